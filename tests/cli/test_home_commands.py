"""init, config, identity and version as their user meets them: the real program, its output and its exit codes."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from clawnet.answers import ANSWERS

pytestmark = pytest.mark.slow


class Done(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str

    def answer(self, command: str) -> dict[str, Any]:
        """The JSON object, checked against the struct that documents it."""
        assert self.code in (0, 78), self.err
        msgspec.json.decode(self.out, type=ANSWERS[command], strict=True)
        value: dict[str, Any] = json.loads(self.out)
        return value


class Program:
    """clawnet with a home of its own, started anew for every command."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.environ = {"PATH": os.environ["PATH"], "HOME": str(home.parent), "CLAWNET_HOME": str(home)}

    def __call__(self, *arguments: str, **more: Any) -> Done:
        command = [sys.executable, "-P", "-m", "clawnet.commands", *arguments]
        environ = {**self.environ, **more.pop("environ", {})}
        done = subprocess.run(
            command, cwd=self.home.parent, env=environ, capture_output=True, text=True, stdin=subprocess.DEVNULL, **more
        )
        return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def clawnet(tmp_path: Path) -> Program:
    return Program(tmp_path / "home")


def test_version(clawnet: Program) -> None:
    assert clawnet("version", "--json").answer("version")["protocol"] == "/clawnet/1.0.0"
    assert clawnet("version").out.split("\t")[1] == "/clawnet/1.0.0"
    assert not clawnet.home.exists()


def test_init_twice(clawnet: Program) -> None:
    first = clawnet("init", "--name", "alice", "--json").answer("init")
    assert len(first["made"]) == 6
    second = clawnet("init", "--name", "bob")
    assert second.code == 0
    assert second.out.strip() == first["peer_id"]
    assert "nothing was changed" in second.err
    assert "still named alice" in second.err
    assert clawnet("init", "-q").err == ""


def test_init_refuses_what_it_cannot_use(clawnet: Program, tmp_path: Path) -> None:
    assert clawnet("init", "--name", "no good").code == 78
    (tmp_path / "file").write_text("")
    refused = clawnet("--home", str(tmp_path / "file" / "home"), "init")
    assert refused.code == 78
    assert "cannot make the directory" in refused.err
    assert clawnet("init", "--nmae", "x").code == 64


def test_config_get_set_check_path(clawnet: Program) -> None:
    assert clawnet("config", "set", "log.level", "debug").code == 78
    clawnet("init", "--name", "alice")
    file = clawnet("config", "path").out.strip()
    assert file == str(clawnet.home / "config.yaml")
    before = Path(file).read_text()
    assert clawnet("config", "get", "market.bid_timeout").out == "30s\n"
    changed = clawnet("config", "set", "market.bid_timeout", "5s", "network.tcp_port", "4010", "--json").answer(
        "config set"
    )
    assert [item["value"] for item in changed["items"]] == [5.0, 4010]
    assert changed["daemon_running"] is False
    assert clawnet("config", "get", "market.bid_timeout", "--json").answer("config get")["value"] == 5.0
    assert Path(file).read_text() == before.replace("# bid_timeout: 30s", "bid_timeout: 5s").replace(
        "# tcp_port: 4002", "tcp_port: 4010"
    )
    assert Path(file).stat().st_mode & 0o777 == 0o600
    assert clawnet("config", "check").code == 0
    shown = {line.split("\t")[0]: line.split("\t")[1:] for line in clawnet("config", "show").out.splitlines()}
    assert shown["network.tcp_port"] == ["4010", f"{file}:{before[: before.index('# tcp_port')].count(chr(10)) + 1}"]
    overridden = clawnet("config", "set", "log.level", "warn", environ={"CLAWNET_LOG_LEVEL": "error"})
    assert "overridden by CLAWNET_LOG_LEVEL" in overridden.err
    assert clawnet("config", "show", "--json").answer("config show")["next"] is None


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("get", "market.bid_timout"), 66, "did you mean market.bid_timeout?"),
        (("get", "tui.theme"), 78, "the live view is not built yet"),
        (("set", "market.bid_timeout"), 64, "has no value"),
        (("set", "market.bid_timeout", "soon"), 78, "allowed: a duration"),
        (("set", "tui.enabled", "true"), 78, "the live view is not built yet"),
        (("set", "market.weights.price", "0.5"), 78, "add up to 1.1"),
        (("set", "log.level", "info", "log.level", "warn"), 64, "named twice"),
        (("frobnicate",), 64, "No such command"),
    ],
)
def test_config_refusals_change_nothing(clawnet: Program, arguments: tuple[str, ...], code: int, said: str) -> None:
    clawnet("init")
    before = (clawnet.home / "config.yaml").read_bytes()
    refused = clawnet("config", *arguments)
    assert (refused.code, refused.out) == (code, "")
    assert said in refused.err
    error = json.loads(clawnet("config", *arguments, "--json").err)["error"]
    assert error["exit_code"] == code
    assert (clawnet.home / "config.yaml").read_bytes() == before


