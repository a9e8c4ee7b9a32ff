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
