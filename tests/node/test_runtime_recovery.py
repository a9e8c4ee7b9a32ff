"""The loop: order of effects, timers, the bound of the inbox, and how a node that fails is made again."""

from __future__ import annotations

import pytest

from clawnet import limits
from clawnet.errors import ClawnetError, ConfigError, StorageError, StorageFullError, UnreachableError
from clawnet.runtime import FAILURES_MAX, REST_MS
from clawnet.timers import TIMER_MS_MAX
from clawnet.wire import events as e
from clawnet.wire.messages import Ping, Pong
from tests.node.runtimekit import BLOB, BOB, JOB, ME, TASK, Entry, World, call, effects, exited, make, ping

FULL = StorageFullError("no room")


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return make(monkeypatch)


# --- the turn


def test_what_waits_is_one_turn_one_transaction_and_one_batch_a_peer(world: World) -> None:
    world.feed(call(1, "set", word="a"), call(2, "set", word="b"), ping(7))
    sent = Ping(1, world.loop.now_ms)
    assert world.journal == [
        ("commit", False, [("a", b"v"), ("b", b"v")]),
        ("send", BOB, [Pong(7, world.loop.now_ms), sent, sent]),
        ("reply", 1, "set"),
        ("reply", 2, "set"),
    ]
    assert (world.runtime.turns_total, world.runtime.stimuli_total) == (1, 3)


def test_every_effect_finds_its_adapter_in_the_order_asked(world: World) -> None:
    wanted = (
        e.Notify(1, "task.output", "x"),
        e.Run(JOB, "spec"),
        e.StopRun(JOB),
        e.PackInputs(b"p", ()),
        e.Open(b"o", None, b"", b"", 0),
        e.Fetch(b"f", BOB, TASK, ((BLOB, 1),)),
        e.GrantBlob(TASK, BOB, BLOB),
        e.ReadBlob(2, BLOB, 1, 3),
        e.Dial(0, BOB, ()),
        e.Dial(9, BOB, ()),
        e.Hangup(BOB, "enough"),
        e.JoinSend(1, BOB, (), None),  # type: ignore[arg-type]
        e.JoinReply(3, None),  # type: ignore[arg-type]
        e.Adopt(4, None, None),  # type: ignore[arg-type]
        e.Drained(),
        e.Log("info", "happened", {"n": 1}),
        e.Count("things_total", "label", 2),
    )
    world.feed(effects(1, *wanted))
    names = "notify run stop pack open fetch grant reply dial dial hangup join join_reply adopt drained reply"
    assert [entry[0] for entry in world.journal] == names.split()
    assert world.journal[7] == ("reply", 2, {"data_b64": "ZWxs", "size": 5, "eof": False})
    assert [entry[2] for entry in world.told("dial")] == [True, False]
    assert world.logs == [("info", "happened", {"n": 1})]
    assert world.counts == {("things_total", "label"): 2}


def test_every_kind_of_effect_is_known_to_the_loop(world: World) -> None:
    in_the_turn = {e.Put, e.Delete, e.Durable, e.Send}
    assert set(world.runtime._acts) | in_the_turn == set(e.Effect.__subclasses__())


def test_revoked_grants_leave_the_database_too(world: World) -> None:
    world.store.commit([e.Put("blob_grants", (TASK, BOB, BLOB)), e.Put("blob_grants", (b"u" * 16, BOB, BLOB))])
    world.feed(effects(1, e.RevokeBlobs(TASK)))
    assert [row[0] for row in world.store.load_all("blob_grants")] == [b"u" * 16]
    assert [entry[0] for entry in world.journal[-3:]] == ["commit", "revoke", "reply"]


def test_no_power_loss_brings_back_the_row_of_a_deleted_file(world: World) -> None:
    world.store.commit([e.Put("blob_grants", (TASK, BOB, BLOB))], durable=True)
    world.feed(effects(1, e.RevokeBlobs(TASK)))
    world.store.cut_power()
    assert list(world.store.load_all("blob_grants")) == []


