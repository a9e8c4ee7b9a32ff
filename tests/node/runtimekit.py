"""A loop over a clock that tests move: a small node, the memory store, and adapters that write one journal."""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from clawnet.errors import StorageError
from clawnet.runtime import Runtime
from clawnet.storage.memory import MemoryStore
from clawnet.wire import events as e
from clawnet.wire.messages import Ping, Pong

ME, BOB = "me", "bob"
JOB, TASK, BLOB = b"j" * 16, b"t" * 16, b"b" * 32
Entry = tuple[Any, ...]


class Handle:
    """What call_later returns."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.work: Callable[[], None] | None = work

    def cancel(self) -> None:
        self.work = None


class Loop:
    """An event loop whose time a test moves."""

    def __init__(self) -> None:
        self.now_ms = 1_000_000
        self.ready: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self.later: list[tuple[int, int, Handle]] = []
        self.count = 0

    def clock(self) -> int:
        return self.now_ms

    def call_soon(self, work: Callable[..., None], *args: Any) -> None:
        self.ready.append((work, args))

    call_soon_threadsafe = call_soon

    def call_later(self, delay_s: float, work: Callable[[], None]) -> Handle:
        handle = Handle(work)
        self.count += 1
        heapq.heappush(self.later, (self.now_ms + round(delay_s * 1000), self.count, handle))
        return handle

    def run(self) -> None:
        """Everything that can happen without time passing."""
        for _ in range(10_000):
            if not self.ready:
                return
            work, args = self.ready.popleft()
            work(*args)
        raise AssertionError("the loop never came to rest")

    def advance(self, ms: int) -> None:
        """Time passes; what falls due on the way is done at its time."""
        until = self.now_ms + ms
        self.run()
        while self.later and self.later[0][0] <= until:
            due_ms, _, handle = heapq.heappop(self.later)
            self.now_ms = max(self.now_ms, due_ms)
            if handle.work is not None:
                handle.work()
            self.run()
        self.now_ms = until


class WordNode:
    """Keeps words in the table `meta`. `heard` is what it was told since it was made."""

    def __init__(self, store: MemoryStore) -> None:
        self.words: dict[str, bytes] = dict(store.load_all("meta"))
        self.heard: list[e.Stimulus] = []
        self.dirty: dict[str, bytes] = {}

    def step(self, now_ms: int, stimulus: e.Stimulus) -> list[e.Effect]:
        self.heard.append(stimulus)
        if isinstance(stimulus, e.RpcCall):
            return self.call(now_ms, stimulus)
        if isinstance(stimulus, e.MessageIn) and isinstance(stimulus.message, Ping):
            if stimulus.message.nonce == 666:
                raise ValueError("a message that trips the node")
            return [e.Send(stimulus.peer, Pong(stimulus.message.nonce, now_ms), stimulus.id)]
        return []

    def call(self, now_ms: int, call: e.RpcCall) -> list[e.Effect]:
        if call.method == "set":
            self.dirty[call.params["word"]] = b"v"
            return [e.Send(BOB, Ping(1, now_ms)), e.Reply(call.call, "set")]
        if call.method == "own":
            return [e.Durable(), e.Put("meta", ("own", b"entry")), e.Reply(call.call, "own")]
        if call.method == "effects":
            return [*call.params["effects"], e.Reply(call.call, "done")]
        if call.method == "boom":
            raise ValueError("a call that trips the node")
        return []

    def end_turn(self, now_ms: int) -> list[e.Effect]:
        rows: list[e.Effect] = [e.Put("meta", (word, value)) for word, value in self.dirty.items()]
        self.words.update(self.dirty)
        self.dirty.clear()
        return rows


class WatchedStore(MemoryStore):
    """The memory store; every commit goes into the journal."""

    def __init__(self, journal: list[Entry]) -> None:
        super().__init__()
        self.journal = journal

    def commit(self, rows: Sequence[e.Put | e.Delete], durable: bool = False) -> None:
        super().commit(rows, durable)
        if rows:
            self.journal.append(("commit", durable, [row.row if isinstance(row, e.Put) else row.key for row in rows]))


class World:
    """Runtime, node and recording adapters. Each adapter writes into one journal, so that order can be seen."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.journal: list[Entry] = []
        self.logs: list[tuple[str, str, dict[str, Any]]] = []
        self.counts: dict[tuple[str, str], int] = {}
        self.links: list[e.PeerUp] = []
        self.store = WatchedStore(self.journal)
        self.start_effects: list[e.Effect] = []
        self.nodes = 0
        self.broken: Exception | None = None
        self.failed: list[str] = []
        self.runtime = Runtime(
            ME,
            clock=loop.clock,
            store=self.store,
            blobs=self,
            executor=Executor(self),
            ipc=self,
            observer=self,
            rebuild=self.rebuild,
            adopt=lambda effect: self.note("adopt", effect.call),
            drained=lambda: self.note("drained"),
            fail=self.failed.append,
        )
        self.runtime.switch = self
        self.runtime.node, _ = self.rebuild()

    @property
    def node(self) -> WordNode:
        assert isinstance(self.runtime.node, WordNode)
        return self.runtime.node

    def rebuild(self) -> tuple[WordNode, list[e.Effect]]:
        if self.broken is not None:
            raise self.broken
        self.nodes += 1
        if self.nodes > 1:
            for up in self.links:
                self.runtime.feed(up)
        return WordNode(self.store), list(self.start_effects)

    def note(self, *what: Any) -> None:
        self.journal.append(what)

    def feed(self, *stimuli: e.Stimulus) -> None:
        """Feeds these and runs what follows."""
        for stimulus in stimuli:
            self.runtime.feed(stimulus)
        self.loop.run()

    def fail(self, error: StorageError, *stimuli: e.Stimulus) -> None:
        """The turn of these stimuli cannot be committed."""
        self.store.fail_next = error
        self.feed(*(stimuli or (call(99, "set", word="lost"),)))

    def told(self, *names: str) -> list[Entry]:
        return [entry for entry in self.journal if entry[0] in names]

    def heard(self) -> list[str]:
        return [type(stimulus).__name__ for stimulus in self.node.heard]

    # --- observer

    def log(self, level: str, event: str, fields: dict[str, Any]) -> None:
        self.logs.append((level, event, fields))

    def count(self, name: str, label: str = "", by: int = 1) -> None:
        self.counts[name, label] = self.counts.get((name, label), 0) + by

    def event(self, name: str) -> dict[str, Any]:
        found = [fields for _, event, fields in self.logs if event == name]
        assert len(found) == 1, [event for _, event, _ in self.logs]
        return found[0]

    # --- ipc

    def reply(self, call: int, value: Any, error: dict[str, Any] | None = None) -> None:
        self.note("reply", call, error["code"] if error else value)

    def notify(self, call: int, method: str, value: Any) -> None:
        self.note("notify", call, method, value)

    # --- switch

    def send(self, peer: str, items: list[Any]) -> bool:
        self.note("send", peer, [item[0] for item in items])
        return True

    def dial(self, call: int, peer: str, addresses: Sequence[str], keep: bool = False) -> None:
        self.note("dial", peer, keep)

    def hangup(self, peer: str, reason: str) -> None:
        self.note("hangup", peer)

    def join(self, call: int, inviter: str, addresses: Sequence[str], ask: Any) -> None:
        self.note("join", inviter)

    def join_reply(self, call: int, answer: Any) -> None:
        self.note("join_reply", call)

    def fetch(
        self,
        request: bytes,
        peer: str,
        task_id: bytes,
        blobs: Sequence[tuple[bytes, int]],
        inline_max: int = 0,
        source: str = "",
    ) -> None:
        self.note("fetch", peer)

    # --- blobs

    def grant(self, task_id: bytes, peer: str, blob: bytes) -> None:
        self.note("grant", peer)

    def revoke(self, task_id: bytes) -> None:
        self.note("revoke", task_id)

    def came_from(self, blob: bytes, size: int, source: str) -> bool:
        return False

    def size(self, blob: bytes) -> int:
        return 5

    def read_at(self, blob: bytes, offset: int, length: int) -> bytes:
        return b"hello"[offset : offset + length]


