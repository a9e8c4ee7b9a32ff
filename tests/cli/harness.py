"""Real nodes for tests: homes under short paths, daemons that are started, joined and waited for, and surely ended.

A `Node` is a home with the real program in front of it. Its commands run as processes with an environment that does not
leak in; what a test only needs to wait for, or to have done before it begins, is asked over the local socket, which is
quick. `close` ends the one daemon that has this home, by its pid, and then looks whether anything of it is left and
whether its log holds a traceback.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from clawnet import api, launch
from clawnet.answers import ANSWERS, ErrorAnswer, Task
from clawnet.api import Client
from clawnet.errors import ClawnetError
from clawnet.paths import Home, make_private_dir

PROGRAM = (sys.executable, "-P", "-m", "clawnet.commands")
PATIENCE_S = 40.0
"""How long anything is waited for before the test fails; on a free machine all of it comes within a second."""
TRACEBACK = "Traceback (most recent call last)"


class Done(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The one line on stdout of a command that succeeded."""
        assert self.code == 0, f"exit code {self.code}: {self.err}"
        return self.out.strip()

    def json(self, kind: str | None = None) -> Any:
        """The object on stdout; with `kind` checked against the struct that documents that command's answer."""
        assert self.out, f"nothing on stdout, exit code {self.code}: {self.err}"
        value = json.loads(self.out)
        return value if kind is None else checked(value, ANSWERS[kind])

    def rows(self, code: int = 0) -> list[list[str]]:
        """The tab-separated rows of a command that ended as it should."""
        assert self.code == code, f"exit code {self.code}: {self.err}"
        return [line.split("\t") for line in self.out.splitlines()]

    def failed(self, code: int, *words: str) -> Done:
        """Asserts the exit code and that one or two lines on stderr say each of `words`."""
        assert self.code == code, f"exit code {self.code}, not {code}: {self.out}{self.err}"
        assert TRACEBACK not in self.err
        said = [line for line in self.err.splitlines() if line.strip()]
        assert 1 <= len(said) <= 3, self.err
        for word in words:
            assert word in self.err, self.err
        return self


