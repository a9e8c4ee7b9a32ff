"""The local socket: server and clients over the real thing, with well-behaved, slow, greedy and broken callers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from clawnet import limits, rpc
from clawnet.api import Client
from clawnet.api_async import AsyncClient
from clawnet.errors import (
    ConfigError,
    DataError,
    FundsError,
    NoDaemonError,
    NotFoundError,
    StoppedError,
    TimedOutError,
    UnreachableError,
)
from clawnet.ipc.connection import Connection
from clawnet.ipc.server import IpcServer
from clawnet.paths import Home, make_private_dir


class Answer(msgspec.Struct):
    available: str


class Served:
    """A real IpcServer in a loop of its own thread; `gone` and `seen` tell what the server's owner was told."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self.seen: list[tuple[str, dict[str, Any]]] = []
        self.gone: list[int] = []
        self.held: list[int] = []
        self.changed = threading.Condition()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.unbegun = 0
        self.server = IpcServer(home.socket, self.on_call, self.on_gone, lambda: self.unbegun)
        self.run(self.server.start())

    def run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(10)

    def soon(self, function: Callable[..., None], *args: Any) -> None:
        self.loop.call_soon_threadsafe(function, *args)

    def on_call(self, call: int, method: str, params: dict[str, Any], client: int, credential: str) -> None:
        with self.changed:
            self.seen.append((method, params))
            if method == "hold":
                self.held.append(call)
            self.changed.notify_all()
        if method == "echo":
            self.server.reply(call, params)
        elif method == "struct":
            self.server.reply(call, Answer("12.5"))
        elif method == "refuse":
            self.server.reply(call, None, FundsError("too dear", hint="send credits", wanted="5").as_dict())
        elif method == "count":
            for number in range(params["to"]):
                self.server.notify(call, "tick", {"n": number})
            self.server.reply(call, {"done": True})
        elif method == "flood":
            for _ in range(64):
                self.server.notify(call, "tick", "x" * 1_000_000)

    def on_gone(self, call: int) -> None:
        with self.changed:
            self.gone.append(call)
            self.changed.notify_all()

    def wait(self, condition: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, 10)

    def stop(self) -> None:
        self.run(self.server.stop())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture
def served(home: Home) -> Iterator[Served]:
    serving = Served(home)
    yield serving
    serving.stop()
    assert not home.socket.exists()
    assert serving.server.clients == 0


def raw(home: Home) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(10)
    connection.connect(str(home.socket))
    return connection


def lines_until_end(connection: socket.socket) -> list[dict[str, Any]]:
    data = b""
    while piece := connection.recv(65536):
        data += piece
    connection.close()
    return [json.loads(line) for line in data.splitlines()]


def test_a_call_is_answered_and_a_struct_is_an_object(served: Served) -> None:
    with Client(served.home, autostart=False) as client:
        assert client.call("echo", {"a": "grün", "b": [1, None]}) == {"a": "grün", "b": [1, None]}
        assert client.call("struct") == {"available": "12.5"}
        assert client.hello["pid"] == os.getpid()


def test_an_error_arrives_as_the_exception_it_was(served: Served) -> None:
    with Client(served.home, autostart=False) as client, pytest.raises(FundsError) as caught:
        client.call("refuse")
    assert (caught.value.message, caught.value.hint, caught.value.exit_code) == ("too dear", "send credits", 79)
    assert caught.value.details == {"wanted": "5"}


def test_a_stream_gives_notifications_in_order_then_the_answer(served: Served) -> None:
    with Client(served.home, autostart=False) as client:
        stream = client.stream("count", {"to": 500})
        assert [value["n"] for _, value in stream] == list(range(500))
        assert stream.result == {"done": True}


def test_answers_of_another_call_are_kept_for_it(served: Served) -> None:
    with Client(served.home, autostart=False) as client:
        held = client.send("hold")
        other = client.send("echo", {"n": 1})
        assert client.call("echo", {"n": 2}) == {"n": 2}
        assert client.receive(other).value == {"n": 1}
        served.soon(served.server.reply, served.held[0], "late")
        assert client.receive(held).value == "late"


def test_a_call_that_a_signal_sends_while_another_is_sent_takes_no_number_of_it(served: Served) -> None:
    with Client(served.home, autostart=False) as client:
        client.connect()
        channel = client._channel
        assert channel is not None
        plain, sent = channel.write, []

        def interrupted(data: bytes) -> None:
            plain(data)
            if not sent:
                sent.append(0)
                sent[0] = client.send("echo", {"from": "the handler"})

        channel.write = interrupted  # type: ignore[method-assign]
        call = client.send("echo", {"from": "the program"})
        assert client.receive(call).value == {"from": "the program"}
        assert client.receive(sent[0]).value == {"from": "the handler"}


