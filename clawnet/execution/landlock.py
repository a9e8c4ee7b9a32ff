"""A second wall around a process that runs modules: Linux Landlock, by which it gives up what it will not need.

Whoever breaks out of the engine is then still in a process that reads the blobs and its own program, writes the two
directories of modules, and neither starts programs nor dials nor signals others. Needs no privileges and cannot be
undone; a root process is bound by it too. Kernels before 5.13, and those without it, do without.

Structures and numbers: include/uapi/linux/landlock.h; the system calls have the same numbers on every architecture.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
import sys
from collections.abc import Sequence
from typing import Final

_CREATE, _ADD_RULE, _RESTRICT = 444, 445, 446
_VERSION: Final = 1
_PATH_BENEATH: Final = 1
_NO_NEW_PRIVS: Final = 38
_WRITE_FILE, _READ_FILE, _READ_DIR, _REMOVE_FILE, _MAKE_DIR, _MAKE_REG = (1 << bit for bit in (1, 2, 3, 5, 7, 8))
_TRUNCATE: Final = 1 << 14
_FS_BITS: Final = {1: 13, 2: 14, 3: 15, 5: 16}
"""How many rights over files there are since which version of the interface."""
_TCP: Final = 3
_SCOPES: Final = 3
"""Signals, and Unix sockets without a file."""


def confine(read: Sequence[str], write: Sequence[str]) -> bool:
    """From now on this thread, and those it starts, get at these files and directories alone; False: not possible here.

    Call it before other threads are started. Raises OSError where the kernel has it and refuses.
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(_CREATE, None, 0, _VERSION)
    if version < 1:
        return False
    files = (1 << max(bits for since, bits in _FS_BITS.items() if since <= version)) - 1
    wanted = [files, _TCP if version >= 4 else 0, _SCOPES if version >= 6 else 0]
    attributes = struct.pack("=QQQ", *wanted)[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = _checked(libc.syscall(_CREATE, attributes, len(attributes), 0))
    try:
        for path in read:
            _allow(libc, ruleset, path, _READ_FILE | _READ_DIR)
        for path in write:
            more = _WRITE_FILE | _REMOVE_FILE | _MAKE_REG | _MAKE_DIR | _TRUNCATE
            _allow(libc, ruleset, path, (_READ_FILE | _READ_DIR | more) & files)
        _checked(libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0))
        _checked(libc.syscall(_RESTRICT, ruleset, 0))
    finally:
        os.close(ruleset)
    return True


def _allow(libc: ctypes.CDLL, ruleset: int, path: str, rights: int) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)  # type: ignore[attr-defined,unused-ignore]
    except OSError:
        return  # what is not there needs no leave
    try:
        if not stat.S_ISDIR(os.fstat(descriptor).st_mode):
            rights &= _READ_FILE | _WRITE_FILE | _TRUNCATE
        rule = struct.pack("=Qi", rights, descriptor)
        _checked(libc.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0))
    finally:
        os.close(descriptor)


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result
