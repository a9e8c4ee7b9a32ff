"""A mesh over QUIC: real daemons without TCP, and with both where the faster one carries the link."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from tests.cli.harness import Node, Nodes, connected, join
from tests.cli.test_market_run import ABROAD

pytestmark = pytest.mark.slow

QUIC_ADDRESS = "/ip4/127.0.0.1/udp/0/quic-v1"
BOTH = f"/ip4/127.0.0.1/tcp/0,{QUIC_ADDRESS}"


def transport_of(node: Node, name: str) -> str:
    """What carries the link to a peer."""
    return str(next(peer["transport"] for peer in node.ask("peer.list")["items"] if peer["name"] == name))


def test_a_mesh_lives_without_tcp(nodes: Nodes, tmp_path: Path) -> None:
    quic = {"CLAWNET_NODE_LISTEN_ADDRS": QUIC_ADDRESS, "CLAWNET_NETWORK_ENABLE_TCP": "false"}
    alice, bob = nodes("alice", **quic).start(), nodes("bob", **quic).start()
    assert {address.split("/")[3] for address in alice.ask("status")["listen"]} == {"udp"}
    join(alice, bob)
    assert transport_of(alice, "bob") == "quic-v1"
    data = os.urandom(3_000_000)
    (tmp_path / "in.bin").write_bytes(data)
    done = alice("run", *ABROAD, "--input", str(tmp_path / "in.bin"), "--", "sh", "-c", "sha256sum < in.bin; exit 7")
    assert done.code == 7
    assert done.out.split()[0] == hashlib.sha256(data).hexdigest()
    assert float(alice("peer", "ping", "bob").line.split("\t")[0]) > 0
    bob("daemon", "restart")
    alice.until("bob is back", lambda: "bob" in connected(alice))
    assert alice("run", *ABROAD, "--", "echo", "again").line == "again"


def test_where_both_are_up_one_carries_the_link_and_the_doctor_knows_both_ports(nodes: Nodes) -> None:
    both = {"CLAWNET_NODE_LISTEN_ADDRS": BOTH}
    alice, bob = nodes("alice", **both).start(), nodes("bob", **both).start()
    assert {address.split("/")[3] for address in alice.ask("status")["listen"]} == {"tcp", "udp"}
    join(alice, bob)
    assert transport_of(alice, "bob") in ("tcp", "quic-v1")
    assert alice("run", *ABROAD, "--", "echo", "hello").line == "hello"
    alice("daemon", "stop")
    found = alice("doctor", "--json", CLAWNET_TCP_PORT="0", CLAWNET_QUIC_PORT="0").json("doctor")["findings"]
    assert {"any free TCP port", "any free UDP port"} <= {one["message"] for one in found if one["check"] == "ports"}
