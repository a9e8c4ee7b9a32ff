"""Awards that come in: document, lock and the chain behind it are checked, then it is ACCEPT or REJECT."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec import Struct

from clawnet import limits
from clawnet.errors import RemoteError, WireError
from clawnet.ledger import taskdoc
from clawnet.ledger.lockcheck import Expected, LockName, check_lock
from clawnet.market import taskspec
from clawnet.market.capability import AI
from clawnet.market.pricing import duration_keys
from clawnet.market.reasons import Reason
from clawnet.market.records import Job
from clawnet.node import saving
from clawnet.node.context import Context, job_id
from clawnet.node.verdicts import cannot_judge
from clawnet.wire.events import MessageIn
from clawnet.wire.messages import Accept, Ack, Cancel, EscrowLock, Reject, Requirements, Winner

if TYPE_CHECKING:
    from clawnet.node.kernel import Rooms

CANCELLED_KEPT_MAX: Final = 4_096
OVER_KEPT_MAX: Final = 65_536
WAITING_BYTES_MAX: Final = 64 * limits.MIB
WAITING_OF_PEER_MAX: Final = 256
WORD_CHARS_MAX: Final = 64


class Award(Struct):
    """An award that is not answered yet: its document, and the lock when it has come."""

    job: Job
    raw: bytes
    document: taskdoc.TaskDocument
    payload: dict[str, Any]
    lock: EscrowLock | None = None


class Taking:
    """Awards between their arrival and their answer, and those that are over or were cancelled before they came."""

    def __init__(self, ctx: Context, rooms: Rooms) -> None:
        self._ctx = ctx
        self._rooms = rooms
        self._waiting: OrderedDict[bytes, Award] = OrderedDict()
        self._waiting_bytes = 0
        self._waiting_of: dict[str, dict[bytes, int]] = {}
        self._cancelled: OrderedDict[bytes, None] = OrderedDict()
        self._over: OrderedDict[bytes, None] = OrderedDict()

    # --- what comes in

    def winner(self, event: MessageIn, message: Winner) -> None:
        """The document. In ring own that is all; otherwise the lock decides."""
        identifier = job_id(event.peer, message.task_id, message.attempt)
        if self._answered(event, identifier):
            return
        try:
            document = taskdoc.decode(message.document)
            payload = payload_of(document)
        except RemoteError as error:
            self._refuse(event.peer, message.task_id, message.attempt, "invalid", text=error.message)
            return
        award = Award(
            self._job(event.peer, identifier, message, document, payload), message.document, document, payload
        )
        if not message.locked:
            if award.job.ring != "own" or message.price_ucr:
                self._refuse(event.peer, message.task_id, message.attempt, Reason.POLICY.value, text="no lock")
            else:
                self._admit(award)
            return
        earlier = self._drop(identifier)
        if earlier is not None:
            award.lock = earlier.lock
        self._waiting[identifier] = award
        self._waiting_bytes += len(award.raw)
        mine = self._waiting_of.setdefault(event.peer, {})
        mine[identifier] = len(award.raw)
        if len(mine) > WAITING_OF_PEER_MAX:
            self._drop(next(iter(mine)))
        while len(self._waiting) > limits.QUEUED_OFFERS_MAX or self._waiting_bytes > WAITING_BYTES_MAX:
            # Whoever fills the room makes place: one that floods pushes out nobody but itself.
            most = max(self._waiting_of.values(), key=lambda held: sum(held.values()))
            self._drop(next(iter(most)))
        if award.lock is not None:
            self._check(award)

    def _job(
        self, peer: str, identifier: bytes, message: Winner, document: taskdoc.TaskDocument, payload: dict[str, Any]
    ) -> Job:
        members = self._rooms.members
        ring = members.ring_of(peer)
        return Job(
            job=identifier,
            peer=peer,
            account=members.account_of(peer),
            ring=ring,
            task_id=message.task_id,
            attempt=message.attempt,
            kind=taskspec.ALIASES.get(document.kind, document.kind),
            price_ucr=message.price_ucr,
            deadline_ms=message.deadline_ms,
            deliver_by_ms=message.deliver_by_ms,
            received_ms=self._ctx.now,
            task_hash=taskdoc.task_hash(message.document),
            stream_output=message.stream_output and ring in self._ctx.config.words("market.preview"),
            locked=message.locked,
            lease_s=document.lease_s,
            cpu=payload.get("cpu", 0),
            memory_bytes=payload.get("memory_bytes", 0),
            gpu=payload.get("gpu", 0),
            priority=payload.get("priority", 0),
        )

    def lock(self, event: MessageIn, message: EscrowLock) -> None:
        """The requester's entries up to the lock; what they refer to is pulled before the answer."""
        identifier = job_id(event.peer, message.task_id, message.attempt)
        if self._answered(event, identifier):
            return
        account = self._rooms.members.account_of(event.peer)
        award = self._waiting.get(identifier)
        if self._too_long(account, message):
            self._drop(identifier)
            reason, text = Reason.CANNOT_AUDIT.value, "ask an issuer to countersign a checkpoint"
            self._refuse(event.peer, message.task_id, message.attempt, reason, text=text, lock=message)
            return
        self._rooms.books.take(event.peer, message.entries)
        if identifier not in self._waiting and self._answered(event, identifier):
            return  # the entries let it be judged
        if award is None:
            if identifier in self._cancelled:
                self._refuse(event.peer, message.task_id, message.attempt, "cancelled", lock=message)
            return  # the document comes with the same batch or again from the outbox, and the lock with it
        award.lock = message
        self._check(award)

    def _too_long(self, account: bytes, message: EscrowLock) -> bool:
        """Whether more entries would have to be audited than this node audits before work (LEDGER.md section 10)."""
        books = self._rooms.books
        head = books.book.head(account)
        held = head[0] if head is not None else books.countersigns.offered_seq(account)
        return message.lock_seq - held > self._ctx.config.integer("ledger.audit_entries_max")

    def _answered(self, event: MessageIn, identifier: bytes) -> bool:
        """A repeated award: the answer is repeated, by us or by the outbox."""
        known = self._rooms.jobs.jobs.get(identifier)
        if known is not None:
            self._ctx.send(event.peer, Accept(known.task_id, known.attempt))
            return True
        return identifier in self._over

    def cancelled(self, event: MessageIn, message: Cancel) -> None:
        """A cancel of something that does not run here: what comes of that award later is refused."""
        identifier = job_id(event.peer, message.task_id, message.attempt)
        if identifier in self._over:
            if event.obligation is not None:
                self._ctx.send(event.peer, Ack(event.obligation), event.id)
            return
        self._cancelled[identifier] = None
        while len(self._cancelled) > CANCELLED_KEPT_MAX:
            self._cancelled.popitem(last=False)
        award = self._waiting.get(identifier)
        if award is not None and award.lock is not None:
            self._check(award)
        elif self._rooms.members.ring_of(event.peer) == "own":
            self._refuse(event.peer, message.task_id, message.attempt, "cancelled")

    def book_moved(self, account: bytes) -> None:
        """Entries of this account came in: awards that waited for them are judged now."""
        mine = self._waiting_of.get(self._rooms.members.peer_of(account) or "", {})
        for award in [self._waiting[identifier] for identifier in mine]:
            if award.lock is not None:
                self._check(award)

    def _drop(self, identifier: bytes) -> Award | None:
        award = self._waiting.pop(identifier, None)
        if award is not None:
            self._waiting_bytes -= len(award.raw)
            mine = self._waiting_of[award.job.peer]
            del mine[identifier]
            if not mine:
                del self._waiting_of[award.job.peer]
        return award

    # --- the worker's list

    def _check(self, award: Award) -> None:
        """LEDGER.md section 11, once the requester's chain is here up to the lock."""
        job, lock = award.job, award.lock
        assert lock is not None
        books = self._rooms.books
        head = books.book.head(job.account)
        if (head is None or head[0] < lock.lock_seq) and not books.dead(job.account):
            books.pull(job.peer, job.account)
            return  # judged when the missing entries have come
        job.lock_seq, job.lock_hash, job.line = lock.lock_seq, lock.lock_hash, lock.line
        expected = Expected(
            account=self._ctx.account,
            task=job.task_hash,
            bid_ucr=job.price_ucr,
            estimate_ms=int(self._estimate_s(award) * 1000),
            exposure_max_ucr=self._ctx.config.amount_ucr("ledger.exposure_max"),
            open_lines_max=books.terms.open_lines_max,
            banned=self._rooms.members.banned(job.peer),
            used=self._rooms.pay.bound(lock.lock_hash, lock.line),
        )
        name = LockName(job.account, lock.lock_seq, lock.lock_hash)
        verdict = check_lock(books.book, name, lock.line, expected, self._ctx.now)
        if verdict:
            self._ctx.log("warn", "lock.refused", peer=job.peer, reason=verdict)
            self._reject(award, verdict)
            return
        self._admit(award)

    def _estimate_s(self, award: Award) -> float:
        """How long such work takes here; it is promised, so the job remembers it."""
        job = award.job
        size = len(award.raw) + sum(item.bytes for item in award.document.inputs)
        words = [work] if (work := _work(award.payload)) else []
        keys = duration_keys(job.kind, Requirements(capabilities=words), size)
        job.duration_key = keys[0]
        job.estimated_s = self._rooms.bidding.durations.estimate(keys, job.kind).estimated_s
        return job.estimated_s

    def _admit(self, award: Award) -> None:
        """Accepts what is good and fits, durably, and fetches its inputs or queues it."""
        job, ctx = award.job, self._ctx
        reason = self._objection(award)
        if reason:
            self._reject(award, reason)
            return
        if job.lock_seq < 0:  # with a lock it was estimated when that was judged
            self._estimate_s(award)
        self._drop(job.job)
        self._rooms.bidding.promised.pop((job.peer, job.task_id), None)
        job.retries = 1 if job.kind != "shell" else 0
        if job.lock_seq >= 0:
            self._rooms.pay.bind(job)
        ctx.put("documents", job.job, award.raw)
        if job.kind == "shell":
            ctx.durable()  # what may not run twice is remembered even when the power fails
        ctx.send(job.peer, Accept(job.task_id, job.attempt))
        self._rooms.jobs.begin(job, award.document, award.payload)

    def _objection(self, award: Award) -> str:
        """Why an award with a good lock is still not taken; "" when it is."""
        job, ctx, card = award.job, self._ctx, self._rooms.cards.own
        if job.job in self._cancelled:
            return "cancelled"
        if ctx.draining:
            return Reason.DRAINING.value
        if job.kind not in ("shell", "compute", "prompt"):
            return Reason.NO_CAPABILITY.value
        if job.kind == "prompt" and AI not in card.capabilities:
            return Reason.NO_CAPABILITY.value
        if job.kind == "prompt" and job.ring not in card.prompt_rings:
            return Reason.POLICY.value
        if job.kind == "compute" and _work(award.payload) not in card.capabilities:
            return Reason.NO_CAPABILITY.value
        if job.kind == "shell" and job.ring not in card.shell_rings:
            return Reason.POLICY.value
        if job.lease_s < limits.LEASE_S:
            return Reason.POLICY.value
        if reason := cannot_judge(award.document, job.ring, card):
            return reason.value
        if job.lock_seq >= 0:
            promise = self._rooms.bidding.promised.get((job.peer, job.task_id))
            if promise is None or not promise.covers(job):
                return "no_bid"
        lacking = self._rooms.placing.lacking(job)
        if lacking is not None:
            return lacking.value
        if ctx.now >= min(job.deadline_ms, job.deliver_by_ms):
            return Reason.DEADLINE.value
        # Declared here for the first time: the offer may have told another size.
        size = sum(item.bytes for item in award.document.inputs)
        refusal = self._rooms.quotas.refusal(job.peer, job.ring, size)
        return refusal.value if refusal is not None else ""

    # --- refusing

    def _reject(self, award: Award, reason: str, text: str = "") -> None:
        self._drop(award.job.job)
        self._refuse(award.job.peer, award.job.task_id, award.job.attempt, reason, text=text, lock=award.lock)

    def _refuse(
        self, peer: str, task_id: bytes, attempt: int, reason: str, *, text: str = "", lock: EscrowLock | None = None
    ) -> None:
        """REJECT, with the waiver that frees the line; durable through the outbox.

        A line that another job of this node works for is not waived: a requester that names it twice gets nothing back.
        Nor is one refused that acknowledges nothing: its awards just lapse, and cost no rows.
        """
        if peer != self._ctx.me and self._rooms.outbox.owed(peer) >= limits.REFUSALS_OWED_MAX:
            self._ctx.count("messages_refused_total", "refusals_owed")
            return
        identifier = job_id(peer, task_id, attempt)
        waiver = b""
        if lock is not None and not self._rooms.pay.bound(lock.lock_hash, lock.line):
            waiver = self._rooms.pay.waiver(self._rooms.members.account_of(peer), lock.lock_hash, lock.line)
        self.over(identifier)
        self._rooms.outbox.oblige(peer, Reject(task_id, attempt, reason, text[:200], waiver), identifier)
        self._ctx.count("jobs_total", "rejected")

    def over(self, identifier: bytes) -> None:
        """This award is answered for good: when it comes again, nothing begins."""
        self._over[identifier] = None
        self._cancelled.pop(identifier, None)
        while len(self._over) > OVER_KEPT_MAX:
            self._over.popitem(last=False)


def _work(payload: dict[str, Any]) -> str:
    """The capability word of a compute task's work: an operation, or a WebAssembly module."""
    if payload.get("module"):
        return taskspec.WASM
    return f"op:{payload['op']}" if payload.get("op") else ""


def payload_of(document: taskdoc.TaskDocument) -> dict[str, Any]:
    """The work itself as its requester wrote it; raises WireError for what is none."""
    try:
        payload = msgspec.msgpack.decode(document.payload)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise WireError(f"not a payload: {error}") from error
    if not isinstance(payload, dict):
        raise WireError("not a payload: it is no map")
    operation = payload.get("op") or ""
    if not isinstance(operation, str) or len(operation) > WORD_CHARS_MAX:
        raise WireError("not a payload: its operation is no word")
    saving.check_outputs(payload)
    for name, (low, high) in taskspec.AMOUNTS.items():
        if type(payload.get(name, 0)) is not int or not low <= payload.get(name, 0) <= high:
            raise WireError(f"not a payload: its {name} is no number from {low} to {high}")
    return payload
