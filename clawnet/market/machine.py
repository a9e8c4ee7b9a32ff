"""What a worker's machine has, what its runs hold of it, and when more of it should be free. Pure."""

from __future__ import annotations

import math
from itertools import islice
from typing import Final

from msgspec import Struct

from clawnet import limits

MILLI: Final = 1000
"""Thousandths of a processor in one."""
COST_MIN_S: Final = 0.001


class Amounts(Struct, frozen=True, gc=False):
    """What a machine has, or a job needs: slots, thousandths of a processor, bytes of memory, GPUs."""

    slots: int = 0
    cpu_milli: int = 0
    memory_bytes: int = 0
    gpu: int = 0

    def within(self, other: Amounts) -> bool:
        """Whether `other` has all of it."""
        return (
            self.slots <= other.slots
            and self.cpu_milli <= other.cpu_milli
            and self.memory_bytes <= other.memory_bytes
            and self.gpu <= other.gpu
        )

    def plus(self, other: Amounts) -> Amounts:
        """Both together."""
        return Amounts(
            self.slots + other.slots,
            self.cpu_milli + other.cpu_milli,
            self.memory_bytes + other.memory_bytes,
            self.gpu + other.gpu,
        )

    def minus(self, other: Amounts) -> Amounts:
        """What is left of it; below zero where more is taken than there is."""
        return Amounts(
            self.slots - other.slots,
            self.cpu_milli - other.cpu_milli,
            self.memory_bytes - other.memory_bytes,
            self.gpu - other.gpu,
        )

    def share_of(self, capacity: Amounts, *, gpu: bool = True) -> float:
        """The largest part of anything that `capacity` has (the dominant share)."""
        parts = [
            self.slots / max(capacity.slots, 1),
            self.cpu_milli / max(capacity.cpu_milli, 1),
            self.memory_bytes / max(capacity.memory_bytes, 1),
        ]
        if gpu and self.gpu:
            parts.append(self.gpu / max(capacity.gpu, 1))
        return max(parts)


class Entry(Struct, frozen=True, gc=False):
    """A job that waits. `flow` is its requester's owner; a `short` one may share a slot with others of its kind."""

    job: bytes
    flow: bytes
    own: bool
    needs: Amounts
    estimated_s: float
    priority: int = 0
    short: bool = False


class _Run(Struct):
    """`slots` is the part of the machine that it holds, in slots."""

    entry: Entry
    held: Amounts
    started_ms: int
    gpus: tuple[int, ...]
    slots: float

    def remaining_s(self, now_ms: int) -> float:
        """By the estimate; one that is overdue is taken to be overdue as long again."""
        return abs(self.entry.estimated_s - (now_ms - self.started_ms) / 1000)


class Machine:
    """What runs, and what it holds of `capacity`: never more than that, unless `capacity` itself was lowered.

    Short jobs share one slot, SHORT_RUNS_MAX at most: what does them does one after the other.
    """

    def __init__(self) -> None:
        self.capacity = Amounts()
        self.used = Amounts()
        self._loaded = (self.used, self.capacity, 0)
        self._measured = (Amounts(), 1.0)
        self.changes = 0
        """Rises with every start and end and every new capacity."""
        self._runs: dict[bytes, _Run] = {}
        self._shorts: dict[bytes, Entry] = {}
        self._shorts_s = 0.0
        self._short_held = Amounts()

    def __len__(self) -> int:
        return len(self._runs) + len(self._shorts)

    def resize(self, capacity: Amounts) -> None:
        """There is more or less of it from now on; what runs goes on."""
        self.capacity = capacity
        self._measured = (Amounts(), 1.0)
        self.changes += 1

    @property
    def free(self) -> Amounts:
        """What nobody holds."""
        return self.capacity.minus(self.used)

    @property
    def taken_slots(self) -> int:
        """The machine's load in slots: of slots, processors and memory what is used most of; shorts count singly."""
        if self._loaded[0] is not self.used or self._loaded[1] is not self.capacity:
            slots = math.ceil(self.used.share_of(self.capacity, gpu=False) * self.capacity.slots)
            self._loaded = (self.used, self.capacity, slots)
        return max(self._loaded[2], len(self))

    def has_room(self) -> bool:
        """Whether anything at all might start."""
        return self.used.slots < self.capacity.slots or 0 < len(self._shorts) < limits.SHORT_RUNS_MAX

    def fits(self, entry: Entry) -> bool:
        """Whether it may start now."""
        if entry.short and 0 < len(self._shorts) < limits.SHORT_RUNS_MAX:
            return True
        return (not entry.short or not self._shorts) and entry.needs.within(self.free)

    def cost_s(self, entry: Entry, took_s: float | None = None) -> float:
        """Its work in slot-seconds: as estimated, or as it turned out."""
        time_s = entry.estimated_s if took_s is None else took_s
        return max(time_s if entry.short else time_s * self._slots(entry.needs), COST_MIN_S)

    def _slots(self, needs: Amounts) -> float:
        """The part of the machine that is set aside for it, in slots."""
        known, slots = self._measured
        if known is not needs:
            slots = max(1.0, needs.share_of(self.capacity) * self.capacity.slots)
            self._measured = (needs, slots)
        return slots

    def start(self, entry: Entry, now_ms: int) -> tuple[int, ...]:
        """It runs from now on; the numbers of the GPUs that are its own."""
        assert self.fits(entry), "a worker never runs more than it declared"
        self.changes += 1
        if entry.short:
            if not self._shorts:
                self._short_held = entry.needs
                self.used = self.used.plus(entry.needs)
            self._shorts[entry.job] = entry
            self._shorts_s += entry.estimated_s
            return ()
        gpus: tuple[int, ...] = ()
        if entry.needs.gpu:
            taken = {number for run in self._runs.values() for number in run.gpus}
            gpus = tuple(islice((n for n in range(self.capacity.gpu) if n not in taken), entry.needs.gpu))
        self.used = self.used.plus(entry.needs)
        self._runs[entry.job] = _Run(entry, entry.needs, now_ms, gpus, self._slots(entry.needs))
        return gpus

    def end(self, job: bytes) -> Entry | None:
        """It runs no longer."""
        self.changes += 1
        short = self._shorts.pop(job, None)
        if short is not None:
            self._shorts_s -= short.estimated_s
            if not self._shorts:
                self._shorts_s = 0.0
                self.used = self.used.minus(self._short_held)
            return short
        run = self._runs.pop(job, None)
        if run is None:
            return None
        self.used = self.used.minus(run.held)
        return run.entry

    def work_s(self, now_ms: int) -> float:
        """Slot-seconds until all that runs has ended, by the estimates."""
        return self._shorts_s + sum([run.remaining_s(now_ms) * run.slots for run in self._runs.values()])

    def opening(self, needs: Amounts, now_ms: int) -> tuple[int, Amounts]:
        """When so much should be free, by the estimates, and what would then be free besides."""
        free, at_ms = self.free, now_ms
        if needs.within(free):
            return now_ms, free.minus(needs)
        ends: list[tuple[int, Amounts]] = [
            (now_ms + round(1000 * run.remaining_s(now_ms)), run.held) for run in self._runs.values()
        ]
        if self._shorts:
            ends.append((now_ms + round(1000 * self._shorts_s), self._short_held))
        for ends_ms, held in sorted(ends, key=lambda end: end[0]):
            free, at_ms = free.plus(held), ends_ms
            if needs.within(free):
                break
        return at_ms, free.minus(needs)
