"""Schemas: a database of schema 1, as a node left it, comes to the present one whole, or stays as it was."""

from __future__ import annotations

import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from clawnet.errors import ConfigError, InternalError, StorageError
from clawnet.market.records import decode_job, decode_task
from clawnet.storage import migrations
from clawnet.storage.migrations import SCHEMA_VERSION, Step
from clawnet.storage.schema import TABLES
from clawnet.storage.store import Store
from clawnet.wire.events import Put

FIXTURE = Path(__file__).parent / "schema-1" / "schema-1.sqlite"
"""The database of a founder after trades with another member that was killed: a payment to it waits in the outbox."""

KILLED = """
import os, signal, sys
from pathlib import Path
from clawnet.storage import migrations
from clawnet.storage.store import Store

def die(connection):
    os.kill(os.getpid(), signal.SIGKILL)

migrations.STEPS = (*migrations.STEPS, migrations.Step("dies", ("DELETE FROM entries",), die))
migrations.SCHEMA_VERSION += 1
Store.open(Path(sys.argv[1]))
"""


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """The fixture where a daemon would have it."""
    path = tmp_path / "clawnet.db"
    shutil.copy(FIXTURE, path)
    path.chmod(0o600)
    return path


def content(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    """All rows of all tables of a database."""
    connection = sqlite3.connect(path)
    names = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]
    rows = {name: sorted(connection.execute(f"SELECT * FROM {name}").fetchall()) for name in names}
    connection.close()
    return rows


def version(path: Path) -> int:
    connection = sqlite3.connect(path)
    found = int(connection.execute("PRAGMA user_version").fetchone()[0])
    connection.close()
    return found


def shape(path: Path) -> dict[str, str]:
    """What SQLite keeps of each table and index, without its line breaks."""
    connection = sqlite3.connect(path)
    rows = connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    connection.close()
    return {name: re.sub(r"\s+", " ", sql) for name, sql in rows}


def test_an_old_database_ends_like_a_new_one_with_its_rows(old: Path, tmp_path: Path) -> None:
    before = content(old)
    assert version(old) == 1
    assert before["outbox"]
    assert len(before["entries"]) > 20
    Store.open(old).close()
    Store.open(tmp_path / "new" / "clawnet.db").close()
    assert version(old) == SCHEMA_VERSION
    assert shape(old) == shape(tmp_path / "new" / "clawnet.db")
    after = content(old)
    assert set(after) == set(TABLES)
    assert before.pop("outputs") == [], "the table that goes held nothing"
    assert {name: after[name] for name in before} == before


def test_entries_of_an_old_chain_name_their_tasks(old: Path) -> None:
    before = content(old)
    tasks = [decode_task(row[-1]) for row in before["tasks"]]
    locks = {(a.lock_seq, task.task_id, a.n, a.price_ucr) for task in tasks for a in task.attempts if a.lock_seq >= 0}
    releases = {
        (a.released_seq, task.task_id, a.n, a.released_ucr)
        for task in tasks
        for a in task.attempts
        if a.released_seq >= 0
    }
    jobs = [decode_job(row[-1]) for row in before["jobs"]]
    claims = {(job.claimed_seq, job.task_id, job.attempt, job.amount_ucr) for job in jobs if job.claimed_seq >= 0}
    Store.open(old).close()
    assert locks
    assert set(content(old)["entry_tasks"]) == locks | releases | claims


def test_a_copy_of_the_old_one_lies_beside_it_until_a_daemon_has_served(old: Path) -> None:
    before = content(old)
    store = Store.open(old)
    copy = old.with_name("clawnet.db.schema-1")
    store.commit([Put("meta", ("a", b"1"))])
    store.close()
    assert (version(copy), content(copy)) == (1, before)
    if sys.platform != "win32":
        assert copy.stat().st_mode & 0o777 == 0o600
    store = Store.open(old)
    assert copy.exists()
    store.served()
    assert not copy.exists()
    store.close()


def test_a_step_that_fails_changes_nothing(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = content(old)
    broken = Step("fails half-way", ("DELETE FROM entries", "CREATE TABLE entries (a)"))
    monkeypatch.setattr(migrations, "STEPS", (*migrations.STEPS, broken))
    with pytest.raises((StorageError, ConfigError, InternalError)):
        Store.open(old)
    assert (version(old), content(old)) == (1, before)


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
def test_a_kill_in_the_middle_leaves_the_old_schema_to_begin_with_again(old: Path) -> None:
    before = {name: rows for name, rows in content(old).items() if name in TABLES}
    done = subprocess.run([sys.executable, "-c", KILLED, str(old)], capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    store = Store.open(old)
    store.close()
    assert version(old) == SCHEMA_VERSION
    after = content(old)
    assert {name: after[name] for name in before} == before


def test_rows_are_converted_in_the_same_transaction(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(connection: sqlite3.Connection) -> None:
        connection.execute("UPDATE tasks SET state = 'changed' WHERE idempotency_key = 'night-1'")

    monkeypatch.setattr(migrations, "STEPS", (*migrations.STEPS, Step("changes rows", (), convert)))
    monkeypatch.setattr(migrations, "SCHEMA_VERSION", SCHEMA_VERSION + 1)
    Store.open(old).close()
    assert [row[1] for row in content(old)["tasks"] if row[4] == "night-1"] == ["changed"]
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="newer clawnet"):
        Store.open(old)
