"""Two nodes that dial each other at once, over and over, on a network that fails: both end on one and the same link."""

from __future__ import annotations

import asyncio
import random

import pytest

from clawnet import limits
from clawnet.errors import LinkError
from clawnet.identity.multiaddr import Multiaddr
from clawnet.net import fake, switch
from clawnet.net.port import Connection
from clawnet.wire.events import DialEnded, MessageIn, PeerDown, PeerUp
from clawnet.wire.messages import Ack
from tests.adapters.switch_world import SwitchNode, SwitchWorld, switch_world


def agreed(one: SwitchNode, other: SwitchNode) -> bool:
    """Whether both have the other up, over the same session."""
    return other.peer in one.up and one.peer in other.up and one.session(other.peer) == other.session(one.peer)


async def settle(one: SwitchNode, other: SwitchNode) -> None:
    """Waits until both agree, looking at whatever either of them is told."""
    async with asyncio.timeout(20):
        while not agreed(one, other):
            await asyncio.wait(
                [asyncio.ensure_future(node._changed.wait()) for node in (one, other)],
                return_when=asyncio.FIRST_COMPLETED,
                timeout=0.05,
            )
            one._changed.clear()
            other._changed.clear()


async def talk(one: SwitchNode, other: SwitchNode, number: int) -> None:
    """A message each way over the link."""
    for here, there in ((one, other), (other, one)):
        message = Ack(number.to_bytes(8, "big") * 2)
        assert here.switch.send(there.peer, [(message, None, None)])
        await there.find(MessageIn, peer=here.peer, message=message)


@pytest.mark.parametrize("kind", ["fake", "tcp"])
def test_a_simultaneous_open_ends_in_one_link(kind: str) -> None:
    async def main() -> None:
        async with switch_world(kind) as world:
            one, other = await world.node(0), await world.node(1)
            one.switch.dial(1, other.peer, other.addresses)
            other.switch.dial(1, one.peer, one.addresses)
            assert (await one.find(DialEnded, call=1)).reason == ""
            assert (await other.find(DialEnded, call=1)).reason == ""
            await settle(one, other)
            await talk(one, other, 1)
            for node in (one, other):
                assert len(list(node.all(PeerUp))) == 1
                assert not list(node.all(PeerDown))
                await node.until(lambda node=node: node.switch.gauges()["connections"] == 1)

    asyncio.run(main())


def delay_everything(monkeypatch: pytest.MonkeyPatch, chance: random.Random) -> None:
    """Makes every step of the fake network take a random number of turns of the loop, in order per connection."""
    dial, open_stream = fake.FakeTransport.dial, fake.FakeConnection.open_stream

    async def slow_dial(self: fake.FakeTransport, address: Multiaddr, peer: str | None, timeout_s: float) -> Connection:
        for _ in range(chance.randrange(12)):
            await asyncio.sleep(0)
        return await dial(self, address, peer, timeout_s)

    async def slow_open(self: fake.FakeConnection, protocols: list[str], timeout_s: float = 10.0) -> fake.FakeStream:
        for _ in range(chance.randrange(12)):
            await asyncio.sleep(0)
        return await open_stream(self, protocols, timeout_s)

    def slow_after(self: fake.FakeConnection, deliver: object) -> None:
        loop = asyncio.get_running_loop()
        line = self.__dict__.setdefault("line", [])
        line.append(deliver)

        def turn(left: int) -> None:
            if left:
                loop.call_soon(turn, left - 1)
            else:
                self._deliver(line.pop(0))

        turn(chance.randrange(8))

    monkeypatch.setattr(fake.FakeTransport, "dial", slow_dial)
    monkeypatch.setattr(fake.FakeConnection, "open_stream", slow_open)
    monkeypatch.setattr(fake.FakeConnection, "after", slow_after)


@pytest.mark.parametrize("seed", range(1, 41))
def test_whatever_the_order_both_sides_agree_and_stay_agreed(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "RECONNECT_MIN_S", 0.001)
    monkeypatch.setattr(limits, "RECONNECT_MAX_S", 0.004)
    monkeypatch.setattr(limits, "LINK_PROBE_S", 0.05)
    chance = random.Random(seed)
    delay_everything(monkeypatch, chance)

    async def main() -> None:
        async with switch_world() as world:
            one, other = await world.node(0, seed=seed), await world.node(1, seed=seed)
            for node, peer in ((one, other), (other, one)):
                node.switch.dial(0, peer.peer, peer.addresses, keep=True)
            for round_number in range(5):
                await _disturb(world, one, other, chance)
                world.network.heal()
                await settle(one, other)
                await talk(one, other, round_number)
            ups = (len(list(one.all(PeerUp))), len(list(other.all(PeerUp))))
            for _ in range(200):
                await asyncio.sleep(0)
            assert agreed(one, other), f"seed {seed}"
            assert ups == (len(list(one.all(PeerUp))), len(list(other.all(PeerUp)))), f"seed {seed}: the link flaps"

    asyncio.run(main())


async def _disturb(world: SwitchWorld, one: SwitchNode, other: SwitchNode, chance: random.Random) -> None:
    for _ in range(chance.randrange(40)):
        await asyncio.sleep(0)
    fault = chance.randrange(4)
    if fault == 0:
        world.network.cut(one.peer, other.peer)
    elif fault == 1:
        for connection in chance.sample(world.network.connections, min(2, len(world.network.connections))):
            connection.close("a fault")
    elif fault == 2:
        for node, peer in ((one, other), (other, one)):
            node.switch.dial(9, peer.peer, peer.addresses)
    for _ in range(chance.randrange(40)):
        await asyncio.sleep(0)


def test_a_peer_that_lost_its_end_gets_in_again_although_the_decider_has_not_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "LINK_PROBE_S", 0.02)

    async def main() -> None:
        async with switch_world() as world:
            decider, other = await world.pair()
            (half_open,) = (c for c in world.network.connections if c.own_peer == other.peer)
            monkeypatch.setattr(half_open, "after", lambda deliver: None)
            half_open.close("lost without a word")
            await other.find(PeerDown)
            assert decider.switch.links()
            assert await other.dial(decider, 5) == ""
            await settle(decider, other)
            await talk(decider, other, 1)
            assert len(list(decider.all(PeerDown))) == 1

    asyncio.run(main())


@pytest.mark.parametrize("late_ms", [0, 60_000])
def test_the_decider_takes_a_much_later_connection_at_once_and_refuses_an_early_one(late_ms: int) -> None:
    async def main() -> None:
        async with switch_world() as world:
            decider, other = await world.pair()
            first = decider.session(other.peer)
            other.clock_off_ms = late_ms
            connection = await other.switch.connect(decider.peer, decider.addresses)
            links = other.switch._links
            kept = links.pop(other_peer := decider.peer)
            link = await other.switch.open_link(connection)
            links[other_peer] = kept
            if late_ms:
                await link.settled
                await settle(decider, other)
                assert decider.session(other.peer) != first
                assert len(list(decider.all(PeerUp))) == 2
            else:
                with pytest.raises(LinkError, match=switch.DUPLICATE):
                    await link.settled
                assert decider.session(other.peer) == other.session(decider.peer) == first
            await talk(decider, other, 1)

    asyncio.run(main())
