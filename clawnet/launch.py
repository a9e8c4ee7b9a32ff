"""Starting the daemon from a command: one at a time, detached, with a clean environment, and its failure explained."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

from clawnet import api, errors, limits, money, paths
from clawnet.errors import ClawnetError, ConfigError, InternalError, NoDaemonError, StorageFullError, TimedOutError
from clawnet.paths import Home

_POLL_S = 0.02
_ROOM_BYTES = 64 * 1024
_KEPT = ("PATH", "HOME", "SHIV_ROOT")
_KEPT_WINDOWS = ("SYSTEMROOT", "SYSTEMDRIVE", "USERPROFILE", "LOCALAPPDATA", "APPDATA", "TEMP", "TMP", "PATHEXT")
_KEPT_TERMUX = ("PREFIX", "LD_PRELOAD", "LD_LIBRARY_PATH", "TERMUX_VERSION", "ANDROID_ROOT", "ANDROID_DATA")
_NOT_KEPT = ("CLAWNET_JOIN", "CLAWNET_AUTOSTART", "CLAWNET_HOME", "CLAWNET_CONFIG")


def program() -> list[str]:
    """The command, by absolute paths, that starts this same program again: a zipapp, or the installed package."""
    import zipfile

    started = Path(sys.argv[0] if sys.argv else "").absolute()
    if started.is_file() and zipfile.is_zipfile(started):
        with zipfile.ZipFile(started) as archive:
            # Some other program's archive may use this package as a library.
            if any(name.removeprefix("site-packages/") == "clawnet/__init__.py" for name in archive.namelist()):
                return [sys.executable, str(started)]
    # -P: the working directory of the daemon (its home) is no place to import from.
    return [sys.executable, "-P", "-m", "clawnet.commands"]


def environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What a daemon inherits: PATH, HOME and CLAWNET_*, whatever shell or job started it; never an invite."""
    kept = [*_KEPT, *(_KEPT_WINDOWS if sys.platform == "win32" else ())]
    if "TERMUX_VERSION" in environ:
        kept += _KEPT_TERMUX
    return {
        name: value
        for name, value in environ.items()
        if name in kept or (name.startswith("CLAWNET_") and name not in _NOT_KEPT)
    }


