"""How a database comes to the present schema: one list of steps, forward only, and a copy of the old file beside it."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Struct

from clawnet.errors import ConfigError
from clawnet.storage.schema import INDEXES, TABLES, create_sql


class Step(Struct, frozen=True):
    """One schema further. `convert`, when rows must change too, runs after the statements in the same transaction.

    The statements are spelt out: a step must do tomorrow what it does today, whatever TABLES says by then. A test
    holds a database that went through all steps against one that was made new.
    """

    why: str
    statements: tuple[str, ...]
    convert: Callable[[sqlite3.Connection], None] | None = None


def _entries_of_tasks(connection: sqlite3.Connection) -> None:
    """Locks and releases as tasks remember them, claims as jobs do; which entry returned a line nobody noted before.

    The places are those of the fields in the rows of this schema, by market/records.py of that time.
    """
    found: list[tuple[int, bytes, int, int]] = []
    for (body,) in connection.execute("SELECT body FROM tasks"):
        task = _fields(body, 15)
        for attempt in task[14] if task else ():
            found.append((attempt[14], task[0], attempt[0], attempt[4]))
            found.append((attempt[19], task[0], attempt[0], attempt[20]))
    for (body,) in connection.execute("SELECT body FROM jobs"):
        job = _fields(body, 38)
        if job:
            found.append((job[37], job[4], job[5], job[25]))
    known = (row for row in found if row[0] >= 0)
    connection.executemany("INSERT OR IGNORE INTO entry_tasks VALUES (?, ?, ?, ?)", known)


def _fields(body: bytes, least: int) -> list[Any]:
    """The fields of a row's body; none of one that is not of this shape."""
    try:
        found = msgspec.msgpack.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return []
    return found if isinstance(found, list) and len(found) >= least else []


STEPS: Final[tuple[Step, ...]] = (
    Step(
        "a restored chain remembers whose answers it still waits for",
        ("CREATE TABLE awaited (peer TEXT NOT NULL, since_ms INTEGER NOT NULL, PRIMARY KEY (peer)) WITHOUT ROWID",),
    ),
    Step(
        "statements that members pass on are taken once, also over restarts",
        (
            "CREATE TABLE relayed (author TEXT NOT NULL, id BLOB NOT NULL, time_ms INTEGER NOT NULL, "
            "PRIMARY KEY (author, id)) WITHOUT ROWID",
        ),
    ),
    Step(
        "memberships can end: by the founder, by leaving, or by a lease that ran out",
        (
            "CREATE TABLE statements (hash BLOB NOT NULL, body BLOB NOT NULL, PRIMARY KEY (hash))",
            "CREATE TABLE leases (account BLOB NOT NULL, body BLOB NOT NULL, PRIMARY KEY (account)) WITHOUT ROWID",
        ),
    ),
    Step("output lies in files and results; its table was never filled", ("DROP TABLE outputs",)),
    Step(
        "the entries of the own chain name the tasks that they are about",
        (
            "CREATE TABLE entry_tasks (seq INTEGER NOT NULL, task_id BLOB NOT NULL, attempt INTEGER NOT NULL, "
            "amount_ucr INTEGER NOT NULL, PRIMARY KEY (seq, task_id, attempt)) WITHOUT ROWID",
            "CREATE INDEX entry_tasks_by_task ON entry_tasks(task_id)",
        ),
        _entries_of_tasks,
    ),
)
"""Step n brings schema n + 1 to n + 2. New steps go to the end; those that were released never change."""

SCHEMA_VERSION: Final = 1 + len(STEPS)


def migrate(connection: sqlite3.Connection, path: Path) -> None:
    """Brings the database to SCHEMA_VERSION in one transaction; raises ConfigError for one from a newer clawnet.

    An older one is first copied to NAME.schema-N, where it stays until `forget_copies`. Cut short anywhere, the next
    call finds the old schema whole and begins again.
    """
    found = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if found == SCHEMA_VERSION:
        return
    if found > SCHEMA_VERSION:
        raise ConfigError(
            f"the database {path} was written by a newer clawnet (schema {found}; this one knows {SCHEMA_VERSION})",
            hint="install that version again, or start with another --home",
            path=str(path),
        )
    if found:
        _copy(connection, path.with_name(f"{path.name}.schema-{found}"))
    connection.execute("BEGIN IMMEDIATE")
    try:
        if found:
            for step in STEPS[found - 1 :]:
                for statement in step.statements:
                    connection.execute(statement)
                if step.convert is not None:
                    step.convert(connection)
        else:
            _create(connection)
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        connection.execute("COMMIT")
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


def forget_copies(path: Path) -> None:
    """Deletes the copies that migrations left: the present schema has served a daemon from its start to its end."""
    for copy in path.parent.glob(f"{path.name}.schema-*"):
        with contextlib.suppress(OSError):
            copy.unlink()


def _create(connection: sqlite3.Connection) -> None:
    """The present schema. WITHOUT ROWID is beyond sqlite-utils' own create(), hence the statements.

    sqlite-utils is loaded only here, when there is something to create.
    """
    from sqlite_utils import Database

    database = Database(connection)
    for table in TABLES.values():
        database.execute(create_sql(table))
    for statement in INDEXES:
        database.execute(statement)


def _copy(connection: sqlite3.Connection, target: Path) -> None:
    """The database as it is, log included, in a private file of its own: whole under its name, or not there."""
    draft = target.with_name(target.name + ".new")
    try:
        draft.unlink(missing_ok=True)
        os.close(os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        with contextlib.closing(sqlite3.connect(draft)) as copy:
            connection.backup(copy)
            copy.execute("PRAGMA journal_mode = DELETE")
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)
