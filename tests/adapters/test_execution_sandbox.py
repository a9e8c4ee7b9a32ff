"""What the sandbox refuses. Every refusal is first shown to be possible outside of it, by the same user."""

from __future__ import annotations

import asyncio
import os
import platform
import subprocess
from pathlib import Path

import pytest

from clawnet.execution.probe import judge, remedy_for
from tests.adapters.execution_bench import Bench, needs_bubblewrap, with_bench

pytestmark = needs_bubblewrap


def _both(script: str, possible: bytes) -> None:
    """The script says `possible` on the host and does not in the sandbox."""

    async def body(bench: Bench) -> None:
        outside = await bench.shell(script, "host")
        assert possible in outside.stdout, outside
        inside = await bench.shell(script, "sandboxed")
        assert possible not in inside.stdout, inside

    with_bench(body)


def test_the_probe_passes_here_and_names_what_it_saw() -> None:
    async def body(bench: Bench) -> None:
        probe = bench.executor.probe
        assert probe is not None
        assert probe.passed, probe
        assert set(probe.checks.values()) == {"refused"}
        assert {"host file", "clawnet's home", "loopback"} <= set(probe.checks)
        assert not list(bench.home.dir.glob(".canary*"))

    with_bench(body)


def test_files_of_this_machine_cannot_be_read() -> None:
    async def body(bench: Bench) -> None:
        (bench.public / "file").write_text("host content")
        (bench.home.dir / "key").write_text("home content")
        for path, content in ((bench.public / "file", b"host content"), (bench.home.dir / "key", b"home content")):
            assert content in (await bench.shell(f"cat {path}", "host")).stdout
            inside = await bench.shell(f"cat {path} /proc/self/cwd/../{path} /proc/1/root{path} /proc/*/root{path}")
            assert content not in inside.stdout

    with_bench(body)


def test_accounts_and_configuration_of_this_machine_are_not_shown() -> None:
    _both("grep -c . /etc/group | awk '$1 > 5 { print \"many\" }'", b"many")


def test_only_the_own_directory_and_tmp_can_be_written() -> None:
    async def body(bench: Bench) -> None:
        (bench.public / "drop").mkdir()
        (bench.public / "drop").chmod(0o777)
        script = f"echo x > {bench.public}/drop/$$ && echo written"
        assert b"written" in (await bench.shell(script, "host")).stdout
        assert b"written" not in (await bench.shell(script)).stdout
        for place in ("/", "/usr", "/usr/bin", "/etc", "/dev", "/proc/sys/kernel/hostname", "/bin", "/lib"):
            found = await bench.shell(f"echo x > {place}/x || echo x > {place} || echo refused")
            assert found.stdout == b"refused\n", place
        found = await bench.shell("echo x > /job/x && echo x > /tmp/x && echo x > /dev/shm/x && echo fine")
        assert found.stdout == b"fine\n"

    with_bench(body)


def test_the_loopback_of_this_machine_cannot_be_reached() -> None:
    async def body(bench: Bench) -> None:
        async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"hello from the host\n")
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(greet, "127.0.0.1", 0)
        name = f"\0clawnet-test-{os.getpid()}"
        local = await asyncio.start_unix_server(greet, name)
        async with server, local:
            port = server.sockets[0].getsockname()[1]
            perl = (
                "perl -MSocket -e 'socket(S, PF_UNIX, SOCK_STREAM, 0); "
                f'connect(S, pack("Sa*", 1, "\\0{name[1:]}")) or die; print scalar <S>\''
            )
            for script in (f"bash -c 'cat < /dev/tcp/127.0.0.1/{port}'", perl):
                outside = await bench.shell(script, "host")
                assert outside.stdout == b"hello from the host\n", outside
                inside = await bench.shell(script)
                assert inside.stdout == b""
                assert inside.exit_code != 0

    with_bench(body)


def test_there_is_no_network_at_all() -> None:
    _both("cat /proc/net/dev | grep -v -w lo | grep -q ': ' && echo interfaces", b"interfaces")


def test_processes_of_this_machine_cannot_be_seen_or_killed() -> None:
    async def body(bench: Bench) -> None:
        become = {"user": 65_534, "group": 65_534, "extra_groups": []} if os.getuid() == 0 else {}
        victims = [subprocess.Popen(["sleep", "600"], **become) for _ in range(2)]  # type: ignore[call-overload]
        try:
            for sandbox in ("sandboxed", "host"):
                victim = victims.pop()
                script = f"kill -0 {victim.pid} && echo visible; ls /proc/{victim.pid} > /dev/null && echo listed; "
                found = await bench.shell(script + f"kill -KILL {victim.pid} && echo killed", sandbox)
                if sandbox == "host":
                    assert found.stdout == b"visible\nlisted\nkilled\n"
                else:
                    assert found.stdout == b""
                    assert victim.poll() is None
                    victim.kill()
                victim.wait()
        finally:
            for victim in victims:
                victim.kill()
                victim.wait()

    with_bench(body)


def test_user_namespaces_cannot_be_nested() -> None:
    _both("unshare -U -r true && echo nested; unshare -m true && echo nested", b"nested")


