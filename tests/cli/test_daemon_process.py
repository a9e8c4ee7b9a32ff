"""The daemon as a process: signals and drains, what a kill leaves behind, and everything that can stand in its way."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.harness import (
    PATIENCE_S,
    Gate,
    Node,
    Nodes,
    alive,
    free_port,
    processes_with,
    until,
)

pytestmark = pytest.mark.slow


@pytest.fixture
def node(nodes: Nodes) -> Node:
    """A node whose home does not exist yet."""
    return nodes()


def ended(node: Node, pid: int) -> None:
    """Waits for the end of the daemon, whose socket and lock must not be in anybody's way."""
    until(f"{node.name} ends", lambda: not alive(pid))
    assert not node.home.socket.exists()


# --- signals


def test_the_node_ends_on_sigterm_after_what_runs(node: Node) -> None:
    node.start()
    task = node("run", "--json", "-n", "--", "true").json("run")["task_id"]
    gate = Gate()
    running = node("market", "submit", "--type", "shell", gate.script + "echo done; exit 4").line
    node.reaches(running, "executing")
    pid = node.pid
    os.kill(pid, signal.SIGTERM)
    node.until("drains", lambda: node.ask("status")["draining"])
    node("run", "-n", "--", "true").failed(69, "is stopping")
    gate.open()
    ended(node, pid)
    assert "daemon.stopped" in node.log
    # The next command finds everything as it was left.
    assert node("market", "result", running).out == "done\n"
    assert node("market", "status", running).line == "settled"
    assert node("market", "status", task).line == "settled"
    assert node.pid not in (0, pid)


def test_a_run_that_outlasts_the_drain_is_ended_with_its_processes(node: Node) -> None:
    node.environ["CLAWNET_DAEMON_DRAIN_TIMEOUT"] = "1s"
    node.start()
    marker = f"drained-{os.urandom(6).hex()}"
    running = node("market", "submit", "--type", "shell", f"sleep 600; : {marker}").line
    node.reaches(running, "executing")
    until("it runs", lambda: processes_with(marker))
    pid = node.pid
    assert node("daemon", "stop").code == 0
    ended(node, pid)
    assert not processes_with(marker)
    state = node.start().reaches(running, "failed", "timed_out", "cancelled", "no_bids")
    assert state["error"]["message"]


def test_a_second_sigterm_does_not_wait(node: Node) -> None:
    node.start()
    marker = f"twice-{os.urandom(6).hex()}"
    running = node("market", "submit", "--type", "shell", f"sleep 600; : {marker}").line
    node.reaches(running, "executing")
    pid = node.pid
    os.kill(pid, signal.SIGTERM)
    node.until("drains", lambda: node.ask("status")["draining"])
    os.kill(pid, signal.SIGTERM)
    ended(node, pid)
    until("the run is gone", lambda: not processes_with(marker))


def test_ctrl_c_ends_a_node_in_the_foreground(node: Node) -> None:
    with node.popen("daemon", "run", "-v") as process:
        node.until("answers", lambda: node.pid)
        assert node.pid == process.pid
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 0
        assert process.stdout is not None
        assert process.stdout.read() == b""


def test_of_two_that_start_at_once_one_has_the_home(node: Node) -> None:
    assert node("init").code == 0
    with contextlib.ExitStack() as stack:
        both = [stack.enter_context(node.popen("daemon", "run")) for _ in range(2)]
        first = until("one leaves", lambda: next((p for p in both if p.poll() is not None), None))
        said = first.stderr.read().decode()
        assert (first.returncode, len(said.splitlines())) == (0, 1), said
        assert "runs already" in said
        other = both[1 - both.index(first)]
        node.until("the other one serves", lambda: node.pid == other.pid)
        os.kill(other.pid, signal.SIGTERM)
        assert other.wait(PATIENCE_S) == 0


# --- what a kill leaves


def test_a_kill_loses_nothing_that_was_accepted(node: Node) -> None:
    node.start()
    marker = f"killed-{os.urandom(6).hex()}"
    running = node("market", "submit", "--type", "shell", f"sleep 600; : {marker}").line
    node.reaches(running, "executing")
    done = node("run", "--json", "-n", "--", "echo", "kept").json("run")["task_id"]
    balance = node("wallet", "balance").line
    pid = node.kill()
    assert node.home.socket.exists()
    assert node.home.lock_file.read_text().strip() == str(pid)
    assert node("wallet", "balance").line == balance
    assert node.pid not in (0, pid)
    assert node("market", "result", done).out == "kept\n"
    until("the run of the killed node is gone", lambda: not processes_with(marker) or node.task(running)["attempts"])
    ended_as = node.reaches(running, "failed", "executing", "timed_out")
    if ended_as["state"] == "executing":
        assert node("market", "cancel", running).code == 0
    assert node("wallet", "audit", "--json").json("wallet audit")["ok"]


