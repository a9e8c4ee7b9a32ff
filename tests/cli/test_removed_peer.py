"""A member without scruples that is removed: it keeps its keys, its papers, its open connections, and obeys nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from clawnet.errors import ClawnetError, LinkError
from clawnet.identity import invite as tokens
from clawnet.identity import multiaddr
from clawnet.identity.certificates import certify_node, read_charter
from clawnet.identity.keybox import unlock
from clawnet.identity.keys import KeyPair, public_of, verify
from clawnet.identity.membership import load_mesh_key
from clawnet.identity.revocations import MeshKey, Revocation, read_statement
from clawnet.mesh.roster import join_bytes
from clawnet.net.blobs import BLOB_PROTOCOL
from clawnet.net.control import CONTROL_PROTOCOL
from clawnet.net.joining import JOIN_PROTOCOL, read_frame
from clawnet.net.port import Connection
from clawnet.net.switch import PROTOCOLS
from clawnet.net.tcp import TcpTransport
from clawnet.wire.batch import decode_batch, frame
from clawnet.wire.codec import decode_payload, decode_struct, encode
from clawnet.wire.envelope import decode_envelope
from clawnet.wire.messages import Disconnect, JoinAnswer, JoinAsk, LedgerPull, Membership, Message, Ping
from clawnet.wire.session import Handshake, HelloFacts
from tests.cli.harness import Node, Nodes, connected, join, until

pytestmark = pytest.mark.slow

WAIT_S = 30.0


def now_ms() -> int:
    return time.time_ns() // 1_000_000


class Outlaw:
    """A member by a true invite, with a program of its own: it reads and writes the protocol and keeps no rule."""

    def __init__(self) -> None:
        self.key, self.owner = KeyPair.generate(os.urandom), KeyPair.generate(os.urandom)
        self.facts: HelloFacts
        self.answer: JoinAnswer
        self.mesh_key = b""

    async def redeem(self, token: str) -> JoinAnswer:
        """What the inviter answers to this key."""
        found = tokens.decode(token)
        at_ms = now_ms()
        body = join_bytes(found.mesh, found.secret, self.key.public, self.owner.public, "outlaw", at_ms)
        proofs = self.key.sign(body), self.owner.sign(body)
        ask = JoinAsk(found.mesh, found.secret, self.key.public, self.owner.public, "outlaw", at_ms, *proofs)
        async with self.dialled(found.addresses[0], found.inviter) as connection:
            stream = await connection.open_stream([JOIN_PROTOCOL])
            await stream.write(frame(encode(ask)))
            stream.close_write()
            return decode_struct(JoinAnswer, await read_frame(stream, 65_536), 65_536)

    async def join(self, token: str) -> None:
        """Becomes a member."""
        self.answer = await self.redeem(token)
        assert not self.answer.refusal, self.answer.refusal
        self.charter, mesh = read_charter(self.answer.charter)
        papers = [
            *self.answer.certificates,
            certify_node(self.owner, mesh, self.key.public, issued_ms=now_ms(), inviter=self.answer.inviter),
        ]
        self.facts = HelloFacts(mesh, "outlaw", papers)
        self.mesh_key = self.answer.mesh_key

    @contextlib.asynccontextmanager
    async def dialled(self, address: str, peer: str) -> AsyncIterator[Connection]:
        transport = TcpTransport(self.key, PROTOCOLS, "outlaw")
        try:
            yield await transport.dial(multiaddr.parse(address), peer, WAIT_S)
        finally:
            await transport.close()

    @contextlib.asynccontextmanager
    async def line(self, address: str, peer: str) -> AsyncIterator[Line]:
        """A control stream on which it has shown its papers; what comes of that is seen by reading."""
        async with self.dialled(address, peer) as connection:
            theirs = public_of(peer)
            handshake = Handshake(
                self.key.peer_id,
                peer,
                self.facts,
                agent="outlaw",
                nonce=os.urandom(32),
                now_ms=now_ms(),
                sign=self.key.sign,
                verify=lambda message, signature: verify(theirs, message, signature),
            )
            yield Line(connection, await connection.open_stream([CONTROL_PROTOCOL]), handshake)


class Line:
    """One control stream: everything heard on it is kept."""

    def __init__(self, connection: Connection, stream: Any, handshake: Handshake) -> None:
        self.connection = connection
        self.stream = stream
        self.handshake = handshake
        self.heard: list[Message] = []

    async def greet(self) -> None:
        await self.stream.write(self.handshake.frame)
        length = int.from_bytes(await self.stream.readexactly(4), "big")
        self.handshake.receive(await self.stream.readexactly(length), now_ms())
        assert self.handshake.session is not None
        await self.say(Ping(1, now_ms()))

    async def say(self, *messages: Message) -> None:
        assert self.handshake.session is not None
        await self.stream.write(self.handshake.session.seal([(one, None, None) for one in messages], now_ms()))

    async def listen(self) -> None:
        """Reads until the other side closes."""
        with contextlib.suppress(LinkError):
            while True:
                length = int.from_bytes(await self.stream.readexactly(4), "big")
                for raw in decode_batch(await self.stream.readexactly(length)).envelopes:
                    envelope = decode_envelope(raw)
                    self.heard.append(decode_payload(envelope.kind, envelope.payload))
        await self.connection.closed

    def told(self) -> str:
        """Why the other side closed."""
        return " ".join(one.reason for one in self.heard if isinstance(one, Disconnect))

    def statements(self) -> list[bytes]:
        return [raw for one in self.heard if isinstance(one, Membership) for raw in one.statements]


@pytest.fixture
def pair(nodes: Nodes) -> Iterator[tuple[Node, Node]]:
    alice, bob = nodes("alice").start(), nodes("bob").start()
    join(alice, bob)
    yield alice, bob


def test_a_removed_member_can_send_nothing_learn_nothing_new_and_decrypt_nothing_written_after(
    pair: tuple[Node, Node],
) -> None:
    asyncio.run(asyncio.wait_for(_outlawed(*pair), 120))


async def _outlawed(alice: Node, bob: Node) -> None:
    outlaw = Outlaw()
    token = alice("peer", "invite", "--uses", "3").line
    await outlaw.join(token)
    assert outlaw.mesh_key == load_mesh_key(alice.home), "a member holds the key"
    places = [(node.ask("status")["listen"][0], node.peer_id) for node in (alice, bob)]
    async with outlaw.line(*places[0]) as one, outlaw.line(*places[1]) as other:
        for line in (one, other):
            await line.greet()
        ears = [asyncio.create_task(line.listen()) for line in (one, other)]
        await asyncio.to_thread(until, "it is a member like others", lambda: "outlaw" in connected(alice))
        await asyncio.to_thread(until, "bob too", lambda: "outlaw" in connected(bob))
        removed = await asyncio.to_thread(alice, "peer", "remove", "outlaw", "--json")
        assert removed.json("peer remove")["removed"] == "owner"
        await asyncio.gather(*ears)
        for line in (one, other):
            assert "removed" in line.told(), line.heard
            with pytest.raises(LinkError):
                for _ in range(100):
                    await line.say(LedgerPull(public_of(alice.peer_id), 0, 2**62))
        told = [statement for line in (one, other) for statement in line.statements()]
    bodies = [read_statement(raw, outlaw.charter, outlaw.facts.mesh) for raw in told]
    assert {type(body) for body in bodies} <= {Revocation, MeshKey}
    await asyncio.to_thread(until, "bob has the new key", lambda: load_mesh_key(bob.home) != outlaw.mesh_key)
    newest = load_mesh_key(alice.home)
    assert load_mesh_key(bob.home) == newest != outlaw.mesh_key
    await _knocks_in_vain(outlaw, places)
    await _decrypts_nothing(outlaw, alice, newest)
    refused = await outlaw.redeem(token)
    assert refused.refusal, "its invite"
    fresh = (await asyncio.to_thread(alice, "peer", "invite")).line
    assert "membership of this key is over" in (await outlaw.redeem(fresh)).refusal
    for node in (alice, bob):
        assert "outlaw" not in connected(node)
        assert node("run", "--ring", "member", "--", "true").code in (0, 75), "the others go on"


async def _knocks_in_vain(outlaw: Outlaw, places: list[tuple[str, str]]) -> None:
    """Every way back in: the papers again, a new machine of the same owner, a data stream without a link."""
    second = KeyPair.generate(os.urandom)
    machine = certify_node(outlaw.owner, outlaw.facts.mesh, second.public, issued_ms=now_ms(), inviter="")
    for place in places:
        for key, papers in (
            (outlaw.key, outlaw.facts.certificates),
            (second, [*outlaw.facts.certificates[:-1], machine]),
        ):
            again = Outlaw()
            again.key, again.facts = key, HelloFacts(outlaw.facts.mesh, "outlaw", list(papers))
            async with again.line(*place) as line:
                with contextlib.suppress(ClawnetError):
                    await line.greet()
                    await line.say(LedgerPull(public_of(places[0][1]), 0, 2**62))
                await line.listen()
                assert {type(one) for one in line.heard} == {Disconnect}, "no word to it but the refusal"
                assert "removed" in line.told()
    async with outlaw.dialled(*places[0]) as connection:
        with pytest.raises(LinkError):
            stream = await connection.open_stream([BLOB_PROTOCOL])
            await stream.write(frame(b"x" * 64))
            assert await stream.read(65_536) == b"", "no blob without a link"
            raise LinkError("it ended without an answer")


async def _decrypts_nothing(outlaw: Outlaw, alice: Node, newest: bytes) -> None:
    """Though it had every statement of the founder, from whomever: none of them opens with what it has."""
    import sqlite3

    with contextlib.closing(sqlite3.connect(f"{alice.home.database.as_uri()}?mode=ro", uri=True)) as database:
        rows = [bytes(row[0]) for row in database.execute("SELECT body FROM statements")]
    bodies = [read_statement(raw, outlaw.charter, outlaw.facts.mesh) for raw in rows]
    keys = [body for body in bodies if isinstance(body, MeshKey)]
    assert keys
    for body in keys:
        assert unlock(body.previous, outlaw.mesh_key) is None
        assert unlock(body.previous, newest) is not None
        assert [outlaw.key.unseal(share.sealed) for share in body.shares] == [None] * len(body.shares)
