"""THE loop: inbox -> Node.step -> one transaction -> effects go out. Durable first, then speak."""

from __future__ import annotations

import asyncio
import base64
import heapq
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from clawnet import limits
from clawnet.errors import ClawnetError, InternalError, StorageFullError
from clawnet.wire import events as e
from clawnet.wire.messages import Message

Item = tuple[Message, bytes | None, bytes | None]
"""A message, what it replies to, its obligation."""


class NodeLike(Protocol):
    """The node as the loop sees it."""

    def step(self, now_ms: int, stimulus: e.Stimulus) -> list[e.Effect]: ...
    def end_turn(self, now_ms: int) -> list[e.Effect]: ...


class StorePort(Protocol):
    """Where rows become durable."""

    def commit(self, rows: Sequence[e.Put | e.Delete], durable: bool = False) -> None: ...
    def query(self, name: str, args: tuple[Any, ...]) -> list[tuple[Any, ...]]: ...
    def query_later(self, name: str, args: tuple[Any, ...], done: Callable[[Any], None]) -> None: ...


class SwitchPort(Protocol):
    """The network."""

    def send(self, peer: str, items: list[Any]) -> bool: ...
    def dial(self, call: int, peer: str, addresses: Sequence[str], keep: bool = False) -> None: ...
    def hangup(self, peer: str, reason: str) -> None: ...
    def join(self, call: int, inviter: str, addresses: Sequence[str], ask: Any) -> None: ...
    def join_reply(self, call: int, answer: Any) -> None: ...
    def fetch(
        self, request: bytes, peer: str, task_id: bytes, blobs: Sequence[tuple[bytes, int]], inline_max: int = 0
    ) -> None: ...


class ExecutorPort(Protocol):
    """What runs tasks and touches files."""

    def run(self, job: bytes, spec: Any) -> None: ...
    def stop(self, job: bytes) -> None: ...
    def pack(self, request: bytes, paths: tuple[tuple[str, str], ...]) -> None: ...
    def open_result(self, effect: e.Open) -> None: ...


class IpcPort(Protocol):
    """The local socket."""

    def reply(self, call: int, value: Any, error: dict[str, Any] | None = None) -> None: ...
    def notify(self, call: int, method: str, value: Any) -> None: ...


class BlobsPort(Protocol):
    """Which blobs whom may fetch, and their bytes."""

    def grant(self, task_id: bytes, peer: str, blob: bytes) -> None: ...
    def revoke(self, task_id: bytes) -> None: ...
    def has(self, blob: bytes) -> bool: ...
    def size(self, blob: bytes) -> int: ...
    def read_at(self, blob: bytes, offset: int, length: int) -> bytes: ...


