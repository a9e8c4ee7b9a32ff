"""Who is asked for a task, in which order, at which price, and why nobody took it; idempotency keys."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from clawnet.execution import bundle
from clawnet.ledger.entries import Lock, parse
from clawnet.wire.blobid import blob_id
from clawnet.wire.events import Run, TaskExited
from tests.node.meshkit import Member, Mesh, echo
from tests.node.trades import CREDIT, SELFLESS, compute, laws, only, pair, shell, tasks, three


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    built = Mesh()
    yield built
    built.run(2 * 3_600)
    laws(built)


def who(mesh: Mesh, member: Member, call: int) -> str:
    view = member.task(call)
    return view["executor"]["name"] if view["executor"] else ""


def household(mesh: Mesh, **keys: str) -> tuple[Member, Member, Member]:
    """Alice with a machine in the attic, and bob, a member."""
    alice = mesh.found("alice", **keys)
    attic = mesh.join(alice, "attic", ring="own")
    bob = mesh.join(alice, "bob", credits_ucr=100 * CREDIT)
    mesh.link_all()
    mesh.run(2)
    return alice, attic, bob


def why(mesh: Mesh, member: Member, call: int) -> dict[str, Any]:
    number = member.call("task.why", task=member.replies[call]["task_id"])
    mesh.settle()
    answer: dict[str, Any] = member.replies[number]
    return answer


# --- rings


def test_own_machines_work_without_price_and_lock(mesh: Mesh) -> None:
    alice, attic, bob = household(mesh)
    seq = alice.node.rooms.books.book.head(alice.key.public)
    call = compute(alice)
    mesh.run(2)
    task = only(alice)
    assert who(mesh, alice, call) == "attic" and task.state == "settled"
    assert task.attempts[0].price_ucr == 0 and task.attempts[0].lock_seq == -1 and task.attempts[0].escrow == "none"
    assert [run.spec.seal_key for run in attic.runs] == [None], "the result comes in plain text"
    assert alice.node.rooms.books.book.head(alice.key.public) == seq
    assert not bob.runs


@pytest.mark.parametrize(
    ("own_self", "attic_up", "prefer", "expected"),
    [
        ("fallback", True, "", "attic"),
        ("fallback", False, "", "alice"),
        ("prefer", True, "", "alice"),
        ("never", True, "", "attic"),
        ("never", False, "", "bob"),
        ("fallback", True, "market", "bob"),
    ],
)
def test_the_order_of_the_rings(mesh: Mesh, own_self: str, attic_up: bool, prefer: str, expected: str) -> None:
    alice, attic, _ = household(mesh, **{"market.self": own_self})
    if not attic_up:
        mesh.cut(alice, attic)
    call = compute(alice, prefer=prefer)
    mesh.run(2)
    assert who(mesh, alice, call) == expected


def test_prefer_market_comes_home_when_no_member_can(mesh: Mesh) -> None:
    alice, _, bob = household(mesh)
    mesh.cut(alice, bob)
    call = compute(alice, prefer="market")
    mesh.run(2)
    assert who(mesh, alice, call) == "attic"


def test_peer_and_exclude(mesh: Mesh) -> None:
    alice, _, _ = three(mesh)
    first, second = compute(alice, peer=["carol"]), compute(alice, exclude=["carol"])
    mesh.run(2)
    assert (who(mesh, alice, first), who(mesh, alice, second)) == ("carol", "bob")


def test_a_node_alone_works_for_itself_over_a_restart(mesh: Mesh) -> None:
    alice = mesh.found("alice")
    alice.runner = lambda member, run: None
    shell(alice, "true", ring="own")
    mesh.run(1)
    alice.restart()
    mesh.run(1)
    assert only(alice).state == "failed", "it ran when the node stopped, and may not run twice"
    alice.runner = echo
    compute(alice)
    mesh.run(1)
    assert {task.state for task in tasks(alice)} == {"failed", "settled"}


# --- price and budget


def test_the_winner_is_who_scores_best(mesh: Mesh) -> None:
    alice = mesh.found("alice", **SELFLESS)
    for name, rate in (("dear", "8"), ("cheap", "2"), ("middle", "4")):
        mesh.join(alice, name, **{"market.rates.task": rate})
    mesh.link_all()
    mesh.run(2)
    call = compute(alice)
    mesh.run(2)
    assert who(mesh, alice, call) == "cheap"
    told = why(mesh, alice, call)
    bids = [peer["bid"] for peer in told["rounds"][0]["peers"] if peer["bid"]]
    assert len(bids) == 3
    for bid in bids:
        assert bid["terms"]["price"] == pytest.approx(0.40 / max(1.0, float(bid["price"])))
        assert bid["score"] == pytest.approx(sum(bid["terms"].values()))
    assert max(bids, key=lambda bid: bid["score"])["bidder"]["name"] == "cheap" and "cheap won" in told["summary"]


def test_a_price_above_the_budget_ends_with_the_reason(mesh: Mesh) -> None:
    alice, _, _ = three(mesh)
    call = compute(alice, budget="0.5")
    mesh.run(2)
    view = alice.task(call)
    assert view["state"] == "no_bids" and view["error"]["exit_code"] == 75
    assert "2 price" in view["error"]["message"] and "--budget" in view["error"]["hint"]
    assert why(mesh, alice, call)["rounds"][0]["declined"] == {"price": 2}


def test_a_budget_above_the_balance_is_refused_at_once(mesh: Mesh) -> None:
    _, bob = pair(mesh)
    call = compute(bob, budget="5000")
    mesh.run(1)
    assert bob.replies[call]["exit_code"] == 79 and not tasks(bob)


def test_nobody_connected(mesh: Mesh) -> None:
    alice = mesh.found("alice", **SELFLESS)
    call = compute(alice)
    mesh.run(1)
    view = alice.task(call)
    assert view["state"] == "no_bids" and "peer list" in view["error"]["hint"]


def test_why_a_named_peer_was_not_asked(mesh: Mesh) -> None:
    alice, bob, _ = three(mesh)

    def hint(**spec: Any) -> str:
        call = compute(alice, peer=["bob"], **spec)
        mesh.run(10)
        view = alice.task(call)
        assert view["state"] == "no_bids"
        text: str = view["error"]["hint"]
        return text

    assert "bob is a member" in hint(ring="own") and "--ring member" in hint(ring="own")
    mesh.cut(alice, bob)
    mesh.run(10)
    assert "bob is not connected" in hint()
    alice.node.rooms.members.ban(bob.peer, True)
    assert "banned" in hint()


def test_workers_without_a_price_are_paid_the_least_there_is(mesh: Mesh) -> None:
    alice = mesh.found("alice", **SELFLESS)
    mesh.join(alice, "kind", **{"market.rates.task": "0", "market.rates.cpu_second": "0"})
    mesh.link_all()
    mesh.run(2)
    compute(alice)
    mesh.run(2)
    assert only(alice).state == "settled" and only(alice).attempts[0].price_ucr == 1


def test_tasks_of_one_turn_share_a_lock(mesh: Mesh) -> None:
    alice, _, _ = three(mesh)
    for _ in range(3):
        compute(alice)
    mesh.run(2)
    locks = [parse(row[-1]) for row in alice.store.load_all("entries") if row[0] == alice.key.public]
    lines = [len(entry.body.lines) for entry in locks if isinstance(entry.body, Lock)]
    assert sum(lines) == 3 and len(lines) < 3
    assert {task.state for task in tasks(alice)} == {"settled"}


def test_full_workers_are_asked_again(mesh: Mesh) -> None:
    alice = mesh.found("alice", **SELFLESS)
    bob = mesh.join(alice, "bob", **{"execution.slots": "1", "execution.queue_max": "0"})
    mesh.link_all()
    mesh.run(2)
    bob.runner = lambda member, run: None
    compute(alice)
    mesh.run(1)
    second = compute(alice)
    mesh.run(3)
    assert alice.task(second)["state"] == "bidding"
    ended = echo(bob, bob.runs[0])
    assert ended is not None
    bob.runner = echo
    bob.feed(ended)
    mesh.run(10)
    assert {task.state for task in tasks(alice)} == {"settled"}


def test_a_node_alone_that_is_full_waits_too(mesh: Mesh) -> None:
    alice = mesh.found("alice", **{"execution.slots": "1", "execution.queue_max": "0"})
    mesh.run(1)
    alice.runner = lambda member, run: None
    compute(alice)
    mesh.run(1)
    compute(alice)
    mesh.run(1)
    ended = echo(alice, alice.runs[0])
    assert ended is not None
    alice.runner = echo
    alice.feed(ended)
    mesh.run(15)
    assert [task.state for task in tasks(alice)] == ["settled", "settled"]


# --- idempotency


def test_the_same_key_finds_the_task_again_also_over_a_restart(mesh: Mesh) -> None:
    alice, _ = pair(mesh)
    first = compute(alice, idempotency_key="nightly")
    again = compute(alice, idempotency_key="nightly")
    mesh.run(5)
    assert alice.replies[again] == {**alice.replies[first], "created": False}
    alice.restart()
    mesh.run(15)
    later = compute(alice, idempotency_key="nightly")
    other = compute(alice, idempotency_key="nightly", op_args={"limit": 11})
    mesh.run(5)
    assert alice.replies[later]["task_id"] == alice.replies[first]["task_id"]
    assert alice.replies[other]["exit_code"] == 65
    assert len(tasks(alice)) == 1


def test_a_key_whose_task_left_nothing_is_free_again(mesh: Mesh) -> None:
    alice, bob = pair(mesh)
    mesh.cut(alice, bob)
    first = compute(alice, idempotency_key="k")
    mesh.run(6)
    assert alice.task(first)["state"] == "no_bids"
    mesh.link(alice, bob)
    second = compute(alice, idempotency_key="k")
    mesh.run(5)
    assert alice.replies[second]["created"] and alice.task(second)["state"] == "settled"


def test_a_key_of_long_ago_is_looked_up_once_also_when_two_ask_at_once(mesh: Mesh, monkeypatch: Any) -> None:
    monkeypatch.setattr("clawnet.node.tasks.FINISHED_KEPT_MAX", 1)
    alice, _ = pair(mesh)
    first = compute(alice, idempotency_key="old")
    mesh.run(5)
    compute(alice)
    mesh.run(5)
    assert not alice.node.rooms.tasks.keys
    again = compute(alice, idempotency_key="old")
    one, two = compute(alice, idempotency_key="new"), compute(alice, idempotency_key="new")
    mesh.run(5)
    assert alice.replies[again] == {**alice.replies[first], "created": False}
    assert [alice.replies[call]["created"] for call in (one, two)] == [True, False]
    assert alice.replies[one]["task_id"] == alice.replies[two]["task_id"]


def failing(member: Member, run: Run) -> TaskExited | None:
    """Runs a job to an exit code of 3."""
    ended = echo(member, run)
    assert ended is not None
    plain = bundle.encode(bundle.Bundle(3, None, b"", b"", "", bundle.Usage(0.01, 0.01, 1024)))
    sealed = bundle.seal(plain, run.spec.seal_key or b"", member.entropy)
    return msgspec.structs.replace(
        ended, exit_code=3, inline=sealed, blob=blob_id(sealed), blob_bytes=len(sealed), output_bytes=0
    )


def test_a_command_that_failed_gives_its_key_to_a_new_task_when_asked(mesh: Mesh) -> None:
    alice, bob = pair(mesh)
    spec = {"type": "shell", "argv": ["false"], "ring": "member", "idempotency_key": "k"}
    bob.runner = failing
    first = alice.call("task.submit", spec=spec)
    mesh.run(5)
    assert alice.task(first)["result"]["exit_code"] == 3
    bob.runner = echo
    kept = alice.call("task.submit", spec=spec)
    mesh.run(1)
    assert alice.replies[kept] == {**alice.replies[first], "created": False}
    again = alice.call("task.submit", spec=spec, retry_failed_before_ms=mesh.now_ms)
    mesh.run(5)
    assert alice.replies[again]["created"] and alice.task(again)["result"]["exit_code"] == 0
    assert alice.task(first)["result"]["exit_code"] == 3
    late = alice.call("task.submit", spec=spec, retry_failed_before_ms=mesh.now_ms)
    mesh.run(5)
    assert alice.replies[late] == {**alice.replies[again], "created": False}


def test_tasks_are_checked_and_none_is_taken(mesh: Mesh) -> None:
    alice, _ = pair(mesh)
    good = {"type": "compute", "op": "sha256", "description": "x"}
    specs = [good, {**good, "op": "none"}, {**good, "peer": ["nobody"]}, 7, {**good, "stdin_b64": "a"}, good]
    call = alice.call("task.check", specs=specs)
    mesh.run(1)
    found = alice.replies[call]["items"]
    assert [item and item["exit_code"] for item in found] == [None, 65, 66, 65, 65, None]
    assert not tasks(alice)


def test_the_same_key_while_the_inputs_are_read(mesh: Mesh) -> None:
    alice, _ = pair(mesh)
    alice.packed["/in"] = b"data"
    inputs = [{"name": "in", "path": "/in"}]
    calls = [compute(alice, idempotency_key="k", inputs=inputs) for _ in range(2)]
    mesh.run(5)
    assert len({alice.replies[call]["task_id"] for call in calls}) == 1 and len(tasks(alice)) == 1
