"""One simulated machine: its disk, its executor, and a production runtime and node that it may kill at any point."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from random import Random
from typing import TYPE_CHECKING, Any

from clawnet.config import Config
from clawnet.errors import StorageFullError
from clawnet.execution import bundle
from clawnet.identity.keys import KeyPair
from clawnet.identity.membership import LocalMembership
from clawnet.ledger.terms import LedgerTerms
from clawnet.node.context import Ports
from clawnet.node.kernel import Node
from clawnet.node.members import MeshFacts
from clawnet.runtime import Runtime
from clawnet.storage.memory import MemoryStore
from clawnet.wire import events as e
from clawnet.wire.blobid import blob_id
from clawnet.wire.verdict import CONTRACT, encode_report, failure
from tests.node.meshruns import Entropy
from tests.node.outcomes import judge
from tests.world.clock import Killed, LawBroken, Loop
from tests.world.story import fields_shown, shown

if TYPE_CHECKING:
    from tests.world.world import World

CAPABILITIES = ("compute", "op:primes", "op:sha256", "op:sort", "op:wordcount", "shell-execution")


class Disk(MemoryStore):
    """The memory store; a commit is a place to die at, before and after it counts."""

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self._machine = machine

    def commit(self, rows: Sequence[e.Put | e.Delete], durable: bool = False) -> None:
        """One transaction."""
        if not rows:
            return
        machine = self._machine
        machine.point("before a commit")
        try:
            super().commit(rows, durable)
        except StorageFullError:
            machine.world.seen["disk full"] += 1
            raise
        machine.sent = 0
        if durable:
            machine.synced_us = machine.world.clock.now_us
        machine.world.committed(machine, rows, durable)
        machine.point("after a commit")


class Blobs:
    """Bulk data on the disk, by hash; who may fetch what is in memory, and told again at every start."""

    def __init__(self) -> None:
        self.data: dict[bytes, bytes] = {}
        self.grants: set[tuple[bytes, str, bytes]] = set()

    def keep(self, data: bytes) -> bytes:
        """Stores bytes whole."""
        identifier = blob_id(data)
        self.data[identifier] = data
        return identifier

    def fetched(self, peer: str, task_id: bytes, blob: bytes) -> bytes | None:
        """What this peer gets for that name."""
        return self.data.get(blob) if (task_id, peer, blob) in self.grants else None

    def grant(self, task_id: bytes, peer: str, blob: bytes) -> None:
        """The port's."""
        self.grants.add((task_id, peer, blob))

    def revoke(self, task_id: bytes) -> None:
        """The port's; what nobody else may fetch is deleted."""
        mine = {grant for grant in self.grants if grant[0] == task_id}
        self.grants -= mine
        left = {grant[2] for grant in self.grants}
        for _, _, blob in mine:
            if blob not in left:
                self.data.pop(blob, None)

    def succeeded(self, old: str, new: str) -> None:
        """The port's: nobody changes its key in this world."""

    def came_from(self, blob: bytes, size: int, source: str) -> bool:
        """The port's; whoever names a blob here has it."""
        return blob in self.data

    def size(self, blob: bytes) -> int:
        """The port's."""
        return len(self.data[blob])

    def read_at(self, blob: bytes, offset: int, length: int) -> bytes:
        """The port's."""
        return self.data[blob][offset : offset + length]


