"""What may be forgotten: tasks 30 days after their final state, results after 7, never what is still needed."""

from __future__ import annotations

from collections.abc import Iterable, Set
from typing import Final

from msgspec import Struct

from clawnet.limits import RESULT_RETENTION_MS, TASK_RETENTION_MS
from clawnet.wire.events import Delete

SWEEP_ROWS_MAX: Final = 256

# A task's rows, and of these the ones that hold its result.
TASK_TABLES: Final = ("tasks", "documents", "transitions", "bids", "results", "outputs", "blob_grants")
RESULT_TABLES: Final = ("results", "outputs", "blob_grants")


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


def deletions(rule: Rule, ids: Iterable[bytes], kept: Set[bytes]) -> list[Delete]:
    """The rows to delete for these ids; `kept` names those that an open line or the outbox still needs."""
    return [Delete(table, (name,)) for name in ids if name not in kept for table in rule.tables]