def test_a_bad_file_is_listed_by_check_and_stops_everything_else(clawnet: Program) -> None:
    clawnet("init")
    file = clawnet.home / "config.yaml"
    file.write_text("market:\n  bid_timout: 5s\n  enabled: maybe\n")
    checked = clawnet("config", "check", "--json")
    assert checked.code == 78
    assert [problem["line"] for problem in checked.answer("config check")["problems"]] == [2, 3]
    assert clawnet("config", "check").out.count(str(file)) == 2
    refused = clawnet("identity", "show")
    assert refused.code == 78
    assert f"{file}:2: market.bid_timout is not a configuration key" in refused.err
    file.write_text("")
    file.chmod(0o666)
    refused = clawnet("config", "show")
    assert refused.code == 78
    assert f"chmod 600 {file}" in refused.err


def test_identity_show_tells_no_secret(clawnet: Program) -> None:
    assert clawnet("identity", "show").code == 78
    peer_id = clawnet("init").out.strip()
    shown = clawnet("identity", "show", "--json")
    answer = shown.answer("identity show")
    assert answer["peer_id"] == peer_id
    assert answer["founded"] and answer["issuer"] and answer["owner_key_here"]
    for key in (clawnet.home / "keys").iterdir():
        assert key.read_text().split(":")[1].strip() not in shown.out


def test_identity_moves_to_another_home(clawnet: Program, tmp_path: Path) -> None:
    peer_id = clawnet("init").out.strip()
    secret = tmp_path / "passphrase"
    secret.write_text("correct horse battery\n")
    exported = tmp_path / "alice.identity"
    refused = clawnet("identity", "export", str(exported), "--passphrase-file", str(secret))
    assert refused.code == 78
    assert f"chmod 600 {secret}" in refused.err
    secret.chmod(0o600)
    clawnet("identity", "export", str(exported), "--passphrase-file", str(secret), "--json").answer("identity export")
    assert exported.stat().st_mode & 0o777 == 0o600
    assert clawnet("identity", "export", str(exported), "--passphrase-file", str(secret)).code == 77
    piped = clawnet("identity", "export", "--passphrase-file", str(secret))
    assert json.loads(piped.out)["format"] == "clawnet-identity"
    there = Program(tmp_path / "there")
    assert there("identity", "import", str(exported), "--passphrase-file", str(secret)).out.strip() == peer_id
    assert there("init").out.strip() == peer_id
    assert there("identity", "import", str(exported), "--passphrase-file", str(secret)).code == 77
    assert there("identity", "import", str(tmp_path / "none"), "--passphrase-file", str(secret)).code == 66
    assert clawnet("identity", "export", str(tmp_path / "x")).code == 64


def test_an_identity_never_goes_to_a_terminal(clawnet: Program, tmp_path: Path) -> None:
    clawnet("init")
    secret = tmp_path / "passphrase"
    secret.write_text("correct horse battery\n")
    secret.chmod(0o600)
    ours, theirs = pty.openpty()
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "clawnet.commands", "identity", "export", "--passphrase-file", str(secret)],
            env=clawnet.environ,
            stdin=subprocess.DEVNULL,
            stdout=theirs,
            stderr=subprocess.PIPE,
        )
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode == 64
    assert b"never written to a terminal" in done.stderr
