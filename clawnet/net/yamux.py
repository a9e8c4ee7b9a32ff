"""/yamux/1.0.0: many flow-controlled streams over one ordered byte stream. No sockets: bytes in, bytes out.

https://github.com/libp2p/specs/blob/master/yamux/README.md. Windows start at 256 KiB and grow, up to 16 MiB, for a
stream whose reader keeps up. A stream opens with the SYN flag on its first data and is acknowledged by the ACK flag on
the first frame of the answer.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from clawnet import limits
from clawnet.errors import LinkError, WireError
from clawnet.net.streams import BufferedStream

if TYPE_CHECKING:
    from clawnet.net.port import Bytes, Connection

PROTOCOL = "/yamux/1.0.0"
HEADER_BYTES = 12
FRAME_DATA_BYTES_MAX = 65_519 - HEADER_BYTES  # header and data fill one noise frame

DATA, WINDOW, PING, GO_AWAY = 0, 1, 2, 3
SYN, ACK, FIN, RST = 1, 2, 4, 8
NORMAL, PROTOCOL_ERROR = 0, 1

_HEADER = struct.Struct(">BBHII")
_WINDOW_VALUE_MAX = 2**32 - 1
_STREAM_ID_MAX = 2**31
_GROW_WITHIN_ROUND_TRIPS = 4


class Session:
    """Both directions of one connection's streams.

    `send` takes bytes for the wire and must keep their order; it may hold them until it is called again or `push` is,
    after which their memory may change; `is_open` says whether it wants bulk data now (control
    frames are sent regardless); `accept` gets every new inbound stream, which is not yet negotiated. `rtt_s` is the
    smoothed round trip, 0.0 while unknown. `now` is the loop's clock, for windows and round trips only.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        initiator: bool,
        send: Callable[[Bytes], None],
        push: Callable[[], None],
        is_open: Callable[[], bool],
        accept: Callable[[MuxedStream], None],
        now: Callable[[], float],
    ) -> None:
        self.streams: dict[int, MuxedStream] = {}
        self.rtt_s = 0.0
        self.gone_away = False
        self.refused = 0
        self.send = send
        self.push = push
        self.is_open = is_open
        self.now = now
        self.window_growth = limits.WINDOW_GROWTH_BYTES_MAX
        self.blocked: dict[MuxedStream, None] = {}
        self._connection = connection
        self._accept = accept
        self._next_id = 1 if initiator else 2
        self._peer_parity = 0 if initiator else 1
        self._outbound = 0
        self._inbound = 0
        self._backlog = 0
        self._head = b""
        self._body_of: MuxedStream | None = None
        self._body_left = 0
        self._body_flags = 0
        self._ping_value = 0
        self._ping_sent_at: float | None = None

    # --- the owner's side

    def open(self) -> MuxedStream:
        """A new outbound stream; the peer hears of it with its first bytes. LinkError when none may be opened."""
        if self.gone_away:
            raise LinkError("the peer is closing the connection", peer=self._connection.peer)
        if self._outbound >= limits.STREAMS_PER_CONNECTION_MAX or self._next_id >= _STREAM_ID_MAX:
            raise LinkError("too many streams on this connection", peer=self._connection.peer)
        stream = MuxedStream(self, self._connection, self._next_id, inbound=False)
        self._next_id += 2
        self._outbound += 1
        self.streams[stream.number] = stream
        return stream

    def negotiated(self, stream: MuxedStream) -> None:
        """The protocol of an accepted stream is agreed: it leaves the backlog."""
        if stream.in_backlog:
            stream.in_backlog = False
            self._backlog -= 1

    def ping(self) -> None:
        """Asks the peer for a sign of life; `rtt_s` is set when it comes."""
        self._ping_value = (self._ping_value + 1) & 0xFFFFFFFF
        self._ping_sent_at = self.now()
        self.frame(PING, SYN, 0, self._ping_value)

    def go_away(self, code: int) -> None:
        """Tells the peer that this side ends the session."""
        self.frame(GO_AWAY, 0, 0, code)

    def drained(self) -> None:
        """The socket takes bulk data again: streams that waited send in turn; whom it stops again goes to the end."""
        waiting = list(self.blocked)
        for stream in waiting:
            if not self.is_open():
                return
            self.blocked.pop(stream, None)
            stream.flush()

    def lost(self, reason: str) -> None:
        """The connection is gone: every stream ends with `reason`."""
        self.gone_away = True
        for stream in list(self.streams.values()):
            stream.fail(reason, discard=False)
        self.streams.clear()
        self.blocked.clear()

    def frame(self, kind: int, flags: int, number: int, value: int) -> None:
        """Sends a frame without data."""
        self.send(_HEADER.pack(0, kind, flags, number, value))

    def forget(self, stream: MuxedStream) -> None:
        """A stream has ended in both directions."""
        if self.streams.pop(stream.number, None) is not None:
            self.window_growth += stream.window_size - limits.STREAM_WINDOW_BYTES
            if stream.inbound:
                self._inbound -= 1
                self.negotiated(stream)
            else:
                self._outbound -= 1
        self.blocked.pop(stream, None)

    # --- the peer's side

    def receive(self, data: bytes) -> None:
        """Takes bytes from the wire; raises WireError when the peer breaks the protocol."""
        at = 0
        end = len(data)
        while at < end:
            if self._body_left:
                take = min(self._body_left, end - at)
                self._body_left -= take
                stream = self._body_of
                if stream is not None and not stream.error:
                    stream.arrive(data if take == end else data[at : at + take])
                at += take
                if not self._body_left:
                    self._body_end()
                continue
            if not self._head and end - at >= HEADER_BYTES:
                fields = _HEADER.unpack_from(data, at)
                at += HEADER_BYTES
            else:
                take = min(HEADER_BYTES - len(self._head), end - at)
                self._head += data[at : at + take]
                at += take
                if len(self._head) < HEADER_BYTES:
                    return
                fields = _HEADER.unpack(self._head)
                self._head = b""
            self._on_frame(*fields)

    def _on_frame(self, version: int, kind: int, flags: int, number: int, value: int) -> None:
        if version != 0 or kind > GO_AWAY:
            raise WireError(f"a yamux frame has version {version} and type {kind}")
        if kind == PING:
            self._on_ping(flags, value)
        elif kind == GO_AWAY:
            self.gone_away = True
        else:
            self._on_stream_frame(kind, flags, number, value)

    def _on_stream_frame(self, kind: int, flags: int, number: int, value: int) -> None:
        if flags & SYN:
            self._on_syn(number)
        stream = self.streams.get(number)
        if kind == WINDOW:
            if stream is not None:
                stream.grant(value)
                stream.on_flags(flags)
            return
        # Data for a stream we have dropped may still be on its way: it is skipped, within what one window allows.
        allowed = stream.receive_window if stream is not None else limits.STREAM_WINDOW_BYTES_MAX
        if value > allowed:
            raise WireError("the peer sends more than the stream's window")
        if stream is not None:
            stream.receive_window -= value
        self._body_of, self._body_left, self._body_flags = stream, value, flags
        if not value:
            self._body_end()

    def _body_end(self) -> None:
        stream, self._body_of = self._body_of, None
        if stream is not None:
            stream.on_flags(self._body_flags)

    def _on_syn(self, number: int) -> None:
        if number == 0 or number % 2 != self._peer_parity or number in self.streams:
            raise WireError(f"the peer opens a stream with the number {number}, which is not free to it")
        full = self._inbound >= limits.STREAMS_PER_CONNECTION_MAX or self._backlog >= limits.STREAM_BACKLOG_MAX
        if full or self.gone_away:
            self.refused += 1
            if self.refused > limits.STREAMS_REFUSED_PER_KEEPALIVE_MAX:
                raise WireError("it opens streams without end")
            self.frame(WINDOW, RST, number, 0)
            return
        stream = MuxedStream(self, self._connection, number, inbound=True)
        stream.in_backlog = True
        self.streams[number] = stream
        self._inbound += 1
        self._backlog += 1
        self._accept(stream)

    def _on_ping(self, flags: int, value: int) -> None:
        if flags & SYN:
            self.frame(PING, ACK, 0, value)
        elif flags & ACK and value == self._ping_value and self._ping_sent_at is not None:
            measured = self.now() - self._ping_sent_at
            self.rtt_s = (7 * self.rtt_s + measured) / 8 if self.rtt_s else measured
            self._ping_sent_at = None


