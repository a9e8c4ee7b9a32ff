"""Nothing of a task's output is lost: the client, either daemon or the link dies while numbered lines are printed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import Nodes
from tests.cli.harness import Node, connected, join, read_until

pytestmark = pytest.mark.slow

LINES = 300
WHOLE = b"".join(b"line %d\n" % n for n in range(LINES))
PRINTS = f"i=0; while [ $i -lt {LINES} ]; do echo line $i; echo note $i >&2; i=$((i+1)); sleep 0.01; done; exit 7"
NOTES = WHOLE.replace(b"line", b"note")
ASKS_MEMBERS = {"CLAWNET_MARKET_SELF": "never", "CLAWNET_MARKET_SEND_TO_SHELL": "member"}


@pytest.fixture
def pair(nodes: Nodes) -> Iterator[tuple[Node, Node]]:
    """A requester that never works for itself, and a worker that runs members' commands."""
    alice, bob = nodes("alice", **ASKS_MEMBERS).start(), nodes("bob").start()
    join(alice, bob)
    alice.until("sees bob", lambda: connected(alice))
    if bob.ask("status")["shell"]["member"] != "sandboxed":
        pytest.skip("bubblewrap not installed")
    yield alice, bob


def submit(alice: Node, script: str = PRINTS, *more: str) -> str:
    return alice("market", "submit", "--type", "shell", *more, "--", script).line


def upto(process: subprocess.Popen[bytes], out: bytes, number: int) -> bytes:
    """What the command has printed, at least up to this line."""
    line = b"line %d\n" % number
    try:
        return out if line in out else out + read_until(process.stdout, line)
    except AssertionError as error:
        raise AssertionError(f"{error}; exit code {process.wait(30)}: {process.stderr.read()[-2000:]!r}") from error


def complete(process: subprocess.Popen[bytes], before: tuple[bytes, bytes] = (b"", b"")) -> None:
    """The command ended with the task's own code, and printed every byte of it on its stream."""
    out, err = process.communicate(timeout=60)
    assert process.returncode == 7, err[-2000:]
    assert before[0] + out == WHOLE
    assert before[1] + err == NOTES


def test_a_run_whose_client_was_killed_is_attached_again(pair: tuple[Node, Node]) -> None:
    alice, _ = pair
    with alice.popen("run", "--", "sh", "-c", PRINTS) as run:
        read_until(run.stdout, b"line 40\n")
        run.kill()
    task = alice.ask("task.list", limit=1)["items"][0]["task_id"]
    with alice.popen("run", "--attach", task) as attached, alice.popen("market", "logs", "-f", task) as logs:
        complete(attached)
        assert logs.communicate(timeout=60) == (WHOLE, NOTES) and logs.returncode == 0
    with alice.popen("run", "--attach", task[:10]) as late:
        complete(late)
    done = alice("run", "--attach", task, "--from-end")
    assert (done.code, done.out, done.err) == (7, "", "")
    assert alice.raw("market", "logs", task)[1] == WHOLE


def test_commands_that_wait_outlive_their_daemon(pair: tuple[Node, Node], tmp_path: Path) -> None:
    alice, _ = pair
    status = tmp_path / "status.json"
    slow = PRINTS.replace("sleep 0.01", "sleep 0.04")  # so that it is not over before the second kill
    with alice.popen("run", "--status-file", str(status), "--", "sh", "-c", slow) as run:
        out = read_until(run.stdout, b"line 40\n")
        task = alice.ask("task.list", limit=1)["items"][0]["task_id"]
        with alice.popen("market", "wait", task) as wait, alice.popen("market", "logs", "-f", task) as logs:
            seen = read_until(logs.stdout, b"line 40\n")
            for number in (120, 200):
                alice.kill()
                out = upto(run, out, number)
                alice.until("those who wait have started it again", lambda: alice.pid)
            complete(run, (out, b""))
            assert wait.wait(60) == 7, wait.stderr.read()
            rest, notes = logs.communicate(timeout=60)
            assert (seen + rest, notes) == (WHOLE, NOTES)
    assert json.loads(status.read_text())["result"]["exit_code"] == 7
    assert list(tmp_path.iterdir()) == [status]


