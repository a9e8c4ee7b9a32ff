"""`clawnet market batch` on real nodes: once each, whatever is killed; bad lines; Ctrl-C; what a second run does."""

from __future__ import annotations

import json
import os
import pty
import signal
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from clawnet.answers import ANSWERS
from tests.cli.harness import Done, Node, Nodes, alive, checked, processes_with, read_until

pytestmark = pytest.mark.slow

WORK = ("--type", "compute", "--op", "sha256", "--ring", "member", "--prefer", "market")


@pytest.fixture(scope="module")
def pair() -> Iterator[list[Node]]:
    """Two nodes for all of these tests; each test names its run, so that no other has done its lines."""
    made = Nodes()
    try:
        yield made.mesh("alice", "bob")
    finally:
        made.close()


@pytest.fixture
def alice(pair: list[Node]) -> Node:
    """The one that submits."""
    return pair[0]


def lines(path: Path, tasks: list[dict[str, Any]]) -> str:
    """A file of these tasks."""
    path.write_text("".join(json.dumps(task) + "\n" for task in tasks))
    return str(path)


def texts(path: Path, count: int) -> str:
    """A file of so many small tasks."""
    return lines(path, [{"description": f"text {n}"} for n in range(count)])


def results(done: Done, code: int = 0) -> list[dict[str, Any]]:
    """The lines a batch printed, each held against its form, in the order of the file."""
    assert done.code == code, done.err
    found = [checked(json.loads(line), ANSWERS["market batch"]) for line in done.out.splitlines()]
    return sorted(found, key=lambda one: one["line"])


def ids(found: list[dict[str, Any]]) -> list[str]:
    """The task of each line."""
    return [one["task"]["task_id"] for one in found]


def spent(node: Node) -> Decimal:
    """What the node has paid and bound since its beginning, by its chain alone."""
    return sum((-Decimal(one["amount"]) for one in chain(node) if one["kind"] in ("lock", "refund")), Decimal(0))


def chain(node: Node) -> list[dict[str, Any]]:
    """The node's own entries."""
    return list(node.ask("wallet.history", limit=500)["items"])


def each_once(node: Node, before: Decimal, found: list[dict[str, Any]]) -> None:
    """Every line has one task of its own with one attempt, and what was paid is the sum of their prices."""
    assert len(set(ids(found))) == len(found)
    assert [len(one["task"]["attempts"]) for one in found] == [1] * len(found)
    node.until("no line is open", lambda: node.ask("wallet.balance")["open_lines"] == 0)
    assert spent(node) - before == sum(Decimal(one["task"]["price"]) for one in found)


# --- the same file again


def test_a_second_run_prints_the_results_again_and_pays_nothing(alice: Node, tmp_path: Path) -> None:
    before = spent(alice)
    tasks: list[dict[str, Any]] = [{"description": "a"}, {"description": "b"}, {"description": "a"}]
    file = lines(tmp_path / "tasks", [*tasks, {"type": "shell", "op": "", "argv": ["sh", "-c", "exit 3"]}])
    first = results(alice("market", "batch", file, *WORK, "--name", "twice"), code=1)
    assert [(one["line"], one["resumed"], one["exit_code"]) for one in first] == [
        *((n, False, 0) for n in (1, 2, 3)),
        (4, False, 3),
    ]
    each_once(alice, before, first)
    paid = spent(alice)
    # Other options for how it is done, and the lines in another order: still the same work.
    lines(tmp_path / "tasks", [{"type": "shell", "op": "", "argv": ["sh", "-c", "exit 3"]}, *reversed(tasks)])
    again = results(alice("market", "batch", file, *WORK, "--name", "twice", "--budget", "7"), code=1)
    assert all(one["resumed"] for one in again) and set(ids(again)) == set(ids(first))
    assert spent(alice) == paid
    # Another operation, or another name, is other work.
    other = results(alice("market", "batch", texts(tmp_path / "one", 1), *WORK, "--name", "x"))
    assert not other[0]["resumed"]
    other = results(alice("market", "batch", str(tmp_path / "one"), *WORK[:2], "--op", "sort", "--name", "x"))
    assert not other[0]["resumed"]


