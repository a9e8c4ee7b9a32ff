"""Escrow histories: several lines and parts, batches, checkpoints, rotation, at random; the laws hold in every book.

These are the parts that the protocol's model check did not cover (docs/LEDGER.md section 16).
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clawnet import limits
from clawnet.errors import NotPermittedError
from clawnet.ledger.audit import audit_chains
from clawnet.ledger.book import Book
from clawnet.ledger.entries import (
    Body,
    Claim,
    ClaimItem,
    Grant,
    Lock,
    LockLine,
    Parsed,
    Proof,
    Refund,
    RefundItem,
    Release,
    Send,
    build,
)
from clawnet.ledger.outcomes import Added, Forked, Invalid, Known, NotYet, Rejected
from clawnet.ledger.statements import Waiver
from tests.rules.ledger_mesh import CREDIT, MESH, NOW, ZERO, Mesh, claim, feed, release_item

NAMES = ("alice", "bob", "carol")


class History:
    """A random honest history of three members; each step does something the rules allow, or nothing."""

    def __init__(self, seed: int, steps: int) -> None:
        self.random = random.Random(seed)
        self.m = Mesh(NAMES, open_lines_max=12)
        self.keys = {name: self.m[name].account for name in (*NAMES, "founder")}
        self.rotated = 0
        actions: list[Callable[[str], None]] = [
            self.lock, self.lock, self.release, self.release, self.claim, self.claim,
            self.refund, self.waive, self.send, self.checkpoint, self.rotate, self.grant,
        ]  # fmt: skip
        for _ in range(steps):
            self.m.now_ms += self.random.choice((0, 1_000, 60_000, 400_000))
            self.random.choice(actions)(self.random.choice(NAMES))

    def others(self, name: str) -> list[str]:
        return [other for other in NAMES if other != name]

    def lock(self, name: str) -> None:
        member = self.m[name]
        room = 12 - len(member.book.open_lines(member.account))
        lines = [
            (self.random.choice(self.others(name)), self.random.randint(1, 5 * CREDIT), self.random.randint(1, 4))
            for _ in range(min(room, self.random.randint(1, 4)))
        ]
        if lines and sum(amount for _, amount, _ in lines) <= member.purse.available_ucr:
            self.m.lock(name, *lines)

    def release(self, name: str) -> None:
        """Some lines, some of them several parts at once, in one entry."""
        items = []
        member = self.m[name]
        for line in member.book.open_lines(member.account):
            left, done = line.left_ucr, line.parts_done
            while done < line.parts and left and self.random.random() < 0.4:
                done += 1
                amount = left if self.random.random() < 0.3 else self.random.randint(1, left)
                left -= amount
                items.append((line.lock_seq, line.line, done, amount))
        if items:
            self.m.release(name, *items)

    def claim(self, name: str) -> None:
        """Everything claimable, or with some forfeited."""
        member = self.m[name]
        payables = [p for p in member.book.incomes(member.account) if self.random.random() < 0.9]
        if payables:
            self.m.put(member.purse.claim([claim(p) for p in payables], self.m.now_ms))

    def refund(self, name: str) -> None:
        member = self.m[name]
        due = [line for line in member.book.open_lines(member.account) if line.expiry_ms <= self.m.now_ms]
        if due:
            items = [RefundItem(line.lock_seq, line.line, None) for line in due]
            self.m.put(member.purse.refund(items, self.m.now_ms))

    def waive(self, name: str) -> None:
        member = self.m[name]
        for line in member.book.open_lines(member.account)[:1]:
            payee = next(other for other in self.others(name) if self.m[other].account == line.payee)
            after_part = self.random.randint(0, line.parts_done)
            waiver = Waiver(MESH, member.account, line.lock_hash, line.line, after_part)
            statements = [waiver.signed(self.m[payee].sign), *member.book.rotations(line.payee)]
            item = RefundItem(line.lock_seq, line.line, Proof(1, statements))
            self.m.put(member.purse.refund([item], self.m.now_ms))

    def send(self, name: str) -> None:
        amount = self.random.randint(1, 3 * CREDIT)
        if amount <= self.m[name].purse.available_ucr:
            payee = self.m[self.random.choice(self.others(name))].account
            self.m.put(self.m[name].purse.send(payee, amount, ZERO, self.m.now_ms))

    def checkpoint(self, name: str) -> None:
        self.m.put(self.m[name].purse.checkpoint(self.m.now_ms))

    def rotate(self, name: str) -> None:
        self.rotated += 1
        new = self.m.keys.new(f"key {self.rotated}")
        self.m.put(self.m[name].purse.rotate(new, self.m.keys.signer(new), self.m.now_ms))
        self.m[name].sign = self.m.keys.signer(new)

    def grant(self, name: str) -> None:
        payee = self.m.keys.new(f"newcomer {self.random.random()}")
        self.m.put(self.m["founder"].purse.grant(payee, self.random.randint(1, CREDIT), bytes(16), self.m.now_ms))


def same(book: Book, other: Book) -> None:
    assert {a: book.view(a) for a in book.accounts()} == {a: other.view(a) for a in other.accounts()}
    assert book.conservation() == other.conservation()
    for account in book.accounts():
        assert book.state_bytes(account) == other.state_bytes(account)
        assert book.open_lines(account) == other.open_lines(account)
        for payee in book.accounts():
            assert book.payables(account, payee) == other.payables(account, payee)


SEEDS = st.integers(0, 2**32)


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.integers(1, 40))
def test_honest_histories_are_valid_conserved_and_equal_in_every_book(seed: int, steps: int) -> None:
    history = History(seed, steps)
    history.m.check()
    chains: dict[bytes, list[bytes]] = {}
    for entry in history.m.log:
        chains.setdefault(entry.account, []).append(entry.raw)
    report = audit_chains(history.m.terms, MESH, chains, history.m.keys.verify)
    assert report.sound
    totals = history.m["alice"].book.conservation()
    assert (report.available_ucr, report.granted_ucr) == (totals.available_ucr, totals.granted_ucr)
    for account, audited in report.accounts.items():
        view = history.m["alice"].book.view(account)
        assert (audited.available_ucr, audited.open_ucr, audited.head) == (view.available_ucr, view.open_ucr, view.hash)
        assert audited.entries == len(chains[account])


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.integers(1, 30))
def test_any_order_and_any_repetition_end_in_the_same_book(seed: int, steps: int) -> None:
    history = History(seed, steps)
    entries = [entry for entry in history.m.log for _ in range(history.random.randint(1, 2))]
    history.random.shuffle(entries)
    book = history.m.fresh_book()
    for entry in entries:
        outcomes = [book.apply(entry.raw, history.m.now_ms), *book.drain(history.m.now_ms)]
        assert all(isinstance(outcome, Added | Known | NotYet) for outcome in outcomes)
        assert book.conservation().conserved
    rotated_early = [entry for entry in history.m.log if (book.head(entry.account) or (-1,))[0] < entry.seq]
    feed(book, rotated_early, history.m.now_ms)
    same(book, history.m["alice"].book)


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.integers(1, 30))
def test_snapshots_of_any_age_and_the_entries_after_them_restore_the_book(seed: int, steps: int) -> None:
    """As after a crash: each account's snapshot is from another moment; later entries come in any order of accounts."""
    history = History(seed, steps)
    book = history.m.fresh_book()
    kept: dict[bytes, bytes] = {}
    for entry in history.m.log:
        book.apply(entry.raw, history.m.now_ms)
        if history.random.random() < 0.3:
            account = history.random.choice(sorted(book.accounts()))
            kept[account] = book.snapshot(account)
    again = history.m.fresh_book()
    snapshots = list(kept.values())
    history.random.shuffle(snapshots)
    for snapshot in snapshots:
        again.restore(snapshot)
    accounts = sorted({entry.account for entry in history.m.log})
    history.random.shuffle(accounts)
    verified = history.m.keys.verified
    for account in accounts:
        head = again.head(account)
        for entry in history.m.log:
            if entry.account == account and (head is None or entry.seq > head[0]):
                assert isinstance(again.apply(entry.raw, 0, trusted=True), Added)
    rotations = sum(len(book.rotations(account)) for account in accounts)
    waivers = sum(len(e.body.items) for e in history.m.log if isinstance(e.body, Refund))
    assert history.m.keys.verified <= verified + rotations + waivers * (1 + 2 * rotations), "no entry is verified twice"
    same(again, book)


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.integers(5, 25), st.data())
def test_an_entry_changed_after_it_was_signed_is_refused(seed: int, steps: int, data: st.DataObject) -> None:
    history = History(seed, steps)
    at = data.draw(st.integers(0, len(history.m.log) - 1))
    entry = history.m.log[at]
    bit = data.draw(st.integers(0, 8 * len(entry.raw) - 1))
    raw = bytearray(entry.raw)
    raw[bit // 8] ^= 1 << bit % 8
    book = history.m.fresh_book()
    feed(book, history.m.log[:at], history.m.now_ms)
    before = book.conservation()
    outcome = book.apply(bytes(raw), history.m.now_ms)
    assert isinstance(outcome, Rejected | NotYet), outcome
    assert book.conservation() == before
    assert book.view(entry.account).refuse in ("", "unknown")
    assert isinstance(book.apply(entry.raw, history.m.now_ms), Added)


AMOUNTS = st.sampled_from((1, CREDIT, 99 * CREDIT, 100 * CREDIT + 1, 10**15))
SMALL = st.integers(0, 5)


@st.composite
def bodies(draw: st.DrawFn, accounts: list[bytes], log: list[Parsed]) -> Body:
    """Any body at all, made of things that exist: real accounts, real entries, nearly right numbers."""
    account = st.sampled_from(accounts)
    entry = draw(st.sampled_from(log))
    kind = draw(SMALL)
    if kind == 0:
        return Send(draw(account), draw(AMOUNTS), ZERO)
    if kind == 1:
        return Grant(draw(account), draw(AMOUNTS), bytes(16))
    if kind == 2:
        items = [release_item(draw(SMALL) + 2, draw(SMALL), draw(SMALL), draw(AMOUNTS)) for _ in range(2)]
        return Release(items)
    if kind == 3:
        return Refund([RefundItem(draw(SMALL) + 2, draw(SMALL), None)])
    if kind == 4:
        key = draw(st.one_of(st.none(), st.binary(min_size=32, max_size=32)))
        return Claim([ClaimItem(entry.account, entry.seq, entry.hash, draw(SMALL), draw(AMOUNTS), key, None)])
    line = LockLine(ZERO, draw(account), draw(AMOUNTS), 1)
    return build_lock(line, draw(st.sampled_from((0, limits.MARGIN_MS, 2 * limits.LOCK_MAX_MS))))


def build_lock(line: LockLine, span_ms: int) -> Body:
    return Lock(NOW, NOW + span_ms, None, [line])


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.data())
def test_whatever_members_sign_no_book_mints_or_burns(seed: int, data: st.DataObject) -> None:
    """Liars sign anything at their heads, forks included; books see it in different orders and stay conserved."""
    history = History(seed, 8)
    m = history.m
    accounts = [m[name].account for name in NAMES]
    book = m.fresh_book()
    feed(book, m.log, m.now_ms)
    heads = {name: book.head(m[name].account) for name in NAMES}
    for _ in range(data.draw(st.integers(1, 8))):
        name = data.draw(st.sampled_from(NAMES))
        seq, prev = heads[name] or (-1, ZERO)
        body = data.draw(bodies(accounts, m.log))
        entry = build(MESH, m[name].account, seq + 1, prev, m.now_ms, body, m[name].sign)
        outcomes = [book.apply(entry.raw, m.now_ms), *book.drain(m.now_ms)]
        assert book.conservation().conserved, (entry, outcomes)
        if any(isinstance(o, Added) for o in outcomes) and data.draw(st.booleans()):
            heads[name] = (entry.seq, entry.hash)
        for account in accounts:
            assert book.view(account).available_ucr + book.view(account).void_ucr >= 0
        if any(isinstance(o, Invalid | Forked) for o in outcomes):
            assert book.view(m[name].account).refuse


