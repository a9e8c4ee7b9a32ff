"""Followers of a task: previews of its output as it comes, completed from the result, each byte once and in order."""

from __future__ import annotations

import base64
from typing import Any

from msgspec import Struct, field

from clawnet import limits
from clawnet.answers_market import time_text
from clawnet.market.records import Task
from clawnet.node.context import Context

PREVIEW_BYTES_MAX = 1 * limits.MIB
KEPT_BYTES_MAX = 64 * limits.MIB
STREAMS = ("stdout", "stderr")


def text_or_b64(data: bytes, key: str) -> dict[str, str]:
    """`{key: text}` for UTF-8, else `{key_b64: ...}` (CLI.md, plain output)."""
    try:
        return {key: data.decode()}
    except UnicodeDecodeError:
        return {key + "_b64": base64.b64encode(data).decode()}


class Preview(Struct):
    """The contiguous start of each output stream, up to a bound."""

    streams: tuple[bytearray, bytearray] = field(default_factory=lambda: (bytearray(), bytearray()))


class _Follower(Struct):
    call: int
    output: bool
    sent: list[int]


class Followers:
    """Who follows which task, and how far each has been told."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._of: dict[bytes, dict[int, _Follower]] = {}
        self._calls: dict[int, bytes] = {}
        self._previews: dict[bytes, Preview] = {}
        self._kept_bytes = 0

    def add(self, call: int, task: Task, *, output: bool, from_end: bool) -> None:
        """From now on `call` is told; with output, from byte 0 (or from what has come so far)."""
        preview = self._previews.get(task.task_id)
        sent = [0, 0]
        if preview is not None and from_end:
            sent = [len(preview.streams[0]), len(preview.streams[1])]
        follower = _Follower(call, output, sent)
        self._of.setdefault(task.task_id, {})[call] = follower
        self._calls[call] = task.task_id
        if preview is not None and output:
            for stream in (1, 2):
                self._tell(follower, stream, preview.streams[stream - 1])

    def gone(self, call: int) -> bytes | None:
        """The client of `call` left; returns the task it followed."""
        task_id = self._calls.pop(call, None)
        if task_id is not None:
            mine = self._of.get(task_id, {})
            mine.pop(call, None)
            if not mine:
                self._of.pop(task_id, None)
        return task_id

    def watched(self, task_id: bytes) -> bool:
        """True while anybody waits for this task."""
        return task_id in self._of

    def state(self, task_id: bytes, state: str, reason: str, at_ms: int) -> None:
        """A transition, to those who follow."""
        for follower in self._of.get(task_id, {}).values():
            self._ctx.notify(follower.call, "task.state", {"state": state, "reason": reason, "at": time_text(at_ms)})

    def output(self, task_id: bytes, stream: int, offset: int, data: bytes) -> None:
        """Bytes of a running task; a gap or a repeat is left to the result to fill."""
        preview = self._previews.setdefault(task_id, Preview())
        kept = preview.streams[stream - 1]
        fits = len(kept) + len(data) <= PREVIEW_BYTES_MAX and self._kept_bytes + len(data) <= KEPT_BYTES_MAX
        if offset == len(kept) and fits:
            kept += data
            self._kept_bytes += len(data)
        for follower in self._of.get(task_id, {}).values():
            if follower.output:
                self._tell_at(follower, stream, offset, data)

    def reset(self, task_id: bytes) -> None:
        """A new attempt begins: what the last one showed is no longer the start of the result."""
        preview = self._previews.pop(task_id, None)
        if preview is not None:
            self._kept_bytes -= sum(len(stream) for stream in preview.streams)

    def _tell(self, follower: _Follower, stream: int, whole: bytes | bytearray) -> None:
        self._tell_at(follower, stream, 0, whole)

    def _tell_at(self, follower: _Follower, stream: int, offset: int, data: bytes | bytearray) -> None:
        sent = follower.sent[stream - 1]
        if offset > sent or offset + len(data) <= sent:
            return
        part = bytes(data[sent - offset :])
        follower.sent[stream - 1] = sent + len(part)
        for at in range(0, len(part), limits.OUTPUT_CHUNK_BYTES_MAX):
            chunk = part[at : at + limits.OUTPUT_CHUNK_BYTES_MAX]
            value: dict[str, Any] = {"stream": STREAMS[stream - 1], "offset": sent + at, **text_or_b64(chunk, "data")}
            self._ctx.notify(follower.call, "task.output", value)

    def finish(self, task: Task, streams: tuple[bytes, bytes] | None) -> list[int]:
        """Ends following: tells what the previews left out, and returns the calls to answer."""
        self.reset(task.task_id)
        followers = self._of.pop(task.task_id, {})
        result = task.result
        for follower in followers.values():
            self._calls.pop(follower.call, None)
            if follower.output and result is not None:
                for stream, name in ((1, "stdout"), (2, "stderr")):
                    whole = streams[stream - 1] if streams is not None else result.get(name)
                    if isinstance(whole, bytes):
                        self._tell(follower, stream, whole)
        return list(followers)
