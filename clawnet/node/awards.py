"""After the auction: award, lock, accept, reject, waiver, reassignment. The requester's side of an attempt."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clawnet import limits
from clawnet.errors import ClawnetError, ExecutorLostError, RemoteError
from clawnet.identity.keys import verify
from clawnet.ledger import statements
from clawnet.market import usage
from clawnet.market.auction import BidFacts
from clawnet.market.reasons import PASSING
from clawnet.market.records import FINAL_STATES, Attempt, Task
from clawnet.money import format_credits
from clawnet.node.context import Context, held_as, job_id
from clawnet.reputation.receipts import outcome_of_waiver
from clawnet.wire.events import MessageIn
from clawnet.wire.messages import (
    Accept,
    Ack,
    Cancel,
    EscrowLock,
    Kind,
    Output,
    Progress,
    Reject,
    Result,
    Waiver,
    Winner,
)
from clawnet.wire.verdict import CONTRACT

if TYPE_CHECKING:
    from clawnet.node.kernel import Rooms

TEN_S_MS = 10_000
RUNNING = ("awarded", "locked", "accepted")
WAIVABLE = (*RUNNING, "unpaid")
TRANSIENT = PASSING | {"no_bid", "exposure"}
"""Words of a REJECT after which the same executor may be asked again: its state of the moment stood in the way."""
GONE = frozenset(("restarted", "draining"))
"""Words of a WAIVER or REJECT that say nothing of the task, only that its executor could not go on."""
REJECTS_TAKEN = 3
"""An executor that bids and then says so often that it has no room comes behind all others, as those that were lost."""


def about(task_id: bytes, n: int) -> bytes:
    """The outbox's name of an attempt."""
    return task_id + n.to_bytes(4, "big")


def note_cost(attempt: Attempt, told: Result | Waiver, now_ms: int) -> None:
    """What the run cost, as far as that can be."""
    cost = usage.Cost(told.duration_s, told.cpu_s, told.memory_bytes_max, told.output_bytes)
    cost = usage.believed(cost, (now_ms - attempt.awarded_ms) / 1000)
    attempt.duration_s, attempt.cpu_s = cost.duration_s, cost.cpu_s
    attempt.memory_bytes_max, attempt.output_bytes = cost.memory_bytes_max, cost.output_bytes


