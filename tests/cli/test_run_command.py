"""`run`, `market submit --wait` and their kin against a scripted node: streams, exit codes, stdin, Ctrl-C, files."""

from __future__ import annotations

import base64
import json
import signal
from pathlib import Path
from typing import Any

import pytest

from clawnet.errors import FundsError, UnreachableError
from tests.cli.conftest import TASK_ID, Program, Script, failure, task

pytestmark = pytest.mark.slow


def out(stream: str, offset: int, data: str) -> tuple[str, dict[str, Any]]:
    return "task.output", {"stream": stream, "offset": offset, "data": data}


@pytest.fixture
def accepting(node: Script) -> Script:
    """A node that accepts every task and settles it."""
    node.answers["task.submit"] = {"task_id": TASK_ID, "created": True, "deadline": "2026-01-02T04:04:05.000Z"}
    node.answers["task.get"] = lambda params: task(task_id=params["task"])
    node.answers["task.follow"] = task()
    node.answers["task.cancel"] = {"task_id": TASK_ID, "state": "cancelled"}
    return node


def test_streams_stay_apart_and_the_code_is_the_commands_own(clawnet: Program, accepting: Script) -> None:
    accepting.notes["task.follow"] = [out("stdout", 0, "ou"), out("stdout", 0, "out\n"), out("stderr", 0, "e")]
    accepting.answers["task.follow"] = task(result={"exit_code": 7})
    done = clawnet("run", "--", "sh", "-c", "exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, "out\n", "err\n")
    spec = accepting.params("task.submit")["spec"]
    assert spec == {"type": "shell", "argv": ["sh", "-c", "exit 7"], "deadline_s": 3600.0, "stream": True}


def test_options_after_the_command_are_the_commands(clawnet: Program, accepting: Script) -> None:
    clawnet("run", "--budget", "2.5", "ls", "--json", "-n")
    spec = accepting.params("task.submit")["spec"]
    assert spec["argv"] == ["ls", "--json", "-n"]
    assert spec["budget_ucr"] == 2_500_000


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"result": {"exit_code": None, "signal": 9}}, 137),
        ({"result": {"exit_code": 127}}, 127),
        ({"result": None, "state": "no_bids", "error": {"code": "no_bids", "message": "m", "exit_code": 75}}, 75),
        ({"result": None, "state": "failed"}, 76),
        ({"result": None, "state": "cancelled"}, 81),
        ({"result": None, "state": "timed_out"}, 124),
        ({"error": {"code": "verification_failed", "message": "m", "exit_code": 80}}, 80),
    ],
)
def test_how_a_task_ends_is_the_exit_code(
    clawnet: Program, accepting: Script, changes: dict[str, Any], code: int
) -> None:
    accepting.answers["task.follow"] = task(**changes)
    assert clawnet("run", "--", "x").returncode == code


def test_json_is_one_object_and_with_stream_lines_come_first(clawnet: Program, accepting: Script) -> None:
    accepting.notes["task.follow"] = [out("stdout", 0, "out\n")]
    done = clawnet("run", "--json", "--", "x")
    assert json.loads(done.stdout)["result"]["stdout"] == "out\n"
    done = clawnet("run", "--json", "--stream", "--", "x")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert lines[:2] == [{"stream": "stdout", "data": "out\n"}, {"stream": "stderr", "data": "err\n"}]
    assert lines[2]["task_id"] == TASK_ID


def test_bytes_that_are_no_text_arrive_unchanged(clawnet: Program, accepting: Script) -> None:
    raw = base64.b64encode(b"\xff\x00\xfe").decode()
    accepting.answers["task.follow"] = task(result={"stdout": None, "stdout_b64": raw, "stderr": ""})
    process = clawnet.start("run", "--", "x")
    assert process.communicate(timeout=60)[0] == b"\xff\x00\xfe"


def test_output_that_is_not_inline_is_read_piece_by_piece(clawnet: Program, accepting: Script) -> None:
    whole = bytes(range(256)) * 8
    accepting.notes["task.follow"] = [
        (
            "task.output",
            {
                "stream": "stdout",
                "offset": 0,
                "data_b64": base64.b64encode(whole[:300]).decode(),
            },
        )
    ]
    accepting.answers["task.follow"] = task(result={"stdout": None, "stdout_bytes": len(whole), "stderr": ""})

    def read(params: dict[str, Any]) -> dict[str, Any]:
        piece = whole[params["offset"] : params["offset"] + 700]
        return {"data_b64": base64.b64encode(piece).decode(), "size": len(whole), "eof": False}

    accepting.answers["task.read"] = read
    process = clawnet.start("run", "--", "x")
    assert process.communicate(timeout=60)[0] == whole


