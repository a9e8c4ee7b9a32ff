"""`clawnet doctor`: everything that can be checked from here, each finding with its remedy. Works without a daemon."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from clawnet import __version__, api, paths
from clawnet.errors import ClawnetError, ConfigError

from .invocation import Invocation, NodeCommand, group, here
from .render import clean, json_line, on_terminal, write

if TYPE_CHECKING:
    from clawnet.config import Config

Finding = dict[str, str]
MARKS = {"ok": "ok  ", "warn": "warn", "error": "FAIL"}

app = group("Check everything; each finding with its remedy.")


@app.command("doctor", cls=NodeCommand)
def doctor(context: typer.Context) -> None:
    """Check configuration, permissions, daemon, ports and sandbox. Exit code 78 when something must be put right."""
    invocation = here(context)
    findings = list(_findings(invocation))
    ok = all(found["level"] != "error" for found in findings)
    if invocation.json:
        write(json_line({"ok": ok, "findings": findings}))
    else:
        write("".join(_lines(findings)))
    raise typer.Exit(0 if ok else ConfigError.exit_code)


def _lines(findings: list[Finding]) -> Iterator[str]:
    for found in findings:
        if on_terminal():
            yield f"{MARKS[found['level']]}  {found['check']}: {clean(found['message'])}\n"
            if found["remedy"]:
                yield f"      {clean(found['remedy'])}\n"
        else:
            yield "\t".join(clean(found[name]) for name in ("level", "check", "message", "remedy")) + "\n"


def _finding(check: str, level: str, message: str, remedy: str = "") -> Finding:
    return {"check": check, "level": level, "message": message, "remedy": remedy}


def _findings(invocation: Invocation) -> Iterator[Finding]:
    yield _finding("python", "ok", f"Python {sys.version.split()[0]}, clawnet {__version__}")
    yield from _home(invocation)
    settings = yield from _config(invocation)
    status, from_daemon = _daemon(invocation)
    yield status
    yield from from_daemon
    checked = {found["check"] for found in from_daemon}
    if settings is None:
        return
    if "ports" not in checked:
        yield from _ports(settings, running=status["level"] == "ok")
    if "sandbox" not in checked:
        yield _sandbox(settings)
    if "ai endpoint" not in checked:
        yield _endpoint(settings)


def _home(invocation: Invocation) -> Iterator[Finding]:
    """The home and the modes of what lies in it."""
    home = invocation.home
    if not home.dir.is_dir():
        yield _finding("home", "warn", f"{home.dir} does not exist yet", "clawnet init")
        return
    keys = sorted(home.keys_dir.iterdir()) if home.keys_dir.is_dir() else []
    problems = 0
    for path, secret in [
        (home.dir, False),
        (home.config_file, False),
        (home.keys_dir, True),
        *((k, True) for k in keys),
    ]:
        try:
            paths.check_private(path, secret=secret)
        except ConfigError as error:
            problems += 1
            yield _finding("permissions", "error", error.message, error.hint)
        except OSError as error:
            problems += 1
            yield _finding("permissions", "error", f"cannot look at {path}: {error.strerror}")
    if not problems:
        yield _finding("permissions", "ok", f"{home.dir} and {len(keys)} keys belong to this user alone")
    if home.mesh_file.exists() and home.node_key.exists():
        yield _finding("home", "ok", f"{home.dir} is initialised")
    else:
        yield _finding("home", "warn", f"{home.dir} is not initialised", "clawnet init")


def _config(invocation: Invocation) -> Any:
    """The configuration's problems; returns the configuration when there are none."""
    from clawnet import config

    try:
        problems = config.check(invocation.home, os.environ)
        for problem in problems:
            yield _finding("config", "error", problem.message, problem.hint)
        if problems:
            return None
        settings = config.load(invocation.home, os.environ, invocation.flags)
    except ClawnetError as error:
        yield _finding("config", "error", error.message, error.hint)
        return None
    file = invocation.home.config_file
    yield _finding("config", "ok", f"{file} is good" if file.exists() else "no file; the defaults are in use")
    return settings


def _daemon(invocation: Invocation) -> tuple[Finding, list[Finding]]:
    """Whether a daemon answers, and what it finds itself."""
    try:
        with invocation.client(autostart=False) as client:
            if api.open_channel(invocation.home) is None:
                return _finding("daemon", "warn", "no daemon runs", "clawnet daemon start"), []
            found = client.call("doctor")
            running = str(client.hello.get("version"))
    except ClawnetError as error:
        return _finding("daemon", "error", error.message, error.hint or "clawnet daemon restart"), []
    if running != __version__:
        message = f"the running daemon is version {running}, this command {__version__}"
        return _finding("daemon", "warn", message, "clawnet daemon restart"), list(found["findings"])
    return _finding("daemon", "ok", f"a daemon answers (pid {client.hello.get('pid')})"), list(found["findings"])


def _ports(settings: Config, *, running: bool) -> Iterator[Finding]:
    """Whether the ports are free for a daemon that does not run yet, and whether QUIC and mDNS can work here at all."""
    from clawnet.net.carriers import NO_QUIC, NO_QUIC_REMEDY, has_quic
    from clawnet.net.vicinity import NO_MDNS, NO_MDNS_REMEDY, has_mdns

    quic = settings.flag("network.enable_quic")
    if quic and not has_quic():
        yield _finding("quic", "warn", NO_QUIC, NO_QUIC_REMEDY)
    if not running and settings.flag("network.enable_mdns") and not has_mdns():
        yield _finding("mdns", "warn", NO_MDNS, NO_MDNS_REMEDY)
    if running:
        return
    if settings.flag("network.enable_tcp"):
        yield _port("TCP", socket.SOCK_STREAM, settings.integer("network.tcp_port"), "network.tcp_port")
    if quic and has_quic():
        yield _port("UDP", socket.SOCK_DGRAM, settings.integer("network.quic_port"), "network.quic_port")


def _port(kind: str, socket_kind: socket.SocketKind, port: int, key: str) -> Finding:
    with socket.socket(socket.AF_INET, socket_kind) as probe:
        if socket_kind == socket.SOCK_STREAM:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            remedy = f"clawnet config set {key} 0 takes any free port"
            return _finding("ports", "warn", f"{kind} port {port} cannot be used: {error.strerror}", remedy)
    return _finding("ports", "ok", f"{kind} port {port} is free" if port else f"any free {kind} port")


def _sandbox(settings: Config) -> Finding:
    """The same probe that the node makes at its start, in a directory of its own."""
    if sys.platform == "win32":
        return _finding("sandbox", "warn", "shell tasks on Windows come with a later version", "use --type compute")
    import asyncio

    from clawnet.execution.places import Places
    from clawnet.execution.spec import ExecutionSettings

    with tempfile.TemporaryDirectory(prefix="clawnet-doctor-") as directory:
        try:
            places = Places(ExecutionSettings(user=settings.text("execution.user")), paths.Home(Path(directory)))
        except ClawnetError as error:
            return _finding("sandbox", "error", error.message, error.hint)
        try:
            result = asyncio.run(places.open())
        finally:
            places.close()
    if result.passed:
        return _finding("sandbox", "ok", "shell tasks run sandboxed: the probe was refused everything it must be")
    return _finding("sandbox", "warn", result.reason, result.remedy)


def _endpoint(settings: Config) -> Finding:
    """The same look at the AI endpoint that the node takes."""
    import asyncio

    from clawnet.execution.prompt import PromptSettings, check

    try:
        return asyncio.run(check(PromptSettings.of(settings, os.environ)))
    except ClawnetError as error:
        return _finding("ai endpoint", "error", error.message, error.hint)
