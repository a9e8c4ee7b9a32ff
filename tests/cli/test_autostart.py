"""Starting the node on demand: one daemon whoever asks, detached, with a clean environment; failures are explained."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from clawnet import api, launch
from clawnet.errors import ClawnetError
from clawnet.paths import Home, make_private_dir
from tests.cli.conftest import Program, failure
from tests.cli.harness import processes_with, until

pytestmark = pytest.mark.slow


@pytest.fixture
def starting(clawnet: Program) -> Iterator[Program]:
    """The program, allowed to start a node; whatever it started is stopped again and has gone."""
    del clawnet.environ["CLAWNET_AUTOSTART"]
    yield clawnet
    done = clawnet("daemon", "stop")
    assert done.returncode == 0, done.stderr
    assert not clawnet.home.socket.exists()


def status(program: Program) -> dict[str, object]:
    found: dict[str, object] = json.loads(program("daemon", "status", "--json").stdout)
    return found


def test_twenty_commands_at_once_start_one_node(starting: Program) -> None:
    processes = [starting.start("run", "-n", "--", "true") for _ in range(2)]
    processes += [starting.start("market", "submit", "--type", "compute", "--op", "sha256", "x") for _ in range(18)]
    for process in processes:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said.decode()
    log = starting.home.log_file.read_text()
    assert log.count("daemon.ready") == 1
    assert status(starting)["running"] is True


def test_a_socket_that_takes_connections_and_answers_nobody_is_no_daemon(starting: Program) -> None:
    # As that of a daemon that was killed, while the system removes it.
    home = starting.home
    assert starting("init").returncode == 0
    make_private_dir(home.run_dir)
    with socket.socket(socket.AF_UNIX) as dying:
        dying.bind(str(home.socket))
        dying.listen()
        process = starting.start("daemon", "start", "--json")
        dying.accept()[0].close()
    out, said = process.communicate(timeout=60)
    assert process.returncode == 0, said.decode()
    assert status(starting)["pid"] == json.loads(out)["pid"]


def test_a_daemon_holds_nothing_of_the_command_that_started_it(starting: Program) -> None:
    starting.environ.update(SECRET_TOKEN="xyzzy", CLAWNET_LOG_LEVEL="debug")
    line = 'x=$("$@"); echo "got $x"'
    arguments = ["run", "-n", "--", "sh", "-c", "echo here"]
    argv = ["sh", "-c", line, "sh", *starting.argv(*arguments)]
    done = subprocess.run(argv, env=starting.environ, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.returncode) == ("got here\n", 0)
    pid = status(starting)["pid"]
    environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    assert b"CLAWNET_LOG_LEVEL=debug" in environ
    assert not [entry for entry in environ if b"xyzzy" in entry]
    assert os.readlink(f"/proc/{pid}/cwd") == str(starting.home.dir)
    held = [os.readlink(f"/proc/{pid}/fd/{number}") for number in (0, 1, 2)]
    assert held == ["/dev/null", str(starting.home.run_dir / "daemon.out"), str(starting.home.run_dir / "daemon.out")]
    assert os.getsid(int(str(pid))) != os.getsid(0)


def test_a_bare_environment_finds_the_same_node(starting: Program) -> None:
    home = starting.home.dir.parent / ".clawnet"
    home.mkdir(mode=0o700)
    starting.home = Home(home)
    starting.environ["CLAWNET_HOME"] = str(home)
    assert starting("daemon", "start").returncode == 0
    bare = {"HOME": str(home.parent)}
    done = subprocess.run(
        starting.argv("daemon", "status", "--json"), env=bare, capture_output=True, text=True, timeout=60
    )
    assert json.loads(done.stdout)["pid"] == status(starting)["pid"]


def test_a_killed_node_leaves_nothing_in_the_way(starting: Program) -> None:
    starting("daemon", "start")
    pid = int(str(status(starting)["pid"]))
    os.kill(pid, signal.SIGKILL)
    done = starting("wallet", "balance")
    assert done.returncode == 0, done.stderr
    assert status(starting)["pid"] != pid


HOLDER = """
import sys
from pathlib import Path
from clawnet.storage.filelock import FileLock
lock = FileLock.take(Path(sys.argv[1]), what="the home")
print("taken", flush=True)
sys.stdin.read()
"""


def test_a_node_that_was_killed_as_it_started_does_not_take_a_second_one_with_it(starting: Program) -> None:
    starting("init")
    words = [sys.executable, "-c", HOLDER, str(starting.home.lock_file)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"taken\n"
        command = starting.start("wallet", "balance")
        until("a node waits for the one that has the home", lambda: waiting(str(starting.home.dir)))
        holder.kill()
    out, err = command.communicate(timeout=60)
    assert (command.returncode, out) == (0, b"1000\n"), err


def waiting(home: str) -> bool:
    """Whether a daemon of this home is loaded and sleeps, as it does while it looks whether another one answers."""
    for pid in processes_with(home):
        proc = Path(f"/proc/{pid}")
        loaded = b"daemon\0run" in (proc / "cmdline").read_bytes() and "_sqlite3" in (proc / "maps").read_text()
        if loaded and all((proc / "stat").read_text().rpartition(")")[2].split()[0] == "S" for _ in range(50)):
            return True
    return False


def test_restart_and_a_second_start(starting: Program) -> None:
    first = json.loads(starting("daemon", "start", "--json").stdout)["pid"]
    assert json.loads(starting("daemon", "start", "--json").stdout)["pid"] == first
    second = json.loads(starting("daemon", "restart", "--json").stdout)["pid"]
    assert second != first
    done = starting("daemon", "run")
    assert (done.returncode, done.stdout) == (0, "")
    assert "runs already" in done.stderr


def test_stop_and_status_without_a_node(clawnet: Program) -> None:
    assert clawnet("daemon", "stop").returncode == 0
    done = clawnet("daemon", "status", "--json")
    assert (done.returncode, json.loads(done.stdout)) == (69, {"running": False, "home": str(clawnet.home.dir)})
    assert clawnet("daemon", "logs").returncode == 66


def test_a_home_that_was_never_made_is_made_by_run_and_submit_alone(starting: Program) -> None:
    error = failure(starting("wallet", "balance", "--json"))
    assert (error["exit_code"], "clawnet init" in error["hint"]) == (78, True)
    assert not starting.home.dir.exists()
    done = starting("run", "-n", "--", "true")
    assert done.returncode == 0
    assert done.stderr.startswith(f"clawnet: making a new home in {starting.home.dir}")


def test_why_a_node_cannot_start_is_said_by_whoever_wanted_it(starting: Program) -> None:
    assert starting("init").returncode == 0
    starting.home.config_file.write_text("market:\n  bid_timeuot: 3s\n")
    done = starting("wallet", "balance")
    assert done.returncode == 78
    assert "bid_timeuot" in done.stderr
    assert "config.yaml:2" in done.stderr
    starting.home.config_file.write_text("")
    starting.home.config_file.chmod(0o666)
    done = starting("wallet", "balance")
    assert (done.returncode, "chmod 600" in done.stderr) == (78, True)


def test_a_node_that_dies_without_a_word_is_named_with_its_code(home: Home, tmp_path: Path) -> None:
    home.keys_dir.mkdir(parents=True)
    home.node_key.touch()
    home.mesh_file.touch()
    with pytest.raises(ClawnetError, match=r"exit code 3\): ouch") as caught:
        launch.start(home, environ=os.environ, program=["sh", "-c", "echo ouch; exit 3"])
    assert str(home.run_dir / "daemon.out") in caught.value.hint
    with pytest.raises(ClawnetError, match="cannot start the daemon"):
        launch.start(home, environ=os.environ, program=["/no/such/program"])


def test_no_autostart_means_it(starting: Program) -> None:
    assert starting("init").returncode == 0
    assert starting("--no-autostart", "wallet", "balance").returncode == 69
    assert starting("wallet", "balance", CLAWNET_AUTOSTART="0").returncode == 69
    assert api.open_channel(starting.home) is None


def test_doctor_finds_what_is_wrong_with_and_without_a_node(starting: Program) -> None:
    assert starting("init").returncode == 0
    report = json.loads(starting("doctor", "--json").stdout)
    assert report["ok"] is True
    assert {"python", "permissions", "config", "daemon", "sandbox", "ports"} <= {f["check"] for f in report["findings"]}
    starting("daemon", "start")
    report = json.loads(starting("doctor", "--json").stdout)
    assert next(f for f in report["findings"] if f["check"] == "daemon")["level"] == "ok"
    starting.home.node_key.chmod(0o644)
    done = starting("doctor", "--json")
    found = [f for f in json.loads(done.stdout)["findings"] if f["level"] == "error"]
    assert (done.returncode, "chmod 600" in found[0]["remedy"]) == (78, True)
    starting.home.node_key.chmod(0o600)