def test_stdin_is_taken_from_a_pipe_or_a_file_unless_refused(
    clawnet: Program, accepting: Script, tmp_path: Path
) -> None:
    def stdin() -> str | None:
        found = accepting.params("task.submit")["spec"].get("stdin_b64")
        return None if found is None else base64.b64decode(found).decode()

    clawnet("run", "--", "cat", stdin=b"piped")
    assert stdin() == "piped"
    clawnet("run", "-n", "--", "cat", stdin=b"piped")
    assert stdin() is None
    clawnet("run", "--", "cat")
    assert stdin() is None
    file = tmp_path / "notes.txt"
    file.write_text("filed")
    with file.open() as source:
        clawnet.start("market", "submit", "Summarize", stdin=source).communicate(timeout=60)
    assert stdin() == "filed"


def test_a_directory_becomes_the_working_directory(clawnet: Program, accepting: Script, tmp_path: Path) -> None:
    (tmp_path / "sources").mkdir()
    (tmp_path / "a=b").write_text("")
    clawnet("run", "--input", "sources", "--input", "data=a=b", "--", "make", cwd=tmp_path)
    spec = accepting.params("task.submit")["spec"]
    assert spec["inputs"] == [
        {"name": "sources", "path": str(tmp_path / "sources")},
        {"name": "data", "path": str(tmp_path / "a=b")},
    ]
    assert spec["cwd"] == "sources"
    done = clawnet("run", "--input", "sources", "--input", "sources=a=b", "--", "make", cwd=tmp_path)
    assert done.returncode == 64


