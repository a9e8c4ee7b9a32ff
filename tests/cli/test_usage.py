"""The command line itself: what it refuses, with which exit code, in how many lines, and never with a traceback."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from clawnet.errors import ConfigError, FundsError
from tests.cli.conftest import Program, Script, failure

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["frobnicate"], 64, "no command 'frobnicate'"),
        (["walet", "balance"], 64, "wallet"),
        (["market", "sumbit"], 64, "submit"),
        (["wallet"], 64, "Missing command"),
        (["wallet", "balance", "--frob"], 64, "--frob"),
        (["--frob"], 64, "--frob"),
        (["wallet", "balance", "extra"], 64, "extra"),
        (["wallet", "send", "bob"], 64, "AMOUNT"),
        (["wallet", "send", "bob", "ten"], 65, "'ten' is not an amount"),
        (["wallet", "send", "bob", "0.1234567"], 65, "not an amount"),
        (["wallet", "send", "bob", "-5"], 64, "-5"),
        (["wallet", "balance", "--timeout", "soon"], 65, "--timeout 'soon' is not a duration"),
        (["market", "submit", "hi", "--deadline", "5x"], 65, "--deadline '5x' is not a duration"),
        (["market", "submit", "hi", "--budget", "1e3"], 65, "--budget '1e3' is not an amount"),
        (["market", "submit", "hi", "--cpu", "two"], 64, "--cpu"),
        (["market", "submit", "hi", "--memory", "lots"], 65, "--memory 'lots'"),
        (["market", "submit", "hi", "--type", "magic"], 64, "no task type 'magic'"),
        (["market", "submit", "hi", "--type", "storage"], 64, "come with a later version"),
        (["market", "submit", "hi", "--type", "swarm_ai"], 64, "swarm tasks come with a later version"),
        (["market", "submit", "hi", "--accept", "magic:1"], 65, "--accept 'magic:1' is no condition"),
        (["market", "history", "--limit", "0"], 64, "--limit"),
        (["market", "submit", "hi", "--consensus", "3"], 64, "--consensus"),
        (["market", "submit", "hi", "--status-file", "x"], 64, "go with --wait"),
        (["market", "submit"], 64, "nothing to do"),
        (["market", "submit", "-"], 64, "standard input"),
        (["market", "submit", "hi", "--env", "novalue"], 65, "NAME=VALUE"),
        (["market", "submit", "hi", "--input", "/no/such/file"], 66, "/no/such/file"),
        (["market", "submit", "--spec", "/no/such/spec"], 66, "/no/such/spec"),
        (["run"], 64, "no command given"),
        (["run", "--type", "shell", "--", "true"], 64, "--type"),
        (["run", "--status-file", "/no/such/dir/x", "--", "true"], 65, "no such directory"),
        (["peer", "connect", "not-an-address"], 65, "not a multiaddr"),
        (["peer", "join", "hello"], 65, "not an invite token"),
        (["peer", "join"], 64, "no token given"),
        (["peer", "invite", "--ring", "stranger"], 64, "--ring is own or member"),
        (["peer", "invite", "--ring", "own", "--uses", "2"], 64, "works once"),
        (["peer", "invite", "--expires", "never"], 65, "--expires 'never'"),
        (["completion", "tcsh"], 64, "no completion for 'tcsh'"),
        (["wallet", "balance"], 69, "no daemon runs"),
        (["--home", "/dev/null/home", "wallet", "balance"], 69, "no daemon runs"),
    ],
)
def test_what_is_wrong_is_said_in_two_lines_with_its_code(
    clawnet: Program, arguments: list[str], code: int, part: str
) -> None:
    done = clawnet(*arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert part in done.stderr
    assert done.stderr.startswith("clawnet: ")
    assert 1 <= len(done.stderr.splitlines()) <= 2
    assert "Traceback" not in done.stderr
    place = arguments.index("--") if "--" in arguments else len(arguments)
    assert failure(clawnet(*arguments[:place], "--json", *arguments[place:]))["exit_code"] == code


def test_an_error_of_the_node_keeps_its_code_hint_and_details(clawnet: Program, node: Script) -> None:
    node.answers["wallet.balance"] = FundsError("nothing left", hint="ask for a grant", wanted="5")
    done = clawnet("wallet", "balance")
    assert (done.returncode, done.stderr) == (79, "clawnet: nothing left\n  ask for a grant\n")
    error = failure(clawnet("wallet", "balance", "--json"))
    assert error == {
        "code": "funds",
        "message": "nothing left",
        "hint": "ask for a grant",
        "exit_code": 79,
        "wanted": "5",
    }


def test_a_defect_gets_an_id_that_the_log_knows(clawnet: Program, node: Script) -> None:
    node.answers["wallet.balance"] = {"no": "such answer"}
    done = clawnet("wallet", "balance")
    assert done.returncode == 70
    assert "Traceback" not in done.stderr
    number = done.stderr.split()[3].rstrip(":")
    log = (clawnet.home.log_file).read_text()
    assert f"id={number}" in log
    assert "KeyError" in log
    assert clawnet.home.log_file.stat().st_mode & 0o077 == 0


def test_other_peoples_text_cannot_drive_the_terminal(clawnet: Program, node: Script) -> None:
    node.answers["wallet.balance"] = ConfigError("name \x1b[31mred\x07\nsecond line")
    done = clawnet("wallet", "balance")
    assert done.stderr == "clawnet: name  [31mred  second line\n"


def test_a_call_without_an_answer_ends_with_124(clawnet: Program, node: Script) -> None:
    done = clawnet("wallet", "balance", "--timeout", "50ms")
    assert done.returncode == 124


def test_a_closed_stdout_is_141_and_silent(clawnet: Program, node: Script) -> None:
    node.answers["wallet.balance"] = {
        "available": "1",
        "locked": "0",
        "incoming": "0",
        "account": "",
        "mesh": "",
        "open_lines": 0,
        "read_only": None,
    }
    reader, writer = os.pipe()
    os.close(reader)
    process = clawnet.start("wallet", "balance", stdout=writer)
    os.close(writer)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (141, b"")


def test_help_is_0_and_names_every_command(clawnet: Program) -> None:
    done = clawnet("--help")
    assert done.returncode == 0
    for name in ("run", "market", "peer", "wallet", "daemon", "config", "identity", "doctor", "completion", "version"):
        assert f"\n  {name} " in done.stdout
    assert "_worker" not in done.stdout


def test_completion_scripts_and_answers(clawnet: Program) -> None:
    for shell in ("bash", "zsh", "fish", "powershell"):
        done = clawnet("completion", shell)
        assert done.returncode == 0
        assert "_CLAWNET_COMPLETE" in done.stdout
    done = clawnet(_CLAWNET_COMPLETE="complete_bash", COMP_WORDS="clawnet wal", COMP_CWORD="1")
    assert done.stdout.split() == ["wallet"]


def test_global_options_reach_the_node_that_they_name(clawnet: Program, node: Script) -> None:
    node.answers["peer.list"] = {"items": [], "next": None}
    done = clawnet("--home", str(node.home.dir), "peer", "list", "--json", CLAWNET_HOME="/nowhere")
    assert (done.returncode, json.loads(done.stdout)) == (0, {"items": [], "next": None})


def test_notices_are_for_terminals_and_verbose_only(clawnet: Program, node: Script) -> None:
    node.answers["market.list"] = node.answers["task.list"] = {"items": [], "next": None}
    assert clawnet("market", "list").stderr == ""
    node.answers["peer.invite"] = {
        "token": "clawnet1abc",
        "ring": "member",
        "expires_at": "2026-01-01T00:00:00Z",
        "uses": 1,
        "credits": "100",
        "mesh": "ab",
    }
    done = clawnet("peer", "invite", "-v", "--credits", "100")
    assert done.stdout == "clawnet1abc\n"
    assert "grants membership" in done.stderr
    asked = {"ring": "member", "expires_s": 3600.0, "uses": 1, "credits": "100", "ephemeral": False}
    assert node.params("peer.invite") == asked


def test_a_token_stays_out_of_argv(clawnet: Program, node: Script) -> None:
    party = {"peer_id": "12D3KooWAlice", "name": "alice", "ring": "member"}
    node.answers["peer.join"] = {"mesh": "ab", "ring": "member", "inviter": party, "peers": 2, "granted": "1000"}
    assert clawnet("peer", "join", "-", stdin=b"clawnet1abc\n").stdout == "ab\n"
    assert node.params("peer.join") == {"token": "clawnet1abc", "leave": False}
    assert clawnet("peer", "join", CLAWNET_JOIN="clawnet1def").returncode == 0
    assert node.params("peer.join")["token"] == "clawnet1def"


def test_command_substitution_returns(clawnet: Program, node: Script) -> None:
    node.answers["wallet.balance"] = {
        "available": "12.5",
        "locked": "0",
        "incoming": "0",
        "account": "",
        "mesh": "",
        "open_lines": 0,
        "read_only": None,
    }
    line = 'x=$("$@"); echo "got $x"'
    argv = ["sh", "-c", line, "sh", *clawnet.argv("wallet", "balance")]
    done = subprocess.run(argv, env=clawnet.environ, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("got 12.5\n", 0)
