"""The switch on the fake network and on TCP: links, messages, refusals, bad peers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import msgspec
import pytest

from clawnet import limits
from clawnet.config import Config
from clawnet.errors import ConfigError, LinkError
from clawnet.identity.multiaddr import parse
from clawnet.net.control import CONTROL_PROTOCOL
from clawnet.net.settings import SwitchSettings
from clawnet.wire.batch import Frames, frame
from clawnet.wire.codec import decode_struct, encode
from clawnet.wire.envelope import decode_envelope
from clawnet.wire.events import DialEnded, MessageIn, PeerDown, PeerUp
from clawnet.wire.messages import Ack, Disconnect, Error, Hello, Kind, LedgerPull, Output, Ping, Pong, Result
from clawnet.wire.session import Handshake, HelloFacts, Session, SignedHello
from tests.adapters.switch_world import KEYS, MESH, SETTINGS, SwitchNode, SwitchWorld, switch_world

KINDS = ("fake", "tcp", "quic-v1")
PULL = LedgerPull(bytes(32), 1, 2)


def run(kind: str, body: Callable[[SwitchWorld], Awaitable[None]]) -> None:
    async def main() -> None:
        async with switch_world(kind) as world:
            await body(world)

    asyncio.run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_messages_arrive_whole_and_in_order_both_ways(kind: str) -> None:
    async def body(world: SwitchWorld) -> None:
        one, other = await world.pair()
        sent = [LedgerPull(bytes(32), n, n) for n in range(200)]
        assert one.switch.send(other.peer, [(message, b"r" * 16, b"o" * 16) for message in sent])
        big = Result(bytes(16), 0, b"", b"", bytes(500_000), bytes(32), 0, 0, 0.0, 0.0, 0)
        assert other.switch.send(
            one.peer, [(big, None, None), (big, None, None), (big, None, None), (PULL, None, None)]
        )
        await other.until(lambda: len(other.messages(one.peer)) == 200)
        await one.until(lambda: len(one.messages(other.peer)) == 4)
        assert other.messages(one.peer) == sent
        assert one.messages(other.peer) == [big, big, big, PULL]
        first = next(other.all(MessageIn))
        assert (first.reply_to, first.obligation) == (b"r" * 16, b"o" * 16)
        assert len({one.id for one in other.all(MessageIn)}) == 200

    run(kind, body)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_dialled_before_the_start_is_dialled_once_it_listens(kind: str) -> None:
    async def body(world: SwitchWorld) -> None:
        other, third = await world.node(1), await world.node(2)
        one = SwitchNode(KEYS[0], world.carriers(KEYS[0]))
        world.nodes.append(one)
        for known in (other, third):
            one.switch.dial(0, known.peer, known.addresses, keep=True)
        one.switch.hangup(third.peer, "not this one")
        await one.switch.start()
        await one.find(PeerUp, peer=other.peer)
        await other.find(PeerUp, peer=one.peer)
        assert list(one.up) == [other.peer]

    run(kind, body)


@pytest.mark.parametrize("kind", KINDS)
def test_a_link_shows_who_where_and_how_far(kind: str) -> None:
    async def body(world: SwitchWorld) -> None:
        one, other = await world.pair()
        up = await other.find(PeerUp)
        assert (up.peer, up.inbound, up.hello.name) == (one.peer, True, f"node-{one.peer[-4:]}")
        assert next(one.all(PeerUp)).inbound is False
        one.switch.send(other.peer, [(Ping(2**40, 0), None, None)])
        pong = await one.find(MessageIn)
        assert isinstance(pong.message, Pong)
        assert pong.message.nonce == 2**40
        (info,) = one.switch.links()
        assert (info.peer, info.inbound, info.transport) == (other.peer, False, kind)
        assert info.rtt_ms > 0
        assert one.switch.rtt_ms(other.peer) == info.rtt_ms
        assert one.switch.rtt_ms("nobody") == 0
        assert abs(info.skew_ms) < 5_000

    run(kind, body)


@pytest.mark.parametrize("kind", KINDS)
def test_one_message_goes_to_many(kind: str) -> None:
    async def body(world: SwitchWorld) -> None:
        hub = await world.node(0)
        others = [await world.node(n) for n in (1, 2, 3)]
        for call, other in enumerate(others, 1):
            assert await hub.dial(other, call) == ""
        assert hub.switch.send_many([*(other.peer for other in others), "nobody"], PULL) == 3
        for other in others:
            assert (await other.find(MessageIn)).message == PULL

    run(kind, body)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("refuser", ["acceptor", "dialler"])
def test_a_refusal_reaches_the_dialler_with_its_reason(kind: str, refuser: str) -> None:
    async def body(world: SwitchWorld) -> None:
        one, other = await world.node(0), await world.node(1)
        node, victim = (other, one) if refuser == "acceptor" else (one, other)
        node.refuse[victim.peer] = "not of this mesh"
        assert "not of this mesh" in await one.dial(other)
        assert not list(one.all(PeerUp))
        assert not list(other.all(PeerUp))
        assert not one.switch.send(other.peer, [(PULL, None, None)])

    run(kind, body)


@pytest.mark.parametrize("kind", KINDS)
def test_dials_that_cannot_succeed_say_why(kind: str) -> None:
    async def body(world: SwitchWorld) -> None:
        one, other = await world.node(0), await world.node(1)
        third = await world.node(2)
        one.switch.dial(2, third.peer, [other.addresses[0].replace(other.peer, third.peer)])
        assert other.peer in (await one.find(DialEnded, call=2)).reason
        dead = "/ip4/127.0.0.1/" + ("udp/9/quic-v1" if kind == "quic-v1" else "tcp/9")
        one.switch.dial(3, other.peer, [dead, "nonsense"])
        assert dead in (await one.find(DialEnded, call=3)).reason
        one.switch.dial(4, other.peer, [])
        assert "no address" in (await one.find(DialEnded, call=4)).reason
        one.switch.dial(5, one.peer, one.addresses)
        assert "itself" in (await one.find(DialEnded, call=5)).reason
        one.switch.dial(6, "", [other.addresses[0].partition("/p2p/")[0]])
        ended = await one.find(DialEnded, call=6)
        assert (ended.reason, ended.peer) == ("", other.peer)
        one.switch.dial(7, "", third.addresses)
        assert (await one.find(DialEnded, call=7, peer=third.peer)).reason == ""
        one.switch.dial(8, third.peer, [])
        assert (await one.find(DialEnded, call=8)).reason == ""
        assert one.switch.gauges()["dialling"] == 0

    run(kind, body)


def test_the_first_address_that_answers_is_taken() -> None:
    async def body(world: SwitchWorld) -> None:
        one, other = await world.node(0), await world.node(1)
        other.addresses = ["/ip4/127.0.0.1/tcp/9", "/ip4/127.0.0.1/tcp/8", *other.addresses]
        assert await one.dial(other) == ""

    run("fake", body)


@pytest.mark.parametrize("kind", KINDS)
def test_hanging_up_is_told_and_final(kind: str) -> None:
    async def body(world: SwitchWorld) -> None:
        one, other = await world.pair()
        one.switch.dial(0, other.peer, other.addresses, keep=True)
        one.switch.hangup(other.peer, "you were removed")
        assert "you were removed" in (await other.find(PeerDown)).reason
        assert (await one.find(PeerDown)).reason == "you were removed"
        assert one.switch.gauges()["dialling"] == 0
        assert one.switch.links() == one.switch.ups() == []
        assert await one.dial(other, 2) == ""
        assert one.switch.ups() == [list(one.all(PeerUp))[1]]
        one.switch.hangup_all("another mesh")
        await one.until(lambda: not one.up)

    run(kind, body)


def test_a_kept_peer_is_dialled_until_it_answers_and_again_after_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "RECONNECT_MIN_S", 0.001)

    async def body(world: SwitchWorld) -> None:
        one, other = await world.node(0), await world.node(1)
        world.network.cut(one.peer, other.peer)
        one.switch.dial(0, other.peer, other.addresses, keep=True)
        one.switch.dial(7, other.peer, [])
        assert "cannot be reached" in (await one.find(DialEnded, call=7)).reason
        assert "cannot be reached" in (await one.find(DialEnded, call=0)).reason
        world.network.heal()
        await one.find(PeerUp)
        world.network.cut(one.peer, other.peer)
        await one.find(PeerDown)
        world.network.heal()
        await one.until(lambda: len(list(one.all(PeerUp))) == 2)
        assert len(list(one.all(DialEnded, call=0))) == 1, "only the first failure is told"

    run("fake", body)


def test_a_full_node_refuses_and_takes_again_when_there_is_room() -> None:
    async def body(world: SwitchWorld) -> None:
        settings = msgspec.structs.replace(SETTINGS, max_peers=1)
        hub, first, second = await world.node(0, settings), await world.node(1), await world.node(2)
        assert await first.dial(hub) == ""
        assert "1 peers already" in await second.dial(hub)
        first.switch.hangup(hub.peer, "bye")
        await hub.find(PeerDown)
        assert await second.dial(hub, 2) == ""

    run("fake", body)


def test_a_silent_peer_is_found_dead() -> None:
    async def body(world: SwitchWorld) -> None:
        settings = msgspec.structs.replace(SETTINGS, ping_interval_s=0.02)
        one, other = await world.node(0, settings), await world.node(1, settings)
        assert await one.dial(other) == ""
        world.network.hang(other.peer)
        world.network.hang(one.peer)
        assert "no sign of life" in (await one.find(PeerDown)).reason
        await other.find(PeerDown)
        world.network.heal()

    run("fake", body)


def test_a_peer_that_stops_reading_is_dropped_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SEND_QUEUE_BYTES_MAX", 512 * 1024)

    async def body(world: SwitchWorld) -> None:
        one, other = await world.pair()
        world.network.hang(other.peer)
        output = Output(bytes(16), 0, 1, 0, bytes(limits.OUTPUT_CHUNK_BYTES_MAX))
        sent = 0
        while one.switch.send(other.peer, [(output, None, None)]):
            sent += 1
            assert sent < 1_000
        assert "does not read" in next(one.all(PeerDown)).reason
        assert one.switch.counters["links_stalled"] == 1
        assert len(one.events("link.stalled")) == 1
        world.network.heal()

    run("fake", body)


class Rogue:
    """A peer with a real key that speaks the control protocol by hand."""

    def __init__(self, world: SwitchWorld, victim: SwitchNode) -> None:
        self.key = KEYS[7]
        self.victim = victim
        self.transport = world.transport(self.key)
        self.session: Session | None = None
        self.frames = Frames(limits.BATCH_BYTES_MAX)

    async def connect(self) -> None:
        self.connection = await self.transport.dial(parse(self.victim.addresses[0]), self.victim.peer)
        self.stream = await self.connection.open_stream([CONTROL_PROTOCOL])

    async def greet(self, off_ms: int = 0, mesh: bytes = MESH) -> None:
        """Says Hello and the first batch."""
        now_ms = self.victim.switch.clock()
        self.handshake = Handshake(
            self.key.peer_id,
            self.victim.peer,
            HelloFacts(mesh, "rogue", []),
            agent="rogue",
            nonce=bytes(32),
            now_ms=now_ms + off_ms,
            sign=self.key.sign,
            verify=lambda message, signature: True,
        )
        await self.stream.write(self.handshake.frame)
        self.handshake.receive(await self.next_frame(), now_ms)
        self.session = self.handshake.session

    async def welcome(self) -> None:
        await self.greet()
        await self.say(Ping(1, 1))
        await self.victim.find(PeerUp, peer=self.key.peer_id)

    async def say(self, *messages: msgspec.Struct, off_ms: int = 0) -> bytes:
        assert self.session is not None
        sealed = self.session.seal([(one, None, None) for one in messages], self.victim.switch.clock() + off_ms)  # type: ignore[misc]
        await self.stream.write(sealed)
        return sealed

    async def next_frame(self) -> bytes:
        async with asyncio.timeout(10):
            length = int.from_bytes(await self.stream.readexactly(4), "big")
            return await self.stream.readexactly(length)

    async def hears(self, kind: type[msgspec.Struct]) -> msgspec.Struct:
        """The next message of a kind that the victim sends."""
        assert self.session is not None
        while True:
            batch = self.session.open(await self.next_frame(), self.victim.switch.clock())
            for raw in batch.envelopes:
                message = decode_envelope(raw).message()
                if isinstance(message, kind):
                    return message


def with_rogue(body: Callable[[Rogue, SwitchNode], Awaitable[None]], kind: str = "fake") -> None:
    async def main(world: SwitchWorld) -> None:
        victim, bystander = await world.pair()
        rogue = Rogue(world, victim)
        await rogue.connect()
        await body(rogue, victim)
        victim.switch.send(bystander.peer, [(PULL, None, None)])
        await bystander.find(MessageIn, message=PULL)
        rogue.connection.close("the test is over")

    run(kind, main)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "garbage",
    [
        b"\x00" * 4,
        b"\xff" * 40,
        frame(b"\xc1"),
        frame(bytes(200)),
        frame(encode(SignedHello(b"x", bytes(64)))),
        b"GET / ",
    ],
    ids=["empty", "oversized", "no msgpack", "zeros", "unsigned", "http"],
)
def test_garbage_instead_of_a_hello_ends_the_connection(kind: str, garbage: bytes) -> None:
    async def body(rogue: Rogue, victim: SwitchNode) -> None:
        await rogue.stream.write(garbage)
        await rogue.connection.closed
        assert victim.switch.counters["wire_refused"] + victim.switch.counters["hellos_refused"] == 1
        assert any(level == "security" for level, _, _ in victim.log)

    with_rogue(body, kind)


def test_garbage_on_an_open_link_ends_it_with_a_ban() -> None:
    async def body(rogue: Rogue, victim: SwitchNode) -> None:
        await rogue.welcome()
        await rogue.stream.write(b"\xff\xff\xff\xff")
        assert "frame of 4294967295" in (await victim.find(PeerDown, peer=rogue.key.peer_id)).reason
        told = await rogue.hears(Disconnect)
        assert "frame of" in told.reason  # type: ignore[attr-defined]
        again = Rogue.__new__(Rogue)
        again.__dict__.update(rogue.__dict__)
        await again.connect()
        await again.greet()
        assert "banned" in (await again.hears(Disconnect)).reason  # type: ignore[attr-defined]

    with_rogue(body)


def test_forged_replayed_and_old_batches_are_dropped_counted_and_at_last_punished() -> None:
    async def body(rogue: Rogue, victim: SwitchNode) -> None:
        await rogue.welcome()
        counters = victim.switch.counters
        sealed = await rogue.say(PULL)
        await rogue.stream.write(sealed)
        await rogue.say(PULL, off_ms=-limits.MESSAGE_AGE_MS - 1_000)
        forged = bytearray(await rogue.say(Ack(bytes(16))))
        forged[-1] ^= 1
        await rogue.stream.write(bytes(forged))
        await rogue.say(Ack(b"a" * 16))
        await victim.find(MessageIn, message=Ack(b"a" * 16))
        assert victim.messages(rogue.key.peer_id) == [PULL, Ack(bytes(16)), Ack(b"a" * 16)]
        assert (counters["batches_replayed"], counters["batches_too_old"]) == (2, 1)
        assert [fields["peer"] for fields in victim.events("message.replayed")] == 2 * [rogue.key.peer_id]
        for _ in range(limits.OFFENCES_MAX):
            await rogue.stream.write(sealed)
        assert "too many refused" in (await victim.find(PeerDown, peer=rogue.key.peer_id)).reason
        assert victim.switch.bans.left_s(rogue.key.peer_id, asyncio.get_running_loop().time()) > 0

    with_rogue(body)


def test_a_malformed_message_is_refused_and_its_neighbours_are_taken() -> None:
    async def body(rogue: Rogue, victim: SwitchNode) -> None:
        await rogue.welcome()
        assert rogue.session is not None
        items = [(Kind.ACK, b"\x91\x01", None, None), (Kind.LEDGER_PULL, encode(PULL), None, None)]
        await rogue.stream.write(rogue.session.seal_encoded(items, victim.switch.clock()))
        assert (await victim.find(MessageIn, peer=rogue.key.peer_id)).message == PULL
        assert victim.switch.counters["wire_refused"] == 1

    with_rogue(body)


@pytest.mark.parametrize(
    ("off_ms", "mesh", "reason"),
    [(-400_000, MESH, "behind this node's clock"), (400_000, MESH, "ahead of"), (0, bytes(31) + b"x", "another mesh")],
)
def test_a_wrong_clock_or_mesh_is_refused_with_the_reason(off_ms: int, mesh: bytes, reason: str) -> None:
    async def body(rogue: Rogue, victim: SwitchNode) -> None:
        await rogue.greet(off_ms, mesh)
        assert reason in (await rogue.hears(Disconnect)).reason  # type: ignore[attr-defined]
        await rogue.connection.closed
        assert not list(victim.all(PeerUp, peer=rogue.key.peer_id))

    with_rogue(body)


def test_over_the_rate_messages_are_dropped_then_the_peer_is_banned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "RATE_LEDGER_PER_S", 5)
    monkeypatch.setattr(limits, "RATE_SPELL_S", 0.05)
    monkeypatch.setattr(limits, "RATE_DROP_S", 0.01)
    monkeypatch.setattr(limits, "RATE_PAUSE_MIN_S", 0.01)
    monkeypatch.setattr(limits, "RATE_PAUSE_MAX_S", 0.02)

    async def body(rogue: Rogue, victim: SwitchNode) -> None:
        await rogue.welcome()
        peer = rogue.key.peer_id
        await rogue.say(*[PULL] * 60)
        await victim.until(lambda: len(victim.messages(peer)) >= 19)
        told = await rogue.hears(Error)
        assert (told.code, "slow down" in told.text) == (103, True)  # type: ignore[attr-defined]
        with pytest.raises(LinkError):
            while True:
                await rogue.say(*[PULL] * 20)
                await asyncio.sleep(0)
        assert "rate limit" in (await victim.find(PeerDown, peer=peer)).reason
        assert victim.switch.counters["messages_over_rate"] > 20
        assert victim.events("peer.banned")[0]["peer"] == peer

    with_rogue(body)


def test_a_second_control_stream_or_a_blob_stream_of_a_stranger_is_reset() -> None:
    async def body(rogue: Rogue, victim: SwitchNode) -> None:
        blob = await rogue.connection.open_stream(["/clawnet/blob/1.0.0"])
        await blob.closed
        second = await rogue.connection.open_stream([CONTROL_PROTOCOL])
        await second.closed
        await rogue.welcome()
        assert victim.switch.counters["streams_refused"] == 2

    with_rogue(body)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stranger_is_shown_out_in_time(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CONNECTION_IDLE_S", 0.05)

    async def body(rogue: Rogue, victim: SwitchNode) -> None:
        await rogue.connection.closed

    with_rogue(body, kind)


def test_a_half_finished_handshake_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HANDSHAKE_TIMEOUT_S", 0.05)

    async def body(rogue: Rogue, victim: SwitchNode) -> None:
        await rogue.greet()
        assert "handshake" in (await rogue.hears(Disconnect)).reason  # type: ignore[attr-defined]
        await rogue.connection.closed

    with_rogue(body)


def test_a_taken_port_gives_way_only_when_nobody_asked_for_it() -> None:
    async def body(world: SwitchWorld) -> None:
        settings = SwitchSettings(tcp_port=4002, agent="t")
        first, second = await world.node(0, settings), await world.node(1, settings)
        assert any("/tcp/4002/" in address for address in first.addresses)
        assert not any("/tcp/4002/" in address for address in second.addresses)
        assert second.events("listen.port_taken")[0]["port"] == 4002
        with pytest.raises(ConfigError, match="in use"):
            await world.node(2, SwitchSettings(tcp_port=4002, tcp_port_is_set=True, agent="t"))
        world.nodes.pop()

    run("fake", body)


def test_the_signed_hello_names_the_remote() -> None:
    async def body(rogue: Rogue, victim: SwitchNode) -> None:
        raw = await rogue.next_frame()
        hello = decode_struct(Hello, decode_struct(SignedHello, raw).hello)
        assert (hello.peer, hello.remote) == (victim.peer, rogue.key.peer_id)

    with_rogue(body)


def test_the_settings_come_from_the_configuration() -> None:
    changes = {"network.tcp_port": "0", "node.max_peers": "7", "node.listen_addrs": "/ip4/127.0.0.1/tcp/0"}
    settings = SwitchSettings.of(Config.defaults(changes), "clawnet/1")
    assert settings == SwitchSettings(
        ("/ip4/127.0.0.1/tcp/0",), 0, True, True, 4001, False, True, 7, 30.0, 15.0, "clawnet/1"
    )