class Executor:
    """Notes what it is asked for; a test feeds the ends."""

    def __init__(self, world: World) -> None:
        self.world = world

    def run(self, job: bytes, spec: Any) -> None:
        if spec == "breaks":
            raise OSError("no process can be made")
        self.world.note("run", job, spec)

    def stop(self, job: bytes) -> None:
        self.world.note("stop", job)

    def pack(
        self,
        request: bytes,
        paths: tuple[tuple[str, str], ...],
        schemas: tuple[tuple[str, bytes], ...] = (),
        gitignore: bool = False,
    ) -> None:
        self.world.note("pack", request)

    def open_result(self, effect: e.Open) -> None:
        self.world.note("open", effect.request)

    def stop_judging(self, request: bytes) -> None:
        self.world.note("stop_judging", request)

    def read_output(self, effect: e.ReadOutput) -> None:
        self.world.note("read", effect.job)


def make(monkeypatch: pytest.MonkeyPatch) -> World:
    loop = Loop()
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: loop)
    return World(loop)


def call(number: int, method: str, **params: Any) -> e.RpcCall:
    return e.RpcCall(number, method, params)


def effects(number: int, *wanted: e.Effect) -> e.RpcCall:
    return call(number, "effects", effects=wanted)


def ping(nonce: int, peer: str = BOB) -> e.MessageIn:
    return e.MessageIn(peer, b"i" * 16, Ping(nonce, 0))


def exited(job: bytes = JOB) -> e.TaskExited:
    return e.TaskExited(job, "exit", "", 0, None, b"", b"", 0, b"", 0, 0.0, 0.0, 0)
