"""More tasks than places: each is asked for a few times, not again and again, and every free place is filled."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from clawnet.wire.events import Run
from tests.node.meshkit import Member, Mesh, echo
from tests.node.trades import CREDIT, SELFLESS, compute, laws, tasks


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    built = Mesh()
    yield built
    built.run(2 * 3_600)
    laws(built)


def crowd(mesh: Mesh, **keys: str) -> tuple[Member, Member]:
    alice = mesh.found("alice", **SELFLESS)
    bob = mesh.join(alice, "bob", credits_ucr=100 * CREDIT, **{"execution.queue_max": "4", **keys})
    mesh.link_all()
    mesh.run(2)
    return alice, bob


def test_the_cost_of_waiting_does_not_grow_with_the_crowd(mesh: Mesh) -> None:
    alice, bob = crowd(mesh)
    held: list[Run] = []
    bob.runner = lambda member, run: held.append(run)  # type: ignore[func-returns-value]
    count = 120
    for _ in range(count):
        compute(alice, deadline_s=3_000)
    mesh.run(1)
    alice.sent.clear()
    done = 0
    while done < count:
        assert held, "a place is free and nobody was put into it"
        done += len(held)
        ended, held[:] = list(held), []
        for run in ended:
            exited = echo(bob, run)
            assert exited is not None
            bob.feed(exited)
        mesh.run(0.05)
    mesh.run(2)
    assert {task.state for task in tasks(alice)} == {"settled"}
    offers = sum(kind == "Offer" for _, kind in alice.sent)
    assert offers < 4 * count, offers


def test_a_task_for_another_peer_does_not_wait_behind_the_crowd(mesh: Mesh) -> None:
    alice, bob = crowd(mesh)
    carol = mesh.join(alice, "carol", credits_ucr=100 * CREDIT)
    mesh.link_all()
    mesh.run(2)
    bob.runner = lambda member, run: None
    for _ in range(40):
        compute(alice, peer=["bob"], deadline_s=60)
    call = compute(alice, peer=["carol"])
    mesh.run(2)
    assert alice.task(call)["state"] == "settled" and carol.runs
    mesh.run(120)
    assert "timed_out" in {task.state for task in tasks(alice)}, "those that waited ended at their deadline"


def test_a_cancelled_task_waits_no_longer(mesh: Mesh) -> None:
    alice, bob = crowd(mesh)
    bob.runner = lambda member, run: None
    calls = [compute(alice, deadline_s=600) for _ in range(40)]
    mesh.run(1)
    for call in calls:
        alice.call("task.cancel", task=alice.replies[call]["task_id"])
    mesh.run(2)
    assert len(alice.node.rooms.auctions.waiting) == 0
