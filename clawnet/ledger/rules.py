"""When an entry is valid (docs/LEDGER.md section 4), as functions of the author's state and what others' chains hold.

A check changes nothing: it answers with the Change to make, a Fault (the entry is invalid for ever) or a Missing (it
cannot be judged yet). Every function is bounded by the number of items in the entry.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from typing import Final, cast

from msgspec import Struct

from clawnet.errors import RemoteError
from clawnet.ledger.entries import (
    ZERO_HASH,
    Body,
    Checkpoint,
    Claim,
    ClaimItem,
    EntryKind,
    Genesis,
    Grant,
    Lock,
    Parsed,
    Proof,
    Refund,
    Release,
    Rotate,
    Send,
    Verify,
    possession_message,
    pow_bits_of,
)
from clawnet.ledger.outcomes import Need
from clawnet.ledger.proofs import current_key
from clawnet.ledger.state import Account, Line, LineKey, Payable, Place, state_bytes, state_hash
from clawnet.ledger.statements import Waiver
from clawnet.ledger.terms import LedgerTerms


class Fault(Struct, frozen=True, gc=False):
    """The rule that the entry breaks: a word for programs, a sentence for people."""

    reason: str
    text: str


class Missing(Struct, frozen=True, gc=False):
    """What must be known before the entry can be judged; see NotYet."""

    need: Need
    account: bytes
    first: int
    last: int


class Income(Struct, frozen=True, gc=False):
    """A claimed payment that exists: on the held branch, or (void) on another one. `payable` None: trusted replay."""

    payable: Payable | None
    void: bool


class Change:
    """What a valid entry does to its author's state."""

    __slots__ = (
        "available_ucr",
        "claimed_ucr",
        "closed",
        "consumed",
        "cursors",
        "granted",
        "issued_ucr",
        "key",
        "lines",
        "open_ucr",
        "opened",
        "opening_ucr",
        "payables",
        "void_ucr",
    )

    def __init__(self) -> None:
        self.available_ucr = 0
        self.open_ucr = 0
        self.opening_ucr = 0
        self.issued_ucr = 0
        self.claimed_ucr = 0
        self.void_ucr = 0
        self.key: bytes | None = None
        self.granted: bytes | None = None
        self.opened: list[Line] = []
        self.lines: dict[LineKey, tuple[int, int]] = {}
        """(left, parts done) after this entry, of the lines it touches."""
        self.closed: list[LineKey] = []
        self.payables: list[Payable] = []
        self.consumed: list[Payable | None] = []
        self.cursors: dict[bytes, Place] = {}


Verdict = Change | Fault | Missing
Resolve = Callable[[Account, ClaimItem], Income | Fault | Missing]
"""Finds the payment that a claim item of this author names."""


class Court(Struct, frozen=True, gc=False):
    """What judging needs besides the author's state."""

    terms: LedgerTerms
    mesh: bytes
    verify: Verify
    resolve: Resolve


def judge(court: Court, state: Account, entry: Parsed) -> Verdict:
    """Applies the row of the table for this entry's kind; signature, place and time are the book's to check."""
    if (entry.kind == EntryKind.GENESIS) != (entry.seq == 0):
        return Fault("genesis", "a chain begins with a genesis entry and has no other")
    if entry.seq == 0 and entry.prev != ZERO_HASH:
        return Fault("genesis", "a genesis entry that follows another entry")
    return _CHECKS[entry.kind](court, state, entry, cast(Body, entry.body))


def _genesis(court: Court, state: Account, entry: Parsed, body: Body) -> Verdict:
    assert isinstance(body, Genesis)
    change = Change()
    terms = court.terms
    if body.pow is not None:
        if pow_bits_of(court.mesh, entry.account, body.pow) < terms.pow_bits:
            return Fault("pow", f"the proof of work is below {terms.pow_bits} bits")
        if terms.open_mesh:
            change.opening_ucr = change.available_ucr = terms.stranger_credit_ucr
    return change


def _grant(court: Court, state: Account, entry: Parsed, body: Body) -> Verdict:
    assert isinstance(body, Grant)
    terms = court.terms
    if entry.account not in terms.issuers:
        return Fault("issuer", "only the charter's issuers grant")
    if body.payee in state.granted:
        return Fault("granted", "this account was granted before")
    if body.amount_ucr > terms.grant_max_ucr:
        return Fault("grant_max", f"a grant of {body.amount_ucr} ucr is above the charter's {terms.grant_max_ucr}")
    if state.issued_ucr + body.amount_ucr > terms.issue_total_max_ucr:
        return Fault("issue_total", f"the issuer's total would pass the charter's {terms.issue_total_max_ucr} ucr")
    change = Change()
    change.granted = body.payee
    change.issued_ucr = body.amount_ucr
    change.payables.append(
        Payable(entry.account, body.payee, entry.seq, 0, entry.hash, int(EntryKind.GRANT), body.amount_ucr)
    )
    return change


