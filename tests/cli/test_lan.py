"""A local network of namespaces: members find each other without an address, strangers are seen and left alone."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from clawnet import limits
from clawnet.identity.membership import load_mesh_key
from clawnet.node.neighbours import mesh_tag
from tests.cli.harness import Node, connected, join
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


def nearby(node: Node) -> dict[str, dict[str, Any]]:
    return {one["peer_id"]: one for one in node.ask("peer.nearby")["items"]}


def test_members_find_each_other_with_no_address_given(lan: Lan) -> None:
    """All that they know of each other is out of date: both hosts have new addresses, both programs new ports."""
    alice, bob = lan.host("alice").start(), lan.host("bob").start()
    join(alice, bob)
    for number, node in enumerate((alice, bob)):
        assert node("daemon", "stop").code == 0
        lan.hosts[node.name].move(100 + number)
        node.environ |= {"CLAWNET_TCP_PORT": str(5000 + number), "CLAWNET_QUIC_PORT": str(6000 + number)}
    alice.start()
    began = time.monotonic()
    bob.start()
    for node in (alice, bob):
        node.until("finds the other", lambda node=node: connected(node))
        print(f"{node.name} is connected {time.monotonic() - began:.2f} s after bob's start began")
    for node, other in ((alice, bob), (bob, alice)):
        one = node.until("sees where the other is", lambda node=node, other=other: nearby(node).get(other.peer_id))
        assert one["same_mesh"] and one["name"] == other.name and one["state"] == "connected"
        assert all(f"/{lan.hosts[other.name].address}/" in text for text in one["addresses"])
        assert len({text.split("/p2p/")[0] for text in one["addresses"]}) == 2, "over TCP and over QUIC"
    done = alice("market", "submit", "--type", "compute", "--op", "sha256", "abc", "--peer", "bob", "--wait")
    assert done.code == 0, done.err
    finding = next(one for one in alice.ask("doctor")["findings"] if one["check"] == "mdns")
    assert finding["level"] == "ok" and lan.hosts["alice"].address in finding["message"]


def test_another_mesh_is_seen_nearby_and_left_alone(lan: Lan) -> None:
    alice, eve = lan.host("alice").start(), lan.host("eve").start()
    for node, other in ((alice, eve), (eve, alice)):
        one = node.until("hears the other", lambda node=node, other=other: nearby(node).get(other.peer_id))
        assert not one["same_mesh"] and one["name"] is None and one["state"] == "seen"
        assert node.ask("peer.list")["items"] == []
    items = alice("peer", "list", "--nearby", "--json").json("peer list nearby")["items"]
    assert [one["peer_id"] for one in items] == [eve.peer_id]
    ((peer, name, mesh, state, since, addresses),) = alice("peer", "list", "--nearby").rows()
    assert (peer, name, mesh, state) == (eve.peer_id, "", "other", "seen") and since.endswith("Z")
    assert addresses.split() == items[0]["addresses"]
    assert "link.up" not in alice.log + eve.log, "nobody was dialled"


def test_who_leaves_is_noticed(lan: Lan) -> None:
    """With a goodbye at once; killed, when the broken link makes its neighbour ask and nobody answers.

    TCP tells at once that a process is gone; over QUIC its silence does, after two pings.
    """
    tcp = {"CLAWNET_NETWORK_ENABLE_QUIC": "false"}
    alice, bob, carol = (lan.host(name, **tcp).start() for name in ("alice", "bob", "carol"))
    for node in (bob, carol):
        join(alice, node)
        alice.until("sees it", lambda node=node: nearby(alice).get(node.peer_id, {}).get("same_mesh"))
    peers = {node.name: node.peer_id for node in (bob, carol)}
    began = time.monotonic()
    assert bob("daemon", "stop").code == 0
    alice.until("misses bob", lambda: peers["bob"] not in nearby(alice))
    print(f"goodbye noticed {time.monotonic() - began:.2f} s after the stop began")
    began = time.monotonic()
    carol.kill()
    alice.until("misses carol", lambda: peers["carol"] not in nearby(alice))
    print(f"a killed node noticed after {time.monotonic() - began:.2f} s")
    assert {peer["state"] for peer in alice.ask("peer.list")["items"]} == {"known"}
    carol.start()
    alice.until("sees carol again", lambda: connected(alice) == {"carol"} and peers["carol"] in nearby(alice))


def test_it_can_be_switched_off(lan: Lan) -> None:
    alice = lan.host("alice").start()
    quiet = lan.host("quiet", CLAWNET_NETWORK_ENABLE_MDNS="false").start()
    other = lan.host("other").start()
    alice.until("hears the one that speaks", lambda: other.peer_id in nearby(alice))
    assert quiet.peer_id not in nearby(alice) and nearby(quiet) == {}
    finding = next(one for one in quiet.ask("doctor")["findings"] if one["check"] == "mdns")
    assert "network.enable_mdns" in finding["message"] and finding["level"] == "ok"
    assert "mdns.announced" not in quiet.log


def test_a_machine_without_a_network_gets_one(lan: Lan) -> None:
    """No address but loopback at the start: the node runs, says so, and announces itself once there is one."""
    late = lan.host("late")
    alice = lan.host("alice").start()
    host = lan.hosts["late"]
    host.unplug()
    late.start()
    finding = next(one for one in late.ask("doctor")["findings"] if one["check"] == "mdns")
    assert "nothing to announce" in finding["message"] and finding["remedy"]
    host.plug()
    late.until("hears alice", lambda: alice.peer_id in nearby(late))
    alice.until("hears it", lambda: late.peer_id in nearby(alice))


GARBAGE = """
import os, select, socket, sys
from hashlib import sha256
from zeroconf import DNSOutgoing, DNSText
from clawnet.identity.keys import KeyPair
from clawnet.net.dnsaddr import write_txt

