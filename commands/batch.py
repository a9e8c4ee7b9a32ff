"""`clawnet market batch`: a task a line, so many at a time; the same file again submits only what is not done."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from clawnet import errors, limits
from clawnet.api import Event
from clawnet.errors import (
    BusyError,
    ClawnetError,
    DataError,
    FundsError,
    StorageFullError,
    TimedOutError,
    UnreachableError,
    UsageError,
)

from . import accepting, approving, following, outputs, submission
from . import options as o
from .app import report
from .batch_lines import Keys, Line, Reader, Source
from .batch_view import View
from .invocation import Invocation, here
from .waiting import Interrupted, terminable

RESUME = "the same command goes on where this one stopped"
IDLE_S = 0.05
"""How soon a line that comes over a pipe is looked for while results are waited for."""

NAME = Annotated[
    str,
    typer.Option("--name", metavar="TEXT", help="Names this run: under another name the same lines are new tasks."),
]
IN_FLIGHT = Annotated[
    int,
    typer.Option("--in-flight", metavar="N", min=1, max=limits.BATCH_IN_FLIGHT_MAX, help="So many tasks at a time."),
]
KEEP_GOING = Annotated[bool, typer.Option("--keep-going", "-k", help="Go on after a line that is no good.")]
RETRY_FAILED = Annotated[
    bool, typer.Option("--retry-failed", help="Submit those again that had ended with another exit code than 0.")
]
FILE = Annotated[str, typer.Argument(metavar="FILE|-", help="Tasks as JSON lines.", show_default=False)]


def batch(
    context: typer.Context,
    file: FILE,
    in_flight: IN_FLIGHT = 16,
    keep_going: KEEP_GOING = False,
    retry_failed: RETRY_FAILED = False,
    name: NAME = "",
    type_: o.TYPE = None,
    op: o.OP = None,
    budget: o.BUDGET = None,
    deadline: o.DEADLINE = None,
    bid_timeout: o.BID_TIMEOUT = None,
    min_reputation: o.MIN_REPUTATION = None,
    require: o.REQUIRE = None,
    cpu: o.CPU = None,
    memory: o.MEMORY = None,
    gpu: o.GPU = None,
    model: o.MODEL = None,
    label: o.LABEL = None,
    os_family: o.OS = None,
    peer: o.PEER = None,
    exclude: o.EXCLUDE = None,
    ring: o.RING = None,
    prefer: o.PREFER = None,
    accept: o.ACCEPT = None,
    env: o.ENV = None,
    retries: o.RETRIES = None,
    priority: o.PRIORITY = None,
) -> None:
    """Submit many tasks, one JSON object a line as --spec takes it; results come as JSON lines as they end.

    Options are defaults for lines that do not say it themselves. Paths of inputs are relative to where you are, not to
    the file. A file is checked whole before anything is submitted (not with --keep-going, and not a pipe). The same
    file again prints what is done, waits for what runs and submits the rest: a line is known by its
    `idempotency_key`, else by its content.
    """
    invocation = here(context)
    defaults = submission.build(
        {},
        type=submission.task_type(type_) if type_ else None,
        op=op,
        budget_ucr=budget,
        deadline_s=deadline,
        bid_timeout_s=bid_timeout,
        min_reputation=min_reputation,
        require=require,
        cpu=cpu,
        memory_bytes=memory,
        gpu=gpu,
        model=model,
        labels=label,
        os=os_family,
        peer=peer,
        exclude=exclude,
        ring=ring,
        prefer=prefer,
        accept=accepting.conditions(accept or []),
        env=submission.environment(env or []),
        retries=retries,
        priority=priority,
    )
    source = Source(file, invocation.home)
    run = Batch(invocation, source, defaults, name, in_flight, keep_going=keep_going, retry_failed=retry_failed)
    try:
        code = run.all()
    finally:
        run.close()
        source.close()
    raise typer.Exit(code)


class Flight:
    """A line on its way: submitted when `task_id` is known, followed from then on, its files saved when `task` is."""

    __slots__ = ("derived", "files", "key", "number", "resumed", "sent", "spec", "task", "task_id")

    def __init__(self, number: int, spec: dict[str, Any], *, derived: bool) -> None:
        self.number = number
        self.files: Path | None = spec.pop("_files", None)
        self.task: dict[str, Any] | None = None
        self.spec = spec
        self.key: str = spec["idempotency_key"]
        self.derived = derived
        self.task_id = ""
        self.resumed = False
        self.sent = False


class Batch:
    """The run over one file. Nothing of it is kept but what is in flight: the node knows by the keys what is done."""

    def __init__(
        self,
        invocation: Invocation,
        source: Source,
        defaults: dict[str, Any],
        name: str,
        in_flight: int,
        *,
        keep_going: bool,
        retry_failed: bool,
    ) -> None:
        self._invocation = invocation
        self._source = source
        self._defaults = defaults
        self._in_flight = in_flight
        self._keep_going = keep_going
        self._retry_before_ms = int(time.time() * 1000) if retry_failed else 0
        self._client = invocation.client(create_home=True)
        self._keys = Keys(name)
        self._view = View(invocation)
        self._lines: Iterator[Line] | Reader = iter(())
        self._ended = False
        self._interrupted = False
        self._wrong: ClawnetError | None = None
        self._calls: dict[int, Flight] = {}
        self._again: deque[Flight] = deque()
        self._not_before = 0.0
        self._pause_s = limits.BATCH_AGAIN_MIN_S
        self._moved = time.monotonic()

    def close(self) -> None:
        """Gives back the terminal, the connection and the counts."""
        self._view.close()
        self._client.close()
        self._keys.close()

    # --- the whole of it

    def all(self) -> int:
        """Runs every line; returns the exit code. Raises what stopped it."""
        submission.resolve_peers(self._client, self._defaults, self._invocation.say)
        if self._source.regular:
            self._first_look()
            self._lines = self._source.lines(self._defaults)
        else:
            self._lines = Reader(self._source)
        self._view.open()
        try:
            with self._ctrl_c(), terminable():
                self._go()
        except Interrupted:  # whoever sends SIGTERM does not wait for tasks: they go on
            self._view.close()
            self._view.summary()
            raise
        self._view.close()
        self._view.summary()
        if self._wrong is not None:
            raise self._wrong
        if self._interrupted:
            raise KeyboardInterrupt
        return 65 if self._view.bad else int(self._view.failed > 0)

    def _go(self) -> None:
        while self._goes_on():
            try:
                self._fill()
                self._hear()
            except UnreachableError as error:
                if not following.is_loss(error):
                    raise
                self._reconnect(error)

    def _first_look(self) -> None:
        """Counts the lines; without --keep-going checks each, by the node's own rules, before any is submitted."""
        if self._keep_going:
            if self._view.wanted:
                self._view.total = sum(1 for _ in self._source.raw())
                self._source.rewind()
            return
        bad: list[Line] = []
        together: list[Line] = []
        size = 0
        for line in self._source.lines(self._defaults):
            self._view.total = (self._view.total or 0) + 1
            if line.error is not None:
                bad.append(line)
            else:
                size += len(line.spec.pop("_content"))
                line.spec.pop("_files", None)
                together.append(line)
            if len(together) >= limits.BATCH_CHECKED_TOGETHER or size > limits.BATCH_LINE_BYTES_MAX:
                bad += self._checked(together)
                together, size = [], 0
            if len(bad) >= limits.BATCH_BAD_LINES_SHOWN:
                break
        bad += self._checked(together)
        if bad:
            for line in sorted(bad, key=lambda line: line.number)[: limits.BATCH_BAD_LINES_SHOWN]:
                assert line.error is not None
                report(self._placed(line.number, line.error), as_json=self._invocation.json)
            raise DataError(
                f"{self._source.name} has lines that are no good; nothing was submitted",
                hint="mend them, or let --keep-going do the others",
            )
        self._source.rewind()

    def _checked(self, lines: list[Line]) -> list[Line]:
        """Those of some lines that the node would not take."""
        if not lines:
            return []
        found = self._client.call("task.check", {"specs": [line.spec for line in lines]})["items"]
        return [
            Line(line.number, {}, errors.from_dict(error))
            for line, error in zip(lines, found, strict=True)
            if error is not None
        ]

    def _placed(self, number: int, error: ClawnetError) -> ClawnetError:
        """The same error with the file and line it is about. What stands in a line is data, not usage."""
        if isinstance(error, UsageError):
            error = DataError(error.message, hint=error.hint, **error.details)
        told = {**error.as_dict(), "message": f"{self._source.name}, line {number}: {error.message}", "line": number}
        return errors.from_dict(told)

    # --- submitting

    def _goes_on(self) -> bool:
        if self._stopping:
            self._again = deque(flight for flight in self._again if flight.sent)
        return bool(self._calls or self._again or not (self._ended or self._stopping))

    @property
    def _stopping(self) -> bool:
        return self._interrupted or self._wrong is not None

    def _fill(self) -> None:
        """Submits lines while there is room."""
        while len(self._calls) < self._in_flight and time.monotonic() >= self._not_before:
            if self._again:
                self._send(self._again.popleft())
                continue
            line = None if self._stopping or self._ended else self._next()
            if line is None:
                return
            if line.error is not None:
                self._refused(line.number, None, line.error)
                continue
            derived = self._keys.give(line.spec)
            self._send(Flight(line.number, line.spec, derived=derived))

    def _next(self) -> Line | None:
        if isinstance(self._lines, Reader):
            line = self._lines.take(self._defaults, 0 if self._calls else IDLE_S)
            self._ended = self._lines.ended
        else:
            line = next(self._lines, None)
            self._ended = line is None
        return line

    def _send(self, flight: Flight) -> None:
        flight.sent = True
        try:
            if flight.task is not None and flight.files is not None:
                call = self._client.send("task.save", outputs.wish(flight.task_id, flight.files))
            elif flight.task_id:
                call = self._client.send("task.follow", {"task": flight.task_id, "output": False, "from": "end"})
            else:
                params = {"spec": flight.spec, "retry_failed_before_ms": self._retry_before_ms}
                call = self._client.send("task.submit", params)
        except UnreachableError:
            self._again.append(flight)
            raise
        except DataError as error:
            # Only here is it seen that a line is too long for one call, or no Unicode.
            self._refused(flight.number, flight.key, error)
            return
        self._calls[call] = flight

    # --- what comes back

    def _hear(self) -> None:
        """Waits for one event, but no longer than until a line may be submitted again."""
        now = time.monotonic()
        last = self._invocation.deadline()
        until = [] if last is None else [last]
        if self._again and len(self._calls) < self._in_flight:
            until.append(max(self._not_before, now))
        if isinstance(self._lines, Reader) and len(self._calls) < self._in_flight and not self._ended:
            until.append(now + IDLE_S)
        if not self._calls:
            if self._again:
                time.sleep(max(0.0, self._not_before - now))
        else:
            with suppress(TimedOutError):
                self._take(self._client.receive(deadline=min(until, default=None)))
        if last is not None and time.monotonic() >= last:
            raise TimedOutError("the batch was not done in time; submitted tasks go on", hint=RESUME)

    def _take(self, event: Event) -> None:
        if event.method or event.call not in self._calls:
            return
        flight = self._calls.pop(event.call)
        if isinstance(event.error, UnreachableError) and not isinstance(event.error, BusyError):
            # The daemon stops: what it had is asked for again from the next.
            self._again.append(flight)
            raise event.error
        if flight.task is not None:
            self._saved(flight, event)
        elif event.error is not None:
            self._failed(flight, event.error)
        elif flight.task_id:
            self._moved_on()
            if flight.files is not None and event.value.get("result") and not event.value.get("error"):
                flight.task = event.value
                self._send(flight)
                return
            self._view.done(flight.number, flight.key, event.value, resumed=flight.resumed)
        else:
            self._moved_on()
            flight.task_id, flight.resumed = event.value["task_id"], not event.value["created"]
            flight.spec = {}
            if event.value.get("held"):
                self._view.above(lambda: approving.tell(self._invocation, event.value))
            self._send(flight)

    def _saved(self, flight: Flight, event: Event) -> None:
        """The files of a task that has ended are in their directory, or cannot be: then the line has failed."""
        assert flight.task is not None
        task, error = flight.task, event.error
        if error is None:
            self._view.above(lambda: outputs.tell(self._invocation, task, event.value))
        else:
            error = self._placed(flight.number, error)
        self._view.done(flight.number, flight.key, task, resumed=flight.resumed, error=error)

    def _moved_on(self) -> None:
        self._moved, self._pause_s = time.monotonic(), limits.BATCH_AGAIN_MIN_S

    def _failed(self, flight: Flight, error: ClawnetError) -> None:
        """A call was answered with an error: the line waits, stands for a task already there, or is no good."""
        full = isinstance(error, (BusyError, StorageFullError)) or (isinstance(error, FundsError) and self._calls)
        if full and (self._calls or time.monotonic() < self._moved + limits.BATCH_STUCK_S):
            flight.sent = bool(flight.task_id)
            self._again.append(flight)
            self._not_before = time.monotonic() + self._pause_s
            self._pause_s = min(2 * self._pause_s, limits.BATCH_AGAIN_MAX_S)
        elif flight.derived and not flight.task_id and isinstance(error, DataError) and error.details.get("task_id"):
            if flight.spec.get("inputs"):
                hint = "its inputs (or the options) have changed since it was done; --name makes a new run of all lines"
                self._refused(flight.number, flight.key, DataError(error.message, hint=hint))
                return
            # The line is done, or under way, with other options: it is not done twice.
            flight.task_id, flight.resumed = str(error.details["task_id"]), True
            self._send(flight)
        else:
            self._refused(flight.number, flight.key, error)

    def _refused(self, number: int, key: str | None, error: ClawnetError) -> None:
        """A line that has no task: reported; without --keep-going nothing more is submitted."""
        placed = self._placed(number, error)
        self._view.refused(number, key, placed)
        if self._keep_going:
            self._view.above(lambda: report(placed, as_json=self._invocation.json))
        elif self._wrong is None:
            self._wrong = placed

    # --- interruptions

    def _reconnect(self, error: UnreachableError) -> None:
        """The daemon is gone: waits until one is back, then asks for everything that was in flight again."""
        self._again.extend(self._calls.values())
        self._calls.clear()
        until = time.monotonic() + limits.BATCH_STUCK_S
        last = self._invocation.deadline()
        until = until if last is None else min(until, last)
        patience = following.Patience(self._client, deadline=until, ends_at=None, say=self._say)
        try:
            patience.again(error)
        except (UnreachableError, TimedOutError) as gone:
            told = gone if until == last else error  # the command's own time is over, or its patience
            raise type(told)(f"{told.message}; submitted tasks are kept", hint=RESUME) from gone

    def _say(self, text: str) -> None:
        self._view.above(lambda: self._invocation.say(text))

    @contextmanager
    def _ctrl_c(self) -> Iterator[None]:
        """The first Ctrl-C submits nothing more and waits for what is in flight; the second leaves at once."""

        def stop(number: int, frame: Any) -> None:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
            if sys.stderr is not None and not self._invocation.quiet:
                text = f"clawnet: waiting for {len(self._calls)} tasks; once more leaves them running; {RESUME}\n"
                os.write(sys.stderr.fileno(), text.encode())

        before = signal.getsignal(signal.SIGINT)
        if before is signal.SIG_IGN:  # a shell's job in the background
            yield
            return
        signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
