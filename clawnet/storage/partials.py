"""Blobs on their way in: the chunks that were verified lie in files of their own, so that a cut costs none of them.

A part is two files, named by the blob and by whose nodes send it: `.leaves` holds the size and the chunks' hashes,
which prove each other by the blob's id, and `.part` holds the chunks from the first on. What a crash left behind the
last verified chunk is found by hashing and cut off. A part lives as long as somebody waits for its blob.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from clawnet import limits
from clawnet.errors import DataError, NotFoundError, StorageError, StorageFullError
from clawnet.storage.files import noting, open_new, sync, sync_directory, translated, write_back
from clawnet.wire.blobid import LEAF_BYTES, id_of_leaves, leaf, leaf_count, split_leaves

if TYPE_CHECKING:
    from clawnet.storage.blobs import BlobStore

Bytes = bytes | bytearray | memoryview
_PART: Final = ".part"
_LEAVES: Final = ".leaves"


def source_tag(source: str) -> str:
    """How file names spell who a blob came from."""
    return hashlib.blake2b(source.encode(), digest_size=8).hexdigest()


class BlobPart:
    """One blob being fetched from one source. `verified` bytes of it are here; the next to come is the one after them.

    Its calls may take long and are made in any thread, one at a time. After `stop` the files stay for another try;
    `drop` and a full disk remove them.
    """

    def __init__(self, store: BlobStore, stem: Path, blob: bytes, size: int) -> None:
        self._store = store
        self._stem = stem
        self.blob = blob
        self.size = size
        self.verified = 0
        self.wanted = True
        self._fd = -1
        self._sent_off = 0
        self._leaves: list[bytes] = []

    def find(self) -> int:
        """Looks at what an earlier try left, chunk by chunk; from where on the blob is needed."""
        self._leaves = self._read_leaves()
        self.verified = self._store.parts.known.get(self._stem.name, -1) if self._leaves else 0
        if self.verified < 0:
            self.verified = self._count_verified()
        return self.verified

    def _read_leaves(self) -> list[bytes]:
        try:
            raw = self._stem.with_suffix(_LEAVES).read_bytes()
        except OSError:
            return []
        size, leaves = int.from_bytes(raw[:8], "big"), split_leaves(raw[8:])
        good = size == self.size and len(leaves) == leaf_count(size) and id_of_leaves(size, leaves) == self.blob
        return leaves if good else []

    def _count_verified(self) -> int:
        found = 0
        with contextlib.suppress(OSError), self._stem.with_suffix(_PART).open("rb", buffering=0) as file:
            for expected in self._leaves:
                chunk = file.read(min(limits.BLOB_CHUNK_BYTES, self.size - found))
                if not chunk or leaf(chunk) != expected:
                    break
                found += len(chunk)
        return found

    def begin(self, leaves: bytes) -> None:
        """The sender's chunk hashes, which prove to be the blob's: from now on chunks may be written."""
        self._leaves = split_leaves(leaves)
        part = self._stem.with_suffix(_PART)
        try:
            self._fd = os.open(part, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o600)
            before = os.fstat(self._fd).st_size
            os.ftruncate(self._fd, self.verified)
            self._store.release(before - self.verified)
            os.lseek(self._fd, self.verified, os.SEEK_SET)
            self._sent_off = self.verified
            if not self.verified:
                with open_new(self._stem.with_suffix(_LEAVES), replace=True) as file:
                    file.write(self.size.to_bytes(8, "big") + leaves)
        except OSError as err:
            raise self._failed(err) from err

    def write(self, pieces: Sequence[Bytes]) -> None:
        """The next chunks, verified before, in pieces of any length."""
        if not self.wanted:
            raise NotFoundError(f"nobody waits for the blob {self.blob.hex()[:16]} any longer")
        more = sum(map(len, pieces))
        try:
            self._store.check_room(more)
            self._store.reserve(more)
        except StorageFullError:
            self.drop()
            raise
        try:
            _write_all(self._fd, pieces)
        except OSError as err:
            os.ftruncate(self._fd, self.verified)  # what is counted again by its size must be no more than this
            self._store.release(more)
            raise self._failed(err) from err
        self.verified += more
        if self.verified - self._sent_off >= _WRITE_BACK_BYTES:
            write_back(self._fd, self._sent_off, self.verified - self._sent_off)
            self._sent_off = self.verified

    def commit(self) -> None:
        """All chunks are here: the blob is whole, and on the disk, when this returns."""
        if self.verified != self.size:
            raise DataError(f"{self.verified} of {self.size} bytes of the blob {self.blob.hex()[:16]} are here")
        if not self.wanted:
            raise NotFoundError(f"nobody waits for the blob {self.blob.hex()[:16]} any longer")
        target = self._store.path(self.blob)
        try:
            sync(self._fd)
            os.close(self._fd)
            self._fd = -1
            target.parent.mkdir(mode=0o700, exist_ok=True)
            self._store.place(self._stem.with_suffix(_PART), target, self.size)
            self._store.keep_leaves(self.blob, self.size, self._leaves)
            sync_directory(target.parent)
        except OSError as err:
            raise self._failed(err) from err
        self._stem.with_suffix(_LEAVES).unlink(missing_ok=True)
        self._store.parts.ended(self)
        if not self.wanted:
            self._store.delete(self.blob)
            raise NotFoundError(f"nobody waits for the blob {self.blob.hex()[:16]} any longer")

    def stop(self) -> None:
        """The try is over. What was verified stays, as long as the blob is waited for."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self.verified and self.wanted and self._store.parts.is_open(self):
            self._store.parts.known[self._stem.name] = self.verified
            self._store.parts.ended(self)
        else:
            self.drop()

    def drop(self) -> None:
        """Forgets all that came; after commit it does nothing."""
        if not self._store.parts.is_open(self):
            return
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._store.parts.ended(self)
        self._store.parts.remove(self._stem)

    def _failed(self, err: OSError) -> Exception:
        path = self._stem.with_suffix(_PART)
        self.drop()
        return translated(err, path)


