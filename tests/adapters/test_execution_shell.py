"""Shell runs as real processes, in the sandbox and on the host: exit codes, streams, limits, cancelling, clean-up."""

from __future__ import annotations

import asyncio
import os
import select
import shutil
import signal
import subprocess
import sys
import time

import pytest

from clawnet import limits
from clawnet.errors import ConfigError
from clawnet.execution import bundle
from clawnet.execution.places import Places
from clawnet.execution.spec import InputRef
from clawnet.execution.workdirs import WorkDirs
from clawnet.wire.events import InputsReady, Open, Opened, TaskOutput
from tests.adapters.execution_bench import WORKER, Bench, needs_bubblewrap, running, with_bench
from tests.cli.harness import until

BOTH = pytest.mark.parametrize("sandbox", [pytest.param("sandboxed", marks=needs_bubblewrap), "host"])


@BOTH
def test_a_command_ends_with_its_own_code_and_streams_apart(sandbox: str) -> None:
    async def body(bench: Bench) -> None:
        found = await bench.shell("echo out; echo err >&2; exit 7", sandbox)
        assert (found.exit_code, found.signal, found.stdout, found.stderr) == (7, None, b"out\n", b"err\n")
        assert found.usage.duration_s > 0

    with_bench(body)


@BOTH
def test_exit_codes_are_exact(sandbox: str) -> None:
    async def body(bench: Bench) -> None:
        for argv, code, number in (
            (["true"], 0, None),
            (["sh", "-c", "exit 137"], 137, None),
            (["sh", "-c", "kill -KILL $$"], None, signal.SIGKILL),
            (["sh", "-c", "kill -TERM $$"], None, signal.SIGTERM),
            (["sh", "-c", "kill -SEGV $$"], None, signal.SIGSEGV),
            (["no-such-command"], 127, None),
            (["exit", "3"], 127, None),
            (["/etc/passwd"], 126, None),
            (["/usr"], 126, None),
        ):
            exited, found = await bench.run(kind="shell", argv=argv, sandbox=sandbox)
            assert found is not None
            assert (found.exit_code, found.signal) == (code, number), argv
            assert (exited.exit_code, exited.signal) == (code, number), argv
        _, found = await bench.run(kind="shell", argv=["no-such-command"], sandbox=sandbox)
        assert found is not None
        assert b"no-such-command: not found" in found.stderr

    with_bench(body)


@BOTH
def test_a_script_runs_with_sh_and_arguments_are_passed_as_they_are(sandbox: str) -> None:
    async def body(bench: Bench) -> None:
        _, found = await bench.run(kind="shell", script="a=1; echo $((a + 1))", sandbox=sandbox)
        assert found is not None
        assert found.stdout == b"2\n"
        odd = ["a b", "$HOME", "'", '"', "*", "", "-n", "ü", "\n"]
        _, found = await bench.run(kind="shell", argv=["printf", "%s|", *odd], sandbox=sandbox)
        assert found is not None
        assert found.stdout.decode() == "".join(f"{word}|" for word in odd)

    with_bench(body)


