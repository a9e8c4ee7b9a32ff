"""Named reads: what Load and the views may ask of the database, as SQL; memory.py answers the same names in Python."""

# ruff: noqa: S608 -- every word of these statements stands in this room; values are always parameters.

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from msgspec import Struct

from clawnet.errors import DataError
from clawnet.limits import KIB
from clawnet.storage.schema import JOB_FINAL, JOB_OPEN_SQL, TABLES, TASK_FINAL, TASK_OPEN_SQL

Row = tuple[Any, ...]

SEQ_MAX: Final = 2**63 - 1


class Query(Struct, frozen=True):
    """One read. `args` names its arguments; `quick` ones touch few rows and may run in the loop thread.

    `prepare` turns the arguments into the statement's parameters. With `bytes_column` the last argument is no
    parameter but a bound: rows end once the lengths of that column add up to it (at least one row is returned).
    """

    sql: str
    args: tuple[str, ...]
    quick: bool = True
    prepare: Callable[[Row], Row] | None = None
    bytes_column: int = -1


def _columns(table: str) -> str:
    return ", ".join(TABLES[table].names)


def _words(values: tuple[str, ...]) -> str:
    return "(" + ", ".join(f"'{value}'" for value in values) + ")"


def prefix_bounds(text: str) -> tuple[bytes, bytes]:
    """The lowest and highest 16-byte id that begin with these hex digits; raises DataError when they are no hex."""
    digits = text.strip().lower()
    if not 1 <= len(digits) <= 32 or any(digit not in "0123456789abcdef" for digit in digits):
        raise DataError(f"{text!r} is no task id", hint="give the hexadecimal id of a task or the beginning of it")
    return bytes.fromhex(digits.ljust(32, "0")), bytes.fromhex(digits.ljust(32, "f"))


def page_start(created_ms: int | None, key: bytes | None) -> tuple[int, bytes]:
    """A page cursor as the statement wants it: None means from the newest on."""
    return (SEQ_MAX, b"\xff" * 32) if created_ms is None else (created_ms, key or b"")


QUICK_BYTES_MAX: Final = 256 * KIB


def is_quick(name: str, args: Row) -> bool:
    """Whether a read may run in the loop's thread: it touches few rows and not too many bytes."""
    query = QUERIES.get(name)
    return query is None or (query.quick and (query.bytes_column < 0 or int(args[-1]) <= QUICK_BYTES_MAX))


def _page(args: Row) -> Row:
    state, created_ms, key, limit = args
    return (state, state, *page_start(created_ms, key), limit)


def _before(args: Row) -> Row:
    account, before_seq, limit = args
    return (account, SEQ_MAX if before_seq is None else before_seq, limit)


_TASKS: Final = _columns("tasks")
_JOBS: Final = _columns("jobs")
_ENTRIES: Final = _columns("entries")

