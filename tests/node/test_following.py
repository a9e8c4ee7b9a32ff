"""A follower gets every byte once and in order: after lost links, restarts, late arrivals, other attempts."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import pytest

from clawnet.execution import bundle
from clawnet.wire import events as e
from clawnet.wire.blobid import blob_id
from clawnet.wire.messages import Output
from tests.node.meshkit import Member, Mesh
from tests.node.trades import laws, only, pair, shell, three


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    built = Mesh()
    yield built
    built.run(7_200)
    laws(built)


def never(member: Member, run: e.Run) -> None:
    """A run that does not end by itself."""


def ends(member: Member, run: e.Run) -> None:
    """The run ends well; its result is what it wrote."""
    stdout, stderr = member.written[run.job]
    plain = bundle.encode(bundle.Bundle(0, None, bytes(stdout), bytes(stderr), "", bundle.Usage(1.0, 0.1, 1024)))
    sealed = plain if run.spec.seal_key is None else bundle.seal(plain, run.spec.seal_key, member.entropy)
    inline = sealed if len(sealed) <= member.inline_max else member.keep(sealed)
    size = len(stdout) + len(stderr)
    identifier = blob_id(sealed)
    member.feed(
        e.TaskExited(run.job, "exit", "", 0, None, inline, identifier, len(sealed), bytes(32), size, 1.0, 0.1, 1024)
    )


def running(mesh: Mesh, **spec: Any) -> tuple[Member, Member, e.Run]:
    """Bob runs a command of Alice's that ends when a test says so."""
    alice, bob = pair(mesh)
    bob.runner = never
    shell(alice, **spec)
    mesh.run(2)
    return alice, bob, bob.runs[0]


def follow(alice: Member, mesh: Mesh, **params: Any) -> int:
    call = alice.call("task.follow", task=only(alice).task_id.hex(), **params)
    mesh.settle()
    return call


def told(member: Member, call: int, stream: str = "stdout", place: int = 0) -> bytes:
    """What a follower was told of a stream, held against the offsets it was told."""
    found = b""
    for method, value in member.notes.get(call, []):
        if method == "task.place":
            found, place = b"", value[stream]
        elif method == "task.output" and value["stream"] == stream:
            data = value["data"].encode() if "data" in value else base64.b64decode(value["data_b64"])
            assert value["offset"] == place + len(found), "a hole or a repeat"
            found += data
    return found


def asks(member: Member) -> int:
    return sum(name == "Output" for _, name in member.sent)


def test_what_comes_while_nothing_is_lost_needs_no_question(mesh: Mesh) -> None:
    alice, bob, run = running(mesh)
    call = follow(alice, mesh)
    bob.write(run, b"one\n")
    bob.write(run, b"oops\n", 2)
    mesh.settle()
    assert (told(alice, call), told(alice, call, "stderr")) == (b"one\n", b"oops\n")
    bob.write(run, b"two\n")
    ends(bob, run)
    mesh.run(2)
    assert told(alice, call) == b"one\ntwo\n" and asks(alice) == 0
    assert alice.replies[call]["result"]["stdout"] == "one\ntwo\n"


def test_what_a_lost_link_took_is_sent_again(mesh: Mesh) -> None:
    alice, bob, run = running(mesh)
    call = follow(alice, mesh)
    bob.write(run, b"1\n")
    mesh.settle()
    mesh.fate = lambda one, other, message: 0 if isinstance(message, Output) else 1
    bob.write(run, b"2\n")
    mesh.settle()
    mesh.cut(alice, bob)
    mesh.settle()
    bob.write(run, b"3\n")
    mesh.settle()
    mesh.fate = lambda one, other, message: 1
    mesh.link(alice, bob)
    mesh.settle()
    assert told(alice, call) == b"1\n2\n3\n"
    bob.write(run, b"4\n")
    mesh.settle()
    assert told(alice, call) == b"1\n2\n3\n4\n"


def test_what_a_requester_could_not_use_is_not_sent(mesh: Mesh) -> None:
    alice, bob, run = running(mesh)
    bob.write(run, b"1\n")
    mesh.settle()
    mesh.cut(alice, bob)
    mesh.settle()
    bob.write(run, b"lost\n")
    mesh.link(alice, bob)
    mesh.settle()
    bob.sent.clear()
    bob.write(run, b"after a gap, and nobody follows\n")
    mesh.settle()
    assert asks(bob) == 0
    assert told(alice, follow(alice, mesh)) == b"1\nlost\nafter a gap, and nobody follows\n"


