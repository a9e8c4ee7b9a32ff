"""A node changes its key: account, debts, tasks and names stay; peers follow, sooner or later; the old key is out."""

from __future__ import annotations

import msgspec
import pytest

from clawnet import limits
from clawnet.identity.keys import KeyPair, peer_id_of
from clawnet.identity.revocations import node_in
from clawnet.ledger.entries import Rotate, build, parse, possession_message
from clawnet.ledger.outcomes import Rejected
from clawnet.wire import events as e
from clawnet.wire.messages import Hello, PeerInfo
from tests.node.meshkit import Entropy, Member, Mesh, echo
from tests.node.trades import CREDIT, compute, paid, pair, shell, three


def rotated(member: Member) -> dict[str, object]:
    """The answer of a change of key that worked, with everything settled after it."""
    call = member.rotate()
    member.mesh.run(2)
    answer = member.replies[call]
    assert "peer_id" in answer, answer
    return answer


def balance(member: Member) -> int:
    return member.node.rooms.books.available()


def seen_by(member: Member, name: str) -> dict[str, object]:
    """What `peer show` tells of a peer."""
    call = member.call("peer.show", peer=name)
    member.mesh.settle()
    view: dict[str, object] = member.replies[call]
    return view


def test_account_balance_name_reputation_and_ring_stay() -> None:
    mesh = Mesh()
    alice, bob = pair(mesh)
    call = compute(alice)
    mesh.run(30)
    assert alice.task(call)["state"] == "settled"
    before, account, old = seen_by(alice, "bob"), bob.account, bob.peer
    held = balance(bob)
    answer = rotated(bob)
    assert (answer["previous"], answer["peer_id"], answer["account"]) == (old, bob.peer, account.hex())
    assert bob.peer != old
    after = seen_by(alice, "bob")
    assert after["peer_id"] == bob.peer and after["state"] == "connected"
    for name in ("name", "ring", "account", "owner", "notes"):
        assert after[name] == before[name], name
    assert balance(bob) == held
    assert alice.node.rooms.books.book.view(account).key == bob.key.public
    assert len(alice.node.rooms.members.records) == 1
    card = alice.node.rooms.members.get(peer_id_of(account)).card
    assert bob.peer.encode() in card, "its card came under the new key, and was believed"
    call = compute(alice)
    mesh.run(30)
    assert alice.task(call)["executor"]["peer_id"] == bob.peer
    assert balance(bob) > held
    mesh.check()


def test_open_tasks_of_both_sides_go_on_through_it() -> None:
    mesh = Mesh()
    alice, bob, carol = three(mesh)
    runs = {}
    for worker in (bob, carol):
        worker.runner = lambda member, run: runs.setdefault(member.name, run) and None
    running = shell(alice, "sleep", peer=["bob"])
    own = shell(bob, "sleep", peer=["carol"])
    mesh.run(5)
    assert set(runs) == {"bob", "carol"}
    # A third is delivered and waits for its key: alice's release does not reach bob before he changes his key.
    rotated(bob)
    mesh.run(5)
    for worker in (bob, carol):
        worker.feed(echo(worker, runs[worker.name]))
    mesh.run(30)
    for requester, call in ((alice, running), (bob, own)):
        task = requester.task(call)
        assert task["state"] == "settled", task
        assert len(task["attempts"]) == 1
    assert alice.task(running)["executor"]["peer_id"] == bob.peer
    assert paid(mesh) and all(count == 1 for count in paid(mesh).values())
    mesh.check()


def test_a_result_under_the_old_key_is_paid_after_the_change() -> None:
    mesh = Mesh()
    alice, bob = pair(mesh)
    mesh.fate = lambda sender, receiver, message: 0 if type(message).__name__ == "Result" else 1
    call = compute(alice)
    mesh.run(3)
    assert alice.task(call)["state"] == "executing"
    rotated(bob)
    mesh.fate = lambda sender, receiver, message: 1
    mesh.run(60)
    assert alice.task(call)["state"] == "settled"
    mesh.check()


