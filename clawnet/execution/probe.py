"""The start-up probe: installed is not working. Each refusal is first shown to be possible outside the sandbox.

A small script runs twice, outside and inside, as the same user and through the same code as any run. It tries to read
a file of this machine and one in clawnet's home, to reach a listener on this machine's loopback, to be among its
processes, to write below /usr, to make a user namespace. Only when all is refused inside is shell offered beyond ring
own.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

from clawnet import limits
from clawnet.execution import seccomp
from clawnet.execution.endings import Ended, ProbeResult
from clawnet.execution.sandbox_bwrap import PATH
from clawnet.execution.shell import STDOUT, Place, ShellRun
from clawnet.execution.spec import JobSpec

REACH: Final = r"""
for client in \
  "bash -c 'exec 3<>/dev/tcp/127.0.0.1/$3; read -r x <&3; echo \$x'" \
  "python3 -c 'import socket; print(socket.create_connection((\"127.0.0.1\", $3), 2).recv(64).decode())'" \
  "perl -MIO::Socket::INET -e 'print IO::Socket::INET->new(\"127.0.0.1:$3\")->getline()'" \
  "nc -w 2 127.0.0.1 $3" "curl -s -m 2 telnet://127.0.0.1:$3"
do
  reached=$(eval "$client" </dev/null 2>/dev/null)
  [ -z "$reached" ] || break
done
say loopback "$reached"
"""
"""Shell text: the listener at port $3 of the loopback is asked by whatever client there is."""

_SCRIPT: Final = (
    r"""
say() { printf '%s=%s\n' "$1" "$2"; }
say file "$(cat "$1" 2>/dev/null)"
say home "$(cat "$2" 2>/dev/null)"
say pids "$(readlink /proc/self/ns/pid)"
say usr "$( (: > /usr/.clawnet-probe) 2>/dev/null && echo written && rm -f /usr/.clawnet-probe)"
say listed "$(grep -c -i ":$4 " /proc/self/net/tcp 2>/dev/null)"
"""
    + REACH
    + r"""say nested "$(unshare -U true 2>/dev/null && echo possible)"
: > mine
grep -E '^(CapEff|CapPrm|NoNewPrivs|Seccomp):' /proc/self/status | tr -d '\t' | tr ':' '='
"""
)

_INSTALL: Final = (
    ("apt-get", "apt install bubblewrap"),
    ("dnf", "dnf install bubblewrap"),
    ("pacman", "pacman -S bubblewrap"),
    ("zypper", "zypper install bubblewrap"),
    ("apk", "apk add bubblewrap"),
)


def find_bubblewrap() -> tuple[str, str]:
    """(path, what its --help says), or ("", reason)."""
    program = shutil.which("bwrap", path=PATH)
    if program is None:
        return "", "bubblewrap is not installed"
    try:
        said = subprocess.run(
            [program, "--help"],
            capture_output=True,
            timeout=limits.SANDBOX_PROBE_TIMEOUT_S,
            check=False,
            env={"PATH": PATH, "LANG": "C.UTF-8"},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", f"bubblewrap does not run: {error}"
    return program, (said.stdout + said.stderr).decode("utf-8", "replace")


def not_installed() -> ProbeResult:
    """The remedy by this system's own package manager."""
    for tool, line in _INSTALL:
        if shutil.which(tool, path=PATH):
            return ProbeResult(False, "bubblewrap is not installed", f"bubblewrap is not installed: {line}")
    return ProbeResult(False, "bubblewrap is not installed", "install the package bubblewrap")


def unsupported() -> ProbeResult | None:
    """Why this machine cannot have the sandbox at all, if so."""
    if sys.platform == "darwin":
        return None
    if not sys.platform.startswith("linux"):
        return ProbeResult(
            False,
            f"there is no sandbox for {sys.platform} in this version",
            "shell tasks run for your own machines only",
        )
    if seccomp.build(seccomp.machine()) is None:
        return ProbeResult(
            False,
            f"there is no system call filter for {seccomp.machine()}",
            "shell tasks run for your own machines only",
        )
    return None


def remedy_for(said: str) -> str:
    """What helps against the ways in which bubblewrap is known to fail."""
    if "uid map" in said or "Creating new namespace failed" in said or "No permissions to create" in said:
        return (
            "let unprivileged users make namespaces: sysctl kernel.unprivileged_userns_clone=1, on Ubuntu 24.04 and "
            "later kernel.apparmor_restrict_unprivileged_userns=0 or an AppArmor profile for bwrap, in a container "
            "--security-opt seccomp=unconfined --security-opt apparmor=unconfined"
        )
    if "Can't mount proc" in said or "mount proc" in said:
        return "in a container: start it with --security-opt systempaths=unconfined"
    if "setpriv" in said:
        return "install util-linux (setpriv), or run the node as a user of its own"
    return "run clawnet doctor for the checks one by one, and see docs/SECURITY.md"


