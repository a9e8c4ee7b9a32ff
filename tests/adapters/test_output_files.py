"""Output files: what is found where a command ran, what is refused where they arrive, how they get into a directory."""

from __future__ import annotations

import hashlib
import io
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clawnet import limits
from clawnet.errors import (
    ClawnetError,
    DataError,
    NotFoundError,
    NotPermittedError,
    StorageError,
    StorageFullError,
    VerificationError,
)
from clawnet.execution import beneath, bundle, saving
from clawnet.execution.bundle import Head, Outputs
from clawnet.execution.outputs import OverLimit, collect, listing
from clawnet.execution.saving import PREFIX, Saver
from clawnet.paths import Home
from clawnet.storage.blobs import BlobStore
from tests.adapters.hostile_trees import TRICKS, file, link, tree

MANY = 2**40
DIST = ("dist/*",)


def _work(root: Path) -> Path:
    (root / "dist" / "sub" / "deep").mkdir(parents=True)
    (root / "dist" / "empty").mkdir()
    (root / "dist" / "a.txt").write_text("alpha")
    (root / "dist" / "tool").write_text("#!/bin/sh\n")
    (root / "dist" / "tool").chmod(0o750)
    (root / "dist" / ".hidden").write_text("hidden")
    (root / "dist" / "sub" / ".inner").write_text("inner")
    (root / "dist" / "sub" / "deep" / ("long" * 40)).write_bytes(os.urandom(300_000))
    (root / "dist" / "latest").symlink_to("sub/deep")
    (root / "other.txt").write_text("other")
    return root


def _names(work: Path, *patterns: str) -> list[str]:
    return [member.name for member in collect(work, patterns, bytes_max=MANY).members]


# --- at the executor


def test_what_a_pattern_matches_is_taken_directories_whole(tmp_path: Path) -> None:
    work = _work(tmp_path / "work")
    assert _names(work, "dist/*") == [
        *("dist", "dist/a.txt", "dist/empty", "dist/latest", "dist/sub", "dist/sub/.inner", "dist/sub/deep"),
        *("dist/sub/deep/" + "long" * 40, "dist/tool"),
    ]
    assert _names(work, "*.txt") == ["other.txt"]
    assert _names(work, "**/*.txt") == ["dist", "dist/a.txt", "other.txt"]
    assert ".hidden" in "".join(_names(work, "."))
    patterns = ["dist", "*.txt", "nothing/*", "dist/none", "dist/sub/**", "dist/a.txt"]
    found = collect(work, patterns, bytes_max=MANY)
    told = listing(io.BytesIO(b"".join(found.parts())), patterns, bytes_max=MANY)
    assert told.missing == ["nothing/*", "dist/none"]


def test_what_is_found_is_what_arrives(tmp_path: Path) -> None:
    work = _work(tmp_path / "work")
    found = collect(work, DIST, bytes_max=MANY)
    data = b"".join(found.parts())
    assert len(data) == found.size
    told = listing(io.BytesIO(data), DIST, bytes_max=MANY)
    assert told.count == 4
    assert told.bytes == sum(one["bytes"] for one in told.files)
    by_name = {one["name"]: one["sha256"] for one in told.files}
    assert by_name["dist/a.txt"] == hashlib.sha256(b"alpha").hexdigest()


def test_what_cannot_travel_is_left_out_with_its_reason(tmp_path: Path) -> None:
    work = tmp_path / "work"
    (work / "dist" / "A").mkdir(parents=True)
    (work / "dist" / "passwd").symlink_to("/etc/passwd")
    (work / "dist" / "up").symlink_to("../../secret")
    os.mkfifo(work / "dist" / "fifo")
    (work / "dist" / "aux.js").write_text("x")
    (work / "dist" / "new\nline").write_text("x")
    (work / "dist" / os.fsdecode(b"bad\xff")).write_text("x")
    (work / "dist" / "a").write_text("x")
    (work / "dist" / "good").write_text("x")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(work / "dist" / "socket"))
        found = collect(work, DIST, bytes_max=MANY)
    assert [member.name for member in found.members] == ["dist", "dist/A", "dist/good"]
    assert found.left_out_count == len(found.left_out) == 8
    text = "\n".join(found.left_out)
    for words in ("passwd is a link that leads out", "fifo is no file", "aux.js is a name that Windows", "a would be"):
        assert words in text
    listing(io.BytesIO(b"".join(found.parts())), DIST, bytes_max=MANY)


