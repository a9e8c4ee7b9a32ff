"""Starting a process with exact descriptors, hearing of its end, finding and killing all that came from it. POSIX."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from clawnet.execution import libproc

LINUX: Final = sys.platform.startswith("linux")
WATCHED: Final = LINUX or sys.platform == "darwin"
"""Whether the system tells what processes hold, so that a run can be watched."""
MARK: Final = "CLAWNET_JOB"
"""The environment variable by which a host run's processes are found even after they left its process group."""
_LOOKS_AT_AN_EXEC: Final = 50
_LOOK_S: Final = 0.05

_FD_MIN: Final = 64
_PAGE: Final = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
_TICK: Final = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100

ExitCallback = Callable[[int, Any], None]
"""Called once with the wait status and the rusage of the process and all it waited for."""


def memory_file(data: bytes) -> int:
    """A descriptor to read `data` from: a memory file on Linux, an unlinked temporary file elsewhere."""
    descriptor = empty_memory_file()
    fill(descriptor, data)
    return descriptor


def empty_memory_file() -> int:
    """One to be filled later."""
    if sys.platform == "linux":
        return os.memfd_create("clawnet", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    import tempfile

    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def fill(descriptor: int, data: bytes) -> None:
    """Writes all that it will ever hold: a run could keep there, by its descriptor, what counts as nobody's memory."""
    view = memoryview(data)
    while view:
        view = view[os.pwrite(descriptor, view, len(data) - len(view)) :]
    if sys.platform == "linux":
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)


def _inheritable() -> Iterator[int]:
    """Descriptors that a new process would inherit: none of ours, but some came from whoever started this one."""
    for name in os.listdir("/proc/self/fd" if LINUX else "/dev/fd"):
        descriptor = int(name)
        if descriptor > 2:
            try:
                if os.get_inheritable(descriptor):
                    yield descriptor
            except OSError:
                continue  # it was the listing's own


def start(argv: Sequence[str], environment: Mapping[str, str], descriptors: Mapping[int, int]) -> int:
    """Starts argv[0] (a path) in a session of its own; `descriptors` maps its numbers (0 to 9) to ours. Gives the pid.

    posix_spawn: the time does not grow with this process's memory, and no Python runs between fork and exec. Raises
    OSError when it cannot be started.
    """
    copies: dict[int, int] = {}
    defaults = [signal.SIGPIPE, signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD, signal.SIGXFSZ]
    try:
        for target, source in descriptors.items():
            copies[target] = fcntl.fcntl(source, fcntl.F_DUPFD_CLOEXEC, _FD_MIN)
        actions: list[tuple[Any, ...]] = [(os.POSIX_SPAWN_CLOSE, fd) for fd in _inheritable() if fd not in copies]
        actions += [(os.POSIX_SPAWN_DUP2, copy, target) for target, copy in copies.items()]
        return os.posix_spawn(
            argv[0],
            [os.fsencode(word) for word in argv],
            {os.fsencode(k): os.fsencode(v) for k, v in environment.items()},
            file_actions=actions,
            setsid=True,
            setsigdef=defaults,
            setsigmask=[],
        )
    finally:
        for copy in copies.values():
            os.close(copy)


