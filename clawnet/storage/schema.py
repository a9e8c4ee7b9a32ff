"""The tables: columns (key columns first), indexes, the statements made from them. A change is a step in migrations."""

# ruff: noqa: S608 -- every word of these statements stands in this room; values are always parameters.

from __future__ import annotations

from typing import Final

from msgspec import Struct

# Words of the states in which a row can no longer change; market/records.py is the source, a test compares the two.
TASK_FINAL: Final = ("settled", "refunded", "no_bids", "cancelled", "failed", "timed_out")
JOB_FINAL: Final = ("done", "rejected", "waived", "forfeited")


class Table(Struct, frozen=True):
    """One table. `columns` are "name TYPE" words; the first `keys` of them are the primary key.

    `once` names columns that keep their first value when a row is written again: an index over them is then never
    touched by an update. `wide` rows hold bodies of kilobytes and more; the others are clustered by their key.
    A row with a `forever` column may be written again with the same value there; any other value is our own mistake
    and raises: a second entry for one (account, seq) would convict this node of equivocation.
    """

    name: str
    keys: int
    columns: tuple[str, ...]
    once: tuple[str, ...] = ()
    forever: str = ""
    wide: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The bare column names."""
        return tuple(column.split()[0] for column in self.columns)


TABLES: Final[dict[str, Table]] = {
    table.name: table
    for table in (
        Table("meta", 1, ("key TEXT", "value BLOB")),
        Table("entries", 2, ("account BLOB", "seq INTEGER", "hash BLOB", "raw BLOB"), forever="hash"),
        Table("segments", 3, ("account BLOB", "seq INTEGER", "hash BLOB", "raw BLOB")),
        Table("accounts", 1, ("account BLOB", "snapshot BLOB"), wide=True),
        Table("balances", 1, ("seq INTEGER", "available_ucr INTEGER")),
        # Which tasks the entries of the own chain are about: kept as long as these, which name them by a hash alone.
        Table("entry_tasks", 3, ("seq INTEGER", "task_id BLOB", "attempt INTEGER", "amount_ucr INTEGER")),
        Table("proofs", 1, ("account BLOB", "proof BLOB"), wide=True),
        Table(
            "tasks",
            1,
            (
                "task_id BLOB",
                "state TEXT",
                "created_ms INTEGER",
                "updated_ms INTEGER",
                "idempotency_key TEXT",
                "body BLOB",
            ),
            once=("created_ms", "idempotency_key"),
            wide=True,
        ),
        Table("unsettled", 1, ("task_id BLOB",)),
        # Tasks in a final state of which an attempt still has an open line or an answer owed.
        Table("documents", 1, ("task_id BLOB", "body BLOB"), wide=True),
        Table("transitions", 2, ("task_id BLOB", "n INTEGER", "at_ms INTEGER", "state TEXT", "reason TEXT")),
        Table("bids", 3, ("task_id BLOB", "round INTEGER", "peer TEXT", "body BLOB")),
        Table("results", 2, ("task_id BLOB", "attempt INTEGER", "body BLOB"), wide=True),
        Table("jobs", 1, ("job BLOB", "state TEXT", "updated_ms INTEGER", "body BLOB"), wide=True),
        Table(
            "outbox",
            1,
            ("obligation BLOB", "peer TEXT", "created_ms INTEGER", "about BLOB", "kind INTEGER", "payload BLOB"),
            wide=True,
        ),
        # The replay window of statements that members pass on (wire/replay.py).
        Table("relayed", 2, ("author TEXT", "id BLOB", "time_ms INTEGER")),
        Table("peers", 1, ("peer TEXT", "body BLOB"), wide=True),
        Table("awaited", 1, ("peer TEXT", "since_ms INTEGER")),
        # Peers that a read-only chain still waits for (LEDGER.md section 9).
        Table("reputation", 1, ("peer TEXT", "body BLOB")),
        Table("durations", 1, ("key TEXT", "body BLOB")),
        Table("invites", 1, ("invite BLOB", "body BLOB")),
        # What ended memberships, and the newest mesh key as sealed to the members (mesh/ends.py).
        Table("statements", 1, ("hash BLOB", "body BLOB"), wide=True),
        Table("leases", 1, ("account BLOB", "body BLOB")),
        Table("blob_grants", 3, ("task_id BLOB", "peer TEXT", "blob BLOB")),
    )
}


def _words(values: tuple[str, ...]) -> str:
    return "(" + ", ".join(f"'{value}'" for value in values) + ")"


# A partial index is used only by a query with the very same condition.
TASK_OPEN_SQL: Final = f"state NOT IN {_words(TASK_FINAL)}"
JOB_OPEN_SQL: Final = f"state NOT IN {_words(JOB_FINAL)}"

INDEXES: Final = (
    "CREATE INDEX tasks_created ON tasks(created_ms, task_id)",
    f"CREATE INDEX tasks_open ON tasks(created_ms, task_id) WHERE {TASK_OPEN_SQL}",
    "CREATE INDEX tasks_by_key ON tasks(idempotency_key) WHERE idempotency_key <> ''",
    "CREATE INDEX entry_tasks_by_task ON entry_tasks(task_id)",
    f"CREATE INDEX jobs_open ON jobs(job) WHERE {JOB_OPEN_SQL}",
)


def create_sql(table: Table) -> str:
    """The CREATE TABLE statement of a table."""
    columns = ", ".join(f"{column} NOT NULL" for column in table.columns)
    key = ", ".join(table.names[: table.keys])
    return f"CREATE TABLE {table.name} ({columns}, PRIMARY KEY ({key}))" + ("" if table.wide else " WITHOUT ROWID")


def put_sql(table: Table) -> str:
    """Insert a row, or update the row with its key in place."""
    names = table.names
    changing = [f"{name} = excluded.{name}" for name in names[table.keys :] if name not in table.once]
    if table.forever:
        # NULL breaks the NOT NULL constraint and thereby the transaction.
        same = f"{table.forever} = excluded.{table.forever}"
        changing = [f"{table.forever} = CASE WHEN {table.name}.{same} THEN excluded.{table.forever} END"]
    action = "UPDATE SET " + ", ".join(changing) if changing else "NOTHING"
    return (
        f"INSERT INTO {table.name} ({', '.join(names)}) VALUES ({', '.join('?' * len(names))}) "
        f"ON CONFLICT ({', '.join(names[: table.keys])}) DO {action}"
    )


def delete_sql(table: Table, keys: int) -> str:
    """Delete the rows whose first `keys` key columns have these values."""
    return f"DELETE FROM {table.name} WHERE " + " AND ".join(f"{name} = ?" for name in table.names[:keys])


def load_sql(table: Table) -> str:
    """All rows of a table in the order of their keys."""
    names = table.names
    return f"SELECT {', '.join(names)} FROM {table.name} ORDER BY {', '.join(names[: table.keys])}"
