"""The security log: one JSON line an event, repeats of one author and floods of many summed up once a minute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Protocol

# A peer that forges signatures all day must not be able to fill the disk with the proof of it,
LINES_A_MINUTE: Final = 600
# nor to hide what others do: of the same event by the same author this many lines stand for all.
LINES_OF_ONE_A_MINUTE: Final = 32

_AUTHOR: Final = ("peer", "address", "account")


class Sink(Protocol):
    """Where lines go; writing never raises."""

    def write(self, line: str) -> bool: ...


class SecurityLog:
    """Writes to `sink` what `render(at, event, fields)` makes of an event; times are seconds."""

    def __init__(self, sink: Sink, render: Callable[[float, str, dict[str, Any]], str]) -> None:
        self._sink = sink
        self._render = render
        self._minute = 0
        self._lines = 0
        self._left_out = 0
        self._seen: dict[tuple[str, str, str], int] = {}

    def write(self, at: float, event: str, fields: dict[str, Any]) -> None:
        """One event; a line, unless it is one too many of its kind in this minute."""
        minute = int(at) // 60
        if minute != self._minute:
            self.sum_up(at)
            self._minute = minute
        key = (event, *_author(fields))
        count = self._seen.get(key, 0) + 1
        if count > 1 or self._lines < LINES_A_MINUTE:
            self._seen[key] = count
        if count > LINES_OF_ONE_A_MINUTE:
            return
        if self._lines >= LINES_A_MINUTE:
            self._left_out += 1
            return
        self._lines += 1
        self._sink.write(self._render(at, event, fields))

    def sum_up(self, at: float) -> None:
        """Tells how many lines were left out since the last time."""
        seen, self._seen = self._seen, {}
        for (event, name, author), count in seen.items():
            if count > LINES_OF_ONE_A_MINUTE:
                whose = {name: author} if name else {}
                told = {"of": event, **whose, "lines": count - LINES_OF_ONE_A_MINUTE}
                self._sink.write(self._render(at, "security.repeated", told))
        if self._left_out:
            self._sink.write(self._render(at, "security.suppressed", {"lines": self._left_out}))
        self._lines = self._left_out = 0


def _author(fields: dict[str, Any]) -> tuple[str, str]:
    """The field that says who did it, and its value."""
    for name in _AUTHOR:
        if fields.get(name):
            return name, str(fields[name])
    return "", ""
