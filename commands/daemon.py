"""`clawnet daemon` and bare `clawnet`: the node as a process. Run it, start, stop and restart it, look at it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from clawnet import api, launch, limits
from clawnet.errors import ClawnetError, NotFoundError, TimedOutError, UnreachableError

from .invocation import Invocation, NodeCommand, group, here
from .render import clean, json_line, pairs, seconds, short, write

POLL_S = 0.05
FOLLOW_S = 0.2
STOP_TIMEOUT_S = 90.0
LEAVE_TIMEOUT_S = 120.0
LOST = (("bound", "bound in open escrow lines"), ("kept", "that could not be sent"))
TAIL_LINES = 20

app = group("The node as a process: run, start, stop, restart, status, logs.", invoke_without_command=True)


@app.callback()
def daemon(context: typer.Context) -> None:
    """The node as a process. `clawnet daemon` alone is `clawnet daemon run`."""
    if context.invoked_subcommand is None:
        raise typer.Exit(serve(here(context)))


@app.command(cls=NodeCommand)
def run(context: typer.Context) -> None:
    """Run the node in the foreground until SIGTERM or Ctrl-C. A new home is made where there is none."""
    raise typer.Exit(serve(here(context)))


def serve(invocation: Invocation) -> int:
    """The daemon itself; 0 with one line when one runs already."""
    if api.answers(invocation.home):
        invocation.warn(f"a daemon runs already for {invocation.home.dir}")
        return 0
    from clawnet import config
    from clawnet import daemon as node
    from clawnet.config_endpoint import take_secrets
    from clawnet.home import initialise, is_ready
    from clawnet.storage import restoring

    environ = take_secrets(os.environ)
    token = environ.pop("CLAWNET_JOIN", "")
    if invocation.home.half_restored:
        restoring.settle(config.load(invocation.home, environ, invocation.flags).home(invocation.home))
    if not is_ready(invocation.home):
        if token:
            launch.mark_to_join(invocation.home)
        invocation.warn(f"making a new home in {invocation.home.dir} with defaults (`clawnet config show`)")
        now_ms = time.time_ns() // 1_000_000
        initialise(invocation.home, environ, invocation.flags, entropy=os.urandom, now_ms=now_ms)
    worker = (*launch.program(), "_worker")

    def ready(addresses: list[str]) -> None:
        invocation.say(f"the node is ready; it listens at {', '.join(addresses) or 'no address'}")
        if token:
            threading.Thread(target=joins, daemon=True).start()

    def joins() -> None:
        try:
            if mesh := launch.join(invocation.home, token):
                invocation.say(f"joined the mesh {mesh}")
        except ClawnetError as error:
            refused.append(error)
            os.kill(os.getpid(), signal.SIGTERM)

    refused: list[ClawnetError] = []

    deadline = time.monotonic() + limits.DAEMON_START_TIMEOUT_S
    while True:
        try:
            code = node.run(invocation.home, environ, invocation.flags, ready=ready, worker_argv=worker)
            if refused:
                break
            return code
        except ClawnetError as error:
            # Of two that start at once one has the home; when that one answers, this is no failure.
            holder = str(error.details.get("pid") or "")
            if _comes_up(invocation, holder=int(holder) if holder.isdigit() else 0):
                invocation.warn(f"a daemon runs already for {invocation.home.dir}")
                return 0
            if not holder or time.monotonic() > deadline:
                raise
            time.sleep(POLL_S)  # it was ended before it answered, and the home is free again
    raise refused[0]


def _comes_up(invocation: Invocation, *, holder: int) -> bool:
    """Whether a daemon answers; the process that has the home is given its time to start or to end."""
    deadline = time.monotonic() + limits.DAEMON_START_TIMEOUT_S
    while not api.answers(invocation.home):
        if not _alive(holder) or time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


def bare(invocation: Invocation) -> int:
    """`clawnet` without a command: on a terminal, start the node and follow its log; else run it."""
    if sys.stdin is None or not (sys.stdin.isatty() and sys.stdout.isatty()):
        return serve(invocation)
    with invocation.client(create_home=True) as client:
        status = client.call("status")
    invocation.say(f"node {status['name']} ({short(status['peer_id'])}) runs, pid {status['pid']}; its log follows")
    try:
        _follow(_log_file(invocation), TAIL_LINES)
    except KeyboardInterrupt:
        invocation.say("the node goes on in the background; `clawnet daemon stop` ends it")
    return 0


# --- starting and stopping


def _start(invocation: Invocation) -> bool:
    invocation.autostart = True
    return launch.start(
        invocation.home,
        environ=os.environ,
        program=launch.program(),
        create_home=True,
        say=invocation.warn,
    )


@app.command(cls=NodeCommand)
def start(context: typer.Context) -> None:
    """Start the node in the background; returns when it answers."""
    invocation = here(context)
    if not _start(invocation):
        invocation.say("it runs already")
    _show_status(invocation, invocation.call("status"))


@app.command(cls=NodeCommand)
def stop(
    context: typer.Context,
    leave: Annotated[
        bool,
        typer.Option("--leave", help="A throw-away member: return what is left to the inviter, and leave the mesh."),
    ] = False,
) -> None:
    """Let the node finish or hand back what runs, and end it; returns when it is gone."""
    invocation = here(context)
    left = _leave(invocation) if leave else None
    pid = _stop(invocation)
    if invocation.json:
        write(json_line({"pid": pid, "draining": False, "left": left}))
    invocation.say("stopped" if pid or left else "no daemon runs")


def _leave(invocation: Invocation) -> dict[str, Any]:
    """The node gives back what it can, tells the mesh that it leaves, and then ends by itself."""
    with invocation.client(autostart=False) as client:
        found: dict[str, Any] = client.call("node.leave", timeout_s=invocation.timeout_s or LEAVE_TIMEOUT_S)
    accepted = "" if found["accepted"] or found["returned"] == "0" else ", which has not acknowledged it"
    invocation.say(f"returned {found['returned']} credits to {found['inviter']['name']}{accepted}")
    lost = [f"{found[word]} {what}" for word, what in LOST if found[word] != "0"]
    if lost:
        invocation.warn(f"lost to the mesh with this home: {', '.join(lost)} (credits)")
    return found


@app.command(cls=NodeCommand)
def restart(context: typer.Context) -> None:
    """Stop the node if it runs, and start it again."""
    invocation = here(context)
    _stop(invocation)
    _start(invocation)
    _show_status(invocation, invocation.call("status"))


def _stop(invocation: Invocation) -> int:
    """Ends the daemon and waits until its process is gone; its pid, or 0 when none ran."""
    channel = api.open_channel(invocation.home)
    if channel is None:
        return 0
    pid = channel.pid or 0
    channel.close()
    try:
        with invocation.client(autostart=False) as client:
            pid = int(client.call("daemon.stop")["pid"])
    except UnreachableError as error:
        # A daemon of another version still understands a signal; one that went away is being waited for below.
        pid = int(error.details.get("pid") or pid)
        if api.answers(invocation.home):
            if not pid or sys.platform == "win32":
                raise
            os.kill(pid, signal.SIGTERM)
    limit_s = invocation.timeout_s or STOP_TIMEOUT_S
    deadline = time.monotonic() + limit_s
    while api.answers(invocation.home) or _alive(pid):
        if time.monotonic() > deadline:
            raise TimedOutError(
                f"the daemon (pid {pid}) has not ended within {limit_s:g} s; it is still draining",
                hint=f"wait on, or end it at once with `kill {pid}`",
                pid=pid,
            )
        time.sleep(POLL_S)
    return pid


def _alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and only waits for its parent does not count."""
    if pid <= 0 or sys.platform == "win32":
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return True


