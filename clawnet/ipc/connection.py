"""One local client: lines in, calls out, answers queued within bounds. The same for the Unix socket and the pipe."""

from __future__ import annotations

import asyncio
from typing import Any, Final, Protocol, cast

import msgspec

from clawnet import limits, rpc
from clawnet.errors import DataError, InternalError

_encoder: Final = msgspec.json.Encoder()
_decoder: Final = msgspec.json.Decoder()
_WRITE_BYTES: Final = 256 * limits.KIB


class Board(Protocol):
    """What a connection needs of its server."""

    def admit(self, connection: Connection) -> str:
        """Empty, or why this client is refused."""

    def call(self, connection: Connection, request: int | str, method: str, params: dict[str, Any]) -> None:
        """A well-formed call of a client that has said hello."""

    def hello(self) -> dict[str, Any]:
        """The answer to a good handshake."""

    def lost(self, connection: Connection) -> None:
        """The client is gone, for whatever reason; said once for every connection made."""

    def may_take(self, connection: Connection, size: int) -> bool:
        """Whether a line of this size may be acted on now; else the connection is held."""

    def hold(self, connection: Connection) -> None:
        """The connection has more lines; its take_share is called when it may act on some."""

    def lines_held(self, change: int) -> None:
        """So many bytes more of lines are held, or fewer; the client that holds most may be cut off for that."""

    def crowded(self) -> None:
        """A client leaves much unread; it or another may be dropped for that."""

    def dirty(self, connection: Connection) -> None:
        """The connection has lines to write when this turn of the loop ends."""

    def count(self, what: str) -> None:
        """A counter goes up: refused, malformed, slow."""


