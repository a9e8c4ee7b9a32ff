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
    """What lies on the disk for a run: bytes as allocated, files and directories, whether any lie too `deep`.

    `hidden`: there is a directory that could not be looked into.
    """

    bytes: int = 0
    files: int = 0
    deep: bool = False
    hidden: bool = False


def disk_used(root: Path, members: Sequence[int], files_max: int) -> Used:
    """What lies below `root`, and what `members` hold open though it has no name any longer; stops above `files_max`
    and at directories nested more than RUN_DEPTH_MAX deep.

    Links are not followed, also where one takes a directory's place meanwhile; a file of several names counts once.
    """
    found = Used()
    seen: set[tuple[int, int]] = set()
    top = len(root.parts)
    for path, entries in _levels(root, found):
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


if sys.platform == "win32":

    def _levels(root: Path, found: Used) -> Iterator[tuple[str, list[os.stat_result]]]:
        for path, directories, files in os.walk(root):
            yield path, list(_told(os.path.join(path, name) for name in (*directories, *files)))

    def _told(names: Iterator[str]) -> Iterator[os.stat_result]:
        for name in names:
            try:
                yield os.stat(name, follow_symlinks=False)
            except OSError:
                continue  # gone meanwhile
else:
    _DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC

    def _levels(root: Path, found: Used) -> Iterator[tuple[str, list[os.stat_result]]]:
        """Each directory's path and what its entries are; one of ours that is not to be looked into is `hidden`."""
        yield from _below(str(root), str(root), None, found)

    def _below(path: str, name: str, parent: int | None, found: Used) -> Iterator[tuple[str, list[os.stat_result]]]:
        try:
            descriptor = _looked_into(name, parent)
        except PermissionError:
            found.hidden = True
            return
        except OSError:
            return  # gone meanwhile, or no directory any longer
        try:
            entries: list[os.stat_result] = []
            inner: list[str] = []
            for each in os.listdir(descriptor):
                try:
                    info = os.stat(each, dir_fd=descriptor, follow_symlinks=False)
                except PermissionError:
                    found.hidden = True
                    continue
                except OSError:
                    continue  # gone meanwhile
                entries.append(info)
                # What somebody else has made, whom a run on the host has asked, is not the run's to open.
                if stat.S_ISDIR(info.st_mode) and (os.geteuid() in (0, info.st_uid) or info.st_mode & 0o005 == 0o005):
                    inner.append(each)
            yield path, entries
            for each in inner:
                yield from _below(os.path.join(path, each), each, descriptor, found)
        finally:
            os.close(descriptor)

    def _looked_into(name: str, parent: int | None) -> int:
        """A directory, opened. One that its owner has shut for itself is opened again: else what is below would be
        free. By descriptor only: by its name a link that has come in its place would be followed. Raises OSError.
        """
        try:
            descriptor = os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
        except PermissionError:
            if sys.platform != "linux":
                os.chmod(name, 0o700, dir_fd=parent, follow_symlinks=False)
                return os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
            handle = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
            try:
                os.chmod(f"/proc/self/fd/{handle}", 0o700)
                return os.open(f"/proc/self/fd/{handle}", _DIRECTORY)
            finally:
                os.close(handle)
        info = os.fstat(descriptor)
        if not info.st_mode & 0o100 and info.st_uid == os.geteuid():
            try:
                os.fchmod(descriptor, stat.S_IMODE(info.st_mode) | 0o700)
            except OSError:
                os.close(descriptor)
                raise
        return descriptor


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
    if found.hidden:
        return "the run keeps a directory shut, so that what it holds on the disk cannot be told"
    return f"the run nested directories more than {limits.RUN_DEPTH_MAX} deep" if found.deep else ""
