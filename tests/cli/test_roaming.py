"""Roaming, on a network of namespaces: whatever moves, sleeps or falls out, the mesh heals and nothing restarts.

What is printed is how long it took; that it happens at all within the harness's patience is what is asserted.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import pytest

from tests.cli.harness import Node, connected, join, until
from tests.cli.netns import Lan, namespaces, possible

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(possible()), reason=possible())]


@pytest.fixture
def lan() -> Iterator[Lan]:
    built = Lan()
    try:
        yield built
    finally:
        built.close()
    assert not namespaces()


@pytest.mark.parametrize("transport", ["tcp", "quic-v1"])
def test_an_address_changes_under_a_link(lan: Lan, transport: str) -> None:
    """A TCP link breaks and is made anew; a QUIC link goes on when its dialler moved (RFC 9000, section 9)."""
    off = {"tcp": "CLAWNET_NETWORK_ENABLE_QUIC", "quic-v1": "CLAWNET_NETWORK_ENABLE_TCP"}[transport]
    alice, bob = (lan.host(name, **{off: "false"}).start() for name in ("alice", "bob"))
    join(alice, bob)
    alice.until("is connected", lambda: connected(alice))
    for mover, other, number in ((bob, alice, 150), (alice, bob, 151)):
        (before,) = other.ask("peer.list")["items"]
        lan.hosts[mover.name].move(number)
        healed(alice, bob, f"{transport}: {mover.name} moved", began=time.monotonic())
        (after,) = other.ask("peer.list")["items"]
        if transport == "quic-v1" and before["inbound"]:
            assert after["connected_at"] == before["connected_at"], "the same link"
        place = lan.hosts[mover.name].address
        other.until("knows the new address", lambda other=other, place=place: place in addresses(other)[0])
    assert {peer["transport"] for node in (alice, bob) for peer in node.ask("peer.list")["items"]} == {transport}


def test_two_that_both_moved_meet_again_through_a_third(lan: Lan) -> None:
    """Without mDNS and with no address of each other left: their cards come by the one that stayed."""
    alone = {"CLAWNET_NETWORK_ENABLE_MDNS": "false"}
    alice, bob, carol = (lan.host(name, **alone).start() for name in ("alice", "bob", "carol"))
    for node in (bob, carol):
        join(alice, node)
    for node in (alice, bob, carol):
        node.until("sees all", lambda node=node: len(connected(node)) == 2)
    for node in (alice, bob):
        lan.hosts[node.name].unplug()
    for node, other in ((alice, bob), (bob, alice), (carol, alice), (carol, bob)):
        gone = f"{node.name} gives {other.name} up"
        until(gone, lambda node=node, other=other: other.name not in connected(node), 90.0)
    for number, node in enumerate((alice, bob)):
        lan.hosts[node.name].move(160 + number)
    began = time.monotonic()
    for node in (alice, bob):
        lan.hosts[node.name].plug()
    healed(alice, bob, "both moved", began=began)


def addresses(node: Node) -> list[str]:
    """Where a node's one peer says that it listens, the newest first."""
    (peer,) = node.ask("peer.list")["items"]
    found: list[str] = peer["addresses"]
    return found


@pytest.mark.timeout(600)
def test_the_mesh_heals_after_whatever_moves(lan: Lan) -> None:
    """An address changes, a cable is out, a cable is out further on, a machine sleeps, a program takes other ports."""
    names = ("alice", "bob", "carol", "dave", "erin", "fred")
    alice, bob, carol, dave, erin, fred = nodes = [lan.host(name).start() for name in names]
    for node in nodes[1:]:
        join(alice, node)
    for node in nodes:
        node.until("sees all", lambda node=node: len(connected(node)) == len(nodes) - 1)
    pids = {node.name: node.pid for node in nodes if node is not fred}
    lan.hosts["carol"].unplug()
    lan.hosts["dave"].block()
    os.kill(erin.pid, signal.SIGSTOP)
    lan.hosts["bob"].move(200)
    healed(alice, bob, "an address changed", began=time.monotonic())
    assert fred("daemon", "stop").code == 0
    fred.environ |= {"CLAWNET_TCP_PORT": "7002", "CLAWNET_QUIC_PORT": "7001"}
    began = time.monotonic()
    fred.start()
    healed(alice, fred, "other ports after a restart", began=began)
    # Everybody has given the three up before they come back.
    for name in ("carol", "dave", "erin"):
        until(f"alice gives {name} up", lambda name=name: name not in connected(alice), 90.0)
    began = time.monotonic()
    lan.hosts["carol"].plug()
    lan.hosts["dave"].plug()
    os.kill(pids["erin"], signal.SIGCONT)
    for node, what in ((carol, "the own cable was out"), (dave, "a cable further on was out"), (erin, "it slept")):
        healed(alice, node, what, began=began)
    for node in nodes:
        node.until("sees all", lambda node=node: len(connected(node)) == len(nodes) - 1)
    print(f"all links among {len(nodes)} are back after {time.monotonic() - began:.1f} s")
    assert pids == {node.name: node.pid for node in nodes if node is not fred}, "nothing restarted"


def healed(alice: Node, other: Node, what: str, *, began: float) -> None:
    """Both ends hear each other again, and a task runs there."""
    for node, peer in ((alice, other), (other, alice)):
        node.until(f"hears {peer.name}", lambda node=node, peer=peer: pings(node, peer))
    print(f"{what}: healed after {time.monotonic() - began:.1f} s")
    done = alice("market", "submit", "--type", "compute", "--op", "sha256", "abc", "--peer", other.name, "--wait")
    assert done.code == 0, done.err


def pings(node: Node, peer: Node) -> bool:
    """Whether an answer comes over the link, old or new."""
    if peer.name not in connected(node):
        return False
    answer = node("peer", "ping", peer.name, "--count", "1", "--json")
    return answer.code == 0 and bool(answer.json()["received"])
