"""One control stream: Hello both ways, admission, then batches; liveness, rate limits and the send queue's bound.

A link comes up at a side when that side has admitted the peer's Hello *and* opened the peer's first batch, which every
side sends as soon as it admits. So a refusal reaches the dialler before it believes in the link, and a Hello replayed
by somebody cannot bring one up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from enum import Enum
from typing import Any, Final, Protocol

from msgspec import Struct

from clawnet import limits
from clawnet.errors import LinkError, MessageTooOld, RemoteError, Replayed, SignatureRefused, WireError
from clawnet.net.port import Connection, Stream
from clawnet.net.rates import CLASS_OF, SESSION, Rates, Verdict
from clawnet.wire.batch import BATCH_OVERHEAD_BYTES, Batch, Frames
from clawnet.wire.envelope import Envelope, decode_envelope
from clawnet.wire.messages import Disconnect, Error, Hello, Kind, Message, Ping, Pong
from clawnet.wire.session import Encoded, Handshake, Item, Session

CONTROL_PROTOCOL = "/clawnet/1.0.0"


class LinkState(Enum):
    """Where a control stream stands."""

    GREETING = "greeting"
    WELCOMING = "welcoming"
    UP = "up"
    CLOSED = "closed"


_REFUSED: Final[dict[type[RemoteError], tuple[str, str]]] = {
    SignatureRefused: ("batches_forged", "signature.invalid"),
    Replayed: ("batches_replayed", "message.replayed"),
    MessageTooOld: ("batches_too_old", "message.too_old"),
}


class LinkInfo(Struct, frozen=True):
    """What is known of one link that is up. `skew_ms` is how far the peer's clock is ahead of this one's."""

    peer: str
    address: str
    transport: str
    inbound: bool
    rtt_ms: float
    skew_ms: int
    since_ms: int
    buffered: int


class LinkOwner(Protocol):
    """What a link asks of, and tells, the switch that owns it."""

    clock: Callable[[], int]
    ping_interval_s: float

    def admit(self, link: Link, hello: Hello) -> str:
        """Empty to admit the peer, else why not."""

    def link_up(self, link: Link) -> None:
        """The link carries messages from now on."""

    def link_message(self, link: Link, envelope: Envelope, message: Message) -> None:
        """One message that is not the link's own business."""

    def link_down(self, link: Link, reason: str) -> None:
        """The link has ended; said once, also of a link that never came up."""

    def ban(self, peer: str, reason: str) -> None:
        """The peer broke the rules beyond patience."""

    def note(self, level: str, event: str, **fields: Any) -> None:
        """A log event."""

    def count(self, name: str, by: int = 1) -> None:
        """A counter goes up."""