def test_no_link_is_followed_to_look_for_files(tmp_path: Path) -> None:
    work = tmp_path / "work"
    work.mkdir()
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "key").write_text("secret")
    (work / "dist").symlink_to(tmp_path / "secrets")
    (work / "loop").symlink_to(".")
    found = collect(work, ["dist/*", "**/key", "loop/loop/*"], bytes_max=MANY)
    assert found.members == []
    assert b"".join(found.parts()) == b""


def test_files_of_somebody_else_are_not_read(tmp_path: Path) -> None:
    work = _work(tmp_path / "work")
    found = collect(work, DIST, bytes_max=MANY, owner=os.getuid() + 1)
    assert not [member for member in found.members if member.kind == "file"]
    assert "dist/a.txt is no file of the task's own" in found.left_out


def test_more_than_may_be_delivered_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = _work(tmp_path / "work")
    with (work / "dist" / "sparse").open("wb") as huge:
        huge.truncate(2**40)
    with pytest.raises(OverLimit, match="bytes"):
        collect(work, DIST, bytes_max=2**30)
    monkeypatch.setattr(limits, "TREE_FILES_MAX", 3)
    with pytest.raises(OverLimit, match="3 files"):
        collect(work, DIST, bytes_max=2**50)
    monkeypatch.setattr(limits, "OUTPUTS_LOOKED_THROUGH_MAX", 2)
    with pytest.raises(OverLimit, match="more than 2"):
        collect(work, ["**/x"], bytes_max=2**50)
    monkeypatch.setattr(limits, "OUTPUTS_LOOKED_THROUGH_MAX", 1_000)
    monkeypatch.setattr(limits, "OUTPUTS_COMPARED_MAX", 100)
    with pytest.raises(OverLimit, match="patterns"):
        collect(work, [f"**/x{n}" for n in range(limits.OUTPUT_GLOBS_MAX)], bytes_max=2**50)


def test_a_file_that_changes_after_it_was_found_is_no_output(tmp_path: Path) -> None:
    work = _work(tmp_path / "work")
    found = collect(work, DIST, bytes_max=MANY)
    (work / "dist" / "a.txt").write_text("longer than before")
    with pytest.raises(DataError, match="changed"):
        b"".join(found.parts())
    (work / "dist" / "a.txt").unlink()
    (work / "dist" / "a.txt").symlink_to("/etc/passwd")
    with pytest.raises(OSError):
        b"".join(found.parts())


# --- at the requester


@pytest.mark.parametrize("trick", TRICKS)
def test_a_result_with_a_trick_in_its_files_does_not_open(trick: str, tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path / "blobs")
    data = TRICKS[trick]
    there = bundle.Bundle(0, None, b"out", b"", outputs=Outputs(), files=data)
    plain = bundle.encode(there)
    if trick == "empty":
        assert not bundle.unpack((plain,), None, blobs, outputs=DIST).outputs_blob
        return
    with pytest.raises(VerificationError, match="does not open"):
        bundle.unpack((plain,), None, blobs, outputs=DIST)


def test_a_good_result_opens_with_its_files(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path / "blobs")
    data = tree(file("dist/x", b"one"), link("dist/l", "x"), file("dist/sub/y", b"twelve"))
    outputs = Outputs(left_out=["dist/fifo is no file"], left_out_count=1)
    found = bundle.unpack(
        (bundle.encode(bundle.Bundle(0, None, outputs=outputs, files=data)),), None, blobs, outputs=(*DIST, "other/*")
    )
    assert [one["name"] for one in found.outputs] == ["dist/x", "dist/sub/y"]
    assert (found.outputs_count, found.outputs_bytes, found.outputs_missing) == (2, 9, ["other/*"])
    assert blobs.path(found.outputs_blob).read_bytes() == data


