"""Inputs: what is packed, what is left out, what is refused, and archives that a liar might send."""

from __future__ import annotations

import io
import json
import os
import socket
import tarfile
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clawnet import limits
from clawnet.errors import ClawnetError, DataError, NotFoundError, NotPermittedError
from clawnet.execution.inputs import check_name, pack_path, place_inputs
from clawnet.execution.spec import InputRef
from clawnet.execution.trees import stays_inside, unpack_tree
from clawnet.storage.blobs import BlobStore


@pytest.mark.parametrize("name", ["a", "data.csv", ".env", "a b", "ü", "x" * 255, "日本", "a..b", "con1"])
def test_names_that_mean_the_same_everywhere_pass(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "a/b", "/a", "a\\b", "C:", "a\0", "a\n", "-rf", "a.", "a ", "NUL", "con.txt"),
        *("x" * 256, "u\u0308", "a*", "a\x7f", "a\udc80"),
    ],
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(DataError):
        check_name(name)


def _project(root: Path) -> Path:
    (root / "sub" / "deep").mkdir(parents=True)
    (root / "empty").mkdir()
    (root / "a.txt").write_text("alpha")
    (root / "sub" / "run").write_text("#!/bin/sh\n")
    (root / "sub" / "run").chmod(0o750)
    (root / "sub" / "deep" / ("long" * 40)).write_bytes(os.urandom(300_000))
    (root / "sub" / "link").symlink_to("../a.txt")
    (root / "sub" / "dirlink").symlink_to("deep")
    return root


def _place(store: BlobStore, target: Path, *items: dict[str, object], cwd: str = "") -> None:
    target.mkdir()
    place_inputs([InputRef.of(item) for item in items], cwd, target, store, None)


def test_a_tree_comes_back_as_it_was(tmp_path: Path) -> None:
    store, root = BlobStore(tmp_path / "blobs"), _project(tmp_path / "project")
    item = pack_path("project", str(root), store)
    assert (item["kind"], item["left_out"]) == ("tree", [])
    _place(store, tmp_path / "out", item, cwd="project")
    out = tmp_path / "out"
    for path in sorted(root.rglob("*")):
        other = out / path.relative_to(root)
        assert other.is_symlink() == path.is_symlink()
        assert other.is_dir() == path.is_dir()
        if path.is_file():
            assert other.read_bytes() == path.read_bytes()
            assert bool(other.stat().st_mode & 0o111) == bool(path.stat().st_mode & 0o111)
    assert len(list(out.rglob("*"))) == len(list(root.rglob("*")))


def test_the_same_content_is_the_same_blob(tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "blobs")
    first, second = _project(tmp_path / "one"), tmp_path / "two"
    second.mkdir()
    for path in sorted(first.rglob("*"), reverse=True):  # made in another order, with other times
        other = second / path.relative_to(first)
        other.parent.mkdir(parents=True, exist_ok=True)
        if path.is_symlink():
            other.symlink_to(path.readlink())
        elif path.is_dir():
            other.mkdir(exist_ok=True)
        else:
            other.write_bytes(path.read_bytes())
            other.chmod(0o711 if path.stat().st_mode & 0o111 else 0o600)
            os.utime(other, (1, 1))
    assert pack_path("x", str(first), store)["blob"] == pack_path("x", str(second), store)["blob"]
    (second / "a.txt").write_text("alphb")
    assert pack_path("x", str(first), store)["blob"] != pack_path("x", str(second), store)["blob"]


def test_what_cannot_travel_is_left_out_and_named(tmp_path: Path) -> None:
    store, root = BlobStore(tmp_path / "blobs"), _project(tmp_path / "project")
    (root / "outside").symlink_to("../secret")
    (root / "absolute").symlink_to("/etc/passwd")
    (root / "roundabout").symlink_to("sub/../../secret")
    os.mkfifo(root / "fifo")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(root / "socket"))
        item = pack_path("project", str(root), store)
    assert sorted(item["left_out"]) == ["absolute", "fifo", "outside", "roundabout", "socket"]
    _place(store, tmp_path / "out", item)
    assert not list((tmp_path / "out" / "project").glob("*o*s*e*"))