def _send(court: Court, state: Account, entry: Parsed, body: Body) -> Verdict:
    assert isinstance(body, Send)
    if body.payee == entry.account:
        return Fault("payee", "a payment to its own author")
    if body.amount_ucr > state.available_ucr:
        return Fault("funds", f"{body.amount_ucr} ucr sent, {state.available_ucr} available")
    change = Change()
    change.available_ucr = -body.amount_ucr
    change.payables.append(
        Payable(entry.account, body.payee, entry.seq, 0, entry.hash, int(EntryKind.SEND), body.amount_ucr)
    )
    return change


def _lock(court: Court, state: Account, entry: Parsed, body: Body) -> Verdict:
    assert isinstance(body, Lock)
    terms = court.terms
    if any(line.payee == entry.account for line in body.lines):
        return Fault("payee", "a line that pays its own author")
    if body.deliver_by_ms + terms.margin_ms > body.expiry_ms:
        return Fault("margin", f"less than {terms.margin_ms} ms between delivery and expiry")
    if body.expiry_ms > entry.time_ms + terms.lock_max_ms:
        return Fault("expiry", f"locked for longer than {terms.lock_max_ms} ms")
    if len(state.lines) + len(body.lines) > terms.open_lines_max:
        return Fault("open_lines", f"more than {terms.open_lines_max} open lines")
    total_ucr = sum(line.amount_ucr for line in body.lines)
    if total_ucr > state.available_ucr:
        return Fault("funds", f"{total_ucr} ucr locked, {state.available_ucr} available")
    change = Change()
    change.available_ucr = -total_ucr
    change.open_ucr = total_ucr
    change.opened = [
        Line(
            entry.seq,
            number,
            entry.hash,
            line.task,
            line.payee,
            line.amount_ucr,
            line.amount_ucr,
            line.parts,
            0,
            body.deliver_by_ms,
            body.expiry_ms,
            entry.time_ms,
        )
        for number, line in enumerate(body.lines)
    ]
    return change


def _release(court: Court, state: Account, entry: Parsed, body: Body) -> Verdict:
    assert isinstance(body, Release)
    change = Change()
    for index, item in enumerate(body.items):
        key = (item.lock_seq, item.line)
        line = state.lines.get(key)
        if line is None:
            return Fault("line", f"line {item.line} of lock {item.lock_seq} is not open")
        left_ucr, parts_done = change.lines.get(key, (line.left_ucr, line.parts_done))
        if item.part != parts_done + 1 or item.part > line.parts:
            return Fault("part", f"part {item.part} released after part {parts_done} of {line.parts}")
        if item.amount_ucr > left_ucr:
            return Fault("amount", f"{item.amount_ucr} ucr released, {left_ucr} left in the line")
        change.lines[key] = (left_ucr - item.amount_ucr, item.part)
        change.open_ucr -= item.amount_ucr
        change.payables.append(
            Payable(
                entry.account,
                line.payee,
                entry.seq,
                index,
                entry.hash,
                int(EntryKind.RELEASE),
                item.amount_ucr,
                item.key_hash,
                item.note_hash,
                item.lock_seq,
                item.line,
                item.part,
                line.task,
            )
        )
    change.closed = [key for key, (left_ucr, _) in change.lines.items() if left_ucr == 0]
    return change


def _refund(court: Court, state: Account, entry: Parsed, body: Body) -> Verdict:
    assert isinstance(body, Refund)
    change = Change()
    seen: set[LineKey] = set()
    for item in body.items:
        key = (item.lock_seq, item.line)
        line = state.lines.get(key)
        if line is None or key in seen:
            return Fault("line", f"line {item.line} of lock {item.lock_seq} is not open")
        if entry.time_ms < line.expiry_ms and not waived(court, entry.account, line, item.proof):
            return Fault("expiry", f"line {item.line} of lock {item.lock_seq} taken back before its expiry, not waived")
        seen.add(key)
        change.available_ucr += line.left_ucr
        change.closed.append(key)
    change.open_ucr = -change.available_ucr
    return change


