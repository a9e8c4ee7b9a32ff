"""Following a task to its end: output as it comes, the result in full, one exit code, a status file, Ctrl-C."""

from __future__ import annotations

import base64
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clawnet import errors, rpc
from clawnet.api import Client
from clawnet.errors import ClawnetError, DataError, TimedOutError

from .invocation import Invocation
from .render import json_line, seconds, short, who, write, write_bytes

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


class Printer:
    """Writes a task's output once and in order, to the streams it belongs to, or as JSON lines."""

    def __init__(self, invocation: Invocation, client: Client, *, as_lines: bool = False) -> None:
        self._invocation = invocation
        self._client = client
        self._as_lines = as_lines
        self.done = dict.fromkeys(STREAMS, 0)

    def chunk(self, value: dict[str, Any]) -> None:
        """A piece of output; what was printed already is left out."""
        name = value["stream"]
        data = data_of(value, "data") or b""
        skip = self.done[name] - int(value["offset"])
        if skip < 0 or skip >= len(data):
            return
        self._put(name, data[skip:])

    def rest(self, task: dict[str, Any]) -> None:
        """What the stream did not bring: from the result, or read piece by piece when it is not inline."""
        result = task.get("result")
        if not result:
            return
        for name in STREAMS:
            whole = data_of(result, name)
            if whole is not None:
                self._put(name, whole[self.done[name] :])
                continue
            while self.done[name] < int(result.get(f"{name}_bytes") or 0):
                params = {"task": task["task_id"], "stream": name, "offset": self.done[name], "length": READ_BYTES}
                piece = self._client.call("task.read", params)
                data = base64.b64decode(piece["data_b64"])
                self._put(name, data)
                if piece["eof"] or not data:
                    break

    def _put(self, name: str, data: bytes) -> None:
        if not data:
            return
        self.done[name] += len(data)
        if not self._as_lines:
            write_bytes(data, error=name == "stderr")
            return
        try:
            write(json_line({"stream": name, "data": data.decode()}))
        except UnicodeDecodeError:
            write(json_line({"stream": name, "data_b64": base64.b64encode(data).decode()}))


def follow(
    client: Client,
    task_id: str,
    *,
    output: Callable[[dict[str, Any]], None] | None = None,
    state: Callable[[dict[str, Any]], None] | None = None,
    from_end: bool = False,
    deadline: float | None = None,
) -> dict[str, Any]:
    """Waits for a task's end and returns it; raises TimedOutError at the deadline (the task goes on)."""
    params = {"task": task_id, "output": output is not None, "from": "end" if from_end else "start"}
    call = client.send("task.follow", params)
    while True:
        try:
            event = client.receive(call, deadline=deadline)
        except TimedOutError as error:
            raise TimedOutError(
                f"task {short(task_id)} was not done in time; it goes on",
                hint=f"`clawnet market wait {short(task_id)}` waits on, `market cancel` ends it",
                task_id=task_id,
            ) from error
        if event.error is not None:
            raise event.error
        if event.method == rpc.OUTPUT and output is not None:
            output(event.value)
        elif event.method == rpc.STATE and state is not None:
            state(event.value)
        elif not event.method:
            task: dict[str, Any] = event.value
            return task


# --- Ctrl-C


class Interrupts:
    """What Ctrl-C (or SIGTERM) does while a task is run: cancel it; the second time, leave at once."""

    def __init__(self, invocation: Invocation, client: Client, task_id: str) -> None:
        self.signal = 0
        self._invocation = invocation
        self._client = client
        self._task_id = task_id

    def __call__(self, number: int, frame: Any) -> None:
        if self.signal:
            os._exit(128 + number)
        self.signal = number
        self._invocation.say("cancelling the task; once more leaves at once")
        self._client.send("task.cancel", {"task": self._task_id, "reason": "interrupted"})
        if hasattr(signal, "alarm"):
            # A node that does not answer the cancel must not hold the terminal.
            signal.signal(signal.SIGALRM, lambda *_: os._exit(128 + number))
            signal.alarm(int(CANCEL_WAIT_S))


@contextmanager
def interrupts(invocation: Invocation, client: Client, task_id: str) -> Iterator[Interrupts]:
    """Lets Ctrl-C and SIGTERM cancel the task while inside."""
    handler = Interrupts(invocation, client, task_id)
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield handler
    finally:
        for number, old in before.items():
            signal.signal(number, old)
        if hasattr(signal, "alarm"):
            signal.alarm(0)


# --- the end


def summary(invocation: Invocation, task: dict[str, Any]) -> None:
    """One line about who did it, for how much, in what time; for people only."""
    executor = who(task.get("executor")) or "nobody"
    price = task.get("price") or "0"
    result = task.get("result") or {}
    took = seconds(result.get("duration_s"))
    code = result.get("exit_code")
    ended = f"exit code {code}" if code is not None else task["state"].replace("_", " ")
    invocation.say(f"task {short(task['task_id'])}: {executor}, {price} credits, {took or 'no run'}, {ended}")


def write_status(path: str, value: dict[str, Any]) -> None:
    """Writes the status file so that whoever reads it finds the old content or the whole new one."""
    target = Path(path)
    draft = target.with_name(f".{target.name}.{os.getpid()}.new")
    try:
        draft.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        draft.replace(target)
    except OSError as error:
        draft.unlink(missing_ok=True)
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
