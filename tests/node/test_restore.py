"""Tabless that are behind (LEDGER.md section 9): every moment of a task's life put back, after the task is over."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import pytest

from clawnet import limits
from clawnet.ledger.entries import Genesis, build
from clawnet.market.records import FINAL_STATES
from clawnet.node.restore import same_host
from clawnet.storage.memory import MemoryStore, Tables
from clawnet.wire import events as e
from tests.node.meshkit import Member, Mesh, echo
from tests.node.trades import compute, paid, shell, tasks, three


def recorded(member: Member) -> list[Tables]:
    """From now on the member's disk as it was after every commit."""
    disks: list[Tables] = [copy(member)]
    commit = member.store.commit

    def record(rows: Sequence[e.Put | e.Delete], durable: bool = False) -> None:
        commit(rows, durable)
        if rows:
            disks.append(copy(member))

    member.store.commit = record  # type: ignore[method-assign]
    return disks


def copy(member: Member) -> Tables:
    return member.store.twin().tables


def put_back(mesh: Mesh, member: Member, disk: Tables) -> None:
    """The member dies and starts on this disk, connected to all."""
    others = [other for other in mesh.members.values() if other is not member]
    for other in others:
        if frozenset((member.peer, other.peer)) in mesh.links:
            mesh.cut(member, other)
    member.store.tables = disk
    member.boot()
    for other in others:
        mesh.link(member, other)
    mesh.run(120)


def whole(mesh: Mesh, member: Member) -> None:
    """Nobody forked, nobody was paid twice, nothing was run twice, and the member writes and works again."""
    assert member.node.rooms.books.purse.read_only_reason == ""
    for other in mesh.members.values():
        assert other.node.rooms.books.book.proof(member.key.public) is None
        assert other.node.rooms.books.book.head(member.key.public) == member.node.rooms.books.book.head(
            member.key.public
        )
    assert all(count == 1 for count in paid(mesh).values())
    for task in tasks(member):
        assert task.state in FINAL_STATES, task.state
    call = compute(member)
    mesh.run(30)
    assert member.task(call)["state"] == "settled"
    mesh.check()


@pytest.mark.parametrize("moment", range(12))
def test_a_requester_on_an_old_disk_neither_forks_nor_buys_again(moment: int) -> None:
    mesh = Mesh()
    alice, bob, carol = three(mesh)
    disks = recorded(alice)
    shell(alice, "echo", retries=0)
    mesh.run(30)
    assert len(bob.runs) + len(carol.runs) == 1
    put_back(mesh, alice, disks[min(moment, len(disks) - 1)])
    # A task that had not reached the chain when the disk was copied may have been unknown to it; it ran once at most.
    assert len(bob.runs) + len(carol.runs) == 1, "it ran a second time"
    whole(mesh, alice)


@pytest.mark.parametrize("moment", range(10))
def test_an_executor_on_an_old_disk_neither_forks_nor_claims_again(moment: int) -> None:
    mesh = Mesh()
    alice, bob, _ = three(mesh)
    disks = recorded(bob)
    compute(alice, peer=["bob"])
    mesh.run(30)
    balance = bob.node.rooms.books.purse.available_ucr
    put_back(mesh, bob, disks[min(moment, len(disks) - 1)])
    assert bob.node.rooms.books.purse.available_ucr == balance
    assert not [job for job in bob.node.rooms.jobs.jobs.values() if job.state != "done"], "nothing is waited for"
    whole(mesh, bob)


def test_the_missing_answer_can_be_done_without_a_day_later() -> None:
    mesh = Mesh()
    alice, bob, carol = three(mesh)
    disk = copy(alice)
    alice.node.rooms.books.send(bob.key.public, 1_000_000, bytes(32))
    alice.perform(alice.node.end_turn(mesh.now_ms))
    mesh.run(5)
    for other in (bob, carol):
        mesh.cut(alice, other)
    alice.store.tables = disk
    alice.boot()
    mesh.link(alice, bob)
    mesh.run(15)
    view = alice.node.rooms.books.chains.restore.view()
    assert view is not None
    assert [peer["name"] for peer in view["unanswered"]] == ["carol"]
    early = alice.call("wallet.resume")
    mesh.settle()
    assert alice.replies[early]["exit_code"] == 77
    mesh.now_ms += limits.RESTORE_OVERRIDE_MS
    late = alice.call("wallet.resume")
    mesh.settle()
    assert alice.replies[late]["restore"] is None
    assert not alice.store.tables["awaited"]
    again = alice.call("wallet.resume")
    mesh.settle()
    assert "not read-only" in alice.replies[again]["message"]


