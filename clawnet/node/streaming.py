"""What running jobs write, told to their requesters: live while nothing is missing, and again from where one asks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct, field

from clawnet import limits
from clawnet.market.records import Job
from clawnet.node.context import Context, job_id
from clawnet.wire.events import MessageIn, OutputKept, ReadOutput, TaskOutput
from clawnet.wire.messages import Output, Progress

if TYPE_CHECKING:
    from clawnet.node.kernel import Rooms

RUN_STATES = ("fetching", "queued", "running")


class _Told(Struct):
    """How far a job's requester was told of each stream. Nothing of it outlives the run, which dies with this node."""

    wanted: bool
    written: list[int] = field(default_factory=lambda: [0, 0])
    sent: list[int] = field(default_factory=lambda: [0, 0])
    asked: dict[int, int] = field(default_factory=dict)
    reading: int = 0
    free_ms: int = 0


class Streaming:
    """The executor's side of a preview.

    What a run writes lies with the run. It is sent as it comes while the requester has been sent all before it; what
    was lost with a link, or was never sent, goes out when the requester asks, a bounded piece an ask and a bounded
    number of bytes a second.
    """

    def __init__(self, ctx: Context, rooms: Rooms) -> None:
        self._ctx = ctx
        self._rooms = rooms
        self._of: dict[bytes, _Told] = {}

    def allowed(self, job: Job) -> bool:
        """Whether the requester may see output before it has paid.

        A job that may start a second time here is not previewed: what its two starts wrote must not be mixed.
        """
        return job.retries == 0 and job.ring in self._ctx.config.words("market.preview")

    def begin(self, job: Job) -> None:
        """The run starts: its streams begin at byte 0."""
        earlier = self._of.get(job.job)
        self._of[job.job] = _Told(job.stream_output or (earlier is not None and earlier.wanted))

    def over(self, identifier: bytes) -> None:
        """The run has ended: its result, or its waiver, says the rest."""
        told = self._of.pop(identifier, None)
        if told is not None and told.asked:
            self._ctx.sleep(("output", identifier))

    def output(self, event: TaskOutput) -> None:
        """A run wrote something."""
        job, told = self._rooms.jobs.jobs.get(event.job), self._of.get(event.job)
        if job is None or told is None:
            return
        place = event.stream - 1
        told.written[place] = event.offset + len(event.data)
        live = told.wanted and told.sent[place] == event.offset
        if live and self.allowed(job) and self._ctx.connected(job.peer):
            self._ctx.send(job.peer, Output(job.task_id, job.attempt, event.stream, event.offset, event.data))
            told.sent[place] = told.written[place]

    def asked(self, event: MessageIn, message: Output) -> None:
        """The requester lacks what follows `offset` in a stream, and wants to be told of it from now on."""
        job = self._rooms.jobs.jobs.get(job_id(event.peer, message.task_id, message.attempt))
        if job is None or job.state not in RUN_STATES:
            return
        if self.allowed(job):
            told = self._of.setdefault(job.job, _Told(True))
            told.wanted = True
            if job.state == "running":
                told.asked[message.stream] = message.offset
                self._serve(job, told)
                return
        self._ctx.send(job.peer, self.progress(job))

    def timer(self, identifier: bytes) -> None:
        """The bytes of this second are sent: what was asked for since is served."""
        job, told = self._rooms.jobs.jobs.get(identifier), self._of.get(identifier)
        if job is not None and told is not None:
            self._serve(job, told)

    def _serve(self, job: Job, told: _Told) -> None:
        ctx = self._ctx
        if told.free_ms > ctx.now:
            ctx.wake(("output", job.job), told.free_ms)
            return
        served = bool(told.asked)
        for stream, offset in sorted(told.asked.items()):
            written = told.written[stream - 1]
            length = min(written - offset, limits.OUTPUT_RESENT_BYTES_MAX)
            if length > 0:
                told.reading += 1
                ctx.out.append(ReadOutput(job.job, stream, offset, length))
                told.free_ms = max(ctx.now, told.free_ms) + 1 + length * 1000 // limits.OUTPUT_RESENT_BYTES_PER_S
            else:
                told.sent[stream - 1] = written
        told.asked.clear()
        if served and not told.reading:
            ctx.send(job.peer, self.progress(job))

    def kept(self, event: OutputKept) -> None:
        """What was asked for is read: it goes out, and with it how much there is."""
        job, told = self._rooms.jobs.jobs.get(event.job), self._of.get(event.job)
        if job is None or told is None:
            return
        told.reading -= 1
        if not self._ctx.connected(job.peer):
            return
        for at in range(0, len(event.data), limits.OUTPUT_CHUNK_BYTES_MAX):
            piece = event.data[at : at + limits.OUTPUT_CHUNK_BYTES_MAX]
            self._ctx.send(job.peer, Output(job.task_id, job.attempt, event.stream, event.offset + at, piece))
        place = event.stream - 1
        told.sent[place] = max(told.sent[place], event.offset + len(event.data))
        if not told.reading:
            self._ctx.send(job.peer, self.progress(job))

    def progress(self, job: Job) -> Progress:
        """That the attempt lives, and how much it has written."""
        told = self._of.get(job.job)
        stdout_bytes, stderr_bytes = told.written if told is not None and self.allowed(job) else (0, 0)
        elapsed_s = max(0, self._ctx.now - job.received_ms) / 1000  # the clock may have been set back
        return Progress(job.task_id, job.attempt, job.state, elapsed_s, stdout_bytes, stderr_bytes)
