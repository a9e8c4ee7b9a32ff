"""The wallet as a file: backup, restore, what a restored or copied home may write and when, and the chain exported."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from clawnet import limits
from tests.cli.harness import Node, Nodes, alive, at_fixed_ports, connected, until

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
WORD = "correct horse battery"


@pytest.fixture
def secret(nodes: Nodes) -> str:
    """A private file with a passphrase."""
    path = nodes.directory / "passphrase"
    path.write_text(WORD + "\n")
    path.chmod(0o600)
    return str(path)


def compute(node: Node, *, by: str) -> None:
    """A paid task of `node`, done by another member."""
    options = ("--op", "sha256", "--prefer", "market", "--peer", by, "--wait", "--json")
    done = node("market", "submit", "--type", "compute", *options)
    assert done.json()["state"] == "settled", done.err


def writable(node: Node) -> bool:
    return node.ask("wallet.balance")["read_only"] is None


def head(node: Node) -> tuple[int, str]:
    """Sequence number and hash of the newest own entry."""
    newest = node.ask("wallet.history", limit=1)["items"][0]
    return newest["seq"], newest["hash"]


def nobody_forked(nodes: list[Node]) -> None:
    """Every node finds all chains it holds valid, and knows no fork."""
    for node in nodes:
        assert node("wallet", "audit", "--json").json()["forks"] == [], node.name
        assert "chain.forked" not in node.security_log


def stop(node: Node) -> None:
    pid = node.pid
    assert node("daemon", "stop").code == 0
    until(f"{node.name} ends", lambda: not alive(pid))


# --- backup and restore


def test_a_wallet_comes_back_from_its_backup_once_all_have_answered(nodes: Nodes, secret: str) -> None:
    alice, bob, carol = nodes.mesh("alice", "bob", "carol")
    compute(alice, by="bob")
    file = nodes.directory / "wallet.backup"
    made = bob("wallet", "backup", str(file), "--passphrase-file", secret, "--json").json("wallet backup")
    assert {peer["name"] for peer in made["peers"]} == {"alice", "carol"}
    assert file.stat().st_mode & 0o777 == 0o600
    assert WORD.encode() not in file.read_bytes()
    # The original lives on after its backup, then dies with its disk.
    assert bob("wallet", "send", "carol", "2").code == 0
    compute(alice, by="bob")
    lost = head(bob)
    carol.until("keeps bob's chain", lambda: _head_of(carol, bob)[0] == lost[0])
    bob.kill()
    carol.kill()
    shutil.rmtree(bob.dir)

    told = bob("wallet", "restore", str(file), "--passphrase-file", secret, "--json").json("wallet restore")
    assert told["seq"] == made["seq"] < lost[0]
    assert "\n  name: bob" in (bob.dir / "config.yaml").read_text(), "bob's own name, also where nothing else tells it"
    bob.start()
    bob.until("takes its chain in", lambda: head(bob) == lost)
    bob.until("has alice's answer", lambda: _unanswered(bob) == ["carol"])
    bob("wallet", "send", "alice", "1").failed(77, "read-only")
    assert "waits for the answers of carol" in bob("daemon", "status").out
    assert "waits for the answers of carol" in bob("doctor").out
    # It is remembered over a restart, and 24 hours have not passed.
    bob.kill()
    bob.start()
    bob.until("still waits", lambda: _unanswered(bob) == ["carol"])
    refused = bob("wallet", "restore", "--accept-risk")
    assert refused.code == 77
    assert "a fork convicts" in refused.err
    assert "from 20" in refused.err

    carol.start()
    bob.until("writes again", lambda: writable(bob))
    assert bob("wallet", "send", "alice", "1").code == 0
    compute(alice, by="bob")
    nobody_forked([alice, bob, carol])


def _unanswered(node: Node) -> list[str]:
    restore = node.ask("wallet.balance")["restore"]
    return [] if restore is None else [peer["name"] for peer in restore["unanswered"]]


def _head_of(keeper: Node, node: Node) -> tuple[int, str]:
    account = node.ask("wallet.balance")["account"]
    page = keeper.ask("wallet.export", account=account, **{"from": 0})
    return (page["last"], "") if page["items"] else (-1, "")


def test_the_owner_may_do_without_the_answers_a_day_later(nodes: Nodes, secret: str) -> None:
    alice, bob = at_fixed_ports(nodes, "alice", "bob")
    file = nodes.directory / "wallet.backup"
    assert bob("wallet", "backup", str(file), "--passphrase-file", secret).code == 0
    bob.kill()
    alice.kill()
    assert bob("wallet", "restore", str(file), "--force", "--passphrase-file", secret).code == 0
    assert [path.name for path in bob.home.archive_dir.glob("*/node.key")] == ["node.key"]
    bob.start()
    bob("wallet", "restore", "--accept-risk").failed(77, "can be done without from", "a fork convicts")
    bob.kill()
    # A day passes: the row says since when.
    connection = sqlite3.connect(bob.home.database)
    connection.execute("UPDATE awaited SET since_ms = since_ms - ?", (limits.RESTORE_OVERRIDE_MS,))
    connection.commit()
    connection.close()
    bob.start()
    assert _unanswered(bob) == ["alice"]
    done = bob("wallet", "restore", "--accept-risk", "--json")
    assert done.json("wallet balance")["restore"] is None
    bob.until("writes again", lambda: writable(bob))
    assert "ledger.risk_accepted" in bob.security_log
    bob("wallet", "restore", "--accept-risk").failed(77, "not read-only")
    alice.start()
    alice.until("is back", lambda: connected(alice) == {"bob"})
    bob.until("may send", lambda: bob("wallet", "send", "alice", "1").code == 0)
    nobody_forked([alice, bob])


def test_a_node_without_peers_has_nobody_to_wait_for(nodes: Nodes, secret: str) -> None:
    node = nodes().start()
    file = nodes.directory / "wallet.backup"
    stop(node)
    assert node("wallet", "backup", str(file), "--passphrase-file", secret).code == 0
    shutil.rmtree(node.dir)
    assert node("wallet", "restore", str(file), "--passphrase-file", secret).code == 0
    node.start()
    assert writable(node)
    assert node("wallet", "balance").line == "1000"


def test_what_is_no_backup_changes_nothing(nodes: Nodes, secret: str) -> None:
    node = nodes().start()
    file = nodes.directory / "wallet.backup"
    assert node("wallet", "backup", str(file), "--passphrase-file", secret).code == 0
    node("wallet", "backup", str(file), "--passphrase-file", secret).failed(77, "exists", "--force")
    assert node("wallet", "backup", str(file), "--force", "--passphrase-file", secret).code == 0
    node("wallet", "restore", str(file), "--passphrase-file", secret).failed(78, "in use")
    stop(node)
    node("wallet", "restore", str(file), "--passphrase-file", secret).failed(77, "already holds a node", "--force")
    other = nodes("other")
    other("wallet", "restore", str(file)).failed(64, "passphrase")
    other("wallet", "restore", "--passphrase-file", secret).failed(64, "which backup")
    other("wallet", "restore", str(file) + "x", "--passphrase-file", secret).failed(66, "no file")
    wrong = nodes.directory / "wrong"
    wrong.write_text("another passphrase\n")
    wrong.chmod(0o600)
    other("wallet", "restore", str(file), "--passphrase-file", str(wrong)).failed(65, "passphrase is wrong")
    whole = file.read_bytes()
    changed = whole[:300] + bytes([whole[300] ^ 1]) + whole[301:]
    for damaged in (whole[:-1], whole[: len(whole) // 2], whole + b"x", changed, b"", b"{}\n"):
        file.write_bytes(damaged)
        done = other("wallet", "restore", str(file), "--passphrase-file", secret)
        done.failed(65, "backup")
    assert not other.home.node_key.exists()
    assert not other.home.mesh_file.exists()
    assert not list(other.dir.rglob("*.db")) or not other.home.database.exists()


def test_a_backup_goes_through_pipes(nodes: Nodes, secret: str) -> None:
    node = nodes().start()
    code, data, err = node.raw("wallet", "backup", "-", "--passphrase-file", secret)
    assert code == 0, err
    stop(node)
    other = nodes("other")
    done = other("wallet", "restore", "-", "--passphrase-file", secret, stdin=data)
    assert done.line == str(other.dir)


# --- copies


def test_a_copied_home_catches_up_before_it_writes(nodes: Nodes) -> None:
    alice, bob = at_fixed_ports(nodes, "alice", "bob")
    stop(bob)
    copy = nodes("copy")
    copy.environ["CLAWNET_NODE_NAME"] = "bob"
    shutil.copytree(bob.dir, copy.dir, ignore=shutil.ignore_patterns("run"))
    bob.start()
    bob.until("is back", lambda: connected(bob) == {"alice"})
    bob.until("may send", lambda: bob("wallet", "send", "alice", "3").code == 0)
    moved_on = head(bob)
    alice.until("keeps it", lambda: _head_of(alice, bob)[0] == moved_on[0])
    alice.kill()
    stop(bob)

    copy.start()
    assert "copied" in copy.ask("wallet.balance")["read_only"]
    copy("wallet", "send", "alice", "1").failed(77, "read-only", "copied")
    alice.start()
    copy.until("catches up", lambda: head(copy) == moved_on)
    copy.until("writes", lambda: writable(copy))
    copy.until("may send", lambda: copy("wallet", "send", "alice", "1").code == 0)
    assert head(copy)[0] > moved_on[0]
    nobody_forked([alice, copy])


def test_two_clones_that_run_at_once_are_both_warned_and_neither_writes(nodes: Nodes) -> None:
    alice, bob = at_fixed_ports(nodes, "alice", "bob")
    stop(bob)
    copy = nodes("copy")
    copy.environ["CLAWNET_NODE_NAME"] = "bob"
    shutil.copytree(bob.dir, copy.dir, ignore=shutil.ignore_patterns("run"))
    bob.start()
    bob.until("is back", lambda: connected(bob) == {"alice"})
    copy.start()
    twins = (bob, copy)
    # A member that picks the connection (its id is the lower one) holds on to each of the two for fifteen seconds.
    until("both are warned", lambda: all("another program runs" in _warnings(node) for node in twins), 150.0)
    for node in twins:
        node("wallet", "send", "alice", "1").failed(77, "another program runs")
        assert "identity.twin" in node.security_log
        assert "another program runs" in node("doctor").out
    nobody_forked([alice])


def _warnings(node: Node) -> str:
    return " ".join(node.ask("status")["warnings"])


def test_a_renamed_home_is_no_copy(nodes: Nodes) -> None:
    node = nodes().start()
    stop(node)
    moved = nodes("moved")
    node.dir.rename(moved.dir)
    moved.start()
    assert writable(moved)
    assert "ledger.restore" not in moved.log


def test_an_older_database_under_a_running_mesh_does_not_fork(nodes: Nodes) -> None:
    alice, bob, carol = nodes.mesh("alice", "bob", "carol")
    stop(bob)
    old = nodes.directory / "old.db"
    shutil.copy(bob.home.database, old)
    bob.start()
    bob.until("is back", lambda: connected(bob) == {"alice", "carol"})
    compute(alice, by="bob")
    assert bob("wallet", "send", "carol", "1").code == 0
    lost = head(bob)
    stop(bob)
    # As a snapshot that is rolled back: the same file, the same place, older content.
    bob.home.database.write_bytes(old.read_bytes())
    for suffix in ("-wal", "-shm"):
        bob.home.database.with_name(bob.home.database.name + suffix).unlink(missing_ok=True)
    bob.start()
    bob.until("catches up", lambda: head(bob) == lost)
    bob.until("writes again", lambda: writable(bob))
    bob.until("may send", lambda: bob("wallet", "send", "alice", "1").code == 0)
    compute(alice, by="bob")
    compute(bob, by="carol")
    nobody_forked([alice, bob, carol])


# --- the chain for outside eyes


def test_an_outsider_can_check_an_exported_chain(nodes: Nodes) -> None:
    alice, bob = nodes.mesh("alice", "bob")
    compute(alice, by="bob")
    assert alice("wallet", "send", "bob", "2.5").code == 0
    bob.until("is paid", lambda: bob.ask("wallet.balance")["available"] == "1003.5")
    done = bob("wallet", "export")
    lines = [json.loads(line) for line in done.out.splitlines()]
    own = [line for line in lines if line["chain"] == "own"]
    income = [line for line in lines if line["chain"] == "income"]
    assert [line["seq"] for line in own] == list(range(len(own)))
    assert own[-1]["balance"] == "1003.5"
    assert {line["account"] for line in income} == {alice.ask("wallet.balance")["account"]}
    claims = [item for line in own if line["kind"] == "claim" for item in line["body"]["items"]]
    claimed = {(item["payer"], item["seq"]) for item in claims}
    assert claimed <= {(line["account"], line["seq"]) for line in income}

    script = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "LEDGER.md").read_text(), re.DOTALL)
    assert script is not None
    checked = subprocess.run([sys.executable, "-c", script[1]], input=done.out, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    assert f"{own[-1]['account']} {own[-1]['hash']}" in checked.stdout
    forged = done.out.replace('"raw_b64": "', '"raw_b64": "AA', 1)
    assert subprocess.run([sys.executable, "-c", script[1]], input=forged, capture_output=True, text=True).returncode

    file = nodes.directory / "chain.csv"
    assert bob("wallet", "export", "--format", "csv", "--output", str(file)).code == 0
    assert file.stat().st_mode & 0o777 == 0o600
    rows = list(csv.DictReader(io.StringIO(file.read_text())))
    assert [row["kind"] for row in rows] == [line["kind"] for line in own]
    assert rows[-1]["balance"] == "1003.5"
    refunds = list(csv.DictReader(io.StringIO(alice("wallet", "export", "--format", "csv").out)))
    released = [row for row in refunds if row["kind"] == "release"]
    assert {row["counterparty"] for row in released} == {bob.peer_id}