def start(
    home: Home,
    *,
    environ: Mapping[str, str],
    program: Sequence[str] | None = None,
    create_home: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> bool:
    """Starts the daemon of `home` unless it runs, and returns when it answers; True when this call started it.

    Of many callers one spawns, the others wait for it. Raises what kept the daemon from starting, with its exit code,
    or TimedOutError after DAEMON_START_TIMEOUT_S.
    """
    fresh = not (home.node_key.exists() and home.mesh_file.exists()) and not home.half_restored
    token = environ.get("CLAWNET_JOIN", "") if create_home else ""
    if fresh and not create_home:
        raise ConfigError(f"{home.dir} is no clawnet home yet", hint="`clawnet init` makes one")
    for directory in (home.dir, home.run_dir):
        paths.make_private_dir(directory)
    deadline = time.monotonic() + limits.DAEMON_START_TIMEOUT_S
    with _open_lock(home.autostart_lock) as lock:
        joins = bool(token) and (fresh or _to_join(home).exists())
        while not _try_lock(lock):
            if api.answers(home) and not joins:
                return False
            _pause(deadline, home)
        if api.answers(home):
            return False
        if fresh and not home.mesh_file.exists():
            say(f"making a new home in {home.dir} with defaults (`clawnet config show`)")
            if token:
                paths.write_private(_to_join(home), b"")
        process = spawn(home, environ, program)
        try:
            _wait(home, process, deadline)
            if token and _to_join(home).exists():
                _join_or_stop(home, token, process)
        finally:
            # It outlives this process by design: nobody waits for it here.
            process.returncode = process.returncode or 0
    return True


def _to_join(home: Home) -> Path:
    """A mark in a home that was made with CLAWNET_JOIN: until it has joined, every start tries to."""
    return home.run_dir / "to-join"


def mark_to_join(home: Home) -> None:
    """This home, which is about to be made, is to join a mesh before it is of use."""
    paths.make_private_dir(home.run_dir)
    paths.write_private(_to_join(home), b"")


def join(home: Home, token: str) -> str:
    """Lets the daemon of a home that was marked redeem an invite; the mesh's id, "" for a home without the mark.

    Raises what peer.join answers; the mark stays then.
    """
    if not _to_join(home).exists():
        return ""
    with api.Client(home, autostart=False) as client:
        found = client.call("peer.join", {"token": token.strip(), "leave": False}, timeout_s=limits.JOIN_WAIT_S)
        _await_credits(client, found["granted"])
    _to_join(home).unlink(missing_ok=True)
    return str(found["mesh"])


def _await_credits(client: api.Client, granted: str) -> None:
    """What comes with the invite is there soon after the join; whoever pays for work next finds it."""
    deadline = time.monotonic() + limits.JOIN_CREDITS_S
    while money.parse_credits(client.call("wallet.balance")["available"]) < money.parse_credits(granted):
        if time.monotonic() > deadline:
            return
        time.sleep(_POLL_S)


def _join_or_stop(home: Home, token: str, process: subprocess.Popen[bytes]) -> None:
    """A node that was made to join does not go on in a mesh of its own when it cannot: it has ended on return.

    Whoever starts it next would else find it still answering, and work in that mesh.
    """
    try:
        join(home, token)
    except ClawnetError as error:
        stopped = contextlib.suppress(ClawnetError, subprocess.TimeoutExpired)
        with stopped, api.Client(home, autostart=False) as client:
            client.call("daemon.stop")
            process.wait(limits.DAEMON_START_TIMEOUT_S)
        error.message = f"joining by CLAWNET_JOIN failed, and the daemon was stopped: {error.message}"
        raise


_program = program


def _arguments(home: Home) -> list[str]:
    config = [] if home.config_file == home.dir / "config.yaml" else ["--config", str(home.config_file)]
    return ["--home", str(home.dir), *config, "daemon", "run", "--json"]


def spawn(home: Home, environ: Mapping[str, str], program: Sequence[str] | None = None) -> subprocess.Popen[bytes]:
    """Starts the daemon of `home` without waiting for it; `failure` explains an early end. Raises ConfigError."""
    command = [*(program or _program()), *_arguments(home)]
    child_environ = environment(environ)
    # What a terminal would show goes to the log file; this file then holds only what went wrong before there was a log.
    child_environ["CLAWNET_LOG_OUTPUT"] = "file"
    said = _said(home)
    try:
        with said.open("wb") as out:
            said.chmod(0o600)
            return _spawn(command, out, home.dir, child_environ)
    except OSError as error:
        raise ConfigError(f"cannot start the daemon ({command[0]}): {error.strerror or error}") from error


def _said(home: Home) -> Path:
    return home.run_dir / "daemon.out"


def _wait(home: Home, process: subprocess.Popen[bytes], deadline: float) -> None:
    while not api.answers(home):
        code = process.poll()
        if code is not None and not (code == 0 and _answers_soon(home, deadline)):
            raise failure(home, code)
        _pause(deadline, home)


def _answers_soon(home: Home, deadline: float) -> bool:
    """A daemon that left with 0 found another one at work; that one answers, or is on its way to."""
    while time.monotonic() < deadline:
        if api.answers(home):
            return True
        time.sleep(_POLL_S)
    return False


def _pause(deadline: float, home: Home) -> None:
    if time.monotonic() > deadline:
        raise TimedOutError(
            f"the daemon was not ready within {limits.DAEMON_START_TIMEOUT_S:g} s",
            hint=f"look at {home.log_file}, or run `clawnet daemon run` in a terminal",
        )
    time.sleep(_POLL_S)


def failure(home: Home, code: int) -> ClawnetError:
    """The error that ended a daemon at its start with this exit code, from the last lines it wrote."""
    said = _said(home)
    lines = [line for line in said.read_text("utf-8", "replace").splitlines() if line.strip()]
    for line in reversed(lines[-20:]):
        try:
            fields = json.loads(line)["error"]
        except (ValueError, KeyError, TypeError):
            continue
        return _prefixed(errors.from_dict(fields))
    place = said.parent.parent
    if not lines and shutil.disk_usage(place).free < _ROOM_BYTES:
        return StorageFullError(f"the daemon could not start: no room on the disk of {place}", hint="make room on it")
    tail = "; ".join(line.strip() for line in lines[-3:]) or "it wrote nothing"
    hint = f"all it wrote is in {said}"
    if code < 0:
        return NoDaemonError(f"the daemon was killed by signal {-code} at its start: {tail}", hint=hint)
    return InternalError(f"the daemon could not start (exit code {code}): {tail}", hint=hint)


def _prefixed(error: ClawnetError) -> ClawnetError:
    error.message = f"the daemon could not start: {error.message}"
    return error


# --- what differs between systems: a process of its own, and the lock that lets one caller spawn


def _open_lock(path: Path) -> IO[bytes]:
    try:
        return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600), "r+b")
    except OSError as error:
        raise ConfigError(f"cannot open {path}: {error.strerror}") from error


if sys.platform == "win32":

    def _spawn(command: list[str], out: IO[bytes], cwd: Path, environ: dict[str, str]) -> subprocess.Popen[bytes]:
        flags = subprocess.DETACHED_PROCESS | subprocess.CREATE_NEW_PROCESS_GROUP
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=cwd, env=environ, creationflags=flags
        )

    def _try_lock(lock: IO[bytes]) -> bool:
        import msvcrt

        try:
            msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:

    def _spawn(command: list[str], out: IO[bytes], cwd: Path, environ: dict[str, str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            cwd=cwd,
            env=environ,
            start_new_session=True,
            umask=0o077,
        )

    def _try_lock(lock: IO[bytes]) -> bool:
        import fcntl

        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