def test_files_that_nobody_asked_for_or_too_many_do_not_open(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path / "blobs")
    plain = bundle.encode(bundle.Bundle(0, None, files=tree(file("dist/x", bytes(10_000)))))
    with pytest.raises(VerificationError, match="none is due"):
        bundle.unpack((plain,), None, blobs)
    with pytest.raises(VerificationError, match="too many"):
        bundle.unpack((plain,), None, blobs, outputs=DIST, outputs_bytes_max=10_000)
    short = bundle.encode_head(Head(0, None, 0, 0, outputs=Outputs(bytes=2_000))) + bytes(1_000)
    with pytest.raises(VerificationError, match="cut short"):
        bundle.unpack((short,), None, blobs, outputs=DIST)


def test_a_list_is_bounded_and_says_how_many_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "OUTPUTS_LISTED_MAX", 3)
    told = listing(io.BytesIO(tree(*(file(f"dist/{n}") for n in range(10)))), DIST, bytes_max=MANY)
    assert (len(told.files), told.count, told.bytes) == (3, 10, 60)


@given(st.binary(max_size=3_000))
def test_garbage_is_no_set_of_outputs(data: bytes) -> None:
    with pytest.raises(DataError):
        listing(io.BytesIO(data), DIST, bytes_max=MANY)


@given(st.integers(0, 1_535), st.integers(0, 255))
def test_one_changed_byte_in_a_header_is_no_way_out(place: int, value: int) -> None:
    data = bytearray(tree(file("dist/x", b"x" * 500)))
    data[place] = value
    try:
        told = listing(io.BytesIO(bytes(data)), DIST, bytes_max=MANY)
    except DataError:
        return
    assert [one["name"] for one in told.files] == ["dist/x"]


# --- into a directory


class _Bench:
    """A node's home, its blobs, and a directory of the user's."""

    def __init__(self, root: Path) -> None:
        self.home = Home(root / "home")
        self.home.dir.mkdir(mode=0o700)
        self.blobs = BlobStore(root / "blobs")
        self.target = root / "target"
        self.target.mkdir()
        self.saver = Saver(self.home, os.urandom)

    def save(self, data: bytes, directory: Path | None = None, umask: int = 0o022, **more: Any) -> saving.Saved:
        blob = self.blobs.put_bytes(data)
        where = str(directory or self.target)
        return self.saver.save(self.blobs.path(blob), blob, more.pop("patterns", DIST), where, umask, **more)

    def left(self) -> list[str]:
        """What is beside the files, and what the node still notes."""
        notes = self.home.data_dir / "saving"
        return [path.name for path in self.target.rglob(PREFIX + "*")] + [
            path.name for path in (notes.iterdir() if notes.exists() else ())
        ]

    def all(self) -> dict[str, str]:
        found = {}
        for path in sorted(self.target.rglob("*")):
            name = str(path.relative_to(self.target))
            if path.is_symlink():
                found[name] = "-> " + os.readlink(path)
            elif path.is_file():
                found[name] = path.read_text()
        return found


@pytest.fixture
def bench(tmp_path: Path) -> _Bench:
    return _Bench(tmp_path)


GOOD = tree(
    file("dist/a", b"new a"),
    file("dist/tool", b"#!/bin/sh\n", executable=True),
    link("dist/l", "a"),
    file("dist/sub/b", b"new b"),
)


def test_files_get_into_their_places_with_the_callers_umask(bench: _Bench) -> None:
    directory = bench.target / "not" / "yet"
    saved = bench.save(GOOD, directory, umask=0o027)
    assert (saved.files, saved.bytes) == (3, 20)
    modes = {name: stat.S_IMODE((directory / name).lstat().st_mode) for name in ("dist", "dist/a", "dist/tool")}
    assert modes == {"dist": 0o750, "dist/a": 0o640, "dist/tool": 0o750}
    assert stat.S_IMODE(directory.stat().st_mode) == stat.S_IMODE(directory.parent.stat().st_mode) == 0o750
    assert os.readlink(directory / "dist" / "l") == "a"
    assert bench.left() == []


