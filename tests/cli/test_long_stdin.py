"""Standard input too long for the task document, from the shell's pipe to a command on another node."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from clawnet import limits
from clawnet.paths import Home
from tests.cli.conftest import Program, Script
from tests.cli.harness import PROGRAM, Node, until
from tests.cli.test_run_command import accepting

pytestmark = pytest.mark.slow

__all__ = ["accepting"]

ABROAD = ("--ring", "member", "--prefer", "market")
SMALL = (
    *PROGRAM[:2],
    "-c",
    "from clawnet import limits; limits.STDIN_FILE_BYTES_MAX = 3_000_000\n"
    "from clawnet.commands.app import main; main()",
)
"""The program with a bound that an endless input reaches soon."""


def left(home: Home) -> list[Path]:
    return list(home.run_dir.glob(f"{home.STDIN_PREFIX}*"))


def test_lines_by_the_million_are_counted_on_another_machine(alice: Node) -> None:
    with (
        subprocess.Popen(["seq", "1", "10000000"], stdout=subprocess.PIPE) as lines,
        alice.popen("run", *ABROAD, "--", "wc", "-lc", stdin=lines.stdout) as counting,
    ):
        assert lines.stdout is not None
        lines.stdout.close()
        out, err = counting.communicate(timeout=90)
        assert (counting.returncode, out.split(), err) == (0, [b"10000000", b"78888897"], b"")
    assert not left(alice.home)


def test_it_is_the_same_for_operations_and_with_other_inputs(alice: Node, tmp_path: Path) -> None:
    data = os.urandom(limits.STDIN_BYTES_MAX + 1)
    done = alice("market", "submit", "--type", "compute", "--op", "sha256", "--wait", "-q", *ABROAD, stdin=data)
    assert hashlib.sha256(data).hexdigest() in done.out
    (tmp_path / "stdin").write_text("a file of that name\n")
    source = ("--input", str(tmp_path / "stdin"))
    done = alice("run", *ABROAD, *source, "--", "sh", "-c", "cat stdin; wc -c", stdin=data)
    assert (done.code, done.out) == (0, f"a file of that name\n{len(data)}\n")
    assert not left(alice.home)


def test_the_same_input_again_is_the_same_task(alice: Node) -> None:
    data = os.urandom(limits.STDIN_BYTES_MAX + 1)
    words = ("market", "submit", "--type", "shell", "wc -c", "--idempotency-key", os.urandom(8).hex())
    first = alice(*words, stdin=data).line
    assert alice(*words, stdin=data).line == first
    alice(*words, stdin=data + b"x").failed(65, "another task")
    assert not left(alice.home)


def test_an_endless_input_reaches_a_bound_and_leaves_nothing(clawnet: Program, accepting: Script) -> None:
    environ = {**clawnet.environ, "LC_ALL": "C.UTF-8"}
    with subprocess.Popen(["yes"], stdout=subprocess.PIPE) as endless:
        done = subprocess.run(
            [*SMALL, "run", "--", "wc", "-l"], stdin=endless.stdout, env=environ, capture_output=True, timeout=60
        )
        endless.kill()
    assert (done.returncode, done.stdout) == (65, b"")
    assert b"longer than" in done.stderr
    assert b"Traceback" not in done.stderr
    assert not any(method == "task.submit" for method, _ in accepting.calls)
    assert not left(clawnet.home)


def test_the_file_is_there_for_the_daemon_alone_and_gone_afterwards(clawnet: Program, accepting: Script) -> None:
    data = os.urandom(limits.STDIN_BYTES_MAX + 1)
    seen: list[tuple[bytes, int]] = []

    def submit(params: dict[str, Any]) -> dict[str, Any]:
        path = Path(params["spec"]["stdin_path"])
        seen.append((path.read_bytes(), path.stat().st_mode & 0o777))
        return {"task_id": "00" * 16, "created": True, "deadline": "2026-01-02T04:04:05.000Z"}

    accepting.answers["task.submit"] = submit
    assert clawnet("run", "--", "cat", stdin=data).returncode == 0
    assert seen == [(data, 0o600)]
    assert "stdin_b64" not in accepting.params("task.submit")["spec"]
    assert not left(clawnet.home)


def test_a_prompt_stays_within_its_bound(clawnet: Program, accepting: Script) -> None:
    done = clawnet("market", "submit", "Summarize", stdin=b"x" * (limits.STDIN_BYTES_MAX + 1))
    assert done.returncode == 65
    assert "prompt" in done.stderr
    assert not accepting.calls


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_client_that_is_ended_while_it_reads_takes_its_file_along(
    clawnet: Program, accepting: Script, number: int
) -> None:
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    reading = clawnet.start("run", "--", "wc", "-c", stdin=subprocess.PIPE, **quiet)
    assert reading.stdin is not None
    reading.stdin.write(b"x" * (limits.STDIN_BYTES_MAX + 10))
    reading.stdin.flush()
    until("it is being written", lambda: left(clawnet.home))
    reading.send_signal(number)
    reading.wait(20)
    reading.stdin.close()
    assert reading.returncode not in (0, None)
    assert not left(clawnet.home)


def test_what_a_killed_client_left_is_gone_with_the_daemons_next_start(alice_alone: Node) -> None:
    node = alice_alone
    with subprocess.Popen(
        [*PROGRAM, "run", "--", "wc", "-c"], stdin=subprocess.PIPE, env=node.environ, stderr=subprocess.DEVNULL
    ) as reading:
        assert reading.stdin is not None
        reading.stdin.write(b"x" * (limits.STDIN_BYTES_MAX + 10))
        reading.stdin.flush()
        until("it is being written", lambda: left(node.home))
        node("daemon", "restart")
        assert left(node.home), "its client lives"
        reading.kill()
        reading.wait()
        reading.stdin.close()
    node("daemon", "restart")
    assert not left(node.home)


@pytest.fixture
def alice_alone(nodes: Any) -> Node:
    """One started node without peers."""
    node: Node = nodes("alice").start()
    return node
