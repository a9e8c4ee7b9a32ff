"""`clawnet demo` as a user runs it: what it shows is true, its books add up for an outsider, and nothing is left."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import tempfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from clawnet.answers import ANSWERS
from clawnet.identity.certificates import read_charter
from clawnet.identity.keys import verify
from clawnet.ledger.audit import AuditReport, audit_chains
from clawnet.ledger.terms import LedgerTerms
from tests.cli.harness import PROGRAM, Done, alive, checked, processes_with, read_until, until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap not installed"),
]

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("files", "primes", "exit-3", "nobody")
WEIGHTS = {"price": 0.4, "reputation": 0.3, "latency": 0.1, "confidence": 0.2}


class Place:
    """A directory of its own for homes, temporary files and input, so that whatever is left can be seen."""

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix="clawnet-", dir="/tmp"))
        for name in ("home", "tmp", "input"):
            (self.directory / name).mkdir()
        self.tmp = self.directory / "tmp"
        self.input = self.directory / "input"
        for number in range(12):
            (self.input / f"{number}.txt").write_text(f"file {number}\n" * (number + 1))
        (self.input / "deep" / "er").mkdir(parents=True)
        (self.input / "deep" / "er" / "data.bin").write_bytes(os.urandom(100_000))
        self.environ = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.directory / "home"),
            "TMPDIR": str(self.tmp),
            "LC_ALL": "C.UTF-8",
        }

    def demo(self, *arguments: str, before: tuple[str, ...] = (), **environ: str) -> Done:
        """Runs the demo to its end; `before` goes in front of the command line."""
        done = subprocess.run(
            [*before, *PROGRAM, "demo", *arguments],
            env={**self.environ, **environ},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=120,
        )
        return Done(done.returncode, done.stdout.decode(), done.stderr.decode())

    def answer(self, *arguments: str, **environ: str) -> dict[str, Any]:
        """The object that a demo with --json over the input directory prints."""
        done = self.demo("--json", "--input-dir", str(self.input), *arguments, **environ)
        assert done.code == 0, done.err
        found: dict[str, Any] = checked(json.loads(done.out), ANSWERS["demo"])
        return found

    def assert_empty(self) -> None:
        """No process that has to do with this directory, and no file in it but the input."""
        assert processes_with(str(self.directory)) == []
        assert list(self.tmp.iterdir()) == []
        assert list((self.directory / "home").iterdir()) == []


@pytest.fixture
def place() -> Iterator[Place]:
    made = Place()
    yield made
    left = processes_with(str(made.directory))
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    shutil.rmtree(made.directory)
    assert left == []


@pytest.fixture(scope="module")
def shown() -> Iterator[tuple[Place, dict[str, Any]]]:
    """One demo over an input directory, for all tests that only look at what it printed."""
    made = Place()
    yield made, made.answer()
    shutil.rmtree(made.directory)


def ucr(text: str) -> int:
    """Micro-credits of a decimal string with a sign, worked out apart from the product's own parser."""
    value = Fraction(text) * 1_000_000
    assert value.denominator == 1
    return int(value)


def task(answer: dict[str, Any], name: str) -> dict[str, Any]:
    """One task of a demo."""
    (found,) = (one for one in answer["tasks"] if one["name"] == name)
    return dict(found)


# --- what it shows


def test_the_four_tasks_end_as_they_should(shown: tuple[Place, dict[str, Any]]) -> None:
    answer = shown[1]
    assert answer["sandbox"]["passed"], answer["sandbox"]
    assert (answer["ok"], answer["problems"], answer["kept"]) == (True, [], None)
    assert [one["name"] for one in answer["tasks"]] == list(NAMES)
    assert [one["task"]["state"] for one in answer["tasks"]] == ["settled", "settled", "settled", "no_bids"]
    for name in NAMES[:3]:
        done = task(answer, name)["task"]
        assert ucr(done["price"]) > 0
        assert (done["ring"], done["escrow"]["state"]) == ("member", "claimed")
        assert done["executor"]["name"] in ("beta", "gamma")
    assert task(answer, "files")["task"]["result"]["exit_code"] == 0
    three = task(answer, "exit-3")["task"]["result"]
    assert (three["exit_code"], three["stdout"], three["stderr"]) == (3, "this is stdout\n", "this is stderr\n")
    nobody = task(answer, "nobody")
    assert (nobody["task"]["price"], nobody["task"]["executor"]) == (None, None)
    assert nobody["task"]["error"]["exit_code"] == 75
    assert "no_capability" in nobody["why"]["summary"] and nobody["why"]["hint"]


