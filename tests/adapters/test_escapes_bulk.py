"""Ways out by sheer quantity, and by outliving the end: each does its harm without the sandbox, in the same test.

Processes without end, disk, memory, and processes that hide from whoever cancels them.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import tempfile
import threading
from pathlib import Path

import pytest

from clawnet import limits
from clawnet.execution import process, shell, watching, workdirs
from clawnet.execution.diskuse import disk_used
from clawnet.execution.watching import Bounds, Watchdog
from tests.adapters.daemons import DAEMON, as_daemon
from tests.adapters.execution_bench import Bench, needs_bubblewrap, running, with_bench
from tests.cli.harness import until

pytestmark = pytest.mark.slow

BOTH = pytest.mark.parametrize("sandbox", [pytest.param("sandboxed", marks=needs_bubblewrap), "host"])


def _number(of: str) -> str:
    """An unusual number of seconds that names one test's processes."""
    return f"7{int.from_bytes(f'{os.getpid()}{of}'.encode(), 'big') % 1_000_000:06d}"


def _plain(script: str) -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        return subprocess.run(["sh", "-c", script], stdout=subprocess.PIPE, cwd=directory, check=False).stdout


# --- processes


@needs_bubblewrap
@pytest.mark.alone
@DAEMON
def test_processes_are_bounded(daemon: str) -> None:
    number, count = _number(daemon), limits.RUN_PROCESSES_MAX + 50
    script = f"i=0; while [ $i -lt {count} ]; do sleep {number} & i=$((i+1)); done; echo all of them"
    outside = _plain(script + f"; kill -9 $(pgrep -fx 'sleep {number}') 2>/dev/null")
    assert outside == b"all of them\n"

    async def body(bench: Bench) -> None:
        job = bench.start(kind="shell", script=script, wall_s=30)
        exited = await bench.exited(job)
        assert b"all of them" not in bench.output(job)
        assert b"fork" in bench.output(job, 2)
        assert exited.ended == "exit"
        assert running(number) == []

    as_daemon(daemon, body)


@needs_bubblewrap
@pytest.mark.alone
@DAEMON
def test_a_fork_bomb_leaves_the_machine_to_others(daemon: str) -> None:
    async def body(bench: Bench) -> None:
        bomb = bench.start(kind="shell", argv=["perl", "-e", '$| = 1; print "lit\\n"; while (1) { fork }'], wall_s=20)
        await bench.said(bomb, b"lit\n")
        for sandbox in ("host", "sandboxed"):
            # The kernel counts processes by user: of what else that user runs here there may be more at one moment.
            for _ in range(20):
                if (await bench.shell("echo $(echo fine)", sandbox)).stdout == b"fine\n":
                    break
            else:
                raise AssertionError(f"nothing runs beside the bomb ({sandbox})")
        bench.executor.stop(bomb)
        assert (await bench.exited(bomb)).ended == "cancelled"

    as_daemon(daemon, body)


# --- the disk

_MB = 1_000_000
_FILL = {
    "one file": "head -c 60000000 /dev/zero > a && sync a && echo escaped; sleep 30",
    "many files": "for i in 1 2 3 4 5 6; do head -c 10000000 /dev/zero > $i; done && echo escaped; sleep 30",
    "a file without a name": "exec 3> a; rm a; head -c 60000000 /dev/zero >&3 && echo escaped; sleep 30",
    "a place deep down": "mkdir -p a/b/c && cd a/b/c && head -c 60000000 /dev/zero > d && echo escaped; sleep 30",
}


@BOTH
@pytest.mark.parametrize("how", _FILL)
def test_the_disk_is_bounded(how: str, sandbox: str) -> None:
    assert _plain(_FILL[how].replace("sleep 30", ":")) == b"escaped\n"

    async def body(bench: Bench) -> None:
        exited, _ = await bench.run(kind="shell", script=_FILL[how], sandbox=sandbox, wall_s=25)
        assert exited.ended == "disk_limit", exited
        assert str(20 * _MB) in exited.reason
        found = await bench.shell("head -c 10000000 /dev/zero > a; stat -c %s a", sandbox)
        assert found.stdout == b"10000000\n", "what is within the bound is left alone"

    with_bench(body, disk_bytes_max=20 * _MB)


