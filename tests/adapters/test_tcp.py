"""libp2p over TCP where the contract ends: hostile and silent peers, limits on handshakes, IPv6 and names."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from clawnet import limits
from clawnet.errors import LinkError
from clawnet.identity.keys import KeyPair
from clawnet.identity.multiaddr import Multiaddr
from clawnet.net import upgrade
from clawnet.net.link import Link
from clawnet.net.multistream import Proposer
from clawnet.net.ping import Pinger
from clawnet.net.port import Connection, Stream
from clawnet.net.tcp import TcpTransport
from clawnet.net.upgrade import Upgrade
from clawnet.net.yamux import ACK, DATA, GO_AWAY, PING, RST, SYN, WINDOW

OURS = KeyPair.from_seed(b"o" * 32)
THEIRS = KeyPair.from_seed(b"t" * 32)
SINK = "/test/sink/1"


@dataclass
class Node:
    """A listening clawnet transport and what it accepted."""

    transport: TcpTransport
    address: Multiaddr
    arrived: asyncio.Queue[Connection] = field(default_factory=asyncio.Queue)
    streams: asyncio.Queue[Stream] = field(default_factory=asyncio.Queue)

    def on_connection(self, connection: Connection) -> None:
        connection.set_stream_handler(self.streams.put_nowait)
        self.arrived.put_nowait(connection)


@asynccontextmanager
async def listening(host: str = "127.0.0.1") -> AsyncIterator[Node]:
    node = Node(TcpTransport(OURS, [SINK]), Multiaddr("", 0))
    listener = await node.transport.listen(host, 0, node.on_connection)
    node.address = listener.addresses[0]
    try:
        yield node
    finally:
        await listener.close()
        await node.transport.close()
        assert node.transport.handshakes == 0


class Puppet:
    """A peer that does exactly what a test says, once it has come through the upgrade."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, side: Upgrade) -> None:
        self.reader, self.writer, self.side = reader, writer, side
        self.left = bytes(side.raw)

    @classmethod
    async def dial(cls, port: int) -> Puppet:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        side = Upgrade(THEIRS, initiator=True, expected=None)
        writer.write(side.start())
        while not side.done:
            writer.write(side.receive(await reader.read(4096)))
        return cls(reader, writer, side)

    def send(self, kind: int, flags: int, number: int, value: int, data: bytes = b"") -> None:
        assert self.side.channel is not None
        raw = struct.pack(">BBHII", 0, kind, flags, number, value) + data
        self.writer.write(self.side.channel.seal(raw))

    async def frame(self) -> bytes:
        """The plain content of the next encrypted frame; b"" at the end."""
        assert self.side.channel is not None
        while True:
            if len(self.left) >= 2:
                end = 2 + int.from_bytes(self.left[:2], "big")
                if len(self.left) >= end:
                    plain = self.side.channel.open(self.left[2:end])
                    self.left = self.left[end:]
                    return plain
            try:
                data = await self.reader.read(65_536)
            except ConnectionError:
                return b""
            if not data:
                return b""
            self.left += data

    async def until_closed(self) -> bytes:
        """All that still comes."""
        got = b""
        while plain := await self.frame():
            got += plain
        self.writer.close()
        return got


def run(body: Callable[[Node], Awaitable[None]], host: str = "127.0.0.1") -> None:
    async def all_of_it() -> None:
        async with listening(host) as node:
            await body(node)

    asyncio.run(asyncio.wait_for(all_of_it(), 30))


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 on this machine")
def test_ipv6() -> None:
    async def body(node: Node) -> None:
        assert str(node.address).startswith("/ip6/::1/tcp/")
        link = await TcpTransport(THEIRS).dial(node.address, OURS.peer_id)
        assert link.address == str(node.address)
        assert await Pinger(link).ping() > 0
        link.close("done")
        await node.transport.close()

    run(body, "::1")


def test_what_cannot_be_dialled_is_a_link_error() -> None:
    async def body(node: Node) -> None:
        with socket.socket() as closed, pytest.raises(LinkError, match="cannot connect"):
            closed.bind(("127.0.0.1", 0))
            await TcpTransport(THEIRS).dial(Multiaddr("127.0.0.1", closed.getsockname()[1]), None)
        with pytest.raises(LinkError, match="no TCP address"):
            await TcpTransport(THEIRS).dial(Multiaddr("127.0.0.1", 1, "quic-v1"), None)

    run(body)


