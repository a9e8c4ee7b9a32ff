"""A sandbox that is set up before its run is known: the next one has its command started, not its sandbox. Linux.

Of the time of a short command nearly all goes into the sandbox around it, and nothing of that depends on the command.
So after a run one more is set up and waits, in a shell that reads its script from a pipe. It serves one run, which
asks for the same in every respect; it is like any other from then on. One that nobody has used for a while goes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from clawnet.execution import process, sandbox_bwrap
from clawnet.execution.sandbox_bwrap import Bubblewrap
from clawnet.execution.workdirs import WorkDirs

KEPT_S: Final = 60.0
_PAUSE_S: Final = 0.002
_MOVED_MAX: Final = 64
_SAY_READY: Final = b"printf w >&3\n"


class Spare:
    """One sandbox that waits. `ours` are our ends of its stdout, stderr and status, `directory` what it works in."""

    def __init__(
        self,
        sandbox: Bubblewrap,
        seccomp: int,
        directory: Path,
        tmp_bytes: int,
        mark: str,
        gone: Callable[[Spare], None],
    ) -> None:
        """`gone` is called when it has ended and was not given away. Raises OSError."""
        self.directory: Path | None = directory
        self.tmp_bytes = tmp_bytes
        self.ours: list[int] = []
        self._telling = self._stdin = -1
        self._ready = False
        theirs: dict[int, int] = {}
        try:
            theirs[0], self._telling = os.pipe()
            os.write(self._telling, _SAY_READY)
            for target in (1, 2, sandbox_bwrap.STATUS_FD):
                reading, theirs[target] = os.pipe()
                self.ours.append(reading)
                os.set_blocking(reading, False)
            theirs[sandbox_bwrap.OPTIONS_FD] = process.memory_file(sandbox_bwrap.options(sandbox_bwrap.ENVIRONMENT))
            if seccomp >= 0:
                # Its own open file, hence its own place in it.
                theirs[sandbox_bwrap.SECCOMP_FD] = os.open(f"/proc/self/fd/{seccomp}", os.O_RDONLY)
            self._stdin = process.empty_memory_file()
            argv = sandbox.waiting_argv(directory, tmp_bytes=tmp_bytes, seccomp=seccomp >= 0)
            environment = {**sandbox_bwrap.OUTSIDE, process.MARK: mark}
            pid = process.start(argv, environment, {**theirs, sandbox_bwrap.STDIN_FD: self._stdin})
        except OSError:
            self.close()
            raise
        finally:
            for descriptor in theirs.values():
                os.close(descriptor)
        self.child = process.Child(pid, lambda status, usage: gone(self), asyncio.get_running_loop())

    def ready(self) -> bool:
        """Whether it is set up: from then on its directory may lie elsewhere."""
        if not self._ready:
            with contextlib.suppress(BlockingIOError):
                self._ready = os.read(self.ours[-1], 1) == b"w"
        return self._ready

    def fits(self, path: Path) -> bool:
        """Whether its directory, which nobody may have put anything into, can take the place of the one at `path`."""
        if self.directory is None:
            return False
        try:
            if os.listdir(self.directory) or len(os.listdir(path)) > _MOVED_MAX:
                return False
            mine, there = self.directory.stat(), path.stat()
        except OSError:
            return False  # somebody has taken it away
        return (mine.st_mode, mine.st_uid, mine.st_dev) == (there.st_mode, there.st_uid, there.st_dev)

    def move(self, path: Path) -> None:
        """Puts its directory in the place of the one at `path`, with what lies in that. Raises OSError."""
        assert self.directory is not None, "it has moved"
        for name in os.listdir(path):
            os.rename(path / name, self.directory / name)
        os.rename(self.directory, path)
        self.directory = None

    def tell(self, script: bytes, stdin: bytes) -> bool:
        """Has it run this; False when it does not live any longer."""
        if not self.child.lives():
            return False
        try:
            process.fill(self._stdin, stdin)
            os.write(self._telling, script)
        except OSError:
            return False
        self._close_held()
        return True

    def end(self) -> None:
        """Kills it; `gone` is called in a moment."""
        process.kill_sandbox(self.child.pid)

    def close(self) -> None:
        """Lets go of what belongs to it."""
        self._close_held()
        while self.ours:
            os.close(self.ours.pop())
        if self.directory is not None:
            with contextlib.suppress(OSError):  # it is gone, or somebody has put something there: the next life's work
                self.directory.rmdir()

    def _close_held(self) -> None:
        for descriptor in (self._telling, self._stdin):
            if descriptor >= 0:
                os.close(descriptor)
        self._telling = self._stdin = -1


class Spares:
    """Has one sandbox at most that waits for a run."""

    def __init__(self, sandbox: Bubblewrap, seccomp: int, dirs: WorkDirs, mark: str) -> None:
        self._sandbox = sandbox
        self._seccomp = seccomp
        self._dirs = dirs
        self._mark = mark
        self._spare: Spare | None = None
        self._leaving: set[Spare] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    def wanted(self, tmp_bytes: int) -> None:
        """A run that a waiting sandbox would have served has ended: in a moment, when that is told, one is set up."""
        if self._closed or (self._spare is not None and self._spare.tmp_bytes == tmp_bytes):
            return
        self._drop()
        self._timer = asyncio.get_running_loop().call_later(_PAUSE_S, self._set_up, tmp_bytes)

    def take(
        self, directory: Path, tmp_bytes: int, command: Sequence[str], limit: Mapping[str, int], stdin: bytes | None
    ) -> Spare | None:
        """The sandbox that waits, begun with this command in `directory`; None when there is none, or none like that.

        Raises OSError when what lies in the directory cannot be had into the sandbox.
        """
        spare = self._spare
        script = sandbox_bwrap.waiting_script(command, limit, bool(stdin))
        if spare is None or spare.tmp_bytes != tmp_bytes or not spare.ready() or len(script) > select.PIPE_BUF:
            return None
        if not spare.fits(directory):
            return None
        self._no_timer()
        self._spare = None
        told = False
        try:
            spare.move(directory)
            told = spare.tell(script, stdin or b"")
        finally:
            if not told:
                self._leave(spare)
        return spare if told else None

    def close(self) -> None:
        """Ends it and waits for that."""
        self._closed = True
        self._drop()
        for spare in list(self._leaving):
            spare.child.wait()

    def _set_up(self, tmp_bytes: int) -> None:
        try:
            directory = self._dirs.make_spare()
            self._spare = Spare(self._sandbox, self._seccomp, directory, tmp_bytes, self._mark + "next", self._gone)
        except OSError:
            return  # the next run sets up its own, and tells what is wrong
        self._timer = asyncio.get_running_loop().call_later(KEPT_S, self._drop)

    def _drop(self) -> None:
        self._no_timer()
        if self._spare is not None:
            self._leave(self._spare)
            self._spare = None

    def _no_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _leave(self, spare: Spare) -> None:
        self._leaving.add(spare)
        spare.end()

    def _gone(self, spare: Spare) -> None:
        if self._spare is spare:
            self._spare = None
            self._no_timer()
        self._leaving.discard(spare)
        spare.close()
