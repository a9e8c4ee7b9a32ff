"""The validity table of docs/LEDGER.md section 4: each row, what it allows at its bound and what it refuses past it."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256

import pytest

from clawnet import limits
from clawnet.ledger.book import Book
from clawnet.ledger.entries import (
    Body,
    Checkpoint,
    Claim,
    ClaimItem,
    Genesis,
    Grant,
    Lock,
    LockLine,
    Parsed,
    Proof,
    Refund,
    RefundItem,
    Release,
    ReleaseItem,
    Rotate,
    Send,
    build,
    possession_message,
    pow_bits_of,
)
from clawnet.ledger.outcomes import Added, Invalid, NotYet, Outcome, Rejected
from clawnet.ledger.state import Account, Line, read_state, state_bytes, state_hash
from clawnet.ledger.statements import Waiver
from clawnet.ledger.terms import LedgerTerms
from tests.rules.ledger_mesh import CREDIT, MESH, NOW, ZERO, Mesh, part_key, release_item

TASK = sha256(b"task").digest()
MARGIN = limits.MARGIN_MS
DELIVER = NOW + 60_000


def mesh() -> Mesh:
    return Mesh(
        ("alice", "bob", "carol"), open_lines_max=4, grant_max_ucr=200 * CREDIT, issue_total_max_ucr=500 * CREDIT
    )


def write(m: Mesh, author: str, body: Body, time_ms: int = NOW) -> Outcome:
    """What a third party's book says of `author` signing this body at the head of its chain."""
    member = m[author]
    head = member.book.head(member.account)
    seq, prev = (0, ZERO) if head is None else (head[0] + 1, head[1])
    entry = build(MESH, member.account, seq, prev, time_ms, body, member.sign)
    observer = m.fresh_book()
    for earlier in m.log:
        assert isinstance(observer.apply(earlier.raw, m.now_ms), Added)
    before = observer.conservation()
    outcome = observer.apply(entry.raw, m.now_ms)
    after = observer.conservation()
    assert before.conserved and after.conserved
    if isinstance(outcome, Invalid):
        assert after == before
        view = observer.view(member.account)
        assert (view.seq, view.refuse) == (seq - 1, "invalid")
    return outcome


def line(m: Mesh, payee: str = "bob", amount_ucr: int = CREDIT, parts: int = 1) -> LockLine:
    return LockLine(TASK, m[payee].account, amount_ucr, parts)


def lock(m: Mesh, *lines: LockLine, deliver: int = DELIVER, expiry: int = DELIVER + MARGIN) -> Lock:
    return Lock(deliver, expiry, None, list(lines or (line(m),)))


def grant(m: Mesh, amount_ucr: int, payee: bytes = TASK) -> Grant:
    return Grant(payee, amount_ucr, bytes(16))


