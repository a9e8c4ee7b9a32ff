"""The asyncio client of the local daemon: many calls in flight on one connection."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any, cast

from clawnet import __version__, api, limits, paths, rpc
from clawnet.errors import ClawnetError, TimedOutError, UnreachableError
from clawnet.paths import Home

_Listener = Callable[[str, Any], None]


class AsyncClient(asyncio.Protocol):
    """A connection to the daemon of a home; calls may overlap freely and are written once a loop turn.

    It never starts a daemon: `clawnet.launch.start` does, or the blocking Client.
    """

    def __init__(self, home: Home | None = None) -> None:
        self.home = home or paths.resolve_home(None, os.environ)
        self.hello: dict[str, Any] = {}
        self._transport: asyncio.Transport | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._partial = b""
        self._out: list[bytes] = []
        self._open: dict[int, asyncio.Future[Any]] = {}
        self._listeners: dict[int, _Listener] = {}
        self._last_call = 0

    async def __aenter__(self) -> AsyncClient:
        await self.connect()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.close()

    async def connect(self) -> None:
        """Connects and shakes hands; raises UnreachableError when no daemon listens or it speaks another version."""
        self._loop = asyncio.get_running_loop()
        try:
            if sys.platform == "win32":
                await cast(Any, self._loop).create_pipe_connection(lambda: self, self.home.pipe_name)
            else:
                await self._loop.create_unix_connection(lambda: self, str(self.home.socket))
        except (FileNotFoundError, ConnectionRefusedError) as error:
            raise api.no_daemon(self.home) from error
        except OSError as error:
            raise UnreachableError(f"cannot reach the daemon of {self.home.dir}: {error.strerror or error}") from error
        try:
            answer = self._loop.create_future()
            self._open[0] = answer
            self._write(rpc.hello_line(__version__))
            self.hello = await self._within(answer, limits.RPC_HELLO_TIMEOUT_S)
            rpc.check_daemon(self.hello)
        except BaseException:
            # Whoever does not get in has nothing to close.
            if self._transport is not None:
                self._transport.abort()
            raise

    async def close(self) -> None:
        """Ends the connection; open calls fail with UnreachableError."""
        if self._transport is not None:
            self._flush()
            self._transport.close()
            await asyncio.sleep(0)

    async def call(self, method: str, params: dict[str, Any] | None = None, *, timeout_s: float | None = None) -> Any:
        """One call and its answer; raises what the daemon answered, UnreachableError, or TimedOutError."""
        return await self._within(self.start(method, params), timeout_s)

    def start(
        self, method: str, params: dict[str, Any] | None = None, *, listener: _Listener | None = None
    ) -> asyncio.Future[Any]:
        """Sends a call and returns the future of its answer; `listener` hears its notifications (method, value)."""
        if self._loop is None or self._transport is None:
            raise UnreachableError("not connected to the daemon")
        self._last_call += 1
        line = rpc.request_line(self._last_call, method, params or {})
        answer = self._loop.create_future()
        self._open[self._last_call] = answer
        if listener is not None:
            self._listeners[self._last_call] = listener
        self._write(line)
        return answer

    async def stream(self, method: str, params: dict[str, Any] | None = None) -> AsyncIterator[tuple[str, Any]]:
        """Notifications of a call as they come, then ("", answer)."""
        queue: asyncio.Queue[tuple[str, Any]] = asyncio.Queue()
        answer = self.start(method, params, listener=lambda kind, value: queue.put_nowait((kind, value)))
        answer.add_done_callback(lambda done: queue.put_nowait(("", None)))
        while True:
            kind, value = await queue.get()
            if not kind:
                yield "", answer.result()
                return
            yield kind, value

    async def _within(self, answer: asyncio.Future[Any], timeout_s: float | None) -> Any:
        try:
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError as error:
            raise TimedOutError("the daemon did not answer in time") from error

    def _write(self, line: bytes) -> None:
        assert self._loop is not None
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out.append(line)

    def _flush(self) -> None:
        if self._out and self._transport is not None:
            self._transport.write(b"".join(self._out))
        self._out.clear()

    # --- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if b"\n" not in data:
            self._partial += data
            if len(self._partial) > limits.RPC_ANSWER_BYTES_MAX and self._transport is not None:
                self._transport.abort()
            return
        *lines, self._partial = (self._partial + data).split(b"\n")
        for line in lines:
            self._take(rpc.parse_line(line))

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        waiting, self._open = self._open, {}
        for answer in waiting.values():
            self._settle(answer, None, UnreachableError("the daemon went away before it answered"))

    def _take(self, message: dict[str, Any]) -> None:
        params = message.get("params")
        if isinstance(params, dict) and "method" in message:
            listener = self._listeners.get(params.get("id", 0))
            if listener is not None:
                listener(message["method"], params.get("value"))
            return
        call = message.get("id")
        answer = self._open.pop(call, None) if isinstance(call, int) else None
        self._listeners.pop(cast(int, call), None)
        if answer is not None:
            failed = message.get("error")
            self._settle(answer, message.get("result"), rpc.error_to_exception(failed) if failed is not None else None)

    @staticmethod
    def _settle(answer: asyncio.Future[Any], value: Any, error: ClawnetError | None) -> None:
        if answer.done():
            return
        if error is None:
            answer.set_result(value)
        else:
            answer.set_exception(error)
