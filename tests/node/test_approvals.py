"""Tasks that wait for approval, in a mesh: nothing leaves and nothing is locked before; released once, or ended."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from clawnet import limits
from clawnet.node import approvals
from clawnet.wire.events import RpcCall
from tests.node.meshkit import Member, Mesh
from tests.node.trades import compute, laws, pair, tasks

ABOVE = "market.approve.above"
TIMEOUT = "market.approve.timeout"
USER = "uid:1000"


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    built = Mesh()
    yield built
    built.run(2 * 3_600)
    laws(built)


def asked(mesh: Mesh, member: Member, method: str, credential: str = USER, **params: Any) -> Any:
    number = mesh.next_call()
    member.feed(RpcCall(number, method, params, 0, credential))
    mesh.settle()
    return member.replies[number]


def held(mesh: Mesh, alice: Member, **spec: Any) -> str:
    """A submission that is held; its id."""
    call = compute(alice, **spec)
    mesh.settle()
    assert alice.replies[call]["held"]["reason"].startswith("its budget of "), alice.replies[call]
    return str(alice.replies[call]["task_id"])


def view(mesh: Mesh, alice: Member, task: str) -> dict[str, Any]:
    found: dict[str, Any] = asked(mesh, alice, "task.get", task=task)
    return found


def untouched(alice: Member, bob: Member) -> bool:
    """No offer, no lock, no run."""
    spoken = {kind for peer, kind in alice.sent if peer == bob.peer}
    return not spoken & {"Offer", "Winner", "EscrowLock"} and not bob.runs and alice.node.rooms.books.available() > 0


def test_nothing_leaves_before_the_approval_and_everything_after(mesh: Mesh) -> None:
    alice, bob = pair(mesh, **{ABOVE: "5"})
    before = asked(mesh, alice, "wallet.balance")["available"]
    alice.sent.clear()
    task = held(mesh, alice, budget="6", deadline_s=3600)
    mesh.run(60)
    seen = view(mesh, alice, task)
    assert seen["state"] == "draft" and not seen["final"] and seen["held"]["until"] == seen["deadline"]
    assert untouched(alice, bob) and asked(mesh, alice, "wallet.balance")["available"] == before
    assert asked(mesh, alice, "task.list", states=["draft"])["items"][0]["held"]["reason"].endswith("which is 5")
    assert "waits for approval" in asked(mesh, alice, "task.why", task=task)["summary"]
    assert asked(mesh, alice, "task.approve", task=task) == {"task_id": task, "state": "announced", "changed": True}
    mesh.run(2)
    done = view(mesh, alice, task)
    assert done["state"] == "settled" and done["held"] is None and bob.runs
    reasons = [move["reason"] for move in done["transitions"]]
    assert reasons[0].startswith("held: its budget of 6") and reasons[1] == f"approved by {USER}"
    assert asked(mesh, alice, "task.list", states=["draft"])["items"] == []


def test_a_budget_at_the_threshold_goes_out_and_so_does_what_costs_nothing(mesh: Mesh) -> None:
    alice = mesh.found("alice", **{ABOVE: "5"})
    mesh.join(alice, "bob")
    mesh.link_all()
    mesh.run(2)
    at = compute(alice, budget="5")
    own = compute(alice, ring="own", budget="50")
    mesh.run(2)
    assert alice.replies[at]["held"] is None and alice.replies[own]["held"] is None
    assert alice.task(own)["state"] == "settled"


def test_a_kind_has_a_threshold_of_its_own(mesh: Mesh) -> None:
    alice, _ = pair(mesh, **{ABOVE: "50", "market.approve.compute": "5"})
    task = held(mesh, alice, budget="6")
    assert "market.approve.compute" in view(mesh, alice, task)["held"]["reason"]
    assert asked(mesh, alice, "task.cancel", task=task)["state"] == "cancelled"


def test_approving_twice_changes_nothing_the_second_time(mesh: Mesh) -> None:
    alice, bob = pair(mesh, **{ABOVE: "5"})
    task = held(mesh, alice, budget="6")
    first = asked(mesh, alice, "task.approve", task=task)
    second = asked(mesh, alice, "task.approve", task=task)
    assert first["changed"] and not second["changed"]
    mesh.run(2)
    assert asked(mesh, alice, "task.approve", task=task) == {"task_id": task, "state": "settled", "changed": False}
    assert len(bob.runs) == 1


@pytest.mark.parametrize("credential", ["", "http:ci", "mcp:7"])
def test_only_a_local_user_approves_also_what_somebody_else_submitted(mesh: Mesh, credential: str) -> None:
    alice, bob = pair(mesh, **{ABOVE: "5"})
    spec = {"type": "compute", "op": "primes", "op_args": {"limit": 10}, "ring": "member", "budget": "6"}
    task = asked(mesh, alice, "task.submit", credential, spec=spec)["task_id"]
    refused = asked(mesh, alice, "task.approve", credential, task=task)
    assert refused["code"] == "not_permitted" and refused["exit_code"] == 77
    assert view(mesh, alice, task)["state"] == "draft" and not bob.runs
    assert asked(mesh, alice, "task.approve", USER, task=task)["changed"]
    mesh.run(2)
    assert view(mesh, alice, task)["state"] == "settled"


def test_what_is_not_held_cannot_be_approved(mesh: Mesh) -> None:
    alice, _ = pair(mesh, **{ABOVE: "5"})
    call = compute(alice, budget="4")
    mesh.run(2)
    error = asked(mesh, alice, "task.approve", task=alice.replies[call]["task_id"])
    assert error["code"] == "bad_input" and "is not held (it is settled)" in error["message"]
    assert asked(mesh, alice, "task.approve", task="ab" * 16)["exit_code"] == 66


@pytest.mark.parametrize(("timeout", "deadline_s", "word"), [("1m", 3600, TIMEOUT), ("1d", 60, "--deadline")])
def test_nobody_approves_in_time(mesh: Mesh, timeout: str, deadline_s: int, word: str) -> None:
    alice, bob = pair(mesh, **{ABOVE: "5", TIMEOUT: timeout})
    task = held(mesh, alice, budget="6", deadline_s=deadline_s, idempotency_key="k")
    follow = mesh.next_call()
    alice.feed(RpcCall(follow, "task.follow", {"task": task, "output": False}, 0, USER))
    mesh.run(59)
    assert view(mesh, alice, task)["state"] == "draft" and follow not in alice.replies
    mesh.run(2)
    ended = alice.replies[follow]
    assert ended["state"] == "failed" and ended["error"]["exit_code"] == 77 and ended["held"] is None
    assert "not approved in time" in ended["error"]["message"] and word in ended["error"]["hint"]
    assert not bob.runs and not alice.node.rooms.approvals._held
    late = asked(mesh, alice, "task.approve", task=task)
    assert late["exit_code"] == 65 and "not approved in time" in late["message"]
    again = held(mesh, alice, budget="6", deadline_s=deadline_s, idempotency_key="k")
    assert again != task, "the key is free again"


def test_a_key_finds_the_held_task(mesh: Mesh) -> None:
    alice, _ = pair(mesh, **{ABOVE: "5"})
    task = held(mesh, alice, budget="6", idempotency_key="k")
    call = compute(alice, budget="6", idempotency_key="k")
    mesh.settle()
    again = alice.replies[call]
    assert (again["task_id"], again["created"]) == (task, False) and again["held"]
    assert len(tasks(alice)) == 1


@pytest.mark.parametrize("after_commit", [False, True])
@pytest.mark.parametrize("turn", [1, 2, 3])
def test_a_held_task_outlives_its_node_and_is_never_released_by_a_restart(
    mesh: Mesh, turn: int, after_commit: bool
) -> None:
    alice, bob = pair(mesh, **{ABOVE: "5"})
    alice.power_cut, alice.crash_after_commit = True, after_commit
    task = held(mesh, alice, budget="6", deadline_s=3000)
    alice.restart()
    mesh.run(10)
    assert view(mesh, alice, task)["state"] == "draft" and untouched(alice, bob)
    alice.crash_at = alice.turns + turn
    number = mesh.next_call()
    alice.feed(RpcCall(number, "task.approve", {"task": task}, 0, USER))
    mesh.run(60)
    if view(mesh, alice, task)["state"] == "draft":
        assert number not in alice.replies, "what was answered is on the disk"
        assert asked(mesh, alice, "task.approve", task=task)["changed"]
        mesh.run(60)
    assert view(mesh, alice, task)["state"] == "settled" and len(bob.runs) == 1


def test_a_hold_ends_in_time_though_the_node_was_away(mesh: Mesh) -> None:
    alice, _ = pair(mesh, **{ABOVE: "5", TIMEOUT: "1m"})
    task = held(mesh, alice, budget="6", deadline_s=3600)
    mesh.run(30)
    alice.restart()
    mesh.run(20)
    assert view(mesh, alice, task)["state"] == "draft"
    mesh.run(15)
    assert view(mesh, alice, task)["error"]["exit_code"] == 77


def test_inputs_stay_until_the_approval_and_go_with_a_cancel(mesh: Mesh) -> None:
    alice, bob = pair(mesh, **{ABOVE: "5"})
    alice.packed["/in"] = b"1 2 3"
    spec = {"op": "wordcount", "op_args": {}, "inputs": [{"name": "in", "path": "/in"}], "budget": "6"}
    task = held(mesh, alice, **spec)
    dropped = held(mesh, alice, **{**spec, "budget": "7"})
    assert alice.blobs
    asked(mesh, alice, "task.cancel", task=dropped)
    assert alice.blobs, "the other task needs them"
    asked(mesh, alice, "task.approve", task=task)
    mesh.run(2)
    assert view(mesh, alice, task)["state"] == "settled" and bob.runs
    assert not alice.blobs


def test_so_many_wait_and_no_more(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HELD_TASKS_MAX", 2)
    assert approvals.limits.HELD_TASKS_MAX == 2
    alice, _ = pair(mesh, **{ABOVE: "5"})
    first, _ = held(mesh, alice, budget="6"), held(mesh, alice, budget="6")
    refused = compute(alice, budget="6")
    small = compute(alice, budget="5")
    mesh.settle()
    assert alice.replies[refused]["code"] == "busy" and "market approve" in alice.replies[refused]["hint"]
    assert alice.replies[small]["held"] is None
    asked(mesh, alice, "task.cancel", task=first)
    held(mesh, alice, budget="6")


def test_another_threshold_holds_nothing_that_was_accepted_and_frees_nothing(mesh: Mesh) -> None:
    alice, _ = pair(mesh, **{ABOVE: "5"})
    task = held(mesh, alice, budget="6", deadline_s=3600)
    alice.config = type(alice.config).defaults({"node.name": "alice"})
    alice.node.ctx.config = alice.config
    mesh.run(5)
    assert view(mesh, alice, task)["state"] == "draft"
    call = compute(alice, budget="6")
    mesh.run(2)
    assert alice.replies[call]["held"] is None


def test_a_command_that_waits_is_no_reason_to_forget_its_task(mesh: Mesh) -> None:
    alice, _ = pair(mesh, **{ABOVE: "5"})
    alice.power_cut = True
    spec = {"type": "compute", "op": "primes", "op_args": {"limit": 10}, "ring": "member", "budget": "6"}
    task = asked(mesh, alice, "task.submit", spec=spec, awaited=True)["task_id"]
    alice.restart()
    mesh.run(1)
    assert view(mesh, alice, task)["held"]


def test_what_waits_is_counted_again_after_a_restart(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HELD_TASKS_MAX", 1)
    alice, _ = pair(mesh, **{ABOVE: "5"})
    task = held(mesh, alice, budget="6")
    alice.restart()
    mesh.run(1)
    (finding,) = alice.node.rooms.approvals.findings()
    assert finding["message"].startswith("1 task waits")
    refused = compute(alice, budget="6")
    mesh.settle()
    assert alice.replies[refused]["code"] == "busy"
    asked(mesh, alice, "task.cancel", task=task)
    assert alice.node.rooms.approvals.findings() == []
