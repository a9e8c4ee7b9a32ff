"""Where entries go in a book: gaps, waiting, ended chains, later constructs, bounds, checkpoints."""

from __future__ import annotations

from hashlib import sha256

import msgspec
import pytest

from clawnet.errors import DataError, NotPermittedError
from clawnet.ledger import checkpoint
from clawnet.ledger.entries import (
    ENTRY_SIGNATURE_TAG,
    Claim,
    Genesis,
    Lock,
    Parsed,
    Send,
    build,
    draft,
    with_signature,
)
from clawnet.ledger.outcomes import Added, Forked, Invalid, Known, NotYet, Rejected, Unauditable
from clawnet.ledger.proofs import verify_proof
from clawnet.ledger.purse import claim_item
from clawnet.ledger.state import HASHES_KEPT, HashTail
from clawnet.ledger.waiting import Aside, Waiting
from tests.rules.ledger_mesh import CREDIT, MESH, NOW, ZERO, Member, Mesh, book_payable, feed, next_of


def sent(m: Mesh, payer: str, payee: str, amount_ucr: int) -> Parsed:
    return m.put(m[payer].purse.send(m[payee].account, amount_ucr, ZERO, m.now_ms))


# --- order


def test_a_gap_is_kept_aside_and_closed() -> None:
    m = Mesh()
    a, b = sent(m, "alice", "bob", 1), sent(m, "alice", "bob", 2)
    book = m.fresh_book()
    feed(book, m.log[:-2])
    early = book.apply(b.raw, NOW)
    assert isinstance(early, NotYet)
    assert (early.need, early.need_account, early.need_from, early.need_to) == ("gap", a.account, a.seq, a.seq)
    assert book.compare_head(b.account, b.seq, b.hash) == "behind"
    assert [type(outcome) for outcome in feed(book, [a])] == [Added, Added]
    assert book.head(a.account) == (b.seq, b.hash) == book.entry_pos(a.account)
    assert isinstance(book.apply(a.raw, NOW), Known)


def test_a_claim_waits_for_its_payers_prefix_and_says_what_it_needs() -> None:
    m = Mesh()
    sent(m, "alice", "bob", 1)
    last = sent(m, "alice", "bob", 2)
    paid = m.claim_all("bob")
    after = sent(m, "bob", "alice", 3)
    book = m.fresh_book()
    without_alice = [entry for entry in m.log if entry.account != last.account]
    *_, refused, gap = feed(book, without_alice)
    assert isinstance(refused, NotYet)
    assert isinstance(gap, NotYet)
    assert (refused.need, refused.need_account, refused.need_from, refused.need_to) == (
        "payer",
        last.account,
        0,
        last.seq - 1,
    )
    assert book.segment_needs(paid) == [(last.account, 0, last.seq)]
    outcomes = feed(book, [entry for entry in m.log if entry.account == last.account])
    assert [o.parsed.hash for o in outcomes if isinstance(o, Added)][-2:] == [paid.hash, after.hash]
    assert book.segment_needs(paid) == []
    assert book.conservation() == m["bob"].book.conservation()


def test_what_is_kept_aside_is_bounded_by_count_bytes_and_account() -> None:
    m = Mesh()
    aside = Aside(entries_max=40, bytes_max=10_000)
    kept = 0
    for name in ("alice", "bob"):
        for seq in range(40):
            entry = m[name].sign_any(seq, ZERO, Genesis(ZERO, None))
            kept += aside.keep(Waiting(entry, m[name].account, None))
    assert kept == len(aside) == 20
    assert aside.keep(Waiting(m["bob"].sign_any(1, ZERO, Genesis(ZERO, None)), m["bob"].account, None))
    aside.drop(m["bob"].account)
    assert len(aside) == 10
    big = Aside(entries_max=40, bytes_max=1_000)
    assert big.keep(Waiting(entry, entry.account, None))
    assert not big.keep(Waiting(m["bob"].sign_any(7, ZERO, Genesis(ZERO, None)), entry.account, None))


