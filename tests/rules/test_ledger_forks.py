"""Forks: proofs, second branches, income that is void in one book and good in another."""

from __future__ import annotations

import pytest

from clawnet.ledger.audit import audit_chains
from clawnet.ledger.entries import (
    ENTRY_SIGNATURE_TAG,
    Claim,
    Parsed,
    Rotate,
    Send,
    build,
    possession_message,
    with_signature,
)
from clawnet.ledger.outcomes import Added, Branch, Forked, Invalid, Known, NotYet, Rejected
from clawnet.ledger.proofs import build_proof
from clawnet.ledger.purse import claim_item
from tests.rules.ledger_mesh import CREDIT, MESH, NOW, ZERO, Mesh, book_payable, claim, feed, next_of


class Fork:
    """Alice signs two payments for one place: `held` to bob, `other` to carol; dave sees neither yet."""

    def __init__(self) -> None:
        self.m = Mesh(("alice", "bob", "carol", "dave"))
        alice = self.m["alice"]
        self.held = next_of(alice, Send(self.m["bob"].account, 60 * CREDIT, ZERO))
        self.other = next_of(alice, Send(self.m["carol"].account, 70 * CREDIT, ZERO))

    def claimed(self, name: str, entry: Parsed) -> Parsed:
        """`name`'s own book sees that branch and claims it."""
        member = self.m[name]
        assert isinstance(member.book.apply(entry.raw, NOW), Added)
        return member.purse.claim([claim(p) for p in member.book.incomes(member.account)], NOW)


def looked_up(book, entry: Parsed, held: Parsed):
    """Applies an entry that contradicts the book; the held one comes from the database when it is asked for."""
    outcome = book.apply(entry.raw, NOW)
    assert isinstance(outcome, NotYet)
    assert (outcome.need, outcome.need_from) == ("lookup", held.seq)
    assert book.view(held.account).refuse == "forked", "the signature is enough to stop trusting"
    book.supply(held.raw)
    (forked,) = book.drain(NOW)
    assert isinstance(forked, Forked)
    return forked


def test_two_entries_for_one_place_are_a_proof_that_any_book_takes() -> None:
    f = Fork()
    dave, bob = f.m["dave"].book, f.m["bob"].book
    assert isinstance(dave.apply(f.held.raw, NOW), Added)
    forked = looked_up(dave, f.other, f.held)
    assert forked.parsed == f.other
    assert dave.proof(f.held.account) == forked.proof
    assert dave.head(f.held.account) == (f.held.seq, f.held.hash), "first seen stays"
    assert isinstance(dave.apply(f.other.raw, NOW), Branch)
    assert isinstance(bob.learn_proof(forked.proof), Forked)
    assert isinstance(bob.learn_proof(forked.proof), Known)
    assert bob.view(f.held.account).refuse == "forked"
    unknown = f.m.fresh_book()
    assert isinstance(unknown.learn_proof(forked.proof), Forked)
    assert build_proof(f.held, f.other, []) == build_proof(f.other, f.held, []) == forked.proof


def test_a_proof_needs_both_signatures_one_place_and_this_mesh() -> None:
    f = Fork()
    alice, bob = f.m["alice"], f.m["bob"]
    later = alice.sign_any(f.held.seq + 1, f.held.hash, Send(bob.account, 1, ZERO))
    forged = with_signature(f.other, bob.sign(ENTRY_SIGNATURE_TAG + f.other.hash))
    foreign = build(ZERO, alice.account, f.held.seq, f.held.prev, NOW, Send(bob.account, 1, ZERO), alice.sign)
    for second in (f.held, later, forged, foreign):
        assert isinstance(f.m.fresh_book().learn_proof(build_proof(f.held, second, [])), Rejected)
    assert isinstance(f.m.fresh_book().learn_proof(b"?"), Rejected)
    assert isinstance(f.m.fresh_book().learn_proof(bytes(300_000)), Rejected)


def test_a_fork_after_a_rotation_is_proved_with_the_rotate_entry() -> None:
    m = Mesh()
    alice, bob = m["alice"], m["bob"]
    new = m.keys.new("new")
    old_sign = alice.sign
    rotation = m.put(alice.purse.rotate(new, m.keys.signer(new), NOW))
    seq, prev = rotation.seq + 1, rotation.hash
    first, second = (
        build(MESH, alice.account, seq, prev, NOW, Send(bob.account, n, ZERO), m.keys.signer(new)) for n in (1, 2)
    )
    assert isinstance(bob.book.apply(first.raw, NOW), Added)
    forked = looked_up(bob.book, second, first)
    assert isinstance(m.fresh_book().learn_proof(forked.proof), Forked)
    assert isinstance(m.fresh_book().learn_proof(build_proof(first, second, [])), Rejected)
    stale = [build(MESH, alice.account, seq, prev, NOW, Send(bob.account, n, ZERO), old_sign) for n in (3, 4)]
    holder = m["founder"].book
    assert isinstance(holder.learn_proof(build_proof(stale[0], stale[1], [])), Rejected), (
        "a key given up convicts nobody"
    )
    assert bob.book.rotations(alice.account) == [rotation.raw]


