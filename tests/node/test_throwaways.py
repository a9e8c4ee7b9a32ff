"""Throw-away members: what an ephemeral invite gives, its lease, leaving with the change, and members that invite."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec
import pytest

from clawnet import limits
from clawnet.identity import invite as tokens
from clawnet.identity.certificates import certify_node, read_charter
from clawnet.identity.keys import KeyPair
from clawnet.identity.membership import LocalMembership
from clawnet.mesh.roster import join_bytes
from clawnet.wire import events as e
from clawnet.wire.messages import JoinAnswer, JoinAsk
from tests.node.meshkit import Member, Mesh
from tests.node.test_removals import ask, hello_of, may_invite

CREDIT = 1_000_000


@pytest.fixture
def mesh() -> Mesh:
    return Mesh("throwaways")


def founder_of(mesh: Mesh, **keys: str) -> Member:
    founder = mesh.found("alice", **keys)
    mesh.settle()
    return founder


def redeem(inviter: Member, token: str, who: str, key: KeyPair | None = None, **changes: Any) -> JoinAnswer:
    """What the inviter answers to whoever redeems a token, as the join stream would bring it."""
    mesh = inviter.mesh
    key, owner = key or mesh._key(who), mesh._key(who + " owner")
    invite = tokens.decode(token)
    body = join_bytes(invite.mesh, invite.secret, key.public, owner.public, who, mesh.now_ms)
    asked = JoinAsk(
        invite.mesh, invite.secret, key.public, owner.public, who, mesh.now_ms, key.sign(body), owner.sign(body)
    )
    answers: list[JoinAnswer] = []
    inviter._do_joinreply = lambda effect: answers.append(effect.answer)  # type: ignore[attr-defined]
    inviter.feed(e.JoinAsked(1, key.peer_id, "/ip4/127.0.0.1/tcp/1", msgspec.structs.replace(asked, **changes)))
    mesh.settle()
    (answer,) = answers
    return answer


def joined(inviter: Member, token: str, name: str) -> Member:
    """A member made of the inviter's answer, connected to the inviter."""
    mesh, answer = inviter.mesh, redeem(inviter, token, name)
    assert not answer.refusal, answer.refusal
    key, owner = mesh._key(name), mesh._key(name + " owner")
    _, mesh_id = read_charter(answer.charter)
    chain = [*answer.certificates]
    if answer.ring == "member":
        chain.append(certify_node(owner, mesh_id, key.public, issued_ms=mesh.now_ms, inviter=answer.inviter))
    local = LocalMembership(answer.charter, tuple(chain), False, answer.inviter, answer.ring, lease_s=answer.lease_s)
    local.verified(key.public)
    member = mesh._add(Member(mesh, name, key, owner, local))
    mesh.link(inviter, member)
    mesh.settle()
    return member


def available(member: Member) -> int:
    return member.node.rooms.books.available()


def ephemeral(inviter: Member, **params: Any) -> str:
    answer = ask(inviter, "peer.invite", ephemeral=True, **params)
    assert "token" in answer, answer
    return str(answer["token"])


# --- the invite


def test_an_ephemeral_invite_pays_each_joiner_and_never_grants(mesh: Mesh) -> None:
    alice = founder_of(mesh)
    before = available(alice)
    token = ephemeral(alice, uses=2, credits="5")
    answer = redeem(alice, token, "other")
    assert (answer.lease_s, answer.mesh_key) == (7_200, b""), "no key of the mesh goes to a throw-away member"
    runner = joined(alice, token, "runner")
    mesh.run(5)
    assert available(runner) == 5 * CREDIT
    assert available(alice) == before - 10 * CREDIT
    assert redeem(alice, token, "third").refusal == "the invite has been used"


def test_an_ephemeral_invite_without_credits_gives_none(mesh: Mesh) -> None:
    alice = founder_of(mesh)
    runner = joined(alice, ephemeral(alice), "runner")
    mesh.run(5)
    assert available(runner) == 0


