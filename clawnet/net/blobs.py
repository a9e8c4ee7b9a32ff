"""/clawnet/blob/1.0.0: bulk data between the parties of a task, every chunk checked against the blob's id as it comes.

The asker sends requests, one frame each, as many as it likes; the holder answers them in order: a frame with the size
and the chunks' hashes, then the bytes. The asker checks the size against what it was promised and the hashes against
the id before the first byte, and each chunk against its hash before it is kept. What a peer may not have is
`not found`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Annotated, Protocol

from msgspec import Meta, Struct

from clawnet import limits
from clawnet.errors import ClawnetError, LinkError, WireError
from clawnet.net.joining import read_frame
from clawnet.net.port import Connection, Stream
from clawnet.wire.batch import frame
from clawnet.wire.blobid import BlobHasher, id_of_leaves, leaf, leaf_count
from clawnet.wire.codec import decode_struct, encode
from clawnet.wire.messages import U64, Bytes16, Bytes32, Word

BLOB_PROTOCOL = "/clawnet/blob/1.0.0"
NOT_FOUND = "not found"
LEAF_BYTES = 32


class BlobRequest(Struct, frozen=True, array_like=True, gc=False, forbid_unknown_fields=True):
    """Asks for a blob of a task, from `offset` on (0 in this version)."""

    task_id: Bytes16
    blob: Bytes32
    offset: U64


class BlobAnswer(Struct, frozen=True, array_like=True, gc=False, forbid_unknown_fields=True):
    """`refusal` is empty when `size` bytes follow; `leaves` are the hashes of their chunks, one after the other."""

    refusal: Word
    size: U64
    leaves: Annotated[bytes, Meta(max_length=limits.BLOB_FRAME_BYTES_MAX - limits.KIB)]


class BlobWriter(Protocol):
    """A blob on its way into the store; invisible until committed."""

    def write(self, data: bytes, /) -> object:
        """The next bytes."""

    def commit(self, blob: bytes, /) -> object:
        """All is there and was verified to be `blob`; it can be read from now on."""

    def abort(self) -> None:
        """Forgets what was written. After commit it does nothing."""


class BlobStore(Protocol):
    """What the blob streams need of the store. Every call may raise a ClawnetError such as StorageFullError."""

    def may_fetch(self, peer: str, task_id: bytes, blob: bytes, /) -> bool:
        """Whether the peer is a party of that task and the blob belongs to it."""

    def has(self, blob: bytes, /) -> bool:
        """Whether the blob is here, whole."""

    def size(self, blob: bytes, /) -> int:
        """Its size in bytes."""

    def read_chunks(self, blob: bytes, /) -> Iterator[bytes]:
        """Its content in chunks of limits.BLOB_CHUNK_BYTES, the last one shorter."""

    def writer(self, size: int, /) -> BlobWriter:
        """Room for a blob of `size` bytes."""


class BlobDesk:
    """Serves blob streams of others and fetches over own ones, at most BLOB_STREAMS_PER_PEER_MAX a peer each way."""

    def __init__(self, store: BlobStore, note: Callable[..., None], count: Callable[[str, int], None]) -> None:
        self._store = store
        self._note = note
        self._count = count
        self._serving: dict[str, int] = {}
        self._turns: dict[str, asyncio.Semaphore] = {}
        self._idle: dict[Connection, list[tuple[Stream, float]]] = {}
        self._leaves: OrderedDict[bytes, bytes] = OrderedDict()

    # --- the holder's side

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
        refusal = self._refusal(peer, request)
        if refusal:
            self._count("blobs_refused", 1)
            await _write(stream, frame(encode(BlobAnswer(refusal, 0, b""))))
            return True
        size = self._store.size(request.blob)
        leaves = await self._leaves_of(request.blob)
        await _write(stream, frame(encode(BlobAnswer("", size, leaves))))
        for chunk in self._store.read_chunks(request.blob):
            await _write(stream, chunk)
            self._count("blob_bytes_sent", len(chunk))
            await asyncio.sleep(0)
        return True

    def _refusal(self, peer: str, request: BlobRequest) -> str:
        if not self._store.may_fetch(peer, request.task_id, request.blob) or not self._store.has(request.blob):
            return NOT_FOUND
        if request.offset:
            return "no resume"
        return ""

    async def _leaves_of(self, blob: bytes) -> bytes:
        leaves = self._leaves.get(blob)
        if leaves is None:
            hasher = BlobHasher()
            for chunk in self._store.read_chunks(blob):
                hasher.update(chunk)
                await asyncio.sleep(0)
            if hasher.digest() != blob:
                raise WireError(f"the stored blob {blob.hex()[:16]} is damaged")
            leaves = self._leaves[blob] = b"".join(hasher.leaves)
            if len(self._leaves) > limits.BLOB_LEAVES_CACHED:
                self._leaves.popitem(last=False)
        return leaves

    # --- the asker's side

    async def fetch(
        self, connection: Connection, task_id: bytes, blobs: Sequence[tuple[bytes, int]], inline_max: int
    ) -> bytes:
        """Fetches the blobs that are not here yet, all over one stream; returns the content of a single small one.

        Raises LinkError (gone, stalled, not found), WireError (not what was promised), or what the store raises.
        """
        inline = len(blobs) == 1 and 0 < blobs[0][1] <= inline_max
        wanted = [(blob, size) for blob, size in dict.fromkeys(blobs) if not self._store.has(blob)]
        if not wanted:
            return b"".join(self._store.read_chunks(blobs[0][0])) if inline else b""
        turn = self._turns.setdefault(connection.peer, asyncio.Semaphore(limits.BLOB_STREAMS_PER_PEER_MAX))
        async with turn:
            stream = await self._stream_to(connection)
            with contextlib.ExitStack() as failed:
                failed.callback(stream.reset)
                asked = b"".join(frame(encode(BlobRequest(task_id, blob, 0))) for blob, _ in wanted)
                await _write(stream, asked)
                parts = [await self._receive(stream, blob, size, inline) for blob, size in wanted]
                failed.pop_all()
            self._idle.setdefault(connection, []).append((stream, asyncio.get_running_loop().time()))
        return parts[0] if inline else b""

    def forget(self, connection: Connection) -> None:
        """The connection is gone, and its idle streams with it."""
        self._idle.pop(connection, None)
        turn = self._turns.get(connection.peer)
        if turn is not None and not turn.locked():
            self._turns.pop(connection.peer)

    async def _stream_to(self, connection: Connection) -> Stream:
        idle = self._idle.get(connection, [])
        while idle:
            stream, since_s = idle.pop()
            if asyncio.get_running_loop().time() - since_s > limits.BLOB_STALL_S / 2:
                stream.reset()
            elif not stream.closed.done() and not stream.unread:
                return stream
        return await connection.open_stream([BLOB_PROTOCOL])

    async def _receive(self, stream: Stream, blob: bytes, size: int, inline: bool) -> bytes:
        answer = await self._answer(stream, blob, size)
        leaves = [answer.leaves[at : at + LEAF_BYTES] for at in range(0, len(answer.leaves), LEAF_BYTES)]
        if inline:
            return b"".join([chunk async for chunk in _chunks(stream, size, leaves)])
        writer = self._store.writer(size)
        try:
            async for chunk in _chunks(stream, size, leaves):
                writer.write(chunk)
                self._count("blob_bytes_received", len(chunk))
            writer.commit(blob)
        finally:
            writer.abort()
        return b""

    async def _answer(self, stream: Stream, blob: bytes, size: int) -> BlobAnswer:
        try:
            async with asyncio.timeout(limits.BLOB_STALL_S):
                raw = await read_frame(stream, limits.BLOB_FRAME_BYTES_MAX)
        except TimeoutError as late:
            raise LinkError(f"the blob {blob.hex()[:16]} was not sent within {limits.BLOB_STALL_S:g} s") from late
        answer = decode_struct(BlobAnswer, raw, limits.BLOB_FRAME_BYTES_MAX)
        if answer.refusal:
            raise LinkError(f"the blob {blob.hex()[:16]}: {answer.refusal}")
        if answer.size != size:
            raise WireError(f"the blob {blob.hex()[:16]} was promised with {size} bytes and has {answer.size}")
        parts = [answer.leaves[at : at + LEAF_BYTES] for at in range(0, len(answer.leaves), LEAF_BYTES)]
        if len(answer.leaves) != LEAF_BYTES * leaf_count(size) or id_of_leaves(size, parts) != blob:
            raise WireError(f"the chunk hashes of blob {blob.hex()[:16]} are not its own")
        return answer


async def _chunks(stream: Stream, size: int, leaves: list[bytes]) -> AsyncIterator[bytes]:
    """The blob's chunks, each verified."""
    left = size
    for number, expected in enumerate(leaves):
        try:
            async with asyncio.timeout(limits.BLOB_STALL_S):
                chunk = await stream.readexactly(min(left, limits.BLOB_CHUNK_BYTES))
        except TimeoutError as late:
            raise LinkError(f"the blob's sender stalled for {limits.BLOB_STALL_S:g} s") from late
        if leaf(chunk) != expected:
            raise WireError(f"chunk {number} of the blob is not what its hash says")
        left -= len(chunk)
        yield chunk


async def _write(stream: Stream, data: bytes) -> None:
    try:
        async with asyncio.timeout(limits.BLOB_STALL_S):
            await stream.write(data)
    except TimeoutError as late:
        raise LinkError(f"the peer took nothing for {limits.BLOB_STALL_S:g} s", peer=stream.connection.peer) from late
