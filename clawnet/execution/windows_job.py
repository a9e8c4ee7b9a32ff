"""Runs on Windows: one process in a Job Object, started suspended, so that nothing it starts is ever outside.

A Job Object bounds memory, processor time and the number of processes, and ends all of them together: when a run is
cancelled, when its command has ended, and when the node is gone. It isolates neither files nor network: on Windows
shell is for ring own, and nobody else. Layouts and numbers: winnt.h, JOBOBJECT_EXTENDED_LIMIT_INFORMATION.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from msgspec import Struct

from clawnet import limits
from clawnet.execution.diskuse import disk_used, free_bytes, over
from clawnet.execution.endings import Ended, ProbeResult
from clawnet.execution.spec import ExecutionSettings, JobSpec
from clawnet.execution.threads import in_thread
from clawnet.execution.workdirs import WorkDirs
from clawnet.paths import Home

STDOUT, STDERR = 1, 2
CREATE_SUSPENDED, CREATE_NO_WINDOW, CREATE_NEW_PROCESS_GROUP = 0x4, 0x0800_0000, 0x200
LIMIT_JOB_TIME, LIMIT_ACTIVE_PROCESS, LIMIT_PRIORITY, LIMIT_JOB_MEMORY = 0x4, 0x8, 0x20, 0x200
LIMIT_DIE_ON_EXCEPTION, LIMIT_KILL_ON_CLOSE = 0x400, 0x2000
BASIC_ACCOUNTING, UI_RESTRICTIONS, EXTENDED_LIMITS = 1, 4, 9
UI_ALL: Final = 0xFF
TERMINATED: Final = 0x636C_6177
"""The exit code of processes that were ended with their job."""
BELOW_NORMAL: Final = 0x4000
_TICKS_PER_S: Final = 10_000_000
_KEPT_NAMES: Final = ("SystemRoot", "SystemDrive", "PATH", "PATHEXT", "ComSpec", "windir", "NUMBER_OF_PROCESSORS", "OS")
_BATCH: Final = (".bat", ".cmd")
_SPOOL_BYTES: Final = limits.MIB


class IoCounters(ctypes.Structure):
    """IO_COUNTERS."""

    _fields_ = [(name, ctypes.c_uint64) for name in ("reads", "writes", "others", "read", "written", "other")]


class BasicLimits(ctypes.Structure):
    """JOBOBJECT_BASIC_LIMIT_INFORMATION; times in 100 ns."""

    _fields_ = [
        ("process_time", ctypes.c_int64),
        ("job_time", ctypes.c_int64),
        ("flags", ctypes.c_uint32),
        ("working_set_min", ctypes.c_size_t),
        ("working_set_max", ctypes.c_size_t),
        ("active_processes", ctypes.c_uint32),
        ("affinity", ctypes.c_size_t),
        ("priority", ctypes.c_uint32),
        ("scheduling", ctypes.c_uint32),
    ]


class ExtendedLimits(ctypes.Structure):
    """JOBOBJECT_EXTENDED_LIMIT_INFORMATION."""

    _fields_ = [
        ("basic", BasicLimits),
        ("io", IoCounters),
        ("process_memory", ctypes.c_size_t),
        ("job_memory", ctypes.c_size_t),
        ("peak_process_memory", ctypes.c_size_t),
        ("peak_job_memory", ctypes.c_size_t),
    ]


class Accounting(ctypes.Structure):
    """JOBOBJECT_BASIC_ACCOUNTING_INFORMATION; times in 100 ns."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("user", "kernel", "period_user", "period_kernel")),
        *((name, ctypes.c_uint32) for name in ("page_faults", "processes", "active", "terminated")),
    ]


def limits_of(spec: JobSpec, processors: int) -> ExtendedLimits:
    """The bounds of a run: processor time is what all processors could give in the time allowed."""
    found = ExtendedLimits()
    found.basic.flags = (
        LIMIT_JOB_TIME
        | LIMIT_ACTIVE_PROCESS
        | LIMIT_PRIORITY
        | LIMIT_JOB_MEMORY
        | LIMIT_DIE_ON_EXCEPTION
        | LIMIT_KILL_ON_CLOSE
    )
    found.basic.job_time = int((spec.wall_s * processors + 2) * _TICKS_PER_S)
    found.basic.active_processes = limits.RUN_PROCESSES_MAX
    found.basic.priority = BELOW_NORMAL
    found.job_memory = spec.memory_bytes_max
    return found


