"""A hostile member against a real daemon: each offence ends its own link, is counted and logged; nothing else ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from clawnet import limits
from clawnet.errors import LinkError
from clawnet.identity import multiaddr
from clawnet.identity.certificates import certify_node, certify_owner, read_charter
from clawnet.identity.keys import KeyPair, public_of, verify
from clawnet.identity.membership import load_membership
from clawnet.net.control import CONTROL_PROTOCOL
from clawnet.net.port import Connection, Stream
from clawnet.net.quic import QuicTransport
from clawnet.net.switch import PROTOCOLS
from clawnet.net.tcp import TcpTransport
from clawnet.wire.batch import Batch, decode_batch, frame, hashes_of, signed_bytes
from clawnet.wire.codec import encode
from clawnet.wire.messages import Ping
from clawnet.wire.session import Handshake, HelloFacts, Session
from tests.cli.harness import Node, Nodes, connected, free_port, until
from tests.cli.test_market_run import ABROAD

pytestmark = pytest.mark.slow

WAIT_S = 30.0
CARRIERS: dict[str, Any] = {"tcp": TcpTransport, "quic-v1": QuicTransport}


def now_ms() -> int:
    return time.time_ns() // 1_000_000


class Victim:
    """A daemon with a member that is honest, and what is to be seen of it from outside."""

    def __init__(self, node: Node, friend: Node, metrics_port: int) -> None:
        self.node = node
        self.friend = friend
        self.metrics_port = metrics_port
        self.peer_id = node.peer_id
        self.addresses = {multiaddr.parse(one).transport: one for one in node.ask("status")["listen"]}
        self.address = self.addresses["tcp"]
        self.pid = node.pid

    def counters(self) -> dict[str, float]:
        """All figures of the exporter; those with labels added up."""
        found: dict[str, float] = {}
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=WAIT_S) as answer:
            for line in answer.read().decode().splitlines():
                if not line.startswith("#"):
                    name, _, value = line.rpartition(" ")
                    name = name.partition("{")[0].removeprefix("clawnet_")
                    found[name] = found.get(name, 0) + float(value)
        return found

    def identity(self, *, member: bool = True) -> tuple[KeyPair, HelloFacts]:
        """Keys nobody has seen before, and the papers of a member (or of nobody)."""
        key, own = KeyPair.generate(os.urandom), KeyPair.generate(os.urandom)
        local = load_membership(self.node.home)
        _, mesh = read_charter(local.charter)
        issuer = KeyPair.load(self.node.home.owner_key) if member else KeyPair.generate(os.urandom)
        papers = [
            certify_owner(issuer, mesh, own.public, may_invite=False, issued_ms=now_ms(), inviter=self.peer_id),
            certify_node(own, mesh, key.public, issued_ms=now_ms(), inviter=self.peer_id),
        ]
        return key, HelloFacts(mesh, "mallory", papers)

    def told(self, event: str, **fields: str) -> list[dict[str, Any]]:
        """The lines of one event in the security log with these fields; every line there must be an object."""
        lines = [json.loads(line) for line in self.node.security_log.splitlines()]
        assert all({"at", "level", "event"} <= line.keys() for line in lines)
        found = [line for line in lines if line["event"] == event]
        return [line for line in found if all(line.get(name) == value for name, value in fields.items())]

    def serves(self) -> None:
        """Asserts that it is the same process, that its friend is still there, and that it takes and gives work."""
        assert self.node.pid == self.pid
        assert "friend" in connected(self.node)
        assert self.node("run", *ABROAD, "--peer", "friend", "--", "echo", "served").out == "served\n"
        assert self.friend("run", *ABROAD, "--peer", "victim", "--", "echo", "served").out == "served\n"


@pytest.fixture(scope="module")
def victim() -> Iterator[Victim]:
    nodes = Nodes()
    try:
        port = free_port()
        both = "/ip4/127.0.0.1/tcp/0,/ip4/127.0.0.1/udp/0/quic-v1"
        fast = {"CLAWNET_NETWORK_PING_INTERVAL": "1s", "CLAWNET_NODE_LISTEN_ADDRS": both}
        node = nodes("victim", CLAWNET_METRICS_PORT=str(port), **fast)
        node.start()
        friend = nodes("friend").start()
        token = node("peer", "invite").line
        assert friend("peer", "join", "-", stdin=token.encode()).code == 0
        if node.ask("status")["shell"]["member"] != "sandboxed":
            pytest.skip("bubblewrap not installed")
        yield Victim(node, friend, port)
    finally:
        nodes.close()


# --- the other end


class Intruder:
    """A real encrypted connection with a control stream on it, and nothing behind it that keeps any rule."""

    def __init__(self, connection: Connection, stream: Stream, key: KeyPair, handshake: Handshake) -> None:
        self.connection = connection
        self.stream = stream
        self.key = key
        self.handshake = handshake
        self.session: Session

    async def read_frame(self) -> bytes:
        return await self.stream.readexactly(int.from_bytes(await self.stream.readexactly(4), "big"))

    async def greet(self) -> None:
        """An honest beginning: the link is up at the other side."""
        await self.stream.write(self.handshake.frame)
        self.handshake.receive(await self.read_frame(), now_ms())
        assert self.handshake.session is not None
        self.session = self.handshake.session
        await self.stream.write(self.session.seal([(Ping(1, now_ms()), None, None)], now_ms()))
        self.session.open(await self.read_frame(), now_ms())

    def signed(self, envelopes: list[bytes], seq: int, at_ms: int) -> bytes:
        """A batch as a member with no scruples would sign it."""
        text = signed_bytes(self.session.id, seq, at_ms, hashes_of(envelopes))
        return frame(encode(Batch(self.session.id, seq, at_ms, envelopes, self.key.sign(text))))

    async def until_dropped(self) -> str:
        """Reads until the other side has had enough; why, as far as it said."""
        async with asyncio.timeout(WAIT_S):
            with contextlib.suppress(LinkError):
                while await self.stream.read(65536):
                    pass
            return await self.connection.closed

    async def send_until_dropped(self, data: bytes, times: int) -> None:
        """Writes as often as that is possible; the other side must end it."""
        with contextlib.suppress(LinkError):
            for _ in range(times):
                await self.stream.write(data)
        await self.until_dropped()


@contextlib.asynccontextmanager
async def intruder(victim: Victim, *, member: bool = True, kind: str = "tcp") -> AsyncIterator[Intruder]:
    key, facts = victim.identity(member=member)
    transport = CARRIERS[kind](key, PROTOCOLS, "intruder")
    try:
        connection = await transport.dial(multiaddr.parse(victim.addresses[kind]), victim.peer_id, WAIT_S)
        stream = await connection.open_stream([CONTROL_PROTOCOL])
        theirs = public_of(victim.peer_id)
        handshake = Handshake(
            key.peer_id,
            victim.peer_id,
            facts,
            agent="intruder",
            nonce=os.urandom(32),
            now_ms=now_ms(),
            sign=key.sign,
            verify=lambda message, signature: verify(theirs, message, signature),
        )
        yield Intruder(connection, stream, key, handshake)
    finally:
        await transport.close()


async def nonsense_for_hello(them: Intruder) -> None:
    await them.stream.write(frame(os.urandom(500)))
    await them.until_dropped()


async def nonsense_for_a_frame(them: Intruder) -> None:
    await them.greet()
    await them.stream.write(frame(os.urandom(500)))
    await them.until_dropped()


async def a_frame_of_four_gigabytes(them: Intruder) -> None:
    await them.greet()
    await them.stream.write(b"\xff\xff\xff\xff")
    await them.until_dropped()


async def a_hello_of_another(them: Intruder) -> None:
    other = KeyPair.generate(os.urandom)
    them.handshake.frame = them.handshake.frame[:-64] + other.sign(b"x")
    await them.stream.write(them.handshake.frame)
    await them.until_dropped()


async def wrong_signatures(them: Intruder) -> None:
    await them.greet()
    batch = bytearray(them.session.seal([(Ping(2, now_ms()), None, None)], now_ms()))
    batch[-1] ^= 1
    await them.send_until_dropped(bytes(batch), limits.OFFENCES_MAX + 1)


async def a_batch_again_and_again(them: Intruder) -> None:
    await them.greet()
    await them.send_until_dropped(
        them.session.seal([(Ping(2, now_ms()), None, None)], now_ms()), limits.OFFENCES_MAX + 2
    )


async def batches_of_yesterday(them: Intruder) -> None:
    await them.greet()
    honest = them.session.seal([(Ping(2, now_ms()), None, None)], now_ms())
    envelopes = decode_batch(honest[4:]).envelopes
    for seq in range(10, 10 + limits.OFFENCES_MAX):
        with contextlib.suppress(LinkError):
            await them.stream.write(them.signed(envelopes, seq, now_ms() - 86_400_000))
    await them.until_dropped()


async def signed_nonsense(them: Intruder) -> None:
    await them.greet()
    for seq in range(10, 10 + limits.OFFENCES_MAX):
        with contextlib.suppress(LinkError):
            await them.stream.write(them.signed([os.urandom(300)], seq, now_ms()))
    await them.until_dropped()


async def silence(them: Intruder) -> None:
    await them.greet()
    await them.until_dropped()


async def pings_without_end(them: Intruder) -> None:
    await them.greet()
    pings = [(Ping(n, now_ms()), None, None) for n in range(64)]
    async with asyncio.timeout(WAIT_S):
        with contextlib.suppress(LinkError):
            while not them.connection.closed.done():
                await them.stream.write(them.session.seal(pings, now_ms()))
                await asyncio.sleep(0)
        await them.connection.closed


@pytest.mark.parametrize("kind", CARRIERS)
@pytest.mark.parametrize(
    ("offence", "counter", "logged"),
    [
        (nonsense_for_hello, "net_hellos_refused_total", "hello.refused"),
        (a_hello_of_another, "net_hellos_refused_total", "signature.invalid"),
        (nonsense_for_a_frame, "net_wire_refused_total", "wire.garbage"),
        (a_frame_of_four_gigabytes, "net_wire_refused_total", "wire.garbage"),
        (wrong_signatures, "net_batches_forged_total", "signature.invalid"),
        (a_batch_again_and_again, "net_batches_replayed_total", "message.replayed"),
        (batches_of_yesterday, "net_batches_too_old_total", "message.too_old"),
        (signed_nonsense, "net_wire_refused_total", "message.refused"),
        (silence, "net_links_timed_out_total", "no sign of life"),
        (pings_without_end, "net_messages_over_rate_session_total", "rate.exceeded"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_an_offence_ends_the_link_of_its_author_alone(
    victim: Victim, kind: str, offence: Callable[[Intruder], Awaitable[None]], counter: str, logged: str
) -> None:
    before = victim.counters().get(counter, 0)
    seen: list[str] = []

    async def offend() -> None:
        async with intruder(victim, kind=kind) as them:
            seen.append(them.key.peer_id)
            await offence(them)

    asyncio.run(offend())
    until("it is counted", lambda: victim.counters().get(counter, 0) > before)

    def lines() -> list[str]:
        both = (victim.node.log + victim.node.security_log).splitlines()
        return [line for line in both if seen[0] in line and logged in line]

    until("it is logged", lines)
    assert len(lines()) <= 2 * limits.OFFENCES_MAX
    assert victim.node.pid == victim.pid
    assert seen[0] not in {
        peer["peer_id"] for peer in victim.node.ask("peer.list")["items"] if peer["state"] == "connected"
    }
    victim.serves()


def test_whoever_offended_is_kept_away_for_a_while(victim: Victim) -> None:
    async def twice() -> tuple[str, str]:
        async with intruder(victim) as them:
            await nonsense_for_a_frame(them)
            connection = await TcpTransport(them.key, PROTOCOLS, "x").dial(
                multiaddr.parse(victim.address), victim.peer_id, WAIT_S
            )
            stream = await connection.open_stream([CONTROL_PROTOCOL])
            again = Intruder(connection, stream, them.key, them.handshake)
            await stream.write(them.handshake.frame)
            return await again.until_dropped(), them.key.peer_id

    _, peer = asyncio.run(twice())
    until(
        "it is refused", lambda: [1 for line in victim.node.log.splitlines() if peer in line and "banned for" in line]
    )
    victim.serves()


def test_a_stranger_with_forged_papers_is_no_member(victim: Victim) -> None:
    async def knock() -> str:
        async with intruder(victim, member=False) as them:
            await them.stream.write(them.handshake.frame)
            await them.until_dropped()
            return them.key.peer_id

    peer = asyncio.run(knock())
    until(
        "it is logged",
        lambda: [one for one in victim.told("membership.refused", peer=peer) if one["address"] and one["reason"]],
    )
    assert peer not in {one["peer_id"] for one in victim.node.ask("peer.list")["items"]}
    victim.serves()


def test_a_change_of_the_configuration_is_in_the_security_log(victim: Victim) -> None:
    before = len(victim.told("config.changed"))
    assert victim.node("config", "set", "log.level", "debug").code == 0
    victim.node.ask("config.reload")
    changed = until("it is logged", lambda: victim.told("config.changed")[before:])
    assert "log.level" in changed[0]["applied"] and changed[0]["restart"] == ""


def test_sockets_that_speak_no_protocol(victim: Victim) -> None:
    where = multiaddr.parse(victim.address)
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection((where.host, where.port))) for _ in range(20)]
        for first in (
            os.urandom(65536),
            b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
            b"\x13/multistream/1.0.0\n" + os.urandom(4096),
            b"",
        ):
            with socket.create_connection((where.host, where.port), timeout=WAIT_S) as other:
                other.sendall(first)
                with contextlib.suppress(OSError):
                    other.shutdown(socket.SHUT_WR)
                    while other.recv(65536):
                        pass
        victim.serves()
        assert all(one.fileno() >= 0 for one in silent)


def test_a_local_program_that_speaks_nonsense(victim: Victim) -> None:
    for data in (
        os.urandom(4096) + b"\n",
        b"{}\n",
        b"[" * 100_000 + b"\n",
        b'{"jsonrpc":"2.0","id":1,"method":"status"}\n',
    ):
        with socket.socket(socket.AF_UNIX) as other:
            other.settimeout(WAIT_S)
            other.connect(str(victim.node.home.socket))
            other.sendall(data)
            other.shutdown(socket.SHUT_WR)
            with contextlib.suppress(OSError):
                while other.recv(65536):
                    pass
    with socket.socket(socket.AF_UNIX) as other:
        other.settimeout(WAIT_S)
        other.connect(str(victim.node.home.socket))
        with contextlib.suppress(OSError):
            for _ in range(64):
                other.sendall(b"x" * limits.MIB)
            pytest.fail("64 MiB without a line were taken")
    victim.serves()


def test_the_socket_is_the_owners_alone(victim: Victim) -> None:
    socket_file: Path = victim.node.home.socket
    assert socket_file.stat().st_mode & 0o777 == 0o600
    assert socket_file.parent.stat().st_mode & 0o777 == 0o700
    for path in victim.node.dir.rglob("*"):
        if "work" not in path.parts:
            assert path.stat().st_mode & 0o077 == 0 or path.is_socket(), path
