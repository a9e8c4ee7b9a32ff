"""The crash soak: five real daemons in one mesh under load, killed with SIGKILL and restarted, then the laws.

Shared by tests/cli/test_crash_soak.py and scripts/bench/crash.py. The load runs in processes of its own
(tests/cli/soak_load.py) that are killed too. Once it stops, all that is owed must come to its end, and an auditor from
outside (tests/cli/auditor.py) holds the databases against the laws.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from msgspec import Struct, field

from clawnet import launch
from clawnet.api import Client
from clawnet.errors import ClawnetError
from clawnet.execution.places import run_as
from clawnet.execution.process import tree
from clawnet.execution.workdirs import SPARE_PREFIX, WorkDirs
from tests.cli.auditor import Accepted, Disk, Verdict, judge, story
from tests.cli.harness import TRACEBACK, Node, Nodes, alive, connected, free_port, join, processes_with, until

NAMES = ("alice", "bob", "carol", "alice-vps", "bob-vps")
OWNERS = {"alice-vps": "alice", "bob-vps": "bob"}
SETTINGS = {
    "CLAWNET_DAEMON_DRAIN_TIMEOUT": "2s",
    "CLAWNET_EXECUTION_SHELL_OWN": "host",
    "CLAWNET_MARKET_RATES_TASK": "0.01",
    "CLAWNET_MARKET_RATES_CPU_SECOND": "0.01",
    "CLAWNET_MARKET_MIN_BID_INCREMENT": "0.001",
}
CLIENTS = 3
EXITS = (69, 75, 76, 124)
"""What a command may exit with whose daemon, or executor, is killed; its task has an end all the same."""
ORPHAN_S = 15.0
REST_S = 180.0


class Figures(Struct):
    """What a soak came to."""

    seed: int
    seconds: float = 0.0
    kills: int = 0
    restarts: int = 0
    clients_killed: int = 0
    tasks_accepted: int = 0
    tasks_settled: int = 0
    tasks_lost: int = 0
    states: dict[str, int] = field(default_factory=dict)
    credits_off: str = "0"
    duplicates_executed: int = 0
    orphans: int = 0
    entries: int = 0
    recoveries: int = 0
    answer_p50_s: float = 0.0
    answer_longest_s: float = 0.0
    recovery_p50_s: float = 0.0
    recovery_longest_s: float = 0.0
    rest_s: float = 0.0
    refused: dict[str, int] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)


class Soak:
    """One mesh, one storm. `say` takes a line now and then for who watches."""

    def __init__(
        self,
        *,
        seconds: float = 60.0,
        nodes: int = 5,
        kill_every_s: float = 1.0,
        seed: int = 1,
        rate: float = 6.0,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.figures = Figures(seed)
        self._seconds = seconds
        self._kill_every_s = kill_every_s
        self._rng = random.Random(seed)
        self._rate = rate
        self._nap = f"60.{os.getpid()}{seed}"
        """So long "endless" tasks sleep; it names their processes."""
        self._say = say
        self._names = [*NAMES, *(f"member-{number}" for number in range(5, nodes))][:nodes]
        self._made = Nodes()
        self._nodes: list[Node] = []
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._life: Counter[str] = Counter()
        self._clients: list[subprocess.Popen[bytes]] = []
        self._client_count = 0
        self._lock = threading.Lock()
        self._watchers: list[threading.Thread] = []
        self._answers: list[float] = []
        self._recoveries: list[float] = []
        self._over = threading.Event()

    @contextlib.contextmanager
    def _mesh(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._over.set()
            for client in self._clients:
                client.kill()
                client.wait()
            for watcher in self._watchers:
                watcher.join()
            for node in self._nodes:
                node.may_log_tracebacks = True  # they are listed among what is broken
            self._made.close()
            for daemon in self._daemons.values():
                daemon.wait()

    def run(self) -> Figures:
        """The whole of it; what is broken stands in the figures."""
        with self._mesh():
            self._found()
            self._load()
            self._storm()
            self._calm()
            self._judge()
            if self.figures.broken and os.environ.get("SOAK_KEEP"):
                shutil.copytree(self._made.directory, os.environ["SOAK_KEEP"], ignore=_no_sockets, dirs_exist_ok=True)
        return self.figures

    # --- the mesh

    def _found(self) -> None:
        for name in self._names:
            address = f"/ip4/127.0.0.1/tcp/{free_port()}"
            node = self._made(name, CLAWNET_NODE_LISTEN_ADDRS=address, **SETTINGS)
            node.start()
            self._nodes.append(node)
        founder = self._nodes[0]
        of_name = {node.name: node for node in self._nodes}
        for node in self._nodes[1:]:
            owner = of_name.get(OWNERS.get(node.name, ""))
            if owner is None:
                join(founder, node)
                node.until("has its grant", partial(_is_rich, node))
                continue
            token = owner("peer", "invite", "--ring", "own", "--credits", "100").line
            joined = node("peer", "join", "-", stdin=token.encode() + b"\n")
            assert joined.code == 0, joined.err
        for node in self._nodes:
            node.until("sees all", partial(_sees, node, len(self._nodes) - 1))
        self._say(f"{len(self._nodes)} daemons in one mesh")

    def _load(self) -> None:
        directory = self._made.directory
        marks = directory / "marks"
        for path in (marks, directory / "inputs", directory / "journals"):
            path.mkdir()
        directory.chmod(0o755)
        marks.chmod(0o777)  # of a daemon that is root, tasks run as somebody else
        plan = {
            "homes": [str(node.home.dir) for node in self._nodes],
            "environs": [node.environ for node in self._nodes],
            "marks": str(marks),
            "inputs": str(directory / "inputs"),
            "journals": str(directory / "journals"),
            "nap": self._nap,
            "rate": self._rate,
            "commands": 0.2,
        }
        (directory / "plan.json").write_text(json.dumps(plan))
        for _ in range(CLIENTS):
            self._start_client()

    def _start_client(self) -> None:
        self._client_count += 1
        words = (
            "-m",
            "tests.cli.soak_load",
            self._made.directory / "plan.json",
            str(1_000 * self.figures.seed + self._client_count),
        )
        root = Path(__file__).parents[2]
        out = (self._made.directory / f"client-{self._client_count}.err").open("wb")
        with out:
            client = subprocess.Popen([sys.executable, *words], cwd=root, stderr=out, stdin=subprocess.DEVNULL)
        self._clients.append(client)

    # --- the storm

    def _storm(self) -> None:
        began = time.monotonic()
        next_client_s = 5.0
        while (passed := time.monotonic() - began) < self._seconds:
            self._over.wait(self._kill_every_s)
            count = 2 if self._rng.random() < 0.1 else 1
            for node in self._rng.sample(self._nodes, count):
                self._kill(node)
            if passed >= next_client_s:
                next_client_s = passed + self._rng.uniform(4, 10)
                victim = self._clients.pop(self._rng.randrange(len(self._clients)))
                victim.kill()
                victim.wait()
                self.figures.clients_killed += 1
                self._start_client()
        self.figures.seconds = round(time.monotonic() - began, 1)
        self._say(f"{self.figures.kills} kills in {self.figures.seconds} s")

    def _pids(self, node: Node) -> set[int]:
        """Whoever is the daemon of this node now, and whoever is about to be."""
        found = {node.pid} - {0}
        daemon = self._daemons.get(node.name)
        if daemon is not None and daemon.poll() is None:
            found.add(daemon.pid)
        return found

    def _kill(self, node: Node) -> None:
        with self._lock:
            self._life[node.name] += 1
        pids = self._pids(node)
        family = {(pid, _born(pid)) for root in pids for pid in tree(root, 1_000)}
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                self.figures.kills += 1
        for pid in pids:
            daemon = self._daemons.get(node.name)
            if daemon is not None and daemon.pid == pid:
                daemon.wait()
            until(f"{node.name} dies", partial(_is_dead, pid))
        self._watch(self._no_orphans, node, family)
        self._over.wait(self._rng.choice((0.0, 0.0, 0.2, 0.5)))
        self._start(node)

    def _start(self, node: Node) -> None:
        """As a supervisor would; a command of the load may have been quicker."""
        old = self._daemons.get(node.name)
        if old is not None and old.poll() is None:
            return
        daemon = launch.spawn(node.home, node.environ, [sys.executable, "-P", "-m", "clawnet.commands"])
        self._daemons[node.name] = daemon
        self.figures.restarts += 1
        self._watch(self._recovers, node, self._life[node.name], time.monotonic())

    def _watch(self, work: Callable[..., None], *args: Any) -> None:
        thread = threading.Thread(target=work, args=args)
        thread.start()
        self._watchers.append(thread)

    def _no_orphans(self, node: Node, family: set[tuple[int, str]]) -> None:
        """Nothing that a killed daemon had started outlives it."""
        deadline = time.monotonic() + ORPHAN_S
        left = family
        while left and time.monotonic() < deadline:
            left = {(pid, born) for pid, born in left if alive(pid) and _born(pid) == born}
            time.sleep(0.05)
        for pid, _ in left:
            self.figures.orphans += 1
            self.figures.broken.append(f"{node.name} left a process behind: {_words_of(pid)}")

    def _recovers(self, node: Node, life: int, since_s: float) -> None:
        """How long until the restarted node takes a task, and until a task given to it then is settled."""

        def gone() -> bool:
            return self._over.is_set() or self._life[node.name] != life

        spec = {"type": "compute", "op": "primes", "op_args": {"limit": 5}, "ring": "member", "prefer": "market"}
        while not gone():
            try:
                with Client(node.home, autostart=False, timeout_s=30) as client:
                    task = client.call("task.submit", {"spec": spec})["task_id"]
                    answered_s = time.monotonic() - since_s
                    with self._lock:
                        self._answers.append(answered_s)
                    stream = client.stream("task.follow", {"task": task, "output": False}, timeout_s=60)
                    for _ in stream:
                        continue
                    if stream.result["state"] == "settled" and not gone():
                        with self._lock:
                            self._recoveries.append(time.monotonic() - since_s)
                    return
            except ClawnetError as error:
                if error.code not in ("unreachable", "timed_out"):
                    with self._lock:
                        self.figures.refused[error.code] = self.figures.refused.get(error.code, 0) + 1
                    return
                self._over.wait(0.02)

    # --- the calm after it

    def _calm(self) -> None:
        for client in self._clients:
            client.terminate()
        for client in self._clients:
            client.wait()
        began = time.monotonic()
        for node in self._nodes:
            if not self._pids(node):
                self._start(node)
        for node in self._nodes:
            node.until("answers", partial(getattr, node, "pid"))
        for node in self._nodes:
            node.until("sees all", partial(_sees, node, len(self._nodes) - 1))
        self._say("the load has stopped; all daemons are up and connected")
        with contextlib.suppress(AssertionError):
            until("the mesh is at rest", self._at_rest, REST_S)
        self.figures.rest_s = round(time.monotonic() - began, 1)
        for watcher in self._watchers:
            watcher.join()
        with contextlib.suppress(AssertionError):
            until("nothing runs", lambda: not processes_with(self._nap), ORPHAN_S)
        for pid in processes_with(self._nap):
            self.figures.orphans += 1
            self.figures.broken.append(f"a process is left: {_words_of(pid)}")

    def _at_rest(self) -> bool:
        for node in self._nodes:
            activity = node.ask("node.status")["activity"]
            if any(activity[f"{what}_open"] for what in ("tasks", "jobs", "obligations")):
                return False
        return True

    # --- the laws

    def _judge(self) -> None:
        figures = self.figures
        accepted = self._journals()
        disks = [Disk.read(node.name, node.home) for node in self._nodes]
        homes = [node.home for node in self._nodes]
        verdict: Verdict = judge(disks, homes, accepted, self._made.directory / "marks")
        figures.broken += verdict.broken
        figures.tasks_accepted, figures.tasks_settled = len(accepted), verdict.settled
        figures.tasks_lost, figures.states = verdict.lost, verdict.states
        figures.credits_off, figures.duplicates_executed = verdict.credits_off, verdict.duplicates
        figures.entries = verdict.entries
        for text in [story(task) for disk in disks for task in disk.tasks.values() if task.state == "no_bids"]:
            self._say(f"without a bid: {text}")
        for times, name in ((self._answers, "answer"), (self._recoveries, "recovery")):
            if times:
                times.sort()
                setattr(figures, f"{name}_p50_s", round(times[len(times) // 2], 2))
                setattr(figures, f"{name}_longest_s", round(times[-1], 2))
        figures.recoveries = len(self._recoveries)
        for disk, node in zip(disks, self._nodes, strict=True):
            self._judge_node(node, disk, {wish.task: wish for wish in accepted if wish.disk == node.name})

    def _judge_node(self, node: Node, disk: Disk, accepted: dict[str, Accepted]) -> None:
        """What only the running daemon can tell: its audit, large output, what it left on the disk and in its log."""
        broken = self.figures.broken
        report = node.ask("wallet.audit")
        if not report["ok"]:
            broken.append(f"{node.name}: its own audit says {report}")
        for name in [name for name in ("log", "security_log") if TRACEBACK in getattr(node, name)]:
            broken.append(f"{node.name}: a traceback in its {name}: {_traceback(getattr(node, name))}")
        base = WorkDirs(node.home, run_as("nobody")).base
        kept = ("etc", SPARE_PREFIX)  # what all sandboxes share, and the one that waits for a run
        left = [path.name for path in base.iterdir() if not path.name.startswith(kept)]
        if left:
            broken.append(f"{node.name}: working directories are left: {left}")
        with node.client() as client:
            for task_id, wish in accepted.items():
                task = disk.tasks.get(task_id)
                result = task.result if task is not None and task.state == "settled" else None
                if not result or result.get("exit_code") != 0 or result["stdout"] is not None:
                    continue
                if _whole_output(client, task_id, result["stdout_bytes"]) != wish.sha256:
                    broken.append(f"{node.name}: wrong output: {task and story(task)}")

    def _journals(self) -> list[Accepted]:
        wishes: dict[str, dict[str, Any]] = {}
        accepted: dict[tuple[str, str], Accepted] = {}
        for path in sorted((self._made.directory / "journals").iterdir()):
            for line in path.read_bytes().splitlines():
                said = json.loads(line)
                if "kind" in said:
                    wishes[said["key"]] = said
                elif "task" in said and "key" in said:
                    wish, name = wishes[said["key"]], self._nodes[said["node"]].name
                    fields = (wish["kind"], wish["retries"], wish["sha256"], wish["cancelled"])
                    accepted[name, said["task"]] = Accepted(said["key"], name, said["task"], *fields)
                elif "twice" in said:
                    pass  # both are among the accepted (auditor.py, _one_key_twice)
                elif "refused" in said:
                    self.figures.refused[said["refused"]] = self.figures.refused.get(said["refused"], 0) + 1
                    if said["refused"] not in ("busy",):
                        self.figures.broken.append(f"a submission was refused: {said}")
                elif "exit" in said:
                    name = f"command exit {said['exit']}"
                    self.figures.refused[name] = self.figures.refused.get(name, 0) + 1
                    if said["exit"] not in EXITS:
                        self.figures.broken.append(f"a command failed: {said}")
                else:
                    self.figures.broken.append(f"a client saw: {said}")
        for path in self._made.directory.glob("client-*.err"):
            if path.stat().st_size:
                self.figures.broken.append(f"{path.name}: {path.read_text()[-500:]}")
        return list(accepted.values())


def _is_rich(node: Node) -> bool:
    return float(node.ask("wallet.balance")["available"]) > 500


def _sees(node: Node, others: int) -> bool:
    return len(connected(node)) == others


def _is_dead(pid: int) -> bool:
    return not alive(pid)


def _whole_output(client: Client, task: str, size: int) -> str:
    digest, offset = hashlib.sha256(), 0
    while offset < size:
        part = client.call("task.read", {"task": task, "stream": "stdout", "offset": offset, "length": 2**20})
        data = base64.b64decode(part["data_b64"])
        if not data:
            break
        digest.update(data)
        offset += len(data)
    return digest.hexdigest()


def _born(pid: int) -> str:
    """When a process began: pids come again."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _words_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")[:300]
    except OSError:
        return f"pid {pid}"


def _traceback(log: str) -> str:
    at = log.index(TRACEBACK)
    return log[max(0, at - 300) : at + 3_000]


def _no_sockets(directory: str, names: list[str]) -> list[str]:
    return [name for name in names if name.endswith(".sock")]
