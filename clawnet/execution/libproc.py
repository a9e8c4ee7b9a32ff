"""What macOS tells of processes (libproc) and of their sandboxes (libsandbox), where Linux has /proc.

Layouts and numbers: XNU bsd/sys/proc_info.h; sandbox_check as programs that sandbox their own parts use it. Everything
is asked through ctypes; on other systems only the layouts mean anything.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from typing import Any, Final

ALL_PIDS, UID_ONLY, PPID_ONLY = 1, 4, 6
TASK_INFO: Final = 4
FILTER_PATH, NO_REPORT = 1, 0x4000_0000
NOWHERE: Final = "/private/var/empty/clawnet-nowhere"
_PIDS_MAX: Final = 65_536


class TaskInfo(ctypes.Structure):
    """struct proc_taskinfo: bytes, and times in the units of mach_timebase_info."""

    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("virtual_size", "resident_size", "total_user", "total_system")),
        *((name, ctypes.c_uint64) for name in ("threads_user", "threads_system")),
        *(
            (name, ctypes.c_int32)
            for name in (
                "policy",
                "faults",
                "pageins",
                "cow_faults",
                "messages_sent",
                "messages_received",
                "syscalls_mach",
                "syscalls_unix",
                "csw",
                "threadnum",
                "numrunning",
                "priority",
            )
        ),
    ]


class Timebase(ctypes.Structure):
    """struct mach_timebase_info: nanoseconds are units * numer / denom."""

    _fields_ = [("numer", ctypes.c_uint32), ("denom", ctypes.c_uint32)]


def pids_in(buffer: Sequence[int], bytes_filled: int) -> list[int]:
    """The process ids in the first bytes of a buffer of 32-bit numbers; zeros stand for none."""
    return [pid for pid in buffer[: max(0, bytes_filled) // 4] if pid > 0]


if sys.platform == "darwin":
    _libc: Any = ctypes.CDLL(None, use_errno=True)
    _libc.proc_listpids.argtypes = [ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_int]
    _libc.proc_pidinfo.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_int]
    # The fixed arguments alone are declared: what follows them goes as variadic, which Apple's arm64 passes elsewhere.
    _libc.sandbox_check.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int]

    def listed(which: int, of: int = 0) -> list[int]:
        """Process ids: all, those of a user, or the children of a process."""
        buffer = (ctypes.c_int32 * _PIDS_MAX)()
        filled = _libc.proc_listpids(which, of, buffer, ctypes.sizeof(buffer))
        return pids_in(list(buffer[: max(0, filled) // 4]), filled)

    def task_info(pid: int) -> TaskInfo | None:
        """What a process holds and has used; None when it is gone or another user's."""
        info = TaskInfo()
        size = ctypes.sizeof(info)
        return info if _libc.proc_pidinfo(pid, TASK_INFO, 0, ctypes.byref(info), size) == size else None

    def seconds(units: int) -> float:
        """Processor time as the kernel counts it, in seconds."""
        base = Timebase()
        _libc.mach_timebase_info(ctypes.byref(base))
        return float(units * base.numer / max(1, base.denom) / 1e9)

    def may_write(pid: int, path: str) -> bool:
        """Whether the sandbox of a process lets it write to this path; without one everything is let."""
        word = ctypes.c_char_p(path.encode("utf-8", "surrogateescape"))
        return bool(_libc.sandbox_check(pid, b"file-write-data", FILTER_PATH | NO_REPORT, word) == 0)

    def confined_to(directory: str) -> list[int]:
        """The processes whose sandbox opens this directory and not the rest: a sandbox is inherited and never left."""
        found = [pid for pid in listed(ALL_PIDS) if not may_write(pid, NOWHERE)]
        return [pid for pid in found if may_write(pid, directory)]