class MuxedStream(BufferedStream):
    """One yamux stream; see port.Stream for what its user sees."""

    def __init__(self, session: Session, connection: Connection, number: int, *, inbound: bool) -> None:
        super().__init__(connection, inbound)
        self.number = number
        self.in_backlog = False
        self.window_size = limits.STREAM_WINDOW_BYTES
        self.receive_window = limits.STREAM_WINDOW_BYTES
        self._session = session
        self._flags = ACK if inbound else SYN
        self._send_window = limits.STREAM_WINDOW_BYTES
        self._pending = bytearray()
        self._taken = 0
        self._updated_at = session.now()

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
        if self._pending:
            self._pending += data
            return
        view = memoryview(data)
        sent = self._send_some(view)
        if sent < len(view):
            self._pending += view[sent:]

    def close_write(self) -> None:
        """See port.Stream.close_write."""
        if not self.write_ended and not self.error:
            self.write_ended = True
            self._finish()

    def reset(self) -> None:
        """See port.Stream.reset."""
        if not self.closed.done() and not self.error:
            if not self._flags & SYN:
                self._session.frame(WINDOW, self._take_flags() | RST, self.number, 0)
            self.fail("reset", discard=True)

    def flush(self) -> None:
        """Sends what waits, as far as window and connection allow, and wakes the writer when nothing is left."""
        while self._pending and self._send_window and self._session.is_open():
            sent = self._send_some(memoryview(bytes(self._pending[:FRAME_DATA_BYTES_MAX])))
            del self._pending[:sent]
        if self._pending and self._send_window:
            self._session.blocked[self] = None
        if self._pending:
            return
        if self.write_ended:
            self._finish()
        self.writable()

    def grant(self, more: int) -> None:
        """The peer allows `more` bytes."""
        self._send_window += more
        if self._send_window > _WINDOW_VALUE_MAX:
            raise WireError("the peer opens a stream's window without end")
        if more and not self.error:
            self.flush()

    def _send_some(self, data: memoryview) -> int:
        session = self._session
        sent = 0
        size = len(data)
        while sent < size and self._send_window:
            if not session.is_open():
                session.blocked[self] = None
                break
            n = min(size - sent, self._send_window, FRAME_DATA_BYTES_MAX)
            self._send_window -= n
            session.send(_HEADER.pack(0, DATA, self._take_flags(), self.number, n))
            session.send(data[sent : sent + n])
            sent += n
        if sent and type(data.obj) is not bytes:
            session.push()
        return sent

    def _finish(self) -> None:
        if not self._pending and not self.write_done and not self.error:
            self.write_done = True
            self._session.frame(DATA, self._take_flags() | FIN, self.number, 0)
            self._settle()

    def _take_flags(self) -> int:
        flags, self._flags = self._flags, 0
        return flags

    # --- receiving

    def arrive(self, data: bytes) -> None:
        """Data within the window."""
        if self.read_ended:
            raise WireError("the peer sends data after the end of its stream")
        self.feed(data)

    def on_flags(self, flags: int) -> None:
        """FIN and RST of a frame, after its data."""
        if flags & RST:
            self.fail("reset by the peer", discard=True)
        elif flags & FIN:
            self.feed_end()

    def _consumed(self, n: int) -> None:
        self._taken += n
        if self._taken * 2 >= self.window_size and not self.read_ended and not self.error:
            self._open_window()

    def _open_window(self) -> None:
        """Gives back what was read; a reader that drains its window within a few round trips gets a larger one."""
        session = self._session
        now = session.now()
        grown = min(self.window_size, session.window_growth, limits.STREAM_WINDOW_BYTES_MAX - self.window_size)
        fast = now - self._updated_at < _GROW_WITHIN_ROUND_TRIPS * session.rtt_s
        if fast and grown > 0:
            self.window_size += grown
            session.window_growth -= grown
            self._taken += grown
        self._updated_at = now
        self.receive_window += self._taken
        session.frame(WINDOW, self._take_flags(), self.number, self._taken)
        self._taken = 0

    def _ended(self) -> None:
        self._pending.clear()
        self._session.forget(self)
