"""Neighbours in the kernel: the tag of the mesh, who is dialled, who is not, and what is shown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from clawnet import limits
from clawnet.identity.keys import KeyPair
from clawnet.node.neighbours import mesh_tag
from clawnet.wire import events as e
from tests.node.meshkit import Member, Mesh

KEY = bytes(range(32))
STRANGER = KeyPair.from_seed(bytes(32)).peer_id


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    built = Mesh()
    yield built
    built.check()


def with_key(member: Member, key: bytes = KEY) -> list[e.Effect]:
    """Gives a member the mesh's key; returns the list that its dials and hang-ups come to."""
    members = member.node.rooms.members
    members.facts = msgspec.structs.replace(members.facts, mesh_key=key)
    did: list[e.Effect] = []
    member._do_dial = did.append  # type: ignore[attr-defined]
    member._do_hangup = did.append  # type: ignore[method-assign]
    return did


def announce(member: Member, peer: str, *addresses: str, key: bytes = KEY) -> None:
    member.feed(e.NeighbourSeen(peer, addresses or (f"/ip4/192.0.2.7/tcp/4002/p2p/{peer}",), mesh_tag(key, peer)))
    member.turn()


def shown(member: Member) -> list[dict[str, Any]]:
    call = member.call("peer.nearby")
    member.turn()
    items: list[dict[str, Any]] = member.replies[call]["items"]
    return items


def test_a_tag_is_the_peers_own_and_no_outsiders() -> None:
    one, other = mesh_tag(KEY, "a"), mesh_tag(KEY, "b")
    assert len(one) == limits.MDNS_TAG_BYTES and len({one, other, mesh_tag(bytes(32), "a")}) == 3


def test_a_member_is_dialled_where_it_announces_itself_and_a_stranger_is_not(mesh: Mesh) -> None:
    alice = mesh.found("alice")
    bob = mesh.join(alice, "bob")
    mesh.settle()
    did = with_key(alice)
    announce(alice, bob.peer, f"/ip4/192.0.2.7/tcp/4002/p2p/{bob.peer}")
    announce(alice, STRANGER, key=bytes(range(1, 33)))
    (dial,) = did
    assert isinstance(dial, e.Dial) and dial.peer == bob.peer and dial.call == 0
    assert dial.addresses[0] == f"/ip4/192.0.2.7/tcp/4002/p2p/{bob.peer}"
    assert [(one["peer_id"], one["same_mesh"], one["state"]) for one in shown(alice)] == [
        (bob.peer, True, "seen"),
        (STRANGER, False, "seen"),
    ]


def test_a_neighbour_has_not_the_only_word_on_where_a_member_is(mesh: Mesh) -> None:
    """Anybody can copy an announcement under other addresses: those known before stay among the dialled."""
    alice = mesh.found("alice")
    bob = mesh.join(alice, "bob")
    mesh.link(alice, bob)
    mesh.settle()
    known = alice.node.rooms.members.records[bob.peer].addresses
    mesh.cut(alice, bob)
    mesh.settle()
    did = with_key(alice)
    announce(alice, bob.peer, *(f"/ip4/192.0.2.{n}/tcp/1/p2p/{bob.peer}" for n in range(1, 13)))
    (dial,) = did
    assert isinstance(dial, e.Dial) and known and set(known) <= set(dial.addresses)
    assert len(dial.addresses) <= limits.DIAL_ADDRESSES_MAX


def test_a_banned_or_muted_member_is_left_alone(mesh: Mesh) -> None:
    alice = mesh.found("alice")
    bob, carol = mesh.join(alice, "bob"), mesh.join(alice, "carol")
    for other in (bob, carol):
        mesh.link(alice, other)
    mesh.settle()
    alice.call("peer.ban", peer="bob")
    alice.call("peer.disconnect", peer="carol")
    mesh.settle()
    did = with_key(alice)
    announce(alice, bob.peer)
    announce(alice, carol.peer)
    assert did == []
    assert {one["name"]: one["state"] for one in shown(alice)} == {"bob": "banned", "carol": "known"}


def test_who_was_never_met_is_dialled_no_more_once_gone(mesh: Mesh) -> None:
    alice = mesh.found("alice")
    bob = mesh.join(alice, "bob")
    mesh.settle()
    did = with_key(alice)
    announce(alice, bob.peer)
    alice.feed(e.NeighbourGone(bob.peer))
    alice.feed(e.NeighbourGone(STRANGER))
    alice.turn()
    assert isinstance(did[-1], e.Hangup) and did[-1].peer == bob.peer and len(did) == 2
    assert shown(alice) == []


def test_a_new_mesh_key_shows_in_the_tag(mesh: Mesh) -> None:
    alice = mesh.found("alice")
    with_key(alice)
    before = alice.node.rooms.neighbours.tag()
    assert before == mesh_tag(KEY, alice.peer)
    with_key(alice, bytes(range(1, 33)))
    assert alice.node.rooms.neighbours.tag() != before


def test_a_member_without_the_key_shows_no_tag_and_knows_nobody_by_one(mesh: Mesh) -> None:
    alice = mesh.found("alice")
    for none in (b"", bytes(32)):
        did = with_key(alice, none)
        assert alice.node.rooms.neighbours.tag() == b""
        announce(alice, STRANGER, key=none)
        assert did == [] and not shown(alice)[0]["same_mesh"]


def test_a_card_with_new_addresses_tells_the_switch_where_to_redial(mesh: Mesh) -> None:
    alice = mesh.found("alice")
    bob = mesh.join(alice, "bob")
    mesh.link(alice, bob)
    mesh.settle()
    did = with_key(alice)
    bob.feed(e.Listening(("/ip4/192.0.2.9/tcp/4002",)))
    mesh.settle()
    assert [(one.peer, one.addresses[0]) for one in did if isinstance(one, e.Dial)] == [
        (bob.peer, "/ip4/192.0.2.9/tcp/4002")
    ]
    bob.feed(e.Listening(("/ip4/192.0.2.9/tcp/4002",)))
    mesh.settle()
    assert len(did) == 1, "nothing new"
