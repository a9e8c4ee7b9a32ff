"""The executor's side of an award: takes or refuses it, fetches its inputs, runs it within the slots, hands back."""

from __future__ import annotations

import hashlib
from collections import OrderedDict, deque
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct

from clawnet import limits
from clawnet.errors import RemoteError
from clawnet.ledger import taskdoc
from clawnet.ledger.entries import parse
from clawnet.ledger.lockcheck import Expected, check_lock
from clawnet.ledger.seal import content_key, key_hash
from clawnet.market import taskspec
from clawnet.market.pricing import Workload, duration_keys, price
from clawnet.market.reasons import Reason
from clawnet.market.records import Job, encode
from clawnet.node.context import Context
from clawnet.node.pay import PULLS_MS
from clawnet.wire.events import (
    BlobReady,
    Fetch,
    MessageIn,
    Run,
    StopRun,
    TaskExited,
    TaskOutput,
)
from clawnet.wire.jobspec import InputRef, JobSpec
from clawnet.wire.messages import (
    Accept,
    Ack,
    Cancel,
    EscrowLock,
    Output,
    Progress,
    Reject,
    Requirements,
    Waiver,
    Winner,
)

if TYPE_CHECKING:
    from clawnet.node.kernel import Rooms

ACTIVE = ("fetching", "queued", "running")
CANCELLED_KEPT_MAX = 4_096


def job_id(requester: str, task_id: bytes, attempt: int) -> bytes:
    """16 bytes: the executor's name of an award."""
    return hashlib.blake2b(requester.encode() + task_id + attempt.to_bytes(4, "big"), digest_size=16).digest()


class _Award(Struct):
    """An award that is not accepted yet: its document, and the lock when it has come."""

    job: Job
    document: bytes
    lock: EscrowLock | None = None


