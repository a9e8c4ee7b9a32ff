"""The sandbox that is set up before its run is known: a run in it is like any other, and it never outlives its use."""

from __future__ import annotations

import asyncio
import os
import re
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from clawnet import limits
from clawnet.execution import bundle, process, spares
from clawnet.execution.spares import Spare, Spares
from clawnet.execution.spec import InputRef
from tests.adapters.daemons import DAEMON, as_daemon
from tests.adapters.execution_bench import Bench, needs_bubblewrap, running, with_bench

pytestmark = needs_bubblewrap


def of(bench: Bench) -> Spares:
    found = bench.executor._places._spares
    assert found is not None
    return found


async def until(condition: Callable[[], bool]) -> None:
    """Until what the loop hears of has made it so."""
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0)


async def waiting(bench: Bench, **fields: Any) -> Spare:
    """The sandbox that waits, set up; a run like `fields` was before it."""
    here = of(bench)
    if here._spare is None:
        await bench.run(kind="shell", argv=["true"], sandbox="sandboxed", **fields)
    await until(lambda: here._spare is not None and here._spare.ready())
    assert here._spare is not None
    return here._spare


async def in_spare(bench: Bench, **fields: Any) -> bundle.Bundle:
    """A run that must get the sandbox that waits."""
    spare = await waiting(bench)
    _, found = await bench.run(kind="shell", sandbox="sandboxed", **fields)
    assert spare.directory is None, "it was not used"
    assert found is not None
    return found


async def in_own(bench: Bench, **fields: Any) -> bundle.Bundle:
    """A run while none waits."""
    here = of(bench)
    here._drop()
    _, found = await bench.run(kind="shell", sandbox="sandboxed", **fields)
    assert found is not None
    return found


Run = Callable[..., Awaitable[bundle.Bundle]]


def processes(spare: Spare) -> list[int]:
    """Handles of all its processes."""
    return [os.pidfd_open(pid) for pid in process.tree(spare.child.pid, 10)]


def have_ended(handles: list[int]) -> bool:
    """Whether those processes end; takes the handles."""
    ended = all(select.select([handle], [], [], 30)[0] for handle in handles)
    for handle in handles:
        os.close(handle)
    return ended


# All that a process can find out about where it is; what differs from run to run is made equal.
_LOOK = """
env | sort; pwd; umask; ulimit -a; id; ls -la . /proc/self/fd /dev /dev/shm; stat -c '%A %U %G %n' /*
grep -E 'Cap|Seccomp|NoNew|Sig|Shd|Uid|Gid|Groups|NSsid' /proc/self/status; cat /proc/self/oom_score_adj /proc/self/stat
cut -d' ' -f3- /proc/self/mountinfo; cat; echo /proc/[0-9]*; stat -c '%F %t %T' -L /proc/self/fd/0
"""


def _equal(found: bundle.Bundle) -> list[bytes]:
    text = re.sub(rb"[0-9a-f]{32}", b"JOB", found.stdout)
    text = re.sub(rb"[A-Z][a-z]{2} +\d+ +\d\d:\d\d", b"TIME", text)
    text = re.sub(rb"(?m)^(\d+ \([a-z]+\) \S+ \d+ \d+ \d+ \d+).*", rb"\1", text)
    text = re.sub(rb"(memfd:|pipe:|socket:).*", b"\\1", text)
    return [re.sub(rb"^total .*|0:\d+ ", b"", line) for line in text.splitlines()]


@DAEMON
@pytest.mark.parametrize("stdin", [None, b"", b"given\0\n"])
def test_a_run_finds_everything_as_in_a_sandbox_of_its_own(daemon: str, stdin: bytes | None) -> None:
    async def body(bench: Bench) -> tuple[list[bytes], list[bytes]]:
        fields: dict[str, Any] = {"script": _LOOK, "stdin": stdin}
        return _equal(await in_own(bench, **fields)), _equal(await in_spare(bench, **fields))

    own, spare = as_daemon(daemon, body)
    assert own == spare
    assert any(b"NoNewPrivs:\t1" in line for line in own)


def test_words_arrive_as_they_are() -> None:
    odd = ["a b", "$HOME", "'", '"', "*", "", "-n", "ü", "\n", "\\", "`id`", "exit", "}", "; exit 9", "#"]
    odd += [os.fsdecode(bytes([byte])) for byte in range(1, 256)] + [os.fsdecode(bytes(range(1, 256)))]

    async def body(bench: Bench) -> None:
        found = await in_spare(bench, argv=["printf", "%s|", *odd])
        assert found.stdout == b"".join(os.fsencode(word) + b"|" for word in odd)
        assert (found.exit_code, found.stderr) == (0, b"")

    with_bench(body)


