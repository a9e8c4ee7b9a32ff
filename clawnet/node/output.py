"""Followers of a task: its output as it comes, each byte once and in order, completed by its executor or its result."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

from msgspec import Struct, field

from clawnet import limits
from clawnet.answers_market import time_text
from clawnet.market.records import Attempt, Task
from clawnet.node.context import Context
from clawnet.wire.messages import Output, Progress

KEPT_BYTES_MAX = limits.OUTPUT_KEPT_BYTES_MAX
STREAMS = ("stdout", "stderr")
UNKNOWN = -1
"""The place of a follower that wants what comes from now on, as long as nobody told how much there was before."""
PAST_END = 2**62


def text_or_b64(data: bytes, key: str) -> dict[str, str]:
    """`{key: text}` for UTF-8, else `{key_b64: ...}` (CLI.md, plain output)."""
    try:
        return {key: data.decode()}
    except UnicodeDecodeError:
        return {key + "_b64": base64.b64encode(data).decode()}


class Start(Struct, frozen=True):
    """Where a follower begins: at byte 0, at the end, or at `offsets` of attempt `attempt` (-1: it saw none).

    `so_far` ends it when it has been told what was written up to now. With `progress` it hears how far transfers are.
    """

    from_end: bool = False
    offsets: tuple[int, int] = (0, 0)
    attempt: int = -1
    so_far: bool = False
    progress: bool = False


class Preview(Struct):
    """What an attempt has written, as far as it is known here.

    `streams` is the contiguous start of each, up to a bound; `seen` how much there is at least. While `steady`, what is
    written comes by itself, or has been asked for; `asked` tells the offsets of questions without an answer yet.
    """

    attempt: int
    peer: str
    steady: bool
    streams: tuple[bytearray, bytearray] = field(default_factory=lambda: (bytearray(), bytearray()))
    seen: list[int] = field(default_factory=lambda: [0, 0])
    asked: list[bool] = field(default_factory=lambda: [False, False])


class _Follower(Struct):
    call: int
    output: bool
    sent: list[int]
    attempt: int
    so_far: bool = False
    progress: bool = False
    upto: list[int] | None = None


class Followers:
    """Who follows which task, and how far each has been told.

    `find` gives an open task by its id; `leave` answers the call of a follower that wanted what there was so far.
    """

    def __init__(self, ctx: Context, find: Callable[[bytes], Task | None], leave: Callable[[int, Task], None]) -> None:
        self._ctx = ctx
        self._find = find
        self._leave = leave
        self._of: dict[bytes, dict[int, _Follower]] = {}
        self._calls: dict[int, bytes] = {}
        self._previews: dict[bytes, Preview] = {}
        self._kept_bytes = 0

    def add(self, call: int, task: Task, *, output: bool, start: Start) -> None:
        """From now on `call` is told: states, and with output what is written from its start on."""
        preview = self._preview(task)
        sent = list(start.offsets)
        attempt = start.attempt
        if start.from_end:
            sent = list(preview.seen) if preview is not None and preview.steady else [UNKNOWN, UNKNOWN]
            if preview is None and task.result is None:
                sent = [0, 0]  # nothing is written yet
        if attempt < 0 and preview is not None:
            attempt = preview.attempt
        follower = _Follower(call, output, sent, attempt, start.so_far, start.progress)
        self._of.setdefault(task.task_id, {})[call] = follower
        self._calls[call] = task.task_id
        if not output:
            return
        if start.from_end and UNKNOWN not in sent:
            self._tell_place(follower, again=False)
        if preview is not None:
            if attempt != preview.attempt:
                self._again(follower, preview.attempt)
            for stream in (1, 2):
                self._tell(follower, stream, 0, preview.streams[stream - 1])
            self._ask(task)
        self._end_so_far(task)

    def gone(self, call: int) -> bytes | None:
        """The client of `call` left; returns the task it followed."""
        task_id = self._calls.pop(call, None)
        if task_id is not None:
            mine = self._of.get(task_id, {})
            mine.pop(call, None)
            if not mine:
                self._of.pop(task_id, None)
        return task_id

    def state(self, task_id: bytes, state: str, reason: str, at_ms: int) -> None:
        """A transition, to those who follow."""
        for follower in self._of.get(task_id, {}).values():
            self._ctx.notify(follower.call, "task.state", {"state": state, "reason": reason, "at": time_text(at_ms)})

    @property
    def told(self) -> list[bytes]:
        """The tasks of whose transfers somebody wants to hear."""
        return [task_id for task_id, those in self._of.items() if any(one.progress for one in those.values())]

    def moved(self, task_id: bytes, value: dict[str, Any]) -> None:
        """How far a transfer of the task's files is, to those who want to hear of it."""
        for follower in self._of.get(task_id, {}).values():
            if follower.progress:
                self._ctx.notify(follower.call, "task.progress", value)

    # --- what the attempt writes

    def begin(self, task: Task, attempt: Attempt) -> None:
        """A new attempt: its output starts at byte 0, and what the last one showed is no part of it."""
        self._forget(task.task_id)
        preview = Preview(attempt.n, attempt.peer, bool(task.spec["stream"]))
        self._previews[task.task_id] = preview
        for follower in self._of.get(task.task_id, {}).values():
            if follower.output:
                self._again(follower, attempt.n)

    def accepted(self, task: Task) -> None:
        """The executor has the task: it can be asked now for output that it would not send by itself."""
        if task.task_id in self._of and self._preview(task) is not None:
            self._ask(task)

    def output(self, task: Task, message: Output) -> None:
        """Bytes of a running task; those after a gap are asked for."""
        preview = self._preview(task)
        if preview is None or preview.attempt != message.attempt:
            return
        place, end = message.stream - 1, message.offset + len(message.data)
        kept = preview.streams[place]
        fits = len(kept) + len(message.data) <= limits.OUTPUT_PREVIEW_BYTES_MAX
        if message.offset == len(kept) and fits and self._kept_bytes + len(message.data) <= KEPT_BYTES_MAX:
            kept += message.data
            self._kept_bytes += len(message.data)
        preview.seen[place] = max(preview.seen[place], end)
        if task.task_id in self._of:
            for follower in self._of[task.task_id].values():
                self._tell(follower, message.stream, message.offset, message.data)
            self._ask(task)
            self._end_so_far(task)

    def progress(self, task: Task, message: Progress) -> None:
        """How much the attempt has written by now; it comes after what was asked for."""
        preview = self._preview(task)
        if preview is None or preview.attempt != message.attempt:
            return
        sizes = (message.stdout_bytes, message.stderr_bytes)
        preview.seen = [max(pair) for pair in zip(preview.seen, sizes, strict=True)]
        preview.asked = [False, False]
        if task.task_id not in self._of:
            return
        for follower in self._of[task.task_id].values():
            if follower.output and UNKNOWN in follower.sent:
                follower.sent = list(sizes)
                self._tell_place(follower, again=False)
            if follower.so_far and follower.upto is None:
                follower.upto = list(sizes)
        self._ask(task)
        self._end_so_far(task)

    def peer_down(self, peer: str) -> None:
        """What this executor's runs write is lost until it is back; who asked for no more than there is has that."""
        for preview in self._previews.values():
            if preview.peer == peer:
                preview.steady, preview.asked = False, [False, False]
        self._of_peer(peer, self._end_so_far)

    def peer_up(self, peer: str) -> None:
        """An executor is back: it is asked for what followers lack."""
        self._of_peer(peer, self._ask)

    def _of_peer(self, peer: str, then: Callable[[Task], None]) -> None:
        for task_id in list(self._of):
            task, preview = self._find(task_id), self._previews.get(task_id)
            if task is not None and preview is not None and preview.peer == peer:
                then(task)

    # --- asking

    def _preview(self, task: Task) -> Preview | None:
        """What is known of the output of the paying attempt; after a restart of this node, nothing yet."""
        preview, attempt = self._previews.get(task.task_id), task.paying
        if attempt is None or attempt.closed:
            return None
        if preview is None or preview.attempt != attempt.n:
            self._forget(task.task_id)
            preview = self._previews[task.task_id] = Preview(attempt.n, attempt.peer, False)
        return preview

    def _runs(self, task: Task) -> bool:
        """Whether there is somebody to ask."""
        attempt = task.paying
        return attempt is not None and attempt.state == "accepted" and self._ctx.connected(attempt.peer)

    def _ask(self, task: Task) -> None:
        """Asks the executor for what the follower furthest behind lacks; one question a stream at a time."""
        preview = self._previews.get(task.task_id)
        followers = [one for one in self._of.get(task.task_id, {}).values() if one.output]
        if preview is None or not followers or not self._runs(task):
            return
        for place in (0, 1):
            lowest = min(PAST_END if one.sent[place] == UNKNOWN else one.sent[place] for one in followers)
            if preview.asked[place] or (preview.steady and lowest >= preview.seen[place]):
                continue
            self._ctx.send(preview.peer, Output(task.task_id, preview.attempt, place + 1, lowest, b""))
            preview.asked[place] = True
        preview.steady = True

    def _end_so_far(self, task: Task) -> None:
        """Answers the followers that have been told all there was when they came, or that cannot be told more."""
        preview, runs = self._previews.get(task.task_id), self._runs(task)
        for follower in list(self._of.get(task.task_id, {}).values()):
            if not follower.so_far:
                continue
            if follower.upto is None and preview is not None and preview.steady and not any(preview.asked):
                follower.upto = list(preview.seen)
            told = follower.upto is not None and all(
                sent >= upto for sent, upto in zip(follower.sent, follower.upto, strict=True)
            )
            if told or not runs:
                self.gone(follower.call)
                self._leave(follower.call, task)

    # --- telling

    def _again(self, follower: _Follower, attempt: int) -> None:
        """Another attempt begins at byte 0; a follower that was shown something of an earlier one is told so."""
        unknown = UNKNOWN in follower.sent
        shown = follower.attempt >= 0 and follower.sent != [0, 0] and not unknown
        follower.attempt, follower.sent = attempt, [0, 0]
        if shown or unknown:
            self._tell_place(follower, again=shown)

    def _tell_place(self, follower: _Follower, *, again: bool) -> None:
        """Where the output goes on for this follower."""
        value = {"attempt": follower.attempt, "stdout": follower.sent[0], "stderr": follower.sent[1], "again": again}
        self._ctx.notify(follower.call, "task.place", value)

    def _tell(self, follower: _Follower, stream: int, offset: int, data: bytes | bytearray) -> None:
        sent = follower.sent[stream - 1]
        if not follower.output or sent == UNKNOWN or offset > sent or offset + len(data) <= sent:
            return
        part = bytes(data[sent - offset :])
        follower.sent[stream - 1] = sent + len(part)
        for at in range(0, len(part), limits.OUTPUT_CHUNK_BYTES_MAX):
            chunk = part[at : at + limits.OUTPUT_CHUNK_BYTES_MAX]
            value: dict[str, Any] = {
                "stream": STREAMS[stream - 1],
                "offset": sent + at,
                "attempt": follower.attempt,
                **text_or_b64(chunk, "data"),
            }
            self._ctx.notify(follower.call, "task.output", value)

    # --- the end

    def _forget(self, task_id: bytes) -> None:
        preview = self._previews.pop(task_id, None)
        if preview is not None:
            self._kept_bytes -= sum(len(stream) for stream in preview.streams)

    def finish(self, task: Task, streams: tuple[bytes, bytes] | None) -> list[int]:
        """Ends following: tells what the previews left out, and returns the calls to answer."""
        self._forget(task.task_id)
        followers = self._of.pop(task.task_id, {})
        result = task.result
        for follower in followers.values():
            self._calls.pop(follower.call, None)
            if not follower.output or result is None or UNKNOWN in follower.sent:
                continue
            attempt = result.get("attempt", follower.attempt)
            if follower.attempt != attempt:
                self._again(follower, attempt)
            for stream, name in ((1, "stdout"), (2, "stderr")):
                whole = streams[stream - 1] if streams is not None else result.get(name)
                if isinstance(whole, bytes):
                    self._tell(follower, stream, 0, whole)
        return list(followers)
