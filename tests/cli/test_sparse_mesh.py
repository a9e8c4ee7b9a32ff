"""A node that may have few connections: five real daemons, and tasks for those it is not connected to."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cli.harness import Node, Nodes, connected, join
from tests.cli.test_market_run import ABROAD

pytestmark = pytest.mark.slow
NAMES = ("bob", "carol", "dave", "erin")


def test_a_task_reaches_who_is_not_connected(nodes: Nodes) -> None:
    alice = nodes("alice").start()
    for name in NAMES:
        join(alice, nodes(name).start())
    alice.until("all are connected", lambda: connected(alice) == set(NAMES))
    for words in (("config", "set", "node.max_peers", "2"), ("config", "set", "node.min_peers", "1")):
        assert alice(*words).code == 0
    assert alice("daemon", "restart").code == 0
    told = alice.until("as many are connected as may be", lambda: two_connected(alice))
    near = {name for name, peer in told.items() if peer["state"] == "connected"}
    far = sorted(set(NAMES) - near)[0]
    assert (
        told[far]["state"] == "known"
        and told[far]["transport"] is None
        and "shell-execution" in told[far]["capabilities"]
    )
    assert {told[name]["came_by"] for name in near} <= {"inbound", "dialled"}
    assert told[far]["invited_by"]["name"] == "alice" and told[far]["known_since"]
    # Right after the restart it may have been found full or gone, and is left alone for some seconds then.
    hello = ("run", *ABROAD, "--peer", far, "--", "echo", "hello")
    alice.until(f"{far} is reached", lambda: alice(*hello).out == "hello\n")
    assert far in connected(alice)
    excluded = [word for name in sorted(near) for word in ("--exclude", name)]
    again = ("run", "--json", *ABROAD, *excluded, "--", "echo", "again")
    found = alice.until("another is reached", lambda: next((one for one in [alice(*again)] if one.code == 0), None))
    done = found.json("run")
    assert done["executor"]["name"] not in near and done["result"]["stdout"] == "again\n"


def two_connected(node: Node) -> dict[str, Any] | None:
    """The peers by name, once two are connected."""
    told = {peer["name"]: peer for peer in node("peer", "list", "--json").json("peer list")["items"]}
    return told if sum(peer["state"] == "connected" for peer in told.values()) == 2 else None
