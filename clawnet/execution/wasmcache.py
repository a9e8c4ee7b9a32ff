"""Compiled modules on disk. They are native code, so only what this user wrote, and nobody else could, is loaded.

An entry is a file of the home's own cache directory: a hash over its content, then what the engine serialised. Its name
is that of the module's blob with the engine's version and the processor's kind; the engine itself refuses what another
build or another configuration wrote. Whatever does not fit is compiled again, and never comes from another node.
"""

from __future__ import annotations

import os
import platform
import stat
import time
from hashlib import sha256
from typing import Final

_MAGIC: Final = b"CWC1"
_STALE_S: Final = 3_600.0


class Cache:
    """The cache in `directory`, none for "". Beyond `bytes_max` the entry that was used longest ago goes."""

    def __init__(self, directory: str, bytes_max: int, engine: str) -> None:
        self._directory = directory if bytes_max and self._is_ours(directory) else ""
        self._bytes_max = bytes_max
        self._suffix = f"-{platform.machine()}-{engine}.cwasm"

    @staticmethod
    def _is_ours(directory: str) -> bool:
        """Whether nobody but this user can write there."""
        try:
            info = os.lstat(directory)
        except OSError:
            return False
        return stat.S_ISDIR(info.st_mode) and _private(info)

    def get(self, key: str) -> bytes | None:
        """A compiled module; None for one that is not there, or not as it was written."""
        if not self._directory:
            return None
        path = os.path.join(self._directory, key + self._suffix)
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        try:
            with os.fdopen(os.open(path, flags), "rb") as file:
                info = os.fstat(file.fileno())
                if not stat.S_ISREG(info.st_mode) or not _private(info):
                    return None
                data = file.read()
            os.utime(path)
        except OSError:
            return None
        content = data[len(_MAGIC) + 32 :]
        if data[: len(_MAGIC)] != _MAGIC or sha256(content).digest() != data[len(_MAGIC) : len(_MAGIC) + 32]:
            return None
        return content

    def put(self, key: str, content: bytes) -> None:
        """Keeps a compiled module, if there is room for one of this size; a full disk is no error."""
        if not self._directory or len(content) > self._bytes_max:
            return
        path = os.path.join(self._directory, key + self._suffix)
        temporary = f"{path}.{os.getpid()}.tmp"
        try:
            with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _BINARY, 0o600), "wb") as file:
                file.write(_MAGIC + sha256(content).digest())
                file.write(content)
            os.replace(temporary, path)
            self._make_room(path)
        except OSError:
            try:
                os.unlink(temporary)
            except OSError:
                return

    def _make_room(self, newest: str) -> None:
        entries: list[tuple[float, int, str]] = []
        for entry in os.scandir(self._directory):
            info = entry.stat(follow_symlinks=False)
            if entry.path.endswith(".tmp") and time.time() - info.st_mtime > _STALE_S:
                os.unlink(entry.path)
            elif entry.path != newest:
                entries.append((info.st_mtime, info.st_size, entry.path))
        room = self._bytes_max - os.stat(newest).st_size
        for _, size, path in sorted(entries, reverse=True):
            room -= size
            if room < 0:
                os.unlink(path)


_BINARY: Final = getattr(os, "O_BINARY", 0)


def _private(info: os.stat_result) -> bool:
    return os.name == "nt" or (info.st_uid == os.geteuid() and not info.st_mode & 0o022)
