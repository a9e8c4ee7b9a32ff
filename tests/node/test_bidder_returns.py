"""A bidder whose link breaks and comes back while the auction is open can still win it."""

from __future__ import annotations

from clawnet.wire.messages import Offer
from tests.node.meshkit import Mesh


def test_the_bid_of_a_peer_that_is_back_counts() -> None:
    mesh = Mesh()
    alice = mesh.found("alice", **{"market.self": "never", "market.soft_close": "5s"})
    bob = mesh.join(alice, "bob")
    carol = mesh.join(alice, "carol", **{"market.rates.task": "3"})
    mesh.link_all()
    mesh.run(2)
    mesh.fate = lambda sender, receiver, message: 0 if receiver is carol and isinstance(message, Offer) else 1
    call = alice.call("task.submit", spec={"type": "compute", "op": "sha256", "description": "x", "ring": "member"})
    mesh.run(1)
    assert len(alice.node.rooms.auctions.live) == 1, "carol has not answered: the auction is open"
    mesh.cut(alice, bob)
    mesh.run(1)
    mesh.link(alice, bob)
    mesh.run(10)
    task = alice.task(call)
    assert (task["state"], task["executor"]["name"]) == ("settled", "bob"), task
    mesh.check()