class Connection(asyncio.Protocol):
    """A client. A line over RPC_LINE_BYTES_MAX, or an unread backlog over RPC_QUEUE_BYTES_MAX, ends it.

    `held` are the bytes of its lines that are not whole, or that nobody has acted on.
    """

    def __init__(self, board: Board, number: int) -> None:
        self.number = number
        self.held = 0
        self.credential = "local"
        self.calls: dict[int | str, int] = {}
        self.pages: set[int | str] = set()
        self.transport: asyncio.Transport | None = None
        self._board = board
        self._greeted = False
        self._partial = bytearray()
        self._waiting: list[bytes] = []
        self._paused = False
        self._unread = False
        self._scheduled = False
        self._closing = False
        self._out: list[bytes] = []
        self._out_bytes = 0

    # --- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=limits.RPC_UNREAD_BYTES)
        refusal = self._board.admit(self)
        if refusal:
            self.fail(None, rpc.INVALID_REQUEST, refusal)

    def data_received(self, data: bytes) -> None:
        if self._closing:
            return
        if b"\n" not in data:
            self._partial += data
            self._check_length(len(self._partial))
            self._count_held()
            return
        first, *lines = data.split(b"\n")
        last = lines.pop()
        lines.insert(0, bytes(self._partial) + first)
        self._partial = bytearray(last)
        if self._check_length(max(map(len, lines)), len(last)):
            self._waiting += lines
            self.take()
        else:
            self._count_held()

    def eof_received(self) -> bool:
        # A client that no longer writes is taken for gone: else one that was killed would be followed for ever.
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self._closing = True
        self._count_held()
        self._board.lost(self)

    def pause_writing(self) -> None:
        """Answers lie unread: no more calls are taken from a client before it has read them."""
        self._unread = True

    def resume_writing(self) -> None:
        self._unread = False
        self.take()

    # --- lines in

    def _check_length(self, *sizes: int) -> bool:
        if max(sizes) <= limits.RPC_LINE_BYTES_MAX:
            return True
        self._board.count("malformed")
        self.fail(None, rpc.INVALID_REQUEST, f"a line is over the limit of {limits.RPC_LINE_BYTES_MAX} bytes")
        return False

    def take(self) -> None:
        """Acts on lines received while the client has a call to spare and the server has room; else reading stops."""
        done = 0
        waiting, self._waiting = self._waiting, []
        for line in waiting:
            if self._is_full() or not self._board.may_take(self, len(line)):
                break
            if line and not self._take_line(line):
                break
            done += 1
        self._waiting = waiting[done:]
        self._hold(bool(self._waiting))
        if self._waiting or self._partial or self.held:
            self._count_held()

    def take_share(self, count: int) -> list[int]:
        """Acts on so many of the lines that were held; their sizes. The rest waits for the next share."""
        sizes: list[int] = []
        for line in self._waiting[:count]:
            if self._is_full() or (line and not self._take_line(line)):
                break
            sizes.append(len(line))
        else:
            if len(self._waiting) > len(sizes):
                self._board.hold(self)
        self._waiting = self._waiting[len(sizes) :]
        self._hold(bool(self._waiting))
        self._count_held()
        return sizes

    def _count_held(self) -> None:
        """Tells the server what is held here; nothing is where the client is on its way out."""
        if self._closing:
            self._partial.clear()
            self._waiting.clear()
        held = len(self._partial) + sum(map(len, self._waiting))
        change, self.held = held - self.held, held
        if change:
            self._board.lines_held(change)

    def cut(self) -> None:
        """Ends a client that holds most of what all together may."""
        self._board.count("refused")
        most = limits.RPC_LINES_BYTES_MAX // limits.MIB
        self.fail(
            None,
            rpc.INVALID_REQUEST,
            f"local clients have sent more than {most} MiB of calls that are not whole, or have to wait, and this one "
            "most of them; send less at once",
        )
        self._count_held()

    def _is_full(self) -> bool:
        return self._closing or self._unread or len(self.calls) >= limits.RPC_CALLS_PER_CLIENT_MAX

    def room(self) -> None:
        """A call was answered: lines that waited for that are taken, in a turn of their own."""
        if self._paused and not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_soon(self._take_again)

    def _take_again(self) -> None:
        self._scheduled = False
        self.take()

    def _hold(self, full: bool) -> None:
        if full != self._paused and self.transport is not None and not self._closing:
            self._paused = full
            (self.transport.pause_reading if full else self.transport.resume_reading)()

    def _take_line(self, line: bytes) -> bool:
        """Acts on a line; False when it must wait until an answer of the client's has gone out."""
        try:
            request = _decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            self._board.count("malformed")
            self.fail(None, rpc.PARSE_ERROR, f"not JSON: {error}")
            return True
        call, method, params, problem = _parts(request)
        if problem or call in self.calls:
            self._board.count("malformed")
            self.fail(call, rpc.INVALID_REQUEST, problem or f"call id {call} is still open")
        elif not self._greeted:
            self._greet(call, method, params)
        elif method == rpc.HELLO:
            self.answer(call, self._board.hello(), None)
        else:
            if method in rpc.PAGES:
                if len(self.pages) >= limits.RPC_PAGES_PER_CLIENT_MAX:
                    return False
                self.pages.add(call)
            self._board.call(self, call, method, params)
        return True

    def _greet(self, call: int | str, method: str, params: dict[str, Any]) -> None:
        wrong = rpc.check_caller(params) if method == rpc.HELLO else DataError("the first call must be hello")
        if wrong is None:
            self._greeted = True
            self.answer(call, self._board.hello(), None)
            return
        self._board.count("refused")
        wrong.details.setdefault("pid", self._board.hello()["pid"])
        self.answer(call, None, wrong.as_dict())
        self.close()

    # --- lines out

    def answer(self, request: int | str, value: Any, error: dict[str, Any] | None) -> None:
        """The one answer to a call: a JSON-able value or struct, or ClawnetError.as_dict()."""
        if error is None:
            self._write({"jsonrpc": "2.0", "id": request, "result": value})
        else:
            wrapped = {"code": rpc.APPLICATION_ERROR, "message": error.get("message", ""), "data": error}
            self._write({"jsonrpc": "2.0", "id": request, "error": wrapped})

    def notify(self, request: int | str, method: str, value: Any) -> None:
        """A streamed part of the answer to a call."""
        self._write({"jsonrpc": "2.0", "method": method, "params": {"id": request, "value": value}})

    def fail(self, request: int | str | None, code: int, message: str) -> None:
        """An error of the protocol itself, after which nothing this client says can be trusted to be what it means."""
        self._write({"jsonrpc": "2.0", "id": request, "error": rpc.error_object(DataError(message), code)})
        self.close()

    def _write(self, value: dict[str, Any]) -> None:
        if self._closing:
            return
        try:
            line = _encoder.encode(value)
        except (TypeError, ValueError, UnicodeEncodeError) as error:
            wrong = InternalError(f"the answer cannot be written as JSON: {error}")
            line = _encoder.encode({"jsonrpc": "2.0", "id": value.get("id"), "error": rpc.error_object(wrong)})
        if not self._out:
            self._board.dirty(self)
        self._out.append(line)
        self._out_bytes += len(line) + 1
        if self._out_bytes > _WRITE_BYTES:
            self.flush()

    def flush(self) -> None:
        """Writes what this turn of the loop has for the client, at once; drops a client that does not read.

        A single answer may be larger than the limit: only what lies unread before it counts.
        """
        if self.transport is None or not self._out:
            return
        data = b"\n".join(self._out) + b"\n"
        self._out.clear()
        self._out_bytes = 0
        if self.unread > limits.RPC_QUEUE_BYTES_MAX:
            self.drop()
            return
        self.transport.write(data)
        if self._unread:
            self._board.crowded()

    @property
    def unread(self) -> int:
        """Bytes that wait for the client to read."""
        return self.transport.get_write_buffer_size() if self.transport is not None else 0

    def drop(self) -> None:
        """Ends the connection of a client that does not read, unsent answers included."""
        self._board.count("slow")
        self._closing = True
        if self.transport is not None:
            self.transport.abort()

    def close(self) -> None:
        """Ends the connection once what is queued has been read, without waiting for it here."""
        if self.transport is not None and not self.transport.is_closing():
            self.flush()
            self._closing = True
            self.transport.close()


def _parts(request: Any) -> tuple[int | str, str, dict[str, Any], str]:
    """(id, method, params, problem) of a decoded line; a problem leaves the other fields harmless."""
    if not isinstance(request, dict):
        return 0, "", {}, f"a call must be an object, not {type(request).__name__}"
    call, method, params = request.get("id"), request.get("method"), request.get("params", {})
    if isinstance(call, bool) or not isinstance(call, (int, str)):
        return 0, "", {}, "a call needs an id, an integer or a text"
    if not isinstance(method, str) or not method:
        return call, "", {}, "a call needs a method"
    if not isinstance(params, dict):
        return call, "", {}, "params must be an object"
    return call, method, params, ""