def test_a_dial_that_gets_no_answer_ends_in_time() -> None:
    async def body(node: Node) -> None:
        with socket.socket() as mute:
            mute.bind(("127.0.0.1", 0))
            mute.listen()
            with pytest.raises(LinkError, match=r"did not answer within 0.05 s"):
                await TcpTransport(THEIRS).dial(Multiaddr("127.0.0.1", mute.getsockname()[1]), None, 0.05)

    run(body)


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH_9.6\r\n", b"", b"\x13/multistream/1.0.0\n\x03na\n"])
def test_a_dial_to_what_is_not_libp2p_is_refused(answer: bytes) -> None:
    async def body(node: Node) -> None:
        def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(answer)
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        with pytest.raises(LinkError, match="cannot connect"):
            await TcpTransport(THEIRS).dial(Multiaddr("127.0.0.1", server.sockets[0].getsockname()[1]), None)
        server.close()

    run(body)


def test_a_handshake_that_stalls_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HANDSHAKE_TIMEOUT_S", 0.05)

    async def body(node: Node) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", node.address.port)
        writer.write(b"\x13/multi")
        with pytest.raises(ConnectionError):
            assert await reader.read() == b""
            raise ConnectionError("ended in good order")
        writer.close()
        assert node.arrived.empty()

    run(body)


def test_handshakes_under_way_are_limited_by_address_and_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PENDING_HANDSHAKES_PER_ADDRESS_MAX", 3)

    async def body(node: Node) -> None:
        idle = [await asyncio.open_connection("127.0.0.1", node.address.port) for _ in range(3)]
        for _, writer in idle:
            writer.write(b"\x13")
        one_more, more_writer = await asyncio.open_connection("127.0.0.1", node.address.port)
        with pytest.raises(ConnectionError):
            assert await one_more.read() == b""
            raise ConnectionError("ended in good order")
        assert node.transport.handshakes == 3
        for _, writer in idle:
            writer.close()
            await writer.wait_closed()
        more_writer.close()
        while node.transport.handshakes:
            await asyncio.sleep(0)
        dialler = TcpTransport(THEIRS)
        assert await Pinger(await dialler.dial(node.address, None)).ping() > 0
        await dialler.close()

    run(body)


def test_a_silent_peer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "KEEPALIVE_S", 0.02)

    async def body(node: Node) -> None:
        puppet = await Puppet.dial(node.address.port)
        link = await node.arrived.get()
        assert "no sign of life" in await link.closed
        puppet.writer.close()

    run(body)


def test_a_quiet_peer_that_answers_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "KEEPALIVE_S", 0.02)

    async def body(node: Node) -> None:
        puppet = await Puppet.dial(node.address.port)
        link = await node.arrived.get()
        for value in range(1, 8):
            assert await puppet.frame() == struct.pack(">BBHII", 0, PING, SYN, 0, value)
            puppet.send(PING, ACK, 0, value)
        assert not link.closed.done()
        puppet.send(GO_AWAY, 0, 0, 0)
        assert await link.closed == "closed by the peer"
        await puppet.until_closed()

    run(body)


@pytest.mark.parametrize(
    "frame",
    [
        (DATA, SYN, 1, limits.STREAM_WINDOW_BYTES + 1),
        (WINDOW, SYN, 2, 0),
        (9, 0, 0, 0),
    ],
)
def test_who_breaks_yamux_gets_a_go_away_and_is_cut_off(frame: tuple[int, int, int, int]) -> None:
    async def body(node: Node) -> None:
        puppet = await Puppet.dial(node.address.port)
        link = await node.arrived.get()
        puppet.send(*frame)
        assert "broke the protocol" in await link.closed
        assert (await puppet.until_closed()).endswith(struct.pack(">BBHII", 0, GO_AWAY, 0, 0, 1))

    run(body)


def test_who_opens_streams_without_end_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "STREAMS_OPENED_PER_KEEPALIVE_MAX", 100)

    async def body(node: Node) -> None:
        puppet = await Puppet.dial(node.address.port)
        link = await node.arrived.get()
        for number in range(1, 205, 2):
            puppet.send(WINDOW, SYN, number, 0)
            puppet.send(WINDOW, RST, number, 0)
        assert "streams without end" in await link.closed
        await puppet.until_closed()

    run(body)


def test_a_tampered_frame_ends_the_connection() -> None:
    async def body(node: Node) -> None:
        puppet = await Puppet.dial(node.address.port)
        link = await node.arrived.get()
        puppet.writer.write(b"\x00\x20" + bytes(32))
        assert "authenticate" in await link.closed
        await puppet.until_closed()

    run(body)


