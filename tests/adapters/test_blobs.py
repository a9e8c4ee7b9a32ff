"""The blob directory: whole or not there, who may fetch, what is swept, what a full disk and a crash leave."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from clawnet import limits
from clawnet.errors import DataError, NotFoundError, StorageError, StorageFullError
from clawnet.limits import BLOB_CHUNK_BYTES
from clawnet.storage import blobs as blobs_module
from clawnet.storage.blobs import BlobStore
from clawnet.wire.blobid import blob_id, id_of_leaves

TASK, OTHER = b"t" * 16, b"o" * 16
BIG = bytes(range(256)) * 1024 * 5 + b"end"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[BlobStore]:
    opened = BlobStore(tmp_path / "blobs")
    yield opened
    files = [file for file in opened.directory.rglob("*") if file.is_file()]
    assert opened.total_bytes == sum(file.stat().st_size for file in files)


def files(directory: Path) -> list[str]:
    return sorted(file.name for file in directory.rglob("*") if file.is_file())


def test_bytes_come_back_under_their_id(store: BlobStore) -> None:
    blob = store.put_bytes(BIG)
    assert blob == blob_id(BIG)
    assert store.has(blob)
    assert store.size(blob) == len(BIG)
    chunks = list(store.read_chunks(blob))
    assert b"".join(chunks) == BIG
    assert {len(chunk) for chunk in chunks[:-1]} == {BLOB_CHUNK_BYTES}
    assert id_of_leaves(len(BIG), store.leaves(blob)) == blob
    assert b"".join(store.read_chunks(blob, BLOB_CHUNK_BYTES + 7)) == BIG[BLOB_CHUNK_BYTES + 7 :]
    assert store.read_at(blob, 300, 20) == BIG[300:320]
    assert store.read_at(blob, len(BIG) - 2, 20) == BIG[-2:]
    assert store.put_bytes(b"") == blob_id(b"")


def test_the_same_bytes_twice_take_their_room_once(store: BlobStore) -> None:
    store.put_bytes(BIG)
    store.put_bytes(BIG)
    writer = store.writer(len(BIG))
    writer.write(BIG)
    assert writer.commit() == blob_id(BIG)
    assert store.total_bytes == len(BIG)


def test_nothing_is_there_before_the_commit_nor_after_an_abort(store: BlobStore) -> None:
    writer = store.writer()
    for start in range(0, len(BIG), 100_001):
        writer.write(BIG[start : start + 100_001])
    assert writer.size == len(BIG)
    assert not store.has(blob_id(BIG))
    writer.abort()
    writer.abort()
    assert not store.has(blob_id(BIG))
    assert files(store.directory) == []


def test_content_that_is_not_what_was_promised_is_dropped(store: BlobStore) -> None:
    writer = store.writer()
    writer.write(b"something else")
    with pytest.raises(DataError, match=blob_id(b"promised").hex()):
        writer.commit(blob_id(b"promised"))
    writer.abort()
    assert files(store.directory) == []


def test_an_abort_after_the_commit_changes_nothing(store: BlobStore) -> None:
    writer = store.writer()
    writer.write(b"kept")
    blob = writer.commit(blob_id(b"kept"))
    writer.abort()
    assert store.has(blob)


@pytest.mark.parametrize(
    ("expected", "durable", "synced"),
    [(None, None, False), (blob_id(b"x"), None, True), (None, True, True), (blob_id(b"x"), False, False)],
)
def test_what_came_from_elsewhere_is_synced_before_it_is_named(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch, expected: bytes | None, durable: bool | None, synced: bool
) -> None:
    order: list[str] = []
    real_sync, real_replace = blobs_module.sync, os.replace

    def sync(fd: int) -> None:
        order.append("sync")
        real_sync(fd)

    def replace(source: Path, target: Path) -> None:
        order.append("rename")
        real_replace(source, target)

    monkeypatch.setattr(blobs_module, "sync", sync)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(blobs_module, "sync_directory", lambda directory: order.append("sync directory"))
    writer = store.writer()
    writer.write(b"x")
    writer.commit(expected, durable)
    assert order == (["sync", "rename", "sync directory"] if synced else ["rename"])


def test_a_blob_that_is_not_here_is_not_found(store: BlobStore) -> None:
    missing = blob_id(b"missing")
    assert not store.has(missing)
    for read in (store.size, store.leaves, lambda blob: store.read_at(blob, 0, 1)):
        with pytest.raises(NotFoundError, match=missing.hex()):
            read(missing)
    store.delete(missing)


def test_only_those_granted_may_fetch_and_only_for_that_task(store: BlobStore) -> None:
    blob = store.put_bytes(b"input")
    assert not store.may_fetch("alice", TASK, blob)
    store.grant(TASK, "alice", blob)
    assert store.may_fetch("alice", TASK, blob)
    assert not store.may_fetch("bob", TASK, blob)
    assert not store.may_fetch("alice", OTHER, blob)
    assert not store.may_fetch("alice", TASK, blob_id(b"other"))


def test_a_revoked_task_takes_along_the_blobs_that_no_other_task_uses(store: BlobStore) -> None:
    own, shared = store.put_bytes(b"own"), store.put_bytes(b"shared")
    store.load_grants([(TASK, "alice", own), (TASK, "alice", own), (TASK, "bob", own), (TASK, "alice", shared)])
    store.grant(OTHER, "alice", shared)
    store.revoke(TASK)
    assert not store.may_fetch("alice", TASK, own)
    assert not store.has(own)
    assert store.has(shared)
    store.revoke(TASK)
    store.revoke(OTHER)
    assert not store.has(shared)


def test_a_blob_that_is_written_again_outlives_the_task_that_lets_it_go(store: BlobStore) -> None:
    """The next task of the same file finds it here, and has its grant a turn later."""
    for again in (lambda: store.put_bytes(b"a module"), lambda: _written(store, b"a module")):
        blob = store.put_bytes(b"a module")
        store.grant(b"1" * 16, "alice", blob)
        assert again() == blob
        store.revoke(b"1" * 16)
        assert store.has(blob), "the second task is about to be granted it"
        store.grant(b"2" * 16, "alice", blob)
        store.revoke(b"2" * 16)
        assert not store.has(blob)
    left = store.put_bytes(b"of a draft that became no task")
    store.grant(b"3" * 16, "alice", left)
    store.put_bytes(b"of a draft that became no task")
    store.revoke(b"3" * 16)
    assert store.has(left)
    os.utime(store.path(left), (1, 1))
    assert store.sweep(1_000_000_000_000) == 1
    assert (store.has(left), store.total_bytes) == (False, 0)


def _written(store: BlobStore, data: bytes) -> bytes:
    writer = store.writer()
    writer.write(data)
    return writer.commit()


def test_the_sweep_spares_what_is_granted_kept_or_young(store: BlobStore) -> None:
    granted, kept, old, young = (store.put_bytes(name) for name in (b"granted", b"kept", b"old", b"young"))
    store.grant(TASK, "alice", granted)
    for blob in (granted, kept, old):
        os.utime(store.path(blob), (1_000, 1_000))
    assert store.sweep(2_000_000, {kept}) == 1
    assert [store.has(blob) for blob in (granted, kept, old, young)] == [True, True, False, True]


def undeletable(store: BlobStore) -> list[bytes]:
    """Directories in the places of the first blob and of the last."""
    blobs = [bytes(32), b"\xff" * 32]
    for blob in blobs:
        store.path(blob).mkdir(parents=True)
        os.utime(store.path(blob), (1_000, 1_000))
    return blobs


def test_the_sweep_goes_on_after_files_that_it_cannot_delete_and_tells_of_one(store: BlobStore) -> None:
    old = [store.put_bytes(bytes([n])) for n in range(30)]
    for blob in old:
        os.utime(store.path(blob), (1_000, 1_000))
    undeletable(store)
    with pytest.raises(StorageError, match="does not work"):
        store.sweep(2_000_000)
    assert not any(store.has(blob) for blob in old)


def test_the_sweep_does_not_mind_a_file_that_is_gone_when_it_comes_there(store: BlobStore) -> None:
    old, gone = store.put_bytes(b"old"), store.path(bytes(32))
    os.utime(store.path(old), (1_000, 1_000))
    gone.parent.mkdir()
    gone.symlink_to("nowhere")
    assert store.sweep(2_000_000) == 1
    assert not store.has(old)


def test_a_revoked_task_lets_all_its_blobs_go_though_one_cannot_be_deleted(store: BlobStore) -> None:
    blobs = [store.put_bytes(bytes([n])) for n in range(30)]
    for blob in blobs + undeletable(store):
        store.grant(TASK, "alice", blob)
    store.revoke(TASK)
    assert not any(store.has(blob) for blob in blobs)
    with pytest.raises(StorageError, match="does not work"):
        store.sweep(2_000_000)


def test_a_blob_goes_though_what_lies_beside_it_does_not(store: BlobStore) -> None:
    blob = store.put_bytes(b"deleted")
    store.path(blob).with_suffix(".leaves").mkdir()
    store.delete(blob)
    assert (store.has(blob), store.total_bytes) == (False, 0)


def test_a_large_file_goes_where_no_thread_can_be_started_for_it(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(limits, "BLOB_UNLINKED_APART_FROM", 1)
    monkeypatch.setattr(threading.Thread, "start", refused)
    store.delete(store.put_bytes(BIG))
    assert (files(store.directory), store.total_bytes) == ([], 0)


def test_a_blob_whose_chunk_hashes_find_no_room_is_here_and_counted(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_open = blobs_module.open_new

    def full(path: Path, *, replace: bool = False) -> BinaryIO:
        if path.suffix == ".leaves":
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "no room")
        return real_open(path, replace=replace)

    monkeypatch.setattr(limits, "BLOB_LEAVES_KEPT_FROM", 1)
    monkeypatch.setattr(blobs_module, "open_new", full)
    blob = store.put_bytes(BIG)
    assert files(store.directory) == [blob.hex()]
    assert store.total_bytes == len(BIG)
    assert id_of_leaves(len(BIG), store.leaves(blob)) == blob


def test_a_blob_whose_directory_cannot_be_synced_stays_counted(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(directory: Path) -> None:
        raise OSError(errno.EIO, "no answer")

    monkeypatch.setattr(blobs_module, "sync_directory", broken)
    for _ in range(2):
        writer = store.writer()
        writer.write(BIG)
        with pytest.raises(StorageError, match="no answer"):
            writer.commit(durable=True)
        writer.abort()
        assert store.total_bytes == len(BIG)
    assert files(store.directory) == [blob_id(BIG).hex()]


def test_the_bound_holds_for_announced_and_for_growing_blobs(tmp_path: Path) -> None:
    store = BlobStore(tmp_path, bytes_max=1_000)
    store.put_bytes(bytes(600))
    with pytest.raises(StorageFullError, match="401 bytes do not fit"):
        store.writer(401)
    one, two = store.writer(), store.writer()
    one.write(bytes(300))
    with pytest.raises(StorageFullError, match=r"storage\.max_size|do not fit"):
        two.write(bytes(101))
    two.abort()
    one.commit()
    assert store.total_bytes == 900
    assert len(files(tmp_path)) == 2
    assert BlobStore(tmp_path).total_bytes == 900


def test_a_disk_nearly_full_is_left_to_the_database(store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blobs_module, "FREE_BYTES_MIN", 2**62)
    with pytest.raises(StorageFullError, match="is full"):
        store.put_bytes(b"x")


def test_a_disk_that_fills_while_writing_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root on Linux")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("mounting a small file system needs CAP_SYS_ADMIN")
    try:
        monkeypatch.setattr(blobs_module, "FREE_BYTES_MIN", 0)
        store = BlobStore(small / "blobs")
        writer = store.writer()
        with pytest.raises(StorageFullError, match="cannot write"):
            for _ in range(40):
                writer.write(os.urandom(64 * 1024))
        writer.abort()
        assert files(small) == []
        assert store.total_bytes == 0
        assert store.has(store.put_bytes(b"fits"))
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_half_written_blobs_of_a_killed_process_are_swept_at_the_start(tmp_path: Path) -> None:
    half = (
        "import os, sys\nfrom pathlib import Path\nfrom clawnet.storage.blobs import BlobStore\n"
        "store = BlobStore(Path(sys.argv[1]))\nstore.put_bytes(b'whole')\nwriter = store.writer()\n"
        "writer.write(bytes(100_000))\nwriter._file.flush()\nos.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", half, str(tmp_path)]).returncode != 0
    assert len(files(tmp_path)) == 2
    store = BlobStore(tmp_path)
    assert files(tmp_path) == [blob_id(b"whole").hex()]
    assert store.total_bytes == len(b"whole")


def test_writers_of_several_threads_do_not_meet(store: BlobStore) -> None:
    def work(number: int) -> None:
        for each in range(20):
            writer = store.writer()
            writer.write(bytes([number]) * 1_000)
            writer.write(bytes([each]) * 1_000)
            writer.commit()
            store.put_bytes(b"common")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(files(store.directory)) == 81


@pytest.mark.skipif(sys.platform == "win32", reason="modes are POSIX")
def test_only_the_owner_can_read_blobs(store: BlobStore) -> None:
    path = store.path(store.put_bytes(b"private"))
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert store.directory.stat().st_mode & 0o777 == 0o700


def test_a_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="blob store does not work"):
        BlobStore(tmp_path / "file" / "blobs")