class Executor:
    """Runs that take seeded times and end in seeded ways, with real bundles and real seals."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.runs: dict[bytes, int] = {}
        self._count = 0

    def run(self, job: bytes, spec: Any) -> None:
        """The port's."""
        machine = self._machine
        machine.point("before a run")
        world = machine.world
        world.started(machine, spec)
        self._count += 1
        self.runs[job] = self._count
        took_us = world.lasts_us(machine, spec)
        world.clock.tell(machine.name, f"runs {job.hex()[:8]} {spec.kind} for {took_us / 1e6:.3f} s")
        if spec.ring != "stranger" and machine.luck.random() < 0.2:
            text = e.TaskOutput(job, 1, 0, b"working\n")
            world.clock.after(took_us // 2, self._written, machine.starts, self._count, text)
        if took_us > spec.wall_s * 1e6:
            world.clock.after(round(spec.wall_s * 1e6), self._ends, job, spec, self._count, "wall_limit", took_us)
            return
        ended = "exit" if machine.luck.random() < world.success else machine.luck.choice(("failed", "memory_limit"))
        world.clock.after(took_us, self._ends, job, spec, self._count, ended, took_us)

    def _written(self, starts: int, number: int, output: e.TaskOutput) -> None:
        if self.runs.get(output.job) == number:
            self._machine.deliver(starts, output)

    def stop(self, job: bytes) -> None:
        """The port's: the process group is killed, its end is heard a moment later."""
        machine = self._machine
        machine.point("before a stop")
        number = self.runs.get(job)
        if number is not None:
            took_us = machine.luck.randrange(1_000, 300_000)
            machine.world.clock.after(took_us, self._ends, job, None, number, "cancelled", took_us)

    def _ends(self, job: bytes, spec: Any, number: int, ended: str, took_us: int) -> None:
        if self.runs.get(job) != number:
            return
        del self.runs[job]
        machine = self._machine
        sealed, plain, report = b"", b"", b""
        if ended == "exit":
            text = b"done " + job.hex().encode()
            usage = bundle.Usage(took_us / 1e6, took_us / 2e6, 4096)
            exit_code = 0 if machine.luck.random() < 0.9 else 3
            verdict = judge(spec.acceptance, exit_code, text)
            if failure(verdict) is not None:
                ended, report = CONTRACT, encode_report(verdict)
        if ended == "exit":
            plain = bundle.encode(bundle.Bundle(exit_code, None, text, b"", "", usage))
            sealed = plain if spec.seal_key is None else bundle.seal(plain, spec.seal_key, machine.entropy)
        inline, blob, size = sealed, blob_id(sealed) if sealed else b"", len(sealed)
        if sealed and machine.luck.random() < 0.15:
            machine.blobs.keep(sealed)
            inline = b""
        digest = hashlib.sha256(plain).digest()
        machine.world.clock.tell(machine.name, f"run {job.hex()[:8]} ended: {ended}")
        code = 0 if ended == "exit" else None
        exited = e.TaskExited(
            job, ended, "" if ended == "exit" else ended, code, None, inline, blob if not inline else b"", size,
            digest, len(plain), took_us / 1e6, took_us / 2e6, 4096, report=report,
        )  # fmt: skip
        # A later run of the job may have waited for this end and begin here, which is a place to die.
        machine.guard(machine.runtime.feed, (exited,))

    def read_output(self, effect: e.ReadOutput) -> None:
        """The port's: all that a run ever writes before its end is one line."""
        data = b"working\n"[effect.offset :][: effect.length] if effect.job in self.runs else b""
        self._machine.runtime.feed(e.OutputKept(effect.job, effect.stream, effect.offset, data))

    def stop_judging(self, request: bytes) -> None:
        """The port's: here a result is judged in no time."""

    def pack(
        self,
        request: bytes,
        paths: tuple[tuple[str, str], ...],
        schemas: tuple[tuple[str, bytes], ...] = (),
        gitignore: bool = False,
    ) -> None:
        """The port's: a file's content is its path, some times over."""
        machine = self._machine
        items = []
        for name, path in paths:
            data = path.encode() * 50
            blob = machine.blobs.keep(data)
            items.append({"name": name, "kind": "file", "blob": blob, "bytes": len(data), "mode": 0o644})
        machine.world.clock.after(2_000, machine.deliver, machine.starts, e.InputsReady(request, tuple(items)))

    def open_result(self, effect: e.Open) -> None:
        """The port's."""
        machine = self._machine
        sealed = effect.inline or machine.blobs.data.get(effect.blob, b"")
        try:
            plain = sealed if effect.key is None else bundle.unseal(sealed, effect.key)
            opened = bundle.decode(plain)
        except Exception as error:  # noqa: BLE001 - what the real adapter turns into a reason
            machine.runtime.feed(e.Opened(effect.request, str(error) or type(error).__name__))
            return
        summary = bundle.Summary(
            opened.exit_code, opened.signal, opened.text, opened.usage, [], hashlib.sha256(plain).digest(),
            len(opened.stdout), len(opened.stderr), opened.stdout, opened.stderr,
        )  # fmt: skip
        verdict = judge(effect.acceptance, opened.exit_code, opened.stdout)
        machine.world.clock.after(500, machine.deliver, machine.starts, e.Opened(effect.request, "", summary, verdict))


class Watched:
    """The production node; what it is told goes into the story first."""

    def __init__(self, node: Node, machine: Machine) -> None:
        self.node = node
        self._machine = machine

    def step(self, now_ms: int, stimulus: e.Stimulus) -> list[e.Effect]:
        """Node.step."""
        machine = self._machine
        machine.steps_total += 1
        world = machine.world
        world.clock.tell(machine.name, shown(stimulus, world.names))
        return self.node.step(now_ms, stimulus)

    def end_turn(self, now_ms: int) -> list[e.Effect]:
        """Node.end_turn."""
        return self.node.end_turn(now_ms)


class Machine:
    """Everything of one member of the mesh. `up` while its process runs; `starts` counts its processes."""

    def __init__(
        self, world: World, name: str, key: KeyPair, owner: KeyPair | None, local: LocalMembership, config: Config
    ) -> None:
        self.world = world
        self.name = name
        self.key = key
        self.peer = key.peer_id
        self.owner = owner
        self.local = local
        self.config = config
        self.luck = Random(f"{world.seed} {name} luck")
        self.entropy = Entropy(f"{world.seed} {name}")
        self.disk = Disk(self)
        self.blobs = Blobs()
        self.escrow_seed = hashlib.sha256(f"{world.seed} {name} escrow".encode()).digest()
        self.skew_ms = 0
        self.clock_stop = True
        self.pace_us = 200
        self.up = False
        self.draining = False
        self.back_us = 0
        self.since_us = 0
        self.starts = 0
        self.steps_total = 0
        self.dies_at = -1
        self.dies_how = "kill"
        self.dies_with: tuple[Machine, ...] = ()
        """Others that stop at the same moment."""
        self.survived: list[str] = []
        """Places to die at that it has passed since `dies_at` was set, by their names."""
        self.sent = 0
        """Batches that have left since the last commit."""
        self.synced_us = 0
        self.forgotten: list[tuple[int, int]] = []
        """From when to when the disk forgot by a power cut what had been committed: nothing was synced in between."""
        self.ups: dict[str, e.PeerUp] = {}
        self.node: Node
        self.runtime: Runtime
        self.loop: Loop
        self.executor: Executor

    def now_ms(self) -> int:
        """This machine's own clock."""
        return self.world.clock.now_us // 1000 + self.skew_ms

    def deliver(self, starts: int, stimulus: e.Stimulus) -> None:
        """A late answer, of no use to a later process."""
        if self.up and self.starts == starts:
            self.runtime.feed(stimulus)

    # --- life and death

    def boot(self) -> None:
        """The daemon starts on what the disk holds."""
        self.starts += 1
        self.up, self.draining = True, False
        self.ups = {}
        self.since_us = self.world.clock.now_us
        self.blobs.grants.clear()
        self.world.clock.tell(self.name, f"starts ({self.starts})")
        self.loop = Loop(self.world.clock, self.guard, self.pace_us)
        self.executor = Executor(self)
        self.guard(self._start, ())
        if self.up:
            self.world.network.machine_up(self)

    def _start(self) -> None:
        asyncio._set_running_loop(self.loop)  # type: ignore[arg-type]
        try:
            self.runtime = Runtime(
                self.peer,
                clock=self.now_ms,
                store=self.disk,
                blobs=self.blobs,
                executor=self.executor,
                ipc=self,
                observer=self,
                rebuild=self._rebuild,
                adopt=lambda effect: None,
                drained=self._drained,
                fail=self._failed,
            )
        finally:
            asyncio._set_running_loop(None)
        self.runtime.switch = self
        node, effects = self._build()
        self.runtime.node = Watched(node, self)
        self.runtime.perform(effects)
        self.runtime.feed(e.Listening((f"/dns/{self.name}.example/tcp/4002/p2p/{self.peer}",)))
        self.runtime.feed(e.CapacityChanged(CAPABILITIES, ("own", "member"), self.world.slots, 2**32, 0))

    def ignore_clock(self) -> None:
        """The stop of LEDGER.md section 8 for clocks over 60 s off is switched off on this machine."""
        self.clock_stop = False
        self.node.rooms.members.clock_off = lambda: False  # type: ignore[method-assign]

    def make_node(self, store: MemoryStore, entropy: Callable[[int], bytes]) -> tuple[Node, list[e.Effect]]:
        """A node from what a disk holds, as the daemon makes one."""
        charter, mesh, proven = self.local.verified(self.key.public)
        facts = MeshFacts(
            charter, self.local.charter, mesh, proven.owner, list(self.local.certificates), bytes(32),
            self.local.inviter, self.local.founded,
        )  # fmt: skip
        issuers = self.world.issuers or frozenset(charter.issuers)
        terms = LedgerTerms(issuers=issuers, grant_max_ucr=charter.grant_max_ucr)
        node = Node(
            self.config,
            Ports(entropy, self.key.sign, lambda peer: self.world.network.rtt_ms(self.peer, peer), self.owner),
            me=self.peer,
            account=self.key.public,
            facts=facts,
            terms=terms,
            escrow_seed=self.escrow_seed,
            os_family="linux",
            version="world",
        )
        if not self.clock_stop:
            node.rooms.members.clock_off = lambda: False  # type: ignore[method-assign]

        def read(name: str, args: tuple[Any, ...]) -> list[tuple[Any, ...]]:
            return list(store.load_all(name[6:])) if name.startswith("table:") else store.query(name, args)

        return node, node.load(self.now_ms(), read)

    def _build(self) -> tuple[Node, list[e.Effect]]:
        self.node, effects = self.make_node(self.disk, self.entropy)
        return self.node, effects

    def _rebuild(self) -> tuple[Watched, list[e.Effect]]:
        previous = self.node
        self.world.clock.tell(self.name, "is made again from its disk")
        node, effects = self._build()
        node.rooms.cards.take_over(previous.rooms.cards)
        for up in self.ups.values():
            self.runtime.feed(up)
        return Watched(node, self), effects

    def guard(self, work: Callable[..., None], args: tuple[Any, ...]) -> None:
        """Does it, or dies of it."""
        try:
            work(*args)
        except Killed:
            self.down(self.dies_how)
            for other in self.dies_with:
                other.down(self.dies_how)

    def point(self, what: str) -> None:
        """A place where the machine may die: `dies_at` counts them down."""
        if self.dies_at > 0:
            self.dies_at -= 1
            self.survived.append(what)
        elif self.dies_at == 0:
            self.dies_at = -1
            self.world.seen[f"died {what}"] += 1
            self.world.clock.tell(self.name, f"dies {what}")
            raise Killed

    def down(self, how: str) -> None:
        """The process is gone: `kill`, `power` (what was not synced is lost too), or `drain`."""
        if not self.up:
            return
        self.world.clock.tell(self.name, f"is down ({how})")
        self.up = False
        self.dies_at = -1
        self.loop.alive = False
        self.executor.runs.clear()
        self.ups = {}
        if how == "power":
            self.disk.cut_power()
            self.world.lost_power(self)
            self.forgotten.append((self.synced_us, self.world.clock.now_us))
            self.world.seen["power cut"] += 1
        noticed_us = self.luck.randrange(1_000_000, 15_000_000) if how == "power" else 0
        self.world.network.machine_down(self, noticed_us=noticed_us)
        self.world.client.machine_down(self)
        away_us = self.luck.randrange(20_000, 20_000_000)
        if how != "drain" and self.luck.random() < 0.12:
            away_us = self.luck.randrange(60_000_000, self.world.away_us_max)
            self.world.seen["away for minutes"] += 1
        self.back_us = self.world.clock.now_us + away_us
        self.world.clock.after(away_us, self.world.restart, self)

    def may_have_lost(self, at_us: int) -> bool:
        """Whether a power cut took what was committed then without a sync, which no promise covers."""
        return any(synced_us < at_us <= cut_us for synced_us, cut_us in self.forgotten)

    def drain(self) -> None:
        """SIGTERM."""
        if self.up and not self.draining:
            self.draining = True
            self.world.seen["drained"] += 1
            self.runtime.feed(e.Drain())

    def _drained(self) -> None:
        self.world.clock.after(0, self.down, "drain")

    def _failed(self, reason: str) -> None:
        raise LawBroken(f"{self.name}: the runtime gave up: {reason}")

    # --- the ports: switch, ipc, observer

    def send(self, peer: str, items: list[Any]) -> bool:
        """Switch: one batch."""
        self.point("between sends" if self.sent else "after a commit, before a send")
        self.sent += 1
        return self.world.network.send(self, peer, items)

    def dial(self, call: int, peer: str, addresses: Sequence[str], keep: bool = False) -> None:
        """Switch: the world keeps the links; who is dialled for a task is connected besides."""
        self.world.network.dial(self, call, self.world.by_peer[peer])

    def hangup(self, peer: str, reason: str) -> None:
        """Switch: closes a link."""
        self.world.network.hangup(self, peer, reason)

    def join(self, call: int, inviter: str, addresses: Sequence[str], ask: Any) -> None:
        """Switch: nobody joins in this world."""

    def join_reply(self, call: int, answer: Any) -> None:
        """Switch: nobody joins in this world."""

    def fetch(
        self,
        request: bytes,
        peer: str,
        task_id: bytes,
        blobs: Sequence[tuple[bytes, int]],
        inline_max: int = 0,
        source: str = "",
    ) -> None:
        """Switch: bulk data."""
        self.world.network.fetch(self, request, peer, task_id, blobs, inline_max)

    def reply(self, call: int, value: Any, error: dict[str, Any] | None = None) -> None:
        """Ipc: an answer to a command."""
        self.point("before a reply")
        self.world.client.replied(self, call, value, error)

    def notify(self, call: int, method: str, value: Any) -> None:
        """Ipc: a part of an answer."""

    def log(self, level: str, event: str, fields: dict[str, Any]) -> None:
        """Observer: what production only logs as a defect of ours fails here."""
        if level in ("error", "security"):
            self.world.clock.tell(self.name, f"logs {event} {fields_shown(fields)}")
        if event in ("node.defect", "node.cannot_start", "runtime.effect_failed", "result.missing"):
            raise LawBroken(f"{self.name}: {event}: {fields.get('traceback') or fields}")
        self.world.logged(self, level, event, fields)

    def count(self, name: str, label: str, by: int) -> None:
        """Observer: counters."""
