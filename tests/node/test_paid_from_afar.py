"""A payment between members that are never connected again: others carry its entries, and nothing is owed for ever."""

from __future__ import annotations

import pytest

from tests.node.meshkit import Member, Mesh


def afar() -> tuple[Mesh, Member, Member, Member]:
    """Bob and carol know each other by their cards alone; alice is connected to both, and is bob's keeper."""
    mesh = Mesh()
    alice = mesh.found("alice")
    bob = mesh.join(alice, "bob", credits_ucr=10_000_000)
    carol = mesh.join(alice, "carol")
    mesh.link(alice, bob)
    mesh.link(alice, carol)
    mesh.run(200)
    return mesh, alice, bob, carol


def arrived(mesh: Mesh, alice: Member, bob: Member, carol: Member) -> None:
    assert carol.node.rooms.books.available() == 1_500_000
    assert not bob.node.rooms.books.book.payables(bob.key.public, carol.key.public), "bob counts carol's claim"
    for member in (alice, bob, carol):
        assert not member.node.rooms.outbox.rows, member.name
    mesh.check()


def test_a_payment_and_its_claim_arrive_through_others() -> None:
    mesh, alice, bob, carol = afar()
    bob.call("wallet.send", peer="carol", amount="1.5")
    mesh.run(300)
    arrived(mesh, alice, bob, carol)


@pytest.mark.parametrize("away", ["carol", "bob", "alice"])
def test_they_arrive_though_somebody_is_away_when_they_are_passed_on(away: str) -> None:
    mesh, alice, bob, carol = afar()
    bob.call("wallet.send", peer="carol", amount="1.5")
    mesh.run(2)
    gone = {"alice": alice, "bob": bob, "carol": carol}[away]
    others = [other for other in (bob, carol) if gone in (alice, other)]
    for other in others:
        mesh.cut(alice, other)
    mesh.run(150)
    if gone is alice:
        alice.boot()
    for other in others:
        mesh.link(alice, other)
    mesh.run(300)
    arrived(mesh, alice, bob, carol)
