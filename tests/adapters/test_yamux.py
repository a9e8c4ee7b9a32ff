"""yamux by pair tests: two sessions, a wire of bytes between them, and every rule of it that a peer can break."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from clawnet import limits
from clawnet.errors import LinkError, WireError
from clawnet.net import yamux
from clawnet.net.port import Bytes
from clawnet.net.yamux import ACK, DATA, FIN, GO_AWAY, PING, RST, SYN, WINDOW, MuxedStream, Session

WINDOW_0 = limits.STREAM_WINDOW_BYTES


class Side:
    """One session, what it wants to send, and the streams it accepted."""

    def __init__(self, *, initiator: bool) -> None:
        self.wire: list[bytes] = []
        self.is_open = True
        self.now = 0.0
        self.accepted: list[MuxedStream] = []
        self.session = Session(
            cast(Any, SimpleNamespace(peer="somebody")),
            initiator=initiator,
            send=self.send,
            push=lambda: None,
            is_open=lambda: self.is_open,
            accept=self.accepted.append,
            now=lambda: self.now,
        )

    def send(self, data: Bytes) -> None:
        self.wire.append(bytes(data))

    def take(self) -> bytes:
        data = b"".join(self.wire)
        self.wire.clear()
        return data

    def frames(self) -> list[tuple[int, int, int, int]]:
        """What waits on the wire: (type, flags, stream, length) of each frame."""
        data, found = self.take(), []
        while data:
            _, kind, flags, number, length = struct.unpack(">BBHII", data[:12])
            found.append((kind, flags, number, length))
            data = data[12 + (length if kind == DATA else 0) :]
        return found


class Pair:
    def __init__(self) -> None:
        self.a, self.b = Side(initiator=True), Side(initiator=False)

    def pump(self, piece: int = 100_000) -> None:
        """Carries bytes both ways until nothing moves."""
        while self.a.wire or self.b.wire:
            for sender, receiver in ((self.a, self.b), (self.b, self.a)):
                data = sender.take()
                for at in range(0, len(data), piece):
                    receiver.session.receive(data[at : at + piece])

    def stream(self) -> tuple[MuxedStream, MuxedStream]:
        near = self.a.session.open()
        near.write_nowait(b"!")
        self.pump()
        far = self.b.accepted[-1]
        assert far._take(1) == b"!"
        far._consumed(1)
        return near, far


def frame(kind: int, flags: int, number: int, value: int, data: bytes = b"", version: int = 0) -> bytes:
    return struct.pack(">BBHII", version, kind, flags, number, value) + data


def run(body: Callable[[Pair], Awaitable[None]]) -> None:
    async def all_of_it() -> None:
        pair = Pair()
        await body(pair)
        for side in (pair.a, pair.b):
            side.session.lost("the test is over")
            assert not side.session.streams and side.session.window_growth == limits.WINDOW_GROWTH_BYTES_MAX

    asyncio.run(all_of_it())


def test_the_first_frames_are_the_specifications() -> None:
    async def body(pair: Pair) -> None:
        near = pair.a.session.open()
        assert pair.a.wire == []
        near.write_nowait(b"hi")
        near.write_nowait(b"ho")
        near.close_write()
        assert pair.a.take() == (
            b"\0\0\0\x01\0\0\0\x01\0\0\0\x02hi" + b"\0\0\0\0\0\0\0\x01\0\0\0\x02ho" + b"\0\0\0\x04\0\0\0\x01\0\0\0\0"
        )
        near.reset()
        assert pair.a.frames() == [(WINDOW, RST, 1, 0)]

    run(body)


def test_numbers_are_odd_and_even_and_the_answer_acknowledges() -> None:
    async def body(pair: Pair) -> None:
        ours, theirs = pair.a.session.open(), pair.b.session.open()
        assert (ours.number, pair.a.session.open().number, theirs.number) == (1, 3, 2)
        ours.write_nowait(b"x")
        pair.b.session.receive(pair.a.take())
        pair.b.accepted[0].write_nowait(b"y")
        assert pair.b.frames() == [(DATA, ACK, 1, 1)]

    run(body)


@pytest.mark.parametrize("piece", [1, 5, 12, 13, 4096])
def test_any_pieces_make_the_same_streams(piece: int) -> None:
    async def body(pair: Pair) -> None:
        near, far = pair.stream()
        near.write_nowait(b"abc" * 1000)
        other = pair.a.session.open()
        other.write_nowait(b"other")
        near.close_write()
        pair.pump(piece)
        assert await far.readexactly(3000) == b"abc" * 1000
        assert await far.read() == b""
        assert await pair.b.accepted[1].readexactly(5) == b"other"

    run(body)


def test_the_window_stops_the_sender_and_reading_opens_it_again() -> None:
    async def body(pair: Pair) -> None:
        near, far = pair.stream()
        near.write_nowait(bytes(3 * WINDOW_0))
        pair.pump()
        assert far.unread == WINDOW_0 - 1 and near.buffered == 2 * WINDOW_0 + 1
        got = 0
        while got < 3 * WINDOW_0:
            got += len(await far.read())
            assert far.unread <= WINDOW_0
            pair.pump()
        assert near.buffered == 0 and far.window_size == WINDOW_0

    run(body)


def test_updates_come_once_half_a_window_was_read() -> None:
    async def body(pair: Pair) -> None:
        near, far = pair.stream()
        near.write_nowait(bytes(WINDOW_0 - 1))
        pair.pump()
        await far.readexactly(WINDOW_0 // 2 - 2)
        assert pair.b.frames() == []
        await far.readexactly(1)
        assert pair.b.frames() == [(WINDOW, ACK, 1, WINDOW_0 // 2)]

    run(body)


def test_a_window_grows_for_a_fast_reader_within_the_connections_share() -> None:
    async def body(pair: Pair) -> None:
        near, far = pair.stream()
        pair.b.session.rtt_s = 1.0
        handed: list[int] = []
        far.set_data_handler(lambda data: handed.append(len(data)))
        for _ in range(80):
            near.write_nowait(bytes(limits.MIB))
            pair.pump()
        assert far.window_size == limits.STREAM_WINDOW_BYTES_MAX
        assert pair.b.session.window_growth == limits.WINDOW_GROWTH_BYTES_MAX - far.window_size + WINDOW_0
        assert sum(handed) == 80 * limits.MIB
        slow_near, slow_far = pair.stream()
        for _ in range(8):
            pair.b.now += 10.0
            slow_near.write_nowait(bytes(WINDOW_0 // 2))
            pair.pump()
            await slow_far.readexactly(WINDOW_0 // 2)
        assert slow_far.window_size == WINDOW_0
        far.reset()
        assert pair.b.session.window_growth == limits.WINDOW_GROWTH_BYTES_MAX

    run(body)


def test_a_full_socket_holds_bulk_back_and_not_control() -> None:
    async def body(pair: Pair) -> None:
        near, far = pair.stream()
        other, other_far = pair.stream()
        pair.a.is_open = False
        near.write_nowait(b"held")
        other.write_nowait(b"too")
        pair.a.session.ping()
        assert pair.a.frames() == [(PING, SYN, 0, 1)]
        assert (near.buffered, other.buffered) == (4, 3)
        pair.a.is_open = True
        pair.a.session.drained()
        pair.pump()
        assert (await far.read(), await other_far.read()) == (b"held", b"too")

    run(body)


def test_a_waiting_writer_goes_on_when_the_socket_drains() -> None:
    async def body(pair: Pair) -> None:
        near, far = pair.stream()
        pair.a.is_open = False
        writer = asyncio.ensure_future(near.write(b"patience"))
        await asyncio.sleep(0)
        assert not writer.done()
        pair.a.is_open = True
        pair.a.session.drained()
        await writer
        pair.pump()
        assert await far.readexactly(8) == b"patience"

    run(body)


def test_what_a_writer_gave_may_change_afterwards() -> None:
    async def body(pair: Pair) -> None:
        near, far = pair.stream()
        data = bytearray(b"first")
        await near.write(data)
        near.write_nowait(memoryview(data))
        data[:] = b"wrong"
        pair.pump()
        assert await far.readexactly(10) == b"firstfirst"

    run(body)


def test_single_bytes_cost_no_more_memory_than_they_are() -> None:
    async def body(pair: Pair) -> None:
        near, far = pair.stream()
        for _ in range(20_000):
            near.write_nowait(b"z")
        pair.pump()
        assert far.unread == 20_000 and len(far._chunks) <= 257
        assert await far.readexactly(20_000) == b"z" * 20_000

    run(body)


def test_pings_are_answered_and_measured() -> None:
    async def body(pair: Pair) -> None:
        pair.a.session.ping()
        pair.b.session.receive(pair.a.take())
        assert pair.b.wire == [frame(PING, ACK, 0, 1)]
        pair.a.now = 0.25
        pair.a.session.receive(pair.b.take())
        assert pair.a.session.rtt_s == 0.25
        pair.a.session.receive(frame(PING, ACK, 0, 77))
        assert pair.a.session.rtt_s == 0.25

    run(body)


def test_go_away_ends_new_streams_and_keeps_old_ones() -> None:
    async def body(pair: Pair) -> None:
        near, far = pair.stream()
        pair.b.session.go_away(yamux.NORMAL)
        pair.pump()
        with pytest.raises(LinkError):
            pair.a.session.open()
        near.write_nowait(b"still")
        pair.pump()
        assert await far.read() == b"still"

    run(body)


def test_streams_beyond_backlog_and_limit_are_reset() -> None:
    async def body(pair: Pair) -> None:
        for i in range(limits.STREAM_BACKLOG_MAX + 1):
            pair.b.session.receive(frame(WINDOW, SYN, 2 * i + 1, 0))
        assert len(pair.b.accepted) == limits.STREAM_BACKLOG_MAX
        assert pair.b.frames() == [(WINDOW, RST, 2 * limits.STREAM_BACKLOG_MAX + 1, 0)]
        for stream in pair.b.accepted:
            pair.b.session.negotiated(stream)
        pair.b.accepted[0].reset()
        assert pair.b.frames() == [(WINDOW, ACK | RST, 1, 0)]
        number = 1001
        while len(pair.b.session.streams) < limits.STREAMS_PER_CONNECTION_MAX:
            pair.b.session.receive(frame(DATA, SYN, number, 0))
            pair.b.session.negotiated(pair.b.accepted[-1])
            number += 2
        pair.b.session.receive(frame(DATA, SYN, number, 3, b"abc"))
        assert pair.b.frames() == [(WINDOW, RST, number, 0)]

    run(body)


def test_data_for_a_stream_that_is_gone_is_skipped() -> None:
    async def body(pair: Pair) -> None:
        near, far = pair.stream()
        near.write_nowait(b"crossing")
        far.reset()
        other, other_far = pair.stream()
        pair.pump()
        other.write_nowait(b"unharmed")
        pair.pump()
        assert await other_far.read() == b"unharmed"
        assert near.closed.result() == "reset by the peer"

    run(body)


@pytest.mark.parametrize(
    "data",
    [
        frame(DATA, 0, 1, 0, version=1),
        frame(4, 0, 1, 0),
        frame(WINDOW, SYN, 2, 0),
        frame(WINDOW, SYN, 0, 0),
        frame(WINDOW, SYN, 1, 0) * 2,
        frame(DATA, SYN, 1, WINDOW_0 + 1),
        frame(DATA, SYN, 1, 2**32 - 1),
        frame(DATA, 0, 9, limits.STREAM_WINDOW_BYTES_MAX + 1),
        frame(WINDOW, SYN, 1, 2**32 - 1),
        frame(DATA, SYN | FIN, 1, 1, b"x") + frame(DATA, 0, 1, 1, b"y"),
    ],
)
def test_a_peer_that_breaks_the_rules_is_refused(data: bytes) -> None:
    async def body(pair: Pair) -> None:
        with pytest.raises(WireError):
            pair.b.session.receive(data)

    run(body)


def test_the_window_counts_over_many_frames() -> None:
    async def body(pair: Pair) -> None:
        pair.b.session.receive(frame(DATA, SYN, 1, WINDOW_0, bytes(WINDOW_0)))
        with pytest.raises(WireError, match="window"):
            pair.b.session.receive(frame(DATA, 0, 1, 1, b"x"))

    run(body)


def test_a_stream_reset_before_its_first_byte_is_never_seen() -> None:
    async def body(pair: Pair) -> None:
        stream = pair.a.session.open()
        stream.reset()
        assert pair.a.wire == [] and not pair.a.session.streams
        assert await stream.closed == "reset"

    run(body)


def test_pending_bytes_leave_before_the_end_of_the_stream() -> None:
    async def body(pair: Pair) -> None:
        near, far = pair.stream()
        near.write_nowait(bytes(WINDOW_0) + b"tail")
        near.close_write()
        far.close_write()
        pair.pump()
        assert not near.closed.done(), "the peer's end does not cut off what waits"
        data = await far.readexactly(WINDOW_0 - 1)
        pair.pump()
        assert len(data) + 5 == WINDOW_0 + 4 and await far.readexactly(5) == b"\0tail"
        assert await far.read() == b""
        assert (near.closed.result(), far.closed.result()) == ("", "")

    run(body)


def test_go_away_and_unknown_flags_are_harmless() -> None:
    async def body(pair: Pair) -> None:
        pair.b.session.receive(frame(GO_AWAY, 0, 0, 2) + frame(PING, 0, 0, 5) + frame(WINDOW, FIN, 77, 9))
        assert pair.b.wire == []
        assert pair.b.session.gone_away

    run(body)
