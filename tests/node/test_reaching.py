"""Members that are not connected: dialled for a task, let go again, and connected at random in a large mesh."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from clawnet import limits
from clawnet.node.reaching import LET_GO
from clawnet.wire import events as e
from tests.node.meshkit import Member, Mesh
from tests.node.sparse import Dials, row, sent
from tests.node.trades import CREDIT, SELFLESS, compute, laws, only

LAZY = {"node.capabilities": "shell-execution"}
"""A member that computes nothing."""


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    built = Mesh()
    yield built
    built.run(3_600)
    laws(built)


def test_a_member_known_by_its_card_is_dialled_for_a_task(mesh: Mesh) -> None:
    alice, _, carol = row(mesh, "alice", "bob", "carol", bob=LAZY)
    dials = Dials(mesh)
    call = compute(alice)
    mesh.run(2)
    assert alice.task(call)["executor"]["name"] == "carol" and only(alice).state == "settled"
    assert dials.made == [("alice", "carol")] and carol in mesh.linked(alice)
    assert not sent(alice, "Gossip"), "it was known"
    compute(alice)
    mesh.run(2)
    assert len(dials.made) == 1, "the link is there now"


def test_those_connected_are_asked_first_and_only_so_many_others(mesh: Mesh) -> None:
    alice = mesh.found("alice", **SELFLESS)
    near = [mesh.join(alice, f"near{n}", credits_ucr=CREDIT) for n in range(3)]
    hub = mesh.join(alice, "hub", **LAZY)
    far = [mesh.join(alice, f"far{n}", credits_ucr=CREDIT) for n in range(20)]
    mesh.settle()
    for one in (*near, hub):
        mesh.link(alice, one)
    for one in far:
        mesh.link(hub, one)
    mesh.run(7_200)
    assert len(alice.node.rooms.members.index) > 15
    dials = Dials(mesh)
    compute(alice)
    mesh.run(5)
    assert len(dials.made) == limits.CANDIDATES_NEAR - len(near)
    assert sent(alice, "Offer") == limits.CANDIDATES_NEAR and only(alice).state == "settled"


@pytest.mark.parametrize("silent", [False, True])
def test_who_cannot_be_reached_is_waited_for_within_bounds_and_left_alone_for_a_while(mesh: Mesh, silent: bool) -> None:
    alice, *_ = row(mesh, "alice", "bob", "carol", bob=LAZY)
    dials = Dials(mesh, lambda dialler, other: False)
    dials.silent = silent
    call = compute(alice, bid_timeout_s=60, deadline_s=300)
    mesh.run(limits.REACH_MS / 1000 + limits.GOSSIP_WAIT_MS / 1000 + 1)
    assert alice.task(call)["state"] == "no_bids"
    assert dials.made.count(("alice", "carol")) == 1
    compute(alice)
    mesh.run(1)
    assert dials.made.count(("alice", "carol")) == 1, "not tried again for every task"
    dials.reaches = lambda dialler, other: True
    mesh.run(limits.UNREACHABLE_MIN_MS / 1000)
    call = compute(alice)
    mesh.run(5)
    assert alice.task(call)["state"] == "settled"


def test_exclusions_and_names_hold_for_those_not_connected(mesh: Mesh) -> None:
    alice, _, carol = row(mesh, "alice", "bob", "carol")
    dials = Dials(mesh)
    call = compute(alice, exclude=["carol"])
    mesh.run(1)
    assert alice.task(call)["executor"]["name"] == "bob" and not dials.made
    call = compute(alice, peer=["carol"])
    mesh.run(1)
    assert alice.task(call)["executor"]["name"] == "carol" and dials.made == [("alice", "carol")]
    mesh.cut(alice, carol, LET_GO)
    alice.node.rooms.members.ban(carol.peer, True)
    call = compute(alice, peer=["carol"], deadline_s=10)
    mesh.run(11)
    assert alice.task(call)["state"] in ("no_bids", "timed_out") and len(dials.made) == 1


def crowd(mesh: Mesh, count: int, **keys: str) -> tuple[Member, list[Member]]:
    """Alice and so many others, who all know each other's cards; nobody is connected."""
    alice = mesh.found("alice", **SELFLESS, **keys)
    others = [mesh.join(alice, f"m{n}") for n in range(count)]
    mesh.settle()
    for one in others:
        mesh.link(alice, one)
    mesh.run(1)
    for one in others:
        mesh.cut(alice, one, LET_GO)
    mesh.run(limits.LINK_IDLE_MS / 1000)
    return alice, others


