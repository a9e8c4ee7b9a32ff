"""Removing a tree that a run has left, whatever it made of it."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

if sys.platform == "win32":

    def remove_tree(path: Path) -> None:
        """Removes a tree that nobody works in any longer. Raises OSError."""
        if path.exists():
            shutil.rmtree(path, onerror=_writable_again)

    def _writable_again(function: Callable[..., Any], path: str, _: Any) -> None:
        """Windows refuses to remove what is read-only."""
        os.chmod(path, stat.S_IWRITE)
        function(path)
else:
    _DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

    def remove_tree(path: Path) -> None:
        """Removes a tree that nobody works in any longer, however deep it is and whatever modes its directories have.

        Level by level: what lies below a directory is moved up beside it, so that no path grows long and nothing
        recurses. Links are removed and never followed. Raises OSError.
        """
        try:
            path.chmod(0o700)
            top = os.open(path, _DIRECTORY)
        except FileNotFoundError:
            return
        try:
            number = 0
            while names := os.listdir(top):
                for name in names:
                    if not _remove_plain(name, top):
                        number = _empty(name, top, number)
                        os.rmdir(name, dir_fd=top)
        finally:
            os.close(top)
        path.rmdir()

    def _remove_plain(name: str, directory: int) -> bool:
        """Removes what is no directory; False for one that is."""
        if stat.S_ISDIR(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
            return False
        os.unlink(name, dir_fd=directory)
        return True

    def _empty(name: str, top: int, number: int) -> int:
        """Empties a directory; those in it are opened and moved up under numbers of their own."""
        os.chmod(name, 0o700, dir_fd=top)
        directory = os.open(name, _DIRECTORY, dir_fd=top)
        try:
            for inner in os.listdir(directory):
                if _remove_plain(inner, directory):
                    continue
                os.chmod(inner, 0o700, dir_fd=directory)
                while True:
                    number += 1
                    try:
                        os.rename(inner, f".{number}", src_dir_fd=directory, dst_dir_fd=top)
                        break
                    except OSError as error:
                        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                            raise
            return number
        finally:
            os.close(directory)
