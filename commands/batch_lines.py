"""The lines of a batch: read one at a time whatever the file's size, made into tasks, and each given its key."""

from __future__ import annotations

import hashlib
import json
import os
import queue
import stat
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from clawnet import limits, units
from clawnet.errors import ClawnetError, DataError, NotFoundError, UsageError
from clawnet.paths import Home

from . import outputs, submission

WORK = ("type", "op", "model", "accept")
"""Defaults that say what is done, not how: with another of these a line is another task."""


class Line(NamedTuple):
    """One line that is not blank: its task, or what is wrong with it."""

    number: int
    spec: dict[str, Any]
    error: ClawnetError | None = None


class Source:
    """The file or standard input. A regular file can be read twice, so it can be checked before anything is done."""

    def __init__(self, name: str, home: Home) -> None:
        self._home = home
        self._piped = name == "-"
        self.name = "standard input" if name == "-" else name
        if name == "-" and sys.stdin is None:
            raise UsageError("- reads the tasks from standard input, which is closed")
        try:
            self._file = _standard_input() if name == "-" else Path(name).open("rb")  # noqa: SIM115
            self.regular = name != "-" and stat.S_ISREG(os.fstat(self._file.fileno()).st_mode)
        except FileNotFoundError as error:
            raise NotFoundError(f"there is no file {name}") from error
        except OSError as error:
            raise DataError(f"cannot read {name}: {error.strerror}") from error
        if name == "-" and sys.stdin.isatty():
            raise UsageError("- reads the tasks from standard input, which is a terminal", hint="name a file")

    def rewind(self) -> None:
        """Begins again at the first line of a regular file."""
        self._file.seek(0)

    def close(self) -> None:
        """Closes the file; standard input stays as it is, for a thread may be waiting in it."""
        if not self._piped:
            self._file.close()

    def raw(self) -> Iterator[tuple[int, bytes]]:
        """(number, bytes) of each line that is not blank. One that is too long comes cut, and still too long."""
        number = 0
        while True:
            try:
                data = self._file.readline(limits.BATCH_LINE_BYTES_MAX + 1)
                rest = data
                while rest and not rest.endswith(b"\n"):
                    rest = self._file.readline(limits.BATCH_LINE_BYTES_MAX)
            except OSError as error:
                raise DataError(f"cannot read {self.name}: {error.strerror}") from error
            if not data:
                return
            number += 1
            if number == 1:
                data = data.removeprefix(b"\xef\xbb\xbf")
            if data.strip():
                yield number, data

    def lines(self, defaults: dict[str, Any]) -> Iterator[Line]:
        """Every line as a task with `defaults` under it."""
        for number, data in self.raw():
            yield self.line(number, data, defaults)

    def line(self, number: int, data: bytes, defaults: dict[str, Any]) -> Line:
        """A line's bytes as a task, or with what is wrong with them."""
        try:
            return Line(number, self._task(data, defaults))
        except ClawnetError as error:
            return Line(number, {}, error)

    def _task(self, data: bytes, defaults: dict[str, Any]) -> dict[str, Any]:
        if len(data) > limits.BATCH_LINE_BYTES_MAX:
            raise DataError(f"the line is longer than {units.format_size(limits.BATCH_LINE_BYTES_MAX)}")
        try:
            value = submission.parse_json(data)
        except UnicodeDecodeError as error:
            raise DataError("the line is not UTF-8") from error
        except ValueError as error:
            where = f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            what = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise DataError(f"not valid JSON: {what}{where}") from error
        except RecursionError as error:
            raise DataError("the line is nested too deeply") from error
        if not isinstance(value, dict):
            raise DataError("the line holds no task (an object)", hint="see docs/CLI.md, --spec")
        own = submission.spelled_out("task", value)
        spec = {**defaults, **own}
        # What a line is, whatever the options are today: by this a batch that goes on knows what is done.
        own |= {name: spec[name] for name in WORK if name in spec}
        submission.complete(spec, None)
        directory = outputs.taken(spec)
        if directory and not spec.get("outputs"):
            raise DataError("output_dir goes with outputs")
        if directory:
            spec["_files"] = outputs.checked(self._home, directory)
        spec["_content"] = json.dumps(own, sort_keys=True, separators=(",", ":"))
        return spec


def _standard_input() -> BinaryIO:
    """Not sys.stdin's own buffer: the interpreter cannot end while a thread waits in that one for more to come."""
    return open(sys.stdin.fileno(), "rb", closefd=False)


class Reader:
    """Lines of a source that may let one wait (a pipe): read ahead in a thread, so that results are not held up."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._queue: queue.Queue[tuple[int, bytes] | ClawnetError | None] = queue.Queue(limits.BATCH_CHECKED_TOGETHER)
        self.ended = False
        threading.Thread(target=self._read, name="batch-lines", daemon=True).start()

    def _read(self) -> None:
        try:
            for item in self._source.raw():
                self._queue.put(item)
            self._queue.put(None)
        except ClawnetError as error:
            self._queue.put(error)

    def take(self, defaults: dict[str, Any], wait_s: float) -> Line | None:
        """The next line; None when none has come within `wait_s`, or when there is no more (`ended`)."""
        try:
            item = self._queue.get(timeout=wait_s) if wait_s > 0 else self._queue.get_nowait()
        except queue.Empty:
            return None
        if item is None:
            self.ended = True
            return None
        if isinstance(item, ClawnetError):
            raise item
        return self._source.line(*item, defaults)


class Keys:
    """The idempotency key of each line: its own, else one made from its content and its number among equal lines.

    The counts of a million lines do not belong in memory: they lie in a private temporary database that vanishes by
    itself.
    """

    def __init__(self, name: str) -> None:
        import sqlite3

        self._name = name.encode()
        self._counts = sqlite3.connect("", isolation_level=None)
        self._counts.execute("PRAGMA journal_mode = OFF")
        self._counts.execute("PRAGMA synchronous = OFF")
        self._counts.execute("CREATE TABLE seen (digest BLOB PRIMARY KEY, n INTEGER NOT NULL) WITHOUT ROWID")
        self._counts.execute("BEGIN")

    def give(self, spec: dict[str, Any]) -> bool:
        """Sets the key of a task that has none; False when the line came with its own."""
        content = spec.pop("_content")
        if spec.get("idempotency_key"):
            return False
        digest = hashlib.sha256(self._name + b"\0" + content.encode("utf-8", "surrogatepass")).digest()[:16]
        found = self._counts.execute("SELECT n FROM seen WHERE digest = ?", (digest,)).fetchone()
        count = 1 + (found[0] if found else 0)
        self._counts.execute("INSERT OR REPLACE INTO seen VALUES (?, ?)", (digest, count))
        spec["idempotency_key"] = f"batch-{digest.hex()}-{count}"
        return True

    def close(self) -> None:
        """The counts are no longer needed."""
        self._counts.close()
