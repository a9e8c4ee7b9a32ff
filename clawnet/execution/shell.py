"""One shell run from its start to its end: the process, its output as it comes, its limits, and how it ended. POSIX.

Sandboxed runs go through bubblewrap; host runs (ring own, where there is no sandbox) are plain processes with the
same limits. Either way the run ends when its command does, and nothing that it started lives on.
"""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from msgspec import Struct

from clawnet import limits
from clawnet.execution import gpu, process, sandbox_bwrap, sandbox_macos
from clawnet.execution.endings import Ended
from clawnet.execution.feeding import Feed
from clawnet.execution.sandbox_bwrap import PATH, Bubblewrap
from clawnet.execution.spares import Spare, Spares
from clawnet.execution.spec import JobSpec
from clawnet.execution.watching import Bounds, Watchdog

STDOUT, STDERR = 1, 2
_LIFELINE_FD: Final = 5
_PAUSE_S: Final = 0.02
_SPOOL_BYTES: Final = limits.MIB
_HUNTS_MAX: Final = 20

# The same limits as inside the sandbox. The guardian, outside the command's ancestry but in its process group, kills
# that group when the daemon is gone: then the lifeline's other end closes.
_HOST_SCRIPT: Final = (
    "echo 1000 2>/dev/null >/proc/self/oom_score_adj; "
    'cd "$1" && shift && unset OLDPWD && ulimit -c 0 && ulimit -t {cpu_s} && '
    "ulimit -f {file_blocks} && ulimit -n {files} && "
    "{{ ulimit -v {address_kib} 2>/dev/null || :; }} && "
    "{{ ulimit -p {processes} 2>/dev/null || ulimit -u {processes}; }} && printf r >&3 || exit 125; "
    '( (trap "" TERM HUP INT; read -r _; kill -KILL 0) <&5 3>&- >/dev/null 2>&1 & ); '
    'exec 3>&- 5<&-; exec "$@"'
)


class Place(Struct, frozen=True):
    """Where and how runs happen: in bubblewrap (`sandbox`), in a seatbelt, or with neither on the host.

    Outside bubblewrap they run as `uid` if that is not None. `seccomp` is the descriptor of the filter (-1: none);
    `mark` begins the mark that such runs carry, so that a node finds what an earlier life of its own left behind.
    `spares` has a sandbox that is set up already, at times.
    """

    sandbox: Bubblewrap | None
    seccomp: int
    uid: int | None
    spool_dir: Path
    mark: str = ""
    processes: int = limits.RUN_PROCESSES_MAX
    backlog: Callable[[], bool] = lambda: False
    gpus: tuple[gpu.Gpu, ...] = ()
    seatbelt: sandbox_macos.Seatbelt | None = None
    spares: Spares | None = None


def environment_of(spec: JobSpec, place: Place, directory: Path) -> dict[str, str]:
    """All that a run finds in its environment."""
    if place.sandbox is not None:
        return {**sandbox_bwrap.ENVIRONMENT, **spec.env, **gpu.variables(place.gpus, spec.gpus)}
    mark = {process.MARK: place.mark + spec.job.hex()}
    if place.seatbelt is not None:
        return {**sandbox_macos.environment(spec.env, directory), **mark}
    # Of a root node the run is somebody else, for whom root's own PATH means little.
    path = PATH if place.uid is not None else os.environ.get("PATH", PATH)
    base = {"PATH": path, "HOME": str(directory), "LANG": "C.UTF-8"}
    base["TMPDIR"] = str(directory.parent / "tmp")
    return {**base, **spec.env, **gpu.variables(place.gpus, spec.gpus), **mark}


def command_of(spec: JobSpec) -> list[str]:
    """The command as argv."""
    return list(spec.argv) if spec.argv is not None else ["sh", "-c", spec.script or ""]


