"""/clawnet/blob/1.0.0: bulk data between the parties of a task, every chunk checked against the blob's id as it comes.

The asker sends requests, one frame each, as many as it likes; the holder answers them in order: a frame with the size
and the chunks' hashes, then the bytes from the chunk on that the asker lacks. The asker (fetching.py) checks the size
against what it was promised and the hashes against the id before the first byte, and each chunk against its hash before
it is kept. What a peer may not have is `not found`.

Here are the frames, what is needed of the store, and the holder's side. Files are read and hashed in threads, a piece
ahead of what is being sent; a piece is read when the asker has taken the one before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from io import BufferedIOBase, RawIOBase
from itertools import islice
from typing import Annotated, Any, Protocol, TypeVar

from msgspec import Meta, Struct

from clawnet import limits
from clawnet.errors import ClawnetError, DataError, LinkError, WireError
from clawnet.net.port import Bytes, Stream
from clawnet.wire.batch import frame
from clawnet.wire.blobid import leaf
from clawnet.wire.codec import decode_struct, encode
from clawnet.wire.messages import U64, Bytes16, Bytes32, Word

BLOB_PROTOCOL = "/clawnet/blob/1.0.0"
NOT_FOUND = "not found"
NO_OFFSET = "no such offset"
T = TypeVar("T")
Content = RawIOBase | BufferedIOBase
Moved = Callable[[str, bytes, int, int], None]
"""How far a long transfer is, every PROGRESS_S: (what, about, bytes done, bytes in all), as in wire/fileevents.py."""


class BlobRequest(Struct, frozen=True, array_like=True, gc=False, forbid_unknown_fields=True):
    """Asks for a blob of a task, from `offset` on: the start of a chunk, 0 for all of it."""

    task_id: Bytes16
    blob: Bytes32
    offset: U64


class BlobAnswer(Struct, frozen=True, array_like=True, gc=False, forbid_unknown_fields=True):
    """`refusal` is empty when bytes follow; `size` is that of the whole blob, `leaves` are the hashes of all chunks."""

    refusal: Word
    size: U64
    leaves: Annotated[bytes, Meta(max_length=limits.BLOB_LEAVES_BYTES_MAX)]


class BlobPart(Protocol):
    """A blob on its way into the store, verified chunk by chunk before it is written; invisible until committed.

    `verified` bytes of it are here. Every call may take long, is made in any thread, and may raise a ClawnetError.
    """

    @property
    def verified(self) -> int: ...
    def begin(self, leaves: bytes, /) -> object:
        """These are its chunks' hashes, checked against the blob's id."""

    def write(self, pieces: Sequence[Bytes], /) -> object:
        """The next chunks, in pieces of any length."""

    def commit(self) -> object:
        """All is there; it can be read, and lasts, from now on."""

    def stop(self) -> object:
        """The try is over; what is there may be gone on with. After commit it does nothing."""


class BlobStore(Protocol):
    """What the blob streams need of the store. Every call may raise a ClawnetError such as StorageFullError."""

    def may_fetch(self, peer: str, task_id: bytes, blob: bytes, /) -> bool:
        """Whether the peer is a party of that task and the blob belongs to it."""

    def has(self, blob: bytes, /) -> bool:
        """Whether the blob is here, whole."""

    def came_from(self, blob: bytes, size: int, source: str, /) -> bool:
        """Whether it is here, of that size, and the source has shown that it has it; the empty source need not."""

    def note_source(self, blob: bytes, source: str, /) -> object:
        """The source has sent all of it."""

    def size(self, blob: bytes, /) -> int:
        """Its size in bytes."""

    def leaves(self, blob: bytes, /) -> Sequence[bytes]:
        """The hashes of its chunks."""

    def read_chunks(self, blob: bytes, /) -> Iterator[bytes]:
        """Its content in chunks of limits.BLOB_CHUNK_BYTES, the last one shorter."""

    def opened(self, blob: bytes, offset: int, /) -> Content:
        """Its content from `offset` on."""

    def fetching(self, blob: bytes, size: int, source: str, /) -> BlobPart:
        """Room for a blob of `size` bytes that `source` sends, and what an earlier try has left of it."""


async def in_thread(work: Callable[..., T], *args: Any) -> T:
    """Does it in a thread. Who cancels this waits until it is done: nothing is closed while it is in use."""
    future = asyncio.get_running_loop().run_in_executor(None, work, *args)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait([future])
        raise


async def where_due(size: int, work: Callable[..., T], *args: Any) -> T:
    """Does it in a thread when it is about more than a piece, else at once."""
    return await in_thread(work, *args) if size > limits.BLOB_PIECE_BYTES else work(*args)


async def write_all(stream: Stream, data: Bytes) -> None:
    """Writes with back-pressure; LinkError when the peer takes nothing for BLOB_STALL_S."""
    try:
        async with asyncio.timeout(limits.BLOB_STALL_S):
            await stream.write(data)
    except TimeoutError as late:
        raise LinkError(f"the peer took nothing for {limits.BLOB_STALL_S:g} s", peer=stream.connection.peer) from late


class BlobDesk:
    """Serves blob streams of others, at most BLOB_STREAMS_PER_PEER_MAX a peer."""

    def __init__(
        self,
        store: BlobStore,
        note: Callable[..., None],
        count: Callable[[str, int], None],
        moved: Moved = lambda what, about, done, total: None,
    ) -> None:
        self._store = store
        self._note = note
        self._count = count
        self._moved = moved
        self._serving: dict[str, int] = {}

    async def serve(self, stream: Stream) -> None:
        """Answers requests until the asker ends the stream, stalls, or breaks the protocol."""
        peer = stream.connection.peer
        if self._serving.get(peer, 0) >= limits.BLOB_STREAMS_PER_PEER_MAX:
            self._count("blob_streams_refused", 1)
            stream.reset()
            return
        self._serving[peer] = self._serving.get(peer, 0) + 1
        try:
            while await self._serve_one(stream, peer):
                pass
            stream.close_write()
        except DataError as problem:
            self._note("error", "blob.damaged", peer=peer, problem=problem.message)
            stream.reset()
        except (ClawnetError, OSError) as problem:
            self._note("debug", "blob.stream_dropped", peer=peer, problem=str(problem))
            stream.reset()
        finally:
            left = self._serving[peer] - 1
            if left:
                self._serving[peer] = left
            else:
                del self._serving[peer]

    async def _serve_one(self, stream: Stream, peer: str) -> bool:
        """False when the asker has no further request."""
        try:
            async with asyncio.timeout(limits.BLOB_STALL_S):
                head = await stream.read(4)
                if not head:
                    return False
                head += await stream.readexactly(4 - len(head)) if len(head) < 4 else b""
                length = int.from_bytes(head, "big")
                if not 0 < length <= limits.KIB:
                    raise WireError(f"blob request of {length} bytes")
                request = decode_struct(BlobRequest, await stream.readexactly(length), limits.KIB)
        except TimeoutError as late:
            raise LinkError("no request came", peer=peer) from late
        store, blob = self._store, request.blob
        allowed = store.may_fetch(peer, request.task_id, blob) and store.has(blob)
        size = store.size(blob) if allowed else 0
        refusal = "" if allowed else NOT_FOUND
        if allowed and (request.offset > size or request.offset % limits.BLOB_CHUNK_BYTES):
            refusal = NO_OFFSET
        if refusal:
            self._count("blobs_refused", 1)
            await write_all(stream, frame(encode(BlobAnswer(refusal, 0, b""))))
            return True
        leaves = await where_due(size, store.leaves, blob)
        await write_all(stream, frame(encode(BlobAnswer("", size, b"".join(leaves)))))
        await self._send(stream, request, size, leaves)
        return True

    async def _send(self, stream: Stream, request: BlobRequest, size: int, leaves: Sequence[bytes]) -> None:
        blob, left = request.blob, size - request.offset
        expected = islice(leaves, request.offset // limits.BLOB_CHUNK_BYTES, None)
        with self._store.opened(blob, request.offset) as file:
            room = _room(left)
            if left <= len(room):
                await self._send_piece(stream, _take(file, room, left, expected, blob))
                return
            loop = asyncio.get_running_loop()
            told_s, other = loop.time(), _room(left)
            ahead = loop.run_in_executor(None, _take, file, room, left, expected, blob)
            try:
                while left:
                    piece = await asyncio.shield(ahead)
                    left -= len(piece)
                    # What was sent before has left this memory: the next piece goes there, while this one is sent.
                    room, other = other, room
                    ahead = loop.run_in_executor(None, _take, file, room, left, expected, blob)
                    await self._send_piece(stream, piece)
                    if loop.time() - told_s >= limits.PROGRESS_S:
                        told_s = loop.time()
                        self._moved("uploading", request.task_id, size - left, size)
            finally:
                if not ahead.done():
                    await asyncio.wait([ahead])

    async def _send_piece(self, stream: Stream, piece: memoryview) -> None:
        for start in range(0, len(piece), limits.BLOB_CHUNK_BYTES):
            chunk = piece[start : start + limits.BLOB_CHUNK_BYTES]
            await write_all(stream, chunk)
            self._count("blob_bytes_sent", len(chunk))


def _room(left: int) -> memoryview:
    return memoryview(bytearray(min(left, limits.BLOB_PIECE_BYTES)))


def _take(file: Content, room: memoryview, left: int, expected: Iterator[bytes], blob: bytes) -> memoryview:
    """The next piece of a blob, in `room`: nothing that this disk has damaged is passed on."""
    piece = room[:left]
    filled = 0
    while filled < len(piece) and (more := file.readinto(piece[filled:])):
        filled += more
    for start in range(0, len(piece), limits.BLOB_CHUNK_BYTES):
        if leaf(piece[start : start + limits.BLOB_CHUNK_BYTES]) != next(expected, b"") or filled < len(piece):
            raise DataError(f"the stored blob {blob.hex()[:16]} is damaged")
    return piece
