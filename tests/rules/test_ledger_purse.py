"""The purse, the worker's list for a lock, the payee's for a release, and audits that find something."""

from __future__ import annotations

import pytest

from clawnet import limits
from clawnet.errors import FundsError, NotPermittedError
from clawnet.identity.keys import KeyPair, verify
from clawnet.ledger.audit import audit_chains
from clawnet.ledger.book import Book
from clawnet.ledger.entries import (
    ClaimItem,
    LockLine,
    Proof,
    RefundItem,
    ReleaseItem,
    Send,
    build,
    parse,
)
from clawnet.ledger.lockcheck import Expected, check_lock, check_release
from clawnet.ledger.outcomes import Added, Invalid, NotYet, Rejected
from clawnet.ledger.purse import Purse
from clawnet.ledger.statements import Waiver
from clawnet.ledger.terms import LedgerTerms
from tests.rules.ledger_mesh import CREDIT, MESH, NOW, ZERO, Mesh, claim, feed, release_item

# --- the purse


def test_a_purse_signs_nothing_that_a_book_would_refuse() -> None:
    m = Mesh()
    signed: list[bytes] = []
    purse = m["alice"].purse
    purse._sign = lambda message: (signed.append(message), m["alice"].sign(message))[1]
    bob = m["bob"].account
    line = LockLine(ZERO, bob, CREDIT, 1)
    with pytest.raises(FundsError, match="101 credits are needed, 100 are available"):
        purse.send(bob, 101 * CREDIT, ZERO, NOW)
    with pytest.raises(FundsError, match="not an amount"):
        purse.send(bob, 0, ZERO, NOW)
    with pytest.raises(FundsError, match="202 credits"):
        purse.lock([LockLine(ZERO, bob, 101 * CREDIT, 1)] * 2, NOW, NOW + limits.MARGIN_MS, NOW)
    with pytest.raises(NotPermittedError, match="delivery and expiry"):
        purse.lock([line], NOW, NOW, NOW)
    with pytest.raises(NotPermittedError, match="issuers"):
        purse.grant(bob, 1, bytes(16), NOW)
    with pytest.raises(NotPermittedError, match="not open"):
        purse.release([ReleaseItem(1, 0, 1, 1, ZERO, ZERO)], NOW)
    with pytest.raises(NotPermittedError, match="begins with a genesis"):
        purse.genesis(NOW)
    with pytest.raises(NotPermittedError, match="not all here"):
        purse.claim([ClaimItem(bob, 99, ZERO, 0, 1, None, None)], NOW)
    with pytest.raises(NotPermittedError, match="malformed lock"):
        purse.lock([LockLine(ZERO, bob, 1, 0)], NOW, NOW + limits.MARGIN_MS, NOW)
    with pytest.raises(NotPermittedError, match="malformed lock"):
        purse.lock([LockLine(ZERO, bob, 1, 1)] * 257, NOW, NOW + limits.MARGIN_MS, NOW)
    with pytest.raises(NotPermittedError, match="malformed release"):
        purse.release([], NOW)
    purse.read_only_reason = "restored from a backup"
    with pytest.raises(NotPermittedError, match="read-only: restored from a backup"):
        purse.send(bob, 1, ZERO, NOW)
    assert signed == []
    purse.read_only_reason = ""
    entry = purse.send(bob, 1, ZERO, NOW)
    assert len(signed) == 1
    assert parse(entry.raw) == entry
    assert isinstance(m["bob"].book.apply(entry.raw, NOW), Added)


def test_a_claim_is_made_once_by_the_purse_too() -> None:
    m = Mesh()
    m.put(m["alice"].purse.send(m["bob"].account, 1, ZERO, NOW))
    items = [claim(p) for p in m["bob"].book.incomes(m["bob"].account)]
    m.put(m["bob"].purse.claim(items, NOW))
    with pytest.raises(NotPermittedError, match="claimed twice"):
        m["bob"].purse.claim(items, NOW)


# --- is this lock good?


def expected(m: Mesh, **changes: object) -> Expected:
    fields: dict[str, object] = {
        "account": m["bob"].account,
        "task": m.lock_entry.body.lines[0].task,
        "bid_ucr": 5 * CREDIT,
        "estimate_ms": 1_000,
        "exposure_max_ucr": 20 * CREDIT,
    }
    return Expected(**(fields | changes))