@pytest.mark.parametrize(("options", "code", "words"), [((), 76, b"restarted"), (("--timeout", "8s"), 124, b"in time")])
def test_a_run_whose_node_was_killed_says_so(node: Node, options: tuple[str, ...], code: int, words: bytes) -> None:
    """It starts the node again, which knows that the command died with it; where that is not allowed, it waits."""
    node.start()
    start = ("--no-autostart",) if options else ()
    with node.popen(*start, "run", "-n", *options, "--", "sh", "-c", "echo begun; sleep 600") as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"begun\n"
        node.kill()
        assert process.wait(PATIENCE_S) == code
        assert words in process.stderr.read()


# --- sockets and ports


def test_a_socket_that_another_program_answers_on(node: Node) -> None:
    assert node("init").code == 0
    node.home.run_dir.mkdir(mode=0o700, exist_ok=True)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(node.home.socket))
        other.listen()
        node("daemon", "run", timeout_s=30).failed(0, "runs already")
        done = node("wallet", "balance", "--timeout", "2s")
        assert done.code in (69, 124)
        assert done.err.count("\n") <= 2
    node.home.socket.unlink()


def test_what_is_no_socket_is_not_removed(node: Node) -> None:
    assert node("init").code == 0
    node.home.run_dir.mkdir(mode=0o700, exist_ok=True)
    node.home.socket.write_text("mine")
    node("daemon", "run").failed(78, "in the way", str(node.home.socket))
    node("daemon", "start").failed(78, "in the way")
    assert node.home.socket.read_text() == "mine"


def test_a_socket_that_nobody_listens_on_is_replaced(node: Node) -> None:
    assert node("init").code == 0
    node.home.run_dir.mkdir(mode=0o700, exist_ok=True)
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(node.home.socket))
    assert node("wallet", "balance").code == 0


def test_a_path_too_long_for_a_socket(nodes: Nodes) -> None:
    node = nodes("/".join(["a-long-name-of-a-directory"] * 5))
    node.name = node.environ["CLAWNET_NODE_NAME"] = "long"
    assert node("run", "-n", "--", "echo", "here").out == "here\n"
    assert not str(node.home.socket).startswith(str(node.dir))
    assert node.home.socket.parent.stat().st_mode & 0o777 == 0o700
    assert node("daemon", "stop").code == 0
    node.home.socket.parent.rmdir()


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that another program listens on."""
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        yield other.getsockname()[1]


def test_a_port_that_was_asked_for_and_is_taken(nodes: Nodes, taken: int) -> None:
    node = nodes("alice", CLAWNET_TCP_PORT=str(taken))
    node("daemon", "start").failed(78, str(taken), "network.tcp_port")
    node("daemon", "run").failed(78, str(taken))
    node.environ["CLAWNET_TCP_PORT"] = str(free_port())
    assert node("daemon", "start").code == 0


def test_the_usual_port_gives_way_with_a_warning(nodes: Nodes) -> None:
    with socket.socket() as other, contextlib.suppress(OSError):
        other.bind(("0.0.0.0", 4002))
        other.listen()
        node = nodes("alice", CLAWNET_TCP_PORT="")
        del node.environ["CLAWNET_TCP_PORT"]
        node.start()
        status = node("daemon", "status", "--json").json("daemon status")
        assert not any("/tcp/4002/" in address for address in status["listen"])
        assert any("4002" in warning for warning in status["warnings"])
        assert "listen.port_taken" in node.log


# --- permissions


@pytest.mark.parametrize(
    ("path", "mode", "right"),
    [
        ("", 0o777, "700"),
        ("config.yaml", 0o666, "600"),
        ("keys", 0o775, "700"),
        ("keys/node.key", 0o644, "600"),
        ("keys/owner.key", 0o660, "600"),
        ("keys/escrow.seed", 0o604, "600"),
        ("mesh.json", 0o662, "600"),
    ],
)
def test_what_others_may_change_is_refused_with_the_line_that_helps(
    node: Node, path: str, mode: int, right: str
) -> None:
    assert node("init").code == 0
    file = node.dir / path
    file.chmod(mode)
    for command in (("daemon", "run"), ("wallet", "balance")):
        node(*command).failed(78, f"chmod {right} {file}")
    assert node.pid == 0
    file.chmod(int(right, 8))
    assert node("wallet", "balance").code == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("path", ["", "config.yaml", "keys/node.key"])
def test_what_belongs_to_others_is_refused(node: Node, path: str) -> None:
    assert node("init").code == 0
    file = node.dir / path
    os.chown(file, 65534, 65534)
    for command in (("daemon", "run"), ("wallet", "balance")):
        node(*command).failed(78, "belongs to another user", f"chown 0 {file}")
    os.chown(file, 0, 0)


def test_the_check_can_be_switched_off(node: Node) -> None:
    assert node("init").code == 0
    for path in (node.dir, node.home.config_file, node.home.node_key, node.home.mesh_file):
        path.chmod(0o777)
    node.environ["CLAWNET_SECURITY_CHECK_PERMISSIONS"] = "false"
    assert node("wallet", "balance").code == 0


def test_a_configuration_that_cannot_be_read(node: Node) -> None:
    assert node("init").code == 0
    node.home.config_file.write_bytes(b"log:\n  level: \xff\xfe\n")
    for command in (("daemon", "run"), ("wallet", "balance"), ("config", "show")):
        node(*command).failed(78, str(node.home.config_file))
    node.home.config_file.unlink()
    node.home.config_file.mkdir(mode=0o700)
    for command in (("daemon", "run"), ("wallet", "balance"), ("config", "show")):
        node(*command).failed(78, str(node.home.config_file))
    node("--config", str(node.dir / "none.yaml"), "wallet", "balance").failed(78, "none.yaml")


# --- the database


def test_a_database_from_a_newer_version(node: Node) -> None:
    node.start()
    assert node("daemon", "stop").code == 0
    with contextlib.closing(sqlite3.connect(node.home.database)) as database:
        database.execute("PRAGMA user_version = 4711")
    node("daemon", "run").failed(78, "newer clawnet", "4711")
    node("wallet", "balance").failed(78, "newer clawnet")


def test_a_database_that_is_none(node: Node) -> None:
    node.start()
    assert node("daemon", "stop").code == 0
    for suffix in ("-wal", "-shm"):
        node.home.database.with_name(node.home.database.name + suffix).unlink(missing_ok=True)
    node.home.database.write_bytes(os.urandom(65536))
    node("daemon", "run").failed(78, str(node.home.database))


def test_a_database_locked_by_another_program(node: Node) -> None:
    node.start()
    assert node("daemon", "stop").code == 0
    with contextlib.closing(sqlite3.connect(node.home.database, isolation_level=None)) as database:
        database.execute("PRAGMA locking_mode = EXCLUSIVE")
        database.execute("CREATE TABLE other (one)")
        done = node("daemon", "run", timeout_s=30)
        assert done.code in (70, 78)
        assert "locked" in done.err
    assert node("wallet", "balance").code == 0


def test_a_database_locked_while_the_node_runs(node: Node) -> None:
    node.start()
    with contextlib.closing(sqlite3.connect(node.home.database, isolation_level=None)) as database:
        database.execute("BEGIN IMMEDIATE")
        done = node("market", "submit", "--type", "shell", "true")
        assert done.code == 70
        assert "locked" in done.err
        assert node("wallet", "balance").code == 0
        database.execute("ROLLBACK")
    assert node("run", "-n", "--", "echo", "on").out == "on\n"


@pytest.fixture
def small_disk(node: Node) -> Iterator[Path]:
    """The node's home on a file system of sixteen megabytes."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root on Linux")
    node.dir.mkdir(mode=0o700)
    options = "size=16m,mode=0700"
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(node.dir)], capture_output=True)
    if mount.returncode != 0:
        pytest.skip("mounting a small file system needs CAP_SYS_ADMIN")
    try:
        yield node.dir
    finally:
        node("daemon", "stop")
        subprocess.run(["umount", str(node.dir)], check=True)