@needs_bubblewrap
@DAEMON
def test_the_disk_is_bounded_for_every_daemon(daemon: str) -> None:
    async def body(bench: Bench) -> None:
        for script in _FILL.values():
            exited, _ = await bench.run(kind="shell", script=script, wall_s=25)
            assert exited.ended == "disk_limit", script

    as_daemon(daemon, body, disk_bytes_max=20 * _MB)


@needs_bubblewrap
@DAEMON
def test_directories_without_end_are_ended_and_removed(daemon: str) -> None:
    """Deeper than any path can name, and than a walk that calls itself can follow."""
    dig = 'perl -e \'for (1 .. 1100) { mkdir "deep" or die; chdir "deep" or die } print "escaped\\n"\''
    assert _plain(dig + "; rm -rf deep") == b"escaped\n"

    async def body(bench: Bench) -> None:
        job = bench.start(kind="shell", script=dig + "; sleep 60")
        exited = await bench.exited(job)
        assert exited.ended == "disk_limit", exited
        assert "deep" in exited.reason
        await bench.shell(dig)

    as_daemon(daemon, body)  # the bench checks that nothing is left


@BOTH
def test_files_without_number_are_ended(sandbox: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "WATCH_DISK_S", 0.05)

    async def body(bench: Bench) -> None:
        script = "perl -e 'for (1 .. 5000) { open F, q(>), $_ } print \"escaped\\n\"; sleep 20'"
        exited, _ = await bench.run(kind="shell", script=script, sandbox=sandbox, wall_s=15)
        assert exited.ended == "disk_limit", exited
        assert "files" in exited.reason

    monkeypatch.setattr(shell, "Bounds", lambda memory, disk: Bounds(memory, disk, files_max=2_000))
    with_bench(body)


@needs_bubblewrap
def test_tmp_and_shared_memory_are_bounded_apart() -> None:
    script = "head -c 40000000 /dev/zero > {place}/clawnet-big 2>/dev/null && echo escaped; rm -f {place}/clawnet-big"

    async def body(bench: Bench) -> None:
        for place in ("/tmp", "/dev/shm"):
            words = script.replace("{place}", place)
            assert (await bench.shell(words, "host")).stdout == b"escaped\n"
            assert (await bench.shell(words, memory_bytes_max=128 * limits.MIB)).stdout == b""

    with_bench(body)


# --- memory


@needs_bubblewrap
@DAEMON
def test_memory_is_bounded_over_all_processes_together(daemon: str) -> None:
    hold = 'perl -e \'$x = "x" x 60_000_000; print "held\\n"; sleep 20\' & '
    assert _plain(hold.replace("sleep 20", "1") * 4 + "wait") == b"held\n" * 4

    async def body(bench: Bench) -> None:
        exited, _ = await bench.run(
            kind="shell", script=hold * 4 + " wait", memory_bytes_max=150 * limits.MIB, wall_s=15
        )
        assert exited.ended == "memory_limit", exited
        assert exited.memory_bytes_max > 150 * limits.MIB

    as_daemon(daemon, body)


@needs_bubblewrap
@DAEMON
def test_files_in_memory_count_as_memory(daemon: str) -> None:
    script = "head -c 40000000 /dev/zero > {place}/held && echo filled; "
    hold = 'perl -e \'$x = "x" x 50_000_000; print "held\\n"; sleep 20\''
    fill = script.format(place="/tmp") + script.format(place="/dev/shm") + hold
    assert (
        _plain(fill.replace("/tmp/held", "held").replace("/dev/shm/held", "held").replace("sleep 20", "1")).count(b"\n")
        == 3
    )

    async def body(bench: Bench) -> None:
        job = bench.start(kind="shell", script=fill, memory_bytes_max=170 * limits.MIB, wall_s=15)
        exited = await bench.exited(job)
        assert exited.ended == "memory_limit", exited
        assert bench.output(job).startswith(b"filled\nfilled\n"), "neither alone is too much"
        mapped = "perl -e 'open F, q(+>), q(/dev/shm/f); print F q(x) x 40_000_000; close F; print qq(fine\\n)'"
        assert (await bench.shell(mapped, memory_bytes_max=170 * limits.MIB)).stdout == b"fine\n"

    as_daemon(daemon, body)


