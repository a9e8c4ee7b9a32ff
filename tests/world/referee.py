"""The referee: judges every entry that a disk takes in, and knows what all books must add up to.

It reads entries with the product's decoder and uses nothing else of the ledger: sums, lines, payments and claims are
its own, so that a wrong rule in the product is seen here.
"""

from __future__ import annotations

from hashlib import sha256

from msgspec import Struct, field

from clawnet.ledger.entries import Claim, Grant, Lock, Parsed, Refund, Release, Send, parse
from tests.world.clock import LawBroken


class Line(Struct):
    """One locked line: `left_ucr` reaches 0 by releases and at most one refund."""

    payee: bytes
    task: bytes
    amount_ucr: int
    left_ucr: int
    expiry_ms: int
    released_ucr: int = 0
    refunded: bool = False


class Payment(Struct):
    """A grant, send or release that its payee may claim once."""

    payee: bytes
    amount_ucr: int
    key_hash: bytes | None
    line: tuple[int, int] | None
    claimed: bool = False


class Chain(Struct):
    """One author's entries, in order."""

    hashes: list[bytes] = field(default_factory=list)
    raws: list[bytes] = field(default_factory=list)
    available_ucr: int = 0
    lines: dict[tuple[int, int], Line] = field(default_factory=dict)
    payments: dict[tuple[int, int], Payment] = field(default_factory=dict)


