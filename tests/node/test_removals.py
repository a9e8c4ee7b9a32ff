"""Memberships that end: removal by the founder, its way round the mesh, the key after it, and who is out for good."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import msgspec
import pytest

from clawnet import limits
from clawnet.identity.certificates import certify_node, certify_owner, read_charter
from clawnet.identity.keybox import lock, seal_to, unlock
from clawnet.identity.keys import KeyPair
from clawnet.identity.membership import LocalMembership
from clawnet.identity.revocations import KeyShare, MeshKey, Revocation, sign_mesh_key, sign_revocation
from clawnet.ledger.entries import parse
from clawnet.wire import events as e
from clawnet.wire.messages import Hello, LedgerPull, LedgerPush, Membership, Message
from tests.node.meshkit import Member, Mesh


@pytest.fixture
def mesh() -> Mesh:
    return Mesh("removals")


def key_of(member: Member) -> bytes:
    return member.node.rooms.mesh_keys.current


def ask(member: Member, method: str, **params: Any) -> Any:
    call = member.call(method, **params)
    member.mesh.settle()
    return member.replies[call]


def hello_of(member: Member, to: Member) -> Hello:
    mesh, name, certificates, rotations = member.node.hello_facts()
    return Hello([1, 0], "test", member.peer, to.peer, mesh, bytes(32), member.now_ms, name, certificates, rotations)


def star(mesh: Mesh, *names: str) -> list[Member]:
    """A founder and members, everybody connected with everybody."""
    founder = mesh.found(names[0])
    members = [founder, *(mesh.join(founder, name) for name in names[1:])]
    mesh.link_all()
    mesh.settle()
    return members


def certified_by(mesh: Mesh, inviter: Member, name: str) -> Member:
    """A member let in by a member that may invite."""
    _, mesh_id = read_charter(inviter.local.charter)
    key, owner = mesh._key(name), mesh._key(name + " owner")
    chain = list(inviter.local.certificates[:-1])
    chain.append(
        certify_owner(
            inviter.owner, mesh_id, owner.public, may_invite=False, issued_ms=mesh.now_ms, inviter=inviter.peer
        )
    )
    chain.append(certify_node(owner, mesh_id, key.public, issued_ms=mesh.now_ms, inviter=inviter.peer))
    local = LocalMembership(inviter.local.charter, tuple(chain), False, inviter.peer, "member")
    return mesh._add(Member(mesh, name, key, owner, local))


def may_invite(mesh: Mesh, founder: Member, name: str) -> Member:
    """A member whose certificate lets it invite others."""
    _, mesh_id = read_charter(founder.local.charter)
    key, owner = mesh._key(name), mesh._key(name + " owner")
    chain = (
        certify_owner(
            founder.owner, mesh_id, owner.public, may_invite=True, issued_ms=mesh.now_ms, inviter=founder.peer
        ),
        certify_node(owner, mesh_id, key.public, issued_ms=mesh.now_ms, inviter=founder.peer),
    )
    local = LocalMembership(founder.local.charter, chain, False, founder.peer, "member")
    return mesh._add(Member(mesh, name, key, owner, local))


# --- removing


def test_a_removed_member_is_out_at_every_member_at_once(mesh: Mesh) -> None:
    alice, bob, carol = star(mesh, "alice", "bob", "carol")
    answer = ask(alice, "peer.remove", peer="bob")
    assert answer["removed"] == "owner"
    assert [machine["name"] for machine in answer["machines"]] == ["bob"]
    assert answer["key_epoch"] == 1
    assert mesh.linked(bob) == []
    for member in (alice, carol):
        assert member.node.admit(bob.peer, hello_of(bob, member)) == "removed from the mesh by its founder"
        assert member.node.rooms.members.index.card(bob.peer) is None
        assert [peer["name"] for peer in ask(member, "peer.list")["items"]] == [
            other.name for other in (alice, carol) if other is not member
        ]
        assert ask(member, "peer.show", peer="bob")["state"] == "removed"
        assert any(log.event == "membership.revoked" for log in member.logs)
    assert bob.node.rooms.removals.own == "removed"
    assert "removed from the mesh" in bob.node.rooms.calls.warnings()[0]


def test_what_a_removed_member_still_says_is_not_heard(mesh: Mesh) -> None:
    alice, bob, carol = star(mesh, "alice", "bob", "carol")
    ask(alice, "peer.remove", peer="bob")
    for member in (alice, carol):
        before = len(member.sent)
        message = LedgerPull(alice.key.public, 0, 2**62)
        member.feed(e.MessageIn(bob.peer, bytes(16), message))
        member.feed(e.PeerUp(bob.peer, hello_of(bob, member), "", "fake", True))
        member.feed(e.MessageIn(bob.peer, bytes(16), message))
        mesh.settle()
        assert [peer for peer, _ in member.sent[before:] if peer == bob.peer] == []
        assert bob.peer not in member.node.ctx.links


def test_an_entry_that_a_removed_member_still_writes_is_not_taken_from_it(mesh: Mesh) -> None:
    alice = mesh.found("alice")
    bob, carol = mesh.join(alice, "bob", credits_ucr=10**8), mesh.join(alice, "carol")
    mesh.link_all()
    mesh.run(5)
    ask(alice, "peer.remove", peer="bob")
    held = alice.node.rooms.books.book.head(bob.key.public)
    assert held is not None
    bob.node.rooms.books.send(carol.key.public, 10**6, bytes(32))
    bob.perform(bob.node.end_turn(mesh.now_ms))
    _, raw = bob.node.rooms.books.shipping.recent[-1]
    push = LedgerPush(bob.key.public, [raw])
    for member in (alice, carol):
        member.feed(e.MessageIn(bob.peer, bytes(16), push))
        mesh.settle()
        assert member.node.rooms.books.book.head(bob.key.public) == held
    alice.feed(e.MessageIn(carol.peer, bytes(16), push))
    mesh.settle()
    assert alice.node.rooms.books.book.head(bob.key.public) == (held[0] + 1, parse(raw).hash), "chains stay public"


def test_the_key_after_a_removal_is_everybodys_but_the_removed_ones(mesh: Mesh) -> None:
    alice, bob, carol = star(mesh, "alice", "bob", "carol")
    old = key_of(bob)
    ask(alice, "peer.remove", peer="bob")
    mesh.run(120)
    assert key_of(alice) == key_of(carol) != old
    assert key_of(bob) == old
    assert alice.node.rooms.mesh_keys.older == carol.node.rooms.mesh_keys.older == [old]
    (body,) = carol.node.rooms.removals.ends.key_statements.values()
    assert bob.key.public not in {share.node for share in body.shares}
    assert all(bob.key.unseal(share.sealed) is None for share in body.shares)
    assert unlock(body.previous, old) is None
    kept = carol.mesh_keys[-1]
    assert (kept.epoch, kept.key, kept.older) == (1, key_of(carol), {0: old})


def test_many_removals_give_as_many_keys_and_all_old_ones_stay_readable(mesh: Mesh) -> None:
    alice, *others = star(mesh, "alice", *(f"m{number}" for number in range(4)), "last")
    last = others[-1]
    mesh.cut(alice, last)
    for other in others[:-1]:
        mesh.cut(other, last)
    keys = [key_of(alice)]
    for number in range(4):
        ask(alice, "peer.remove", peer=f"m{number}")
        keys.append(key_of(alice))
    assert len(set(keys)) == 5
    mesh.link(alice, last)
    mesh.settle()
    rooms = last.node.rooms
    assert [rooms.mesh_keys.current, *rooms.mesh_keys.older] == keys[::-1]


def test_whoever_was_away_hears_of_it_from_any_member(mesh: Mesh) -> None:
    alice, bob, carol = star(mesh, "alice", "bob", "carol")
    mesh.cut(alice, bob)
    mesh.cut(alice, carol)
    mesh.settle()
    dave = mesh.join(alice, "dave")
    mesh.link(alice, dave)
    mesh.settle()
    ask(alice, "peer.remove", peer="bob")
    assert bob in mesh.linked(carol), "nobody has told carol"
    mesh.cut(alice, dave)
    mesh.link(carol, dave)
    mesh.settle()
    assert bob not in mesh.linked(carol)
    assert key_of(carol) == key_of(alice)


def test_a_removal_outlives_restarts(mesh: Mesh) -> None:
    alice, bob, carol = star(mesh, "alice", "bob", "carol")
    ask(alice, "peer.remove", peer="bob")
    mesh.run(1)
    new = key_of(alice)
    for member in (alice, carol):
        member.restart()
        mesh.settle()
        assert member.node.admit(bob.peer, hello_of(bob, member)).startswith("removed")
        assert key_of(member) == new
    assert ask(alice, "peer.remove", peer="bob")["message"] == (
        "bob is no member any longer: removed from the mesh by its founder"
    )


def test_a_start_with_the_clock_set_back_forgets_no_removal_and_no_key(mesh: Mesh) -> None:
    alice, bob, carol = star(mesh, "alice", "bob", "carol")
    ask(alice, "peer.remove", peer="bob")
    mesh.run(1)
    for member in (alice, carol):
        member.skew_ms = -10 * 365 * 86_400_000
        member.restart()
        member.node.rooms.members.records.pop(bob.peer, None)  # nor does it hang on its ever having been met
        assert member.node.admit(bob.peer, hello_of(bob, member)).startswith("removed")
        assert member.node.rooms.removals.ends.epoch == member.node.rooms.mesh_keys.epoch == 1


@pytest.mark.parametrize("seed", range(8))
def test_a_removal_reaches_everybody_over_loss_and_restarts(seed: int) -> None:
    mesh, chance = Mesh(f"removal {seed}"), random.Random(seed)
    members = star(mesh, "alice", *(f"m{number}" for number in range(6)))
    alice, bob = members[0], members[1]

    def fate(sender: Member, receiver: Member, message: Message) -> int:
        return 0 if isinstance(message, Membership) and chance.random() < 0.6 else 1

    mesh.fate = fate
    ask(alice, "peer.remove", peer="m0")
    for _ in range(40):
        if chance.random() < 0.2:
            chance.choice([member for member in members if member is not bob]).restart()
        mesh.run(60)
    for member in members:
        if member is not bob:
            assert member.node.rooms.members.records[bob.peer].ended == "removed", f"seed {seed}: {member.name}"
            assert bob not in mesh.linked(member)
            assert key_of(member) == key_of(alice)


def test_the_founders_own_machine_is_removed_alone(mesh: Mesh) -> None:
    alice = mesh.found("alice")
    server, other = mesh.join(alice, "server", ring="own"), mesh.join(alice, "other", ring="own")
    mesh.link_all()
    mesh.settle()
    answer = ask(alice, "peer.remove", peer="server")
    assert answer["removed"] == "machine"
    assert mesh.linked(server) == []
    assert mesh.linked(other) == [alice]


def test_an_owner_is_removed_with_all_its_machines_or_one_of_them_alone(mesh: Mesh) -> None:
    alice = mesh.found("alice")
    bob = mesh.join(alice, "bob")
    _, mesh_id = read_charter(alice.local.charter)
    key = mesh._key("bob's server")
    chain = (
        bob.local.certificates[0],
        certify_node(bob.owner, mesh_id, key.public, issued_ms=mesh.now_ms, inviter=bob.peer),
    )
    local = LocalMembership(alice.local.charter, chain, False, bob.peer, "own")
    mesh._add(Member(mesh, "server", key, bob.owner, local))
    mesh.link_all()
    mesh.settle()
    answer = ask(alice, "peer.remove", peer="server", machine=True)
    assert (answer["removed"], [one["name"] for one in answer["machines"]]) == ("machine", ["server"])
    assert mesh.linked(alice) == [bob]
    assert mesh.linked(bob) == [alice], "its own owner obeys too"
    answer = ask(alice, "peer.remove", peer="bob")
    assert answer["removed"] == "owner"
    assert mesh.linked(alice) == []


def test_only_the_founder_removes_and_the_refusal_names_it(mesh: Mesh) -> None:
    _, bob, _ = star(mesh, "alice", "bob", "carol")
    error = ask(bob, "peer.remove", peer="carol")
    assert error["exit_code"] == 77
    assert "alice" in error["message"]
    alice = mesh.members[next(iter(mesh.members))]
    assert ask(alice, "peer.remove", peer="nobody")["exit_code"] == 66
    assert ask(alice, "peer.remove", peer="alice")["exit_code"] == 65


# --- those whom a removed owner invited


def test_members_invited_by_a_removed_owner_stay_and_nobody_else_it_certified(mesh: Mesh) -> None:
    alice = mesh.found("alice")
    bob = may_invite(mesh, alice, "bob")
    carol = certified_by(mesh, bob, "carol")
    mesh.link_all()
    mesh.settle()
    answer = ask(alice, "peer.remove", peer="bob")
    assert [one["name"] for one in answer["kept"]] == ["carol"]
    assert mesh.linked(carol) == [alice]
    mallory = certified_by(mesh, bob, "mallory")
    assert alice.node.admit(mallory.peer, hello_of(mallory, alice)).startswith("removed")
    answer = ask(alice, "peer.remove", peer="carol")
    assert mesh.linked(carol) == []


# --- what may not be said


def refused(member: Member, sender: Member, *statements: bytes) -> str:
    before = len(member.logs)
    member.feed(e.MessageIn(sender.peer, bytes(16), Membership(list(statements))))
    member.mesh.settle()
    said = [log.fields["reason"] for log in member.logs[before:] if log.event == "message.refused"]
    return said[0] if said else ""


def test_revocations_by_keys_that_do_not_stand_above_are_refused(mesh: Mesh) -> None:
    alice, bob, carol = star(mesh, "alice", "bob", "carol")
    _, mesh_id = read_charter(alice.local.charter)
    node_chain, owner_chain = tuple(carol.local.certificates), tuple(carol.local.certificates[:-1])

    def by(key: KeyPair, subject: str, ended: bytes, chain: tuple[bytes, ...], mesh_id: bytes = mesh_id) -> bytes:
        body = Revocation(mesh_id, key.public, subject, ended, mesh.now_ms, "removed", (), chain)
        return sign_revocation(body, key)

    stands = "does not stand above"
    assert stands in refused(alice, bob, by(bob.owner, "owner", carol.owner.public, owner_chain))
    assert stands in refused(alice, bob, by(bob.key, "node", carol.key.public, node_chain))
    assert "lacks the certificates" in refused(alice, bob, by(bob.owner, "owner", carol.owner.public, ()))
    assert "founder" in refused(alice, bob, by(bob.owner, "owner", alice.owner.public, ()))
    assert "another mesh" in refused(alice, bob, by(alice.owner, "owner", carol.owner.public, (), bytes(32)))
    true = by(alice.owner, "owner", carol.owner.public, ())
    for place in range(0, len(true), 7):
        bent = bytearray(true)
        bent[place] ^= 1
        assert refused(alice, bob, bytes(bent)), place
    assert carol in mesh.linked(alice)
    late = Revocation(
        mesh_id, alice.owner.public, "owner", carol.owner.public, mesh.now_ms + 2 * limits.CLOCK_AHEAD_MS, "removed"
    )
    assert "future" in refused(bob, alice, sign_revocation(late, alice.owner))
    assert refused(bob, alice, true) == ""
    assert mesh.linked(carol) == []


def test_only_the_founder_makes_mesh_keys(mesh: Mesh) -> None:
    alice, bob, carol = star(mesh, "alice", "bob", "carol")
    _, mesh_id = read_charter(alice.local.charter)
    key = b"k" * 32
    sealed = KeyShare(carol.key.public, seal_to(carol.key.public, key, bob.entropy))
    body = MeshKey(mesh_id, 1, mesh.now_ms, lock(key_of(bob), key, bob.entropy), (sealed,))
    assert "not signed by the founder" in refused(carol, bob, sign_mesh_key(body, bob.owner))
    assert key_of(carol) != key
    assert refused(carol, bob, sign_mesh_key(body, alice.owner)) == ""
    assert key_of(carol) == key
    assert any(log.event == "mesh_key.rotated" for log in carol.logs)


def test_a_sealed_box_is_libsodiums(mesh: Mesh) -> None:
    from nacl.public import SealedBox
    from nacl.signing import SigningKey

    seed = hashlib.sha256(b"seed").digest()
    sealed = seal_to(KeyPair.from_seed(seed).public, b"s" * 32, lambda count: b"e" * count)
    assert SealedBox(SigningKey(seed).to_curve25519_private_key()).decrypt(sealed) == b"s" * 32
    assert KeyPair.from_seed(seed).unseal(sealed) == b"s" * 32
    assert KeyPair.from_seed(bytes(32)).unseal(sealed) is None
    assert KeyPair.from_seed(seed).unseal(sealed[:-1]) is None
    assert KeyPair.from_seed(seed).unseal(b"") is None


def test_questions_are_answered_at_most_once_in_ten_seconds(mesh: Mesh) -> None:
    alice, _, carol = star(mesh, "alice", "bob", "carol")
    ask(alice, "peer.remove", peer="bob")
    mesh.run(limits.MEMBERSHIP_ANSWER_MS / 1000 + 1)
    before = len(alice.sent)
    for _ in range(100):
        alice.feed(e.MessageIn(carol.peer, bytes(16), Membership([], [1] * limits.MEMBERSHIP_BUCKETS)))
    alice.feed(e.MessageIn(carol.peer, bytes(16), Membership([], [1, 2, 3])))
    mesh.settle()
    assert alice.sent[before:].count((carol.peer, "Membership")) == 2, "an answer, and a question for what she lacks"


# --- what the ledger and open work see of it


def test_work_for_a_removed_member_stops_and_its_money_comes_back_at_expiry(mesh: Mesh) -> None:
    alice = mesh.found("alice")
    bob, carol = mesh.join(alice, "bob", credits_ucr=10**8), mesh.join(alice, "carol")
    mesh.link_all()
    mesh.settle()
    carol.runner = lambda member, run: None
    bob.config = bob.config
    call = bob.call("task.submit", spec={"type": "compute", "op": "sha256", "peer": [carol.peer], "description": "x"})
    mesh.run(5)
    assert "task_id" in bob.replies[call], bob.replies[call]
    assert len(carol.runs) == 1
    ask(alice, "peer.remove", peer="bob")
    assert len(carol.stops) == 1
    mesh.run(2 * 3_600)
    assert bob.node.rooms.books.book.open_lines(bob.key.public) == []


def test_a_ban_lasts_over_a_restart_and_so_do_names(mesh: Mesh) -> None:
    alice, bob = star(mesh, "alice", "bob")
    twin = mesh.join(alice, "twin")
    twin.config = msgspec.structs.replace(twin.config) if isinstance(twin.config, msgspec.Struct) else twin.config
    twin.node.rooms.members.name = "bob"
    mesh.link(alice, twin)
    mesh.settle()
    assert alice.node.rooms.members.records[twin.peer].shown == "bob~2"
    ask(alice, "peer.ban", peer="bob")
    assert any(log.level == "security" and log.event == "peer.banned" for log in alice.logs)
    alice.restart()
    mesh.relink.clear()
    mesh.settle()
    assert ask(alice, "peer.show", peer=bob.peer)["state"] == "banned"
    assert alice.node.rooms.members.records[twin.peer].shown == "bob~2"
    assert alice.node.admit(bob.peer, hello_of(bob, alice)) == "banned"
    ask(alice, "peer.unban", peer=bob.peer)
    alice.restart()
    assert alice.node.admit(bob.peer, hello_of(bob, alice)) == ""