class Child:
    """A started process; `on_exit` is called in the loop when it ended. Signals never reach a reused pid."""

    def __init__(
        self,
        pid: int,
        on_exit: ExitCallback,
        loop: asyncio.AbstractEventLoop,
        before_reaping: Callable[[], None] | None = None,
    ) -> None:
        """`before_reaping` is called, in a thread, when it ended but its pid still stands for its process group."""
        self.pid = pid
        self._before_reaping = before_reaping
        self.over = False
        """It runs no longer; `ended` once it is reaped as well."""
        self.ended = False
        self._on_exit = on_exit
        self._loop = loop
        self._pidfd = -1
        if hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError):  # a kernel before 5.3: a thread waits instead
                self._pidfd = os.pidfd_open(pid)
        if self._pidfd >= 0:
            loop.add_reader(self._pidfd, self._over)
        else:
            try:
                self._in_thread(lambda: _wait_unreaped(self.pid), self._over)
            except RuntimeError:  # nor is a thread to be had: the loop looks now and then
                self._look()

    def hand_over(self, on_exit: ExitCallback) -> None:
        """Whom its end is told from now on."""
        self._on_exit = on_exit

    def wait(self) -> None:
        """Returns when it has ended, is reaped and its end is told; for a child without `before_reaping`."""
        if not self.over:
            _wait_unreaped(self.pid)
            self._over()

    def lives(self) -> bool:
        """Whether it still runs; the loop may not have heard of its end yet."""
        return not self.over and os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def _look(self) -> None:
        if self.over or _is_over(self.pid):
            self._over()
        else:
            self._loop.call_later(_LOOK_S, self._look)

    def _over(self) -> None:
        if self.over:
            return  # it was waited for meanwhile
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
        self.over = True
        if self._before_reaping is None:
            self._reap()
            return
        try:
            self._in_thread(self._before_reaping, self._reap)
        except RuntimeError:  # no thread is to be had beside so many processes of this user: the loop does it
            self._before_reaping()
            self._reap()

    def _reap(self) -> None:
        _, status, usage = os.wait4(self.pid, 0)
        self.ended = True
        self._on_exit(status, usage)

    def _in_thread(self, work: Callable[[], None], then: Callable[[], None]) -> None:
        def do() -> None:
            try:
                work()
            finally:
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody asks any longer
                    self._loop.call_soon_threadsafe(then)

        threading.Thread(target=do, name=f"clawnet-child-{self.pid}", daemon=True).start()

    def signal_group(self, number: int) -> None:
        """Signals the process group, which is the session's first; nothing when the process has ended."""
        if not self.ended:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # gone; macOS's word for zombies only
                os.killpg(self.pid, number)

    def kill(self) -> None:
        """SIGKILL to this one process."""
        if not self.ended:
            send(self.pid, signal.SIGKILL)


def _wait_unreaped(pid: int) -> None:
    """Returns when a child has ended; its pid still stands for it then."""
    _is_over(pid, wait=True)


def _is_over(pid: int, wait: bool = False) -> bool:
    """Whether a child has ended, be it reaped or not; with `wait`, when it has."""
    if sys.platform == "darwin":
        import select

        queue = select.kqueue()
        try:
            end = select.kevent(
                pid, select.KQ_FILTER_PROC, select.KQ_EV_ADD | select.KQ_EV_ONESHOT, select.KQ_NOTE_EXIT
            )
            return bool(queue.control([end], 1, None if wait else 0))
        except ProcessLookupError:  # it has ended before it could be watched
            return True
        finally:
            queue.close()
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | (0 if wait else os.WNOHANG)) is not None
    except ChildProcessError:  # it was waited for meanwhile
        return True


