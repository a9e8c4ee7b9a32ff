"""The blob directory: content-addressed files, written aside and renamed when whole, and who may fetch which."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Set
from pathlib import Path
from typing import BinaryIO, Final

from clawnet import limits
from clawnet.errors import DataError, NotFoundError, StorageError, StorageFullError
from clawnet.wire.blobid import BlobHasher, blob_id, leaf

FREE_BYTES_MIN: Final = 16 * limits.MIB

_TEMPORARY: Final = "tmp"
_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class BlobStore:
    """Blobs of one node, each in a file named by its id. Writers may be used in any thread, one thread each.

    A blob is here whole or not at all: what a crash leaves half written lies in a directory of its own, which is
    emptied at the start. `bytes_max` bounds the whole (0: no bound), and FREE_BYTES_MIN of the disk are left to the
    database; beyond either, writing raises StorageFullError.
    """

    def __init__(self, directory: Path, bytes_max: int = 0) -> None:
        """Raises StorageError when the directory cannot be used."""
        self.directory = directory
        self.bytes_max = bytes_max
        self._temporary = directory / _TEMPORARY
        self._lock = threading.Lock()
        self._bytes = 0
        self._serial = 0
        # task -> (peer, blob) pairs granted, and how many grants a blob has in all.
        self._grants: dict[bytes, set[tuple[str, bytes]]] = {}
        self._uses: dict[bytes, int] = {}
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._temporary.mkdir(mode=0o700, exist_ok=True)
            for stale in self._temporary.iterdir():
                stale.unlink()
            self._bytes = sum(file.stat().st_size for _, file in self._files())
        except OSError as err:
            raise _translate(err, directory) from err

    # --- writing

    def put_bytes(self, data: bytes) -> bytes:
        """Stores a blob held in memory; its id."""
        blob = blob_id(data)
        if not self.has(blob):
            writer = self.writer(len(data))
            try:
                writer.write(data)
                writer.commit()
            finally:
                writer.abort()
        return blob

    def writer(self, size: int = 0) -> BlobWriter:
        """A new blob, of `size` bytes where that is known; StorageFullError when there is no room for it."""
        self.check_room(size)
        with self._lock:
            self._serial += 1
            path = self._temporary / f"{os.getpid()}-{self._serial}"
        try:
            file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY, 0o600), "wb")
        except OSError as err:
            raise _translate(err, path) from err
        return BlobWriter(self, path, file)

    def check_room(self, size: int) -> None:
        """Raises StorageFullError when `size` more bytes do not fit."""
        self._check_bound(size)
        try:
            free = shutil.disk_usage(self.directory).free
        except OSError as err:
            raise _translate(err, self.directory) from err
        if free < size + FREE_BYTES_MIN:
            raise StorageFullError(
                f"the disk of {self.directory} is full: {free} bytes are free, {size} more are needed",
                hint="make room on the disk, then try again",
            )

    def _check_bound(self, size: int) -> None:
        if self.bytes_max and self._bytes + size > self.bytes_max:
            raise StorageFullError(
                f"{size} bytes do not fit: blobs take {self._bytes} of at most {self.bytes_max} bytes",
                hint="raise storage.max_size, or wait until old results are forgotten",
            )

    def _reserve(self, more: int) -> None:
        """Room for `more` bytes of a blob being written; given back by _release."""
        with self._lock:
            self._check_bound(more)
            self._bytes += more

    def _release(self, fewer: int) -> None:
        with self._lock:
            self._bytes -= fewer

    def _place(self, part: Path, target: Path, size: int) -> None:
        """Gives a finished file its name; of two that are the same blob, one counts."""
        with self._lock:
            known = target.is_file()
            os.replace(part, target)
            if known:
                self._bytes -= size

    # --- reading

    def path(self, blob: bytes) -> Path:
        """Where the blob lies, or would."""
        name = blob.hex()
        return self.directory / name[:2] / name

    def has(self, blob: bytes) -> bool:
        """Whether the blob is here, whole."""
        return self.path(blob).is_file()

    def size(self, blob: bytes) -> int:
        """Its size in bytes; NotFoundError when it is not here."""
        try:
            return self.path(blob).stat().st_size
        except FileNotFoundError as err:
            raise NotFoundError(f"blob {blob.hex()} is not here", blob=blob.hex()) from err

    def read_chunks(self, blob: bytes, offset: int = 0) -> Iterator[bytes]:
        """Its content from `offset` on, in chunks of limits.BLOB_CHUNK_BYTES; NotFoundError when it is not here."""
        try:
            with self.path(blob).open("rb") as file:
                file.seek(offset)
                while chunk := file.read(limits.BLOB_CHUNK_BYTES):
                    yield chunk
        except FileNotFoundError as err:
            raise NotFoundError(f"blob {blob.hex()} is not here", blob=blob.hex()) from err
        except OSError as err:
            raise _translate(err, self.path(blob)) from err

    def read_at(self, blob: bytes, offset: int, length: int) -> bytes:
        """At most `length` bytes from `offset` on; NotFoundError when the blob is not here."""
        try:
            with self.path(blob).open("rb") as file:
                file.seek(offset)
                return file.read(length)
        except FileNotFoundError as err:
            raise NotFoundError(f"blob {blob.hex()} is not here", blob=blob.hex()) from err
        except OSError as err:
            raise _translate(err, self.path(blob)) from err

    def leaves(self, blob: bytes) -> list[bytes]:
        """The hashes of its chunks, computed from the file."""
        return [leaf(chunk) for chunk in self.read_chunks(blob)]

    @property
    def total_bytes(self) -> int:
        """Bytes of all blobs, those being written included."""
        return self._bytes

    # --- forgetting

    def delete(self, blob: bytes) -> None:
        """Removes the blob; nothing happens when it is not here."""
        path = self.path(blob)
        with self._lock:
            try:
                size = path.stat().st_size
                path.unlink()
            except FileNotFoundError:
                return
            except OSError as err:
                raise _translate(err, path) from err
            self._bytes -= size

    def sweep(self, before_ms: int, kept: Set[bytes] = frozenset()) -> int:
        """Deletes blobs that nobody may fetch, that are not kept and were last written before this time; how many."""
        old = [
            blob
            for blob, file in list(self._files())
            if blob not in self._uses and blob not in kept and file.stat().st_mtime_ns < before_ms * 1_000_000
        ]
        for blob in old:
            self.delete(blob)
        return len(old)

    def _files(self) -> Iterator[tuple[bytes, Path]]:
        for shelf in self.directory.iterdir():
            if shelf.name == _TEMPORARY or not shelf.is_dir():
                continue
            for file in shelf.iterdir():
                try:
                    yield bytes.fromhex(file.name), file
                except ValueError:
                    continue

    # --- who may fetch

    def grant(self, task_id: bytes, peer: str, blob: bytes) -> None:
        """From now on `peer` may fetch `blob` by naming `task_id`; a second grant changes nothing."""
        granted = self._grants.setdefault(task_id, set())
        if (peer, blob) not in granted:
            granted.add((peer, blob))
            self._uses[blob] = self._uses.get(blob, 0) + 1

    def load_grants(self, rows: Iterable[tuple[bytes, str, bytes]]) -> None:
        """The rows of blob_grants; called at the start, before anything is revoked."""
        for row in rows:
            self.grant(*row)

    def revoke(self, task_id: bytes) -> None:
        """Nobody may fetch the task's blobs any longer; those granted for no other task are deleted."""
        for _, blob in self._grants.pop(task_id, ()):
            left = self._uses[blob] - 1
            if left:
                self._uses[blob] = left
            else:
                del self._uses[blob]
                self.delete(blob)

    def succeeded(self, old: str, new: str) -> None:
        """A peer goes by another id: what was granted under the old one is granted under the new one instead."""
        for granted in self._grants.values():
            moved = [pair for pair in granted if pair[0] == old]
            granted.difference_update(moved)
            granted.update((new, blob) for _, blob in moved)

    def may_fetch(self, peer: str, task_id: bytes, blob: bytes) -> bool:
        """Whether this peer was granted this blob for this task."""
        return (peer, blob) in self._grants.get(task_id, ())


