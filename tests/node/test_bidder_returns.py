"""Bidders that are late: one whose link breaks and comes back can still win, one that is slow is waited for at last."""

from __future__ import annotations

from clawnet.wire.events import Send
from clawnet.wire.messages import Bid, Message, Offer
from tests.node.meshkit import Member, Mesh


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


def test_one_that_was_slow_is_waited_for_where_nobody_else_is_left() -> None:
    mesh = Mesh()
    alice = mesh.found("alice", **{"market.self": "never", "market.bid_timeout": "20s"})
    bob = mesh.join(alice, "bob")
    mesh.link_all()
    mesh.run(2)
    late: list[Bid] = []

    def hold(sender: Member, receiver: Member, message: Message) -> int:
        late.extend([message] if isinstance(message, Bid) else [])
        return 0 if isinstance(message, Bid) else 1

    def submit(word: str) -> int:
        return alice.call(
            "task.submit", spec={"type": "compute", "op": "sha256", "description": word, "ring": "member"}
        )

    mesh.fate = hold
    first = submit("one")
    mesh.run(19)
    assert alice.task(first)["state"] == "bidding", "it may answer until the timeout"
    mesh.run(2)
    assert alice.task(first)["state"] == "no_bids" and len(late) == 1
    second = submit("two")
    mesh.run(3)
    assert alice.task(second)["state"] == "bidding", "one that was slow is waited for when all else has failed"
    mesh.fate = lambda *_: 1
    mesh.carry(bob, Send(alice.peer, late[-1]))
    mesh.run(10)
    assert alice.task(second)["state"] == "settled"
    mesh.fate = hold
    third = submit("three")
    mesh.run(11)
    fourth = submit("four")
    mesh.run(21)
    assert [alice.task(call)["state"] for call in (third, fourth)] == ["no_bids"] * 2, "and not for ever"
    mesh.check()
