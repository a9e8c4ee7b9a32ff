"""An executor is killed: what may start elsewhere does, what may not says so, and nothing is paid twice."""

from __future__ import annotations

from decimal import Decimal

import pytest

from tests.cli.harness import Node, Nodes, join, processes_with

pytestmark = pytest.mark.slow

SLEEP = "71.25"
SCRIPT = "exec sleep 71.$((20 + 5))"
MEMBERS = ("--ring", "member", "--prefer", "market")


def locked(node: Node) -> set[str]:
    """The tasks with an open line of this payer."""
    return {line["task_id"] for line in node.ask("wallet.escrows")["items"] if line["role"] == "payer"}


def test_a_killed_executor_loses_the_task_to_another_and_a_command_that_may_not_start_twice_says_76(
    nodes: Nodes,
) -> None:
    alice = nodes("alice", CLAWNET_MARKET_SELF="never").start()
    bob, carol = nodes("bob").start(), nodes("carol").start()
    join(alice, bob)
    had = [Decimal(node.ask("wallet.balance")["available"]) for node in (alice, bob)]
    with alice.popen("run", *MEMBERS, "--deadline", "10m", "--", "sh", "-c", SCRIPT) as once:
        bob.until("the command runs", lambda: processes_with(SLEEP))
        (command,) = locked(alice)
        primes = alice("market", "submit", "--type", "compute", "--op", "primes", "10000000", *MEMBERS).line
        alice.reaches(primes, "executing")
        bob.kill()
        join(alice, carol)

        # The command: told after the lease, with the name and until when it may still run; its slot stays.
        assert once.wait(90) == 76
        assert once.stderr
        told = once.stderr.read().decode()
        assert "no word from bob" in told and "may still run there until 20" in told, told
        task = alice.task(command)
        assert (task["state"], task["error"]["code"], len(task["attempts"])) == ("executing", "executor_lost", 1)

    # The computation: another has it.
    assert alice("market", "wait", primes).code == 0
    task = alice("market", "show", primes, "--json").json("market show")
    first, second = task["attempts"]
    assert (first["executor"]["name"], first["state"], first["reason"]) == ("bob", "lost", "no word from bob for 30 s")
    assert (second["executor"]["name"], second["state"]) == ("carol", "done")
    assert first["started_at"] < first["ended_at"] <= second["started_at"] < second["ended_at"]
    assert first["escrow"]["state"] == "locked" and task["executor"]["name"] == "carol"
    assert "reassigned" in [move["state"] for move in task["transitions"]]
    shown = dict(alice("market", "show", primes).rows())
    assert "bob" in shown["attempt_1"] and "no word from bob for 30 s" in shown["attempt_1"]
    assert "carol" in shown["attempt_2"] and "done" in shown["attempt_2"]
    why = alice("market", "why", primes, "--json").json("market why")
    assert [one["winner"]["name"] for one in why["rounds"] if one["winner"]] == ["bob", "carol"]
    assert why["attempts"] == task["attempts"]
    assert "attempt 1: bob (member) lost (no word from bob for 30 s)" in alice("market", "why", primes).out
    assert locked(alice) == {primes, command}

    # Bob is back: he hands back both; the command is not started again, and who waits for it is told.
    with alice.popen("market", "wait", command) as waiting:
        bob.start()
        assert waiting.wait(60) == 76
    assert alice.task(command)["state"] == "failed"
    alice.until("both lines are free", lambda: not locked(alice))
    task = alice.task(primes)
    assert [one["escrow"]["state"] for one in task["attempts"]] == ["refunded", "claimed"]
    assert task["attempts"][0]["ended_at"] == first["ended_at"]
    assert len(alice.task(command)["attempts"]) == 1 and not processes_with(SLEEP)
    price = Decimal(task["price"])
    carol.until("paid", lambda: Decimal(carol.ask("wallet.balance")["available"]) == 1000 + price)
    now = [Decimal(node.ask("wallet.balance")["available"]) for node in (alice, bob)]
    # Carol's grant is of alice's purse's making, not of her balance.
    assert now == [had[0] - price, had[1]] and price > 0
    assert alice.ask("wallet.audit")["ok"]