def fill(ballast: Path) -> None:
    """Leaves no room at all beside this file."""
    with ballast.open("wb", buffering=0) as file:
        for piece in (bytes(65536), bytes(64)):
            with contextlib.suppress(OSError):
                while file.write(piece):
                    pass


def test_a_full_disk_refuses_a_task_and_harms_nothing(node: Node, small_disk: Path) -> None:
    node.start()
    kept = node("run", "--json", "-n", "--", "echo", "kept").json("run")["task_id"]
    ballast = small_disk / "ballast"
    fill(ballast)
    refused = node("market", "submit", "--type", "shell", "echo " + "x" * 50_000)
    refused.failed(70, "full")
    node("run", "--json", "-n", "--", "echo", "x" * 50_000).failed(70, "storage_full")
    node.until("answers again", lambda: node("wallet", "balance").code == 0)
    assert node("market", "result", kept).out == "kept\n"
    pid = node.pid
    ballast.unlink()
    node.until("takes tasks again", lambda: node("run", "-n", "--", "echo", "again").out == "again\n")
    assert node.pid == pid
    assert {row["state"] for row in node("market", "history", "--json").json()["items"]} == {"settled"}
    node.kill()
    assert node("market", "result", kept).out == "kept\n"
    assert node("wallet", "audit", "--json").json("wallet audit")["ok"]


def test_a_node_on_a_full_disk_can_be_stopped(node: Node, small_disk: Path) -> None:
    node.start()
    fill(small_disk / "ballast")
    for _ in range(2):
        node("market", "submit", "--type", "shell", "echo " + "x" * 50_000).failed(70, "full")
    pid = node.pid
    assert node("daemon", "stop").code == 0
    ended(node, pid)


def test_a_start_on_a_full_disk(node: Node, small_disk: Path) -> None:
    fill(small_disk / "ballast")
    done = node("daemon", "start")
    assert done.code in (70, 78)
    assert "No space left" in done.err or "no room" in done.err
    (small_disk / "ballast").unlink()
    assert node("daemon", "start").code == 0
