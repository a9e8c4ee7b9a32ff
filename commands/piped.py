"""Standard input for a task: inline when it is short, else in a file that the daemon takes over."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import signal
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from clawnet import limits, units
from clawnet.api import Client
from clawnet.errors import DataError, StorageFullError
from clawnet.paths import Home

READ_BYTES = 1 * limits.MIB
LOOK_BYTES = 16 * limits.MIB


class Piped(NamedTuple):
    """What was read so far of standard input; `longer`: there is more than goes inline."""

    head: bytes
    longer: bool

    def whole(self) -> bytes:
        """All of it, where only text that goes inline will do; raises DataError when it is too long."""
        if self.longer:
            raise DataError(
                f"standard input is longer than {units.format_size(limits.STDIN_BYTES_MAX)}, and a prompt can be no "
                "longer",
                hint="a shell or compute task takes more",
            )
        return self.head


def standard_input(*, wanted: bool = True) -> Piped | None:
    """The beginning of standard input where it is a regular file or a pipe (ssh's rule), else None."""
    if not wanted or sys.stdin is None:
        return None
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):
        return None
    if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
        return None
    head = _read(limits.STDIN_BYTES_MAX + 1)
    return Piped(head, len(head) > limits.STDIN_BYTES_MAX)


def _read(size: int) -> bytes:
    try:
        return sys.stdin.buffer.read(size)
    except OSError as error:
        raise DataError(f"standard input cannot be read: {error.strerror or error}") from error


@contextlib.contextmanager
def handed_over(client: Client, spec: dict[str, Any], piped: Piped | None) -> Iterator[None]:
    """While inside, a long standard input lies in a file that `spec` names; the daemon has a copy when it answers.

    Raises DataError when it is longer than that file may be, StorageFullError when it does not fit on the disk.
    """
    if piped is None or not piped.longer or spec.get("stdin_b64") or spec.get("stdin_path"):
        yield
        return
    # The connection makes the home if there is none. It is not held while something slow writes for hours.
    client.connect()
    client.close()
    with _ended_in_order(), _file(client.home) as (path, file):
        _fill(file, path, piped.head)
        spec["stdin_path"] = str(path)
        yield


@contextlib.contextmanager
def _file(home: Home) -> Iterator[tuple[Path, BinaryIO]]:
    """A fresh file for this user alone, locked so that the daemon's sweep knows that it is in use; gone at the end."""
    while True:
        path = home.stdin_file(secrets.token_hex(8))
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        with os.fdopen(os.open(path, flags, 0o600), "w+b", buffering=0) as file:
            try:
                if _locked(file, path):
                    yield path, file
                    return
            finally:
                if sys.platform != "win32":
                    path.unlink(missing_ok=True)
        if sys.platform == "win32":
            path.unlink(missing_ok=True)


def _locked(file: BinaryIO, path: Path) -> bool:
    """Takes the lock; False when a sweep was quicker and the file is gone."""
    if sys.platform == "win32":
        return True  # what is open cannot be removed there
    import fcntl

    if os.geteuid() == 0:  # the daemon of this home may be another user's
        owner = path.parent.stat()
        os.fchown(file.fileno(), owner.st_uid, owner.st_gid)
    fcntl.flock(file, fcntl.LOCK_EX)
    return path.exists()


def _fill(file: BinaryIO, path: Path, data: bytes) -> None:
    size, looked = 0, -LOOK_BYTES
    while data:
        size += len(data)
        if size > limits.STDIN_FILE_BYTES_MAX:
            raise DataError(
                f"standard input is longer than {units.format_size(limits.STDIN_FILE_BYTES_MAX)}",
                hint="send less of it, or in several tasks",
            )
        try:
            if size - looked >= LOOK_BYTES:
                looked = size
                if shutil.disk_usage(path).free < limits.DISK_RESERVE_BYTES:
                    raise OSError(errno.ENOSPC, "it is nearly full")
            view = memoryview(data)
            while view:
                view = view[file.write(view) :]
        except OSError as error:
            raise StorageFullError(
                f"standard input cannot be kept on this disk: {error.strerror or error}", hint="make room on it"
            ) from error
        data = _read(READ_BYTES)


@contextlib.contextmanager
def _ended_in_order() -> Iterator[None]:
    """While inside, the signals that end a program unwind it, so that the file does not stay behind."""

    def leave(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {getattr(signal, name): signal.signal(getattr(signal, name), leave) for name in names}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
