"""The Python API: a blocking client of the local daemon, which is also what every command uses.

    from clawnet.api import Client

    with Client() as client:
        print(client.call("wallet.balance")["available"])

Methods, params and answers are those of clawnet/rpc.py and docs/schema/. Needs the standard library alone.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from clawnet import __version__, limits, paths, rpc
from clawnet.errors import ClawnetError, NoDaemonError, TimedOutError, UnreachableError
from clawnet.paths import Home

SIGNAL_WAIT_S = 0.5
ANSWER_WAIT_S = 3.0
_RECEIVE_BYTES = 256 * 1024


class Event(NamedTuple):
    """Something the daemon said about `call`: a notification (`method` set), its answer, or its error."""

    call: int
    method: str
    value: Any
    error: ClawnetError | None


class Stream:
    """The notifications of one call, as (method, value); `result` is its answer, once the iteration has ended."""

    def __init__(self, client: Client, call: int, deadline: float | None) -> None:
        self.call = call
        self.result: Any = None
        self._client = client
        self._deadline = deadline

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        while True:
            event = self._client.receive(self.call, deadline=self._deadline)
            if event.method:
                yield event.method, event.value
                continue
            if event.error is not None:
                raise event.error
            self.result = event.value
            return


class Client:
    """A connection to the daemon of a home, made (and the daemon started) at the first call.

    `autostart` may be turned off by CLAWNET_AUTOSTART=0 too. `create_home` lets a home that was never initialised be
    initialised with defaults. `timeout_s` bounds each call; None means RPC_CALL_TIMEOUT_S. `program` is the command
    that starts clawnet (see clawnet.launch), `say` takes notices for people. One thread at a time may use it.
    """

    def __init__(
        self,
        home: Home | None = None,
        *,
        autostart: bool = True,
        create_home: bool = False,
        timeout_s: float | None = None,
        environ: Mapping[str, str] | None = None,
        program: Sequence[str] | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self._environ = os.environ if environ is None else environ
        self.home = home or paths.resolve_home(None, self._environ)
        self.hello: dict[str, Any] = {}
        self._autostart = autostart and self._environ.get("CLAWNET_AUTOSTART", "").lower() not in ("0", "false", "no")
        self._create_home = create_home
        self._timeout_s = limits.RPC_CALL_TIMEOUT_S if timeout_s is None else timeout_s
        self._program = program
        self._say = say or (lambda text: None)
        self._channel: Channel | None = None
        self._partial = b""
        self._lines: list[bytes] = []
        self._kept: list[Event] = []
        self._last_call = 0
        self._greeting = b""

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def connected(self) -> bool:
        """Whether there is a connection, as far as is known."""
        return self._channel is not None

    def connect(self, *, start: bool = True) -> None:
        """Connects, starting the daemon where that is allowed (and `start`); a second call does nothing.

        Raises NoDaemonError when there is no daemon, or whatever kept a new one from starting.
        """
        if self._channel is not None:
            return
        channel = open_channel(self.home)
        if channel is None:
            if not (self._autostart and start):
                raise no_daemon(self.home)
            from clawnet import launch

            launch.start(
                self.home,
                environ=self._environ,
                program=self._program,
                create_home=self._create_home,
                say=self._say,
            )
            channel = open_channel(self.home)
            if channel is None:
                raise NoDaemonError(f"the daemon of {self.home.dir} went away as soon as it had started")
        self._channel = channel
        # Sent together with the first call, so that a command costs one round trip.
        self._greeting = rpc.hello_line(__version__)

    def close(self) -> None:
        """Ends the connection; the daemon and accepted tasks go on."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        self._partial = b""
        self._lines.clear()
        self._kept.clear()

    # --- calls

    def call(self, method: str, params: dict[str, Any] | None = None, *, timeout_s: float | None = None) -> Any:
        """One call and its answer.

        Raises the ClawnetError that the daemon answered, UnreachableError when it is gone, TimedOutError after
        `timeout_s`.
        """
        call = self.send(method, params)
        deadline = time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)
        while True:
            event = self.receive(call, deadline=deadline)
            if event.error is not None:
                raise event.error
            if not event.method:
                return event.value

    def stream(self, method: str, params: dict[str, Any] | None = None, *, timeout_s: float | None = None) -> Stream:
        """A call that says things before its answer; `timeout_s` bounds the whole of it (None: no bound)."""
        call = self.send(method, params)
        return Stream(self, call, None if timeout_s is None else time.monotonic() + timeout_s)

    def send(self, method: str, params: dict[str, Any] | None = None) -> int:
        """Sends a call without waiting; what comes back is had by `receive`. Returns the call's number."""
        # A signal's handler may send a call of its own before this one has returned: the number is this one's alone.
        call = self._last_call = self._last_call + 1
        line = rpc.request_line(call, method, params or {})
        self.connect()
        assert self._channel is not None
        greeting, self._greeting = self._greeting, b""
        try:
            self._channel.write(greeting + line)
        except OSError as error:
            # A refusal may have been written before the daemon closed: it tells more than the broken pipe.
            if not greeting:
                raise self._gone() from error
        return call

    def receive(self, call: int | None = None, *, deadline: float | None = None) -> Event:
        """The next event, of `call` alone or of any; others are kept for later. `deadline` is in monotonic seconds."""
        for place, event in enumerate(self._kept):
            if call is None or event.call == call:
                return self._kept.pop(place)
        while True:
            event = self._event(rpc.parse_line(self._line(deadline)))
            if event.call == 0:
                if event.error is not None:
                    self.close()
                    raise event.error
                rpc.check_daemon(event.value)
                self.hello = event.value
            elif call is None or event.call == call:
                return event
            else:
                self._kept.append(event)

    def kept(self, call: int) -> Event | None:
        """An event of `call` that came while another call was waited for; None when there is none."""
        for place, event in enumerate(self._kept):
            if event.call == call:
                return self._kept.pop(place)
        return None

    # --- lines

    @staticmethod
    def _event(message: dict[str, Any]) -> Event:
        params = message.get("params")
        if isinstance(params, dict) and "method" in message:
            return Event(int(params.get("id", 0)), str(message["method"]), params.get("value"), None)
        call = message.get("id")
        error = rpc.error_to_exception(message["error"]) if message.get("error") is not None else None
        return Event(call if isinstance(call, int) else 0, "", message.get("result"), error)

    def _line(self, deadline: float | None) -> bytes:
        while not self._lines:
            if self._channel is None:
                raise self._gone()
            left_s = None if deadline is None else deadline - time.monotonic()
            if left_s is not None and left_s <= 0:
                raise TimedOutError("the daemon did not answer in time", hint="`clawnet daemon status` shows its state")
            try:
                # Python acts on a signal that came just before a read began only when that read ends.
                data = self._channel.read(SIGNAL_WAIT_S if left_s is None else min(left_s, SIGNAL_WAIT_S))
            except TimeoutError:
                continue
            except OSError as error:
                raise self._gone() from error
            if not data:
                raise self._gone()
            if b"\n" not in data:
                self._partial += data
                if len(self._partial) > limits.RPC_ANSWER_BYTES_MAX:
                    self.close()
                    raise UnreachableError(f"the daemon's answer is over {limits.RPC_ANSWER_BYTES_MAX} bytes")
                continue
            *lines, rest = (self._partial + data).split(b"\n")
            self._lines = lines[::-1]
            self._partial = rest
        return self._lines.pop()

    def _gone(self) -> NoDaemonError:
        self.close()
        return NoDaemonError(
            "the daemon went away before it answered",
            hint="`clawnet daemon status` and `clawnet daemon logs` tell more; accepted tasks are kept",
        )


