"""Celery with Redis under the same loads: one broker, two worker processes, one hash a task."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from time import perf_counter
from typing import Any

APPLICATION = """
import hashlib, sys
from celery import Celery
app = Celery("bench", broker=sys_url, backend=sys_url)
app.conf.update(task_serializer="json", result_expires=600, worker_prefetch_multiplier=4)

@app.task
def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()
"""
# Asked line by line on standard input, answers line by line; one thread a task in flight, as the library wants it.
ASKER = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from celery_bench import digest
lock = Lock()

def one(number):
    digest.delay(f"payload {number}").get(timeout=60, interval=0.001)
    with lock:
        sys.stdout.write(f"{number}\\n")
        sys.stdout.flush()

with ThreadPoolExecutor(128) as pool:
    for line in sys.stdin:
        pool.submit(one, int(line))
"""
READY_S = 60.0


def celery_missing(python: str) -> str:
    """Why Celery cannot run here, as a sentence; "" when it can."""
    if shutil.which("redis-server") is None:
        return "there is no redis-server (Debian and Ubuntu: apt-get install redis-server)"
    if python:
        probe = subprocess.run(
            [python, "-c", "import celery, redis, kombu.transport.redis"], capture_output=True, check=False
        )
        return (
            ""
            if probe.returncode == 0
            else f"{python} has no working celery and redis (pip install celery redis packaging)"
        )
    found = importlib.util.find_spec("celery") and importlib.util.find_spec("redis")
    return (
        "" if found else "celery and redis are not installed (pip install celery redis packaging; or --celery PYTHON)"
    )


class Celery:
    """A broker, two workers, and a process that asks."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._asker: subprocess.Popen[bytes] | None = None
        self._count = 0

    @classmethod
    @asynccontextmanager
    async def running(cls, directory: Path, python: str) -> AsyncIterator[Celery]:
        """Started in `directory`, until the block is left."""
        self, program = cls(), python or sys.executable
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        url = f"redis://127.0.0.1:{port}/0"
        (directory / "celery_bench.py").write_text(APPLICATION.replace("sys_url", json.dumps(url)))
        quiet = {"cwd": directory, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        broker = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        try:
            self._processes.append(subprocess.Popen(broker, **quiet))
            worker = [program, "-m", "celery", "-A", "celery_bench", "worker", "-c", "1", "-l", "ERROR", "-n"]
            for name in ("one", "two"):
                self._processes.append(subprocess.Popen([*worker, f"{name}@bench"], **quiet))
            self._asker = subprocess.Popen(
                [program, "-c", ASKER], cwd=directory, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
            )
            self._processes.append(self._asker)
            threading.Thread(target=self._read, args=(asyncio.get_running_loop(),), daemon=True).start()
            async with asyncio.timeout(READY_S):
                await asyncio.gather(*(self.task() for _ in range(20)))
            yield self
        finally:
            for process in reversed(self._processes):
                process.terminate()
                with suppress(subprocess.TimeoutExpired):
                    await asyncio.to_thread(process.wait, 10)
                process.kill()
                process.wait()

    def _read(self, loop: asyncio.AbstractEventLoop) -> None:
        assert self._asker is not None and self._asker.stdout is not None
        for line in self._asker.stdout:
            loop.call_soon_threadsafe(self._done, int(line))

    def _done(self, number: int) -> None:
        waiting = self._waiting.pop(number, None)
        if waiting is not None and not waiting.done():
            waiting.set_result(None)

    async def task(self) -> None:
        """One hash, until the result is here."""
        assert self._asker is not None and self._asker.stdin is not None
        self._count += 1
        waiting = self._waiting[self._count] = asyncio.get_running_loop().create_future()
        self._asker.stdin.write(b"%d\n" % self._count)
        await waiting

    async def measured(
        self,
        load: Callable[[Callable[[], Awaitable[None]]], Awaitable[list[float]]],
        summary: Callable[[list[float], float], dict[str, Any]],
    ) -> dict[str, Any]:
        """Runs a load to its end."""
        started = perf_counter()
        times = await load(self.task)
        return summary(times, perf_counter() - started)