# --- the escrow of section 6, step by step


def test_one_lock_of_several_lines_released_in_parts_and_batches() -> None:
    m = Mesh(NAMES)
    lock = m.lock("alice", ("bob", 9 * CREDIT, 3), ("carol", 4 * CREDIT, 1), ("bob", 2 * CREDIT, 1))
    assert m["bob"].book.exposure_ucr(m["alice"].account, m["bob"].account) == 11 * CREDIT
    m.release("alice", (lock.seq, 0, 1, 3 * CREDIT), (lock.seq, 2, 1, 2 * CREDIT), (lock.seq, 1, 1, 4 * CREDIT))
    found = m["bob"].book.find_release(m["alice"].account, lock.seq, 2, 1)
    assert found is not None
    assert (found.index, found.amount_ucr, found.task) == (1, 2 * CREDIT, lock.body.lines[2].task)
    assert [p.index for p in m["bob"].book.payables(m["alice"].account, m["bob"].account)] == [0, 1]
    m.release("alice", (lock.seq, 0, 2, 3 * CREDIT))
    paid = m.claim_all("bob")
    assert len(paid.body.items) == 3
    assert m["carol"].book.find_release(m["alice"].account, lock.seq, 2, 1) is None
    assert m["alice"].book.cursor(m["bob"].account, m["alice"].account) == (lock.seq + 2, 0)
    m.claim_all("carol")
    balances = [m["bob"].book.view(m[name].account).available_ucr for name in NAMES]
    assert balances == [85 * CREDIT, 108 * CREDIT, 104 * CREDIT]
    assert m["bob"].book.line(m["alice"].account, lock.seq, 0).left_ucr == 3 * CREDIT
    m.check()


