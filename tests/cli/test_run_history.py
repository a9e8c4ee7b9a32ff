"""What is told of tasks that have ended: their cost, their output within retention, their entries on the chain."""

from __future__ import annotations

from decimal import Decimal

import pytest

from tests.cli.harness import Node, Nodes


@pytest.fixture
def pair(nodes: Nodes) -> tuple[Node, Node]:
    alice, bob = nodes.mesh("alice", "bob")
    return alice, bob


def test_show_tells_what_every_run_cost(pair: tuple[Node, Node]) -> None:
    alice, _ = pair
    work = "head -c 300000 /dev/zero; head -c 160000000 /dev/zero | tail -c 150000000 | wc -c >&2"
    told = alice("run", "--ring", "member", "--peer", "bob", "--json", "--", "sh", "-c", work).json("run")
    usage, (attempt,) = told["result"]["usage"], told["attempts"]
    assert usage["bytes_out"] == 300_010 == attempt["usage"]["bytes_out"]
    assert 50 < usage["bytes_in"] < 5_000 and usage["memory_bytes_max"] > 100_000_000
    assert 0 < attempt["usage"]["cpu_s"] < 30 and 0 < attempt["usage"]["duration_s"] < 60
    shown = dict(line.split("\t", 1) for line in alice("market", "show", told["task_id"]).out.splitlines())
    assert shown["bytes_out"] == "300010" and shown["bytes_in"] == str(usage["bytes_in"])
    assert shown["processor"].endswith("s") and shown["peak_memory"].endswith("iB")
    assert "bytes out 300010" in shown["attempt_1"]


def test_show_tells_it_of_a_run_without_a_result_too(pair: tuple[Node, Node]) -> None:
    alice, bob = pair
    assert bob("config", "set", "execution.output_max", "4KiB").code == 0
    done = alice("run", "--ring", "member", "--peer", "bob", "--json", "--", "sh", "-c", "head -c 300000 /dev/zero")
    (attempt,) = done.json("run")["attempts"]
    assert attempt["state"] in ("waived", "refunded") and Decimal(attempt["escrow"]["amount"]) > 0
    assert attempt["usage"]["duration_s"] > 0 and attempt["usage"]["bytes_in"] > 50


def test_the_wallet_tells_the_entries_of_one_task_on_both_sides(pair: tuple[Node, Node]) -> None:
    alice, bob = pair
    work = (
        "market",
        "submit",
        "--type",
        "compute",
        "--op",
        "wordcount",
        "--peer",
        "bob",
        "--wait",
        "--json",
        "one two",
    )
    first, second = (alice(*work).json("run") for _ in range(2))
    task, price = first["task_id"], first["price"]
    rows = alice("wallet", "history", "--task", task).rows()
    assert [(row[2], row[3], row[6]) for row in rows] == [("release", price, task), ("lock", price, task)]
    bob.until("the claim", lambda: bob("wallet", "history", "--task", task[:12]).rows())
    told = bob("wallet", "history", "--task", task, "--json").json("wallet history")["items"]
    assert [(entry["kind"], entry["tasks"][0]["amount"]) for entry in told] == [("claim", price)]
    assert alice("daemon", "restart").code == 0
    named = {row[6] for row in alice("wallet", "history").rows() if row[2] in ("lock", "release")}
    assert named == {task, second["task_id"]}
    lines = [line for line in alice("wallet", "export").out.splitlines() if '"release"' in line]
    assert len(lines) == 2 and task in lines[0] and second["task_id"] in lines[1]
    alice("wallet", "history", "--task", "feedface").failed(66, "no task")
    alice("wallet", "history", "--task", "no").failed(65, "no task id")


def test_lists_are_followed_to_their_end(pair: tuple[Node, Node]) -> None:
    alice, _ = pair
    lines = b"".join(
        b'{"type": "compute", "op": "wordcount", "description": "%d", "ring": "own"}\n' % n for n in range(620)
    )
    done = alice("market", "batch", "--in-flight", "64", "-", stdin=lines, timeout_s=180)
    assert done.code == 0, done.err
    assert len(alice("market", "history", "--limit", "2000").rows()) == 620
    part = alice("market", "history", "--limit", "510", "--json").json("market history")
    assert len(part["items"]) == 510 == len({item["task_id"] for item in part["items"]}) and part["next"]
    assert part["items"] == sorted(part["items"], key=lambda item: item["created_at"], reverse=True)