def test_a_question_that_is_lost_is_asked_again(mesh: Mesh) -> None:
    alice, bob, run = running(mesh)
    call = follow(alice, mesh)
    lost = [1, 1]
    mesh.fate = lambda one, other, message: 0 if isinstance(message, Output) and lost and lost.pop() else 1
    bob.write(run, b"lost ")  # and then the question that the next piece gives rise to
    bob.write(run, b"heard ")
    mesh.settle()
    assert told(alice, call) == b"" and not lost
    mesh.run(11)  # the next sign of life tells how much there is
    assert told(alice, call) == b"lost heard "


def test_a_late_follower_gets_what_the_memory_no_longer_holds(mesh: Mesh) -> None:
    alice, bob, run = running(mesh)
    first = follow(alice, mesh)
    pieces = [bytes([65 + n % 26]) * 65_535 + b"\n" for n in range(48)]
    for piece in pieces:
        bob.write(run, piece)
        mesh.settle()
    kept = alice.node.rooms.tasks.followers._previews[only(alice).task_id].streams[0]
    assert len(kept) == 2**20
    late = follow(alice, mesh)
    mesh.run(1)
    assert told(alice, first) == told(alice, late) == b"".join(pieces)
    bob.write(run, b"end\n")
    mesh.settle()
    assert told(alice, first).endswith(b"end\n") and told(alice, late).endswith(b"end\n")


