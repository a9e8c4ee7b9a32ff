"""The real program as a process, and a real local socket that answers from a script where no node is needed."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from clawnet.errors import ClawnetError
from clawnet.ipc.server import IpcServer
from clawnet.paths import Home
from tests.cli.harness import Node, Nodes, answers, connected

TASK_ID = "00112233445566778899aabbccddeeff"
PARTY = {"peer_id": "12D3KooWBob", "name": "bob", "ring": "member"}
Answer = Callable[[dict[str, Any]], Any]


def task(**changes: Any) -> dict[str, Any]:
    """A settled shell task as the node tells it."""
    result: dict[str, Any] = {
        "exit_code": 0,
        "signal": None,
        "stdout": "out\n",
        "stderr": "err\n",
        "text": None,
        "outputs": [],
        "sha256": "ab" * 32,
        "duration_s": 0.25,
        "usage": {"duration_s": 0.25, "cpu_s": 0.1, "memory_bytes_max": 1000, "output_bytes": 8},
        "stdout_bytes": 4,
        "stderr_bytes": 4,
    }
    plain = {
        "task_id": TASK_ID,
        "state": "settled",
        "type": "shell",
        "description": "echo out",
        "created_at": "2026-01-02T03:04:05.000Z",
        "deadline": "2026-01-02T04:04:05.000Z",
        "max_budget": "10",
        "price": "1.5",
        "ring": "member",
        "executor": PARTY,
        "attempts": [],
        "bids": 2,
        "escrow": {"id": None, "state": "none", "amount": "0"},
        "result": {**result, **changes.pop("result", {})} if changes.get("result", {}) is not None else None,
        "error": None,
        "idempotency_key": None,
        "final": True,
    }
    return {**plain, **changes}


class Script:
    """A daemon's socket whose answers are given by the test; `calls` holds what was asked."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.answers: dict[str, Any] = {}
        self.notes: dict[str, list[tuple[str, Any]]] = {}
        self.held: dict[str, list[int]] = {}
        self.changed = threading.Condition()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.server = IpcServer(home.socket, self._on_call, lambda call: None)
        asyncio.run_coroutine_threadsafe(self.server.start(), self._loop).result(10)

    def _on_call(self, call: int, method: str, params: dict[str, Any], client: int, credential: str) -> None:
        with self.changed:
            self.calls.append((method, params))
            self.changed.notify_all()
        for name, value in self.notes.get(method, []):
            self.server.notify(call, name, value)
        answer = self.answers.get(method)
        if answer is None:
            self.held.setdefault(method, []).append(call)
            return
        if callable(answer):
            answer = answer(params)
        if isinstance(answer, ClawnetError):
            self.server.reply(call, None, answer.as_dict())
        else:
            self.server.reply(call, answer)

    def release(self, method: str, value: Any) -> None:
        """Answers the calls that were held for want of a scripted answer."""

        def answer() -> None:
            for call in self.held.pop(method, []):
                self.server.reply(call, value)

        self._loop.call_soon_threadsafe(answer)

    def wait_for(self, method: str) -> dict[str, Any]:
        """The params of the first call of this method, once it has come."""
        with self.changed:
            assert self.changed.wait_for(lambda: any(name == method for name, _ in self.calls), 20), self.calls
        return self.params(method)

    def params(self, method: str) -> dict[str, Any]:
        """The params of the last call of this method."""
        return next(params for name, params in reversed(self.calls) if name == method)

    def stop(self) -> None:
        """Ends the server and its loop."""
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _stop(self) -> None:
        # A connection that is being accepted while the listener closes would be left open, and told in a later test.
        while accepts := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(accepts)
        await self.server.stop()


class Program:
    """`clawnet` run as a process with a home of its own and an environment that does not leak in."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self.environ = {
            "PATH": os.environ["PATH"],
            "HOME": str(home.dir.parent),
            "CLAWNET_HOME": str(home.dir),
            "CLAWNET_NETWORK_TCP_PORT": "0",
            "CLAWNET_NETWORK_QUIC_PORT": "0",
            "CLAWNET_NETWORK_ENABLE_MDNS": "false",
            "CLAWNET_AUTOSTART": "0",
            "LC_ALL": "C.UTF-8",
        }

    def argv(self, *arguments: str) -> list[str]:
        """The command line."""
        return [sys.executable, "-P", "-m", "clawnet.commands", *arguments]

    def __call__(
        self, *arguments: str, stdin: bytes | None = None, cwd: Path | None = None, **environ: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs to the end; stdin is a pipe when given, else /dev/null."""
        source: dict[str, Any] = {"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}
        done = subprocess.run(
            self.argv(*arguments), env={**self.environ, **environ}, cwd=cwd, capture_output=True, timeout=60, **source
        )
        out, err = (data.decode("utf-8", "replace") for data in (done.stdout, done.stderr))
        return subprocess.CompletedProcess(done.args, done.returncode, out, err)

    def start(self, *arguments: str, **more: Any) -> subprocess.Popen[bytes]:
        """Starts it with pipes."""
        more = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
        return subprocess.Popen(self.argv(*arguments), env=self.environ, **more)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """A home that does not exist yet."""
    return Home(tmp_path / "home")


@pytest.fixture
def clawnet(home: Home) -> Program:
    """The program."""
    return Program(home)


@pytest.fixture
def node(home: Home) -> Iterator[Script]:
    """The socket of a scripted node."""
    script = Script(home)
    yield script
    script.stop()


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    """Makes real nodes for one test."""
    made = Nodes()
    yield made
    made.close()


@pytest.fixture(scope="session")
def mesh() -> Iterator[list[Node]]:
    """Three real nodes in one mesh, for all tests that leave them as they found them."""
    made = Nodes()
    try:
        three = made.mesh("alice", "bob", "carol")
        if three[1].ask("status")["shell"]["member"] != "sandboxed":
            pytest.skip("bubblewrap not installed")
        yield three
    finally:
        made.close()


@pytest.fixture
def alice(mesh: list[Node]) -> Iterator[Node]:
    """The node that founded the mesh, connected to both others; whatever a test did to it, all three go on serving."""
    mesh[0].until("is connected to both", lambda: {"bob", "carol"} <= connected(mesh[0]))
    yield mesh[0]
    assert answers(mesh)


def failure(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The error object on stderr of a command run with --json."""
    error: dict[str, Any] = json.loads(done.stderr.splitlines()[-1])["error"]
    assert error["exit_code"] == done.returncode
    return error
