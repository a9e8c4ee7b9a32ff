"""The asker's side of /clawnet/blob/1.0.0: blobs come over one stream, verified before they are kept, once each.

A fetch that is cut leaves what it verified in the store, and the next one asks for the rest. Two fetches that want the
same blob from the same source share one transfer. While one batch of chunks is hashed and written in a thread, the next
is read: more than that is never held here, and the sender waits.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager

from msgspec import Struct

from clawnet import limits
from clawnet.errors import ClawnetError, LinkError, StorageError, WireError
from clawnet.net.blobs import (
    BLOB_PROTOCOL,
    BlobAnswer,
    BlobPart,
    BlobRequest,
    BlobStore,
    Moved,
    in_thread,
    where_due,
    write_all,
)
from clawnet.net.joining import read_frame
from clawnet.net.port import Connection, Stream
from clawnet.wire.batch import frame
from clawnet.wire.blobid import LEAF_BYTES, id_of_leaves, leaf, leaf_count, split_leaves
from clawnet.wire.codec import decode_struct, encode
from clawnet.wire.events import CONTENT, LINK, STORAGE, BlobReady

Way = Callable[[str, int], AbstractAsyncContextManager[Connection]]
BATCH_CHUNKS = limits.BLOB_PIECE_BYTES // limits.BLOB_CHUNK_BYTES


class Wish(Struct):
    """What is to be fetched: blobs (id, size) of a task. `received` counts the bytes that were new and are kept.

    `source` is whom the sender must have shown its blobs as: one that is here from elsewhere is sent all the same, and
    compared. Empty: one that is here will do.
    """

    task_id: bytes
    blobs: Sequence[tuple[bytes, int]]
    inline_max: int = 0
    source: str = ""
    received: int = 0
    request: bytes = b""
    told_s: float = 0.0

    @property
    def inline(self) -> bool:
        """Whether it is a single blob, small enough to be handed over instead of being stored."""
        return len(self.blobs) == 1 and 0 < self.blobs[0][1] <= self.inline_max


class BlobFetcher:
    """Fetches, at most BLOB_STREAMS_PER_PEER_MAX at a time from a peer; streams are used again."""

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
        self._turns: dict[str, asyncio.Semaphore] = {}
        self._idle: dict[Connection, list[tuple[Stream, float]]] = {}
        self._under_way: dict[tuple[bytes, str], asyncio.Future[None]] = {}

    async def outcome(self, request: bytes, peer: str, wish: Wish, way: Way) -> BlobReady:
        """What a fetch comes to; `way(peer, size)` leads to the peer, or raises LinkError."""
        reason, fault, inline = "", "", b""
        loop = asyncio.get_running_loop()
        began_s = wish.told_s = loop.time()
        wish.request = request
        try:
            if self.missing(wish):
                size = sum(size for _, size in wish.blobs)
                async with way(peer, size) as connection:
                    inline = await self.fetch(connection, wish)
                if size >= limits.BULK_BYTES_MIN:
                    took_s = round(loop.time() - began_s, 3)
                    self._note("info", "blobs.fetched", peer=peer, bytes=wish.received, seconds=took_s)
            else:
                inline = self.at_hand(wish)
        except WireError as problem:
            reason, fault = problem.message, CONTENT
            self._note("security", "blob.refused", peer=peer, reason=reason)
        except ClawnetError as problem:
            reason, fault = problem.message, STORAGE if isinstance(problem, StorageError) else LINK
        except OSError as problem:
            reason, fault = f"the blob store: {problem.strerror}", STORAGE
        return BlobReady(request, reason, inline, fault, wish.received)

    async def fetch(self, connection: Connection, wish: Wish) -> bytes:
        """Fetches what is not here yet, all over one stream; returns the content of a single small one.

        Raises LinkError (gone, stalled, not found), WireError (not what was promised), or what the store raises.
        """
        while True:
            wanted = self.missing(wish)
            if not wanted:
                return self.at_hand(wish)
            if wish.inline:
                return await self._fetch_over(connection, wish, wanted)
            free = [(blob, size) for blob, size in wanted if (blob, wish.source) not in self._under_way]
            if free:
                await self._fetch_over(connection, wish, free)
            else:
                await asyncio.wait([self._under_way[wanted[0][0], wish.source]])

    def at_hand(self, wish: Wish) -> bytes:
        """Of blobs that are all here, the content of a single small one."""
        return b"".join(self._store.read_chunks(wish.blobs[0][0])) if wish.inline else b""

    def missing(self, wish: Wish) -> list[tuple[bytes, int]]:
        """What of it is not here."""
        sizes = dict(wish.blobs)
        if any(sizes[blob] != size for blob, size in wish.blobs):
            raise WireError("one blob is promised with two sizes")
        return [(blob, size) for blob, size in sizes.items() if not self._store.came_from(blob, size, wish.source)]

    def forget(self, connection: Connection) -> None:
        """The connection is gone, and its idle streams with it."""
        self._idle.pop(connection, None)
        turn = self._turns.get(connection.peer)
        if turn is not None and not turn.locked():
            self._turns.pop(connection.peer)

    async def _fetch_over(self, connection: Connection, wish: Wish, blobs: Sequence[tuple[bytes, int]]) -> bytes:
        over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        names = [] if wish.inline else [(blob, wish.source) for blob, _ in blobs]
        self._under_way.update(dict.fromkeys(names, over))
        try:
            turn = self._turns.setdefault(connection.peer, asyncio.Semaphore(limits.BLOB_STREAMS_PER_PEER_MAX))
            async with turn:
                stream = await self._stream_to(connection)
                with contextlib.ExitStack() as failed:
                    failed.callback(stream.reset)
                    inline = await self._transfer(stream, wish, blobs)
                    failed.pop_all()
                if not connection.closed.done():
                    self._idle.setdefault(connection, []).append((stream, asyncio.get_running_loop().time()))
                return inline
        finally:
            for name in names:
                del self._under_way[name]
            over.set_result(None)

    async def _stream_to(self, connection: Connection) -> Stream:
        idle = self._idle.get(connection, [])
        while idle:
            stream, since_s = idle.pop()
            if asyncio.get_running_loop().time() - since_s > limits.BLOB_STALL_S / 2:
                stream.reset()
            elif not stream.closed.done() and not stream.unread:
                return stream
        return await connection.open_stream([BLOB_PROTOCOL])

    async def _transfer(self, stream: Stream, wish: Wish, blobs: Sequence[tuple[bytes, int]]) -> bytes:
        """Asks for all of them from where each is missing, then takes the answers one by one."""
        parts: list[BlobPart] = []
        try:
            if not wish.inline:
                for blob, size in blobs:
                    # Noted in the thread itself: a part that was opened while this was cancelled is stopped too.
                    await where_due(size, lambda *of: parts.append(self._store.fetching(*of)), blob, size, wish.source)
            offsets = [part.verified // limits.BLOB_CHUNK_BYTES * limits.BLOB_CHUNK_BYTES for part in parts] or [0]
            asked = zip(blobs, offsets, strict=True)
            await write_all(
                stream, b"".join(frame(encode(BlobRequest(wish.task_id, blob, at))) for (blob, _), at in asked)
            )
            if wish.inline:
                return await _receive_inline(stream, *blobs[0])
            for (blob, size), part in zip(blobs, parts, strict=True):
                await self._receive(stream, wish, blob, size, part)
            return b""
        finally:
            for part in parts:
                part.stop()

    async def _receive(self, stream: Stream, wish: Wish, blob: bytes, size: int, part: BlobPart) -> None:
        offset = part.verified
        answer = await _answer(stream, blob, size)
        left = size - offset
        await where_due(left, part.begin, answer.leaves)
        batches = _Batches(part, split_leaves(answer.leaves), offset // limits.BLOB_CHUNK_BYTES, left)
        try:
            while left:
                chunk = batches.room(min(left, limits.BLOB_CHUNK_BYTES))
                await _read_chunk(stream, chunk)
                left -= len(chunk)
                await batches.add(chunk)
                offset = self._counted(wish, offset, part)
                now_s = asyncio.get_running_loop().time()
                if now_s - wish.told_s >= limits.PROGRESS_S:
                    wish.told_s = now_s
                    self._moved("fetching", wish.request, offset, size)
        finally:
            # Also what came before a cut is kept.
            try:
                await batches.end()
            finally:
                self._counted(wish, offset, part)
        await in_thread(part.commit)
        self._store.note_source(blob, wish.source)

    def _counted(self, wish: Wish, before: int, part: BlobPart) -> int:
        """Tells of what was kept since the last time; where the part stands."""
        now = part.verified
        wish.received += now - before
        self._count("blob_bytes_received", now - before)
        return now


class _Batches:
    """Verifies and writes chunks in a thread: those of one batch while the next one is read.

    The memory a chunk lay in is used again for another one.
    """

    def __init__(self, part: BlobPart, leaves: list[bytes], first: int, size: int) -> None:
        self._part = part
        self._leaves = leaves
        self._next = first
        self._size = size
        self._waiting: list[memoryview] = []
        self._written: list[memoryview] = []
        self._free: list[memoryview] = []
        self._busy: asyncio.Future[None] | None = None

    def room(self, size: int) -> memoryview:
        """Where the next chunk goes."""
        whole = self._free.pop() if self._free else memoryview(bytearray(min(self._size, limits.BLOB_CHUNK_BYTES)))
        return whole[:size]

    async def add(self, chunk: memoryview) -> None:
        """The next chunk; waits while a whole batch waits already."""
        self._waiting.append(chunk)
        if len(self._waiting) >= BATCH_CHUNKS:
            await self._hand_over()

    async def end(self) -> None:
        """All that was added is written."""
        if self._waiting:
            await self._hand_over()
        await self._settle()

    async def _settle(self) -> None:
        if self._busy is not None:
            await asyncio.wait([self._busy])
            busy, self._busy = self._busy, None
            busy.result()
        self._free += self._written
        self._written = []

    async def _hand_over(self) -> None:
        batch, self._waiting = self._waiting, []
        await self._settle()
        first, self._next = self._next, self._next + len(batch)
        expected = self._leaves[first : self._next]
        if self._size <= limits.BLOB_PIECE_BYTES:
            _keep(self._part, batch, expected, first)
            self._free += batch
            return
        self._written = batch
        self._busy = asyncio.get_running_loop().run_in_executor(None, _keep, self._part, batch, expected, first)


def _keep(part: BlobPart, batch: Sequence[memoryview], expected: Sequence[bytes], first: int) -> None:
    """Writes the chunks that are what their hashes say, up to the first that is not: that one raises WireError."""
    good = 0
    for chunk, promised in zip(batch, expected, strict=True):
        if leaf(chunk) != promised:
            break
        good += 1
    if good:
        part.write(batch[:good])
    if good < len(batch):
        raise WireError(f"chunk {first + good} of the blob is not what its hash says")


async def _receive_inline(stream: Stream, blob: bytes, size: int) -> bytes:
    answer = await _answer(stream, blob, size)
    content = bytearray(size)
    rest = memoryview(content)
    for number, expected in enumerate(split_leaves(answer.leaves)):
        chunk, rest = rest[: limits.BLOB_CHUNK_BYTES], rest[limits.BLOB_CHUNK_BYTES :]
        await _read_chunk(stream, chunk)
        if leaf(chunk) != expected:
            raise WireError(f"chunk {number} of the blob is not what its hash says")
    return bytes(content)


async def _answer(stream: Stream, blob: bytes, size: int) -> BlobAnswer:
    """The holder's answer, which is held to what was promised before a byte of the blob is read."""
    bytes_max = leaf_count(size) * LEAF_BYTES + limits.KIB
    try:
        async with asyncio.timeout(limits.BLOB_STALL_S):
            raw = await read_frame(stream, min(bytes_max, limits.BLOB_FRAME_BYTES_MAX))
    except TimeoutError as late:
        raise LinkError(f"the blob {blob.hex()[:16]} was not sent within {limits.BLOB_STALL_S:g} s") from late
    answer = decode_struct(BlobAnswer, raw, limits.BLOB_FRAME_BYTES_MAX)
    if answer.refusal:
        raise LinkError(f"the blob {blob.hex()[:16]}: {answer.refusal}")
    if answer.size != size:
        raise WireError(f"the blob {blob.hex()[:16]} was promised with {size} bytes and has {answer.size}")
    leaves = split_leaves(answer.leaves)
    if len(answer.leaves) != LEAF_BYTES * leaf_count(size) or id_of_leaves(size, leaves) != blob:
        raise WireError(f"the chunk hashes of blob {blob.hex()[:16]} are not its own")
    return answer


async def _read_chunk(stream: Stream, chunk: memoryview) -> None:
    """Fills `chunk`. LinkError when no byte comes for BLOB_STALL_S, or they drip beyond patience."""
    try:
        async with asyncio.timeout(limits.BLOB_CHUNK_S):
            filled = await stream.read_into(chunk, limits.BLOB_STALL_S)
    except TimeoutError as late:
        raise LinkError(f"the blob's sender stalled for {limits.BLOB_STALL_S:g} s") from late
    if filled < len(chunk):
        raise LinkError(f"the stream ended {len(chunk) - filled} bytes before its time", peer=stream.connection.peer)
