"""`clawnet run` on real nodes, at home and on a member's machine: streams, codes, inputs, stdin, limits of size."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.cli.harness import PROGRAM, Node, checked, processes_with, read_until, until

pytestmark = pytest.mark.slow

ABROAD = ("--ring", "member", "--prefer", "market")
"""Puts a task on another node's machine: own ring first means that this node would take it itself."""
PLACES = pytest.mark.parametrize("place", [(), ABROAD], ids=["home", "abroad"])


@PLACES
def test_streams_stay_apart_and_the_code_is_the_commands_own(alice: Node, place: tuple[str, ...]) -> None:
    done = alice("run", *place, "--", "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.code, done.out, done.err) == (7, "out\n", "err\n")
    newest = alice("market", "history", "--limit", "1", "--json").json("market history")["items"][0]
    assert newest["exit_code"] == 7
    assert newest["executor"]["name"] in (("bob", "carol") if place else ("alice",))


@PLACES
@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["/no/such/program"], 127),
        (["no-such-program"], 127),
        (["/etc/passwd"], 126),
        (["sh", "-c", "kill -TERM $$"], 128 + signal.SIGTERM),
        (["sh", "-c", "kill -SEGV $$"], 128 + signal.SIGSEGV),
        (["sh", "-c", "exit 64"], 64),
        (["true"], 0),
    ],
)
def test_codes_of_a_shell(alice: Node, place: tuple[str, ...], command: list[str], code: int) -> None:
    assert alice("run", *place, "--", *command).code == code


def test_json_is_one_object_of_the_documented_form(alice: Node) -> None:
    done = alice("run", "--json", *ABROAD, "--", "sh", "-c", "echo out; echo err >&2; exit 3")
    task = checked(done.json("run"))
    assert done.code == 3
    assert (task["result"]["stdout"], task["result"]["stderr"], task["result"]["exit_code"]) == ("out\n", "err\n", 3)
    assert task["error"] is None
    assert task["escrow"]["state"] in ("released", "claimed")
    streamed = alice("run", "--json", "--stream", *ABROAD, "--", "sh", "-c", "echo out; echo err >&2; exit 3")
    *lines, last = [json.loads(line) for line in streamed.out.splitlines()]
    assert {(line["stream"], line["data"]) for line in lines} == {("stdout", "out\n"), ("stderr", "err\n")}
    assert checked(last)["result"]["exit_code"] == 3


def test_the_status_file_tells_a_code_from_an_error(alice: Node, tmp_path: Path) -> None:
    note = tmp_path / "status.json"
    assert alice("run", "--status-file", str(note), "--", "sh", "-c", "exit 75").code == 75
    task = checked(json.loads(note.read_text()))
    assert (task["result"]["exit_code"], task["error"]) == (75, None)
    assert alice("run", "--status-file", str(note), "--cpu", "4096", *ABROAD, "--", "true").code == 75
    task = checked(json.loads(note.read_text()))
    assert (task["result"], task["error"]["code"]) == (None, "no_bids")