def test_gaps_signed_by_a_key_not_known_yet_are_not_held_against_anybody() -> None:
    m = Mesh()
    new = m.keys.new("new")
    rotation = m.put(m["alice"].purse.rotate(new, m.keys.signer(new), NOW))
    after = sent(m, "alice", "bob", 1)
    book = m.fresh_book()
    feed(book, m.log[:-2])
    early = book.apply(after.raw, NOW)
    assert isinstance(early, NotYet)
    assert (early.need, early.kept) == ("gap", False)
    assert [type(o) for o in feed(book, [rotation, after])] == [Added, Added]


# --- the end of a chain


def test_an_invalid_entry_ends_the_chain_and_what_was_before_it_stands() -> None:
    m = Mesh()
    alice, bob = m["alice"], m["bob"]
    kept = sent(m, "alice", "bob", 5)
    bad = next_of(alice, Send(bob.account, 10**12, ZERO))
    after = alice.sign_any(bad.seq + 1, bad.hash, Send(bob.account, 1, ZERO))
    book = bob.book
    outcome = book.apply(bad.raw, NOW)
    assert isinstance(outcome, Invalid)
    assert book.urgent
    assert isinstance(book.apply(after.raw, NOW), Invalid)
    view = book.view(alice.account)
    assert (view.seq, view.refuse) == (kept.seq, "invalid")
    m.members.pop("alice")
    m.claim_all("bob")
    assert book.conservation().conserved
    on_poison = claim_item(book_payable(alice, kept, amount_ucr=1, entry=bad), None)
    assert isinstance(m["founder"].book.apply(bad.raw, NOW), Invalid)
    assert isinstance(m["founder"].book.apply(next_of(bob, Claim([on_poison])).raw, NOW), Invalid)


def test_two_entries_after_an_ended_chain_are_still_a_fork() -> None:
    m = Mesh()
    bad = next_of(m["alice"], Send(m["bob"].account, 10**12, ZERO))
    good = next_of(m["alice"], Send(m["bob"].account, 1, ZERO))
    assert isinstance(m["bob"].book.apply(bad.raw, NOW), Invalid)
    outcome = m["bob"].book.apply(good.raw, NOW)
    assert isinstance(outcome, Forked)
    assert verify_proof(outcome.proof, MESH, m.keys.verify)


def later_entry(member: Member, kind: int, body: object) -> bytes:
    head = member.book.head(member.account)
    assert head is not None
    encoded = msgspec.msgpack.encode([1, MESH, member.account, head[0] + 1, head[1], NOW, kind, body])
    digest = sha256(b"clawnet/entry/1" + encoded).digest()
    return encoded + member.sign(ENTRY_SIGNATURE_TAG + digest)


def test_constructs_of_the_later_increment_stop_the_audit_and_convict_nobody() -> None:
    m = Mesh()
    alice, bob = m["alice"], m["bob"]
    seq = next_of(alice, Genesis(ZERO, None)).seq
    outcome = bob.book.apply(later_entry(alice, 9, [1, 2, 3]), NOW)
    assert isinstance(outcome, Unauditable)
    assert outcome.seq == seq
    view = bob.book.view(alice.account)
    assert (view.refuse, view.ended, view.forked) == ("upgrade", "", False)
    assert f"cannot audit beyond seq {seq - 1}, upgrade" in view.upgrade
    beyond = claim_item(
        book_payable(alice, sent(m, "bob", "alice", 1), amount_ucr=1, entry=next_of(alice, Genesis(ZERO, None))), None
    )
    waiting = bob.book.apply(next_of(m["founder"], Claim([beyond])).raw, NOW)
    assert isinstance(waiting, NotYet)
    assert waiting.need == "upgrade"
    again = m.fresh_book()
    again.restore(bob.book.snapshot(alice.account))
    assert again.view(alice.account).refuse == "upgrade"


# --- memory that is bounded