Case = tuple[str, str, Callable[[Mesh], Body], str]
PLAIN: list[Case] = [
    ("a second genesis", "alice", lambda m: Genesis(ZERO, None), "genesis"),
    ("a grant by the issuer", "founder", lambda m: grant(m, 200 * CREDIT), ""),
    ("a grant by a member", "alice", lambda m: grant(m, 1), "issuer"),
    ("a second grant to one account", "founder", lambda m: grant(m, 1, m["bob"].account), "granted"),
    ("a grant above the charter's", "founder", lambda m: grant(m, 200 * CREDIT + 1), "grant_max"),
    ("a send of everything", "alice", lambda m: Send(m["bob"].account, 100 * CREDIT, ZERO), ""),
    ("a send of more than everything", "alice", lambda m: Send(m["bob"].account, 100 * CREDIT + 1, ZERO), "funds"),
    ("a send to oneself", "alice", lambda m: Send(m["alice"].account, 1, ZERO), "payee"),
    (
        "a lock of everything",
        "alice",
        lambda m: lock(m, line(m, amount_ucr=60 * CREDIT), line(m, "carol", 40 * CREDIT)),
        "",
    ),
    (
        "a lock of more",
        "alice",
        lambda m: lock(m, line(m, amount_ucr=60 * CREDIT), line(m, "carol", 40 * CREDIT + 1)),
        "funds",
    ),
    ("a lock that pays its author", "alice", lambda m: lock(m, line(m), line(m, "alice")), "payee"),
    ("as many lines as may be open", "alice", lambda m: lock(m, *[line(m)] * 4), ""),
    ("one line more", "alice", lambda m: lock(m, *[line(m)] * 5), "open_lines"),
    ("a margin one millisecond short", "alice", lambda m: lock(m, expiry=DELIVER + MARGIN - 1), "margin"),
    ("the longest lock", "alice", lambda m: lock(m, expiry=NOW + limits.LOCK_MAX_MS), ""),
    ("a longer lock", "alice", lambda m: lock(m, expiry=NOW + limits.LOCK_MAX_MS + 1), "expiry"),
    ("a release without a lock", "alice", lambda m: Release([release_item(1, 0, 1, 1)]), "line"),
    ("a refund without a lock", "alice", lambda m: Refund([RefundItem(1, 0, None)]), "line"),
    ("a checkpoint of the true state", "alice", lambda m: checkpoint(m, "alice"), ""),
    ("a checkpoint of another state", "alice", lambda m: Checkpoint(TASK), "state"),
]


def checkpoint(m: Mesh, name: str) -> Checkpoint:
    return Checkpoint(state_hash(m[name].book.state_bytes(m[name].account)))


@pytest.mark.parametrize(("author", "body", "reason"), [case[1:] for case in PLAIN], ids=[case[0] for case in PLAIN])
def test_plain_rows(author: str, body: Callable[[Mesh], Body], reason: str) -> None:
    m = mesh()
    judged(write(m, author, body(m)), reason)


def judged(outcome: Outcome, reason: str) -> None:
    if reason:
        assert isinstance(outcome, Invalid), outcome
        assert outcome.reason == reason
        assert outcome.text
    else:
        assert isinstance(outcome, Added), outcome


def test_an_issuers_total_is_capped() -> None:
    m = mesh()
    m.put(m["founder"].purse.grant(sha256(b"x").digest(), 200 * CREDIT, bytes(16), NOW))
    judged(write(m, "founder", grant(m, 1)), "issue_total")


LOCKED: list[tuple[str, Callable[[int], list[ReleaseItem]], str]] = [
    ("the first part", lambda s: [release_item(s, 0, 1, CREDIT)], ""),
    ("parts in order in one entry", lambda s: [release_item(s, 0, 1, CREDIT), release_item(s, 0, 2, CREDIT)], ""),
    ("parts of two lines in one entry", lambda s: [release_item(s, 0, 1, CREDIT), release_item(s, 1, 1, CREDIT)], ""),
    ("everything in the first part", lambda s: [release_item(s, 0, 1, 3 * CREDIT)], ""),
    ("more than is left", lambda s: [release_item(s, 0, 1, 3 * CREDIT + 1)], "amount"),
    (
        "more than is left, over items",
        lambda s: [release_item(s, 0, 1, 2 * CREDIT), release_item(s, 0, 2, 2 * CREDIT)],
        "amount",
    ),
    ("a part too early", lambda s: [release_item(s, 0, 2, CREDIT)], "part"),
    ("part 0", lambda s: [release_item(s, 0, 0, CREDIT)], "part"),
    ("the same part twice", lambda s: [release_item(s, 0, 1, CREDIT)] * 2, "part"),
    ("a part beyond the line's", lambda s: [release_item(s, 1, 1, 1), release_item(s, 1, 2, 1)], "part"),
    ("a line the lock has not", lambda s: [release_item(s, 2, 1, 1)], "line"),
    ("a lock that is none", lambda s: [release_item(0, 0, 1, 1)], "line"),
]