# --- looking at it


@app.command(cls=NodeCommand)
def status(context: typer.Context) -> None:
    """Whether the node runs, and how it is; exit code 69 when it does not run."""
    invocation = here(context)
    if not api.answers(invocation.home):
        answer = {"running": False, "home": str(invocation.home.dir)}
        pairs(invocation, answer, [("running", False), ("home", answer["home"])])
        raise typer.Exit(UnreachableError.exit_code)
    invocation.autostart = False
    _show_status(invocation, invocation.call("status"))


def _show_status(invocation: Invocation, found: dict[str, Any]) -> None:
    answer = {"running": True, **found}
    tasks = ", ".join(f"{count} {state}" for state, count in sorted(found["tasks"].items()) if count)
    pairs(
        invocation,
        answer,
        [
            ("running", True),
            ("pid", found["pid"]),
            ("version", found["version"]),
            ("name", found["name"]),
            ("peer id", found["peer_id"]),
            ("mesh", found["mesh"]),
            ("home", found["home"]),
            ("up", seconds(found["uptime_s"])),
            ("listening", ", ".join(found["listen"])),
            ("peers", f"{found['peers_connected']} connected of {found['peers_known']} known"),
            ("tasks", tasks),
            ("runs", f"{found['runs']} of {found['slots']} slots"),
            ("offers", ", ".join(found["capabilities"])),
            ("shell", ", ".join(f"{ring} {mode}" for ring, mode in found["shell"].items())),
            ("balance", found["balance"]),
            ("memory", f"{found['memory_rss_bytes'] / 2**20:.0f} MiB"),
            ("storage", f"{found['storage_bytes'] / 2**20:.1f} MiB"),
            ("draining", "yes" if found["draining"] else ""),
            ("warning", "; ".join(found["warnings"])),
        ],
    )