def test_a_fork_at_the_rotation_itself() -> None:
    m = Mesh()
    alice = m["alice"]
    send = next_of(alice, Send(m["bob"].account, 1, ZERO))
    new = m.keys.new("new")
    possession = m.keys.signer(new)(possession_message(alice.account, send.seq, send.prev))
    rotation = alice.sign_any(send.seq, send.prev, Rotate(new, possession))
    assert isinstance(m["bob"].book.apply(rotation.raw, NOW), Added)
    forked = looked_up(m["bob"].book, send, rotation)
    assert isinstance(m.fresh_book().learn_proof(forked.proof), Forked)


def test_the_second_branch_may_show_its_later_entry_first() -> None:
    f = Fork()
    alice, dave = f.m["alice"], f.m["dave"].book
    beyond = alice.sign_any(f.other.seq + 1, f.other.hash, Send(f.m["bob"].account, 1, ZERO))
    assert isinstance(dave.apply(f.held.raw, NOW), Added)
    odd = dave.apply(beyond.raw, NOW)
    assert isinstance(odd, NotYet)
    assert (odd.need, odd.need_from) == ("branch", f.held.seq)
    assert dave.view(alice.account).refuse == "forked"
    going_on = alice.sign_any(f.held.seq + 1, f.held.hash, Send(f.m["bob"].account, 2, ZERO))
    outcomes = feed(dave, [going_on])
    assert [type(o) for o in outcomes] == [Added, Forked]
    assert dave.conservation().conserved


@pytest.mark.parametrize("first_seen", ["held", "other"])
def test_a_claim_on_the_branch_a_book_does_not_hold_is_void_there_and_nowhere_else(first_seen: str) -> None:
    f = Fork()
    alice, dave = f.m["alice"].account, f.m["dave"].book
    claims = {"bob": f.claimed("bob", f.held), "carol": f.claimed("carol", f.other)}
    mine, theirs = (f.held, f.other) if first_seen == "held" else (f.other, f.held)
    winner, loser = ("bob", "carol") if first_seen == "held" else ("carol", "bob")
    assert isinstance(dave.apply(mine.raw, NOW), Added)
    assert isinstance(dave.apply(claims[winner].raw, NOW), Added)
    waiting = dave.apply(claims[loser].raw, NOW)
    assert isinstance(waiting, NotYet)
    assert (waiting.need, waiting.need_account, waiting.need_to) == ("branch", alice, theirs.seq)
    assert dave.view(f.m[loser].account).refuse == "", "not served is not yet, not invalid"
    looked_up(dave, theirs, mine)
    chain = [entry.raw for entry in f.m.log if entry.account == alice]
    assert dave.check_branch(alice, [*chain, mine.raw], NOW) is None
    (voided,) = dave.drain(NOW)
    assert isinstance(voided, Added)
    amount = theirs.body.amount_ucr
    assert voided.void_ucr == amount
    assert voided.payables == (None,)
    view = dave.view(f.m[loser].account)
    assert (view.available_ucr, view.void_ucr, view.refuse) == (100 * CREDIT, amount, "")
    for name in ("dave", "bob", "carol"):
        assert f.m[name].book.conservation().conserved
    restored = f.m.fresh_book()
    for _, snapshot in dave.snapshots():
        restored.restore(snapshot)
    assert restored.conservation() == dave.conservation()
    assert restored.view(f.m[loser].account) == view


def test_void_income_that_was_spent_is_a_debt_at_the_head() -> None:
    f = Fork()
    alice, dave, carol = f.m["alice"].account, f.m["dave"].book, f.m["carol"]
    claimed = f.claimed("carol", f.other)
    spent = carol.purse.send(f.m["bob"].account, 150 * CREDIT, ZERO, NOW)
    assert isinstance(dave.apply(f.held.raw, NOW), Added)
    feed(dave, [claimed, spent])
    looked_up(dave, f.other, f.held)
    assert dave.check_branch(alice, [e.raw for e in f.m.log if e.account == alice] + [f.held.raw], NOW) is None
    assert [type(o) for o in dave.drain(NOW)] == [Added, Added]
    view = dave.view(carol.account)
    assert (view.available_ucr, view.refuse, view.ended) == (-50 * CREDIT, "debt", "")
    assert dave.payables(carol.account, f.m["bob"].account)[0].amount_ucr == 150 * CREDIT
    assert dave.conservation().conserved


