"""Books of different age: what two nodes ask each other about a chain that one of them does not follow."""

from __future__ import annotations

import pytest

from clawnet.ledger.state import HashTail
from tests.node.meshkit import Mesh
from tests.node.trades import CREDIT, SELFLESS, compute


def test_a_head_older_than_the_hashes_held_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = Mesh()
    alice = mesh.found("alice", **SELFLESS)
    bob, carol, dave = (mesh.join(alice, name, credits_ucr=CREDIT) for name in ("bob", "carol", "dave"))
    mesh.link_all()
    mesh.run(70)
    for other in (alice, bob, dave):
        mesh.cut(other, carol)
    compute(alice, peer=[dave.peer])
    mesh.run(70)
    # Bob has begun again from a snapshot, and holds but the newest hash; carol, as in a large mesh, does not follow.
    held = bob.node.rooms.books.book._accounts[alice.account]
    held.tail = HashTail(held.seq, held.hash)
    followed = (bob.account, carol.account)
    monkeypatch.setattr(carol.node.rooms.books.chains, "_wanted", lambda peer, account: account in followed)
    for other in (alice, dave):
        mesh.cut(other, bob)
    before = len(bob.sent)
    mesh.link(bob, carol)
    mesh.run(5)
    heads = [member.node.rooms.books.book.head(alice.account) for member in (bob, carol)]
    assert heads[0] is not None and heads[1] is not None and heads[1][0] < heads[0][0], "carol's book is the older one"
    asked = [kind for _, kind in bob.sent[before:]].count("LedgerPull")
    assert 1 <= asked <= 5