def test_an_imported_identity_of_nobody_begins_anew_by_its_owners_word() -> None:
    mesh = Mesh()
    alice = mesh.found("alice")
    alice.local = msgspec.structs.replace(alice.local, imported=True)
    alice.store.tables = MemoryStore().tables
    alice.boot()
    mesh.run(15)
    view = alice.node.rooms.books.chains.restore.view()
    assert view is not None
    assert view["chain_unseen"]
    mesh.now_ms += limits.RESTORE_OVERRIDE_MS
    alice.call("wallet.resume")
    mesh.settle()
    assert alice.node.rooms.books.purse.available_ucr == 1_000_000_000
    mesh.check()


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("m 1", "m 1", True),
        ("m 1", "m 2", False),
        ("m 1", "n 1", False),
        ("m 1", "- 1", True),
        ("- 1", "m 2", False),
        ("m -", "m 2", True),
    ],
)
def test_a_stamp_tells_places_apart_by_what_both_know(one: str, other: str, same: bool) -> None:
    assert same_host(one, other) is same


def test_who_is_refused_is_not_waited_for() -> None:
    """It could not answer: a member that lies, and is banned for it, would keep the wallet for a day."""
    mesh = Mesh()
    alice, _, carol = three(mesh)
    for when in ("before", "meanwhile"):
        if when == "before":
            alice.feed(e.RpcCall(mesh.next_call(), "peer.ban", {"peer": "carol"}))
            mesh.run(1)
        mesh.fate = lambda one, other, message: 0 if one is carol else 1
        alice.node.rooms.books.chains.restore.begin("a test")
        alice.perform(alice.node.end_turn(alice.now_ms))
        mesh.run(10)
        if when == "meanwhile":
            assert alice.node.rooms.books.purse.read_only_reason
            alice.feed(e.RpcCall(mesh.next_call(), "peer.ban", {"peer": "carol"}))
            mesh.run(1)
        assert alice.node.rooms.books.purse.read_only_reason == "", when
        alice.feed(e.RpcCall(mesh.next_call(), "peer.unban", {"peer": "carol"}))
        mesh.run(1)
        if carol not in mesh.linked(alice):
            mesh.link(alice, carol)
        mesh.run(1)


def test_a_convicted_member_is_not_waited_for() -> None:
    mesh = Mesh()
    alice, _, carol = three(mesh)
    book = alice.node.rooms.books.book
    a, b = (
        build(
            alice.node.rooms.books.mesh,
            carol.key.public,
            0,
            bytes(32),
            mesh.now_ms + n,
            Genesis(bytes(32), None),
            carol.key.sign,
        )
        for n in (1, 2)
    )
    alice.node.rooms.books.take(carol.peer, [a.raw, b.raw])
    alice.perform(alice.node.end_turn(alice.now_ms))
    mesh.run(1)
    assert book.proof(carol.key.public)
    alice.node.rooms.books.chains.restore.begin("a test")
    alice.perform(alice.node.end_turn(alice.now_ms))
    mesh.run(10)
    assert alice.node.rooms.books.purse.read_only_reason == ""


def test_a_release_that_a_later_state_wrote_does_not_block_the_others() -> None:
    mesh = Mesh()
    alice, bob, carol = three(mesh)
    bob.runner = lambda member, run: None
    shell(alice, "echo", peer=["bob"])
    mesh.run(1)
    disk = copy(alice)
    # Bob delivers, alice releases; bob never hears of it, carol holds the release.
    mesh.fate = lambda one, other, message: 0 if one is alice and other is bob else 1
    (run,) = bob.runs
    ended = echo(bob, run)
    assert ended is not None
    bob.feed(ended)
    mesh.run(1)
    assert sum(paid(mesh).values()) == 1
    mesh.fate = lambda one, other, message: 1
    for other in (bob, carol):
        mesh.cut(alice, other)
    alice.store.tables = disk
    alice.boot()
    mesh.link(alice, bob)
    mesh.run(2)
    assert alice.node.rooms.books._releases, "bob has delivered again, and the check of the chain is under way"
    mesh.link(alice, carol)
    mesh.run(30)
    assert alice.node.rooms.books.purse.read_only_reason == ""
    assert not alice.node.rooms.books._releases
    assert [task.state for task in tasks(alice)] == ["settled"], "the result that was paid there is here as well"
    call = shell(alice, "again", peer=["carol"])
    mesh.run(30)
    assert alice.task(call)["state"] == "settled"
