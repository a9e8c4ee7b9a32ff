"""THE loop: inbox -> Node.step -> one transaction -> effects go out. Durable first, then speak.

When a turn cannot be committed, or a step raises, nothing of it leaves, and the node is made again from the database as
after a crash: the one way of recovery there is, and the one that is tried every day.
"""

from __future__ import annotations

import asyncio
import base64
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any

from clawnet.errors import (
    BusyError,
    ClawnetError,
    InternalError,
    NotFoundError,
    NotPermittedError,
    StorageError,
    StorageFullError,
    UnreachableError,
)
from clawnet.inbox import Inbox, describe
from clawnet.ports import BlobsPort, ExecutorPort, IpcPort, Item, NodeLike, Observer, StorePort, SwitchPort
from clawnet.storage.queries import is_quick
from clawnet.timers import Timers
from clawnet.undone import failing, internal
from clawnet.wire import events as e
from clawnet.wire.fileevents import SaveOutputs

REST_MS = 1_000
"""So long a node waits that could not even write what it owes at its start, for the disk was full."""
FAILURES_MAX = 8
FAILURES_WITHIN_MS = 10_000


class Runtime:
    """Feeds one node and performs what it asks for. Everything happens in one event loop's thread.

    `rebuild` makes a new node from the store after a commit failed or a step raised; `adopt` and `drained` are the
    daemon's. Nothing of a turn leaves before its transaction is committed.
    """

    def __init__(
        self,
        me: str,
        *,
        clock: Callable[[], int],
        store: StorePort,
        blobs: BlobsPort,
        executor: ExecutorPort,
        ipc: IpcPort,
        observer: Observer,
        rebuild: Callable[[], tuple[NodeLike, list[e.Effect]]],
        adopt: Callable[[e.Adopt], None],
        drained: Callable[[], None],
        fail: Callable[[str], None],
    ) -> None:
        self.me = me
        self.clock = clock
        self.store = store
        self.blobs = blobs
        self.executor = executor
        self.ipc = ipc
        self.observer = observer
        self._rebuild = rebuild
        self._adopt = adopt
        self._drained = drained
        self._fail = fail
        self.node: NodeLike
        self.switch: SwitchPort
        self.rotated: Callable[[e.Rotated], None]
        self.keep_mesh_key: Callable[[e.KeepMeshKey], None]
        self._loop = asyncio.get_running_loop()
        self._inbox = Inbox(me)
        self._scheduled = False
        self._timers = Timers(clock, lambda key: self.feed(e.TimerFired(key)), lambda: self.stopped)
        # Answers to what an earlier node asked for are of no use to the present one.
        self._generation = 0
        self._calls: set[int] = set()
        self._jobs: set[bytes] = set()
        # Jobs an earlier node had started, being stopped, each with the Run of the present node that waits for its end.
        self._stopping: dict[bytes, e.Run | None] = {}
        self.resting: ClawnetError | None = None
        self._draining = False
        self._full = False
        self._failures: deque[int] = deque(maxlen=FAILURES_MAX)
        self._reports = 0
        self.turns_total = 0
        self.stimuli_total = 0
        self.stopped = False
        self._acts: dict[type[e.Effect], Callable[[Any], None]] = {
            e.Reply: self._reply,
            e.Notify: lambda effect: self.ipc.notify(effect.call, effect.method, effect.value),
            e.Wake: self._wake,
            e.Run: self._run,
            e.StopRun: self._stop_run,
            e.ReadOutput: lambda effect: self.executor.read_output(effect),
            SaveOutputs: lambda effect: self.executor.save(effect),
            e.PackInputs: lambda effect: self.executor.pack(
                effect.request, effect.paths, effect.schemas, effect.gitignore
            ),
            e.Open: lambda effect: self.executor.open_result(effect),
            e.StopJudging: lambda effect: self.executor.stop_judging(effect.request),
            e.Fetch: self._fetch,
            e.GrantBlob: lambda effect: self.blobs.grant(effect.task_id, effect.peer, effect.blob),
            e.RevokeBlobs: lambda effect: self.blobs.revoke(effect.task_id),
            e.ReadBlob: self._read_blob,
            e.Load: self._load,
            e.Dial: lambda effect: self.switch.dial(effect.call, effect.peer, effect.addresses, keep=effect.call == 0),
            e.Hangup: lambda effect: self.switch.hangup(effect.peer, effect.reason),
            e.JoinSend: lambda effect: self.switch.join(effect.call, effect.inviter, effect.addresses, effect.ask),
            e.JoinReply: lambda effect: self.switch.join_reply(effect.call, effect.answer),
            e.Adopt: lambda effect: self._adopt(effect),
            e.KeepMeshKey: lambda effect: self.keep_mesh_key(effect),
            e.Succeeded: self._succeeded,
            e.Rotated: lambda effect: self.rotated(effect),
            e.Drained: lambda effect: self._drained(),
            e.Log: lambda effect: self.observer.log(effect.level, effect.event, effect.fields),
            e.Count: lambda effect: self.observer.count(effect.name, effect.label, effect.by),
        }

    # --- the inbox

    def feed(self, stimulus: e.Stimulus) -> None:
        """Takes a stimulus; the turn that handles it starts in this pass of the event loop.

        Local calls above their bound are answered "busy", messages above that of their peer or of all peers are dropped
        and counted; timers and completions always fit. Called in the loop's thread only.
        """
        if (self.resting is not None or not self._inbox.has_room(stimulus)) and self._refuse(stimulus):
            return
        kind = type(stimulus)
        if kind in _OF_RUNS and self._is_stale(stimulus):  # type: ignore[arg-type]
            return
        self._inbox.put(stimulus)
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._turn)

    def _refuse(self, stimulus: e.Stimulus) -> bool:
        if type(stimulus) is e.RpcCall:
            busy = BusyError("the daemon has more calls waiting than it takes", hint="try again in a moment")
            self.ipc.reply(stimulus.call, None, (self.resting or busy).as_dict())
            return True
        if type(stimulus) is e.MessageIn and stimulus.peer != self.me:
            self.observer.count("messages_refused_total", "inbox_full", 1)
            return True
        return False

    def _schedule(self) -> None:
        if not self._scheduled and self._inbox:
            self._scheduled = True
            self._loop.call_soon(self._turn)

    @property
    def backlog(self) -> int:
        """Stimuli that wait."""
        return len(self._inbox)

    @property
    def calls_waiting(self) -> int:
        """Local calls among them: their callers give no more while many wait."""
        return self._inbox.calls

    def _turn(self) -> None:
        """All that waits (at most INBOX_TURN_MAX), one transaction, one write a peer."""
        self._scheduled = False
        if self.stopped or self.resting is not None:
            return
        node = self.node
        now_ms = self.clock()
        out: list[e.Effect] = []
        handled: list[e.Stimulus] = []
        try:
            for stimulus in self._inbox.turn():
                handled.append(stimulus)
                kind = type(stimulus)
                if kind is e.RpcCall:
                    self._calls.add(stimulus.call)  # type: ignore[attr-defined]
                elif kind is e.CallGone:
                    self._calls.discard(stimulus.call)  # type: ignore[attr-defined]
                elif kind is e.Drain:
                    self._draining = True
                out += node.step(now_ms, stimulus)
            out += node.end_turn(now_ms)
        except Exception as error:  # noqa: BLE001 -- the one that names the stimulus, answers, and rebuilds or stops
            self._defect(error, handled)
        else:
            self.turns_total += 1
            self.stimuli_total += len(handled)
            self._perform(out, handled)
        self._schedule()

    # --- effects

    def perform(self, effects: list[e.Effect]) -> None:
        """Performs the effects of a node's start-up."""
        self._perform(effects, [])

    def _perform(self, out: list[e.Effect], handled: list[e.Stimulus]) -> None:
        rows: list[e.Put | e.Delete] = []
        sends: dict[str, list[Item]] = {}
        acts: list[e.Effect] = []
        durable = False
        for effect in out:
            kind = type(effect)
            if kind is e.Put or kind is e.Delete:
                rows.append(effect)  # type: ignore[arg-type]
            elif kind is e.Send:
                items = sends.get(effect.peer)  # type: ignore[attr-defined]
                if items is None:
                    items = sends[effect.peer] = []  # type: ignore[attr-defined]
                items.append((effect.message, effect.reply_to, effect.obligation))  # type: ignore[attr-defined]
            elif kind is e.Durable:
                durable = True
            else:
                if kind is e.RevokeBlobs:
                    # A file that is deleted does not come back with rows that a power loss undoes: they are synced.
                    durable = True
                    rows.append(e.Delete("blob_grants", (effect.task_id,)))  # type: ignore[attr-defined]
                acts.append(effect)
        if rows:
            try:
                self.store.commit(rows, durable)
            except InternalError as error:
                self._defect(error, handled)
                return
            except ClawnetError as error:
                self._commit_failed(error, handled)
                return
            self._full = False
        for peer, items in sends.items():
            if peer == self.me:
                self._loop_back(items)
            else:
                try:
                    self.switch.send(peer, items)
                except Exception as error:  # noqa: BLE001 -- one peer's messages lost must not lose the other effects
                    self.report("runtime.send_failed", peer, error)
        for effect in acts:
            self._act(effect)

    def _act(self, effect: e.Effect) -> None:
        try:
            self._acts[type(effect)](effect)
        except Exception as error:  # noqa: BLE001 -- the rows are durable: one effect lost must not lose the others
            self._effect_failed(effect, error)

    def _loop_back(self, items: list[Item]) -> None:
        """Messages to this node itself: the same rooms, without encoding."""
        for message, reply_to, obligation in items:
            self.feed(e.MessageIn(self.me, b"", message, reply_to, obligation))

    def _reply(self, effect: e.Reply) -> None:
        self._calls.discard(effect.call)
        self.ipc.reply(effect.call, effect.value, effect.error)

    def _run(self, effect: e.Run) -> None:
        if effect.job in self._stopping:
            self._stopping[effect.job] = effect
            return
        self._jobs.add(effect.job)
        self.executor.run(effect.job, effect.spec)

    def _stop_run(self, effect: e.StopRun) -> None:
        if self._stopping.get(effect.job) is not None:
            # It never began; what the node hears is the end of the earlier run.
            self._stopping.pop(effect.job)
        self.executor.stop(effect.job)

    def _is_stale(self, stimulus: e.TaskExited | e.TaskOutput | e.OutputKept) -> bool:
        """True for news of a run that an earlier node started; after its end the run that waited for it may begin."""
        job = stimulus.job
        if type(stimulus) is not e.TaskExited:
            return job in self._stopping
        self._jobs.discard(job)
        if job not in self._stopping:
            return False
        waiting = self._stopping.pop(job)
        if waiting is not None:
            self._act(waiting)
        return True

    def _succeeded(self, effect: e.Succeeded) -> None:
        self.blobs.succeeded(effect.old, effect.new)
        self.switch.hangup(effect.old, f"its node goes on as {effect.new}")

    def _fetch(self, effect: e.Fetch) -> None:
        known = [self.blobs.came_from(blob, size, effect.source) for blob, size in effect.blobs]
        if effect.peer == self.me or all(known):
            reason, fault = ("", "") if all(known) else ("a blob is missing from this node's store", e.STORAGE)
            self.feed(e.BlobReady(effect.request, reason, fault=fault))
            return
        self.switch.fetch(effect.request, effect.peer, effect.task_id, effect.blobs, effect.inline_max, effect.source)

    def _read_blob(self, effect: e.ReadBlob) -> None:
        try:
            size = self.blobs.size(effect.blob)
            data = self.blobs.read_at(effect.blob, effect.offset, effect.length)
        except ClawnetError as error:
            gone = effect.gone if isinstance(error, NotFoundError) else None
            self._reply(e.Reply(effect.call, None, gone or error.as_dict()))
            return
        eof = effect.offset + len(data) >= size
        self._reply(e.Reply(effect.call, {"data_b64": base64.b64encode(data).decode(), "size": size, "eof": eof}))

    def _load(self, effect: e.Load) -> None:
        if not is_quick(effect.query, effect.args):
            # `done` is called in the store's thread.
            generation, into_loop = self._generation, self._loop.call_soon_threadsafe

            def done(rows: list[tuple[Any, ...]] | ClawnetError) -> None:
                into_loop(self._loaded, generation, effect, rows)

            self.store.query_later(effect.query, effect.args, done)
            return
        rows: list[tuple[Any, ...]] | ClawnetError
        try:
            rows = self.store.query(effect.query, effect.args)
        except ClawnetError as error:
            rows = error
        self._loaded(self._generation, effect, rows)

    def _loaded(self, generation: int, effect: e.Load, rows: list[tuple[Any, ...]] | ClawnetError) -> None:
        if generation != self._generation:
            return
        if isinstance(rows, ClawnetError):
            self.observer.log("error", "storage.read_failed", {"query": effect.query, "reason": rows.message})
            rows = []
        self.feed(e.Loaded(effect.request, tuple(rows)))

    # --- timers

    def _wake(self, effect: e.Wake) -> None:
        if effect.at_ms == e.NEVER:
            self._timers.forget(effect.key)
        else:
            self._timers.set(effect.key, effect.at_ms)

    # --- what goes wrong

    def _commit_failed(self, error: ClawnetError, handled: list[e.Stimulus]) -> None:
        """Nothing of the turn leaves: its calls get the error, and the node is made again from what is durable."""
        self.observer.log("error", "storage.commit_failed", {"reason": error.message})
        self.observer.count("commits_failed_total", error.code, 1)
        if self._draining:
            # All that was promised is on the disk, and what cannot be written now is redone at the next start.
            self._drained()
        self._answer(handled, error)
        if isinstance(error, StorageFullError):
            # The first failure costs its turn alone; a disk that stays full must not make the node spin.
            in_a_row, self._full = self._full, True
            if in_a_row:
                self._rest(error)
                return
        elif self._too_often(error.message):
            return
        self._start_again([])

    def _defect(self, error: BaseException, handled: list[e.Stimulus]) -> None:
        """A step raised. What came in the turn is tried again one by one, so that only the culprit pays for it.

        Its traceback goes to the log under an id; its call is answered with that id, its peer is dropped.
        """
        if len(handled) > 1:
            self.observer.log("warn", "node.turn_repeated", {"stimuli": len(handled), "reason": repr(error)})
            self._start_again(handled)
            return
        stimulus = handled[0] if handled else None
        self._answer(handled, internal(self.report("node.defect", describe(stimulus), error)))
        if type(stimulus) is e.MessageIn and stimulus.peer != self.me:
            self.switch.hangup(stimulus.peer, "its message could not be handled")
        elif self._too_often(repr(error)):
            return
        self._start_again([])

    def _effect_failed(self, effect: e.Effect, error: Exception) -> None:
        """An adapter raised where it should have answered: neither its call nor the node must wait for ever."""
        identifier = self.report("runtime.effect_failed", type(effect).__name__, error)
        answer = error if isinstance(error, ClawnetError) else internal(identifier)
        call = getattr(effect, "call", 0)
        if call in self._calls and type(effect) is not e.JoinReply:  # whose number is the network's
            self._calls.discard(call)
            self.ipc.reply(call, None, answer.as_dict())
        stimulus = failing(effect, answer)
        if stimulus is not None:
            self.feed(stimulus)

    def report(self, event: str, about: str, error: BaseException) -> str:
        """Logs and counts a defect with its traceback; returns the id under which the log has it."""
        self._reports += 1
        identifier = f"{self.clock():x}-{self._reports:x}"
        story = "".join(traceback.format_exception(error))
        self.observer.log("error", event, {"id": identifier, "stimulus": about, "traceback": story})
        self.observer.count("defects_total", "", 1)
        return identifier

    def _answer(self, handled: list[e.Stimulus], error: ClawnetError) -> None:
        for stimulus in handled:
            if type(stimulus) is e.RpcCall and stimulus.call in self._calls:
                self._calls.discard(stimulus.call)
                self.ipc.reply(stimulus.call, None, error.as_dict())

    def _too_often(self, reason: str) -> bool:
        """Counts a failure of our own making; too many in a short time stop the daemon."""
        now_ms = self.clock()
        self._failures.append(now_ms)
        if len(self._failures) < FAILURES_MAX or now_ms - self._failures[0] >= FAILURES_WITHIN_MS:
            return False
        self.stopped = True
        self._fail(f"the node failed {FAILURES_MAX} times within {FAILURES_WITHIN_MS // 1000} seconds: {reason}")
        return True

    def _start_again(self, again: list[e.Stimulus]) -> None:
        """A node from the database. It learns first who is connected, then `again` one by one, then what waits."""
        self._generation += 1
        self._timers.clear()
        self._stopping.update(dict.fromkeys(self._jobs))
        for job in sorted(self._jobs):
            self.executor.stop(job)
        self._jobs.clear()
        waiting, self._inbox = self._inbox, Inbox(self.me)
        try:
            self.node, effects = self._rebuild()
        except StorageError as error:
            self._inbox = waiting
            self._rest(error)
            return
        except Exception as error:  # noqa: BLE001 -- a node that cannot be made is the end of the daemon
            self.report("node.cannot_start", "start", error)
            self.stopped = True
            self._fail(error.message if isinstance(error, ClawnetError) else repr(error))
            return
        if self._draining:
            self._inbox.put(e.Drain())
        if again:
            first, self._inbox = self._inbox, Inbox(self.me)
            self._inbox.put_alone(first)
            self._inbox.put_alone(stimulus for stimulus in again if type(stimulus) not in _OF_THE_OLD_NODE)
        for stimulus in waiting:
            if type(stimulus) not in _OF_THE_OLD_NODE:
                self._inbox.put(stimulus)
        renewed = {stimulus.call for stimulus in self._inbox if type(stimulus) is e.RpcCall}
        self._hang_up_calls(self._calls - renewed)
        self._calls &= renewed
        self._begin(effects)

    def _hang_up_calls(self, calls: set[int]) -> None:
        lost = UnreachableError(
            "the daemon had to begin again from its database; the tasks it has taken go on",
            hint="ask again: `clawnet market status` lists the tasks",
        ).as_dict()
        for call in sorted(calls):
            self.ipc.reply(call, None, lost)

    def retire(self, but: int) -> None:
        """This loop makes room for another: no further turn, runs end, who waits is told (but for the call `but`)."""
        self.stopped = True
        for job in sorted(self._jobs):
            self.executor.stop(job)
        left = NotPermittedError("this node has left its mesh for another one").as_dict()
        waiting = {stimulus.call for stimulus in self._inbox if type(stimulus) is e.RpcCall}
        for call in sorted((self._calls | waiting) - {but}):
            self.ipc.reply(call, None, left)
        self._calls.clear()

    def _begin(self, effects: list[e.Effect]) -> None:
        """Performs what the new node owes at its start; when the disk has no room for it, a rest and another try."""
        rows: list[e.Put | e.Delete] = [effect for effect in effects if isinstance(effect, e.Put | e.Delete)]
        durable = any(type(effect) is e.Durable for effect in effects)
        try:
            self.store.commit(rows, durable)
        except ClawnetError as error:
            if isinstance(error, StorageFullError) or not self._too_often(error.message):
                self._rest(error)
            return
        self._perform([effect for effect in effects if not isinstance(effect, e.Put | e.Delete | e.Durable)], [])
        self._schedule()

    def _rest(self, error: ClawnetError) -> None:
        """No turns for a while: what peers send is dropped, calls are answered with the error."""
        self.observer.log("error", "node.rests", {"reason": error.message})
        self.resting = error
        self._loop.call_later(REST_MS / 1000, self._wake_up)

    def _wake_up(self) -> None:
        self.resting = None
        if not self.stopped:
            self._start_again([])


# Rows and timers that an earlier node asked for, news of its runs, and of links that the new one is told afresh.
_OF_RUNS = frozenset((e.TaskExited, e.TaskOutput, e.OutputKept))
_OF_THE_OLD_NODE = _OF_RUNS | {e.Loaded, e.PeerUp, e.PeerDown, e.Drain, e.TimerFired}