def test_what_failed_is_done_again_only_when_asked(alice: Node, tmp_path: Path) -> None:
    flaky = {"type": "shell", "argv": ["sh", "-c", "exit 4"], "ring": "member", "idempotency_key": "flaky"}
    nobody = {"type": "prompt", "description": "hello", "idempotency_key": "nobody"}
    file = lines(tmp_path / "tasks", [{**flaky, "budget": "2"}, nobody])
    first = results(alice("market", "batch", file), code=1)
    assert [one["exit_code"] for one in first] == [4, 75]
    again = results(alice("market", "batch", file), code=1)
    # A command that ran is done, whatever its exit code; where nothing came of it the key is free again.
    assert [one["resumed"] for one in again] == [True, False]
    third = results(alice("market", "batch", file, "--retry-failed"), code=1)
    assert [one["resumed"] for one in third] == [False, False]
    last = results(alice("market", "batch", file), code=1)
    assert last[0]["resumed"] and ids(last)[0] == ids(third)[0] != ids(first)[0]


# --- bad lines


def test_bad_lines_are_all_told_before_anything_is_submitted(alice: Node, tmp_path: Path) -> None:
    count = len(alice.ask("task.list", limit=500)["items"])
    path = tmp_path / "tasks"
    good = '{"description": "fine"}'
    bad = ["nonsense", "[1]", '{"op": "none", "description": "x"}', '{"inputs": ["/no/such/file"]}', '{"nope": 1}']
    path.write_text("\n".join([good, *bad, "", good]) + "\n")
    done = alice("market", "batch", str(path), *WORK, "--name", "bad")
    assert (done.code, done.out) == (65, "")
    told = [line for line in done.err.splitlines() if ", line " in line]
    assert [f"{path}, line {n}" in line for n, line in zip(range(2, 7), told, strict=True)] == [True] * 5, done.err
    assert "nothing was submitted" in done.err
    assert len(alice.ask("task.list", limit=500)["items"]) == count
    found = results(alice("market", "batch", str(path), *WORK, "--name", "bad", "--keep-going"), code=65)
    assert [(one["line"], one["exit_code"]) for one in found] == [
        *((1, 0), (2, 65), (3, 65), (4, 65), (5, 66), (6, 65), (8, 0)),
    ]
    # The two good lines are equal and yet two tasks.
    assert found[0]["task"]["task_id"] != found[-1]["task"]["task_id"]


def test_a_pipe_is_done_as_it_comes_up_to_the_first_bad_line(alice: Node) -> None:
    text = b'{"description": "p1"}\nnonsense\n{"description": "p2"}\n'
    done = alice("market", "batch", "-", *WORK, "--name", "pipe", stdin=text)
    assert {one["line"]: one["exit_code"] for one in results(done, code=65)} == {1: 0, 2: 65}
    done.failed(65, "standard input, line 2", "not valid JSON")
    # What a line says is data: 64 is for the command line alone.
    for line in (b"{}", b'{"type": "nope", "description": "x"}', b'{"type": "compute", "description": "x"}'):
        alice("market", "batch", "-", stdin=line).failed(65, "standard input, line 1")
    alice("market", "batch", "/no/such/file").failed(66, "/no/such/file")
    alice("market", "batch", "-", "--in-flight", "0").failed(64, "--in-flight")


def test_results_come_while_more_lines_are_waited_for(alice: Node) -> None:
    with alice.popen("market", "batch", "-", *WORK, "--name", "slow", stdin=-1) as batch:
        assert batch.stdin and batch.stdout
        for n in (1, 2):
            batch.stdin.write(f'{{"description": "slow {n}"}}\n'.encode())
            batch.stdin.flush()
            assert json.loads(read_until(batch.stdout, b"\n"))["line"] == n
        batch.stdin.close()
        assert batch.wait(30) == 0


# --- interruptions


def test_a_killed_batch_goes_on_where_it_stopped(alice: Node, tmp_path: Path) -> None:
    before = spent(alice)
    file = texts(tmp_path / "tasks", 24)
    with alice.popen("market", "batch", file, *WORK, "--name", "killed", "--in-flight", "3") as batch:
        seen = read_until(batch.stdout, b"\n").splitlines(keepends=True)
        batch.kill()
    done = {json.loads(line)["task"]["task_id"] for line in seen if line.endswith(b"\n")}
    found = results(alice("market", "batch", file, *WORK, "--name", "killed"))
    assert [one["line"] for one in found] == list(range(1, 25))
    assert done <= {one["task"]["task_id"] for one in found if one["resumed"]}
    assert not found[-1]["resumed"], "it was killed before the end"
    each_once(alice, before, found)


