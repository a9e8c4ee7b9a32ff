"""WebAssembly through real nodes: `run --wasm` and `market submit`, the same output on every machine, bad modules."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import wasmtime

from tests.cli.harness import Node, checked

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples" / "wasm"
WORDFREQ = str(EXAMPLES / "wordfreq.wasm")
COLUMN = str(EXAMPLES / "column.wasm")
FILES = str(Path(__file__).parents[1] / "adapters" / "wasm" / "files.wasm")
ABROAD = ("--ring", "member", "--prefer", "market")
PLACES = pytest.mark.parametrize("place", [(), ABROAD], ids=["home", "abroad"])


def at(node: str) -> tuple[str, ...]:
    return ("--peer", node)


@PLACES
def test_a_c_program_reads_standard_input_arguments_and_files(
    alice: Node, place: tuple[str, ...], tmp_path: Path
) -> None:
    done = alice("run", *place, "--wasm", WORDFREQ, "--", "-n", "2", stdin=b"b a b c b a")
    assert (done.code, done.out, done.err) == (0, "3 b\n2 a\n", "")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "one.txt").write_text("x y x")
    (tmp_path / "extra.txt").write_text("z")
    folder, extra = ("--input", str(tmp_path / "texts")), ("--input", str(tmp_path / "extra.txt"))
    done = alice("run", *place, "--wasm", WORDFREQ, *folder, *extra, "--", "one.txt", "extra.txt", "gone.txt")
    assert (done.code, done.out, done.err) == (1, "2 x\n1 y\n1 z\n", "wordfreq: cannot read gone.txt\n")


@PLACES
def test_an_assemblyscript_program_runs_and_its_code_is_its_own(alice: Node, place: tuple[str, ...]) -> None:
    done = alice("run", *place, "--wasm", COLUMN, "--", "n", stdin=b"n\n1\n2\n")
    assert (done.code, done.out) == (0, "count 2\nsum 3.0\nmin 1.0\nmax 2.0\nmean 1.5\n")
    done = alice("run", *place, "--wasm", COLUMN, "--", "m", stdin=b"n\n1\n")
    assert (done.code, done.out, done.err) == (2, "", "column: there is no column m\n")


def test_the_issues_form_of_a_submission(alice: Node, tmp_path: Path) -> None:
    submit = ("market", "submit", *ABROAD, "--type", "compute", "--wait")
    done = alice(*submit, "--input", f"module={WORDFREQ}", stdin=b"a b a")
    assert (done.code, done.out) == (0, "2 a\n1 b\n")
    spec = tmp_path / "task.json"
    spec.write_text(json.dumps({"type": "compute", "wasm": WORDFREQ, "argv": ["-n", "1"], "stdin": "a b a"}))
    assert alice("market", "submit", "--wait", "--spec", str(spec)).out == "2 a\n"
    lines = tmp_path / "batch.jsonl"
    lines.write_text(spec.read_text() + "\n" + spec.read_text().replace("a b a", "c") + "\n")
    done = alice("market", "batch", str(lines), "--json")
    assert done.code == 0, done
    ended = [json.loads(line)["task"]["task_id"] for line in done.out.splitlines()]
    assert sorted(alice.task(task)["result"]["stdout"] for task in ended) == ["1 c\n", "2 a\n"]


def test_two_machines_give_the_same_output_with_cold_and_warm_cache(alice: Node) -> None:
    outputs = set()
    for place in (at("bob"), at("carol"), at("bob"), at("carol")):
        done = alice("run", *place, "--json", "--wasm", FILES, "--env", "COLOUR=red", "--", "last")
        task = checked(done.json("run"))
        assert task["result"], (task["error"], alice("market", "why", task["task_id"], "--json").out)
        assert (done.code, task["result"]["exit_code"]) == (7, 7)
        outputs.add(hashlib.sha256(task["result"]["stdout"].encode()).hexdigest())
    assert len(outputs) == 1
    (output,) = outputs
    accepted = ("--accept", f"sha256:{output}", "--accept", "exit:7")
    done = alice("run", *ABROAD, *accepted, "--wasm", FILES, "--env", "COLOUR=red", "--", "last")
    assert done.code == 7, done


def test_files_that_a_module_leaves_come_back(alice: Node, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("a note")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "inner.txt").write_text("inner")
    inputs = ("--input", str(tmp_path / "note.txt"), "--input", "tree=" + str(tmp_path / "tree"))
    out = tmp_path / "out"
    out.mkdir()
    # A single directory among the inputs would be the root: with the file beside it, it is that here too.
    done = alice("run", *ABROAD, "--wasm", FILES, *inputs, "--output", "a/*", "--output-dir", str(out), "--", "last")
    assert done.code == 7, done
    assert (out / "a" / "note.txt").read_text() == "NOTEte"


def test_a_module_that_is_none_is_refused_before_anything_is_sent(alice: Node, tmp_path: Path) -> None:
    before = alice("market", "history", "--json").json()["items"]
    table: list[tuple[bytes, str]] = [
        (b"", "is empty"),
        (b"#!/bin/sh\n", "is no WebAssembly"),
        (b"(module)", "compile it first"),
        (b"\0asm\x0d\0\1\0", "component"),
    ]
    path = tmp_path / "bad.wasm"
    for content, words in table:
        path.write_bytes(content)
        alice("run", "--wasm", str(path)).failed(65, words)
        alice("market", "submit", "--type", "compute", "--input", f"module={path}").failed(65, words)
    alice("run", "--wasm", str(tmp_path / "none.wasm")).failed(66, "there is no file")
    alice("run", "--wasm", str(tmp_path)).failed(65, "is no file")
    alice("run", "--fuel", "5", "--", "true").failed(64, "fuel")
    alice("market", "submit", "--type", "compute").failed(64, "nothing to do")
    alice("market", "submit", "--type", "compute", "text").failed(64, "--input module=")
    assert alice("market", "history", "--json").json()["items"] == before


def test_what_a_module_may_not_ends_in_a_final_state_with_the_reason(alice: Node, tmp_path: Path) -> None:
    def module(text: str) -> str:
        path = tmp_path / "module.wasm"
        path.write_bytes(wasmtime.wat2wasm(text))
        return str(path)

    def last() -> dict[str, Any]:
        (item,) = alice("market", "history", "--limit", "1", "--json").json()["items"]
        return checked(alice.task(item["task_id"]))

    foreign = '(module (import "env" "spawn" (func)) (func (export "_start")))'
    alice("run", "--retries", "0", "--wasm", module(foreign)).failed(76, "env.spawn")
    assert (last()["state"], last()["error"]["code"]) == ("failed", "executor_lost")
    forever = '(module (func (export "_start") (loop $l (br $l))))'
    alice("run", *ABROAD, "--retries", "0", "--fuel", "1000000", "--wasm", module(forever)).failed(
        76, "fuel of 1000000"
    )
    assert last()["state"] == "failed"
    assert last()["escrow"]["state"] in ("refunded", "none")
    done = alice("run", *ABROAD, "--wasm", module('(module (func (export "_start") unreachable))'))
    assert (done.code, done.err.splitlines()[0]) == (134, "clawnet: the module trapped: unreachable code was reached")
    assert last()["state"] == "settled"
    done = alice("run", "--timeout", "1s", "--wasm", module(forever))
    assert done.code == 124
    assert last()["state"] == "cancelled"


def test_nodes_that_can_run_modules_say_so(alice: Node) -> None:
    assert "wasm" in alice("daemon", "status").out
    findings = alice("doctor", "--json").json()["findings"]
    (found,) = [item for item in findings if item["check"] == "wasm"]
    assert found["level"] == "ok"