def test_a_release_that_waits_for_its_key_is_claimed_under_the_new_one() -> None:
    mesh = Mesh()
    alice, bob = pair(mesh)
    mesh.fate = lambda sender, receiver, message: 0 if type(message).__name__ == "Settlement" else 1
    call = compute(alice)
    mesh.run(3)
    rotated(bob)
    mesh.fate = lambda sender, receiver, message: 1
    mesh.run(60)
    assert alice.task(call)["state"] == "settled"
    mesh.check()


def test_a_waiver_under_the_old_key_frees_the_line_after_the_change() -> None:
    mesh = Mesh()
    alice, bob = pair(mesh)
    mesh.fate = lambda sender, receiver, message: 0 if type(message).__name__ in ("Reject", "Waiver") else 1
    bob.runner = lambda member, run: msgspec.structs.replace(
        echo(member, run), ended="wall_limit", reason="too long", exit_code=None, inline=b"", blob=b""
    )
    held = balance(alice)
    call = compute(alice, retries=0)
    mesh.run(3)
    rotated(bob)
    mesh.fate = lambda sender, receiver, message: 1
    mesh.run(60)
    assert alice.task(call)["final"]
    assert balance(alice) == held, "the waiver was good, so the line came back before its expiry"
    mesh.check()


def test_a_peer_that_was_away_follows_when_it_is_back() -> None:
    mesh = Mesh()
    alice, bob, carol = three(mesh)
    mesh.cut(alice, bob)
    mesh.cut(alice, carol)
    mesh.run(1)
    old = bob.peer
    rotated(bob)
    rotated(bob)
    mesh.link(alice, bob)
    mesh.run(5)
    assert seen_by(alice, "bob")["peer_id"] == bob.peer
    assert seen_by(alice, old)["peer_id"] == bob.peer, "an id that people wrote down still names it"
    assert alice.node.rooms.books.book.view(bob.account).key == bob.key.public
    assert alice.node.rooms.members.get(peer_id_of(bob.account)).shown == "bob"
    mesh.check()


def test_who_dials_an_old_id_goes_on_with_its_successor_alone() -> None:
    mesh = Mesh()
    alice, bob, carol = three(mesh)
    mesh.cut(alice, bob)
    old = bob.peer
    rotated(bob)
    hello = greeting(bob, alice)
    assert alice.node.admit(bob.peer, hello, old) == ""
    assert old in alice.node.admit(carol.peer, greeting(carol, alice), old)


def greeting(speaker: Member, hearer: Member, **changed: object) -> Hello:
    """What a member says first on a control stream."""
    mesh, name, certificates, rotations = speaker.node.hello_facts()
    hello = Hello(
        [1, 0], "test", speaker.peer, hearer.peer, mesh, bytes(32), speaker.now_ms, name, certificates, rotations
    )
    return msgspec.structs.replace(hello, **changed)


def test_the_news_travels_to_who_is_not_connected_to_it() -> None:
    mesh = Mesh()
    alice, bob, _ = three(mesh)
    mesh.cut(alice, bob)
    mesh.run(1)
    mesh.fate = lambda sender, receiver, message: 0 if type(message).__name__ == "PeerInfo" else 1
    rotated(bob)
    mesh.run(5)
    assert bob not in mesh.linked(alice)
    assert seen_by(alice, "bob")["peer_id"] == bob.peer, "carol passed it on"


