"""What every stream and connection does alike: the reading half, waiting writers, the desk for inbound streams."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING

from clawnet import limits
from clawnet.errors import LinkError

if TYPE_CHECKING:
    from clawnet.net.port import Bytes, Connection, DataHandler, StreamHandler


_MERGE_ABOVE_CHUNKS = 256
_MERGE_BELOW_BYTES = 1_024


class BufferedStream(ABC):
    """A stream without a carrier: arriving bytes wait here for a reader or go to the data handler.

    A carrier calls `feed`, `feed_end`, `fail` and `writable`, and fills in the hooks at the end. It must not feed
    more than the window it granted; `_consumed` tells it what the reader has taken. `write_ended` says that nothing
    more is accepted for sending, `write_done` that all of it, the end included, is on its way.
    """

    def __init__(self, connection: Connection, inbound: bool) -> None:
        self.protocol = ""
        self.connection = connection
        self.inbound = inbound
        self.closed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.unread = 0
        self.read_ended = False
        self.write_ended = False
        self.write_done = False
        self.error = ""
        self._chunks: deque[bytes] = deque()
        self._first_from = 0
        self._reader: asyncio.Future[None] | None = None
        self._filling: _Filling | None = None
        self._writer: asyncio.Future[None] | None = None
        self._on_data: DataHandler | None = None
        self._end_told = False
        self._paused = False

    @property
    def buffered(self) -> int:
        """Bytes kept for sending."""
        return 0

    # --- reading

    async def read(self, n_max: int = limits.STREAM_CHUNK_BYTES) -> bytes:
        """See port.Stream.read."""
        while not self._chunks:
            if self.read_ended:
                return b""
            self._check_alive()
            await self._wait_for_data()
        chunk = self._take(n_max)
        self._consumed(len(chunk))
        return chunk

    async def readexactly(self, n: int) -> bytes:
        """See port.Stream.readexactly."""
        parts: list[bytes] = []
        missing = n
        while missing:
            part = await self.read(missing)
            if not part:
                raise LinkError(f"the stream ended {missing} bytes before its time", peer=self.connection.peer)
            parts.append(part)
            missing -= len(part)
        return b"".join(parts)

    async def read_into(self, buffer: memoryview, stall_s: float) -> int:
        """See port.Stream.read_into."""
        filled = 0
        while self._chunks and filled < len(buffer):
            chunk = self._take(len(buffer) - filled)
            buffer[filled : filled + len(chunk)] = chunk
            filled += len(chunk)
            self._consumed(len(chunk))
        if filled == len(buffer) or self.read_ended:
            return filled
        self._check_alive()
        assert self._reader is None, "one reader at a time"
        filling = self._filling = _Filling(buffer, filled, stall_s)
        self._reader = filling.over
        try:
            await filling.over
        finally:
            self._reader = self._filling = None
            filling.stop()
        if filling.filled < len(buffer) and not self.read_ended:
            self._check_alive()
        return filling.filled

    def set_data_handler(self, on_data: DataHandler | None) -> None:
        """See port.Stream.set_data_handler."""
        self._on_data = on_data
        self._hand_over()

    def pause_reading(self) -> None:
        """See port.Stream.pause_reading."""
        self._paused = True

    def resume_reading(self) -> None:
        """See port.Stream.resume_reading."""
        self._paused = False
        self._hand_over()

    def unshift(self, data: bytes) -> None:
        """Puts bytes back that were read and belong to the next reader."""
        if data:
            if self._first_from:
                self._chunks[0] = self._chunks[0][self._first_from :]
                self._first_from = 0
            self._chunks.appendleft(data)
            self.unread += len(data)
            self._consumed(-len(data))

    def feed(self, data: bytes) -> None:
        """Bytes from the peer; at least one."""
        if self._filling is not None:
            taken = self._filling.take(data)
            self._consumed(taken)
            if taken == len(data):
                return
            data = data[taken:]
        if self._on_data is not None and not self._paused and not self._chunks:
            self._tell(data)
            self._consumed(len(data))
            return
        chunks = self._chunks
        chunks.append(data)
        self.unread += len(data)
        if len(chunks) > _MERGE_ABOVE_CHUNKS and len(chunks) * _MERGE_BELOW_BYTES > self.unread:
            self._merge()
        self._wake_reader()

    def feed_end(self) -> None:
        """The peer has ended its direction."""
        if self.read_ended or self.error:
            return
        self.read_ended = True
        self._wake_reader()
        self._hand_over()
        self._settle()

    def fail(self, reason: str, *, discard: bool) -> None:
        """The stream is gone in both directions: readers, writers and `closed` learn why.

        `discard` drops what was not read (a reset); otherwise a reader gets it before it gets the error.
        """
        if self.error or self.closed.done():
            return
        self.error = reason or "closed"
        if discard:
            self._chunks.clear()
            self.unread = self._first_from = 0
        self._paused = False
        self._wake_reader()
        self.writable()
        self._hand_over()
        self._settle()

    def _take(self, n_max: int) -> bytes:
        """The first bytes that wait, at most `n_max`, as far as they lie in one chunk."""
        chunk = self._chunks[0]
        start = self._first_from
        if len(chunk) - start <= n_max:
            self._chunks.popleft()
            self._first_from = 0
            if start:
                chunk = chunk[start:]
        else:
            self._first_from = start + n_max
            chunk = chunk[start : start + n_max]
        self.unread -= len(chunk)
        return chunk

    def _merge(self) -> None:
        """Many tiny chunks become one, so that a peer sending single bytes costs no more memory than its window."""
        if self._first_from:
            self._chunks[0] = self._chunks[0][self._first_from :]
            self._first_from = 0
        whole = b"".join(self._chunks)
        self._chunks.clear()
        self._chunks.append(whole)

    def _hand_over(self) -> None:
        while self._on_data is not None and not self._paused and self._chunks:
            chunk = self._take(limits.STREAM_WINDOW_BYTES_MAX)
            self._tell(chunk)
            self._consumed(len(chunk))
        if self._on_data is None or self._paused or self._end_told:
            return
        if self.read_ended or self.error:
            self._end_told = True
            self._tell(b"")

    def _tell(self, data: bytes) -> None:
        """To the data handler; one that cannot answer any more has no use for the stream."""
        assert self._on_data is not None
        try:
            self._on_data(data)
        except LinkError:
            self.reset()

    async def _wait_for_data(self) -> None:
        assert self._reader is None, "one reader at a time"
        self._reader = asyncio.get_running_loop().create_future()
        try:
            await self._reader
        finally:
            self._reader = None

    def _wake_reader(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    # --- writing

    async def write(self, data: Bytes) -> None:
        """See port.Stream.write."""
        view = memoryview(data)
        while True:
            self._check_writable()
            if not self.buffered:
                view = view[self._send_some(view) :]
                if not view:
                    return
            assert self._writer is None, "one writer at a time"
            self._writer = asyncio.get_running_loop().create_future()
            try:
                await self._writer
            finally:
                self._writer = None

    def writable(self) -> None:
        """Wakes a waiting writer: the window opened, the connection drained, or the stream failed."""
        if self._writer is not None and not self._writer.done():
            self._writer.set_result(None)

    def _check_writable(self) -> None:
        self._check_alive()
        if self.write_ended:
            raise LinkError("the stream is closed for writing", peer=self.connection.peer, protocol=self.protocol)

    def _check_alive(self) -> None:
        if self.error:
            raise LinkError(f"the stream is gone: {self.error}", peer=self.connection.peer, protocol=self.protocol)

    def _settle(self) -> None:
        """Resolves `closed` when both directions are over."""
        if (self.error or (self.read_ended and self.write_done)) and not self.closed.done():
            self.closed.set_result(self.error)
            self._ended()

    # --- what the carrier fills in

    @abstractmethod
    def write_nowait(self, data: Bytes) -> None:
        """See port.Stream.write_nowait."""

    @abstractmethod
    def close_write(self) -> None:
        """See port.Stream.close_write."""

    @abstractmethod
    def reset(self) -> None:
        """See port.Stream.reset."""

    @abstractmethod
    def _send_some(self, data: memoryview) -> int:
        """Takes as much of `data` as may leave now and returns how much that was."""

    @abstractmethod
    def _consumed(self, n: int) -> None:
        """The reader took `n` bytes (negative: gave them back)."""

    @abstractmethod
    def _ended(self) -> None:
        """Both directions are over: the carrier forgets the stream."""


class _Filling:
    """A reader's buffer that arriving bytes go straight into; `over` resolves when it is full, fails when none come."""

    __slots__ = ("_buffer", "_heard_s", "_loop", "_stall_s", "_watch", "filled", "over")

    def __init__(self, buffer: memoryview, filled: int, stall_s: float) -> None:
        self.filled = filled
        self._buffer = buffer
        self._stall_s = stall_s
        self._loop = asyncio.get_running_loop()
        self._heard_s = self._loop.time()
        self.over: asyncio.Future[None] = self._loop.create_future()
        self._watch = self._loop.call_at(self._heard_s + stall_s, self._look)

    def take(self, data: bytes) -> int:
        """Takes of `data` what there is room for, and returns how much that was."""
        start = self.filled
        room = len(self._buffer) - start
        if len(data) > room:
            data = data[:room]
        self.filled = stop = start + len(data)
        self._buffer[start:stop] = data
        self._heard_s = self._loop.time()
        if len(data) == room and not self.over.done():
            self.over.set_result(None)
        return len(data)

    def stop(self) -> None:
        """The reader does not wait any longer."""
        self._watch.cancel()

    def _look(self) -> None:
        latest_s = self._heard_s + self._stall_s
        if self._loop.time() < latest_s:
            self._watch = self._loop.call_at(latest_s, self._look)
        elif not self.over.done():
            self.over.set_exception(TimeoutError())


class StreamDesk:
    """Where a connection's inbound streams go: to a built-in service, or to the handler of whoever owns it.

    Until a handler is set at most limits.STREAM_BACKLOG_MAX streams wait; more are reset.
    """

    def __init__(self, protocols: tuple[str, ...], services: Mapping[str, StreamHandler]) -> None:
        self.protocols = (*protocols, *services)
        self._services = services
        self._handler: StreamHandler | None = None
        self._waiting: deque[BufferedStream] = deque()

    def set_handler(self, handler: StreamHandler) -> None:
        """Streams go to `handler` from now on, those that waited first."""
        self._handler = handler
        while self._waiting:
            stream = self._waiting.popleft()
            if not stream.closed.done():
                handler(stream)

    def deliver(self, stream: BufferedStream) -> None:
        """Hands over a stream whose protocol is agreed."""
        service = self._services.get(stream.protocol)
        if service is not None:
            service(stream)
        elif self._handler is not None:
            self._handler(stream)
        elif len(self._waiting) < limits.STREAM_BACKLOG_MAX:
            self._waiting.append(stream)
        else:
            stream.reset()

    def clear(self) -> None:
        """Forgets streams that nobody took."""
        self._waiting.clear()
