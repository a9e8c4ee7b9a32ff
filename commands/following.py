"""Following a task to its end over the lives of daemons: each byte of its output once, in order, on its own stream."""

from __future__ import annotations

import base64
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from clawnet import limits, rpc
from clawnet.api import Client
from clawnet.errors import ClawnetError, NoDaemonError, StoppedError, TimedOutError, UnreachableError

from .invocation import Invocation
from .progress_bar import Bar
from .render import json_line, short, write, write_bytes
from .waiting import READ_BYTES, STREAMS, data_of, interruption, present

CANCEL_WAIT_S = 10.0
PAUSE_MIN_S = 0.05
PAUSE_MAX_S = 1.0
Say = Callable[[str], None]


class Printer:
    """Writes a task's output once and in order, to the streams it belongs to, or as JSON lines.

    It knows how far it is, in which attempt: a connection that is made anew goes on there. With `from_end` it begins
    where the output was when the daemon first told.
    """

    def __init__(
        self, invocation: Invocation, client: Client, *, as_lines: bool = False, from_end: bool = False
    ) -> None:
        self._invocation = invocation
        self._client = client
        self._as_lines = as_lines
        self._placed = not from_end
        self._attempt = -1
        self.done = dict.fromkeys(STREAMS, 0)

    def start(self) -> dict[str, Any]:
        """Where the daemon is to begin, as params of task.follow."""
        if not self._placed:
            return {"from": "end"}
        return {"from": "start", **self.done, **({"attempt": self._attempt} if self._attempt >= 0 else {})}

    def place(self, value: dict[str, Any]) -> None:
        """Where the output goes on; when that is in another attempt, whoever reads it must know."""
        if value["again"]:
            self._invocation.warn(f"attempt {value['attempt'] + 1}: the output starts again from its beginning")
            if self._as_lines:
                write(json_line({"attempt": value["attempt"], "again": True}))
        self._attempt, self._placed = value["attempt"], True
        self.done = {name: value[name] for name in STREAMS}

    def chunk(self, value: dict[str, Any]) -> None:
        """A piece of output; what was printed already is left out."""
        self._attempt = value.get("attempt", self._attempt)
        name = value["stream"]
        data = data_of(value, "data") or b""
        skip = self.done[name] - int(value["offset"])
        if skip < 0 or skip >= len(data):
            return
        self._put(name, data[skip:])

    def rest(self, task: dict[str, Any], patience: Patience | None = None) -> None:
        """What the stream did not bring: from the result, or read piece by piece when it is not inline."""
        result = task.get("result")
        if not result or not self._placed:
            return
        for name in STREAMS:
            whole = data_of(result, name)
            if whole is not None:
                self._put(name, whole[self.done[name] :])
                continue
            while self.done[name] < int(result.get(f"{name}_bytes") or 0):
                params = {"task": task["task_id"], "stream": name, "offset": self.done[name], "length": READ_BYTES}
                try:
                    piece = self._client.call("task.read", params)
                except UnreachableError as error:
                    if patience is None or not is_loss(error):
                        raise
                    patience.again(error)
                    continue
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


# --- connecting again


class Patience:
    """How long a command waits for a daemon that went away: to its own deadline, else to the task's.

    `deadline` is in monotonic seconds, `ends_at` the task's deadline as the node tells it. With neither, not at all.
    """

    def __init__(self, client: Client, *, deadline: float | None, ends_at: str | None, say: Say) -> None:
        self.deadline = deadline
        self._client = client
        self._ends_at = ends_at
        self._say = say

    def again(self, error: UnreachableError) -> None:
        """Connects again after `error`; raises it when there is no daemon by the task's deadline.

        At the command's own deadline it is a TimedOutError.

        One that was stopped on purpose is not started again by those who wait: they wait until somebody does.
        """
        client = self._client
        client.close()
        until = self._until(error)
        stopped = isinstance(error, StoppedError)
        self._say(
            "the daemon was stopped; this waits until it runs again, and the task goes on then"
            if stopped
            else "the connection to the daemon was lost; connecting again"
        )
        pause_s = PAUSE_MIN_S
        while True:
            if time.monotonic() + pause_s >= until:
                if self.deadline is None:
                    raise error
                raise TimedOutError("no daemon answered in time", hint="tasks that it had accepted are kept") from error
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, PAUSE_MAX_S)
            try:
                client.connect(start=not stopped)
                return
            except (NoDaemonError, TimedOutError) as still:
                error = still if isinstance(still, NoDaemonError) else error

    def _until(self, error: UnreachableError) -> float:
        if self.deadline is not None:
            return self.deadline
        if not self._ends_at:
            raise error
        from datetime import UTC, datetime

        left_s = (datetime.fromisoformat(self._ends_at) - datetime.now(UTC)).total_seconds()
        return time.monotonic() + max(0.0, left_s)


def first_look(client: Client, names: list[str]) -> list[dict[str, Any]]:
    """The tasks as they stand. A daemon that goes away just then is asked once more, started where that is allowed."""
    try:
        return [client.call("task.get", {"task": name}) for name in names]
    except UnreachableError as error:
        if not is_loss(error) or isinstance(error, StoppedError):
            raise
        client.close()
        client.connect()
        return [client.call("task.get", {"task": name}) for name in names]


def is_loss(error: ClawnetError) -> bool:
    """Whether asking again may help: nobody answers, or the daemon stops, begins again, or has too much to do."""
    return isinstance(error, UnreachableError) and "rpc_version" not in error.details