def test_the_payer_learns_key_and_task_from_the_claim_that_reaches_it() -> None:
    m = Mesh()
    lock = m.lock("alice", ("bob", CREDIT, 1))
    m.release("alice", (lock.seq, 0, 1, CREDIT))
    paid = m["bob"].purse.claim([claim(p) for p in m["bob"].book.incomes(m["bob"].account)], NOW)
    outcome = m["alice"].book.apply(paid.raw, NOW)
    assert isinstance(outcome, Added)
    (payable,) = outcome.payables
    assert payable is not None
    assert (payable.lock_seq, payable.line, payable.part) == (lock.seq, 0, 1)
    assert payable.task == lock.body.lines[0].task


def test_less_than_the_line_is_asked_and_the_rest_waived_at_once() -> None:
    """Step 5: with the last part a waiver; the payer writes release and refund one after the other."""
    m = Mesh()
    lock = m.lock("alice", ("bob", 5 * CREDIT, 1))
    waiver = Waiver(MESH, m["alice"].account, lock.hash, 0, 1).signed(m["bob"].sign)
    item = RefundItem(lock.seq, 0, Proof(1, [waiver]))
    alice = m["alice"]
    with pytest.raises(NotPermittedError, match="before its expiry"):
        alice.purse.refund([item], NOW)
    assert not alice.book.refundable(alice.account, item, NOW)
    assert alice.book.refundable(alice.account, item, lock.body.expiry_ms)
    assert not alice.book.refundable(alice.account, RefundItem(lock.seq, 1, None), lock.body.expiry_ms)
    m.release("alice", (lock.seq, 0, 1, 2 * CREDIT))
    assert alice.book.refundable(alice.account, item, NOW)
    m.put(m["alice"].purse.refund([item], NOW))
    m.claim_all("bob")
    assert m["bob"].book.view(m["alice"].account).available_ucr == 98 * CREDIT
    m.check()


def test_a_waiver_that_crosses_a_release_takes_nothing_back() -> None:
    m = Mesh()
    lock = m.lock("alice", ("bob", 5 * CREDIT, 1))
    m.release("alice", (lock.seq, 0, 1, 5 * CREDIT))
    waiver = Waiver(MESH, m["alice"].account, lock.hash, 0, 0).signed(m["bob"].sign)
    with pytest.raises(NotPermittedError, match="not open"):
        m["alice"].purse.refund([RefundItem(lock.seq, 0, Proof(1, [waiver]))], NOW)
    m.claim_all("bob")
    assert m["alice"].book.view(m["bob"].account).available_ucr == 105 * CREDIT


def test_a_checkpoint_is_due_every_thousand_entries() -> None:
    m = Mesh(("alice",))
    purse = m["alice"].purse
    assert not purse.checkpoint_due
    for _ in range(limits.CHECKPOINT_EVERY - 1):
        purse.checkpoint(NOW) if purse.checkpoint_due else purse.send(m["founder"].account, 1, ZERO, NOW)
    assert purse.checkpoint_due
    purse.checkpoint(NOW)
    assert not purse.checkpoint_due
