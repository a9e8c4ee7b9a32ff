"""Spend limits as their user meets them: config, the refusal with 79, what is left, and a restart in between."""

from __future__ import annotations

import os

import pytest

from tests.cli.harness import Node, Nodes

PER_DAY = "market.spend.per_day"
PER_TASK = "market.spend.per_task"


@pytest.fixture
def pair(nodes: Nodes) -> tuple[Node, Node]:
    first, second = nodes.mesh("alice", "bob")
    return first, second


ABROAD = ("--type", "compute", "--op", "wordcount", "--peer", "bob", "--wait", "one two three")


def test_the_day_is_spent_refused_raised_and_kept_over_a_restart(pair: tuple[Node, Node]) -> None:
    alice, _ = pair
    assert alice("config", "set", PER_DAY, "5", PER_TASK, "4").code == 0
    assert alice("wallet", "send", "bob", "4").code == 0
    spend = alice("wallet", "balance", "--json").json("wallet balance")["spend"]
    assert spend["credential"] == f"uid:{os.geteuid()}"
    assert spend["per_task"]["limit"] == "4" and spend["open"]["limit"] is None
    assert (spend["per_day"]["limit"], spend["per_day"]["used"], spend["per_day"]["left"]) == ("5", "4", "1")
    alice("wallet", "send", "bob", "1.5").failed(79, PER_DAY, "4 are used", "1.5 were asked", "config set")
    alice("market", "submit", "--budget", "4.5", *ABROAD).failed(79, PER_TASK, "4 credits", "4.5 were asked")
    alice("market", "submit", "--budget", "2", *ABROAD).failed(79, PER_DAY)
    assert alice("daemon", "restart").code == 0
    alice("wallet", "send", "bob", "1.5").failed(79, PER_DAY)
    assert alice("config", "set", PER_DAY, "none").code == 0
    alice.until("bob is back", lambda: [p for p in alice.ask("peer.list")["items"] if p["state"] == "connected"])
    done = alice("market", "submit", *ABROAD)
    assert done.code == 0, done.err
    spend = alice.ask("wallet.balance")["spend"]
    assert spend["per_day"]["limit"] is None and float(spend["per_day"]["used"]) > 4


def test_nothing_may_be_spent_and_own_work_goes_on(pair: tuple[Node, Node]) -> None:
    alice, _ = pair
    assert alice("config", "set", PER_DAY, "0").code == 0
    alice("market", "submit", *ABROAD).failed(79, PER_DAY, "0 credits")
    task = alice.ask("task.list", limit=1)["items"][0]
    assert PER_DAY in alice("market", "why", task["task_id"]).out
    assert alice("run", "--", "echo", "free").out == "free\n"
    alice("config", "set", PER_DAY, "plenty").failed(78, PER_DAY, "none")