class Parts:
    """The parts in one directory: at most BLOB_PARTS_MAX, shared by those that send them.

    Of whoever has the most, the part untouched longest goes first: nobody's go for what another begins.

    `known` is how many bytes of a part were verified in this process, by the name of its files.
    """

    def __init__(self, directory: Path, store: BlobStore) -> None:
        self.directory = directory
        self.known: dict[str, int] = {}
        self._store = store
        self._open: dict[str, BlobPart] = {}
        directory.mkdir(mode=0o700, exist_ok=True)
        for file in list(directory.iterdir()):
            if file.suffix == _LEAVES and not file.with_suffix(_PART).exists():
                file.unlink()

    @property
    def bytes_held(self) -> int:
        """What all parts take on the disk, their chunk hashes left out."""
        return sum(file.stat().st_size for file in self.directory.glob("*" + _PART))

    def open(self, blob: bytes, size: int, source: str) -> BlobPart:
        """The part of this blob from this source, begun or not; one fetch at a time may have it."""
        stem = self.directory / f"{blob.hex()}-{source_tag(source)}"
        assert stem.name not in self._open, "one fetch of a blob from a source at a time"
        part = self._open[stem.name] = BlobPart(self._store, stem, blob, size)
        self._bound()
        return part

    def is_open(self, part: BlobPart) -> bool:
        """False once it was committed, stopped or dropped."""
        return self._open.get(part._stem.name) is part

    def ended(self, part: BlobPart) -> None:
        """The part is not written any longer."""
        self._open.pop(part._stem.name, None)

    def remove(self, stem: Path) -> None:
        """Deletes a part's files."""
        self.known.pop(stem.name, None)
        part = stem.with_suffix(_PART)
        with contextlib.suppress(FileNotFoundError):
            size = part.stat().st_size
            part.unlink()
            self._store.release(size)
        stem.with_suffix(_LEAVES).unlink(missing_ok=True)

    def forget(self, blob: bytes) -> None:
        """Nobody waits for the blob: a fetch under way ends at its next chunk, what lies here goes."""
        self._remove_if(lambda stem: stem.name.startswith(blob.hex()))

    def sweep(self, wanted: Callable[[bytes], bool], before_ms: int = 0) -> None:
        """Removes parts of blobs that are not wanted, and those not written since then."""

        def stale(stem: Path) -> bool:
            try:
                blob = bytes.fromhex(stem.name.partition("-")[0])
                written_ns = stem.with_suffix(_PART).stat().st_mtime_ns
            except (ValueError, OSError):
                return True
            return not wanted(blob) or written_ns < before_ms * 1_000_000

        self._remove_if(stale)

    def _stems(self) -> Iterable[Path]:
        return [file.with_suffix("") for file in self.directory.glob("*" + _PART)]

    def _remove_if(self, goes: Callable[[Path], bool]) -> None:
        for name, part in list(self._open.items()):
            if goes(self.directory / name):
                part.wanted = False
        failures: list[StorageError] = []
        for stem in self._stems():
            with noting(failures, stem):
                if stem.name not in self._open and goes(stem):
                    self.remove(stem)
        if failures:
            raise failures[0]

    def _bound(self) -> None:
        """Who sends no more than an even share loses nothing; parts that are being written cannot go."""
        idle = [stem for stem in self._stems() if stem.name not in self._open]
        over = len(idle) + len(self._open) - limits.BLOB_PARTS_MAX
        if over <= 0:
            return
        held = Counter(_sender(name) for name in (*self._open, *(stem.name for stem in idle)))
        share = limits.BLOB_PARTS_MAX // len(held)
        idle.sort(key=lambda stem: stem.with_suffix(_PART).stat().st_mtime_ns)
        for _ in range(over):
            most = max((held[_sender(stem.name)] for stem in idle), default=0)
            if most <= share:
                return
            goes = next(stem for stem in idle if held[_sender(stem.name)] == most)
            idle.remove(goes)
            held[_sender(goes.name)] -= 1
            self.remove(goes)


def _sender(name: str) -> str:
    """Who sends a part, by the name of its files."""
    return name.rpartition("-")[2]


class SeenPart:
    """A blob that is here already, sent by somebody who has yet to show that it has it: compared, never written.

    Else whoever names another's file by its id would have it here without having it, or would learn that it is here.
    """

    verified = 0

    def __init__(self, blob: bytes, size: int) -> None:
        self.blob = blob
        self.size = size

    def find(self) -> int:
        return 0

    def begin(self, leaves: bytes) -> None:
        assert len(leaves) == LEAF_BYTES * leaf_count(self.size)

    def write(self, pieces: Sequence[Bytes]) -> None:
        self.verified += sum(map(len, pieces))

    def commit(self) -> None:
        assert self.verified == self.size

    def stop(self) -> None:
        """Nothing was kept."""


def _write_all(fd: int, pieces: Sequence[Bytes]) -> None:
    """All bytes. The kernel finds room for a few pages at a time far faster than for a megabyte in one piece."""
    for piece in pieces:
        rest = memoryview(piece)
        while rest:
            rest = rest[os.write(fd, rest[:_WRITE_BYTES]) :]


_WRITE_BYTES: Final = 64 * limits.KIB
_WRITE_BACK_BYTES: Final = 8 * limits.MIB
