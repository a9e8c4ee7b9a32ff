"""How a task that was waited for ended: its exit code, its error, a line about it, a status file."""

from __future__ import annotations

import base64
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clawnet import errors, paths
from clawnet.errors import ClawnetError, DataError, TimedOutError, UnreachableError

from .invocation import Invocation
from .render import clean, json_line, seconds, short, who, write

STREAMS = ("stdout", "stderr")
READ_BYTES = 512 * 1024
CANCEL_WAIT_S = 10.0
PRESENT_WAIT_S = 2.0
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


class Interrupted(KeyboardInterrupt):
    """A signal other than Ctrl-C that ends a command as Ctrl-C does; the exit code is 128 and its number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def number_of(error: KeyboardInterrupt) -> int:
    """Which signal it was."""
    return error.number if isinstance(error, Interrupted) else int(signal.SIGINT)


def interruption(number: int) -> dict[str, Any]:
    """The error that stands for an interruption in a status file."""
    return {"code": "interrupted", "message": "the command was interrupted", "hint": "", "exit_code": 128 + number}


def present(invocation: Invocation, task_id: str, why: dict[str, Any]) -> dict[str, Any] | None:
    """The task as it stands when this command leaves before it has ended, for the reason `why`; None: nobody answers.

    Asked over a connection of its own: the other one may have been left in the middle of a line.
    """
    try:
        with invocation.client(autostart=False) as client:
            task: dict[str, Any] = client.call("task.get", {"task": task_id}, timeout_s=PRESENT_WAIT_S)
    except (UnreachableError, TimedOutError):
        return None
    return task if task.get("error") or task.get("result") else {**task, "error": {**why, "task_id": task_id}}


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM ends what is inside as Ctrl-C does, with its own number; one that was ignored stays so."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise Interrupted(number)

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def status_file(invocation: Invocation, path: str | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A status file for whatever the end is: the task, or the error that kept it from having one.

    SIGTERM is such an end too. `invocation.leaving` writes it for a command that leaves without unwinding.
    """
    noted = False

    def note(value: dict[str, Any]) -> None:
        nonlocal noted
        noted = True
        if path:
            write_status(path, value)

    if path and not Path(path).absolute().parent.is_dir():
        raise DataError(f"cannot write the status file {path}: there is no such directory")
    invocation.leaving = note
    try:
        with terminable():
            yield note
    except ClawnetError as error:
        if not noted:
            note({"error": error.as_dict()})
        raise
    except KeyboardInterrupt as error:
        if not noted:
            note({"error": interruption(number_of(error))})
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
