"""Working directories of runs: made for one job, given to whom it runs as, removed with all that it left in them.

Of a node that runs as root the jobs run as somebody else, who cannot pass through root's private home; then the
directories lie below /var/tmp, in a directory that others may pass but not list.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from msgspec import Struct

from clawnet.errors import ConfigError
from clawnet.paths import Home

if sys.platform != "win32":
    _DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class JobDirs(Struct, frozen=True):
    """The directories of one job: `work` is where it starts, `tmp` is its TMPDIR outside the sandbox."""

    root: Path
    work: Path
    tmp: Path

    def remove(self) -> None:
        """Removes them with everything in them, whatever modes the job gave it."""
        remove_tree(self.root)


def remove_tree(path: Path) -> None:
    """Removes a tree that nobody works in any longer, however deep it is and whatever modes its directories have.

    Level by level: what lies below a directory is moved up beside it, so that no path grows long and nothing recurses.
    Links are removed and never followed. Raises OSError.
    """
    if sys.platform == "win32":
        if path.exists():
            shutil.rmtree(path, onerror=_writable_again)
        return
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


def _writable_again(function: Callable[..., Any], path: str, _: Any) -> None:
    """Windows refuses to remove what is read-only."""
    os.chmod(path, stat.S_IWRITE)
    function(path)


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


class WorkDirs:
    """Where the jobs' directories lie. `owner` is the uid of the jobs, None for the node's own."""

    def __init__(self, home: Home, owner: int | None) -> None:
        self.owner = owner
        self.base = home.work_dir if owner is None else Path(f"/var/tmp/clawnet-{os.getuid()}-{home.digest}")
        self._ours = False

    def open(self) -> bool:
        """Makes the base directory; True if an earlier life of the node had left jobs in it (they are removed)."""
        mode = 0o700 if self.owner is None else 0o711
        self.base.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            self.base.mkdir(mode=mode)
        except FileExistsError:
            info = self.base.lstat()
            if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid():
                if self.owner is None:
                    raise ConfigError(f"{self.base} is not a directory of this user's", hint="move it away") from None
                # Somebody else took the name in a directory open to all.
                self.base = Path(tempfile.mkdtemp(prefix="clawnet-", dir="/var/tmp"))
        self._ours = True
        self.base.chmod(mode)
        left = list(self.base.iterdir())
        for path in left:
            if path.is_dir() and not path.is_symlink():
                remove_tree(path)
            else:
                path.unlink()
        return bool(left)

    def make(self, job: bytes) -> JobDirs:
        """Fresh directories for a job; raises OSError."""
        root = self.base / job.hex()
        dirs = JobDirs(root, root / "work", root / "tmp")
        root.mkdir(mode=0o700 if self.owner is None else 0o711)
        for path in (dirs.work, dirs.tmp):
            path.mkdir(mode=0o700)
            if self.owner is not None:
                os.chown(path, self.owner, self.owner)
        if self.owner is not None:
            root.chmod(0o711)  # whatever the umask took away
        return dirs

    def close(self) -> None:
        """Removes the base directory, if it could be had."""
        if self._ours:
            remove_tree(self.base)