def test_what_is_there_is_replaced_and_the_rest_stays(bench: _Bench) -> None:
    (bench.target / "dist" / "sub").mkdir(parents=True)
    (bench.target / "dist" / "a").write_text("old a")
    (bench.target / "dist" / "a").chmod(0o400)
    (bench.target / "dist" / "mine").write_text("mine")
    outside = bench.target.parent / "outside"
    outside.write_text("outside")
    (bench.target / "dist" / "sub" / "b").symlink_to(outside)
    bench.save(GOOD)
    assert bench.all() == {
        "dist/a": "new a",
        "dist/l": "-> a",
        "dist/mine": "mine",
        "dist/sub/b": "new b",
        "dist/tool": "#!/bin/sh\n",
    }
    assert outside.read_text() == "outside", "a link is replaced, never written through"
    assert bench.left() == []


def _a_link_for_a_directory(target: Path, outside: Path) -> None:
    (target / "dist").symlink_to(outside)


def _a_link_deeper(target: Path, outside: Path) -> None:
    (target / "dist").mkdir()
    (target / "dist" / "sub").symlink_to(outside)


def _a_file_for_a_directory(target: Path, outside: Path) -> None:
    (target / "dist").write_text("a file")


def _a_directory_for_a_file(target: Path, outside: Path) -> None:
    (target / "dist" / "tool").mkdir(parents=True)


@pytest.mark.parametrize(
    "prepare", [_a_link_for_a_directory, _a_link_deeper, _a_file_for_a_directory, _a_directory_for_a_file]
)
def test_what_stands_in_the_way_keeps_all_from_being_written(
    bench: _Bench, prepare: Callable[[Path, Path], None]
) -> None:
    outside = bench.target.parent / "outside"
    outside.mkdir()
    prepare(bench.target, outside)
    before = bench.all()
    with pytest.raises(DataError) as refused:
        bench.save(GOOD)
    assert "move it away" in refused.value.hint
    assert (bench.all(), list(outside.iterdir()), bench.left()) == (before, [], [])


def test_the_directory_itself_may_be_reached_through_a_link(bench: _Bench) -> None:
    (bench.target.parent / "way").symlink_to(bench.target)
    bench.save(GOOD, bench.target.parent / "way")
    assert bench.all()["dist/a"] == "new a"


def test_the_own_home_is_no_place_for_output_files(bench: _Bench, tmp_path: Path) -> None:
    (tmp_path / "way").symlink_to(bench.home.dir)
    for directory in (bench.home.dir, bench.home.dir / "keys", tmp_path / "way", tmp_path / "way" / "new"):
        with pytest.raises(NotPermittedError, match="home"):
            bench.save(GOOD, directory)
    inside = tree(file("home/config.yaml"))
    with pytest.raises(NotPermittedError, match="home"):
        bench.save(inside, tmp_path, patterns=("home",))
    assert sorted(path.name for path in bench.home.dir.iterdir()) == ["saving"]


