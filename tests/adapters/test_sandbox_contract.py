"""One contract for what runs a shell task on each platform; it runs where the platform is. The pure parts run anywhere.

Linux: bubblewrap. macOS: a seatbelt. Windows: a Job Object, for ring own alone.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from clawnet import limits
from clawnet.execution import libproc, windows_job
from clawnet.execution.sandbox_macos import Seatbelt, quoted
from clawnet.execution.spec import ExecutionSettings, JobSpec
from clawnet.paths import Home
from tests.adapters.execution_bench import Bench, needs_bubblewrap, with_bench

LINUX, MACOS, WINDOWS = (sys.platform.startswith(name) for name in ("linux", "darwin", "win32"))
SEATBELT = pytest.mark.skipif(not MACOS, reason="macOS alone")
JOB = pytest.mark.skipif(not WINDOWS, reason="Windows alone")
PLATFORMS = pytest.mark.parametrize(
    "platform",
    [
        pytest.param("bubblewrap", marks=[needs_bubblewrap, pytest.mark.skipif(not LINUX, reason="Linux alone")]),
        pytest.param("seatbelt", marks=SEATBELT),
        pytest.param("job", marks=JOB),
    ],
)
SHELL = ["cmd", "/c"] if WINDOWS else ["sh", "-c"]


def _mode(platform: str) -> str:
    return "host" if platform == "job" else "sandboxed"


# --- the contract


@PLATFORMS
def test_codes_streams_and_standard_input(platform: str) -> None:
    async def body(bench: Bench) -> None:
        mode = _mode(platform)
        _, found = await bench.run(kind="shell", script="echo out&& echo err>&2&& exit 7", sandbox=mode)
        assert found is not None
        assert (found.exit_code, found.stdout.split(), found.stderr.split()) == (7, [b"out"], [b"err"])
        _, found = await bench.run(kind="shell", argv=["no-such-command-here"], sandbox=mode)
        assert found is not None
        assert found.exit_code == 127
        _, found = await bench.run(kind="shell", argv=["sort"], stdin=b"b\na\n", sandbox=mode)
        assert found is not None
        assert found.stdout.split() == [b"a", b"b"]

    with_bench(body)


@PLATFORMS
def test_cancelling_and_the_end_take_everything_along(platform: str) -> None:
    later = "ping -n 60 127.0.0.1 > nul" if WINDOWS else "sleep 60"

    async def body(bench: Bench) -> None:
        script = f"start /b {later} & echo up& {later}" if WINDOWS else f"{later} & echo up; {later}"
        job = bench.start(kind="shell", script=script, sandbox=_mode(platform))
        await bench.said(job, b"up")
        bench.executor.stop(job)
        assert (await bench.exited(job)).ended == "cancelled"
        exited, _ = await bench.run(kind="shell", script=later, sandbox=_mode(platform), wall_s=1.0)
        assert exited.ended == "wall_limit"

    with_bench(body)


@PLATFORMS
def test_bounds_of_output_memory_and_disk(platform: str) -> None:
    hog = [
        sys.executable,
        "-c",
        "import time; held = bytearray(400_000_000); held[::4096] = b'x' * len(held[::4096]); time.sleep(30)",
    ]
    fill = [sys.executable, "-c", "import time; open('a', 'wb').write(bytes(60_000_000)); time.sleep(30)"]

    async def body(bench: Bench) -> None:
        mode = _mode(platform)
        exited, _ = await bench.run(kind="shell", script=_ENDLESS, sandbox=mode, output_bytes_max=100_000)
        assert exited.ended == "output_limit"
        if platform != "bubblewrap":  # there this Python need not be below /usr; other tests fill memory and disk
            exited, _ = await bench.run(kind="shell", argv=hog, sandbox=mode, memory_bytes_max=200_000_000)
            assert exited.ended == "memory_limit"
            exited, _ = await bench.run(kind="shell", argv=fill, sandbox=mode)
            assert exited.ended == "disk_limit"

    with_bench(body, disk_bytes_max=20_000_000)


_ENDLESS = "for /l %i in (0,0,1) do @echo yes" if WINDOWS else "yes"


@SEATBELT
def test_the_seatbelt_probe_passes_and_refuses_what_it_says() -> None:
    async def body(bench: Bench) -> None:
        probe = bench.executor.probe
        assert probe is not None
        assert probe.passed, probe
        assert set(probe.checks.values()) == {"refused"}
        assert "outliving its end" in probe.checks
        (bench.public / "file").write_text("host")
        assert (await bench.shell(f"cat {bench.public}/file", "host")).stdout == b"host"
        assert (await bench.shell(f"cat {bench.public}/file")).stdout == b""
        assert (
            await bench.shell("echo x > mine && cat mine && echo x > $TMPDIR/t && cat $TMPDIR/t")
        ).stdout == b"x\nx\n"

    with_bench(body)


@JOB
def test_on_windows_nobody_but_own_machines_gets_a_shell() -> None:
    async def body(bench: Bench) -> None:
        assert bench.executor.capacity().shell_rings == ("own",)
        exited, _ = await bench.run(kind="shell", script="echo x", ring="member")
        assert exited.ended == "failed"

    with_bench(body)


# --- the seatbelt's profile, anywhere


def _rules(seatbelt: Seatbelt, directory: Path) -> list[str]:
    return seatbelt.profile(directory).splitlines()


def test_the_profile_refuses_what_it_does_not_name() -> None:
    home = Path("/Users/a/.clawnet")
    rules = _rules(Seatbelt((home,), uid=None), home / "work" / "00" / "work")
    assert rules[:2] == ["(version 1)", "(deny default)"]
    assert "(deny network*)" in rules
    allowed = [rule for rule in rules if rule.startswith("(allow")]
    assert not [rule for rule in allowed if rule.startswith(("(allow default", "(allow network", "(allow mach"))]
    assert [rule for rule in allowed if "file-write*" in rule] == [
        '(allow file-read* file-write* file-map-executable (subpath (param "WORK")) (subpath (param "TMP")))'
    ]
    assert all("same-sandbox" in rule for rule in allowed if "signal" in rule or "process-info" in rule)
    # The last rule that fits decides.
    shut = rules.index(f'(deny file-read* file-write* (subpath "{home}"))')
    readable = next(at for at, rule in enumerate(rules) if '(subpath "/usr")' in rule and "file-read*" in rule)
    own = next(at for at, rule in enumerate(rules) if rule.startswith("(allow file-read* file-write*"))
    assert readable < shut < own
    assert "/Users" not in " ".join(rule for rule in allowed if "metadata" not in rule)


def test_the_profile_is_balanced_and_paths_stay_text() -> None:
    odd = Path('/tmp/a "b) (allow default')
    text = Seatbelt((odd,), uid=None).profile(odd / "work")
    outside = "".join(piece for at, piece in enumerate(text.replace('\\"', "").split('"')) if at % 2 == 0)
    assert outside.count("(") == outside.count(")")
    assert "(allow default" not in outside
    assert quoted('a"b\\') == '"a\\"b\\\\"'


def test_the_seatbelts_command_line() -> None:
    argv = Seatbelt((), uid=None).argv(Path("/var/tmp/x/work"), ["/bin/sh", "-c", "true"])
    assert argv[0] == "/usr/bin/sandbox-exec"
    assert argv[1:5] == ["-D", "WORK=/var/tmp/x/work", "-D", "TMP=/var/tmp/x/tmp"]
    assert argv[5] == "-p"
    assert argv[-3:] == ["/bin/sh", "-c", "true"]
    assert Seatbelt((), uid=None).members(Path("/nowhere")) == [] or MACOS


def test_layouts_are_those_of_the_system_headers() -> None:
    assert ctypes.sizeof(libproc.TaskInfo) == 96
    assert libproc.TaskInfo.resident_size.offset == 8
    assert libproc.TaskInfo.priority.offset == 92
    assert libproc.pids_in([5, 0, 7, 9], 12) == [5, 7]
    assert libproc.pids_in([5, 7], -1) == []
    if ctypes.sizeof(ctypes.c_void_p) == 8:
        assert ctypes.sizeof(windows_job.BasicLimits) == 64
        assert ctypes.sizeof(windows_job.IoCounters) == 48
        assert ctypes.sizeof(windows_job.ExtendedLimits) == 144
        assert windows_job.ExtendedLimits.job_memory.offset == 120
        assert windows_job.BasicLimits.priority.offset == 56
    assert ctypes.sizeof(windows_job.Accounting) == 48


# --- the seatbelt's probe, its script run anywhere without a seatbelt


def test_the_seatbelt_probe_sees_every_opening_where_nothing_is_shut() -> None:
    """On this machine nothing is shut by it: each check must be found open, or the probe would pass by being blind."""
    if WINDOWS:
        pytest.skip("macOS and Linux alone")
    from clawnet.execution import probe_macos

    async def body(bench: Bench) -> None:
        places = bench.executor._places
        pair = [places.dirs.make(os.urandom(16)) for _ in range(2)]
        try:
            host = places.place("host")
            where = (pair[0].work, pair[1].work)
            bench.home.dir.chmod(0o755)
            found = await probe_macos.probe(host, host, where, bench.home.dir, places.dirs.base)
        finally:
            for dirs in pair:
                dirs.remove()
        assert not found.passed
        opened = {name for name, state in found.checks.items() if state == "possible"}
        expected = {"host file", "clawnet's home", "loopback", "signals to host processes", "writing outside"}
        assert expected <= opened, found
        assert not list(places.dirs.base.glob("canary-*"))
        assert not list(places.dirs.base.glob("drop-*"))

    with_bench(body, offers=("shell-execution",))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"file": "T"}, "host file"),
        ({"home": "T"}, "clawnet's home"),
        ({"loopback": "T"}, "loopback"),
        ({"signal": "possible"}, "signals"),
        ({"drop": "possible"}, "writing outside"),
        ({"outlived": "possible"}, "outliving"),
    ],
)
def test_the_seatbelt_probe_fails_for_every_single_opening(change: dict[str, str], named: str) -> None:
    from clawnet.execution.probe_macos import judge

    outside = {"file": "T", "loopback": "T", "signal": "possible", "drop": "possible", "hidden": "begun"}
    assert judge("T", outside, {}, 501).passed
    found = judge("T", outside, change, 501)
    assert not found.passed
    assert named in found.reason
    assert not judge("T", outside, {}, 0).passed
    for name in outside:
        assert not judge("T", {**outside, name: ""}, {}, 501).passed, f"{name} was not shown to be possible"


def test_survivors_are_told_from_others() -> None:
    from clawnet.execution.probe_macos import survivors

    listing = "  12 /bin/sleep 100007\n 13 /bin/sleep 1\n14 sh -c /bin/sleep 100007\n\n"
    assert survivors("100007", listing) == [12]


# --- Windows: what is decided before anything runs


def _spec(**fields: object) -> JobSpec:
    return JobSpec(job=b"\0" * 16, kind="shell", **fields)  # type: ignore[arg-type]


def test_a_windows_command_line() -> None:
    def found(name: str) -> str | None:
        return {"tool": r"C:\bin\tool.exe", "build": r"C:\bin\build.CMD"}.get(name)

    line = windows_job.command_line
    assert line(_spec(argv=["tool", "a b", 'c"d', ""]), found, "cmd.exe")[0] == r'C:\bin\tool.exe "a b" c\"d ""'
    assert line(_spec(script="dir & exit 3"), found, r"C:\cmd.exe") == (r'"C:\cmd.exe" /d /s /c "dir & exit 3"', 0, "")
    assert line(_spec(argv=["nothing"]), found, "cmd.exe")[:2] == ("", 127)
    refused = line(_spec(argv=["build", "a&calc"]), found, "cmd.exe")
    assert refused[:2] == ("", 126)
    assert "script" in refused[2]


def test_a_windows_environment_holds_nothing_of_the_nodes() -> None:
    environ = {"SYSTEMROOT": "C:\\Windows", "Path": "C:\\bin", "CLAWNET_OPENCLAW_TOKEN": "secret", "USERNAME": "me"}
    found = windows_job.environment_of(_spec(argv=["x"], env={"GIVEN": "1"}), Path("/place/0/work"), environ)
    assert found["SystemRoot"] == "C:\\Windows"
    assert found["PATH"] == "C:\\bin"
    assert (found["GIVEN"], found["TMP"]) == ("1", str(Path("/place/0/tmp")))
    assert "secret" not in found.values()
    assert "USERNAME" not in found


def test_a_windows_jobs_limits_and_ends() -> None:
    bounds = windows_job.limits_of(_spec(argv=["x"], wall_s=10.0, memory_bytes_max=2**28), processors=4)
    assert bounds.job_memory == 2**28
    assert bounds.basic.active_processes == limits.RUN_PROCESSES_MAX
    assert bounds.basic.job_time == 42 * 10_000_000
    assert bounds.basic.flags & windows_job.LIMIT_KILL_ON_CLOSE
    assert bounds.basic.flags & windows_job.LIMIT_JOB_MEMORY
    assert not bounds.basic.flags & 0x1800, "no process may break away from the job"
    assert windows_job.ended_by(0, 2**28, 2**28) == ("exit", "")
    assert windows_job.ended_by(1, 2**20, 2**28) == ("exit", "")
    assert windows_job.ended_by(1, 2**28, 2**28)[0] == "memory_limit"


def test_on_windows_a_shell_is_for_own_machines_whatever_the_policy_says(tmp_path: Path) -> None:
    async def main() -> None:
        for own, expected in (("auto", "host"), ("host", "host"), ("sandboxed", "off"), ("off", "off")):
            settings = ExecutionSettings(shell_own=own, shell_member="sandboxed")
            places = windows_job.Places(settings, Home(tmp_path / own))
            probe = await places.open()
            assert not probe.passed
            assert "own machines" in probe.reason
            assert places.mode("own") == expected
            assert places.mode("member") == places.mode("stranger") == "off"
            places.close()
            assert not (tmp_path / own / "work").exists()

    asyncio.run(main())


def test_what_windows_imports_needs_nothing_of_posix() -> None:
    """The rooms of execution as Windows would import them: the modules it does not have are out of reach."""
    code = """
import asyncio, builtins, ctypes, sys, types
import concurrent.futures, http.client, importlib.metadata, logging, multiprocessing.connection, shutil, subprocess
import tempfile, uuid, msgspec, httpx, nacl.bindings, wasmtime, platformdirs, yaml
MISSING = {"fcntl", "resource", "pwd", "grp", "termios"}
plain = builtins.__import__
def importing(name, *rest):
    if name in MISSING:
        raise ImportError(name)
    return plain(name, *rest)
for name in MISSING & set(sys.modules):
    del sys.modules[name]
class Library:
    def __init__(self, *a, **k): pass
    def __getattr__(self, name):
        made = types.SimpleNamespace(); self.__dict__[name] = made; return made
ctypes.WinDLL = Library
sys.platform = "win32"
builtins.__import__ = importing
import clawnet.execution.executor as executor, clawnet.execution.shells as shells
print(shells.Places.__module__, shells.ShellRun.__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["clawnet.execution.windows_job", "JobRun"], done.stderr[-2000:]
