"""Offers that are passed on: who hears of them, who bids, what they say, and what of them is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from clawnet import limits
from clawnet.identity.keys import KeyPair
from clawnet.ledger.entries import Rotate, build, possession_message
from clawnet.node.reaching import LET_GO
from clawnet.wire import events as e
from clawnet.wire.codec import decode_struct, encode
from clawnet.wire.hearsay import OpenOffer
from clawnet.wire.messages import Gossip, Kind, Offer, Relayed, Requirements
from clawnet.wire.relayed import make_relayed
from tests.node.meshkit import Member, Mesh
from tests.node.sparse import Dials, row, sent
from tests.node.trades import CREDIT, SELFLESS, compute, laws

LAZY = {"node.capabilities": "shell-execution"}
"""A member that computes nothing."""
ROW = ("alice", "bob", "carol", "dave", "erin")


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    built = Mesh()
    yield built
    built.run(3_600)
    laws(built)


def chain(mesh: Mesh, **of: dict[str, str]) -> list[Member]:
    """Alice to erin in a row; only erin computes, and alice has not heard of her."""
    lazy = {name: {**LAZY, **of.pop(name, {})} for name in ROW[1:-1]}
    members = row(mesh, *ROW, **lazy, **of)
    assert members[0].node.rooms.members.index.card(members[-1].peer) is None
    return members


def kept(member: Member, kind: str = "Gossip") -> list[Gossip]:
    """From now on, all messages of a kind that this member sends."""
    found: list[Gossip] = []
    send = member._do_send

    def watch(effect: e.Send) -> None:
        if type(effect.message).__name__ == kind:
            found.append(effect.message)  # type: ignore[arg-type]
        send(effect)

    member._do_send = watch  # type: ignore[method-assign]
    return found


def hear(receiver: Member, sender: Member, message: Any) -> int:
    """How many times the receiver passes this on."""
    before = sent(receiver, "Gossip")
    receiver.feed(e.MessageIn(sender.peer, bytes(16), message, None, None))
    receiver.turn()
    return sent(receiver, "Gossip") - before


def test_a_task_that_nobody_known_can_do_reaches_who_can(mesh: Mesh) -> None:
    alice, bob, carol, dave, erin = chain(mesh)
    dials = Dials(mesh)
    call = compute(alice)
    mesh.run(5)
    view = alice.task(call)
    assert view["state"] == "settled" and view["executor"]["name"] == "erin" and view["price"] != "0"
    assert ("erin", "alice") in dials.made and not any(one == "alice" for one, _ in dials.made)
    assert [sent(one, "Gossip") for one in (alice, bob, carol, dave)] == [1, 1, 1, 1], "each passes it on once"
    assert sent(erin, "Bid") == 1 and not sent(bob, "Bid"), "a bid goes to the author alone"
    compute(alice)
    mesh.run(5)
    assert sent(alice, "Gossip") == 1 and sent(alice, "Offer") == 1, "erin is known now"


def test_what_goes_round_is_the_offer_and_no_more(mesh: Mesh) -> None:
    alice, *_ = chain(mesh)
    Dials(mesh)
    seen = kept(alice)
    compute(alice, op_args={"limit": 4711}, description="about our takeover")
    mesh.run(1)
    (message,) = seen
    body = decode_struct(OpenOffer, decode_struct(Relayed, message.statement).body)
    assert body.offer.kind == "compute" and body.addresses == alice.node.rooms.cards.addresses
    assert body.ring == "member" and message.hops == 1
    assert b"takeover" not in message.statement and b"4711" not in message.statement


def test_nobody_is_asked_around_where_everybody_is_connected(mesh: Mesh) -> None:
    alice = mesh.found("alice", **SELFLESS)
    bob = mesh.join(alice, "bob", credits_ucr=CREDIT, **LAZY)
    carol = mesh.join(alice, "carol", credits_ucr=CREDIT, **LAZY)
    mesh.link_all()
    mesh.run(2)
    call = compute(alice)
    mesh.settle()
    assert alice.task(call)["state"] == "no_bids", "at once"
    mesh.cut(alice, bob)
    mesh.run(30)
    call = compute(alice)
    mesh.settle()
    assert alice.task(call)["state"] == "no_bids", "one that was lost is nobody to be found"
    assert not sent(alice, "Gossip") and carol in mesh.linked(alice)


def test_in_vain_it_ends_within_bounds_and_is_not_repeated_for_every_task(mesh: Mesh) -> None:
    alice, *_ = chain(mesh, erin=LAZY)
    Dials(mesh)
    calls = [compute(alice) for _ in range(40)]
    mesh.run(limits.GOSSIP_WAIT_MS / 1000 + 6)
    assert {alice.task(call)["state"] for call in calls} == {"no_bids"}
    assert sent(alice, "Gossip") == 1, "one of a kind at a time, and none after one in vain"
    shown = alice.call("task.why", task=alice.replies[calls[0]]["task_id"])
    mesh.settle()
    assert [one["closed_by"] for one in alice.replies[shown]["rounds"]] == ["gossip_over"]
    mesh.run(limits.GOSSIP_FRUITLESS_MS / 1000)
    compute(alice)
    mesh.run(1)
    assert sent(alice, "Gossip") == 2


def test_many_tasks_wait_for_the_first_that_asks_around(mesh: Mesh) -> None:
    alice, *_, erin = chain(mesh)
    Dials(mesh)
    calls = [compute(alice) for _ in range(12)]
    mesh.run(40)
    assert {alice.task(call)["state"] for call in calls} == {"settled"}
    assert sent(alice, "Gossip") == 1 and sent(erin, "Bid") >= 12


def test_exclusion_and_ring_hold_for_who_heard_of_it(mesh: Mesh) -> None:
    alice, *_, erin = chain(mesh)
    mesh.link(alice, erin)
    mesh.run(1)
    mesh.cut(alice, erin, LET_GO)
    mesh.run(1)
    alice.node.rooms.members.index.remove(erin.peer)
    Dials(mesh)
    call = compute(alice, exclude=["erin"])
    mesh.run(10)
    assert alice.task(call)["state"] == "no_bids" and sent(erin, "Bid") == 1, "she cannot know"
    call = compute(alice, ring="own")
    mesh.run(10)
    assert alice.task(call)["state"] == "no_bids" and sent(alice, "Gossip") == 1, "no own machine to pass it to"
    alice.node.rooms.members.index.remove(erin.peer)
    call = compute(alice, peer=["erin"])
    mesh.run(10)
    assert sent(alice, "Gossip") == 1, "who is named is not looked for"
    assert not erin.runs


def test_an_offer_to_own_machines_is_passed_on_among_them_alone(mesh: Mesh) -> None:
    alice = mesh.found("alice", **SELFLESS)
    attic = mesh.join(alice, "attic", ring="own", **LAZY)
    cellar = mesh.join(alice, "cellar", ring="own", **LAZY)
    shed = mesh.join(alice, "shed", ring="own")
    bob = mesh.join(alice, "bob", credits_ucr=CREDIT, **LAZY)
    mesh.settle()
    for one, other in ((alice, attic), (attic, cellar), (cellar, shed), (alice, bob), (attic, bob), (bob, shed)):
        mesh.link(one, other)
    mesh.run(0)
    for one in (alice, attic):
        one.node.rooms.members.index.remove(shed.peer)
    Dials(mesh)
    call = compute(alice, ring="own")
    mesh.run(5)
    assert alice.task(call)["executor"]["name"] == "shed" and alice.task(call)["price"] == "0"
    assert sent(alice, "Gossip") and not sent(bob, "Gossip")
    assert hear(bob, alice, statement_of(alice, ring="own")) == 0, "who gets it all the same passes nothing on"
    assert hear(bob, alice, statement_of(alice)) > 0


def statement_of(
    alice: Member, *, key: KeyPair | None = None, author: str = "", kind: str = "prompt", close_ms: int = 0, **of: Any
) -> Gossip:
    """An offer of alice's as her neighbours get it, or one that somebody made up."""
    now_ms = alice.now_ms
    offer = Offer(
        task_id=alice.entropy(16), round=1, kind=kind, task=bytes(32), payload_bytes=10, input_bytes=0,
        max_budget_ucr=9 * CREDIT, deadline_ms=now_ms + 300_000, close_ms=close_ms or now_ms + 30_000, lease_s=30,
        requirements=Requirements(),
    )  # fmt: skip
    own = alice.node.rooms.cards.own
    body = msgspec.structs.replace(OpenOffer(offer, "member", own.addresses, own.certificates), **of)
    return Gossip(*spoken(alice, encode(body), key or alice.key, author or alice.peer), 0)


