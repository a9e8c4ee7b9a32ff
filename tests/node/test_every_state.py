"""Cancel and deadline in every state of a task, with its daemon up and down; keys and the bytes they stand for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from clawnet.wire import events as e
from tests.node.meshkit import Member, Mesh, echo
from tests.node.trades import compute, laws, only, pair, shell, tasks

STAGES = ("announced", "bidding", "awarded", "executing", "fetching", "delivered")
LOST: dict[str, tuple[str, ...]] = {
    "announced": ("Offer",),
    "bidding": ("Bid", "Decline"),
    "awarded": ("Winner", "EscrowLock"),
    "delivered": ("Settlement", "LedgerPush"),
}


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    built = Mesh()
    yield built
    built.fetching, built.fate = True, lambda *_: 1
    built.run(7_200)
    laws(built)


def never(member: Member, run: e.Run) -> None:
    """A run that does not end by itself."""


def reach(mesh: Mesh, stage: str) -> tuple[Member, Member, int]:
    """A task held at this stage by what is lost on its way, and somebody who waits for it."""
    alice, bob = pair(mesh)
    lost = LOST.get(stage, ())
    bob.runner = never if stage == "executing" else echo
    bob.inline_max = 0 if stage == "fetching" else bob.inline_max
    mesh.fetching = stage != "fetching"
    mesh.fate = lambda one, other, message: 0 if type(message).__name__ in lost else 1
    submit = compute if stage == "delivered" else shell
    submit(alice, deadline_s=10, bid_timeout_s=60)
    mesh.run(1)
    waiting = follow(alice, mesh)
    assert waiting not in alice.replies, alice.replies[waiting]["state"]
    task = only(alice)
    found = task.attempts[0].state if stage == "fetching" else task.state
    assert found in ((stage, "bidding") if stage == "announced" else (stage,)), found
    return alice, bob, waiting


def follow(alice: Member, mesh: Mesh) -> int:
    call = alice.call("task.follow", task=only(alice).task_id.hex())
    mesh.settle()
    return call


def code(alice: Member, call: int) -> int:
    """The exit code of a command that waited."""
    task = alice.replies[call]
    return task["error"]["exit_code"] if task["error"] else task["result"]["exit_code"]


@pytest.mark.parametrize("stage", STAGES)
def test_cancel_in_every_state_twice_and_after_the_end(mesh: Mesh, stage: str) -> None:
    alice, _, waiting = reach(mesh, stage)
    name = only(alice).task_id.hex()
    calls = [alice.call("task.cancel", task=name), alice.call("task.cancel", task=name)]
    mesh.run(1)
    assert [alice.replies[call]["state"] for call in calls] == ["cancelled", "cancelled"]
    assert code(alice, waiting) == 81
    moves = only(alice).transitions
    mesh.fetching, mesh.fate = True, lambda *_: 1
    mesh.run(3_600)
    again = alice.call("task.cancel", task=name)
    late = follow(alice, mesh)
    assert alice.replies[again]["state"] == "cancelled" and code(alice, late) == 81
    assert only(alice).transitions == moves


def test_cancel_while_the_inputs_are_read(mesh: Mesh) -> None:
    """Nobody has the id of a draft: a client that leaves meanwhile leaves a task that is accepted all the same."""
    alice, _ = pair(mesh)
    alice.packed["/in"] = b"input"
    call = compute(alice, inputs=[{"name": "in", "path": "/in"}])
    alice.feed(e.CallGone(call))
    mesh.run(5)
    assert only(alice).state == "settled"


@pytest.mark.parametrize("down", ["nobody", "requester", "executor"])
@pytest.mark.parametrize("stage", STAGES)
def test_the_deadline_whoever_is_down_when_it_passes(mesh: Mesh, stage: str, down: str) -> None:
    alice, bob, waiting = reach(mesh, stage)
    if down == "requester":
        mesh.now_ms += 60_000
        alice.restart()
        waiting = follow(alice, mesh)
    elif down == "executor":
        mesh.cut(alice, bob)
        mesh.run(25)
        bob.restart()
    mesh.run(25)
    paid = stage == "delivered"  # what was delivered in time is paid, and opens when the key comes
    if paid:
        assert waiting not in alice.replies
        mesh.fate = lambda *_: 1
        if down == "executor":
            mesh.link(alice, bob)
        mesh.run(400)
    nobody = down == "executor" and stage in ("announced", "bidding")  # an auction does not wait for who is gone
    assert code(alice, waiting) == (0 if paid else 75 if nobody else 124)
    if down == "executor" and not paid:
        mesh.link(alice, bob)
    mesh.fetching, mesh.fate = True, lambda *_: 1
    mesh.run(3_600)
    assert only(alice).state == ("settled" if paid else "no_bids" if nobody else "timed_out")


# --- idempotency keys


def keyed(alice: Member, path: str, **spec: Any) -> int:
    return compute(alice, idempotency_key="nightly", inputs=[{"name": "data", "path": path}], **spec)


def test_a_key_stands_for_the_bytes_of_the_inputs_not_for_their_paths(mesh: Mesh) -> None:
    alice, _ = pair(mesh)
    alice.packed = {"/one/data": b"same", "/two/data": b"same", "/three/data": b"other"}
    first, twin = keyed(alice, "/one/data"), keyed(alice, "/two/data")
    mesh.run(5)
    alice.restart()
    mesh.run(15)
    again, other = keyed(alice, "/two/data"), keyed(alice, "/three/data")
    mesh.run(5)
    assert alice.replies[first]["created"] and not alice.replies[again]["created"]
    assert alice.replies[first]["task_id"] == alice.replies[twin]["task_id"] == alice.replies[again]["task_id"]
    assert alice.replies[other]["exit_code"] == 65
    alice.packed["/one/data"] = b"changed"
    changed = keyed(alice, "/one/data")
    mesh.run(5)
    assert alice.replies[changed]["exit_code"] == 65
    assert len(tasks(alice)) == 1 and not alice.blobs  # nothing is kept of what became no task


def test_twenty_at_once_make_one_task(mesh: Mesh) -> None:
    alice, _ = pair(mesh)
    alice.packed = {"/data": b"same"}
    calls = [keyed(alice, "/data") for _ in range(20)]
    mesh.run(5)
    assert len({alice.replies[call]["task_id"] for call in calls}) == 1
    assert sum(alice.replies[call]["created"] for call in calls) == 1
    assert only(alice).state == "settled"


@pytest.mark.parametrize("restarted", [False, True])
def test_a_key_without_a_result_is_free_again(mesh: Mesh, restarted: bool) -> None:
    alice, bob = pair(mesh)
    alice.packed = {"/data": b"same", "/more": b"more"}
    bob.runner = never
    first = keyed(alice, "/data")
    mesh.run(2)
    alice.call("task.cancel", task=alice.replies[first]["task_id"])
    mesh.run(2)
    if restarted:
        alice.restart()
        mesh.run(15)
    bob.runner = echo
    second = keyed(alice, "/more")
    mesh.run(5)
    assert alice.replies[second]["created"]
    assert alice.task(second)["state"] == "settled"
