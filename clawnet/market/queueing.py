"""Which waiting job starts next on a worker, and what those that run hold of the machine. Pure.

Fair queueing with start tags (Goyal, Vin, Cheng: SFQ, 1996): every requester, that is every owner however many nodes
it has, is a flow with a tag that grows by the work started for it; the flow with the lowest tag goes next. Work is
counted in slot-seconds: the time, estimated until it is known, times the largest share of the machine that the job
takes. One that comes back starts at the clock, which is the work done for the flow that was served last: it saves
nothing up while it is away. So whoever sends a thousand tasks waits for them, and not the one who sends a single one
after them.

This node's own ring is a tier of its own, and first where both are due: while both have work waiting it gets OWN_WEIGHT
parts for every one that all others get together. Priority orders a flow's jobs among themselves and nothing else.

A job that does not fit into what is free is not passed over for ever: the time at which it should fit is fixed when it
is first in line (EASY backfilling: Lifka, 1995). Until then others may start that end by then or leave it what it
needs; after that nothing starts before it that it would have to wait for.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Final

from msgspec import Struct, field

from clawnet import limits
from clawnet.market.machine import Amounts, Entry, Machine

OWN_WEIGHT: Final = 4.0
_SLACK: Final = 64
_NOTHING_S: Final = 1e-6


class _Flow(Struct):
    """One requester's waiting jobs. `tag` is where its next one starts, `running_s` the part of it that runs now."""

    key: bytes
    tag: float
    running_s: float = 0.0
    heap: list[tuple[int, int, Entry]] = field(default_factory=list)
    count: int = 0
    backlog_s: float = 0.0
    place: tuple[float, int, bytes] | None = None

    def keeps(self, clock: float) -> bool:
        """Whether it has anything waiting, running, or to make up for."""
        return self.count > 0 or self.running_s > 0 or self.tag > clock


class _Tier:
    """The flows of the own ring, or of all others, in the order of their tags."""

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.tag = 0.0
        self.running_s = 0.0
        self.clock = 0.0
        self.count = 0
        self.backlog_s = 0.0
        self.flows: dict[bytes, _Flow] = {}
        self.heap: list[tuple[float, int, bytes]] = []
        self._tidy_at = _SLACK

    def place(self, flow: _Flow, number: int) -> None:
        """Puts a flow that has jobs where its tag belongs."""
        flow.place = (flow.tag, number, flow.key)
        heapq.heappush(self.heap, flow.place)
        if len(self.heap) > 2 * len(self.flows) + _SLACK:
            self.heap = [f.place for f in self.flows.values() if f.place is not None and f.count]
            heapq.heapify(self.heap)

    def first(self) -> _Flow | None:
        """The flow that is due first."""
        while self.heap:
            flow = self.flows.get(self.heap[0][2])
            if flow is not None and flow.count and flow.place is self.heap[0]:
                return flow
            heapq.heappop(self.heap)
        return None

    def flow(self, key: bytes) -> _Flow:
        """A requester's flow; those that have nothing waiting and nothing to make up for are forgotten in time."""
        found = self.flows.get(key)
        if found is None:
            if len(self.flows) >= self._tidy_at:
                self.flows = {key: flow for key, flow in self.flows.items() if flow.keeps(self.clock)}
                self._tidy_at = 2 * len(self.flows) + _SLACK
            found = self.flows[key] = _Flow(key, self.clock)
        return found

    def ahead_s(self, key: bytes) -> float:
        """Work that starts before one job more of this flow."""
        mine = self.flows.get(key)
        if mine is None:
            tag, ahead_s = self.clock, 0.0
        else:
            tag, ahead_s = max(self.clock + mine.running_s, mine.tag) + mine.backlog_s, mine.backlog_s
        for flow in self.flows.values():
            if flow.count and flow is not mine and flow.tag <= tag:
                ahead_s += min(flow.backlog_s, max(tag - flow.tag, flow.backlog_s / flow.count))
        return ahead_s


