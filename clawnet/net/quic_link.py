"""One libp2p connection over QUIC v1: aioquic's connection with proven peers, back-pressure, and our streams.

https://github.com/libp2p/specs/blob/master/quic/README.md and RFC 9000. A stream's window opens as its reader takes
bytes, not as they arrive, so that a reader that stops holds its writer.
"""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import Callable, Sequence
from typing import Any

from aioquic.quic import events
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.packet import QuicErrorCode, QuicFrameType
from aioquic.tls import AlertBadCertificate, AlertHandshakeFailure
from cryptography import x509
from msgspec import Struct

from clawnet import limits
from clawnet.errors import LinkError, WireError
from clawnet.identity.multiaddr import of_socket
from clawnet.net import identify, ping
from clawnet.net.negotiation import accept, propose
from clawnet.net.port import StreamHandler
from clawnet.net.quic_stream import QuicStream
from clawnet.net.quic_tls import peer_of
from clawnet.net.streams import StreamDesk

Address = tuple[Any, ...]

_FRAME_HEAD_BYTES_MAX = 17
_LINGER_S = 2.0


class QuicPlan(Struct, frozen=True):
    """What a link needs to know of its owner. `send` writes a datagram; `on_gone` comes once, at the end."""

    own_peer: str
    protocols: tuple[str, ...]
    identify: StreamHandler
    send: Callable[[bytes, Address], None]
    on_ready: Callable[[QuicLink], None]
    on_cid: Callable[[bytes, QuicLink | None], None]
    on_gone: Callable[[QuicLink], None]