@DAEMON
@pytest.mark.parametrize("stdin", [b"", b"given"])
@pytest.mark.parametrize("run", [in_own, in_spare])
def test_nothing_can_be_kept_in_what_standard_input_came_by(daemon: str, stdin: bytes, run: Run) -> None:
    script = """
    for file in /proc/self/fd/0 /proc/1/fd/*; do
        [ -c $file ] || [ -p $file ] || ! { printf more >> $file && echo escaped; }
    done 2> /dev/null
    cat; [ ! -f /proc/1/fd/6 ] || stat -L -c %s /proc/1/fd/6
    """

    async def body(bench: Bench) -> bundle.Bundle:
        return await run(bench, script=script, stdin=stdin)

    told = as_daemon(daemon, body).stdout
    assert told in (stdin, stdin + b"%d\n" % len(stdin))


def test_exit_codes_are_exact_and_streams_apart() -> None:
    async def body(bench: Bench) -> None:
        for argv, code, number in (
            (["sh", "-c", "echo out; echo err >&2; exit 7"], 7, None),
            (["sh", "-c", "exit 137"], 137, None),
            (["sh", "-c", "kill -KILL $$"], None, signal.SIGKILL),
            (["sh", "-c", "kill -SEGV $$"], None, signal.SIGSEGV),
            (["no-such-command"], 127, None),
            (["exit", "3"], 127, None),
            (["/usr"], 126, None),
        ):
            found = await in_spare(bench, argv=argv)
            assert (found.exit_code, found.signal) == (code, number), argv
            if code == 7:
                assert (found.stdout, found.stderr) == (b"out\n", b"err\n")

    with_bench(body)


def test_each_serves_one_run_in_a_fresh_directory() -> None:
    async def body(bench: Bench) -> None:
        script = "ls -A . /tmp /dev/shm; touch here /tmp/there /dev/shm/everywhere; sleep 0.01"
        for _ in range(3):
            spare = await waiting(bench)
            pair = [bench.start(kind="shell", script=script, sandbox="sandboxed") for _ in range(2)]
            assert spare.directory is None
            for job in pair:
                assert (await bench.exited(job)).exit_code == 0
                assert bench.output(job) == b".:\n\n/dev/shm:\n\n/tmp:\n"

    with_bench(body)


def test_inputs_and_outputs_come_along() -> None:
    async def body(bench: Bench) -> None:
        item = InputRef(name="letter", kind="file", blob=bench.blobs.put_bytes(b"dear"), size=4, mode=0o755)
        found = await in_spare(
            bench, script="cat letter; stat -c %a letter .; cat letter > out", inputs=[item], outputs=["out"]
        )
        assert found.stdout == b"dear755\n700\n"
        assert found.outputs is not None
        assert found.outputs.bytes > 0

    with_bench(body)


def test_a_run_that_it_does_not_fit_gets_its_own() -> None:
    async def body(bench: Bench) -> None:
        here, mib = of(bench), limits.MIB
        spare = await waiting(bench)
        for fields, said in (
            ({"argv": ["printenv", "GIVEN"], "env": {"GIVEN": "x"}}, b"x\n"),
            ({"argv": ["echo", "a" * 10_000]}, b"a" * 10_000 + b"\n"),
        ):
            _, found = await bench.run(kind="shell", sandbox="sandboxed", **fields)
            assert found is not None
            assert found.stdout == said
            assert here._spare is spare
        size = "df -P --block-size=1 /tmp | awk 'NR == 2 { print $2 }'"
        for memory in (128 * mib, 64 * mib):
            exited, found = await bench.run(kind="shell", script=size, sandbox="sandboxed", memory_bytes_max=memory)
            assert found is not None, exited
            assert int(found.stdout) == memory // 4
        assert spare.directory is not None, "it was not used"
        await until(lambda: spare.child.ended and here._spare is not None)
        assert here._spare is not None
        assert here._spare.tmp_bytes == 16 * mib

    with_bench(body)


def test_what_somebody_puts_into_its_directory_is_not_found_by_the_run() -> None:
    async def body(bench: Bench) -> None:
        spare = await waiting(bench)
        assert spare.directory is not None
        (spare.directory / "planted").touch()
        _, found = await bench.run(kind="shell", script="ls -A", sandbox="sandboxed")
        assert found is not None
        assert found.stdout == b""
        (spare.directory / "planted").unlink()

    with_bench(body)


