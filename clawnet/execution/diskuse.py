"""How much a directory holds: bytes as allocated and the number of files, for the bound on a run's disk."""

from __future__ import annotations

import os
import shutil
import stat
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from msgspec import Struct

from clawnet import limits

_OPEN_MAX: Final = 65_536
_BLOCK: Final = 512


class Used(Struct, gc=False):
    """What lies on the disk for a run: bytes as allocated, files and directories, whether any lie too `deep`."""

    bytes: int = 0
    files: int = 0
    deep: bool = False


def disk_used(root: Path, members: Sequence[int], files_max: int) -> Used:
    """What lies below `root`, and what `members` hold open though it has no name any longer; stops above `files_max`
    and at directories nested more than RUN_DEPTH_MAX deep.

    Links are not followed, also where one takes a directory's place meanwhile; a file of several names counts once.
    """
    found = Used()
    seen: set[tuple[int, int]] = set()
    top = len(root.parts)
    for path, entries in _levels(root):
        for info in entries:
            if info.st_nlink > 1 and not stat.S_ISDIR(info.st_mode):
                key = (info.st_dev, info.st_ino)
                if key in seen:
                    continue
                seen.add(key)
            found.files += 1
            found.bytes += _allocated(info)
        found.deep = len(Path(path).parts) - top >= limits.RUN_DEPTH_MAX
        if found.deep or found.files > files_max:
            return found
    found.bytes += _nameless(root, members, seen)
    return found


def _allocated(info: os.stat_result) -> int:
    if sys.platform == "win32":
        return info.st_size
    return info.st_blocks * _BLOCK


def _levels(root: Path) -> Iterator[tuple[str, list[os.stat_result]]]:
    """Each directory's path and what the entries of it are."""
    if sys.platform == "win32":
        for path, directories, files in os.walk(root):
            yield path, list(_told(os.path.join(path, name) for name in (*directories, *files)))
        return
    for path, directories, files, descriptor in os.fwalk(root, follow_symlinks=False):
        yield path, list(_told((*directories, *files), descriptor))


def _told(names: Sequence[str] | Iterator[str], descriptor: int | None = None) -> Iterator[os.stat_result]:
    for name in names:
        try:
            yield os.stat(name, dir_fd=descriptor, follow_symlinks=False)
        except OSError:
            continue  # gone meanwhile


def _nameless(root: Path, members: Sequence[int], seen: set[tuple[int, int]]) -> int:
    """Bytes of files on the same disk that these processes hold open and that have no name any longer. Linux."""
    if sys.platform != "linux":
        return 0
    size = looked = 0
    try:
        device = root.stat().st_dev
    except OSError:
        return 0
    for pid in members:
        try:
            names = os.listdir(f"/proc/{pid}/fd")
        except OSError:
            continue
        for name in names:
            looked += 1
            if looked > _OPEN_MAX:
                return size
            try:
                info = os.stat(f"/proc/{pid}/fd/{name}")
            except OSError:
                continue
            key = (info.st_dev, info.st_ino)
            if info.st_nlink == 0 and info.st_dev == device and stat.S_ISREG(info.st_mode) and key not in seen:
                seen.add(key)
                size += _allocated(info)
    return size


def free_bytes(path: Path) -> int:
    """What a user may still write there; a path that is gone has room enough."""
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return 2**62


def over(found: Used, bytes_max: int, files_max: int) -> str:
    """What is too much, as a sentence, or ""."""
    if found.bytes > bytes_max:
        return f"the run held {found.bytes} bytes on the disk; {bytes_max} are allowed"
    if found.files > files_max:
        return f"the run made more than {files_max} files"
    return f"the run nested directories more than {limits.RUN_DEPTH_MAX} deep" if found.deep else ""
