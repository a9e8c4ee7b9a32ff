"""Acceptance contracts between real daemons with real money: what passes is paid, what fails comes back."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import wasmtime

from tests.adapters.test_verify import READER
from tests.cli.harness import Node, Nodes, checked, connected, join, processes_with

pytestmark = pytest.mark.slow

NAP = f"1000.{os.getpid()}"
"""Seconds that no other process sleeps."""
ABROAD = ("--ring", "member", "--prefer", "market", "--peer")
TRUSTING = (sys.executable, "-P", "-c", "import runpy, sys; sys.path.insert(0, sys.argv.pop(1)); "
            "sys.argv[0] = 'clawnet'; runpy.run_module('tests.cli.trusting_node', run_name='__main__')",
            str(Path(__file__).parents[2]))  # fmt: skip


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Node, Node]]:
    """Alice, and Bob, who works for her."""
    nodes = Nodes()
    try:
        alice, bob = nodes.mesh("alice", "bob")
        if bob.ask("status")["shell"]["member"] != "sandboxed":
            pytest.skip("bubblewrap not installed")
        alice("config", "set", "execution.verifier_wall_max", "3s")
        bob("config", "set", "execution.verifier_wall_max", "3s")
        yield alice, bob
    finally:
        nodes.close()


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A schema, broken ones, and a verifier module."""
    (tmp_path / "wanted.json").write_text('{"type": "object",\n "required": ["a"]}\n')
    (tmp_path / "none.json").write_text('{"type": "objct"}')
    (tmp_path / "torn.json").write_text('{"type": "object",\n "required": ["a",]}\n')
    (tmp_path / "y.wasm").write_bytes(bytes(wasmtime.wat2wasm(READER)))
    return tmp_path


def money(*nodes: Node) -> list[Decimal]:
    return [Decimal(node.ask("wallet.balance")["available"]) for node in nodes]


def run(alice: Node, peer: str, *words: str, cwd: Path | None = None) -> tuple[int, dict[str, Any]]:
    done = alice("run", "--json", *ABROAD, peer, *words, cwd=cwd)
    return done.code, checked(done.json("run"))


def test_what_passes_is_paid(pair: tuple[Node, Node], files: Path) -> None:
    alice, bob = pair
    before = money(alice, bob)
    text = '{"a": 1}\n'
    conditions = [
        *("--accept", "exit:0", "--accept", "sha256:" + hashlib.sha256(text.encode()).hexdigest()),
        *("--accept", "schema:wanted.json", "--accept", "test:test $(cat) = '{\"a\":' || grep -q a dist/x"),
    ]
    script = "mkdir dist; echo a > dist/x; echo '{\"a\": 1}'"
    output = ("--output", "dist/*", "--output-dir", str(files / "out"))
    code, task = run(alice, "bob", *conditions, *output, "--", "sh", "-c", script, cwd=files)
    assert (code, task["state"], task["error"], task["escrow"]["state"]) == (0, "settled", None, "claimed")
    assert [(one["kind"], one["outcome"], one["judged_by"]) for one in task["acceptance"]] == [
        (kind, "passed", "requester") for kind in ("exit", "sha256", "schema", "test")
    ]
    price = Decimal(task["price"])
    assert price > 0
    bob.until("is paid", lambda: money(alice, bob) == [before[0] - price, before[1] + price])
    assert not alice.ask("wallet.escrows")["items"]
    shown = alice("market", "show", task["task_id"]).rows()
    assert [row[1] for row in shown if row[0] == "accept"][:1] == ["exit:0  passed"]


