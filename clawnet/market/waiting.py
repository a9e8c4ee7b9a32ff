"""Tasks that wait for an auction: by priority, then by arrival; those that ask for the same thing wait as one lane.

When everybody who could take a task is full, its lane is held: asking for each of its tasks again and again would cost
the square of their number. A held lane lets one task try after a pause that grows, then two more for each that found a
taker until one finds none; and one for each of its attempts that ended, so that a free place is filled at once. Pure:
pauses are returned.
"""

from __future__ import annotations

import heapq
from typing import Final

from msgspec import Struct, field

PAUSE_MIN_MS: Final = 100
PAUSE_MAX_MS: Final = 5_000
_SLACK: Final = 1_024

Place = tuple[int, int, bytes, bytes]
"""Order of a waiting task: negative priority, number of arrival, lane, task id."""


class _Held(Struct):
    """A lane whose takers are full."""

    parked: list[Place] = field(default_factory=list)
    tries: int = 0
    growing: bool = False
    pause_ms: int = PAUSE_MIN_MS


class Waiting:
    """All waiting tasks of a node. `pop` gives the next that may try."""

    def __init__(self) -> None:
        self._ready: list[Place] = []
        self._held: dict[bytes, _Held] = {}
        self._places: dict[bytes, Place] = {}
        self._counts: dict[bytes, int] = {}
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._places)

    def held(self, lane: bytes) -> bool:
        """Whether this lane's tasks try a few at a time."""
        return lane in self._held

    def push(self, lane: bytes, priority: int, task_id: bytes) -> None:
        """The task waits behind those of its priority; once, however often it is pushed."""
        if task_id not in self._places:
            self._arrivals += 1
            self._places[task_id] = place = (-priority, self._arrivals, lane, task_id)
            self._counts[lane] = self._counts.get(lane, 0) + 1
            heapq.heappush(self._ready, place)

    def pop(self) -> bytes | None:
        """The next task that may be put up for auction; None when all that wait are held."""
        while self._ready:
            place = heapq.heappop(self._ready)
            if self._places.get(place[3]) is not place:
                continue
            lane = self._held.get(place[2])
            if lane is not None:
                if lane.tries <= 0:
                    heapq.heappush(lane.parked, place)
                    continue
                lane.tries -= 1
            self._leave(place)
            return place[3]
        return None

    def _leave(self, place: Place) -> None:
        del self._places[place[3]]
        self._counts[place[2]] -= 1
        if not self._counts[place[2]]:
            del self._counts[place[2]]

    def forget(self, task_id: bytes) -> None:
        """The task waits no longer."""
        place = self._places.get(task_id)
        if place is not None:
            self._leave(place)
            self._tidy()

    def _tidy(self) -> None:
        """Places of tasks that no longer wait are dropped before they outnumber the others."""
        count = len(self._ready) + sum(len(lane.parked) for lane in self._held.values())
        if count <= 2 * len(self._places) + _SLACK:
            return
        for heap in (self._ready, *(lane.parked for lane in self._held.values())):
            heap[:] = [place for place in heap if self._places.get(place[3]) is place]
            heapq.heapify(heap)

    # --- lanes

    def full(self, lane: bytes, priority: int, task_id: bytes) -> int:
        """Nobody has room for this task: it waits, and its lane is held; a pause to arm, 0 when one is under way."""
        self.push(lane, priority, task_id)
        held = self._held.get(lane)
        if held is not None:
            held.tries, held.growing = 0, False
            return 0
        self._held[lane] = _Held()
        return PAUSE_MIN_MS

    def pause_over(self, lane: bytes) -> int:
        """One task of the lane may try; the next pause, or 0 when nothing of it waits: then it is held no longer."""
        held = self._held.get(lane)
        if held is None or lane not in self._counts:
            self._held.pop(lane, None)
            return 0
        self._let_try(lane, held, 1)
        held.growing = True
        held.pause_ms = min(2 * held.pause_ms, PAUSE_MAX_MS)
        return held.pause_ms

    def taken(self, lane: bytes) -> None:
        """A task of the lane found a taker: until the next that finds none, there may be room for two more."""
        held = self._held.get(lane)
        if held is not None and held.growing:
            held.pause_ms = PAUSE_MIN_MS
            self._let_try(lane, held, 2)

    def ended(self, lane: bytes) -> None:
        """An attempt of this lane ended: its place is free, for a task of this lane or of another that is held."""
        held = self._held.get(lane)
        if held is not None:
            self._let_try(lane, held, 1)
        for other in self._held:
            if other != lane:
                # Whoever had a turn goes to the end of the dictionary: the held lanes take turns.
                self._held[other] = self._held.pop(other)
                self._let_try(other, self._held[other], 1)
                break

    def _let_try(self, lane: bytes, held: _Held, count: int) -> None:
        """So many more of a held lane may try, the first of those that were put aside or of those still in line."""
        held.tries = min(held.tries + count, self._counts.get(lane, 0))
        while held.parked and count:
            place = heapq.heappop(held.parked)
            if self._places.get(place[3]) is place:
                heapq.heappush(self._ready, place)
                count -= 1