def test_the_hash_tail_forgets_in_blocks() -> None:
    tail = HashTail()
    hashes = [sha256(bytes([n % 256, n // 256])).digest() for n in range(2 * HASHES_KEPT + 10)]
    for entry_hash in hashes:
        tail.append(entry_hash)
    assert tail.get(len(hashes) - 1) == hashes[-1]
    assert tail.get(len(hashes)) is None
    assert tail.get(0) is None
    assert tail.get(HASHES_KEPT) == hashes[HASHES_KEPT]
    first, newest = tail.newest(3)
    assert (first, newest) == (len(hashes) - 3, b"".join(hashes[-3:]))


def test_spilled_payments_stay_claimable() -> None:
    m = Mesh()
    seq = m.lock("alice", ("bob", 10, 4)).seq
    m.release("alice", *[(seq, 0, part, 1) for part in (1, 2)])
    m.release("alice", *[(seq, 0, part, 1) for part in (3, 4)])
    paid = m.claim_all("bob")
    book = type(m["bob"].book)(m.terms, MESH, m.keys.verify, payables_max=2)
    entries = [entry for entry in m.log if entry.hash != paid.hash]
    feed(book, entries)
    assert len(book.payables(m["alice"].account, m["bob"].account)) <= 2
    outcome = book.apply(paid.raw, NOW)
    by_place = {(entry.account, entry.seq): entry for entry in m.log}
    for _ in range(8):
        if not isinstance(outcome, NotYet):
            break
        assert outcome.need == "lookup"
        book.supply(by_place[(outcome.need_account, outcome.need_from)].raw)
        (outcome,) = book.drain(NOW)
    assert isinstance(outcome, Added)
    assert book.conservation() == m["bob"].book.conservation()


def test_an_old_entry_sent_again_is_looked_up_and_changes_nothing() -> None:
    m = Mesh()
    book = m["bob"].book
    old = m.log[0]
    again = m.fresh_book()
    for _, snapshot in book.snapshots():
        again.restore(snapshot)
    for _ in range(2 * HASHES_KEPT):
        sent(m, "founder", "bob", 1) if m["founder"].purse.available_ucr else m.grant("founder", CREDIT)
    assert m["bob"].book.compare_head(old.account, old.seq, old.hash) == "lookup"
    outcome = book.apply(old.raw, NOW)
    assert isinstance(outcome, NotYet)
    assert outcome.need == "lookup"
    book.supply(old.raw)
    assert book.drain(NOW) == []
    assert isinstance(book.apply(old.raw, NOW), Known)
    assert book.view(old.account).refuse == ""
    with pytest.raises(DataError):
        m.fresh_book().supply(old.raw)


def test_heads_changed_last_are_newest_first() -> None:
    m = Mesh(("alice", "bob", "carol"))
    sent(m, "carol", "bob", 1)
    last = sent(m, "alice", "bob", 1)
    heads = m["founder"].book.heads_changed_last(2)
    assert heads[0] == (last.account, last.seq, last.hash)
    assert heads[1][0] == m["carol"].account
    assert len(m["founder"].book.heads_changed_last(100)) == 4
    assert m["bob"].book.compare_head(*heads[0]) == "same"
    assert m["bob"].book.compare_head(last.account, last.seq, ZERO) == "differs"
    assert m["bob"].book.compare_head(last.account, last.seq - 1, last.prev) == "ahead"
    assert m["bob"].book.compare_head(last.account, last.seq + 9, ZERO) == "behind"


# --- checkpoints


class Adopting:
    """Alice's checkpoint, countersigned by the founder, offered to a book that has never seen her."""

    def __init__(self) -> None:
        self.m = m = Mesh(("alice", "bob", "carol"))
        self.seq = m.lock("alice", ("bob", 30, 2)).seq
        self.early = m.release("alice", (self.seq, 0, 1, 10))
        new = m.keys.new("alice's second")
        self.rotation = m.put(m["alice"].purse.rotate(new, m.keys.signer(new), NOW))
        self.document = m["founder"].book.state_bytes(m["alice"].account)
        self.entry = m.put(m["alice"].purse.checkpoint(NOW))
        founder = m["founder"]
        self.statement = checkpoint.countersign(
            founder.book, self.entry.account, self.entry.seq, self.entry.hash, founder.sign
        )
        self.book = m.fresh_book()
        feed(self.book, [entry for entry in m.log if entry.account == founder.account])

    def adopt(self, **changes: object) -> str:
        fields: dict[str, object] = {
            "raw": self.entry.raw,
            "document": self.document,
            "statements": [self.statement],
            "auditors": [self.m["founder"].account],
            "rotations": [self.rotation.raw],
        }
        return checkpoint.adopt(self.book, **(fields | changes), verify=self.m.keys.verify)


def test_an_audit_may_start_at_a_countersigned_checkpoint() -> None:
    a = Adopting()
    assert a.adopt() == ""
    alice, bob = a.m["alice"].account, a.m["bob"]
    view = a.book.view(alice)
    assert (view.seq, view.base_seq, view.refuse) == (a.entry.seq, a.entry.seq, "")
    assert view.available_ucr == a.m["founder"].book.view(alice).available_ucr
    late = a.m.release("alice", (a.seq, 0, 2, 20))
    assert isinstance(a.book.apply(late.raw, NOW), Added)
    feed(a.book, [entry for entry in a.m.log if entry.account == bob.account])
    outcome = a.book.apply(a.m.claim_all("bob").raw, NOW)
    assert isinstance(outcome, NotYet), "a payment before the checkpoint"
    assert (outcome.need, outcome.need_from) == ("lookup", a.early.seq)
    segment = [entry.raw for entry in a.m.log if entry.account == alice and a.seq <= entry.seq <= a.entry.seq]
    assert not a.book.supply_linked([segment[0], segment[2]])
    assert not a.book.supply_linked([b"?"])
    assert a.book.supply_linked(segment)
    (claimed,) = a.book.drain(NOW)
    assert isinstance(claimed, Added)
    assert a.book.view(bob.account) == a.m["founder"].book.view(bob.account)


def test_a_checkpoint_is_adopted_only_with_all_that_proves_it() -> None:
    a = Adopting()
    other = a.m.put(a.m["bob"].purse.checkpoint(NOW))
    assert "not a checkpoint" in a.adopt(raw=a.early.raw)
    assert "state document" in a.adopt(document=a.m["founder"].book.state_bytes(a.m["bob"].account))
    assert "countersigned" in a.adopt(auditors=[a.m["bob"].account])
    assert "countersigned" in a.adopt(statements=[b"?"])
    assert "key" in a.adopt(rotations=[])
    assert a.adopt(raw=other.raw)
    assert a.adopt(raw=b"?")
    assert a.adopt(document=b"?")
    assert a.book.view(a.m["alice"].account).seq == -1
    assert a.adopt() == ""
    assert "already" in a.adopt()


def test_only_what_is_held_and_unblemished_is_countersigned() -> None:
    a = Adopting()
    founder = a.m["founder"]
    with pytest.raises(NotPermittedError, match="not in the chain"):
        checkpoint.countersign(founder.book, a.entry.account, a.entry.seq, ZERO, founder.sign)
    wrong = with_signature(
        draft(MESH, a.entry.account, a.entry.seq, a.entry.prev, NOW, Send(founder.account, 1, ZERO)), bytes(64)
    )
    assert isinstance(founder.book.apply(wrong.raw, NOW), Rejected)
    alice = a.m["alice"]
    second = build(
        MESH,
        alice.account,
        a.entry.seq,
        a.entry.prev,
        NOW,
        Lock(NOW, NOW, None, []),
        a.m.keys.signer(a.m.keys.new("alice's second")),
    )
    founder.book.apply(second.raw, NOW)
    with pytest.raises(NotPermittedError, match="forked"):
        checkpoint.countersign(founder.book, a.entry.account, a.entry.seq, a.entry.hash, founder.sign)


# --- start-up


def test_damaged_snapshots_and_databases_are_said_so() -> None:
    m = Mesh()
    book = m.fresh_book()
    with pytest.raises(DataError):
        book.restore(b"?")
    assert isinstance(book.apply(m.log[0].raw, NOW, trusted=True), Added)
    assert isinstance(book.apply(m.log[0].raw, NOW, trusted=True), Known)
    holes = [entry for entry in m.log if entry.account == m["alice"].account][1:]
    assert isinstance(book.apply(holes[0].raw, NOW, trusted=True), Rejected)