def test_what_an_ephemeral_invite_cannot_be(mesh: Mesh) -> None:
    alice = founder_of(mesh)
    assert ask(alice, "peer.invite", ephemeral=True, ring="own")["exit_code"] == 65
    assert ask(alice, "peer.invite", ephemeral=True, credits="99999", uses=2)["exit_code"] == 79
    assert ask(alice, "peer.invite", ephemeral=True, uses=limits.THROWAWAYS_MAX + 1)["exit_code"] == 77


def test_a_runner_has_no_say_over_who_else_comes_in(mesh: Mesh) -> None:
    alice = founder_of(mesh, **{"mesh.members_may_invite": "true"})
    runner = joined(alice, ephemeral(alice), "runner")
    assert ask(runner, "peer.invite")["exit_code"] == 77


# --- the lease


def test_a_runner_that_is_not_seen_for_two_hours_is_out_everywhere(mesh: Mesh) -> None:
    alice = founder_of(mesh)
    bob = mesh.join(alice, "bob")
    mesh.link(alice, bob)
    runner = joined(alice, ephemeral(alice, credits="5"), "runner")
    mesh.link(bob, runner)
    mesh.settle()
    mesh.run(3 * 3_600)
    assert runner in mesh.linked(alice), "seen all the time"
    mesh.cut(alice, runner)
    mesh.cut(bob, runner)
    mesh.run(3_600)
    assert alice.node.admit(runner.peer, hello_of(runner, alice)) == ""
    mesh.run(3_700)
    for member in (alice, bob):
        assert "throw-away" in member.node.admit(runner.peer, hello_of(runner, member))
        assert runner.peer not in member.node.rooms.members.records, "its name is free again"
    assert alice.store.tables["leases"] == {}
    assert alice.node.rooms.removals.ends.epoch == 0, "it never had the mesh's key, so there is none to change"


def test_a_lease_goes_on_after_the_inviter_was_off(mesh: Mesh) -> None:
    alice = founder_of(mesh)
    runner = joined(alice, ephemeral(alice), "runner")
    mesh.cut(alice, runner)
    mesh.settle()
    mesh.now_ms += 5 * 3_600_000
    alice.restart()
    mesh.run(3_600)
    assert alice.node.admit(runner.peer, hello_of(runner, alice)) == "", "it could not be seen while alice was off"
    mesh.run(3_700)
    assert "throw-away" in alice.node.admit(runner.peer, hello_of(runner, alice))


def test_a_runner_that_joined_and_was_never_seen_again(mesh: Mesh) -> None:
    alice = founder_of(mesh)
    token = ephemeral(alice, uses=2, expires_s=86_400)
    assert not redeem(alice, token, "ghost").refusal
    mesh.run(7_300)
    assert redeem(alice, token, "ghost").refusal.startswith("the membership of this key is over")
    assert not redeem(alice, token, "next").refusal


# --- leaving


def test_leaving_returns_the_rest_and_ends_the_membership(mesh: Mesh) -> None:
    alice = founder_of(mesh)
    bob = mesh.join(alice, "bob")
    mesh.link(alice, bob)
    runner = joined(alice, ephemeral(alice, credits="5"), "runner")
    mesh.link(bob, runner)
    mesh.run(5)
    before = available(alice)
    answer = ask(runner, "node.leave")
    mesh.run(limits.DRAIN_SETTLE_MS / 1000 + 1)
    assert answer == {
        "inviter": answer["inviter"],
        "returned": "5",
        "accepted": True,
        "kept": "0",
        "bound": "0",
        "told": 2,
    }
    assert available(alice) == before + 5 * CREDIT
    assert mesh.linked(runner) == []
    for member in (alice, bob):
        assert member.node.admit(runner.peer, hello_of(runner, member)) == "it left the mesh"
    assert alice.store.tables["leases"] == {}
    assert runner.drained == 1


