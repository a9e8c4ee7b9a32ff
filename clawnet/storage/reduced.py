"""A database in small, for a backup: the ledger, the peers, and what open lines and idempotency keys need."""

# ruff: noqa: S608 -- every word of these statements stands in this room; values are always parameters.

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from clawnet.errors import ConfigError, NotFoundError
from clawnet.storage.migrations import SCHEMA_VERSION, migrate
from clawnet.storage.schema import INDEXES, JOB_OPEN_SQL, TABLES, TASK_OPEN_SQL, create_sql
from clawnet.storage.store import translate

_OPEN_TASKS: Final = f"SELECT task_id FROM old.tasks WHERE {TASK_OPEN_SQL} UNION SELECT task_id FROM old.unsettled"
_OPEN_JOBS: Final = f"SELECT job FROM old.jobs WHERE {JOB_OPEN_SQL}"

_KEPT: Final[dict[str, str]] = {
    "meta": "key = 'checkpoint' OR key LIKE 'spent:%'",
    **dict.fromkeys(("entries", "segments", "accounts", "balances", "proofs", "peers", "reputation", "durations"), "1"),
    "tasks": f"task_id IN ({_OPEN_TASKS}) OR idempotency_key <> ''",
    "unsettled": "1",
    "documents": f"task_id IN ({_OPEN_TASKS}) OR task_id IN ({_OPEN_JOBS})",
    "transitions": f"task_id IN ({_OPEN_TASKS})",
    "bids": f"task_id IN ({_OPEN_TASKS})",
    "results": f"task_id IN ({_OPEN_TASKS})",
    "jobs": JOB_OPEN_SQL,
    **dict.fromkeys(("outbox", "statements", "leases"), "1"),
}
"""Which rows of which tables; blobs, output previews and unredeemed invites stay behind."""


class Reduced(NamedTuple):
    """A reduced database as the bytes of its file; how many entries it holds, the head of one account, its peers."""

    image: bytes
    entries: int
    seq: int
    peers: list[tuple[str, bytes]]


def reduce(database: Path, account: bytes, settle: Callable[[bytes], tuple[str, bytes] | None]) -> Reduced:
    """Copies the rows worth keeping, as of one moment, also while a daemon writes.

    It is made in memory: no part of it is ever on a disk, where a process that is killed would leave it in plain.

    `settle` is shown the body of every open task; for one that must not go on from a backup it returns the state and
    body to keep instead. Raises NotFoundError without a database, ConfigError for one of another schema.
    """
    if not database.exists():
        raise NotFoundError(f"there is no database {database}", hint="start the node once: `clawnet daemon start`")
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None, uri=True)) as connection:
        try:
            connection.execute("PRAGMA temp_store = MEMORY")
            connection.execute("ATTACH ? AS old", (f"{database.absolute().as_uri()}?mode=ro",))
            connection.execute("BEGIN")
            found = int(connection.execute("PRAGMA old.user_version").fetchone()[0])
            if found != SCHEMA_VERSION:
                raise ConfigError(
                    f"the database {database} has schema {found}, and this clawnet writes {SCHEMA_VERSION}",
                    hint="`clawnet daemon restart` brings it to this version",
                )
            for table in TABLES.values():
                connection.execute(create_sql(table))
                kept = _KEPT.get(table.name)
                if kept is not None:
                    connection.execute(f"INSERT INTO main.{table.name} SELECT * FROM old.{table.name} WHERE {kept}")
            for statement in INDEXES:
                connection.execute(statement)
            rows = connection.execute(f"SELECT task_id, body FROM tasks WHERE {TASK_OPEN_SQL}").fetchall()
            for task_id, body in rows:
                settled = settle(body)
                if settled is not None:
                    connection.execute("UPDATE tasks SET state = ?, body = ? WHERE task_id = ?", (*settled, task_id))
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            entries = int(connection.execute("SELECT count(*) FROM entries").fetchone()[0])
            seq = connection.execute("SELECT max(seq) FROM entries WHERE account = ?", (account,)).fetchone()[0]
            peers = connection.execute("SELECT peer, body FROM peers ORDER BY peer").fetchall()
            connection.execute("COMMIT")
            image = connection.serialize()
        except sqlite3.Error as error:
            raise translate(error, database) from error
    return Reduced(image, entries, -1 if seq is None else int(seq), peers)


def revive(path: Path, reason: str) -> None:
    """Makes a reduced database one to start from: at the present schema, its chain read-only for `reason`.

    Raises ClawnetError when the file is no database, or one from a newer clawnet.
    """
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        try:
            migrate(connection, path)
            connection.execute("INSERT OR REPLACE INTO meta VALUES ('restore', ?)", (reason.encode(),))
        except sqlite3.Error as error:
            raise translate(error, path) from error
        finally:
            for copy in path.parent.glob(f"{path.name}.schema-*"):
                copy.unlink()
