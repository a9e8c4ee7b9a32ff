"""How long an attempt may be silent, undelivered, unopened: one timer a task, and what follows when it fires."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clawnet import limits
from clawnet.errors import ExecutorLostError, TimedOutError
from clawnet.market.records import FINAL_STATES, Attempt, Task
from clawnet.node.approvals import is_held
from clawnet.node.context import Context
from clawnet.reputation.receipts import Outcome
from clawnet.wire.messages import LedgerPull

if TYPE_CHECKING:
    from clawnet.node.kernel import Rooms

KEY_PULLS_MS = (5_000, 30_000, 300_000)
HOUR_MS = 3_600_000
AGAIN_MS = 5_000


class Leases:
    """The timers of LEDGER.md section 8 on the requester's side."""

    def __init__(self, ctx: Context, rooms: Rooms) -> None:
        self._ctx = ctx
        self._rooms = rooms

    def arm(self, task: Task) -> None:
        """One timer a task, at the earliest thing that could be due."""
        if is_held(task):
            self._ctx.wake(("task", task.task_id), task.held_until_ms)
            return
        first_ms = 0
        if task.state not in FINAL_STATES and not task.shown_lost and task.state not in ("delivered", "verified"):
            first_ms = task.deadline_ms
        for attempt in task.attempts:
            if not attempt.closed:
                due_ms = self._due_ms(task, attempt)
                if due_ms and (due_ms < first_ms or not first_ms):
                    first_ms = due_ms
        if first_ms:
            self._ctx.wake(("task", task.task_id), max(first_ms, self._ctx.now + 1))

    def heard(self, task: Task, attempt: Attempt) -> None:
        """A sign of life: the lease begins again, also of an executor that was given up for lost."""
        attempt.heard_ms = self._ctx.now
        if task.shown_lost and attempt.paying and task.state not in FINAL_STATES:
            task.shown_lost = False
            task.error_code = task.error_text = task.error_hint = ""
            self._rooms.tasks.touch(task)
        self.arm(task)

    def _due_ms(self, task: Task, attempt: Attempt) -> int:
        """When something is next to be done for an open attempt; 0 for never."""
        if attempt.state in ("claimed", "delivering"):
            return 0
        if attempt.state == "released":
            return attempt.delivered_ms + self._key_wait_ms(attempt)
        ends_ms = attempt.expiry_ms
        if attempt.refunded or self._ctx.now >= ends_ms:
            # The refund is asked for and waits for the wallet, or for its clock.
            ends_ms = self._ctx.now + AGAIN_MS
        if attempt.paying and task.state not in FINAL_STATES and not task.shown_lost:
            silent_ms = self._silent_ms(task, attempt)
            if silent_ms:
                return min(attempt.heard_ms + silent_ms, ends_ms)
        return ends_ms

    def _silent_ms(self, task: Task, attempt: Attempt) -> int:
        """How long nothing may be heard of an attempt in this state; 0: that does not matter.

        An executor that goes away with its result on the way is waited for where nobody else may do the task.
        """
        if attempt.state == "fetching":
            away = task.retries_left > 0 and not self._ctx.connected(attempt.peer)
            return limits.LEASE_S * 1000 if away else 0
        if attempt.state == "locked" or (attempt.state == "awarded" and not attempt.price_ucr):
            return limits.ACCEPT_TIMEOUT_MS
        return limits.LEASE_S * 1000 if attempt.state == "accepted" else 0

    def _key_wait_ms(self, attempt: Attempt) -> int:
        """LEDGER.md section 8: pull at 5 s, 30 s, 5 min, then hourly."""
        waited = self._ctx.now - attempt.delivered_ms
        for step in KEY_PULLS_MS:
            if waited < step:
                return step
        return (waited // HOUR_MS + 1) * HOUR_MS

    def timer(self, task: Task) -> None:
        """Something may be due: the end of a hold, deadline, accept, lease, key, expiry."""
        ctx = self._ctx
        if is_held(task):
            self._rooms.approvals.timer(task)
            self.arm(task)
            return
        if (
            task.state not in FINAL_STATES
            and ctx.now >= task.deadline_ms
            and task.state not in ("delivered", "verified")
            and not task.shown_lost
        ):
            self._deadline(task)
        for attempt in task.attempts:
            if attempt.closed or attempt.state in ("claimed", "delivering"):
                continue
            if attempt.state == "released":
                if ctx.now >= attempt.delivered_ms + KEY_PULLS_MS[0]:
                    self._pull_key(task, attempt)
            elif ctx.now >= attempt.expiry_ms:
                self._expired(task, attempt)
            elif attempt.paying and task.state not in FINAL_STATES and not task.shown_lost:
                self._silence(task, attempt)
        self.arm(task)

    def _expired(self, task: Task, attempt: Attempt) -> None:
        """The last moment has passed without a result: a line is refunded; without one the attempt just ends."""
        if attempt.lock_seq >= 0:
            if attempt.state == "fetching" and not attempt.lost and not self._ctx.connected(attempt.peer):
                attempt.lost = True
                self._rooms.members.receipt(attempt, Outcome.LOST, task)
            if not attempt.refunded:
                self._rooms.books.refund(task, attempt, None)
            return
        self._rooms.awards.close(task, attempt, "lost", "no word until its expiry")
        if task.state not in FINAL_STATES and attempt.paying:
            error = ExecutorLostError(f"{self._rooms.members.name_of(attempt.peer)} delivered nothing in time")
            self._rooms.tasks.finish(task, "failed", error)
        self._rooms.tasks.touch(task)

    def _deadline(self, task: Task) -> None:
        self._rooms.awards.cancel(task, "deadline")
        attempt = task.paying
        on_its_way = attempt is not None and attempt.state == "fetching" and attempt.delivered_ms <= task.deadline_ms
        if attempt is not None and not on_its_way:
            # Who delivered in time is judged by how the fetch ends: it may be this node that is slow, or full.
            self._rooms.members.receipt(attempt, Outcome.LATE, task)
        seconds = (task.deadline_ms - task.created_ms) / 1000
        text = f"no result within the deadline of {seconds:g} s"
        ended = [attempt for attempt in task.attempts if attempt.reason]
        if ended:
            text += f"; attempt {ended[-1].n + 1} had ended before: {ended[-1].reason}"
        if trouble := self._rooms.results.trouble(task):
            text += f"; the result is there and could not be fetched: {trouble}"
        elif on_its_way:
            text += "; the result is there and was still being fetched"
        error = TimedOutError(text, hint="allow more with --deadline")
        self._rooms.tasks.finish(task, "timed_out", error)

    def _silence(self, task: Task, attempt: Attempt) -> None:
        """No ACCEPT in time, or no progress within the lease (LEDGER.md section 6, reassignment)."""
        ctx = self._ctx
        limit_ms = self._silent_ms(task, attempt)
        attempt.heard_ms = min(attempt.heard_ms, ctx.now)  # the clock may have been set back
        if not limit_ms or ctx.now < attempt.heard_ms + limit_ms:
            return
        name = self._rooms.members.name_of(attempt.peer)
        if attempt.state == "fetching":
            attempt.lost = True
            self._rooms.results.withheld(task, attempt, f"{name} went away with its result")
            return
        self._rooms.members.receipt(attempt, Outcome.LOST, task)
        attempt.lost = True
        if task.spec["retries"] > 0 and task.retries_left > 0:
            self._rooms.awards.cancel(task, "lease ended")
            self._rooms.awards.move_slot(task, attempt, f"no word from {name} for {limit_ms // 1000} s")
            return
        if task.spec["retries"] > 0:
            self._rooms.awards.cancel(task, "lease ended")
            self._rooms.tasks.finish(task, "failed", ExecutorLostError(f"{name} was lost and no retry is left"))
            return
        until = max(attempt.deliver_by_ms, ctx.now)
        self._lost(task, attempt, until, name)

    def _lost(self, task: Task, attempt: Attempt, until_ms: int, name: str) -> None:
        """Retries 0: who waits is told; the slot stays, and a result that still comes is paid and shown."""
        task.shown_lost = True
        error = ExecutorLostError(
            f"no word from {name}; the command may still run there until {self._rooms.views.time(until_ms)}",
            hint="clawnet market wait TASK shows a result that still arrives",
        )
        task.error_code, task.error_text, task.error_hint = error.code, error.message, error.hint
        self._rooms.tasks.answer(task)
        self._rooms.tasks.touch(task)

    def _pull_key(self, task: Task, attempt: Attempt) -> None:
        ctx = self._ctx
        head = self._rooms.books.book.head(attempt.account)
        start = 0 if head is None else head[0] + 1
        ctx.send(attempt.peer, LedgerPull(attempt.account, start, 2**62))
        waited = ctx.now - attempt.delivered_ms
        if waited >= HOUR_MS and attempt.reason != "key withheld":
            attempt.reason = "key withheld"
            self._rooms.tasks.touch(task)
            self._rooms.members.receipt(attempt, Outcome.KEY_WITHHELD, task)
            if task.state not in FINAL_STATES:
                name = self._rooms.members.name_of(attempt.peer)
                error = ExecutorLostError(f"{name} was paid but withholds the key of the result")
                self._rooms.tasks.finish(task, "failed", error)