class Link:
    """A control stream and its session, driven by the stream's data handler; no task, no future per message."""

    def __init__(self, owner: LinkOwner, stream: Stream, handshake: Handshake, wanted: str = "") -> None:
        self.connection: Connection = stream.connection
        self.peer = self.connection.peer
        self.wanted = wanted
        """Whom this node dialled where it found another id: the peer must prove that it follows that one."""
        self.state = LinkState.GREETING
        self.hello: Hello | None = None
        self.session: Session | None = None
        self.reason = ""
        self.rtt_ms = 0.0
        self.skew_ms = 0
        self.since_ms = 0
        self.welcomed_ms = 0
        loop = asyncio.get_running_loop()
        self.settled: asyncio.Future[None] = loop.create_future()
        self._loop = loop
        self._owner = owner
        self._stream = stream
        self._handshake = handshake
        self._frames = Frames(limits.HELLO_BYTES_MAX + BATCH_OVERHEAD_BYTES)
        self._heard_s = self.up_s = loop.time()
        self._ping: tuple[int, float] | None = None
        self._pings = 0
        self._probing = 0
        self._offences = 0
        self._rates = Rates(self._heard_s)
        self._resume: asyncio.TimerHandle | None = None
        self._frame_since_s: float | None = None
        self._timer: asyncio.TimerHandle = loop.call_later(limits.HANDSHAKE_TIMEOUT_S, self._greeting_late)

    def start(self) -> None:
        """Sends the Hello and listens."""
        self._write(self._handshake.frame)
        if self.state is LinkState.GREETING:
            self._stream.set_data_handler(self._on_data)

    def info(self) -> LinkInfo:
        """The link as `peer list` shows it."""
        connection = self.connection
        return LinkInfo(
            self.peer,
            connection.address,
            connection.transport,
            connection.inbound,
            self.rtt_ms,
            self.skew_ms,
            self.since_ms,
            self._stream.buffered,
        )

    def send(self, items: list[Item]) -> bool:
        """One write with all of these; False when the link is not up, or is dropped because the peer does not read."""
        if self.state is not LinkState.UP or self.session is None:
            return False
        return self._write(self.session.seal(items, self._owner.clock()))

    def send_encoded(self, items: list[Encoded]) -> bool:
        """As send, for payloads encoded already."""
        if self.state is not LinkState.UP or self.session is None:
            return False
        return self._write(self.session.seal_encoded(items, self._owner.clock()))

    def close(self, reason: str) -> None:
        """Tells the peer why, where that is possible, and ends the link."""
        if self.state is LinkState.CLOSED:
            return
        if self.session is not None:
            farewell = self.session.seal(
                [(Disconnect(reason[: limits.TEXT_CHARS_MAX]), None, None)], self._owner.clock()
            )
            try:
                self._stream.write_nowait(farewell)
                self._stream.close_write()
            except LinkError:
                self._end(reason, reason, reset=True)
        self._end(reason, reason)

    def probe(self) -> None:
        """Asks for a sign of life now; without one in LINK_PROBE_S the link ends."""
        if self.state is LinkState.UP and self._probing < limits.LINK_PROBES_MAX:
            self._probing += 1
            asked_s = self._loop.time()
            self._send_ping()
            self._loop.call_later(limits.LINK_PROBE_S, self._probe_over, asked_s)

    # --- what arrives

    def _on_data(self, data: bytes) -> None:
        if not data:
            self._end(self._lost_reason(), "")
            return
        self._heard_s = self._loop.time()
        taken = False
        try:
            for body in self._frames.feed(data):
                taken = True
                if self.state is LinkState.GREETING:
                    self._on_hello(body)
                elif self.state is not LinkState.CLOSED:
                    self._on_batch(body)
                if self.state is LinkState.CLOSED:
                    return
        except WireError as problem:
            self._owner.count("wire_refused", 1)
            self._owner.note("security", "wire.garbage", peer=self.peer, problem=problem.message)
            if self.state is LinkState.UP:
                self._owner.ban(self.peer, problem.message)
            self.close(problem.message)
            return
        if not self._frames.unfinished:
            self._frame_since_s = None
        elif self._frame_since_s is None or taken:
            self._frame_since_s = self._heard_s
        if self._rates.pause_s:
            self._back_off()

    def _on_hello(self, body: bytes) -> None:
        try:
            hello = self._handshake.receive(body, self._owner.clock())
        except RemoteError as problem:
            self.session = self._handshake.session
            level = "warn" if isinstance(problem, (LinkError, MessageTooOld)) else "security"
            event = "signature.invalid" if isinstance(problem, SignatureRefused) else "hello.refused"
            self._owner.note(level, event, peer=self.peer, address=self.connection.address, problem=problem.message)
            self._owner.count("hellos_refused")
            self.close(problem.message)
            return
        self.hello = hello
        self.session = self._handshake.session
        self._frames.bytes_max = limits.BATCH_BYTES_MAX
        refusal = self._owner.admit(self, hello)
        if self.state is LinkState.CLOSED:
            return
        if refusal:
            self._owner.note("info", "link.refused", peer=self.peer, reason=refusal)
            self._owner.count("links_refused")
            self.close(refusal)
            return
        self.state = LinkState.WELCOMING
        self._send_ping()

    def _on_batch(self, body: bytes) -> None:
        assert self.session is not None
        try:
            batch = self.session.open(body, self._owner.clock())
        except (SignatureRefused, MessageTooOld) as problem:
            counter, event = _REFUSED[type(problem)]
            self._owner.count(counter)
            self._owner.note("security", event, peer=self.peer, problem=problem.message)
            self._offend(problem.message)
            return
        self._owner.count("batches_received")
        if self.state is LinkState.WELCOMING and not self._on_welcome(batch):
            return
        for raw in batch.envelopes:
            self._on_envelope(raw)
            if self.state is not LinkState.UP:
                return

    def _on_welcome(self, batch: Batch) -> bool:
        """The peer's first batch: it admits this node, unless it is a refusal."""
        first = decode_envelope(batch.envelopes[0])
        if first.kind == Kind.DISCONNECT:
            self._on_envelope(batch.envelopes[0])
            return False
        self.welcomed_ms = batch.time_ms
        self.since_ms = self._owner.clock()
        self.up_s = self._loop.time()
        self.state = LinkState.UP
        self._timer.cancel()
        self._timer = self._loop.call_later(self._owner.ping_interval_s, self._tick)
        self._owner.link_up(self)
        if not self.settled.done():
            self.settled.set_result(None)
        return self._is_up()

    def _is_up(self) -> bool:
        return self.state is LinkState.UP

    def _on_envelope(self, raw: bytes) -> None:
        try:
            envelope = decode_envelope(raw)
            if not self._within_rate(envelope, len(raw)):
                return
            message = envelope.message()
        except WireError as problem:
            self._owner.count("wire_refused")
            self._owner.note("security", "message.refused", peer=self.peer, problem=problem.message)
            self._offend(problem.message)
            return
        if envelope.kind > Kind.DISCONNECT:
            self._owner.link_message(self, envelope, message)
            return
        match message:
            case Ping():
                self._answer(Pong(message.nonce, self._owner.clock()), envelope.id)
            case Pong() if message.nonce <= self._pings:
                self._on_pong(message)
            case Disconnect():
                self._end(f"the peer closed the link: {message.reason}", "the peer left")
            case _:
                self._owner.link_message(self, envelope, message)

    def _within_rate(self, envelope: Envelope, size: int) -> bool:
        verdict = self._rates.take(envelope.kind, size, self._heard_s)
        if verdict is Verdict.PASS:
            return True
        name = CLASS_OF.get(envelope.kind, SESSION)
        self._owner.count("messages_over_rate")
        self._owner.count(f"messages_over_rate_{name}")
        if verdict is Verdict.TELL:
            self._owner.note("security", "rate.exceeded", peer=self.peer, of=name, kind=envelope.kind)
            self._answer(Error(103, "slow down: messages over the rate limit are dropped"), envelope.id)
        elif verdict is Verdict.BAN:
            self._owner.ban(self.peer, f"rate limit of {name} messages")
            self.close(f"rate limit of {name} messages exceeded for too long")
        return False

    def _back_off(self) -> None:
        """The stream is not read for a while: the sender's own queue fills, and what it sends is late, not lost."""
        pause_s, self._rates.pause_s = self._rates.pause_s, 0.0
        self._owner.count("links_held_back")
        self._stream.pause_reading()
        self._resume = self._loop.call_later(pause_s, self._go_on)

    def _go_on(self) -> None:
        self._resume = None
        self._heard_s = self._loop.time()
        if self._frame_since_s is not None:
            self._frame_since_s = self._heard_s
        self._stream.resume_reading()

    def _on_pong(self, pong: Pong) -> None:
        if self._ping is None or pong.nonce != self._ping[0]:
            return
        passed_ms = (self._heard_s - self._ping[1]) * 1000
        self.rtt_ms = passed_ms if not self.rtt_ms else 0.875 * self.rtt_ms + 0.125 * passed_ms
        self.skew_ms = round(pong.time_ms + passed_ms / 2) - self._owner.clock()
        self._ping = None

    def _offend(self, what: str) -> None:
        self._offences += 1
        if self._offences >= limits.OFFENCES_MAX and self.state is not LinkState.CLOSED:
            self._owner.ban(self.peer, what)
            self.close(f"too many refused messages, the last: {what}")

    # --- what leaves

    def _answer(self, message: Message, reply_to: bytes) -> None:
        self.send([(message, reply_to, None)])

    def _send_ping(self) -> None:
        assert self.session is not None
        self._pings += 1
        self._ping = (self._pings, self._loop.time())
        now_ms = self._owner.clock()
        self._write(self.session.seal([(Ping(self._pings, now_ms), None, None)], now_ms))

    def _write(self, data: bytes) -> bool:
        try:
            self._stream.write_nowait(data)
        except LinkError as problem:
            if self._stream.buffered + len(data) > limits.SEND_QUEUE_BYTES_MAX and not self._stream.closed.done():
                self._owner.count("links_stalled")
                self._owner.note("warn", "link.stalled", peer=self.peer, buffered=self._stream.buffered)
                self._end("the peer does not read what is sent to it", "the send queue is full", reset=True)
            else:
                self._end(problem.message, problem.message)
            return False
        self._owner.count("bytes_sent", len(data))
        return True

    # --- time

    def _tick(self) -> None:
        now_s = self._loop.time()
        silent_s = now_s - self._heard_s
        if silent_s > 2 * self._owner.ping_interval_s:
            self._owner.count("links_timed_out")
            self._end(f"no sign of life for {silent_s:.0f} s", "ping timeout", reset=True)
            return
        if self._frame_since_s is not None and now_s - self._frame_since_s > limits.FRAME_TIMEOUT_S:
            self._owner.count("links_dripping")
            self._owner.note("security", "link.dripping", peer=self.peer, address=self.connection.address)
            self._end(f"a batch was not whole after {limits.FRAME_TIMEOUT_S:g} s", "too slow", reset=True)
            return
        self._timer = self._loop.call_later(self._owner.ping_interval_s, self._tick)
        self._send_ping()

    def _probe_over(self, asked_s: float) -> None:
        self._probing -= 1
        if self.state is LinkState.UP and self._heard_s < asked_s:
            self._owner.count("links_timed_out")
            self._end(f"no answer to a ping within {limits.LINK_PROBE_S:g} s", "ping timeout", reset=True)

    def _greeting_late(self) -> None:
        self.close(f"no complete handshake within {limits.HANDSHAKE_TIMEOUT_S:g} s")

    def _lost_reason(self) -> str:
        for closed in (self.connection.closed, self._stream.closed):
            if closed.done() and closed.result():
                return closed.result()
        return "the peer ended the control stream"

    def _end(self, reason: str, told: str, *, reset: bool = False) -> None:
        """The link is over; `told` is the reason given to the transport."""
        if self.state is LinkState.CLOSED:
            return
        self.state = LinkState.CLOSED
        self.reason = reason
        self._timer.cancel()
        if self._resume is not None:
            self._resume.cancel()
        self._stream.set_data_handler(_drop)
        if reset:
            self._stream.reset()
        try:
            self.connection.close(told or reason)
        finally:
            if not self.settled.done():
                self.settled.set_exception(LinkError(reason, peer=self.peer))
                self.settled.exception()
            self._owner.link_down(self, reason)


def _drop(data: bytes) -> None:
    """What comes after the end is nobody's."""