async def probe(outside: Place, inside: Place, job_dirs: tuple[Path, Path], home: Path, base: Path) -> ProbeResult:
    """Runs the script outside and inside; `job_dirs` are their working directories, `base` is readable for the run."""
    token = os.urandom(8).hex()
    canaries = (base / f"canary-{token}", home / f".canary-{token}")
    try:
        for path in canaries:
            path.write_text(token)
            path.chmod(0o644)
        server = await asyncio.start_server(lambda _, writer: greet(writer, token), "127.0.0.1", 0)
        try:
            port = server.sockets[0].getsockname()[1]
            words = [str(canaries[0]), str(canaries[1]), str(port), f"{port:04X}"]
            ended_out, found_out, said_out = await run_script(outside, job_dirs[0], _SCRIPT, words)
            ended_in, found_in, said_in = await run_script(inside, job_dirs[1], _SCRIPT, words)
        finally:
            server.close()
        home_readable = canaries[1].read_text() == token
        owner = (job_dirs[1] / "mine").stat().st_uid if ended_in.how == "exit" else -1
    except OSError as error:
        return ProbeResult(False, f"the probe could not be made: {error}", remedy_for(str(error)))
    finally:
        for path in canaries:
            path.unlink(missing_ok=True)
    if ended_out.how != "exit" or found_out.get("file") != token or not home_readable:
        return ProbeResult(False, f"the probe does not work outside the sandbox: {said_out}", "see the node's log")
    if ended_in.how != "exit":
        reason = f"bubblewrap does not work here: {ended_in.reason or said_in}"
        return ProbeResult(False, reason, remedy_for(reason + said_in))
    return judge(token, found_out, found_in, owner)


def judge(token: str, outside: dict[str, str], inside: dict[str, str], owner: int) -> ProbeResult:
    """Compares what the script could do outside with what it could do inside; `owner` has a file made inside."""
    reached = outside.get("loopback") == token
    listed = outside.get("listed", "0") not in ("", "0")
    if not reached and not listed:
        return ProbeResult(False, "no way was found to show that the loopback can be reached outside", "install bash")
    checks = {
        "host file": refused(inside.get("file") == token),
        "clawnet's home": refused(inside.get("home") == token),
        "loopback": refused(inside.get("loopback") == token or inside.get("listed", "") not in ("", "0")),
        "host processes": refused(not inside.get("pids") or inside.get("pids") == outside.get("pids")),
        "writing below /usr": refused(bool(inside.get("usr"))),
        "nested user namespaces": refused(bool(inside.get("nested"))),
        "root towards host files": refused(owner == 0),
        "capabilities": refused(set(inside.get("CapEff", "1") + inside.get("CapPrm", "1")) != {"0"}),
        "new privileges": refused(inside.get("NoNewPrivs") != "1"),
        "unfiltered system calls": refused(inside.get("Seccomp") != "2"),
    }
    open_ones = [name for name, state in checks.items() if state != "refused"]
    if open_ones:
        reason = "the sandbox does not keep a run from: " + ", ".join(open_ones)
        return ProbeResult(False, reason, remedy_for(reason), checks)
    return ProbeResult(True, checks=checks)


def refused(possible: bool) -> str:
    """The word for a check."""
    return "possible" if possible else "refused"


async def greet(writer: asyncio.StreamWriter, token: str) -> None:
    """Says the token to a client of the probe's listener."""
    writer.write(token.encode() + b"\n")
    try:
        await writer.drain()
    except ConnectionError:
        return  # the client had read enough
    finally:
        writer.close()


async def run_script(place: Place, directory: Path, script: str, words: list[str]) -> tuple[Ended, dict[str, str], str]:
    """How a script of `name=value` lines ended at a place, what it told, and the last of its stderr."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Ended] = loop.create_future()
    streams = {1: bytearray(), 2: bytearray()}
    spec = JobSpec(
        job=os.urandom(16),
        kind="shell",
        argv=["sh", "-c", script, "probe", *words],
        wall_s=limits.SANDBOX_PROBE_TIMEOUT_S,
        memory_bytes_max=512 * limits.MIB,
        output_bytes_max=64 * limits.KIB,
    )
    run = ShellRun(
        spec,
        directory,
        place,
        on_output=lambda stream, offset, data: streams[stream].extend(data),
        on_end=done.set_result,
    )
    run.start()
    ended = await done
    for stream in run.streams:
        stream.kept.close()
    lines = streams[STDOUT].decode("utf-8", "replace").splitlines()
    found = dict(line.split("=", 1) for line in lines if "=" in line)
    return ended, found, streams[2].decode("utf-8", "replace").strip()[-400:]
