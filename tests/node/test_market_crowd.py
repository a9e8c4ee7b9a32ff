"""More tasks than places: each is asked for a few times, not again and again, and every free place is filled."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from clawnet import limits
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


def test_above_the_bound_of_open_tasks_a_submission_is_told_to_come_again(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "OPEN_TASKS_MAX", 3)
    alice, bob = crowd(mesh)
    bob.runner = lambda member, run: None
    calls = [compute(alice, deadline_s=60) for _ in range(5)]
    mesh.run(1)
    assert [alice.replies[call].get("code", "") for call in calls] == ["", "", "", "busy", "busy"]
    assert alice.replies[calls[-1]]["exit_code"] == 69 and "try again" in alice.replies[calls[-1]]["hint"]


def test_open_tasks_are_listed_page_by_page_newest_first(mesh: Mesh) -> None:
    alice, bob = crowd(mesh)
    bob.runner = lambda member, run: None
    for n in range(7):
        compute(alice, deadline_s=600)
        mesh.run(0.01 * (n % 2))
    mesh.settle()
    found, after, pages = [], None, 0
    while pages == 0 or after is not None:
        number = alice.call("task.list", states=["open"], limit=3, after=after)
        mesh.settle()
        page = alice.replies[number]
        found += [item["task_id"] for item in page["items"]]
        after, pages = page["next"], pages + 1
    newest = sorted(alice.node.rooms.tasks.open.values(), key=lambda task: (-task.created_ms, task.task_id))
    assert pages == 3 and set(found) == {task.task_id.hex() for task in newest} and len(found) == 7
    made = {task.task_id.hex(): task.created_ms for task in newest}
    assert [made[one] for one in found] == sorted(made.values(), reverse=True)
