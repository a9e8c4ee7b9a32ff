"""Requester and executors as production nodes: a task through auction, lock, run, release, key and result."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.node.meshkit import Member, Mesh


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    built = Mesh()
    yield built
    built.run(60)
    built.check()


def three(mesh: Mesh) -> tuple[Member, Member, Member]:
    founder = mesh.found("alice", **{"market.self": "never"})
    bob = mesh.join(founder, "bob", credits_ucr=100_000_000)
    carol = mesh.join(founder, "carol", credits_ucr=100_000_000)
    mesh.link_all()
    mesh.run(2)
    return founder, bob, carol


def compute(member: Member, **spec: object) -> int:
    return member.call(
        "task.submit", spec={"type": "compute", "op": "primes", "op_args": {"limit": 10}, "ring": "member", **spec}
    )


def test_a_task_is_auctioned_locked_run_paid_and_opened(mesh: Mesh) -> None:
    alice, bob, carol = three(mesh)
    call = compute(alice)
    mesh.run(2)
    task = alice.task(call)
    assert task["state"] == "settled", task
    assert task["result"]["stdout"] == "primes"
    assert task["escrow"]["state"] == "claimed"
    assert task["executor"]["name"] in ("bob", "carol")
    price = task["price"]
    assert price != "0"
    mesh.run(30)
    assert not alice.node.rooms.outbox.rows
    assert not bob.node.rooms.outbox.rows and not carol.node.rooms.outbox.rows
    worker = bob if task["executor"]["name"] == "bob" else carol
    balance = worker.call("wallet.balance")
    mesh.settle()
    assert float(worker.replies[balance]["available"]) == 100 + float(price)
