"""Places on this machine: which job has one, which waits for one, and how long another one would wait."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from clawnet import limits
from clawnet.market.machine import MILLI, Amounts, Entry, Machine
from clawnet.market.pricing import Workload, is_prompt
from clawnet.market.queueing import FairQueue
from clawnet.market.reasons import Reason
from clawnet.market.records import Job
from clawnet.node.context import Context
from clawnet.wire.messages import Requirements

if TYPE_CHECKING:
    from clawnet.node.kernel import Rooms
_NOTHING: Final = Requirements()


class _Line:
    """A machine with the queue before it."""

    def __init__(self) -> None:
        self.machine = Machine()
        self.queue = FairQueue()

    def pick(self, now_ms: int) -> tuple[bytes, tuple[int, ...]] | None:
        entry = self.queue.pick(self.machine, now_ms)
        return None if entry is None else (entry.job, self.machine.start(entry, now_ms))

    def end(self, job: bytes, duration_s: float) -> None:
        entry = self.machine.end(job)
        if entry is None:
            return
        self.queue.ended(entry, self.machine.cost_s(entry, duration_s))
        self.queue.rest()


class Placing:
    """Slots, processors, memory and GPUs of this machine, and the slots of its AI endpoint.

    Prompts use another machine's processor, or that of the endpoint: they have slots of their own and nothing else.
    """

    def __init__(self, ctx: Context, rooms: Rooms) -> None:
        self._ctx = ctx
        self._rooms = rooms
        self._here = _Line()
        self._endpoint = _Line()
        self._share = Amounts(1)
        """What is set aside for a task that asks for nothing: a slot's share of what there is."""
        self._queue_max = ctx.config.integer("execution.queue_max")

    @property
    def capacity(self) -> Amounts:
        """What this machine declares."""
        return self._here.machine.capacity

    def resize(self, capacity: Amounts) -> list[Job]:
        """What this machine has from now on. Returns waiting jobs that it will never have room for."""
        config = self._ctx.config
        prompts = Amounts(config.integer("execution.prompt_slots") if capacity.slots else 0)
        slots, most_bytes = max(capacity.slots, 1), config.integer("execution.memory_max")
        share_bytes = max(min(capacity.memory_bytes // slots, most_bytes), limits.RUN_MEMORY_BYTES_MIN)
        share = Amounts(1, capacity.cpu_milli // slots, share_bytes)
        self._endpoint.machine.resize(prompts)
        if capacity == self.capacity and share == self._share:
            return []
        self._here.machine.resize(capacity)
        self._share = share
        jobs = self._rooms.jobs.jobs
        waiting = [jobs[entry.job] for entry in self._here.queue if entry.job in jobs]
        for job in waiting:
            self._here.queue.discard(job.job)
            self.wait(job)
        return [job for job in waiting if not self.needs(job).within(capacity)] if capacity.slots else []

    # --- what a job needs

    def needs(self, job: Job) -> Amounts:
        """What is set aside for a job: what its task asks for, else a slot's share of what there is."""
        if is_prompt(job.kind):
            return Amounts(1)
        return self._amounts(job.cpu, job.memory_bytes, job.gpu)

    def _amounts(self, cpu: int, memory_bytes: int, gpu: int) -> Amounts:
        share = self._share
        if not (cpu or memory_bytes or gpu):
            return share
        bytes_max = max(memory_bytes, limits.RUN_MEMORY_BYTES_MIN) if memory_bytes else share.memory_bytes
        return Amounts(1, cpu * MILLI or share.cpu_milli, bytes_max, gpu)

    def memory_bytes_max(self, job: Job) -> int:
        """What its run may use: all that is set aside for it."""
        return self.needs(job).memory_bytes or self._ctx.config.integer("execution.memory_max")

    def lacking(self, job: Job) -> Reason | None:
        """What keeps this machine from taking the job on: of what it needs, or for want of a place."""
        needs, capacity = self.needs(job), self.capacity
        if needs is not self._share and not is_prompt(job.kind) and not needs.within(capacity):
            if needs.gpu > capacity.gpu:
                return Reason.NO_GPU
            return Reason.CPU if needs.cpu_milli > capacity.cpu_milli else Reason.MEMORY
        asked = job.cpu or job.memory_bytes or job.gpu
        requirements = Requirements(cpu=job.cpu, memory_bytes=job.memory_bytes, gpu=job.gpu) if asked else _NOTHING
        return Reason.FULL if self.workload(job.kind, job.peer, job.ring, requirements).is_full else None

    def _line(self, kind: str) -> _Line:
        return self._endpoint if is_prompt(kind) else self._here

    def _flow(self, peer: str, account: bytes, ring: str) -> bytes:
        """Whose job it is: all nodes of an owner are one requester."""
        members = self._rooms.members
        if ring == "own":
            return members.facts.owner
        record = members.records.get(peer)
        return record.owner if record is not None and record.owner else account

    # --- waiting and starting

    def expect(self, job: Job) -> None:
        """Its inputs are on their way; its place in line is kept."""
        self._line(job.kind).queue.expect(job.job, self._flow(job.peer, job.account, job.ring))

    def wait(self, job: Job) -> None:
        """The job waits for its turn."""
        line, needs = self._line(job.kind), self.needs(job)
        asked = job.cpu or job.memory_bytes or job.gpu
        entry = Entry(
            job=job.job,
            flow=self._flow(job.peer, job.account, job.ring),
            own=job.ring == "own",
            needs=needs,
            estimated_s=job.estimated_s,
            priority=job.priority,
            short=job.kind == "compute" and not asked and job.estimated_s <= limits.SHORT_RUN_S,
        )
        line.queue.push(entry, line.machine.cost_s(entry))

    def leave(self, job: Job) -> None:
        """The job waits no longer."""
        self._line(job.kind).queue.discard(job.job)

    def due(self) -> Iterator[tuple[bytes, tuple[int, ...]]]:
        """Jobs whose turn it is, one by one, each with the GPUs that are its own; it runs, or `end` is called."""
        for line in (self._endpoint, self._here):
            while (found := line.pick(self._ctx.now)) is not None:
                yield found

    def end(self, job: bytes, duration_s: float) -> None:
        """The job runs no longer: what it held is free, and what its time was not estimated at is made up for."""
        self._here.end(job, duration_s)
        self._endpoint.end(job, duration_s)

    # --- what bids say of it

    def workload(self, kind: str, peer: str, ring: str, requirements: Requirements) -> Workload:
        """What stands before one more task of this kind and this requester."""
        line, now_ms = self._line(kind), self._ctx.now
        machine, queue = line.machine, line.queue
        flow = self._flow(peer, self._rooms.members.account_of(peer), ring)
        slots, committed = machine.capacity.slots, machine.taken_slots + len(queue)
        if committed < slots and not requirements.cpu and not requirements.memory_bytes and not requirements.gpu:
            return Workload(slots, committed, queue_max=self._queue_max)
        needs = Amounts(1)
        if line is self._here:
            needs = self._amounts(requirements.cpu, requirements.memory_bytes, requirements.gpu)
        ahead_s, opens_ms = queue.ahead_s(flow, own=ring == "own"), now_ms
        if not ahead_s or needs is not self._share:
            opens_ms, _ = machine.opening(needs, now_ms)
        return Workload(
            slots,
            committed,
            machine.work_s(now_ms) + ahead_s if ahead_s else 0.0,
            self._queue_max,
            opens_s=(opens_ms - now_ms) / 1000,
            has_place=committed < slots or queue.has_place(flow, self._queue_max),
        )