def test_the_files_are_those_of_the_directory_given(shown: tuple[Place, dict[str, Any]]) -> None:
    place, answer = shown
    paths = sorted(path for path in place.input.rglob("*") if path.is_file())
    wanted = {f"{hashlib.sha256(path.read_bytes()).hexdigest()}  ./{path.relative_to(place.input)}" for path in paths}
    *lines, last = task(answer, "files")["task"]["result"]["stdout"].splitlines()
    assert set(lines) == wanted
    assert last == f"{len(paths)} files"
    assert answer["input"] == {
        "path": str(place.input.resolve()),
        "files": len(paths),
        "bytes": sum(path.stat().st_size for path in paths),
    }


def test_every_score_is_the_sum_of_its_terms_and_the_best_wins(shown: tuple[Place, dict[str, Any]]) -> None:
    for one in shown[1]["tasks"][:3]:
        (auction,) = one["why"]["rounds"]
        assert (auction["ring"], auction["asked"]) == ("member", 2)
        bids = [peer["bid"] for peer in auction["peers"] if peer["bid"]]
        assert {bid["bidder"]["name"] for bid in bids} == {"beta", "gamma"}
        for bid in bids:
            terms = bid["terms"]
            assert bid["score"] == pytest.approx(sum(terms.values()))
            assert terms["price"] == pytest.approx(WEIGHTS["price"] / max(1.0, float(bid["price"])))
            assert terms["reputation"] == pytest.approx(WEIGHTS["reputation"] * bid["reputation"])
            assert terms["confidence"] == pytest.approx(WEIGHTS["confidence"] * bid["confidence"])
            assert 0 < terms["latency"] <= WEIGHTS["latency"]
        (winner,) = (bid for bid in bids if bid["won"])
        assert winner["score"] == max(bid["score"] for bid in bids)
        assert winner["bidder"] == auction["winner"] == one["task"]["executor"]
        assert winner["price"] == one["task"]["price"]


def test_the_wallets_tell_who_paid_whom(shown: tuple[Place, dict[str, Any]]) -> None:
    answer = shown[1]
    books = answer["books"]
    wallets = {one["node"]: one for one in books["wallets"]}
    assert list(wallets) == [node["name"] for node in answer["nodes"]] == ["alpha", "beta", "gamma"]
    earned = dict.fromkeys(wallets, 0)
    for name in NAMES[:3]:
        done = task(answer, name)["task"]
        earned[done["executor"]["name"]] += ucr(done["price"])
        earned["alpha"] -= ucr(done["price"])
    for name, one in wallets.items():
        assert ucr(one["after"]) - ucr(one["before"]) == ucr(one["change"]) == earned[name]
        assert ucr(one["locked"]) == 0
    assert sum(ucr(one["after"]) for one in books["wallets"]) == ucr(books["total"]) == ucr(books["granted"])
    assert books["agree"]
    assert all(audit["ok"] and not audit["problems"] for audit in books["audits"])
    assert (books["audits"][0]["complete"], books["audits"][0]["chains"]) == (True, 3)


def test_the_nodes_are_three_daemons_on_the_loopback_alone(shown: tuple[Place, dict[str, Any]]) -> None:
    nodes = shown[1]["nodes"]
    for name in ("pid", "peer_id", "home"):
        assert len({node[name] for node in nodes}) == 3
    for node in nodes:
        assert node["listen"] and all(text.startswith("/ip4/127.0.0.1/tcp/") for text in node["listen"])
    assert [node["joined_by"] for node in nodes] == ["", "invite of alpha", "invite of alpha"]


def test_nothing_is_left(shown: tuple[Place, dict[str, Any]]) -> None:
    place, answer = shown
    assert not any(alive(node["pid"]) for node in answer["nodes"])
    place.assert_empty()


