"""Held tasks as their user meets them: listed, released, dropped, expired with 77, over a restart, to the credit."""

from __future__ import annotations

from decimal import Decimal

import pytest

from tests.cli.harness import Node, Nodes, read_until, until

ABOVE = "market.approve.above"
WORK = ("--type", "compute", "--op", "wordcount", "--peer", "bob", "one two three")


@pytest.fixture
def pair(nodes: Nodes) -> tuple[Node, Node]:
    alice, bob = nodes.mesh("alice", "bob")
    assert alice("config", "set", ABOVE, "5").code == 0
    return alice, bob


def balance(node: Node) -> tuple[Decimal, Decimal]:
    told = node.ask("wallet.balance")
    return Decimal(told["available"]), Decimal(told["locked"])


def test_held_listed_released_over_a_restart_and_paid_once(pair: tuple[Node, Node]) -> None:
    alice, _ = pair
    before = balance(alice)
    submitted = alice("market", "submit", "--budget", "6", "--deadline", "1h", *WORK)
    task = submitted.line
    for word in ("waits for approval until", "budget of 6 credits", ABOVE, f"market approve {task[:8]}"):
        assert word in submitted.err, submitted.err
    (row,) = alice("market", "list").rows()
    assert row[:2] == [task, "draft"] and ABOVE in row[-1]
    (held,) = alice("market", "approve").rows()
    assert held[:3] == [task, "compute", "6"] and ABOVE in held[4]
    assert alice("market", "approve", "--json").json("market approve held")["items"][0]["held"]["reason"]
    assert "1 task waits for approval" in alice("doctor").out
    assert alice("daemon", "restart").code == 0
    assert alice.task(task)["state"] == "draft" and balance(alice) == before
    alice.until("bob is back", lambda: [p for p in alice.ask("peer.list")["items"] if p["state"] == "connected"])
    assert alice("market", "approve", task[:8]).out == "announced\n"
    done = alice.reaches(task, "settled")
    again = alice("market", "approve", task, "--verbose", "--json")
    assert again.json("market approve")["items"] == [{"task_id": task, "state": "settled", "changed": False}]
    assert "approved before" in again.err
    assert balance(alice) == (before[0] - Decimal(done["price"]), Decimal(0))
    assert alice("market", "approve").out == ""
    assert "approved by uid:" in alice("market", "show", task).out


def test_a_command_that_waits_is_told_and_goes_on_when_somebody_approves(pair: tuple[Node, Node]) -> None:
    alice, _ = pair
    command = ("market", "submit", "--budget", "6", "--wait", *WORK)
    with alice.popen(*command) as waiting:
        said = read_until(waiting.stderr, b"drops it").decode()
        assert "waits for approval" in said
        (held,) = alice("market", "approve").rows()
        assert alice("market", "approve", held[0]).code == 0
        out, _ = waiting.communicate(timeout=60)
    assert waiting.returncode == 0 and b"3" in out


def test_run_waits_too_and_a_cancel_ends_it(pair: tuple[Node, Node]) -> None:
    alice, _ = pair
    with alice.popen("run", "--budget", "6", "--ring", "member", "--", "true") as waiting:
        read_until(waiting.stderr, b"drops it")
        (held,) = alice("market", "approve").rows()
        assert alice("market", "cancel", held[0]).out == "cancelled\n"
        waiting.communicate(timeout=60)
    assert waiting.returncode == 81
    alice("market", "approve", held[0]).failed(65, "held no longer")


def test_nobody_approves_in_time(pair: tuple[Node, Node]) -> None:
    alice, bob = pair
    before = balance(alice)
    alice("market", "submit", "--budget", "6", "--deadline", "1s", "--wait", *WORK).failed(
        77, "not approved in time", ABOVE, "--deadline allows more"
    )
    assert alice("config", "set", "market.approve.timeout", "1s").code == 0
    done = alice("market", "submit", "--budget", "6", "--deadline", "1h", "--wait", "--json", *WORK)
    told = done.json("run")
    assert done.code == 77 and told["state"] == "failed" and told["error"]["exit_code"] == 77
    assert "market.approve.timeout" in told["error"]["hint"]
    assert balance(alice) == before and bob.ask("status")["activity"]["jobs_open"] == 0


def test_a_batch_is_told_of_its_held_lines_and_ends_when_they_do(pair: tuple[Node, Node]) -> None:
    alice, _ = pair
    line = b'{"type": "compute", "op": "wordcount", "description": "a b", "peer": ["bob"], "budget": "%d"}\n'
    file = alice.dir.parent / "lines"
    file.write_bytes(line % 6 + line % 4)
    with alice.popen("market", "batch", str(file)) as batch:
        read_until(batch.stderr, b"drops it")
        until("the other line is done", lambda: alice("market", "history").rows())
        (held,) = alice("market", "approve").rows()
        assert alice("market", "approve", held[0]).code == 0
        out, _ = batch.communicate(timeout=60)
    assert batch.returncode == 0 and out.count(b'"exit_code": 0, "task"') == 2


def test_what_approve_cannot_take(pair: tuple[Node, Node]) -> None:
    alice, _ = pair
    alice("market", "approve", "feedface").failed(66, "no task")
    alice("market", "approve", "not-hex").failed(65, "no task id")
    done = alice("market", "submit", "--budget", "4", "--wait", *WORK)
    assert done.code == 0, done.err
    (task,) = (item["task_id"] for item in alice.ask("task.list", limit=1)["items"])
    alice("market", "approve", task).failed(65, "is not held (it is settled)")
    alice("config", "set", ABOVE, "much").failed(78, ABOVE, "none")
    alice("config", "set", "market.approve.timeout", "0s").failed(78, "market.approve.timeout", "too small")


def test_each_kind_of_task_has_limits_of_its_own(pair: tuple[Node, Node]) -> None:
    alice, _ = pair
    assert alice("config", "set", ABOVE, "none", "market.spend.compute.per_task", "2").code == 0
    alice("market", "submit", "--budget", "3", *WORK).failed(79, "market.spend.compute.per_task", "2 credits", "3 were")
    assert (
        alice("config", "set", "market.spend.compute.per_task", "none", "market.spend.compute.per_day", "1").code == 0
    )
    first = alice("market", "submit", "--budget", "1", "--wait", "--json", *WORK)
    assert first.code == 0, first.err
    price = Decimal(first.json("run")["price"])
    over = alice("market", "submit", "--wait", *WORK)
    over.failed(79, "market.spend.compute.per_day", "1 credits a day")
    assert alice("wallet", "send", "bob", "3").code == 0, "a payment is no task of this kind"
    spend = alice("wallet", "balance", "--json").json("wallet balance")["spend"]
    kinds = {kind["kind"]: kind for kind in spend["kinds"]}
    assert Decimal(kinds["compute"]["per_day"]["used"]) == price and kinds["shell"]["per_day"]["used"] == "0"
    assert Decimal(spend["per_day"]["used"]) == price + 3
    assert alice("daemon", "restart").code == 0
    kinds = {kind["kind"]: kind for kind in alice.ask("wallet.balance")["spend"]["kinds"]}
    assert Decimal(kinds["compute"]["per_day"]["used"]) == price
