"""The purse: writes this node's own chain. Every entry is judged by the rules of all books before it is signed.

An entry that a purse returns must be durable before it leaves this machine; a second content for its place is never
signed, since that would convict this node.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from clawnet import limits
from clawnet.errors import FundsError, NotPermittedError, WireError
from clawnet.ledger.book import Book
from clawnet.ledger.entries import (
    ENTRY_SIGNATURE_TAG,
    ZERO_HASH,
    Body,
    Checkpoint,
    Claim,
    ClaimItem,
    Genesis,
    Grant,
    Lock,
    LockLine,
    Parsed,
    Refund,
    RefundItem,
    Release,
    ReleaseItem,
    Rotate,
    Send,
    Sign,
    draft,
    parse,
    possession_message,
    with_signature,
)
from clawnet.ledger.rules import Change, Fault
from clawnet.ledger.state import Payable
from clawnet.money import AMOUNT_UCR_MAX, format_credits

_FUNDS: Final = frozenset({"funds", "open_lines", "grant_max", "issue_total"})


class Purse:
    """Appends to the chain of `account` in `book`.

    `read_only_reason`, when set by the owner of this object (a restored home, a clock far off), refuses every entry
    with that sentence.
    """

    def __init__(self, book: Book, account: bytes, sign: Sign, *, read_only_reason: str = "") -> None:
        self.book = book
        self.account = account
        self.read_only_reason = read_only_reason
        self._sign = sign

    @property
    def available_ucr(self) -> int:
        """What can be sent or locked now."""
        return self.book.view(self.account).available_ucr

    @property
    def opened(self) -> bool:
        """Whether the chain has its genesis entry."""
        return self.book.head(self.account) is not None

    @property
    def checkpoint_due(self) -> bool:
        """Whether the next checkpoint should be written."""
        view = self.book.view(self.account)
        return view.seq - view.checkpoint_seq >= limits.CHECKPOINT_EVERY

    def genesis(self, now_ms: int, *, revocation: bytes = ZERO_HASH, stamp: bytes | None = None) -> Parsed:
        """Opens the chain; `stamp` is a proof of work."""
        return self._append(Genesis(revocation, stamp), now_ms)

    def grant(self, payee: bytes, amount_ucr: int, invite: bytes, now_ms: int) -> Parsed:
        """Creates credits for `payee`; issuers only, once per payee."""
        self._check_amount(amount_ucr)
        return self._append(Grant(payee, amount_ucr, invite), now_ms)

    def send(self, payee: bytes, amount_ucr: int, memo_hash: bytes, now_ms: int) -> Parsed:
        """Pays `payee`."""
        self._check_amount(amount_ucr)
        return self._append(Send(payee, amount_ucr, memo_hash), now_ms)

    def lock(self, lines: Sequence[LockLine], deliver_by_ms: int, expiry_ms: int, now_ms: int) -> Parsed:
        """Binds amounts: one entry for all the lines of a turn that share their times."""
        for line in lines:
            self._check_amount(line.amount_ucr)
        return self._append(Lock(deliver_by_ms, expiry_ms, None, list(lines)), now_ms)

    def release(self, items: Sequence[ReleaseItem], now_ms: int) -> Parsed:
        """Pays delivered parts. The sealed results must become durable in the same transaction, or before."""
        return self._append(Release(list(items)), now_ms)

    def refund(self, items: Sequence[RefundItem], now_ms: int) -> Parsed:
        """Takes back what is left of lines, at expiry or with a waiver."""
        return self._append(Refund(list(items)), now_ms)

    def claim(self, items: Sequence[ClaimItem], now_ms: int) -> Parsed:
        """Counts incomes; for releases it shows the keys, so only after the payer's chain was found good."""
        return self._append(Claim(list(items)), now_ms)

    def checkpoint(self, now_ms: int) -> Parsed:
        """States what the chain adds up to."""
        return self._append(Checkpoint(self.book.state_hash(self.account)), now_ms)

    def rotate(self, new_key: bytes, new_sign: Sign, now_ms: int) -> Parsed:
        """Hands the chain to a new key, which signs every entry after this one."""
        seq, prev = self._next_place()
        possession = new_sign(possession_message(self.account, seq, prev))
        entry = self._append(Rotate(new_key, possession), now_ms)
        self._sign = new_sign
        return entry

    def _next_place(self) -> tuple[int, bytes]:
        head = self.book.head(self.account)
        return (0, ZERO_HASH) if head is None else (head[0] + 1, head[1])

    def _append(self, body: Body, now_ms: int) -> Parsed:
        """Drafts, judges, signs, adds. Raises FundsError or NotPermittedError before anything is signed."""
        if self.read_only_reason:
            raise NotPermittedError(
                f"the wallet is read-only: {self.read_only_reason}",
                hint="clawnet doctor says what it waits for",
            )
        seq, prev = self._next_place()
        try:
            entry = parse(draft(self.book.mesh, self.account, seq, prev, now_ms, body).raw)
        except WireError as error:
            raise NotPermittedError(f"the ledger does not allow it: {error.message}") from error
        if entry.defect:
            raise NotPermittedError(f"the ledger does not allow it: {entry.defect}", reason="malformed")
        self._check_standing(entry)
        verdict = self.book.judge_next(entry)
        if isinstance(verdict, Fault):
            raise self._refusal(verdict)
        if not isinstance(verdict, Change):
            raise NotPermittedError(
                "a payment cannot be claimed yet: the payer's entries up to it are not all here",
                need=verdict.need,
            )
        signed = with_signature(entry, self._sign(ENTRY_SIGNATURE_TAG + entry.hash))
        self.book.append_own(signed, verdict)
        return signed

    def _check_standing(self, entry: Parsed) -> None:
        view = self.book.view(self.account)
        if entry.upgrade or view.upgrade:
            raise NotPermittedError(view.upgrade or f"{entry.upgrade} needs a later version of clawnet")
        body = entry.body
        spent_ucr = 0
        if isinstance(body, Send):
            spent_ucr = body.amount_ucr
        elif isinstance(body, Lock):
            spent_ucr = sum(line.amount_ucr for line in body.lines)
        if spent_ucr > view.available_ucr:
            raise FundsError(
                f"{format_credits(spent_ucr)} credits are needed, {format_credits(view.available_ucr)} are available",
                hint="clawnet wallet escrows shows what is bound, and until when",
                needed_ucr=spent_ucr,
                available_ucr=view.available_ucr,
            )

    def _refusal(self, fault: Fault) -> FundsError | NotPermittedError:
        error = FundsError if fault.reason in _FUNDS else NotPermittedError
        return error(f"the ledger does not allow it: {fault.text}", reason=fault.reason)

    def _check_amount(self, amount_ucr: int) -> None:
        if not 0 < amount_ucr <= AMOUNT_UCR_MAX:
            raise FundsError(f"{format_credits(amount_ucr)} credits is not an amount that can be paid")


def claim_item(payable: Payable, key: bytes | None) -> ClaimItem:
    """The claim on a payment: `key` is shown for a release, None for a grant or a send."""
    return ClaimItem(payable.payer, payable.seq, payable.hash, payable.index, payable.amount_ucr, key, None)