own, peer, tag = sys.argv[1], sys.argv[2], bytes.fromhex(sys.argv[3])
out = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
out.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(own))

def say(name, text):
    answer = DNSOutgoing(0x8400)
    answer.add_answer_at_time(DNSText(name + "._p2p._udp.local.", 16, 0x8001, 120, text), 0)
    for packet in answer.packets():
        out.sendto(packet, ("224.0.0.251", 5353))

for number in range(600):
    who = KeyPair.from_seed(sha256(b"%d" % number).digest()).peer_id
    say(f"stranger{number}", write_txt([f"/ip4/10.77.0.99/tcp/{1 + number}/p2p/{who}"], os.urandom(16)))
    say(f"garbage{number}", os.urandom(1 + number))
    out.sendto(os.urandom(1 + number), ("224.0.0.251", 5353))
say("goodbye" * 9, b"")
while True:  # a datagram after such a flood may be lost
    say("liar", write_txt([f"/ip4/{own}/tcp/9/p2p/{peer}"], tag))
    if select.select([sys.stdin], [], [], 0.5)[0]:
        break
"""


def test_strangers_garbage_and_a_copied_announcement_keep_nobody_apart(lan: Lan) -> None:
    """A neighbour floods the network with nodes that are none, with noise, and with bob's own tag under its address."""
    alice, bob = lan.host("alice").start(), lan.host("bob").start()
    join(alice, bob)
    peer = bob.peer_id
    assert bob("daemon", "stop").code == 0
    lan.host("eve")
    tag = mesh_tag(load_mesh_key(alice.home), peer)
    flood = [sys.executable, "-c", GARBAGE, lan.hosts["eve"].address, peer, tag.hex()]
    command = ["ip", "netns", "exec", lan.hosts["eve"].namespace, *flood]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as eve:
        try:
            alice.until("believes the copy", lambda: nearby(alice).get(peer, {}).get("same_mesh"))
        finally:
            eve.communicate(timeout=60)
    assert eve.returncode == 0
    alice.until("hears many", lambda: len(nearby(alice)) > limits.NEIGHBOURS_MAX // 4)
    lan.hosts["bob"].move(170)
    bob.environ |= {"CLAWNET_TCP_PORT": "5002", "CLAWNET_QUIC_PORT": "5001"}
    bob.start()
    for node in (alice, bob):
        node.until("finds the other", lambda node=node: connected(node))
    assert len(nearby(alice)) <= limits.NEIGHBOURS_MAX
    assert {one["name"] for one in nearby(alice).values() if one["same_mesh"]} == {"bob"}
    assert [peer["name"] for peer in alice.ask("peer.list")["items"]] == ["bob"]


HOLD = """
import socket, sys
held = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
held.bind(("", 5353))
print("held", flush=True)
sys.stdin.read()
"""


def test_without_multicast_a_node_runs_and_says_so(lan: Lan) -> None:
    """Another program holds the port of mDNS for itself."""
    alice = lan.host("alice")
    command = ["ip", "netns", "exec", lan.hosts["alice"].namespace, sys.executable, "-c", HOLD]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdin is not None
        assert holder.stdout.readline() == b"held\n"
        alice.start()

        def finding() -> dict[str, str]:
            found = (one for one in alice.ask("doctor")["findings"] if one["check"] == "mdns")
            return next(found)

        alice.until("has noticed", lambda: finding()["level"] == "warn")
        assert finding()["remedy"] and "no mDNS" in finding()["message"]
        assert alice.log.count("mdns.unavailable") == 1
        holder.stdin.close()
    lan.hosts["alice"].move(180)
    alice.until("tries again", lambda: finding()["level"] == "ok" and "announced" in finding()["message"])
