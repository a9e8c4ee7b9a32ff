"""One contract for every transport: each sentence of net/port.py, held to the fake and to libp2p over TCP."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from clawnet import limits
from clawnet.errors import LinkError
from clawnet.identity.keys import KeyPair
from clawnet.net import identify
from clawnet.net.fake import FakeNetwork
from clawnet.net.ping import Pinger
from clawnet.net.port import Connection, Listener, Stream, Transport
from clawnet.net.quic import QuicTransport
from clawnet.net.tcp import TcpTransport

ALICE = KeyPair.from_seed(b"a" * 32)
BOB = KeyPair.from_seed(b"b" * 32)
CAROL = KeyPair.from_seed(b"c" * 32)
ECHO = "/test/echo/1"
SINK = "/test/sink/1"

Body = Callable[["Pair"], Awaitable[None]]


class Pair:
    """Alice's connection to Bob, Bob's end of it, and the streams that reached Bob."""

    def __init__(self, dialler: Transport, listener: Listener, near: Connection, far: Connection) -> None:
        self.dialler, self.listener, self.near, self.far = dialler, listener, near, far
        self.inbound: asyncio.Queue[Stream] = asyncio.Queue()
        far.set_stream_handler(self.inbound.put_nowait)

    async def streams(self, protocol: str = SINK) -> tuple[Stream, Stream]:
        near = await self.near.open_stream([protocol])
        return near, await self.inbound.get()


def transports(kind: str) -> tuple[Transport, Transport]:
    if kind == "fake":
        network = FakeNetwork()
        return network.transport(ALICE.peer_id, [ECHO], "a/1"), network.transport(BOB.peer_id, [ECHO, SINK], "b/1")
    make = {"tcp": TcpTransport, "quic-v1": QuicTransport}[kind]
    return make(ALICE, [ECHO], "a/1"), make(BOB, [ECHO, SINK], "b/1")


@asynccontextmanager
async def connected(kind: str) -> AsyncIterator[Pair]:
    dialler, acceptor = transports(kind)
    arrived: asyncio.Queue[Connection] = asyncio.Queue()
    listener = await acceptor.listen("127.0.0.1", 0, arrived.put_nowait)
    near = await dialler.dial(listener.addresses[0], BOB.peer_id)
    pair = Pair(dialler, listener, near, await arrived.get())
    try:
        yield pair
    finally:
        near.close("the test is over")
        await asyncio.wait_for(asyncio.gather(near.closed, pair.far.closed), 10)
        await listener.close()
        await dialler.close()
        await acceptor.close()


@pytest.fixture(params=["fake", "tcp", "quic-v1"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def run(kind: str, body: Body) -> None:
    async def all_of_it() -> None:
        async with connected(kind) as pair:
            await body(pair)

    asyncio.run(asyncio.wait_for(all_of_it(), 30))


def test_both_ends_know_each_other(kind: str) -> None:
    async def body(pair: Pair) -> None:
        assert (pair.near.peer, pair.far.peer) == (BOB.peer_id, ALICE.peer_id)
        assert (pair.near.inbound, pair.far.inbound) == (False, True)
        assert pair.near.address == str(pair.listener.addresses[0])
        assert pair.far.address.startswith("/ip4/127.0.0.1/" + ("udp/" if kind == "quic-v1" else "tcp/"))
        assert pair.near.transport == pair.dialler.name == kind

    run(kind, body)


def test_bytes_arrive_in_order_and_both_directions_end_alone(kind: str) -> None:
    async def body(pair: Pair) -> None:
        near, far = await pair.streams()
        assert (near.protocol, far.protocol, near.inbound, far.inbound) == (SINK, SINK, False, True)
        await near.write(b"one ")
        near.write_nowait(b"two ")
        await near.write(memoryview(bytearray(b"three")))
        near.close_write()
        near.close_write()
        assert await far.readexactly(13) == b"one two three"
        assert await far.read() == b"" == await far.read()
        assert not far.closed.done() and not near.closed.done()
        await far.write(b"still open")
        assert await near.readexactly(10) == b"still open"
        far.close_write()
        assert await near.read() == b""
        assert await near.closed == "" == await far.closed
        with pytest.raises(LinkError):
            await near.write(b"x")
        with pytest.raises(LinkError):
            near.write_nowait(b"x")

    run(kind, body)


def test_read_returns_at_most_what_was_asked(kind: str) -> None:
    async def body(pair: Pair) -> None:
        near, far = await pair.streams()
        await near.write(b"abcdef")
        assert await far.read(4) == b"abcd"
        assert await far.read(4) == b"ef"
        waiting = asyncio.ensure_future(far.read(1))
        await asyncio.sleep(0)
        await near.write(b"gh")
        assert await waiting == b"g"
        assert await far.read(9) == b"h"

    run(kind, body)


def test_readexactly_says_when_the_stream_ends_too_early(kind: str) -> None:
    async def body(pair: Pair) -> None:
        near, far = await pair.streams()
        await near.write(b"abc")
        near.close_write()
        with pytest.raises(LinkError, match="ended 7 bytes"):
            await far.readexactly(10)

    run(kind, body)


def test_a_buffer_is_filled_whatever_pieces_the_bytes_come_in(kind: str) -> None:
    async def body(pair: Pair) -> None:
        near, far = await pair.streams()
        buffer = memoryview(bytearray(6))
        await near.write(b"early ")
        assert await far.read(2) == b"ea"
        filling = asyncio.ensure_future(far.read_into(buffer, 30))
        for piece in (b"l", b"at", b"e, and more"):
            await near.write(piece)
        assert await filling == 6 and buffer == b"rly la"
        assert await far.readexactly(6) == b"te, an"
        near.close_write()
        assert await far.read_into(memoryview(bytearray(100)), 30) == 6, "the peer's end"
        assert await far.read_into(buffer, 30) == 0

    run(kind, body)


def test_a_buffer_above_the_window_is_filled(kind: str) -> None:
    async def body(pair: Pair) -> None:
        near, far = await pair.streams()
        data = hashlib.sha256(b"much").digest() * (limits.STREAM_WINDOW_BYTES // 8)
        writer = asyncio.ensure_future(near.write(data))
        buffer = bytearray(len(data))
        assert await far.read_into(memoryview(buffer), 30) == len(data) and buffer == data
        await writer

    run(kind, body)


def test_who_fills_a_buffer_learns_of_silence_and_of_a_reset(kind: str) -> None:
    async def body(pair: Pair) -> None:
        near, far = await pair.streams()
        buffer = memoryview(bytearray(10))
        await near.write(b"abc")
        with pytest.raises(TimeoutError):
            await far.read_into(buffer, 0.05)
        filling = asyncio.ensure_future(far.read_into(buffer, 30))
        await asyncio.sleep(0)
        near.reset()
        with pytest.raises(LinkError, match="reset"):
            await filling
        with pytest.raises(LinkError, match="reset"):
            await far.read_into(buffer, 30)

    run(kind, body)


def test_what_was_written_may_be_overwritten_at_once(kind: str) -> None:
    async def body(pair: Pair) -> None:
        near, far = await pair.streams()
        memory, expected = bytearray(300_000), hashlib.sha256()
        reader = asyncio.ensure_future(far.readexactly(8 * len(memory) + 4))
        for n in range(8):
            memory[:] = bytes([n]) * len(memory)
            expected.update(memory)
            await near.write(memoryview(memory))
        memory[:4] = b"last"
        near.write_nowait(memory[:4])
        memory[:] = bytes(len(memory))
        expected.update(b"last")
        assert hashlib.sha256(await reader).digest() == expected.digest()

    run(kind, body)


def test_four_mebibytes_pass_whole(kind: str) -> None:
    async def body(pair: Pair) -> None:
        near, far = await pair.streams()
        data = b"".join(hashlib.sha256(i.to_bytes(4, "big")).digest() * 1024 for i in range(128))
        writer = asyncio.ensure_future(near.write(data))
        assert await far.readexactly(len(data)) == data
        await writer

    run(kind, body)


def test_a_reader_that_stops_holds_the_writer_at_one_window(kind: str) -> None:
    async def body(pair: Pair) -> None:
        near, far = await pair.streams()
        size = 4 * limits.STREAM_WINDOW_BYTES
        writer = asyncio.ensure_future(near.write(bytes(size)))
        # Another stream's round trips outlast everything that could still arrive on the first.
        pinger = Pinger(pair.near)
        for _ in range(20):
            await pinger.ping()
        assert not writer.done()
        assert 0 < far.unread <= limits.STREAM_WINDOW_BYTES
        assert len(await far.readexactly(size)) == size
        await writer
        pinger.close()

    run(kind, body)


def test_write_nowait_keeps_order_and_is_bounded(kind: str) -> None:
    async def body(pair: Pair) -> None:
        near, far = await pair.streams()
        block = bytes(limits.MIB)
        with pytest.raises(LinkError):
            for _ in range(limits.SEND_QUEUE_BYTES_MAX // len(block) + 20):
                near.write_nowait(block)
                await asyncio.sleep(0)
        sent = near.buffered
        assert 0 < sent <= limits.SEND_QUEUE_BYTES_MAX
        got = 0
        done = asyncio.ensure_future(near.write(b"the end"))
        tail = b""
        while not tail.endswith(b"the end"):
            chunk = await far.read()
            got += len(chunk)
            tail = (tail + chunk)[-7:]
        await done
        assert near.buffered == 0 and got > sent

    run(kind, body)


def test_a_data_handler_gets_every_chunk_and_one_end(kind: str) -> None:
    async def body(pair: Pair) -> None:
        near, far = await pair.streams()
        await near.write(b"early ")
        assert await far.read(3) == b"ear"
        seen: list[bytes] = []
        far.set_data_handler(seen.append)
        for _ in range(100):
            await near.write(b"x" * 10_000)
        near.close_write()
        pinger = Pinger(pair.near)
        while not seen or seen[-1]:
            await pinger.ping()
        pinger.close()
        assert b"".join(seen) == b"ly " + b"x" * 1_000_000
        assert seen.count(b"") == 1

    run(kind, body)


def test_a_paused_handler_fills_the_window_and_goes_on_later(kind: str) -> None:
    async def body(pair: Pair) -> None:
        near, far = await pair.streams()
        seen: list[bytes] = []
        far.set_data_handler(seen.append)
        far.pause_reading()
        size = 3 * limits.STREAM_WINDOW_BYTES
        writer = asyncio.ensure_future(near.write(bytes(size)))
        pinger = Pinger(pair.near)
        for _ in range(10):
            await pinger.ping()
        assert not seen and 0 < far.unread <= limits.STREAM_WINDOW_BYTES and not writer.done()
        far.resume_reading()
        await writer
        while sum(map(len, seen)) < size:
            await pinger.ping()
        assert sum(map(len, seen)) == size
        pinger.close()

    run(kind, body)


def test_a_reset_ends_both_sides_and_readers_learn_it(kind: str) -> None:
    async def body(pair: Pair) -> None:
        near, far = await pair.streams()
        ends: list[bytes] = []
        near.set_data_handler(ends.append)
        reader = asyncio.ensure_future(far.read())
        await asyncio.sleep(0)
        near.reset()
        near.reset()
        with pytest.raises(LinkError, match="reset"):
            await reader
        assert "reset" in await near.closed and "reset" in await far.closed
        assert ends == [b""]
        with pytest.raises(LinkError):
            await far.write(b"x")

    run(kind, body)


def test_a_waiting_writer_learns_of_a_reset(kind: str) -> None:
    async def body(pair: Pair) -> None:
        near, far = await pair.streams()
        writer = asyncio.ensure_future(near.write(bytes(4 * limits.STREAM_WINDOW_BYTES)))
        await Pinger(pair.near).ping()
        far.reset()
        with pytest.raises(LinkError, match="reset"):
            await writer

    run(kind, body)


def test_closing_a_connection_flushes_and_ends_its_streams(kind: str) -> None:
    async def body(pair: Pair) -> None:
        near, far = await pair.streams()
        near.write_nowait(b"last words")
        near.close_write()
        half, _ = await pair.streams()
        pair.near.close("enough")
        pair.near.close("enough said")
        assert await pair.near.closed == "enough"
        await pair.far.closed
        assert await far.readexactly(10) == b"last words"
        assert await far.read() == b""
        with pytest.raises(LinkError):
            await half.read()
        with pytest.raises(LinkError):
            await pair.near.open_stream([SINK])

    run(kind, body)


def test_the_first_supported_protocol_is_taken(kind: str) -> None:
    async def body(pair: Pair) -> None:
        near = await pair.near.open_stream(["/test/unknown/1", ECHO, SINK])
        assert near.protocol == ECHO == (await pair.inbound.get()).protocol

    run(kind, body)


def test_an_unsupported_protocol_is_refused_and_the_connection_lives(kind: str) -> None:
    async def body(pair: Pair) -> None:
        with pytest.raises(LinkError) as caught:
            await pair.near.open_stream(["/test/unknown/1"])
        assert caught.value.details["refused"] is True
        # Alice supports no SINK, and it is her list that counts when Bob opens.
        with pytest.raises(LinkError):
            await pair.far.open_stream([SINK])
        assert await Pinger(pair.far).ping() >= 0

    run(kind, body)


def test_streams_that_come_before_the_handler_wait_for_it(kind: str) -> None:
    async def body(pair: Pair) -> None:
        opened = await pair.far.open_stream([ECHO])
        await opened.write(b"hello")
        await Pinger(pair.far).ping()
        got: list[Stream] = []
        pair.near.set_stream_handler(got.append)
        assert [stream.protocol for stream in got] == [ECHO]
        assert await got[0].readexactly(5) == b"hello"

    run(kind, body)


def test_more_streams_than_the_limit_are_refused_at_home(kind: str) -> None:
    async def body(pair: Pair) -> None:
        opened = [await pair.near.open_stream([SINK]) for _ in range(limits.STREAMS_PER_CONNECTION_MAX)]
        with pytest.raises(LinkError, match="too many streams"):
            await pair.near.open_stream([SINK])
        opened[0].reset()
        await pair.near.open_stream([SINK])

    run(kind, body)


def test_ping_and_identify_are_answered_both_ways(kind: str) -> None:
    async def body(pair: Pair) -> None:
        for one, other, agent in ((pair.near, BOB, "b/1"), (pair.far, ALICE, "a/1")):
            pinger = Pinger(one)
            for _ in range(5):
                assert 0 <= await pinger.ping() < 10
            pinger.close()
            seen = await identify.ask(one)
            assert (seen.peer, seen.agent, seen.addresses) == (other.peer_id, agent, ())
            assert {ECHO, "/ipfs/ping/1.0.0", "/ipfs/id/1.0.0"} <= set(seen.protocols)

    run(kind, body)


def test_a_third_ping_stream_is_refused(kind: str) -> None:
    async def body(pair: Pair) -> None:
        streams = [await pair.near.open_stream(["/ipfs/ping/1.0.0"]) for _ in range(2)]
        with pytest.raises(LinkError, match="reset"):
            await (await pair.near.open_stream(["/ipfs/ping/1.0.0"])).read()
        await streams[0].write(b"p" * 32)
        assert await streams[0].readexactly(32) == b"p" * 32

    run(kind, body)


def test_wrong_peer_own_peer_and_nobody_are_refused(kind: str) -> None:
    async def body(pair: Pair) -> None:
        address = pair.listener.addresses[0]
        for expected in (CAROL.peer_id, ALICE.peer_id):
            with pytest.raises(LinkError):
                await pair.dialler.dial(address, expected)
        with pytest.raises(LinkError):
            await pair.dialler.dial(address.with_peer(CAROL.peer_id), None)
        with pytest.raises(LinkError):
            await pair.dialler.dial(address.with_peer(CAROL.peer_id), BOB.peer_id)
        await pair.listener.close()
        with pytest.raises(LinkError):
            await pair.dialler.dial(address, BOB.peer_id)
        assert await Pinger(pair.near).ping() >= 0, "closing a listener leaves its connections alone"

    run(kind, body)


def test_a_taken_address_cannot_be_bound(kind: str) -> None:
    async def body(pair: Pair) -> None:
        with pytest.raises(LinkError) as caught:
            await pair.dialler.listen("127.0.0.1", pair.listener.addresses[0].port, lambda connection: None)
        assert caught.value.details["errno"]

    run(kind, body)


def test_a_dial_that_is_cancelled_leaves_nothing(kind: str) -> None:
    async def body(pair: Pair) -> None:
        dial = asyncio.ensure_future(pair.dialler.dial(pair.listener.addresses[0], BOB.peer_id))
        await asyncio.sleep(0)
        dial.cancel()
        with pytest.raises(asyncio.CancelledError):
            await dial
        assert await Pinger(pair.near).ping() >= 0

    run(kind, body)
