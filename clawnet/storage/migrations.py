"""How a database comes to the present schema: one list of steps, forward only, and a copy of the old file beside it."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Final

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
