"""Where shell runs happen on this machine: the sandbox if the probe passes, the host by policy, or nowhere. POSIX."""

from __future__ import annotations

import os
import pwd
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from clawnet.errors import ConfigError
from clawnet.execution import probe, probe_macos, process, seccomp
from clawnet.execution.endings import ProbeResult
from clawnet.execution.gpu import Gpu
from clawnet.execution.sandbox_bwrap import Bubblewrap
from clawnet.execution.sandbox_macos import Seatbelt
from clawnet.execution.shell import Place
from clawnet.execution.spares import Spares
from clawnet.execution.spec import ExecutionSettings
from clawnet.execution.workdirs import WorkDirs
from clawnet.paths import Home

NOBODY = 65_534
Probing = Callable[[Place, Place, tuple[Path, Path], Path, Path], Awaitable[ProbeResult]]


def run_as(user: str) -> int | None:
    """Whom runs become: None when the node is not root (they stay what it is), else the uid of `user` or nobody's."""
    if os.getuid() != 0:
        return None
    if not user:
        return NOBODY
    try:
        uid = int(user) if user.isdigit() else pwd.getpwnam(user).pw_uid
    except KeyError as error:
        raise ConfigError(
            f"execution.user is {user!r}, and there is no such user", hint="clawnet config set execution.user nobody"
        ) from error
    if uid == 0:
        raise ConfigError("execution.user is root", hint="tasks never run as root: set it to nobody")
    return uid


class Places:
    """Opened once by the executor; then `mode` and `place` answer for each run."""

    def __init__(self, settings: ExecutionSettings, home: Home, gpus: tuple[Gpu, ...] = ()) -> None:
        self._settings = settings
        self._home = home
        self._gpus = gpus
        self.uid = run_as(settings.user)
        self.dirs = WorkDirs(home, self.uid)
        self.host_allowed = os.getuid() != 0 or bool(settings.user)
        self._mark = home.digest + "-"
        self._filter = -1
        self._host: Place | None = None
        self._sandbox: Place | None = None
        self._spares: Spares | None = None
        self._probe = ProbeResult(False, "the sandbox was not probed yet")

    async def open(self) -> ProbeResult:
        """Removes what an earlier life left, then probes."""
        if self.dirs.open():
            for pid in process.marked(self._mark):
                process.send(pid, 9)
        base = self.dirs.base
        self._host = Place(None, -1, self.uid, base, self._mark, backlog=self._settings.backlog, gpus=self._gpus)
        self._probe = await self._probed()
        return self._probe

    async def _probed(self) -> ProbeResult:
        impossible = probe.unsupported()
        if impossible is not None:
            return impossible
        hidden = tuple({self._home.dir.resolve(), self._home.data_dir.resolve()})
        assert self._host is not None
        if sys.platform == "darwin":
            if not probe_macos.find():
                return ProbeResult(False, "there is no sandbox-exec here", probe_macos.REMEDY)
            seatbelt = Seatbelt(hidden, uid=self.uid)
            return await self._tried(msgspec.structs.replace(self._host, seatbelt=seatbelt), probe_macos.probe)
        program, said = probe.find_bubblewrap()
        if not program:
            missing = "not installed" in said
            return probe.not_installed() if missing else ProbeResult(False, said, probe.remedy_for(said))
        base = self.dirs.base
        sandbox = Bubblewrap(program, base, uid=self.uid, hidden=hidden)
        sandbox.prepare(said)
        self._filter = process.memory_file(seccomp.build(seccomp.machine()) or b"")
        return await self._tried(
            msgspec.structs.replace(self._host, sandbox=sandbox, seccomp=self._filter), probe.probe
        )

    async def _tried(self, inside: Place, probing: Probing) -> ProbeResult:
        """The sandbox is what sandboxed runs get from now on, if its probe passes."""
        assert self._host is not None
        pair = [self.dirs.make(os.urandom(16)) for _ in range(2)]
        try:
            where = (pair[0].work, pair[1].work)
            result = await probing(self._host, inside, where, self._home.dir, self.dirs.base)
        finally:
            for dirs in pair:
                dirs.remove()
        if result.passed:
            if inside.sandbox is not None and inside.sandbox.in_memory:
                self._spares = Spares(inside.sandbox, inside.seccomp, self.dirs, self._mark)
            self._sandbox = msgspec.structs.replace(inside, spares=self._spares)
        return result

    def mode(self, ring: str) -> str:
        """sandboxed, host or off."""
        settings = self._settings
        wanted = {"own": settings.shell_own, "member": settings.shell_member, "stranger": settings.shell_stranger}
        policy = wanted.get(ring, "off")
        if policy in ("sandboxed", "auto") and self._sandbox is not None:
            return "sandboxed"
        if policy in ("host", "auto") and ring == "own" and self.host_allowed:
            return "host"
        return "off"

    def place(self, mode: str) -> Place:
        """The place for a mode other than off."""
        place = self._sandbox if mode == "sandboxed" else self._host
        assert place is not None, f"no place for mode {mode}"
        return place

    def close(self) -> None:
        """Ends the sandbox that waits for a run, and removes the working directories."""
        if self._spares is not None:
            self._spares.close()
        self.dirs.close()
        if self._filter >= 0:
            os.close(self._filter)
            self._filter = -1