@app.command(cls=NodeCommand)
def logs(
    context: typer.Context,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on as lines are written.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", metavar="N", min=0, help="So many to begin with.")] = 100,
) -> None:
    """The node's log, also of a node that does not run."""
    invocation = here(context)
    path = _log_file(invocation)
    if not path.exists() and not follow:
        raise NotFoundError(f"there is no log yet at {path}", hint="`clawnet daemon start` starts the node")
    if follow:
        _follow(path, lines)
    else:
        write("".join(_tail(path, lines)))


def _log_file(invocation: Invocation) -> Path:
    """Where the node writes its log; node.data_dir may move it."""
    from clawnet import config

    return config.load(invocation.home, os.environ, invocation.flags).home(invocation.home).log_file


def _tail(path: Path, count: int) -> list[str]:
    """The last lines of a file, read from its end."""
    if not count:
        return []
    with path.open("rb") as file:
        place = file.seek(0, os.SEEK_END)
        data = b""
        while place > 0 and data.count(b"\n") <= count:
            step = min(place, 64 * 1024)
            place = file.seek(place - step)
            data = file.read(step) + data
    return [clean(line) + "\n" for line in data.decode("utf-8", "replace").splitlines()[-count:]]


def _follow(path: Path, count: int) -> None:
    """Prints a file as it grows, over rotation, until interrupted."""
    if path.exists():
        write("".join(_tail(path, count)))
    for line in _growth(path):
        write(clean(line) + "\n")


def _growth(path: Path) -> Iterator[str]:
    """Whole lines appended after now; a file that was replaced is read from its start."""
    size = path.stat().st_size if path.exists() else 0
    opened, rest = None, b""
    try:
        while True:
            if opened is None and path.exists():
                opened = path.open("rb")
                opened.seek(size)
                size = 0
            data = opened.read(64 * 1024) if opened is not None else b""
            if data:
                *whole, rest = (rest + data).split(b"\n")
                yield from (line.decode("utf-8", "replace") for line in whole)
                continue
            if opened is not None and _replaced(opened.fileno(), path):
                opened.close()
                opened = None
                continue
            time.sleep(FOLLOW_S)
    finally:
        if opened is not None:
            opened.close()


def _replaced(descriptor: int, path: Path) -> bool:
    held = os.fstat(descriptor)
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return (held.st_dev, held.st_ino) != (there.st_dev, there.st_ino)