def test_who_asks_and_never_reads_the_answers_is_cut_off() -> None:
    async def body(node: Node) -> None:
        puppet = await Puppet.dial(node.address.port)
        link = await node.arrived.get()
        pings = struct.pack(">BBHII", 0, PING, SYN, 0, 1) * 5000
        assert puppet.side.channel is not None
        while not link.closed.done():
            puppet.writer.write(puppet.side.channel.seal(pings))
            await asyncio.sleep(0)
            if puppet.writer.transport.is_closing():
                break
        assert "reads no answers" in await link.closed
        puppet.writer.close()

    run(body)


def test_a_peer_that_opens_its_window_and_reads_nothing_costs_one_bounded_buffer() -> None:
    async def body(node: Node) -> None:
        puppet = await Puppet.dial(node.address.port)
        link = await node.arrived.get()
        hello = Proposer([SINK]).start()
        puppet.send(DATA, SYN, 1, len(hello), hello)
        puppet.send(WINDOW, 0, 1, 2**31)
        stream = await node.streams.get()
        assert isinstance(link, Link)
        writing = asyncio.ensure_future(stream.write(bytes(64 * limits.MIB)))
        other = asyncio.ensure_future(asyncio.wait_for(link.closed, 5))
        for _ in range(100):
            await asyncio.sleep(0)
            assert link.unsent <= limits.SOCKET_BUFFER_BYTES + 2 * limits.STREAM_CHUNK_BYTES
        assert not writing.done() and not other.done()
        writing.cancel()
        puppet.writer.close()
        await other

    run(body)


def test_a_stream_that_never_says_its_protocol_is_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "STREAM_NEGOTIATION_TIMEOUT_S", 0.02)

    async def body(node: Node) -> None:
        puppet = await Puppet.dial(node.address.port)
        assert (await puppet.frame())[1] == PING
        puppet.send(DATA, SYN, 1, 5, b"\x13/mul")
        answer = await puppet.frame()
        assert struct.unpack(">BBHII", answer) == (0, WINDOW, ACK | 8, 1, 0)
        puppet.send(DATA, SYN, 3, 6, b"POST /")
        assert struct.unpack(">BBHII", await puppet.frame()) == (0, WINDOW, ACK | 8, 3, 0)
        puppet.send(GO_AWAY, 0, 0, 0)
        await puppet.until_closed()

    run(body)


def test_one_stalled_stream_does_not_stop_another() -> None:
    async def body(node: Node) -> None:
        dialler = TcpTransport(THEIRS)
        link = await dialler.dial(node.address, OURS.peer_id)
        stalled = await link.open_stream([SINK])
        writing = asyncio.ensure_future(stalled.write(bytes(64 * limits.MIB)))
        inbound = await node.streams.get()
        lively = await link.open_stream([SINK])
        lively_end = await node.streams.get()
        for _ in range(50):
            lively.write_nowait(b"ping")
            assert await lively_end.readexactly(4) == b"ping"
        assert inbound.unread <= limits.STREAM_WINDOW_BYTES and not writing.done()
        assert stalled.buffered == 0, "what write() has not sent yet stays with its caller"
        writing.cancel()
        await dialler.close()

    run(body)


def test_peers_without_early_muxers_agree_in_band(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upgrade, "MUXERS", ())

    async def body(node: Node) -> None:
        dialler = TcpTransport(THEIRS)
        link = await dialler.dial(node.address, OURS.peer_id)
        assert await Pinger(link).ping() > 0
        assert (await node.arrived.get()).peer == THEIRS.peer_id
        await dialler.close()

    run(body)


def test_the_transport_measures_its_round_trip() -> None:
    async def body(node: Node) -> None:
        dialler = TcpTransport(THEIRS)
        link = await dialler.dial(node.address, None)
        pinger = Pinger(link)
        while not link.rtt_s:
            await pinger.ping()
        assert 0 < link.rtt_s < 10
        await dialler.close()

    run(body)


def test_pings_beyond_the_rate_are_answered_later_not_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PING_BURST", 10)
    monkeypatch.setattr(limits, "PING_PER_S", 1_000)

    async def body(node: Node) -> None:
        dialler = TcpTransport(THEIRS)
        pinger = Pinger(await dialler.dial(node.address, None))
        assert all([await pinger.ping() >= 0 for _ in range(40)])
        await dialler.close()

    run(body)