def test_a_name_that_is_no_utf_8_is_left_out_and_told_in_text_that_can_be_stored(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / os.fsdecode(b"bad\xff")).write_text("x")
    item = pack_path("tree", str(tree), BlobStore(tmp_path / "blobs"))
    assert item["left_out"] == ["bad\\udcff"]
    assert json.loads(msgspec.json.encode(item["left_out"])) == item["left_out"]


def test_files_keep_their_bytes_and_their_executable_bit(tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "blobs")
    (tmp_path / "tool").write_bytes(b"\0\1\2")
    (tmp_path / "tool").chmod(0o700)
    item = pack_path("my tool", str(tmp_path / "tool"), store)
    assert (item["kind"], item["bytes"], item["mode"]) == ("file", 3, 0o755)
    _place(store, tmp_path / "out", item)
    placed = tmp_path / "out" / "my tool"
    assert (placed.read_bytes(), placed.stat().st_mode & 0o777) == (b"\0\1\2", 0o755)


def test_the_own_home_never_travels(tmp_path: Path) -> None:
    store, home = BlobStore(tmp_path / "blobs"), tmp_path / "user" / ".clawnet"
    (home / "keys").mkdir(parents=True)
    (home / "keys" / "node.key").write_text("secret")
    (tmp_path / "user" / "file").write_text("x")
    (tmp_path / "sneaky").symlink_to(home / "keys")
    for path in (home, home / "keys" / "node.key", tmp_path / "sneaky"):
        with pytest.raises(NotPermittedError):
            pack_path("x", str(path), store, private=(home,))
    item = pack_path("x", str(tmp_path / "user"), store, private=(home,))
    assert item["left_out"] == [".clawnet"]
    assert b"secret" not in store.path(item["blob"]).read_bytes()


def test_what_is_not_there_or_too_big_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = BlobStore(tmp_path / "blobs")
    with pytest.raises(NotFoundError, match="nothing"):
        pack_path("x", str(tmp_path / "nothing"), store)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(DataError, match="neither"):
        pack_path("x", str(tmp_path / "fifo"), store)
    monkeypatch.setattr(limits, "INPUT_BYTES_MAX", 1_000_000)
    (tmp_path / "dir").mkdir()
    for number in range(3):
        (tmp_path / "dir" / str(number)).write_bytes(bytes(400_000))
    with pytest.raises(DataError, match="larger"):
        pack_path("x", str(tmp_path / "dir"), store)
    (tmp_path / "big").write_bytes(bytes(1_000_001))
    with pytest.raises(DataError, match="larger"):
        pack_path("x", str(tmp_path / "big"), store)
    monkeypatch.setattr(limits, "TREE_FILES_MAX", 2)
    (tmp_path / "many").mkdir()
    for number in range(3):
        (tmp_path / "many" / str(number)).touch()
    with pytest.raises(DataError, match="more than 2"):
        pack_path("x", str(tmp_path / "many"), store)
    assert not [path for path in store.directory.rglob("*") if path.is_file()], "nothing half-written stays"
    assert store.total_bytes == 0


