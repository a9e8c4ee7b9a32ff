"""What a book answers when it is given an entry, and what it shows of an account."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from clawnet.ledger.entries import Parsed
from clawnet.ledger.state import Payable

Need = Literal["future", "gap", "payer", "branch", "lookup", "upgrade"]


class Outcome(Struct, frozen=True, gc=False):
    """Base of all answers to an entry."""


class Added(Outcome, frozen=True, gc=False):
    """The entry is valid and is now the head of its chain in this book: store it.

    `payables`: for a claim the payments it counts, item by item (None: one that this book knows no more of, or void);
    for a grant, send or release the payments it makes claimable. `void_ucr` of a claim counts for nothing here.
    """

    parsed: Parsed
    payables: tuple[Payable | None, ...] = ()
    void_ucr: int = 0


class Known(Outcome, frozen=True, gc=False):
    """The book holds this very entry."""

    account: bytes
    seq: int


class NotYet(Outcome, frozen=True, gc=False):
    """The entry cannot be judged yet; nothing is wrong with it so far. `kept`: the book retries it by itself.

    `need` tells what is missing: "future" (wait until `retry_at_ms`), "gap" and "payer" (entries `need_from` to
    `need_to` of `need_account`, from a peer), "branch" (the same, but of another branch than the one held: from the
    claimant), "lookup" (the entry at `need_from` of the held chain, from this node's own database: give it to
    Book.supply), "upgrade" (only a later version can judge that chain).
    """

    account: bytes
    seq: int
    hash: bytes
    need: Need
    need_account: bytes
    need_from: int
    need_to: int
    kept: bool
    retry_at_ms: int = 0


class Invalid(Outcome, frozen=True, gc=False):
    """The author signed an entry that breaks a rule: its chain ends before it. `reason` is a word for `text`."""

    account: bytes
    seq: int
    reason: str
    text: str


class Forked(Outcome, frozen=True, gc=False):
    """Two signed entries for one place convict their author: store and pass on `proof`, once per account.

    `parsed` is the entry off the held branch (to be stored as a segment), None when only the proof was given.
    """

    account: bytes
    seq: int
    proof: bytes
    parsed: Parsed | None = None


class Branch(Outcome, frozen=True, gc=False):
    """A signed entry off the branch this book holds: evidence to be stored beside the chain, never counted."""

    parsed: Parsed


class Unauditable(Outcome, frozen=True, gc=False):
    """A construct of a later increment: the chain cannot be audited beyond `seq` - 1 by this version."""

    account: bytes
    seq: int
    text: str


class Rejected(Outcome, frozen=True, gc=False):
    """Bytes that say nothing about any account (no entry, foreign mesh, bad signature): their sender's fault."""

    reason: str


class AccountView(Struct, frozen=True, gc=False):
    """One account as this book sees it. `seq` -1: unknown. `refuse` says why no lock of it is accepted ("" if none).

    `good_seq` is the head when the first sign of a fork was seen: what was in this book by then stays good.
    """

    account: bytes
    seq: int
    hash: bytes
    key: bytes
    time_ms: int
    available_ucr: int
    open_ucr: int
    open_lines: int
    issued_ucr: int
    void_ucr: int
    base_seq: int
    checkpoint_seq: int
    forked: bool
    good_seq: int
    ended: str
    upgrade: str
    refuse: str


class Totals(Struct, frozen=True, array_like=True, gc=False):
    """Both sides of the conservation equation, in ucr: available + open + unclaimed = granted (with openings)."""

    available_ucr: int
    open_ucr: int
    unclaimed_ucr: int
    granted_ucr: int

    @property
    def conserved(self) -> bool:
        """Whether the equation holds."""
        return self.available_ucr + self.open_ucr + self.unclaimed_ucr == self.granted_ucr