def test_a_mesh_larger_than_may_be_connected_is_connected_at_random_and_in_turn(mesh: Mesh) -> None:
    alice, others = crowd(mesh, 30, **{"node.max_peers": "8", "node.min_peers": "3"})
    dials = Dials(mesh)
    alice.node.rooms.reaching.start()
    alice.perform(alice.node.end_turn(mesh.now_ms))
    mesh.run(1)
    first = set(mesh.linked(alice))
    assert len(first) == 4, "half of what may be"
    assert first != set(others[:4]), "not those known longest"
    met = set(first)
    for _ in range(40):
        mesh.run(limits.LINKS_TURNED_EVERY_MS / 1000)
        met |= set(mesh.linked(alice))
        assert 3 <= len(mesh.linked(alice)) <= 8
    assert len(met) > 15 and len(dials.made) < 60
    alice.restart()
    mesh.run(120)
    assert 3 <= len(mesh.linked(alice)) <= 8 and set(mesh.linked(alice)) != first


def test_idle_links_make_room_and_busy_ones_stay(mesh: Mesh) -> None:
    alice, others = crowd(mesh, 6, **{"node.max_peers": "3", "node.min_peers": "1"})
    busy = others[0]
    busy.runner = lambda member, run: None
    Dials(mesh)
    call = compute(alice, peer=["m0"], retries=0)
    mesh.run(2)
    assert alice.task(call)["state"] == "executing"
    for one in others[1:3]:
        mesh.link(one, alice)
    mesh.run(limits.LINK_IDLE_MS / 1000 + 1)
    mesh.link(others[3], alice)
    mesh.link(others[4], alice)
    mesh.run(70)
    linked = mesh.linked(alice)
    assert len(linked) <= 3 and busy in linked
    assert others[3] in linked or others[4] in linked, "the newcomers stay a while"


def test_a_link_that_breaks_while_its_work_goes_on_is_dialled_until_it_is_back(mesh: Mesh) -> None:
    alice, _, carol = row(mesh, "alice", "bob", "carol", bob=LAZY)
    kept: list[e.Dial] = []
    alice._do_dial = lambda dial: kept.append(dial) if not dial.call else mesh.dialled(alice, dial)  # type: ignore[method-assign]
    Dials(mesh)
    carol.runner = lambda member, run: None
    compute(alice)
    mesh.run(2)
    assert not [dial for dial in kept if dial.peer == carol.peer]
    mesh.cut(alice, carol)
    mesh.run(1)
    assert [dial.peer for dial in kept if dial.peer == carol.peer] == [carol.peer]
    mesh.link(alice, carol)
    mesh.run(1)


@pytest.mark.parametrize("reason", ["timed out", LET_GO])
def test_whoever_owes_a_message_makes_the_link_again_also_one_that_it_never_made(mesh: Mesh, reason: str) -> None:
    """Alice called carol for a task and has all of it; that she has, carol has not heard when the link is lost."""
    alice, _, carol = row(mesh, "alice", "bob", "carol", bob=LAZY)
    dials = Dials(mesh)
    kept: list[e.Dial] = []
    carol._do_dial = lambda dial: kept.append(dial) if not dial.call else mesh.dialled(carol, dial)  # type: ignore[method-assign]
    mesh.fate = lambda sender, receiver, message: int(type(message).__name__ != "Ack")
    compute(alice)
    mesh.run(2)
    assert dials.made == [("alice", "carol")] and only(alice).state == "settled" and carol.node.rooms.outbox.rows
    mesh.fate = lambda sender, receiver, message: 1
    mesh.cut(alice, carol, reason)
    mesh.run(1)
    if reason == LET_GO:
        assert not kept, "she was asked not to redial at once"
        mesh.run(limits.HEADS_EVERY_MS / 1000 + 1)
        assert dials.made[1:] == [("carol", "alice")] and not carol.node.rooms.outbox.rows
    else:
        assert [dial.peer for dial in kept] == [alice.peer]
        mesh.link(alice, carol)
        mesh.run(1)
    assert not carol.node.rooms.outbox.rows


def test_who_is_let_go_does_not_dial_back_for_ever(mesh: Mesh) -> None:
    alice, others = crowd(mesh, 3)
    mesh.link(alice, others[0])
    mesh.run(1)
    hung: list[e.Hangup] = []
    others[0]._do_hangup = hung.append  # type: ignore[method-assign]
    mesh.cut(alice, others[0], "the peer closed the link: " + LET_GO)
    mesh.run(1)
    assert [effect.peer for effect in hung] == [alice.peer]
    assert others[0].node.rooms.reaching.can_dial(alice.peer), "it lives, and may be called for a task"


def test_a_grant_arrives_in_a_mesh_larger_than_may_be_connected(mesh: Mesh) -> None:
    """Bob is connected to others before he meets the founder, of whose chain he holds nothing and wants this alone."""
    alice, others = crowd(mesh, 3)
    bob = mesh.join(alice, "bob", credits_ucr=CREDIT, **{"node.max_peers": "2", "node.min_peers": "1"})
    for one in (*others, alice):
        mesh.link(bob, one)
        mesh.run(1)
    assert not bob.node.rooms.reaching.all_fit
    assert bob.node.rooms.books.available() == CREDIT
    books = bob.node.rooms.books.book
    assert all(books.head(one.account) is None for one in others[2:]), "there is no work with them"