def test_rows_asked_for_come_as_a_stimulus(world: World) -> None:
    world.store.commit([e.Put("documents", (TASK, b"doc")), e.Put("tasks", (TASK, "draft", 1, 1, "", b""))])
    world.feed(effects(1, e.Load((1,), "document", (TASK,)), e.Load((2,), "tasks_open", ()), e.Load((3,), "none", ())))
    loaded = [heard for heard in world.node.heard if isinstance(heard, e.Loaded)]
    assert {heard.request: heard.rows for heard in loaded} == {
        (1,): ((TASK, b"doc"),),
        (2,): ((TASK, "draft", 1, 1, "", b""),),
        (3,): (),
    }
    assert world.event("storage.read_failed")["query"] == "none"


# --- timers


def fired(world: World) -> list[Entry]:
    return [heard.key for heard in world.node.heard if isinstance(heard, e.TimerFired)]


def test_timers_fire_in_order_and_a_later_wake_replaces_an_earlier_one(world: World) -> None:
    now = world.loop.now_ms
    world.feed(effects(1, e.Wake(("c",), now + 300), e.Wake(("a",), now + 100), e.Wake(("b",), now + 200)))
    world.feed(effects(2, e.Wake(("a",), now + 250)))
    world.loop.advance(199)
    assert fired(world) == []
    world.loop.advance(51)
    assert fired(world) == [("b",), ("a",)]
    world.loop.advance(1_000)
    assert fired(world) == [("b",), ("a",), ("c",)]


def test_a_wake_in_the_past_fires_at_once_and_one_far_off_survives_a_jump_of_the_clock(world: World) -> None:
    now = world.loop.now_ms
    world.feed(effects(1, e.Wake(("past",), now - 5), e.Wake(("far",), now + 3_600_000)))
    world.loop.advance(0)
    assert fired(world) == [("past",)]
    world.loop.now_ms += 3_600_000
    world.loop.advance(TIMER_MS_MAX)
    assert fired(world) == [("past",), ("far",)]


def test_a_clock_that_is_set_back_puts_nothing_off(world: World) -> None:
    now = world.loop.now_ms
    world.feed(effects(1, e.Wake(("soon",), now + 10_000), e.Wake(("later",), now + 60_000)))
    hour_ms, clock = 3_600_000, world.loop.clock
    world.runtime._timers._clock = lambda: clock() - hour_ms
    world.loop.advance(20_000)
    assert fired(world) == [("soon",)], "at most as much later as it had waited when the clock was set"
    world.feed(effects(2, e.Wake(("new",), clock() - hour_ms + 1_000)))
    world.loop.advance(1_000)
    assert fired(world) == [("soon",), ("new",)]
    world.loop.advance(60_000)
    assert fired(world) == [("soon",), ("new",), ("later",)]


def test_replaced_timers_do_not_pile_up(world: World) -> None:
    now = world.loop.now_ms
    for n in range(20):
        world.feed(effects(n, *(e.Wake((k,), now + 10_000 + n) for k in range(200))))
    assert len(world.runtime._timers) <= 5 * 200 + 1_024
    world.loop.advance(20_000)
    assert len(fired(world)) == 200


# --- the bound of the inbox


def test_a_full_inbox_answers_calls_drops_messages_and_keeps_the_rest(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "INBOX_MAX", 1)
    monkeypatch.setattr(limits, "INBOX_OF_PEER_MAX", 1)
    calls = (call(4, "set", word="a"), call(5, "set", word="b"))
    for stimulus in (ping(1), ping(2), *calls, e.TimerFired(("t",)), exited(), ping(5, ME)):
        world.runtime.feed(stimulus)
    assert world.journal == [("reply", 5, "busy")]
    assert world.counts == {("messages_refused_total", "inbox_full"): 1}
    world.loop.run()
    assert world.heard()[:5] == ["MessageIn", "RpcCall", "TimerFired", "TaskExited", "MessageIn"]
    assert world.runtime.backlog == 0


# --- a commit that fails


def test_nothing_leaves_before_the_commit_nor_after_one_that_failed(world: World) -> None:
    world.fail(FULL, call(1, "set", word="lost"), effects(2, e.Put("meta", ("x", b"")), e.Run(JOB, "spec")))
    assert world.journal == [("reply", 1, "storage_full"), ("reply", 2, "storage_full")]
    assert (world.nodes, world.node.words) == (2, {})
    world.feed(call(3, "set", word="kept"))
    assert [entry[0] for entry in world.journal[2:]] == ["commit", "send", "reply"]
    assert world.node.words == {"kept": b"v"} == dict(world.store.load_all("meta"))
    assert world.failed == []