def test_the_old_key_is_refused_and_convicts_nobody() -> None:
    mesh = Mesh()
    alice, bob, carol = three(mesh)
    copy = Member(mesh, bob.name, bob.key, bob.owner, bob.local)
    copy.store = bob.store.twin()
    copy.boot()
    mesh.settle()
    rotated(bob)
    mesh.run(5)
    refusal = alice.node.admit(copy.peer, greeting(copy, alice))
    assert "given up" in refusal and bob.peer in refusal
    # What the copy writes at the next place of the chain would be a fork; nobody hears it from a refused peer.
    # Above the rotation its signature is nobody's.
    entry = parse(copy.node.rooms.books.purse.send(alice.account, CREDIT, bytes(32), mesh.now_ms).raw)
    head = alice.node.rooms.books.book.head(bob.account)
    later = build(entry.mesh, bob.account, head[0] + 1, head[1], mesh.now_ms, entry.body, copy.key.sign)
    assert isinstance(alice.node.rooms.books.book.apply(later.raw, mesh.now_ms), Rejected)
    for member in (alice, carol, bob):
        assert member.node.rooms.books.book.proof(bob.account) is None
    # Cards under the old key are not believed, by others or by the node itself.
    card = copy.node.rooms.cards
    card.refresh()
    said = PeerInfo(card._statement, card._signature, 7)
    for hearer in (alice, bob):
        hearer.feed(e.MessageIn(carol.peer, bytes(16), said))
    mesh.run(2)
    assert seen_by(alice, "bob")["peer_id"] == bob.peer
    assert not bob.node.rooms.twins.reason()
    mesh.check()


@pytest.mark.parametrize("after_commit", [False, True])
@pytest.mark.parametrize("turn", range(1, 4))
def test_a_crash_at_any_point_leaves_the_old_key_or_the_new_one(turn: int, after_commit: bool) -> None:
    mesh = Mesh()
    alice, bob = pair(mesh)
    old, account = bob.peer, bob.account
    bob.crash_at, bob.crash_after_commit = bob.turns + turn, after_commit
    bob.rotate()
    mesh.run(20)
    assert bob.turns > bob.crash_at
    assert bob.account == account
    written = bob.node.rooms.books.book.view(account).key
    assert written == bob.key.public, "the chain and the key file agree"
    if bob.peer == old:
        assert turn == 1 and not after_commit
    assert seen_by(alice, "bob")["peer_id"] == bob.peer
    call = compute(alice)
    mesh.run(30)
    assert alice.task(call)["state"] == "settled"
    mesh.check()


def test_invites_given_before_are_void_and_the_answer_says_how_many() -> None:
    mesh = Mesh()
    alice, _ = pair(mesh)
    for _ in range(2):
        alice.call("peer.invite", ring="member")
    mesh.run(1)
    assert rotated(alice)["invites_void"] == 2
    assert list(alice.store.load_all("invites")) == []
    assert alice.node.hello_facts()[3], "and the founder's own certificate is of its new key"
    assert node_in(alice.node.hello_facts()[2]).node == alice.key.public
    # It still issues, under the account that the charter names.
    mesh.join(alice, "dave", credits_ucr=5 * CREDIT)
    mesh.link_all()
    mesh.run(5)
    mesh.check()


def test_a_restart_knows_both_sides_changes() -> None:
    mesh = Mesh()
    alice, bob = pair(mesh)
    old = bob.peer
    rotated(bob)
    rotated(alice)
    for member in (alice, bob):
        member.restart()
    mesh.run(15)
    assert seen_by(alice, old)["peer_id"] == bob.peer
    assert seen_by(bob, "alice")["peer_id"] == alice.peer
    call = compute(alice)
    mesh.run(30)
    assert alice.task(call)["state"] == "settled"
    mesh.check()


def test_a_chain_that_may_not_be_written_is_not_handed_over() -> None:
    mesh = Mesh()
    alice, bob, carol = three(mesh)
    mesh.cut(alice, bob)
    mesh.cut(bob, carol)
    mesh.run(1)
    bob.node.rooms.books.chains.restore.begin("tried here")
    call = bob.rotate()
    mesh.run(15)
    assert bob.replies[call]["code"] == "not_permitted" and "read-only" in bob.replies[call]["message"]
    assert not bob.node.hello_facts()[3]