# perl's syscall() reaches calls that no program at hand makes; numbers by architecture: x86_64, aarch64.
_CALLS = {
    "ptrace(TRACEME)": ((101, 117), "0, 0, 0, 0"),
    "keyctl(get session keyring)": ((250, 219), "0, -3, 0, 0"),
    "unshare(NEWUSER)": ((272, 97), "0x10000000"),
    "process_vm_readv(self)": ((310, 270), "$$, 0, 0, 0, 0, 0"),
    "memfd_create": ((319, 279), "$n, 0"),
    "personality(query)": ((135, 92), "0xffffffff"),
    "name_to_handle_at": ((303, 264), "-100, $n, $handle, $mount, 0"),
}


@pytest.mark.parametrize("call", _CALLS)
def test_the_filter_refuses(call: str) -> None:
    numbers, arguments = _CALLS[call]
    number = numbers[platform.machine() == "aarch64"]
    words = 'my $n = "/"; my $handle = pack("IIx128", 128, 0); my $mount = pack("x8");'
    _both(f'perl -e \'{words} print syscall({number}, {arguments}) >= 0 ? "possible" : "refused"\'', b"possible")


def test_the_task_is_nobody_of_this_machine() -> None:
    async def body(bench: Bench) -> None:
        places = bench.executor._places
        found = await bench.shell("cat /proc/self/status; id -un; touch mine; stat -c %u mine")
        status = dict(line.split(":", 1) for line in found.stdout.decode().splitlines() if ":" in line)
        assert {status[name].strip() for name in ("CapEff", "CapPrm", "CapBnd", "CapAmb")} == {"0" * 16}
        assert (status["NoNewPrivs"].strip(), status["Seccomp"].strip()) == ("1", "2")
        uid = str(places.uid if places.uid is not None else os.getuid())
        assert found.stdout.decode().splitlines()[-2:] == ["job", uid]
        assert uid != "0"

    with_bench(body)


def test_a_task_sees_no_trace_of_the_node() -> None:
    async def body(bench: Bench) -> None:
        found = await bench.shell(
            "cat /proc/*/environ /proc/*/cmdline /proc/mounts /proc/self/mountinfo | tr '\\0' '\\n'"
        )
        # The source of the bound directory is in mountinfo, as in every container; it says nothing but the job.
        lines = [line for line in found.stdout.decode().splitlines() if " /job " not in line and " /etc " not in line]
        assert str(bench.home.dir) not in "\n".join(lines)
        assert "PYTHON" not in "\n".join(lines)

    with_bench(body)


def test_a_home_below_a_bound_directory_is_covered(tmp_path: Path) -> None:
    from clawnet.execution.sandbox_bwrap import Bubblewrap

    (tmp_path / "base").mkdir()
    sandbox = Bubblewrap("bwrap", tmp_path / "base", uid=None, hidden=(Path("/usr/local/clawnet"), Path("/home/a")))
    sandbox.prepare("--size --disable-userns")
    argv = sandbox.argv(
        tmp_path,
        ["true"],
        limit={"cpu_s": 1, "file_blocks": 1, "address_kib": 1, "files": 1, "processes": 1},
        tmp_bytes=1,
        seccomp=True,
    )
    text = " ".join(argv)
    assert "--tmpfs /usr/local/clawnet --remount-ro /usr/local/clawnet" in text
    assert "/home/a" not in text
    assert "bind / " not in text
    older = Bubblewrap("bwrap", tmp_path / "base", uid=None, hidden=())
    older.prepare("--unshare-all")
    words = older.argv(
        tmp_path / "work",
        ["true"],
        limit=dict.fromkeys(("cpu_s", "file_blocks", "address_kib", "files", "processes"), 1),
        tmp_bytes=1,
        seccomp=True,
    )
    assert "--size" not in words
    assert "--disable-userns" not in words


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"file": "T"}, "host file"),
        ({"home": "T"}, "clawnet's home"),
        ({"loopback": "T"}, "loopback"),
        ({"listed": "1"}, "loopback"),
        ({"pids": "pid:[1]"}, "host processes"),
        ({"usr": "written"}, "writing below /usr"),
        ({"nested": "possible"}, "nested user namespaces"),
        ({"CapEff": "00000000a80425fb"}, "capabilities"),
        ({"NoNewPrivs": "0"}, "new privileges"),
        ({"Seccomp": "0"}, "unfiltered system calls"),
    ],
)
def test_the_probe_fails_for_every_single_opening(change: dict[str, str], named: str) -> None:
    outside = {"file": "T", "loopback": "T", "pids": "pid:[1]"}
    inside = {"pids": "pid:[2]", "CapEff": "0" * 16, "CapPrm": "0" * 16, "NoNewPrivs": "1", "Seccomp": "2"}
    assert judge("T", outside, inside, 1000).passed
    found = judge("T", outside, {**inside, **change}, 1000)
    assert not found.passed
    assert named in found.reason
    assert found.remedy
    assert not judge("T", outside, inside, 0).passed
    assert not judge("T", {**outside, "loopback": ""}, inside, 1000).passed


def test_known_failures_have_remedies() -> None:
    assert "apparmor" in remedy_for("bwrap: setting up uid map: Permission denied")
    assert "systempaths" in remedy_for("bwrap: Can't mount proc on /newroot/proc: Operation not permitted")
    assert "doctor" in remedy_for("something new")