def spoken(alice: Member, body: bytes, key: KeyPair, author: str) -> tuple[bytes, bytes]:
    kind, name = Kind.MARKET_TASK_ANNOUNCE, alice.entropy(16)
    return make_relayed(author, kind, body, identifier=name, time_ms=alice.now_ms, sign=key.sign)


EVE = KeyPair.from_seed(bytes(32))


@pytest.mark.parametrize("lie", ["signature", "stranger", "banned", "over", "ring", "hops", "garbage", "kind"])
def test_what_may_not_be_passed_on(mesh: Mesh, lie: str) -> None:
    alice, bob, carol, *_ = chain(mesh)
    good = statement_of(alice)
    message: Any = good
    if lie == "signature":
        message = statement_of(alice, key=EVE)
    elif lie == "stranger":
        message = statement_of(alice, key=EVE, author=EVE.peer_id)
    elif lie == "banned":
        bob.node.rooms.members.records[alice.peer].banned = True
    elif lie == "over":
        message = statement_of(alice, close_ms=alice.now_ms)
    elif lie == "ring":
        message = statement_of(alice, ring="world")
    elif lie == "hops":
        message = msgspec.structs.replace(good, hops=limits.RELAY_HOPS_MAX)
    elif lie == "garbage":
        message = Gossip(*spoken(alice, b"\x93", alice.key, alice.peer), 0)
    else:
        message = Gossip(alice.node.rooms.cards._statement, alice.node.rooms.cards._signature, 0)
    rows = dict(bob.store.tables["relayed"])
    assert hear(bob, alice, message) == 0
    if lie != "hops":
        assert bob.store.tables["relayed"] == rows, "it fills no window"
    bob.node.rooms.members.records[alice.peer].banned = False
    if lie != "hops":
        assert hear(bob, alice, good) == 1, "the true one goes on"
    assert hear(bob, carol, good) == 0, "once"
    bob.restart()
    mesh.run(1)
    assert hear(bob, carol, good) == 0, "over a restart too"
    mesh.run(60)


