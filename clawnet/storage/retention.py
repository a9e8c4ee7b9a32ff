"""What may be forgotten: tasks 30 days after their final state, results after 7, never what is still needed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from typing import Final, Protocol

from msgspec import Struct

from clawnet.limits import RESULT_RETENTION_MS, TASK_RETENTION_MS
from clawnet.storage.queries import Row
from clawnet.wire.events import Delete, Put

SWEEP_ROWS_MAX: Final = 256

# A task's rows, and of these the ones that hold its result.
TASK_TABLES: Final = ("tasks", "documents", "transitions", "bids", "results", "blob_grants")
RESULT_TABLES: Final = ("results", "blob_grants")


class Rule(Struct, frozen=True):
    """Rows found by `query` are forgotten from all `tables` once they have been final for `after_ms`."""

    query: str
    tables: tuple[str, ...]
    after_ms: int


RULES: Final = (
    Rule("tasks_expired", TASK_TABLES, TASK_RETENTION_MS),
    Rule("results_expired", RESULT_TABLES, RESULT_RETENTION_MS),
    Rule("jobs_expired", ("jobs", "documents"), RESULT_RETENTION_MS),
)


class SweepStore(Protocol):
    """What the sweep needs of a store."""

    def query(self, name: str, args: Row) -> list[Row]: ...
    def commit(self, rows: Sequence[Put | Delete], durable: bool = False) -> None: ...


def sweep(store: SweepStore, now_ms: int, kept: Set[bytes]) -> list[bytes]:
    """Forgets what is past its time, at most SWEEP_ROWS_MAX rows of a kind; the tasks whose blobs may go.

    The few rows more than the ids kept are asked for, so that old rows that must stay cannot hide younger ones.
    """
    gone: list[bytes] = []
    for rule in RULES:
        found = [row[0] for row in store.query(rule.query, (now_ms - rule.after_ms, SWEEP_ROWS_MAX + len(kept)))]
        ids = [name for name in found if name not in kept]
        store.commit(deletions(rule, ids, kept))
        if "blob_grants" in rule.tables:
            gone += ids
    return gone


def deletions(rule: Rule, ids: Iterable[bytes], kept: Set[bytes]) -> list[Delete]:
    """The rows to delete for these ids; `kept` names those that an open line or the outbox still needs."""
    return [Delete(table, (name,)) for name in ids if name not in kept for table in rule.tables]
