"""What commands print: bare values and rows for pipes, JSON as the node gave it, columns for people."""

from __future__ import annotations

import json
import os
import pty
import subprocess
from typing import Any

import pytest

from tests.cli.conftest import PARTY, TASK_ID, Program, Script, task

pytestmark = pytest.mark.slow

BALANCE = {
    "available": "985.5",
    "locked": "3",
    "incoming": "0",
    "account": "ab" * 32,
    "mesh": "cd" * 32,
    "open_lines": 1,
    "spend": {
        "credential": "uid:1000",
        "per_task": {"limit": "2", "used": None, "left": None, "resets_at": None},
        "per_day": {"limit": "5", "used": "4", "left": "1", "resets_at": "2026-01-02T00:00:00.000Z"},
        "open": {"limit": None, "used": "3", "left": None, "resets_at": None},
    },
    "read_only": None,
}
TERMS = {"price": 0.4, "reputation": 0.15, "latency": 0.1, "confidence": 0.1}
BID = {
    "round": 1,
    "bidder": PARTY,
    "price": "1.1",
    "estimated_s": 1.0,
    "queue_wait_s": 0.0,
    "confidence": 0.5,
    "reputation": 0.5,
    "load": 0.1,
    "energy_cost": 0.0,
    "score": 0.75,
    "terms": TERMS,
    "at": "2026-01-02T03:04:05Z",
    "won": True,
}
WHY = {
    "task_id": TASK_ID,
    "state": "settled",
    "summary": "bob won: the only bid",
    "hint": "",
    "rounds": [
        {
            "round": 1,
            "opened_at": "",
            "closed_at": "",
            "closed_by": "all_answered",
            "ring": "member",
            "asked": 2,
            "declined": {"no_gpu": 1},
            "winner": PARTY,
            "reason": "the only acceptable bid",
            "peers": [{"peer": PARTY, "answer": "bid", "reason": "", "bid": BID}],
        }
    ],
    "attempts": [],
    "transitions": [],
}
SUMMARY = {
    "task_id": TASK_ID,
    "state": "settled",
    "type": "shell",
    "description": "echo a\tb",
    "created_at": "T",
    "ended_at": "T",
    "max_budget": "10",
    "price": "1.5",
    "executor": PARTY,
    "exit_code": 0,
    "error": None,
}
CASES: list[tuple[str, Any, list[str], str]] = [
    ("wallet.balance", BALANCE, ["wallet", "balance"], "985.5\n"),
    (
        "task.list",
        {"items": [SUMMARY], "next": None},
        ["market", "history"],
        f"{TASK_ID}\tsettled\tshell\t1.5\tbob\t0\tT\techo a b\n",
    ),
    ("task.get", task(), ["market", "status", TASK_ID[:8]], "settled\n"),
    (
        "task.bids",
        {"items": [BID], "next": None},
        ["market", "bids", TASK_ID],
        "bob (member)\t1.1\t0.7500\t0.4000\t0.1500\t0.1000\t0.1000\t1\tyes\t0 ms\n",
    ),
    ("task.cancel", {"task_id": TASK_ID, "state": "cancelled"}, ["market", "cancel", TASK_ID], "cancelled\n"),
    (
        "wallet.send",
        {"to": PARTY, "amount": "5", "seq": 7, "hash": "ef"},
        ["wallet", "send", "bob", "5"],
        "12D3KooWBob\t5\t7\n",
    ),
    (
        "peer.ping",
        {"peer": PARTY, "sent": 2, "received": 2, "rtts_s": [0.001, 0.002]},
        ["peer", "ping", "bob"],
        "0.001000\t0.002000\n",
    ),
    ("peer.ban", {"peer": PARTY, "state": "banned", "changed": True}, ["peer", "ban", "bob"], "12D3KooWBob\tbanned\n"),
]


@pytest.mark.parametrize(("method", "answer", "arguments", "plain"), CASES)
def test_bare_values_when_piped_and_the_whole_object_as_json(
    clawnet: Program, node: Script, method: str, answer: Any, arguments: list[str], plain: str
) -> None:
    node.answers[method] = answer
    done = clawnet(*arguments)
    assert (done.returncode, done.stdout, done.stderr) == (0, plain, "")
    done = clawnet(*arguments, "--json")
    assert json.loads(done.stdout) == answer
    assert done.stdout.count("\n") == 1


def test_why_tells_the_terms_of_each_score(clawnet: Program, node: Script) -> None:
    node.answers["task.why"] = WHY
    text = clawnet("market", "why", TASK_ID).stdout
    assert "bob won: the only bid\n" in text
    assert "declined: 1 no_gpu" in text
    assert "score 0.7500 = price 0.4000 + reputation 0.1500 + latency 0.1000 + confidence 0.1000 (won)" in text


def test_an_audit_that_fails_is_80(clawnet: Program, node: Script) -> None:
    account = {
        "account": "ab",
        "peer": PARTY,
        "entries": 3,
        "head": "cd",
        "available": "5",
        "locked": "0",
        "ok": False,
        "problem": "entry 2: signature",
    }
    node.answers["wallet.audit"] = {
        "ok": False,
        "complete": True,
        "accounts": [account],
        "granted": "5",
        "available": "5",
        "locked": "0",
        "unclaimed": "0",
        "forks": [],
    }
    done = clawnet("wallet", "audit")
    assert done.returncode == 80
    assert "entry 2: signature" in done.stdout
    assert "1 of 1 chains are not valid" in done.stderr


def test_people_get_labels_and_columns(clawnet: Program, node: Script) -> None:
    node.answers["wallet.balance"] = BALANCE
    node.answers["task.list"] = {"items": [SUMMARY], "next": None}
    limits = "2 for one task, 1 of 5 left until 2026-01-02T00:00:00.000Z"
    for arguments, part in ((["wallet", "balance"], limits), (["market", "history"], "TASK")):
        leader, follower = pty.openpty()
        process = clawnet.start(*arguments, stdout=follower, stderr=subprocess.DEVNULL)
        process.wait(60)
        os.close(follower)
        assert part in os.read(leader, 65536).decode()
        os.close(leader)


def test_logs_print_what_there_is_and_end(clawnet: Program, node: Script) -> None:
    node.answers["task.get"] = task(state="executing", result=None, final=False)
    node.notes["task.follow"] = [("task.output", {"stream": "stdout", "offset": 0, "attempt": 0, "data": "so far\n"})]
    node.answers["task.follow"] = task(state="executing", result=None, final=False)
    done = clawnet("market", "logs", TASK_ID)
    assert (done.returncode, done.stdout) == (0, "so far\n")
    assert node.params("task.follow")["so_far"] is True
    node.answers["task.follow"] = task(result={"stdout": "so far\nand on\n"})
    assert clawnet("market", "logs", "-f", TASK_ID).stdout == "so far\nand on\n"


def test_a_result_that_is_not_there_yet_is_66(clawnet: Program, node: Script) -> None:
    node.answers["task.get"] = task(state="executing", result=None, final=False)
    assert clawnet("market", "result", TASK_ID).returncode == 66
    node.answers["task.get"] = task()
    done = clawnet("market", "result", TASK_ID)
    assert (done.returncode, done.stdout, done.stderr) == (0, "out\n", "err\n")