def test_nobody_passes_on_what_a_removed_member_asks_even_where_it_is_not_known(mesh: Mesh) -> None:
    alice, bob, carol, dave, _ = chain(mesh)
    good, later = statement_of(bob), statement_of(bob)
    mesh.link(alice, dave)
    mesh.run(1)
    assert hear(dave, carol, good) == 2
    alice.call("peer.remove", peer="bob")
    mesh.run(5)
    dave.node.rooms.members.records.pop(bob.peer)
    assert hear(dave, carol, later) == 0


def test_nobody_passes_on_what_a_banned_member_asks_under_its_next_key(mesh: Mesh) -> None:
    alice, bob, carol, *_ = chain(mesh)
    proof = EVE.sign(possession_message(alice.account, 1, bytes(32)))
    mesh_id = alice.node.hello_facts()[0]
    row = build(mesh_id, alice.account, 1, bytes(32), alice.now_ms, Rotate(EVE.public, proof), alice.key.sign)
    bob.node.rooms.members.records[alice.peer].banned = True
    assert hear(bob, carol, statement_of(alice, key=EVE, author=EVE.peer_id, rotations=[row.raw])) == 0
    assert bob.node.ctx.ids.inner(EVE.peer_id) == EVE.peer_id, "nor is anything kept of it"
    bob.node.rooms.members.records[alice.peer].banned = False


def test_a_flood_is_cut_off_by_author_and_by_carrier(mesh: Mesh) -> None:
    alice, bob, carol, dave, _ = chain(mesh)
    passed = sum(hear(bob, alice, statement_of(alice)) for _ in range(2 * limits.GOSSIP_PER_AUTHOR_PER_MINUTE))
    assert passed == limits.GOSSIP_PER_AUTHOR_PER_MINUTE
    assert hear(bob, carol, statement_of(dave)) == 1, "others are heard"
    before = bob.node.rooms.relay.window
    for _ in range(limits.GOSSIP_PER_PEER_PER_MINUTE):
        hear(bob, carol, statement_of(alice, key=EVE))
    assert hear(bob, carol, statement_of(dave)) == 0, "who carries too much is not listened to for a minute"
    assert bob.node.rooms.relay.window is before
    mesh.run(60)
    assert hear(bob, carol, statement_of(dave)) == 1


def test_where_somebody_bids_the_offer_goes_no_further(mesh: Mesh) -> None:
    alice, bob, carol, *_ = row(mesh, "alice", "bob", "carol", "dave")
    message = statement_of(alice, kind="compute")
    before = sent(bob, "Bid")
    assert hear(bob, alice, message) == 0 and sent(bob, "Bid") == before + 1
    assert carol in mesh.linked(bob)
