"""A small node, recording ports around its runtime, and a clock that the test turns: the parts of test_runtime.py."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from clawnet.errors import NotFoundError, StorageFullError
from clawnet.observe.logs import Observer
from clawnet.runtime import Runtime
from clawnet.storage.memory import MemoryStore
from clawnet.storage.store import Store
from clawnet.wire import events as e
from clawnet.wire.messages import Ack, Message

ME, PEER, OTHER = "me", "peer", "other"
NOW_MS = 1_700_000_000_000
Story = list[tuple[Any, ...]]


class Tally:
    """A node that adds up numbers, tells every peer that asks, and breaks when told to. Its only row is the sum."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.dirty = False
        self.broken = False
        self.seen: list[e.Stimulus] = []

    def step(self, now_ms: int, stimulus: e.Stimulus) -> list[e.Effect]:
        self.seen.append(stimulus)
        if isinstance(stimulus, e.RpcCall):
            return self._call(stimulus)
        if isinstance(stimulus, e.MessageIn):
            assert isinstance(stimulus.message, Ack)
            if stimulus.message.obligation == BAD.obligation:
                raise RuntimeError("a defect in the handling of this message")
            self.total += 1
            self.dirty = True
            return [e.Send(stimulus.peer, Ack(b"s" * 16), stimulus.id)] if stimulus.peer != ME else []
        return []

    def _call(self, call: e.RpcCall) -> list[e.Effect]:
        if call.method == "break":
            raise ZeroDivisionError("secret words")
        if call.method == "break later":
            self.broken = True
            return []
        self.total += int(call.params.get("add", 0))
        self.dirty = "add" in call.params
        return list(call.params.get("effects", ())) + [e.Reply(call.call, self.total)] * ("mute" not in call.params)

    def end_turn(self, now_ms: int) -> list[e.Effect]:
        if self.broken:
            raise ArithmeticError("a defect at the end of the turn")
        if not self.dirty:
            return []
        self.dirty = False
        return [e.Put("meta", ("total", self.total.to_bytes(8, "big"))), e.Durable()]


GOOD, BAD = Ack(b"g" * 16), Ack(b"b" * 16)


class Ports:
    """Network, executor, local socket, blobs and store of a runtime, all of which write one story in order."""

    def __init__(self, store: Store | MemoryStore) -> None:
        self.story: Story = []
        self.real = store
        self.full = False
        self.blobs = {b"blob": b"0123456789"}
        self.raises: Exception | None = None

    # the store

    def commit(self, rows: Any, durable: bool = False) -> None:
        if self.full and rows:
            raise StorageFullError("the disk is full")
        self.real.commit(rows, durable)
        if rows:
            self.story.append(("commit", len(rows), durable))

    def query(self, name: str, args: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        return self.real.query(name, args)

    def query_later(self, name: str, args: tuple[Any, ...], done: Callable[[Any], None]) -> None:
        self.real.query_later(name, args, done)

    # the others

    def send(self, peer: str, items: list[tuple[Message, bytes | None, bytes | None]]) -> bool:
        self.story.append(("send", peer, [type(message).__name__ for message, _, _ in items]))
        return True

    def hangup(self, peer: str, reason: str) -> None:
        self.story.append(("hangup", peer))

    def dial(self, call: int, peer: str, addresses: Any, keep: bool = False) -> None:
        if self.raises is not None:
            raise self.raises
        self.story.append(("dial", peer, keep))

    def run(self, job: bytes, spec: Any) -> None:
        self.story.append(("run", job))

    def stop(self, job: bytes) -> None:
        self.story.append(("stop", job))

    def reply(self, call: int, value: Any, error: dict[str, Any] | None = None) -> None:
        self.story.append(("reply", call, value if error is None else error["code"]))

    def notify(self, call: int, method: str, value: Any) -> None:
        self.story.append(("notify", call, method, value))

    def grant(self, task_id: bytes, peer: str, blob: bytes) -> None:
        self.story.append(("grant", peer))

    def revoke(self, task_id: bytes) -> None:
        self.story.append(("revoke", task_id))

    def came_from(self, blob: bytes, size: int, source: str) -> bool:
        return blob in self.blobs

    def size(self, blob: bytes) -> int:
        if blob not in self.blobs:
            raise NotFoundError("no such blob")
        return len(self.blobs[blob])

    def read_at(self, blob: bytes, offset: int, length: int) -> bytes:
        return self.blobs[blob][offset : offset + length]

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: self.story.append((name, *args))


class Lines:
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.lost = 0

    def write(self, line: str) -> bool:
        self.lines.append(line)
        return True

    def close(self) -> None:
        pass


class House:
    """A runtime with all its parts, and the clock that the test turns."""

    def __init__(self, store: Store | MemoryStore) -> None:
        self.now_ms = NOW_MS
        self.ports = ports = Ports(store)
        self.log = Lines()
        self.nodes: list[Tally] = []
        self.start_effects: list[e.Effect] = []
        self.failed: list[str] = []
        self.drained = 0
        self.calls = 0
        port: Any = ports
        self.runtime = Runtime(
            ME,
            clock=lambda: self.now_ms,
            store=port,
            blobs=port,
            executor=port,
            ipc=port,
            observer=Observer(self.log),
            rebuild=self.build,
            adopt=lambda effect: ports.story.append(("adopt", effect.call)),
            drained=self._drained,
            fail=self.failed.append,
        )
        self.runtime.switch = port
        self.runtime.node, effects = self.build()
        self.runtime.perform(effects)
        self.story.clear()

    def _drained(self) -> None:
        self.drained += 1

    def build(self) -> tuple[Tally, list[e.Effect]]:
        rows = [row for row in self.ports.real.load_all("meta") if row[0] == "total"]
        node = Tally(int.from_bytes(rows[0][1], "big") if rows else 0)
        self.nodes.append(node)
        return node, list(self.start_effects)

    @property
    def story(self) -> Story:
        return self.ports.story

    @property
    def node(self) -> Tally:
        return self.nodes[-1]

    def call(self, method: str = "add", **params: Any) -> int:
        self.calls += 1
        self.runtime.feed(e.RpcCall(self.calls, method, params))
        return self.calls

    def hear(self, message: Message = GOOD, peer: str = PEER) -> None:
        self.runtime.feed(e.MessageIn(peer, b"i" * 16, message))

    async def until(self, condition: Callable[[], bool]) -> None:
        """Lets the loop run until the condition holds."""
        async with asyncio.timeout(30):
            while not condition():
                await asyncio.sleep(0.001)

    async def settle(self) -> None:
        """Lets the loop run until nothing waits in the inbox."""
        while self.runtime.backlog:
            await asyncio.sleep(0)

    def total_on_disk(self) -> int:
        return sum(int.from_bytes(row[1], "big") for row in self.ports.real.load_all("meta"))

    def events(self) -> list[str]:
        return [line.split()[2] for line in self.log.lines]


Test = Callable[[House], Coroutine[Any, Any, None]]


def play(store: Store | MemoryStore, test: Test) -> House:
    """Runs a test inside an event loop; a defect that the test did not ask for fails it."""

    async def go() -> House:
        unhandled: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: unhandled.append(context))
        house = House(store)
        await test(house)
        house.runtime.stopped = True
        assert not unhandled
        return house

    return asyncio.run(go())