def test_a_stopped_daemon_is_waited_for_and_not_started(pair: tuple[Node, Node]) -> None:
    alice, _ = pair
    with alice.popen("run", "-v", "--", "sh", "-c", PRINTS) as run:
        out = read_until(run.stdout, b"line 40\n")
        assert alice("daemon", "stop").code == 0
        err = read_until(run.stderr, b"the daemon was stopped")
        assert not alice.pid
        alice.start()
        rest, notes = run.communicate(timeout=60)
    assert out + rest == WHOLE and run.returncode == 7
    assert b"".join(re.findall(rb"note \d+\n", err + notes)) == NOTES


def test_what_is_written_before_a_kill_and_after_it_is_told_apart(pair: tuple[Node, Node], nodes: Nodes) -> None:
    """The executor dies: another one takes the command, and the output says that it starts again."""
    alice, bob = pair
    carol = nodes("carol").start()
    join(alice, carol)
    spec = ("--retries", "1", "--deadline", "5m")
    with alice.popen("run", *spec, "--", "sh", "-c", PRINTS) as run:
        out = read_until(run.stdout, b"line 40\n")
        found = alice.ask("task.list", limit=1)["items"][0]
        first = bob if found["executor"]["name"] == "bob" else carol
        first.kill()
        first.start()  # it hands the task back: what ran there died with it
        rest, err = run.communicate(timeout=60)
    told = b"clawnet: attempt 2: the output starts again from its beginning\n"
    assert err.count(told) == 1 and err.split(told)[1] == NOTES
    assert (out + rest).endswith(WHOLE) and run.returncode == 7
    before = (out + rest)[: -len(WHOLE)]
    assert before and WHOLE.startswith(before)
    with alice.popen("run", "--attach", found["task_id"]) as again:
        complete(again)
    with first.client() as client:
        assert client.call("status")["pid"]