class Node:
    """A home, the program for it, and the way to its daemon."""

    def __init__(self, directory: Path, name: str, **environ: str) -> None:
        self.name = name
        self.home = Home(directory)
        self.dir = directory
        self.environ = {
            "PATH": os.environ["PATH"],
            "HOME": str(directory.parent),
            "CLAWNET_HOME": str(directory),
            "CLAWNET_NODE_NAME": name,
            "LC_ALL": "C.UTF-8",
            **environ,
        }
        if "CLAWNET_TCP_PORT" not in environ:
            self.environ.setdefault("CLAWNET_NODE_LISTEN_ADDRS", "/ip4/127.0.0.1/tcp/0")
        self.environ.setdefault("CLAWNET_QUIC_PORT", "0")
        self.environ.setdefault("CLAWNET_NETWORK_ENABLE_MDNS", "false")
        self.program: tuple[str, ...] = PROGRAM
        self.may_log_tracebacks = False
        self._spawned: list[subprocess.Popen[bytes]] = []

    # --- commands

    def __call__(
        self,
        *arguments: str,
        stdin: bytes | None = None,
        cwd: Path | None = None,
        timeout_s: float = 90.0,
        **environ: str,
    ) -> Done:
        """Runs a command to its end; stdin is a pipe when given, else /dev/null."""
        code, out, err = self.raw(*arguments, stdin=stdin, cwd=cwd, timeout_s=timeout_s, **environ)
        return Done(code, out.decode("utf-8", "replace"), err.decode("utf-8", "replace"))

    def raw(
        self,
        *arguments: str,
        stdin: bytes | None = None,
        cwd: Path | None = None,
        timeout_s: float = 90.0,
        **environ: str,
    ) -> tuple[int, bytes, bytes]:
        """The same with bytes."""
        source: dict[str, Any] = {"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}
        env = {**self.environ, **environ}
        done = subprocess.run(
            [*self.program, *arguments], env=env, cwd=cwd, capture_output=True, timeout=timeout_s, **source
        )
        assert TRACEBACK.encode() not in done.stderr, done.stderr.decode()
        return done.returncode, done.stdout, done.stderr

    @contextlib.contextmanager
    def popen(self, *arguments: str, **more: Any) -> Iterator[subprocess.Popen[bytes]]:
        """A command under way, with pipes; killed at the end if it still runs."""
        more = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
        env = {**self.environ, **more.pop("environ", {})}
        process = subprocess.Popen([*self.program, *arguments], env=env, **more)
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.wait(PATIENCE_S)
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()

    # --- the daemon

    def start(self) -> Node:
        """Starts the daemon, and returns when it answers; a home that is none yet becomes one.

        As `daemon start` does, without a process for that command: the tests of the command run the command.
        """
        if "CLAWNET_JOIN" in self.environ:
            done = self("daemon", "start", "--json")
            assert done.code == 0, done.err
            return self
        return self.spawn().ready()

    def spawn(self) -> Node:
        """Starts the daemon and does not wait for it, so that others can start at the same time."""
        self._collect()
        if not self.pid:
            for directory in (self.home.dir, self.home.run_dir):
                make_private_dir(directory)
            self._spawned.append(launch.spawn(self.home, self.environ, self.program))
        return self

    def ready(self) -> Node:
        """Waits until the daemon that `spawn` started answers."""

        def look() -> bool:
            code = self._spawned[-1].poll() if self._spawned else None
            if self.pid:
                return True
            if code is not None:
                raise launch.failure(self.home, code)
            return False

        self.until("answers", look)
        return self

    def _collect(self) -> None:
        """Those of its daemons that are over are no longer kept in the table of processes."""
        self._spawned = [process for process in self._spawned if process.poll() is None]

    @property
    def pid(self) -> int:
        """The pid of the daemon that answers, else 0.

        The socket of one that was killed takes connections until the last of its threads has ended.
        """
        channel = api.open_channel(self.home)
        if channel is None:
            return 0
        with contextlib.closing(channel):
            return channel.pid if channel.pid and alive(channel.pid) else 0

    def client(self) -> Client:
        """A client of the running daemon; never starts one."""
        return Client(self.home, autostart=False, timeout_s=PATIENCE_S)

    def ask(self, method: str, **params: Any) -> Any:
        """One call over the local socket."""
        with self.client() as client:
            return client.call(method, params)

    def until(self, what: str, found: Callable[[], Any]) -> Any:
        """Waits for something about this node to become true, and returns it."""
        return until(f"{self.name}: {what}", found)

    def task(self, task: str) -> dict[str, Any]:
        """One task as `market show --json` has it."""
        found: dict[str, Any] = self.ask("task.get", task=task)
        return found

    def reaches(self, task: str, *states: str) -> dict[str, Any]:
        """Waits until the task is in one of these states."""

        def look() -> dict[str, Any] | None:
            now = self.task(task)
            return now if now["state"] in states else None

        found: dict[str, Any] = self.until(f"task {task[:8]} {states}", look)
        return found

    @property
    def peer_id(self) -> str:
        """This node's id."""
        return str(self.ask("status")["peer_id"])

    @property
    def log(self) -> str:
        """What the daemon wrote to its log."""
        return self.home.log_file.read_text() if self.home.log_file.exists() else ""

    @property
    def security_log(self) -> str:
        """What it wrote to its security log."""
        return self.home.security_log.read_text() if self.home.security_log.exists() else ""

    def kill(self) -> int:
        """SIGKILL to the daemon, and its death waited for; its pid."""
        pid = self.pid
        assert pid
        os.kill(pid, signal.SIGKILL)
        until(f"{self.name} dies", lambda: not alive(pid))
        for process in self._spawned:
            if process.pid == pid:
                process.wait(PATIENCE_S)
        return pid

    def close(self) -> None:
        """Ends the daemon that has this home, removes the home, and complains about what should not have happened."""
        left: list[str] = []
        pid = self.pid
        if pid:
            os.kill(pid, signal.SIGTERM)
            with contextlib.suppress(AssertionError):
                until(f"{self.name} ends", lambda: not alive(pid), 15.0)
            if alive(pid):
                left.append(f"{self.name} did not end after SIGTERM within 15 s; its log ends:\n{self.log[-2000:]}")
                os.kill(pid, signal.SIGKILL)
        for process in self._spawned:
            try:
                process.wait(15.0)
            except subprocess.TimeoutExpired:
                left.append(
                    f"{self.name} has a daemon that runs and does not answer; its log ends:\n{self.log[-2000:]}"
                )
                process.kill()
                process.wait()
        if TRACEBACK in self.log and not self.may_log_tracebacks:
            left.append(f"the log of {self.name} holds a traceback:\n{self.log[-6000:]}")
        shutil.rmtree(self.dir, ignore_errors=True)
        assert not left, "\n".join(left)


class Nodes:
    """Makes nodes in one directory with a short name and closes them all."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="clawnet-", dir="/tmp"))
        self._made: list[Node] = []

    def __call__(self, name: str = "alice", **environ: str) -> Node:
        """A node whose home does not exist yet."""
        node = Node(self.directory / name, name, **environ)
        self._made.append(node)
        return node

    def mesh(self, *names: str, ring: str = "member") -> list[Node]:
        """Started nodes, all in the mesh of the first."""
        founder, *others = nodes = started(*(self(name) for name in names))
        for node in others:
            join(founder, node, ring=ring)
        for node in nodes:
            node.until("sees all", lambda node=node: len(connected(node)) == len(nodes) - 1)
        return nodes

    def close(self) -> None:
        """Closes every node; all of them also when one complains."""
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, self.directory, ignore_errors=True)
            for node in self._made:
                stack.callback(node.close)


def started(*nodes: Node) -> list[Node]:
    """Nodes that all start at once, when all of them answer."""
    for node in nodes:
        node.spawn()
    return [node.ready() for node in nodes]


def join(founder: Node, newcomer: Node, *, ring: str = "member") -> None:
    """An invite of `founder`, redeemed by `newcomer`, over their sockets: the tests of the two commands run these."""
    token = founder.ask("peer.invite", ring=ring)["token"]
    granted = Decimal(newcomer.ask("peer.join", token=token, leave=False)["granted"])
    newcomer.until("knows the founder", lambda: connected(newcomer))
    newcomer.until("has its grant", lambda: Decimal(newcomer.ask("wallet.balance")["available"]) >= granted)


def at_fixed_ports(nodes: Nodes, *names: str) -> list[Node]:
    """A mesh whose nodes find each other also when all of them were down."""
    made = [nodes(name, CLAWNET_NODE_LISTEN_ADDRS=f"/ip4/127.0.0.1/tcp/{free_port()}").start() for name in names]
    for node in made[1:]:
        join(made[0], node)
    return made


def connected(node: Node) -> set[str]:
    """The names of the peers that are connected."""
    return {peer["name"] for peer in node.ask("peer.list")["items"] if peer["state"] == "connected"}


def until(what: str, found: Callable[[], Any], patience_s: float = PATIENCE_S) -> Any:
    """Asks again and again until the answer is true, and returns it; fails after `patience_s`.

    What takes long is asked less often: the asking is work too, for who asks and for the node.
    """
    began = time.monotonic()
    while True:
        value = found()
        if value:
            return value
        passed = time.monotonic() - began
        assert passed < patience_s, f"not within {patience_s:g} s: {what}"
        time.sleep(min(max(passed / 20, 0.01), 0.1))


def alive(pid: int) -> bool:
    """Whether a process runs; one that is over and not yet collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def processes_with(marker: str) -> list[int]:
    """The processes of this machine that carry `marker` in their arguments, by pid; a sandbox hides nothing from us."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if marker.encode() in (entry / "cmdline").read_bytes() and alive(int(entry.name)):
                    found.append(int(entry.name))
    return found


class Gate:
    """What a task waits at, sandboxed or not, until the test lets it on: `script` goes before its own."""

    def __init__(self) -> None:
        self._mark = f"gate-{os.urandom(6).hex()}"
        self.script = f": {self._mark}; touch here; until [ -e go ]; do sleep 0.05; done; "

    def open(self, count: int = 1) -> None:
        """Waits until so many stand there, and lets them on."""
        until("tasks wait at the gate", lambda: len(self._places()) >= count)
        for place in self._places():
            (place / "go").touch()

    def _places(self) -> list[Path]:
        """Their working directories, each once, though several processes of a task are in one."""
        places: dict[int, Path] = {}
        for pid in processes_with(self._mark):
            place = Path(f"/proc/{pid}/cwd")
            with contextlib.suppress(OSError):
                places[(place / "here").stat().st_ino] = place
        return list(places.values())


def free_port() -> int:
    """A port nobody has at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def read_until(stream: Any, wanted: bytes) -> bytes:
    """Reads a pipe until it brought `wanted`; the test's own time limit bounds it."""
    data = b""
    while wanted not in data:
        piece = os.read(stream.fileno(), 65536)
        assert piece, f"it ended with {data!r} and without {wanted!r}"
        data += piece
    return data


def checked(value: Any, form: Any = Task) -> Any:
    """The same value, after it was held against the documented form: nothing missing, nothing untold."""
    told = msgspec.to_builtins(msgspec.convert(value, type=form, strict=True))
    if form is not ErrorAnswer:
        assert not (extra := list(_beyond(value, told, ""))), extra
    return value


def _beyond(value: Any, told: Any, place: str) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            if key not in told:
                yield f"{place}.{key}"
            else:
                yield from _beyond(item, told[key], f"{place}.{key}")
    elif isinstance(value, list):
        for number, (item, known) in enumerate(zip(value, told, strict=True)):
            yield from _beyond(item, known, f"{place}[{number}]")


def answers(nodes: Sequence[Node]) -> bool:
    """Whether every daemon still answers; ClawnetError means that one does not."""
    try:
        return all(node.ask("status")["pid"] == node.pid for node in nodes)
    except ClawnetError:
        return False