def test_a_signal_that_does_not_end_the_wait_for_an_answer_is_acted_on_all_the_same(served: Served) -> None:
    begun, acted = threading.Event(), threading.Event()

    def answer(text: str) -> None:
        served.soon(lambda: [served.server.reply(call, text) for call in served.held])

    def elsewhere() -> None:
        # Taken by this thread, the signal leaves the other's read alone, as one does that comes just before it.
        assert begun.wait(10)
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        if not acted.wait(10):
            answer("nobody acted on it")

    before = signal.signal(signal.SIGUSR1, lambda *_: (acted.set(), answer("acted on")))
    thread = threading.Thread(target=elsewhere)
    thread.start()
    with Client(served.home, autostart=False) as client:
        held = client.send("hold")
        client.call("echo")  # the server has the other call now
        channel = client._channel
        assert channel is not None
        read = channel.read
        channel.read = lambda timeout_s: begun.set() or read(timeout_s)  # type: ignore[method-assign,func-returns-value]
        assert client.receive(held).value == "acted on"
    thread.join()
    signal.signal(signal.SIGUSR1, before)


def test_a_thousand_calls_in_flight_on_one_connection(served: Served) -> None:
    async def many() -> list[Any]:
        async with AsyncClient(served.home) as client:
            return await asyncio.gather(*(client.call("echo", {"n": n}) for n in range(1_000)))

    assert asyncio.run(many()) == [{"n": n} for n in range(1_000)]


def test_the_async_client_streams_and_raises(served: Served) -> None:
    async def use() -> list[tuple[str, Any]]:
        async with AsyncClient(served.home) as client:
            with pytest.raises(FundsError):
                await client.call("refuse")
            return [event async for event in client.stream("count", {"to": 2})]

    assert asyncio.run(use()) == [("tick", {"n": 0}), ("tick", {"n": 1}), ("", {"done": True})]


def test_more_calls_than_allowed_wait_instead_of_failing(served: Served) -> None:
    over = limits.RPC_CALLS_PER_CLIENT_MAX + 10
    with Client(served.home, autostart=False) as client:
        calls = [client.send("hold") for _ in range(over)]
        served.wait(lambda: len(served.held) == limits.RPC_CALLS_PER_CLIENT_MAX)
        for call in list(served.held):
            served.soon(served.server.reply, call, None)
        served.wait(lambda: len(served.held) == over)
        for call in served.held[-10:]:
            served.soon(served.server.reply, call, None)
        assert {client.receive().call for _ in calls} == set(calls)


def test_the_owner_of_a_call_hears_that_its_client_is_gone(served: Served) -> None:
    client = Client(served.home, autostart=False)
    client.send("hold")
    served.wait(lambda: len(served.held) == 1)
    client.close()
    served.wait(lambda: served.gone == served.held)
    served.soon(served.server.reply, served.held[0], "nobody hears this")


def test_a_client_that_does_not_read_is_dropped_and_others_go_on(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "RPC_QUEUE_BYTES_MAX", 16 * limits.MIB)
    slow = raw(served.home)
    slow.sendall(rpc.hello_line("0") + rpc.request_line(1, "flood", {}) + rpc.request_line(2, "flood", {}))
    served.wait(lambda: len(served.gone) == 1)
    assert served.server.counters == {"slow": 1}
    with Client(served.home, autostart=False) as client:
        assert client.call("echo") == {}
    slow.close()


def test_a_large_answer_reaches_a_client_that_reads(served: Served) -> None:
    text = "x" * (limits.RPC_LINE_BYTES_MAX - 1_000)
    with Client(served.home, autostart=False) as client:
        assert client.call("echo", {"text": text}) == {"text": text}
        with pytest.raises(DataError, match="over the limit"):
            client.call("echo", {"text": text + "x" * 1_000})


@pytest.mark.parametrize(
    ("sent", "code", "part"),
    [
        (b"garbage\n", -32700, "not JSON"),
        (b"\xff\xfe\n", -32700, "not JSON"),
        (b"[1]\n", -32600, "must be an object"),
        (b'{"jsonrpc":"2.0","method":"echo"}\n', -32600, "needs an id"),
        (b'{"jsonrpc":"2.0","id":1}\n', -32600, "needs a method"),
        (b'{"jsonrpc":"2.0","id":1,"method":"echo","params":[]}\n', -32600, "params must be"),
        (b'{"jsonrpc":"2.0","id":1,"method":"echo"}\n', -32000, "must be hello"),
        (b"[" * 100_000 + b"\n", -32700, "not JSON"),
    ],
)
def test_what_is_no_call_is_refused_by_name(served: Served, sent: bytes, code: int, part: str) -> None:
    connection = raw(served.home)
    connection.sendall(sent)
    (answer,) = lines_until_end(connection)
    assert answer["error"]["code"] == code
    assert part in answer["error"]["message"]
    assert not served.seen