def test_calls_that_waited_are_told_when_their_node_is_gone(world: World) -> None:
    world.feed(call(1, "wait"), call(2, "wait"))
    world.feed(e.CallGone(2))
    world.fail(FULL, call(3, "set", word="a"))
    assert world.journal == [("reply", 3, "storage_full"), ("reply", 1, UnreachableError.code)]


def test_what_an_earlier_node_asked_for_does_not_reach_the_next(world: World) -> None:
    world.runtime.feed(effects(1, e.Wake(("old",), world.loop.now_ms + 5), e.Load((1,), "tasks_open", ())))
    world.runtime._turn()
    world.fail(FULL)
    world.loop.advance(1_000)
    assert world.nodes == 2
    assert world.heard() == []


def test_a_new_node_hears_first_who_is_connected(world: World) -> None:
    up = e.PeerUp(BOB, None, "addr", "tcp", True)  # type: ignore[arg-type]
    world.links = [up]
    world.store.fail_next = FULL
    world.runtime.feed(call(1, "set", word="a"))
    world.runtime._turn()
    world.feed(up, ping(4), e.Listening(()))
    assert world.heard() == ["PeerUp", "PeerUp", "MessageIn", "Listening"]


def test_runs_of_an_earlier_node_end_before_the_same_job_runs_again(world: World) -> None:
    world.feed(effects(1, e.Run(JOB, "first")))
    world.start_effects = [e.Run(JOB, "again")]
    world.fail(FULL)
    assert world.told("run", "stop") == [("run", JOB, "first"), ("stop", JOB)]
    world.feed(e.TaskOutput(JOB, 1, 0, b"old"), exited())
    assert world.told("run")[1:] == [("run", JOB, "again")]
    assert world.heard() == []
    world.feed(e.TaskOutput(JOB, 1, 0, b"new"), exited())
    assert world.heard() == ["TaskOutput", "TaskExited"]


def test_a_run_that_still_waits_for_an_earlier_one_can_be_stopped(world: World) -> None:
    world.feed(effects(1, e.Run(JOB, "first")))
    world.start_effects = [e.Run(JOB, "again")]
    world.fail(FULL)
    world.feed(effects(3, e.StopRun(JOB)))
    world.feed(exited())
    assert len(world.told("run")) == 1
    assert world.heard()[-1] == "TaskExited"


def test_a_node_that_cannot_write_its_first_rows_rests_and_tries_again(world: World) -> None:
    world.start_effects = [e.Put("meta", ("start", b"v")), e.Send(BOB, Ping(2, 0))]
    world.store.bytes_max = 0
    world.feed(call(1, "set", word="a"), ping(1))
    world.feed(call(2, "set", word="b"), ping(9))
    world.loop.advance(3 * REST_MS)
    assert world.told("send") == []
    assert world.told("reply") == [("reply", 1, "storage_full"), ("reply", 2, "storage_full")]
    assert world.nodes <= 6
    world.store.bytes_max = None
    world.loop.advance(REST_MS)
    assert world.told("commit", "send") == [("commit", False, [("start", b"v")]), ("send", BOB, [Ping(2, 0)])]
    world.feed(call(3, "set", word="c"))
    assert world.journal[-1] == ("reply", 3, "set")
    assert world.failed == []


def test_a_draining_daemon_does_not_wait_for_room(world: World) -> None:
    world.feed(e.Drain())
    world.fail(FULL)
    assert world.told("drained") == [("drained",)]
    assert world.heard() == ["Drain"]


def test_a_disk_that_keeps_failing_stops_the_daemon_but_a_full_one_does_not(world: World) -> None:
    for _ in range(2 * FAILURES_MAX):
        world.fail(FULL)
        world.store.fail_next = None
        world.loop.advance(REST_MS)
    assert world.failed == []
    world.feed(call(1, "set", word="a"))
    for _ in range(FAILURES_MAX):
        assert not world.runtime.stopped
        world.fail(StorageError("input/output error"))
    assert world.runtime.stopped
    assert "input/output error" in world.failed[0]
    sent = len(world.told("send"))
    world.feed(ping(1))
    assert len(world.told("send")) == sent


# --- a node with a defect