class Jobs:
    """Jobs by id; which run, which wait."""

    def __init__(self, ctx: Context, rooms: Rooms, os_family: str) -> None:
        self._ctx = ctx
        self._rooms = rooms
        self.os_family = os_family
        self.jobs: dict[bytes, Job] = {}
        self._awards: dict[bytes, _Award] = {}
        self.running: dict[bytes, None] = {}
        self.queue: deque[bytes] = deque()
        self.documents: dict[bytes, taskdoc.TaskDocument] = {}
        self._cancelled: OrderedDict[bytes, None] = OrderedDict()
        self._over: dict[bytes, None] = {}
        self._dirty: dict[bytes, Job] = {}
        self.slots = 0
        self._progress_armed = False

    # --- taking an award

    def winner(self, event: MessageIn, message: Winner) -> None:
        """The document. In ring own that is all; otherwise the lock decides."""
        ctx, rooms = self._ctx, self._rooms
        identifier = job_id(event.peer, message.task_id, message.attempt)
        if identifier in self._over:
            return  # refused or handed back already; the outbox repeats that answer
        known = self.jobs.get(identifier)
        if known is not None:
            self._again(event.peer, known)
            return
        ring = rooms.members.ring_of(event.peer)
        try:
            document = taskdoc.decode(message.document)
        except RemoteError as error:
            self._refuse(event.peer, message.task_id, message.attempt, "invalid", error.message)
            return
        job = Job(
            job=identifier,
            peer=event.peer,
            account=rooms.members.account_of(event.peer),
            ring=ring,
            task_id=message.task_id,
            attempt=message.attempt,
            kind=taskspec.ALIASES.get(document.kind, document.kind),
            price_ucr=message.price_ucr,
            deadline_ms=message.deadline_ms,
            deliver_by_ms=message.deliver_by_ms,
            received_ms=ctx.now,
            task_hash=taskdoc.task_hash(message.document),
            stream_output=message.stream_output and ring in ctx.config.words("market.preview"),
            locked=message.locked,
            lease_s=document.lease_s,
        )
        award = self._awards.get(identifier) or _Award(job, message.document)
        award.job, award.document = job, message.document
        self.documents[identifier] = document
        if not message.locked:
            if ring != "own" or message.price_ucr:
                self._refuse(event.peer, message.task_id, message.attempt, "policy", "no lock")
                return
            self._admit(award)
            return
        self._awards[identifier] = award
        if len(self._awards) > limits.QUEUED_OFFERS_MAX:
            self._awards.pop(next(iter(self._awards)))
        if award.lock is not None:
            self._check(award)

    def lock(self, event: MessageIn, message: EscrowLock) -> None:
        """The requester's entries up to the lock; what they refer to is pulled before the answer."""
        identifier = job_id(event.peer, message.task_id, message.attempt)
        known = self.jobs.get(identifier)
        if known is not None:
            self._again(event.peer, known)
            return
        self._rooms.books.take(event.peer, message.entries)
        award = self._awards.get(identifier)
        if award is None:
            return  # the document comes with the same batch or again from the outbox, and the lock with it
        award.lock = message
        self._check(award)

    def book_moved(self, account: bytes) -> None:
        """Entries of this account came in: awards that waited for them are judged now."""
        for award in [a for a in self._awards.values() if a.job.account == account and a.lock is not None]:
            self._check(award)

    def _check(self, award: _Award) -> None:
        job, lock = award.job, award.lock
        assert lock is not None
        books = self._rooms.books
        head = books.book.head(job.account)
        if head is None or head[0] < lock.lock_seq:
            if not books.dead(job.account):
                return  # entries are missing and being pulled; the requester repeats its award meanwhile
        lock_entry = next((raw for raw in lock.entries if parse(raw).hash == lock.lock_hash), None)
        if lock_entry is None:
            self._awards.pop(job.job, None)
            self._refuse(job.peer, job.task_id, job.attempt, "chain", "the lock is not among the entries sent")
            return
        job.lock_seq, job.lock_hash, job.line = lock.lock_seq, lock.lock_hash, lock.line
        expected = Expected(
            account=self._ctx.account,
            task=job.task_hash,
            bid_ucr=job.price_ucr,
            estimate_ms=int(job.estimated_s * 1000),
            exposure_max_ucr=self._ctx.config.amount_ucr("ledger.exposure_max"),
            open_lines_max=books.terms.open_lines_max,
            banned=self._rooms.members.banned(job.peer),
            used=(job.account, lock.lock_seq, lock.line) in self._rooms.pay.by_line,
        )
        verdict = check_lock(books.book, parse(lock_entry), lock.line, expected, self._ctx.now)
        self._awards.pop(job.job, None)
        if verdict:
            self._ctx.log("warn", "lock.refused", peer=job.peer, reason=verdict)
            self._refuse(job.peer, job.task_id, job.attempt, verdict, "", job)
            return
        self._admit(award)

    def _admit(self, award: _Award) -> None:
        """Accepts what is good and fits, durably, and fetches its inputs or queues it."""
        job, ctx = award.job, self._ctx
        document = self.documents[job.job]
        reason = self._objection(job, document)
        if reason:
            self._refuse(job.peer, job.task_id, job.attempt, reason, "", job)
            return
        requirements_size = len(award.document) + sum(item.bytes for item in document.inputs)
        payload = self._payload(document)
        job.duration_key = duration_keys(job.kind, self._requirements(payload), requirements_size)[0]
        estimate = self._rooms.bidding.durations.estimate(
            (job.duration_key, job.duration_key.rpartition("|")[0]), job.kind
        )
        job.estimated_s = estimate.estimated_s
        job.retries = 1 if job.kind != "shell" else 0
        self.jobs[job.job] = job
        if job.lock_seq >= 0:
            self._rooms.pay.by_line[(job.account, job.lock_seq, job.line)] = job.job
        ctx.put("documents", job.job, award.document)
        ctx.send(job.peer, Accept(job.task_id, job.attempt))
        self._start(job, document)

    @staticmethod
    def _requirements(payload: dict[str, Any]) -> Requirements:
        return Requirements(capabilities=[f"op:{payload['op']}"] if payload.get("op") else [])

    def _objection(self, job: Job, document: taskdoc.TaskDocument) -> str:
        """Why an award with a good lock is still not taken; "" when it is."""
        workload = self._rooms.bidding.workload()
        if job.job in self._cancelled:
            return "cancelled"
        if self._ctx.draining:
            return Reason.DRAINING.value
        if job.kind not in ("shell", "compute"):
            return Reason.NO_CAPABILITY.value
        if job.kind == "shell" and job.ring not in self._rooms.members.card.shell_rings:
            return Reason.POLICY.value
        if workload.committed >= workload.slots + workload.queue_max:
            return Reason.FULL.value
        if self._ctx.now >= min(job.deadline_ms, job.deliver_by_ms):
            return Reason.DEADLINE.value
        if sum(item.bytes for item in document.inputs) > limits.INPUT_BYTES_MAX:
            return Reason.TOO_LARGE.value
        return ""

    def _refuse(self, peer: str, task_id: bytes, attempt: int, reason: str, text: str, job: Job | None = None) -> None:
        """REJECT, with the waiver that frees the line; durable through the outbox."""
        identifier = job_id(peer, task_id, attempt)
        self._awards.pop(identifier, None)
        self.documents.pop(identifier, None)
        self._over[identifier] = None
        waiver = self._rooms.pay.waiver(job) if job is not None else b""
        self._rooms.outbox.oblige(peer, Reject(task_id, attempt, reason, text[:200], waiver), identifier)
        self._ctx.count("jobs_total", "rejected")

    def _again(self, peer: str, job: Job) -> None:
        """A repeated award: the answer is repeated."""
        self._ctx.send(peer, Accept(job.task_id, job.attempt))

    # --- running

    def _start(self, job: Job, document: taskdoc.TaskDocument) -> None:
        """Inputs first; then a slot."""
        job.state = "fetching" if document.inputs else "queued"
        self.touch(job)
        if not document.inputs:
            self.queue.append(job.job)
            return
        blobs = tuple((item.blob, item.bytes) for item in document.inputs)
        self._ctx.out.append(Fetch(b"inputs:" + job.job, job.peer, job.task_id, blobs))

    def inputs_fetched(self, event: BlobReady) -> None:
        """All inputs are here, or cannot be had."""
        job = self.jobs.get(event.request[len(b"inputs:") :])
        if job is None or job.state != "fetching":
            return
        if event.reason:
            self._give_up(job, "inputs", event.reason)
            return
        job.state = "queued"
        self.queue.append(job.job)
        self.touch(job)

    def pump(self) -> None:
        """At the end of a turn: starts queued jobs while a slot is free, in the order they came."""
        while self.queue and len(self.running) < self.slots:
            job = self.jobs.get(self.queue.popleft())
            if job is not None and job.state == "queued":
                self._run(job)

    def _payload(self, document: taskdoc.TaskDocument) -> dict[str, Any]:
        try:
            payload = msgspec.msgpack.decode(document.payload)
        except (ValueError, RecursionError):
            return {}  # a stranger's bytes: the run that follows refuses the empty job
        return payload if isinstance(payload, dict) else {}

    def _run(self, job: Job) -> None:
        ctx = self._ctx
        document = self.documents.get(job.job)
        left_s = (min(job.deadline_ms, job.deliver_by_ms) - ctx.now) / 1000
        if document is None or left_s <= 0:
            self._give_up(job, "deadline", "its deadline passed before a slot was free")
            return
        payload = self._payload(document)
        key = None
        if job.lock_seq >= 0:
            secret = self._rooms.pay.key_of(job)
            job.key_hash, key = key_hash(secret), content_key(secret, document.secret)
        try:
            spec = msgspec.convert(
                {
                    "job": job.job,
                    "kind": job.kind,
                    "ring": job.ring,
                    "argv": payload.get("argv"),
                    "script": payload.get("script"),
                    "op": payload.get("op") or "",
                    "op_args": payload.get("op_args") or {},
                    "env": payload.get("env") or {},
                    "inputs": [InputRef(i.name, i.kind, i.blob, i.bytes, i.mode) for i in document.inputs],
                    "stdin": payload.get("stdin"),
                    "cwd_input": payload.get("cwd") or "",
                    "seal_key": key,
                    "wall_s": min(left_s, ctx.config.seconds("execution.wall_max")),
                    "memory_bytes_max": ctx.config.integer("execution.memory_max"),
                    "output_bytes_max": min(ctx.config.integer("execution.output_max"), limits.RESULT_BYTES_MAX),
                },
                JobSpec,
            )
        except msgspec.ValidationError as error:
            self._give_up(job, "invalid", str(error))
            return
        job.state, job.started_ms, job.starts = "running", ctx.now, job.starts + 1
        self.running[job.job] = None
        self.touch(job)
        ctx.out.append(Run(job.job, spec))
        if not self._progress_armed:
            self._progress_armed = True
            ctx.wake(("progress",), ctx.now + limits.LEASE_S * 1000 // 3)

    def progress(self) -> None:
        """Every third of a lease: what is alive says so."""
        ctx = self._ctx
        active = [job for job in self.jobs.values() if job.state in ACTIVE]
        self._progress_armed = bool(active)
        for job in active:
            elapsed_s = (ctx.now - job.received_ms) / 1000
            ctx.send(job.peer, Progress(job.task_id, job.attempt, job.state, elapsed_s))
        if active:
            ctx.wake(("progress",), ctx.now + limits.LEASE_S * 1000 // 3)

    def output(self, event: TaskOutput) -> None:
        """A preview, to rings own and member."""
        job = self.jobs.get(event.job)
        if job is not None and job.stream_output:
            self._ctx.send(job.peer, Output(job.task_id, job.attempt, event.stream, event.offset, event.data))

    # --- the end of a run

    def exited(self, event: TaskExited) -> None:
        """Delivers the sealed bundle, or hands the line back with a report."""
        job = self.jobs.get(event.job)
        self.running.pop(event.job, None)
        if job is None or job.state != "running":
            return
        job.ended_ms, job.duration_s, job.cpu_s = self._ctx.now, event.duration_s, event.cpu_s
        job.memory_bytes_max, job.output_bytes = event.memory_bytes_max, event.output_bytes
        has_bundle = bool(event.inline) or event.blob_bytes > 0
        if event.ended == "exit" and has_bundle:
            rows, dropped = self._rooms.bidding.durations.learn(job.duration_key, event.duration_s, event.cpu_s)
            for name, body in rows:
                self._ctx.put("durations", name, body)
            for name in dropped:
                self._ctx.delete("durations", name)
            self._rooms.pay.deliver(job, event, job.price_ucr)
        elif job.cancelled and has_bundle and job.lock_seq >= 0:
            self._rooms.pay.deliver(
                job, event, min(job.price_ucr, price(self._rooms.bidding.rates, event.cpu_s, Workload(1)))
            )
        elif job.cancelled:
            self._give_up(job, "cancelled", event.reason)
        else:
            self._give_up(job, event.ended, event.reason)

    def _give_up(self, job: Job, reason: str, text: str) -> None:
        """No result: a waiver frees the line at once."""
        job.state, job.reason = "waived", reason
        self._over[job.job] = None
        self.documents.pop(job.job, None)
        message = Waiver(job.task_id, job.attempt, self._rooms.pay.waiver(job), reason, text.encode()[:2000])
        self._rooms.outbox.oblige(job.peer, message, job.job)
        self.touch(job)
        self._ctx.count("jobs_total", "waived")

    def cancel(self, event: MessageIn, message: Cancel) -> None:
        """Stops what runs; what was never started is refused when its award arrives."""
        identifier = job_id(event.peer, message.task_id, message.attempt)
        job = self.jobs.get(identifier)
        if job is None:
            self._cancelled[identifier] = None
            while len(self._cancelled) > CANCELLED_KEPT_MAX:
                self._cancelled.popitem(last=False)
            award = self._awards.get(identifier)
            if award is not None and award.lock is not None:
                self._check(award)
            return
        if job.state == "running":
            job.cancelled = True
            self._ctx.out.append(StopRun(job.job))
        elif job.state in ("fetching", "queued"):
            job.cancelled = True
            self._give_up(job, "cancelled", message.reason)
        elif event.obligation is not None:
            self._ctx.send(event.peer, Ack(event.obligation), event.id)

    def stop_for(self, account: bytes) -> None:
        """A fork is proven against this requester: nothing more runs for it."""
        for job in [job for job in self.jobs.values() if job.account == account and job.ring != "own"]:
            if job.state == "running":
                job.cancelled = True
                self._ctx.out.append(StopRun(job.job))
            elif job.state in ("fetching", "queued"):
                self._give_up(job, "not_trusted", "")

    # --- saving and loading

    def touch(self, job: Job) -> None:
        self._dirty[job.job] = job

    def flush(self) -> None:
        """Writes the rows of all jobs that changed in this turn; finished ones leave the memory."""
        for job in self._dirty.values():
            self._ctx.put("jobs", job.job, job.state, self._ctx.now, encode(job))
            if job.state in ("done", "rejected", "waived", "forfeited"):
                self.jobs.pop(job.job, None)
        self._dirty.clear()

    def load(self, job: Job, document: bytes | None) -> None:
        """Takes in an unfinished job at start-up."""
        self.jobs[job.job] = job
        if job.lock_seq >= 0:
            self._rooms.pay.by_line[(job.account, job.lock_seq, job.line)] = job.job
        if document is not None:
            self.documents[job.job] = taskdoc.decode(document)

    def resume(self) -> None:
        """After a restart (LEDGER.md section 9): rerun where a second start is allowed, else hand back; wait for pay."""
        for job in list(self.jobs.values()):
            if job.state == "running" and (job.retries == 0 or self._ctx.now >= job.deliver_by_ms):
                self._give_up(job, "restarted", "the executor was restarted while the task ran")
            elif job.state in ACTIVE and job.job in self.documents:
                self._start(job, self.documents[job.job])
            elif job.state in ACTIVE:
                self._give_up(job, "restarted", "its document is lost")
            elif job.state == "delivered" and job.lock_seq >= 0:
                self._ctx.wake(("job", job.job), self._ctx.now + PULLS_MS[0])

    def drain(self) -> bool:
        """Hands back what has not started; True when nothing runs any longer."""
        for job in [job for job in self.jobs.values() if job.state in ("fetching", "queued")]:
            self._give_up(job, "draining", "the executor is stopping")
        return not self.running

    def drain_now(self) -> None:
        """The drain timeout is over: what still runs is stopped and handed back."""
        for identifier in self.running:
            self._ctx.out.append(StopRun(identifier))

    def told(self, identifier: bytes) -> None:
        """The requester has our refusal or hand-back: it will not send that award again."""
        self._over.pop(identifier, None)

    def load_over(self, identifier: bytes) -> None:
        """At start-up: an award that was refused or handed back, and whose requester may not know it yet."""
        self._over[identifier] = None
