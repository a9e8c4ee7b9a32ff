"""Stopping a node that has work: what runs may finish and is paid, the rest goes elsewhere, and nothing is lost."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

import pytest

from tests.cli.harness import PATIENCE_S, Gate, Node, Nodes, alive, connected, join, processes_with, until

pytestmark = pytest.mark.slow


def submit(node: Node, script: str, *options: str) -> str:
    """A shell task for other members; its id."""
    words = ("--type", "shell", "--ring", "member", "--prefer", "market", "--deadline", "30m", *options)
    return node("market", "submit", *words, script).line


def runs_at(node: Node, task: str, *, name: str) -> None:
    """Waits until the task runs at this node."""
    node.until(
        f"runs at {name}", lambda: _executor(node.task(task)) == name and node.task(task)["state"] == "executing"
    )


def _executor(task: dict[str, Any]) -> str:
    return task["executor"]["name"] if task["executor"] else ""


def terminate(node: Node) -> int:
    pid = node.pid
    os.kill(pid, signal.SIGTERM)
    return pid


def gone(node: Node, pid: int) -> None:
    until(f"{node.name} ends", lambda: not alive(pid))
    assert "daemon.stopped" in node.log


def nothing_lost(nodes: list[Node]) -> None:
    """The books of all add up, with nothing bound or owed, once everybody has told everybody."""

    def whole() -> bool:
        audit = nodes[0].ask("wallet.audit")
        return bool(audit["ok"] and audit["complete"] and audit["locked"] == audit["unclaimed"] == "0")

    nodes[0].until("the books add up", whole)


def test_what_runs_finishes_and_is_paid_before_the_node_ends(nodes: Nodes) -> None:
    alice, bob = nodes.mesh("alice", "bob")
    gate = Gate()
    script = gate.script + "echo done; exit 3"
    with alice.popen("run", "--ring", "member", "--prefer", "market", "-n", "--", "sh", "-c", script) as waiting:
        until("it runs", lambda: bob.ask("status")["runs"] == 1)
        pid = terminate(bob)
        bob.until("drains", lambda: bob.ask("status")["draining"])
        gate.open()
        assert waiting.wait(PATIENCE_S) == 3
        assert waiting.stdout is not None
        assert waiting.stdout.read() == b"done\n"
    gone(bob, pid)
    task = alice.ask("task.list", limit=1)["items"][0]
    assert alice.task(task["task_id"])["escrow"]["state"] == "claimed", "it was paid before bob ended"
    bob.start()
    assert float(bob.ask("wallet.balance")["available"]) > 1000
    nothing_lost([alice, bob])


def test_what_does_not_finish_goes_elsewhere_where_it_may(nodes: Nodes) -> None:
    bob = nodes("bob", CLAWNET_DAEMON_DRAIN_TIMEOUT="1s")
    alice, carol = nodes("alice").start(), nodes("carol").start()
    bob.start()
    join(alice, bob)
    task = submit(alice, "sleep 6; echo again", "--retries", "1")
    runs_at(alice, task, name="bob")
    join(alice, carol)
    with alice.popen("market", "wait", task) as waiting:
        pid = terminate(bob)
        gone(bob, pid)
        assert waiting.wait(PATIENCE_S) == 0
    told = alice.task(task)
    assert (told["state"], _executor(told), told["result"]["stdout"]) == ("settled", "carol", "again\n")
    assert [attempt["executor"]["name"] for attempt in told["attempts"]] == ["bob", "carol"]
    assert told["attempts"][0]["escrow"]["state"] == "refunded", "the line came back at once"


def test_without_retries_who_waits_is_told_at_once(nodes: Nodes) -> None:
    alice, bob = nodes("alice").start(), nodes("bob", CLAWNET_DAEMON_DRAIN_TIMEOUT="1s").start()
    join(alice, bob)
    marker = f"drained-{os.urandom(6).hex()}"
    words = ("run", "--ring", "member", "--prefer", "market", "-n", "--", "sh", "-c", f"sleep 600; : {marker}")
    with alice.popen(*words) as waiting:
        until("it runs", lambda: processes_with(marker) and bob.ask("status")["runs"] == 1)
        pid = terminate(bob)
        assert waiting.wait(PATIENCE_S) == 76
        assert waiting.stderr is not None
        assert b"bob" in waiting.stderr.read()
    gone(bob, pid)
    until("nothing of it runs", lambda: not processes_with(f"sleep 600; : {marker}"))
    alice.until("its line is back", lambda: alice.ask("wallet.balance")["locked"] == "0")
    nothing_lost([alice])


def test_what_waits_for_a_slot_goes_elsewhere_even_without_retries(nodes: Nodes) -> None:
    alice, bob = nodes("alice").start(), nodes("bob", CLAWNET_EXECUTION_SLOTS="1").start()
    carol = nodes("carol").start()
    join(alice, bob)
    gate = Gate()
    first = submit(alice, gate.script + "echo first")
    runs_at(alice, first, name="bob")
    second = submit(alice, "echo second")
    alice.until("bob has both", lambda: alice.task(second)["state"] == "executing")
    join(alice, carol)
    alice.until("sees both", lambda: connected(alice) == {"bob", "carol"})
    pid = terminate(bob)
    told = alice.reaches(second, "settled")
    assert (_executor(told), told["result"]["stdout"]) == ("carol", "second\n")
    gate.open()
    told = alice.reaches(first, "settled")
    assert (_executor(told), told["result"]["stdout"]) == ("bob", "first\n")
    gone(bob, pid)


def test_a_second_sigterm_loses_nothing(nodes: Nodes) -> None:
    alice, bob = nodes.mesh("alice", "bob")
    marker = f"twice-{os.urandom(6).hex()}"
    task = submit(alice, f"sleep 600; : {marker}")
    runs_at(alice, task, name="bob")
    until("it runs", lambda: processes_with(marker))
    pid = terminate(bob)
    bob.until("drains", lambda: bob.ask("status")["draining"])
    os.kill(pid, signal.SIGTERM)
    gone(bob, pid)
    until("nothing of it runs", lambda: not processes_with(f"sleep 600; : {marker}"))
    # Back again it says what became of the run: it is not started twice, and its line comes back.
    bob.start()
    told = alice.reaches(task, "failed")
    assert told["error"]["code"] == "executor_lost"
    alice.until("its line is back", lambda: alice.ask("wallet.balance")["locked"] == "0")
    nothing_lost([alice, bob])


def test_a_restart_under_load_loses_nothing(nodes: Nodes) -> None:
    alice, bob = nodes.mesh("alice", "bob")
    spec = {"type": "compute", "op": "primes", "op_args": {"limit": 200_000}, "prefer": "market", "peer": ["bob"]}
    tasks = []
    with alice.client() as client:
        for n in range(24):
            body = {**spec, "deadline_s": 600, "idempotency_key": f"load-{n}"}
            tasks.append(client.call("task.submit", {"spec": body})["task_id"])
            if n in (6, 14):
                with bob.popen("daemon", "restart") as restarting:
                    assert restarting.wait(PATIENCE_S) == 0
    told = [alice.reaches(task, "settled", "failed", "timed_out", "no_bids") for task in tasks]
    assert [task["state"] for task in told] == ["settled"] * len(tasks), json.dumps(told)[:2000]
    nothing_lost([alice, bob])


def test_tasks_of_a_requester_that_stops_go_on_when_it_is_back(nodes: Nodes) -> None:
    alice, bob = nodes.mesh("alice", "bob")
    # The command follows the task once it prints; only then is the node stopped under it.
    words = ("--type", "shell", "--ring", "member", "--prefer", "market", "--deadline", "30m", "--wait", "--stream")
    gate = Gate()
    with alice.popen("market", "submit", "-v", "-n", *words, f"echo begun; {gate.script} echo kept") as waiting:
        assert waiting.stdout is not None
        assert waiting.stdout.readline() == b"begun\n"
        task = alice.ask("task.list", limit=1)["items"][0]["task_id"]
        runs_at(alice, task, name="bob")
        pid = alice.pid
        assert alice("daemon", "stop").code == 0
        gone(alice, pid)
        gate.open()
        bob.until("the run is over", lambda: bob.ask("status")["runs"] == 0)
        assert waiting.poll() is None, "whoever waits goes on waiting"
        assert not alice.pid, "and does not start what was stopped on purpose"
        alice.start()
        out, err = waiting.communicate(timeout=PATIENCE_S)
    assert (waiting.returncode, out) == (0, b"kept\n"), err
    assert b"the daemon was stopped" in err
    told = alice.reaches(task, "settled")
    assert (told["result"]["stdout"], told["escrow"]["state"]) == ("begun\nkept\n", "claimed")
    nothing_lost([alice, bob])