def test_a_spec_in_yaml_or_json_with_options_over_it(clawnet: Program, accepting: Script, tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(
        "type: shell\nargv: [make, test]\nbudget: 2\ndeadline: 5m\nenv: {DEBUG: '1'}\nlabels: [fast]\n"
    )
    clawnet("run", "--spec", "task.yaml", "--budget", "3", "--label", "slow", cwd=tmp_path)
    spec = accepting.params("task.submit")["spec"]
    assert spec["argv"] == ["make", "test"]
    assert (spec["budget_ucr"], spec["deadline_s"], spec["env"], spec["labels"]) == (
        3_000_000,
        300.0,
        {"DEBUG": "1"},
        ["slow"],
    )
    text = json.dumps({"type": "compute", "op": "sha256", "description": "abc", "memory": "2GiB"}).encode()
    done = clawnet("market", "submit", "--spec", "-", stdin=text)
    assert (done.returncode, done.stdout) == (0, TASK_ID + "\n")
    spec = accepting.params("task.submit")["spec"]
    assert (spec["memory_bytes"], base64.b64decode(spec["stdin_b64"])) == (2**31, b"abc")


BAD_SPECS = [
    b'{"type": "shel", "script": "x"}',
    b"type: shel\nscript: x",
    b"type: swarm\nscript: x",
    b'{"type": "shell", "type": "shell", "script": "x"}',
    b"type: shell\nscript: x\nscript: y",
    b"type: shell\nscript: x\nenv: {A: 1, A: 2}",
    b"type: shell\nscript: x\ninputs: [{name: a, path: /etc/passwd}, {name: a, path: /etc/group}]",
]


@pytest.mark.parametrize("text", [b"{", b"[1]", b"a: [", b"\xff\xfe", b"- x", b"{" + b'"a":[' * 5000, *BAD_SPECS])
def test_a_spec_that_is_none_is_refused(clawnet: Program, accepting: Script, text: bytes) -> None:
    done = clawnet("market", "submit", "--spec", "-", stdin=text)
    assert (done.returncode, "Traceback" in done.stderr) == (65, False)
    assert not accepting.calls


def test_the_status_file_tells_the_commands_code_from_an_error(
    clawnet: Program, accepting: Script, tmp_path: Path
) -> None:
    file = tmp_path / "status.json"
    accepting.answers["task.follow"] = task(result={"exit_code": 79})
    assert clawnet("run", "--status-file", str(file), "--", "x").returncode == 79
    assert json.loads(file.read_text())["result"]["exit_code"] == 79
    accepting.answers["task.submit"] = FundsError("too dear")
    assert clawnet("run", "--status-file", str(file), "--", "x").returncode == 79
    assert json.loads(file.read_text())["error"]["code"] == "funds"
    assert list(tmp_path.glob(".status*")) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_cancels_the_task(clawnet: Program, accepting: Script, number: int, code: int) -> None:
    del accepting.answers["task.follow"]
    process = clawnet.start("run", "--", "sleep", "60")
    accepting.wait_for("task.follow")
    process.send_signal(number)
    assert accepting.wait_for("task.cancel")["task"] == TASK_ID
    accepting.release("task.follow", task(state="cancelled", result=None))
    process.communicate(timeout=60)
    assert process.returncode == code


def test_a_second_interrupt_leaves_at_once(clawnet: Program, accepting: Script) -> None:
    del accepting.answers["task.follow"]
    process = clawnet.start("run", "--", "sleep", "60")
    accepting.wait_for("task.follow")
    process.send_signal(signal.SIGINT)
    accepting.wait_for("task.cancel")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130


def test_a_timeout_of_run_cancels_and_one_of_wait_does_not(clawnet: Program, accepting: Script) -> None:
    def cancel(params: dict[str, Any]) -> dict[str, Any]:
        accepting.release("task.follow", task(state="cancelled", result=None))
        return {"task_id": TASK_ID, "state": "cancelled"}

    del accepting.answers["task.follow"]
    accepting.answers["task.cancel"] = cancel
    error = failure(clawnet("run", "--json", "--timeout", "2s", "--", "sleep", "60"))
    assert (error["code"], error["task_id"]) == ("timed_out", TASK_ID)
    before = len(accepting.calls)
    assert clawnet("market", "wait", TASK_ID, "--timeout", "2s").returncode == 124
    assert [name for name, _ in accepting.calls[before:]] == ["task.get", "task.follow"]


def test_a_timeout_leaves_the_task_as_it_is_after_the_cancel(
    clawnet: Program, accepting: Script, tmp_path: Path
) -> None:
    def cancel(params: dict[str, Any]) -> dict[str, Any]:
        over = task(state="cancelled", result=None, price="0.25")
        # On a slow machine the time is over before the task is followed.
        accepting.answers["task.get"] = accepting.answers["task.follow"] = over
        accepting.release("task.follow", over)
        return {"task_id": TASK_ID, "state": "cancelled"}

    del accepting.answers["task.follow"]
    accepting.answers["task.cancel"] = cancel
    file = tmp_path / "status.json"
    done = clawnet("run", "--json", "--timeout", "3s", "--status-file", str(file), "--", "sleep", "60")
    assert failure(done)["code"] == "timed_out" and done.returncode == 124
    assert (json.loads(done.stdout)["state"], json.loads(done.stdout)["price"]) == ("cancelled", "0.25")
    assert json.loads(file.read_text()) == json.loads(done.stdout)


def test_a_cancel_that_does_not_end_is_waited_for_so_long_and_no_longer(
    clawnet: Program, accepting: Script, tmp_path: Path
) -> None:
    del accepting.answers["task.follow"]
    accepting.answers["task.get"] = task(state="executing", result=None)
    late, cut = tmp_path / "late.json", tmp_path / "cut.json"
    process = clawnet.start("run", "--json", "--status-file", str(cut), "--", "sleep", "60")
    accepting.wait_for("task.follow")
    process.send_signal(signal.SIGINT)
    done = clawnet("run", "--json", "--timeout", "2s", "--status-file", str(late), "--", "sleep", "60")
    assert done.returncode == 124 and json.loads(done.stdout) == json.loads(late.read_text())
    told = json.loads(late.read_text())
    assert (told["state"], told["error"]["code"], told["error"]["exit_code"]) == ("executing", "timed_out", 124)
    out_bytes, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and json.loads(out_bytes) == json.loads(cut.read_text())
    told = json.loads(cut.read_text())
    assert (told["state"], told["error"]["code"], told["error"]["exit_code"]) == ("executing", "interrupted", 130)


def test_a_second_interrupt_leaves_a_status_file_too(clawnet: Program, accepting: Script, tmp_path: Path) -> None:
    del accepting.answers["task.follow"]
    file = tmp_path / "status.json"
    process = clawnet.start("run", "--status-file", str(file), "--", "sleep", "60")
    accepting.wait_for("task.follow")
    process.send_signal(signal.SIGTERM)
    accepting.wait_for("task.cancel")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert (process.returncode, json.loads(file.read_text())["error"]["exit_code"]) == (143, 143)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_who_only_waits_leaves_the_task_running_and_says_how_it_stands(
    clawnet: Program, accepting: Script, tmp_path: Path, number: int, code: int
) -> None:
    del accepting.answers["task.follow"]
    accepting.answers["task.get"] = task(state="executing", result=None)
    file = tmp_path / "status.json"
    waits = ("market", "submit", "--type", "shell", "x", "--wait", "--status-file", str(file))
    for arguments in (waits, ("market", "wait", TASK_ID)):
        before = len(accepting.held.get("task.follow", []))
        process = clawnet.start(*arguments)
        with accepting.changed:
            assert accepting.changed.wait_for(
                lambda before=before: sum(name == "task.follow" for name, _ in accepting.calls) > before, 20
            )
        process.send_signal(number)
        process.communicate(timeout=60)
        assert process.returncode == code
    told = json.loads(file.read_text())
    assert (told["task_id"], told["state"], told["error"]["exit_code"]) == (TASK_ID, "executing", code)
    assert all(name != "task.cancel" for name, _ in accepting.calls)


def test_sigterm_ends_a_batch_with_its_summary_and_leaves_what_runs(
    clawnet: Program, accepting: Script, tmp_path: Path
) -> None:
    del accepting.answers["task.follow"]
    accepting.answers["task.check"] = lambda params: {"items": [None for _ in params["specs"]]}
    file = tmp_path / "tasks.jsonl"
    file.write_text("".join(json.dumps({"type": "shell", "script": f"sleep {n}"}) + "\n" for n in range(3)))
    process = clawnet.start("market", "batch", str(file), "-v", "--in-flight", "1")
    accepting.wait_for("task.follow")
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and b"0 done, 0 failed" in err and b"Traceback" not in err
    names = [name for name, _ in accepting.calls]
    assert (names.count("task.submit"), names.count("task.cancel")) == (1, 0)


def test_waiting_for_several_is_0_when_all_succeed(clawnet: Program, accepting: Script) -> None:
    assert clawnet("market", "wait", "aaaa", "bbbb").returncode == 0
    accepting.answers["task.follow"] = lambda params: task(result={"exit_code": 3 if params["task"] == "bbbb" else 0})
    done = clawnet("market", "wait", "aaaa", "bbbb", "--json")
    assert done.returncode == 1
    assert [item["result"]["exit_code"] for item in json.loads(done.stdout)["items"]] == [0, 3]
    assert clawnet("market", "wait", "bbbb").returncode == 3


def test_submit_prints_the_id_and_with_wait_the_result(clawnet: Program, accepting: Script) -> None:
    assert clawnet("market", "submit", "--type", "shell", "echo out").stdout == TASK_ID + "\n"
    assert json.loads(clawnet("market", "submit", "--type", "shell", "x", "--json").stdout)["created"] is True
    done = clawnet("market", "submit", "--type", "shell", "x", "--wait")
    assert (done.returncode, done.stdout, done.stderr) == (0, "out\n", "err\n")
    accepting.answers["task.follow"] = task(
        type="prompt",
        result={
            "text": "Paris.",
            "stdout": None,
            "stderr": None,
            "stdout_bytes": 0,
            "stderr_bytes": 0,
        },
    )
    assert clawnet("market", "submit", "capital of France?", "--wait").stdout == "Paris.\n"


def test_the_summary_is_talk(clawnet: Program, accepting: Script) -> None:
    done = clawnet("run", "-v", "--", "x")
    assert done.stdout == "out\n"
    assert "bob (member), 1.5 credits, 250 ms, exit code 0" in done.stderr


def test_a_named_peer_is_resolved_and_told(clawnet: Program, accepting: Script) -> None:
    accepting.answers["peer.show"] = {"peer_id": "12D3KooWBobsWholeId"}
    done = clawnet("run", "-v", "--peer", "bob", "--", "x")
    assert "--peer bob is 12D3KooWBobsWholeId" in done.stderr
    assert accepting.params("task.submit")["spec"]["peer"] == ["12D3KooWBobsWholeId"]


def test_a_daemon_that_goes_away_at_the_first_look_is_asked_once_more(clawnet: Program, accepting: Script) -> None:
    def look(params: dict[str, Any]) -> Any:
        asked = [name for name, _ in accepting.calls].count("task.get")
        return UnreachableError("the daemon begins again") if asked == 1 else task(state="settled")

    accepting.answers["task.get"] = look
    done = clawnet("market", "wait", TASK_ID)
    assert (done.returncode, done.stderr) == (0, "")
    accepting.answers["task.get"] = UnreachableError("the daemon begins again and again")
    assert clawnet("market", "wait", TASK_ID).returncode == 69
