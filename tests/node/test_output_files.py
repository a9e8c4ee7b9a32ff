"""Output files at the node: patterns travel with the task, results keep their files, task.save asks for them once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from clawnet import limits
from clawnet.errors import WireError
from clawnet.ledger.taskdoc import TaskDocument
from clawnet.market.records import decode_task
from clawnet.node.context import job_id
from clawnet.node.taking import payload_of
from clawnet.wire import events as e
from clawnet.wire.fileevents import Moved, OutputsSaved, SaveOutputs
from tests.node.meshkit import Member, Mesh

BLOB = b"\x07" * 32
LISTED = [{"name": "dist/x", "bytes": 3, "sha256": "ab" * 32}]


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    built = Mesh()
    yield built
    built.run(60)
    built.check()


def _pair(mesh: Mesh) -> tuple[Member, Member]:
    alice = mesh.found("alice", **{"market.self": "never"})
    bob = mesh.join(alice, "bob", credits_ucr=100_000_000)
    mesh.link_all()
    mesh.run(2)
    return alice, bob


def _submit(member: Member, **spec: Any) -> int:
    given = {"type": "shell", "argv": ["true"], "ring": "member", "outputs": ["dist/*"], **spec}
    return member.call("task.submit", spec=given)


def _with_files(member: Member) -> list[SaveOutputs]:
    """Results that this member opens have files, and what it asks to be saved is noted and not done."""
    asked: list[SaveOutputs] = []
    plain = member._do_open

    def open_result(effect: e.Open) -> None:
        before = len(member.inbox)
        plain(effect)
        opened = member.inbox[before]
        assert isinstance(opened, e.Opened)
        summary = msgspec.structs.replace(opened.bundle, outputs=LISTED, outputs_blob=BLOB, outputs_count=1,
                                          outputs_bytes=3, outputs_missing=["core"])  # fmt: skip
        member.inbox[before] = msgspec.structs.replace(opened, bundle=summary)

    member._do_open = open_result  # type: ignore[method-assign]
    member._do_saveoutputs = asked.append  # type: ignore[attr-defined]
    return asked


def test_the_executor_hears_the_patterns_and_the_smaller_bound(mesh: Mesh) -> None:
    alice, bob = _pair(mesh)
    _submit(alice, outputs=["dist/*", "x"])
    mesh.run(2)
    spec = bob.runs[0].spec
    assert (spec.outputs, spec.outputs_bytes_max) == (["dist/*", "x"], 2**31)
    _submit(alice, outputs=[])
    mesh.run(2)
    assert bob.runs[1].spec.outputs == []


def test_a_document_with_other_patterns_is_none() -> None:
    def read(**payload: Any) -> dict[str, Any]:
        return payload_of(TaskDocument("shell_task", msgspec.msgpack.encode(payload), [], [], 30, False, 0, bytes(32)))

    assert read(outputs=["a/*"], outputs_bytes_max=5)["outputs"] == ["a/*"]
    for payload in (
        {"outputs": "a"},
        {"outputs": [1]},
        {"outputs": ["../a"]},
        {"outputs": ["a"] * (limits.OUTPUT_GLOBS_MAX + 1)},
        {"outputs": ["a"], "outputs_bytes_max": -1},
        {"outputs": ["a"], "outputs_bytes_max": 2**60},
        {"outputs": ["a"], "outputs_bytes_max": "1"},
    ):
        with pytest.raises(WireError):
            read(**payload)


def test_a_result_keeps_its_files_and_they_are_saved_on_demand(mesh: Mesh) -> None:
    alice, _ = _pair(mesh)
    asked = _with_files(alice)
    call = _submit(alice)
    mesh.run(2)
    task = alice.task(call)
    result = task["result"]
    assert (result["outputs"], result["outputs_count"], result["outputs_missing"]) == (LISTED, 1, ["core"])
    held = {blob for granted in alice.grants.values() for _, blob in granted}
    assert BLOB in held
    save = alice.call("task.save", task=task["task_id"][:8], directory="/tmp/x", umask=0o022, progress=True)
    mesh.run(1)
    assert asked == [SaveOutputs(save, BLOB, ("dist/*",), "/tmp/x", 0o022, True)]
    alice.feed(Moved("saving", save, 1, 3))
    alice.feed(Moved("saving", 999, 1, 3))
    alice.feed(OutputsSaved(save, 1, 3))
    alice.feed(OutputsSaved(save, 1, 3))
    mesh.run(1)
    assert alice.notes[save] == [("task.progress", {"what": "saving", "done": 1, "total": 3})]
    assert alice.replies[save] == {"task_id": task["task_id"], "directory": "/tmp/x", "files": 1, "bytes": 3}
    again = alice.call("task.save", task=task["task_id"], directory="/tmp/x")
    mesh.run(1)
    alice.feed(OutputsSaved(again, 0, 0, {"code": "not_permitted", "message": "no", "hint": "", "exit_code": 77}))
    mesh.run(1)
    assert alice.replies[again]["exit_code"] == 77
    assert asked[1].umask == 0o077, "who says nothing gets private files"


def test_what_cannot_be_saved_is_said(mesh: Mesh) -> None:
    alice, bob = _pair(mesh)
    bob.runner = lambda member, run: None
    call = _submit(alice)
    mesh.run(2)
    task = alice.replies[call]["task_id"]
    calls = {
        alice.call("task.save", task=task, directory="/tmp/x"): 66,
        alice.call("task.save", task=task): 65,
        alice.call("task.save", task=task, directory=7): 65,
        alice.call("task.save", task=task, directory="/tmp/x\0"): 65,
        alice.call("task.save", task=task, directory="/tmp/x", umask=0o1777): 65,
        alice.call("task.save", task=task, directory="/tmp/x", umask="rw"): 65,
        alice.call("task.save", task="ff" * 16, directory="/tmp/x"): 66,
    }
    mesh.run(1)
    assert {number: alice.replies[number]["exit_code"] for number in calls} == calls
    alice.call("task.cancel", task=task)
    mesh.run(2)
    late = alice.call("task.save", task=task, directory="/tmp/x")
    mesh.run(1)
    assert alice.replies[late]["exit_code"] == 66


def test_a_task_that_left_none_is_saved_with_none(mesh: Mesh) -> None:
    alice, _ = _pair(mesh)
    call = _submit(alice)
    mesh.run(2)
    save = alice.call("task.save", task=alice.replies[call]["task_id"], directory="/tmp/x")
    mesh.run(1)
    assert alice.replies[save]["files"] == 0


def test_a_result_that_does_not_pass_is_not_saved(mesh: Mesh) -> None:
    alice, bob = _pair(mesh)

    def lies(effect: e.Open) -> None:
        alice.feed(e.Opened(effect.request, "its output 'evil' was not asked for"))

    alice._do_open = lies  # type: ignore[method-assign]
    call = _submit(alice)
    mesh.run(2)
    task = alice.task(call)
    assert (task["state"], task["error"]["exit_code"], task["escrow"]["state"]) == ("settled", 80, "claimed")
    save = alice.call("task.save", task=task["task_id"], directory="/tmp/x")
    mesh.run(1)
    assert alice.replies[save]["exit_code"] == 80
    assert alice.node.rooms.members.reputation.score(bob.peer, mesh.now_ms).accuracy < 0.5


def test_a_full_disk_here_is_no_fault_of_the_executor(mesh: Mesh) -> None:
    alice, bob = _pair(mesh)
    plain, tries = alice._do_open, 0

    def full(effect: e.Open) -> None:
        nonlocal tries
        tries += 1
        if tries < 4:
            alice.feed(e.Opened(effect.request, "the disk is full", fault=e.STORAGE))
        else:
            plain(effect)

    alice._do_open = full  # type: ignore[method-assign]
    call = _submit(alice)
    mesh.run(3)
    assert alice.task(call)["state"] == "delivered"
    mesh.run(60)
    assert (tries, alice.task(call)["state"], alice.task(call)["error"]) == (4, "settled", None)
    tries = -1_000
    late = _submit(alice)
    mesh.run(600)
    task = alice.task(late)
    assert (task["state"], task["error"]["code"]) == ("settled", "storage_full")
    assert tries == -1_000 + limits.FETCH_TRIES_MAX
    assert alice.node.rooms.members.reputation.score(bob.peer, mesh.now_ms).accuracy >= 0.5


def test_who_wants_to_hear_how_far_transfers_are_does(mesh: Mesh) -> None:
    alice, bob = _pair(mesh)
    bob.runner = lambda member, run: None
    call = _submit(alice)
    mesh.run(2)
    task = alice.replies[call]["task_id"]
    told = alice.call("task.follow", task=task, output=False, progress=True)
    silent = alice.call("task.follow", task=task, output=False)
    mesh.run(1)
    award = job_id(alice.node.ctx.me, bytes.fromhex(task), 0)
    name = bytes.fromhex(task) + (0).to_bytes(2, "big")
    found = alice.node.rooms.awards.of_about(name)
    alice.feed(Moved("uploading", award, 1, 9))
    alice.feed(Moved("uploading", bytes(16), 1, 9))
    alice.feed(Moved("fetching", b"result:" + name, 2, 9))
    alice.feed(Moved("fetching", b"result:" + bytes(18), 2, 9))
    alice.feed(Moved("packing", b"inputs:" + bytes(16), 2, 9))
    mesh.run(1)
    assert found is not None
    assert [value for method, value in alice.notes[told] if method == "task.progress"] == [
        {"what": "uploading", "done": 1, "total": 9},
        {"what": "fetching", "done": 2, "total": 9},
    ]
    assert not [method for method, _ in alice.notes.get(silent, []) if method == "task.progress"]
    alice.call("task.cancel", task=task)


def test_a_task_of_an_older_version_has_no_files(mesh: Mesh) -> None:
    alice, _ = _pair(mesh)
    call = _submit(alice)
    mesh.run(2)
    task_id = bytes.fromhex(alice.replies[call]["task_id"])
    task = alice.node.rooms.tasks.get(task_id)
    assert task is not None and task.result is not None
    for name in [name for name in task.result if name.startswith("outputs_")]:
        del task.result[name]
    old = decode_task(msgspec.msgpack.encode(task))
    assert alice.node.rooms.views.task(old)["result"]["outputs_count"] == 0


def test_the_same_content_is_known_with_other_words_about_what_git_ignores(mesh: Mesh) -> None:
    alice, _ = _pair(mesh)
    first = _submit(alice, idempotency_key="k")
    mesh.run(2)
    again, other = (
        _submit(alice, idempotency_key="k", gitignore=True),
        _submit(alice, idempotency_key="k", outputs=["other"]),
    )
    mesh.run(2)
    assert alice.replies[again]["task_id"] == alice.replies[first]["task_id"]
    assert alice.replies[other]["exit_code"] == 65
