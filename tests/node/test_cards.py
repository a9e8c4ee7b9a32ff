"""Cards of members: heard of without a connection, taken once, passed on once, newest wins, over restarts too."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import msgspec
import pytest

from clawnet import limits
from clawnet.identity.keys import KeyPair
from clawnet.node.cards import FIRST_HOP
from clawnet.wire import events as e
from clawnet.wire.codec import decode_struct, encode
from clawnet.wire.messages import Kind, Message, PeerCard, PeerInfo, Relayed
from clawnet.wire.relayed import make_relayed
from tests.node.meshkit import Member, Mesh


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    built = Mesh()
    yield built
    built.check()


def line(mesh: Mesh, *names: str) -> list[Member]:
    """Members in a row: each is connected to the next alone."""
    founder = mesh.found(names[0])
    members = [founder, *(mesh.join(founder, name) for name in names[1:])]
    mesh.settle()
    for one, other in pairwise(members):
        mesh.link(one, other)
    mesh.run(1)
    return members


def card_of(holder: Member, author: Member) -> PeerCard | None:
    return holder.node.rooms.members.index.card(author.peer)


def relabel(member: Member, *labels: str) -> PeerInfo:
    """A new card of a member, as its neighbours get it."""
    member.config = type(member.config).defaults({"node.name": member.name, "node.labels": " ".join(labels)})
    member.node.ctx.config = member.config
    member.feed(e.Listening(("/ip4/127.0.0.1/tcp/5000",)))
    member.turn()
    cards = member.node.rooms.cards
    return PeerInfo(cards._statement, cards._signature, FIRST_HOP)


def hear(receiver: Member, sender: Member, message: PeerInfo) -> int:
    """How many times the receiver passes this on."""
    before = receiver.sent.count
    count = sum(before(sent) for sent in {sent for sent in receiver.sent if sent[1] == "PeerInfo"})
    receiver.feed(e.MessageIn(sender.peer, bytes(16), message, None, None))
    receiver.turn()
    return sum(before(sent) for sent in {sent for sent in receiver.sent if sent[1] == "PeerInfo"}) - count


def test_members_know_members_they_are_not_connected_to(mesh: Mesh) -> None:
    alice, bob, carol, dave = line(mesh, "alice", "bob", "carol", "dave")
    assert card_of(alice, carol) is not None, "passed on once"
    record = alice.node.rooms.members.records[carol.peer]
    assert record.last_ms == 0 and record.ring == "member" and record.addresses
    mesh.run(600)
    assert card_of(alice, dave) is not None, "by introductions, in the end"
    assert alice.node.rooms.books.chains.keepers() == [bob.peer], "only who was met can hold anything of ours"
    alice.restart()
    mesh.run(1)
    assert card_of(alice, carol) is not None and card_of(alice, dave) is not None
    shown = alice.call("peer.list")
    mesh.settle()
    states = {peer["name"]: peer["state"] for peer in alice.replies[shown]["items"]}
    assert states == {"bob": "connected", "carol": "known", "dave": "known"}
    assert carol in mesh.members.values() and bob in mesh.linked(carol)


def test_a_statement_is_passed_on_once_also_over_a_restart(mesh: Mesh) -> None:
    alice, bob, carol = line(mesh, "alice", "bob", "carol")
    message = relabel(alice, "blue")
    mesh.cut(alice, bob)
    mesh.cut(bob, carol)
    mesh.run(0)
    mesh.link(bob, carol)
    mesh.run(0)
    other = relabel(alice, "green")
    assert hear(bob, alice, other) == 1, "to carol"
    assert hear(bob, alice, other) == 0
    bob.restart()
    mesh.run(1)
    known = bob.sent.count((carol.peer, "PeerInfo"))
    assert hear(bob, alice, other) == 0 and bob.sent.count((carol.peer, "PeerInfo")) == known
    assert card_of(bob, alice) is not None
    assert card_of(carol, alice).labels == ["green"]  # type: ignore[union-attr]
    assert hear(bob, alice, message) == 0, "an older card of the same author"
    assert card_of(bob, alice).labels == ["green"]  # type: ignore[union-attr]


@pytest.mark.parametrize("lost", ["ban", "room"])
def test_a_card_that_was_dropped_is_taken_again_when_its_author_shows_it(mesh: Mesh, lost: str) -> None:
    alice, bob = line(mesh, "alice", "bob")
    members = bob.node.rooms.members
    shown = card_of(bob, alice)
    assert shown is not None
    if lost == "ban":
        members.ban(alice.peer, True)
        mesh.run(1)
        members.ban(alice.peer, False)
        assert card_of(bob, alice) == shown, "work may be offered to it again before it is connected"
    members.index.remove(alice.peer)
    mesh.cut(alice, bob)
    mesh.run(0)
    mesh.link(alice, bob)
    mesh.run(1)
    assert card_of(bob, alice) == shown


def test_what_has_travelled_far_enough_goes_no_further(mesh: Mesh) -> None:
    alice, bob, _ = line(mesh, "alice", "bob", "carol")
    mesh.cut(alice, bob)
    mesh.run(0)
    message = relabel(alice, "blue")
    assert hear(bob, alice, msgspec.structs.replace(message, hops=limits.RELAY_HOPS_MAX)) == 0
    assert card_of(bob, alice).labels == ["blue"]  # type: ignore[union-attr]
    assert hear(bob, alice, message) == 1, "an introduction was no reason not to pass it on"


def test_an_old_statement_is_still_a_card_and_goes_no_further(mesh: Mesh) -> None:
    alice, bob, carol = line(mesh, "alice", "bob", "carol")
    mesh.cut(alice, bob)
    mesh.run(0)
    message = relabel(alice, "blue")
    mesh.run(limits.MESSAGE_AGE_MS / 1000 + 10)
    assert hear(bob, alice, message) == 0
    assert card_of(bob, alice).labels == ["blue"]  # type: ignore[union-attr]
    mesh.run(60)
    assert card_of(carol, alice).labels == ["blue"]  # type: ignore[union-attr]
    mesh.run(limits.CARD_AGE_MS / 1000)
    bob.node.rooms.members.index.remove(alice.peer)
    hear(bob, alice, message)
    assert card_of(bob, alice) is None, "a day old: its author would have made a new one"


@pytest.mark.parametrize("lie", ["signature", "author", "stranger", "kind", "future"])
def test_cards_that_no_member_made_are_refused(mesh: Mesh, lie: str) -> None:
    alice, bob, _ = line(mesh, "alice", "bob", "carol")
    mesh.cut(alice, bob)
    mesh.run(0)
    message = relabel(alice, "blue")
    read = decode_struct(Relayed, message.statement)
    card = decode_struct(PeerCard, read.body)
    eve = KeyPair.from_seed(bytes(32))
    kind, author, key = Kind.PEER_INFO, alice.peer, alice.key
    if lie == "signature":
        key = eve
    elif lie == "author":
        author, key = eve.peer_id, eve
    elif lie == "stranger":
        author, key, card = eve.peer_id, eve, msgspec.structs.replace(card, peer=eve.peer_id)
    elif lie == "kind":
        kind = Kind.MEMBERSHIP
    else:
        card = msgspec.structs.replace(card, serial=bob.now_ms + limits.MESSAGE_AGE_MS + 1_000)
    false = make_relayed(author, kind, encode(card), identifier=bytes(16), time_ms=bob.now_ms, sign=key.sign)
    before = dict(bob.store.tables["relayed"])
    assert hear(bob, alice, PeerInfo(*false, FIRST_HOP)) == 0
    assert card_of(bob, alice).labels == []  # type: ignore[union-attr]
    assert bob.node.rooms.members.index.card(eve.peer_id) is None
    assert bob.store.tables["relayed"] == before, "what nobody signed fills no window"
    assert hear(bob, alice, message) == 1


def test_the_window_on_the_disk_is_bounded_by_time(mesh: Mesh) -> None:
    alice, bob, _ = line(mesh, "alice", "bob", "carol")
    for count in range(5):
        relabel(alice, f"label{count}")
        mesh.run(1)
    held = len(bob.store.tables["relayed"])
    assert held >= 5
    mesh.run(limits.MESSAGE_AGE_MS / 1000 + 10)
    relabel(alice, "last")
    mesh.run(1)
    assert len(bob.store.tables["relayed"]) == len(bob.node.rooms.relay.window) < held
    floor = bob.node.rooms.relay.window.floor_ms
    bob.restart()
    mesh.run(1)
    assert bob.node.rooms.relay.window.floor_ms == floor > 0


def test_a_card_is_made_anew_before_others_think_it_old(mesh: Mesh) -> None:
    alice, bob = line(mesh, "alice", "bob")
    serial = card_of(bob, alice).serial  # type: ignore[union-attr]
    mesh.run(limits.CARD_REFRESH_MS / 1000 + 120)
    assert card_of(bob, alice).serial > serial  # type: ignore[union-attr]


def test_cards_go_round_once_and_old_ones_are_forgotten(mesh: Mesh) -> None:
    alice, bob, carol, dave = line(mesh, "alice", "bob", "carol", "dave")
    mesh.run(1_200)
    assert all(card_of(one, other) for one in (alice, bob) for other in (carol, dave))
    before = sum(member.sent.count((other.peer, "PeerInfo")) for member in (alice, bob) for other in (alice, bob))
    mesh.run(3_600)
    after = sum(member.sent.count((other.peer, "PeerInfo")) for member in (alice, bob) for other in (alice, bob))
    assert after == before, "nothing has changed"
    mesh.cut(carol, dave)
    mesh.run(limits.CARD_AGE_MS / 1000 + 120)
    assert card_of(alice, dave) is None and card_of(alice, carol) is not None


def test_a_change_costs_a_message_a_link_and_a_few_more_however_many_links_there_are(mesh: Mesh) -> None:
    founder = mesh.found("alice")
    for number in range(13):
        mesh.join(founder, f"m{number}")
    mesh.settle()
    mesh.link_all()
    mesh.run(120)
    heard: list[tuple[str, str]] = []

    def count(sender: Member, receiver: Member, message: Message) -> int:
        if isinstance(message, PeerInfo) and decode_struct(Relayed, message.statement).author == founder.peer:
            heard.append((sender.name, receiver.name))
        return 1

    mesh.fate = count
    relabel(founder, "blue")
    mesh.run(1)
    assert {receiver for _, receiver in heard} >= {f"m{number}" for number in range(13)}
    assert len(heard) <= 13 + limits.CARD_HEARERS**2


def test_who_is_met_by_many_at_once_introduces_so_many_a_minute(mesh: Mesh) -> None:
    founder = mesh.found("alice")
    others = [mesh.join(founder, f"m{number}") for number in range(12)]
    mesh.settle()
    introduced: list[str] = []

    def count(sender: Member, receiver: Member, message: Message) -> int:
        if isinstance(message, PeerInfo) and sender is founder:
            author = decode_struct(Relayed, message.statement).author
            introduced.extend([author] * (author not in (founder.peer, receiver.peer) and message.hops > FIRST_HOP))
        return 1

    for one in others[:6]:
        mesh.link(founder, one)
    mesh.run(61)
    mesh.fate = count
    for one in others[6:]:
        mesh.link(founder, one)
    mesh.settle()
    assert 0 < len(introduced) <= limits.CARDS_INTRODUCED_PER_MINUTE + 6 * limits.CARD_HEARERS
    mesh.run(1_200)
    assert all(card_of(others[0], other) is not None for other in others[1:]), "the others as news"
