"""One stream of a QUIC connection: what waits for the peer's window, and the window granted as the reader takes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from clawnet import limits
from clawnet.errors import LinkError
from clawnet.net.port import Bytes
from clawnet.net.streams import BufferedStream

if TYPE_CHECKING:
    from clawnet.net.quic_link import QuicLink

_GROW_WITHIN_ROUND_TRIPS = 4


class QuicStream(BufferedStream):
    """One bidirectional QUIC stream; see port.Stream for what its user sees."""

    def __init__(self, link: QuicLink, number: int, *, inbound: bool) -> None:
        super().__init__(link, inbound)
        self.number = number
        self.in_backlog = False
        self.window = limits.STREAM_WINDOW_BYTES
        self.granted = self.window
        self._link = link
        self._pending = bytearray()
        self._taken = 0
        self._granted_at = asyncio.get_running_loop().time()

    @property
    def buffered(self) -> int:
        """See port.Stream.buffered."""
        return len(self._pending)

    # --- sending

    def write_nowait(self, data: Bytes) -> None:
        """See port.Stream.write_nowait."""
        self._check_writable()
        if len(self._pending) + len(data) > limits.SEND_QUEUE_BYTES_MAX:
            raise LinkError("the peer takes nothing and the send queue is full", peer=self.connection.peer)
        view = memoryview(data)
        sent = 0 if self._pending else self._send_some(view)
        self._pending += view[sent:]

    def close_write(self) -> None:
        """See port.Stream.close_write."""
        if not self.write_ended and not self.error:
            self.write_ended = True
            self._finish()

    def reset(self) -> None:
        """See port.Stream.reset."""
        if not self.closed.done() and not self.error:
            self._link.stop(self.number)
            self.fail("reset", discard=True)

    def flush(self) -> None:
        """Sends what waits, as far as the window allows, and wakes the writer when nothing is left."""
        self._link.waiting.pop(self, None)
        if self._pending:
            with memoryview(self._pending) as view:
                sent = self._send_some(view)
            del self._pending[:sent]
        if self._pending:
            return
        if self.write_ended:
            self._finish()
        self.writable()

    def stopped(self) -> None:
        """The peer wants nothing more on this stream."""
        if not self.write_done:
            self._pending.clear()
            self.write_ended = self.write_done = True
            self._link.waiting.pop(self, None)
            self.writable()
            self._settle()

    def _send_some(self, data: memoryview) -> int:
        sent = self._link.take(self.number, data)
        if sent < len(data):
            self._link.waiting[self] = None
        return sent

    def _finish(self) -> None:
        if not self._pending and not self.write_done and not self.error:
            self.write_done = True
            self._link.end(self.number)
            self._settle()

    # --- receiving

    def arrive(self, data: bytes, end: bool) -> None:
        """Bytes in order, and perhaps the peer's end."""
        if self.error or self.read_ended:
            return
        if data:
            self.feed(data)
        if end:
            self.feed_end()

    def _consumed(self, n: int) -> None:
        self._taken += n
        if 2 * (self._taken + self.window - self.granted) >= self.window and not self.read_ended and not self.error:
            self._open_window()

    def _open_window(self) -> None:
        """Gives back what was read; a reader that drains its window within a few round trips gets a larger one."""
        now = asyncio.get_running_loop().time()
        grown = min(self.window, self._link.window_growth, limits.STREAM_WINDOW_BYTES_MAX - self.window)
        if now - self._granted_at < _GROW_WITHIN_ROUND_TRIPS * self._link.rtt_s and grown > 0:
            self.window += grown
            self._link.window_growth -= grown
        self._granted_at = now
        self.granted = self._taken + self.window
        self._link.flush_soon()

    def _ended(self) -> None:
        self._pending.clear()
        self._link.forget(self)
