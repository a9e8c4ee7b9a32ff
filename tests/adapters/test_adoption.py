"""Another mesh's membership taking its place in a home: all of it or nothing, whatever fails or ends in between."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from clawnet import adoption, handover, paths
from clawnet.errors import ConfigError, StorageFullError
from clawnet.home import is_ready
from clawnet.identity import membership
from clawnet.identity.membership import LocalMembership, create_home, load_membership
from clawnet.paths import Home
from clawnet.storage.store import Store
from tests.conftest import NOW_MS, counted_entropy

NEW_KEY = b"n" * 32


class Killed(BaseException):
    """The process ends."""


@pytest.fixture
def home(fresh_home: Home) -> Home:
    Store.open(fresh_home.database).close()
    membership.keep_mesh_key(fresh_home, 1, b"1" * 32, {0: b"0" * 32})
    return fresh_home


@pytest.fixture
def other(tmp_path: Path) -> LocalMembership:
    """The membership of the mesh that is joined; the owner's key stays."""
    made = create_home(Home(tmp_path / "other"), "bob", counted_entropy("bob"), NOW_MS).membership
    return LocalMembership(charter=made.charter, certificates=made.certificates, founded=False, ring="member")


def files(home: Home) -> dict[str, bytes]:
    """What lies in a home, by its name; empty directories do not count."""
    found = {path.relative_to(home.dir).as_posix(): path for path in home.dir.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not name.endswith("-shm")}


def has_moved(home: Home, other: LocalMembership, before: dict[str, bytes]) -> None:
    """The home is of the new mesh, and all that it was lies in the archive."""
    assert load_membership(home) == other
    assert membership.load_mesh_key(home) == NEW_KEY
    archived = {path.name: path.read_bytes() for path in home.archive_dir.rglob("*") if path.is_file()}
    left = {"mesh.json": "mesh.json", "mesh.key": "keys/mesh.key", "mesh-0.key": "keys/mesh-0.key"}
    assert {name: archived[name] for name in left} == {name: before[place] for name, place in left.items()}
    assert "clawnet.db" in archived and not home.database.exists()
    assert not adoption.half_done(home)


def failing_at(monkeypatch: pytest.MonkeyPatch, count: int, error: BaseException, *names: str) -> None:
    """The step with this number fails: a rename, or the sync of a directory."""
    steps = 0

    def step(real: Any) -> Any:
        def work(*args: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps == count:
                raise error
            return real(*args)

        return work

    monkeypatch.setattr(os, "replace", step(os.replace))
    monkeypatch.setattr(paths, "sync_directory", step(paths.sync_directory))


def test_a_home_joins_another_mesh(home: Home, other: LocalMembership) -> None:
    before = files(home)
    adoption.write_aside(home, other, NEW_KEY)
    assert {name: data for name, data in files(home).items() if not name.startswith("join.")} == before
    adoption.settle_in(home)
    has_moved(home, other, before)
    assert files(home)["keys/owner.key"] == before["keys/owner.key"]


def test_what_cannot_be_written_is_found_before_anything_has_changed(
    home: Home, other: LocalMembership, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(home)

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageFullError) as caught:
            adoption.write_aside(home, other, NEW_KEY)
    assert str(home.dir) in caught.value.message and "join again" in caught.value.hint
    assert files(home) == before


@pytest.mark.parametrize("count", range(1, 12))
def test_a_failure_leaves_the_home_as_it_was(
    home: Home, other: LocalMembership, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    before = files(home)
    adoption.write_aside(home, other, NEW_KEY)
    with monkeypatch.context() as patch:
        failing_at(patch, count, OSError(errno.EIO, "Input/output error"))
        with pytest.raises(ConfigError) as caught:
            adoption.settle_in(home)
    assert "Input/output error" in caught.value.message and "stays in its mesh" in caught.value.hint
    assert files(home) == before
    assert not handover.settle(home)
    assert files(home) == before


def test_no_room_in_an_archive_on_another_file_system_leaves_the_home_as_it_was(
    home: Home, other: LocalMembership, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(home)
    adoption.write_aside(home, other, NEW_KEY)
    real_replace, real_write = os.replace, paths.write_private

    def replace(source: Path, target: Path) -> None:
        if Path(source).name == "mesh.key" and "archive" in str(target):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        if Path(source).name == "mesh.json" and "archive" in str(source):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        real_replace(source, target)

    def write(path: Path, data: bytes) -> None:
        if "archive" in str(path):
            raise StorageFullError("cannot write", hint="make room")
        real_write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        patch.setattr(paths, "write_private", write)
        with pytest.raises(StorageFullError):
            adoption.settle_in(home)
    assert files(home) == before


@pytest.mark.parametrize("count", range(1, 12))
def test_a_join_that_was_cut_short_is_finished_by_the_next_start(
    home: Home, other: LocalMembership, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    before = files(home)
    adoption.write_aside(home, other, NEW_KEY)
    with monkeypatch.context() as patch:
        failing_at(patch, count, Killed())
        with pytest.raises(Killed):
            adoption.settle_in(home)
    counts = not (home.dir / "join.draft").exists()
    assert counts == (count > 1)
    assert is_ready(home), "a start must not found another mesh in it"
    assert not handover.settle(home)
    if counts:
        has_moved(home, other, before)
    else:
        assert {name: data for name, data in files(home).items() if name != "run/daemon.lock"} == before
