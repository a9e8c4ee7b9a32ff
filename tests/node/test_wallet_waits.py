"""A wallet that may not be written for a while: what was awarded meanwhile gets its lock later, or ends without one."""

from __future__ import annotations

import pytest

from tests.node.meshkit import Member, Mesh


def waiting(mesh: Mesh) -> tuple[Member, int]:
    """A task whose award waits for its lock, since the own chain is being checked."""
    alice = mesh.found("alice", **{"market.self": "never"})
    mesh.join(alice, "bob")
    mesh.link_all()
    mesh.run(2)
    alice.node.rooms.books.chains.checking = True
    call = alice.call("task.submit", spec={"type": "compute", "op": "sort", "description": "x", "ring": "member"})
    mesh.run(1)
    assert alice.task(call)["state"] == "awarded"
    return alice, call


@pytest.mark.parametrize("how", ["goes on", "restarts"])
def test_a_task_cancelled_while_its_lock_waits_ends_without_one(how: str) -> None:
    mesh = Mesh()
    alice, call = waiting(mesh)
    alice.call("task.cancel", task=alice.replies[call]["task_id"])
    mesh.run(1)
    if how == "restarts":
        alice.boot()
    alice.node.rooms.books.chains.checking = False
    mesh.run(120)
    assert not alice.node.rooms.tasks.open and not alice.node.rooms.outbox.rows
    assert not alice.node.rooms.books.book.open_lines(alice.key.public)
    mesh.check()
