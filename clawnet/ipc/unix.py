"""Listening on a Unix socket: 0600 in a 0700 directory of ours, put in place in one step, stale ones replaced."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

from clawnet import paths, rpc
from clawnet.errors import ConfigError
from clawnet.ipc.errors import cannot_listen, in_use

BACKLOG = 256


class UnixListener:
    """An open socket; `close` also removes its name, unless another daemon has replaced it."""

    def __init__(self, server: asyncio.AbstractServer, path: Path, identity: tuple[int, int]) -> None:
        self._server = server
        self._path = path
        self._identity = identity

    def close(self) -> None:
        self._server.close()
        try:
            if _identity(self._path) == self._identity:
                self._path.unlink()
        except FileNotFoundError:
            pass


async def listen(loop: asyncio.AbstractEventLoop, path: Path, accept: Callable[[], asyncio.Protocol]) -> UnixListener:
    """Listens on `path`; raises ConfigError when a daemon answers there or the place is not ours alone."""
    paths.make_private_dir(path.parent)
    _own(path.parent)
    _clear(path)
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listening.setblocking(False)
        draft.unlink(missing_ok=True)
        listening.bind(str(draft))
        draft.chmod(0o600)
        listening.listen(BACKLOG)
        # Whoever finds the name finds a socket that accepts, with its mode set.
        draft.rename(path)
        identity = _identity(path)
    except OSError as error:
        listening.close()
        raise cannot_listen(path, error) from error
    server = await loop.create_unix_server(accept, sock=listening, backlog=BACKLOG)
    return UnixListener(server, path, identity)


def _own(directory: Path) -> None:
    """The directory must be ours and closed to others: a socket's own mode is not honoured everywhere."""
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise ConfigError(f"{directory} is not a directory of this user", hint=f"remove or rename {directory}")
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise ConfigError(
            f"{directory} is open to other users (mode {stat.S_IMODE(status.st_mode):04o})",
            hint=f"chmod 700 {directory}",
        )


def _clear(path: Path) -> None:
    """Removes what a killed daemon left; raises ConfigError when somebody answers there, or it is no socket."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise ConfigError(f"{path} is in the way: it is not a socket", hint=f"remove or rename {path}")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(2.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except FileNotFoundError:
            return
        except OSError as error:
            raise cannot_listen(path, error) from error
        raise in_use(path, rpc.peer_of(probe)[1])


def _identity(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_dev, status.st_ino
