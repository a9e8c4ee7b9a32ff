"""Full audit: every chain from genesis with every signature, every income traced into its payer's chain.

Needs nothing but the entries: a node's `wallet audit` uses it on its own database, and anybody can use it on copies.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from msgspec import Struct

from clawnet import limits
from clawnet.ledger.book import FOREVER_MS, Book
from clawnet.ledger.entries import Verify
from clawnet.ledger.outcomes import Added, Known, NotYet, Outcome
from clawnet.ledger.terms import LedgerTerms


class AccountAudit(Struct, frozen=True):
    """One chain's sums at its last valid entry, in ucr. `head_seq` is -1 where there is no valid entry."""

    available_ucr: int
    open_ucr: int
    entries: int
    head_seq: int
    head: bytes
    void_ucr: int = 0


class Problem(Struct, frozen=True):
    """What is wrong with (or unknown of) one chain, from which seq on."""

    account: bytes
    seq: int
    text: str


class AuditReport(Struct, frozen=True):
    """The books of all chains together. `conserved`: available + open + unclaimed equals all that was granted."""

    accounts: dict[bytes, AccountAudit]
    problems: tuple[Problem, ...]
    available_ucr: int
    open_ucr: int
    unclaimed_ucr: int
    granted_ucr: int
    conserved: bool

    @property
    def sound(self) -> bool:
        """Whether everything was audited, nothing is wrong, and no credit appeared or vanished."""
        return self.conserved and not self.problems


class _Chain:
    """One chain being read; `stopped` is the entry that waits for another chain."""

    def __init__(self, account: bytes, raws: Iterable[bytes]) -> None:
        self.account = account
        self.raws: Iterator[bytes] = iter(raws)
        self.stopped: tuple[bytes, NotYet] | None = None
        self.next_seq = 0
        self.done = False


def audit_chains(
    terms: LedgerTerms,
    mesh: bytes,
    chains: Mapping[bytes, Iterable[bytes]],
    verify: Verify,
    *,
    segments: Mapping[bytes, Iterable[bytes]] | None = None,
    now_ms: int = FOREVER_MS,
) -> AuditReport:
    """Audits chains (account -> raw entries from genesis, in order) together, reading each once.

    `segments` holds void branches kept as evidence beside the chains; an account that has one is given in `chains` as
    a sequence. `now_ms` bounds the stamps accepted; without it stamps are taken as they are.
    """
    book = Book(terms, mesh, verify, payables_max=_PAYABLES_MAX)
    problems: list[Problem] = []
    reading = {account: _Chain(account, raws) for account, raws in chains.items()}
    _read_all(book, reading, problems, now_ms)
    if segments:
        _take_segments(book, chains, segments, now_ms)
        _read_all(book, reading, problems, now_ms)
    for chain in reading.values():
        if chain.stopped is not None:
            missing = chain.stopped[1]
            text = f"cannot be audited further: {_WANTS.get(missing.need, missing.need)}"
            problems.append(Problem(chain.account, missing.seq, text))
    totals = book.conservation()
    return AuditReport(
        {account: _account(book, account, chain) for account, chain in reading.items()},
        tuple(problems),
        totals.available_ucr,
        totals.open_ucr,
        totals.unclaimed_ucr,
        totals.granted_ucr,
        totals.conserved,
    )


_PAYABLES_MAX = 100 * limits.PAYABLES_MAX
"""An audit cannot look an old payment up, so it remembers more of them than a running book."""
_READ_AT_ONCE = 64
_WANTS = {
    "payer": "it claims a payment from a chain, or a part of one, that is not here",
    "branch": "it claims a payment on another branch of a forked chain",
    "future": "it is stamped in the future",
    "upgrade": "it depends on a construct of a later version",
    "gap": "an entry is missing",
}


def _account(book: Book, account: bytes, chain: _Chain) -> AccountAudit:
    view = book.view(account)
    return AccountAudit(view.available_ucr, view.open_ucr, view.seq + 1, view.seq, view.hash, view.void_ucr)


def _read_all(book: Book, reading: Mapping[bytes, _Chain], problems: list[Problem], now_ms: int) -> None:
    """Reads every chain as far as it goes; one that waits for another is taken up again when that one has moved.

    They are read side by side, so that payments are claimed soon after they were made and few are remembered.
    """
    waiting: dict[bytes, dict[bytes, None]] = {}
    todo: dict[bytes, None] = dict.fromkeys(reading)
    while todo:
        account = next(iter(todo))
        del todo[account]
        chain = reading[account]
        before = chain.next_seq
        _read_on(book, chain, problems, now_ms)
        if chain.stopped is not None:
            waiting.setdefault(chain.stopped[1].need_account, {})[account] = None
        if chain.next_seq > before:
            todo.update(waiting.pop(account, {}))
        if chain.stopped is None and not chain.done:
            todo[account] = None


def _read_on(book: Book, chain: _Chain, problems: list[Problem], now_ms: int) -> None:
    for _ in range(_READ_AT_ONCE):
        if chain.done:
            return
        raw = chain.stopped[0] if chain.stopped is not None else next(chain.raws, None)
        chain.stopped = None
        if raw is None:
            chain.done = True
            return
        outcome = book.apply(raw, now_ms, keep=False)
        if isinstance(outcome, NotYet):
            chain.stopped = (raw, outcome)
            return
        if not isinstance(outcome, Added) or outcome.parsed.account != chain.account:
            problems.append(Problem(chain.account, chain.next_seq, _fault(outcome)))
            chain.done = not isinstance(outcome, Known)
        chain.next_seq += 1


def _fault(outcome: Outcome) -> str:
    if isinstance(outcome, Added):
        return "an entry of another account"
    if isinstance(outcome, Known):
        return "an entry appears twice"
    text = getattr(outcome, "text", "") or getattr(outcome, "reason", "")
    return text or "two entries for one place: a fork"


def _take_segments(
    book: Book, chains: Mapping[bytes, Iterable[bytes]], segments: Mapping[bytes, Iterable[bytes]], now_ms: int
) -> None:
    for account, raws in segments.items():
        held = chains.get(account, ())
        prefix: Sequence[bytes] = held if isinstance(held, Sequence) else list(held)
        for raw in raws:
            outcome = book.apply(raw, now_ms, keep=False)
            if isinstance(outcome, NotYet) and outcome.need == "lookup" and outcome.need_from < len(prefix):
                book.supply(prefix[outcome.need_from])
                book.drain(now_ms)
        book.check_branch(account, prefix, now_ms)
