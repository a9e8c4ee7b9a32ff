"""Blobs on the disk: content-addressed files, whole or not there, and who may fetch which for what task."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from clawnet import limits
from clawnet.errors import NotFoundError, StorageError, StorageFullError
from clawnet.wire.blobid import BlobHasher

FREE_BYTES_MIN: Final = 16 * limits.MIB
_PART: Final = ".part"


class BlobStore:
    """Files named by their blob id under `directory` (0700), each 0600.

    Grants live in memory; the node tells them again after a start. All methods may raise StorageError, and those that
    write StorageFullError when the disk or `bytes_max` leaves no room.
    """

    def __init__(self, directory: Path, bytes_max: int = 0) -> None:
        self._dir = directory
        self._bytes_max = bytes_max
        self._grants: dict[bytes, dict[str, set[bytes]]] = {}
        self._uses: Counter[bytes] = Counter()
        self._number = 0
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._bytes = 0
        for entry in os.scandir(directory):
            if entry.name.endswith(_PART):
                os.unlink(entry.path)
            elif entry.is_file(follow_symlinks=False):
                self._bytes += entry.stat(follow_symlinks=False).st_size

    # --- content

    def path(self, blob: bytes) -> Path:
        """Where a blob lies (or would)."""
        return self._dir / blob.hex()

    def has(self, blob: bytes) -> bool:
        """Whether the whole blob is here."""
        return self.path(blob).is_file()

    def size(self, blob: bytes) -> int:
        """Its size in bytes; NotFoundError when it is not here."""
        try:
            return self.path(blob).stat().st_size
        except OSError as error:
            raise NotFoundError(f"the blob {blob.hex()[:16]} is not stored here") from error

    @property
    def total_bytes(self) -> int:
        """Bytes of all blobs."""
        return self._bytes

    def put_bytes(self, data: bytes) -> bytes:
        """Stores bytes and returns their blob id."""
        writer = self.writer(len(data))
        try:
            writer.write(data)
            return writer.commit()
        finally:
            writer.abort()

    def writer(self, size: int = 0) -> BlobWriter:
        """Room for a blob of `size` bytes (0: not known yet)."""
        self.check_room(size)
        self._number += 1
        return BlobWriter(self, self._dir / f"{os.getpid()}-{self._number}{_PART}")

    def check_room(self, size: int) -> None:
        """Raises StorageFullError when `size` more bytes do not fit."""
        if self._bytes_max and self._bytes + size > self._bytes_max:
            raise StorageFullError(
                f"{size} bytes do not fit: blobs hold {self._bytes} of at most {self._bytes_max} bytes",
                hint="raise storage.max_size, or wait until tasks are forgotten",
            )
        free = os.statvfs(self._dir) if hasattr(os, "statvfs") else None
        if free is not None and free.f_bavail * free.f_frsize < size + FREE_BYTES_MIN:
            raise StorageFullError(f"the disk of {self._dir} is full", hint="free some space")

    def read_chunks(self, blob: bytes) -> Iterator[bytes]:
        """Its bytes in chunks of BLOB_CHUNK_BYTES; NotFoundError when it is not here."""
        try:
            with self.path(blob).open("rb") as file:
                while chunk := file.read(limits.BLOB_CHUNK_BYTES):
                    yield chunk
        except FileNotFoundError as error:
            raise NotFoundError(f"the blob {blob.hex()[:16]} is not stored here") from error
        except OSError as error:
            raise StorageError(f"a blob cannot be read: {error.strerror}") from error

    def read_at(self, blob: bytes, offset: int, length: int) -> bytes:
        """At most `length` bytes from `offset` on."""
        try:
            with self.path(blob).open("rb") as file:
                file.seek(offset)
                return file.read(length)
        except FileNotFoundError as error:
            raise NotFoundError(f"the blob {blob.hex()[:16]} is not stored here") from error
        except OSError as error:
            raise StorageError(f"a blob cannot be read: {error.strerror}") from error

    def delete(self, blob: bytes) -> None:
        """Forgets a blob; one that is not here is no error."""
        path = self.path(blob)
        with contextlib.suppress(FileNotFoundError):
            size = path.stat().st_size
            path.unlink()
            self._bytes -= size

    def stored(self, size: int) -> None:
        """A writer has added a file (internal to this module)."""
        self._bytes += size

    # --- who may fetch

    def grant(self, task_id: bytes, peer: str, blob: bytes) -> None:
        """From now on `peer` may fetch `blob` for this task."""
        blobs = self._grants.setdefault(task_id, {}).setdefault(peer, set())
        if blob not in blobs:
            blobs.add(blob)
            self._uses[blob] += 1

    def revoke(self, task_id: bytes) -> None:
        """The task needs its blobs no longer: nobody may fetch them for it, and those no other task uses are deleted."""
        for blobs in self._grants.pop(task_id, {}).values():
            for blob in blobs:
                self._uses[blob] -= 1
                if self._uses[blob] <= 0:
                    del self._uses[blob]
                    self.delete(blob)

    def may_fetch(self, peer: str, task_id: bytes, blob: bytes) -> bool:
        """Whether `peer` is a party of the task and the blob belongs to it."""
        return blob in self._grants.get(task_id, {}).get(peer, ())


class BlobWriter:
    """A blob on its way into the store: a temporary file, hashed as it grows, renamed when it is whole and synced."""

    def __init__(self, store: BlobStore, path: Path) -> None:
        self._store = store
        self._path = path
        self._hasher = BlobHasher()
        self._size = 0
        self._open = True
        try:
            self._file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")
        except OSError as error:
            raise _full_or(error) from error

    def write(self, data: bytes) -> None:
        """The next bytes."""
        try:
            self._file.write(data)
        except OSError as error:
            raise _full_or(error) from error
        self._hasher.update(data)
        self._size += len(data)

    def commit(self, expected: bytes | None = None) -> bytes:
        """Makes the blob durable and visible, and returns its id; StorageError when it is not `expected`."""
        blob = self._hasher.digest()
        if expected is not None and blob != expected:
            self.abort()
            raise StorageError("a blob's content is not what its id says")
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            target = self._store.path(blob)
            known = target.exists()
            os.replace(self._path, target)
        except OSError as error:
            self.abort()
            raise _full_or(error) from error
        self._open = False
        if not known:
            self._store.stored(self._size)
        return blob

    def abort(self) -> None:
        """Forgets what was written; after commit it does nothing."""
        if self._open:
            self._open = False
            self._file.close()
            with contextlib.suppress(FileNotFoundError):
                self._path.unlink()


def _full_or(error: OSError) -> StorageError | StorageFullError:
    import errno

    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageFullError("the disk is full; nothing of the blob was kept", hint="free some space")
    return StorageError(f"a blob cannot be written: {error.strerror}")