class FairQueue:
    """Jobs that wait for a place, bounded by its owner (`has_place`)."""

    def __init__(self) -> None:
        self._entries: dict[bytes, tuple[Entry, float]] = {}
        self._own, self._others = _Tier(OWN_WEIGHT), _Tier(1.0)
        self._clock = 0.0
        self._numbers = 0
        self._coming: dict[bytes, bytes] = {}
        self._places: dict[bytes, int] = {}
        self._running_s: dict[bytes, float] = {}
        self._reserved: tuple[bytes, int, Amounts] | None = None
        self._stuck_at = -1

    def __len__(self) -> int:
        return len(self._entries) + len(self._coming)

    def __contains__(self, job: bytes) -> bool:
        return job in self._entries

    def __iter__(self) -> Iterator[Entry]:
        return (entry for entry, _ in self._entries.values())

    # --- places

    def has_place(self, flow: bytes, places_max: int) -> bool:
        """Whether this requester may have one more job wait here.

        It may hold as many places as it leaves free: alone it gets half of them, two that flood get a third each, and
        whoever comes then still finds some.
        """
        return self._places.get(flow, 0) < places_max - len(self)

    def expect(self, job: bytes, flow: bytes) -> None:
        """The job will wait here once its inputs have come: it has its place already."""
        if job not in self._coming and job not in self._entries:
            self._coming[job] = flow
            self._places[flow] = self._places.get(flow, 0) + 1

    def push(self, entry: Entry, cost_s: float) -> None:
        """The job waits, behind those of its requester that have its priority."""
        if entry.job in self._entries:
            return
        self.expect(entry.job, entry.flow)
        del self._coming[entry.job]
        self._entries[entry.job] = (entry, cost_s)
        tier = self._tier(entry)
        if not tier.count:
            tier.tag = max(tier.tag, self._clock + tier.running_s / tier.weight)
        flow = tier.flow(entry.flow)
        self._numbers += 1
        heapq.heappush(flow.heap, (-entry.priority, self._numbers, entry))
        if not flow.count:
            flow.tag = max(flow.tag, tier.clock + flow.running_s)
            tier.place(flow, self._numbers)
        self._count(tier, flow, 1, cost_s)

    def discard(self, job: bytes) -> None:
        """The job waits no longer."""
        found = self._entries.get(job)
        flow_key = self._coming.pop(job, None) if found is None else found[0].flow
        if flow_key is None:
            return
        self._leave_place(flow_key)
        if found is None:
            return
        entry, cost_s = self._entries.pop(job)
        tier = self._tier(entry)
        flow = tier.flows[entry.flow]
        self._count(tier, flow, -1, -cost_s)
        if len(flow.heap) > 2 * flow.count + _SLACK:
            flow.heap = [item for item in flow.heap if self._waits(item[2])]
            heapq.heapify(flow.heap)

    def _leave_place(self, flow: bytes) -> None:
        self._places[flow] -= 1
        if not self._places[flow]:
            del self._places[flow]

    def _count(self, tier: _Tier, flow: _Flow, count: int, cost_s: float) -> None:
        self._stuck_at = -1
        tier.count += count
        flow.count += count
        tier.backlog_s = tier.backlog_s + cost_s if tier.count else 0.0
        flow.backlog_s = flow.backlog_s + cost_s if flow.count else 0.0

    def _waits(self, entry: Entry) -> bool:
        found = self._entries.get(entry.job)
        return found is not None and found[0] is entry

    def _tier(self, entry: Entry) -> _Tier:
        return self._own if entry.own else self._others

    # --- who starts

    def pick(self, machine: Machine, now_ms: int) -> Entry | None:
        """The job that starts now: first in line where it fits, else one that does not keep that one waiting.

        None: nothing can start. It waits no longer, and its work is counted; the caller starts it.
        """
        if not self._entries or self._stuck_at == machine.changes or not machine.has_room():
            return None
        entry = self._first()
        if machine.fits(entry):
            self._reserved = None
        else:
            self._reserve(entry, machine, now_ms)
            behind = (other for other in self._in_line() if other is not entry)
            fill = next((one for one in behind if machine.fits(one) and self._leaves_room(one, now_ms)), None)
            if fill is None:
                self._stuck_at = machine.changes  # until a job comes or goes
                return None
            entry = fill
        self._leave_line(entry)
        return entry

    def _first(self) -> Entry:
        own, others = self._own, self._others
        flow = (own if own.count and (not others.count or own.tag <= others.tag) else others).first()
        assert flow is not None, "a tier that counts jobs has a flow that does"
        while not self._waits(flow.heap[0][2]):
            heapq.heappop(flow.heap)
        return flow.heap[0][2]

    def _in_line(self) -> list[Entry]:
        """Waiting jobs in the order in which they are due: QUEUE_LOOK_MAX at most, QUEUE_LOOK_FLOW of a flow."""
        found: list[Entry] = []
        for tier in sorted((self._own, self._others), key=lambda tier: tier.tag):
            passed = []
            while (flow := tier.first()) is not None and len(found) < limits.QUEUE_LOOK_MAX:
                passed.append(heapq.heappop(tier.heap))
                items = [item for item in self._front(flow) if self._waits(item[2])]
                found += [item[2] for item in items]
                for item in items:
                    heapq.heappush(flow.heap, item)
            for place in passed:
                heapq.heappush(tier.heap, place)
        return found

    def _front(self, flow: _Flow) -> list[tuple[int, int, Entry]]:
        count = min(limits.QUEUE_LOOK_FLOW, len(flow.heap))
        return [heapq.heappop(flow.heap) for _ in range(count)]

    def _reserve(self, entry: Entry, machine: Machine, now_ms: int) -> None:
        if self._reserved is None or self._reserved[0] != entry.job:
            self._reserved = (entry.job, *machine.opening(entry.needs, now_ms))

    def _leaves_room(self, entry: Entry, now_ms: int) -> bool:
        """Whether the first in line loses nothing by it; what it takes beside that one is taken off."""
        assert self._reserved is not None
        job, at_ms, spare = self._reserved
        if now_ms + 1000 * entry.estimated_s <= at_ms:
            return True
        if not entry.needs.within(spare):
            return False
        self._reserved = (job, at_ms, spare.minus(entry.needs))
        return True

    def _leave_line(self, entry: Entry) -> None:
        """The job starts: its work is counted for its requester."""
        tier = self._tier(entry)
        flow = tier.flows[entry.flow]
        cost_s = self._entries[entry.job][1]
        self.discard(entry.job)
        self._clock = max(self._clock, tier.tag - tier.running_s / tier.weight)
        tier.clock = max(tier.clock, flow.tag - flow.running_s)
        self._running_s[entry.job] = cost_s
        self._move(tier, flow, cost_s, cost_s)

    def _move(self, tier: _Tier, flow: _Flow, counted_s: float, running_s: float) -> None:
        """So much more work is counted for a flow and its tier, and so much more of it runs."""
        tier.tag += counted_s / tier.weight
        for one in (tier, flow):
            one.running_s += running_s
            one.running_s = one.running_s if one.running_s > _NOTHING_S else 0.0
        flow.tag += counted_s
        if flow.count:
            self._numbers += 1
            tier.place(flow, self._numbers)

    # --- what the estimates missed, and what is to be expected

    def ended(self, entry: Entry, took_s: float) -> None:
        """A run is over, and took so many slot-seconds: what was counted too much or too little for it is put right.

        What one has to make up for is bounded by QUEUE_DEBT_S.
        """
        counted_s = self._running_s.pop(entry.job, None)
        if counted_s is not None:
            tier = self._tier(entry)
            flow = tier.flows[entry.flow]
            more_s = min(took_s, counted_s + limits.QUEUE_DEBT_S) - counted_s
            self._move(tier, flow, more_s, -counted_s)

    def rest(self) -> None:
        """Where nothing waits and nothing runs, nobody is owed anything."""
        if not self._entries and not self._running_s:
            for tier in (self._own, self._others):
                tier.flows.clear()
                tier.heap.clear()
                tier.tag = tier.clock = tier.running_s = 0.0
            self._clock = 0.0

    def ahead_s(self, flow: bytes, *, own: bool) -> float:
        """Slot-seconds of waiting work that starts before one job more of this requester."""
        mine, other = (self._own, self._others) if own else (self._others, self._own)
        ahead_s = mine.ahead_s(flow)
        if not other.count:
            return ahead_s
        each_s = other.backlog_s / other.count if own is False else 0.0
        return ahead_s + min(other.backlog_s, ahead_s * other.weight / mine.weight + each_s)
