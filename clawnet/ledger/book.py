"""The book: one node's record of every chain it has seen, judged entry by entry. First seen stays.

Pure: entries, the time and the verification of signatures come in as arguments; outcomes come back. What the book
needs from the database or from a peer it names in NotYet (outcomes.py). Nothing here recurses; everything is bounded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from clawnet import limits
from clawnet.errors import DataError, RemoteError, WireError
from clawnet.ledger.branches import Branches
from clawnet.ledger.entries import ClaimItem, Parsed, RefundItem, Verify, parse, signed_by
from clawnet.ledger.outcomes import (
    Added,
    Branch,
    Forked,
    Invalid,
    Known,
    NotYet,
    Outcome,
    Rejected,
    Unauditable,
)
from clawnet.ledger.proofs import build_proof, verify_proof
from clawnet.ledger.records import Records
from clawnet.ledger.rules import Change, Court, Fault, Income, Missing, Verdict, commit, judge, waived
from clawnet.ledger.state import (
    Account,
)
from clawnet.ledger.terms import LedgerTerms
from clawnet.ledger.waiting import Aside, Waiting

FOREVER_MS: Final = 2**63
"""A `now_ms` for judging entries whose time no longer matters: those of this node's own database."""


class Book(Records):
    """All chains of one mesh as one node sees them.

    `apply` judges one entry; `drain` returns what became possible by it (kept entries that now count, or are invalid).
    `verify(public, message, signature)` is the only expensive part and is injected.
    """

    def __init__(
        self, terms: LedgerTerms, mesh: bytes, verify: Verify, *, payables_max: int = limits.PAYABLES_MAX
    ) -> None:
        super().__init__(terms, mesh)
        self._verify = verify
        self._payables_max = payables_max
        self._aside = Aside()
        self._ready: dict[bytes, None] = {}
        self._outcomes: list[Outcome] = []
        self._branches = Branches()
        self._court = Court(terms, mesh, verify, self._resolve)
        self._replay_court = Court(terms, mesh, verify, self._resolve_trusted)
        self._scratch_court = Court(terms, mesh, verify, self._resolve_scratch)

    # --- taking entries in

    def apply(self, raw: bytes, now_ms: int, *, trusted: bool = False, keep: bool = True) -> Outcome:
        """Judges one entry as received.

        `trusted` is for this node's own database, read at start in any order of accounts: signatures, times and other
        chains were checked when the entry was first added. Without `keep` nothing is set aside for later.
        """
        try:
            entry = parse(raw)
        except WireError as error:
            return Rejected(error.message)
        if entry.mesh != self.mesh:
            return Rejected("an entry of another mesh")
        if trusted:
            return self._replay(entry)
        return self._place(entry, now_ms, keep, b"")

    def drain(self, now_ms: int) -> list[Outcome]:
        """What can be said now of entries set aside before, in the order in which they became judgeable."""
        outcomes, self._outcomes = self._outcomes, []
        for account in self._aside.due(now_ms):
            self._ready[account] = None
        if not self._ready:
            return outcomes
        while self._ready:
            account = next(iter(self._ready))
            del self._ready[account]
            waiting = self._aside.take(account, self._next_seq(account))
            if waiting is None:
                continue
            outcome = self._place(waiting.entry, now_ms, True, waiting.key)
            if not isinstance(outcome, NotYet) or _need_of(outcome) != waiting.missing:
                outcomes.append(outcome)
            outcomes += self._outcomes
            self._outcomes = []
        return outcomes

    def append_own(self, entry: Parsed, verdict: Verdict) -> Added:
        """Adds the entry that the purse has just had judged (`judge_next`) and signed."""
        assert isinstance(verdict, Change), "only a valid entry is signed"
        return self._add(self._of(entry.account), entry, verdict)

    def judge_next(self, entry: Parsed) -> Verdict:
        """The verdict on an own entry that is not signed yet. It must stand at its chain's head."""
        state = self._of(entry.account)
        assert entry.seq == state.seq + 1 and entry.prev == state.hash, "not the next entry"
        if state.ended is not None:
            return Fault("ended", f"the chain ended: {state.ended_reason}")
        return judge(self._court, state, entry)

    def refundable(self, account: bytes, item: RefundItem, now_ms: int) -> bool:
        """Whether this item could stand in a refund written now, so that a false waiver spoils no batch."""
        line = self.line(account, item.lock_seq, item.line)
        return line is not None and (now_ms >= line.expiry_ms or waived(self._court, account, line, item.proof))

    def _place(self, entry: Parsed, now_ms: int, keep: bool, verified_by: bytes) -> Outcome:
        """Finds where an entry belongs: behind the head, at it, beyond it, or off this branch."""
        state = self._accounts.get(entry.account)
        if state is None:
            if not self.has_room():
                return Rejected("more accounts than a book can hold")
            state = self._new(entry.account)
        if entry.seq <= state.seq:
            return self._behind(state, entry)
        if verified_by != state.key and not signed_by(entry, state.key, self._verify):
            if entry.seq == state.seq + 1:
                return Rejected("the signature is not the account's")
            return self._not_yet(entry, Missing("gap", entry.account, state.seq + 1, entry.seq - 1), kept=False)
        if state.ended is not None:
            return self._after_end(state, entry, state.ended)
        if state.upgrade:
            return Unauditable(entry.account, state.seq + 1, state.upgrade)
        rival = self._aside.get(entry.account, entry.seq)
        if rival is not None and rival.entry.hash != entry.hash:
            self._outcomes.append(self._fork(state, rival.entry, entry))
        if entry.seq > state.seq + 1:
            missing = Missing("gap", entry.account, state.seq + 1, entry.seq - 1)
            if rival is not None:
                return self._not_yet(entry, missing, kept=rival.entry.hash == entry.hash)
            kept = keep and self._aside.keep(Waiting(entry, state.key, missing))
            return self._not_yet(entry, missing, kept)
        if entry.prev != state.hash and entry.seq > 0:
            return self._off_branch(state, entry)
        return self._at_head(state, entry, now_ms, keep)

    def _at_head(self, state: Account, entry: Parsed, now_ms: int, keep: bool) -> Outcome:
        for other in state.branch.values():
            if other.seq == entry.seq and other.hash != entry.hash and entry.account not in self._proofs:
                self._outcomes.append(self._fork(state, entry, other))
        if entry.time_ms > now_ms + limits.CLOCK_AHEAD_MS:
            at_ms = entry.time_ms - limits.CLOCK_AHEAD_MS
            missing = Missing("future", entry.account, entry.seq, entry.seq)
            kept = keep and self._aside.keep_until(Waiting(entry, state.key, missing), at_ms)
            return self._not_yet(entry, missing, kept, at_ms)
        if entry.upgrade:
            state.upgrade = entry.upgrade
            self._note(state, urgent=True)
            self._aside.drop(entry.account)
            return Unauditable(entry.account, entry.seq, entry.upgrade)
        verdict = Fault("malformed", entry.defect) if entry.defect else judge(self._court, state, entry)
        if isinstance(verdict, Missing):
            kept = keep and self._aside.keep(Waiting(entry, state.key, verdict))
            return self._not_yet(entry, verdict, kept)
        if isinstance(verdict, Fault):
            return self._end(state, entry, verdict)
        return self._add(state, entry, verdict)

    def _replay(self, entry: Parsed) -> Outcome:
        state = self._of(entry.account)
        if entry.seq <= state.seq:
            return Known(entry.account, entry.seq)
        if entry.seq != state.seq + 1 or entry.prev != state.hash or entry.body is None or entry.upgrade:
            return Rejected("the database holds a chain with a hole in it")
        verdict = judge(self._replay_court, state, entry)
        if not isinstance(verdict, Change):
            text = verdict.text if isinstance(verdict, Fault) else verdict.need
            return Rejected(f"the database holds an invalid entry: {text}")
        return self._add(state, entry, verdict)

    def _add(self, state: Account, entry: Parsed, change: Change) -> Added:
        self._accounts[entry.account] = state
        commit(state, entry, change)
        for payable in change.payables:
            payee = self._accounts.get(payable.payee)
            if payee is None or payee.cursors.get(entry.account, (-1, 0)) < payable.place:
                state.add_payable(payable)
        state.spill(self._payables_max)
        for payer, cursor in change.cursors.items():
            held = self._accounts.get(payer)
            if held is not None:
                held.pass_cursor(entry.account, cursor)
                self._dirty[payer] = None
        self._note(state, urgent=change.void_ucr > 0)
        if len(self._aside):
            self._aside.take(entry.account, entry.seq)
            if self._aside.holds(entry.account):
                self._ready[entry.account] = None
        for waiter in self._aside.waiting_for(entry.account):
            self._ready[waiter] = None
        payables = change.consumed if change.cursors else change.payables
        return Added(entry, tuple(payables), change.void_ucr)

    def _not_yet(self, entry: Parsed, missing: Missing, kept: bool, retry_at_ms: int = 0) -> NotYet:
        return NotYet(
            entry.account,
            entry.seq,
            entry.hash,
            missing.need,
            missing.account,
            missing.first,
            missing.last,
            kept,
            retry_at_ms,
        )

    # --- entries that contradict

    def _behind(self, state: Account, entry: Parsed) -> Outcome:
        """An entry for a place that is taken: the same one, or the second branch of a fork."""
        held = state.tail.get(entry.seq)
        if held == entry.hash:
            return Known(entry.account, entry.seq)
        if entry.hash in state.branch and entry.account in self._proofs:
            return Branch(entry)
        supplied = self._branches.supplied(entry.account, entry.seq)
        if supplied is not None and supplied.hash == entry.hash:
            return Known(entry.account, entry.seq)
        if not signed_by(entry, state.key_at(entry.seq), self._verify):
            return Rejected("the signature is not the account's")
        if held is not None or supplied is not None:
            state.distrust(f"two entries signed for seq {entry.seq}")
            self._set_beside(state, entry)
            if entry.account in self._proofs:
                return Branch(entry)
            if supplied is not None:
                return self._fork(state, supplied, entry)
        missing = Missing("lookup", entry.account, entry.seq, entry.seq)
        kept = self._branches.ask(entry)
        return self._not_yet(entry, missing, kept)

    def _after_end(self, state: Account, entry: Parsed, ended: Parsed) -> Outcome:
        if entry.seq == ended.seq and entry.hash != ended.hash:
            self._set_beside(state, entry)
            return self._fork(state, ended, entry)
        return Invalid(entry.account, ended.seq, "ended", f"the chain ended at seq {ended.seq}: {state.ended_reason}")

    def _off_branch(self, state: Account, entry: Parsed) -> Outcome:
        """The next seq, but on another entry than the head: a second branch whose beginning is still to be seen."""
        state.distrust(f"an entry that does not continue seq {state.seq}")
        known = entry.hash in state.branch
        self._set_beside(state, entry)
        for other in list(state.branch.values()):
            if other.seq == entry.seq and other.hash != entry.hash and entry.account not in self._proofs:
                return self._fork(state, other, entry)
        if entry.account in self._proofs and (known or entry.prev in state.branch):
            return Branch(entry)
        return self._not_yet(entry, Missing("branch", entry.account, entry.seq - 1, entry.seq - 1), kept=True)

    def _set_beside(self, state: Account, entry: Parsed) -> None:
        size = len(entry.raw)
        of_account = sum(len(other.raw) for other in state.branch.values())
        room = (
            self._branch_bytes + size <= limits.BRANCH_BYTES_MAX
            and of_account + size <= limits.BRANCH_BYTES_PER_ACCOUNT_MAX
            and len(state.branch) < limits.BRANCH_ENTRIES_MAX
        )
        if room and entry.hash not in state.branch:
            state.branch[entry.hash] = entry
            self._branch_bytes += size
        self._note(state, urgent=True)
        for waiter in self._aside.waiting_for(state.account):
            self._ready[waiter] = None

    def _fork(self, state: Account, held: Parsed, other: Parsed) -> Forked:
        rotations = [raw for seq, _, raw in state.rotations if seq < other.seq]
        proof = self._proofs.get(state.account)
        if proof is None:
            proof = self._proofs[state.account] = build_proof(held, other, rotations)
        state.distrust(f"two entries signed for seq {other.seq}")
        self._note(state, urgent=True)
        return Forked(state.account, other.seq, proof, other)

    def _end(self, state: Account, entry: Parsed, fault: Fault) -> Invalid:
        state.ended = entry
        state.ended_reason = fault.text
        self._aside.drop(entry.account)
        self._note(state, urgent=True)
        return Invalid(entry.account, entry.seq, fault.reason, fault.text)

    def learn_proof(self, proof: bytes, *, trusted: bool = False) -> Forked | Known | Rejected:
        """Takes in a fork proof from a peer (or, `trusted`, from the database). Known: one is held already."""
        try:
            first, _ = verify_proof(proof, self.mesh, (lambda *_: True) if trusted else self._verify)
        except RemoteError as error:
            return Rejected(error.message)
        account = first.account
        if account in self._proofs:
            return Known(account, first.seq)
        if len(self._proofs) >= limits.ACCOUNTS_MAX:
            return Rejected("more fork proofs than a book can hold")
        state = self._accounts.get(account)
        if state is not None and not trusted and not signed_by(first, state.key_at(first.seq), self._verify):
            return Rejected("the fork proof is signed with a key that the account had given up")
        self._proofs[account] = proof
        if state is not None:
            state.distrust(f"two entries signed for seq {first.seq}")
            self._note(state, urgent=True)
        return Forked(account, first.seq, proof)

    # --- what claims refer to

    def _resolve(self, author: Account, item: ClaimItem) -> Income | Fault | Missing:
        payer = author if item.payer == author.account else self._accounts.get(item.payer)
        if payer is None:
            return Missing("payer", item.payer, 0, item.seq)
        waiting = payer.payables.get(author.account)
        payable = waiting.get((item.seq, item.index)) if waiting is not None else None
        if payable is not None and payable.hash == item.hash:
            return Income(payable, False)
        return self._resolve_rare(payer, author, item, scratch=False)

    def _resolve_trusted(self, author: Account, item: ClaimItem) -> Income | Fault | Missing:
        payer = author if item.payer == author.account else self._accounts.get(item.payer)
        waiting = payer.payables.get(author.account) if payer is not None else None
        return Income(waiting.get((item.seq, item.index)) if waiting is not None else None, False)

    def _resolve_scratch(self, author: Account, item: ClaimItem) -> Income | Fault | Missing:
        payer = author if item.payer == author.account else self._accounts.get(item.payer)
        if payer is None:
            return Missing("payer", item.payer, 0, item.seq)
        waiting = payer.payables.get(author.account)
        payable = waiting.get((item.seq, item.index)) if waiting is not None else None
        if payable is not None and payable.hash == item.hash:
            return Income(payable, False)
        return self._resolve_rare(payer, author, item, scratch=payer is not author)

    def _resolve_rare(
        self, payer: Account, author: Account, item: ClaimItem, *, scratch: bool
    ) -> Income | Fault | Missing:
        """A claim that is not on an unclaimed payment in memory: old, foreign-branch, early, or false."""
        judged = self._branches.judged(item.hash, item.index)
        if judged is not None:
            return judged
        if item.seq > payer.seq:
            return self._resolve_ahead(payer, item)
        held = payer.tail.get(item.seq) or self._branches.supplied_hash(item.payer, item.seq)
        if held is None:
            return Missing("lookup", item.payer, item.seq, item.seq)
        if held != item.hash:
            return Missing("branch", item.payer, max(0, item.seq - 63), item.seq)
        if scratch or item.seq <= payer.spilled_seq:
            return self._branches.payment(item)
        return Fault("payment", "the entry named pays this account nothing there")

    def _resolve_ahead(self, payer: Account, item: ClaimItem) -> Fault | Missing:
        if payer.ended is not None:
            if item.hash == payer.ended.hash:
                return Fault("payment", "the entry named is invalid")
            return Missing("branch", item.payer, max(0, item.seq - 63), item.seq)
        if payer.upgrade:
            return Missing("upgrade", item.payer, payer.seq + 1, item.seq)
        if payer.suspect:
            return Missing("branch", item.payer, payer.seq + 1, item.seq)
        return Missing("payer", item.payer, payer.seq + 1, item.seq)

    def supply(self, raw: bytes) -> None:
        """Answers NotYet("lookup"): an entry of a held chain, from this node's own database. `drain` then goes on."""
        entry = parse(raw)
        state = self._accounts.get(entry.account)
        if state is None or entry.seq > state.seq:
            raise DataError("an entry was supplied that this book does not hold")
        for asked in self._branches.supply(entry):
            if asked.hash != entry.hash:
                outcome = self._behind(state, asked)
                if not isinstance(outcome, NotYet):
                    self._outcomes.append(outcome)
        for waiter in self._aside.waiting_for(entry.account):
            self._ready[waiter] = None

    def supply_linked(self, raws: Sequence[bytes]) -> bool:
        """Takes in older entries of a chain adopted at a checkpoint, from a peer: proved by the links between them.

        `raws` are consecutive and end in an entry whose hash this book knows. False when they prove nothing.
        """
        try:
            entries = [parse(raw) for raw in raws]
        except WireError:
            return False
        known: bytes | None = None
        for entry in reversed(entries):
            state = self._accounts.get(entry.account)
            if state is None:
                return False
            known = known or state.tail.get(entry.seq) or self._branches.supplied_hash(entry.account, entry.seq)
            if entry.hash != known or entry.account != entries[0].account:
                return False
            known = entry.prev
        for entry in reversed(entries):
            self.supply(entry.raw)
        return bool(entries)

    def check_branch(self, account: bytes, prefix: Sequence[bytes], now_ms: int) -> Missing | None:
        """Judges the void branches of `account` that are known, so that claims on them can be judged (`drain`).

        `prefix` holds the raw entries of the held chain from genesis, from this node's own database. Answers with what
        is missing to judge them all.
        """
        state = self._accounts.get(account)
        if state is None:
            return Missing("payer", account, 0, 0)
        missing: Missing | None = None
        for path in self._branches.paths(state.branch):
            found = self._branches.judge(self._scratch_court, self._replay_court, account, prefix, path, now_ms)
            missing = missing or found
        for waiter in self._aside.waiting_for(account):
            self._ready[waiter] = None
        return missing


def _need_of(outcome: NotYet) -> Missing:
    return Missing(outcome.need, outcome.need_account, outcome.need_from, outcome.need_to)