def read_status(data: bytes) -> tuple[bool, int | None, int | None]:
    """(the set-up was done, exit code, signal) from what the script inside wrote (sandbox_bwrap.SCRIPT).

    A shell reports 128+N for a fatal signal N; only then it has also said so on its stderr, except for SIGINT and
    SIGPIPE, which it passes over in silence and which therefore read as exit codes 130 and 141.
    """
    if not data.startswith(b"r"):
        return False, None, None
    said, _, number = data[1:].rstrip(b"\n").rpartition(b"\n")
    if not number.isdigit() or len(number) > 3:
        return True, None, None
    code = int(number)
    return (True, None, code - 128) if said and code > 128 else (True, code, None)


class _Stream:
    """One output pipe: what was read so far, kept in memory and beyond a size in an unnamed file."""

    def __init__(self, number: int, descriptor: int, spool_dir: Path) -> None:
        self.number = number
        self.descriptor = descriptor
        self.size = 0
        self.kept = tempfile.SpooledTemporaryFile(max_size=_SPOOL_BYTES, dir=str(spool_dir))  # noqa: SIM115

    @property
    def open(self) -> bool:
        return self.descriptor >= 0

    def again(self, offset: int, length: int) -> bytes:
        """A piece of what was read so far."""
        self.kept.seek(offset)
        data = self.kept.read(length)
        self.kept.seek(self.size)
        return data


