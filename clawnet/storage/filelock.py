"""A lock file that holds the pid of its holder and frees itself when that process ends."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from clawnet.errors import ConfigError

if sys.platform == "win32":
    import msvcrt

    def _try_lock(fd: int) -> None:
        # The byte locked lies behind the text, which stays readable for others.
        os.lseek(fd, 1024, os.SEEK_SET)
        msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)

else:
    import fcntl

    def _try_lock(fd: int) -> None:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


class FileLock:
    """An exclusive lock; `release` gives it back, the file stays."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd

    @classmethod
    def take(cls, path: Path, *, what: str) -> FileLock:
        """Takes the lock or raises ConfigError with the pid of its holder; OSError when the file cannot be made."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600)
        try:
            _try_lock(fd)
        except OSError as err:
            os.lseek(fd, 0, os.SEEK_SET)
            holder = os.read(fd, 32).decode("ascii", "replace").strip() or "unknown"
            os.close(fd)
            raise ConfigError(
                f"{what} is in use by another process (pid {holder}, lock file {path})",
                hint=f"stop that one first (`clawnet daemon stop`, or end process {holder}), or use another --home",
                pid=holder,
            ) from err
        os.ftruncate(fd, 0)
        os.lseek(fd, 0, os.SEEK_SET)
        os.write(fd, f"{os.getpid()}\n".encode())
        return cls(path, fd)

    def release(self) -> None:
        """Gives the lock back; a second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
