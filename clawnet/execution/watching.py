"""The watchdog over a run: memory of all its processes together, processor time, disk space, room on the machine.

What the kernel would bound with a cgroup is looked at here, since few machines give a user one that can be written. A
run may therefore pass a bound for the moment between two looks; what it holds then is given back by ending it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from msgspec import Struct

from clawnet import limits
from clawnet.execution import process
from clawnet.execution.diskuse import Used, disk_used, free_bytes, over
from clawnet.execution.threads import in_thread

FIRST_LOOK_S: Final = 0.02
_GROWTH_BYTES_PER_S: Final = 4 * 1024 * limits.MIB
_WALK_SHARE: Final = 20
_LOOK_SHARE: Final = 4


class Bounds(Struct, frozen=True, gc=False):
    """What a run may hold. `disk_bytes_max` is of its working directory, inputs included."""

    memory_bytes_max: int
    disk_bytes_max: int
    files_max: int = limits.RUN_FILES_MAX


def memory_left() -> int | None:
    """What this machine can still give without swapping; None where it does not tell."""
    try:
        with open("/proc/meminfo", "rb") as file:
            for line in file:
                if line.startswith(b"MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        return None
    return None


class Watchdog:
    """Looks at one run again and again until `stop`; ends it with `end(how, reason)` when it holds too much.

    `members` gives its processes, `root` is the directory of the job, on the file system of the working directories.
    `in_files` tells what they keep in file systems of memory. `peak_bytes` and `cpu_s` are the most that was seen.
    """

    def __init__(
        self,
        bounds: Bounds,
        root: Path,
        *,
        members: Callable[[], list[int]],
        end: Callable[[str, str], None],
        in_files: Callable[[], int] = lambda: 0,
    ) -> None:
        self.peak_bytes = 0
        self.cpu_s = 0.0
        self._bounds = bounds
        self._root = root
        self._members = members
        self._in_files = in_files
        self._end = end
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._stopped = False
        self._walking = False
        self._weighing = False
        self._weigh_again_s = 0.0
        self._walked_s = time.monotonic()
        self._walk_took_s = 0.0
        self._used_bytes = 0
        self._free_then = free_bytes(root)

    def start(self) -> None:
        """The first look comes at once: a run that begins holds nothing yet."""
        self._timer = self._loop.call_later(FIRST_LOOK_S, self._look)

    def stop(self) -> None:
        """No more looks."""
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        if self._stopped:
            return
        began_s = time.monotonic()
        members = self._members()
        most = self._bounds.memory_bytes_max
        in_files = self._in_files()
        used = process.resident_bytes(members) + in_files
        self.cpu_s = max(self.cpu_s, process.cpu_seconds(members))
        if used > most:
            self._weigh(members, in_files)
        else:
            self.peak_bytes = max(self.peak_bytes, used)
        if self._machine_is_full():
            return
        self._look_at_disk(members)
        pause_s = min(max((most - used) / _GROWTH_BYTES_PER_S, limits.WATCH_MIN_S), limits.WATCH_MAX_S)
        # A run of many processes is looked at less often: the loop is not its alone.
        pause_s = max(pause_s, _LOOK_SHARE * (time.monotonic() - began_s))
        self._timer = self._loop.call_later(pause_s, self._look)

    def _weigh(self, members: list[int], in_files: int) -> None:
        """What they hold with shared pages counted once: the kernel takes seconds over it where many share much."""
        began_s = time.monotonic()
        if self._weighing or began_s < self._weigh_again_s:
            return
        self._weighing = in_thread(
            self._loop, lambda done: self._weighed(done, began_s), process.proportional_bytes, members, in_files
        )

    def _weighed(self, done: asyncio.Future[int], began_s: float) -> None:
        self._weighing = False
        now_s = time.monotonic()
        self._weigh_again_s = now_s + (now_s - began_s)
        if self._stopped or done.cancelled():
            return
        used, most = done.result(), self._bounds.memory_bytes_max
        self.peak_bytes = max(self.peak_bytes, used)
        if used > most:
            self._end("memory_limit", f"the run held {used} bytes of memory; {most} are allowed")

    def _machine_is_full(self) -> bool:
        left = memory_left()
        if left is not None and left < limits.MEMORY_RESERVE_BYTES:
            self._end("failed", "the memory of the executor is nearly used up")
            return True
        if free_bytes(self._root) < limits.DISK_RESERVE_BYTES:
            self._end("failed", "the disk of the working directories is nearly full")
            return True
        return False

    # --- disk

    def _look_at_disk(self, members: list[int]) -> None:
        """Walks the working directory when it can have grown too large since the last walk, and now and then anyway."""
        if self._walking:
            return
        left = self._bounds.disk_bytes_max - self._used_bytes
        taken = self._free_then - free_bytes(self._root)
        rest_s = max(limits.WATCH_DISK_S, _WALK_SHARE * self._walk_took_s)
        if taken <= left and time.monotonic() - self._walked_s < rest_s:
            return
        free = free_bytes(self._root)
        self._walking = in_thread(
            self._loop,
            lambda done: self._walked(done, free),
            disk_used,
            self._root,
            members,
            self._bounds.files_max,
        )
        if self._walking:
            self._walked_s = time.monotonic()

    def _walked(self, done: asyncio.Future[Used], free: int) -> None:
        self._walking = False
        if self._stopped or done.cancelled() or done.exception() is not None:
            return  # a directory that goes away under the walk is one of a run that ends
        found = done.result()
        self._walk_took_s = time.monotonic() - self._walked_s
        self._used_bytes, self._free_then = found.bytes, free
        reason = over(found, self._bounds.disk_bytes_max, self._bounds.files_max)
        if reason:
            self._end("disk_limit", reason)
