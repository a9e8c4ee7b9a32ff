"""The loop's timers: one heap with lazy deletion, one call of the event loop for whichever is due first."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from typing import Any

Key = tuple[Any, ...]

TIMER_MS_MAX = 30_000
"""The longest sleep: the wall clock may be set, and the loop's clock stands still while the machine is suspended."""
SLACK = 1_024
SET_BACK_MS = 1_000
"""By so much the clock may go back and it is no jump. After a jump every timer has as long to wait as it had before."""


class Timers:
    """At most one time (Unix ms) a key. `fired` is told the key when its time has come, unless `asleep` says not to."""

    def __init__(self, clock: Callable[[], int], fired: Callable[[Key], None], asleep: Callable[[], bool]) -> None:
        self._clock = clock
        self._fired = fired
        self._asleep = asleep
        self._loop = asyncio.get_running_loop()
        self._heap: list[tuple[int, int, Key]] = []
        self._due: dict[Key, tuple[int, int]] = {}
        self._count = 0
        self._handle: asyncio.TimerHandle | None = None
        self._handle_ms = 0
        self._seen_ms = clock()

    def __len__(self) -> int:
        """What the heap holds, replaced timers included."""
        return len(self._heap)

    def set(self, key: Key, at_ms: int) -> None:
        """A time for this key in place of the one it had."""
        self._look()
        self._count += 1
        number = self._count
        self._due[key] = (at_ms, number)
        heapq.heappush(self._heap, (at_ms, number, key))
        if self._handle is None or at_ms < self._handle_ms:
            self._arm(at_ms)
        if len(self._heap) > 2 * len(self._due) + SLACK:
            self._heap = [(at, number, key) for key, (at, number) in self._due.items()]
            heapq.heapify(self._heap)

    def forget(self, key: Key) -> None:
        """No time for this key any longer."""
        self._due.pop(key, None)

    def clear(self) -> None:
        """No timer at all."""
        self._heap.clear()
        self._due.clear()

    def fire(self) -> None:
        """Tells every timer that is due, in order, and sleeps until the next."""
        self._handle = None
        if self._asleep():
            return
        now_ms = self._look()
        heap = self._heap
        while heap:
            at_ms, number, key = heap[0]
            current = self._due.get(key)
            if current is None or current[1] != number:
                heapq.heappop(heap)
                continue
            if at_ms > now_ms:
                self._arm(at_ms)
                return
            heapq.heappop(heap)
            del self._due[key]
            self._fired(key)

    def _look(self) -> int:
        """What the clock says. When it was set back the timers go with it: what is waited for is a time, no date."""
        before_ms, self._seen_ms = self._seen_ms, self._clock()
        jump_ms = self._seen_ms - before_ms
        if jump_ms < -SET_BACK_MS:
            self._due = {key: (at + jump_ms, number) for key, (at, number) in self._due.items()}
            self._heap = [(at, number, key) for key, (at, number) in self._due.items()]
            heapq.heapify(self._heap)
            if self._heap:
                self._arm(self._heap[0][0])
        return self._seen_ms

    def _arm(self, at_ms: int) -> None:
        if self._handle is not None:
            self._handle.cancel()
        self._handle_ms = at_ms
        wait_ms = min(max(0, at_ms - self._clock()), TIMER_MS_MAX)
        self._handle = self._loop.call_later(wait_ms / 1000, self.fire)


def every(seconds: float, work: Callable[[], None], *, first_s: float = 0.0) -> None:
    """Calls `work` again and again for as long as the running loop does, first after `first_s`, else `seconds`.

    What `work` raises goes to the loop's exception handler, and `work` is called again nevertheless.
    """
    loop = asyncio.get_running_loop()

    def again() -> None:
        try:
            work()
        finally:
            loop.call_later(seconds, again)

    loop.call_later(first_s or seconds, again)
