"""--gitignore: what stays behind is what git would not look at."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from clawnet.execution.inputs import pack_path
from clawnet.storage.blobs import BlobStore


def _repository(root: Path) -> Path:
    (root / ".git" / "info").mkdir(parents=True)
    (root / ".git" / "config").write_text("[core]\n")
    return root


def _put(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def _packed(root: Path, tmp_path: Path, *, gitignore: bool = True) -> tuple[list[str], int]:
    """The files that travel, and how many entries stayed behind."""
    blobs = BlobStore(tmp_path / "blobs")
    item = pack_path("x", str(root), blobs, gitignore=gitignore)
    with tarfile.open(blobs.path(item["blob"])) as tar:
        return sorted(member.name for member in tar if not member.isdir()), item["ignored"]


CASES = {
    "plain": ({".gitignore": "*.o\n", "a.o": "", "a.c": "", "sub/b.o": ""}, [".gitignore", "a.c"]),
    "directory": (
        {".gitignore": "build/\n", "build/x": "", "sub/build/y": "", "a/build": ""},
        [".gitignore", "a/build"],
    ),
    "anchored": ({".gitignore": "/build\n", "build/x": "", "sub/build/y": ""}, [".gitignore", "sub/build/y"]),
    "negation": ({".gitignore": "*.log\n!keep.log\n", "a.log": "", "keep.log": ""}, [".gitignore", "keep.log"]),
    "no way back into an ignored directory": (
        {".gitignore": "logs/\n!logs/keep\n", "logs/keep": "", "a": ""},
        [".gitignore", "a"],
    ),
    "its content with one exception": (
        {".gitignore": "logs/*\n!logs/keep\n", "logs/keep": "", "logs/x": ""},
        [".gitignore", "logs/keep"],
    ),
    "nested": (
        {".gitignore": "*.tmp\n", "sub/.gitignore": "!x.tmp\n*.dat\n", "x.tmp": "", "sub/x.tmp": "", "sub/y.tmp": "",
         "sub/a.dat": "", "b.dat": ""},
        [".gitignore", "b.dat", "sub/.gitignore", "sub/x.tmp"],
    ),
    "nested and anchored": (
        {"sub/.gitignore": "/out\n", "out": "", "sub/out": "", "sub/deep/out": ""},
        ["out", "sub/.gitignore", "sub/deep/out"],
    ),
    "two stars": (
        {".gitignore": "**/cache\na/**/b\n", "x/cache/1": "", "a/1/2/b": "", "a/b": "", "c/b": ""},
        [".gitignore", "c/b"],
    ),
    "comments, blanks and escapes": (
        {".gitignore": "# no\n\n\\#yes\n\\!bang\nspace\\ \n", "#yes": "", "!bang": "", "space ": "", "no": ""},
        [".gitignore", "no"],
    ),
    "what is no pattern": ({".gitignore": "\\\n!\n*.o\n", "a.o": "", "b": ""}, [".gitignore", "b"]),
    "no rules": ({"a": "", "b/c": ""}, ["a", "b/c"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_git_ignores_stays_behind(case: str, tmp_path: Path) -> None:
    files, kept = CASES[case]
    root = _put(_repository(tmp_path / "repo"), files)
    assert _packed(root, tmp_path)[0] == sorted(kept)


def test_what_is_excluded_for_this_checkout_alone_stays_behind_too(tmp_path: Path) -> None:
    root = _put(_repository(tmp_path / "repo"), {"secret.env": "", "a": "", "sub/.gitignore": "!secret.env\n"})
    (root / ".git" / "info" / "exclude").write_text("secret.env\n")
    (root / "sub" / "secret.env").write_text("")
    assert _packed(root, tmp_path) == (["a", "sub/.gitignore", "sub/secret.env"], 2)


def test_the_repository_itself_stays_behind_and_is_counted(tmp_path: Path) -> None:
    root = _put(_repository(tmp_path / "repo"), {"a": ""})
    assert _packed(root, tmp_path) == (["a"], 1)
    assert ".git/config" in _packed(root, tmp_path, gitignore=False)[0]


def test_of_a_part_of_a_repository_the_rules_around_it_hold(tmp_path: Path) -> None:
    root = _put(
        _repository(tmp_path / "repo"), {".gitignore": "*.o\n/sub/x\n", "sub/a.o": "", "sub/x": "", "sub/b": ""}
    )
    assert _packed(root / "sub", tmp_path) == (["b"], 2)


def test_an_ignored_directory_that_is_named_for_itself_goes_along(tmp_path: Path) -> None:
    root = _put(_repository(tmp_path / "repo"), {".gitignore": "build/\n", "build/x": "", "build/.gitignore": "y\n"})
    (root / "build" / "y").write_text("")
    assert _packed(root / "build", tmp_path) == ([".gitignore", "x"], 1)


def test_a_repository_within_has_rules_of_its_own(tmp_path: Path) -> None:
    root = _put(_repository(tmp_path / "repo"), {".gitignore": "*.o\n", "a.o": "", "inner/b.o": "", "inner/c.x": ""})
    _put(_repository(root / "inner"), {".gitignore": "*.x\n"})
    assert _packed(root, tmp_path)[0] == [".gitignore", "inner/.gitignore", "inner/b.o"]


def test_the_rules_of_a_linked_checkout_are_found(tmp_path: Path) -> None:
    common = tmp_path / "main" / ".git"
    (common / "info").mkdir(parents=True)
    (common / "info" / "exclude").write_text("local\n")
    (common / "worktrees" / "w").mkdir(parents=True)
    (common / "worktrees" / "w" / "commondir").write_text("../..\n")
    root = _put(tmp_path / "w", {".git": f"gitdir: {common}/worktrees/w\n", "local": "", "a": ""})
    assert _packed(root, tmp_path)[0] == ["a"]


def test_a_link_is_no_rule_file_and_no_directory(tmp_path: Path) -> None:
    root = _put(_repository(tmp_path / "repo"), {"rules": "*\n", "real/x": ""})
    (root / ".gitignore").symlink_to("rules")
    (root / "link").symlink_to("real")
    assert _packed(root, tmp_path)[0] == [".gitignore", "link", "real/x", "rules"]


def test_without_a_repository_the_files_still_hold(tmp_path: Path) -> None:
    root = _put(tmp_path / "plain", {".gitignore": "*.o\n", "a.o": "", "b": ""})
    assert _packed(root, tmp_path) == ([".gitignore", "b"], 1)