def offered() -> Mesh:
    m = Mesh()
    m.lock_entry = m.lock("alice", ("bob", 5 * CREDIT, 1), ("founder", CREDIT, 1))
    return m


CHECKS: list[tuple[dict[str, object], int, str]] = [
    ({}, 0, ""),
    ({"bid_ucr": 4 * CREDIT}, 0, ""),
    ({"bid_ucr": 5 * CREDIT + 1}, 0, "amount"),
    ({"account": ZERO}, 0, "account"),
    ({"task": ZERO}, 0, "task"),
    ({"parts": 2}, 0, "parts"),
    ({"used": True}, 0, "used"),
    ({"banned": True}, 0, "banned"),
    ({"estimate_ms": 60_000}, 0, ""),
    ({"estimate_ms": 60_001}, 0, "deliver_by"),
    ({}, 59_000, ""),
    ({}, 59_001, "deliver_by"),
    ({}, limits.CLOCK_AHEAD_MS + 1, "clock"),
    ({}, -limits.CLOCK_AHEAD_MS - 1, "clock"),
    ({"open_lines_max": 1}, 0, "open_lines"),
    ({"exposure_max_ucr": 5 * CREDIT - 1}, 0, "exposure"),
    ({"exposure_max_ucr": 5 * CREDIT}, 0, ""),
]


@pytest.mark.parametrize(("changes", "later_ms", "word"), CHECKS)
def test_the_workers_list(changes: dict[str, object], later_ms: int, word: str) -> None:
    m = offered()
    assert check_lock(m["bob"].book, m.lock_entry, 0, expected(m, **changes), NOW + later_ms) == word


def test_no_work_for_a_lock_that_is_not_on_a_good_chain() -> None:
    m = offered()
    book, lock = m["bob"].book, m.lock_entry
    assert check_lock(m.fresh_book(), lock, 0, expected(m), NOW) == "chain"
    assert check_lock(book, lock, 7, expected(m), NOW) == "chain"
    other = build(MESH, lock.account, lock.seq, lock.prev, NOW + 1, lock.body, m["alice"].sign)
    assert check_lock(book, other, 0, expected(m), NOW) == "chain"
    poison = m["alice"].sign_any(lock.seq + 1, lock.hash, Send(m["bob"].account, 10**12, ZERO))
    assert isinstance(book.apply(poison.raw, NOW), Invalid)
    assert check_lock(book, lock, 0, expected(m), NOW) == "invalid"
    assert isinstance(m["founder"].book.apply(other.raw, NOW), NotYet)
    assert check_lock(m["founder"].book, lock, 0, expected(m), NOW) == "forked"


def test_no_work_for_a_line_that_was_taken_back() -> None:
    m = offered()
    waiver = Waiver(MESH, m["alice"].account, m.lock_entry.hash, 0, 0).signed(m["bob"].sign)
    m.put(m["alice"].purse.refund([RefundItem(m.lock_entry.seq, 0, Proof(1, [waiver]))], NOW))
    assert check_lock(m["bob"].book, m.lock_entry, 0, expected(m), NOW) == "chain"


def test_a_key_is_shown_only_for_the_release_that_was_asked() -> None:
    m = offered()
    alice, bob = m["alice"], m["bob"]
    m.release("alice", (m.lock_entry.seq, 0, 1, 4 * CREDIT))
    (release,) = bob.book.payables(alice.account, bob.account)
    assert check_release(bob.book, release, 4 * CREDIT, release.key_hash, ZERO) == ""
    assert check_release(bob.book, release, 5 * CREDIT, release.key_hash, ZERO) == "amount"
    assert check_release(bob.book, release, 4 * CREDIT, ZERO, ZERO) == "key"
    assert check_release(bob.book, release, 4 * CREDIT, release.key_hash, bytes([1]) * 32) == "note"


