"""The start-up probe of the seatbelt sandbox: as on Linux, each refusal is first shown to be possible outside.

One check more: a process that leaves its session and its parents, with nothing on it that names the run, must be ended
with the run. Where one outlives it, shell is offered to no one but own machines.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, Final

from clawnet.execution.endings import ProbeResult
from clawnet.execution.probe import greet, refused, run_script
from clawnet.execution.sandbox_macos import PROGRAM
from clawnet.execution.shell import Place

SCRIPT: Final = r"""
say() { printf '%s=%s\n' "$1" "$2"; }
say file "$(cat "$1" 2>/dev/null)"
say home "$(cat "$2" 2>/dev/null)"
for client in "bash -c 'exec 3<>/dev/tcp/127.0.0.1/$3; read -r x <&3; echo \$x'" "nc -w 2 127.0.0.1 $3"
do
  reached=$(eval "$client" </dev/null 2>/dev/null)
  [ -z "$reached" ] || break
done
say loopback "$reached"
say signal "$(kill -CONT "$4" 2>/dev/null && echo possible)"
say drop "$( (: > "$5") 2>/dev/null && echo possible)"
say hidden "$(perl -MPOSIX -e 'if (!fork) { setsid; exit if fork; %ENV = (); close STDOUT; close STDERR;
  $SIG{$_} = "IGNORE" for keys %SIG; exec "/bin/sleep", $ARGV[0] } wait; print "begun"' "$6" 2>/dev/null)"
: > mine
"""
REMEDY: Final = "shell tasks run for your own machines only; clawnet doctor shows the checks one by one"


def find() -> str:
    """The path of sandbox-exec, or "" where there is none."""
    return PROGRAM if os.access(PROGRAM, os.X_OK) else ""


async def probe(outside: Place, inside: Place, job_dirs: tuple[Path, Path], home: Path, base: Path) -> ProbeResult:
    """Runs the script outside and inside; `job_dirs` are their working directories, `base` is readable for the run."""
    token = os.urandom(8).hex()
    number = str(100_000 + int.from_bytes(os.urandom(2), "big"))
    file, secret, drop = base / f"canary-{token}", home / f".canary-{token}", base / f"drop-{token}"
    become: dict[str, Any] = {} if outside.uid is None else {"user": outside.uid, "extra_groups": []}
    try:
        for path in (file, secret):
            path.write_text(token)
            path.chmod(0o644)
        drop.mkdir()
        drop.chmod(0o777)
        victim = await asyncio.create_subprocess_exec("sleep", "600", **become)
        server = await asyncio.start_server(lambda _, writer: greet(writer, token), "127.0.0.1", 0)
        try:
            port = server.sockets[0].getsockname()[1]
            words = [str(file), str(secret), str(port), str(victim.pid), str(drop / "x"), number]
            _, found_out, said = await run_script(outside, job_dirs[0], SCRIPT, words)
            end_survivors(number)
            (drop / "x").unlink(missing_ok=True)
            ended, found_in, said_in = await run_script(inside, job_dirs[1], SCRIPT, words)
            found_in["outlived"] = "possible" if end_survivors(number) else ""
        finally:
            server.close()
            victim.kill()
            await victim.wait()
        owner = (job_dirs[1] / "mine").stat().st_uid if ended.how == "exit" else -1
    except OSError as error:
        return ProbeResult(False, f"the probe could not be made: {error}", REMEDY)
    finally:
        for path in (file, secret):
            path.unlink(missing_ok=True)
        shutil.rmtree(drop, ignore_errors=True)
    if ended.how != "exit":
        return ProbeResult(False, f"sandbox-exec does not work here: {ended.reason or said_in}", REMEDY)
    return judge(token, found_out, found_in, owner, said)


def judge(token: str, outside: dict[str, str], inside: dict[str, str], owner: int, said: str = "") -> ProbeResult:
    """Compares what the script could do outside with what it could do inside; `owner` has a file made inside."""
    shown = {"file": token, "loopback": token, "signal": "possible", "drop": "possible", "hidden": "begun"}
    unshown = [name for name, value in shown.items() if outside.get(name) != value]
    if unshown:
        return ProbeResult(False, f"the probe does not work outside the sandbox: {', '.join(unshown)} {said}", REMEDY)
    checks = {
        "host file": refused(inside.get("file") == token),
        "clawnet's home": refused(inside.get("home") == token),
        "loopback": refused(inside.get("loopback") == token),
        "signals to host processes": refused(bool(inside.get("signal"))),
        "writing outside": refused(bool(inside.get("drop"))),
        "outliving its end": refused(bool(inside.get("outlived"))),
        "root towards host files": refused(owner == 0),
    }
    open_ones = [name for name, state in checks.items() if state != "refused"]
    if open_ones:
        return ProbeResult(False, "the sandbox does not keep a run from: " + ", ".join(open_ones), REMEDY, checks)
    return ProbeResult(True, checks=checks)


def survivors(number: str, listing: str) -> list[int]:
    """The processes in a listing of `ps -axo pid=,args=` that sleep this number of seconds."""
    lines = [line.split() for line in listing.splitlines()]
    return [int(words[0]) for words in lines if words[1:] == ["/bin/sleep", number] and words[0].isdigit()]


def end_survivors(number: str) -> list[int]:
    """Kills whatever of the script still sleeps, and tells what it was."""
    listing = subprocess.run(["ps", "-axo", "pid=,args="], capture_output=True, text=True, check=False).stdout
    found = survivors(number, listing)
    for pid in found:
        os.kill(pid, 9)
    return found
