"""How attempts end otherwise than well: silence, hand-backs, refusals, cancels, deadlines; and what each costs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from clawnet.execution import bundle
from clawnet.market.records import Attempt
from clawnet.wire import events as e
from clawnet.wire.blobid import blob_id
from tests.node.meshkit import Member, Mesh, echo
from tests.node.trades import CREDIT, claims, compute, laws, only, paid, pair, shell, three

HOUR_S = 3_600


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    built = Mesh()
    yield built
    built.run(2 * HOUR_S)
    laws(built)


def never(member: Member, run: e.Run) -> None:
    """A run that does not end by itself."""


def failing(member: Member, run: e.Run) -> e.TaskExited:
    return e.TaskExited(run.job, "failed", "no such thing", None, None, b"", b"", 0, bytes(32), 0, 0.1, 0.1, 0)


def follow(member: Member, mesh: Mesh, task_id: bytes) -> int:
    call = member.call("task.follow", task=task_id.hex(), output=False)
    mesh.settle()
    return call


def spent(mesh: Mesh, member: Member) -> float:
    call = member.call("wallet.balance")
    mesh.settle()
    return float(member.replies[call]["available"])


def silence(kinds: tuple[str, ...], sender: Member) -> Any:
    return lambda one, other, message: 0 if one is sender and type(message).__name__ in kinds else 1


def attempt(member: Member, n: int = 0) -> Attempt:
    return only(member).attempts[n]


# --- silence


def test_retries_0_and_silence_tells_the_waiting_command_and_keeps_the_slot(mesh: Mesh) -> None:
    alice, bob, _ = three(mesh)
    bob.runner = never
    call = shell(alice, peer=["bob"], deadline_s=600)
    mesh.run(1)
    task_id = bytes.fromhex(alice.replies[call]["task_id"])
    waiting = follow(alice, mesh, task_id)
    mesh.fate = silence(("Progress", "Result", "Output"), bob)
    mesh.run(60)
    answer = alice.replies[waiting]
    assert answer["error"]["exit_code"] == 76 and not answer["final"]
    assert answer["state"] == "executing" and len(answer["attempts"]) == 1
    mesh.fate = lambda *_: 1
    bob.feed(echo(bob, bob.runs[0]))
    mesh.run(60)
    task = only(alice)
    assert task.state == "settled" and task.result is not None and task.error_code == ""
    assert len(paid(mesh)) == 1


def test_retries_0_and_no_result_until_expiry_fails_and_refunds(mesh: Mesh) -> None:
    alice, bob = pair(mesh)
    before = spent(mesh, alice)
    bob.runner = never
    shell(alice, deadline_s=60)
    mesh.run(1)
    mesh.fate = silence(("Progress", "Result", "Waiver", "Reject", "Ack"), bob)
    mesh.run(100)
    assert only(alice).state == "executing"
    mesh.run(400)
    assert only(alice).state == "failed" and only(alice).error_code == "executor_lost"
    assert spent(mesh, alice) == before
    mesh.fate = lambda *_: 1
    for run in bob.runs:
        bob.feed(failing(bob, run))


def test_retries_move_a_silent_attempt_on_and_its_late_result_is_not_paid(mesh: Mesh) -> None:
    alice, bob, carol = three(mesh)
    bob.runner = carol.runner = never
    compute(alice, deadline_s=900)
    mesh.run(1)
    silent = bob if bob.runs else carol
    other = carol if silent is bob else bob
    other.runner = echo
    mesh.fate = silence(("Progress", "Result", "Waiver"), silent)
    mesh.run(45)
    task = only(alice)
    assert task.state == "settled" and [a.paying for a in task.attempts] == [False, True]
    mesh.fate = lambda *_: 1
    silent.feed(echo(silent, silent.runs[0]))
    mesh.run(60)
    assert claims(silent) == 0 and claims(other) == 1


def test_the_only_executor_that_was_lost_is_asked_again_when_it_is_back(mesh: Mesh) -> None:
    alice, bob = pair(mesh)
    bob.runner = never
    call = compute(alice, deadline_s=600)
    mesh.run(1)
    mesh.cut(alice, bob)
    mesh.run(100)
    view = alice.task(call)
    assert view["state"] == "reassigned"
    lost = view["attempts"][0]
    assert lost["state"] == "lost" and lost["reason"] == "no word from bob for 30 s"
    assert lost["started_at"] < lost["ended_at"] < view["deadline"] and lost["escrow"]["state"] == "locked"
    bob.runner = echo
    mesh.link(alice, bob)
    mesh.run(20)
    view = alice.task(call)
    assert view["state"] == "settled"
    assert [a["state"] for a in view["attempts"]] == ["waived", "done"]
    assert view["attempts"][0] == {
        **lost,
        "state": "waived",
        "escrow": {**lost["escrow"], "state": "refunded"},
    }


def test_a_hand_back_of_an_attempt_that_lost_its_slot_moves_nothing(mesh: Mesh) -> None:
    alice, bob, carol = three(mesh)
    bob.runner = carol.runner = never
    compute(alice, deadline_s=900)
    mesh.run(1)
    silent = bob if bob.runs else carol
    mesh.fate = silence(("Progress", "Waiver"), silent)
    mesh.run(35)
    assert [a.paying for a in only(alice).attempts] == [False, True]
    mesh.fate = lambda *_: 1
    mesh.run(70)
    task = only(alice)
    assert task.state == "executing" and len(task.attempts) == 2 and task.attempts[0].refunded
    working = carol if silent is bob else bob
    working.feed(echo(working, working.runs[0]))
    mesh.run(5)
    assert only(alice).state == "settled"


def test_an_own_machine_that_goes_silent_ends_without_a_line(mesh: Mesh) -> None:
    alice = mesh.found("alice", **{"market.self": "never"})
    attic = mesh.join(alice, "attic", ring="own")
    mesh.link_all()
    mesh.run(2)
    attic.runner = never
    shell(alice, ring="own", deadline_s=60)
    mesh.run(1)
    assert attempt(alice).lock_seq == -1 and attempt(alice).state == "accepted"
    mesh.fate = silence(("Progress", "Waiver", "Reject", "Ack"), attic)
    mesh.run(50)
    alice.restart()
    mesh.run(600)
    assert only(alice).state == "failed"
    mesh.fate = lambda *_: 1
    attic.feed(failing(attic, attic.runs[0]))


# --- refusals and hand-backs


def test_a_refusal_moves_the_slot_even_with_retries_0(mesh: Mesh) -> None:
    alice, bob, carol = three(mesh)
    mesh.fate = silence(("Winner", "EscrowLock"), alice)
    shell(alice)
    mesh.run(1)
    shy = next(member for member in (bob, carol) if member.peer == attempt(alice).peer)
    shy.feed(e.CapacityChanged(("compute",), (), 4, 2**32, 0))  # no shell for members any more
    mesh.fate = lambda *_: 1
    mesh.run(30)
    task = only(alice)
    assert task.state == "settled" and [a.state for a in task.attempts] == ["rejected", "done"]
    assert task.attempts[0].reason == "policy" and not shy.runs


@pytest.mark.parametrize(("retries", "state"), [(0, "failed"), (2, "settled")])
def test_a_run_that_fails_hands_the_line_back(mesh: Mesh, retries: int, state: str) -> None:
    alice, bob, carol = three(mesh)
    runs: list[e.Run] = []

    def first_fails(member: Member, run: e.Run) -> e.TaskExited | None:
        runs.append(run)
        return failing(member, run) if len(runs) == 1 else echo(member, run)

    bob.runner = carol.runner = first_fails
    compute(alice, retries=retries)
    mesh.run(5)
    task = only(alice)
    assert task.state == state
    if state == "failed":
        assert task.error_code == "executor_lost" and attempt(alice).escrow == "refunded"
    assert attempt(alice).state == "waived" and attempt(alice).refunded


# --- cancelling


def cancel(mesh: Mesh, member: Member) -> None:
    member.call("task.cancel", task=only(member).task_id.hex())
    mesh.settle()


def test_cancel_before_the_award(mesh: Mesh) -> None:
    alice, bob = pair(mesh)
    mesh.fate = silence(("Bid", "Decline"), bob)
    compute(alice)
    mesh.settle()
    cancel(mesh, alice)
    assert only(alice).state == "cancelled" and not only(alice).attempts
    mesh.fate = lambda *_: 1


def test_cancel_while_inputs_are_fetched(mesh: Mesh) -> None:
    alice, bob = pair(mesh)
    alice.packed["/in"] = b"some bytes"
    mesh.fetching = False
    compute(alice, inputs=[{"name": "in", "path": "/in"}])
    mesh.run(1)
    assert [job.state for job in bob.node.rooms.jobs.jobs.values()] == ["fetching"]
    cancel(mesh, alice)
    mesh.run(1)
    assert attempt(alice).state == "waived" and attempt(alice).refunded
    assert not alice.blobs and not bob.blobs


def metered(member: Member, job: bytes) -> e.TaskExited:
    run = next(run for run in member.runs if run.job == job)
    plain = bundle.encode(bundle.Bundle(None, 9, b"half", b"", "", bundle.Usage(1.0, 1.0, 1024)))
    sealed = bundle.seal(plain, run.spec.seal_key, member.entropy)
    return e.TaskExited(job, "cancelled", "", None, 9, sealed, blob_id(sealed), len(sealed), bytes(32), 4, 1.0, 1.0, 0)


def test_cancel_during_the_run_pays_the_metered_part_at_most(mesh: Mesh) -> None:
    alice, bob = pair(mesh, **{"market.rates.task": "1"})
    bob.runner, bob.stopper = never, metered
    before = spent(mesh, alice)
    compute(alice)
    mesh.run(1)
    cancel(mesh, alice)
    mesh.run(2)
    first = attempt(alice)
    assert only(alice).state == "cancelled" and first.state == "done"
    assert 0 < first.released_ucr <= first.price_ucr
    assert before - spent(mesh, alice) == pytest.approx(first.released_ucr / CREDIT)


def test_cancel_during_the_run_costs_nothing_without_a_part(mesh: Mesh) -> None:
    alice, bob = pair(mesh)
    before = spent(mesh, alice)
    bob.runner = never
    compute(alice)
    mesh.run(1)
    cancel(mesh, alice)
    mesh.run(2)
    assert attempt(alice).state == "waived" and spent(mesh, alice) == before


def test_cancel_after_the_delivery_changes_nothing_of_the_pay(mesh: Mesh) -> None:
    alice, bob = pair(mesh)
    mesh.fate = lambda one, other, message: 0 if one is bob and type(message).__name__ == "Settlement" else 1
    compute(alice)
    mesh.run(1)
    assert only(alice).state == "delivered"
    cancel(mesh, alice)
    mesh.fate = lambda *_: 1
    mesh.run(30)
    assert only(alice).state == "cancelled" and claims(bob) == 1


@pytest.mark.parametrize("restarted", [False, True])
def test_cancel_of_an_award_that_never_arrived_frees_the_line(mesh: Mesh, restarted: bool) -> None:
    alice, bob = pair(mesh)
    mesh.fate = silence(("Winner", "EscrowLock"), alice)
    compute(alice)
    mesh.run(1)
    assert attempt(alice).state == "locked"
    cancel(mesh, alice)
    if restarted:
        alice.restart()
    mesh.fate = lambda *_: 1
    mesh.run(30)
    assert attempt(alice).state == "rejected" and attempt(alice).refunded and not bob.runs


def test_cancel_of_an_own_award_that_never_arrived(mesh: Mesh) -> None:
    alice = mesh.found("alice", **{"market.self": "never"})
    attic = mesh.join(alice, "attic", ring="own")
    mesh.link_all()
    mesh.run(2)
    mesh.fate = silence(("Winner",), alice)
    compute(alice, ring="own")
    mesh.run(1)
    cancel(mesh, alice)
    mesh.fate = lambda *_: 1
    mesh.run(10)
    assert attempt(alice).state == "rejected" and not attic.runs


# --- deadlines


@pytest.mark.parametrize("stage", ["bidding", "locked", "executing", "fetching", "delivered"])
def test_the_deadline_in_every_state(mesh: Mesh, stage: str) -> None:
    alice, bob = pair(mesh)
    lost: dict[str, tuple[str, ...]] = {
        "bidding": ("Bid", "Decline"),
        "locked": ("Winner", "EscrowLock"),
        "executing": (),
        "fetching": (),
        "delivered": ("Settlement", "LedgerPush"),
    }
    bob.runner = never if stage == "executing" else echo
    bob.inline_max = 0 if stage == "fetching" else bob.inline_max
    mesh.fetching = stage != "fetching"
    mesh.fate = silence(lost[stage], alice if stage == "locked" else bob)
    compute(alice, deadline_s=5, bid_timeout_s=60)
    mesh.run(1)
    if stage == "fetching":
        assert attempt(alice).state == "fetching"
    mesh.run(9)
    task = only(alice)
    assert task.state == ("delivered" if stage == "delivered" else "timed_out"), task.state
    mesh.fetching, mesh.fate = True, lambda *_: 1
    if stage == "fetching":
        alice.restart()
    mesh.run(60)
    assert only(alice).state == ("settled" if stage == "delivered" else "timed_out")
    if stage in ("locked", "executing"):
        assert attempt(alice).refunded


def test_nothing_spins_while_a_key_is_withheld(mesh: Mesh) -> None:
    alice, bob = pair(mesh)
    lost = ("Settlement", "LedgerPush")
    mesh.fate = silence(lost, bob)
    compute(alice, deadline_s=5)
    mesh.run(10)
    turns = alice.turns
    mesh.run(60)
    assert alice.turns - turns < 60, "a timer fires again and again"
    mesh.run(2 * HOUR_S)
    task = only(alice)
    assert task.state == "failed" and "withholds" in task.error_text
    mesh.fate = lambda *_: 1
    mesh.run(2 * HOUR_S)
    assert attempt(alice).state == "done" and only(alice).result is not None


def test_refund_at_expiry_by_a_clock_that_was_moved(mesh: Mesh) -> None:
    alice, bob = pair(mesh)
    bob.runner = never
    shell(alice, deadline_s=60)
    mesh.run(1)
    mesh.cut(alice, bob)
    expiry_ms = attempt(alice).expiry_ms
    alice.skew_ms = expiry_ms - mesh.now_ms - 1
    mesh.run(0)
    assert not attempt(alice).refunded
    alice.skew_ms += 2
    mesh.run(0)
    assert attempt(alice).refunded and only(alice).state == "timed_out"
    alice.skew_ms = 0
    mesh.now_ms = expiry_ms
    mesh.link(alice, bob)
    bob.feed(failing(bob, bob.runs[0]))


def test_bytes_other_than_those_of_the_note_are_never_paid(mesh: Mesh) -> None:
    alice, bob = pair(mesh)

    def lying(member: Member, run: e.Run) -> e.TaskExited:
        good = echo(member, run)
        assert good is not None
        garbled = bytes(len(good.inline))
        return e.TaskExited(**{name: getattr(good, name) for name in good.__struct_fields__} | {"inline": garbled})

    bob.runner = lying
    compute(alice, deadline_s=60)
    mesh.run(5)
    assert attempt(alice).released_seq == -1 and not paid(mesh)
    mesh.run(600)
    assert attempt(alice).refunded and only(alice).state == "no_bids"
    assert attempt(alice).reason == "its result was refused: the bytes are not those named"
    assert "its result was refused: the bytes are not those named" in only(alice).error_text
    assert "attempt" in only(alice).error_text