def test_a_call_that_trips_the_node_gets_an_id_and_the_others_their_answers(world: World) -> None:
    world.feed(call(1, "set", word="a"), call(2, "boom"), call(3, "set", word="b"))
    assert world.told("reply") == [("reply", 1, "set"), ("reply", 2, "internal"), ("reply", 3, "set")]
    assert world.node.words == {"a": b"v", "b": b"v"} == dict(world.store.load_all("meta"))
    defect = world.event("node.defect")
    assert defect["stimulus"] == "RpcCall(boom)"
    assert "a call that trips the node" in defect["traceback"]
    assert defect["id"]
    assert world.counts["defects_total", ""] == 1


def test_the_peer_whose_message_trips_the_node_is_dropped_and_no_other(world: World) -> None:
    world.feed(ping(1, "alice"), ping(666), ping(2, "carol"))
    assert world.told("hangup") == [("hangup", BOB)]
    assert [entry[1] for entry in world.told("send")] == ["alice", "carol"]
    assert world.event("node.defect")["stimulus"] == "MessageIn(Ping from bob)"


def test_peers_alone_cannot_stop_the_daemon(world: World) -> None:
    for _ in range(3 * FAILURES_MAX):
        world.feed(ping(666))
    assert world.failed == []
    assert len(world.told("hangup")) == 3 * FAILURES_MAX


def test_a_node_that_trips_over_itself_again_and_again_stops_the_daemon(world: World) -> None:
    for n in range(FAILURES_MAX):
        world.feed(call(n, "boom"))
    assert len(world.failed) == 1
    assert "a call that trips the node" in world.failed[0]


def test_a_second_entry_for_one_seq_is_a_defect_that_leaves_nothing(world: World) -> None:
    account = b"a" * 32
    world.store.commit([e.Put("entries", (account, 1, b"first", b"raw"))])
    world.feed(effects(1, e.Durable(), e.Put("entries", (account, 1, b"other", b"raw")), e.Send(BOB, Ping(1, 0))))
    assert world.told("send") == []
    assert world.told("reply") == [("reply", 1, "internal")]
    assert world.event("node.defect")


def test_an_adapter_that_fails_costs_its_own_effect_alone(world: World) -> None:
    world.feed(effects(1, e.Run(JOB, "breaks"), e.Run(b"k" * 16, "fine"), e.Put("meta", ("a", b""))))
    assert [entry[0] for entry in world.journal] == ["commit", "run", "reply"]
    assert world.event("runtime.effect_failed")["stimulus"] == "Run"
    assert world.nodes == 1


@pytest.mark.parametrize("broken", [ConfigError("the mesh file is damaged"), KeyError("mesh")])
def test_a_node_that_cannot_be_made_ends_the_daemon(world: World, broken: Exception) -> None:
    world.broken = broken
    world.feed(call(1, "boom"))
    assert world.failed == [broken.message if isinstance(broken, ClawnetError) else repr(broken)]
    assert world.runtime.stopped


# --- crashes


class Crash(BaseException):
    """The process ends."""


class Ending(list[Entry]):
    """A journal of so many entries; at the next one the process ends."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def append(self, entry: Entry) -> None:
        if len(self) == self.limit:
            raise Crash
        super().append(entry)


@pytest.mark.parametrize("power", [True, False], ids=["power loss", "killed"])
@pytest.mark.parametrize("survive", range(9))
def test_what_was_said_before_a_crash_is_in_the_database_after_it(
    monkeypatch: pytest.MonkeyPatch, power: bool, survive: int
) -> None:
    world = make(monkeypatch)
    journal = world.journal = world.store.journal = Ending(survive)
    with pytest.raises(Crash):
        for n, method in enumerate(("set", "own", "set", "set")):
            world.feed(call(n, method, word=f"w{n}"))
    assert len(journal) == survive
    if power:
        world.store.cut_power()
    found = {row[0] for row in world.store.load_all("meta")}
    answered = {entry[1] for entry in journal if entry[0] == "reply"}
    # An own entry outlives the power; what was accepted outlives the process, and the power too once an entry follows.
    promised = {"w0", "own", "w2"} if not power else {"w0", "own"} if 1 in answered else set()
    assert {("w0", "own", "w2")[n] for n in answered if n < 3} & promised <= found
