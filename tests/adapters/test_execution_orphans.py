"""Whoever executes may be killed at any moment: nothing that it started outlives it, also what it started just then.

Nor does what it was asked for at its start get lost.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from clawnet.execution import bundle
from clawnet.wire.events import Open, Opened
from tests.adapters.execution_bench import Bench, needs_bubblewrap, running
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


def test_a_result_that_is_to_be_opened_before_the_executor_has_started_is_opened_then() -> None:
    """A node asks for it as soon as it is loaded; a soak under SIGKILL found a task that was never opened again."""

    async def main() -> None:
        bench = Bench()
        plain = bundle.encode(bundle.Bundle(0, None, b"out"))
        try:
            bench.executor.open_result(Open(b"early", None, plain, b"", len(plain)))
            await bench.executor.start()
            opened = await bench.until(lambda: next((e for e in bench.events if isinstance(e, Opened)), None))
            assert (opened.request, opened.reason) == (b"early", "")
        finally:
            await bench.executor.close()
            shutil.rmtree(bench.public)

    asyncio.run(main())
