"""A whole mesh from one seed: machines, network, faults, people; the laws are asked at every commit and at the end."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from random import Random
from typing import Any

from clawnet import limits
from clawnet.config import Config
from clawnet.identity.certificates import certify_node, certify_owner, read_charter
from clawnet.identity.keys import KeyPair
from clawnet.identity.membership import LocalMembership, found_mesh
from clawnet.ledger.entries import Claim, EntryKind, Lock, Parsed, Refund, Release, Send, parse
from clawnet.ledger.seal import derive_key
from clawnet.market.records import decode_job
from clawnet.wire import events as e
from clawnet.wire.blobid import blob_id
from clawnet.wire.messages import Result
from tests.node.meshkit import START_MS
from tests.node.meshruns import Entropy
from tests.world.client import Client
from tests.world.clock import Clock, LawBroken
from tests.world.faults import SKEW_MS_MAX, Faults
from tests.world.garbage import SeldomCollected
from tests.world.liars import Liar
from tests.world.machine import Machine
from tests.world.network import Network
from tests.world.referee import Referee

ONE_ISSUER_MAX = 100
"""In larger meshes every node issues its own first credits: else each audits one chain of a grant for every node."""
LARGE = 200
"""Larger meshes have fewer links a node and one fault in five minutes a machine; nobody is away for twenty minutes."""
AHEAD_MS = limits.CLOCK_AHEAD_MS
TRANSIT_MS = limits.MARGIN_MS - 2 * SKEW_MS_MAX
"""Numbers of the ledger as they are: a planted bug changes the product's, not the law's."""
GRANTS_UCR = (200_000_000, 200_000_000, 4_000_000)


class Delivery:
    """A sealed result that an executor has made durable."""

    def __init__(
        self,
        executor: Machine,
        task_id: bytes,
        attempt: int,
        blob: bytes,
        amount_ucr: int,
        key: bytes,
        at_us: int,
        in_time: bool,
    ) -> None:
        self.executor = executor
        self.task_id = task_id
        self.attempt = attempt
        self.blob = blob
        self.amount_ucr = amount_ucr
        self.key = key
        self.at_us = at_us
        self.in_time = in_time


class World:
    """`faults` False: a calm mesh, for figures. `rest_s`: so long nobody asks for anything.
    `links_max`: so many links a node, that not all members may be connected. All follows from the seed
    and these figures."""

    def __init__(
        self,
        seed: int,
        nodes: int = 50,
        seconds: float = 60.0,
        *,
        faults: bool = True,
        tasks_per_minute: int = 1,
        lies: Sequence[str] = (),
        late: bool = False,
        power: bool = False,
        rest_s: float = 0.0,
        each_issues: bool = False,
        links_max: int = 0,
    ) -> None:
        self.seed = seed
        self.seconds = seconds
        self.clock = Clock(START_MS)
        rng = Random(f"{seed} world")
        self.rng = rng
        self.sends = nodes <= LARGE
        self.large = nodes > LARGE
        self.links_max = links_max or (16 if nodes > LARGE else 0)
        self.each_issues = each_issues
        self.away_us_max = 1_200_000_000 if nodes <= LARGE else 200_000_000
        self.run_s = rng.choice((0.05, 1.0, 8.0)) if faults else 0.2
        self.success = rng.choice((1.0, 0.95, 0.8)) if faults else 1.0
        self.slots = rng.choice((2, 3, 4))
        self.network = Network(self.clock, Random(f"{seed} network"))
        self.client = Client(self, Random(f"{seed} client"))
        self.machines: list[Machine] = []
        self.by_peer: dict[str, Machine] = {}
        self.names: dict[str, str] = {}
        self._names_of_accounts: dict[bytes, str] = {}
        self.referee = Referee(self._names_of_accounts)
        self.deliveries: dict[tuple[bytes, int, int], Delivery] = {}
        self.task_of_job: dict[bytes, tuple[str, bytes]] = {}
        self.starts_of: dict[tuple[str, bytes], int] = {}
        self.keys: dict[tuple[str, str], set[bytes]] = {}
        """Keys by executor and requester: none may travel in a result."""
        self.issuers: frozenset[bytes] = frozenset()
        self.liars: dict[str, Liar] = {}
        """By peer: members with a habit of liars.py, from m1 on."""
        self._lies = tuple(lies)
        self._taken: set[tuple[str, str, bytes]] = set()
        self._stamps: dict[bytes, tuple[int, bytes]] = {}
        """Time and author of every entry that any disk has taken, by its bytes."""
        self.peace_us = 0
        self.traffic_took_s = 0.0
        """What the time of traffic and faults took to simulate; the rest is settling and the last laws."""
        self.warnings: dict[str, int] = {}
        self.seen = self.network.seen
        """What trouble truly happened, each kind counted where it did."""
        with SeldomCollected():
            self._make(nodes, rng, 0.0 if not faults else rng.choice((0.0, 0.001, 0.01, 0.03)))
        self.faults = Faults(self, Random(f"{seed} faults"), enabled=faults and not late)
        self.faults.power = self.faults.power or power
        self.late = late
        if late:
            self.faults.pull_clocks_apart()
        if self.faults.skewed > limits.CLOCK_STOP_MS:
            self.seen[f"clocks minutes off, stop {'on' if self.faults.clock_stop else 'off'}"] += 1
        self.client.plan(self.machines, seconds, tasks_per_minute, rest_s)

    # --- making

    def _key(self, name: str) -> KeyPair:
        return KeyPair.from_seed(hashlib.sha256(f"{self.seed} {name}".encode()).digest())

    def _make(self, count: int, rng: Random, loss: float) -> None:
        now_ms = START_MS
        key, owner = self._key("m0"), self._key("m0 owner")
        local = found_mesh(owner, key.public, "m0", Entropy(f"{self.seed} charter"), now_ms)
        _, mesh = read_charter(local.charter)
        self._add("m0", key, owner, local)
        for number in range(1, count):
            name = f"m{number}"
            node = self._key(name)
            mine = self._key(name + " owner")
            chain = [
                certify_owner(owner, mesh, mine.public, may_invite=False, issued_ms=now_ms, inviter=key.peer_id),
                certify_node(mine, mesh, node.public, issued_ms=now_ms, inviter=key.peer_id),
            ]
            self._add(name, node, mine, LocalMembership(local.charter, tuple(chain), False, key.peer_id, "member"))
        if count > ONE_ISSUER_MAX or self.each_issues:
            self.issuers = frozenset(machine.key.public for machine in self.machines)
        for machine, habit in zip(self.machines[1:], self._lies, strict=False):
            self.liars[machine.peer] = Liar(self, machine, habit)
        self.referee.liars = frozenset(self.by_peer[peer].key.public for peer in self.liars)
        for machine in self.machines:
            machine.boot()
        founder = self.machines[0]
        for machine in self.machines[1:] if not self.issuers else ():
            founder.node.rooms.books.grant(machine.key.public, rng.choice(GRANTS_UCR), bytes(16))
        founder.runtime.perform(founder.node.end_turn(founder.now_ms()))
        degree = min(count - 1, 7 if count <= LARGE else 3)
        for number, machine in enumerate(self.machines):
            if number:
                self.network.join(machine, founder if count <= 60 else self.machines[number // 30], loss)
            others = rng.sample(self.machines, min(count, degree)) if count > 9 else self.machines
            for other in others:
                self.network.join(machine, other, loss)

    def _add(self, name: str, key: KeyPair, owner: KeyPair, local: LocalMembership) -> None:
        words = {"node.name": name, "market.self": "fallback" if self.rng.random() < 0.1 else "never"}
        if self.links_max:
            words["node.max_peers"] = str(self.links_max)
        machine = Machine(self, name, key, owner, local, Config.defaults(words))
        self.machines.append(machine)
        self.by_peer[machine.peer] = machine
        self.names[machine.peer] = name
        self._names_of_accounts[key.public] = name

    # --- running

    def run(self) -> None:
        """The busy time with its faults, then peace until nothing is owed, then the last laws. Raises LawBroken."""
        with SeldomCollected() as self._memory:
            self._run()

    def _run(self) -> None:
        from tests.world import laws

        start_us, began = self.clock.now_us, time.perf_counter()
        self.faults.plan(self.seconds)
        step_us = 5_000_000
        while self.clock.now_us < start_us + round(self.seconds * 1e6):
            self.clock.run(min(self.clock.now_us + step_us, start_us + round(self.seconds * 1e6)))
            laws.now(self)
            self._memory.tidy()
        self.traffic_took_s = time.perf_counter() - began
        self.peace()
        for _ in range(260):
            self.clock.run(self.clock.now_us + 20_000_000)
            laws.now(self)
            self._memory.tidy()
            if laws.quiet(self):
                break
        self.clock.run(self.clock.now_us + 130_000_000)
        laws.end(self)

    def peace(self) -> None:
        """The faults end: every machine comes back in its time, links heal, disks have room."""
        self.clock.tell("", "peace")
        self.peace_us = self.clock.now_us
        self.client.again = False
        self.network.calm = True
        self.faults.end()
        for edge in self.network.edges.values():
            edge.loss = 0.0
            edge.blocked_us = [min(until, self.clock.now_us) for until in edge.blocked_us]
        for machine in self.machines:
            machine.disk.bytes_max = None
            machine.dies_at = -1
            machine.pace_us = 200
            machine.loop.pace_us = 200

    def restart(self, machine: Machine) -> None:
        """The service manager."""
        if not machine.up:
            machine.boot()

    @property
    def honest(self) -> list[Machine]:
        """Those for whom the laws are."""
        return [machine for machine in self.machines if machine.peer not in self.liars]

    def name_of(self, account: bytes) -> str:
        """Whose account that is."""
        return self._names_of_accounts.get(account, "?")

    def deliveries_of(self, machine: Machine) -> list[tuple[bytes, int, int]]:
        """(payer, lock seq, line) of everything that this executor has delivered."""
        return [place for place, delivery in self.deliveries.items() if delivery.executor is machine]

    @property
    def steps_total(self) -> int:
        """Stimuli that nodes have taken."""
        return sum(machine.steps_total for machine in self.machines)

    # --- what the machines report

    def committed(self, machine: Machine, rows: Sequence[e.Put | e.Delete], durable: bool) -> None:
        """Rows are on a disk."""
        latest_ms = machine.now_ms() + AHEAD_MS
        releases: list[Parsed] = []
        for row in rows:
            if type(row) is not e.Put:
                continue
            if row.table == "entries":
                account, seq, entry_hash, raw = row.row
                entry = self.referee.saw(machine.key.public, account, seq, entry_hash, raw, durable)
                if machine.peer not in self.liars:
                    self._stamped(machine, raw, latest_ms)
                if entry is not None and entry.kind == EntryKind.RELEASE:
                    releases.append(entry)
                if entry is not None and entry.kind == EntryKind.REFUND:
                    self._refunded(machine, entry)
                if entry is not None and entry.kind == EntryKind.CLAIM:
                    self._claimed(machine, entry)
            elif row.table == "relayed":
                self._relayed(machine, row.row[0], row.row[1])
            elif row.table == "jobs":
                self._job(machine, row.row[1], row.row[-1])
        for entry in releases:
            self._released(machine, entry)

    def _relayed(self, machine: Machine, author: str, identifier: bytes) -> None:
        """A statement that somebody passed on is taken once, however often the process starts."""
        place = (machine.peer, author, identifier)
        if place in self._taken:
            raise LawBroken(f"{machine.name} takes a statement of {self.names.get(author)} a second time")
        self._taken.add(place)

    def lost_power(self, machine: Machine) -> None:
        """What was not synced is gone: statements that it took may come again."""
        held = machine.disk.tables["relayed"]
        self._taken = {place for place in self._taken if place[0] != machine.peer or place[1:] in held}

    def _job(self, machine: Machine, state: str, body: bytes) -> None:
        if state == "running":
            job = decode_job(body)
            self.task_of_job[job.job] = (job.peer, job.task_id)
        elif state == "delivered":
            job = decode_job(body)
            if job.lock_seq >= 0:
                seed, mesh = machine.escrow_seed, machine.node.rooms.books.mesh
                key = derive_key(seed, mesh, job.account, job.lock_hash, job.line, 1)
                held = self.deliveries.get((job.account, job.lock_seq, job.line))
                if held is not None and held.blob == job.blob:
                    return
                in_time = machine.now_ms() <= job.deliver_by_ms
                delivery = Delivery(
                    machine, job.task_id, job.attempt, job.blob, job.amount_ucr, key, self.clock.now_us, in_time
                )
                self.deliveries[job.account, job.lock_seq, job.line] = delivery
                self.keys.setdefault((machine.peer, job.peer), set()).add(key)

    def _released(self, machine: Machine, entry: Parsed) -> None:
        """A release stands only where the sealed result is durable (LEDGER.md section 6, step 6)."""
        assert isinstance(entry.body, Release)
        for item in entry.body.items:
            where = f"{machine.name} releases line {(item.lock_seq, item.line)}"
            delivery = self.deliveries.get((entry.account, item.lock_seq, item.line))
            if delivery is None:
                raise LawBroken(f"{where}, but nobody has delivered anything for it")
            if item.amount_ucr != delivery.amount_ucr:
                raise LawBroken(f"{where} for {item.amount_ucr}; the note asks {delivery.amount_ucr}")
            row = machine.disk.tables["results"].get((delivery.task_id, delivery.attempt))
            held = delivery.blob in machine.blobs.data or (row is not None and blob_id(row[-1]) == delivery.blob)
            if not held:
                raise LawBroken(f"{where}, and the sealed result is not on its disk")

    def _refunded(self, machine: Machine, entry: Parsed) -> None:
        """What was delivered in time by its executor's clock has had the time to arrive before it is taken back."""
        assert isinstance(entry.body, Refund)
        for item in entry.body.items:
            delivery = self.deliveries.get((entry.account, item.lock_seq, item.line))
            if delivery is None or item.proof is not None or not delivery.in_time:
                continue
            passed_ms = (self.clock.now_us - delivery.at_us) // 1000
            if passed_ms < TRANSIT_MS:
                raise LawBroken(f"{machine.name} refunds what was delivered in time {passed_ms} ms ago: no margin")

    def _stamped(self, machine: Machine, raw: bytes, latest_ms: int) -> None:
        """No book takes an entry from the future: it would let a payer refund a line before its time."""
        stamp = self._stamps.get(raw)
        if stamp is None:
            entry = parse(raw)
            stamp = self._stamps[raw] = (entry.time_ms, entry.account)
        if stamp[0] > latest_ms:
            ahead_s = (stamp[0] - machine.now_ms()) // 1000
            raise LawBroken(f"{machine.name} takes an entry of {self._names_of_accounts[stamp[1]]} {ahead_s} s ahead")

    def _claimed(self, machine: Machine, entry: Parsed) -> None:
        """A key is shown for a release that stands on this disk, at the note's amount (section 6, step 7)."""
        assert isinstance(entry.body, Claim)
        for item in entry.body.items:
            if item.key is None:
                continue
            row = machine.disk.tables["entries"].get((item.payer, item.seq))
            body = parse(row[-1]).body if row is not None else None
            where = f"{machine.name} shows a key to {self._names_of_accounts.get(item.payer)}"
            if row is None or row[2] != item.hash or not isinstance(body, Release):
                raise LawBroken(f"{where} for no release that its book holds")
            if item.payer in self.referee.liars and not _solvent(machine, item.payer, item.seq):
                raise LawBroken(f"{where} on a chain that falls below zero")
            line = body.items[item.index]
            delivery = self.deliveries.get((item.payer, line.lock_seq, line.line))
            if delivery is None or (delivery.amount_ucr, delivery.key) != (line.amount_ucr, item.key):
                raise LawBroken(f"{where} for a release of {line.amount_ucr}; the note asks {delivery}")

    def sending(self, machine: Machine, peer: str, message: Any, payload: bytes) -> None:
        """A message goes onto a link."""
        if machine.peer in self.liars:
            return
        if type(message) is Result and any(key in payload for key in self.keys.get((machine.peer, peer), ())):
            raise LawBroken(f"{machine.name} sends the key along with the sealed result")

    def started(self, machine: Machine, spec: Any) -> None:
        """An executor starts a run."""
        where = self.task_of_job.get(spec.job)
        if where is None:
            raise LawBroken(f"{machine.name} runs job {spec.job.hex()[:8]}, of which no disk knows")
        if machine.peer in self.liars:
            return  # what a liar does after it has refused is its own affair
        self.starts_of[where] = self.starts_of.get(where, 0) + 1
        if self.late:
            self.faults.cut_until_delivery(machine, spec.job)
        wish = self.client.wishes[spec.env["MARK"]]
        if wish.once and self.starts_of[where] > 1 and where[0] not in self.liars:
            raise LawBroken(f"task {wish.mark} ({where[1].hex()[:8]}), a shell task without retries, starts twice")

    def lasts_us(self, machine: Machine, spec: Any) -> int:
        """How long a run takes; in a late world all but the last seconds that its executor has for it."""
        if self.late:
            left_ms = machine.node.rooms.jobs.jobs[spec.job].deliver_by_ms - machine.now_ms()
            return max(1_000, (left_ms - machine.luck.randrange(1_000, 20_000)) * 1_000)
        return round(machine.luck.expovariate(1 / (self.run_s * 1e6))) + 1_000

    def logged(self, machine: Machine, level: str, event: str, fields: dict[str, Any]) -> None:
        """What a node thought worth a security line: honest nodes give no cause for one."""
        if machine.peer in self.liars:
            return
        if level == "security":
            self.warnings[event] = self.warnings.get(event, 0) + 1
            guilty = str(fields.get("account") or fields.get("peer") or "")
            if any(guilty in (peer, self.by_peer[peer].key.public.hex()[:16]) for peer in self.liars):
                return
            if event in ("chain.forked", "chain.invalid", "note.refused", "waiver.refused", "release.underpaid"):
                raise LawBroken(f"{machine.name} logs {event} of an honest peer: {fields}")


def _solvent(machine: Machine, payer: bytes, last: int) -> bool:
    """Whether a payer's prefix on this disk never spends what it has not: its own sums, incomes at their word."""
    left_ucr: dict[tuple[int, int], int] = {}
    available_ucr = 0
    for seq in range(last + 1):
        body = parse(machine.disk.tables["entries"][payer, seq][-1]).body
        if isinstance(body, Claim):
            available_ucr += sum(item.amount_ucr for item in body.items)
        elif isinstance(body, Send):
            available_ucr -= body.amount_ucr
        elif isinstance(body, Lock):
            for at, line in enumerate(body.lines):
                left_ucr[seq, at] = line.amount_ucr
                available_ucr -= line.amount_ucr
        elif isinstance(body, Release):
            for item in body.items:
                left_ucr[item.lock_seq, item.line] -= item.amount_ucr
        elif isinstance(body, Refund):
            available_ucr += sum(left_ucr.pop((item.lock_seq, item.line)) for item in body.items)
        if available_ucr < 0:
            return False
    return True