def test_resending_is_bounded_in_bytes_a_second(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clawnet.limits.OUTPUT_RESENT_BYTES_PER_S", 2**19)
    alice, bob, run = running(mesh, stream=False)
    for _ in range(64):
        bob.write(run, bytes(65_536))
    mesh.settle()
    call = follow(alice, mesh)
    mesh.run(3)
    assert 2**20 <= len(told(alice, call)) <= 2**21
    mesh.run(8)
    assert len(told(alice, call)) == 2**22


def test_a_task_that_was_not_streamed_is_from_the_first_follower_on(mesh: Mesh) -> None:
    alice, bob, run = running(mesh, stream=False)
    bob.write(run, b"before ")
    mesh.settle()
    assert "Output" not in {name for _, name in bob.sent}
    call = follow(alice, mesh)
    assert told(alice, call) == b"before "
    bob.write(run, b"after")
    mesh.settle()
    assert told(alice, call) == b"before after"


def test_a_requester_that_was_killed_gets_the_missing_part(mesh: Mesh) -> None:
    alice, bob, run = running(mesh)
    call = follow(alice, mesh)
    bob.write(run, b"12")
    mesh.settle()
    before = told(alice, call)
    alice.restart()
    bob.write(run, b"34")
    mesh.settle()
    again = follow(alice, mesh, stdout=len(before), stderr=0, attempt=0)
    whole = follow(alice, mesh)
    bob.write(run, b"56")
    ends(bob, run)
    mesh.run(5)
    assert before + told(alice, again, place=2) == told(alice, whole) == b"123456"
    assert alice.replies[again]["state"] == "settled"


def test_from_the_end_means_from_now_on(mesh: Mesh) -> None:
    alice, bob, run = running(mesh)
    bob.write(run, b"old")
    mesh.settle()
    known = follow(alice, mesh, **{"from": "end"})
    alice.restart()
    bob.write(run, b" old")
    mesh.settle()
    unknown = follow(alice, mesh, **{"from": "end"})
    bob.write(run, b" new")
    ends(bob, run)
    mesh.run(5)
    assert told(alice, unknown) == b" new"
    place = next(value for method, value in alice.notes[unknown] if method == "task.place")
    assert place == {"attempt": 0, "stdout": 7, "stderr": 0, "again": False}
    assert told(alice, known) == b""
    ended = follow(alice, mesh, **{"from": "end"})
    assert told(alice, ended) == b"" and alice.replies[ended]["state"] == "settled"


def test_what_there_is_so_far_is_answered_at_once(mesh: Mesh) -> None:
    alice, bob, run = running(mesh)
    bob.write(run, b"so far")
    mesh.settle()
    alice.restart()
    mesh.settle()
    call = follow(alice, mesh, so_far=True)
    assert told(alice, call) == b"so far" and alice.replies[call]["state"] == "executing"
    mesh.cut(alice, bob)
    mesh.settle()
    bob.write(run, b", more")
    call = follow(alice, mesh, so_far=True)
    assert told(alice, call) == b"so far" and alice.replies[call]["state"] == "executing"
    mesh.link(alice, bob)


def test_another_attempt_is_told_and_begins_at_byte_0(mesh: Mesh) -> None:
    alice, bob, carol = three(mesh)
    bob.runner = carol.runner = never
    shell(alice, retries=1)
    mesh.run(2)
    first, second = (bob, carol) if bob.runs else (carol, bob)
    call = follow(alice, mesh)
    first.write(first.runs[0], b"of the first")
    mesh.settle()
    assert told(alice, call) == b"of the first"
    first.restart()
    mesh.run(5)
    run = second.runs[0]
    second.write(run, b"of the ")
    mesh.settle()
    mesh.settle()
    stale = follow(alice, mesh, stdout=5, stderr=0, attempt=0)
    second.write(run, b"second")
    ends(second, run)
    mesh.run(5)
    for one in (call, stale):
        place = [value for method, value in alice.notes[one] if method == "task.place"]
        assert place == [{"attempt": 1, "stdout": 0, "stderr": 0, "again": True}]
        assert told(alice, one, place=5 if one == stale else 0) == b"of the second"
    assert alice.replies[call]["result"]["stdout"] == "of the second"


def test_who_comes_back_after_the_end_is_told_that_the_result_is_anothers(mesh: Mesh) -> None:
    alice, bob, run = running(mesh)
    bob.write(run, b"whole")
    ends(bob, run)
    mesh.run(5)
    task_id = only(alice).task_id.hex()
    call = alice.call("task.follow", task=task_id, stdout=3, stderr=0, attempt=0)
    other = alice.call("task.follow", task=task_id, stdout=3, stderr=0, attempt=4)
    mesh.settle()
    assert told(alice, call, place=3) == b"le"
    assert told(alice, other) == b"whole" and alice.notes[other][0][1]["again"]


def test_no_preview_where_policy_forbids_it(mesh: Mesh) -> None:
    alice = mesh.found("alice", **{"market.self": "never"})
    bob = mesh.join(alice, "bob", credits_ucr=10**8, **{"market.preview": "own"})
    mesh.link_all()
    mesh.run(2)
    bob.runner = never
    shell(alice, ring="member")
    mesh.run(2)
    run = bob.runs[0]
    call = follow(alice, mesh)
    now = follow(alice, mesh, so_far=True)
    bob.write(run, b"sealed until paid")
    mesh.run(30)
    alice.restart()
    mesh.run(1)
    again = follow(alice, mesh)
    mesh.run(30)
    assert told(alice, call) == told(alice, again) == b"" and alice.replies[now]["state"] == "executing"
    assert "Output" not in {name for _, name in bob.sent}
    ends(bob, run)
    mesh.run(5)
    assert told(alice, again) == b"sealed until paid"


def test_nobody_else_may_ask(mesh: Mesh) -> None:
    alice, bob, carol = three(mesh)
    bob.runner = carol.runner = never
    shell(alice)
    mesh.run(2)
    worker, other = (bob, carol) if bob.runs else (carol, bob)
    worker.write(worker.runs[0], b"for Alice alone")
    mesh.settle()
    worker.sent.clear()
    ask = Output(only(alice).task_id, 0, 1, 0, b"")
    worker.feed(e.MessageIn(other.peer, bytes(16), ask))
    worker.feed(e.MessageIn(alice.peer, bytes(16), Output(bytes(16), 0, 1, 0, b"")))
    mesh.settle()
    assert not worker.sent


def test_a_lost_executor_that_speaks_again_is_followed_again(mesh: Mesh) -> None:
    alice, bob, run = running(mesh)
    call = follow(alice, mesh)
    bob.write(run, b"before ")
    mesh.settle()
    mesh.cut(alice, bob)
    mesh.run(40)
    assert alice.replies[call]["error"]["code"] == "executor_lost"
    again = follow(alice, mesh)
    assert again not in alice.replies
    bob.write(run, b"during ")
    mesh.link(alice, bob)
    mesh.run(11)
    assert told(alice, again) == b"before during " and not only(alice).shown_lost
    bob.write(run, b"after")
    ends(bob, run)
    mesh.run(5)
    assert told(alice, again) == b"before during after"
    assert alice.replies[again]["state"] == "settled" and alice.replies[again]["error"] is None
