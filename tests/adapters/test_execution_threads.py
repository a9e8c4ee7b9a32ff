"""A machine that has no thread left to give: runs begin, are watched over and end all the same."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from clawnet import limits
from clawnet.execution import feeding, threads, watching
from clawnet.execution.feeding import Feed
from clawnet.execution.spec import InputRef
from clawnet.execution.watching import Bounds, Watchdog
from tests.adapters.execution_bench import Bench, with_bench

OFF = {"shell_own": "off", "shell_member": "off"}


@contextmanager
def no_thread(after: int = 0, times: float = float("inf")) -> Iterator[list[str]]:
    """As at the bound of a user's processes: so many threads begin, then so often none does. Gives those refused."""
    real, refused = threading.Thread.start, list[str]()
    begun: list[str] = []

    def start(thread: threading.Thread) -> None:
        if len(begun) >= after and len(refused) < times:
            refused.append(thread.name)
            raise RuntimeError("can't start new thread")
        begun.append(thread.name)
        real(thread)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        yield refused


def test_a_run_whose_inputs_and_output_are_large_begins_and_ends() -> None:
    async def body(bench: Bench) -> None:
        data = os.urandom(2 * limits.RUN_INLINE_WORK_BYTES_MAX)
        file = InputRef("data", "file", bench.blobs.put_bytes(data), len(data))
        with no_thread():
            found = await bench.shell("cat data", "host", inputs=[file])
        assert found.stdout == data

    with_bench(body)


def test_what_a_pool_has_no_thread_for_is_done_once_and_at_once() -> None:
    done: list[int] = []
    pool = ThreadPoolExecutor(1)
    with no_thread():
        assert threads.submit(pool, lambda: done.append(1) or 7).result() == 7  # type: ignore[func-returns-value]
        with pytest.raises(ZeroDivisionError):
            threads.submit(pool, lambda: 1 // 0).result(10)
    assert threads.submit(pool, lambda: 8).result(10) == 8
    pool.shutdown()
    assert done == [1]
    with pytest.raises(RuntimeError, match="shutdown"):
        threads.submit(pool, int)


def test_what_no_thread_was_to_be_had_for_is_not_done_later() -> None:
    done: list[str] = []

    async def main() -> None:
        loop, told = asyncio.get_running_loop(), asyncio.Event()
        with no_thread():
            assert not threads.in_thread(loop, lambda future: told.set(), done.append, "first")
        assert threads.in_thread(loop, lambda future: told.set(), done.append, "second")
        async with asyncio.timeout(60):
            await told.wait()

    asyncio.run(main())
    assert done == ["second"]


@pytest.mark.parametrize("how", ["memory_limit", "disk_limit"])
def test_a_look_that_cannot_be_made_is_made_at_a_later_one(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "free_bytes", lambda path: 2**62)
    monkeypatch.setattr(watching, "memory_left", lambda: None)
    bounds = Bounds(1, 2**40) if how == "memory_limit" else Bounds(2**40, -1)

    async def main() -> None:
        ends: list[str] = []
        ended = asyncio.Event()

        def end(how: str, reason: str) -> None:
            ends.append(how)
            ended.set()

        watchdog = Watchdog(bounds, tmp_path, members=lambda: [os.getpid()], end=end)
        with no_thread(times=2) as refused:
            watchdog.start()
            async with asyncio.timeout(60):
                await ended.wait()
            watchdog.stop()
        assert len(refused) == 2
        assert ends[0] == how

    asyncio.run(main())


@pytest.mark.parametrize("closed", [False, True])
def test_standard_input_waits_for_its_thread(closed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeding, "_AGAIN_S", 0.0)
    (tmp_path / "in").write_bytes(b"given")

    async def main() -> None:
        loop, errors, fed = asyncio.get_running_loop(), list[str](), asyncio.Event()
        feed = Feed(tmp_path / "in", loop, errors.append)
        read: list[bytes] = []

        def readable() -> None:
            read.append(os.read(feed.reading, 100))
            if not read[-1]:
                loop.remove_reader(feed.reading)
                fed.set()

        loop.add_reader(feed.reading, readable)
        with no_thread(times=2) as refused:
            feed.start()
            if closed:
                feed.close()
            async with asyncio.timeout(60):
                await fed.wait()
        await asyncio.sleep(0)
        os.close(feed.reading)
        assert b"".join(read) == (b"" if closed else b"given")
        assert len(refused) == (1 if closed else 2)
        assert not errors
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(feed._source)

    asyncio.run(main())


def test_what_a_module_left_goes_without_a_thread() -> None:
    async def body(bench: Bench) -> None:
        directory = bench.home.wasm_runs_dir / "left"
        directory.mkdir(parents=True)
        with no_thread():
            bench.executor._computer._clear(directory)
        assert not directory.exists()

    with_bench(body, **OFF)
