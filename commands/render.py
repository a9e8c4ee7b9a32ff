"""Answers on stdout: one JSON object, what a person reads at a terminal, or bare values and tab-separated rows."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from clawnet.errors import StorageError, StorageFullError

from .invocation import Invocation

Column = tuple[str, Callable[[Any], Any]]
ID_CHARS = 8


def write(text: str) -> None:
    """Writes to stdout; BrokenPipeError when it is closed, or nobody reads it any longer."""
    with to_stdout() as stream:
        stream.write(text)


def write_bytes(data: bytes, *, error: bool = False) -> None:
    """Writes bytes as they are, to stdout or stderr; a stderr that is closed takes nothing."""
    if not error:
        with to_stdout() as stream:
            stream.buffer.write(data)
    elif sys.stderr is not None:
        sys.stderr.buffer.write(data)
        sys.stderr.buffer.flush()


@contextmanager
def to_stdout() -> Iterator[TextIO]:
    """The stream, flushed at the end. What it cannot take, for its disk is full, is an error like that of any file."""
    if sys.stdout is None:
        raise BrokenPipeError
    try:
        yield sys.stdout
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        kind = StorageFullError if error.errno in (errno.ENOSPC, errno.EDQUOT) else StorageError
        raise kind(f"cannot write to standard output: {error.strerror}") from error


def on_terminal() -> bool:
    """Whether a person reads stdout."""
    return sys.stdout is not None and sys.stdout.isatty()


def json_line(value: Any) -> str:
    """One line of JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(", ", ": ")) + "\n"


def clean(value: Any) -> str:
    """Text that cannot drive a terminal or break a row: names and reasons come from other people's machines."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = str(value)
    return text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)


def clean_lines(text: str) -> str:
    """Text of several lines that cannot drive a terminal: line ends and tabs stay, other control characters do not."""
    return "\n".join("\t".join(clean(cell) for cell in line.split("\t")) for line in text.split("\n"))


def short(identifier: str | None) -> str:
    """The start of an id, for people; any unambiguous prefix is accepted back."""
    if not identifier:
        return ""
    # Peer ids all begin with 12D3KooW: their ends tell them apart, but prefixes are what commands accept.
    return identifier[: len("12D3KooW") + ID_CHARS] if identifier.startswith("12D3KooW") else identifier[:ID_CHARS]


def show(invocation: Invocation, value: Any, *, bare: Any, lines: Iterable[tuple[str, Any]] = ()) -> None:
    """One answer: JSON, or labelled lines at a terminal, or the bare value (one line, tabs between several)."""
    if invocation.json:
        write(json_line(value))
        return
    rows = [(label, clean(text)) for label, text in lines] if on_terminal() else []
    if rows:
        width = max(len(label) for label, _ in rows)
        write("".join(f"{label:<{width}}  {text}\n" for label, text in rows if text))
    else:
        parts = bare if isinstance(bare, (list, tuple)) else [bare]
        write("\t".join(clean(part) for part in parts) + "\n")


def pairs(invocation: Invocation, value: Any, rows: Iterable[tuple[str, Any]]) -> None:
    """One answer with many facts: JSON, labelled lines at a terminal, or name and value with a tab between."""
    if invocation.json:
        write(json_line(value))
        return
    cleaned = [(label, clean(text)) for label, text in rows]
    if on_terminal():
        width = max((len(label) for label, text in cleaned if text), default=0)
        write("".join(f"{label:<{width}}  {text}\n" for label, text in cleaned if text))
    else:
        write("".join(f"{label.replace(' ', '_')}\t{text}\n" for label, text in cleaned))


def table(invocation: Invocation, value: Any, columns: Sequence[Column], *, empty: str = "") -> None:
    """A list: JSON as it came, an aligned table at a terminal, or tab-separated rows without a header."""
    if invocation.json:
        write(json_line(value))
        return
    rows = [[clean(of(item)) for _, of in columns] for item in value["items"]]
    if not on_terminal():
        write("".join("\t".join(row) + "\n" for row in rows))
        return
    if not rows:
        invocation.say(empty or "nothing to show")
        return
    titles = [title for title, _ in columns]
    widths = [max(len(row[n]) for row in [titles, *rows]) for n in range(len(columns))]
    text = "".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n"
        for row in [titles, *rows]
    )
    write(text)
    if value.get("next"):
        invocation.say("there are more; --limit shows them")


def who(party: dict[str, Any] | None) -> str:
    """A peer for people: its name and ring, else its id."""
    if not party:
        return ""
    return f"{party['name'] or short(party['peer_id'])} ({party['ring']})"


def size(count: int) -> str:
    """A number of bytes for people."""
    value, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            break
        value /= 1024
    return f"{value:.4g} {unit}"


def seconds(value: float | None) -> str:
    """A duration for people."""
    if value is None:
        return ""
    if value < 0.9995:  # what rounds to 1 s is told so
        return f"{value * 1000:.3g} ms"
    if value < 120:
        return f"{value:.3g} s"
    return f"{int(value) // 60} min" if value < 7200 else f"{value / 3600:.1f} h"
