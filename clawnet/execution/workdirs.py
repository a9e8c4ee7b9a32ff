"""Working directories of runs: made for one job, given to whom it runs as, removed with all that it left in them.

Of a node that runs as root the jobs run as somebody else, who cannot pass through root's private home; then the
directories lie below /var/tmp, in a directory that others may pass but not list.
"""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from pathlib import Path

from msgspec import Struct

from clawnet.errors import ConfigError
from clawnet.execution.removing import remove_tree
from clawnet.paths import Home

__all__ = ["JobDirs", "WorkDirs", "remove_tree"]

SPARE_PREFIX = "next-"

if sys.platform == "win32":

    def _user() -> int:
        return 0  # as in stat there

    def _give(path: Path, owner: int) -> None:
        raise AssertionError("nobody is root on Windows")
else:
    _user = os.getuid

    def _give(path: Path, owner: int) -> None:
        os.chown(path, owner, owner)


class JobDirs(Struct, frozen=True):
    """The directories of one job: `work` is where it starts, `tmp` is its TMPDIR outside the sandbox."""

    root: Path
    work: Path
    tmp: Path

    def remove(self) -> None:
        """Removes them with everything in them, whatever modes the job gave it."""
        remove_tree(self.root)


class WorkDirs:
    """Where the jobs' directories lie. `owner` is the uid of the jobs, None for the node's own."""

    def __init__(self, home: Home, owner: int | None) -> None:
        self.owner = owner
        self.base = home.work_dir if owner is None else Path(f"/var/tmp/clawnet-{_user()}-{home.digest}")
        self._ours = False

    def open(self) -> bool:
        """Makes the base directory; True if an earlier life of the node had left jobs in it (they are removed)."""
        mode = 0o700 if self.owner is None else 0o711
        self.base.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            self.base.mkdir(mode=mode)
        except FileExistsError:
            info = self.base.lstat()
            if not stat.S_ISDIR(info.st_mode) or info.st_uid != _user():
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
                _give(path, self.owner)
        if self.owner is not None:
            root.chmod(0o711)  # whatever the umask took away
        return dirs

    def make_spare(self) -> Path:
        """A fresh working directory that no job has yet; it comes to lie where a job's is. Raises OSError."""
        path = self.base / (SPARE_PREFIX + os.urandom(16).hex())
        path.mkdir(mode=0o700)
        if self.owner is not None:
            _give(path, self.owner)
        return path

    def close(self) -> None:
        """Removes the base directory, if it could be had."""
        if self._ours:
            remove_tree(self.base)