@pytest.mark.parametrize(("items", "reason"), [case[1:] for case in LOCKED], ids=[case[0] for case in LOCKED])
def test_release_rows(items: Callable[[int], list[ReleaseItem]], reason: str) -> None:
    m = mesh()
    seq = m.lock("alice", ("bob", 3 * CREDIT, 3), ("carol", 2 * CREDIT, 1)).seq
    judged(write(m, "alice", Release(items(seq))), reason)


def test_a_line_is_closed_when_nothing_is_left() -> None:
    m = mesh()
    seq = m.lock("alice", ("bob", 3 * CREDIT, 3)).seq
    m.release("alice", (seq, 0, 1, 3 * CREDIT))
    judged(write(m, "alice", Release([release_item(seq, 0, 2, 1)])), "line")
    judged(write(m, "alice", Refund([RefundItem(seq, 0, None)]), NOW + limits.CLOCK_AHEAD_MS), "line")


def test_the_rest_of_a_released_line_returns_only_by_refund() -> None:
    m = mesh()
    entry = m.lock("alice", ("bob", 3 * CREDIT, 1))
    m.release("alice", (entry.seq, 0, 1, CREDIT))
    assert m["bob"].book.view(m["alice"].account).available_ucr == 97 * CREDIT
    m.now_ms = DELIVER + MARGIN
    m.put(m["alice"].purse.refund([RefundItem(entry.seq, 0, None)], m.now_ms))
    assert m["bob"].book.view(m["alice"].account).available_ucr == 99 * CREDIT
    m.check()


def waiver(m: Mesh, entry: Parsed, signer: str = "bob", **changes: object) -> Proof:
    fields: dict[str, object] = {
        "mesh": MESH,
        "payer": m["alice"].account,
        "lock_hash": entry.hash,
        "line": 0,
        "after_part": 1,
    }
    return Proof(1, [Waiver(**(fields | changes)).signed(m[signer].sign)])


Refunding = tuple[str, Callable[[Mesh, Parsed], list[RefundItem]], int, str]
REFUNDS: list[Refunding] = [
    ("at expiry", lambda m, e: [RefundItem(e.seq, 0, None)], DELIVER + MARGIN, ""),
    (
        "both lines at expiry",
        lambda m, e: [RefundItem(e.seq, 0, None), RefundItem(e.seq, 1, None)],
        DELIVER + MARGIN,
        "",
    ),
    ("one line twice", lambda m, e: [RefundItem(e.seq, 0, None)] * 2, DELIVER + MARGIN, "line"),
    ("a millisecond early", lambda m, e: [RefundItem(e.seq, 0, None)], DELIVER + MARGIN - 1, "expiry"),
    ("waived", lambda m, e: [RefundItem(e.seq, 0, waiver(m, e))], NOW, ""),
    ("waived from the start", lambda m, e: [RefundItem(e.seq, 0, waiver(m, e, after_part=0))], NOW, ""),
    ("waived after a later part", lambda m, e: [RefundItem(e.seq, 0, waiver(m, e, after_part=2))], NOW, "expiry"),
    ("waived by somebody else", lambda m, e: [RefundItem(e.seq, 0, waiver(m, e, "carol"))], NOW, "expiry"),
    ("waived in another mesh", lambda m, e: [RefundItem(e.seq, 0, waiver(m, e, mesh=TASK))], NOW, "expiry"),
    ("waived to another payer", lambda m, e: [RefundItem(e.seq, 0, waiver(m, e, payer=TASK))], NOW, "expiry"),
    ("waived of another lock", lambda m, e: [RefundItem(e.seq, 0, waiver(m, e, lock_hash=TASK))], NOW, "expiry"),
    ("waived of another line", lambda m, e: [RefundItem(e.seq, 0, waiver(m, e, line=1))], NOW, "expiry"),
    ("a waiver that is none", lambda m, e: [RefundItem(e.seq, 0, Proof(1, [b"?"]))], NOW, "expiry"),
    ("a bad waiver after expiry", lambda m, e: [RefundItem(e.seq, 0, Proof(1, [b"?"]))], DELIVER + MARGIN, ""),
]