def _member(
    name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", link: str = ""
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, len(data), link
    return info, data


def _tar(*members: tuple[tarfile.TarInfo, bytes]) -> io.BytesIO:
    buffer = io.BytesIO()
    with tarfile.open(mode="w", fileobj=buffer) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    buffer.seek(0)
    return buffer


@pytest.mark.parametrize(
    "members",
    [
        [_member("../x", data=b"1")],
        [_member("/x", data=b"1")],
        [_member("a/../../x", data=b"1")],
        [_member("a//b", data=b"1")],
        [_member("./x", data=b"1")],
        [_member("l", tarfile.SYMTYPE, link="/etc")],
        [_member("l", tarfile.SYMTYPE, link="..")],
        [_member("l", tarfile.SYMTYPE, link="a/../../b")],
        [_member("l", tarfile.SYMTYPE, link=".."), _member("l/x", data=b"1")],
        [_member("l", tarfile.SYMTYPE, link="d"), _member("l/x", data=b"1")],
        [
            _member("y", tarfile.DIRTYPE),
            _member("x", tarfile.SYMTYPE, link="."),
            _member("x/z", tarfile.SYMTYPE, link="y"),
        ],
        [
            _member("y", tarfile.DIRTYPE),
            _member("x", tarfile.SYMTYPE, link="."),
            _member("x/x/y/z", tarfile.SYMTYPE, link="../../.."),
            _member("y/z/planted", tarfile.SYMTYPE, link="deep"),
        ],
        [_member("h", tarfile.LNKTYPE, link="/etc/passwd")],
        [_member("d", tarfile.CHRTYPE)],
        [_member("f", tarfile.FIFOTYPE)],
        [_member("x", data=b"1"), _member("x", data=b"2")],
        [_member("d", tarfile.DIRTYPE), _member("d", data=b"2")],
        [_member("x", data=b"1"), _member("x/y", data=b"2")],
        [_member("no/parent", data=b"2")],
        [_member("x" * 300, data=b"2")],
    ],
)
def test_archives_that_lie_are_refused_and_touch_nothing_outside(
    members: list[tuple[tarfile.TarInfo, bytes]], tmp_path: Path
) -> None:
    inside = tmp_path / "deep" / "inside"
    inside.mkdir(parents=True)
    with pytest.raises(DataError):
        unpack_tree(_tar(*members), inside)
    assert sorted(path.name for path in tmp_path.rglob("*") if inside not in path.parents) == ["deep", "inside"]


def test_an_archive_that_is_too_big_is_refused_before_it_fills_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "INPUT_BYTES_MAX", 1_000)
    with pytest.raises(DataError, match="larger"):
        unpack_tree(_tar(_member("a", data=bytes(600)), _member("b", data=bytes(600))), tmp_path)
    assert not (tmp_path / "b").exists()


@given(st.binary(max_size=2_000))
def test_garbage_is_no_archive(data: bytes) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        try:
            unpack_tree(io.BytesIO(data), Path(directory))
        except ClawnetError as error:
            assert isinstance(error, DataError)


def test_inputs_that_clash_are_refused(tmp_path: Path) -> None:
    store, root = BlobStore(tmp_path / "blobs"), _project(tmp_path / "project")
    tree, file = pack_path("p", str(root), store), pack_path("a.txt", str(root / "a.txt"), store)
    with pytest.raises(DataError, match="overwrite"):
        _place(store, tmp_path / "1", file, tree, cwd="p")
    with pytest.raises(DataError, match="same name"):
        _place(store, tmp_path / "2", file, {**file, "name": "A.TXT"})
    with pytest.raises(DataError, match="no directory"):
        _place(store, tmp_path / "3", file, cwd="a.txt")
    with pytest.raises(DataError, match="shorter"):
        _place(store, tmp_path / "4", {**file, "bytes": 6})
    with pytest.raises(DataError):
        _place(store, tmp_path / "5", {**file, "kind": "device"})


@pytest.mark.parametrize(
    ("relative", "target", "inside"),
    [
        ("a", "b", True),
        ("a/b", "../c", True),
        ("a/b", "../../c", False),
        ("a", "..", False),
        ("a", "", False),
        ("a", "/b", False),
        ("a/b/c", "../../d/e", True),
        ("a/b", "c/../../../d", False),
        ("a", "b/../c", False),
        ("a", "./b", True),
    ],
)
def test_links_are_judged_by_their_text(relative: str, target: str, inside: bool) -> None:
    assert stays_inside(relative, target) is inside
