"""Acceptance contracts between nodes: who judges what, who is paid, what each end tells, and whose fault it was."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from clawnet.identity.keys import verify
from clawnet.ledger import statements
from clawnet.market.records import Attempt, Task
from clawnet.wire import events as e
from clawnet.wire import verdict as v
from clawnet.wire.blobid import blob_id
from clawnet.wire.messages import Message, Waiver
from tests.node.meshkit import Member, Mesh
from tests.node.meshruns import Runner
from tests.node.outcomes import answer
from tests.node.trades import SELFLESS, claims, compute, laws, only, paid, pair, shell, three

GOOD = b"all is well"
HASH = "sha256:" + hashlib.sha256(GOOD).hexdigest()


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    built = Mesh()
    yield built
    built.run(2 * 3_600)
    laws(built)


def ends(text: bytes = GOOD, code: int = 0, *, honest: bool = True) -> Runner:
    """An executor whose runs all end like this."""
    return lambda member, run: answer(member, run, text, code, honest=honest)


def never(member: Member, run: e.Run) -> None:
    """A run that does not end by itself."""


def balance(mesh: Mesh, member: Member) -> int:
    mesh.settle()
    return member.node.rooms.books.book.view(member.account).available_ucr


def open_lines(member: Member) -> int:
    return member.node.rooms.books.book.view(member.account).open_lines


def attempt(member: Member, n: int = 0) -> Attempt:
    return only(member).attempts[n]


def outcomes(member: Member, other: Member) -> dict[str, int]:
    """What `member` has seen of `other`."""
    return dict(note.split(" ", 1)[::-1] for note in member.node.rooms.members.reputation.notes(other.peer))  # type: ignore[misc]


def seen(member: Member, call: int) -> list[tuple[str, str, str | None]]:
    return [(one["value"], one["outcome"], one["judged_by"]) for one in member.task(call)["acceptance"]]


# --- what passes


def test_what_passes_is_paid_and_shown_as_judged_here(mesh: Mesh) -> None:
    alice, bob = pair(mesh)
    bob.runner = ends()
    before = balance(mesh, bob)
    call = shell(alice, "x", accept=["exit:0", HASH, "test:true"])
    mesh.run(5)
    task = alice.task(call)
    assert (task["state"], task["error"], task["escrow"]["state"]) == ("settled", None, "claimed")
    shown = [("exit:0", "passed", "requester"), (HASH, "passed", "requester"), ("test:true", "passed", "executor")]
    assert seen(alice, call) == shown
    assert "not judged in this test" in task["acceptance"][2]["detail"]
    assert balance(mesh, bob) == before + attempt(alice).released_ucr > before
    assert outcomes(alice, bob) == {"settled": "1"}


def test_it_is_part_of_what_the_lock_holds(mesh: Mesh) -> None:
    alice, bob = pair(mesh)
    shell(alice, "x", accept=["exit:0"])
    mesh.run(5)
    (spec,) = [run.spec for run in bob.runs]
    assert [(one.kind, one.value) for one in spec.acceptance] == [("exit_code", b"0")]
    documents = {row[0]: row[-1] for row in alice.store.load_all("documents")}
    task = only(alice)
    assert b"exit_code" in documents[task.task_id]
    assert task.spec["accept"] == [{"kind": "exit_code", "text": "exit:0"}], "the row keeps the words alone"


def test_a_verifier_module_goes_along_and_is_no_file_of_the_task(mesh: Mesh) -> None:
    alice, bob = pair(mesh)
    capacity = e.CapacityChanged(("compute", "op:sort", "shell-execution", "wasm"), ("own", "member"), 4, 2**32, 0)
    bob.feed(capacity)
    mesh.run(1)
    alice.packed |= {"/x/v.wasm": b"\0asm module", "/in": b"b\na\n"}
    found: list[tuple[list[str], bytes]] = []

    def runner(member: Member, run: e.Run) -> e.TaskExited:
        module = run.spec.acceptance[0].module
        assert module is not None
        found.append(([item.name for item in run.spec.inputs], member.blobs[module.blob]))
        return answer(member, run, GOOD)

    bob.runner = runner
    spec = {"op": "sort", "op_args": {}, "inputs": [{"name": "in", "path": "/in"}]}
    compute(alice, accept=[{"wasm": "/x/v.wasm"}], **spec)
    mesh.run(5)
    assert found == [(["in"], b"\0asm module")]
    assert only(alice).state == "settled" and not alice.blobs and not bob.blobs


# --- what the executor finds to fail


def test_what_fails_at_its_executor_is_refunded_at_once_and_fails(mesh: Mesh) -> None:
    alice, bob = pair(mesh)
    bob.runner = ends(code=3)
    before, bobs = balance(mesh, alice), balance(mesh, bob)
    call = shell(alice, "x", accept=["exit:0", HASH])
    mesh.run(5)
    task = alice.task(call)
    assert (task["state"], task["error"]["code"], task["error"]["exit_code"]) == ("failed", "verification_failed", 80)
    assert "exit:0: exit code 3" in task["error"]["message"]
    assert seen(alice, call) == [("exit:0", "failed", "executor"), (HASH, "not_judged", None)]
    assert balance(mesh, alice) == before and balance(mesh, bob) == bobs
    assert open_lines(alice) == 0 and attempt(alice).escrow == "refunded" and not paid(mesh)
    assert task["attempts"][0]["reason"] == "contract: exit:0: exit code 3"
    why = alice.call("task.why", task=task["task_id"])
    mesh.settle()
    assert alice.replies[why]["attempts"][0]["reason"] == "contract: exit:0: exit code 3"


def test_that_is_nobodys_fault(mesh: Mesh) -> None:
    alice, bob = pair(mesh)
    score = alice.node.rooms.members.reputation.score(bob.peer, alice.now_ms).total
    bob.runner = ends(code=3)
    shell(alice, "x", accept=["exit:0"])
    mesh.run(5)
    assert outcomes(alice, bob) == {"task_fault": "1"}
    assert alice.node.rooms.members.reputation.score(bob.peer, alice.now_ms).total == pytest.approx(score)


def test_with_retries_left_the_slot_moves(mesh: Mesh) -> None:
    alice, bob, carol = three(mesh)
    ran: list[Member] = []

    def runner(member: Member, run: e.Run) -> e.TaskExited:
        ran.append(member)
        return answer(member, run, GOOD if len(ran) == 2 else b"wrong")

    bob.runner = carol.runner = runner
    before = balance(mesh, alice)
    call = compute(alice, accept=[HASH])
    mesh.run(10)
    task = only(alice)
    assert task.state == "settled" and [one.escrow for one in task.attempts] == ["refunded", "claimed"]
    assert [claims(member) for member in ran] == [0, 1] and list(paid(mesh).values()) == [1]
    assert balance(mesh, alice) == before - task.attempts[1].released_ucr
    assert seen(alice, call) == [(HASH, "passed", "requester")]
    assert alice.task(call)["attempts"][0]["reason"].startswith("contract: sha256:")


def test_when_all_fail_the_last_report_is_the_error(mesh: Mesh) -> None:
    alice, bob, carol = three(mesh)
    bob.runner = carol.runner = ends(b"wrong")
    before = balance(mesh, alice)
    call = compute(alice, accept=[HASH])
    mesh.run(30)
    task = alice.task(call)
    assert len(task["attempts"]) == 2 and {one["escrow"]["state"] for one in task["attempts"]} == {"refunded"}
    assert (task["state"], task["error"]["exit_code"]) == ("failed", 80)
    assert "nobody else takes the task" in task["error"]["message"]
    assert balance(mesh, alice) == before and not paid(mesh)


def test_the_retries_are_counted(mesh: Mesh) -> None:
    alice, bob, carol = three(mesh)
    bob.runner = carol.runner = ends(b"wrong")
    call = compute(alice, accept=[HASH], retries=0)
    mesh.run(30)
    task = alice.task(call)
    assert len(task["attempts"]) == 1 and (task["state"], task["error"]["exit_code"]) == ("failed", 80)


@pytest.mark.parametrize(
    "report",
    [b"", b"nonsense", v.encode_report([v.judged(0, "passed")]), v.encode_report([v.judged(7, "failed")])],
)
def test_a_report_of_nothing_is_its_senders_fault(mesh: Mesh, report: bytes) -> None:
    alice, bob = pair(mesh)
    bob.runner = lambda member, run: msgspec.structs.replace(ends(code=3)(member, run), report=report)
    before = balance(mesh, alice)
    call = shell(alice, "x", accept=["exit:0"])
    mesh.run(5)
    task = alice.task(call)
    assert (task["state"], task["error"]["exit_code"]) == ("failed", 76)
    assert outcomes(alice, bob) == {"failed": "1"} and balance(mesh, alice) == before


def test_a_task_without_a_contract_cannot_have_failed_one(mesh: Mesh) -> None:
    alice, bob = pair(mesh)
    report = v.encode_report([v.judged(0, "failed", "I say so")])
    bob.runner = lambda member, run: e.TaskExited(
        run.job, "contract", "", None, None, b"", b"", 0, bytes(32), 0, 0.0, 0.0, 0, report=report
    )
    call = shell(alice, "x")
    mesh.run(5)
    assert alice.task(call)["error"]["exit_code"] == 76 and outcomes(alice, bob) == {"failed": "1"}
    assert alice.task(call)["acceptance"] == []


def test_own_machines_keep_contracts_too(mesh: Mesh) -> None:
    alice = mesh.found("alice", **SELFLESS)
    other = mesh.join(alice, "other", ring="own")
    mesh.link_all()
    mesh.run(2)
    other.runner = ends(code=3)
    call = shell(alice, "x", accept=["exit:0"], ring="own")
    mesh.run(5)
    task = alice.task(call)
    assert (task["state"], task["error"]["exit_code"], task["escrow"]["state"]) == ("failed", 80, "none")
    other.runner = ends(code=3, honest=False)
    call = shell(alice, "y", accept=["exit:0"], ring="own")
    mesh.run(5)
    task = alice.task(call)
    assert (task["state"], task["error"]["exit_code"], task["result"]["exit_code"]) == ("settled", 80, 3)
    assert "nothing was paid" in task["error"]["hint"]


def test_what_this_node_ran_itself_is_judged_once(mesh: Mesh) -> None:
    alice = mesh.found("alice")
    mesh.run(1)
    alice.runner = ends()
    alice.judge = lambda acceptance, code, text: pytest.fail("again") if acceptance else ()
    call = shell(alice, "x", accept=[HASH], ring="own")
    mesh.run(2)
    assert alice.task(call)["state"] == "settled" and seen(alice, call) == [(HASH, "passed", "executor")]


# --- what the requester finds to fail


@pytest.mark.parametrize("inline_max", [2**19, 0])
def test_a_delivery_that_fails_was_paid_and_its_proof_is_kept(mesh: Mesh, inline_max: int) -> None:
    alice, bob = pair(mesh)
    bob.inline_max = inline_max
    bob.runner = ends(b"x" * 20_000, honest=False)
    call = shell(alice, "x", accept=["exit:0", HASH])
    mesh.run(5)
    task = alice.task(call)
    assert (task["state"], task["error"]["code"], task["error"]["exit_code"]) == ("settled", "verification_failed", 80)
    assert (task["escrow"]["state"], claims(bob)) == ("claimed", 1), "it was paid"
    assert "bob delivered what does not pass here" in task["error"]["message"]
    assert seen(alice, call) == [("exit:0", "passed", "requester"), (HASH, "failed", "requester")]
    assert task["result"]["stdout"] == "x" * 20_000
    assert [one["state"] for one in task["transitions"] if one["state"] in ("delivered", "verified", "settled")] == [
        "delivered",
        "verified",
        "settled",
    ]
    assert outcomes(alice, bob) == {"bad_result": "1"}
    score = alice.node.rooms.members.reputation.score(bob.peer, alice.now_ms)
    assert score.accuracy < 0.5 < score.completion
    check_proof(alice, only(alice))


def check_proof(member: Member, task: Task) -> None:
    """Note, sealed bytes, key and document are all still there, and go together."""
    one = next(attempt for attempt in task.attempts if attempt.key)
    note = statements.Note.verified_by_any(one.note, member.node.rooms.books.keys_of(one.account), verify)
    assert one.note and one.key and one.key_hash == hashlib.sha256(one.key).digest()
    rows = {row[1]: row[-1] for row in member.store.load_all("results") if row[0] == task.task_id}
    sealed = rows[one.n] if one.inline else member.blobs[one.blob]
    assert (len(sealed), blob_id(sealed)) == (note.ct_bytes, note.ct_hash)
    assert any(row[0] == task.task_id for row in member.store.load_all("documents"))


def test_a_verifier_that_comes_to_no_verdict_here_blames_nobody(mesh: Mesh) -> None:
    alice, bob = pair(mesh)
    bob.runner = ends()
    alice.judge = lambda acceptance, code, text: (v.judged(0, "broken", "it did not end"),) if acceptance else ()
    call = shell(alice, "x", accept=["test:true"])
    mesh.run(5)
    task = alice.task(call)
    assert (task["state"], task["error"]["exit_code"]) == ("settled", 80)
    assert seen(alice, call) == [("test:true", "broken", "requester")]
    assert outcomes(alice, bob) == {"task_fault": "1"}


def test_a_result_that_passes_leaves_no_sealed_bytes(mesh: Mesh) -> None:
    alice, bob = pair(mesh)
    bob.runner = ends()
    shell(alice, "x", accept=[HASH])
    mesh.run(5)
    assert not list(alice.store.load_all("results"))


# --- cancelled, late, restarted


def test_a_cancel_stops_what_judges(mesh: Mesh) -> None:
    alice, bob = pair(mesh)
    bob.runner = ends()
    alice.judge = lambda acceptance, code, text: None if acceptance else ()
    call = shell(alice, "x", accept=["test:sleep 1000"])
    mesh.run(5)
    assert alice.task(call)["state"] == "delivered" and len(alice.judging) == 1
    alice.call("task.cancel", task=alice.replies[call]["task_id"])
    mesh.run(5)
    task = alice.task(call)
    assert not alice.judging and task["state"] == "cancelled" and task["result"] is not None
    assert claims(bob) == 1 and open_lines(alice) == 0


def test_a_cancel_while_the_executor_judges_costs_nothing(mesh: Mesh) -> None:
    alice, bob = pair(mesh)
    bob.runner = never
    before = balance(mesh, alice)
    call = shell(alice, "x", accept=["test:sleep 1000"])
    mesh.run(5)
    alice.call("task.cancel", task=alice.replies[call]["task_id"])
    mesh.run(5)
    assert alice.task(call)["state"] == "cancelled" and bob.stops
    assert balance(mesh, alice) == before and open_lines(alice) == 0


def test_judging_begins_again_after_a_restart(mesh: Mesh) -> None:
    alice, bob = pair(mesh)
    bob.runner = ends(honest=False, text=b"wrong")
    judge = alice.judge
    alice.judge = lambda acceptance, code, text: None if acceptance else ()
    call = shell(alice, "x", accept=[HASH])
    mesh.run(5)
    name = alice.replies[call]["task_id"]
    alice.judging.clear()
    alice.judge = judge
    alice.restart()
    mesh.run(5)
    number = alice.call("task.get", task=name)
    mesh.settle()
    task = alice.replies[number]
    assert (task["state"], task["error"]["exit_code"]) == ("settled", 80)
    assert task["acceptance"][0]["outcome"] == "failed"


# --- who is asked, and what a liar of a requester sends


def test_nobody_gets_a_verifier_that_it_may_not_run(mesh: Mesh) -> None:
    alice, bob = pair(mesh)
    bob.feed(e.CapacityChanged(("compute", "op:primes", "shell-execution"), ("own",), 4, 2**32, 0))
    mesh.run(1)
    call = compute(alice, accept=["test:true"])
    mesh.run(5)
    assert alice.task(call)["state"] == "no_bids"
    call = compute(alice, accept=["exit:0"])
    mesh.run(5)
    assert alice.task(call)["state"] == "settled"
    bob.feed(e.CapacityChanged(("compute", "op:primes", "shell-execution"), ("own", "member"), 4, 2**32, 0))
    mesh.run(1)
    call = compute(alice, accept=["test:true"])
    mesh.run(5)
    assert alice.task(call)["state"] == "settled"


def test_a_contract_that_cannot_be_judged_is_rejected_with_its_waiver(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clawnet.market import contracts

    alice, bob = pair(mesh)
    before = balance(mesh, alice)
    monkeypatch.setitem(contracts._READERS, "exit", lambda *_: contracts.Accept("colour", "exit:0", b"red"))
    call = shell(alice, "x", accept=["exit:0"])
    mesh.run(5)
    assert not bob.runs and alice.task(call)["attempts"][0]["state"] == "rejected"
    assert balance(mesh, alice) == before and open_lines(alice) == 0


def test_a_verifier_of_a_ring_that_policy_refuses_is_rejected(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """A requester that leaves the need out of its offer, so that it is bid for."""
    from clawnet.market import contracts

    alice, bob = pair(mesh)
    monkeypatch.setattr(contracts, "needs", lambda found: [])
    bob.feed(e.CapacityChanged(("compute", "op:primes", "shell-execution"), ("own",), 4, 2**32, 0))
    mesh.run(1)
    call = compute(alice, accept=["test:true"])
    mesh.run(5)
    assert not bob.runs and alice.task(call)["attempts"][0]["reason"] == "policy"


# --- submissions


@pytest.mark.parametrize("accept", ["exit:x", ["sha256:1"], [{"schema": 3}], ["colour:red"], 5])
def test_a_bad_condition_is_refused_at_once(mesh: Mesh, accept: Any) -> None:
    alice, _ = pair(mesh)
    call = shell(alice, "x", accept=accept)
    mesh.settle()
    assert alice.replies[call]["exit_code"] == 65 and not list(alice.store.load_all("tasks"))


def test_a_schema_is_looked_at_before_the_task_is_accepted(mesh: Mesh) -> None:
    alice, _ = pair(mesh)
    asked: list[e.PackInputs] = []
    alice._do_packinputs = asked.append  # type: ignore[method-assign]
    call = shell(alice, "x", accept=[{"schema": {"type": "objct"}, "name": "s.json"}])
    mesh.settle()
    assert [one.schemas for one in asked] == [(("schema:s.json", b'{"type":"objct"}'),)]
    assert call not in alice.replies, "nothing is accepted before that"
    error = {"code": "bad_input", "message": "no schema", "hint": "", "exit_code": 65}
    alice.feed(e.InputsReady(asked[0].request, (), error))
    mesh.settle()
    assert alice.replies[call]["exit_code"] == 65


def test_another_contract_is_other_content_for_a_key(mesh: Mesh) -> None:
    alice, bob = pair(mesh)
    bob.runner = ends()
    first = shell(alice, "x", accept=[HASH], idempotency_key="k")
    mesh.run(5)
    same = shell(alice, "x", accept=["sha256:" + HASH[7:].upper()], idempotency_key="k")
    other = shell(alice, "x", accept=["exit:0"], idempotency_key="k")
    mesh.settle()
    assert alice.replies[same]["task_id"] == alice.replies[first]["task_id"] and not alice.replies[same]["created"]
    assert alice.replies[other]["exit_code"] == 65


def test_a_key_whose_task_failed_its_contract_is_free_again(mesh: Mesh) -> None:
    alice, bob = pair(mesh)
    bob.runner = ends(b"wrong")
    first = shell(alice, "x", accept=[HASH], idempotency_key="k")
    mesh.run(5)
    bob.runner = ends()
    again = shell(alice, "x", accept=[HASH], idempotency_key="k")
    mesh.run(5)
    assert alice.task(first)["error"]["exit_code"] == 80
    assert alice.replies[again]["created"] and alice.task(again)["state"] == "settled"


# --- killed at every turn


def as_shell(member: Member) -> int:
    return shell(member, "x", deadline_s=120, accept=["exit:0", HASH])


def as_compute(member: Member) -> int:
    return compute(member, deadline_s=120, accept=[HASH])


def deaf(sender: Member, receiver: Member, message: Message) -> int:
    """Every message once; a report twice."""
    return 2 if isinstance(message, Waiver) else 1


@pytest.mark.parametrize("mode", ["after", "power"])
@pytest.mark.parametrize("who", ["alice", "bob", "both"])
@pytest.mark.parametrize(("submit", "honest"), [(as_shell, True), (as_compute, True), (as_shell, False)])
@pytest.mark.parametrize("turn", range(1, 11))
def test_a_crash_after_any_turn_of_a_task_that_fails(turn: int, submit: Any, honest: bool, who: str, mode: str) -> None:
    mesh = Mesh(f"{turn}")
    alice, bob = pair(mesh)
    before = balance(mesh, alice)
    bob.runner = ends(b"wrong", honest=honest)
    mesh.fate = deaf
    submit(alice)
    for member in (alice, bob):
        if who in (member.name, "both"):
            member.crash_at = member.turns + turn
            member.crash_after_commit, member.power_cut = mode != "after", mode == "power"
    mesh.run(30)
    mesh.run(2 * 3_600)
    laws(mesh)
    if not list(alice.store.load_all("tasks")):
        return
    task = only(alice)
    if task.state == "settled":
        assert not honest and task.error_code == "verification_failed" and sum(paid(mesh).values()) == 1
        check_proof(alice, task)
    else:
        assert not paid(mesh) and balance(mesh, alice) == before and open_lines(alice) == 0
        assert task.state == "no_bids" or task.error_code in ("verification_failed", "executor_lost")
        assert task.error_code != "verification_failed" or honest