@BOTH
def test_a_run_is_the_first_that_the_kernel_takes_when_memory_runs_out(sandbox: str) -> None:
    async def body(bench: Bench) -> None:
        assert (await bench.shell("sh -c 'cat /proc/self/oom_score_adj'", sandbox)).stdout == b"1000\n"

    with_bench(body)


@pytest.mark.parametrize(("name", "word"), [("memory_left", "memory"), ("free_bytes", "disk")])
def test_a_machine_that_has_nothing_left_ends_the_run(name: str, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever took it: sockets and pipes hold memory that belongs to no process."""
    plenty = {"memory_left": 2**40, "free_bytes": 2**40}
    left = {key: [value] for key, value in plenty.items()}
    monkeypatch.setattr(watching, "memory_left", lambda: left["memory_left"][0])
    monkeypatch.setattr(watching, "free_bytes", lambda path: left["free_bytes"][0])

    async def body(bench: Bench) -> None:
        job = bench.start(kind="shell", script="echo up; sleep 60", sandbox="host")
        await bench.said(job, b"up\n")
        left[name][0] = 1
        exited = await bench.exited(job)
        assert exited.ended == "failed"
        assert word in exited.reason

    with_bench(body)


def test_what_this_machine_says_of_its_memory_is_understood() -> None:
    left = watching.memory_left()
    assert left is not None
    assert 2**20 < left < 2**50


# --- outliving the end

_HIDE = (
    "perl -MPOSIX -e 'if (!fork) {{ setsid; exit if fork; $SIG{{$_}} = q(IGNORE) for keys %SIG; "
    "close STDIN; close STDOUT; close STDERR; exec q(sleep), q({number}) }}'; echo up; "
)


@BOTH
@pytest.mark.parametrize("end", ["cancel", "wall", "exit"])
def test_nothing_outlives_the_end_by_hiding(sandbox: str, end: str) -> None:
    number = _number(sandbox + end)
    hide = _HIDE.format(number=number)
    with subprocess.Popen(["sh", "-c", hide], stdout=subprocess.PIPE, start_new_session=True) as outside:
        assert outside.stdout is not None
        assert outside.stdout.readline() == b"up\n"
        (survivor,) = until("it hides", lambda: running(number))
    try:
        assert running(number) == [survivor], "its parent is over, its session another, its ears are shut"
    finally:
        os.kill(survivor, 9)
    until("it is gone", lambda: not running(number))

    async def body(bench: Bench) -> None:
        script = hide + ("exit 3" if end == "exit" else "sleep 60")
        job = bench.start(kind="shell", script=script, sandbox=sandbox, wall_s=1.0 if end == "wall" else 30)
        await bench.said(job, b"up\n")
        if end == "cancel":
            bench.executor.stop(job)
        exited = await bench.exited(job)
        assert exited.ended == {"cancel": "cancelled", "wall": "wall_limit", "exit": "exit"}[end]
        assert running(number) == []

    with_bench(body)


@needs_bubblewrap
@DAEMON
def test_a_sandbox_that_outlived_its_daemon_is_found_by_the_next(daemon: str) -> None:
    number = _number(daemon)

    async def body(bench: Bench) -> None:
        job = bench.start(kind="shell", script=f"[ -z $CLAWNET_JOB ] || echo known; echo up; sleep {number}", wall_s=30)
        await bench.said(job, b"up\n")
        # What a new life does of whatever carries this home's mark.
        found = process.marked(f"{bench.home.digest}-")
        assert found
        for pid in found:
            process.send(pid, signal.SIGKILL)
        await bench.exited(job)
        assert bench.output(job) == b"up\n", "the run itself knows nothing of the mark"
        until("it is gone", lambda: not running(number))

    as_daemon(daemon, body)


# --- the parts


def test_what_lies_on_the_disk_is_counted_once_and_links_are_not_followed(tmp_path: Path) -> None:
    elsewhere, root = tmp_path / "elsewhere", tmp_path / "root"
    elsewhere.mkdir()
    (elsewhere / "big").write_bytes(bytes(5 * _MB))
    (root / "a").mkdir(parents=True)
    (root / "a" / "file").write_bytes(bytes(_MB))
    os.link(root / "a" / "file", root / "again")
    (root / "link").symlink_to(elsewhere)
    with (root / "sparse").open("wb") as file:
        file.truncate(500 * _MB)
    used = disk_used(root, [], 1_000)
    assert _MB <= used.bytes < 2 * _MB
    assert used.files == 4
    with (root / "gone").open("wb") as file:
        file.write(bytes(3 * _MB))
        file.flush()
        (root / "gone").unlink()
        assert disk_used(root, [os.getpid()], 1_000).bytes >= used.bytes + 3 * _MB
    assert disk_used(root, [], 2).files > 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="directories are not shut by their mode there")
@pytest.mark.parametrize("mode", [0o000, 0o100, 0o200, 0o400])
def test_what_lies_below_a_directory_that_a_run_has_shut_is_counted(mode: int) -> None:
    """By a node that is not root: root may look into everything."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
        root = Path(directory)
        (root / "shut" / "inner").mkdir(parents=True)
        (root / "shut" / "inner" / "big").write_bytes(os.urandom(2 * _MB))
        precious = root / "precious"
        precious.mkdir(mode=0o500)
        (root / "shut" / "link").symlink_to(precious)
        user = os.geteuid() or 65_534
        for path in (root, *root.rglob("*")):
            os.chown(path, user, -1, follow_symlinks=False)
        (root / "shut").chmod(mode)
        child = os.fork()
        if not child:
            try:
                if not os.geteuid():
                    os.setuid(user)
                used = disk_used(root, [], 1_000)
                os._exit(0 if used.bytes > 2 * _MB and used.files == 5 and not used.hidden else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert precious.stat().st_mode & 0o777 == 0o500


def test_trees_of_every_kind_are_removed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "kept").touch()
    root = tmp_path / "root"
    (root / "a" / "b").mkdir(parents=True)
    (root / "a" / "b" / "link").symlink_to(precious)
    (root / ".1").mkdir()
    (root / ".1" / "x").touch()
    (root / ".2").touch()
    os.mkfifo(root / "a" / "pipe")
    at = os.open(root, os.O_RDONLY)
    for _ in range(1_500):
        os.mkdir("deep", 0o700, dir_fd=at)
        down = os.open("deep", os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = down
    os.close(at)
    (root / "a" / "b").chmod(0)
    (root / "a").chmod(0)
    workdirs.remove_tree(root)
    assert not root.exists()
    assert (precious / "kept").exists()
    workdirs.remove_tree(root)


def test_what_many_processes_share_is_weighed_beside_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel takes seconds over it, which a run of strangers could make the node stand still for."""
    weighed_in: list[threading.Thread] = []

    def weigh(pids: object, in_files: int = 0) -> int:
        weighed_in.append(threading.current_thread())
        return 12_345

    monkeypatch.setattr(process, "proportional_bytes", weigh)

    async def body() -> None:
        ended: asyncio.Future[tuple[str, str]] = asyncio.get_running_loop().create_future()

        def end(how: str, reason: str) -> None:
            if not ended.done():
                ended.set_result((how, reason))

        watch = Watchdog(Bounds(12_344, 2**40), tmp_path, members=lambda: [os.getpid()], end=end)
        watch.start()
        assert await ended == ("memory_limit", "the run held 12345 bytes of memory; 12344 are allowed")
        watch.stop()
        assert watch.peak_bytes == 12_345

    asyncio.run(body())
    assert threading.main_thread() not in weighed_in


def test_the_watch_over_a_run_that_is_over_says_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        said: list[str] = []
        watch = Watchdog(Bounds(1, 1), tmp_path, members=lambda: [os.getpid()], end=lambda how, _: said.append(how))
        watch.start()
        watch.stop()
        done = asyncio.get_running_loop().time() + 2 * watching.FIRST_LOOK_S
        while asyncio.get_running_loop().time() < done:
            await asyncio.sleep(0)
        assert not said

    asyncio.run(main())
