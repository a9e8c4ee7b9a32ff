"""A long chain: the issuer countersigns its checkpoint, and a worker that never met it starts its audit there."""

from __future__ import annotations

from clawnet import limits
from tests.node.meshkit import Member, Mesh


def long_chain(mesh: Mesh) -> tuple[Member, Member]:
    alice = mesh.found("alice")
    bob = mesh.join(
        alice, "bob", credits_ucr=100_000_000, **{"market.self": "never", "ledger.audit_entries_max": "100"}
    )
    mesh.link_all()
    mesh.run(2)
    for _ in range(limits.CHECKPOINT_EVERY):
        bob.node.rooms.books.send(alice.key.public, 1, bytes(32))
    bob.perform(bob.node.end_turn(mesh.now_ms))
    mesh.run(130)
    return alice, bob


def test_the_issuer_countersigns_a_checkpoint_once_it_holds_the_chain() -> None:
    mesh = Mesh()
    alice, bob = long_chain(mesh)
    kept = bob.node.rooms.books.countersigns.own
    assert kept is not None and set(kept.statements) == {alice.peer}
    bob.boot()
    assert bob.node.rooms.books.countersigns.own == kept
    mesh.check()


def test_a_worker_that_never_met_the_payer_starts_at_the_checkpoint() -> None:
    mesh = Mesh()
    alice, bob = long_chain(mesh)
    dave = mesh.join(alice, "dave")
    mesh.link(bob, dave)
    mesh.run(2)
    call = bob.call("task.submit", spec={"type": "compute", "op": "sha256", "description": "x", "ring": "member"})
    mesh.run(3)
    task = bob.task(call)
    assert task["state"] == "settled", task
    if task["executor"]["name"] == "dave":
        view = dave.node.rooms.books.book.view(bob.key.public)
        kept = bob.node.rooms.books.countersigns.own
        assert kept is not None and view.base_seq == kept.seq


def test_a_checkpoint_that_no_auditor_signed_starts_nothing() -> None:
    mesh = Mesh()
    alice, bob = long_chain(mesh)
    kept = bob.node.rooms.books.countersigns.own
    assert kept is not None
    statement = next(iter(kept.statements.values()))
    kept.statements = {alice.peer: statement[:-1] + bytes([statement[-1] ^ 1])}
    dave = mesh.join(alice, "dave")
    mesh.link(bob, dave)
    mesh.cut(alice, bob)
    mesh.run(2)
    call = bob.call("task.submit", spec={"type": "compute", "op": "sha256", "description": "x", "ring": "member"})
    mesh.run(3)
    assert bob.replies[call]["created"]
    assert dave.node.rooms.books.book.view(bob.key.public).base_seq == 0
    assert any(log.event == "checkpoint.refused" for log in dave.logs)
