"""Whoever executes may be killed at any moment: nothing that it started outlives it, also what it started just then."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.adapters.execution_bench import needs_bubblewrap, running
from tests.cli.harness import until

KILLED = """
import asyncio, os, signal, sys
from tests.adapters.execution_bench import Bench

async def main():
    bench = Bench()
    print(bench.public, flush=True)
    await bench.executor.start()
    print(bench.executor.probe.passed, flush=True)
    for number in range(10):
        bench.start(kind="shell", argv=["sleep", sys.argv[1]], sandbox=sys.argv[2])
        await asyncio.sleep(0.001 * number)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("sandbox", [pytest.param("sandboxed", marks=needs_bubblewrap), "host"])
def test_runs_that_are_being_set_up_end_with_who_started_them(sandbox: str) -> None:
    nap = f"9{os.getpid():06d}{len(sandbox)}"
    words = [sys.executable, "-c", KILLED, nap, sandbox]
    root = Path(__file__).parents[2]
    done = subprocess.run(words, capture_output=True, text=True, cwd=root, timeout=60)
    assert done.returncode == -9, done.stderr
    public, passed = done.stdout.split()
    shutil.rmtree(public)
    assert passed == "True" or sandbox == "host"
    until("nothing is left behind", lambda: not running(nap))
