"""Simulated time: one heap of events in microseconds, the story they tell, and the event loop of one machine."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable
from typing import Any

STORY_LINES = 400


class LawBroken(BaseException):
    """A law of the mesh does not hold; the message says which and where. No handler of the product may catch it."""


class Killed(BaseException):
    """The machine stops in the middle of what it was doing. No handler of the product may catch it."""


class Clock:
    """Events in the order of their time, ties in the order they were made; every told line goes into the trace."""

    def __init__(self, start_ms: int) -> None:
        self.now_us = start_ms * 1000
        self.start_us = self.now_us
        self._heap: list[tuple[int, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0
        self.events_total = 0
        self._lines: list[str] = []
        self._before: list[str] = []
        self._trace = hashlib.blake2b(digest_size=16)

    def after(self, delay_us: int, work: Callable[..., None], *args: Any) -> None:
        """Does `work` when `delay_us` have passed."""
        self._count += 1
        heapq.heappush(self._heap, (self.now_us + delay_us if delay_us > 0 else self.now_us, self._count, work, args))

    def run(self, until_us: int) -> None:
        """Everything that happens up to then."""
        heap, pop = self._heap, heapq.heappop
        while heap and heap[0][0] <= until_us:
            self.now_us, _, work, args = pop(heap)
            self.events_total += 1
            work(*args)
        self.now_us = max(self.now_us, until_us)

    @property
    def elapsed_s(self) -> float:
        """Simulated seconds since the beginning."""
        return (self.now_us - self.start_us) / 1e6

    def tell(self, who: str, what: str) -> None:
        """One line of the story."""
        self._lines.append(f"{self.now_us - self.start_us} {who} {what}\n")
        if len(self._lines) == STORY_LINES:
            self._trace.update("".join(self._lines).encode())
            self._before, self._lines = self._lines, []

    @property
    def story(self) -> list[str]:
        """The last STORY_LINES lines that were told."""
        told = []
        for line in [*self._before, *self._lines][-STORY_LINES:]:
            at_us, who, what = line.rstrip("\n").split(" ", 2)
            told.append(f"{int(at_us) / 1e6:11.6f} {who:>5} {what}")
        return told

    @property
    def trace(self) -> str:
        """What stands for all that was told so far."""
        trace = self._trace.copy()
        trace.update("".join(self._lines).encode())
        return trace.hexdigest()


class Handle:
    """What call_later returns."""

    def __init__(self) -> None:
        self.cancelled = False

    def cancel(self) -> None:
        """It will not be called."""
        self.cancelled = True


class Loop:
    """The event loop as the product's runtime sees it: of one start of one machine, and dead with it.

    `pace_us` is how long the machine takes to get to a callback: what comes in meanwhile shares a turn.
    """

    def __init__(
        self, clock: Clock, guard: Callable[[Callable[..., None], tuple[Any, ...]], None], pace_us: int
    ) -> None:
        self._clock = clock
        self._guard = guard
        self.pace_us = pace_us
        self.alive = True

    def call_soon(self, work: Callable[..., None], *args: Any) -> None:
        """In the next pass."""
        self._clock.after(self.pace_us, self._do, work, args)

    call_soon_threadsafe = call_soon

    def call_later(self, delay_s: float, work: Callable[..., None], *args: Any) -> Handle:
        """After a delay, unless cancelled."""
        handle = Handle()
        self._clock.after(round(delay_s * 1e6), self._do_later, handle, work, args)
        return handle

    def _do_later(self, handle: Handle, work: Callable[..., None], args: tuple[Any, ...]) -> None:
        if not handle.cancelled:
            self._do(work, args)

    def _do(self, work: Callable[..., None], args: tuple[Any, ...]) -> None:
        if self.alive:
            self._guard(work, args)
