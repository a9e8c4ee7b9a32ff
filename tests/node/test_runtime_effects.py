"""Effects whose adapter raises: the node hears the failure that it knows of them, and nothing waits for their end."""

from __future__ import annotations

from typing import Any

import pytest

from clawnet.errors import ClawnetError, StorageFullError
from clawnet.wire import events as e
from clawnet.wire.fileevents import OutputsSaved, SaveOutputs
from clawnet.wire.messages import Ack
from tests.node.runtimekit import BLOB, BOB, JOB, TASK, World, call, effects, exited, make

FULL = StorageFullError("no room")


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return make(monkeypatch)


def breaks(world: World, *names: str, error: Exception | None = None) -> None:
    """These functions of executor, network and store raise what no adapter should."""

    def broken(*args: Any, **kwargs: Any) -> None:
        raise error or ValueError("secret words")

    for name in names:
        for port in (world, world.runtime.executor, world.store):
            if hasattr(port, name):
                setattr(port, name, broken)


def told(world: World, *wanted: e.Effect) -> list[Any]:
    """What the node hears after it asked for these, besides the call that made it ask."""
    world.feed(effects(1, *wanted))
    return [heard for heard in world.node.heard if not isinstance(heard, e.RpcCall)]


def test_a_run_that_cannot_be_started_has_failed(world: World) -> None:
    (ended,) = told(world, e.Run(JOB, "breaks"))
    assert isinstance(ended, e.TaskExited)
    assert (ended.job, ended.ended, ended.inline, ended.blob_bytes) == (JOB, "failed", b"", 0)
    assert world.event("runtime.effect_failed")["id"] in ended.reason
    assert "process" not in ended.reason, "what the system said stays in the log: the reason goes to the requester"


def test_a_run_that_could_not_be_started_is_not_waited_for_by_the_next_node(world: World) -> None:
    world.feed(effects(1, e.Run(JOB, "breaks")))
    world.start_effects = [e.Run(JOB, "again")]
    world.fail(FULL)
    assert world.told("run", "stop") == [("run", JOB, "again")]


def test_a_run_that_waited_for_an_earlier_one_and_cannot_be_started_has_failed(world: World) -> None:
    world.feed(effects(1, e.Run(JOB, "first")))
    world.start_effects = [e.Run(JOB, "breaks")]
    world.fail(FULL)
    world.feed(exited())
    assert [heard.ended for heard in world.node.heard if isinstance(heard, e.TaskExited)] == ["failed"]


def test_blobs_that_cannot_be_fetched_are_a_fault_of_this_machine(world: World) -> None:
    breaks(world, "fetch")
    (ready,) = told(world, e.Fetch(b"f", BOB, TASK, ((BLOB, 1),)))
    assert (type(ready), ready.request, ready.fault) == (e.BlobReady, b"f", e.STORAGE)
    assert "internal error" in ready.reason


def test_a_result_that_cannot_be_opened_is_a_fault_of_this_machine(world: World) -> None:
    breaks(world, "open_result")
    (opened,) = told(world, e.Open(b"o", None, b"", b"", 0))
    assert (type(opened), opened.request, opened.fault, opened.bundle) == (e.Opened, b"o", e.STORAGE, None)


@pytest.mark.parametrize(("error", "code"), [(ValueError("odd"), "internal"), (FULL, "storage_full")])
def test_inputs_that_cannot_be_packed_are_an_error_of_their_draft(world: World, error: Exception, code: str) -> None:
    breaks(world, "pack", error=error)
    (ready,) = told(world, e.PackInputs(b"p", ()))
    assert (type(ready), ready.request, ready.error["code"]) == (e.InputsReady, b"p", code)
    if isinstance(error, ClawnetError):
        assert ready.error["message"] == error.message


def test_rows_that_cannot_be_asked_for_are_none(world: World) -> None:
    breaks(world, "query", "query_later")
    loaded = told(world, e.Load((1,), "document", (TASK,)), e.Load((2,), "tasks_open", ()))
    assert loaded == [e.Loaded((1,), ()), e.Loaded((2,), ())]


def test_output_that_cannot_be_read_again_is_empty(world: World) -> None:
    breaks(world, "read_output")
    assert told(world, e.ReadOutput(JOB, 2, 7, 9)) == [e.OutputKept(JOB, 2, 7, b"")]


def test_a_call_whose_effect_fails_is_answered_and_the_node_hears_of_it(world: World) -> None:
    breaks(world, "dial")
    world.runtime.executor.save = world.dial  # type: ignore[method-assign]
    world.feed(call(7, "wait"), call(8, "wait"))
    dialled, saved = told(world, e.Dial(7, BOB, ()), SaveOutputs(8, BLOB, (), "/out", 0o77))[-2:]
    assert (type(dialled), dialled.call, dialled.peer) == (e.DialEnded, 7, BOB)
    assert (type(saved), saved.call, saved.error["code"]) == (OutputsSaved, 8, "internal")
    assert world.told("reply")[:2] == [("reply", 7, "internal"), ("reply", 8, "internal")]


def test_a_number_of_the_network_is_not_taken_for_a_call(world: World) -> None:
    breaks(world, "join_reply")
    world.feed(call(3, "wait"))
    world.feed(effects(1, e.JoinReply(3, None)))  # type: ignore[arg-type]
    assert world.told("reply") == [("reply", 1, "done")]


def test_who_still_waits_for_a_turn_is_told_too_when_the_node_leaves_its_mesh(world: World) -> None:
    world.feed(call(1, "wait"), call(2, "wait"))
    world.runtime.feed(call(3, "set", word="a"))
    world.runtime.retire(2)
    world.loop.run()
    assert world.journal == [("reply", 1, "not_permitted"), ("reply", 3, "not_permitted")]


def test_messages_that_cannot_be_sent_cost_no_other_effect(world: World) -> None:
    breaks(world, "send")
    world.feed(effects(1, e.Send(BOB, Ack(BLOB)), e.Run(JOB, "runs")))
    assert world.told("run", "reply") == [("run", JOB, "runs"), ("reply", 1, "done")]
    assert "secret words" in world.event("runtime.send_failed")["traceback"]