def submit(
    client: Client,
    spec: dict[str, Any],
    *,
    awaited: bool,
    deadline: float | None,
    say: Say,
    bar: Bar | None = None,
) -> dict[str, Any]:
    """Hands a task to the daemon. With an idempotency key a lost answer is asked for again: it is one task anyhow.

    `awaited`: this command stays until the end, so the daemon need not sync the task to its disk before it answers.
    While it reads the inputs it is waited for, however long they are.
    """
    client.connect()
    limit = time.monotonic() + limits.RPC_CALL_TIMEOUT_S if deadline is None else deadline
    patience = Patience(client, deadline=limit, ends_at=None, say=say)
    while True:
        try:
            return _accepted(client, {"spec": spec, "awaited": awaited}, deadline, bar)
        except (NoDaemonError, StoppedError) as error:
            if not spec.get("idempotency_key"):
                raise
            patience.again(error)


def _accepted(client: Client, params: dict[str, Any], deadline: float | None, bar: Bar | None) -> dict[str, Any]:
    call = client.send("task.submit", {**params, "progress": bool(params["spec"].get("inputs"))})
    try:
        while True:
            patient = time.monotonic() + limits.RPC_CALL_TIMEOUT_S
            event = client.receive(call, deadline=patient if deadline is None else deadline)
            if event.error is not None:
                raise event.error
            if not event.method:
                accepted: dict[str, Any] = event.value
                return accepted
            if bar is not None and event.method == rpc.PROGRESS:
                bar.moved(event.value)
    finally:
        if bar is not None:
            bar.close()


def follow(
    client: Client,
    task_id: str,
    *,
    printer: Printer | None = None,
    bar: Bar | None = None,
    so_far: bool = False,
    patience: Patience | None = None,
    deadline: float | None = None,
    connected: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Waits for a task's end and returns it; raises TimedOutError at the deadline (the task goes on).

    A daemon that went away is waited for as `patience` has it; `connected` is called when it is back. With `so_far` it
    ends when what was written up to now is printed.
    """
    deadline = patience.deadline if patience is not None else deadline
    while True:
        try:
            return _once(client, task_id, printer, so_far, deadline, bar)
        except UnreachableError as error:
            if patience is None or not is_loss(error):
                raise
            patience.again(error)
            connected()


def _once(
    client: Client, task_id: str, printer: Printer | None, so_far: bool, deadline: float | None, bar: Bar | None
) -> dict[str, Any]:
    start = {"from": "end"} if printer is None else printer.start()
    params = {"task": task_id, "output": printer is not None, **start, **({"so_far": True} if so_far else {})}
    call = client.send("task.follow", {**params, "progress": True} if bar is not None and bar.wanted else params)
    try:
        return _followed(client, call, task_id, printer, deadline, bar)
    finally:
        if bar is not None:
            bar.close()


def _followed(
    client: Client, call: int, task_id: str, printer: Printer | None, deadline: float | None, bar: Bar | None
) -> dict[str, Any]:
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
        if not event.method:
            task: dict[str, Any] = event.value
            return task
        if bar is not None and event.method == rpc.PROGRESS:
            bar.moved(event.value)
        elif bar is not None and event.method == rpc.OUTPUT:
            bar.close()
        if printer is not None and event.method == rpc.OUTPUT:
            printer.chunk(event.value)
        elif printer is not None and event.method == rpc.PLACE:
            printer.place(event.value)


def follow_all(
    client: Client, tasks: list[dict[str, Any]], *, patience: Patience, deadline: float | None
) -> list[dict[str, Any]]:
    """Waits until all of these tasks have ended and returns them in the same order."""
    ended: dict[str, dict[str, Any]] = {}
    names = [task["task_id"] for task in tasks]
    while len(ended) < len(set(names)):
        try:
            left = [name for name in dict.fromkeys(names) if name not in ended]
            calls = {client.send("task.follow", {"task": name, "output": False, "from": "end"}): name for name in left}
            while calls:
                event = client.receive(deadline=deadline)
                if event.error is not None:
                    raise event.error
                if not event.method:
                    ended[calls.pop(event.call)] = event.value
        except TimedOutError as error:
            names_left = ", ".join(short(name) for name in left if name not in ended)
            raise TimedOutError(f"not done in time: {names_left}", hint="the tasks go on") from error
        except UnreachableError as error:
            if not is_loss(error):
                raise
            patience.again(error)
    return [ended[name] for name in names]


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
            self._leave(number, None)
        self.signal = number
        if hasattr(signal, "alarm"):
            # A node that does not answer the cancel must not hold the terminal.
            signal.signal(signal.SIGALRM, self._too_late)
            signal.alarm(int(CANCEL_WAIT_S))
        if self._client.connected:
            self._invocation.say("cancelling the task; once more leaves at once")
            self.cancel()
        else:
            name = short(self._task_id)
            self._invocation.say(f"no daemon answers; `clawnet market cancel {name}` cancels the task when one does")

    def _too_late(self, *_: Any) -> None:
        self._leave(self.signal, present(self._invocation, self._task_id, interruption(self.signal)))

    def _leave(self, number: int, task: dict[str, Any] | None) -> NoReturn:
        """Ends the process with nothing unwound, which may wait for a reader: only the status file is written."""
        try:
            self._invocation.leaving(task or {"error": {**interruption(number), "task_id": self._task_id}})
            if task is not None and self._invocation.json:
                os.write(1, json_line(task).encode())
        finally:
            os._exit(128 + number)

    def cancel(self) -> None:
        """Asks the daemon to cancel; a daemon that is gone is asked when it is back."""
        try:
            self._client.send("task.cancel", {"task": self._task_id, "reason": "interrupted"})
        except NoDaemonError:
            return

    def connected(self) -> None:
        """There is a daemon again: what it was asked before may have been lost with the other one."""
        if self.signal:
            self.cancel()


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