class Relay:
    """A TCP relay that a test cuts and mends."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self._ends: list[socket.socket] = []
        self._carriers: list[threading.Thread] = []
        self._open = True
        self._door = threading.Thread(target=self._accept)
        self._door.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listening.accept()
                if not self._open:
                    near.close()
                    continue
                far = socket.create_connection(("127.0.0.1", self._target))
                self._ends += [near, far]
                for one, other in ((near, far), (far, near)):
                    carrier = threading.Thread(target=self._carry, args=(one, other))
                    carrier.start()
                    self._carriers.append(carrier)

    @staticmethod
    def _carry(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """All connections end, in the middle of whatever they carried; no new one is let through."""
        self._open = False
        ends, self._ends = self._ends, []
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        while self._carriers:
            self._carriers.pop().join()
        for end in ends:
            end.close()

    @property
    def busy(self) -> bool:
        """Whether a connection goes through."""
        return bool(self._ends)

    def mend(self) -> None:
        """Connections go through again."""
        self._open = True

    def close(self) -> None:
        """The end."""
        self.cut()
        self._listening.shutdown(socket.SHUT_RDWR)
        self._door.join()
        self._listening.close()


def test_a_link_that_is_cut_again_and_again_loses_nothing(nodes: Nodes) -> None:
    alice, bob = nodes("alice", **ASKS_MEMBERS).start(), nodes("bob").start()
    address = next(one for one in alice.ask("status")["listen"] if "/tcp/" in one)
    relay = Relay(int(re.findall(r"/tcp/(\d+)", address)[0]))
    try:
        token = alice("peer", "invite", "--ring", "member").line
        assert bob("peer", "join", "-", stdin=token.encode() + b"\n").code == 0
        bob.until("knows alice", lambda: connected(bob))
        through = re.sub(r"/tcp/\d+", f"/tcp/{relay.port}", address)

        def relayed() -> bool:
            # The nodes know each other's own addresses too, and may be connected again before this is.
            if not relay.busy:
                bob("peer", "disconnect", "alice")
                bob("peer", "connect", through)
            return relay.busy

        def link() -> None:
            bob.until("is connected through the relay", relayed)
            alice.until("sees bob", lambda: connected(alice))

        link()
        with alice.popen("run", "--", "sh", "-c", PRINTS) as run:
            out = b""
            for number in (40, 80, 120):
                out = upto(run, out, number)
                relay.cut()
                relay.mend()
                link()
            complete(run, (out, b""))
    finally:
        relay.close()


def test_ctrl_c_of_an_attached_run_cancels_and_of_logs_does_not(pair: tuple[Node, Node]) -> None:
    alice, _ = pair
    task = submit(alice, "echo begun; sleep 60")
    with alice.popen("market", "logs", "-f", task) as logs:
        assert read_until(logs.stdout, b"begun\n") == b"begun\n"
        logs.send_signal(signal.SIGINT)
        assert logs.wait(30) == 130
    with alice.popen("run", "--attach", task) as attached:
        assert read_until(attached.stdout, b"begun\n") == b"begun\n"
        assert alice.task(task)["state"] == "executing"
        attached.send_signal(signal.SIGINT)
        assert attached.wait(30) == 130
    assert alice.reaches(task, "cancelled")["error"]["exit_code"] == 81
    assert alice("market", "wait", task).code == 81
    assert alice("run", "--attach", task).code == 81


def test_from_the_end_and_so_far(pair: tuple[Node, Node]) -> None:
    """More than the requester keeps in memory: what follows asks the executor, or the result, for it."""
    alice, _ = pair
    whole = bytes(3_000_000) + WHOLE
    task = submit(alice, "head -c 3000000 /dev/zero; " + PRINTS)
    alice.until("the lines have begun", lambda: b"line 1\n" in alice.raw("market", "logs", task)[1])
    so_far = alice.raw("market", "logs", task)[1]
    with alice.popen("run", "--attach", task) as attached, alice.popen("run", "--attach", task, "--from-end") as late:
        assert attached.communicate(timeout=60) == (whole, NOTES)
        from_then_on = late.communicate(timeout=60)[0]
    assert (attached.returncode, late.returncode) == (7, 7)
    assert whole.startswith(so_far)
    assert whole.endswith(from_then_on) and len(so_far) + len(from_then_on) <= len(whole)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--from-end"], "--attach"),
        (["--attach", "abcd", "--", "ls"], "a command"),
        (["--attach", "abcd", "--budget", "3"], "--budget"),
        (["--attach", "abcd", "--os", "any"], "--os"),
    ],
)
def test_what_does_not_go_with_attach_is_64(nodes: Nodes, arguments: list[str], words: str) -> None:
    nodes("alice")("run", *arguments).failed(64, words)


def test_many_clients_with_one_key_make_one_task(pair: tuple[Node, Node], tmp_path: Path) -> None:
    alice, _ = pair
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data").write_text("the same bytes")

    def run(where: str, *more: str) -> list[str]:
        source = ["--input", f"data={tmp_path / where / 'data'}", "--idempotency-key", "nightly"]
        return ["run", *more, *source, "--", "sh", "-c", "cat data; echo; date +%N; exit 3"]

    with contextlib.ExitStack() as stack:
        # Another path with the same bytes is the same content.
        started = [stack.enter_context(alice.popen(*run("one" if n % 2 else "two"))) for n in range(20)]
        ended = [process.communicate(timeout=80) for process in started]
    assert {process.returncode for process in started} == {3}, ended
    assert len(set(ended)) == 1 and ended[0][0].startswith(b"the same bytes\n")
    assert len(alice.ask("task.list", limit=50)["items"]) == 1
    alice.kill()
    assert alice.raw(*run("two")) == (3, *ended[0])
    (tmp_path / "one" / "data").write_text("other bytes")
    alice(*run("one")).failed(65, "nightly", "another task")
    cancelled = submit(alice, "sleep 60", "--idempotency-key", "free again")
    assert alice("market", "cancel", cancelled).code == 0
    other = submit(alice, "true", "--idempotency-key", "free again")
    assert other != cancelled and alice("market", "wait", other).code == 0


def test_an_interrupted_wait_leaves_a_whole_status_file(pair: tuple[Node, Node], tmp_path: Path) -> None:
    alice, _ = pair
    status = tmp_path / "status.json"
    arguments = ("market", "submit", "--wait", "--stream", "--status-file", str(status), "--type", "shell")
    with alice.popen(*arguments, "--", "echo begun; sleep 30") as waiting:
        read_until(waiting.stdout, b"begun")
        os.kill(waiting.pid, signal.SIGINT)
        assert waiting.wait(30) == 130
    assert json.loads(status.read_text())["error"]["exit_code"] == 130
    task = alice.ask("task.list", limit=1)["items"][0]
    assert task["state"] == "executing"
    assert alice("market", "cancel", task["task_id"]).code == 0
