"""What goes wrong, when and where, from the seed: deaths at any point, partitions, full disks, slowness, skew."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.world.machine import Machine
    from tests.world.world import World

SKEW_MS_MAX = 120_000


class Faults:
    """One plan of faults. Each seed has its own mixture."""

    def __init__(self, world: World, rng: Random, *, enabled: bool) -> None:
        self.world = world
        self.rng = rng
        self.enabled = enabled
        self.power = enabled and rng.random() < 0.25
        self.done: dict[str, int] = {}
        self.skewed = rng.choice((0, 0, 2_000, 28_000, SKEW_MS_MAX)) if enabled else 0
        self.clock_stop = rng.random() < 0.5
        """Whether a node with a clock far off writes nothing (LEDGER.md section 8); without it the margin is tried."""
        self._skew(self.skewed)
        if not self.clock_stop:
            for machine in world.machines:
                machine.ignore_clock()

    def _skew(self, most_ms: int) -> None:
        for machine in self.world.machines:
            machine.skew_ms = self.rng.randrange(-most_ms, most_ms + 1) if most_ms else 0

    def pull_clocks_apart(self) -> None:
        """Every second machine is as fast as clocks may be, the others as slow, and none minds (section 8, margin)."""
        self.skewed, self.clock_stop = SKEW_MS_MAX, False
        for number, machine in enumerate(self.world.machines):
            machine.skew_ms = -SKEW_MS_MAX if number % 2 else SKEW_MS_MAX
            machine.ignore_clock()

    def cut_until_delivery(self, machine: Machine, job: bytes) -> None:
        """An executor is cut off from the start of a run until a moment before it must have delivered."""
        left_ms = machine.node.rooms.jobs.jobs[job].deliver_by_ms - machine.now_ms()
        until_us = self.world.clock.now_us + max(0, left_ms - 1_000) * 1_000
        for edge in self.world.network.of.get(machine.peer, ()):
            edge.blocked_us = [max(until, until_us) for until in edge.blocked_us]

    def plan(self, seconds: float) -> None:
        """Spreads the faults over the busy time: a few per machine and minute."""
        if not self.enabled:
            return
        rng, machines = self.rng, self.world.machines
        per_machine = rng.choice((1.0, 5.0, 15.0, 30.0)) * seconds / 60
        if self.world.large:
            per_machine = min(per_machine, 0.2)
        kinds = [
            self._die,
            self._die,
            self._die,
            self._die,
            self._die,
            self._cut,
            self._cut,
            self._fill,
            self._slow,
            self._drop,
            self._drain,
        ]
        for _ in range(round(per_machine * len(machines))):
            at_us = round(rng.uniform(1.0, seconds - 0.5) * 1e6)
            self.world.clock.after(at_us, self._happen, rng.choice(kinds), rng.choice(machines))

    def end(self) -> None:
        """Peace. Clocks that would keep their nodes from writing for ever are set right."""
        self.enabled = False
        if self.clock_stop and self.skewed == SKEW_MS_MAX:
            self._skew(0)
            for edge in self.world.network.edges.values():
                self.world.network.break_link(edge, "the clock was set")

    def _happen(self, kind: Callable[[Machine], None], machine: Machine) -> None:
        if self.enabled and machine.up:
            name = kind.__name__.strip("_")
            self.done[name] = self.done.get(name, 0) + 1
            kind(machine)

    def _die(self, machine: Machine) -> None:
        """At the n-th point from now: a commit, the moment after it, a send, a reply, a run."""
        machine.dies_how = "kill"
        if self.power and self.rng.random() < 0.5:
            machine.dies_how = "power"
        machine.dies_at = self.rng.randrange(30)

    def _cut(self, machine: Machine) -> None:
        """Some or all links of a machine carry nothing for a while, in one direction or both."""
        until_us = self.world.clock.now_us + round(self.rng.uniform(0.2, 30.0) * 1e6)
        share = self.rng.choice((0.3, 1.0))
        ways = self.rng.choice(((0,), (1,), (0, 1)))
        self.world.clock.tell(machine.name, f"is cut off ({share:g}, {len(ways)})")
        self.world.seen["cut both ways" if len(ways) == 2 else "cut one way"] += 1
        for edge in self.world.network.of.get(machine.peer, ()):
            if self.rng.random() <= share:
                mine = edge.ends.index(machine)
                for way in ways:
                    edge.blocked_us[mine ^ way] = until_us

    def _drop(self, machine: Machine) -> None:
        """One connection breaks with whatever is under way on it."""
        edges = self.world.network.of.get(machine.peer)
        if edges:
            self.world.network.break_link(self.rng.choice(edges), "broken")

    def _fill(self, machine: Machine) -> None:
        """The disk is full for a while."""
        machine.disk.bytes_max = machine.disk.size() + self.rng.choice((0, 2_000))
        self.world.clock.tell(machine.name, "has a full disk")
        self.world.clock.after(round(self.rng.uniform(0.1, 8.0) * 1e6), self._room, machine)

    def _room(self, machine: Machine) -> None:
        machine.disk.bytes_max = None

    def _slow(self, machine: Machine) -> None:
        """Every turn takes its time."""
        self.world.seen["slow machine"] += 1
        machine.pace_us = machine.loop.pace_us = self.rng.choice((20_000, 300_000))
        self.world.clock.after(round(self.rng.uniform(1.0, 20.0) * 1e6), self._fast, machine)

    def _fast(self, machine: Machine) -> None:
        machine.pace_us = machine.loop.pace_us = 200

    def _drain(self, machine: Machine) -> None:
        """SIGTERM, as an upgrade gives it."""
        machine.drain()