class BlobWriter:
    """A blob on its way into the store; invisible until committed."""

    def __init__(self, store: BlobStore, path: Path, file: BinaryIO) -> None:
        self._store = store
        self._path = path
        self._file: BinaryIO | None = file
        self._hasher = BlobHasher()

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._hasher.size

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """The next bytes; StorageFullError when they do not fit."""
        assert self._file is not None, "the blob is already committed or aborted"
        self._store._reserve(len(data))
        self._hasher.update(data)
        try:
            self._file.write(data)
        except OSError as err:
            raise _translate(err, self._path) from err
        return len(data)

    def commit(self, expected: bytes | None = None, durable: bool | None = None) -> bytes:
        """Makes the blob readable under its id, which is returned.

        With `expected` the content must be that blob, else DataError and nothing is kept. A `durable` blob is on the
        disk when this returns; when not said, that holds for expected ones: they came from elsewhere, and what is
        written about them next may promise that they are here.
        """
        assert self._file is not None, "the blob is already committed or aborted"
        blob = self._hasher.digest()
        if expected is not None and blob != expected:
            self.abort()
            raise DataError(f"the content is blob {blob.hex()}, not {expected.hex()}")
        durable = expected is not None if durable is None else durable
        target = self._store.path(blob)
        try:
            self._file.flush()
            if durable:
                _sync(self._file.fileno())
            self._file.close()
            target.parent.mkdir(mode=0o700, exist_ok=True)
            self._store._place(self._path, target, self._hasher.size)
            if durable:
                _sync_directory(target.parent)
        except OSError as err:
            self.abort()
            raise _translate(err, target) from err
        self._file = None
        return blob

    def abort(self) -> None:
        """Forgets what was written. After commit it does nothing."""
        if self._file is None:
            return
        file, self._file = self._file, None
        # A full disk may refuse the last buffer once more; the file goes anyway.
        with contextlib.suppress(OSError):
            file.close()
        self._path.unlink(missing_ok=True)
        self._store._release(self._hasher.size)


_BINARY: Final[int] = getattr(os, "O_BINARY", 0)


def _sync(fd: int) -> None:
    try:
        import fcntl

        # macOS: fsync alone leaves the data in the drive's cache. Elsewhere there is no such command.
        fcntl.fcntl(fd, getattr(fcntl, "F_FULLFSYNC"))  # noqa: B009
    except (ImportError, AttributeError, OSError):
        os.fsync(fd)


def _sync_directory(directory: Path) -> None:
    """Makes renames in the directory and the directory itself last; Windows has no such call and needs none."""
    if os.name != "posix":
        return
    for each in (directory, directory.parent):
        fd = os.open(each, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _translate(err: OSError, path: Path) -> StorageError:
    if err.errno in _FULL:
        return StorageFullError(
            f"cannot write {path}: {err.strerror}", hint="make room on the disk, then try again", path=str(path)
        )
    return StorageError(f"the blob store does not work: {path}: {err.strerror}", path=str(path))
