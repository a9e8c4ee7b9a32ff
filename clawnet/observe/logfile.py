"""A log file: whole lines appended, old files kept by number and age, and a disk that may be full at any time."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from clawnet.errors import ClawnetError
from clawnet.paths import make_private_dir

LOOK_EVERY_S: Final = 30.0


class LogFile:
    """Lines go to `path` (0600); above `bytes_max` it becomes path.1, path.1 becomes path.2, up to `backups`.

    `write` never raises: a line that cannot be written is counted in `lost`, and the next that can be tells of it.
    `age_s` is how long a backup is kept (0: forever). A file that somebody moved or removed is begun anew.
    """

    def __init__(
        self, path: Path, bytes_max: int, backups: int, age_s: float, clock: Callable[[], float] = time.time
    ) -> None:
        self.path = path
        self.lost = 0
        self._bytes_max = bytes_max
        self._backups = backups
        self._age_s = age_s
        self._clock = clock
        self._fd = -1
        self._bytes = 0
        self._broken_line = False
        self._look_at = 0.0
        self._closed = False
        self._look()

    def write(self, line: str) -> bool:
        """Appends one line (without its line end); tells whether it was written."""
        data = line.encode("utf-8", "replace") + b"\n"
        if self._clock() >= self._look_at:
            self._look()
        if self._bytes and self._bytes + len(data) > self._bytes_max:
            self._rotate()
        if self._fd < 0:
            self.lost += 1
            return False
        if self._broken_line:
            data = b"\n" + data
        try:
            written = os.write(self._fd, data)
        except OSError:
            self.lost += 1
            return False
        self._bytes += written
        self._broken_line = written < len(data)
        self.lost += self._broken_line
        return not self._broken_line

    def close(self) -> None:
        """Lets the file go; later lines are dropped."""
        self._closed = True
        self._drop()

    def _drop(self) -> None:
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = -1
            self._bytes = 0

    def _look(self) -> None:
        """Opens the file if it is not open or no longer the one under that name; forgets backups that are too old."""
        self._look_at = self._clock() + LOOK_EVERY_S
        if self._closed:
            return
        if self._fd >= 0:
            try:
                same = os.path.samestat(self.path.stat(), os.fstat(self._fd))
            except OSError:
                same = False
            if not same:
                self._drop()
        if self._fd < 0:
            self._open()
        self._forget_old()

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        for name in ("O_CLOEXEC", "O_NOFOLLOW", "O_BINARY", "O_NONBLOCK"):
            flags |= getattr(os, name, 0)
        try:
            make_private_dir(self.path.parent)
            self._fd = os.open(self.path, flags, 0o600)
            if hasattr(os, "fchmod"):
                os.fchmod(self._fd, 0o600)
            self._bytes = os.fstat(self._fd).st_size
            self._broken_line = False
        except (OSError, ClawnetError):
            self._drop()

    def _rotate(self) -> None:
        """Every file moves one number up; when that fails, lines go on into the file there is."""
        self._drop()
        try:
            for number in range(self._backups, 0, -1):
                source = self._numbered(number - 1)
                if source.exists():
                    source.replace(self._numbered(number))
            if not self._backups:
                self.path.unlink(missing_ok=True)
        except OSError:
            # Tried again when the file has grown by half as much.
            self._open()
            self._bytes = min(self._bytes, self._bytes_max // 2)
            return
        self._look()

    def _numbered(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}") if number else self.path

    def _forget_old(self) -> None:
        if not self._age_s:
            return
        oldest = self._clock() - self._age_s
        prefix = f"{self.path.name}."
        with contextlib.suppress(OSError):
            for entry in os.scandir(self.path.parent):
                if not (entry.name.startswith(prefix) and entry.name[len(prefix) :].isdigit()):
                    continue
                if entry.is_file(follow_symlinks=False) and entry.stat(follow_symlinks=False).st_mtime < oldest:
                    Path(entry.path).unlink()


class LogStream:
    """Lines go to an open descriptor: standard output or standard error. It is never closed here."""

    def __init__(self, fd: int) -> None:
        self.lost = 0
        self._fd = fd

    def write(self, line: str) -> bool:
        """Writes one line; a reader that went away costs the line and nothing else."""
        try:
            os.write(self._fd, line.encode("utf-8", "replace") + b"\n")
        except OSError:
            self.lost += 1
            return False
        return True

    def close(self) -> None:
        """The descriptor belongs to the process."""