def test_an_endless_line_ends_the_connection(served: Served) -> None:
    connection = raw(served.home)
    try:
        for _ in range(limits.RPC_LINE_BYTES_MAX // 65536 + 64):
            connection.sendall(b"x" * 65536)
    except OSError:
        pass
    served.wait(lambda: True)
    connection.close()
    with Client(served.home, autostart=False) as client:
        client.call("echo")
    assert served.server.counters["malformed"] == 1


@pytest.mark.parametrize(("version", "part"), [(rpc.RPC_VERSION + 1, "daemon restart"), (0, "upgrade")])
def test_another_version_of_the_protocol_is_told_what_to_do(
    served: Served, monkeypatch: pytest.MonkeyPatch, version: int, part: str
) -> None:
    line = rpc.request_line(0, "hello", {"rpc_version": version, "version": "9"})
    monkeypatch.setattr(rpc, "hello_line", lambda text: line)
    with Client(served.home, autostart=False) as client, pytest.raises(UnreachableError) as caught:
        client.call("echo")
    assert part in caught.value.hint
    assert caught.value.details["pid"] == os.getpid()
    assert not served.seen


def test_the_socket_is_for_its_owner_alone(served: Served) -> None:
    assert stat.S_IMODE(served.home.socket.stat().st_mode) == 0o600
    assert stat.S_IMODE(served.home.run_dir.stat().st_mode) == 0o700


def test_a_second_daemon_is_told_who_listens(served: Served) -> None:
    second = IpcServer(served.home.socket, served.on_call, served.on_gone)
    with pytest.raises(ConfigError, match=f"pid {os.getpid()}"):
        served.run(second.start())
    with Client(served.home, autostart=False) as client:
        assert client.call("echo") == {}


def test_the_socket_of_a_killed_daemon_is_replaced(home: Home) -> None:
    make_private_dir(home.run_dir)
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(home.socket))
    dead.close()
    with pytest.raises(UnreachableError, match="no daemon runs"):
        Client(home, autostart=False).connect()
    serving = Served(home)
    with Client(home, autostart=False) as client:
        assert client.call("echo") == {}
    serving.stop()


