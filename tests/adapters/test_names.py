"""Peers dialled by name: what is looked up, how often, and what a name server that does not answer costs."""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import Any

import pytest

from clawnet import limits
from clawnet.errors import LinkError
from clawnet.identity.multiaddr import Multiaddr, parse
from clawnet.net.names import Names
from clawnet.net.ratelimit import Arrivals
from clawnet.wire.events import DialEnded, PeerUp
from tests.adapters.switch_world import SwitchNode, switch_world

Row = tuple[int, int, int, str, tuple[Any, ...]]


def row(host: str) -> Row:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return (family, socket.SOCK_STREAM, 6, "", (host, 0, 0, 0)[: 4 if ":" in host else 2])


class NameServer:
    """What the names of a test stand for; a name in `silent` is not answered before `answer` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **names: list[str]) -> None:
        self.names = {name.replace("_", "."): hosts for name, hosts in names.items()}
        self.silent: set[str] = set()
        self.asked: list[str] = []
        self.answer = threading.Event()
        self._real = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", self._look)

    def _look(self, host: Any, *more: Any, **named: Any) -> list[Any]:
        if not str(host).endswith(".test"):
            return self._real(host, *more, **named)
        self.asked.append(host)
        if host in self.silent:
            assert self.answer.wait(60)
        if host not in self.names:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [row(one) for one in self.names[host]]


def by_name(node: SwitchNode, name: str, family: str = "dns") -> list[str]:
    """A node's addresses with a name in place of the host."""
    return [str(parse(address)._replace(host=name, family=family)) for address in node.addresses]


async def dialled(node: SwitchNode, call: int, addresses: list[str]) -> str:
    node.switch.dial(call, "", addresses)
    ended: DialEnded = await node.find(DialEnded, call=call)
    return ended.reason


@pytest.mark.parametrize("kind", ["tcp", "quic-v1"])
@pytest.mark.parametrize("family", ["dns", "dns4"])
def test_a_name_is_looked_up(kind: str, family: str) -> None:
    async def main() -> None:
        async with switch_world(kind) as world:
            one, other = await world.node(0), await world.node(1)
            assert await dialled(one, 1, by_name(other, "localhost", family)) == ""
            assert (await one.find(PeerUp)).address == str(parse(other.addresses[0]).with_peer(None))

    asyncio.run(main())


def test_of_the_addresses_of_a_name_the_one_that_answers_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    NameServer(monkeypatch, two_test=["127.0.0.9", "127.0.0.1", "127.0.0.1"])

    async def main() -> None:
        async with switch_world("tcp") as world:
            one, other = await world.node(0), await world.node(1)
            assert await dialled(one, 1, by_name(other, "two.test")) == ""

    asyncio.run(main())


def test_a_name_nobody_has_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    NameServer(monkeypatch)

    async def main() -> None:
        async with switch_world("tcp") as world:
            one, other = await world.node(0), await world.node(1)
            reason = await dialled(one, 1, by_name(other, "nobody.test"))
            assert "nobody.test" in reason and "Name or service not known" in reason

    asyncio.run(main())


def test_many_names_of_one_address_are_one_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a card full of names could have this node dial whom it likes as often as it likes."""
    names = NameServer(monkeypatch, **{f"n{n}_victim_test": ["127.0.0.1"] for n in range(3)})

    async def main() -> None:
        async with switch_world("tcp") as world:
            one, other = await world.node(0), await world.node(1)
            one.switch._visits._dials = Arrivals(2)
            with socket.socket() as victim:
                victim.bind(("127.0.0.1", 0))
                port = victim.getsockname()[1]
                reasons = [
                    await dialled(one, n + 1, [f"/dns4/n{n}.victim.test/tcp/{port}/p2p/{other.peer}"]) for n in range(3)
                ]
            assert ["cannot connect" in reason for reason in reasons] == [True, True, False]
            assert reasons[2] == "127.0.0.1 was dialled 600 times within a minute"
            assert len(names.asked) == 3

    asyncio.run(main())


def test_a_name_server_that_does_not_answer_stops_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "NAME_LOOKUPS_MAX", 2)
    server = NameServer(monkeypatch, good_test=["127.0.0.1", "::1"])
    server.silent = {"one.test", "two.test", "three.test"}

    async def fails(names: Names, host: str) -> None:
        with pytest.raises(LinkError, match=rf"{host}.*not looked up within 0.05 s"):
            await names.addresses(Multiaddr(host, 7, "tcp", None, "dns"), 0.05)

    async def main() -> None:
        names = Names()
        await asyncio.gather(*(fails(names, host) for host in sorted(server.silent)))
        assert len(server.asked) == 2, "no more than may be asked at once"
        await fails(names, "good.test")
        server.answer.set()
        found = await names.addresses(Multiaddr("good.test", 7, "tcp", None, "dns"), 30)
        assert [str(where) for where in found] == ["/ip4/127.0.0.1/tcp/7", "/ip6/::1/tcp/7"]

    try:
        asyncio.run(main())
    finally:
        server.answer.set()


def test_the_program_ends_before_the_name_server_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    server = NameServer(monkeypatch, late_test=["127.0.0.1"])
    server.silent = {"late.test"}

    async def main() -> None:
        with pytest.raises(LinkError, match="not looked up"):
            await Names().addresses(Multiaddr("late.test", 7, "tcp", None, "dns"), 0.05)

    asyncio.run(main())
    waiting = [thread for thread in threading.enumerate() if thread.name == "lookup"]
    assert len(waiting) == 1 and waiting[0].daemon, "the end of the process does not wait for it"
    server.answer.set()
    waiting[0].join(30)
    assert not waiting[0].is_alive()
