"""A directory held open, and what lies directly in it: no step from one to the next follows a symbolic link.

Where the system has no such calls (Windows) names are used, and each is looked at before it is entered.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

_BY_DESCRIPTOR: Final = os.open in os.supports_dir_fd and os.scandir in os.supports_fd
_NOFOLLOW: Final[int] = getattr(os, "O_NOFOLLOW", 0)
_OPEN: Final[int] = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_DIRECTORY: Final[int] = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | _OPEN


class Beneath:
    """One directory. Every method raises OSError; a link where a directory is needed is NotADirectoryError."""

    def __init__(self, path: str, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor

    @classmethod
    @contextmanager
    def opened(cls, path: Path) -> Iterator[Beneath]:
        """The directory at this path, which may itself be reached through links."""
        found = cls(str(path), os.open(path, _DIRECTORY) if _BY_DESCRIPTOR else -1)
        try:
            yield found
        finally:
            found.close()

    def close(self) -> None:
        """Lets go of it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def child(self, name: str) -> Beneath:
        """A directory in this one; to be closed by the caller."""
        inner = os.path.join(self.path, name)
        if not _BY_DESCRIPTOR:
            if not stat.S_ISDIR(os.lstat(inner).st_mode):
                raise NotADirectoryError(errno.ENOTDIR, "not a directory", inner)
            return Beneath(inner, -1)
        try:
            return Beneath(inner, os.open(name, _DIRECTORY | _NOFOLLOW, dir_fd=self._descriptor))
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise NotADirectoryError(errno.ENOTDIR, "not a directory", inner) from error
            raise

    def identity(self) -> tuple[int, int]:
        """(device, inode): the same directory under whatever name."""
        info = os.stat(self._descriptor if self._descriptor >= 0 else self.path)
        return info.st_dev, info.st_ino

    def names(self) -> Iterator[os.DirEntry[str]]:
        """What lies in it, in no order."""
        with os.scandir(self._descriptor if self._descriptor >= 0 else self.path) as entries:
            yield from entries

    def look(self, name: str) -> os.stat_result | None:
        """What is there under this name, links not followed; None for nothing."""
        where, more = self._at(name)
        try:
            return os.stat(where, follow_symlinks=False, **more)
        except FileNotFoundError:
            return None

    def read(self, name: str) -> int:
        """A descriptor for reading a file; a link is an OSError, a pipe is not waited for."""
        where, more = self._at(name)
        return os.open(where, os.O_RDONLY | _NOFOLLOW | getattr(os, "O_NONBLOCK", 0) | _OPEN, **more)

    def target(self, name: str) -> str:
        """What a symbolic link says."""
        where, more = self._at(name)
        return os.readlink(where, **more)

    def make(self, name: str) -> None:
        """A directory in it, with the mode that this process gives to new ones."""
        where, more = self._at(name)
        os.mkdir(where, **more)

    def mode(self, name: str, mode: int) -> None:
        """Changes the mode of a file or directory in it that this process made."""
        where, more = self._at(name)
        os.chmod(where, mode, **more)

    def drop(self, name: str) -> None:
        """Removes a file or link in it."""
        where, more = self._at(name)
        os.unlink(where, **more)

    def drop_directory(self, name: str) -> None:
        """Removes an empty directory in it."""
        where, more = self._at(name)
        os.rmdir(where, **more)

    def writable(self) -> bool:
        """Whether this process may make and remove names in it."""
        if self._descriptor >= 0 and os.access in os.supports_dir_fd:
            return os.access(".", os.W_OK | os.X_OK, dir_fd=self._descriptor)
        return os.access(self.path, os.W_OK | os.X_OK)

    def _at(self, name: str) -> tuple[str, dict[str, Any]]:
        if self._descriptor >= 0:
            return name, {"dir_fd": self._descriptor}
        return os.path.join(self.path, name), {}


def move(source: Beneath, name: str, target: Beneath, as_name: str) -> None:
    """Gives a file another name, in place of whatever has it; both directories lie on the same file system."""
    if source._descriptor >= 0:
        os.replace(name, as_name, src_dir_fd=source._descriptor, dst_dir_fd=target._descriptor)
    else:
        os.replace(os.path.join(source.path, name), os.path.join(target.path, as_name))


def second_name(source: Beneath, name: str, target: Beneath, as_name: str) -> bool:
    """Gives a file a second name, where the file system can do that; a link gets one itself."""
    try:
        if source._descriptor >= 0:
            os.link(name, as_name, src_dir_fd=source._descriptor, dst_dir_fd=target._descriptor, follow_symlinks=False)
        else:
            os.link(os.path.join(source.path, name), os.path.join(target.path, as_name))
    except (OSError, NotImplementedError):
        return False
    return True
