"""Void branches: the other side of a payer's fork, checked as evidence for claims on it and never counted.

Also the entries looked up in this node's own database when a claim or a second entry reaches further back than the
book's memory. Everything is bounded; what falls out is looked up or judged again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from clawnet import limits
from clawnet.ledger.entries import ClaimItem, EntryKind, Grant, Lock, Parsed, Release, Send, parse
from clawnet.ledger.rules import Change, Court, Fault, Income, Missing, commit, judge
from clawnet.ledger.state import Account, Payable


class Branches:
    """What one book knows off its held branches."""

    def __init__(self) -> None:
        self._supplied: dict[tuple[bytes, int], Parsed] = {}
        self._asked: dict[tuple[bytes, int], list[Parsed]] = {}
        self._judged: dict[bytes, dict[int, Payable] | str] = {}

    # --- entries from the database

    def supplied(self, account: bytes, seq: int) -> Parsed | None:
        """The held chain's entry there, if it was looked up lately."""
        return self._supplied.get((account, seq))

    def supplied_hash(self, account: bytes, seq: int) -> bytes | None:
        """Its hash."""
        entry = self._supplied.get((account, seq))
        return None if entry is None else entry.hash

    def ask(self, entry: Parsed) -> bool:
        """Keeps an entry until the held one at its place is supplied; False when too many are asked for."""
        asked = self._asked.setdefault((entry.account, entry.seq), [])
        if any(other.hash == entry.hash for other in asked):
            return True
        if len(self._asked) > limits.LOOKUPS_MAX or len(asked) >= 4:
            if not asked:
                del self._asked[(entry.account, entry.seq)]
            return False
        asked.append(entry)
        return True

    def supply(self, entry: Parsed) -> list[Parsed]:
        """Remembers a looked-up entry and returns those that waited to be compared with it."""
        while len(self._supplied) >= limits.LOOKUPS_MAX:
            del self._supplied[next(iter(self._supplied))]
        self._supplied[(entry.account, entry.seq)] = entry
        return self._asked.pop((entry.account, entry.seq), [])

    def payment(self, item: ClaimItem) -> Income | Fault | Missing:
        """The payment that a claim names on the held chain, from looked-up entries alone."""
        entry = self._supplied.get((item.payer, item.seq))
        if entry is None:
            return Missing("lookup", item.payer, item.seq, item.seq)
        body = entry.body
        if isinstance(body, Grant | Send) and item.index == 0:
            kind = entry.kind
            return Income(Payable(item.payer, body.payee, item.seq, 0, entry.hash, kind, body.amount_ucr), False)
        if not isinstance(body, Release) or item.index >= len(body.items):
            return Fault("payment", "the entry named pays nothing there")
        paid = body.items[item.index]
        lock = self._supplied.get((item.payer, paid.lock_seq))
        if lock is None:
            return Missing("lookup", item.payer, paid.lock_seq, paid.lock_seq)
        assert isinstance(lock.body, Lock), "a held release names a held lock"
        line = lock.body.lines[paid.line]
        return Income(
            Payable(
                item.payer,
                line.payee,
                item.seq,
                item.index,
                entry.hash,
                int(EntryKind.RELEASE),
                paid.amount_ucr,
                paid.key_hash,
                paid.note_hash,
                paid.lock_seq,
                paid.line,
                paid.part,
                line.task,
            ),
            False,
        )

    # --- branches off the held chain

    def judged(self, entry_hash: bytes, index: int) -> Income | Fault | None:
        """What is known of a payment in a judged void branch; None when that entry was not judged."""
        payments = self._judged.get(entry_hash)
        if payments is None:
            return None
        if isinstance(payments, str):
            return Fault("payment", f"the entry named is invalid: {payments}")
        payable = payments.get(index)
        if payable is None:
            return Fault("payment", "the entry named pays nothing there")
        return Income(payable, True)

    def paths(self, branch: dict[bytes, Parsed]) -> Iterator[list[Parsed]]:
        """Each void branch from its oldest known entry to its newest, those with something unjudged only."""
        continued = {entry.prev for entry in branch.values()}
        for entry in branch.values():
            if entry.hash in continued or entry.hash in self._judged:
                continue
            path: list[Parsed] = []
            step: Parsed | None = entry
            while step is not None and len(path) <= limits.BRANCH_ENTRIES_MAX:
                path.append(step)
                step = branch.get(step.prev)
            path.reverse()
            yield path

    def judge(
        self,
        court: Court,
        replay_court: Court,
        account: bytes,
        prefix: Iterable[bytes],
        path: list[Parsed],
        now_ms: int,
    ) -> Missing | None:
        """Judges the branch `path`, which leaves the held chain `prefix` somewhere, by section 4."""
        scratch = Account(account)
        for raw in prefix:
            entry = parse(raw)
            if entry.seq >= path[0].seq:
                break
            change = judge(replay_court, scratch, entry)
            assert isinstance(change, Change), "the held chain is valid"
            _advance(scratch, entry, change)
        if scratch.seq != path[0].seq - 1 or scratch.hash != path[0].prev:
            return Missing("branch", account, path[0].seq - 1, path[0].seq - 1)
        bad = ""
        for entry in path:
            if not bad:
                verdict = self._judge_one(court, scratch, entry, now_ms)
                if isinstance(verdict, Missing):
                    return verdict
                if isinstance(verdict, Fault):
                    bad = verdict.text
                else:
                    _advance(scratch, entry, verdict)
                    self._remember(entry.hash, {payable.index: payable for payable in verdict.payables})
            if bad:
                self._remember(entry.hash, bad)
        return None

    def _judge_one(self, court: Court, scratch: Account, entry: Parsed, now_ms: int) -> Change | Fault | Missing:
        if entry.time_ms > now_ms + limits.CLOCK_AHEAD_MS:
            return Missing("future", entry.account, entry.seq, entry.seq)
        if entry.upgrade:
            return Missing("upgrade", entry.account, entry.seq, entry.seq)
        if entry.defect:
            return Fault("malformed", entry.defect)
        return judge(court, scratch, entry)

    def _remember(self, entry_hash: bytes, payments: dict[int, Payable] | str) -> None:
        while len(self._judged) >= limits.BRANCH_ENTRIES_MAX:
            del self._judged[next(iter(self._judged))]
        self._judged[entry_hash] = payments


def _advance(scratch: Account, entry: Parsed, change: Change) -> None:
    commit(scratch, entry, change)
    for payable in change.payables:
        scratch.add_payable(payable)