# --- the way to the daemon


class Channel:
    """Bytes to and from the daemon over a Unix socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def write(self, data: bytes) -> None:
        """Writes all of it; OSError when the daemon is gone."""
        self._connection.settimeout(limits.RPC_CALL_TIMEOUT_S)
        self._connection.sendall(data)

    def read(self, timeout_s: float | None) -> bytes:
        """Some bytes; empty at the end. TimeoutError after `timeout_s`."""
        self._connection.settimeout(timeout_s)
        return self._connection.recv(_RECEIVE_BYTES)

    def close(self) -> None:
        """Ends the connection."""
        self._connection.close()

    @property
    def pid(self) -> int | None:
        """The daemon's process id as the system tells it."""
        return rpc.peer_of(self._connection)[1]


class PipeChannel(Channel):
    """The same over a Windows named pipe. Reads there cannot be bounded in time."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[self._pipe.write(view) :]

    def read(self, timeout_s: float | None) -> bytes:
        return bytes(self._pipe.read(_RECEIVE_BYTES) or b"")

    def close(self) -> None:
        self._pipe.close()

    @property
    def pid(self) -> int | None:
        return None


def no_daemon(home: Home) -> NoDaemonError:
    """Nobody listens, and starting a daemon was not allowed."""
    return NoDaemonError(f"no daemon runs for {home.dir}", hint="start it with `clawnet daemon start`")


def answers(home: Home) -> bool:
    """Whether a daemon serves this home. One that was killed accepts connections until the system has removed it.

    One that has not answered after ANSWER_WAIT_S is taken for busy. Raises UnreachableError as `open_channel` does.
    """
    channel = open_channel(home)
    if channel is None:
        return False
    try:
        channel.write(rpc.hello_line(__version__))
        return bool(channel.read(ANSWER_WAIT_S))
    except TimeoutError:
        return True
    except OSError:
        return False
    finally:
        channel.close()


def open_channel(home: Home) -> Channel | None:
    """A connection to the daemon of this home, or None when none listens.

    Raises UnreachableError when the socket is another user's or cannot be opened.
    """
    if sys.platform == "win32":
        return _open_pipe(home.pipe_name)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(limits.RPC_HELLO_TIMEOUT_S)
        connection.connect(str(home.socket))
        uid = rpc.peer_of(connection)[0]
    except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
        connection.close()
        return None
    except OSError as error:
        connection.close()
        raise UnreachableError(f"cannot reach the daemon at {home.socket}: {error.strerror or error}") from error
    if uid not in (None, os.geteuid()) and os.geteuid() != 0:
        connection.close()
        raise UnreachableError(
            f"the daemon at {home.socket} runs as another user (uid {uid})",
            hint="use a home of your own: --home or CLAWNET_HOME",
        )
    return Channel(connection)


def _open_pipe(name: str) -> Channel | None:
    """A Windows pipe whose instances are all taken is busy for a moment only."""
    deadline = time.monotonic() + limits.RPC_HELLO_TIMEOUT_S
    while True:
        try:
            return PipeChannel(open(name, "r+b", buffering=0))  # noqa: PTH123 - lives as long as the client
        except FileNotFoundError:
            return None
        except OSError as error:
            if getattr(error, "winerror", None) != 231 or time.monotonic() > deadline:
                raise UnreachableError(f"cannot reach the daemon at {name}: {error.strerror or error}") from error
            time.sleep(0.02)
