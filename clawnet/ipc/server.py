"""The server of the local socket: who may connect, which call belongs to whom, one write a client and loop turn."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from clawnet import __version__, limits, rpc
from clawnet.errors import BusyError, StoppedError
from clawnet.ipc.connection import Connection

OnCall = Callable[[int, str, dict[str, Any], int, str], None]
OnGone = Callable[[int], None]
LOCAL: Final = "local"
WINDOW_LOOK_S: Final = 0.001


class IpcServer:
    """Listens on `path` (mode 0600 in a 0700 directory; on Windows a pipe's name) for processes of this user.

    `on_call(call_id, method, params, client, credential)` is called for each call, in the order the client wrote them;
    `credential` is who asks by the kernel's word ("uid:1000"), or "local" where the socket alone vouches.
    It is answered by `reply` once, after any number of `notify`. `on_gone(call_id)` follows when the client of an open
    call goes away; what is said to it afterwards is dropped. A client that does not read is dropped, never waited for.

    Calls are handed on in windows of RPC_WINDOW_CALLS: the next is opened when `waiting()`, the number of those that
    nobody has begun with, is 0 again. Meanwhile lines stay with their clients, who share each window evenly.
    """

    def __init__(
        self, path: Path | str, on_call: OnCall, on_gone: OnGone, waiting: Callable[[], int] = lambda: 0
    ) -> None:
        self.path = path
        self.counters: dict[str, int] = {}
        self._on_call = on_call
        self._on_gone = on_gone
        self._connections: dict[int, Connection] = {}
        self._calls: dict[int, tuple[Connection, int | str]] = {}
        self._dirty: list[Connection] = []
        self._waiting = waiting
        self._window = self._window_bytes = 0
        self._held: dict[int, Connection] = {}
        self._lines_bytes = 0
        self._window_ends = False
        self._last_call = 0
        self._last_client = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._listener: Any = None

    async def start(self) -> None:
        """Begins to listen; replaces the socket that a killed daemon left.

        Raises ConfigError when another daemon listens there or the directory is not ours alone.
        """
        self._loop = asyncio.get_running_loop()
        if sys.platform == "win32":
            from clawnet.ipc import windows

            self._listener = windows.listen(self._loop, str(self.path), self._accept)
        else:
            from clawnet.ipc import unix

            self._listener = await unix.listen(self._loop, Path(self.path), self._accept)

    async def stop(self) -> None:
        """Stops listening, tells open calls that the daemon stops, flushes what is queued, closes every client."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        stopped = StoppedError("the daemon was stopped before it answered", hint="`clawnet daemon start` starts it")
        for call in sorted(self._calls):
            self.reply(call, None, stopped.as_dict())
        self._flush()
        for connection in list(self._connections.values()):
            connection.close()
        # The transports close in the next turns of the loop; one that does not drain is cut.
        for _ in range(100):
            if not self._connections:
                break
            await asyncio.sleep(0.01)
        for connection in list(self._connections.values()):
            if connection.transport is not None:
                connection.transport.abort()

    @property
    def clients(self) -> int:
        """How many clients are connected."""
        return len(self._connections)

    # --- the port used by the runtime

    def reply(self, call: int, value: Any, error: dict[str, Any] | None = None) -> None:
        """The one answer to a call: a JSON-able value or msgspec struct, or `error` (ClawnetError.as_dict)."""
        entry = self._calls.pop(call, None)
        if entry is None:
            return
        connection, request = entry
        del connection.calls[request]
        connection.pages.discard(request)
        connection.answer(request, value, error)
        connection.room()

    def notify(self, call: int, method: str, value: Any) -> None:
        """A streamed part of the answer to an open call."""
        entry = self._calls.get(call)
        if entry is not None:
            entry[0].notify(entry[1], method, value)

    # --- Board: what connections tell

    def admit(self, connection: Connection) -> str:
        """Counts the client in; refuses another user's process and one client too many."""
        self._connections[connection.number] = connection
        if len(self._connections) > limits.RPC_CLIENTS_MAX:
            self.count("refused")
            return f"more than {limits.RPC_CLIENTS_MAX} local clients; try again when some have ended"
        peer = connection.transport.get_extra_info("socket") if connection.transport is not None else None
        if peer is not None and sys.platform != "win32":
            uid = rpc.peer_of(peer)[0]
            connection.credential = LOCAL if uid is None else f"uid:{uid}"
            if uid not in (None, os.geteuid(), 0):
                self.count("refused")
                return "this daemon belongs to another user"
        return ""

    def may_take(self, connection: Connection, size: int) -> bool:
        """Whether a line of this client may be acted on in the present window; else it is held until its share."""
        if self._held or self._window >= limits.RPC_WINDOW_CALLS or self._window_bytes >= limits.RPC_WINDOW_BYTES:
            self.hold(connection)
            return False
        self._count_in(size)
        return True

    def hold(self, connection: Connection) -> None:
        """The client has lines for a later window."""
        self._held[connection.number] = connection
        self._end_window()

    def _count_in(self, size: int) -> None:
        self._window += 1
        self._window_bytes += size
        self._end_window()

    def _end_window(self) -> None:
        if not self._window_ends:
            assert self._loop is not None
            self._window_ends = True
            self._loop.call_soon(self._next_window)

    def _next_window(self) -> None:
        """Once the calls handed on have been begun with, those who are held have their shares of a new window."""
        assert self._loop is not None
        if self._waiting():
            self._loop.call_later(WINDOW_LOOK_S, self._next_window)
            return
        self._window = self._window_bytes = 0
        self._window_ends = False
        held, self._held = list(self._held.values()), {}
        share = max(1, limits.RPC_WINDOW_CALLS // max(1, len(held)))
        for at, connection in enumerate(held):
            if self._window >= limits.RPC_WINDOW_CALLS or self._window_bytes >= limits.RPC_WINDOW_BYTES:
                # Who had no share of this window is first in the next.
                self._held = {one.number: one for one in held[at:]} | self._held
                break
            for size in connection.take_share(share):
                self._count_in(size)

    def call(self, connection: Connection, request: int | str, method: str, params: dict[str, Any]) -> None:
        """Gives the call a number of its own and hands it on."""
        if len(self._calls) >= limits.RPC_CALLS_MAX:
            busy = BusyError(f"{limits.RPC_CALLS_MAX} local calls are open already", hint="try again in a moment")
            connection.pages.discard(request)
            connection.answer(request, None, busy.as_dict())
            return
        self._last_call += 1
        call = self._last_call
        connection.calls[request] = call
        self._calls[call] = (connection, request)
        self._on_call(call, method, params, connection.number, connection.credential)

    def hello(self) -> dict[str, Any]:
        """The answer to a good handshake."""
        return {"rpc_version": rpc.RPC_VERSION, "version": __version__, "pid": os.getpid()}

    def lost(self, connection: Connection) -> None:
        """The client's open calls are gone."""
        self._connections.pop(connection.number, None)
        self._held.pop(connection.number, None)
        calls = list(connection.calls.values())
        connection.calls.clear()
        for call in calls:
            del self._calls[call]
            self._on_gone(call)

    def lines_held(self, change: int) -> None:
        """What lines of all clients wait for has a bound: beyond it who has sent most of them is cut off."""
        self._lines_bytes += change
        if change > 0 and self._lines_bytes > limits.RPC_LINES_BYTES_MAX:
            max(self._connections.values(), key=lambda one: one.held).cut()

    def crowded(self) -> None:
        """A client leaves much unread: when all of them together leave too much, who leaves most is dropped."""
        sizes = [(one.unread, one.number) for one in self._connections.values()]
        if sum(size for size, _ in sizes) > limits.RPC_QUEUES_BYTES_MAX:
            self._connections[max(sizes)[1]].drop()

    def dirty(self, connection: Connection) -> None:
        """One flush at the end of this turn of the loop, whatever number of lines it produced."""
        assert self._loop is not None
        if not self._dirty:
            self._loop.call_soon(self._flush)
        self._dirty.append(connection)

    def count(self, what: str) -> None:
        """Counters of what went wrong: refused, malformed, slow."""
        self.counters[what] = self.counters.get(what, 0) + 1

    def _flush(self) -> None:
        dirty, self._dirty = self._dirty, []
        for connection in dirty:
            connection.flush()

    def _accept(self) -> Connection:
        self._last_client += 1
        return Connection(self, self._last_client)
