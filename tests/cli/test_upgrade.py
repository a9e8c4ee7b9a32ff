"""An upgrade: the home of a node that wrote schema 1 is started by this version, and goes on where it stood."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

import pytest

from clawnet.storage.migrations import SCHEMA_VERSION
from tests.cli.harness import Node, Nodes, alive, until

pytestmark = pytest.mark.slow

OLD = Path(__file__).resolve().parents[1] / "adapters" / "schema-1"
"""Keys, mesh.json and database of alice, who traded with bob in January 2026; bob died before her last payment came."""


@pytest.fixture
def old(nodes: Nodes) -> Node:
    """A home as a node of schema 1 left it."""
    node = nodes()
    node.dir.mkdir(mode=0o700)
    (node.dir / "keys").mkdir(mode=0o700)
    shutil.copy(OLD / "schema-1.sqlite", node.home.database)
    shutil.copy(OLD / "mesh.json", node.home.mesh_file)
    for key in (OLD / "keys").iterdir():
        shutil.copy(key, node.home.keys_dir / key.name)
    for path in (node.home.database, node.home.mesh_file, *node.home.keys_dir.iterdir()):
        path.chmod(0o600)
    return node


def version(path: Path) -> int:
    connection = sqlite3.connect(path)
    found = int(connection.execute("PRAGMA user_version").fetchone()[0])
    connection.close()
    return found


def test_a_node_of_schema_1_goes_on_with_this_version(old: Node) -> None:
    copy = old.home.database.with_name("clawnet.db.schema-1")
    assert version(old.home.database) == 1
    old.start()
    assert (version(old.home.database), version(copy)) == (SCHEMA_VERSION, 1)
    balance = old.ask("wallet.balance")
    assert (balance["available"], balance["restore"]) == ("992.5", None)
    history = old.ask("wallet.history", limit=50)["items"]
    assert [entry["seq"] for entry in history] == list(range(13, -1, -1))
    assert old.ask("status")["activity"]["obligations_open"] == 1, "what bob never had is still owed to him"
    assert len(old.ask("task.list", limit=50)["items"]) == 5
    # A key that was paid for in January is not paid for again.
    night = ("--type", "compute", "--op", "sha256", "--prefer", "market", "--peer", "bob")
    again = old("market", "submit", *night, "--wait", "--json", "--idempotency-key", "night-1").json()
    assert (again["state"], again["created_at"][:7]) == ("settled", "2026-01")
    # It works on, and its chain goes on.
    assert old("run", "-n", "--", "echo", "new").out == "new\n"
    old.until("may send", lambda: old("wallet", "send", "bob", "1").code == 0)
    assert old.ask("wallet.history", limit=1)["items"][0]["seq"] == 14
    assert old.ask("wallet.audit", peer="alice")["accounts"][0]["ok"]
    # The copy stays over a death, and goes after a daemon that ended as it should.
    old.kill()
    old.start()
    assert copy.exists()
    pid = old.pid
    assert old("daemon", "stop").code == 0
    until("it ends", lambda: not alive(pid))
    assert not copy.exists()
    assert old.start().ask("wallet.balance")["available"] == "991.5"


def test_a_database_from_the_future_is_refused(old: Node) -> None:
    connection = sqlite3.connect(old.home.database)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    old("daemon", "start").failed(78, "newer clawnet", "schema 99")
    assert version(old.home.database) == 99