# --- other input, other result


def test_one_byte_of_input_changes_the_result(place: Place, shown: tuple[Place, dict[str, Any]]) -> None:
    shutil.rmtree(place.input)
    shutil.copytree(shown[0].input, place.input)
    with (place.input / "deep" / "er" / "data.bin").open("r+b") as file:
        first = file.read(1)
        file.seek(0)
        file.write(bytes([first[0] ^ 1]))
    before = task(shown[1], "files")["task"]["result"]
    after = task(place.answer(), "files")["task"]["result"]
    assert before["sha256"] != after["sha256"]
    changed = set(before["stdout"].splitlines()) ^ set(after["stdout"].splitlines())
    assert {line.partition("  ")[2] for line in changed} == {"./deep/er/data.bin"}
    place.assert_empty()


def test_names_of_every_kind_travel_and_what_cannot_stays_behind(place: Place) -> None:
    shutil.rmtree(place.input)
    (place.input / "a b").mkdir(parents=True)
    for name in ("new\nline", "back\\slash", "\\n", "-dash", "cr\rx", "ü", "a b/$(id)", " lead"):
        (place.input / name).write_text(name)
    (place.input / os.fsdecode(b"bad\xff")).write_text("x")
    (place.input / "outside").symlink_to("/etc/passwd")
    (place.input / "inside").symlink_to("-dash")
    os.mkfifo(place.input / "fifo")
    answer = place.answer("--nodes", "2")
    assert (answer["input"]["files"], answer["ok"]) == (8, True)
    assert task(answer, "files")["task"]["result"]["stdout"].endswith("\n8 files\n")


def test_an_empty_directory_and_a_long_path_will_do(place: Place) -> None:
    shutil.rmtree(place.input)
    place.input.mkdir()
    deep = place.tmp / ("x" * 90)
    deep.mkdir()
    before = set(Path("/tmp").glob("clawnet-*"))
    answer = place.answer("--nodes", "2", TMPDIR=str(deep))
    assert (answer["input"]["files"], answer["ok"]) == (0, True)
    assert list(deep.iterdir()) == []
    uid = f"clawnet-{os.getuid()}-"
    homes = [node["home"] for node in answer["nodes"]]
    digests = {hashlib.sha256(home.encode()).hexdigest()[:16] for home in homes}
    left = {path.name for path in set(Path("/tmp").glob("clawnet-*")) - before}
    assert not left & {uid + digest for digest in digests}


def test_told_to_a_person(place: Place) -> None:
    done = place.demo("--verbose", CLAWNET_TCP_PORT="1", CLAWNET_MARKET_RATES_TASK="never mind")
    assert done.code == 0, done.err
    for words in ("Task 1, files", "beta (member)", "confidence", "won", "winner:", "escrow claimed", "The books"):
        assert words in done.out
    assert "3000, equals what was granted, 3000" in done.out
    assert "every process has ended and every file is gone" in done.out
    assert "\x1b" not in done.out
    steps = done.err.splitlines()
    assert all(line.startswith("clawnet: ") for line in steps) and len(steps) >= 8
    # Without --input-dir it is the checkout's own sources that travel.
    assert f"{sum(1 for _ in own_sources())} files" in done.out
    place.assert_empty()


def own_sources() -> Iterator[Path]:
    for name in ("clawnet", "commands", "tests", "scripts", "packaging", "docs", "examples", "termux"):
        for path in (ROOT / name).rglob("*"):
            parts = path.relative_to(ROOT).parts
            hidden = any(part.startswith(".") or part in ("__pycache__", "node_modules") for part in parts)
            if not hidden and path.suffix != ".pyc" and path.is_file() and not path.is_symlink():
                yield path
    yield from (path for path in ROOT.iterdir() if path.is_file() and not path.name.startswith("."))


# --- an auditor from outside


