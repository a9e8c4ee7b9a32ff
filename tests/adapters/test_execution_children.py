"""A process that was started: its end is told once, and its pid stands until what it left has been looked for."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import signal
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from clawnet.execution import process
from tests.adapters.execution_bench import Bench, running, with_bench


class World:
    """A child that ends with code 3 when `let_go` is called, and what was told of its end."""

    def __init__(self, before_reaping: Callable[[World], None] | None = None) -> None:
        self.ends: list[int] = []
        self.told = asyncio.Event()
        reading, self._writing = os.pipe()
        pid = process.start(["/bin/sh", "-c", "read -r _; exit 3"], {}, {0: reading})
        os.close(reading)
        hunt = None if before_reaping is None else lambda: before_reaping(self)
        self.child = process.Child(pid, self._on_exit, asyncio.get_running_loop(), hunt)

    def _on_exit(self, status: int, usage: Any) -> None:
        self.ends.append(os.waitstatus_to_exitcode(status))
        self.told.set()

    def let_go(self) -> None:
        os.close(self._writing)

    async def ended(self) -> None:
        async with asyncio.timeout(60):
            await self.told.wait()
        assert self.ends == [3]
        assert self.child.over
        assert self.child.ended
        with pytest.raises(ChildProcessError):
            os.waitpid(self.child.pid, os.WNOHANG)


def no_pidfd(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel before 5.3."""

    def refuse(pid: int, flags: int = 0) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "pidfd_open", refuse, raising=False)


def no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user with as many processes as he may have."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)


def in_loop(body: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await body()

    asyncio.run(main())


@pytest.mark.parametrize("pidfd", [True, False])
def test_it_is_over_before_it_is_reaped(pidfd: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not pidfd:
        no_pidfd(monkeypatch)
    looking, found = threading.Event(), threading.Event()
    threads: list[threading.Thread] = []

    def hunt(world: World) -> None:
        threads.append(threading.current_thread())
        looking.set()
        assert found.wait(60)

    async def body() -> None:
        world = World(hunt)
        assert not world.child.over
        assert world.child.lives()
        world.let_go()
        assert await asyncio.to_thread(looking.wait, 60)
        assert world.child.over
        assert not world.child.ended
        assert not world.child.lives()
        os.kill(world.child.pid, 0)  # nobody else can have its number yet
        assert world.ends == []
        found.set()
        await world.ended()
        assert threads != [threading.main_thread()]

    in_loop(body)


def test_where_no_thread_is_to_be_had_the_loop_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []

    def hunt(world: World) -> None:
        threads.append(threading.current_thread())
        assert world.child.over
        os.kill(world.child.pid, 0)

    async def body() -> None:
        world = World(hunt)
        no_thread(monkeypatch)
        world.let_go()
        await world.ended()
        assert threads == [threading.main_thread()]

    in_loop(body)


def test_where_neither_pidfd_nor_thread_is_to_be_had_its_end_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    no_pidfd(monkeypatch)
    no_thread(monkeypatch)

    async def body() -> None:
        world = World()
        assert not world.child.over
        world.let_go()
        await world.ended()

    in_loop(body)


def test_a_hunt_that_fails_does_not_keep_the_end_back(monkeypatch: pytest.MonkeyPatch) -> None:
    failed: list[object] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: failed.append(args.exc_type))

    def hunt(world: World) -> None:
        raise MemoryError

    async def body() -> None:
        world = World(hunt)
        world.let_go()
        await world.ended()
        await asyncio.to_thread(_threads_end)

    in_loop(body)
    assert failed == [MemoryError]


@pytest.mark.parametrize("pidfd", [True, False])
def test_its_end_can_be_waited_for(pidfd: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not pidfd:
        no_pidfd(monkeypatch)

    async def body() -> None:
        world = World()
        world.let_go()
        world.child.wait()
        assert world.ends == [3], "told by the time that it returns"
        world.child.wait()
        await asyncio.to_thread(_threads_end)
        await asyncio.sleep(0)
        await world.ended()

    in_loop(body)


def _threads_end() -> None:
    for thread in threading.enumerate():
        if thread.name.startswith("clawnet-child-"):
            thread.join(60)


def test_its_end_is_told_to_whom_it_was_handed_over() -> None:
    async def body() -> None:
        world = World()
        codes: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        world.child.hand_over(lambda status, usage: codes.set_result(os.waitstatus_to_exitcode(status)))
        world.let_go()
        async with asyncio.timeout(60):
            assert await codes == 3
        assert world.ends == []

    in_loop(body)


def test_signals_reach_it_until_it_is_reaped_and_nobody_after() -> None:
    async def body() -> None:
        world = World()
        world.child.signal_group(signal.SIGKILL)
        async with asyncio.timeout(60):
            await world.told.wait()
        assert world.ends == [-signal.SIGKILL]
        world.child.signal_group(signal.SIGKILL)
        world.child.kill()
        world.let_go()

    in_loop(body)


def test_a_run_that_has_ended_is_not_cancelled_while_what_it_left_is_looked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looking, go_on = threading.Event(), threading.Event()
    look = process.marked

    def slow(value: str) -> list[int]:
        looking.set()
        assert go_on.wait(60)
        return look(value)

    async def body(bench: Bench) -> None:
        monkeypatch.setattr(process, "marked", slow)
        job = bench.start(kind="shell", script="exit 5", sandbox="host")
        assert await asyncio.to_thread(looking.wait, 60)
        bench.executor.stop(job)
        go_on.set()
        exited = await bench.exited(job)
        assert (exited.ended, exited.exit_code) == ("exit", 5)

    with_bench(body)


def test_a_run_ends_whole_where_no_thread_is_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it left is killed all the same, by the loop."""
    number = f"6{os.getpid():06d}"

    async def body(bench: Bench) -> None:
        # The executor's own threads are there before; those of a run's end are not.
        await asyncio.to_thread(os.getpid)
        began = threading.Thread.start

        def refuse(thread: threading.Thread) -> None:
            if thread.name.startswith("clawnet-child-"):
                raise RuntimeError("can't start new thread")
            began(thread)

        monkeypatch.setattr(threading.Thread, "start", refuse)
        found = await bench.shell(f"setsid sleep {number} > /dev/null 2>&1 & exit 4", "host")
        assert found.exit_code == 4
        assert running(number) == []

    with_bench(body)


@pytest.mark.parametrize("fails", ["copy", "listing", "spawn"])
def test_a_start_that_fails_keeps_no_descriptor(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real, copied = fcntl.fcntl, list[int]()

    def full(*args: Any, **words: Any) -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    def copy(descriptor: int, command: int, argument: int) -> int:
        if fails == "copy" and copied:
            full()
        copied.append(real(descriptor, command, argument))
        return copied[-1]

    monkeypatch.setattr(process.fcntl, "fcntl", copy)
    if fails == "listing":
        monkeypatch.setattr(process.os, "listdir", full)
    if fails == "spawn":
        monkeypatch.setattr(process.os, "posix_spawn", full)
    with open(os.devnull, "rb") as file, pytest.raises(OSError, match="Too many open files"):
        process.start(["/bin/true"], {}, {0: file.fileno(), 5: file.fileno()})
    assert len(copied) == (1 if fails == "copy" else 2)
    for descriptor in copied:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)
