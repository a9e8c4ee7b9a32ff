"""One owner can certify any number of nodes: together they get no more of another node than a share."""

from __future__ import annotations

import hashlib

import msgspec
import pytest

from clawnet import limits
from clawnet.errors import RateLimited
from clawnet.identity.certificates import certify_node, certify_owner, read_charter
from clawnet.identity.keys import KeyPair
from clawnet.node.cards import FIRST_HOP
from clawnet.wire import events as e
from clawnet.wire.codec import encode
from clawnet.wire.messages import Head, Kind, LedgerPush, PeerCard, PeerInfo
from clawnet.wire.relayed import make_relayed
from clawnet.wire.replay import ReplayWindow
from tests.node.meshkit import Member, Mesh
from tests.node.test_liars_in_the_way import tell
from tests.node.trades import three


class Crowd:
    """An owner in the mesh, and as many nodes of it as wanted, which exist by their certificates alone."""

    def __init__(self, mesh: Mesh, founder: Member, name: str) -> None:
        self.mesh, self.name = mesh, name
        self.founder = founder
        self.owner = KeyPair.from_seed(hashlib.sha256(name.encode()).digest())
        _, self.id = read_charter(founder.local.charter)
        self.base = certify_owner(
            founder.owner, self.id, self.owner.public, may_invite=False, issued_ms=mesh.now_ms, inviter=founder.peer
        )

    def card(self, number: int) -> tuple[str, PeerInfo]:
        """The card of one of its nodes, as its author would send it."""
        key = KeyPair.from_seed(hashlib.sha256(f"{self.name} {number}".encode()).digest())
        now_ms = self.mesh.now_ms
        node = certify_node(self.owner, self.id, key.public, issued_ms=now_ms, inviter=self.founder.peer)
        certificates = [*self.founder.local.certificates[:-1], self.base, node]
        rooms = self.founder.node.rooms
        own: PeerCard = rooms.cards.own
        card = msgspec.structs.replace(
            own, peer=key.peer_id, name=f"{self.name}{number}", certificates=certificates, serial=now_ms, rotations=[]
        )
        identifier = hashlib.sha256(key.public + now_ms.to_bytes(8, "big")).digest()[:16]
        statement = make_relayed(
            key.peer_id, Kind.PEER_INFO, encode(card), identifier=identifier, time_ms=now_ms, sign=key.sign
        )
        return key.peer_id, PeerInfo(*statement, FIRST_HOP)


def test_cards_of_one_owners_nodes_fill_its_share_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HEARD_OF_OWNER_MAX", 5)
    mesh = Mesh()
    alice, bob, _ = three(mesh)
    crowd, honest = Crowd(mesh, alice, "mallory"), Crowd(mesh, alice, "hana")
    known = set(alice.node.rooms.members.records)
    cards = [crowd.card(number) for number in range(12)]
    for _, card in cards:
        alice.feed(e.MessageIn(bob.peer, bytes(16), card, None, None))
        alice.turn()
    taken = set(alice.node.rooms.members.records) - known
    assert len(taken) == 5 and taken == {peer for peer, _ in cards[:5]}
    peer, card = honest.card(0)
    alice.feed(e.MessageIn(bob.peer, bytes(16), card, None, None))
    alice.turn()
    assert peer in alice.node.rooms.members.records
    alice.restart()
    assert not alice.node.rooms.members.may_hear_of(crowd.owner.public), "counted again after a restart"
    mesh.now_ms += limits.CARD_AGE_MS + 1
    peer, card = crowd.card(100)
    alice.feed(e.MessageIn(bob.peer, bytes(16), card, None, None))
    alice.turn()
    left = set(alice.node.rooms.members.records) & ({peer} | taken)
    assert peer in left and len(left) == 5, "one that was silent for a day makes room"


def test_who_connects_for_the_first_time_to_a_full_node_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = Mesh()
    alice, bob, carol = three(mesh)
    monkeypatch.setattr(limits, "PEER_RECORDS_MAX", len(alice.node.rooms.members.records))
    dave = mesh.join(alice, "dave")
    mesh.cut(alice, carol)
    mesh.settle()
    mesh.link(alice, dave)
    mesh.settle()
    records = alice.node.rooms.members.records
    assert dave.peer in records and bob.peer in records
    assert len(records) == limits.PEER_RECORDS_MAX and carol.peer not in records


def test_heads_claimed_by_many_nodes_of_one_owner_are_believed_as_of_one() -> None:
    mesh = Mesh()
    alice, bob, carol = three(mesh)
    members = alice.node.rooms.members
    members.records[carol.peer].owner = members.records[bob.peer].owner
    mesh.fate = lambda one, other, message: 0 if isinstance(message, LedgerPush) and other is alice else 1
    head = alice.node.rooms.books.book.head(alice.key.public)
    assert head is not None
    said = LedgerPush(alice.key.public, [], [Head(alice.key.public, head[0] + 7, bytes(32))])
    tell(bob, alice, said)
    assert alice.node.rooms.books.chains.waiting
    mesh.run(limits.START_CHECK_MS / 1000 + 1)
    tell(carol, alice, said)
    assert not alice.node.rooms.books.chains.waiting


def test_the_statements_of_one_owners_nodes_push_nobody_elses_out() -> None:
    window = ReplayWindow(ids_max=64, author_share=8, group_max=16)
    window.group_of = lambda author: b"mallory" if author.startswith("m") else author.encode()
    now_ms = 1_800_000_000_000
    assert window.admit("alice", b"first", now_ms - 1_000, now_ms)
    refused = 0
    for number in range(100):
        try:
            window.admit(f"m{number}", b"x", now_ms + number, now_ms)
        except RateLimited:
            refused += 1
    assert (refused, window.floor_ms, len(window)) == (84, 0, 17)
    later = now_ms + limits.MESSAGE_AGE_MS + 1_000
    assert window.admit("m7", b"y", later, later), "its share is free again when what filled it is too old"
    again = ReplayWindow(ids_max=64, author_share=8, group_max=1)
    again.group_of = window.group_of
    again.restore(list(window.rows()), window.floor_ms)
    with pytest.raises(RateLimited):
        again.admit("m8", b"z", later, later)
