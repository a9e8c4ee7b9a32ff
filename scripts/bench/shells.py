"""The shell section of exec.py: what the sandbox costs over a plain process, and how soon a line of output is seen."""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import time
from pathlib import Path
from time import perf_counter
from typing import Any

from mesh import Mesh, percentile

from clawnet import launch
from clawnet.execution.executor import Executor
from clawnet.execution.spec import SHELL, ExecutionSettings, JobSpec
from clawnet.paths import Home
from clawnet.storage.blobs import BlobStore
from clawnet.wire.events import Stimulus, TaskExited

TARGETS = (("sandbox_over_plain_p50_ms", "<=", 10.0),)
LINES, PAUSE_S = 100, 0.02
_TELL = (
    f"use Time::HiRes qw(time sleep); $| = 1; sleep 1; for (1 .. {LINES}) {{ print time, qq(\\n); sleep {PAUSE_S} }}"
)


class _Runs:
    """An executor whose runs are waited for one by one."""

    def __init__(self, directory: Path) -> None:
        home = Home(directory / "home")
        home.dir.mkdir(mode=0o700)
        settings = ExecutionSettings(offers=(SHELL,))
        blobs = BlobStore(directory / "blobs")
        self._ends: dict[bytes, asyncio.Future[TaskExited]] = {}
        self.executor = Executor(settings, home, blobs, entropy=os.urandom, deliver=self._take)

    def _take(self, stimulus: Stimulus) -> None:
        if isinstance(stimulus, TaskExited):
            self._ends.pop(stimulus.job).set_result(stimulus)

    async def true(self, sandbox: str, env: dict[str, str] | None = None) -> float:
        """How long `true` takes, in milliseconds. A run with an environment never gets a sandbox that waits for one."""
        job = os.urandom(16)
        end = self._ends[job] = asyncio.get_running_loop().create_future()
        began = perf_counter()
        self.executor.run(job, JobSpec(job=job, kind="shell", argv=["true"], sandbox=sandbox, env=env or {}))
        exited = await end
        if exited.ended != "exit" or exited.exit_code != 0:
            raise SystemExit(f"a run of `true` ended as {exited.ended}: {exited.reason}")
        return (perf_counter() - began) * 1e3


def _plain() -> float:
    began = perf_counter()
    subprocess.run(["true"], capture_output=True, check=True)
    return (perf_counter() - began) * 1e3


async def measured(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Plain, on the host, in a new sandbox and in one that waited, in turns; then the lines of a command elsewhere."""
    times: dict[str, list[float]] = {"plain": [], "host": [], "new": [], "sandbox": []}
    runs = _Runs(directory)
    try:
        await runs.executor.start()
        sandboxed = runs.executor.shell_mode("own") == "sandboxed"
        for _ in range(options.runs):
            times["plain"].append(_plain())
            times["host"].append(await runs.true("host"))
            if sandboxed:
                times["new"].append(await runs.true("sandboxed", {"NEW": ""}))
                times["sandbox"].append(await runs.true("sandboxed"))
    finally:
        await runs.executor.close()
    if not times["sandbox"]:
        raise SystemExit("there is no sandbox here: " + (runs.executor.probe.reason if runs.executor.probe else ""))
    middle = {name: statistics.median(values) for name, values in times.items()}
    late = await _lines(directory)
    return {
        "plain_true_p50_ms": round(middle["plain"], 2),
        "host_true_p50_ms": round(middle["host"], 2),
        "new_sandbox_true_p50_ms": round(middle["new"], 2),
        "sandboxed_true_p50_ms": round(middle["sandbox"], 2),
        "sandbox_over_plain_p50_ms": round(middle["sandbox"] - middle["plain"], 2),
        "sandboxed_true_p95_ms": round(percentile(times["sandbox"], 95), 2),
        "line_from_remote_p50_ms": round(statistics.median(late), 2),
        "line_from_remote_p95_ms": round(percentile(late, 95), 2),
    }


async def _lines(directory: Path) -> list[float]:
    """For each line of a command on another node: milliseconds from its writing to its reading behind `clawnet run`."""
    async with Mesh.running(directory / "mesh", slots=1) as mesh:
        words = ["run", "--ring", "member", "--prefer", "market", "--budget", "5", "--", "perl", "-e", _TELL]
        environ = {**os.environ, "CLAWNET_HOME": str(mesh.nodes[0].home.dir)}
        following = await asyncio.create_subprocess_exec(
            *launch.program(), *words, env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
        )
        assert following.stdout is not None
        late = [(time.time() - float(line)) * 1e3 async for line in following.stdout]
        if await following.wait() != 0 or len(late) != LINES:
            raise SystemExit(f"{len(late)} lines came of {LINES}")
        return late