class Awards:
    """Attempts of open tasks. An attempt is closed when nothing is owed in either direction."""

    def __init__(self, ctx: Context, rooms: Rooms) -> None:
        self._ctx = ctx
        self._rooms = rooms
        rooms.outbox.register(Kind.MARKET_WINNER, self._rebuild_winner)
        rooms.outbox.register(Kind.MARKET_ESCROW_LOCK, self._rebuild_lock)
        self.documents: dict[bytes, bytes] = {}
        self._by_line: dict[tuple[int, int], tuple[Task, Attempt]] = {}

    # --- award

    def award(self, task: Task, bid: BidFacts) -> None:
        """Gives the task to this bidder: a lock first where there is a price, then the document."""
        ctx, rooms = self._ctx, self._rooms
        peer = rooms.members.get(bid.peer)
        ring = "self" if bid.peer == ctx.me else peer.ring if peer else "member"
        free = ring in ("self", "own")
        attempt = Attempt(
            n=len(task.attempts),
            peer=bid.peer,
            account=rooms.members.account_of(bid.peer),
            ring=ring,
            price_ucr=0 if free else max(1, bid.price_ucr),
            estimated_s=bid.estimated_s,
            confidence=bid.confidence_claimed,
            awarded_ms=ctx.now,
            heard_ms=ctx.now,
        )
        latest_ms = ctx.now + rooms.books.terms.lock_max_ms - rooms.books.terms.margin_ms - TEN_S_MS
        attempt.deliver_by_ms = min(-(-task.deadline_ms // TEN_S_MS) * TEN_S_MS, latest_ms)
        attempt.expiry_ms = attempt.deliver_by_ms + rooms.books.terms.margin_ms
        task.attempts.append(attempt)
        price = format_credits(attempt.price_ucr)
        rooms.tasks.move(task, "awarded", f"{rooms.members.name_of(bid.peer)} for {price} credits")
        rooms.tasks.followers.begin(task, attempt)
        for item in task.inputs:
            ctx.lend(job_id(ctx.me, task.task_id, attempt.n), bid.peer, item["blob"])
        if free:
            self._send_award(task, attempt)
        else:
            rooms.books.locks.ask(task, attempt)

    def locked(self, task: Task, attempt: Attempt, known_seq: int) -> None:
        """The line is in the own chain, in this turn's transaction: the document may leave."""
        attempt.state, attempt.escrow, attempt.known_seq = "locked", "locked", known_seq
        attempt.heard_ms = self._ctx.now
        self._rooms.history.about(attempt.lock_seq, task.task_id, attempt.n, attempt.price_ucr)
        self._by_line[(attempt.lock_seq, attempt.line)] = (task, attempt)
        self._send_award(task, attempt)

    def lock_failed(self, task: Task, attempt: Attempt, error: ClawnetError) -> None:
        """No lock could be written (funds, open lines, read-only chain): the task ends with that error."""
        self.close(task, attempt, "unfunded", error.message)
        attempt.paying = False
        self._rooms.tasks.touch(task)
        self._rooms.tasks.finish(task, "failed", error)

    def no_line(self, task: Task, attempt: Attempt) -> None:
        """The limit of open lines is reached: the auction is held again when some have ended."""
        self.close(task, attempt, "unfunded", "open lines")
        attempt.paying = False
        task.attempts.remove(attempt)  # nothing was said of it
        self._rooms.tasks.move(task, "reassigned", "the limit of open escrow lines is reached")
        self._rooms.auctions.pause(task)

    def key_shown(self, lock_seq: int, line: int, key: bytes) -> None:
        """A claim in the executor's valid chain shows the key of this line's release."""
        found = self._by_line.get((lock_seq, line))
        if found is not None:
            self._rooms.results.claimed(*found, key)

    def pulled(self, peer: str) -> None:
        """A worker audits this chain before it answers: it has a little longer for that (LEDGER.md section 6)."""
        for task, attempt in list(self._by_line.values()):
            if attempt.peer == peer and attempt.state == "locked":
                attempt.heard_ms = self._ctx.now
                self._rooms.leases.arm(task)

    def knows(self, lock_seq: int, line: int) -> bool:
        """Whether an open attempt stands behind this own line."""
        return (lock_seq, line) in self._by_line

    def of_line(self, lock_seq: int, line: int) -> tuple[Task, Attempt] | None:
        """The open attempt behind this own line."""
        return self._by_line.get((lock_seq, line))

    def _send_award(self, task: Task, attempt: Attempt) -> None:
        rooms = self._rooms
        rooms.outbox.oblige(attempt.peer, self._winner(task, attempt), about(task.task_id, attempt.n))
        if attempt.lock_seq >= 0:
            rooms.outbox.oblige(attempt.peer, self._lock(task, attempt, again=False), about(task.task_id, attempt.n))
        self.remembered(task, attempt)
        rooms.tasks.touch(task)
        self._rooms.leases.arm(task)

    def remembered(self, task: Task, attempt: Attempt) -> None:
        """Who has, or had, what may run once only is not forgotten when the power fails: nobody else may get it then.

        This node itself loses what it began together with what it knows of it.
        """
        if task.spec["retries"] == 0 and attempt.peer != self._ctx.me:
            self._ctx.durable()

    def _winner(self, task: Task, attempt: Attempt) -> Winner:
        return Winner(
            task_id=task.task_id,
            attempt=attempt.n,
            document=self.documents[task.task_id],
            price_ucr=attempt.price_ucr,
            deadline_ms=task.deadline_ms,
            deliver_by_ms=attempt.deliver_by_ms,
            stream_output=task.spec["stream"],
            locked=attempt.lock_seq >= 0,
            description="",
        )

    def _lock(self, task: Task, attempt: Attempt, *, again: bool) -> EscrowLock:
        """The first of a lock's messages to a peer carries its entry; the others only name it."""
        return EscrowLock(
            task_id=task.task_id,
            attempt=attempt.n,
            lock_seq=attempt.lock_seq,
            lock_hash=attempt.lock_hash,
            line=attempt.line,
            entries=self._rooms.books.shipping.segment(attempt.peer, attempt.known_seq, attempt.lock_seq, again=again),
        )

    def of_about(self, name: bytes) -> tuple[Task, Attempt] | None:
        task = self._rooms.tasks.open.get(name[:16])
        n = int.from_bytes(name[16:], "big")
        return (task, task.attempts[n]) if task is not None and n < len(task.attempts) else None

    def _rebuild_winner(self, name: bytes) -> Winner | None:
        found = self.of_about(name)
        if found is None or found[1].state not in ("awarded", "locked") or name[:16] not in self.documents:
            return None
        return self._winner(*found)

    def _rebuild_lock(self, name: bytes) -> EscrowLock | None:
        found = self.of_about(name)
        return self._lock(*found, again=True) if found is not None and found[1].state == "locked" else None

    def find(self, event: MessageIn, task_id: bytes, n: int) -> tuple[Task, Attempt] | None:
        task = self._rooms.tasks.open.get(task_id)
        if task is None or n >= len(task.attempts) or task.attempts[n].peer != event.peer:
            return None
        return task, task.attempts[n]

    # --- answers of the executor

    def accept(self, event: MessageIn, message: Accept) -> None:
        """The executor has durably taken it."""
        self._rooms.outbox.settle(Kind.MARKET_WINNER, event.peer, about(message.task_id, message.attempt))
        self._rooms.outbox.settle(Kind.MARKET_ESCROW_LOCK, event.peer, about(message.task_id, message.attempt))
        found = self.find(event, message.task_id, message.attempt)
        if found is None or found[1].state not in ("awarded", "locked"):
            return
        task, attempt = found
        attempt.state, attempt.accepted_ms, attempt.heard_ms = "accepted", self._ctx.now, self._ctx.now
        if attempt.paying and task.state == "awarded":
            self._rooms.tasks.move(task, "executing", "accepted")
        self._rooms.tasks.touch(task)
        self._rooms.leases.arm(task)
        self._rooms.tasks.followers.accepted(task)

    def reject(self, event: MessageIn, message: Reject) -> None:
        """Durably not started: the line comes back, and the slot may move whatever the retries say."""
        self.acknowledge(event)
        self._rooms.outbox.settle(Kind.MARKET_WINNER, event.peer, about(message.task_id, message.attempt))
        self._rooms.outbox.settle(Kind.MARKET_ESCROW_LOCK, event.peer, about(message.task_id, message.attempt))
        found = self.find(event, message.task_id, message.attempt)
        if found is None or found[1].state not in RUNNING:
            return
        task, attempt = found
        self._rooms.outbox.settle(Kind.TASK_CANCEL, event.peer, about(message.task_id, message.attempt))
        attempt.state, attempt.reason = "rejected", message.reason
        self.remembered(task, attempt)
        self._give_back(task, attempt, message.waiver)
        if attempt.paying:
            why = f"rejected: {message.reason} {message.text}".strip()
            refusals = sum(one.peer == attempt.peer and one.state == "rejected" for one in task.attempts)
            later = message.reason in TRANSIENT and refusals < REJECTS_TAKEN
            attempt.lost = not later and (message.reason in TRANSIENT or message.reason in GONE)
            self.move_slot(task, attempt, why, free=True, later=later)

    def progress(self, event: MessageIn, message: Progress) -> None:
        """The attempt lives."""
        found = self.find(event, message.task_id, message.attempt)
        if found is None:
            return
        task, attempt = found
        if attempt.state in ("awarded", "locked"):
            self.accept(event, Accept(message.task_id, message.attempt))
        self._rooms.leases.heard(task, attempt)
        if attempt.paying and attempt.state in RUNNING and task.state not in FINAL_STATES:
            self._rooms.tasks.followers.progress(task, message)

    def output(self, event: MessageIn, message: Output) -> None:
        """A preview of the output, from rings own and member only (LEDGER.md: preview)."""
        found = self.find(event, message.task_id, message.attempt)
        if found is None or not found[1].paying or found[1].state not in RUNNING or found[0].state in FINAL_STATES:
            return
        found[1].heard_ms = self._ctx.now
        self._rooms.tasks.followers.output(found[0], message)

    def waiver(self, event: MessageIn, message: Waiver) -> None:
        """The attempt ends without a result: the line comes back; with retries left the slot moves."""
        self.acknowledge(event)
        found = self.find(event, message.task_id, message.attempt)
        if found is None or found[1].state not in WAIVABLE:
            return
        task, attempt = found
        self._rooms.outbox.settle(Kind.TASK_CANCEL, event.peer, about(message.task_id, message.attempt))
        attempt.state, attempt.reason = "waived", attempt.reason or message.reason
        note_cost(attempt, message, self._ctx.now)
        attempt.lost = attempt.lost or message.reason in GONE
        self.remembered(task, attempt)
        self._give_back(task, attempt, message.waiver)
        if task.state in FINAL_STATES or not attempt.paying:
            return
        if message.reason == CONTRACT:
            self._rooms.verdicts.sent_back(task, attempt, message.report)
            return
        self._rooms.members.receipt(attempt, outcome_of_waiver(message.reason), task)
        text = message.report.decode("utf-8", "replace")
        self.move_slot(task, attempt, f"{message.reason}: {text}" if text else message.reason)

    def acknowledge(self, event: MessageIn) -> None:
        if event.obligation is not None:
            self._ctx.send(event.peer, Ack(event.obligation), event.id)

    def _give_back(self, task: Task, attempt: Attempt, waiver: bytes) -> None:
        """A refund by waiver; without a valid one the line waits for its expiry."""
        self._rooms.tasks.touch(task)
        if attempt.lock_seq < 0:
            self.close(task, attempt, attempt.state, attempt.reason)
            return
        try:
            terms = statements.Waiver.verified_by_any(waiver, self._rooms.books.keys_of(attempt.account), verify)
        except RemoteError as error:
            self._ctx.log("security", "waiver.refused", peer=attempt.peer, reason=error.message)
            return
        if (terms.lock_hash, terms.line, terms.after_part) == (attempt.lock_hash, attempt.line, 0):
            attempt.waiver = waiver
            self._rooms.books.refund(task, attempt, waiver)

    # --- ends

    def close(self, task: Task, attempt: Attempt, state: str, reason: str = "") -> None:
        """Nothing is owed any longer in either direction."""
        attempt.state, attempt.closed = state, True
        if attempt.accepted_ms:
            self._rooms.auctions.attempt_ended(task)
        attempt.ended_ms = attempt.ended_ms or self._ctx.now
        self._by_line.pop((attempt.lock_seq, attempt.line), None)
        self._rooms.results.forget(task, attempt)
        if task.inputs:
            self._ctx.let_go(job_id(self._ctx.me, task.task_id, attempt.n))
        for kind in (Kind.MARKET_WINNER, Kind.MARKET_ESCROW_LOCK, Kind.TASK_CANCEL):
            self._rooms.outbox.settle(kind, attempt.peer, about(task.task_id, attempt.n))
        attempt.reason = attempt.reason or reason

    def refunded(self, task: Task, attempt: Attempt, seq: int = -1) -> None:
        """The line is closed in the own chain, by its entry `seq` where that is known."""
        if seq >= 0:
            left_ucr = attempt.price_ucr - (attempt.released_ucr if attempt.released_seq >= 0 else 0)
            self._rooms.history.about(seq, task.task_id, attempt.n, left_ucr)
        if not attempt.refunded:
            self._rooms.spending.unlocked(task, attempt)
        attempt.refunded = True
        if attempt.state in ("released", "claimed", "done"):
            return
        attempt.escrow = "refunded"
        state = attempt.state if attempt.state in ("rejected", "waived") else "refunded"
        self.close(task, attempt, state, "delivered nothing in time")
        if attempt.paying and task.state in ("awarded", "executing"):
            error = ExecutorLostError(f"{attempt.peer[-8:]} delivered nothing in time")
            self._rooms.tasks.finish(task, "failed", error)
        self._rooms.tasks.touch(task)

    def cancel(self, task: Task, reason: str) -> None:
        """Tells the executor of the running attempt to stop (an obligation: it is told until it answers)."""
        for attempt in task.attempts:
            if attempt.closed or attempt.state not in RUNNING:
                continue
            name = about(task.task_id, attempt.n)
            self._rooms.outbox.oblige(attempt.peer, Cancel(task.task_id, attempt.n, reason[:200]), name)

    def task_final(self, task: Task) -> None:
        """Nothing more is fetched for the task once its attempts are closed."""
        self.documents.pop(task.task_id, None)
        self._rooms.verdicts.task_final(task)
        if task.inputs:
            self._ctx.let_go(held_as(task.task_id, "inputs"))
        self._rooms.leases.arm(task)

    def move_slot(self, task: Task, attempt: Attempt, why: str, *, free: bool = False, later: bool = False) -> None:
        """The paying slot leaves this attempt; a new auction where the retries allow, else the task has failed.

        `free`: it costs no retry. `later`: the executor may take it yet, so it is asked again after a pause.
        """
        attempt.paying = False
        attempt.ended_ms, attempt.reason = attempt.ended_ms or self._ctx.now, attempt.reason or why
        if not later:
            task.refused.append(attempt.peer)
        self._rooms.tasks.touch(task)
        if task.state in FINAL_STATES:
            return
        task.shown_lost = False
        task.error_code = task.error_text = task.error_hint = ""
        if not free:
            if task.retries_left <= 0:
                self._rooms.tasks.finish(task, "failed", self._rooms.verdicts.given_up(task, attempt, why))
                return
            task.retries_left -= 1
        if len(task.attempts) >= limits.ATTEMPTS_MAX:
            self._rooms.tasks.finish(task, "failed", ExecutorLostError(f"{limits.ATTEMPTS_MAX} attempts failed: {why}"))
            return
        self._rooms.tasks.move(task, "reassigned", why)
        if later:
            self._rooms.auctions.later(task)
        else:
            self._rooms.auctions.queue(task)

    # --- timers

    def resume(self, task: Task) -> None:
        """After a restart: goes on where the rows say the attempts were."""
        for attempt in task.attempts:
            if attempt.closed:
                continue
            attempt.heard_ms = self._ctx.now
            if attempt.lock_seq >= 0:
                self._by_line[(attempt.lock_seq, attempt.line)] = (task, attempt)
            if attempt.state == "fetching":
                self._rooms.results.fetch(task, attempt)
            elif attempt.state == "delivering":
                self._rooms.results.stored(task, attempt, b"")
            elif attempt.state == "claimed":
                self._rooms.results.open(task, attempt)
            elif attempt.state in ("rejected", "waived") and attempt.waiver and not attempt.refunded:
                self._rooms.books.refund(task, attempt, attempt.waiver)
            elif attempt.state == "awarded" and attempt.price_ucr and attempt.lock_seq < 0:
                self._never_locked(task, attempt)
        self._rooms.leases.arm(task)

    def _never_locked(self, task: Task, attempt: Attempt) -> None:
        """The node stopped while its wallet could not be written: nothing was said, the auction is held again."""
        self.close(task, attempt, "unfunded", "stopped before the lock was written")
        attempt.paying = False
        self._rooms.tasks.touch(task)
        if task.state not in FINAL_STATES:
            self._rooms.tasks.move(task, "reassigned", attempt.reason)
            self._rooms.auctions.queue(task)
