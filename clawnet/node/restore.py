"""The restore rule (LEDGER.md section 9): a chain that may be behind is not written before everybody has shown it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clawnet import limits
from clawnet.errors import ExecutorLostError, NotPermittedError
from clawnet.ledger.entries import Claim, EntryKind, Lock, Refund, Release
from clawnet.ledger.outcomes import Added
from clawnet.ledger.statements import note_hash
from clawnet.market.records import FINAL_STATES, Task
from clawnet.node.context import Context
from clawnet.node.shipping import CLAIM

if TYPE_CHECKING:
    from clawnet.node.books import Books
    from clawnet.node.kernel import Rooms

ANYBODY = ""
"""Awaited in place of a peer where keys were imported without their chain: whoever shows it first."""


class Restore:
    """Why the own chain is read-only, since when, and whose answers are missing. The rows `awaited` remember them."""

    def __init__(self, ctx: Context, rooms: Rooms, books: Books) -> None:
        self._ctx = ctx
        self._rooms = rooms
        self._books = books
        self.reason = ""
        self.since_ms = 0
        self.awaited: dict[str, None] = {}

    # --- from the disk

    def load_reason(self, reason: str) -> None:
        """The chain was read-only when the node ended."""
        self.reason = reason
        self.since_ms = self.since_ms or self._ctx.now

    def load_awaited(self, peer: str, since_ms: int) -> None:
        """A peer that had not answered then."""
        self.awaited[peer] = None
        self.since_ms = since_ms

    def start(self, stamp: str, stored: str) -> None:
        """At the start of the node: goes on where it stood, or begins where the database lies in another place."""
        if self.reason and not self.awaited:
            self._await_everybody()
            if not self.awaited:
                self._end()
        if stamp and stamp != stored:
            self._ctx.put("meta", "host", stamp.encode())
            if stored and not same_host(stored, stamp):
                self.begin("its database was copied or moved here from another place")

    # --- beginning and end

    def begin(self, reason: str) -> None:
        """Nothing is written until everybody known has told what it holds of this chain."""
        if not self.reason:
            self.reason, self.since_ms = reason, self._ctx.now
            self._ctx.put("meta", "restore", reason.encode())
            self._ctx.log("error", "ledger.restore", reason=reason)
            self._await_everybody()
            if not self.awaited:
                self._end()
        self._books.chains.reconsider()

    def begin_import(self) -> None:
        """The keys came from elsewhere and the chain did not: nothing is written before a peer has shown it."""
        if not self.reason:
            self._await(ANYBODY)
            self.begin("this identity was imported, and no peer has shown its chain yet")

    def _await_everybody(self) -> None:
        for record in self._rooms.members.records.values():
            if record.last_ms and not record.banned and not record.ended:
                self._await(record.peer)
                self._books.chains.pull(record.peer, self._ctx.account)

    def _await(self, peer: str) -> None:
        if peer not in self.awaited and not self._rooms.members.banned(peer):  # who is not let in could not answer
            self.awaited[peer] = None
            self._ctx.put("awaited", peer, self.since_ms or self._ctx.now)

    def peer_up(self, peer: str) -> None:
        """Whoever connects while the chain is read-only is asked, also those met only now."""
        if self.reason:
            self._await(peer)
            self._books.chains.pull(peer, self._ctx.account)

    def chain_shown(self) -> None:
        """An imported identity has its chain."""
        self._answer(ANYBODY)

    def answered(self, peer: str) -> None:
        """This peer holds nothing of the own chain that is not here; after the last one the chain is written again."""
        if self._answer(peer) and not self.awaited:
            self._end()

    def _answer(self, peer: str) -> bool:
        if self.awaited.pop(peer, 0) == 0:
            return False
        self._ctx.delete("awaited", peer)
        return True

    def _end(self) -> None:
        ctx = self._ctx
        for peer in list(self.awaited):
            self._answer(peer)
        self.reason, self.since_ms = "", 0
        ctx.delete("meta", "restore")
        ctx.log("info", "ledger.restored")
        self._books.chains.reconsider()
        if self._books.purse.opened:
            self._books.claim_all()
        else:
            self._books.open_chain()

    def accept_risk(self) -> None:
        """The owner's override, after 24 h: the chain is written without the answers that are missing.

        Raises NotPermittedError when the chain may be written anyway, or too little time has passed.
        """
        if not self.reason:
            raise NotPermittedError("the wallet is not read-only: there is nothing to override")
        allowed_ms = self.since_ms + limits.RESTORE_OVERRIDE_MS
        if self._ctx.now < allowed_ms:
            raise NotPermittedError(
                f"the missing answers can be done without from {self._rooms.views.time(allowed_ms)} on",
                hint="bring the peers that `clawnet wallet balance` names online: their answers end it at once",
            )
        self._ctx.log("security", "ledger.risk_accepted", unanswered=" ".join(self.awaited))
        self._end()

    def view(self) -> dict[str, Any] | None:
        """The state of the rule as `wallet balance` and `daemon status` show it; None while the chain is whole."""
        if not self.reason:
            return None
        members, time = self._rooms.members, self._rooms.views.time
        return {
            "reason": self.reason,
            "since": time(self.since_ms),
            "override_from": time(self.since_ms + limits.RESTORE_OVERRIDE_MS),
            "unanswered": [members.party(peer) for peer in sorted(self.awaited) if peer],
            "chain_unseen": ANYBODY in self.awaited,
        }

    def sentence(self) -> str:
        """The same for people: what it waits for."""
        names = [self._rooms.members.name_of(peer) for peer in sorted(self.awaited) if peer]
        some = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        if some:
            return f"{self.reason}; it waits for the answers of {some}"
        return self.reason

    def remedy(self) -> str:
        """What the owner can do about it; "" while the chain is whole."""
        if not self.reason:
            return ""
        allowed = self._rooms.views.time(self.since_ms + limits.RESTORE_OVERRIDE_MS)
        return (
            f"bring those peers online; from {allowed} on also: clawnet wallet restore --accept-risk (a fork convicts)"
        )

    # --- what the missing entries say of tasks and jobs

    def taken(self, outcome: Added) -> None:
        """An own entry that was not on this disk: what it ended is ended here too, what it began is not begun again."""
        body, awards = outcome.parsed.body, self._rooms.awards
        if isinstance(body, Lock):
            for line in body.lines:
                self._began_elsewhere(line.task)
        elif isinstance(body, Release):
            for item in body.items:
                found = awards.of_line(item.lock_seq, item.line)
                if found is None:
                    continue
                if found[1].state == "delivering" and item.note_hash == note_hash(found[1].note):
                    # What was released is here too: it waits for its key as it did there.
                    self._rooms.results.released(*found, outcome.parsed.seq)
                    continue
                found[1].escrow = "released"
                awards.close(*found, "released", "its result was taken in by a later state of this node")
                self._lost(found[0])
        elif isinstance(body, Refund):
            for refund in body.items:
                found = awards.of_line(refund.lock_seq, refund.line)
                if found is not None:
                    awards.refunded(*found, outcome.parsed.seq)
        elif isinstance(body, Claim):
            self._claimed(outcome)

    def _claimed(self, outcome: Added) -> None:
        """Jobs that a claim was paid for: their payers may still need to be shown it."""
        for payable in outcome.payables:
            if payable is None:
                continue
            job = self._rooms.pay.released(payable.payer, payable.lock_seq, payable.line)
            if payable.kind != EntryKind.RELEASE or job is None:
                continue
            self._rooms.jobs.stop(job)
            self._books.shipping.claimed(outcome.parsed.seq, [job])
            self._rooms.pay.paid(job, outcome.parsed.seq)
            self._books.shipping.settle({job.peer: None}, CLAIM, outcome.parsed.seq)

    def _began_elsewhere(self, task_hash: bytes) -> None:
        """A task that waits here for its auction was given away by a later state of this node."""
        for task in list(self._rooms.tasks.open.values()):
            if task.task_hash == task_hash:
                self._lost(task)

    def _lost(self, task: Task) -> None:
        if task.state not in FINAL_STATES:
            self._rooms.awards.cancel(task, "the requester was restored")
            self._rooms.tasks.finish(
                task,
                "failed",
                ExecutorLostError(
                    "a later state of this node had given the task away, and this copy does not know how it ended",
                    hint="it is not started a second time; submit it again if it must run",
                ),
            )


def same_host(one: str, other: str) -> bool:
    """Whether two stamps "machine file" tell of one place; "-" in either says nothing about that part."""
    pairs = zip(one.split(" "), other.split(" "), strict=False)
    return all(a == b or "-" in (a, b) for a, b in pairs)