QUERIES: Final[dict[str, Query]] = {
    # tasks as their requester keeps them
    "tasks_open": Query(
        f"SELECT {_TASKS} FROM tasks INDEXED BY tasks_open WHERE {TASK_OPEN_SQL} ORDER BY created_ms, task_id",
        (),
        quick=False,
    ),
    "tasks_page": Query(
        f"SELECT {_TASKS} FROM tasks WHERE (? = '' OR state = ?) AND (created_ms, task_id) < (?, ?) "
        "ORDER BY created_ms DESC, task_id DESC LIMIT ?",
        ("state", "before_created_ms", "before_task_id", "limit"),
        quick=False,
        prepare=_page,
    ),
    "task": Query(f"SELECT {_TASKS} FROM tasks WHERE task_id = ?", ("task_id",)),
    "task_by_prefix": Query(
        f"SELECT {_TASKS} FROM tasks WHERE task_id BETWEEN ? AND ? ORDER BY task_id LIMIT ?",
        ("hex_prefix", "limit"),
        prepare=lambda args: (*prefix_bounds(args[0]), args[1]),
    ),
    "task_by_key": Query(
        f"SELECT {_TASKS} FROM tasks WHERE idempotency_key = ? AND idempotency_key <> '' "
        "ORDER BY created_ms DESC, task_id DESC",
        ("idempotency_key",),
    ),
    "task_states": Query("SELECT state, count(*) FROM tasks GROUP BY state ORDER BY state", (), quick=False),
    "document": Query("SELECT task_id, body FROM documents WHERE task_id = ?", ("task_id",)),
    "transitions": Query(
        f"SELECT {_columns('transitions')} FROM transitions WHERE task_id = ? ORDER BY n", ("task_id",)
    ),
    "bids": Query(f"SELECT {_columns('bids')} FROM bids WHERE task_id = ? ORDER BY round, peer", ("task_id",)),
    "results": Query(f"SELECT {_columns('results')} FROM results WHERE task_id = ? ORDER BY attempt", ("task_id",)),
    "result": Query(
        f"SELECT {_columns('results')} FROM results WHERE task_id = ? AND attempt = ?", ("task_id", "attempt")
    ),
    # jobs: tasks run for somebody
    "jobs_open": Query(
        f"SELECT {_JOBS} FROM jobs INDEXED BY jobs_open WHERE {JOB_OPEN_SQL} ORDER BY job", (), quick=False
    ),
    "jobs_page": Query(
        f"SELECT {_JOBS} FROM jobs WHERE (? = '' OR state = ?) AND (updated_ms, job) < (?, ?) "
        "ORDER BY updated_ms DESC, job DESC LIMIT ?",
        ("state", "before_updated_ms", "before_job", "limit"),
        quick=False,
        prepare=_page,
    ),
    "job": Query(f"SELECT {_JOBS} FROM jobs WHERE job = ?", ("job",)),
    # chains
    "entry": Query(f"SELECT {_ENTRIES} FROM entries WHERE account = ? AND seq = ?", ("account", "seq")),
    "entries_range": Query(
        f"SELECT {_ENTRIES} FROM entries WHERE account = ? AND seq BETWEEN ? AND ? ORDER BY seq",
        ("account", "from_seq", "to_seq", "bytes_max"),
        bytes_column=3,
    ),
    "entries_page": Query(
        f"SELECT {_ENTRIES} FROM entries WHERE account = ? AND seq < ? ORDER BY seq DESC LIMIT ?",
        ("account", "before_seq", "limit"),
        prepare=_before,
    ),
    "balances_page": Query(
        "SELECT seq, available_ucr FROM balances WHERE seq < ? ORDER BY seq DESC LIMIT ?",
        ("before_seq", "limit"),
        prepare=lambda args: (SEQ_MAX if args[0] is None else args[0], args[1]),
    ),
    "entry_tasks": Query(
        f"SELECT {_columns('entry_tasks')} FROM entry_tasks WHERE seq BETWEEN ? AND ? "
        "ORDER BY seq DESC, task_id, attempt LIMIT ?",
        ("from_seq", "to_seq", "limit"),
        quick=False,
    ),
    # An entry of the own chain with the task, attempt and amount it is about, and the balances after and before it.
    "entries_of_task": Query(
        "SELECT e.account, e.seq, e.hash, e.raw, t.task_id, t.attempt, t.amount_ucr, "
        "coalesce(b.available_ucr, 0), coalesce(p.available_ucr, 0) "
        "FROM entry_tasks t JOIN entries e ON e.account = ? AND e.seq = t.seq "
        "LEFT JOIN balances b ON b.seq = t.seq LEFT JOIN balances p ON p.seq = t.seq - 1 "
        "WHERE t.task_id BETWEEN ? AND ? ORDER BY t.task_id, t.seq DESC, t.attempt LIMIT ?",
        ("account", "hex_prefix", "limit"),
        prepare=lambda args: (args[0], *prefix_bounds(args[1]), args[2]),
    ),
    "entry_heads": Query("SELECT account, max(seq) FROM entries GROUP BY account ORDER BY account", (), quick=False),
    "segments": Query(
        f"SELECT {_columns('segments')} FROM segments WHERE account = ? ORDER BY seq, hash", ("account",)
    ),
    "proof": Query("SELECT account, proof FROM proofs WHERE account = ?", ("account",)),
    # what the retention sweep may look at: ids of rows final for long enough that nobody waits for
    "tasks_expired": Query(
        f"SELECT task_id FROM tasks WHERE created_ms < ? AND updated_ms < ? AND state IN {_words(TASK_FINAL)} "
        "AND task_id NOT IN (SELECT task_id FROM unsettled) ORDER BY created_ms, task_id LIMIT ?",
        ("before_ms", "limit"),
        quick=False,
        prepare=lambda args: (args[0], args[0], args[1]),
    ),
    "results_expired": Query(
        # From what results left to their tasks: there are many more tasks than results of them.
        "SELECT task_id FROM (SELECT task_id FROM results UNION SELECT task_id FROM blob_grants) CROSS JOIN tasks "
        f"USING (task_id) WHERE created_ms < ? AND updated_ms < ? AND state IN {_words(TASK_FINAL)} "
        "AND task_id NOT IN (SELECT task_id FROM unsettled) ORDER BY created_ms, task_id LIMIT ?",
        ("before_ms", "limit"),
        quick=False,
        prepare=lambda args: (args[0], args[0], args[1]),
    ),
    "jobs_expired": Query(
        f"SELECT job FROM jobs WHERE updated_ms < ? AND state IN {_words(JOB_FINAL)} "
        "AND job NOT IN (SELECT about FROM outbox) ORDER BY job LIMIT ?",
        ("before_ms", "limit"),
        quick=False,
    ),
}
