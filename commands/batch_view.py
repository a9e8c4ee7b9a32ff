"""What a batch shows: a JSON line for each line that ended on stdout, a progress bar and a summary on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from clawnet.errors import ClawnetError

from . import waiting
from .invocation import Invocation
from .render import json_line, on_terminal, write

if TYPE_CHECKING:
    from rich.progress import Progress


class View:
    """The counts of a batch and where they are shown."""

    def __init__(self, invocation: Invocation) -> None:
        self.total: int | None = None
        self.ended = 0
        self.failed = 0
        self.resumed = 0
        self.bad = 0
        self.wanted = not invocation.quiet and sys.stderr is not None and sys.stderr.isatty()
        self._invocation = invocation
        self._bar: Progress | None = None
        self._began = time.monotonic()

    def open(self) -> None:
        """Shows the bar where stderr is a terminal."""
        self._began = time.monotonic()
        if not self.wanted:
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[failed]} failed"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            redirect_stdout=False,
            redirect_stderr=False,
            transient=True,
        )
        self._bar.add_task("", total=self.total, failed=0)
        self._bar.start()

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def above(self, print_it: Callable[[], Any]) -> None:
        """Prints something on the terminal that the bar is on, above it."""
        if self._bar is None:
            print_it()
            return
        self._bar.stop()
        print_it()
        self._bar.start()

    def done(
        self, number: int, key: str, task: dict[str, Any], *, resumed: bool, error: ClawnetError | None = None
    ) -> None:
        """A task has ended (or its executor was lost and it may still end); `error` kept its files from being saved."""
        code = waiting.exit_code(task) or (error.exit_code if error is not None else 0)
        self.failed += code != 0
        self.resumed += resumed
        value = {"line": number, "idempotency_key": key, "resumed": resumed, "exit_code": code, "task": task}
        self._line({**value, "error": None if error is None else _told(error)})

    def refused(self, number: int, key: str | None, error: ClawnetError) -> None:
        """A line has no task: it is no good (64 to 66), or the node would not take it now."""
        if 64 <= error.exit_code <= 66:
            self.bad += 1
        else:
            self.failed += 1
        value = {"line": number, "idempotency_key": key, "resumed": False, "exit_code": error.exit_code, "task": None}
        self._line({**value, "error": _told(error)})

    def _line(self, value: dict[str, Any]) -> None:
        self.ended += 1
        value.setdefault("error", None)
        text = json_line(value)
        if self._bar is None:
            write(text)
            return
        if on_terminal():
            self.above(lambda: write(text))
        else:
            write(text)
        self._bar.update(self._bar.task_ids[0], completed=self.ended, failed=self.failed + self.bad)

    def summary(self) -> None:
        """One line about the whole, for people."""
        took_s = time.monotonic() - self._began
        parts = [f"{self.ended - self.failed - self.bad} done", f"{self.failed} failed"]
        parts += [f"{self.bad} bad lines"] if self.bad else []
        parts += [f"{self.resumed} of them from before"] if self.resumed else []
        rate = f" ({self.ended / took_s:.0f} a second)" if took_s > 0 and self.ended > 1 else ""
        self._invocation.say(f"{', '.join(parts)}; {took_s:.1f} s{rate}")


def _told(error: ClawnetError) -> dict[str, Any]:
    return {"code": error.code, "message": error.message, "hint": error.hint, "exit_code": error.exit_code}