def environment_of(spec: JobSpec, directory: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """All that a run finds in its environment: what Windows itself cannot do without, and what the task gives."""
    known = {name.upper(): value for name, value in environ.items()}
    base = {name: known[name.upper()] for name in _KEPT_NAMES if name.upper() in known}
    tmp = str(directory.parent / "tmp")
    return {**base, "USERPROFILE": str(directory), "HOME": str(directory), "TEMP": tmp, "TMP": tmp, **spec.env}


def command_line(spec: JobSpec, found: Callable[[str], str | None], shell: str) -> tuple[str, int, str]:
    """(command line, 0, "") to start, or ("", exit code, what a shell would have said): 127 not found, 126 not to run.

    A script goes to `cmd /c` as it stands. A batch file is no program: its arguments would be read as commands, so it
    is for scripts, whose author knows that.
    """
    if spec.argv is None:
        return f'"{shell}" /d /s /c "{spec.script or ""}"', 0, ""
    name = spec.argv[0]
    program = found(name)
    if program is None:
        return "", 127, f"{name}: not found\r\n"
    if program.lower().endswith(_BATCH):
        return "", 126, f"{name}: a batch file; send it as a script: market submit --type shell\r\n"
    return subprocess.list2cmdline([program, *spec.argv[1:]]), 0, ""


class Place(Struct, frozen=True):
    """Where runs happen: on this machine, in a job each."""

    spool_dir: Path
    backlog: Callable[[], bool] = lambda: False


class Places:
    """What the executor asks on Windows: every run of ring own is on the host, in a Job Object; others' are not."""

    def __init__(self, settings: ExecutionSettings, home: Home, gpus: tuple[Any, ...] = ()) -> None:
        self._settings = settings
        self.uid = None
        self.dirs = WorkDirs(home, None)
        self.host_allowed = True

    async def open(self) -> ProbeResult:
        """Removes what an earlier life left; its processes ended with it, as its jobs were closed."""
        self.dirs.open()
        return ProbeResult(
            False,
            "Windows isolates neither files nor network for a run: shell tasks run for your own machines only",
            "members' shell tasks go to machines with Linux; compute tasks run here for all",
        )

    def mode(self, ring: str) -> str:
        """host or off."""
        return "host" if ring == "own" and self._settings.shell_own in ("auto", "host") else "off"

    def place(self, mode: str) -> Place:
        """The place for a mode other than off."""
        return Place(self.dirs.base, self._settings.backlog)

    def close(self) -> None:
        """Removes the working directories."""
        self.dirs.close()


class _Stream:
    """One output pipe: what was read so far, kept in memory and beyond a size in a temporary file."""

    def __init__(self, number: int, spool_dir: Path) -> None:
        self.number = number
        self.size = 0
        self.open = True
        self.kept = tempfile.SpooledTemporaryFile(max_size=_SPOOL_BYTES, dir=str(spool_dir))  # noqa: SIM115

    def again(self, offset: int, length: int) -> bytes:
        """A piece of what was read so far."""
        self.kept.seek(offset)
        data = self.kept.read(length)
        self.kept.seek(self.size)
        return data


if sys.platform == "win32":
    _kernel: Any = ctypes.WinDLL("kernel32", use_last_error=True)
    _ntdll: Any = ctypes.WinDLL("ntdll")
    for _function in (_kernel.CreateJobObjectW, _kernel.AssignProcessToJobObject, _ntdll.NtResumeProcess):
        _function.restype = ctypes.c_void_p if _function is _kernel.CreateJobObjectW else ctypes.c_int
    _kernel.CreateJobObjectW.argtypes = [ctypes.c_void_p, ctypes.c_wchar_p]
    _kernel.AssignProcessToJobObject.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    _kernel.SetInformationJobObject.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_uint32]
    _kernel.QueryInformationJobObject.argtypes = [
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_uint32,
        ctypes.c_void_p,
    ]
    _kernel.TerminateJobObject.argtypes = [ctypes.c_void_p, ctypes.c_uint32]
    _kernel.CloseHandle.argtypes = [ctypes.c_void_p]
    _ntdll.NtResumeProcess.argtypes = [ctypes.c_void_p]

    class Job:
        """A Job Object; closing it ends everything in it. Raises OSError."""

        def __init__(self, bounds: ExtendedLimits) -> None:
            self._handle = _kernel.CreateJobObjectW(None, None)
            if not self._handle:
                raise ctypes.WinError(ctypes.get_last_error())
            shut = ctypes.c_uint32(UI_ALL)
            try:
                self._set(EXTENDED_LIMITS, bounds)
                self._set(UI_RESTRICTIONS, shut)
            except OSError:
                self.close()
                raise

        def _set(self, which: int, value: Any) -> None:
            if not _kernel.SetInformationJobObject(self._handle, which, ctypes.byref(value), ctypes.sizeof(value)):
                raise ctypes.WinError(ctypes.get_last_error())

        def _ask(self, which: int, value: Any) -> Any:
            size = ctypes.sizeof(value)
            if not _kernel.QueryInformationJobObject(self._handle, which, ctypes.byref(value), size, None):
                raise ctypes.WinError(ctypes.get_last_error())
            return value

        def begin(self, process: subprocess.Popen[bytes]) -> None:
            """Takes in a suspended process and lets it go."""
            handle = int(process._handle)  # type: ignore[attr-defined]
            if not _kernel.AssignProcessToJobObject(self._handle, handle):
                raise ctypes.WinError(ctypes.get_last_error())
            if _ntdll.NtResumeProcess(handle) < 0:
                raise OSError("the process cannot be resumed")

        def used(self) -> tuple[float, int]:
            """(processor seconds, most memory) of all that ran in it."""
            told = self._ask(BASIC_ACCOUNTING, Accounting())
            held = self._ask(EXTENDED_LIMITS, ExtendedLimits())
            return (told.user + told.kernel) / _TICKS_PER_S, int(held.peak_job_memory)

        def terminate(self) -> None:
            """Ends every process in it."""
            if self._handle:
                _kernel.TerminateJobObject(self._handle, TERMINATED)

        def close(self) -> None:
            """Lets go of it, which ends what is left in it."""
            if self._handle:
                _kernel.CloseHandle(self._handle)
                self._handle = None

    class JobRun:
        """One run: `on_output(stream, offset, data)` comes as output does, `on_end(Ended)` once, after all of it."""

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
            self.streams = [_Stream(number, place.spool_dir) for number in (STDOUT, STDERR)]
            self._directory = directory
            self._place = place
            self._stdin = stdin
            self._disk_bytes_max = disk_bytes_max
            self._on_output = on_output
            self._on_end = on_end
            self._loop = asyncio.get_running_loop()
            self._job: Job | None = None
            self._process: subprocess.Popen[bytes] | None = None
            self._stopped: tuple[str, str] | None = None
            self._timers: list[asyncio.TimerHandle] = []
            self._code: int | None = None
            self._started_s = time.monotonic()
            self._finished = False
            self._looking = False

        def start(self) -> None:
            """Raises OSError when the process cannot be started at all."""
            environment = environment_of(self.spec, self._directory, os.environ)
            line, code, said = command_line(self.spec, self._found(environment), os.environ.get("COMSPEC", "cmd.exe"))
            self._started_s = time.monotonic()
            if not line:
                self._loop.call_soon(self._refused, code, said)
                return
            job = self._job = Job(limits_of(self.spec, os.cpu_count() or 1))
            try:
                self._process = self._start(line, environment)
                job.begin(self._process)
            except OSError:
                if self._process is not None:
                    self._process.kill()
                job.close()
                raise
            for stream, pipe in zip(self.streams, (self._process.stdout, self._process.stderr), strict=True):
                threading.Thread(target=self._read, args=(stream, pipe), daemon=True).start()
            threading.Thread(target=self._wait, args=(self._process,), daemon=True).start()
            wall_s = self.spec.wall_s
            self._later(wall_s, self.stop, "wall_limit", f"the run took longer than {wall_s:g} s")
            self._later(limits.WATCH_DISK_S, self._look)

        def _start(self, line: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
            with self._source() as source:
                return subprocess.Popen(
                    line,
                    stdin=source,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    cwd=self._directory,
                    env=environment,
                    creationflags=CREATE_SUSPENDED | CREATE_NO_WINDOW | CREATE_NEW_PROCESS_GROUP,
                )

        def _source(self) -> Any:
            if self._stdin is not None:
                return self._stdin.open("rb")
            if not self.spec.stdin:
                return open(os.devnull, "rb")
            file = tempfile.TemporaryFile(dir=self._place.spool_dir)  # noqa: SIM115 - the caller closes it
            file.write(self.spec.stdin)
            file.seek(0)
            return file

        def _found(self, environment: Mapping[str, str]) -> Callable[[str], str | None]:
            path = os.pathsep.join((str(self._directory), environment.get("PATH", "")))
            return lambda name: shutil.which(name, path=path)

        def _refused(self, code: int, said: str) -> None:
            self._take(self.streams[1], said.encode())
            for stream in self.streams:
                stream.open = False
            self._exited(code)

        def _later(self, delay_s: float, callback: Callable[..., None], *args: Any) -> None:
            self._timers.append(self._loop.call_later(delay_s, callback, *args))

        # --- threads: each hands over what it got and waits until it was taken

        def _read(self, stream: _Stream, pipe: Any) -> None:
            while data := os.read(pipe.fileno(), limits.OUTPUT_CHUNK_BYTES_MAX):
                while self._place.backlog() and self._code is None:
                    time.sleep(0.02)
                taken = threading.Event()
                try:
                    self._loop.call_soon_threadsafe(self._took, stream, data, taken)
                except RuntimeError:
                    return  # the loop is closed: nobody asks any longer
                taken.wait()
            pipe.close()
            self._tell(self._closed, stream)

        def _wait(self, process: subprocess.Popen[bytes]) -> None:
            code = process.wait()
            self._tell(self._exited, code)

        def _tell(self, callback: Callable[..., None], *args: Any) -> None:
            try:
                self._loop.call_soon_threadsafe(callback, *args)
            except RuntimeError:
                return

        def _took(self, stream: _Stream, data: bytes, taken: threading.Event) -> None:
            self._take(stream, data)
            taken.set()

        def _take(self, stream: _Stream, data: bytes) -> None:
            room = self.spec.output_bytes_max - sum(each.size for each in self.streams)
            if len(data) > room:
                self._lose("output_limit", f"the run wrote more than {self.spec.output_bytes_max} bytes")
                data = data[: max(0, room)]
            if data:
                try:
                    stream.kept.write(data)
                except OSError as error:
                    self._lose("failed", f"its output cannot be kept: {error.strerror or error}")
                    return
                offset, stream.size = stream.size, stream.size + len(data)
                self._on_output(stream.number, offset, data)

        def _lose(self, how: str, reason: str) -> None:
            """Some of its output is not kept: so the run ends, also when its command is over by then."""
            self.stop(how, reason)
            if self._stopped is None:
                self._stopped = (how, reason)

        def written(self, number: int, offset: int, length: int) -> bytes:
            """What the command wrote to a stream from `offset` on; empty where nothing is kept."""
            for stream in self.streams:
                if stream.number == number and offset < stream.size:
                    return stream.again(offset, length)
            return b""

        # --- limits and the end

        def stop(self, how: str, reason: str) -> None:
            """Ends the run and everything it started, at once: Windows has no signal that asks first."""
            if self._stopped is None and self._code is None:
                self._stopped = (how, reason)
                if self._job is not None:
                    self._job.terminate()

        def _look(self) -> None:
            if self._code is not None or self._looking:
                return
            if free_bytes(self._directory) < limits.DISK_RESERVE_BYTES:
                self.stop("failed", "the disk of the working directories is nearly full")
                return
            root = self._directory.parent
            self._looking = in_thread(self._loop, self._looked, disk_used, root, (), limits.RUN_FILES_MAX)
            if not self._looking:
                self._later(limits.WATCH_DISK_S, self._look)

        def _looked(self, done: asyncio.Future[Any]) -> None:
            self._looking = False
            if self._code is not None or done.cancelled() or done.exception() is not None:
                return
            reason = over(done.result(), self._disk_bytes_max, limits.RUN_FILES_MAX)
            if reason:
                self.stop("disk_limit", reason)
            else:
                self._later(limits.WATCH_DISK_S, self._look)

        def _exited(self, code: int) -> None:
            """The command has ended, and with it whatever it left running: only then do the pipes close."""
            self._code = code
            if self._job is not None:
                self._job.terminate()
            self._finish_if_over()

        def _closed(self, stream: _Stream) -> None:
            stream.open = False
            self._finish_if_over()

        def _finish_if_over(self) -> None:
            if self._code is None or self._finished or any(stream.open for stream in self.streams):
                return
            self._finished = True
            for timer in self._timers:
                timer.cancel()
            cpu_s, peak_bytes = self._job.used() if self._job is not None else (0.0, 0)
            if self._job is not None:
                self._job.close()
            how, reason = self._stopped or ended_by(self._code, peak_bytes, self.spec.memory_bytes_max)
            took_s = time.monotonic() - self._started_s
            self._on_end(Ended(how, reason, self._code, None, took_s, cpu_s, peak_bytes))


def ended_by(code: int, peak_bytes: int, memory_bytes_max: int) -> tuple[str, str]:
    """How a run ended that nobody stopped: one that failed at its bound of memory failed for want of it."""
    if code != 0 and peak_bytes >= memory_bytes_max:
        return "memory_limit", f"the run held {peak_bytes} bytes of memory; {memory_bytes_max} are allowed"
    return "exit", ""
