"""How many messages a task costs, by kind, and what the mesh says without one: counted by the simulated network.

Nodes compare the heads of the chains they hold every minute, with one peer, and pull what they lack: that goes by the
minute, whatever the number of tasks, and is counted so. All other ledger messages are some task's.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from typing import Any

from msgspec import Struct

from clawnet.node.chains import Chains
from clawnet.node.context import Context
from clawnet.wire.codec import encode
from clawnet.wire.messages import KIND_OF, Kind, LedgerPull, LedgerPush
from tests.world.machine import Machine
from tests.world.signer import signer
from tests.world.world import World

SIZES = (20, 100, 300, 1_000)
REST_S = 130.0
"""Links are made and chains told before the first task, so that they are nobody's cost."""
BUSY_S = 60.0
CARDS, HEADS, CHAINS, ENDS = "cards", "heads of chains", "chains after heads", "membership"


class Tally:
    """Messages of a task by kind, and of the mesh by what they are for."""

    def __init__(self, world: World) -> None:
        self.of_tasks: Counter[str] = Counter()
        self.of_mesh: Counter[str] = Counter()
        self._asked: set[bytes] = set()
        self._shown: set[bytes] = set()
        """Pulls because of a head, and the answers to them: who, whom, what."""
        world.network.told = self._told
        for machine in world.machines:
            self._watch(machine, machine.node.ctx, machine.node.rooms.books.chains)

    def _told(self, machine: Machine, peer: str, message: Any) -> None:
        """All but ledger messages, as they leave; those are counted where it is known why."""
        kind = KIND_OF[type(message)]
        if kind is Kind.PEER_INFO:
            self.of_mesh[CARDS] += 1
        elif kind is Kind.MEMBERSHIP:
            self.of_mesh[ENDS] += 1
        elif kind not in (Kind.LEDGER_PULL, Kind.LEDGER_PUSH):
            self.of_tasks[kind.name] += 1

    def _watch(self, machine: Machine, ctx: Context, chains: Chains) -> None:
        send, head, serve, pushed = ctx.send, chains._head, chains._serve, chains.pushed
        because: list[object] = []
        """Not empty while something is done because of a head."""

        def sends(peer: str, message: Any, reply_to: bytes | None = None) -> None:
            if type(message) is LedgerPull and because:
                self._asked.add(_name(machine.peer, peer, message))
            if type(message) is LedgerPush and because:
                self._shown.add(_name(machine.peer, peer, message))
            if type(message) is LedgerPush and not message.entries and message.heads:
                self.of_mesh[HEADS] += 1
            elif type(message) in (LedgerPull, LedgerPush) and because:
                self.of_mesh[CHAINS] += 1
            elif type(message) in (LedgerPull, LedgerPush):
                self.of_tasks[KIND_OF[type(message)].name] += 1
            send(peer, message, reply_to)

        def doing(work: Callable[..., None], why: bool, *of: Any) -> None:
            because.extend((work,) * why)
            work(*of)
            del because[len(because) - why :]

        ctx.send = sends  # type: ignore[method-assign]
        chains._head = lambda peer, told: doing(head, True, peer, told)  # type: ignore[method-assign]
        chains._serve = lambda peer, pull, rows: doing(  # type: ignore[method-assign]
            serve, _name(peer, machine.peer, pull) in self._asked, peer, pull, rows
        )
        chains.pushed = lambda peer, push: doing(  # type: ignore[method-assign]
            pushed, _name(peer, machine.peer, push) in self._shown, peer, push
        )


def _name(sender: str, receiver: str, message: LedgerPull | LedgerPush) -> bytes:
    return hashlib.blake2b(sender.encode() + receiver.encode() + encode(message), digest_size=16).digest()


class Figures(Struct):
    """Of one mesh: messages a task by kind; of the mesh itself a node and minute; dials that tasks needed."""

    nodes: int
    tasks: int
    paid: int
    dials: int
    of_a_task: dict[str, float]
    of_a_minute: dict[str, float]

    @property
    def total(self) -> float:
        """All that one task causes."""
        return sum(self.of_a_task.values())


def measure(nodes: int, seed: int = 1) -> Figures:
    """A calm mesh of so many nodes, one task each within a minute, from the first offer until nothing is owed."""
    with signer(ed25519=False):
        world = World(seed, nodes, BUSY_S, faults=False, rest_s=REST_S, each_issues=True)
        start_us = world.clock.now_us
        tally, seen = Tally(world), world.network.seen
        world.clock.run(start_us + round(REST_S * 1e6))
        tally.of_tasks.clear()
        dials = seen["dialled for a task"]
        world.run()
        minutes = (world.clock.now_us - start_us) / 60e6
    tasks = len(world.client.accepted)
    return Figures(
        nodes,
        tasks,
        world.referee.releases_total,
        seen["dialled for a task"] - dials,
        {kind: count / tasks for kind, count in tally.of_tasks.items()},
        {what: count / nodes / minutes for what, count in tally.of_mesh.items()},
    )


def report(sizes: tuple[int, ...] = SIZES) -> float:
    """Prints a table, one column a mesh; returns how much more a task costs in the largest than in the smallest."""
    columns = [measure(nodes) for nodes in sizes]
    least = columns[0].total

    def line(name: str, *cells: str) -> None:
        print(f"{name:28}" + "".join(f"{cell:>12}" for cell in cells))

    line("nodes", *(str(one.nodes) for one in columns))
    line("tasks, of them paid", *(f"{one.tasks}, {one.paid}" for one in columns))
    print("messages of a task")
    for kind in sorted({kind for one in columns for kind in one.of_a_task}):
        line("  " + kind, *(f"{one.of_a_task.get(kind, 0.0):.2f}" for one in columns))
    line("  all", *(f"{one.total:.2f}" for one in columns))
    line(f"  times those at {sizes[0]}", *(f"{one.total / least:.2f}" for one in columns))
    line("dials of a task", *(f"{one.dials / one.tasks:.3f}" for one in columns))
    print("messages of the mesh, a node and minute")
    for what in (CARDS, HEADS, CHAINS, ENDS):
        line("  " + what, *(f"{one.of_a_minute.get(what, 0.0):.2f}" for one in columns))
    return columns[-1].total / least