@pytest.mark.parametrize(("items", "time_ms", "reason"), [c[1:] for c in REFUNDS], ids=[c[0] for c in REFUNDS])
def test_refund_rows(items: Callable[[Mesh, Parsed], list[RefundItem]], time_ms: int, reason: str) -> None:
    m = mesh()
    entry = m.lock("alice", ("bob", 3 * CREDIT, 3), ("carol", CREDIT, 1))
    m.release("alice", (entry.seq, 0, 1, CREDIT))
    m.now_ms = time_ms
    judged(write(m, "alice", Refund(items(m, entry)), time_ms), reason)


def test_a_waiver_by_a_rotated_payee_brings_its_rotations() -> None:
    m = mesh()
    entry = m.lock("alice", ("bob", CREDIT, 1))
    new = m.keys.new("bob's second key")
    rotation = m.put(m["bob"].purse.rotate(new, m.keys.signer(new), NOW))
    m["bob"].sign = m.keys.signer(new)
    proof = waiver(m, entry, after_part=0)
    judged(write(m, "alice", Refund([RefundItem(entry.seq, 0, proof)])), "expiry")
    shown = Proof(1, [*proof.statements, rotation.raw])
    judged(write(m, "alice", Refund([RefundItem(entry.seq, 0, shown)])), "")


class Paid:
    """Alice owes bob a send, two released parts and carol a third."""

    def __init__(self) -> None:
        self.m = mesh()
        self.send = self.m.put(self.m["alice"].purse.send(self.m["bob"].account, 7, ZERO, NOW))
        self.lock = self.m.lock("alice", ("bob", 30, 2), ("carol", 20, 1))
        seq = self.lock.seq
        self.release = self.m.release("alice", (seq, 0, 1, 10), (seq, 1, 1, 20), (seq, 0, 2, 20))

    def sent(self, **changes: object) -> ClaimItem:
        return self.item({"seq": self.send.seq, "hash": self.send.hash, "amount_ucr": 7, "key": None} | changes)

    def part(self, number: int = 0, **changes: object) -> ClaimItem:
        line, part, amount = ((0, 1, 10), (1, 1, 20), (0, 2, 20))[number]
        key = part_key(self.lock.seq, line, part)
        return self.item({"index": number, "amount_ucr": amount, "key": key} | changes)

    def item(self, changes: dict[str, object]) -> ClaimItem:
        fields: dict[str, object] = {
            "payer": self.m["alice"].account,
            "seq": self.release.seq,
            "hash": self.release.hash,
            "index": 0,
            "amount_ucr": 1,
            "key": None,
            "proof": None,
        }
        return ClaimItem(**(fields | changes))


CLAIMS: list[tuple[str, Callable[[Paid], list[ClaimItem]], str]] = [
    ("everything in order", lambda p: [p.sent(), p.part(0), p.part(2)], ""),
    ("a release alone: the send is forfeited", lambda p: [p.part(0)], ""),
    ("a later item alone", lambda p: [p.part(2)], ""),
    ("one item twice", lambda p: [p.part(0), p.part(0)], "cursor"),
    ("out of order", lambda p: [p.part(0), p.sent()], "cursor"),
    ("another's item", lambda p: [p.part(1)], "payment"),
    ("an item that is not there", lambda p: [p.part(0, index=3)], "payment"),
    ("a send by an index", lambda p: [p.sent(index=1)], "payment"),
    ("an entry that pays nothing", lambda p: [p.part(0, seq=p.lock.seq, hash=p.lock.hash)], "payment"),
    ("too much", lambda p: [p.part(0, amount_ucr=11)], "amount"),
    ("too little", lambda p: [p.sent(amount_ucr=6)], "amount"),
    ("without the key", lambda p: [p.part(0, key=None)], "key"),
    ("with a wrong key", lambda p: [p.part(0, key=TASK)], "key"),
    ("a send with a key", lambda p: [p.sent(key=TASK)], "key"),
]