class _Core(QuicConnection):
    """aioquic's connection; asks both sides for a certificate, and grants stream data as the readers take it."""

    def __init__(self, configuration: QuicConfiguration, link: QuicLink, **handshake: Any) -> None:
        super().__init__(configuration=configuration, **handshake)
        self._link = link
        bidi, uni = self._local_max_streams_bidi, self._local_max_streams_uni
        bidi.value = bidi.sent = limits.STREAMS_PER_CONNECTION_MAX
        uni.value = uni.sent = 0

    def close(
        self, error_code: int = QuicErrorCode.NO_ERROR, frame_type: int | None = None, reason_phrase: str = ""
    ) -> None:
        """Ends the connection; with an error code it is the core that found the peer at fault."""
        if error_code != QuicErrorCode.NO_ERROR and self._close_event is None:
            self._link.offence = reason_phrase or f"a breach of QUIC, error {error_code:#x}"
        super().close(error_code, frame_type, reason_phrase)

    @property
    def over(self) -> bool:
        """Closed by either side, or about to be."""
        return self._close_event is not None

    @property
    def why(self) -> str:
        """The reason it was closed for."""
        event = self._close_event
        if event is None:
            return ""
        if event.error_code == QuicErrorCode.CONNECTION_REFUSED:
            return "connection refused"
        return event.reason_phrase or (f"closed with error {event.error_code:#x}" if event.error_code else "")

    @property
    def rtt_s(self) -> float:
        """The smoothed round trip; 0.0 while unknown."""
        return float(self._loss._rtt_smoothed) if self._loss._rtt_initialized else 0.0

    @property
    def undelivered(self) -> bool:
        """Whether the peer has yet to acknowledge stream data."""
        return any(not stream.sender.is_finished and _kept(stream.sender) for stream in self._streams.values())

    def room(self, number: int) -> int:
        """How many bytes the stream may be given now: what the peer's window and our share of memory allow."""
        stream = self._get_or_create_stream_for_send(number)
        sender = stream.sender
        if sender._reset_error_code is not None:
            return 0  # the peer wants no more: the stream hears of it when the datagrams at hand are taken in
        window: int = stream.max_stream_data_remote - sender._buffer_stop
        return max(0, min(window, limits.STREAM_WINDOW_BYTES_MAX // 8 - (sender._buffer_stop - sender._buffer_start)))

    def stopped(self, number: int) -> bool:
        """Whether our direction of a stream was cut, by the peer or here."""
        stream = self._streams.get(number)
        return stream is not None and stream.sender._reset_error_code is not None

    def dropped(self, number: int) -> bool:
        """Whether a stream that the peer still sends on was ended by this side."""
        stream = self._streams.get(number)
        if stream is None:
            return True
        return stream.sender._reset_error_code is not None or stream.receiver._stop_error_code is not None

    def stop(self, number: int) -> None:
        """Ends a stream in both directions, as far as they are open."""
        stream = self._streams.get(number)
        if stream is None:
            return
        self.reset_stream(number, 0)
        if not stream.receiver.is_finished:
            self.stop_stream(number, 0)

    def _initialize(self, peer_cid: bytes) -> None:
        super()._initialize(peer_cid)
        tls: Any = self.tls
        tls._request_client_certificate = True
        check_signature, expect_finished = tls._check_certificate_verify_signature, tls._server_expect_finished

        def check(verify: Any) -> None:
            check_signature(verify)
            try:
                self._link.prove(tls._peer_certificate, len(tls._peer_certificate_chain))
            except WireError as problem:
                raise AlertBadCertificate(problem.message) from problem

        def expect() -> None:
            if not self._link.peer:
                raise AlertHandshakeFailure("the peer shows no certificate")
            expect_finished()

        tls._check_certificate_verify_signature = check
        tls._server_expect_finished = expect

    def _write_stream_limits(self, builder: Any, space: Any, stream: Any) -> None:
        stream.max_stream_data_local = max(stream.max_stream_data_local, self._link.granted(stream.stream_id))
        if stream.max_stream_data_local_sent == stream.max_stream_data_local or stream.receiver.is_finished:
            return
        frame = builder.start_frame(
            QuicFrameType.MAX_STREAM_DATA,
            capacity=_FRAME_HEAD_BYTES_MAX,
            handler=self._on_max_stream_data_delivery,
            handler_args=(stream,),
        )
        frame.push_uint_var(stream.stream_id)
        frame.push_uint_var(stream.max_stream_data_local)
        stream.max_stream_data_local_sent = stream.max_stream_data_local


def _kept(sender: Any) -> bool:
    return bool(sender._buffer_stop > sender._buffer_start or sender._buffer_fin is not None)


class QuicLink:
    """See port.Connection; before `on_ready` it is a handshake and nothing of the port may be used but `closed`."""

    transport = "quic-v1"

    def __init__(
        self, plan: QuicPlan, configuration: QuicConfiguration, address: Address, expected: str | None, **handshake: Any
    ) -> None:
        self.peer = ""
        self.found = ""
        self.inbound = not configuration.is_client
        self.remote = address
        self.host = str(address[0])
        self.ready = False
        self.gone = False
        self.offence = ""
        self._loop = asyncio.get_running_loop()
        self.closed: asyncio.Future[str] = self._loop.create_future()
        self.waiting: dict[QuicStream, None] = {}
        self.window_growth = limits.WINDOW_GROWTH_BYTES_MAX
        self._plan = plan
        self._expected = expected
        self._problem = ""
        self._core = _Core(configuration, self, **handshake)
        self._ping = ping.Answerer()
        self._desk = StreamDesk(plan.protocols, {ping.PROTOCOL: self._ping.serve, identify.PROTOCOL: plan.identify})
        self._streams: dict[int, QuicStream] = {}
        self._outbound = 0
        self._backlog = 0
        self._opened = 0
        self._refused = 0
        self._heard = False
        self._asked = False
        self._flush_due = False
        self._receiving = False
        self._answered = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._limit: asyncio.TimerHandle | None = self._loop.call_later(limits.HANDSHAKE_TIMEOUT_S, self._too_slow)

    # --- port.Connection

    @property
    def address(self) -> str:
        """See port.Connection.address; it follows a peer that moves."""
        now: Any = self._core.get_peer_address() or self.remote
        return str(of_socket(now[0], now[1], "quic-v1"))

    @property
    def rtt_s(self) -> float:
        """See port.Connection.rtt_s."""
        return self._core.rtt_s

    @property
    def cids(self) -> tuple[bytes, ...]:
        """The connection ids under which datagrams for it arrive at first."""
        return (self._core.host_cid,)

    async def open_stream(
        self, protocols: Sequence[str], timeout_s: float = limits.STREAM_NEGOTIATION_TIMEOUT_S
    ) -> QuicStream:
        """See port.Connection.open_stream."""
        if self.closed.done():
            raise LinkError(f"the connection is closed: {self.closed.result()}", peer=self.peer)
        if self._outbound >= limits.STREAMS_PER_CONNECTION_MAX:
            raise LinkError("too many streams on this connection", peer=self.peer)
        stream = QuicStream(self, self._core.get_next_available_stream_id(), inbound=False)
        self._core.send_stream_data(stream.number, b"")
        self._streams[stream.number] = stream
        self._outbound += 1
        return await propose(stream, protocols, timeout_s)

    def set_stream_handler(self, handler: StreamHandler) -> None:
        """See port.Connection.set_stream_handler."""
        self._desk.set_handler(handler)

    def close(self, reason: str) -> None:
        """See port.Connection.close: ends the streams, and the connection once the peer has what was sent."""
        if self.closed.done():
            return
        if not self.ready:
            self.abort(reason)
            return
        self._finish(reason)
        self._limit = self._loop.call_later(_LINGER_S, self._say_goodbye)
        self._flush()

    # --- the owner's side

    def connect(self) -> None:
        """Sends the first flight of a dial."""
        self._core.connect(self.remote, self._loop.time())
        self._flush()

    def receive(self, data: bytes, address: Address) -> None:
        """A datagram for this connection; `received` follows after the last one at hand."""
        self._heard = True
        self._core.receive_datagram(data, address, self._loop.time())

    def received(self) -> None:
        """Takes in what the datagrams brought, and answers."""
        self._after()

    def abort(self, reason: str) -> None:
        """Ends the connection at once, unsent bytes included."""
        self._finish(reason)
        self._say_goodbye()

    def prove(self, certificate: x509.Certificate, chain: int) -> None:
        """TLS has proven possession of the certificate's key: whose is it? Raises WireError when it cannot stay."""
        try:
            if chain:
                raise WireError("the peer shows more than one certificate")
            peer = peer_of(certificate, datetime.datetime.now(datetime.UTC))
            if peer == self._plan.own_peer:
                raise WireError("the other side is this node itself")
            if self._expected is not None and peer != self._expected:
                self.found = peer
                raise WireError(f"it is {peer} there, not {self._expected}")
        except WireError as problem:
            self._problem = problem.message
            raise
        self.peer = peer

    # --- the streams' side

    def granted(self, number: int) -> int:
        """Up to which offset the peer may send on a stream."""
        stream = self._streams.get(number)
        return stream.granted if stream is not None else 0

    def take(self, number: int, data: memoryview) -> int:
        """Sends as much of `data` as may leave now; returns how much."""
        size = min(len(data), self._core.room(number))
        if size:
            self._core.send_stream_data(number, bytes(data[:size]))
            self.flush_soon()
        return size

    def end(self, number: int) -> None:
        """Ends our direction of a stream, unless the peer has ended it just now."""
        if self._core.stopped(number):
            return
        self._core.send_stream_data(number, b"", end_stream=True)
        self.flush_soon()

    def stop(self, number: int) -> None:
        """Drops a stream."""
        self._core.stop(number)
        self.flush_soon()

    def flush_soon(self) -> None:
        """What the core has to send leaves at the end of this turn of the loop, or of the datagram being taken in."""
        if self._receiving:
            self._answered = True
        elif not self._flush_due:
            self._flush_due = True
            self._loop.call_soon(self._flush)

    def forget(self, stream: QuicStream) -> None:
        """A stream has ended in both directions."""
        self.waiting.pop(stream, None)
        if self._streams.pop(stream.number, None) is not None:
            self.window_growth += stream.window - limits.STREAM_WINDOW_BYTES
            if stream.inbound:
                self._negotiated(stream)
            else:
                self._outbound -= 1

    # --- receiving

    def _after(self) -> None:
        """Takes in what the core has found, then sends what it has to say."""
        self._receiving, self._answered = True, False
        try:
            while (event := self._core.next_event()) is not None:
                self._on_event(event)
            for stream in list(self.waiting):
                stream.flush()
        finally:
            self._receiving = False
        if self._core.over:
            self._finish(self._problem or self._core.why or "closed by the peer")
        if self._answered or not self.ready or self.closed.done():
            self._flush()
        else:
            # Whoever waited for these bytes runs first: what he has to say leaves with the acknowledgement.
            self.flush_soon()

    def _on_event(self, event: events.QuicEvent) -> None:
        if isinstance(event, events.StreamDataReceived):
            stream = self._streams.get(event.stream_id) or self._on_stream(event.stream_id)
            if stream is not None:
                stream.arrive(event.data, event.end_stream)
        elif isinstance(event, events.StreamReset):
            stream = self._streams.get(event.stream_id)
            self._core.stop(event.stream_id)
            if stream is not None:
                stream.fail("reset by the peer", discard=True)
        elif isinstance(event, events.StopSendingReceived):
            stream = self._streams.get(event.stream_id)
            if stream is not None:
                stream.stopped()
        elif isinstance(event, events.HandshakeCompleted):
            self._on_handshake()
        elif isinstance(event, events.ConnectionIdIssued):
            self._plan.on_cid(event.connection_id, self)
        elif isinstance(event, events.ConnectionIdRetired):
            self._plan.on_cid(event.connection_id, None)
        elif isinstance(event, events.ConnectionTerminated):
            self._finish(self._problem or event.reason_phrase or "closed by the peer")
            self._gone()

    def _on_handshake(self) -> None:
        if self.closed.done():
            return
        self.ready = True
        if self._limit is not None:
            self._limit.cancel()
        self._limit = self._loop.call_later(limits.KEEPALIVE_S, self._keep_alive)
        self._plan.on_ready(self)

    def _on_stream(self, number: int) -> QuicStream | None:
        """The peer's first bytes on a new stream; late ones of a stream that was dropped are not."""
        if self.closed.done() or number % 4 != (0 if self.inbound else 1) or self._core.dropped(number):
            return None
        self._opened += 1
        full = self._backlog >= limits.STREAM_BACKLOG_MAX
        self._refused += full
        if (
            self._opened > limits.STREAMS_OPENED_PER_KEEPALIVE_MAX
            or self._refused > limits.STREAMS_REFUSED_PER_KEEPALIVE_MAX
        ):
            self.offence = "it opens streams without end"
            self.abort(self.offence)
            return None
        if full:
            self._core.stop(number)
            return None
        stream = QuicStream(self, number, inbound=True)
        self._streams[number] = stream
        self._backlog += 1
        stream.in_backlog = True
        accept(stream, self._desk, self._negotiated)
        return stream

    def _negotiated(self, stream: QuicStream) -> None:
        if stream.in_backlog:
            stream.in_backlog = False
            self._backlog -= 1

    # --- sending

    def _flush(self) -> None:
        """Sends the datagrams that are due and sets the timer."""
        self._flush_due = False
        if self.gone:
            return
        if self.closed.done() and not self._core.over and not self._core.undelivered:
            self._core.close(reason_phrase=self.closed.result()[: limits.QUIC_REASON_CHARS_MAX])
        for data, address in self._core.datagrams_to_send(self._loop.time()):
            self._plan.send(data, address)
        if self.closed.done() and self._core.over:
            self._gone()
            return
        at = self._core.get_timer()
        if self._timer is not None and at != self._timer_at:
            self._timer.cancel()
            self._timer = None
        if self._timer is None and at is not None:
            self._timer = self._loop.call_at(at, self._on_timer)
            self._timer_at = at

    def _on_timer(self) -> None:
        self._timer = None
        self._core.handle_timer(max(self._timer_at, self._loop.time()))
        self._after()

    # --- life and end

    def _keep_alive(self) -> None:
        if self._asked and not self._heard:
            self.abort(f"no sign of life for {2 * limits.KEEPALIVE_S:g} s")
            return
        self._opened = self._refused = 0
        self._asked = not self._heard
        self._heard = False
        self._core.send_ping(0)
        self._flush()
        self._limit = self._loop.call_later(limits.KEEPALIVE_S, self._keep_alive)

    def _too_slow(self) -> None:
        self.offence = "the handshake took too long"
        self.abort(self.offence)

    def _say_goodbye(self) -> None:
        """Tells the peer, whatever it has not acknowledged."""
        self._core.close(reason_phrase=self.closed.result()[: limits.QUIC_REASON_CHARS_MAX])
        self._flush()

    def _finish(self, reason: str) -> None:
        """Nothing is taken or given any more; what the core still holds may yet leave."""
        if self.closed.done():
            return
        self.closed.set_result(reason)
        if self._limit is not None:
            self._limit.cancel()
        self._ping.close()
        self._desk.clear()
        for stream in list(self._streams.values()):
            stream.fail(reason, discard=False)
        self._streams.clear()
        self.waiting.clear()

    def _gone(self) -> None:
        """The last datagram has left."""
        if self.gone:
            return
        self.gone = True
        for timer in (self._timer, self._limit):
            if timer is not None:
                timer.cancel()
        self._plan.on_gone(self)