class ShellRun:
    """One run. `on_output(stream, offset, data)` comes as output does, `on_end(Ended)` once, after all of it.

    `stdin` is a file to read standard input from instead of `spec.stdin`; `disk_bytes_max` bounds what lies
    in the job's directories.
    """

    def __init__(
        self,
        spec: JobSpec,
        directory: Path,
        place: Place,
        *,
        stdin: Path | None = None,
        disk_bytes_max: int = limits.RUN_DISK_BYTES_MAX,
        on_output: Callable[[int, int, bytes], None],
        on_end: Callable[[Ended], None],
    ) -> None:
        self.spec = spec
        self.streams: list[_Stream] = []
        self._directory = directory
        self._place = place
        self._stdin = stdin
        self._feed: Feed | None = None
        self._on_output = on_output
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._child: process.Child | None = None
        self._status = -1
        self._lifeline = -1
        self._stopped: tuple[str, str] | None = None
        self._result: tuple[int, Any] | None = None
        self._timers: list[asyncio.TimerHandle] = []
        self._started_s = 0.0
        self._disk_bytes_max = disk_bytes_max
        self._watchdog: Watchdog | None = None
        self._finished = False

    # --- start

    def start(self) -> None:
        """Raises OSError when the process cannot be started at all."""
        spare = self._spare()
        if spare is None:
            pid, ours = self._launch()
            hunt = self._before_reaping if self._place.sandbox is None else None
            self._child = process.Child(pid, self._on_exit, self._loop, hunt)
        else:
            self._child, ours = spare.child, spare.ours
            self._child.hand_over(self._on_exit)
        self._status = ours.pop()
        self._attend(ours)

    def _spare(self) -> Spare | None:
        """A sandbox that was set up before and has been told this run's command, if one is there that is like it."""
        self._started_s = time.monotonic()
        spares = self._place.spares
        if spares is None or not self._is_plain():
            return None
        return spares.take(self._directory, self._tmp_bytes(), command_of(self.spec), self._limit(), self.spec.stdin)

    def _is_plain(self) -> bool:
        """Whether nothing but the command, the limits and a short standard input tells this run from others."""
        return not self.spec.env and not self.spec.gpus and self._stdin is None

    def _launch(self) -> tuple[int, list[int]]:
        """Starts the process; its pid, and our ends of its stdout, stderr and status."""
        spec, place = self.spec, self._place
        environment = environment_of(spec, place, self._directory)
        argv, own = self._command(environment)
        ours: list[int] = []
        theirs: dict[int, int] = {}
        try:
            theirs[0] = self._standard_input()
            for target in (1, 2, sandbox_bwrap.STATUS_FD):
                reading, theirs[target] = os.pipe()
                os.set_blocking(reading, False)
                ours.append(reading)
            if place.sandbox is None:
                theirs[_LIFELINE_FD], self._lifeline = os.pipe()
            else:
                theirs[sandbox_bwrap.OPTIONS_FD] = process.memory_file(sandbox_bwrap.options(environment))
                if place.seccomp >= 0:
                    # Its own open file, hence its own place in it: runs start at the same time.
                    theirs[sandbox_bwrap.SECCOMP_FD] = os.open(f"/proc/self/fd/{place.seccomp}", os.O_RDONLY)
            self._started_s = time.monotonic()
            return process.start(argv, own, theirs), ours
        except OSError:
            for descriptor in ours:
                os.close(descriptor)
            self._close_held()
            raise
        finally:
            for descriptor in theirs.values():
                os.close(descriptor)

    def _attend(self, outputs: list[int]) -> None:
        """Reads what it writes, feeds it, and watches over it from now on."""
        spec = self.spec
        for number, descriptor in zip((STDOUT, STDERR), outputs, strict=True):
            stream = _Stream(number, descriptor, self._place.spool_dir)
            self.streams.append(stream)
            self._loop.add_reader(descriptor, self._on_readable, stream)
        if self._feed is not None:
            self._feed.start()
        self._later(spec.wall_s, self.stop, "wall_limit", f"the run took longer than {spec.wall_s:g} s")
        if process.WATCHED:
            bounds = Bounds(spec.memory_bytes_max, self._disk_bytes_max)
            self._watchdog = Watchdog(
                bounds, self._directory.parent, members=self._members, end=self.stop, in_files=self._in_files
            )
            self._watchdog.start()

    def _standard_input(self) -> int:
        """A descriptor for the command to read from."""
        if self._stdin is not None:
            self._feed = Feed(self._stdin, self._loop, lambda reason: self.stop("failed", reason))
            return self._feed.reading
        return process.memory_file(self.spec.stdin) if self.spec.stdin else os.open(os.devnull, os.O_RDONLY)

    def _command(self, environment: dict[str, str]) -> tuple[list[str], dict[str, str]]:
        """The command line, and the environment of its outermost program: never the task's where that one is root."""
        spec, place = self.spec, self._place
        limit = self._limit()
        if place.sandbox is not None:
            argv = place.sandbox.argv(
                self._directory,
                command_of(spec),
                limit=limit,
                tmp_bytes=self._tmp_bytes(),
                seccomp=place.seccomp >= 0,
                devices=gpu.bind_words(place.gpus, spec.gpus),
            )
            # Not in the task's own: by it a later life of the node finds a sandbox that outlived this one's.
            return argv, {**sandbox_bwrap.OUTSIDE, process.MARK: place.mark + spec.job.hex()}
        argv = ["/bin/sh", "-c", _HOST_SCRIPT.format(**limit), "sh", str(self._directory), *command_of(spec)]
        if place.seatbelt is not None:
            argv = place.seatbelt.argv(self._directory, argv)
        if place.uid is None:
            return argv, environment
        words = [f"{name}={value}" for name, value in environment.items()]
        return [*sandbox_bwrap.drop_words(place.uid), "/usr/bin/env", "-", *words, *argv], sandbox_bwrap.OUTSIDE

    def _limit(self) -> dict[str, int]:
        """The rlimits of the command, in words of the shell that sets them."""
        spec, place = self.spec, self._place
        processes = place.processes
        if place.sandbox is None:
            processes += process.threads_of(os.getuid() if place.uid is None else place.uid)
        return sandbox_bwrap.limit_words(
            wall_s=spec.wall_s, memory_bytes_max=spec.memory_bytes_max, processes=processes, gpu=bool(spec.gpus)
        )

    def _tmp_bytes(self) -> int:
        return min(self.spec.memory_bytes_max // 4, limits.RUN_TMP_BYTES_MAX)

    def _later(self, delay_s: float, callback: Callable[..., None], *args: Any) -> None:
        self._timers.append(self._loop.call_later(delay_s, callback, *args))

    # --- output

    def _on_readable(self, stream: _Stream) -> None:
        if self._place.backlog() and self._result is None:
            self._loop.remove_reader(stream.descriptor)
            self._later(_PAUSE_S, self._resume, stream)
            return
        self._read(stream)

    def _resume(self, stream: _Stream) -> None:
        if stream.open:
            self._loop.add_reader(stream.descriptor, self._on_readable, stream)

    def _read(self, stream: _Stream) -> bool:
        """One chunk; False when there is nothing (more) to read now."""
        try:
            data = os.read(stream.descriptor, limits.OUTPUT_CHUNK_BYTES_MAX)
        except BlockingIOError:
            return False
        if not data:
            self._close(stream)
            self._finish_if_over()
            return False
        room = self.spec.output_bytes_max - sum(each.size for each in self.streams)
        if len(data) > room:
            self._lose("output_limit", f"the run wrote more than {self.spec.output_bytes_max} bytes")
            data = data[: max(0, room)]
        if data:
            try:
                stream.kept.write(data)
            except OSError as error:
                self._lose("failed", f"its output cannot be kept: {error.strerror or error}")
                return True
            offset, stream.size = stream.size, stream.size + len(data)
            self._on_output(stream.number, offset, data)
        return True

    def _lose(self, how: str, reason: str) -> None:
        """Some of its output is not kept: so the run ends, also when that is found only after its command has ended."""
        self.stop(how, reason)
        if self._stopped is None:
            self._stopped = (how, reason)

    def _close(self, stream: _Stream) -> None:
        if stream.open:
            self._loop.remove_reader(stream.descriptor)
            os.close(stream.descriptor)
            stream.descriptor = -1

    def written(self, number: int, offset: int, length: int) -> bytes:
        """What the command wrote to a stream from `offset` on, at most `length` bytes; empty where nothing is kept."""
        for stream in self.streams:
            if stream.number == number and offset < stream.size:
                try:
                    return stream.again(offset, length)
                except OSError as error:
                    self.stop("failed", f"its output cannot be read back: {error.strerror or error}")
        return b""

    # --- limits and the end

    def stop(self, how: str, reason: str) -> None:
        """Ends the run: SIGTERM to all its processes and SIGKILL after a grace; over a limit of size, at once."""
        if self._stopped is not None or self._result is not None or (self._child is not None and self._child.over):
            return
        self._stopped = (how, reason)
        if how in ("cancelled", "wall_limit"):
            members = self._members()
            for pid in members:
                process.send(pid, signal.SIGTERM)
            # None yet: the sandbox is still being set up, and there is nobody to be given a grace.
            self._later(limits.KILL_GRACE_S if members or not process.LINUX else 0.0, self._kill)
        else:
            self._kill()

    def _members(self) -> list[int]:
        """The run's own processes: without bubblewrap, and without the process 1 that reports how the command ended."""
        if self._child is None or self._child.ended:
            return []
        found = process.tree(self._child.pid, limits.RUN_PROCESSES_MAX)
        if self._place.seatbelt is not None:
            return list(dict.fromkeys([*found, *self._place.seatbelt.members(self._directory)]))
        return found[2:] if self._place.sandbox is not None else found

    def _in_files(self) -> int:
        """The memory that lies in the sandbox's own /tmp and /dev/shm."""
        if self._place.sandbox is None or not self._place.sandbox.in_memory or self._child is None:
            return 0
        return sum(process.mounted_bytes(pid, sandbox_bwrap.IN_MEMORY) for pid in process.children(self._child.pid)[:1])

    def _kill(self) -> None:
        child = self._child
        if child is None or child.ended:
            return
        if self._place.sandbox is None:
            self._kill_host()
            return
        # Process 1 of the sandbox takes all others with it, and bubblewrap then ends by itself, after them.
        process.kill_sandbox(child.pid)
        self._later(limits.RUN_DRAIN_S, child.kill)

    def _kill_host(self) -> None:
        """Kills the process group and what descends from it; what left it is looked for before the child is reaped."""
        child = self._child
        if child is None:
            return
        for pid in process.tree(child.pid, limits.RUN_PROCESSES_MAX)[1:]:
            process.send(pid, signal.SIGKILL)
        child.signal_group(signal.SIGKILL)

    def _before_reaping(self) -> None:
        """Kills what is left of a host run: of its group, and what left that but has the run's mark or its sandbox.

        In a thread: to read the environments of all processes takes seconds where hundreds of them fork.
        """
        self._kill_host()
        child = self._child
        for _ in range(_HUNTS_MAX):
            found = process.marked(self._place.mark + self.spec.job.hex())
            if self._place.seatbelt is not None:
                found += self._place.seatbelt.members(self._directory)
            found = [pid for pid in found if child is not None and pid != child.pid]
            if not found:
                break
            for pid in found:
                process.send(pid, signal.SIGKILL)

    def _on_exit(self, status: int, usage: Any) -> None:
        self._result = (status, usage)
        if self._watchdog is not None:
            self._watchdog.stop()
        for timer in self._timers:
            timer.cancel()
        for stream in self.streams:
            while stream.open and self._read(stream):
                pass
        self._later(limits.RUN_DRAIN_S, self._give_up_draining)
        self._finish_if_over()

    def _give_up_draining(self) -> None:
        for stream in self.streams:
            self._close(stream)
        self._finish_if_over()

    def _finish_if_over(self) -> None:
        if self._result is None or self._finished or any(stream.open for stream in self.streams):
            return
        self._finished = True
        for timer in self._timers:
            timer.cancel()
        self._close_held()
        ended = self._ended(*self._result)
        self._on_end(ended)
        if self._place.spares is not None and ended.how == "exit" and self._is_plain():
            self._place.spares.wanted(self._tmp_bytes())

    def _close_held(self) -> None:
        if self._feed is not None:
            self._feed.close()
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1

    def _ended(self, status: int, usage: Any) -> Ended:
        ready, code, number = self._outcome(status)
        if self._stopped is not None:
            how, reason = self._stopped
        elif ready:
            how, reason = "exit", ""
        else:
            how, reason = "failed", "the run could not be set up: " + self._last_words()
        unit = 1024 if process.LINUX else 1
        seen = self._watchdog
        # The kernel counts our own size into a process that posix_spawn started: a smaller figure says nothing.
        largest = usage.ru_maxrss if usage.ru_maxrss > resource.getrusage(resource.RUSAGE_SELF).ru_maxrss else 0
        return Ended(
            how=how,
            reason=reason,
            exit_code=code,
            signal=number,
            duration_s=time.monotonic() - self._started_s,
            cpu_s=max(usage.ru_utime + usage.ru_stime, seen.cpu_s if seen is not None else 0.0),
            memory_bytes_max=max(largest * unit, seen.peak_bytes if seen is not None else 0),
        )

    def _outcome(self, status: int) -> tuple[bool, int | None, int | None]:
        try:
            said = os.read(self._status, limits.OUTPUT_CHUNK_BYTES_MAX)
        except BlockingIOError:
            said = b""
        os.close(self._status)
        waited = os.waitstatus_to_exitcode(status)
        if self._place.sandbox is not None:
            ready, code, number = read_status(said)
            if ready and code is None and number is None:
                number = waited - 128 if waited > 128 else signal.SIGKILL
            return ready, code, None if number is None else int(number)
        return (said.startswith(b"r"), None, -waited) if waited < 0 else (said.startswith(b"r"), waited, None)

    def _last_words(self) -> str:
        stream = self.streams[STDERR - 1]
        stream.kept.seek(max(0, stream.size - 400))
        return stream.kept.read(400).decode("utf-8", "replace").strip() or "it said nothing"
