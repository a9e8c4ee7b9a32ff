"""How far a long transfer is: one line on the terminal that stderr is, taken away when it is over."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .invocation import Invocation

if TYPE_CHECKING:
    from rich.progress import Progress


class Bar:
    """Shows itself at the first news, and only where a person reads stderr. `wanted` tells whether it would."""

    def __init__(self, invocation: Invocation) -> None:
        self.wanted = not invocation.quiet and not invocation.json and sys.stderr is not None and sys.stderr.isatty()
        self._shown: Progress | None = None
        self._what = ""

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def moved(self, value: dict[str, Any]) -> None:
        """News: {"what", "done", "total"}, bytes; total 0 when it is not known."""
        if not self.wanted:
            return
        if self._shown is None or self._what != value["what"]:
            self.close()
            self._open(value["what"], value["total"] or None)
        assert self._shown is not None
        self._shown.update(self._shown.task_ids[0], completed=value["done"], total=value["total"] or None)

    def _open(self, what: str, total: int | None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        self._what = what
        self._shown = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TransferSpeedColumn(),
            console=Console(stderr=True),
            redirect_stdout=False,
            redirect_stderr=False,
            transient=True,
        )
        self._shown.add_task(what, total=total)
        self._shown.start()

    def close(self) -> None:
        """Takes it away: something else is to be written."""
        if self._shown is not None:
            self._shown.stop()
            self._shown = None