@pytest.mark.parametrize("fork_first", [False, True])
def test_releases_from_before_the_fork_was_seen_stay_good(fork_first: bool) -> None:
    m = offered()
    alice, book = m["alice"], m["bob"].book
    lock = m.lock_entry
    second = build(MESH, lock.account, lock.seq, lock.prev, NOW + 1, lock.body, alice.sign)
    entry = alice.purse.release([release_item(lock.seq, 0, 1, 5 * CREDIT)], NOW)
    for raw in (second.raw, entry.raw) if fork_first else (entry.raw, second.raw):
        book.apply(raw, NOW)
    (release,) = book.payables(alice.account, m["bob"].account)
    word = check_release(book, release, 5 * CREDIT, release.key_hash, ZERO)
    assert word == ("forked" if fork_first else "")
    again = m.fresh_book()
    for account in book.accounts():
        again.restore(book.snapshot(account))
    assert check_release(again, release, 5 * CREDIT, release.key_hash, ZERO) == word


# --- audits that find something


def chains_of(m: Mesh) -> dict[bytes, list[bytes]]:
    chains: dict[bytes, list[bytes]] = {}
    for entry in m.log:
        chains.setdefault(entry.account, []).append(entry.raw)
    return chains


def test_an_audit_names_what_is_wrong_and_where() -> None:
    m = offered()
    alice, bob = m["alice"].account, m["bob"].account
    m.release("alice", (m.lock_entry.seq, 0, 1, 5 * CREDIT))
    m.claim_all("bob")
    sound = audit_chains(m.terms, MESH, chains_of(m), m.keys.verify)
    assert sound.sound
    missing = {account: raws for account, raws in chains_of(m).items() if account != alice}
    report = audit_chains(m.terms, MESH, missing, m.keys.verify)
    assert [(p.account, p.seq) for p in report.problems] == [(bob, 2)]
    assert "claims a payment" in report.problems[0].text
    assert report.conserved
    tampered = chains_of(m)
    tampered[alice][1] = tampered[alice][1][:-1] + bytes([tampered[alice][1][-1] ^ 1])
    report = audit_chains(m.terms, MESH, tampered, m.keys.verify)
    assert (alice, 1) in [(p.account, p.seq) for p in report.problems]
    assert not report.sound
    swapped = chains_of(m) | {alice: chains_of(m)[bob]}
    assert any("another account" in p.text for p in audit_chains(m.terms, MESH, swapped, m.keys.verify).problems)
    doubled = chains_of(m)
    doubled[alice].insert(1, doubled[alice][0])
    assert any("twice" in p.text for p in audit_chains(m.terms, MESH, doubled, m.keys.verify).problems)
    overdraft = chains_of(m)
    head = m["alice"].book.head(alice)
    assert head is not None
    overdraft[alice].append(m["alice"].sign_any(head[0] + 1, head[1], Send(bob, 10**12, ZERO)).raw)
    report = audit_chains(m.terms, MESH, overdraft, m.keys.verify)
    assert any("available" in p.text for p in report.problems)


def test_an_audit_reads_chains_that_come_as_streams() -> None:
    m = offered()
    streams = {account: iter(raws) for account, raws in chains_of(m).items()}
    assert audit_chains(m.terms, MESH, streams, m.keys.verify, now_ms=NOW).sound


def test_a_chain_under_real_keys() -> None:
    """Ed25519 as the node uses it, not the stub of the other tests."""
    founder, member = (KeyPair.from_seed(bytes([n]) * 32) for n in (1, 2))
    terms = LedgerTerms(frozenset({founder.public}))
    book = Book(terms, MESH, verify)
    purse = Purse(book, founder.public, founder.sign)
    log = [purse.genesis(NOW), purse.grant(founder.public, CREDIT, bytes(16), NOW)]
    log.append(purse.claim([claim(p) for p in book.incomes(founder.public)], NOW))
    log.append(purse.rotate(member.public, member.sign, NOW))
    log.append(purse.send(member.public, 1, ZERO, NOW))
    other = Book(terms, MESH, verify)
    assert all(isinstance(outcome, Added) for outcome in feed(other, log))
    assert other.view(founder.public).key == member.public
    report = audit_chains(terms, MESH, {founder.public: [entry.raw for entry in log]}, verify)
    assert report.sound
    forged = log[4].raw[:-1] + bytes([log[4].raw[-1] ^ 1])
    fresh = Book(terms, MESH, verify)
    feed(fresh, log[:4])
    assert isinstance(fresh.apply(forged, NOW), Rejected)
