"""A real executor on a bench of its own: home, blob store, and what it delivered."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from clawnet.execution import bundle
from clawnet.execution.executor import Executor
from clawnet.execution.spec import ExecutionSettings, JobSpec
from clawnet.paths import Home
from clawnet.storage.blobs import BlobStore
from clawnet.wire.events import Stimulus, TaskExited, TaskOutput

WORKER = (sys.executable, "-c", "from clawnet.execution.worker import main; main()")
T = TypeVar("T")

needs_bubblewrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap not installed")


class Bench:
    """`events` is all that was delivered; `public` a directory that any user of this machine may read and write."""

    def __init__(self, **settings: Any) -> None:
        self.public = Path(tempfile.mkdtemp(prefix="clawnet-test-", dir=None if os.name == "nt" else "/var/tmp"))
        self.public.chmod(0o777)
        self.home = Home(self.public / "home")
        self.home.dir.mkdir(mode=0o755)
        self.blobs = BlobStore(self.public / "blobs")
        self.events: list[Stimulus] = []
        self.settings = ExecutionSettings(**{"worker_argv": WORKER, **settings})
        self.executor = Executor(self.settings, self.home, self.blobs, entropy=os.urandom, deliver=self._take)
        self._heard = asyncio.Event()

    def _take(self, stimulus: Stimulus) -> None:
        self.events.append(stimulus)
        self._heard.set()

    async def until(self, condition: Callable[[], T | None]) -> T:
        """Waits on events until the condition holds."""
        async with asyncio.timeout(60):
            while not (found := condition()):
                self._heard.clear()
                await self._heard.wait()
        return found

    def start(self, **fields: Any) -> bytes:
        job = os.urandom(16)
        self.executor.run(job, JobSpec(job=job, **fields))
        return job

    async def exited(self, job: bytes) -> TaskExited:
        return await self.until(
            lambda: next((e for e in self.events if isinstance(e, TaskExited) and e.job == job), None)
        )

    def output(self, job: bytes, stream: int = 1) -> bytes:
        """What was streamed so far; each piece must be where its offset says."""
        data = b""
        for event in self.events:
            if isinstance(event, TaskOutput) and event.job == job and event.stream == stream:
                assert event.offset == len(data)
                data += event.data
        return data

    async def kill_worker(self) -> None:
        """Kills the one worker; back when the next one is ready."""
        (pid,) = self.executor.worker_pids
        os.kill(pid, signal.SIGKILL)
        workers = self.executor._pool._workers
        async with asyncio.timeout(60):
            while self.executor.worker_pids in ([], [pid]) or not workers[0].ready:
                await asyncio.sleep(0)  # until the loop has heard of it

    async def said(self, job: bytes, text: bytes) -> None:
        await self.until(lambda: text in self.output(job))

    async def run(self, **fields: Any) -> tuple[TaskExited, bundle.Bundle | None]:
        exited = await self.exited(self.start(**fields))
        if exited.ended != "exit":
            return exited, None
        if exited.inline:
            return exited, bundle.decode(exited.inline)
        return exited, bundle.decode(self.blobs.path(exited.blob).read_bytes())

    async def shell(self, script: str, sandbox: str = "sandboxed", **fields: Any) -> bundle.Bundle:
        """Runs a script that must end by itself."""
        exited, found = await self.run(kind="shell", argv=["sh", "-c", script], sandbox=sandbox, **fields)
        assert found is not None, exited
        return found


def with_bench(body: Callable[[Bench], Awaitable[None]], **settings: Any) -> None:
    """Runs the body on a bench; nothing may be left over when it ends."""

    async def main() -> None:
        bench = Bench(**settings)
        try:
            await bench.executor.start()
            await body(bench)
        finally:
            await bench.executor.close()
            shutil.rmtree(bench.public)
        assert not bench.executor.worker_pids or not any(map(_lives, bench.executor.worker_pids))
        assert not list(Path("/var/tmp").glob(f"clawnet-*-{bench.home.digest}"))

    asyncio.run(main())


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def running(marker: str) -> list[int]:
    """Processes of this machine with the marker among their arguments."""
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdigit() and int(path.name) != os.getpid() and _lives(int(path.name)):
            try:
                if marker.encode() in (path / "cmdline").read_bytes().split(b"\0"):
                    found.append(int(path.name))
            except OSError:
                continue
    return found