@pytest.mark.parametrize(("items", "reason"), [case[1:] for case in CLAIMS], ids=[case[0] for case in CLAIMS])
def test_claim_rows(items: Callable[[Paid], list[ClaimItem]], reason: str) -> None:
    paid = Paid()
    judged(write(paid.m, "bob", Claim(items(paid))), reason)


def test_a_payment_is_claimed_once_and_a_skipped_one_is_forfeited() -> None:
    paid = Paid()
    paid.m.put(paid.m["bob"].purse.claim([paid.part(0)], NOW))
    judged(write(paid.m, "bob", Claim([paid.part(0)])), "cursor")
    judged(write(paid.m, "bob", Claim([paid.sent()])), "cursor")
    judged(write(paid.m, "bob", Claim([paid.part(2)])), "")
    paid.m.check()


def test_an_issuer_claims_its_grant_to_itself() -> None:
    m = mesh()
    m.grant("founder", 50 * CREDIT)
    assert m["alice"].book.view(m["founder"].account).available_ucr == 50 * CREDIT
    m.check()


def test_rotation_hands_the_chain_to_the_new_key_alone() -> None:
    m = mesh()
    alice, old = m["alice"], m["alice"].sign
    seq = m.lock("alice", ("bob", 5 * CREDIT, 1)).seq
    new = m.keys.new("alice's second key")
    entry = m.put(alice.purse.rotate(new, m.keys.signer(new), NOW))
    view = m["bob"].book.view(alice.account)
    assert (view.key, view.available_ucr, view.open_lines) == (new, 95 * CREDIT, 1)
    stale = build(MESH, alice.account, entry.seq + 1, entry.hash, NOW, Send(m["bob"].account, 1, ZERO), old)
    assert isinstance(m["bob"].book.apply(stale.raw, NOW), Rejected)
    m.release("alice", (seq, 0, 1, 5 * CREDIT))
    m.claim_all("bob")
    m.check()


def test_a_rotation_shows_possession_of_the_new_key_at_its_place() -> None:
    m = mesh()
    alice = m["alice"]
    new = m.keys.new("new")
    head = alice.book.head(alice.account)
    assert head is not None
    wrong_place = m.keys.signer(new)(possession_message(alice.account, head[0], head[1]))
    judged(write(m, "alice", Rotate(new, wrong_place)), "possession")
    judged(
        write(m, "alice", Rotate(new, alice.sign(possession_message(alice.account, head[0] + 1, head[1])))),
        "possession",
    )
    judged(
        write(m, "alice", Rotate(new, m.keys.signer(new)(possession_message(alice.account, head[0] + 1, head[1])))), ""
    )


# --- the first row: signature, mesh, place, time


def test_bad_signatures_and_foreign_meshes_say_nothing_of_the_account() -> None:
    m = mesh()
    alice, bob = m["alice"], m["bob"]
    head = alice.book.head(alice.account)
    assert head is not None
    send = Send(bob.account, 1, ZERO)
    forged = build(MESH, alice.account, head[0] + 1, head[1], NOW, send, bob.sign)
    foreign = build(TASK, alice.account, head[0] + 1, head[1], NOW, send, alice.sign)
    for entry in (forged, foreign):
        assert isinstance(bob.book.apply(entry.raw, NOW), Rejected)
    assert isinstance(bob.book.apply(b"noise", NOW), Rejected)
    assert bob.book.view(alice.account).refuse == ""


def test_a_future_stamp_is_kept_aside_until_it_is_not() -> None:
    """A refund stamped ahead of its expiry counts 300 s before it at most (section 7)."""
    m = mesh()
    entry = m.lock("alice", ("bob", CREDIT, 1))
    expiry = DELIVER + MARGIN
    head = m["alice"].book.head(m["alice"].account)
    assert head is not None
    refund = m["alice"].sign_any(head[0] + 1, head[1], Refund([RefundItem(entry.seq, 0, None)]), time_ms=expiry)
    book = m["bob"].book
    early = book.apply(refund.raw, expiry - limits.CLOCK_AHEAD_MS - 1)
    assert isinstance(early, NotYet)
    assert (early.need, early.kept, early.retry_at_ms) == ("future", True, expiry - limits.CLOCK_AHEAD_MS)
    assert book.view(m["alice"].account).open_lines == 1
    assert book.drain(expiry - limits.CLOCK_AHEAD_MS - 1) == []
    (added,) = book.drain(expiry - limits.CLOCK_AHEAD_MS)
    assert isinstance(added, Added)
    assert book.view(m["alice"].account).open_lines == 0


