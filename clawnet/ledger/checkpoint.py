"""Countersigned checkpoints: an audit may start at one instead of at genesis (docs/LEDGER.md section 10)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

from clawnet.errors import NotPermittedError, RemoteError
from clawnet.ledger.book import Book
from clawnet.ledger.entries import Checkpoint, Parsed, Sign, Verify, parse, signed_by
from clawnet.ledger.proofs import rotated_keys
from clawnet.ledger.state import Account, HashTail, StateDocument, read_state, state_hash
from clawnet.ledger.statements import Countersign

STATEMENTS_MAX: Final = 16


def countersign(book: Book, account: bytes, seq: int, entry_hash: bytes, sign: Sign) -> bytes:
    """States that this node audited the chain up to here. What it holds it holds for ever, so it never says it twice
    of two hashes.

    Raises NotPermittedError where it cannot say so.
    """
    view = book.view(account)
    if view.refuse in ("forked", "invalid", "upgrade"):
        raise NotPermittedError(f"the chain cannot be countersigned: {view.refuse}")
    if not book.holds(account, seq, entry_hash):
        raise NotPermittedError("the entry to countersign is not in the chain held here")
    return Countersign(book.mesh, account, seq, entry_hash, 0).signed(sign)


def countersigned(
    book: Book, entry: Parsed, statements: Sequence[bytes], auditors: Collection[bytes], verify: Verify
) -> bool:
    """Whether one of `auditors` (public keys of own-ring nodes and of issuers) countersigned this entry."""
    for statement in statements[:STATEMENTS_MAX]:
        for auditor in auditors:
            try:
                said = Countersign.verified(statement, auditor, verify)
            except RemoteError:
                continue
            if (said.mesh, said.account, said.seq, said.hash) == (book.mesh, entry.account, entry.seq, entry.hash):
                return True
    return False


def adopt(
    book: Book,
    raw: bytes,
    document: bytes,
    statements: Sequence[bytes],
    auditors: Collection[bytes],
    rotations: Sequence[bytes],
    verify: Verify,
) -> str:
    """Starts an account that this book does not know at a countersigned checkpoint; "" or why not.

    `document` is the state that the checkpoint hashes, `rotations` the account's rotate entries before it. Older
    payments that it made are proved later by Book.supply_linked.
    """
    try:
        entry = parse(raw)
        keys = rotated_keys(entry.account, rotations, book.mesh, verify)
        state = read_state(document)
    except RemoteError as error:
        return error.message
    body = entry.body
    if not isinstance(body, Checkpoint) or entry.mesh != book.mesh or entry.seq == 0:
        return "not a checkpoint of this mesh"
    if book.view(entry.account).seq >= 0:
        return "the chain is held here already"
    if body.state_hash != state_hash(document):
        return "the state document is not the one that the checkpoint states"
    key = keys[-1][1] if keys else entry.account
    if state.key != key or not signed_by(entry, key, verify):
        return "the checkpoint is not signed by the account's key"
    if not countersigned(book, entry, statements, auditors, verify):
        return "no auditor that counts has countersigned the checkpoint"
    if not book.has_room():
        return "more accounts than a book can hold"
    account = _account_at(entry, state)
    account.rotations = [(seq, new, raw) for (seq, new), raw in zip(keys, rotations, strict=True)]
    book.install(account)
    return ""


def _account_at(entry: Parsed, document: StateDocument) -> Account:
    state = Account(entry.account)
    state.key = document.key
    state.seq = state.base_seq = state.checkpoint_seq = state.spilled_seq = entry.seq
    state.hash = entry.hash
    state.time_ms = entry.time_ms
    state.available_ucr = document.available_ucr
    state.issued_ucr = document.issued_ucr
    state.granted = set(document.granted)
    state.lines = {line.key: line for line in document.lines}
    state.open_ucr = sum(line.left_ucr for line in document.lines)
    state.cursors = {payer: (seq, index) for payer, seq, index in document.cursors}
    state.tail = HashTail(entry.seq, entry.hash)
    return state
