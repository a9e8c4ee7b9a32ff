"""The loop with a small node on the real store and on its twin: durable first, and what a failure may cost."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from clawnet import limits, runtime
from clawnet.errors import InternalError, NotFoundError
from clawnet.storage.memory import MemoryStore
from clawnet.storage.store import Store
from clawnet.wire import events as e
from tests.node.tallykit import BAD, GOOD, ME, NOW_MS, OTHER, PEER, House, Tally, play


@pytest.fixture(autouse=True)
def short_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "REST_MS", 20)


@pytest.fixture(params=["sqlite", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store | MemoryStore]:
    opened: Store | MemoryStore = Store.open(tmp_path / "clawnet.db") if request.param == "sqlite" else MemoryStore()
    yield opened
    opened.close()


def test_nothing_leaves_before_its_commit(store: Store | MemoryStore) -> None:
    async def test(house: House) -> None:
        house.call(add=5, effects=[e.Send(PEER, GOOD), e.Notify(1, "m", 1), e.Run(b"j", None)])
        await house.settle()

    house = play(store, test)
    assert house.story[0] == ("commit", 1, True)
    assert house.story[1:] == [("send", PEER, ["Ack"]), ("notify", 1, "m", 1), ("run", b"j"), ("reply", 1, 5)]


def test_what_waits_is_one_transaction_and_one_write_a_peer(store: Store | MemoryStore) -> None:
    async def test(house: House) -> None:
        for peer in (PEER, OTHER, PEER):
            house.hear(peer=peer)
        house.call(add=1)
        await house.settle()
        assert house.runtime.turns_total == 1

    house = play(store, test)
    assert house.story == [
        ("commit", 1, True),
        ("send", PEER, ["Ack", "Ack"]),
        ("send", OTHER, ["Ack"]),
        ("reply", 1, 4),
    ]
    assert house.total_on_disk() == 4


def test_a_turn_without_rows_is_no_transaction(store: Store | MemoryStore) -> None:
    async def test(house: House) -> None:
        house.call("read")
        await house.settle()

    assert play(store, test).story == [("reply", 1, 0)]


def test_a_full_disk_lets_nothing_leave_and_the_node_forgets_what_was_not_written(store: Store | MemoryStore) -> None:
    async def test(house: House) -> None:
        house.call(add=5)
        await house.settle()
        house.ports.full = True
        house.story.clear()
        house.call(add=7, effects=[e.Send(PEER, GOOD), e.Run(b"j", None)])
        await house.settle()
        await house.until(lambda: len(house.nodes) > 1)
        assert house.story == [("reply", 2, "storage_full")]
        assert house.node.total == house.total_on_disk() == 5
        house.ports.full = False
        house.call(add=1)
        await house.until(lambda: ("reply", 3, 6) in house.story or ("reply", 3, "storage_full") in house.story)

    house = play(store, test)
    assert "storage.commit_failed" in house.events()
    assert not house.failed


def test_a_disk_that_stays_full_does_not_spin(store: Store | MemoryStore) -> None:
    """A timer that is due writes; while it cannot, the node must not be made again without end."""

    async def test(house: House) -> None:
        house.ports.full = True
        house.start_effects = [e.Wake(("due",), NOW_MS)]
        house.node.dirty = True
        real_step = Tally.step

        def step(node: Tally, now_ms: int, stimulus: e.Stimulus) -> list[e.Effect]:
            node.dirty |= isinstance(stimulus, e.TimerFired)
            return real_step(node, now_ms, stimulus)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tally, "step", step)
            house.hear()
            for _ in range(300):
                await asyncio.sleep(0)
            assert len(house.nodes) < 20
            house.ports.full = False
            await house.until(lambda: any(kind == "commit" for kind, *_ in house.story))

    assert not play(store, test).failed


def test_a_call_left_open_by_the_old_node_is_answered(store: Store | MemoryStore) -> None:
    async def test(house: House) -> None:
        waiting = house.call("follow", mute=True)
        await house.settle()
        house.call("break")
        await house.until(lambda: len(house.nodes) > 1)
        assert [entry for entry in house.story if entry[:2] == ("reply", waiting)] == [("reply", 1, "unreachable")]

    play(store, test)


def test_a_defect_costs_its_call_and_no_other(store: Store | MemoryStore) -> None:
    async def test(house: House) -> None:
        for method in ("add", "break", "add"):
            house.call(method, add=1)
        house.hear()
        await house.settle()
        assert ("reply", 2, "internal") in house.story
        assert {entry[:2] for entry in house.story if entry[0] == "reply"} == {("reply", n) for n in (1, 2, 3)}
        assert all(isinstance(entry[2], int) for entry in house.story if entry[0] == "reply" and entry[1] != 2)
        assert not any(entry[0] == "hangup" for entry in house.story)
        assert house.node.total == house.total_on_disk() == 3

    house = play(store, test)
    (line,) = (line for line in house.log.lines if " node.defect " in line)
    assert "id=" in line and "ZeroDivisionError" in line and "RpcCall(break)" in line
    assert not house.failed


def test_a_message_that_breaks_the_node_costs_its_sender_the_link(store: Store | MemoryStore) -> None:
    async def test(house: House) -> None:
        house.hear(GOOD, OTHER)
        house.hear(BAD, PEER)
        house.hear(GOOD, OTHER)
        await house.settle()
        assert [entry for entry in house.story if entry[0] == "hangup"] == [("hangup", PEER)]
        assert house.total_on_disk() == 2

    assert not play(store, test).failed


def test_a_peer_cannot_stop_the_daemon_by_sending_it_often(store: Store | MemoryStore) -> None:
    async def test(house: House) -> None:
        for _ in range(30):
            house.hear(BAD)
        await house.settle()

    assert not play(store, test).failed


def test_a_node_that_fails_again_and_again_stops(store: Store | MemoryStore) -> None:
    async def test(house: House) -> None:
        for _ in range(20):
            house.call("break later", mute=True)
            for _ in range(5):
                await asyncio.sleep(0)
        await house.until(lambda: bool(house.failed))
        assert house.runtime.stopped

    house = play(store, test)
    assert len(house.failed) == 1 and "times" in house.failed[0]


def test_a_row_that_contradicts_the_database_is_a_defect(store: Store | MemoryStore) -> None:
    async def test(house: House) -> None:
        entry = ("entries", (b"A", 1))
        house.call(effects=[e.Put(entry[0], (*entry[1], b"hash", b""))])
        await house.settle()
        house.call(effects=[e.Put(entry[0], (*entry[1], b"another", b"")), e.Send(PEER, GOOD)])
        await house.settle()
        house.call("read")
        await house.settle()

    house = play(store, test)
    assert house.story == [("commit", 1, False), ("reply", 1, 0), ("reply", 2, "internal"), ("reply", 3, 0)]
    assert "node.defect" in house.events()


@pytest.mark.parametrize(("error", "code"), [(OSError("odd"), "internal"), (NotFoundError("gone"), "not_found")])
def test_an_effect_that_cannot_be_performed_stops_no_other(
    store: Store | MemoryStore, error: Exception, code: str
) -> None:
    async def test(house: House) -> None:
        house.ports.raises = error
        house.call(add=1, mute=True, effects=[e.Dial(1, PEER, ()), e.Run(b"j", None)])
        await house.settle()

    house = play(store, test)
    assert house.story == [("commit", 1, True), ("reply", 1, code), ("run", b"j")]
    assert len(house.nodes) == 1


def test_messages_to_oneself_come_back_in_the_next_turn(store: Store | MemoryStore) -> None:
    async def test(house: House) -> None:
        house.call(add=1, effects=[e.Send(ME, GOOD, b"r" * 16, b"o" * 16)])
        await house.settle()
        message = house.node.seen[-1]
        assert isinstance(message, e.MessageIn)
        assert (message.peer, message.reply_to, message.obligation) == (ME, b"r" * 16, b"o" * 16)
        assert message.message is GOOD

    house = play(store, test)
    assert house.story == [("commit", 1, True), ("reply", 1, 1), ("commit", 1, True)]


def fired(house: House) -> list[Any]:
    return [stimulus.key[0] for node in house.nodes for stimulus in node.seen if isinstance(stimulus, e.TimerFired)]


def test_timers_come_in_order_and_a_later_wake_replaces_an_earlier(store: Store | MemoryStore) -> None:
    async def test(house: House) -> None:
        wakes = [("c", 3), ("a", 1), ("b", 2), ("moved", 1), ("moved", 4), ("far", 10**9)]
        house.call(effects=[e.Wake((name,), NOW_MS + after) for name, after in wakes])
        house.call(effects=[e.Wake(("brought forward",), NOW_MS + 10**8), e.Wake(("brought forward",), NOW_MS)])
        await house.settle()
        house.now_ms += 100
        await house.until(lambda: "moved" in fired(house))
        assert fired(house) in (["brought forward", "a", "b", "c", "moved"],)

    play(store, test)


def test_a_timer_waits_for_the_wall_clock(store: Store | MemoryStore) -> None:
    async def test(house: House) -> None:
        house.call(effects=[e.Wake(("t",), NOW_MS + 2), e.Wake(("later",), NOW_MS + 50)])
        await house.settle()
        house.now_ms += 10
        await house.until(lambda: bool(fired(house)))
        assert fired(house) == ["t"]

    play(store, test)


def test_timers_of_the_old_node_do_not_reach_the_new_one(store: Store | MemoryStore) -> None:
    async def test(house: House) -> None:
        house.call(effects=[e.Wake(("old",), NOW_MS + 5)])
        await house.settle()
        house.start_effects = [e.Wake(("new",), NOW_MS + 6)]
        house.call("break")
        await house.settle()
        house.now_ms += 10
        await house.until(lambda: bool(fired(house)))
        assert fired(house) == ["new"]

    play(store, test)


def test_the_inbox_is_bounded_for_peers_and_clients_alone(
    store: Store | MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "INBOX_MAX", 3)
    monkeypatch.setattr(limits, "INBOX_OF_PEER_MAX", 3)

    async def test(house: House) -> None:
        for _ in range(5):
            house.hear()
        for _ in range(4):
            house.call(add=1)
        house.hear(peer=ME)
        house.runtime.feed(e.TaskOutput(b"j", 1, 0, b"x"))
        assert (house.runtime.backlog, house.runtime.calls_waiting) == (8, 3)
        assert house.story == [("reply", 4, "busy")]
        await house.settle()
        assert house.node.total == 7 and house.runtime.calls_waiting == 0

    play(store, test)


def test_a_long_queue_is_taken_in_several_turns(store: Store | MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "INBOX_TURN_MAX", 4)

    async def test(house: House) -> None:
        for _ in range(10):
            house.hear()
        await house.settle()
        assert (house.runtime.turns_total, house.runtime.stimuli_total) == (3, 10)

    assert play(store, test).total_on_disk() == 10


def test_rows_are_read_beside_the_loop(store: Store | MemoryStore) -> None:
    def loaded(house: House) -> list[e.Loaded]:
        return [stimulus for stimulus in house.node.seen if isinstance(stimulus, e.Loaded)]

    async def test(house: House) -> None:
        house.call(effects=[e.Put("tasks", (b"t" * 16, "executing", 1, 1, "", b"body"))])
        house.call(effects=[e.Load(("later", 1), "tasks_open", ()), e.Load(("now", 2), "task", (b"t" * 16,))])
        house.call(effects=[e.Load(("bad", 3), "task_by_prefix", ("no hex", 1))])
        await house.until(lambda: len(loaded(house)) == 3)
        answers = {one.request[0]: one.rows for one in loaded(house)}
        assert answers["later"] == answers["now"] == ((b"t" * 16, "executing", 1, 1, "", b"body"),)
        assert answers["bad"] == ()

    play(store, test)


def test_rows_asked_for_by_the_old_node_do_not_reach_the_new_one(store: Store | MemoryStore) -> None:
    async def test(house: House) -> None:
        house.call(effects=[e.Load(("old",), "tasks_open", ())])
        house.call("read")
        await house.until(lambda: ("reply", 2, 0) in house.story)
        house.call("break")
        await house.until(lambda: len(house.nodes) > 1)
        house.call(effects=[e.Load(("new",), "tasks_open", ())])
        await house.until(lambda: any(isinstance(one, e.Loaded) for one in house.node.seen))
        assert [one.request[0] for one in house.node.seen if isinstance(one, e.Loaded)] == ["new"]

    play(store, test)


def test_a_blob_is_read_piece_by_piece(store: Store | MemoryStore) -> None:
    async def test(house: House) -> None:
        for offset, length, blob in ((0, 4, b"blob"), (4, 100, b"blob"), (0, 1, b"none")):
            call = house.call(mute=True)
            house.runtime.perform([e.ReadBlob(call, blob, offset, length)])
        await house.settle()

    first, last, missing = (entry[2] for entry in play(store, test).story)
    assert first == {"data_b64": "MDEyMw==", "size": 10, "eof": False}
    assert last == {"data_b64": "NDU2Nzg5", "size": 10, "eof": True}
    assert missing == "not_found"


def test_blobs_that_are_here_are_not_fetched(store: Store | MemoryStore) -> None:
    async def test(house: House) -> None:
        for request, peer, blob in ((b"1", PEER, b"blob"), (b"2", ME, b"none"), (b"3", PEER, b"none")):
            house.runtime.perform([e.Fetch(request, peer, b"t" * 16, ((blob, 10),))])
        await house.settle()
        ready = [(one.request, bool(one.reason)) for one in house.node.seen if isinstance(one, e.BlobReady)]
        assert ready == [(b"1", False), (b"2", True)]

    assert [(entry[0], entry[1]) for entry in play(store, test).story] == [("fetch", b"3")]


def test_every_effect_has_its_performer(store: Store | MemoryStore) -> None:
    async def test(house: House) -> None:
        kinds = set(e.Effect.__subclasses__()) - {e.Put, e.Delete, e.Durable, e.Send}
        assert set(house.runtime._acts) == kinds

    play(store, test)


def exited(job: bytes, reason: str) -> e.TaskExited:
    return e.TaskExited(job, "cancelled", reason, None, None, b"", b"", 0, b"", 0, 0.0, 0.0, 0)


def test_what_the_old_node_had_started_is_stopped_before_the_new_one_starts_it_again(
    store: Store | MemoryStore,
) -> None:
    """The new node believes what the database says: nothing runs. It must not hear of the old run as of its own."""

    async def test(house: House) -> None:
        house.call(effects=[e.Run(b"again", None), e.Run(b"gone", None), e.Run(b"over", None)])
        await house.settle()
        house.runtime.feed(exited(b"over", "by itself"))
        await house.settle()
        house.story.clear()
        house.start_effects = [e.Run(b"again", None)]
        house.call("break")
        await house.until(lambda: len(house.nodes) > 1)
        await house.settle()
        assert sorted(entry for entry in house.story if entry[0] in ("stop", "run")) == [
            ("stop", b"again"),
            ("stop", b"gone"),
        ]
        house.runtime.feed(e.TaskOutput(b"again", 1, 0, b"old words"))
        for job in (b"again", b"gone"):
            house.runtime.feed(exited(job, "stopped"))
        await house.until(lambda: ("run", b"again") in house.story)
        house.runtime.feed(e.TaskOutput(b"again", 1, 0, b"new words"))
        house.runtime.feed(exited(b"again", "done"))
        await house.settle()
        heard = [one for one in house.node.seen if isinstance(one, e.TaskOutput | e.TaskExited)]
        about_again = [one for one in heard if one.job == b"again"]
        assert [type(one) for one in about_again] == [e.TaskOutput, e.TaskExited]
        assert isinstance(about_again[0], e.TaskOutput) and about_again[0].data == b"new words"

    play(store, test)


def test_a_run_that_waits_for_the_end_of_the_old_one_can_be_stopped(store: Store | MemoryStore) -> None:
    async def test(house: House) -> None:
        house.call(effects=[e.Run(b"j", None)])
        await house.settle()
        house.start_effects = [e.Run(b"j", None)]
        house.call("break")
        await house.until(lambda: len(house.nodes) > 1)
        house.call(effects=[e.StopRun(b"j")])
        await house.settle()
        house.runtime.feed(exited(b"j", "stopped"))
        await house.until(lambda: any(isinstance(one, e.TaskExited) for one in house.node.seen))
        assert [entry for entry in house.story if entry[0] == "run"] == [("run", b"j")]

    play(store, test)


def test_a_call_that_still_waits_is_handled_by_the_new_node(store: Store | MemoryStore) -> None:
    """Also when that node could not write what it owes at its start and had to be made twice."""

    async def test(house: House) -> None:
        house.start_effects = [e.Put("meta", ("started", b"1"))]
        house.call("break later", mute=True)
        house.call(add=1)
        house.ports.full = True
        await house.until(lambda: len(house.nodes) > 1)
        house.ports.full = False
        await house.until(lambda: len(replies(house, 2)) > 0)
        told = replies(house, 2)
        await house.settle()
        assert len(told) == 1
        assert house.node.total == (told[0] if isinstance(told[0], int) else 0)

    play(store, test)


def replies(house: House, call: int) -> list[Any]:
    return [entry[2] for entry in house.story if entry[:2] == ("reply", call)]


def test_messages_wait_while_the_disk_is_full(store: Store | MemoryStore) -> None:
    async def test(house: House) -> None:
        house.ports.full = True
        house.hear()
        await house.until(lambda: len(house.nodes) > 1)
        house.hear()
        house.ports.full = False
        await house.until(lambda: house.total_on_disk() > 0)

    assert play(store, test).total_on_disk() in (1, 2)


def test_the_timers_of_a_stopped_runtime_sleep(store: Store | MemoryStore) -> None:
    async def test(house: House) -> None:
        house.call(effects=[e.Wake(("t",), NOW_MS + 2)])
        await house.settle()
        house.runtime.stopped = True
        house.now_ms += 5
        house.runtime._timers.fire()
        assert house.runtime.backlog == 0

    play(store, test)


def test_a_stopped_runtime_takes_nothing_more(store: Store | MemoryStore) -> None:
    async def test(house: House) -> None:
        house.call(add=1)
        house.runtime.stopped = True
        house.hear()
        for _ in range(5):
            await asyncio.sleep(0)
        assert house.total_on_disk() == 0
        assert not any(kind in ("send", "commit") for kind, *_ in house.story)

    play(store, test)


def test_a_node_that_cannot_be_made_again_ends_the_daemon(store: Store | MemoryStore) -> None:
    async def test(house: House) -> None:
        def broken() -> tuple[Tally, list[e.Effect]]:
            raise InternalError("the database makes no sense")

        house.runtime._rebuild = broken
        house.call("break")
        await house.until(lambda: bool(house.failed))
        assert house.runtime.stopped

    assert play(store, test).failed == ["the database makes no sense"]