def test_a_signed_entry_with_a_malformed_body_ends_the_chain() -> None:
    m = mesh()
    outcome = write(m, "alice", Lock(DELIVER, DELIVER + MARGIN, None, []))
    judged(outcome, "malformed")


# --- opening


def stamped(bits: int) -> tuple[bytes, bytes]:
    account = sha256(b"public stranger").digest()
    nonce = next(n for n in (i.to_bytes(4, "big") for i in range(10**6)) if pow_bits_of(MESH, account, n) >= bits)
    return account, nonce


@pytest.mark.parametrize(
    ("open_mesh", "stamp", "opening_ucr"),
    [(True, True, 5), (True, False, 0), (False, True, 0)],
)
def test_opening_credit_needs_an_open_mesh_and_a_stamp(open_mesh: bool, stamp: bool, opening_ucr: int) -> None:
    m = Mesh(("alice",), open_mesh=open_mesh, stranger_credit_ucr=5, pow_bits=8)
    account, nonce = stamped(8)
    assert m.keys.new("stranger") == account
    entry = build(MESH, account, 0, ZERO, NOW, Genesis(ZERO, nonce if stamp else None), m.keys.signer(account))
    assert isinstance(m["alice"].book.apply(entry.raw, NOW), Added)
    assert m["alice"].book.view(account).available_ucr == opening_ucr
    assert m["alice"].book.conservation().conserved


def test_too_little_work_and_a_linked_genesis_are_invalid() -> None:
    m = Mesh(("alice",), pow_bits=20)
    account = m.keys.new("stranger")
    opening = [
        (ZERO, Genesis(ZERO, b"x"), "pow"),
        (TASK, Genesis(ZERO, None), "genesis"),
        (ZERO, Send(m["alice"].account, 1, ZERO), "genesis"),
    ]
    for prev, body, reason in opening:
        book = Book(LedgerTerms(frozenset(), pow_bits=20), MESH, m.keys.verify)
        entry = build(MESH, account, 0, prev, NOW, body, m.keys.signer(account))
        judged(book.apply(entry.raw, NOW), reason)
        assert book.head(account) is None


def test_the_state_document_is_of_the_chain_alone() -> None:
    """Equal in every book, and unchanged by what others owe or hold against the account."""
    paid = Paid()
    m = paid.m
    documents = {member.book.state_bytes(m["alice"].account) for member in m.members.values()}
    m.put(m["bob"].purse.claim([paid.sent(), paid.part(0)], NOW))
    documents |= {member.book.state_bytes(m["alice"].account) for member in m.members.values()}
    assert len(documents) == 1


def test_the_state_document_does_not_depend_on_the_order_of_memory() -> None:
    """As after a restore, or in a process whose sets are ordered otherwise."""
    names = [sha256(bytes([n])).digest() for n in range(9)]
    documents = set()
    for order in (names, names[::-1]):
        state = Account(TASK)
        state.granted = set(order)
        state.cursors = dict.fromkeys(order, (1, 0))
        state.lines = {(n, 0): Line(n, 0, TASK, TASK, TASK, 1, 1, 1, 0, 1, 1, 1) for n in map(names.index, order)}
        documents.add(state_bytes(state))
        document = read_state(documents.copy().pop())
        assert document.granted == sorted(names)
        assert [line.lock_seq for line in document.lines] == list(range(9))
        assert document.cursors == sorted((payer, 1, 0) for payer in names)
    assert len(documents) == 1
