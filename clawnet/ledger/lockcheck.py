"""Is this lock good? The worker's list of docs/LEDGER.md section 11, asked before any work is done."""

from __future__ import annotations

from msgspec import Struct

from clawnet import limits
from clawnet.ledger.book import Book
from clawnet.ledger.entries import Parsed
from clawnet.ledger.state import Line, Payable


class LockName(Struct, frozen=True, gc=False):
    """A lock entry by its place and hash; its bytes need not be at hand, for the book holds its open lines."""

    account: bytes
    seq: int
    hash: bytes


class Expected(Struct, frozen=True, gc=False):
    """What the payee knows of the line it was promised.

    `estimate_ms` is how long the work will take from now, `exposure_max_ucr` the most that may be open from this payer
    to this payee, `open_lines_max` the most lines of this payer in all. `used`: the line serves another attempt.
    """

    account: bytes
    task: bytes
    bid_ucr: int
    estimate_ms: int
    exposure_max_ucr: int
    parts: int = 1
    open_lines_max: int = limits.OPEN_LINES_MAX
    banned: bool = False
    used: bool = False


def check_lock(book: Book, lock: LockName | Parsed, line: int, expected: Expected, now_ms: int) -> str:
    """The word for the first thing wrong with the line, "" when work may begin.

    The lock must have been applied to the book before. Words: chain, banned, forked, invalid, upgrade, debt (the
    payer's account), account, task, amount, parts, used (the line), clock, deliver_by, margin (its times), open_lines,
    exposure (limits).
    """
    view = book.view(lock.account)
    if expected.banned:
        return "banned"
    if view.refuse and view.refuse != "unknown":
        return view.refuse
    held = book.line(lock.account, lock.seq, line)
    if held is None or held.lock_hash != lock.hash:
        return "chain"
    return _line(held, expected) or _times(book, held, expected, now_ms) or _limits(book, lock.account, expected)


def _line(held: Line, expected: Expected) -> str:
    if held.payee != expected.account:
        return "account"
    if held.task != expected.task:
        return "task"
    if held.amount_ucr < expected.bid_ucr:
        return "amount"
    if held.parts != expected.parts:
        return "parts"
    return "used" if expected.used else ""


def _times(book: Book, held: Line, expected: Expected, now_ms: int) -> str:
    if abs(held.time_ms - now_ms) > limits.CLOCK_AHEAD_MS:
        return "clock"
    if now_ms + expected.estimate_ms > held.deliver_by_ms:
        return "deliver_by"
    if held.deliver_by_ms + book.terms.margin_ms > held.expiry_ms:
        return "margin"
    return ""


def _limits(book: Book, payer: bytes, expected: Expected) -> str:
    if book.view(payer).open_lines > expected.open_lines_max:
        return "open_lines"
    if book.exposure_ucr(payer, expected.account) > expected.exposure_max_ucr:
        return "exposure"
    return ""


def check_release(book: Book, release: Payable, amount_ucr: int, key_hash: bytes, note_hash: bytes) -> str:
    """May the payee show its key for this release (section 6, step 7)? "" or: forked, amount, key, note.

    `release` comes from the book, so the payer's chain is valid up to it; the other three are of the payee's own note.
    """
    view = book.view(release.payer)
    if view.refuse == "forked" and release.seq > view.good_seq:
        return "forked"
    if release.amount_ucr < amount_ucr:
        return "amount"
    if release.key_hash != key_hash:
        return "key"
    return "" if release.note_hash == note_hash else "note"
