"""market.send_to between real daemons: for each kind of task who may see it by default, and what --ring changes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ai_server import ai_server
from tests.cli.harness import Node, Nodes, connected, join

KINDS = {
    "shell": ("--type", "shell", "echo done"),
    "compute": ("--type", "compute", "--op", "wordcount", "one two"),
    "prompt": ("--type", "prompt", "hello"),
}


@pytest.fixture
def pair(nodes: Nodes) -> Iterator[tuple[Node, Node]]:
    """Alice, who does nothing herself, and Bob, a member who can do all three."""
    with ai_server("tiny-1") as server:
        alice = nodes("alice", CLAWNET_MARKET_SELF="never").start()
        bob = nodes("bob", CLAWNET_OPENCLAW_API_ENDPOINT=server.url, CLAWNET_OPENCLAW_PROBE_INTERVAL="200ms").start()
        join(alice, bob)
        alice.until("is connected", lambda: connected(alice))
        wanted = {"shell-execution", "compute", "ai-inference"}
        alice.until("sees what bob can do", lambda: wanted <= set(alice.ask("peer.show", peer="bob")["capabilities"]))
        yield alice, bob


def newest(node: Node) -> dict[str, object]:
    (item,) = node.ask("task.list", limit=1)["items"]
    return node.task(item["task_id"])


@pytest.mark.parametrize("kind", list(KINDS))
def test_own_keeps_a_kind_at_home_and_a_ring_named_for_one_task_widens_that_one(
    pair: tuple[Node, Node], kind: str
) -> None:
    alice, _ = pair
    task = ("market", "submit", "--wait", *KINDS[kind])
    if kind != "shell":
        assert alice("config", "set", f"market.send_to.{kind}", "own").code == 0
    alice(*task).failed(75, "no acceptable bid", "--ring member")
    kept = newest(alice)
    assert (kept["bids"], kept["attempts"]) == (0, []), "no member heard of it"
    assert "bob" not in alice("market", "why", str(kept["task_id"])).out
    alice("market", "submit", "--wait", "--prefer", "market", *KINDS[kind]).failed(77, "--ring member", "send_to")
    wider = alice(*task[:3], "--ring", "member", *KINDS[kind], "--json")
    assert wider.code == 0, wider.err
    assert wider.json("run")["executor"]["name"] == "bob"
    alice(*task).failed(75)


@pytest.mark.parametrize("kind", list(KINDS))
def test_member_lets_members_see_a_kind_and_a_ring_named_for_one_task_narrows_that_one(
    pair: tuple[Node, Node], kind: str
) -> None:
    alice, _ = pair
    assert alice("config", "set", f"market.send_to.{kind}", "member").code == 0
    done = alice("market", "submit", "--wait", "--json", *KINDS[kind])
    assert done.code == 0, done.err
    assert done.json("run")["executor"]["name"] == "bob"
    alice("market", "submit", "--wait", "--ring", "own", *KINDS[kind]).failed(75)
    assert newest(alice)["bids"] == 0


def test_the_default_is_own_for_shell_and_member_for_the_rest(pair: tuple[Node, Node]) -> None:
    alice, _ = pair
    shown = {kind: alice("config", "get", f"market.send_to.{kind}").line for kind in KINDS}
    assert shown == {"shell": "own", "compute": "member", "prompt": "member"}
    for kind, code in (("shell", 75), ("compute", 0), ("prompt", 0)):
        assert alice("market", "submit", "--wait", *KINDS[kind]).code == code
    alice("config", "set", "market.send_to.shell", "everybody").failed(78, "own | member")