def audit_of(home: Path) -> tuple[AuditReport, dict[bytes, list[bytes]]]:
    """What somebody who has the ledger's verification code and a node's files, and nothing else, finds."""
    membership = json.loads((home / "mesh.json").read_text())
    charter, mesh = read_charter(base64.b64decode(membership["charter"]))
    terms = LedgerTerms(
        issuers=frozenset(charter.issuers),
        grant_max_ucr=charter.grant_max_ucr,
        issue_total_max_ucr=charter.issue_total_max_ucr,
        open_lines_max=charter.open_lines_max,
        margin_ms=charter.margin_ms,
        lock_max_ms=charter.lock_max_ms,
    )
    chains: dict[bytes, list[bytes]] = {}
    database = sqlite3.connect(f"file:{home / 'clawnet.db'}?mode=ro", uri=True)
    try:
        for account, raw in database.execute("SELECT account, raw FROM entries ORDER BY account, seq"):
            chains.setdefault(account, []).append(raw)
    finally:
        database.close()
    return audit_chains(terms, mesh, chains, verify), chains


def test_an_independent_auditor_reaches_the_same_sums(place: Place) -> None:
    answer = place.answer("--keep")
    directory = Path(answer["kept"])
    nodes = answer["nodes"]
    try:
        assert directory.parent == place.tmp.resolve() and all(alive(node["pid"]) for node in nodes)
        founder, chains = audit_of(directory / "alpha")
        assert (founder.sound, founder.problems, len(founder.accounts)) == (True, (), 3)
        assert founder.granted_ucr == ucr(answer["books"]["granted"]) == 3_000_000_000
        assert (founder.open_ucr, founder.unclaimed_ucr) == (0, 0)
        after = {one["node"]: ucr(one["after"]) for one in answer["books"]["wallets"]}
        accounts = {node["name"]: account_of(node) for node in nodes}
        assert {name: founder.accounts[account].available_ucr for name, account in accounts.items()} == after
        for node in nodes[1:]:
            report, _ = audit_of(directory / node["name"])
            own = report.accounts[accounts[node["name"]]]
            assert own.available_ucr == after[node["name"]] and not report.problems
        forge(directory / "alpha", chains)
    finally:
        for node in nodes:
            stopped = subprocess.run(
                [*PROGRAM, "--home", node["home"], "daemon", "stop"], env=place.environ, stdin=subprocess.DEVNULL
            )
            assert stopped.returncode == 0
        assert not any(alive(node["pid"]) for node in nodes)
        shutil.rmtree(directory)
    place.assert_empty()


def account_of(node: dict[str, Any]) -> bytes:
    """The account of a kept node, as its own command line tells it."""
    done = subprocess.run(
        [*PROGRAM, "--home", node["home"], "wallet", "balance", "--json"],
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=True,
    )
    return bytes.fromhex(json.loads(done.stdout)["account"])


def forge(home: Path, chains: dict[bytes, list[bytes]]) -> None:
    """One flipped bit anywhere, or one entry left out, and the audit says so."""
    membership = json.loads((home / "mesh.json").read_text())
    charter, mesh = read_charter(base64.b64decode(membership["charter"]))
    terms = LedgerTerms(issuers=frozenset(charter.issuers))
    longest = max(chains, key=lambda account: len(chains[account]))
    for position in (10, -70, -1):
        bad = {account: list(raws) for account, raws in chains.items()}
        raw = bytearray(bad[longest][2])
        raw[position] ^= 1
        bad[longest][2] = bytes(raw)
        assert not audit_chains(terms, mesh, bad, verify).sound
    missing = {account: list(raws) for account, raws in chains.items()}
    del missing[longest][2]
    assert not audit_chains(terms, mesh, missing, verify).sound


# --- when it is stopped, or fails


