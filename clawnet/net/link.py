"""A libp2p connection over one socket: upgrade, frames, keepalive, and the streams inside; an asyncio protocol.

The hot path makes no task and no future: bytes go from the socket into one buffer, frame by frame through the cipher,
and to the streams' readers or handlers; what these send in one turn leaves in as few encrypted frames as possible.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, cast

from msgspec import Struct

from clawnet import limits
from clawnet.errors import LinkError, WireError
from clawnet.identity.keys import KeyPair
from clawnet.identity.multiaddr import of_socket
from clawnet.net import identify, ping, yamux
from clawnet.net.negotiation import accept, propose
from clawnet.net.noise import PLAIN_BYTES_MAX, Channel
from clawnet.net.port import Bytes, StreamHandler
from clawnet.net.streams import StreamDesk
from clawnet.net.upgrade import Upgrade

_BUFFER_BYTES_MIN = 16 * limits.KIB
_FLUSH_BYTES = 4 * PLAIN_BYTES_MAX
_LINGER_S = 2.0


class LinkPlan(Struct, frozen=True):
    """What a link needs to know of its owner. `on_end(link)` is called once, when the socket is gone."""

    identity: KeyPair
    protocols: tuple[str, ...]
    identify: StreamHandler
    on_ready: Callable[[Link], None]
    on_end: Callable[[Link], None]
    may_start: Callable[[Link], bool]


class Link(asyncio.BufferedProtocol):
    """See port.Connection; before `on_ready` it is a handshake and nothing of the port may be used but `closed`."""

    transport = "tcp"

    def __init__(self, plan: LinkPlan, *, inbound: bool, expected: str | None) -> None:
        self.peer = ""
        self.found = ""
        """Who the other side turned out to be, where another one was expected."""
        self.address = ""
        self.host = ""
        self.inbound = inbound
        loop = asyncio.get_running_loop()
        self.closed: asyncio.Future[str] = loop.create_future()
        self.ready = False
        self.offence = ""
        self._loop = loop
        self._plan = plan
        self._upgrade: Upgrade | None = Upgrade(plan.identity, initiator=not inbound, expected=expected)
        self._channel: Channel | None = None
        self._session: yamux.Session | None = None
        self._socket: asyncio.Transport | None = None
        self._ping = ping.Answerer()
        self._desk = StreamDesk(plan.protocols, {ping.PROTOCOL: self._ping.serve, identify.PROTOCOL: plan.identify})
        self._buffer = bytearray(_BUFFER_BYTES_MIN)
        self._view = memoryview(self._buffer)
        self._filled = 0
        self._out: list[Bytes] = []
        self._out_bytes = 0
        self._flush_due = False
        self._receiving = False
        self._paused = False
        self._heard = False
        self._asked = False
        self._streams_opened = 0
        self._timer: asyncio.TimerHandle | None = None

    # --- port.Connection

    @property
    def rtt_s(self) -> float:
        """See port.Connection.rtt_s."""
        return self._session.rtt_s if self._session is not None else 0.0

    @property
    def unsent(self) -> int:
        """Bytes that wait for the socket."""
        return self._out_bytes + (self._socket.get_write_buffer_size() if self._socket is not None else 0)

    async def open_stream(
        self, protocols: Sequence[str], timeout_s: float = limits.STREAM_NEGOTIATION_TIMEOUT_S
    ) -> yamux.MuxedStream:
        """See port.Connection.open_stream."""
        if self.closed.done() or self._session is None:
            reason = self.closed.result() if self.closed.done() else "it is not set up"
            raise LinkError(f"the connection is closed: {reason}", peer=self.peer)
        return await propose(self._session.open(), protocols, timeout_s)

    def set_stream_handler(self, handler: StreamHandler) -> None:
        """See port.Connection.set_stream_handler."""
        self._desk.set_handler(handler)

    def close(self, reason: str) -> None:
        """See port.Connection.close."""
        self._end(reason, yamux.NORMAL)

    # --- asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The socket is connected."""
        self._socket = cast(asyncio.Transport, transport)
        self._socket.set_write_buffer_limits(high=limits.SOCKET_BUFFER_BYTES, low=limits.SOCKET_BUFFER_BYTES // 4)
        name: Any = transport.get_extra_info("peername")
        if not name:
            self.abort("the peer left at once")
            return
        self.host = name[0]
        self.address = str(of_socket(name[0], name[1]))
        if not self._plan.may_start(self):
            self.abort("too many handshakes at once")
            return
        self._timer = self._loop.call_later(limits.HANDSHAKE_TIMEOUT_S, self._too_slow)
        assert self._upgrade is not None
        first = self._upgrade.start()
        if first:
            self._socket.write(first)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the socket's bytes go; never empty, since a whole frame fits and whole frames are taken out."""
        return self._view[self._filled :]

    def buffer_updated(self, nbytes: int) -> None:
        """Bytes arrived."""
        self._heard = True
        self._filled += nbytes
        full = self._filled == len(self._buffer)
        if self.closed.done():
            self._filled = 0
            return
        self._receiving = True
        try:
            if self._upgrade is not None:
                self._on_upgrade(self._upgrade)
            if self._channel is not None:
                self._on_frames(self._channel)
        except WireError as error:
            self.offence = error.message
            self._end(f"the peer broke the protocol: {error.message}", yamux.PROTOCOL_ERROR)
        finally:
            self._receiving = False
        if self.closed.done():
            self._filled = 0
            return
        if full and len(self._buffer) < limits.SOCKET_BUFFER_BYTES:
            self._grow()
        self._flush()
        if self._session is not None and self._session.gone_away and not self._session.streams:
            self._end("closed by the peer", yamux.NORMAL)

    def eof_received(self) -> None:
        """The peer sends nothing more; the transport closes itself after this."""

    def connection_lost(self, exc: Exception | None) -> None:
        """The socket is gone."""
        self._finish(f"the connection broke: {exc}" if exc is not None else "closed by the peer")
        if self._timer is not None:
            self._timer.cancel()
        self._socket = None
        self._plan.on_end(self)

    def pause_writing(self) -> None:
        """The socket's buffer is above its mark."""
        self._paused = True

    def resume_writing(self) -> None:
        """The socket's buffer has drained."""
        self._paused = False
        if self._session is not None and not self.closed.done():
            self._session.drained()

    # --- the owner's side

    def abort(self, reason: str) -> None:
        """Drops the connection at once, unsent bytes included."""
        self._finish(reason)
        if self._socket is not None:
            self._socket.abort()

    def _too_slow(self) -> None:
        self.offence = "the handshake took too long"
        self.abort(self.offence)

    # --- receiving

    def _on_upgrade(self, upgrade: Upgrade) -> None:
        data = bytes(self._view[: self._filled])
        self._filled = 0
        assert self._socket is not None
        try:
            answer = upgrade.receive(data)
        except LinkError as error:
            self.found = str(error.details.get("found") or "")
            self.abort(error.message)
            return
        if answer:
            self._socket.write(answer)
        if not upgrade.done:
            return
        if upgrade.peer == self._plan.identity.peer_id:
            self.abort("the other side is this node itself")
            return
        self._upgrade = None
        self._channel = upgrade.channel
        self.peer = upgrade.peer
        if self._timer is not None:
            self._timer.cancel()
        self._session = yamux.Session(
            self,
            initiator=not self.inbound,
            send=self._send,
            push=self._flush,
            is_open=self._is_open,
            accept=self._on_stream,
            now=self._loop.time,
        )
        self._timer = self._loop.call_later(limits.KEEPALIVE_S, self._keep_alive)
        self.ready = True
        self._plan.on_ready(self)
        self._session.ping()
        self._session.receive(upgrade.plain)
        while len(upgrade.raw) > len(self._buffer):
            self._grow()
        self._buffer[: len(upgrade.raw)] = upgrade.raw
        self._filled = len(upgrade.raw)

    def _on_frames(self, channel: Channel) -> None:
        assert self._session is not None
        view, buffer, end = self._view, self._buffer, self._filled
        receive, decrypt = self._session.receive, channel.open
        at = 0
        while end - at >= 2:
            stop = at + 2 + (buffer[at] << 8 | buffer[at + 1])
            if stop > end:
                if stop - at > len(buffer):
                    self._grow()
                break
            receive(decrypt(view[at + 2 : stop]))
            at = stop
            if self.closed.done():
                return
        if at:
            rest = end - at
            self._buffer[:rest] = self._buffer[at:end]
            self._filled = rest

    def _grow(self) -> None:
        bigger = bytearray(max(2 * len(self._buffer), 2 * _BUFFER_BYTES_MIN))
        bigger[: len(self._buffer)] = self._buffer
        self._buffer, self._view = bigger, memoryview(bigger)

    def _on_stream(self, stream: yamux.MuxedStream) -> None:
        """A new inbound stream: agree on its protocol without a task, then hand it over."""
        self._streams_opened += 1
        if self._streams_opened > limits.STREAMS_OPENED_PER_KEEPALIVE_MAX:
            raise WireError("it opens streams without end")
        assert self._session is not None
        accept(stream, self._desk, self._session.negotiated)

    # --- sending

    def _is_open(self) -> bool:
        return not self._paused

    def _send(self, data: Bytes) -> None:
        if self.closed.done():
            return
        self._out.append(data)
        self._out_bytes += len(data)
        if self._out_bytes >= _FLUSH_BYTES:
            self._flush()
        elif not self._flush_due and not self._receiving:
            self._flush_due = True
            self._loop.call_soon(self._flush_later)

    def _flush_later(self) -> None:
        self._flush_due = False
        self._flush()

    def _flush(self) -> None:
        """Encrypts and writes all that was sent since the last time."""
        if not self._out or self._socket is None or self._channel is None:
            return
        plain = b"".join(self._out)
        self._out.clear()
        self._out_bytes = 0
        self._socket.write(self._channel.seal(plain))
        if self._paused and not self.closed.done():
            # Streams stop by themselves; what still grows are answers to a peer that asks and never reads.
            waiting = self._socket.get_write_buffer_size()
            if waiting > limits.SOCKET_BUFFER_BYTES + limits.UNREAD_ANSWER_BYTES_MAX:
                self.offence = "the peer reads no answers"
                self.abort(self.offence)

    # --- life and end

    def _keep_alive(self) -> None:
        if self._asked and not self._heard:
            self.abort(f"no sign of life for {2 * limits.KEEPALIVE_S:g} s")
            return
        self._streams_opened = 0
        self._asked = not self._heard
        self._heard = False
        if self._session is not None:
            self._session.refused = 0
            self._session.ping()
        self._timer = self._loop.call_later(limits.KEEPALIVE_S, self._keep_alive)

    def _end(self, reason: str, code: int) -> None:
        """Says goodbye, sends what is due, and closes when the peer has too, or after a moment."""
        if self.closed.done():
            return
        if self._session is None or self._socket is None:
            self.abort(reason)
            return
        self._session.go_away(code)
        self._flush()
        self._finish(reason)
        self._timer = self._loop.call_later(_LINGER_S, self._socket.abort)
        try:
            self._socket.write_eof()
        except OSError:  # the peer has reset the connection, and asyncio has not noticed yet
            self._socket.abort()

    def _finish(self, reason: str) -> None:
        if self.closed.done():
            return
        self.closed.set_result(reason)
        if self._timer is not None:
            self._timer.cancel()
        self._ping.close()
        self._desk.clear()
        if self._session is not None:
            self._session.lost(reason)
        self._out.clear()
        self._out_bytes = 0