def test_a_window_of_calls_is_shared_and_the_rest_stays_with_its_clients(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: set[int] = set()
    hold = served.server.hold

    def noted(connection: Connection) -> None:
        hold(connection)
        with served.changed:
            held.add(connection.number)
            served.changed.notify_all()

    def seen(word: str) -> int:
        return sum(params.get("word") == word for _, params in served.seen)

    monkeypatch.setattr(served.server, "hold", noted)
    window = limits.RPC_WINDOW_CALLS
    served.unbegun = 1
    calls = [rpc.request_line(number, "echo", {"word": "greedy"}) for number in range(1, 4 * window + 1)]
    with raw(served.home) as greedy, Client(served.home, autostart=False) as modest:
        greedy.sendall(rpc.hello_line("0") + b"".join(calls))
        served.wait(lambda: len(served.seen) >= window - 1 and len(held) == 1)
        modest.send("echo", {"word": "modest"})
        served.wait(lambda: len(held) == 2)
        assert (seen("greedy"), seen("modest")) == (window - 1, 0), "its hello and no more before these were begun with"
        served.unbegun = 0
        served.wait(lambda: len(served.seen) >= 4 * window + 1)
        assert (seen("greedy"), seen("modest")) == (4 * window, 1)
        words = [params["word"] for _, params in served.seen]
        assert words.index("modest") <= window - 1 + window // 2, "who waits has an even share of the next window"


def test_who_reads_no_answers_gives_no_more_calls(served: Served) -> None:
    connection = raw(served.home)
    connection.sendall(rpc.hello_line("0"))
    line = rpc.request_line(1, "echo", {"data": "x" * 100_000})
    connection.setblocking(False)
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while sent < 64 * limits.MIB:
            sent += connection.send(line.replace(b'"id":1,', b'"id":%d,' % (sent + 1)))
    assert sent < 64 * limits.MIB, "the rest of what it wants to say is its own to keep"
    with Client(served.home, autostart=False) as client:
        assert client.call("echo", {"n": 1}) == {"n": 1}
        unread = served.run(_sum(served))
    assert unread < 4 * limits.MIB
    connection.close()


def test_a_client_has_a_few_large_answers_open_at_once(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc, "PAGES", frozenset(("hold",)))
    few = limits.RPC_PAGES_PER_CLIENT_MAX
    with Client(served.home, autostart=False) as client, Client(served.home, autostart=False) as other:
        calls = [client.send("hold", {"n": n}) for n in range(3 * few)]
        served.wait(lambda: len(served.held) == few)
        assert other.call("echo", {"n": 1}) == {"n": 1}
        assert len(served.held) == few
        for n in range(3 * few):
            served.wait(lambda n=n: len(served.held) > n)
            served.soon(served.server.reply, served.held[n], n)
        assert [client.receive(call).value for call in calls] == list(range(3 * few))


async def _sum(served: Served) -> int:
    return sum(connection.unread for connection in served.server._connections.values())


def test_when_all_leave_too_much_unread_who_leaves_most_is_dropped(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "RPC_QUEUES_BYTES_MAX", 6 * limits.MIB)
    silent = [raw(served.home) for _ in range(4)]
    for connection in silent:
        connection.sendall(rpc.hello_line("0") + rpc.request_line(1, "hold", {}))
    with served.changed:
        assert served.changed.wait_for(lambda: len(served.held) == 4, 10)
    for at, call in enumerate(served.held):
        for _ in range(1 + (at == 2)):
            served.soon(served.server.notify, call, "x", "y" * 2 * limits.MIB)
    with Client(served.home, autostart=False) as client:
        client.call("echo")
    assert served.server.counters["slow"] == 1
    for connection in silent:
        connection.close()


def test_lines_that_never_end_have_one_bound_over_all_clients(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "RPC_LINES_BYTES_MAX", 4 * limits.MIB)
    greedy, *many = (raw(served.home) for _ in range(8))
    greedy.sendall(rpc.hello_line("0") + b"x" * limits.MIB)
    while served.run(_lines(served)) < limits.MIB:
        pass
    for connection in many:
        connection.sendall(rpc.hello_line("0") + b"x" * (limits.MIB // 2))
    *_, said = lines_until_end(greedy)
    assert "4 MiB" in said["error"]["message"]
    with Client(served.home, autostart=False) as client:
        assert client.call("echo") == {}
    for connection in many:
        connection.close()


async def _lines(served: Served) -> int:
    return sum(connection.held for connection in served.server._connections.values())


def test_lines_that_cannot_be_begun_with_count_too(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "RPC_LINES_BYTES_MAX", 3 * limits.MIB)
    monkeypatch.setattr(limits, "RPC_CALLS_PER_CLIENT_MAX", 1)
    many = [raw(served.home) for _ in range(2)]
    for connection in many:
        connection.sendall(rpc.hello_line("0") + rpc.request_line(1, "hold", {}))
    served.wait(lambda: len(served.held) == 2)
    many[0].sendall(rpc.request_line(2, "echo", {"text": "x" * limits.MIB}))
    many[1].sendall(rpc.request_line(2, "echo", {"text": "x" * 2 * limits.MIB}))
    *_, said = lines_until_end(many[1])
    assert "3 MiB" in said["error"]["message"]
    served.soon(served.server.reply, served.held[0], {})
    served.wait(lambda: any(method == "echo" for method, _ in served.seen))
    for connection in many:
        connection.close()


def test_no_more_clients_than_the_limit(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "RPC_CLIENTS_MAX", 1)
    with Client(served.home, autostart=False) as client:
        client.call("echo")
        (answer,) = lines_until_end(raw(served.home))
        assert "more than 1 local clients" in answer["error"]["message"]
        assert client.call("echo") == {}


def test_waiting_ends_when_the_time_is_up_or_the_daemon_goes(home: Home) -> None:
    serving = Served(home)
    client = Client(home, autostart=False)
    with pytest.raises(TimedOutError):
        client.call("hold", timeout_s=0.01)
    held = client.send("hold")
    serving.stop()
    assert isinstance(client.receive(held).error, StoppedError)
    with pytest.raises(NoDaemonError, match="went away"):
        client.receive(held)


def test_text_that_is_no_unicode_is_refused_before_it_is_sent(served: Served) -> None:
    with Client(served.home, autostart=False) as client, pytest.raises(DataError, match="UTF-8"):
        client.call("echo", {"argv": ["caf\udce9"]})


def test_an_unknown_error_code_keeps_its_text() -> None:
    error = rpc.error_to_exception({"code": -32000, "message": "m", "data": {"code": "newer_code", "message": "story"}})
    assert (error.message, error.exit_code) == ("story", 70)
    found = rpc.error_to_exception(rpc.error_object(NotFoundError("no task 12", task="12")))
    assert isinstance(found, NotFoundError)
    assert found.details == {"task": "12"}
