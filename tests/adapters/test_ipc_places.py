"""The local socket where something else is in its place: an open directory, a file, another program."""

from __future__ import annotations

import asyncio
import socket
import threading
from pathlib import Path

import pytest

from clawnet import rpc
from clawnet.api import Client
from clawnet.errors import ConfigError, UnreachableError
from clawnet.ipc.server import IpcServer
from clawnet.paths import Home, make_private_dir


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.mark.parametrize("mode", [0o755, 0o770])
def test_a_directory_open_to_others_is_refused(home: Home, mode: int) -> None:
    make_private_dir(home.run_dir)
    home.run_dir.chmod(mode)
    server = IpcServer(home.socket, lambda *args: None, lambda call: None)
    with pytest.raises(ConfigError, match="open to other users") as caught:
        asyncio.run(server.start())
    assert "chmod 700" in caught.value.hint


def test_a_file_in_the_way_is_named(home: Home) -> None:
    make_private_dir(home.run_dir)
    home.socket.write_text("not a socket")
    server = IpcServer(home.socket, lambda *args: None, lambda call: None)
    with pytest.raises(ConfigError, match="not a socket"):
        asyncio.run(server.start())


def test_what_is_no_daemon_of_ours_is_said(home: Home) -> None:
    make_private_dir(home.run_dir)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(home.socket))
        listening.listen()

        def greet() -> None:
            connection, _ = listening.accept()
            connection.recv(1_000)
            connection.sendall(b"SSH-2.0-hello\r\n")
            connection.close()

        thread = threading.Thread(target=greet)
        thread.start()
        with Client(home, autostart=False) as client, pytest.raises(UnreachableError, match="does not speak"):
            client.call("echo")
        thread.join()


def test_a_daemon_too_old_is_recognised_by_the_command() -> None:
    with pytest.raises(UnreachableError, match="older than this command"):
        rpc.check_daemon({"rpc_version": rpc.RPC_VERSION_OLDEST - 1})
    with pytest.raises(UnreachableError, match="does not speak"):
        rpc.check_daemon("what?")