def test_a_branch_counts_as_evidence_only_from_where_it_leaves_the_held_chain() -> None:
    f = Fork()
    alice, carol, dave = f.m["alice"], f.m["carol"], f.m["dave"].book
    later = [
        alice.sign_any(entry.seq + 1, entry.hash, Send(carol.account, amount_ucr, ZERO))
        for entry, amount_ucr in ((f.held, 1), (f.other, 2))
    ]
    feed(dave, [f.held, later[0]])
    looked_up(dave, later[1], later[0])
    wanted = book_payable(alice, later[1], amount_ucr=2, entry=later[1])
    claimed = next_of(carol, Claim([claim_item(wanted, None)]))
    assert isinstance(dave.apply(claimed.raw, NOW), NotYet)
    chain = [e.raw for e in f.m.log if e.account == alice.account] + [f.held.raw, later[0].raw]
    missing = dave.check_branch(alice.account, chain, NOW)
    assert missing is not None
    assert (missing.need, missing.first) == ("branch", f.other.seq)
    assert all(isinstance(outcome, NotYet) for outcome in dave.drain(NOW))
    assert isinstance(dave.apply(f.other.raw, NOW), Branch)
    assert dave.check_branch(alice.account, chain, NOW) is None
    (voided,) = dave.drain(NOW)
    assert isinstance(voided, Added)
    assert voided.void_ucr == 2
    assert dave.conservation().conserved


def test_a_branch_that_breaks_a_rule_makes_the_claim_on_it_invalid() -> None:
    f = Fork()
    alice, dave = f.m["alice"], f.m["dave"].book
    greedy = alice.sign_any(f.held.seq, f.held.prev, Send(f.m["carol"].account, 10**12, ZERO))
    assert isinstance(dave.apply(f.held.raw, NOW), Added)
    looked_up(dave, greedy, f.held)
    payable = book_payable(alice, greedy, amount_ucr=10**12, entry=greedy)
    false_claim = next_of(f.m["carol"], Claim([claim_item(payable, None)]))
    assert isinstance(dave.apply(false_claim.raw, NOW), NotYet)
    assert dave.check_branch(alice.account, [e.raw for e in f.m.log if e.account == alice.account], NOW) is None
    (outcome,) = dave.drain(NOW)
    assert isinstance(outcome, Invalid)
    assert dave.conservation().conserved


def test_audit_traces_void_income_through_kept_segments() -> None:
    f = Fork()
    alice = f.m["alice"].account
    claims = [f.claimed("bob", f.held), f.claimed("carol", f.other)]
    chains: dict[bytes, list[bytes]] = {}
    for entry in [*f.m.log, f.held, *claims]:
        chains.setdefault(entry.account, []).append(entry.raw)
    without = audit_chains(f.m.terms, MESH, chains, f.m.keys.verify)
    assert [problem.account for problem in without.problems] == [f.m["carol"].account]
    with_it = audit_chains(f.m.terms, MESH, chains, f.m.keys.verify, segments={alice: [f.other.raw]})
    assert with_it.sound
    assert with_it.accounts[f.m["carol"].account].void_ucr == 70 * CREDIT
    assert with_it.accounts[f.m["carol"].account].available_ucr == 100 * CREDIT


def test_ended_and_forked_chains_survive_a_restart() -> None:
    f = Fork()
    dave, bob = f.m["dave"].book, f.m["bob"]
    assert isinstance(dave.apply(f.held.raw, NOW), Added)
    looked_up(dave, f.other, f.held)
    bad = next_of(bob, Send(bob.account, 1, ZERO))
    assert isinstance(dave.apply(bad.raw, NOW), Invalid)
    again = f.m.fresh_book()
    for _, snapshot in dave.snapshots():
        again.restore(snapshot)
    assert dave.snapshots() == again.snapshots() == []
    proof = dave.proof(f.held.account)
    assert proof is not None
    assert again.view(f.held.account).refuse == "forked", "even before the proof is read"
    again.learn_proof(proof, trusted=True)
    for account in dave.accounts():
        assert again.view(account) == dave.view(account)
    good = next_of(bob, Send(f.m["carol"].account, 1, ZERO))
    assert isinstance(again.apply(good.raw, NOW), Forked)


def test_nothing_of_a_forkers_chain_is_good_that_came_after_the_proof_also_not_after_a_restart() -> None:
    """World seed 7 (liars, 8 nodes, 3 links): a node that held nothing of a forker's chain heard of the fork first."""
    f = Fork()
    dave = f.m["dave"].book
    assert isinstance(dave.apply(f.held.raw, NOW), Added)
    proof = looked_up(dave, f.other, f.held).proof
    late = f.m.fresh_book()
    assert isinstance(late.learn_proof(proof), Forked)
    feed(late, [*f.m.log, f.held])
    alice = f.held.account
    assert late.head(alice) == (f.held.seq, f.held.hash)
    assert (late.view(alice).refuse, late.view(alice).good_seq) == ("forked", -1)
    again = f.m.fresh_book()
    for _, snapshot in late.snapshots():
        again.restore(snapshot)
    again.learn_proof(proof, trusted=True)
    assert again.view(alice) == late.view(alice)
