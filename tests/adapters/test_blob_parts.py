"""Blobs half fetched: what was verified is found again, what nobody waits for goes, and a full disk keeps nothing."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from clawnet import limits
from clawnet.errors import NotFoundError, StorageError, StorageFullError
from clawnet.net.fetching import BlobFetcher, Wish
from clawnet.storage import blobs as blobs_module
from clawnet.storage.blobs import BlobStore
from clawnet.storage.partials import BlobPart, SeenPart
from clawnet.wire.blobid import BlobHasher

CHUNK = limits.BLOB_CHUNK_BYTES
TASK, OTHER = b"t" * 16, b"o" * 16
DATA = b"".join(bytes([n]) * CHUNK for n in range(5)) + b"the end"
HASHER = BlobHasher()
HASHER.update(DATA)
BLOB = HASHER.digest()
LEAVES = b"".join(HASHER.leaves)
BOB = "bob"


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return opened(tmp_path)


def opened(tmp_path: Path) -> BlobStore:
    """The store as a start of the node finds it: with the grants of its database."""
    store = BlobStore(tmp_path / "blobs")
    store.grant(TASK, "me", BLOB)
    return store


def files(store: BlobStore) -> list[Path]:
    return sorted(file for file in store.directory.rglob("*") if file.is_file())


def begun(store: BlobStore, chunks: int, source: str = BOB) -> BlobPart:
    """A part of which so many chunks came."""
    part = store.fetching(BLOB, len(DATA), source)
    assert isinstance(part, BlobPart)
    part.begin(LEAVES)
    at = part.verified
    part.write([DATA[at : at + 100], DATA[at + 100 : chunks * CHUNK]])
    return part


def finish(store: BlobStore, part: BlobPart) -> None:
    part.begin(LEAVES)
    part.write([DATA[part.verified :]])
    part.commit()
    part.stop()
    assert store.path(BLOB).read_bytes() == DATA
    assert files(store) == [store.path(BLOB)]
    assert store.total_bytes == len(DATA)


@pytest.mark.parametrize("again", [False, True], ids=["the same process", "after a restart"])
def test_a_stopped_part_goes_on_where_it_was(store: BlobStore, tmp_path: Path, again: bool) -> None:
    begun(store, 3).stop()
    assert not store.has(BLOB)
    store = opened(tmp_path) if again else store
    assert store.total_bytes == 3 * CHUNK
    part = store.fetching(BLOB, len(DATA), BOB)
    assert part.verified == 3 * CHUNK
    assert isinstance(part, BlobPart)
    finish(store, part)


@pytest.mark.parametrize(
    ("damage", "left"),
    [
        (lambda data: data + b"half a chunk that was not verified", 3),
        (lambda data: data[:CHUNK] + b"!" + data[CHUNK + 1 :], 1),
        (lambda data: data[: 2 * CHUNK + 5], 2),
        (lambda data: b"", 0),
    ],
    ids=["more", "changed", "cut", "empty"],
)
def test_what_a_crash_left_is_believed_as_far_as_its_hashes_hold(tmp_path: Path, damage: object, left: int) -> None:
    store = opened(tmp_path)
    part = begun(store, 3)
    path = part._stem.with_suffix(".part")
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    store = opened(tmp_path)
    assert store.total_bytes == path.stat().st_size
    found = store.fetching(BLOB, len(DATA), BOB)
    assert found.verified == left * CHUNK
    assert isinstance(found, BlobPart)
    finish(store, found)


@pytest.mark.parametrize(
    "leaves", [b"", b"x" * 40, bytes(8) + LEAVES, len(DATA).to_bytes(8, "big") + bytes(len(LEAVES))]
)
def test_chunk_hashes_that_are_not_the_blobs_are_worth_nothing(tmp_path: Path, leaves: bytes) -> None:
    store = opened(tmp_path)
    part = begun(store, 3)
    part._stem.with_suffix(".leaves").write_bytes(leaves)
    store = opened(tmp_path)
    found = store.fetching(BLOB, len(DATA), BOB)
    assert found.verified == 0
    assert isinstance(found, BlobPart)
    finish(store, found)


def test_a_part_of_one_source_is_none_of_another(store: BlobStore) -> None:
    begun(store, 3).stop()
    other = store.fetching(BLOB, len(DATA), "eve")
    assert other.verified == 0
    other.stop()


def test_a_part_goes_with_the_last_that_waits_for_its_blob(store: BlobStore) -> None:
    store.grant(OTHER, "me", BLOB)
    begun(store, 3).stop()
    store.revoke(TASK)
    assert store.total_bytes == 3 * CHUNK
    store.revoke(OTHER)
    assert files(store) == []
    assert store.total_bytes == 0


def test_a_fetch_that_nobody_waits_for_any_longer_ends_and_leaves_nothing(store: BlobStore) -> None:
    part = begun(store, 3)
    store.revoke(TASK)
    with pytest.raises(NotFoundError, match="nobody waits"):
        part.write([DATA[3 * CHUNK :]])
    part.stop()
    assert files(store) == []
    assert store.total_bytes == 0


def test_a_blob_that_becomes_whole_when_nobody_waits_any_longer_is_not_kept(store: BlobStore) -> None:
    part = begun(store, 5)
    part.write([DATA[5 * CHUNK :]])
    store.revoke(TASK)
    with pytest.raises(NotFoundError, match="nobody waits"):
        part.commit()
    part.stop()
    assert files(store) == []
    assert store.total_bytes == 0


def test_the_sweep_takes_parts_that_are_old_or_of_no_use(store: BlobStore, tmp_path: Path) -> None:
    begun(store, 3).stop()
    store.sweep_parts(0)
    assert store.total_bytes == 3 * CHUNK
    part = next(file for file in files(store) if file.suffix == ".part")
    os.utime(part, (1_000, 1_000))
    store.sweep_parts(2_000_000)
    assert files(store) == []
    begun(store, 3).stop()
    later = BlobStore(tmp_path / "blobs")
    later.sweep_parts(0)
    assert files(later) == []
    assert later.total_bytes == 0


def test_the_sweep_of_parts_goes_on_after_one_that_it_cannot_delete(store: BlobStore, tmp_path: Path) -> None:
    for n in range(30):
        begun(store, 1, f"peer {n}").stop()
    later = BlobStore(tmp_path / "blobs")
    for name in ("00", "ff"):
        (later.parts.directory / f"{name * 32}-{name * 8}.part").mkdir()
    with pytest.raises(StorageError, match="does not work"):
        later.sweep_parts(0)
    assert files(later) == []
    assert later.total_bytes == 0


def test_the_part_untouched_longest_makes_room(store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BLOB_PARTS_MAX", 2)
    for age, source in ((30, "a"), (20, "b"), (10, "c")):
        part = begun(store, 1, source)
        part.stop()
        if part._stem.with_suffix(".part").exists():
            os.utime(part._stem.with_suffix(".part"), (1_000_000 - age, 1_000_000 - age))
    assert [store.fetching(BLOB, len(DATA), source).verified for source in "cba"] == [CHUNK, CHUNK, 0]


def test_nobodys_part_goes_for_those_that_another_begins(store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BLOB_PARTS_MAX", 4)
    begun(store, 1).stop()
    (mine,) = (file for file in files(store) if file.suffix == ".part")
    os.utime(mine, (1_000, 1_000))
    for n in range(6):
        part = store.parts.open(bytes([n]) * 32, len(DATA), "eve")
        part.begin(LEAVES)
        part.write([DATA[:CHUNK]])
        part.stop()
        os.utime(part._stem.with_suffix(".part"), (2_000 + n, 2_000 + n))
    left = {file.name[:2] for file in files(store) if file.suffix == ".part"}
    assert left == {mine.name[:2], "03", "04", "05"}
    assert store.fetching(BLOB, len(DATA), BOB).verified == CHUNK


def test_no_room_for_what_is_declared_is_told_before_the_first_byte(store: BlobStore) -> None:
    store.bytes_max = len(DATA) - 1
    with pytest.raises(StorageFullError, match="do not fit"):
        store.fetching(BLOB, len(DATA), BOB)
    assert files(store) == []


def test_a_disk_that_does_not_tell_its_room_holds_no_part_for_ever(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(path: object) -> None:
        raise OSError(errno.EIO, "no answer")

    with monkeypatch.context() as patch, pytest.raises(StorageError):
        patch.setattr(shutil, "disk_usage", fails)
        store.fetching(BLOB, len(DATA), BOB)
    part = store.fetching(BLOB, len(DATA), BOB)
    assert isinstance(part, BlobPart)
    finish(store, part)


def test_a_fetch_cancelled_while_its_part_is_opened_can_be_made_again(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, go = threading.Event(), threading.Event()
    open_part = store.parts.open

    def slowly(blob: bytes, size: int, source: str) -> BlobPart:
        began.set()
        assert go.wait(60)
        return open_part(blob, size, source)

    async def body() -> None:
        fetcher = BlobFetcher(store, lambda *words, **more: None, lambda name, by: None)
        wish = Wish(TASK, [(BLOB, len(DATA))], source=BOB)
        unused: Any = None  # nothing is asked before the part is open
        task = asyncio.create_task(fetcher._transfer(unused, wish, wish.blobs))
        assert await asyncio.to_thread(began.wait, 60)
        task.cancel()
        asyncio.get_running_loop().call_soon(go.set)
        with pytest.raises(asyncio.CancelledError):
            await task

    with monkeypatch.context() as patch:
        patch.setattr(store.parts, "open", slowly)
        asyncio.run(body())
    part = store.fetching(BLOB, len(DATA), BOB)
    assert isinstance(part, BlobPart)
    finish(store, part)


def test_a_bound_that_is_reached_on_the_way_keeps_nothing(store: BlobStore) -> None:
    part = begun(store, 3)
    store.bytes_max = 4 * CHUNK
    with pytest.raises(StorageFullError, match="do not fit"):
        part.write([DATA[3 * CHUNK :]])
    part.stop()
    assert files(store) == []
    assert store.total_bytes == 0


def test_a_disk_that_fills_on_the_way_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root on Linux")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs CAP_SYS_ADMIN")
    try:
        monkeypatch.setattr(blobs_module, "FREE_BYTES_MIN", 0)
        monkeypatch.setattr(BlobStore, "check_room", lambda self, size: None)
        store = opened(small)
        part = begun(store, 3)
        with pytest.raises(StorageFullError, match="cannot write"):
            part.write([DATA[3 * CHUNK :]])
        part.stop()
        assert files(store) == []
        assert store.total_bytes == 0
        assert store.has(store.put_bytes(b"fits"))
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_what_is_here_is_compared_and_not_written_until_its_source_has_shown_it(store: BlobStore) -> None:
    store.put_bytes(DATA)
    assert store.came_from(BLOB, len(DATA), "")
    assert not store.came_from(BLOB, len(DATA), BOB)
    assert not store.came_from(BLOB, len(DATA) - 1, "")
    part = store.fetching(BLOB, len(DATA), BOB)
    assert isinstance(part, SeenPart)
    part.begin(LEAVES)
    part.write([DATA])
    part.commit()
    part.stop()
    store.note_source(BLOB, BOB)
    assert store.came_from(BLOB, len(DATA), BOB)
    assert not store.came_from(BLOB, len(DATA), "eve")
    assert files(store) == [store.path(BLOB)]


def test_who_has_sent_a_large_blob_is_known_after_a_restart(
    store: BlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "BLOB_LEAVES_KEPT_FROM", CHUNK)
    monkeypatch.setattr(limits, "BLOB_SOURCES_MAX", 2)
    store.put_bytes(DATA)
    for source in (BOB, "eve", "mallory"):
        store.note_source(BLOB, source)
    later = opened(tmp_path)
    assert [later.came_from(BLOB, len(DATA), source) for source in (BOB, "eve", "mallory")] == [True, True, False]
    later.delete(BLOB)
    assert files(later) == []
    assert not later.came_from(BLOB, len(DATA), BOB)


def test_kept_chunk_hashes_are_used_and_wrong_ones_are_not(store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BLOB_LEAVES_KEPT_FROM", CHUNK)
    store.put_bytes(DATA)
    beside = store.path(BLOB).with_suffix(".leaves")
    assert beside.read_bytes() == LEAVES
    monkeypatch.setattr(store, "read_chunks", lambda blob: pytest.fail("the file is read"))
    assert b"".join(store.leaves(BLOB)) == LEAVES
    monkeypatch.undo()
    monkeypatch.setattr(limits, "BLOB_LEAVES_KEPT_FROM", CHUNK)
    beside.write_bytes(bytes(len(LEAVES)))
    assert b"".join(store.leaves(BLOB)) == LEAVES
    assert beside.read_bytes() == LEAVES


def test_chunk_hashes_of_a_blob_that_is_gone_go_at_the_start(
    store: BlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "BLOB_LEAVES_KEPT_FROM", CHUNK)
    store.put_bytes(DATA)
    store.path(BLOB).unlink()
    assert files(store)
    assert files(opened(tmp_path)) == []


def test_a_large_file_is_out_of_sight_at_once(store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BLOB_UNLINKED_APART_FROM", CHUNK)
    store.put_bytes(DATA)
    store.delete(BLOB)
    assert not store.has(BLOB)
    assert store.total_bytes == 0
    for thread in threading.enumerate():
        if thread.name == "clawnet-unlink":
            thread.join()
    assert files(store) == []


def test_a_blob_that_goes_to_the_disk_on_its_way_is_whole_and_is_gone_on_with(store: BlobStore) -> None:
    data = random.Random(1).randbytes(20 * limits.MIB + 5)
    hasher = BlobHasher()
    hasher.update(data)
    blob, leaves = hasher.digest(), b"".join(hasher.leaves)
    store.grant(TASK, "me", blob)
    for end in (9 * limits.MIB, len(data)):
        part = store.fetching(blob, len(data), BOB)
        part.begin(leaves)
        while part.verified < end:
            part.write([memoryview(data)[part.verified : min(end, part.verified + 3 * CHUNK)]])
        if end < len(data):
            part.stop()
    part.commit()
    assert b"".join(store.read_chunks(blob)) == data
