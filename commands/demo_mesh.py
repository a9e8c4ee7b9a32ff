"""The demo's nodes: real daemons with homes in one temporary directory, joined by invites, and all gone after."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clawnet import api, launch
from clawnet.api import Client
from clawnet.errors import ClawnetError, ConfigError, TimedOutError
from clawnet.paths import Home

NAMES = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta")
READY_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 10.0
POLL_S = 0.01
SETTINGS = {
    "node.listen_addrs": "/ip4/127.0.0.1/tcp/0",
    "network.enable_mdns": "false",
    "daemon.drain_timeout": "2s",
}
"""Each node listens at a free loopback port, so that nothing outside this machine can reach it."""


class Node:
    """One daemon: its home, its process, a connection to it, and what it last said of itself."""

    def __init__(self, name: str, home: Home) -> None:
        self.name = name
        self.home = home
        self.process: subprocess.Popen[bytes] | None = None
        self.client = Client(home, autostart=False)
        self.status: dict[str, Any] = {}


class Mesh:
    """The nodes in the order of their names; the first founds the mesh and submits the tasks."""

    def __init__(self, directory: Path, count: int) -> None:
        self.directory = directory
        self.nodes = [Node(name, Home(directory / name)) for name in NAMES[:count]]

    @property
    def founder(self) -> Node:
        """The node that submits."""
        return self.nodes[0]

    # --- bringing it up

    def start(self) -> None:
        """Makes the homes, starts every daemon, and returns when all of them answer.

        Raises whatever kept one from starting, or TimedOutError.
        """
        from clawnet.home import initialise

        # Settings of the user's own node have no business here.
        environ = {name: value for name, value in os.environ.items() if not name.startswith("CLAWNET_")}
        for node in self.nodes:
            now_ms = time.time_ns() // 1_000_000
            initialise(node.home, {}, {}, entropy=os.urandom, now_ms=now_ms, name=node.name)
            _set(node.home, SETTINGS)
            node.home.run_dir.mkdir(mode=0o700, exist_ok=True)
            node.process = launch.spawn(node.home, environ, launch.program())
        _until(lambda: all(self._answers(node) for node in self.nodes), "the daemons did not start")
        self._look()

    @staticmethod
    def _answers(node: Node) -> bool:
        assert node.process is not None
        if api.answers(node.home):
            return True
        code = node.process.poll()
        if code is not None:
            raise launch.failure(node.home, code)
        return False

    def _look(self) -> None:
        for node in self.nodes:
            node.status = node.client.call("status")

    def join(self) -> None:
        """Invites every other node as a member, and lets each join with its token."""
        calls = []
        for node in self.nodes[1:]:
            token = self.founder.client.call("peer.invite", {"ring": "member"})["token"]
            calls.append((node.client, node.client.send("peer.join", {"token": token, "leave": False})))
        deadline = time.monotonic() + READY_TIMEOUT_S
        for client, call in calls:
            event = client.receive(call, deadline=deadline)
            if event.error is not None:
                raise event.error
        _until(self._settled, "the nodes did not find each other")
        self._look()

    def _settled(self) -> bool:
        """Whether the founder knows what every other node can do, and every grant is in its owner's wallet."""
        peers = self.founder.client.call("peer.list")["items"]
        ready = [peer for peer in peers if peer["state"] == "connected" and peer["capabilities"]]
        if len(ready) < len(self.nodes) - 1:
            return False
        balances = [node.client.call("wallet.balance") for node in self.nodes]
        return all(float(found["available"]) > 0 and not found["read_only"] for found in balances)

    # --- taking it down

    def stop(self) -> None:
        """Ends every process that was started here, by force if need be; returns when all are gone."""
        for node in self.nodes:
            node.client.close()
            if node.process is not None and node.process.poll() is None:
                node.process.terminate()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for node in self.nodes:
            if node.process is None:
                continue
            try:
                node.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                node.process.kill()
                node.process.wait()
            # A long path has its socket elsewhere, in a directory of its own.
            if node.home.socket.parent != node.home.run_dir:
                shutil.rmtree(node.home.socket.parent, ignore_errors=True)

    def keep(self) -> None:
        """Leaves everything running; a node that is started again will listen where the others look for it."""
        for node in self.nodes:
            address = next(text for text in node.status["listen"] if "/ip4/127.0.0.1/" in text)
            _set(node.home, {"node.listen_addrs": address.partition("/p2p/")[0]})
            node.client.close()
            if node.process is not None:
                node.process.returncode = 0


def _set(home: Home, values: dict[str, str]) -> None:
    from clawnet import config

    config.set_in_file(home.config_file, values)


def _until(met: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while not met():
        if time.monotonic() > deadline:
            raise TimedOutError(f"{otherwise} within {READY_TIMEOUT_S:g} s", hint="`clawnet doctor` may tell why")
        time.sleep(POLL_S)


class Signals:
    """Turns SIGINT, SIGTERM or SIGHUP into an exception; for a second after that, or once `over`, they do nothing.

    Python drops an exception that comes while it tidies up; whoever then presses Ctrl-C again is heard.
    """

    def __init__(self) -> None:
        self.over = False
        self._again_s = 0.0
        names = ("SIGINT", "SIGTERM", "SIGHUP")
        numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
        # What nohup made deaf to a closed terminal stays so.
        numbers = [n for n in numbers if n == signal.SIGINT or signal.getsignal(n) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._came) for number in numbers}

    def _came(self, number: int, frame: Any) -> None:
        now_s = time.monotonic()
        if self.over or now_s < self._again_s:
            return
        self._again_s = now_s + 1.0
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)

    def restore(self) -> None:
        """Puts the former handlers back."""
        for number, before in self._before.items():
            signal.signal(number, before)


@contextmanager
def mesh(count: int, *, keep: bool = False) -> Iterator[Mesh]:
    """A mesh in a fresh directory. Whatever ends the block, no process and no file is left.

    With `keep` all stays; of a block that failed, the files, for the logs in them. Raises ConfigError when there is no
    place for it.
    """
    # What a start needs is loaded before a signal is turned into an exception: Python drops one that comes while it
    # tidies up after an import, and the demo would go on as if nothing had been pressed.
    import zipfile  # noqa: F401

    import yaml  # noqa: F401

    import clawnet.home  # noqa: F401

    signals = Signals()
    made: Mesh | None = None
    done = failed = False
    try:
        try:
            made = Mesh(_directory(), count)
            yield made
            done = True
        except ClawnetError as error:
            failed = True
            if made is not None and keep:
                error.hint = f"homes and logs are kept in {made.directory}"
            raise
        finally:
            signals.over = True
    finally:
        if made is not None:
            made.keep() if keep and done else made.stop()
            if not (keep and (done or failed)):
                shutil.rmtree(made.directory, ignore_errors=True)
        signals.restore()


def _directory() -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix="clawnet-demo-")).resolve()
    except OSError as error:
        raise ConfigError(
            f"cannot make a directory for the demo: {error.strerror}", hint="TMPDIR names a place that can be written"
        ) from error
