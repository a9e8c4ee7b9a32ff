"""A small mesh of chains for the ledger's tests: named accounts with stub keys, one book and purse each."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b, sha256

from clawnet.ledger.book import Book
from clawnet.ledger.entries import Body, LockLine, Parsed, ReleaseItem, build
from clawnet.ledger.outcomes import Added, Outcome
from clawnet.ledger.purse import Purse, claim_item
from clawnet.ledger.state import Payable
from clawnet.ledger.terms import LedgerTerms

MESH = sha256(b"mesh").digest()
NOW = 1_800_000_000_000
CREDIT = 1_000_000
ZERO = bytes(32)


class StubKeys:
    """Signatures that only their owner can make and this oracle can check: blake2b under a secret per key."""

    def __init__(self) -> None:
        self._secrets: dict[bytes, bytes] = {}
        self.verified = 0

    def new(self, name: str) -> bytes:
        public = sha256(b"public " + name.encode()).digest()
        self._secrets[public] = sha256(b"secret " + name.encode()).digest()
        return public

    def signer(self, public: bytes):
        secret = self._secrets[public]
        return lambda message: blake2b(message, key=secret, digest_size=64).digest()

    def verify(self, public: bytes, message: bytes, signature: bytes) -> bool:
        self.verified += 1
        secret = self._secrets.get(public)
        return secret is not None and blake2b(message, key=secret, digest_size=64).digest() == signature


class Member:
    """One node's ledger: its own book, and a purse on it."""

    def __init__(self, mesh: Mesh, name: str) -> None:
        self.mesh = mesh
        self.name = name
        self.account = mesh.keys.new(name)
        self.sign = mesh.keys.signer(self.account)
        self.book = Book(mesh.terms, MESH, mesh.keys.verify)
        self.purse = Purse(self.book, self.account, self.sign)

    def sign_any(self, seq: int, prev: bytes, body: Body, *, time_ms: int = NOW) -> Parsed:
        """An entry this member signs whatever the rules say."""
        return build(MESH, self.account, seq, prev, time_ms, body, self.sign)


class Mesh:
    """A founder who issues, members with granted credits, and every entry anybody wrote, in order."""

    def __init__(self, names: Sequence[str] = ("alice", "bob"), *, credits_each: int = 100, **terms: object) -> None:
        self.keys = StubKeys()
        founder = self.keys.new("founder")
        self.terms = LedgerTerms(issuers=frozenset({founder}), **terms)
        self.members: dict[str, Member] = {}
        self.log: list[Parsed] = []
        self.now_ms = NOW
        self.member("founder")
        for name in names:
            self.member(name)
        for name in names:
            self.grant(name, credits_each * CREDIT)

    def __getitem__(self, name: str) -> Member:
        return self.members[name]

    def member(self, name: str) -> Member:
        member = self.members[name] = Member(self, name)
        self.put(member.purse.genesis(self.now_ms))
        for entry in self.log:
            member.book.apply(entry.raw, self.now_ms)
        return member

    def grant(self, name: str, amount_ucr: int) -> None:
        payee = self[name]
        if amount_ucr:
            self.put(self["founder"].purse.grant(payee.account, amount_ucr, bytes(16), self.now_ms))
            self.claim_all(name)

    def put(self, entry: Parsed) -> Parsed:
        """Everybody's book gets an entry that its author's purse wrote."""
        self.log.append(entry)
        for member in self.members.values():
            if member.account != entry.account:
                outcome = member.book.apply(entry.raw, self.now_ms)
                assert isinstance(outcome, Added), outcome
        return entry

    def lock(self, payer: str, *lines: tuple[str, int, int], deliver_ms: int = 60_000) -> Parsed:
        """Locks (payee, amount, parts) lines."""
        deliver_by_ms = self.now_ms + deliver_ms
        locked = [
            LockLine(sha256(f"task {n}".encode()).digest(), self[payee].account, amount, parts)
            for n, (payee, amount, parts) in enumerate(lines)
        ]
        expiry_ms = deliver_by_ms + self.terms.margin_ms
        return self.put(self[payer].purse.lock(locked, deliver_by_ms, expiry_ms, self.now_ms))

    def release(self, payer: str, *items: tuple[int, int, int, int]) -> Parsed:
        """Releases (lock_seq, line, part, amount) items, each under its own key."""
        return self.put(self[payer].purse.release([release_item(*item) for item in items], self.now_ms))

    def claim_all(self, name: str) -> Parsed:
        payee = self[name]
        return self.put(payee.purse.claim([claim(p) for p in payee.book.incomes(payee.account)], self.now_ms))

    def fresh_book(self) -> Book:
        return Book(self.terms, MESH, self.keys.verify)

    def check(self) -> None:
        """The laws: every book is conserved and agrees on every account."""
        views = None
        for member in self.members.values():
            totals = member.book.conservation()
            assert totals.conserved, (member.name, totals)
            mine = {m.account: member.book.view(m.account) for m in self.members.values()}
            assert views is None or mine == views
            views = mine


def part_key(lock_seq: int, line: int, part: int) -> bytes:
    return sha256(f"key {lock_seq} {line} {part}".encode()).digest()


def release_item(lock_seq: int, line: int, part: int, amount_ucr: int) -> ReleaseItem:
    key_hash = sha256(part_key(lock_seq, line, part)).digest()
    return ReleaseItem(lock_seq, line, part, amount_ucr, key_hash, ZERO)


def claim(payable: Payable):
    key = part_key(payable.lock_seq, payable.line, payable.part) if payable.key_hash is not None else None
    return claim_item(payable, key)


def feed(book: Book, entries: Sequence[Parsed], now_ms: int = NOW) -> list[Outcome]:
    """Applies entries in this order, and everything that becomes possible on the way."""
    outcomes: list[Outcome] = []
    for entry in entries:
        outcomes.append(book.apply(entry.raw, now_ms))
        outcomes += book.drain(now_ms)
    return outcomes


def next_of(member: Member, body: Body, time_ms: int = NOW) -> Parsed:
    """An entry at the member's head, signed without asking the rules."""
    head = member.book.head(member.account)
    assert head is not None
    return member.sign_any(head[0] + 1, head[1], body, time_ms=time_ms)


def book_payable(payer: Member, like: Parsed, *, amount_ucr: int, entry: Parsed) -> Payable:
    return Payable(payer.account, like.body.payee, entry.seq, 0, entry.hash, 2, amount_ucr)
