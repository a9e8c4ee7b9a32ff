"""What every run cost, as its requester tells it: also of tries that failed, and within what is possible."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from clawnet import limits
from clawnet.execution import bundle
from clawnet.ledger.taskdoc import TaskDocument
from clawnet.node import jobs, taking
from clawnet.node.taking import payload_of
from clawnet.wire import events as e
from clawnet.wire.blobid import blob_id
from tests.node.meshkit import Member, Mesh
from tests.node.trades import compute, laws, pair, three


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    built = Mesh()
    yield built
    built.run(2 * 3_600)
    laws(built)


def breaks(member: Member, run: e.Run) -> e.TaskExited:
    """A run that ends without a result, after it had cost something."""
    return e.TaskExited(
        run.job, "memory_limit", "too much", None, None, b"", b"", 0, bytes(32), 77, 0.5, 0.25, 64 * limits.MIB
    )


def boasts(usage: bundle.Usage) -> Any:
    """A runner whose bundle and message claim this cost."""

    def run(member: Member, run: e.Run) -> e.TaskExited:
        plain = bundle.encode(bundle.Bundle(0, None, b"four", b"", "", usage))
        sealed = bundle.seal(plain, run.spec.seal_key, member.entropy) if run.spec.seal_key else plain
        return e.TaskExited(
            run.job,
            "exit",
            "",
            0,
            None,
            sealed,
            blob_id(sealed),
            len(sealed),
            bytes(32),
            2**62,
            1e9,
            1e9,
            2**62,
        )

    return run


def test_a_result_tells_what_went_in_and_came_out(mesh: Mesh) -> None:
    alice, _ = pair(mesh)
    alice.packed["/in"] = b"1 2 3"
    call = compute(alice, op="wordcount", op_args={}, inputs=[{"name": "in", "path": "/in"}])
    mesh.run(2)
    view = alice.task(call)
    usage, (attempt,) = view["result"]["usage"], view["attempts"]
    row = next(iter(alice.store.load_all("documents")))
    assert usage["bytes_in"] == len(row[-1]) + 5
    assert usage["bytes_out"] == len("wordcount") == usage["output_bytes"]
    assert (usage["cpu_s"], usage["memory_bytes_max"]) == (0.01, 1024)
    assert {**attempt["usage"]} == {name: usage[name] for name in attempt["usage"]}


def test_a_try_that_failed_tells_its_cost_too_and_one_that_never_ran_none(mesh: Mesh) -> None:
    alice, bob, carol = three(mesh)
    bob.runner = carol.runner = breaks
    call = compute(alice, retries=1)
    mesh.run(5)
    view = alice.task(call)
    assert view["state"] == "failed" and len(view["attempts"]) == 2
    for attempt in view["attempts"]:
        usage = attempt["usage"]
        assert (usage["duration_s"], usage["cpu_s"], usage["memory_bytes_max"]) == (0.5, 0.25, 64 * limits.MIB)
        assert usage["bytes_out"] == 77 and usage["bytes_in"] > 0
    bob.runner = lambda member, run: None
    carol.runner = bob.runner
    bob.stopper = carol.stopper = lambda member, job: None
    quiet = compute(alice, deadline_s=20)
    mesh.run(2)
    assert alice.task(quiet)["attempts"][0]["usage"] is None
    mesh.run(30)


def test_a_liar_is_believed_within_what_can_be(mesh: Mesh) -> None:
    alice, bob = pair(mesh)
    bob.runner = boasts(bundle.Usage(1e300, float("inf"), 2**63, 2**63, 0, "m" * 5_000, "f" * 5_000))
    call = compute(alice)
    mesh.run(2)
    view = alice.task(call)
    assert view["state"] == "settled"
    usage, (attempt,) = view["result"]["usage"], view["attempts"]
    for told in (usage, attempt["usage"]):
        assert told["duration_s"] < 60 and told["cpu_s"] < 60 * limits.PROCESSORS_MAX
        assert told["memory_bytes_max"] == limits.MEMORY_BYTES_MAX
        assert told["bytes_out"] == 4, "what came is counted here"


def test_a_cost_that_is_no_number_counts_as_none(mesh: Mesh) -> None:
    alice, bob = pair(mesh)
    bob.runner = boasts(bundle.Usage(float("nan"), float("nan"), 0))
    call = compute(alice)
    mesh.run(2)
    assert alice.task(call)["result"]["usage"]["cpu_s"] == 0


def test_the_executor_tells_what_it_did_for_whom(mesh: Mesh) -> None:
    alice, bob, carol = three(mesh)
    first = compute(alice, peer=["bob"])
    mesh.run(5)
    bob.runner = breaks
    second = compute(alice, peer=["bob"])
    mesh.run(5)

    def jobs(member: Member, **params: Any) -> Any:
        number = member.call("job.list", **params)
        mesh.settle()
        return member.replies[number]

    failed, done = jobs(bob)["items"]
    assert (done["task_id"], done["state"]) == (alice.replies[first]["task_id"], "done")
    assert done["requester"]["name"] == "alice" and done["earned"] == done["price"] == alice.task(first)["price"]
    assert done["usage"] == alice.task(first)["attempts"][0]["usage"], "both sides count the same"
    assert (failed["task_id"], failed["state"]) == (alice.replies[second]["task_id"], "waived")
    assert failed["reason"] == "memory_limit" and failed["earned"] == "0" and failed["usage"]["cpu_s"] == 0.25
    page = jobs(bob, limit=1)
    assert [item["state"] for item in page["items"]] == ["waived"]
    assert [item["state"] for item in jobs(bob, limit=1, after=page["next"])["items"]] == ["done"]
    assert jobs(carol) == {"items": [], "next": None} == jobs(alice)
    assert jobs(bob, after="x-y")["exit_code"] == 65


def test_what_a_task_asks_for_is_read_once_unless_it_is_long(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    alice, bob = pair(mesh)
    read: list[int] = []

    def counted(document: TaskDocument) -> dict[str, Any]:
        read.append(len(document.payload))
        return payload_of(document)

    monkeypatch.setattr(taking, "payload_of", counted)
    monkeypatch.setattr(jobs, "payload_of", counted)
    compute(alice)
    mesh.run(5)
    assert len(read) == len(bob.runs) == 1
    compute(alice, op="sha256", op_args={}, stdin_b64="eHh4" * (jobs.PAYLOAD_KEPT_BYTES // 3))
    mesh.run(5)
    assert len(read) == 3 and len(bob.runs) == 2
    assert not bob.node.rooms.jobs._payloads
