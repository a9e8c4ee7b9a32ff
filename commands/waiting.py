"""How a task that was waited for ended: its exit code, its error, a line about it, a status file."""

from __future__ import annotations

import base64
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clawnet import errors, paths
from clawnet.errors import ClawnetError, DataError

from .invocation import Invocation
from .render import clean, json_line, seconds, short, who, write

STREAMS = ("stdout", "stderr")
READ_BYTES = 512 * 1024
CANCEL_WAIT_S = 10.0
BY_STATE = {
    "no_bids": ("no_bids", 75),
    "cancelled": ("cancelled", 81),
    "timed_out": ("timed_out", 124),
    "failed": ("executor_lost", 76),
    "refunded": ("verification_failed", 80),
}


def exit_code(task: dict[str, Any]) -> int:
    """What a waiting command exits with: the error's code, else the command's own, 128+N for a signal."""
    error, result = task.get("error"), task.get("result")
    if error:
        return int(error.get("exit_code") or BY_STATE.get(task["state"], ("", 70))[1])
    if result:
        if result.get("signal"):
            return 128 + int(result["signal"])
        return int(result.get("exit_code") or 0)
    return BY_STATE.get(task["state"], ("", 0))[1]


def task_error(task: dict[str, Any]) -> ClawnetError | None:
    """The task's error as an exception, for the line on stderr."""
    error = task.get("error")
    if not error:
        if task.get("result") or task["state"] not in BY_STATE:
            return None
        code = BY_STATE[task["state"]][0]
        error = {"code": code, "message": f"task {short(task['task_id'])} is {task['state'].replace('_', ' ')}"}
    return errors.from_dict({**error, "task_id": task["task_id"]})


def data_of(value: dict[str, Any], name: str) -> bytes | None:
    """Bytes of a field that is text, or base64 under NAME_b64; None when it is not inline."""
    if value.get(f"{name}_b64") is not None:
        return base64.b64decode(value[f"{name}_b64"])
    text = value.get(name)
    return text.encode() if isinstance(text, str) else None


# --- the end


def summary(invocation: Invocation, task: dict[str, Any]) -> None:
    """One line about who did it, for how much, in what time; for people only."""
    executor = who(task.get("executor")) or "nobody"
    price = task.get("price") or "0"
    result = task.get("result") or {}
    took = seconds(result.get("duration_s"))
    code = result.get("exit_code")
    ended = f"exit code {code}" if code is not None else task["state"].replace("_", " ")
    usage = result.get("usage") or {}
    if "tokens_out" in usage:
        model = clean(usage["model"]) or "no model named"
        ended = f"{usage['tokens_in']} tokens in and {usage['tokens_out']} out, {model}"
        if usage.get("finish_reason") == "length":
            ended += "; the answer was cut: it had reached the most tokens that the executor allows"
    invocation.say(f"task {short(task['task_id'])}: {executor}, {price} credits, {took or 'no run'}, {ended}")


def write_status(path: str, value: dict[str, Any]) -> None:
    """Writes the status file so that whoever reads it finds the old content or the whole new one."""
    try:
        with paths.whole(Path(path), mode=0o666) as file:
            file.write(json.dumps(value, ensure_ascii=False, indent=2).encode() + b"\n")
    except OSError as error:
        raise DataError(f"cannot write the status file {path}: {error.strerror}") from error


@contextmanager
def status_file(path: str | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A status file for whatever the end is: the task, or the error that kept it from having one."""
    if not path:
        yield lambda value: None
        return
    if not Path(path).absolute().parent.is_dir():
        raise DataError(f"cannot write the status file {path}: there is no such directory")
    try:
        yield lambda value: write_status(path, value)
    except ClawnetError as error:
        write_status(path, {"error": error.as_dict()})
        raise
    except KeyboardInterrupt:
        left = {"code": "interrupted", "message": "the command was interrupted", "hint": "", "exit_code": 130}
        write_status(path, {"error": left})
        raise


def pause_until(deadline: float | None, most_s: float) -> float:
    """The nearer of a deadline and `most_s` from now, in monotonic seconds."""
    limit = time.monotonic() + most_s
    return limit if deadline is None else min(limit, deadline)


def finish(invocation: Invocation, task: dict[str, Any], *, lines_before: bool = False) -> int:
    """Says how it ended and returns the exit code; with --json prints the task."""
    from .app import report

    if invocation.json:
        write(json_line(task))
    else:
        summary(invocation, task)
    error = task_error(task)
    if error is not None:
        report(error, as_json=invocation.json)
    if sys.stdout is not None:
        sys.stdout.flush()
    return exit_code(task)
