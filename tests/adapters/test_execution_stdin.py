"""Standard input that came as an input: it reaches the command whole, through a pipe, and nothing of it stays."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import threading
from pathlib import Path

import pytest

from clawnet import limits
from clawnet.execution import feeding
from clawnet.execution.spec import InputRef
from clawnet.paths import Home
from tests.adapters.execution_bench import Bench, needs_bubblewrap, with_bench

BOTH = pytest.mark.parametrize("sandbox", [pytest.param("sandboxed", marks=needs_bubblewrap), "host"])


def _given(bench: Bench, data: bytes, name: str = "stdin") -> dict[str, object]:
    return {"inputs": [InputRef(name, "file", bench.blobs.put_bytes(data), len(data))], "stdin_input": name}


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@BOTH
def test_all_of_it_arrives_and_lies_nowhere(sandbox: str) -> None:
    data = os.urandom(5_000_000)

    async def body(bench: Bench) -> None:
        found = await bench.shell("ls -A; sha256sum", sandbox, **_given(bench, data))
        assert found.stdout.decode() == f"{hashlib.sha256(data).hexdigest()}  -\n"
        before = _descriptors()
        for script in ("true", "head -c 10 > /dev/null", "exec 0<&-; sleep 0.01", "cat > /dev/null", "kill -9 $$"):
            exited, _ = await bench.run(kind="shell", script=script, sandbox=sandbox, **_given(bench, data))
            assert exited.ended == "exit", script
        async with asyncio.timeout(20):
            while _descriptors() > before:  # a thread may still be at the removal of the last directory
                await asyncio.sleep(0)

    with_bench(body)


@BOTH
def test_the_blob_itself_is_out_of_the_commands_reach(sandbox: str) -> None:
    data = b"line\n" * 100_000

    async def body(bench: Bench) -> None:
        given = _given(bench, data)
        script = "echo changed 1<>/proc/self/fd/0; chmod 777 /proc/self/fd/0; stat -L -c %F /proc/self/fd/0"
        found = await bench.shell(script, sandbox, **given)
        assert found.stdout.splitlines()[-1] == b"fifo"
        (ref,) = given["inputs"]  # type: ignore[misc]
        assert bench.blobs.path(ref.blob).read_bytes() == data

    with_bench(body)


@BOTH
def test_a_run_that_does_not_read_can_be_cancelled(sandbox: str) -> None:
    async def body(bench: Bench) -> None:
        given = _given(bench, bytes(4_000_000))
        job = bench.start(kind="shell", script="echo up; sleep 60", sandbox=sandbox, **given)
        await bench.said(job, b"up\n")
        bench.executor.stop(job)
        assert (await bench.exited(job)).ended == "cancelled"

    with_bench(body)


def test_other_inputs_are_placed_as_ever_and_operations_read_it_too() -> None:
    async def body(bench: Bench) -> None:
        given = _given(bench, b"b\na\n")
        other = InputRef("file", "file", bench.blobs.put_bytes(b"x"), 1)
        given["inputs"] += [other]  # type: ignore[operator]
        found = await bench.shell("ls; cat", "host", **given)
        assert found.stdout == b"file\nb\na\n"
        _, sorted_ = await bench.run(kind="compute", op="sort", **_given(bench, b"b\na\n"))
        assert sorted_ is not None
        assert sorted_.stdout == b"a\nb\n"

    with_bench(body)


def test_what_a_task_calls_standard_input_must_be_a_file_of_its_own() -> None:
    async def body(bench: Bench) -> None:
        blob = bench.blobs.put_bytes(b"x")
        for kind, name in (("file", "elsewhere"), ("tree", "stdin")):
            refs = [InputRef("stdin", kind, blob, 1)]
            exited, _ = await bench.run(kind="shell", argv=["true"], sandbox="host", inputs=refs, stdin_input=name)
            assert exited.ended == "failed"
            assert name in exited.reason or kind in exited.reason

    with_bench(body)


def test_a_client_that_died_leaves_a_file_and_the_next_sweep_removes_it(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.run_dir.mkdir()
    left, held, other = home.stdin_file("left"), home.stdin_file("held"), home.run_dir / "daemon.lock"
    for path in (left, held, other):
        path.write_bytes(b"x")
    (home.run_dir / f"{home.STDIN_PREFIX}link").symlink_to(other)
    with held.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        feeding.sweep(home)
        assert (left.exists(), held.exists(), other.exists()) == (False, True, True)
    feeding.sweep(home)
    assert not held.exists()
    feeding.sweep(Home(tmp_path / "none"))


def test_of_the_home_nothing_else_travels(tmp_path: Path) -> None:
    home = Home(tmp_path)
    (home.run_dir / "deeper").mkdir(parents=True)
    home.keys_dir.mkdir()
    (home.keys_dir / "stdin-key").write_text("secret")
    link = home.stdin_file("link")
    link.symlink_to(home.keys_dir / "stdin-key")
    private = (home.dir,)
    assert feeding.private_but(home, str(home.stdin_file("a")), private) == ()
    for path in (link, home.keys_dir / "stdin-key", home.run_dir / "daemon.lock", home.run_dir / "deeper" / "stdin-a"):
        assert feeding.private_but(home, str(path), private) == private


@BOTH
def test_nothing_can_be_kept_where_a_short_one_lies(sandbox: str) -> None:
    """It is memory of nobody's: a run wrote into it what its own memory had no room for."""

    async def body(bench: Bench) -> None:
        script = "printf more >> /proc/self/fd/0 && echo escaped; cat"
        found = await bench.shell(script, sandbox, stdin=b"given")
        assert found.stdout == b"given"

    with_bench(body)


def test_a_disk_that_takes_its_time_holds_up_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = os.urandom(9 * limits.MIB + 1)
    (tmp_path / "file").write_bytes(data)
    began, go, real = threading.Event(), threading.Event(), feeding.read_ahead

    def slowly(descriptor: int, start: int) -> None:
        began.set()
        assert go.wait(60)
        real(descriptor, start)

    monkeypatch.setattr(feeding, "read_ahead", slowly)

    async def body() -> None:
        loop = asyncio.get_running_loop()
        before = _descriptors()
        feeds = [feeding.Feed(tmp_path / "file", loop, lambda reason: None) for _ in range(2)]
        for feed in feeds:
            feed.start()
        assert await asyncio.to_thread(began.wait, 60)
        feeds[1].close()
        os.close(feeds[1].reading)
        os.set_blocking(feeds[0].reading, False)
        with pytest.raises(BlockingIOError):
            os.read(feeds[0].reading, 1)
        go.set()
        os.set_blocking(feeds[0].reading, True)
        with os.fdopen(feeds[0].reading, "rb") as reading:
            assert await asyncio.to_thread(reading.read) == data
        async with asyncio.timeout(20):
            while _descriptors() > before:  # what a thread was at when it was closed is closed after it
                await asyncio.sleep(0)

    asyncio.run(body())
