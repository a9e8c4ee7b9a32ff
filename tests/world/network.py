"""The simulated network: links that are FIFO and either deliver everything or break, partitions, and reconnecting."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING, Any

from clawnet import limits
from clawnet.errors import WireError
from clawnet.node.reaching import LET_GO
from clawnet.wire.codec import decode_payload, encode_payload
from clawnet.wire.events import BlobReady, DialEnded, MessageIn, PeerDown, PeerUp
from clawnet.wire.messages import Hello, Result
from tests.world.clock import Clock, LawBroken

if TYPE_CHECKING:
    from tests.world.machine import Machine

STALL_US = 8_000_000
"""A sender whose bytes are not acknowledged for so long gives the connection up."""
Encoded = tuple[int, bytes, bytes | None, bytes | None]


class Link:
    """One connection: per end whether its node was told of it and still has it; per direction its last arrival.

    Batches are numbered, and as in wire/session.py one that does not come after the last one taken is refused.
    """

    __slots__ = ("ends", "flying", "gone", "last_us", "late", "sent", "starts", "taken", "told")

    def __init__(self, ends: tuple[Machine, Machine]) -> None:
        self.ends = ends
        self.starts = (ends[0].starts, ends[1].starts)
        self.told = [False, False]
        self.gone = [False, False]
        self.last_us = [0, 0]
        self.flying = [0, 0]
        self.sent = [0, 0]
        self.taken = [0, 0]
        self.late: tuple[set[int], set[int]] = (set(), set())


class Edge:
    """Two machines that keep a connection to each other; `ends[0]` to `ends[1]` is direction 0."""

    __slots__ = (
        "blocked_us", "callers", "dead", "ends", "jitter_us", "kept", "latency_us", "link", "loss", "trying", "wait_us"
    )  # fmt: skip

    def __init__(self, a: Machine, b: Machine, rng: Random, loss: float) -> None:
        self.ends = (a, b)
        self.latency_us = [rng.randrange(200, 60_000), 0]
        self.latency_us[1] = self.latency_us[0] if rng.random() < 0.7 else rng.randrange(200, 60_000)
        self.jitter_us = rng.choice((100, 2_000, 20_000))
        self.loss = loss
        """How often a batch does not arrive, arrives twice, or is overtaken: each so often."""
        self.blocked_us = [0, 0]
        self.dead = [False, False]
        """Directions whose bytes no longer arrive on the present connection."""
        self.link: Link | None = None
        self.trying = False
        self.wait_us = 0
        self.kept = True
        """Whether it is connected again after every loss; else somebody dialled for a task, and that once."""
        self.callers: list[tuple[Machine, int, DialEnded]] = []
        """Who waits for the end of a dial, and what it hears if that fails."""


class Network:
    """All edges. Messages travel as their encoded payloads, in one batch a turn and peer."""

    def __init__(self, clock: Clock, rng: Random) -> None:
        self.clock = clock
        self.rng = rng
        self.edges: dict[tuple[str, str], Edge] = {}
        self.of: dict[str, list[Edge]] = {}
        self._ids = 0
        self.messages_total = 0
        self.told: Callable[[Machine, str, Any], None] | None = None
        """Hears of every message that leaves: for whoever counts them."""
        self.loss = 0.0
        self.bytes_total = 0
        self.lost_total = 0
        self.calm = False
        self.seen: Counter[str] = Counter()

    def join(self, a: Machine, b: Machine, loss: float) -> None:
        """From now on these two try to be connected."""
        if (a.peer, b.peer) in self.edges or a is b:
            return
        self.loss = loss
        self._try(self._edge(a, b), self.rng.randrange(200_000))

    def _edge(self, a: Machine, b: Machine) -> Edge:
        edge = Edge(a, b, self.rng, 0.0 if self.calm else self.loss)
        self.edges[a.peer, b.peer] = self.edges[b.peer, a.peer] = edge
        self.of.setdefault(a.peer, []).append(edge)
        self.of.setdefault(b.peer, []).append(edge)
        return edge

    def dial(self, machine: Machine, call: int, other: Machine) -> None:
        """A node dials: for a task once; call 0: for good, where there was a connection before."""
        edge = self.edges.get((machine.peer, other.peer))
        if call == 0:
            if edge is not None and not edge.kept:
                edge.kept = True
                self._try(edge, self.rng.randrange(200_000))
            return
        self.seen["dialled for a task"] += 1
        if edge is None:
            edge = self._edge(machine, other)
            edge.kept = False
        link = edge.link
        if link is None or any(link.gone):
            edge.callers.append((machine, machine.starts, DialEnded(call, other.peer, "it cannot be reached")))
            self._try(edge, 0)

    def rtt_ms(self, peer: str, other: str) -> float:
        """The round trip as ping would measure it."""
        edge = self.edges.get((peer, other))
        return sum(edge.latency_us) / 1000 if edge is not None else 0.0

    # --- connecting

    def _try(self, edge: Edge, delay_us: int) -> None:
        if not edge.trying:
            edge.trying = True
            self.clock.after(delay_us, self._attempt, edge)

    def _again(self, edge: Edge) -> None:
        callers, edge.callers = edge.callers, []
        for machine, starts, ended in callers:
            self.clock.after(1_000, machine.deliver, starts, ended)
        if not edge.kept:
            return
        edge.wait_us = min(max(500_000, edge.wait_us * 2), 8_000_000)
        self._try(edge, edge.wait_us // 2 + self.rng.randrange(edge.wait_us))

    def _reachable(self, edge: Edge) -> bool:
        now = self.clock.now_us
        return all(end.up for end in edge.ends) and all(until <= now for until in edge.blocked_us)

    def _attempt(self, edge: Edge) -> None:
        edge.trying = False
        link = edge.link
        if link is not None and not any(link.gone):
            edge.callers.clear()
            return
        if not self._reachable(edge):
            if any(end.up for end in edge.ends):
                self._again(edge)
            return
        edge.trying = True
        self.clock.after(3 * max(edge.latency_us), self._connect, edge)

    def _connect(self, edge: Edge) -> None:
        edge.trying = False
        if not self._reachable(edge):
            self._again(edge)
            return
        if edge.link is not None:
            # The end that has not noticed yet that the old connection is dead does so by the new one.
            for side in (0, 1):
                self._lose(edge.link, side, "replaced")
        a, b = edge.ends
        hellos = [self._hello(b, a), self._hello(a, b)]
        refusals = [a.node.admit(b.peer, hellos[0]), b.node.admit(a.peer, hellos[1])]
        if any(refusals):
            self.clock.tell(a.name, f"refused {b.name}: {refusals}")
            edge.wait_us = 8_000_000
            self._again(edge)
            return
        edge.wait_us = 0
        edge.callers.clear()
        edge.dead = [False, False]
        edge.link = link = Link(edge.ends)
        for side, delay_us in ((0, 0), (1, edge.latency_us[0])):
            link.last_us[1 - side] = self.clock.now_us + delay_us
            self.clock.after(delay_us, self._up, link, side, hellos[side])

    def _hello(self, speaker: Machine, hearer: Machine) -> Hello:
        mesh, name, certificates, rotations = speaker.node.hello_facts()
        nonce = self.rng.randbytes(32)
        now_ms = speaker.now_ms()
        return Hello([1, 0], "world", speaker.peer, hearer.peer, mesh, nonce, now_ms, name, certificates, rotations)

    def _up(self, link: Link, side: int, hello: Hello) -> None:
        end = link.ends[side]
        if link.gone[side] or end.starts != link.starts[side] or not end.up:
            return
        link.told[side] = True
        up = PeerUp(hello.peer, hello, "", "world", side == 1)
        end.ups[hello.peer] = up
        end.runtime.feed(up)

    def _lose(self, link: Link, side: int, reason: str) -> None:
        """One end notices that the connection is gone."""
        if link.gone[side]:
            return
        link.gone[side] = True
        end, other = link.ends[side], link.ends[1 - side]
        if link.told[side] and end.up and end.starts == link.starts[side]:
            end.ups.pop(other.peer, None)
            end.runtime.feed(PeerDown(other.peer, reason))
        edge = self.edges[end.peer, other.peer]
        if edge.link is link and edge.kept:
            self._try(edge, 20_000 + self.rng.randrange(500_000))

    def break_link(self, edge: Edge, reason: str, delays_us: tuple[int, int] | None = None) -> None:
        """The connection dies: what is under way is lost, and each end notices in its own time."""
        link = edge.link
        if link is None or all(link.gone):
            return
        edge.dead = [True, True]
        for side in (0, 1):
            delay_us = delays_us[side] if delays_us else self.rng.randrange(100_000, 4_000_000)
            self.clock.after(delay_us, self._lose, link, side, reason)

    def machine_down(self, machine: Machine, *, noticed_us: int) -> None:
        """A process is gone; the others notice by its reset, or after a while when its machine lost its power."""
        for edge in self.of.get(machine.peer, ()):
            link = edge.link
            if link is None:
                continue
            side = edge.ends.index(machine)
            link.gone[side] = True
            edge.dead[side] = edge.dead[1 - side] = True
            self.clock.after(noticed_us + edge.latency_us[side], self._lose, link, 1 - side, "connection reset")

    def machine_up(self, machine: Machine) -> None:
        """A process listens and dials again."""
        for edge in self.of.get(machine.peer, ()):
            edge.wait_us = 0
            if edge.kept:
                self._try(edge, self.rng.randrange(5_000, 300_000))

    def hangup(self, machine: Machine, peer: str, reason: str) -> None:
        """The node wants this link closed."""
        edge = self.edges.get((machine.peer, peer))
        if edge is not None and edge.link is not None:
            edge.kept = edge.kept and reason != LET_GO
            side = edge.ends.index(machine)
            delays = [edge.latency_us[0], edge.latency_us[1]]
            delays[side] = 0
            self.break_link(edge, reason, (delays[0], delays[1]))

    # --- messages

    def send(self, machine: Machine, peer: str, items: list[Any]) -> bool:
        """One batch into the link; False when there is none."""
        edge = self.edges.get((machine.peer, peer))
        link = edge.link if edge is not None else None
        if edge is None or link is None:
            return False
        side = 0 if edge.ends[0] is machine else 1
        if not link.told[side] or link.gone[side]:
            return False
        batch: list[Encoded] = []
        size = 0
        sending, told = machine.world.sending, self.told
        for message, reply_to, obligation in items:
            kind, payload = encode_payload(message)
            if told is not None:
                told(machine, peer, message)
            if type(message) is Result:
                sending(machine, peer, message, payload)
            batch.append((int(kind), payload, reply_to, obligation))
            size += len(payload) + 40
        self.messages_total += len(batch)
        self.bytes_total += size
        clock = self.clock
        kinds = " ".join([type(item[0]).__name__ for item in items])
        clock.tell(machine.name, f"-> {link.ends[1 - side].name}: {kinds} ({size})")
        if edge.dead[side]:
            self.lost_total += len(batch)
            return True
        link.sent[side] += 1
        extra_us = self._trouble(edge, link, side, batch, size) if edge.loss and not self.calm else 0
        if extra_us < 0:
            return True
        now = clock.now_us
        arrives = max(link.last_us[side], now + edge.latency_us[side] + self.rng.randrange(edge.jitter_us))
        if edge.blocked_us[side] > now:
            if edge.blocked_us[side] > now + STALL_US:
                self.seen["link given up by its sender"] += 1
                edge.dead[side] = True
                self.lost_total += len(batch)
                for end in (0, 1):
                    delay_us = STALL_US if end == side else STALL_US + self.rng.randrange(STALL_US)
                    clock.after(delay_us, self._lose, link, end, "timed out")
                return True
            self.seen["held up" if edge.blocked_us[1 - side] > now else "held up one way"] += 1
            arrives = max(arrives, edge.blocked_us[side] + edge.latency_us[side])
        link.last_us[side] = arrives + 1
        arrives += extra_us
        link.flying[side] += size
        if link.flying[side] > limits.SEND_QUEUE_BYTES_MAX:
            raise LawBroken(f"{machine.name} has {link.flying[side]} bytes under way to {link.ends[1 - side].name}")
        clock.after(arrives - now, self._arrive, edge, link, side, batch, size, link.sent[side])
        return True

    def _trouble(self, edge: Edge, link: Link, side: int, batch: list[Encoded], size: int) -> int:
        """What may befall a batch: lost (-1), on its way twice, or so much later that those after it overtake it."""
        lot, clock, name = self.rng.random() / edge.loss, self.clock, link.ends[side].name
        if lot >= 3:
            return 0
        if lot < 1:
            self.seen["batch lost"] += 1
            self.lost_total += len(batch)
            clock.tell(name, f"lost on the way to {link.ends[1 - side].name}")
            self.break_link(edge, "timed out")
            edge.dead[1 - side] = self.rng.random() < 0.5
            return -1
        if lot < 2:
            link.flying[side] += size
            late_us = STALL_US + self.rng.randrange(STALL_US)
            clock.after(late_us, self._arrive, edge, link, side, batch, size, link.sent[side])
            return 0
        # A carrier that mixes up its bytes does not live long; until it breaks, later batches are taken.
        link.late[side].add(link.sent[side])
        delays = self.rng.randrange(100_000, 4_000_000), self.rng.randrange(100_000, 4_000_000)
        for end in (0, 1):
            clock.after(delays[end], self._lose, link, end, "broken")
        return self.rng.randrange(1_000, 1_000_000)

    def _arrive(self, edge: Edge, link: Link, side: int, batch: list[Encoded], size: int, number: int) -> None:
        link.flying[side] -= size
        end = link.ends[1 - side]
        if edge.link is not link or edge.dead[side] or link.gone[1 - side] or not end.up:
            self.lost_total += len(batch)
            return
        if number <= link.taken[side]:
            self.seen["batch refused, overtaken" if number in link.late[side] else "batch refused, a duplicate"] += 1
            return
        link.taken[side] = number
        sender, feed = link.ends[side].peer, end.runtime.feed
        for kind, payload, reply_to, obligation in batch:
            self._ids += 1
            try:
                message = decode_payload(kind, payload)
            except WireError as error:
                raise LawBroken(f"{link.ends[side].name} sends what nobody can read: {error}") from error
            feed(MessageIn(sender, self._ids.to_bytes(16, "big"), message, reply_to, obligation))

    # --- blobs

    def fetch(self, machine: Machine, request: bytes, peer: str, task_id: bytes, blobs: Any, inline_max: int) -> None:
        """Bulk data on a stream of its own: it comes whole, or not at all."""
        edge = self.edges.get((machine.peer, peer))
        if edge is None or edge.link is None or any(edge.link.gone):
            self.clock.after(1_000, machine.deliver, machine.starts, BlobReady(request, "not connected"))
            return
        size = sum(blob_bytes for _, blob_bytes in blobs)
        took_us = 2 * sum(edge.latency_us) + size // 10
        self.clock.after(
            took_us, self._fetched, machine, machine.starts, edge, edge.link, request, task_id, blobs, inline_max
        )

    def _fetched(
        self,
        machine: Machine,
        starts: int,
        edge: Edge,
        link: Link,
        request: bytes,
        task_id: bytes,
        blobs: Any,
        inline_max: int,
    ) -> None:
        holder = edge.ends[1] if edge.ends[0] is machine else edge.ends[0]
        blocked = any(until > self.clock.now_us for until in edge.blocked_us)
        if edge.link is not link or any(link.gone) or any(edge.dead) or blocked:
            machine.deliver(starts, BlobReady(request, "the link broke"))
            return
        inline = b""
        for blob, blob_bytes in blobs:
            data = holder.blobs.fetched(machine.peer, task_id, blob)
            if data is None or len(data) != blob_bytes:
                machine.deliver(starts, BlobReady(request, "not found"))
                return
            if len(blobs) == 1 and 0 < blob_bytes <= inline_max:
                inline = data
            elif machine.up and machine.starts == starts:
                machine.blobs.keep(data)
        machine.deliver(starts, BlobReady(request, "", inline))