@pytest.mark.parametrize(
    ("condition", "script", "why"),
    [
        ("exit:0", "exit 3", "exit code 3; 0 is wanted"),
        ("exit:3", "kill -TERM $$", "ended by signal 15; 3 is wanted"),
        ("sha256:" + "0" * 64, "echo hi", hashlib.sha256(b"hi\n").hexdigest()),
        ("schema:wanted.json", "echo '{\"b\": 1}'", "at $: 'a'"),
        ("schema:wanted.json", "echo hi", "it is no JSON"),
        ("test:echo told >&2; exit 4", "echo hi", 'exit code 4; it said: "told"'),
        ("test:kill -SEGV $$", "echo hi", "its verifier crashed (signal 11)"),
        ("test:sleep NAP", "echo hi", "its verifier did not end"),
        ("wasm:y.wasm", "echo no", 'exit code 1; it said: "no good"'),
        ("wasm:y.wasm", "echo trap", "its verifier trapped"),
        ("wasm:y.wasm", "echo loop", "came to no verdict"),
    ],
)
def test_what_fails_is_refunded_at_once_to_the_last_micro_credit(
    pair: tuple[Node, Node], files: Path, condition: str, script: str, why: str
) -> None:
    alice, bob = pair
    before = money(alice, bob)
    condition = condition.replace("NAP", NAP)
    code, task = run(alice, "bob", "--accept", condition, "--", "sh", "-c", script, cwd=files)
    assert (code, task["state"], task["error"]["code"]) == (80, "failed", "verification_failed")
    assert why in task["error"]["message"], task["error"]["message"]
    assert money(alice, bob) == before and not alice.ask("wallet.escrows")["items"]
    (one,) = task["attempts"]
    assert (one["state"], one["escrow"]["state"]) == ("waived", "refunded") and why in one["reason"]
    assert task["acceptance"][0]["judged_by"] == "executor"
    assert why in alice("market", "why", task["task_id"]).line
    assert processes_with(f"sleep\0{NAP}") == []
    reputation = alice("peer", "reputation", "bob", "--json").json("peer reputation")["items"][0]
    assert "task_fault" in " ".join(reputation["notes"]) and "bad_result" not in " ".join(reputation["notes"])


def test_what_is_wrong_with_a_contract_is_told_before_anything_is_sent(pair: tuple[Node, Node], files: Path) -> None:
    alice, _ = pair
    count = len(alice.ask("task.list", limit=10_000)["items"])
    for condition, code, words in (
        ("schema:torn.json", 65, ("torn.json, line 2",)),
        ("schema:none.json", 65, ("none.json", "$.type")),
        ("schema:nobody.json", 66, ("nobody.json",)),
        ("schema:.", 65, ("cannot read",)),
        ("wasm:none.json", 65, ("none.json",)),
        ("wasm:nobody", 66, ("nobody",)),
        ("exit:256", 65, ("0 to 255",)),
        ("sha256:12", 65, ("64 hexadecimal",)),
        ("test:", 65, ("no condition",)),
        ("colour:red", 65, ("no condition", "exit:0")),
    ):
        alice("run", "--accept", condition, "--", "true", cwd=files).failed(code, *words)
    (files / "ref.json").write_text('{"$ref": "http://127.0.0.1:1/other.json"}')
    alice("run", "--accept", "schema:ref.json", "--", "true", cwd=files).failed(65, "which is not in it")
    (files / "task.yaml").write_text("type: shell\nargv: ['true']\naccept: [colour:red]\n")
    alice("run", "--spec", "task.yaml", cwd=files).failed(65, "task.yaml: accept")
    assert len(alice.ask("task.list", limit=10_000)["items"]) == count


def test_a_spec_and_the_lines_of_a_batch_have_contracts(pair: tuple[Node, Node], files: Path) -> None:
    alice, _ = pair
    spec = {"type": "compute", "op": "sort", "stdin": '{"a": 1}\n', "accept": ["exit:0", "schema:wanted.json"]}
    (files / "task.json").write_text(json.dumps({**spec, "peer": ["bob"], "ring": "member", "prefer": "market"}))
    done = alice("market", "submit", "--wait", "--json", "--spec", "task.json", cwd=files)
    task = checked(done.json())
    assert (done.code, [one["outcome"] for one in task["acceptance"]]) == (0, ["passed", "passed"])
    lines = [{"type": "compute", "op": "sort", "stdin": text} for text in ('{"a": 2}\n', '{"b": 2}\n')]
    (files / "lines").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ("--accept", "schema:wanted.json", "--retries", "0", *ABROAD, "bob", "-k")
    ended = [json.loads(line) for line in alice("market", "batch", *words, "lines", cwd=files).out.splitlines()]
    assert {line["line"]: line["exit_code"] for line in ended} == {1: 0, 2: 80}