def waived(court: Court, payer: bytes, line: Line, proof: Proof | None) -> bool:
    """Whether the payee, under any key it ever had, gave back what comes after the parts already released."""
    if proof is None:
        return False
    try:
        key = current_key(line.payee, proof.statements[1:], court.mesh, court.verify)
        waiver = Waiver.verified(proof.statements[0], key, court.verify)
    except RemoteError:
        return False
    return (
        waiver.mesh == court.mesh
        and waiver.payer == payer
        and waiver.lock_hash == line.lock_hash
        and waiver.line == line.line
        and waiver.after_part <= line.parts_done
    )


def _claim(court: Court, state: Account, entry: Parsed, body: Body) -> Verdict:
    assert isinstance(body, Claim)
    change = Change()
    missing: Missing | None = None
    for item in body.items:
        place = (item.seq, item.index)
        cursor = change.cursors.get(item.payer) or state.cursors.get(item.payer)
        if cursor is not None and place <= cursor:
            return Fault("cursor", "a payment claimed twice, or out of order")
        income = court.resolve(state, item)
        if isinstance(income, Fault):
            return income
        change.cursors[item.payer] = place
        if isinstance(income, Missing):
            missing = missing or income
            continue
        fault = _mismatch(item, income.payable, entry.account)
        if fault is not None:
            return fault
        change.available_ucr += item.amount_ucr
        if income.void:
            change.void_ucr += item.amount_ucr
        else:
            change.claimed_ucr += item.amount_ucr
        change.consumed.append(None if income.void else income.payable)
    return missing or change


def _mismatch(item: ClaimItem, payable: Payable | None, author: bytes) -> Fault | None:
    if payable is None:
        return None
    if payable.payee != author:
        return Fault("payee", "a claim on another account's payment")
    if payable.amount_ucr != item.amount_ucr:
        return Fault("amount", f"{item.amount_ucr} ucr claimed of a payment of {payable.amount_ucr}")
    if payable.key_hash is None:
        return Fault("key", "a key shown for a plain payment") if item.key is not None else None
    if item.key is None or sha256(item.key).digest() != payable.key_hash:
        return Fault("key", "the key shown is not the one released for")
    return None


def _checkpoint(court: Court, state: Account, entry: Parsed, body: Body) -> Verdict:
    assert isinstance(body, Checkpoint)
    if body.state_hash != state_hash(state_bytes(state)):
        return Fault("state", "the checkpoint states another state than the chain adds up to")
    return Change()


def _rotate(court: Court, state: Account, entry: Parsed, body: Body) -> Verdict:
    assert isinstance(body, Rotate)
    if not court.verify(body.new_key, possession_message(entry.account, entry.seq, entry.prev), body.possession):
        return Fault("possession", "the new key does not show possession")
    change = Change()
    change.key = body.new_key
    return change


_CHECKS: Final[dict[int, Callable[[Court, Account, Parsed, Body], Verdict]]] = {
    EntryKind.GENESIS: _genesis,
    EntryKind.GRANT: _grant,
    EntryKind.SEND: _send,
    EntryKind.LOCK: _lock,
    EntryKind.RELEASE: _release,
    EntryKind.REFUND: _refund,
    EntryKind.CLAIM: _claim,
    EntryKind.CHECKPOINT: _checkpoint,
    EntryKind.ROTATE: _rotate,
}


def commit(state: Account, entry: Parsed, change: Change) -> None:
    """Makes the entry the head of its author's state. Payments of other chains are the book's to forget."""
    state.seq = entry.seq
    state.hash = entry.hash
    state.time_ms = entry.time_ms
    state.tail.append(entry.hash)
    state.available_ucr += change.available_ucr
    state.open_ucr += change.open_ucr
    state.opening_ucr += change.opening_ucr
    state.issued_ucr += change.issued_ucr
    state.claimed_ucr += change.claimed_ucr
    state.void_ucr += change.void_ucr
    if change.granted is not None:
        state.granted.add(change.granted)
    for line in change.opened:
        state.lines[(line.lock_seq, line.line)] = line
    for key, (left_ucr, parts_done) in change.lines.items():
        line = state.lines[key]
        line.left_ucr = left_ucr
        line.parts_done = parts_done
    for key in change.closed:
        del state.lines[key]
    for payable in change.payables:
        state.paid_ucr += payable.amount_ucr
    state.cursors.update(change.cursors)
    if change.key is not None:
        state.key = change.key
        state.rotations.append((entry.seq, change.key, entry.raw))
    if entry.kind == EntryKind.CHECKPOINT:
        state.checkpoint_seq = entry.seq