@PLACES
def test_a_file_and_a_directory_travel(alice: Node, place: tuple[str, ...], tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    (tmp_path / "one.bin").write_bytes(data)
    tree = tmp_path / "tree"
    (tree / "deep").mkdir(parents=True)
    (tree / "deep" / "a.txt").write_text("content of a\n")
    (tree / "run.sh").write_text("#!/bin/sh\necho I ran\n")
    (tree / "run.sh").chmod(0o755)
    told = ["--input", str(tree), "--input", f"big={tmp_path / 'one.bin'}"]
    script = "cat deep/a.txt; ./run.sh; sha256sum < big; pwd"
    done = alice("run", *place, *told, "--", "sh", "-c", script)
    assert done.code == 0, done.err
    content, ran, digest, where = done.out.splitlines()
    assert (content, ran, digest.split()[0]) == ("content of a", "I ran", hashlib.sha256(data).hexdigest())
    assert str(tmp_path) not in where


def test_one_byte_of_input_changes_the_result(alice: Node, tmp_path: Path) -> None:
    file = tmp_path / "data"
    seen = set()
    for text in ("abc", "abd"):
        file.write_text(text)
        task = alice("run", "--json", *ABROAD, "--input", str(file), "--", "sh", "-c", "cat data").json()
        assert task["result"]["stdout"] == text
        seen.add(task["result"]["sha256"])
    assert len(seen) == 2


def test_stdin_is_read_from_a_pipe_and_left_alone_with_n(alice: Node, tmp_path: Path) -> None:
    assert alice("run", *ABROAD, "--", "cat", stdin=b"from a pipe\0\xff").code == 0
    assert alice.raw("run", *ABROAD, "--", "cat", stdin=b"from a pipe\0\xff")[1] == b"from a pipe\0\xff"
    assert alice("run", "--", "cat").out == ""
    program = " ".join(PROGRAM)
    loop = f"printf 'a\\nb\\nc\\n' | while read x; do {program} run -n -- echo got $x; done"
    done = subprocess.run(["sh", "-c", loop], env=alice.environ, capture_output=True, text=True, timeout=90)
    assert (done.stdout, done.stderr) == ("got a\ngot b\ngot c\n", "")
    eaten = loop.replace("run -n", "run")
    done = subprocess.run(["sh", "-c", eaten], env=alice.environ, capture_output=True, text=True, timeout=90)
    assert done.stdout == "got a\n"


def test_the_environment_of_a_run_is_what_was_given(alice: Node) -> None:
    done = alice("run", *ABROAD, "--env", "COLOUR=a b=c", "--", "sh", "-c", 'echo "$COLOUR"; env', SECRET="xyzzy")
    assert done.out.splitlines()[0] == "a b=c"
    assert "xyzzy" not in done.out
    assert "CLAWNET_HOME" not in done.out


@PLACES
def test_megabytes_on_both_streams_arrive_whole_and_in_order(alice: Node, place: tuple[str, ...]) -> None:
    script = "seq 1 400000; seq 400001 800000 >&2"
    code, out, err = alice.raw("run", *place, "--", "sh", "-c", script)
    assert code == 0, err[-500:]
    assert out == b"".join(b"%d\n" % n for n in range(1, 400_001))
    assert err == b"".join(b"%d\n" % n for n in range(400_001, 800_001))


def test_bytes_that_are_no_text_come_back_unchanged(alice: Node) -> None:
    data = bytes(range(256)) * 17
    code, out, _ = alice.raw("run", *ABROAD, "--", "sh", "-c", "cat", stdin=data)
    assert (code, out) == (0, data)
    task = alice("run", "--json", *ABROAD, "--", "cat", stdin=data).json("run")
    assert task["result"]["stdout"] is None
    assert task["result"]["stdout_b64"]


def test_a_big_result_is_not_inlined_but_read_later(alice: Node) -> None:
    task = alice("run", "--json", *ABROAD, "--", "sh", "-c", "seq 1 300000").json("run")
    assert task["result"]["stdout"] is None
    assert task["result"]["stdout_bytes"] > 1 << 20
    code, out, _ = alice.raw("market", "result", task["task_id"])
    assert (code, out) == (0, b"".join(b"%d\n" % n for n in range(1, 300_001)))
    assert alice.raw("market", "logs", task["task_id"])[1] == out


@PLACES
def test_output_comes_while_the_command_runs(alice: Node, place: tuple[str, ...], tmp_path: Path) -> None:
    with alice.popen("run", *place, "--", "sh", "-c", "echo first; exec sleep 600 # stream") as process:
        assert read_until(process.stdout, b"first\n") == b"first\n"
        process.send_signal(signal.SIGINT)
        process.wait(60)


# --- interrupts and limits of time


@PLACES
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_ends_the_process_group_where_it_runs(
    alice: Node, place: tuple[str, ...], number: int, code: int
) -> None:
    marker = f"interrupted-{os.urandom(6).hex()}"
    script = f"echo begun; sleep 600 & sh -c 'sleep 600; : {marker}'; : {marker}"
    with alice.popen("run", *place, "--", "sh", "-c", script) as process:
        read_until(process.stdout, b"begun\n")
        assert processes_with(marker)
        process.send_signal(number)
        assert process.wait(60) == code
    task = alice("market", "history", "--limit", "1", "--json").json("market history")["items"][0]
    assert task["state"] == "cancelled"
    until("the process group is gone", lambda: not processes_with(marker))


def test_a_second_interrupt_leaves_at_once(alice: Node) -> None:
    marker = f"twice-{os.urandom(6).hex()}"
    script = f"trap '' TERM INT; echo begun; while :; do sleep 600; done; : {marker}"
    with alice.popen("run", *ABROAD, "--", "sh", "-c", script) as process:
        read_until(process.stdout, b"begun\n")
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) in (130, -signal.SIGINT), "to a shell the two are one"
    until("the process group is gone", lambda: not processes_with(marker))


@PLACES
def test_the_timeout_of_run_cancels(alice: Node, place: tuple[str, ...]) -> None:
    marker = f"late-{os.urandom(6).hex()}"
    done = alice("run", "--timeout", "1s", *place, "--", "sh", "-c", f"echo begun; sleep 600; : {marker}")
    done.failed(124, "was cancelled")
    assert done.out == "begun\n"
    until("the process group is gone", lambda: not processes_with(marker))


def test_the_deadline_ends_a_task_where_it_runs(alice: Node) -> None:
    marker = f"overdue-{os.urandom(6).hex()}"
    done = alice("run", "--json", "--deadline", "2s", *ABROAD, "--", "sh", "-c", f"sleep 600; : {marker}")
    task: dict[str, Any] = done.json("run")
    assert (done.code, task["state"]) == (124, "timed_out")
    until("the process group is gone", lambda: not processes_with(marker))


def test_a_closed_stdout_is_141(alice: Node) -> None:
    pipe = f"{{ {' '.join(PROGRAM)} run -- seq 1 1000000; echo $? >&3; }} 3>&2 2>/dev/null | head -n 1"
    done = subprocess.run(["sh", "-c", pipe], env=alice.environ, capture_output=True, text=True, timeout=90)
    assert (done.stdout, done.stderr) == ("1\n", "141\n")
