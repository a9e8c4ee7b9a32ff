"""What is told of tasks that have ended: their cost, their output within retention, their entries on the chain."""

from __future__ import annotations

import base64
import json
import time
from decimal import Decimal

import pytest

from clawnet import limits
from clawnet.storage.blobs import BlobStore
from clawnet.storage.retention import sweep
from clawnet.storage.store import Store
from tests.cli.harness import Node, Nodes


@pytest.fixture
def pair(nodes: Nodes) -> tuple[Node, Node]:
    alice, bob = nodes.mesh("alice", "bob")
    return alice, bob


def test_show_tells_what_every_run_cost(pair: tuple[Node, Node]) -> None:
    alice, bob = pair
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
    bob.until("the claim", lambda: bob("market", "history", "--role", "executor").rows())
    (job,) = bob("market", "history", "--role", "executor", "--json").json("market history executor")["items"]
    assert job["task_id"] == told["task_id"] and job["requester"]["name"] == "alice"
    assert job["earned"] == told["price"] and job["usage"] == attempt["usage"]
    (row,) = bob("market", "history", "--role", "executor").rows()
    assert row[:3] == [told["task_id"], "done", "shell"] and "300010" in row
    bob("market", "history", "--role", "miner").failed(64, "requester or executor")


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


WRITES = "head -c $0 /dev/zero | tr '\\0' '\\377'; head -c $1 /dev/zero | tr '\\0' '\\376' >&2"


def test_logs_of_ended_tasks_are_exact_until_they_are_forgotten(nodes: Nodes) -> None:
    (alice,) = nodes.mesh("alice")
    kept = {}
    for sizes in ((500, 20), (90_000, 30_000), (2_500_000, 1_200_000)):
        done = alice.raw("run", "--json", "--", "sh", "-c", WRITES, *map(str, sizes))
        task = json.loads(done[1])["task_id"]
        kept[task] = (b"\xff" * sizes[0], b"\xfe" * sizes[1])
    for task, (out, err) in kept.items():
        assert alice.raw("market", "logs", task) == (0, out, err)
        assert alice.raw("market", "result", task)[:2] == (0, out)
    assert alice("daemon", "restart").code == 0
    small, middle, large = kept
    for task, (out, err) in kept.items():
        assert alice.raw("market", "logs", task) == (0, out, err)
    lines = [json.loads(line) for line in alice("market", "logs", "--json", large).out.splitlines()]
    for stream, want in zip(("stdout", "stderr"), kept[large], strict=True):
        assert b"".join(base64.b64decode(x["data_b64"]) for x in lines if x.get("stream") == stream) == want
    assert alice("daemon", "stop").code == 0
    time_passes(alice, limits.RESULT_RETENTION_MS + 60_000)
    assert alice.raw("market", "logs", small) == (0, *kept[small])
    for task in (middle, large):
        alice("market", "logs", task).failed(66, "forgotten", "7 days", f"market show {task[:8]}")
        alice("market", "result", task).failed(66, "forgotten")
        assert alice("market", "show", task, "--json").json("market show")["result"]["stdout"] is None
    assert alice("daemon", "stop").code == 0
    time_passes(alice, limits.TASK_RETENTION_MS + 60_000)
    alice("market", "logs", small).failed(66, "no task", "30 days")


def time_passes(node: Node, passed_ms: int) -> None:
    """What the daemon's sweep does once so much time has gone by, on a node that is down."""
    then_ms = int(time.time() * 1000) + passed_ms
    store = Store.open(node.home.database)
    sweep(store, then_ms, frozenset())
    held = {row[2] for row in store.load_all("blob_grants")}
    store.close()
    blobs = BlobStore(node.home.blobs_dir)
    for blob in held:
        blobs.grant(b"k" * 16, "peer", blob)
    blobs.sweep(then_ms)
