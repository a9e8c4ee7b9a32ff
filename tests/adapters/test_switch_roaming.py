"""A switch whose network changes, whose peer's machine goes away, or that hears of a peer's new address."""

from __future__ import annotations

import asyncio

import pytest

from clawnet import limits
from clawnet.errors import LinkError
from clawnet.net.dialling import Dialler
from clawnet.net.link import Link as TcpLink
from clawnet.wire.events import PeerDown, PeerUp
from tests.adapters.switch_world import switch_world


def test_after_a_change_a_dead_link_is_found_and_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LINK_PROBE_S", 0.05)

    async def main() -> None:
        async with switch_world() as world:
            one, other = await world.pair()
            one.switch.dial(0, other.peer, other.addresses, keep=True)
            one.switch.network_changed()
            await asyncio.sleep(3 * limits.LINK_PROBE_S)
            assert not list(one.all(PeerDown)), "a link that lives answers and stays"
            world.network.hang(other.peer)
            one.switch.network_changed()
            await one.find(PeerDown, peer=other.peer)
            world.network.heal()
            await one.until(lambda: len(list(one.all(PeerUp))) == 2)

    asyncio.run(main())


def test_a_peer_that_says_goodbye_and_is_gone_leaves_no_link() -> None:
    """What is answered meets a closed socket, whose reset comes back at once.

    A link that fails to end then is connected to nobody: nothing passes, and the next one is refused as a second one.
    """

    async def main() -> None:
        async with switch_world("tcp") as world:
            one, other = await world.pair()
            near, far = one.switch.connection(other.peer), other.switch.connection(one.peer)
            assert isinstance(near, TcpLink) and near._socket is not None
            assert isinstance(far, TcpLink) and far._socket is not None
            far._socket.pause_reading()
            one.switch.hangup(other.peer, "you may go")
            near.abort("its machine is gone")
            while near._socket is not None:
                await asyncio.sleep(0)
            far._socket.resume_reading()
            assert "you may go" in (await other.find(PeerDown)).reason
            assert other.switch.links() == []
            assert await one.dial(other, 2) == ""

    asyncio.run(main())


def test_a_link_in_doubt_twice_is_asked_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """What answers before the change says nothing of after it."""
    monkeypatch.setattr(limits, "LINK_PROBE_S", 0.1)

    async def main() -> None:
        async with switch_world() as world:
            one, other = await world.pair()
            one.switch.network_changed()
            await asyncio.sleep(limits.LINK_PROBE_S / 2)
            world.network.hang(other.peer)
            one.switch.network_changed()
            await one.find(PeerDown, peer=other.peer)
            world.network.heal()

    asyncio.run(main())


def test_a_pause_before_a_dial_ends_when_the_network_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "RECONNECT_MIN_S", 1_000.0)
    monkeypatch.setattr(limits, "RECONNECT_MAX_S", 1_000.0)

    async def main() -> None:
        async with switch_world() as world:
            one, other = await world.node(0), await world.node(1)
            world.network.cut(one.peer, other.peer)
            one.switch.dial(0, other.peer, other.addresses, keep=True)
            await one.until(lambda: any(ended.peer == other.peer for ended in one.told if hasattr(ended, "reason")))
            world.network.heal()
            one.switch.network_changed()
            await one.find(PeerUp, peer=other.peer)

    asyncio.run(main())


class Owner:
    """Records what a dialler tries; no address answers."""

    def __init__(self) -> None:
        self.tried: list[tuple[str, ...]] = []
        self.hang: set[str] = set()
        self.again = asyncio.Event()

    async def open_link(self, connection: None, wanted: str = "") -> None:
        raise AssertionError("nobody answered")

    async def connect(self, peer: str, addresses: tuple[str, ...]) -> None:
        self.tried.append(tuple(addresses))
        self.again.set()
        if addresses[0] in self.hang:
            await asyncio.Event().wait()
        raise LinkError("nobody there")

    def chance(self) -> float:
        return 1.0

    def dial_ended(self, call: int, peer: str, reason: str) -> None:
        pass

    def dialler_idle(self, dialler: Dialler) -> None:
        pass

    async def next(self) -> tuple[str, ...]:
        async with asyncio.timeout(10):
            await self.again.wait()
        self.again.clear()
        return self.tried[-1]


def test_news_of_an_address_begins_a_hanging_attempt_anew_and_not_all_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "DIAL_RESTART_S", 0.2)

    async def main() -> None:
        owner = Owner()
        owner.hang = {"old", "new", "newer", "newest"}
        dialler = Dialler(owner, "peer", "peer")  # type: ignore[arg-type]
        dialler.want(0, ("old",), keep=True)
        assert await owner.next() == ("old",)
        dialler.want(0, ("new",), keep=True)
        assert await owner.next() == ("new", "old")
        dialler.want(0, ("newer",), keep=True)
        dialler.want(0, ("newest",), keep=True)
        assert len(owner.tried) == 2, "an attempt is given its time"
        assert await owner.next() == ("newest", "newer", "new", "old")
        assert len(owner.tried) == 3
        dialler.want(0, ("old",), keep=True)
        await asyncio.sleep(2 * limits.DIAL_RESTART_S)
        assert len(owner.tried) == 3, "that was no news"
        dialler.cancel("over")

    asyncio.run(main())


def test_news_ends_a_long_pause_and_makes_the_next_one_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "RECONNECT_MIN_S", 0.01)
    monkeypatch.setattr(limits, "RECONNECT_MAX_S", 1_000.0)

    async def main() -> None:
        owner = Owner()
        dialler = Dialler(owner, "peer", "peer")  # type: ignore[arg-type]
        dialler._failures = 16
        dialler.want(0, ("old",), keep=True)
        assert await owner.next() == ("old",)
        await asyncio.sleep(0)
        dialler.want(0, ("new",), keep=True)
        assert await owner.next() == ("new", "old")
        assert await owner.next() == ("new", "old"), "soon after"
        dialler.cancel("over")

    asyncio.run(main())
