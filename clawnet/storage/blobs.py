"""The blob directory: content-addressed files, written aside and renamed when whole, and who may fetch which."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Sequence, Set
from io import RawIOBase
from pathlib import Path
from typing import BinaryIO, Final

from clawnet import limits
from clawnet.errors import DataError, NotFoundError, StorageError, StorageFullError
from clawnet.storage.files import noting, open_new, sync, sync_directory, translated
from clawnet.storage.partials import BlobPart, Parts, SeenPart, source_tag
from clawnet.wire.blobid import BlobHasher, blob_id, id_of_leaves, leaf, leaf_count, split_leaves

FREE_BYTES_MIN: Final = 16 * limits.MIB

_TEMPORARY: Final = "tmp"
_PARTS: Final = "parts"
_LEAVES: Final = ".leaves"
_SOURCES: Final = ".from"


class BlobStore:
    """Blobs of one node, each in a file named by its id. Writers may be used in any thread, one thread each.

    A blob is here whole or not at all: what a crash leaves half written lies in a directory of its own, which is
    emptied at the start, and what is half fetched in another, where it waits for the rest. `bytes_max` bounds the whole
    (0: no bound), and FREE_BYTES_MIN of the disk are left to the database; beyond either, writing raises
    StorageFullError. Beside a large blob lie its chunk hashes, and who has sent it.
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
        self._sources: dict[bytes, set[str]] = {}
        # Blobs written by this node's own work since their last grant.
        self._new: set[bytes] = set()
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._temporary.mkdir(mode=0o700, exist_ok=True)
            for stale in self._temporary.iterdir():
                stale.unlink()
            self.parts = Parts(directory / _PARTS, self)
            self._drop_left_behind()
            self._bytes = sum(file.stat().st_size for _, file in self._files()) + self.parts.bytes_held
        except OSError as err:
            raise translated(err, directory) from err

    def _drop_left_behind(self) -> None:
        """Chunk hashes of blobs that are gone."""
        for shelf in self._shelves():
            for file in list(shelf.iterdir()):
                if file.suffix in (_LEAVES, _SOURCES) and not file.with_suffix("").exists():
                    file.unlink()

    # --- writing

    def put_bytes(self, data: bytes) -> bytes:
        """Stores a blob held in memory; its id."""
        blob = blob_id(data)
        self.note_new(blob)
        if not self.has(blob):
            writer = self.writer(len(data))
            try:
                writer.write(data)
                writer.commit()
            finally:
                writer.abort()
        return blob

    def note_new(self, blob: bytes) -> None:
        """A grant is about to be asked for this blob: it stays until then, whoever lets it go meanwhile."""
        with self._lock:
            self._new.add(blob)

    def writer(self, size: int = 0) -> BlobWriter:
        """A new blob, of `size` bytes where that is known; StorageFullError when there is no room for it."""
        self.check_room(size)
        with self._lock:
            self._serial += 1
            path = self._temporary / f"{os.getpid()}-{self._serial}"
        try:
            file = open_new(path)
        except OSError as err:
            raise translated(err, path) from err
        return BlobWriter(self, path, file)

    def fetching(self, blob: bytes, size: int, source: str) -> BlobPart | SeenPart:
        """Where a blob of `size` bytes that `source` sends is gathered; StorageFullError when there is no room for it.

        What an earlier try brought is found there again. A blob that is here from elsewhere is only compared.
        """
        if self.has(blob):
            return SeenPart(blob, size)
        part = self.parts.open(blob, size, source)
        try:
            self.check_room(size - part.find())
        except StorageFullError:
            part.drop()
            raise
        except StorageError:
            self.parts.ended(part)
            raise
        return part

    def check_room(self, size: int) -> None:
        """Raises StorageFullError when `size` more bytes do not fit."""
        self._check_bound(size)
        try:
            free = shutil.disk_usage(self.directory).free
        except OSError as err:
            raise translated(err, self.directory) from err
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

    def room(self) -> int:
        """How many bytes more can be stored now."""
        try:
            free = shutil.disk_usage(self.directory).free - FREE_BYTES_MIN
        except OSError as err:
            raise translated(err, self.directory) from err
        return max(0, min(free, self.bytes_max - self._bytes) if self.bytes_max else free)

    def reserve(self, more: int) -> None:
        """Room for `more` bytes of a blob being written; given back by release."""
        with self._lock:
            self._check_bound(more)
            self._bytes += more

    def release(self, fewer: int) -> None:
        """So many bytes are not written any longer, or gone."""
        with self._lock:
            self._bytes -= fewer

    def place(self, part: Path, target: Path, size: int) -> None:
        """Gives a finished file its name; of two that are the same blob, one counts."""
        with self._lock:
            known = target.is_file()
            os.replace(part, target)
            if known:
                self._bytes -= size

    def keep_leaves(self, blob: bytes, size: int, leaves: Sequence[bytes]) -> None:
        """Spares whoever serves this blob the reading of all of it before the first byte; small ones are read.

        So is one whose hashes find no room: the blob is here all the same.
        """
        if size < limits.BLOB_LEAVES_KEPT_FROM:
            return
        path = self.path(blob).with_suffix(_LEAVES)
        try:
            with open_new(path, replace=True) as file:
                file.write(b"".join(leaves))
        except OSError:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

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
        with self.opened(blob, offset) as file:
            try:
                while chunk := file.read(limits.BLOB_CHUNK_BYTES):
                    yield chunk
            except OSError as err:
                raise translated(err, self.path(blob)) from err

    def opened(self, blob: bytes, offset: int = 0) -> RawIOBase:
        """Its file from `offset` on, to be read and closed; NotFoundError when it is not here."""
        try:
            file = self.path(blob).open("rb", buffering=0)
        except FileNotFoundError as err:
            raise NotFoundError(f"blob {blob.hex()} is not here", blob=blob.hex()) from err
        except OSError as err:
            raise translated(err, self.path(blob)) from err
        file.seek(offset)
        return file

    def read_at(self, blob: bytes, offset: int, length: int) -> bytes:
        """At most `length` bytes from `offset` on; NotFoundError when the blob is not here."""
        try:
            with self.path(blob).open("rb") as file:
                file.seek(offset)
                return file.read(length)
        except FileNotFoundError as err:
            raise NotFoundError(f"blob {blob.hex()} is not here", blob=blob.hex()) from err
        except OSError as err:
            raise translated(err, self.path(blob)) from err

    def leaves(self, blob: bytes) -> list[bytes]:
        """The hashes of its chunks: as they were kept, or computed from the file. DataError when it is damaged."""
        size = self.size(blob)
        with contextlib.suppress(OSError):
            kept = split_leaves(self.path(blob).with_suffix(_LEAVES).read_bytes())
            if len(kept) == leaf_count(size) and id_of_leaves(size, kept) == blob:
                return kept
        leaves = [leaf(chunk) for chunk in self.read_chunks(blob)]
        if id_of_leaves(size, leaves) != blob:
            raise DataError(f"the stored blob {blob.hex()[:16]} is damaged", blob=blob.hex())
        self.keep_leaves(blob, size, leaves)
        return leaves

    @property
    def total_bytes(self) -> int:
        """Bytes of all blobs, those being written included."""
        return self._bytes

    # --- forgetting

    def delete(self, blob: bytes, *, forced: bool = True) -> None:
        """Removes the blob; nothing happens when it is not here, or, unless `forced`, waits for its first grant."""
        path = self.path(blob)
        with self._lock:
            if blob in self._new and not forced:
                return
            self._new.discard(blob)
            try:
                size = path.stat().st_size
                if size < limits.BLOB_UNLINKED_APART_FROM:
                    path.unlink()
                else:
                    self._unlink_apart(path)
            except FileNotFoundError:
                return
            except OSError as err:
                raise translated(err, path) from err
            self._bytes -= size
            self._sources.pop(blob, None)
            for suffix in (_LEAVES, _SOURCES):
                with contextlib.suppress(OSError):  # what stays of them goes at a start
                    path.with_suffix(suffix).unlink(missing_ok=True)

    def _unlink_apart(self, path: Path) -> None:
        """A large file takes its time to go: it is out of sight at once, and gone when a thread is done, or a start."""
        self._serial += 1
        gone = self._temporary / f"{os.getpid()}-{self._serial}"
        os.replace(path, gone)
        try:
            threading.Thread(target=gone.unlink, args=(True,), name="clawnet-unlink", daemon=True).start()
        except RuntimeError:  # the system gives no thread
            gone.unlink(missing_ok=True)

    def sweep(self, before_ms: int, kept: Set[bytes] = frozenset()) -> int:
        """Deletes blobs that nobody may fetch, that are not kept and were last written before this time; how many.

        Raises the first StorageError of files that cannot be deleted or looked at, when all others are done.
        """
        failures: list[StorageError] = []
        found: list[tuple[bytes, Path]] = []
        with noting(failures, self.directory):
            for shelf in self._shelves():
                with noting(failures, shelf):
                    found += _blobs_in(shelf)
        swept = 0
        for blob, file in found:
            with noting(failures, file):
                if blob not in self._uses and blob not in kept and file.stat().st_mtime_ns < before_ms * 1_000_000:
                    self.delete(blob)
                    swept += 1
        if failures:
            raise failures[0]
        return swept

    def sweep_parts(self, before_ms: int) -> None:
        """Forgets what was half fetched for nobody any longer, and what was not gone on with since then.

        Raises the first StorageError of files that cannot be deleted, when all others are done.
        """
        self.parts.sweep(self._uses.__contains__, before_ms)

    def _shelves(self) -> Iterator[Path]:
        for shelf in self.directory.iterdir():
            if shelf.name not in (_TEMPORARY, _PARTS) and shelf.is_dir():
                yield shelf

    def _files(self) -> Iterator[tuple[bytes, Path]]:
        for shelf in self._shelves():
            yield from _blobs_in(shelf)

    # --- who may fetch

    def grant(self, task_id: bytes, peer: str, blob: bytes) -> None:
        """From now on `peer` may fetch `blob` by naming `task_id`; a second grant changes nothing."""
        with self._lock:
            self._new.discard(blob)
        granted = self._grants.setdefault(task_id, set())
        if (peer, blob) not in granted:
            granted.add((peer, blob))
            self._uses[blob] = self._uses.get(blob, 0) + 1

    def load_grants(self, rows: Iterable[tuple[bytes, str, bytes]]) -> None:
        """The rows of blob_grants; called at the start, before anything is revoked."""
        for row in rows:
            self.grant(*row)

    def revoke(self, task_id: bytes) -> None:
        """Nobody may fetch the task's blobs any longer; those granted for no other task are deleted.

        A file that cannot be deleted now is left to the sweeps, which tell of it when it still cannot be.
        """
        for _, blob in self._grants.pop(task_id, ()):
            left = self._uses[blob] - 1
            if left:
                self._uses[blob] = left
            else:
                del self._uses[blob]
                # In this order: a fetch that ends between the two sees the one, or is seen by the other.
                with contextlib.suppress(StorageError):
                    self.parts.forget(blob)
                with contextlib.suppress(StorageError):
                    self.delete(blob, forced=False)

    def succeeded(self, old: str, new: str) -> None:
        """A peer goes by another id: what was granted under the old one is granted under the new one instead."""
        for granted in self._grants.values():
            moved = [pair for pair in granted if pair[0] == old]
            granted.difference_update(moved)
            granted.update((new, blob) for _, blob in moved)

    def may_fetch(self, peer: str, task_id: bytes, blob: bytes) -> bool:
        """Whether this peer was granted this blob for this task."""
        return (peer, blob) in self._grants.get(task_id, ())

    # --- who has sent what

    def came_from(self, blob: bytes, size: int, source: str) -> bool:
        """Whether the blob is here, of that size, and `source` has shown that it has it; an empty one need not."""
        return (
            self.has(blob) and self.size(blob) == size and (not source or source_tag(source) in self._sources_of(blob))
        )

    def note_source(self, blob: bytes, source: str) -> None:
        """`source` has sent the blob, whole; remembered over restarts where it is large, as long as it is here."""
        tag = source_tag(source)
        known = self._sources_of(blob)
        if not source or tag in known or len(known) >= limits.BLOB_SOURCES_MAX:
            return
        known.add(tag)
        path = self.path(blob)
        with contextlib.suppress(OSError):
            if path.stat().st_size >= limits.BLOB_LEAVES_KEPT_FROM:
                with path.with_suffix(_SOURCES).open("a") as file:
                    file.write(tag + "\n")

    def _sources_of(self, blob: bytes) -> set[str]:
        known = self._sources.get(blob)
        if known is None:
            known = self._sources[blob] = set()
            with contextlib.suppress(OSError, ValueError):
                known.update(self.path(blob).with_suffix(_SOURCES).read_text().split())
        return known


def _blobs_in(shelf: Path) -> Iterator[tuple[bytes, Path]]:
    for file in shelf.iterdir():
        try:
            yield bytes.fromhex(file.name), file
        except ValueError:
            continue


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
        self._store.reserve(len(data))
        self._hasher.update(data)
        try:
            self._file.write(data)
        except OSError as err:
            raise translated(err, self._path) from err
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
        if expected is None:
            self._store.note_new(blob)
        try:
            self._file.flush()
            if durable:
                sync(self._file.fileno())
            self._file.close()
            target.parent.mkdir(mode=0o700, exist_ok=True)
            self._store.place(self._path, target, self._hasher.size)
        except OSError as err:
            self.abort()
            raise translated(err, target) from err
        # From here on the bytes are the store's and stay counted, whatever fails.
        self._file = None
        self._store.keep_leaves(blob, self._hasher.size, self._hasher.leaves)
        if durable:
            try:
                sync_directory(target.parent)
            except OSError as err:
                raise translated(err, target) from err
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
        self._store.release(self._hasher.size)