def test_a_key_changes_so_often_and_no_more() -> None:
    mesh = Mesh()
    alice, bob = pair(mesh)
    for _ in range(limits.ROTATIONS_MAX):
        rotated(bob)
    call = bob.rotate()
    mesh.run(2)
    assert bob.replies[call]["code"] == "not_permitted"
    assert seen_by(alice, "bob")["peer_id"] == bob.peer
    mesh.check()


def test_a_ban_holds_for_every_key_that_follows() -> None:
    mesh = Mesh()
    alice, bob = pair(mesh)
    alice.call("peer.ban", peer="bob")
    mesh.run(1)
    rotated(bob)
    assert alice.node.admit(bob.peer, greeting(bob, alice)) == "banned"


def test_two_rows_of_keys_for_one_account_are_not_both_believed() -> None:
    mesh = Mesh()
    alice, bob = pair(mesh)
    thief = Member(mesh, bob.name, bob.key, bob.owner, bob.local)
    thief.entropy = Entropy("thief")
    thief.store = bob.store.twin()
    thief.boot()
    rotated(bob)
    thief.rotate()
    for seconds in (0, 15):  # nobody answers for its keepers, so it goes on without them
        mesh.run(seconds)
        while thief.turn():
            pass
    assert thief.node.hello_facts()[3], "it has changed its key, on a branch of its own"
    refusal = alice.node.admit(thief.peer, greeting(thief, alice))
    assert "another change of key" in refusal
    assert seen_by(alice, "bob")["peer_id"] == bob.peer


def grafted(mesh_id: bytes, fresh: KeyPair, stolen: KeyPair, now_ms: int) -> bytes:
    """A rotate entry by which a chain that nobody knows goes over to a key that was another node's."""
    proof = stolen.sign(possession_message(fresh.public, 1, bytes(32)))
    return build(mesh_id, fresh.public, 1, bytes(32), now_ms, Rotate(stolen.public, proof), fresh.sign).raw


@pytest.mark.parametrize("given_up", [True, False])
def test_no_fresh_account_comes_in_by_a_key_that_is_or_was_anothers(given_up: bool) -> None:
    mesh = Mesh()
    alice, bob, carol = three(mesh)
    stolen, old = bob.key, bob.peer
    mesh_id, hello = bob.node.hello_facts()[0], greeting(bob, alice)
    if given_up:
        rotated(bob)
    else:
        alice.call("peer.ban", peer="bob")
        mesh.run(1)
    fresh = KeyPair.generate(Entropy("fresh"))
    row = [grafted(mesh_id, fresh, stolen, mesh.now_ms)]
    assert "another node's" in alice.node.admit(old, msgspec.structs.replace(hello, rotations=row))
    assert peer_id_of(fresh.public) not in alice.node.rooms.members.records
    # Nor does a member that holds the key go over to it: what is sent to bob would go to that member.
    row = [grafted(mesh_id, carol.key, stolen, mesh.now_ms)]
    successions = alice.node.rooms.successions
    assert not successions.learn(successions.keys_shown(old, row), row)
    assert alice.node.ctx.ids.outer(peer_id_of(bob.account)) == bob.peer
    # The node whose key it was does not take itself for another either.
    assert "another node's" in bob.node.rooms.successions.refusal(successions.keys_shown(old, row), "")


def test_whoever_was_never_met_is_remembered_by_its_keys_within_bounds() -> None:
    mesh = Mesh()
    alice, bob = pair(mesh)
    rotated(bob)
    successions, entropy = alice.node.rooms.successions, Entropy("many")
    for _ in range(limits.REACH_PEERS_MAX + 8):
        successions.learn([KeyPair.generate(entropy).public, KeyPair.generate(entropy).public], [])
    assert len(alice.node.ctx.ids._first) == 2 * (limits.REACH_PEERS_MAX + 1)
    assert alice.node.ctx.ids.outer(peer_id_of(bob.account)) == bob.peer, "who was met stays"