@pytest.mark.parametrize("which", [0, -1])
def test_a_run_begins_though_it_was_killed_just_before(which: int) -> None:
    async def body(bench: Bench) -> None:
        spare = await waiting(bench)
        handle = os.pidfd_open(spare.child.pid)
        os.kill(process.tree(spare.child.pid, 10)[which], signal.SIGKILL)
        assert have_ended([handle])
        assert not spare.child.over, "the loop has not heard of it"
        _, found = await bench.run(kind="shell", script="echo here", sandbox="sandboxed")
        assert found is not None
        assert found.stdout == b"here\n"
        await until(lambda: not of(bench)._leaving)
        assert spare.child.ended

    with_bench(body)


def test_cancelling_and_limits_take_every_process_along() -> None:
    number = f"7{os.getpid():06d}"

    async def body(bench: Bench) -> None:
        script = f"setsid sleep {number} & (trap '' TERM; sleep {number}) & echo up; wait"
        for wall_s, end in ((60.0, "cancelled"), (0.5, "wall_limit")):
            spare = await waiting(bench)
            job = bench.start(kind="shell", script=script, sandbox="sandboxed", wall_s=wall_s)
            assert spare.directory is None
            if end == "cancelled":
                await bench.said(job, b"up\n")
                bench.executor.stop(job)
            assert (await bench.exited(job)).ended == end
            assert running(number) == []
        found = await in_spare(bench, script=f"setsid sleep {number} & sleep {number} & exit 4")
        assert found.exit_code == 4
        assert running(number) == []

    with_bench(body)


def test_a_run_can_be_cancelled_at_any_moment_of_its_start() -> None:
    async def body(bench: Bench) -> None:
        for turns in range(6):
            await waiting(bench)
            job = bench.start(kind="shell", argv=["sleep", "60"], sandbox="sandboxed")
            for _ in range(turns):
                await asyncio.to_thread(os.getpid)
            bench.executor.stop(job)
            assert (await bench.exited(job)).ended == "cancelled"

    with_bench(body)


def test_one_that_nobody_uses_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spares, "KEPT_S", 0.0)

    async def body(bench: Bench) -> None:
        here = of(bench)
        await bench.run(kind="shell", argv=["true"], sandbox="sandboxed")
        await until(lambda: bool(here._leaving))
        (spare,) = here._leaving
        await until(lambda: spare.child.ended)
        assert here._spare is None
        assert spare.directory is not None
        assert not spare.directory.exists()

    with_bench(body)


@pytest.mark.parametrize("ready", [True, False])
def test_none_outlives_its_node(ready: bool) -> None:
    handles: list[int] = []

    async def body(bench: Bench) -> None:
        here = of(bench)
        await bench.run(kind="shell", argv=["true"], sandbox="sandboxed")
        await until(lambda: here._spare is not None and (here._spare.ready() or not ready))
        assert here._spare is not None
        handles.extend(processes(here._spare))

    with_bench(body)  # which closes the node, and looks for directories
    assert have_ended(handles)


_DRIVER = """
import asyncio, os, signal
from clawnet.execution import process
from tests.adapters.execution_bench import Bench
from tests.adapters.test_spare_sandboxes import waiting

async def main():
    bench = Bench()
    await bench.executor.start()
    spare = await waiting(bench)
    print(bench.public, bench.executor._places.dirs.base, *process.tree(spare.child.pid, 10), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def test_killing_the_node_ends_it() -> None:
    root = Path(__file__).parents[2]
    with subprocess.Popen([sys.executable, "-c", _DRIVER], stdout=subprocess.PIPE, cwd=root) as node:
        assert node.stdout is not None
        public, base, *pids = node.stdout.readline().decode().split()
        handles = [os.pidfd_open(int(pid)) for pid in pids]
        node.kill()
    for directory in (public, base):
        shutil.rmtree(directory)
    assert len(handles) == 2
    assert have_ended(handles)


def test_one_that_is_killed_at_any_moment_of_its_set_up_leaves_nothing() -> None:
    """Its first process waited for ever for bubblewrap, which was killed after a look that had not found it."""

    async def body(bench: Bench) -> None:
        here = of(bench)
        for turns in range(40):
            here._set_up(limits.MIB)
            for _ in range(turns):
                await asyncio.to_thread(os.getpid)
            here._drop()
            await until(lambda: not here._leaving)
        await until(lambda: not process.marked(bench.home.digest))

    with_bench(body)