def test_directories_that_cannot_be_used_are_refused(bench: _Bench, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for name in ("relative", str(tmp_path / "file"), str(tmp_path / "file" / "below")):
        with pytest.raises(DataError):
            bench.save(GOOD, Path(name))
    assert (tmp_path / "file").read_text() == "x"
    if os.getuid() != 0:
        bench.target.chmod(0o500)
        with pytest.raises(NotPermittedError):
            bench.save(GOOD)


def test_files_that_are_no_longer_kept_or_damaged_are_told(bench: _Bench) -> None:
    blob = bench.blobs.put_bytes(GOOD)
    path = bench.blobs.path(blob)
    data = bytearray(path.read_bytes())
    data[512] ^= 1
    path.write_bytes(data)
    with pytest.raises(StorageError, match="damaged"):
        bench.saver.save(path, blob, DIST, str(bench.target), 0o022)
    path.unlink()
    with pytest.raises(NotFoundError, match="no longer"):
        bench.saver.save(path, blob, DIST, str(bench.target / "new"), 0o022)
    assert (bench.all(), bench.left(), (bench.target / "new").exists()) == ({}, [], False)


@pytest.mark.parametrize("when", range(5))
def test_a_failure_half_way_leaves_the_old_files(bench: _Bench, monkeypatch: pytest.MonkeyPatch, when: int) -> None:
    (bench.target / "dist").mkdir()
    (bench.target / "dist" / "a").write_text("old a")
    (bench.target / "dist" / "tool").write_text("old tool")
    before = bench.all()
    real, calls = beneath.move, 0

    def move(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == when + 1 and when < 4:
            raise OSError(28, "No space left on device")
        real(*arguments)

    monkeypatch.setattr(saving, "move", move)
    if when == 4:
        bench.save(GOOD)
        assert calls == 4
        return
    with pytest.raises(StorageFullError, match="do not fit"):
        bench.save(GOOD)
    assert (bench.all(), bench.left()) == (before, [])
    assert not (bench.target / "dist" / "sub").exists()


def test_without_second_names_a_failure_leaves_the_old_files_too(
    bench: _Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    (bench.target / "dist" / "sub").mkdir(parents=True)
    (bench.target / "dist" / "a").write_text("old a")
    (bench.target / "dist" / "sub" / "b").write_text("old b")
    before = bench.all()
    monkeypatch.setattr(saving, "second_name", lambda *arguments: False)
    real = beneath.move

    def move(source: Any, name: str, target: Any, as_name: str) -> None:
        if as_name == "tool":
            raise OSError(5, "Input/output error")
        real(source, name, target, as_name)

    monkeypatch.setattr(saving, "move", move)
    with pytest.raises(ClawnetError):
        bench.save(GOOD)
    assert (bench.all(), bench.left()) == (before, [])


class _Died(BaseException):
    """SIGKILL: nothing after it is done, not even cleaning up."""


def _die_at(bench: _Bench, monkeypatch: pytest.MonkeyPatch, name: str, call: int) -> None:
    """Saves until the `call`th call of a function, where the process is no more."""
    real, calls = getattr(saving, name), 0

    def dies(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise _Died
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(saving, name, dies)
        patch.setattr(saving, "remove_tree", lambda path: None)
        patch.setattr(Path, "unlink", lambda path, missing_ok=False: None)
        with pytest.raises(_Died):
            bench.save(GOOD)


def test_after_a_crash_while_files_were_staged_nothing_is_left(bench: _Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    _die_at(bench, monkeypatch, "_write", 2)
    assert bench.left()
    Saver(bench.home, os.urandom).recover()
    assert (bench.all(), bench.left()) == ({}, [])


def test_after_a_crash_while_files_were_moved_all_are_in_place(bench: _Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    (bench.target / "dist").mkdir()
    (bench.target / "dist" / "tool").write_text("old tool")
    _die_at(bench, monkeypatch, "move", 2)
    assert bench.left()
    Saver(bench.home, os.urandom).recover()
    assert bench.all() == {"dist/a": "new a", "dist/l": "-> a", "dist/sub/b": "new b", "dist/tool": "#!/bin/sh\n"}
    assert bench.left() == []


def test_the_next_save_removes_what_a_crash_left_and_nobody_noted(bench: _Bench) -> None:
    stale = bench.target / f"{PREFIX}{bench.home.digest}-0011223344556677"
    (stale / "new").mkdir(parents=True)
    other = bench.target / f"{PREFIX}another-0011223344556677"
    other.mkdir()
    bench.save(GOOD)
    assert not stale.exists()
    assert other.exists(), "what another node is at is its own"


def test_a_note_that_lies_removes_nothing(bench: _Bench, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    notes = bench.home.data_dir / "saving"
    notes.mkdir()
    (notes / "1").write_text(f'{{"staging": "{precious}", "umask": 0, "moving": false}}')
    (notes / "2").write_text("no JSON")
    bench.saver.recover()
    assert precious.exists()
    assert list(notes.iterdir()) == []