def send(pid: int, number: int) -> None:
    """A signal to a process that may be gone already."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def kill_sandbox(pid: int) -> None:
    """SIGKILL to a child of ours that is bubblewrap, or to process 1 inside, after whose end it ends by itself.

    Process 1 begins as one that waits for bubblewrap's word, and it would for ever if that were killed after our look.
    Stopped, bubblewrap begins none between the look and its end. Linux.
    """
    inside = children(pid)
    if not inside:
        send(pid, signal.SIGSTOP)
        os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        inside = children(pid)
        send(pid, signal.SIGKILL)
    for each in inside:
        send(each, signal.SIGKILL)


def children(pid: int) -> list[int]:
    """The processes that `pid` started and that still live; empty where the system does not tell."""
    if sys.platform == "darwin":
        return libproc.listed(libproc.PPID_ONLY, pid)
    found: list[int] = []
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children", "rb") as file:
                found += map(int, file.read().split())
    except (OSError, ValueError):
        return found
    return found


def tree(pid: int, most: int) -> list[int]:
    """`pid` and all its descendants, parents first, at most `most`."""
    found = [pid]
    for each in found:
        if len(found) >= most:
            break
        found += children(each)
    return found


def resident_bytes(pids: Sequence[int]) -> int:
    """The memory that these processes hold, shared pages counted for each of them."""
    if sys.platform == "darwin":
        return sum(info.resident_size for info in map(libproc.task_info, pids) if info is not None)
    pages = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/statm", "rb") as file:
                pages += int(file.read(128).split()[1])
        except (OSError, ValueError, IndexError):
            continue
    return pages * _PAGE


def proportional_bytes(pids: Sequence[int], in_files: int = 0) -> int:
    """The memory that these processes hold, shared pages counted once in all; dearer to ask for than resident_bytes.

    `in_files` is what they hold in file systems of memory besides, of which what is mapped is not counted twice.
    """
    if sys.platform != "linux":
        return resident_bytes(pids) + in_files
    total = mapped = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
                lines = file.read(4096).splitlines()
        except OSError:
            total += resident_bytes((pid,))
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(b"Pss:"))
        mapped += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(b"Pss_Shmem:"))
    return total + max(0, in_files - mapped)


def mounted_bytes(pid: int, paths: Sequence[str]) -> int:
    """What is used of the file systems at these paths as `pid` sees them, where they are other than ours; Linux."""
    used = 0
    for path in paths:
        try:
            # Opened once: while the sandbox is being set up, the same name is another place from call to call.
            inside = os.open(f"/proc/{pid}/root{path}", os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            continue  # it has ended
        try:
            if os.fstat(inside).st_dev == os.stat(path).st_dev:
                continue  # the sandbox is still being set up: this is the host's own
            found = os.fstatvfs(inside)
        except OSError:
            continue
        finally:
            os.close(inside)
        used += (found.f_blocks - found.f_bfree) * found.f_frsize
    return used


def cpu_seconds(pids: Sequence[int]) -> float:
    """Processor time of these processes, on Linux also of the children they waited for."""
    if sys.platform == "darwin":
        found = [info for info in map(libproc.task_info, pids) if info is not None]
        return sum(libproc.seconds(info.total_user + info.total_system) for info in found)
    ticks = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                fields = file.read(1024).rpartition(b")")[2].split()
            ticks += sum(map(int, fields[11:15]))
        except (OSError, ValueError):
            continue
    return ticks / _TICK


def threads_of(uid: int) -> int:
    """How many threads (macOS: processes) `uid` has: what RLIMIT_NPROC counts outside a user namespace of its own."""
    if sys.platform == "darwin":
        return len(libproc.listed(libproc.UID_ONLY, uid))
    count = 0
    for name in os.listdir("/proc") if LINUX else ():
        if name.isdigit():
            try:
                if os.stat(f"/proc/{name}").st_uid == uid:
                    count += len(os.listdir(f"/proc/{name}/task"))
            except OSError:
                continue
    return count


def marked(value: str) -> list[int]:
    """Processes whose environment at their start carried MARK=value (any value that begins so); Linux only."""
    wanted = f"{MARK}={value}".encode()
    found: list[int] = []
    for name in os.listdir("/proc") if LINUX else ():
        if name.isdigit():
            environment = _environment(name)
            if environment.startswith(wanted) or b"\0" + wanted in environment:
                found.append(int(name))
    return found


def _environment(name: str) -> bytes:
    """What the process was given at its start; in the moment of its exec that is not there yet, and is looked at again.

    Processes of the kernel and those that are over have no program, and never any.
    """
    for _ in range(_LOOKS_AT_AN_EXEC):
        try:
            with open(f"/proc/{name}/environ", "rb") as file:
                if environment := file.read(256 * 1024):
                    return environment
            os.readlink(f"/proc/{name}/exe")
        except OSError:
            return b""
        os.sched_yield()
    return b""