@pytest.mark.parametrize(
    ("number", "step"),
    [
        (signal.SIGINT, b"starting"),
        (signal.SIGTERM, b"joining"),
        (signal.SIGHUP, b"task files"),
        (signal.SIGINT, b"taking everything down"),
    ],
)
def test_a_signal_leaves_nothing(place: Place, number: signal.Signals, step: bytes) -> None:
    process = subprocess.Popen(
        [*PROGRAM, "demo", "--verbose", "--input-dir", str(place.input)],
        env=place.environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    with process.stdout, process.stderr:
        read_until(process.stderr, step)
        process.send_signal(number)
        code = process.wait(60)
        assert b"Traceback" not in process.stderr.read()
    # It may be over before the last of these comes.
    assert code == 128 + number or (code, step) == (0, b"taking everything down")
    until("all is gone", lambda: processes_with(str(place.directory)) == [])
    place.assert_empty()


def test_a_time_limit_ends_it_clean(place: Place) -> None:
    done = place.demo("--timeout", "1ms", "--input-dir", str(place.input))
    done.failed(124)
    place.assert_empty()


def test_a_wrong_result_is_found_out(place: Place) -> None:
    liar = place.directory / "sha256sum"
    liar.write_text('#!/bin/sh\nfor name; do printf "%064d  %s\\n" 7 "$name"; done\n')
    liar.chmod(0o755)
    mount = f"mount --bind {liar} {real_program('sha256sum')}"
    done = place.demo("--json", "--input-dir", str(place.input), before=in_a_mount_namespace(mount))
    assert done.code == 80, done.err
    answer = json.loads(done.out)
    assert not answer["ok"]
    assert [one["name"] for one in answer["tasks"] if not one["ok"]] == ["files"]
    assert json.loads(done.err)["error"]["code"] == "verification_failed"
    place.assert_empty()


def test_without_the_sandbox_shell_tasks_stay_at_home_and_it_says_why(place: Place) -> None:
    mount = f"mount --bind /dev/null {real_program('bwrap')}"
    before = in_a_mount_namespace(mount)
    done = place.demo("--json", "--input-dir", str(place.input), before=before)
    assert done.code == 0, done.err
    answer = checked(json.loads(done.out), ANSWERS["demo"])
    assert (answer["ok"], answer["sandbox"]["passed"]) == (True, False)
    assert answer["sandbox"]["reason"] and answer["sandbox"]["remedy"]
    for name, executor, price in (("files", "alpha", "0"), ("primes", None, None), ("exit-3", "alpha", "0")):
        done_task = task(answer, name)["task"]
        assert done_task["state"] == "settled"
        if executor:
            assert (done_task["executor"]["name"], done_task["price"]) == (executor, price)
            assert done_task["escrow"]["state"] == "none"
        else:
            assert done_task["executor"]["name"] in ("beta", "gamma")
    told = place.demo("--input-dir", str(place.input), before=before)
    assert told.code == 0
    assert answer["sandbox"]["reason"] in told.out and answer["sandbox"]["remedy"] in told.out
    place.assert_empty()


def real_program(name: str) -> str:
    """The file behind a command; in a mount namespace another may be laid over it."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return os.path.realpath(found)


def in_a_mount_namespace(command: str) -> tuple[str, ...]:
    """Puts a process into a mount namespace of its own in which `command` was run first."""
    before = ("unshare", "--mount", "sh", "-ec", f'{command}; exec "$@"', "sh")
    if os.geteuid() != 0 or subprocess.run([*before, "true"], capture_output=True).returncode:
        pytest.skip("laying a file over a program needs root")
    return before


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (("--nodes", "1"), 64, "2<=x"),
        (("--nodes", "two"), 64, "two"),
        (("more",), 64, "more"),
        (("--no-such",), 64, "--no-such"),
        (("--input-dir", "/no/such/directory"), 66, "/no/such/directory"),
        (("--input-dir", __file__), 65, "no directory"),
        (("--input-dir", "/tmp"), 65, "demo's own files"),
    ],
)
def test_bad_input(place: Place, arguments: tuple[str, ...], code: int, word: str) -> None:
    place.environ["TMPDIR"] = "/tmp" if arguments[-1] == "/tmp" else place.environ["TMPDIR"]
    place.demo(*arguments).failed(code, word)
    place.assert_empty()


def test_more_than_can_travel_is_refused_before_it_is_read(place: Place) -> None:
    with (place.input / "big").open("wb") as file:
        file.truncate(64 * 1024 * 1024)
    place.demo("--input-dir", str(place.input)).failed(65, "64MiB")
    (place.input / "big").unlink()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(place.input / "socket"))
        assert place.answer("--nodes", "2")["ok"]
