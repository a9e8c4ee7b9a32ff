"""A blob's id: SHA-256 over its size and the hashes of its chunks, so that every chunk can be checked as it arrives.

leaf = SHA-256(0x00 || chunk), id = SHA-256(0x01 || size as u64 big-endian || leaf ...), in chunks of
limits.BLOB_CHUNK_BYTES, the last one shorter. The two prefixes keep a leaf from ever passing for an id (as in RFC
6962, section 2.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import Final

from clawnet import limits

LEAF_PREFIX: Final = b"\x00"
ROOT_PREFIX: Final = b"\x01"
LEAF_BYTES: Final = 32


def leaf(chunk: bytes | bytearray | memoryview) -> bytes:
    """The hash of one chunk."""
    digest = sha256(LEAF_PREFIX)
    digest.update(chunk)
    return digest.digest()


def split_leaves(joined: bytes) -> list[bytes]:
    """Chunk hashes that lie one after the other; the last is shorter where that is not what they are."""
    return [joined[at : at + LEAF_BYTES] for at in range(0, len(joined), LEAF_BYTES)]


def leaf_count(size: int) -> int:
    """How many chunks a blob of `size` bytes has; the empty blob has none."""
    return -(-size // limits.BLOB_CHUNK_BYTES)


def id_of_leaves(size: int, leaves: Sequence[bytes]) -> bytes:
    """The id of the blob of `size` bytes whose chunks have these hashes."""
    return sha256(b"".join((ROOT_PREFIX, size.to_bytes(8, "big"), *leaves))).digest()


def blob_id(data: bytes | bytearray | memoryview) -> bytes:
    """The id of a blob held in memory."""
    hasher = BlobHasher()
    hasher.update(data)
    return hasher.digest()


class BlobHasher:
    """The id of a blob that comes in pieces of any length; `leaves` are the finished chunks' hashes."""

    __slots__ = ("_chunk", "_fill", "leaves", "size")

    def __init__(self) -> None:
        self.size = 0
        self.leaves: list[bytes] = []
        self._chunk = sha256(LEAF_PREFIX)
        self._fill = 0

    def update(self, data: bytes | bytearray | memoryview) -> None:
        """The next bytes."""
        view = memoryview(data)
        self.size += len(view)
        while view:
            taken = view[: limits.BLOB_CHUNK_BYTES - self._fill]
            self._chunk.update(taken)
            self._fill += len(taken)
            view = view[len(taken) :]
            if self._fill == limits.BLOB_CHUNK_BYTES:
                self._finish_chunk()

    def digest(self) -> bytes:
        """The id of all that came; nothing may follow."""
        if self._fill:
            self._finish_chunk()
        return id_of_leaves(self.size, self.leaves)

    def _finish_chunk(self) -> None:
        self.leaves.append(self._chunk.digest())
        self._chunk = sha256(LEAF_PREFIX)
        self._fill = 0