@BOTH
def test_the_environment_is_clean_and_takes_what_the_task_gives(sandbox: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_THE_NODE", "marker")

    async def body(bench: Bench) -> None:
        found = await bench.shell("env; pwd; cd; pwd", sandbox, env={"GIVEN": "a=b c", "LD_PRELOAD": ""})
        lines = found.stdout.decode().splitlines()
        names = {line.partition("=")[0] for line in lines if "=" in line}
        assert names <= {"PATH", "HOME", "LANG", "TMPDIR", "PWD", "GIVEN", "LD_PRELOAD", "CLAWNET_JOB"}
        assert "GIVEN=a=b c" in lines
        assert lines[-1] == lines[-2]
        assert b"marker" not in found.stdout

    with_bench(body)


@BOTH
def test_stdin_is_what_the_task_gives_else_empty(sandbox: str) -> None:
    async def body(bench: Bench) -> None:
        data = os.urandom(200_000)
        found = await bench.shell("cat", sandbox, stdin=data)
        assert found.stdout == data
        assert (await bench.shell("cat", sandbox)).stdout == b""

    with_bench(body)


@BOTH
def test_a_task_cannot_claim_another_exit_code_than_its_own_by_descriptors(sandbox: str) -> None:
    async def body(bench: Bench) -> None:
        found = await bench.shell("ls /proc/self/fd | tr '\\n' ' '", sandbox)
        assert found.stdout.split() == [b"0", b"1", b"2", b"3"], "only the three streams, and ls's own directory"

    with_bench(body)


@BOTH
def test_output_is_streamed_while_the_command_runs(sandbox: str) -> None:
    async def body(bench: Bench) -> None:
        job = bench.start(kind="shell", script="echo first; read -r _ < /dev/zero; sleep 60", sandbox=sandbox)
        await bench.said(job, b"first\n")
        bench.executor.stop(job)
        assert (await bench.exited(job)).ended == "cancelled"

    with_bench(body)


@BOTH
@pytest.mark.slow
def test_cancelling_takes_every_process_along(sandbox: str) -> None:
    marker = f"{os.getpid()}.{sandbox}.777"

    async def body(bench: Bench) -> None:
        nap = f"sleep {_seconds(marker)}"
        script = f'{nap} & setsid {nap} & (trap "" TERM; {nap}; sleep 60) & echo up; wait'
        outside = subprocess.Popen(["sh", "-c", f"setsid {nap} & echo up"], stdout=subprocess.PIPE)
        assert outside.stdout is not None
        assert outside.stdout.readline() == b"up\n"
        outside.wait()
        outside.stdout.close()
        (survivor,) = until("the nap has begun", lambda: running(_seconds(marker)))
        os.kill(survivor, signal.SIGKILL)  # so a process that left its group outlives its parent
        job = bench.start(kind="shell", script=script, sandbox=sandbox)
        await bench.said(job, b"up\n")
        bench.executor.stop(job)
        exited = await bench.exited(job)
        assert (exited.ended, exited.inline) == ("cancelled", b"")
        assert running(_seconds(marker)) == []

    with_bench(body)


@BOTH
def test_a_run_can_be_cancelled_at_any_moment_of_its_start(sandbox: str) -> None:
    async def body(bench: Bench) -> None:
        for turns in range(0, 12, 3):
            job = bench.start(kind="shell", argv=["sleep", "60"], sandbox=sandbox)
            for _ in range(turns):
                await asyncio.to_thread(os.getpid)
            bench.executor.stop(job)
            bench.executor.stop(job)
            assert (await bench.exited(job)).ended == "cancelled"
            bench.executor.stop(job)

    with_bench(body)


def _seconds(marker: str) -> str:
    """An unusual number of seconds that names one test's processes."""
    return f"8{int.from_bytes(marker.encode(), 'big') % 100_000:05d}"


@BOTH
def test_what_a_command_leaves_running_ends_with_it(sandbox: str) -> None:
    number = _seconds(f"left{sandbox}{os.getpid()}")

    async def body(bench: Bench) -> None:
        found = await bench.shell(f"setsid sleep {number} & sleep {number} & exit 4", sandbox)
        assert found.exit_code == 4
        assert running(number) == []

    with_bench(body)


@BOTH
def test_the_wall_clock_limit_ends_a_run(sandbox: str) -> None:
    async def body(bench: Bench) -> None:
        exited, _ = await bench.run(kind="shell", argv=["sleep", "60"], sandbox=sandbox, wall_s=0.2)
        assert exited.ended == "wall_limit"
        assert "0.2" in exited.reason

    with_bench(body)


@BOTH
def test_the_output_limit_ends_a_run_and_keeps_what_fits(sandbox: str) -> None:
    async def body(bench: Bench) -> None:
        exited, _ = await bench.run(kind="shell", argv=["yes"], sandbox=sandbox, output_bytes_max=100_000)
        assert exited.ended == "output_limit"
        assert exited.output_bytes == 100_000
        assert len(bench.output(exited.job)) == 100_000

    with_bench(body)


@pytest.mark.slow
@BOTH
def test_the_memory_limit_counts_all_processes_together(sandbox: str) -> None:
    async def body(bench: Bench) -> None:
        # Each holds 60 MB: none alone is over the limit.
        hold = 'perl -e \'$x = "x" x 60_000_000; print "held\\n"; sleep 60\' &'
        exited, _ = await bench.run(
            kind="shell", script=hold * 4 + " wait", sandbox=sandbox, memory_bytes_max=150 * limits.MIB, wall_s=30
        )
        assert exited.ended == "memory_limit", exited
        assert exited.memory_bytes_max > 150 * limits.MIB
        found = await bench.shell("perl -e '$x = \"x\" x 60_000_000; print 1'", sandbox)
        assert found.stdout == b"1"

    with_bench(body)


@BOTH
def test_one_process_cannot_take_address_space_without_bound(sandbox: str) -> None:
    async def body(bench: Bench) -> None:
        found = await bench.shell("ulimit -v; ulimit -c; ulimit -f", sandbox, memory_bytes_max=64 * limits.MIB)
        assert found.stdout.split() == [b"262144", b"0", str(limits.RUN_FILE_BYTES_MAX // 512).encode()]

    with_bench(body)


@BOTH
def test_working_directories_are_own_fresh_and_removed(sandbox: str) -> None:
    async def body(bench: Bench) -> None:
        script = "ls -A; mkdir -p a/b; echo 1 > a/b/c; chmod 000 a; touch $TMPDIR/t"
        for _ in range(2):
            assert (await bench.shell(script, sandbox)).stdout == b""

    with_bench(body)  # the bench checks that nothing is left


@BOTH
def test_inputs_lie_where_they_were_named(sandbox: str) -> None:
    async def body(bench: Bench) -> None:
        source = bench.public / "project"
        (source / "sub").mkdir(parents=True)
        (source / "sub" / "data.txt").write_text("content")
        (source / "run.sh").write_text("#!/bin/sh\necho ran in $PWD; cat sub/data.txt extra.bin\n")
        (source / "run.sh").chmod(0o755)
        (bench.public / "extra").write_bytes(b"\x00\xff")
        bench.executor.pack(b"r", (("project", str(source)), ("extra.bin", str(bench.public / "extra"))))
        ready = await bench.until(lambda: next((e for e in bench.events if isinstance(e, InputsReady)), None))
        assert ready.error is None
        refs = [InputRef.of(item) for item in ready.inputs]
        _, found = await bench.run(kind="shell", argv=["./run.sh"], sandbox=sandbox, inputs=refs, cwd_input="project")
        assert found is not None
        assert found.stdout.startswith(b"ran in /")
        assert found.stdout.endswith(b"\ncontent\x00\xff"), found
        listing = await bench.shell("ls; touch project/new", sandbox, inputs=refs)
        assert (listing.exit_code, listing.stdout) == (0, b"extra.bin\nproject\n")

    with_bench(body)


@needs_bubblewrap
def test_a_sealed_result_opens_with_its_key_alone() -> None:
    async def body(bench: Bench) -> None:
        key = os.urandom(32)
        for size in (10, 3_000_000):
            exited = await bench.exited(
                bench.start(kind="shell", script=f"head -c {size} /dev/zero; echo e >&2", seal_key=key)
            )
            assert (exited.ended, bool(exited.inline)) == ("exit", size == 10)
            for number, wrong in enumerate((key, os.urandom(32))):
                request = bytes([number]) + exited.job
                bench.executor.open_result(Open(request, wrong, exited.inline, exited.blob, exited.blob_bytes))
                opened = await bench.until(
                    lambda request=request: next(
                        (e for e in bench.events if isinstance(e, Opened) and e.request == request), None
                    )
                )
                assert bool(opened.reason) == (wrong is not key)
                if wrong is not key:
                    continue
                summary = opened.bundle
                assert isinstance(summary, bundle.Summary)
                assert (summary.exit_code, summary.stdout_bytes, summary.stderr_bytes) == (0, size, 2)
                assert summary.sha256 == exited.plain_hash
                if size == 10:
                    assert (summary.stdout, summary.stderr) == (bytes(10), b"e\n")
                else:
                    assert summary.stdout is None
                    assert bench.blobs.path(summary.stdout_blob).read_bytes() == bytes(size)
                    assert bench.blobs.path(summary.stderr_blob).read_bytes() == b"e\n"

    with_bench(body)


def test_a_writer_waits_while_the_node_has_too_much_to_do() -> None:
    busy = [True]

    async def body(bench: Bench) -> None:
        script = "head -c 1000000 /dev/zero; echo done >&2"
        job = bench.start(kind="shell", script=script, sandbox="host")
        quick = bench.start(kind="compute", op="sha256", stdin=b"x")
        await bench.exited(quick)
        assert not any(isinstance(e, TaskOutput) for e in bench.events)
        busy[0] = False
        exited = await bench.exited(job)
        assert exited.output_bytes == 1_000_005
        assert max(len(e.data) for e in bench.events if isinstance(e, TaskOutput)) <= limits.OUTPUT_CHUNK_BYTES_MAX

    with_bench(body, backlog=lambda: busy[0])


def test_policy_decides_where_and_whether() -> None:
    async def own_off(bench: Bench) -> None:
        exited, _ = await bench.run(kind="shell", argv=["true"])
        assert exited.ended == "failed"
        assert "own" in exited.reason

    with_bench(own_off, shell_own="off", shell_member="off")

    async def host(bench: Bench) -> None:
        assert bench.executor.capacity().shell_rings == ("own",)
        assert bench.executor.shell_mode("own") == "host"
        exited, _ = await bench.run(kind="shell", argv=["true"], ring="member")
        assert exited.ended == "failed"
        exited, _ = await bench.run(kind="shell", argv=["true"], sandbox="sandboxed")
        assert exited.ended == "failed"

    with_bench(host, shell_own="host", shell_member="off")


@needs_bubblewrap
def test_a_member_never_gets_the_host() -> None:
    async def body(bench: Bench) -> None:
        exited, _ = await bench.run(kind="shell", argv=["true"], ring="member", sandbox="host")
        assert exited.ended == "failed"
        exited, found = await bench.run(kind="shell", argv=["pwd"], ring="member")
        assert found is not None
        assert found.stdout == b"/job\n"
        assert bench.executor.capacity().shell_rings == ("own", "member")

    with_bench(body)


@pytest.mark.skipif(os.getuid() != 0, reason="the node must be root for it")
def test_a_root_node_without_a_user_runs_nothing_on_the_host() -> None:
    async def body(bench: Bench) -> None:
        exited, _ = await bench.run(kind="shell", argv=["id", "-u"])
        assert exited.ended == "failed"

    with_bench(body, user="", shell_own="host")

    async def named(bench: Bench) -> None:
        assert (await bench.shell("id -u", "host")).stdout == b"65534\n"

    with_bench(named)


def test_nonsense_is_refused_with_a_reason() -> None:
    async def body(bench: Bench) -> None:
        for fields in (
            {"kind": "shell"},
            {"kind": "shell", "argv": []},
            {"kind": "shell", "argv": ["-x"]},
            {"kind": "shell", "argv": ["a\0b"]},
            {"kind": "shell", "argv": ["x"], "env": {"A=B": "c"}},
            {"kind": "shell", "argv": ["x" * 200_000]},
            {"kind": "dance"},
            {"kind": "shell", "argv": ["true"], "ring": "stranger"},
            {"kind": "shell", "argv": ["true"], "cwd_input": "nowhere", "sandbox": "host"},
        ):
            exited, _ = await bench.run(**fields)
            assert exited.ended == "failed", fields
            assert exited.reason

    with_bench(body)


_DRIVER = """
import asyncio, os, sys
from tests.adapters.execution_bench import Bench
from clawnet.wire.events import TaskOutput
async def main():
    bench = Bench()
    await bench.executor.start()
    print(bench.public, bench.executor._places.dirs.base, flush=True)
    for sandbox in sys.argv[2:]:
        nap = f"sh -c 'echo up; exec sleep {sys.argv[1]}' {sys.argv[1]}"
        script = f"setsid {nap} & {nap} & wait"
        await bench.said(bench.start(kind="shell", script=script, sandbox=sandbox), b"up\\nup\\n")
    bench.start(kind="compute", op="primes", op_args={"limit": 10_000_000})
    print("up", *bench.executor.worker_pids, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("sandbox", [pytest.param("sandboxed", marks=needs_bubblewrap), "host"])
def test_killing_the_node_kills_its_jobs(sandbox: str) -> None:
    number = _seconds(f"node{sandbox}{os.getpid()}")
    node = subprocess.Popen([sys.executable, "-c", _DRIVER, number, sandbox], stdout=subprocess.PIPE)
    assert node.stdout is not None
    directories = node.stdout.readline().decode().split()
    try:
        workers = list(map(int, node.stdout.readline().split()[1:]))
        jobs: list[int] = []
        until = time.monotonic() + 30
        # In the moment of its exec a process has no arguments to be known by.
        while len(jobs) != 2 and time.monotonic() < until:
            jobs = [pid for pid in running(number) if pid != node.pid]
        assert len(jobs) == 2
        assert workers
        # On the host, one that left the process group is found at the next start only (see the next test).
        watched = workers + [pid for pid in jobs if sandbox == "sandboxed" or os.getsid(pid) != pid]
        handles = [os.pidfd_open(pid) for pid in watched]
        node.kill()
        node.wait()
        for handle in handles:
            assert select.select([handle], [], [], 10)[0], "a job outlived its node"
            os.close(handle)
    finally:
        node.kill()
        node.wait()
        node.stdout.close()
        for pid in running(number):
            os.kill(pid, signal.SIGKILL)
        for directory in directories:
            shutil.rmtree(directory, ignore_errors=True)


def test_a_new_life_ends_what_an_earlier_one_left_on_the_host() -> None:
    number = _seconds(f"earlier{os.getpid()}")

    async def body(bench: Bench) -> None:
        places = bench.executor._places
        dirs = places.dirs.make(os.urandom(16))
        (dirs.work / "left").write_text("x")
        mark = {"CLAWNET_JOB": f"{bench.home.digest}-{'00' * 16}"}
        with subprocess.Popen(["sleep", number], env={**os.environ, **mark}) as left:
            await places.open()
            assert left.wait(10) == -signal.SIGKILL
        assert not dirs.root.exists()

    with_bench(body)


def test_worker_arguments_are_those_of_the_program() -> None:
    from clawnet.execution.compute import DEFAULT_ARGV

    assert DEFAULT_ARGV[-1] == "_worker"
    assert WORKER[0] == DEFAULT_ARGV[0]


def test_closing_works_after_a_failed_start_or_none() -> None:
    async def main() -> None:
        bench = Bench()
        await bench.executor.close()
        shutil.rmtree(bench.public)
        bench = Bench(user="no-such-user-here")
        try:
            if os.getuid() == 0:
                with pytest.raises(ConfigError, match="no-such-user-here"):
                    await bench.executor.start()
            else:
                await bench.executor.start()
        finally:
            await bench.executor.close()
            shutil.rmtree(bench.public)

    asyncio.run(main())


def test_a_working_directory_that_is_no_directory_is_a_clear_error() -> None:
    async def main() -> None:
        bench = Bench()
        places = Places(bench.settings, bench.home)
        places.dirs.base.symlink_to(bench.public / "elsewhere")
        (bench.public / "elsewhere").mkdir()
        (bench.public / "elsewhere" / "precious").touch()
        try:
            if places.uid is None:
                with pytest.raises(ConfigError):
                    await places.open()
            else:
                await places.open()
                assert not places.dirs.base.is_symlink()
        finally:
            places.close()
            link = WorkDirs(bench.home, places.uid).base
            assert (bench.public / "elsewhere" / "precious").exists()
            link.unlink()
            shutil.rmtree(bench.public)

    asyncio.run(main())