def test_a_cancel_leaves_no_verifier(pair: tuple[Node, Node]) -> None:
    alice, bob = pair
    before = money(alice, bob)
    mark = f"77{os.getpid()}.5"
    words = ("--type", "shell", *ABROAD, "bob", "--accept", f"test:sleep {mark}; true", "true")
    bob("config", "set", "execution.verifier_wall_max", "1h")
    try:
        task = alice("market", "submit", *words).line
        bob.until("judges", lambda: processes_with(mark))
        assert alice("market", "cancel", task).code == 0
        bob.until("has ended it", lambda: not processes_with(mark))
        alice.until("has its money", lambda: money(alice, bob) == before)
    finally:
        bob("config", "set", "execution.verifier_wall_max", "3s")


def test_a_requester_killed_while_it_judges_judges_again(pair: tuple[Node, Node]) -> None:
    alice, bob = pair
    before = money(alice, bob)
    words = ("--type", "shell", *ABROAD, "bob", "--accept", "test:sleep 1; grep -q hi", "echo hi")
    task = alice("market", "submit", *words).line
    alice.reaches(task, "delivered")
    alice.kill()
    alice.start()
    told = alice.reaches(task, "settled")
    assert (told["error"], told["acceptance"][0]["outcome"], told["result"]["stdout"]) == (None, "passed", "hi\n")
    assert sum(money(alice, bob)) == sum(before)


@pytest.fixture(scope="module")
def trusting() -> Iterator[tuple[Node, Node]]:
    """Alice, and Mallory, who delivers whatever came of a run."""
    nodes = Nodes()
    try:
        alice, mallory = nodes("alice").start(), nodes("mallory")
        honest, mallory.program = mallory.program, TRUSTING
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        with mallory.popen("daemon", "run", **quiet) as daemon:
            mallory.program = honest
            mallory.until("runs", lambda: mallory.pid)
            join(alice, mallory)
            if mallory.ask("status")["shell"]["member"] != "sandboxed":
                pytest.skip("bubblewrap not installed")
            alice.until("sees mallory", lambda: connected(alice))
            yield alice, mallory
            daemon.terminate()
            daemon.wait(60)
    finally:
        nodes.close()


@pytest.mark.parametrize(
    ("condition", "script", "why"),
    [
        ("exit:0", "echo out; exit 3", "exit code 3"),
        ("sha256:" + "0" * 64, "echo out", "is wanted"),
        ("schema:wanted.json", "echo out", "no JSON"),
        ("test:grep yes", "echo out", "exit code 1"),
        ("wasm:y.wasm", "echo out", "exit code 1"),
    ],
)
def test_who_delivers_what_fails_is_paid_and_found_out(
    trusting: tuple[Node, Node], files: Path, condition: str, script: str, why: str
) -> None:
    alice, mallory = trusting
    before = money(alice, mallory)
    code, task = run(alice, "mallory", "--accept", condition, "--", "sh", "-c", script, cwd=files)
    assert (code, task["state"], task["error"]["code"]) == (80, "settled", "verification_failed")
    assert why in task["error"]["message"] and task["escrow"]["state"] == "claimed"
    assert (task["acceptance"][0]["outcome"], task["acceptance"][0]["judged_by"]) == ("failed", "requester")
    assert task["result"]["stdout"] == "out\n"
    price = Decimal(task["price"])
    mallory.until("is paid", lambda: money(alice, mallory) == [before[0] - price, before[1] + price])
    reputation = alice("peer", "reputation", "mallory", "--json").json("peer reputation")["items"][0]
    assert reputation["factors"]["accuracy"] < 0.5
    alice("market", "result", task["task_id"]).failed(80, why)