class Observer(Protocol):
    """Logs and counters."""

    def log(self, level: str, event: str, fields: dict[str, Any]) -> None: ...
    def count(self, name: str, label: str, by: int) -> None: ...


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
        self._loop = asyncio.get_running_loop()
        self._inbox: deque[e.Stimulus] = deque()
        self._scheduled = False
        self._timers: list[tuple[int, int, tuple[Any, ...]]] = []
        self._due: dict[tuple[Any, ...], tuple[int, int]] = {}
        self._timer_count = 0
        self._handle: asyncio.TimerHandle | None = None
        self._handle_ms = 0
        self._rebuilds: deque[int] = deque(maxlen=8)
        self.turns_total = 0
        self.stimuli_total = 0
        self.stopped = False
        self._acts: dict[type[e.Effect], Callable[[Any], None]] = {
            e.Reply: self._reply,
            e.Notify: self._notify,
            e.Wake: self._wake,
            e.Run: self._run,
            e.StopRun: lambda effect: self.executor.stop(effect.job),
            e.PackInputs: lambda effect: self.executor.pack(effect.request, effect.paths),
            e.Open: lambda effect: self.executor.open_result(effect),
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
            e.Drained: lambda effect: self._drained(),
            e.Log: lambda effect: self.observer.log(effect.level, effect.event, effect.fields),
            e.Count: lambda effect: self.observer.count(effect.name, effect.label, effect.by),
        }

    # --- the inbox

    def feed(self, stimulus: e.Stimulus) -> None:
        """Takes a stimulus; the turn that handles it starts in this pass of the event loop.

        Above INBOX_MAX local calls are answered "busy" and peers' messages are dropped and counted; timers and
        completions always fit.
        """
        if len(self._inbox) >= limits.INBOX_MAX and not self._make_room(stimulus):
            return
        self._inbox.append(stimulus)
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._turn)

    def _make_room(self, stimulus: e.Stimulus) -> bool:
        if type(stimulus) is e.RpcCall:
            error = ClawnetError("the daemon has more calls waiting than it takes", hint="try again in a moment")
            self.ipc.reply(stimulus.call, None, error.as_dict())
            return False
        if type(stimulus) is e.MessageIn and stimulus.peer != self.me:
            self.observer.count("messages_refused_total", "inbox_full", 1)
            return False
        return True

    @property
    def backlog(self) -> int:
        """Stimuli that wait."""
        return len(self._inbox)

    def _turn(self) -> None:
        """All that waits (at most INBOX_TURN_MAX), one transaction, one write a peer."""
        self._scheduled = False
        if self.stopped:
            return
        inbox, node = self._inbox, self.node
        now_ms = self.clock()
        out: list[e.Effect] = []
        handled: list[e.Stimulus] = []
        try:
            for _ in range(min(len(inbox), limits.INBOX_TURN_MAX)):
                stimulus = inbox.popleft()
                handled.append(stimulus)
                out += node.step(now_ms, stimulus)
            out += node.end_turn(now_ms)
        except Exception as error:  # the one broad except: names the stimulus, answers, rebuilds or stops
            self._defect(error, handled)
        else:
            self.turns_total += 1
            self.stimuli_total += len(handled)
            self._perform(out, handled)
        if inbox and not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._turn)

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
                acts.append(effect)
        if rows:
            try:
                self.store.commit(rows, durable)
            except ClawnetError as error:
                self._commit_failed(error, handled)
                return
        for peer, items in sends.items():
            if peer == self.me:
                self._loop_back(items)
            else:
                self.switch.send(peer, items)
        table = self._acts
        for effect in acts:
            table[type(effect)](effect)

    def _loop_back(self, items: list[Item]) -> None:
        """Messages to this node itself: the same rooms, without encoding."""
        for message, reply_to, obligation in items:
            self.feed(e.MessageIn(self.me, b"", message, reply_to, obligation))

    def _reply(self, effect: e.Reply) -> None:
        self.ipc.reply(effect.call, effect.value, effect.error)

    def _notify(self, effect: e.Notify) -> None:
        self.ipc.notify(effect.call, effect.method, effect.value)

    def _run(self, effect: e.Run) -> None:
        self.executor.run(effect.job, effect.spec)

    def _fetch(self, effect: e.Fetch) -> None:
        if effect.peer == self.me or all(self.blobs.has(blob) for blob, _ in effect.blobs):
            missing = [blob for blob, _ in effect.blobs if not self.blobs.has(blob)]
            self.feed(e.BlobReady(effect.request, "a blob is missing from this node's store" if missing else ""))
            return
        self.switch.fetch(effect.request, effect.peer, effect.task_id, effect.blobs, effect.inline_max)

    def _read_blob(self, effect: e.ReadBlob) -> None:
        try:
            size = self.blobs.size(effect.blob)
            data = self.blobs.read_at(effect.blob, effect.offset, effect.length)
        except ClawnetError as error:
            self.ipc.reply(effect.call, None, error.as_dict())
            return
        eof = effect.offset + len(data) >= size
        self.ipc.reply(effect.call, {"data_b64": base64.b64encode(data).decode(), "size": size, "eof": eof})

    def _load(self, effect: e.Load) -> None:
        request = effect.request

        def done(rows: Any) -> None:
            if isinstance(rows, ClawnetError):
                self.observer.log("error", "storage.read_failed", {"query": effect.query, "reason": rows.message})
                rows = []
            self.feed(e.Loaded(request, tuple(rows)))

        self.store.query_later(effect.query, effect.args, done)

    # --- timers

    def _wake(self, effect: e.Wake) -> None:
        self._timer_count += 1
        number = self._timer_count
        self._due[effect.key] = (effect.at_ms, number)
        heapq.heappush(self._timers, (effect.at_ms, number, effect.key))
        if self._handle is None or effect.at_ms < self._handle_ms:
            self._arm(effect.at_ms)
        if len(self._timers) > 4 * len(self._due) + 1024:
            self._timers = [(at, number, key) for key, (at, number) in self._due.items()]
            heapq.heapify(self._timers)

    def _arm(self, at_ms: int) -> None:
        if self._handle is not None:
            self._handle.cancel()
        self._handle_ms = at_ms
        self._handle = self._loop.call_later(max(0, at_ms - self.clock()) / 1000, self._fire)

    def _fire(self) -> None:
        self._handle = None
        now_ms = self.clock()
        timers = self._timers
        while timers:
            at_ms, number, key = timers[0]
            current = self._due.get(key)
            if current is None or current[1] != number:
                heapq.heappop(timers)
                continue
            if at_ms > now_ms:
                self._arm(at_ms)
                return
            heapq.heappop(timers)
            del self._due[key]
            self.feed(e.TimerFired(key))

    # --- what goes wrong

    def _commit_failed(self, error: ClawnetError, handled: list[e.Stimulus]) -> None:
        """Nothing of the turn leaves: its calls get the error, and the node is built again from what is durable."""
        self.observer.log("error", "storage.commit_failed", {"reason": error.message})
        self.observer.count("commits_failed_total", error.code, 1)
        for stimulus in handled:
            if type(stimulus) is e.RpcCall:
                self.ipc.reply(stimulus.call, None, error.as_dict())
        self._start_again(error.message if not isinstance(error, StorageFullError) else "")

    def _defect(self, error: BaseException, handled: list[e.Stimulus]) -> None:
        """A step raised: the traceback goes to the log under an id, the call is answered, the peer is dropped."""
        stimulus = handled[-1] if handled else None
        identifier = f"{self.clock():x}"
        self.observer.log(
            "error",
            "node.defect",
            {"id": identifier, "stimulus": _describe(stimulus), "traceback": "".join(traceback.format_exception(error))},
        )
        self.observer.count("defects_total", "", 1)
        answer = InternalError(
            f"an internal error happened (id {identifier})",
            hint="clawnet daemon logs shows it under that id; please report it",
            id=identifier,
        ).as_dict()
        for one in handled:
            if type(one) is e.RpcCall:
                self.ipc.reply(one.call, None, answer)
        if type(stimulus) is e.MessageIn and stimulus.peer != self.me:
            self.switch.hangup(stimulus.peer, "its message could not be handled")
        self._start_again(str(error))

    def _start_again(self, reason: str) -> None:
        now_ms = self.clock()
        self._rebuilds.append(now_ms)
        if reason and len(self._rebuilds) == self._rebuilds.maxlen and now_ms - self._rebuilds[0] < 10_000:
            self.stopped = True
            self._fail(f"the node failed {len(self._rebuilds)} times within ten seconds: {reason}")
            return
        self._timers.clear()
        self._due.clear()
        try:
            self.node, effects = self._rebuild()
        except ClawnetError as error:
            self.stopped = True
            self._fail(error.message)
            return
        self._perform(effects, [])


def _describe(stimulus: e.Stimulus | None) -> str:
    """The kind of a stimulus, never its content."""
    if stimulus is None:
        return "end of turn"
    if isinstance(stimulus, e.MessageIn):
        return f"MessageIn({type(stimulus.message).__name__} from {stimulus.peer})"
    if isinstance(stimulus, e.RpcCall):
        return f"RpcCall({stimulus.method})"
    if isinstance(stimulus, e.TimerFired):
        return f"TimerFired({stimulus.key[0]})"
    return type(stimulus).__name__
