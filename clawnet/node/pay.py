"""The executor's delivery and pay: note and sealed result, the claim that shows the key, and how a job ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clawnet.ledger.seal import derive_key
from clawnet.ledger.statements import Note, note_hash
from clawnet.ledger.statements import Waiver as WaiverStatement
from clawnet.market.records import Job
from clawnet.node.context import Context
from clawnet.reputation.receipts import Outcome
from clawnet.wire.blobid import blob_id
from clawnet.wire.events import TaskExited
from clawnet.wire.messages import Kind, Result

if TYPE_CHECKING:
    from clawnet.node.kernel import Rooms

PULLS_MS = (10_000, 60_000, 600_000, 3_600_000)


class Pay:
    """Which line pays which job, and the key that each claim shows."""

    def __init__(self, ctx: Context, rooms: Rooms, escrow_seed: bytes) -> None:
        self._ctx = ctx
        self._rooms = rooms
        self._seed = escrow_seed
        self._by_line: dict[tuple[bytes, int, int], tuple[bytes, bytes]] = {}
        self._lines: dict[tuple[bytes, int], bytes] = {}

    def deliver(self, job: Job, event: TaskExited, amount_ucr: int) -> None:
        """Note and sealed bundle are durable before TASK_RESULT leaves: the outbox row holds both."""
        ctx = self._ctx
        self._rooms.jobs.leave(job)
        blob = event.blob or blob_id(event.inline)
        job.blob, job.blob_bytes, job.inline = blob, event.blob_bytes or len(event.inline), bool(event.inline)
        job.amount_ucr = amount_ucr
        if job.lock_seq >= 0:
            note = Note(
                mesh=self._rooms.books.mesh,
                payer=job.account,
                lock_hash=job.lock_hash,
                line=job.line,
                part=1,
                amount_ucr=amount_ucr,
                ct_hash=job.blob,
                ct_bytes=job.blob_bytes,
                key_hash=job.key_hash,
                status=f"exit:{event.exit_code}" if event.exit_code is not None else f"signal:{event.signal}",
                plain_hash=None,
                time_ms=ctx.now,
            )
            job.note = note.signed(ctx.ports.sign)
            job.note_hash = note_hash(job.note)
            if amount_ucr < job.price_ucr:
                job.waiver = self.waiver(job.account, job.lock_hash, job.line, 1)
        job.state = "delivered"
        self._rooms.jobs.touch(job)
        if not event.inline:
            ctx.lend(job.job, job.peer, event.blob)
        message = Result(
            task_id=job.task_id,
            attempt=job.attempt,
            note=job.note,
            waiver=job.waiver,
            inline=event.inline,
            blob=job.blob,
            blob_bytes=job.blob_bytes,
            output_bytes=event.output_bytes,
            duration_s=event.duration_s,
            cpu_s=event.cpu_s,
            memory_bytes_max=event.memory_bytes_max,
        )
        self._rooms.outbox.oblige(job.peer, message, job.job)
        if job.lock_seq >= 0:
            ctx.durable()
            ctx.wake(("job", job.job), ctx.now + PULLS_MS[0])
        ctx.count("jobs_total", "delivered")

    def released(self, payer: bytes, lock_seq: int, line: int) -> Job | None:
        """The job that a release of this line pays."""
        bound = self._by_line.get((payer, lock_seq, line))
        return self._rooms.jobs.jobs.get(bound[0]) if bound is not None else None

    def key_of(self, job: Job) -> bytes:
        """The key `k` that the claim shows."""
        return derive_key(self._seed, self._rooms.books.mesh, job.account, job.lock_hash, job.line, 1)

    def paid(self, job: Job, seq: int) -> None:
        """The claim is in the own chain."""
        job.state, job.claimed_seq = "claimed", seq
        self._rooms.history.about(seq, job.task_id, job.attempt, job.amount_ucr)
        self._rooms.outbox.settle(Kind.TASK_RESULT, job.peer, job.job)
        self._rooms.jobs.touch(job)
        self._rooms.members.observe_requester(job.peer, Outcome.PAID)

    def underpaid(self, job: Job) -> None:
        """The release is for less, or for another key: the key stays hidden, the rest stays bound."""
        self._rooms.members.observe_requester(job.peer, Outcome.UNDERPAID)
        self._ctx.log("security", "release.underpaid", peer=job.peer, task=job.task_id.hex())
        self.forfeit(job, "underpaid")

    def acknowledged(self, job: Job) -> None:
        """The requester has what it paid for (ring own: it has the result)."""
        if job.state in ("claimed", "delivered"):
            job.state = "done"
            self._end(job)

    def result_acknowledged(self, identifier: bytes) -> None:
        """Ring own: the requester has the result, and nothing is owed."""
        job = self._rooms.jobs.jobs.get(identifier)
        if job is not None and job.lock_seq < 0:
            self.acknowledged(job)

    def line_ended(self, payer: bytes, lock_seq: int, line: int) -> None:
        """The payer refunded the line: what was delivered is not paid any more.

        Unless it was released before: then this is what was left of it, and the claim may not have been written yet.
        """
        job = self.released(payer, lock_seq, line)
        if job is not None and job.state == "delivered" and self._rooms.books.owes(payer, lock_seq, line):
            return
        self._unbind(payer, lock_seq, line)
        if job is None:
            return
        if job.state == "delivered":
            self._rooms.members.observe_requester(job.peer, Outcome.RECEIPT_REFUSED)
            self.forfeit(job, "refunded")
        elif job.state in ("fetching", "queued", "running"):
            self._rooms.jobs.stop(job)
            self.forfeit(job, "refunded")

    def forfeit(self, job: Job, reason: str) -> None:
        """Nothing will be paid for this job any more."""
        job.state, job.reason = "forfeited", reason
        self._end(job)

    def _end(self, job: Job) -> None:
        """The job needs nothing more: its row stays, the memory goes."""
        self._rooms.jobs.touch(job)
        if job.lock_seq >= 0:
            self._unbind(job.account, job.lock_seq, job.line)
        self._rooms.outbox.settle(Kind.TASK_RESULT, job.peer, job.job)
        self._rooms.taking.over(job.job)
        if not job.inline:
            self._ctx.let_go(job.job)

    def timer(self, job: Job) -> None:
        """Waiting for the release: pull the requester's chain at 10 s, 1 min, 10 min, then hourly."""
        if job.state != "delivered" or job.lock_seq < 0:
            return
        self._rooms.books.pull(job.peer, job.account)
        job.pulls += 1
        step = PULLS_MS[min(job.pulls, len(PULLS_MS) - 1)]
        self._ctx.wake(("job", job.job), self._ctx.now + step)

    def waiver(self, payer: bytes, lock_hash: bytes, line: int, after_part: int = 0) -> bytes:
        """The signed hand-back of a line, or of what is left of it after a part."""
        statement = WaiverStatement(self._rooms.books.mesh, payer, lock_hash, line, after_part)
        return statement.signed(self._ctx.ports.sign)

    def bind(self, job: Job) -> None:
        """From now on this line pays this job and no other."""
        self._by_line[(job.account, job.lock_seq, job.line)] = (job.job, job.lock_hash)
        self._lines[(job.lock_hash, job.line)] = job.job

    def _unbind(self, payer: bytes, lock_seq: int, line: int) -> None:
        bound = self._by_line.pop((payer, lock_seq, line), None)
        if bound is not None:
            self._lines.pop((bound[1], line), None)

    def task_of(self, lock_hash: bytes, line: int) -> str | None:
        """The id of the task that this line of somebody's lock pays here."""
        job = self._rooms.jobs.jobs.get(self._lines.get((lock_hash, line), b""))
        return None if job is None else job.task_id.hex()

    def bound(self, lock_hash: bytes, line: int) -> bool:
        """Whether a job of this node is worked or waited for on this line."""
        return (lock_hash, line) in self._lines