@pytest.mark.parametrize(("who", "how"), [(0, "killed"), (1, "killed"), (0, "restarted")])
def test_a_daemon_that_ends_meanwhile_costs_nothing(pair: list[Node], tmp_path: Path, who: int, how: str) -> None:
    alice, victim = pair[0], pair[who]
    before = spent(alice)
    file = texts(tmp_path / "tasks", 60)
    command = ("market", "batch", file, *WORK, "--name", f"daemon{who}{how}", "--in-flight", "4")
    with alice.popen(*command) as batch:
        out = read_until(batch.stdout, b"\n")
        if how == "restarted":
            assert victim("daemon", "restart").code == 0
        else:
            victim.kill()
        if who:
            victim.start()
        assert batch.stdout
        out += batch.stdout.read()
        assert batch.wait(90) == 0, batch.stderr and batch.stderr.read()
    found = [json.loads(line) for line in out.splitlines()]
    assert sorted(one["line"] for one in found) == list(range(1, 61))
    assert len(set(ids(found))) == 60
    alice.until("no line is open", lambda: alice.ask("wallet.balance")["open_lines"] == 0)
    done = [[a for a in one["task"]["attempts"] if a["state"] == "done"] for one in found]
    assert [len(attempts) for attempts in done] == [1] * 60
    # While bob was away alice did some herself, at no price.
    assert spent(alice) - before == sum(Decimal(attempts[0]["price"]) for attempts in done) > 0


def test_ctrl_c_waits_for_what_runs_and_the_second_leaves_it_running(alice: Node, tmp_path: Path) -> None:
    sleeper = {"type": "shell", "argv": ["sleep", "86.5"], "ring": "own"}
    file = lines(tmp_path / "tasks", [sleeper, {"type": "compute", "op": "sha256", "description": "later"}])
    command = ("market", "batch", file, "--name", "ctrl-c")
    with alice.popen(*command, "--in-flight", "1") as batch:
        assert batch.stderr and batch.stdout
        alice.until("it runs", lambda: processes_with("86.5"))
        batch.send_signal(signal.SIGINT)
        assert b"once more" in read_until(batch.stderr, b"\n")
        assert batch.poll() is None
        batch.send_signal(signal.SIGINT)
        assert batch.wait(20) == 130
        assert batch.stdout.read() == b""
    (task,) = [one for one in alice.ask("task.list", states=["executing"])["items"] if "86.5" in one["description"]]
    with alice.popen(*command, "--timeout", "2s", "--in-flight", "1") as batch:
        assert batch.wait(20) == 124
    assert processes_with("86.5"), "it was left running"
    with alice.popen(*command) as batch:
        assert batch.stdout
        # The second line has ended, so the first has been submitted again, and found its task.
        assert json.loads(read_until(batch.stdout, b"\n"))["line"] == 2
        alice.ask("task.cancel", task=task["task_id"])
        assert batch.wait(20) == 1
        last = json.loads(batch.stdout.read())
    assert (last["line"], last["exit_code"], last["resumed"]) == (1, 81, True)
    assert last["task"]["task_id"] == task["task_id"]
    alice.until("nothing of it is left", lambda: not processes_with("86.5"))


# --- what people see


def test_a_terminal_shows_a_bar_and_a_summary_and_stdout_only_results(alice: Node, tmp_path: Path) -> None:
    file = texts(tmp_path / "tasks", 5)
    ours, theirs = pty.openpty()
    try:
        with alice.popen("market", "batch", file, *WORK, "--name", "bar", stderr=theirs) as batch:
            os.close(theirs)
            seen = b""
            while b"5 done, 0 failed" not in seen:
                seen += os.read(ours, 65536)
            assert batch.stdout
            assert len([json.loads(line) for line in batch.stdout.read().splitlines()]) == 5
            assert batch.wait(20) == 0
    finally:
        os.close(ours)
    assert b"/5" in seen
    assert alive(alice.pid)


def test_a_bad_line_ends_a_batch_though_its_pipe_stays_open(alice: Node) -> None:
    with alice.popen("market", "batch", "-", *WORK, "--name", "open", stdin=-1) as batch:
        assert batch.stdin and batch.stderr
        batch.stdin.write(b"nonsense\n")
        batch.stdin.flush()
        assert batch.wait(30) == 65
        assert b"line 1" in batch.stderr.read()
