"""What the blob store asks of the file system: new files, what is on the disk for good, and errors in our words."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from clawnet.errors import StorageError, StorageFullError

_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_BINARY: Final[int] = getattr(os, "O_BINARY", 0)


def open_new(path: Path, *, replace: bool = False) -> BinaryIO:
    """A file of mode 0600 to write; with `replace` one that is there already is emptied."""
    how = os.O_TRUNC if replace else os.O_EXCL
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | how | _BINARY, 0o600), "wb")


def sync(fd: int) -> None:
    """What was written to the file is on the disk when this returns."""
    try:
        import fcntl

        # macOS: fsync alone leaves the data in the drive's cache. Elsewhere there is no such command.
        fcntl.fcntl(fd, getattr(fcntl, "F_FULLFSYNC"))  # noqa: B009
    except (ImportError, AttributeError, OSError):
        os.fsync(fd)


def write_back(fd: int, start: int, length: int) -> None:
    """Sends a part of a file on its way to the disk, so that `sync` has less to wait for. It does not wait itself."""
    # Linux takes this advice by writing what is dirty and letting go of what was clean before: what was just written
    # stays in memory. What other systems make of it is their own affair.
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.posix_fadvise(fd, start, length, os.POSIX_FADV_DONTNEED)


def sync_directory(directory: Path) -> None:
    """Makes renames in the directory and the directory itself last; Windows has no such call and needs none."""
    if os.name != "posix":
        return
    for each in (directory, directory.parent):
        fd = os.open(each, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def translated(err: OSError, path: Path) -> StorageError:
    """The same in our words."""
    if err.errno in _FULL:
        return StorageFullError(
            f"cannot write {path}: {err.strerror}", hint="make room on the disk, then try again", path=str(path)
        )
    return StorageError(f"the blob store does not work: {path}: {err.strerror}", path=str(path))


@contextlib.contextmanager
def noting(failures: list[StorageError], path: Path) -> Iterator[None]:
    """What fails within is noted and ends only that, so that other files have their turn; one that is gone is fine."""
    try:
        yield
    except FileNotFoundError:
        pass
    except OSError as err:
        failures.append(translated(err, path))
    except StorageError as err:
        failures.append(err)
