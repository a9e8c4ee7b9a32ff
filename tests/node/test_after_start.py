"""A node that has just started can be trusted: what is asked of it in its first seconds waits for what it needs."""

from __future__ import annotations

import hashlib

from clawnet.identity import invite
from clawnet.identity.keys import KeyPair
from clawnet.mesh.roster import join_bytes
from clawnet.wire import events as e
from clawnet.wire.messages import JoinAsk, Offer
from tests.node.meshkit import Member, Mesh
from tests.node.trades import CREDIT, compute, laws, pair


def restarted(mesh: Mesh) -> tuple[Member, Member]:
    """Alice has just started again; her only worker is not connected yet."""
    alice, bob = pair(mesh)
    mesh.cut(alice, bob)
    mesh.settle()
    alice.boot()
    return alice, bob


def test_a_task_of_the_first_moment_waits_for_those_who_could_bid() -> None:
    mesh = Mesh()
    alice, bob = restarted(mesh)
    call = compute(alice)
    mesh.run(1)
    assert alice.replies[call]["created"], "it is taken at once"
    assert alice.task(call)["state"] == "announced"
    mesh.link(alice, bob)
    mesh.run(2)
    assert alice.task(call)["state"] == "settled"
    laws(mesh)


def test_nobody_is_waited_for_who_cannot_be_reached_when_another_can_do_it() -> None:
    mesh = Mesh()
    alice, bob = pair(mesh)
    carol = mesh.join(alice, "carol")
    mesh.link(alice, carol)
    mesh.run(1)
    for other in (bob, carol):
        mesh.cut(alice, other)
    alice.boot()
    call = compute(alice)
    mesh.link(alice, carol)
    mesh.settle()
    assert alice.task(call)["state"] == "announced", "bob has a moment too"
    alice.feed(e.DialEnded(0, bob.peer, "connection refused"))
    mesh.settle()
    assert alice.task(call)["state"] == "settled"
    laws(mesh)


def test_who_never_answers_is_not_waited_for_long() -> None:
    mesh = Mesh()
    alice, bob = restarted(mesh)
    call = compute(alice)
    alice.feed(e.DialEnded(0, bob.peer, "connection refused"))
    mesh.run(4)
    assert alice.task(call)["state"] == "announced", "it may be starting too"
    mesh.run(2)
    assert alice.task(call)["state"] == "no_bids"


def test_a_worker_that_starts_again_in_the_middle_of_an_auction_can_still_have_the_task() -> None:
    mesh = Mesh()
    alice, bob = pair(mesh)
    mesh.fate = lambda sender, receiver, message: not isinstance(message, Offer)
    call = compute(alice)
    mesh.run(0.1)
    mesh.cut(alice, bob)
    mesh.run(3)
    assert alice.task(call)["state"] == "bidding"
    mesh.fate = lambda sender, receiver, message: 1
    mesh.link(alice, bob)
    mesh.run(1)
    assert alice.task(call)["state"] == "settled"
    laws(mesh)


def test_a_worker_that_left_is_not_waited_for_long() -> None:
    mesh = Mesh()
    alice, bob = pair(mesh)
    mesh.cut(alice, bob)
    mesh.settle()
    call = compute(alice)
    mesh.run(6)
    assert alice.task(call)["state"] == "no_bids"
    mesh.run(1)
    late = compute(alice)
    mesh.settle()
    assert alice.task(late)["state"] == "no_bids", "it is known to be gone by now"


def test_a_lock_waits_for_the_check_of_the_chain_and_no_longer_than_for_who_can_be_reached() -> None:
    mesh = Mesh()
    alice, bob = restarted(mesh)
    carol = mesh.join(alice, "carol")
    mesh.link(alice, carol)
    call = compute(alice)
    mesh.run(0.6)
    assert alice.node.rooms.books.chains.checking and alice.task(call)["state"] == "awarded"
    alice.feed(e.DialEnded(0, bob.peer, "connection refused"))
    mesh.run(0.1)
    assert alice.task(call)["state"] == "settled"