def test_leaving_while_the_inviter_is_away_ends_in_time_and_says_what_was_kept(mesh: Mesh) -> None:
    alice = founder_of(mesh)
    runner = joined(alice, ephemeral(alice, credits="5"), "runner")
    mesh.run(5)
    mesh.cut(alice, runner)
    mesh.settle()
    call = runner.call("node.leave")
    mesh.run(60)
    answer = runner.replies[call]
    assert (answer["returned"], answer["accepted"], answer["kept"], answer["told"]) == ("0", False, "5", 0)
    assert runner.drained == 1


def test_only_a_throw_away_member_leaves(mesh: Mesh) -> None:
    alice = founder_of(mesh)
    bob = mesh.join(alice, "bob")
    mesh.link(alice, bob)
    for member in (alice, bob):
        error = ask(member, "node.leave")
        assert error["exit_code"] == 77
        assert "no throw-away member" in error["message"]
        assert not member.node.ctx.draining


def test_who_left_comes_back_by_no_token(mesh: Mesh) -> None:
    alice = founder_of(mesh)
    token = ephemeral(alice, uses=3)
    runner = joined(alice, token, "runner")
    ask(runner, "node.leave")
    mesh.run(10)
    assert redeem(alice, token, "runner").refusal.startswith("the membership of this key is over")
    other = KeyPair.from_seed(hashlib.sha256(b"another key of the same owner").digest())
    assert redeem(alice, token, "runner", other).refusal.startswith("the membership of this key is over")
    assert not redeem(alice, token, "another runner").refusal, "the token serves the next job"


# --- members that invite


def test_a_member_that_may_invite_pays_its_guest_and_passes_nothing_on(mesh: Mesh) -> None:
    alice = founder_of(mesh)
    bob = may_invite(mesh, alice, "bob")
    alice.node.rooms.books.grant(bob.key.public, 50 * CREDIT, bytes(32)[:16])
    alice.perform(alice.node.end_turn(mesh.now_ms))
    mesh.link(alice, bob)
    mesh.run(5)
    token = ask(bob, "peer.invite", credits="20")["token"]
    carol = joined(bob, token, "carol")
    mesh.link(alice, carol)
    mesh.run(5)
    assert available(carol) == 20 * CREDIT
    assert available(bob) == 30 * CREDIT
    assert alice.node.rooms.members.records[carol.peer].inviter == bob.peer
    error = ask(carol, "peer.invite")
    assert error["exit_code"] == 77
    ask(alice, "peer.remove", peer="bob")
    assert redeem(bob, ask(bob, "peer.invite").get("token", token), "dave").refusal


def test_the_uses_left_of_a_token_end_with_the_removal_of_who_used_it(mesh: Mesh) -> None:
    alice = founder_of(mesh)
    token = ask(alice, "peer.invite", uses=5)["token"]
    joined(alice, token, "bob")
    ask(alice, "peer.remove", peer=mesh._key("bob").peer_id)
    assert redeem(alice, token, "fresh keys").refusal == "the invite has been used"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"secret": bytes(16)}, "no such invite"),
        ({"mesh": bytes(32)}, "no such invite"),
        ({"name": "somebody else"}, "does not prove"),
        ({"owner_key": bytes(32)}, "does not prove"),
        ({"node_proof": bytes(64)}, "does not prove"),
    ],
)
def test_what_is_redeemed_falsely_is_refused_with_the_reason(mesh: Mesh, change: dict[str, Any], reason: str) -> None:
    alice = founder_of(mesh)
    token = ask(alice, "peer.invite")["token"]
    assert reason in redeem(alice, token, "bob", **change).refusal
    assert any(log.level == "security" and log.event == "join.refused" for log in alice.logs)
    assert not redeem(alice, token, "bob").refusal, "a false try uses nothing up"


def test_an_expired_token_is_refused(mesh: Mesh) -> None:
    alice = founder_of(mesh)
    token = ask(alice, "peer.invite", expires_s=60)["token"]
    mesh.run(61)
    assert redeem(alice, token, "bob").refusal == "the invite has expired"