class Referee:
    """All chains as their authors made them durable."""

    def __init__(self, names: dict[bytes, str]) -> None:
        self.names = names
        self.chains: dict[bytes, Chain] = {}
        self.granted_ucr = 0
        self.liars: frozenset[bytes] = frozenset()
        """Accounts whose chains are nobody's law; what honest ones claim of them comes from outside."""
        self.outside_ucr = 0
        self._outside: set[tuple[bytes, bytes, tuple[int, int]]] = set()
        self.entries_total = 0
        self.releases_total = 0
        self.refunds_total = 0
        self.paid_tasks: dict[tuple[bytes, bytes], tuple[int, int]] = {}
        """(payer, task hash) -> the one line of it that was released."""

    def _fail(self, account: bytes, seq: int, why: str) -> LawBroken:
        return LawBroken(f"ledger: entry {seq} of {self.names.get(account, account.hex()[:8])}: {why}")

    def saw(
        self, keeper: bytes, account: bytes, seq: int, entry_hash: bytes, raw: bytes, durable: bool
    ) -> Parsed | None:
        """An entry goes to the disk of `keeper`. Returns it when its author writes it now."""
        if account in self.liars:
            return None
        chain = self.chains.setdefault(account, Chain())
        if seq < len(chain.hashes):
            if chain.hashes[seq] != entry_hash:
                raise self._fail(account, seq, "a second content for one place: the chain forks")
            return None
        if keeper != account:
            who = self.names.get(keeper, "?")
            raise self._fail(
                account, seq, f"{who} holds it, and its author has not made it durable: it spoke too early"
            )
        if not durable:
            raise self._fail(account, seq, "an own entry is committed without a sync")
        if seq != len(chain.hashes):
            raise self._fail(account, seq, f"a gap; the next place is {len(chain.hashes)}")
        entry = parse(raw)
        chain.hashes.append(entry_hash)
        chain.raws.append(raw)
        self.entries_total += 1
        self._apply(chain, entry)
        if chain.available_ucr < 0:
            raise self._fail(account, seq, f"available falls to {chain.available_ucr}")
        return entry

    def _apply(self, chain: Chain, entry: Parsed) -> None:
        body = entry.body
        if isinstance(body, Grant):
            self.granted_ucr += body.amount_ucr
            chain.payments[entry.seq, 0] = Payment(body.payee, body.amount_ucr, None, None)
        elif isinstance(body, Send):
            chain.available_ucr -= body.amount_ucr
            chain.payments[entry.seq, 0] = Payment(body.payee, body.amount_ucr, None, None)
        elif isinstance(body, Lock):
            for at, line in enumerate(body.lines):
                chain.available_ucr -= line.amount_ucr
                chain.lines[entry.seq, at] = Line(
                    line.payee, line.task, line.amount_ucr, line.amount_ucr, body.expiry_ms
                )
        elif isinstance(body, Release):
            for at, item in enumerate(body.items):
                self._release(chain, entry, at, item.lock_seq, item.line, item.amount_ucr, item.key_hash)
        elif isinstance(body, Refund):
            for refund in body.items:
                self._refund(chain, entry, refund.lock_seq, refund.line, refund.proof is not None)
        elif isinstance(body, Claim):
            for claim in body.items:
                self._claim(chain, entry, claim.payer, (claim.seq, claim.index), claim.amount_ucr, claim.key)

    def _release(
        self, chain: Chain, entry: Parsed, at: int, lock_seq: int, number: int, amount_ucr: int, key_hash: bytes
    ) -> None:
        place = (lock_seq, number)
        line = chain.lines.get(place)
        if line is None or line.refunded or not 0 < amount_ucr <= line.left_ucr:
            raise self._fail(entry.account, entry.seq, f"releases {amount_ucr} of line {place}, which is {line}")
        line.left_ucr -= amount_ucr
        line.released_ucr += amount_ucr
        paid = self.paid_tasks.setdefault((entry.account, line.task), place)
        if paid != place:
            raise self._fail(entry.account, entry.seq, f"one task is paid twice, by lines {paid} and {place}")
        chain.payments[entry.seq, at] = Payment(line.payee, amount_ucr, key_hash, place)
        self.releases_total += 1

    def _refund(self, chain: Chain, entry: Parsed, lock_seq: int, number: int, waived: bool) -> None:
        line = chain.lines.get((lock_seq, number))
        if line is None or line.refunded or line.left_ucr <= 0:
            raise self._fail(entry.account, entry.seq, f"refunds line {(lock_seq, number)}, which is {line}")
        if not waived and entry.time_ms < line.expiry_ms:
            raise self._fail(entry.account, entry.seq, f"refunds {line.expiry_ms - entry.time_ms} ms before expiry")
        chain.available_ucr += line.left_ucr
        line.left_ucr, line.refunded = 0, True
        self.refunds_total += 1

    def _claim(
        self, chain: Chain, entry: Parsed, payer: bytes, place: tuple[int, int], amount_ucr: int, key: bytes | None
    ) -> None:
        if payer in self.liars:
            if (entry.account, payer, place) in self._outside:
                raise self._fail(entry.account, entry.seq, f"claims {place} of {self.names.get(payer)} twice")
            self._outside.add((entry.account, payer, place))
            self.outside_ucr += amount_ucr
            chain.available_ucr += amount_ucr
            return
        paying = self.chains.get(payer)
        payment = paying.payments.get(place) if paying is not None else None
        if payment is None or payment.claimed or (payment.payee, payment.amount_ucr) != (entry.account, amount_ucr):
            raise self._fail(entry.account, entry.seq, f"claims {place} of {self.names.get(payer)}, which is {payment}")
        if payment.key_hash is not None and (key is None or sha256(key).digest() != payment.key_hash):
            raise self._fail(entry.account, entry.seq, "shows a key that is not the released one")
        payment.claimed = True
        chain.available_ucr += amount_ucr

    # --- questions

    def conservation(self) -> tuple[int, int]:
        """What is there in all, and what was granted, or claimed of liars."""
        there = 0
        for chain in self.chains.values():
            there += chain.available_ucr
            there += sum(line.left_ucr for line in chain.lines.values())
            there += sum(payment.amount_ucr for payment in chain.payments.values() if not payment.claimed)
        return there, self.granted_ucr + self.outside_ucr

    def line_ends(self) -> list[str]:
        """Lines that have not ended, at a time when all must have."""
        return [
            f"line {place} of {self.names.get(account)}: {line}"
            for account, chain in self.chains.items()
            for place, line in chain.lines.items()
            if line.left_ucr
        ]

    def unclaimed(self) -> list[str]:
        """Payments that nobody has claimed, at a time when all must have been."""
        return [
            f"payment {place} of {self.names.get(account)} to {self.names.get(payment.payee)}: {payment.amount_ucr}"
            for account, chain in self.chains.items()
            for place, payment in chain.payments.items()
            if not payment.claimed and payment.payee not in self.liars
        ]