def test_a_payment_waits_for_the_check_instead_of_failing() -> None:
    mesh = Mesh()
    alice, bob = restarted(mesh)
    call = alice.call("wallet.send", peer="bob", amount="5")
    wrong = alice.call("wallet.send", peer="bob", amount="999999999")
    mesh.settle()
    assert call not in alice.replies and wrong not in alice.replies
    mesh.link(alice, bob)
    mesh.run(1)
    assert alice.replies[call]["amount"] == "5"
    assert alice.replies[wrong]["code"] == "funds"
    assert bob.node.rooms.books.purse.available_ucr == 105 * CREDIT
    mesh.check()


def test_a_payment_whose_command_gave_up_is_not_made() -> None:
    mesh = Mesh()
    alice, bob = restarted(mesh)
    before_ucr = alice.node.rooms.books.available()
    call = alice.call("wallet.send", peer="bob", amount="5")
    mesh.settle()
    alice.feed(e.CallGone(call))
    mesh.link(alice, bob)
    mesh.run(30)
    assert call not in alice.replies and alice.node.rooms.books.available() == before_ucr


def test_a_newcomer_is_let_in_once_its_grant_can_be_written() -> None:
    mesh = Mesh()
    alice, bob = pair(mesh)
    call = alice.call("peer.invite", ring="member")
    mesh.settle()
    secret = invite.decode(alice.replies[call]["token"]).secret
    mesh.cut(alice, bob)
    alice.boot()
    answers: list[e.JoinReply] = []
    alice._do_joinreply = answers.append  # type: ignore[attr-defined]
    node, owner = (KeyPair.from_seed(hashlib.sha256(word).digest()) for word in (b"node", b"owner"))
    facts = alice.node.rooms.members.facts
    body = join_bytes(facts.mesh, secret, node.public, owner.public, "dave", mesh.now_ms)
    ask = JoinAsk(facts.mesh, secret, node.public, owner.public, "dave", mesh.now_ms, node.sign(body), owner.sign(body))
    alice.feed(e.JoinAsked(1, node.peer_id, "address", ask))
    mesh.settle()
    assert not answers
    mesh.link(alice, bob)
    mesh.run(1)
    assert [answer.answer.refusal for answer in answers] == [""]
    granted = alice.node.rooms.books.book.payables(alice.key.public, node.public)
    assert [payable.amount_ucr for payable in granted] == [1_000 * CREDIT]


def test_a_node_alone_goes_on_with_what_it_had_taken() -> None:
    mesh = Mesh()
    alice = mesh.found("alice")
    call = alice.call("task.submit", spec={"type": "compute", "op": "primes", "op_args": {"limit": 10}})
    alice.crash_at = alice.turns + 1
    mesh.run(1)
    assert alice.task(call)["state"] == "settled", "it knows what it can do only once its sandbox was probed"
    laws(mesh)


def test_a_token_that_is_redeemed_again_gives_no_membership_to_another_owner() -> None:
    mesh = Mesh()
    alice, _ = pair(mesh)
    call = alice.call("peer.invite", ring="member")
    mesh.settle()
    secret = invite.decode(alice.replies[call]["token"]).secret
    answers: list[e.JoinReply] = []
    alice._do_joinreply = answers.append  # type: ignore[attr-defined]
    node, owner, other = (KeyPair.from_seed(hashlib.sha256(word).digest()) for word in (b"node", b"owner", b"other"))
    facts = alice.node.rooms.members.facts
    for number, key in enumerate((owner, owner, other)):
        body = join_bytes(facts.mesh, secret, node.public, key.public, "dave", mesh.now_ms)
        ask = JoinAsk(facts.mesh, secret, node.public, key.public, "dave", mesh.now_ms, node.sign(body), key.sign(body))
        alice.feed(e.JoinAsked(number, node.peer_id, "address", ask))
        mesh.settle()
    assert [answer.answer.refusal for answer in answers] == ["", "", "the invite has been used"]
