"""Two programs with one identity: both notice, neither writes while the other lives, and nobody forks."""

from __future__ import annotations

from clawnet import limits
from clawnet.wire.events import Listening
from tests.node.meshkit import Member, Mesh
from tests.node.trades import three


def clone(mesh: Mesh, member: Member) -> Member:
    """A second program on a copy of the member's disk. It has the same peer id, so one of the two is in the mesh."""
    twin = Member(mesh, member.name, member.key, member.owner, member.local)
    twin.store = member.store.twin()
    twin.boot()
    return twin


def swap(mesh: Mesh, old: Member, new: Member) -> None:
    """The one takes the other's connections, as a second connection with one peer id does."""
    others = [other for other in mesh.members.values() if other.peer != old.peer]
    for other in others:
        if frozenset((old.peer, other.peer)) in mesh.links:
            mesh.cut(old, other)
    mesh.members[new.peer] = new
    for other in others:
        mesh.link(new, other)
    mesh.run(15)


def refused(member: Member) -> str:
    """What `wallet send` answers; "" when it was sent."""
    call = member.call("wallet.send", peer="bob", amount="1")
    member.mesh.run(1)
    answer = member.replies[call]
    return str(answer.get("message", ""))


def test_two_that_live_at_once_hear_of_each_other_and_wait() -> None:
    mesh = Mesh()
    alice, bob, carol = three(mesh)
    twin = clone(mesh, alice)
    swap(mesh, alice, twin)
    assert refused(twin) == "", "it has caught up, and nobody has heard of the other yet"
    swap(mesh, twin, alice)
    assert "another program runs" in refused(alice)
    assert any("another program runs" in text for text in alice.node.rooms.calls.warnings())
    assert [log.event for log in alice.logs].count("identity.twin") == 1
    swap(mesh, alice, twin)
    assert "another program runs" in refused(twin)
    for member in (bob, carol):
        assert member.node.rooms.books.book.proof(alice.key.public) is None
    # The copy is stopped; after a while without a word of it the other one goes on.
    swap(mesh, twin, alice)
    mesh.run(limits.TWIN_HOLD_MS / 1000 + 1)
    assert refused(alice) == ""
    for member in (bob, carol):
        assert member.node.rooms.books.book.proof(alice.key.public) is None
    mesh.check()


def test_a_restart_is_no_twin() -> None:
    mesh = Mesh()
    alice, _, _ = three(mesh)
    for _ in range(3):
        alice.restart()
        mesh.run(15)
    assert not [log for log in alice.logs if log.event == "identity.twin"]
    assert refused(alice) == ""


def test_an_own_card_from_before_the_clock_was_set_back_is_no_twin() -> None:
    mesh = Mesh()
    alice, _, _ = three(mesh)
    alice.skew_ms = 100_000
    alice.feed(Listening(("/ip4/127.0.0.1/tcp/4999",)))
    mesh.run(2)
    alice.skew_ms = 0
    alice.restart()
    mesh.run(15)
    assert not [log for log in alice.logs if log.event == "identity.twin"]
    assert refused(alice) == ""


def test_a_card_that_nobody_hears_is_not_written() -> None:
    """A node that begins again on a full disk owes it no row, so it can answer what it is asked."""
    mesh = Mesh()
    alice = mesh.found("alice")
    before = alice.store.commits_total
    alice.feed(Listening(("/ip4/127.0.0.1/tcp/4999",)))
    mesh.run(1)
    assert alice.node.rooms.cards.own.addresses == ["/ip4/127.0.0.1/tcp/4999"]
    assert alice.store.commits_total == before
