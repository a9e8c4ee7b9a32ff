"""The store's twin in memory: same calls, same answers, and a disk that tests can fill, break or cut the power of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

from clawnet.errors import ClawnetError, InternalError, NotFoundError, StorageError, StorageFullError
from clawnet.storage.queries import QUERIES, Row, page_start, prefix_bounds
from clawnet.storage.schema import JOB_FINAL, TABLES, TASK_FINAL
from clawnet.storage.store import Done, fold
from clawnet.wire.events import Delete, Put

_FOREVER: Final = {name: table.names.index(table.forever) for name, table in TABLES.items() if table.forever}
_ONCE: Final = {
    name: tuple(table.names.index(column) for column in table.once) for name, table in TABLES.items() if table.once
}
_KEYS: Final = {name: table.keys for name, table in TABLES.items()}


class Table(dict[Row, Row]):
    """The rows of one table by key. Those that share the first column of a key are found without a walk over all."""

    __slots__ = ("_shared",)

    def __init__(self, rows: Mapping[Row, Row] | None = None) -> None:
        super().__init__(rows or {})
        self._shared: dict[object, dict[Row, None]] | None = None

    def put(self, key: Row, row: Row) -> None:
        """A row, new or in place of the old one."""
        if self._shared is not None and key not in self:
            self._shared.setdefault(key[0], {})[key] = None
        self[key] = row

    def drop(self, key: Row) -> None:
        """Takes a row out, if it is there."""
        if self.pop(key, None) is not None and self._shared is not None:
            shared = self._shared[key[0]]
            del shared[key]
            if not shared:
                del self._shared[key[0]]

    def beginning(self, start: Row) -> list[Row]:
        """The keys that begin with `start`, in order."""
        if not start:
            return sorted(self)
        if self._shared is None:
            self._shared = {}
            for key in self:
                self._shared.setdefault(key[0], {})[key] = None
        found = self._shared.get(start[0], {})
        count = len(start)
        return sorted(found if count == 1 else [key for key in found if key[:count] == start])


Tables = dict[str, Table]


class MemoryStore:
    """Tables as dicts. `bytes_max` makes it a small disk; `fail_next` makes the next commit fail with that error."""

    def __init__(self, bytes_max: int | None = None) -> None:
        self.tables: Tables = {name: Table() for name in TABLES}
        self.bytes_max = bytes_max
        self.fail_next: StorageError | None = None
        self.commits_total = 0
        self.durable_total = 0
        # The rows as they were at the last durable commit, for those written since.
        self._undo: dict[tuple[str, Row], Row | None] = {}

    def commit(self, rows: Sequence[Put | Delete], durable: bool = False) -> None:
        """One transaction: all of these rows or, when it raises, none."""
        if not rows:
            return
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error
        changes: dict[tuple[str, Row], Row | None] = {}
        for table, pending in fold(rows).items():
            self._changes(table, pending.deletes, pending.puts, changes)
        if self.bytes_max is not None:
            grown = sum(_bytes(row) for row in changes.values()) - sum(
                _bytes(self.tables[table].get(key)) for table, key in changes
            )
            if grown > 0 and self.size() + grown > self.bytes_max:
                raise StorageFullError("cannot write to the database: the simulated disk is full")
        for (table, key), row in changes.items():
            held = self.tables[table]
            if not durable:
                self._undo.setdefault((table, key), held.get(key))
            if row is None:
                held.drop(key)
            else:
                held.put(key, row)
        self.commits_total += 1
        self.durable_total += durable
        if durable:
            self._undo.clear()

    def _changes(
        self, table: str, deletes: dict[Row, None], puts: dict[Row, Row], changes: dict[tuple[str, Row], Row | None]
    ) -> None:
        held = self.tables[table]
        for start in deletes:
            if len(start) == _KEYS[table]:
                changes[table, start] = None
            else:
                changes.update({(table, key): None for key in held.beginning(start)})
        forever = _FOREVER.get(table)
        once = _ONCE.get(table, ())
        width = len(TABLES[table].columns)
        for key, row in puts.items():
            if len(row) != width or None in row:
                raise InternalError(f"a row of {table} has {len(row)} values, or an empty one; {width} are needed")
            if forever is None and not once:
                changes[table, key] = row
                continue
            old = held.get(key) if (table, key) not in changes else None
            if old is not None and forever is not None and old[forever] != row[forever]:
                raise InternalError(f"a row contradicts one already in the database: {table}")
            if old is not None and once:
                row = tuple(old[i] if i in once else value for i, value in enumerate(row))
            changes[table, key] = row

    def load_all(self, table: str) -> Iterator[Row]:
        """All rows of a table in key order."""
        held = self.tables[table]
        return iter([held[key] for key in sorted(held)])

    def query(self, name: str, args: Row = ()) -> list[Row]:
        """The rows of a named query."""
        query = QUERIES.get(name)
        if query is None:
            raise NotFoundError(f"there is no query {name!r}")
        assert len(args) == len(query.args), f"query {name} takes {query.args}"
        return _ANSWERS[name](self.tables, *args)

    def query_later(self, name: str, args: Row, done: Done) -> None:
        """Answers at once: there is no thread here."""
        try:
            rows = self.query(name, args)
        except ClawnetError as err:
            done(err)
        else:
            done(rows)

    def size(self) -> int:
        """Bytes of all values held."""
        return sum(_bytes(row) for held in self.tables.values() for row in held.values())

    def close(self) -> None:
        """Nothing to let go; the rows stay, so that a test can open a new node on the same disk."""

    def twin(self) -> MemoryStore:
        """A store of its own with the same rows."""
        copy = MemoryStore(self.bytes_max)
        copy.tables = {name: Table(rows) for name, rows in self.tables.items()}
        return copy

    def cut_power(self) -> None:
        """The worst a power loss may do: everything since the last durable commit is gone."""
        for (table, key), row in self._undo.items():
            if row is None:
                self.tables[table].drop(key)
            else:
                self.tables[table].put(key, row)
        self._undo.clear()


def _bytes(row: Row | None) -> int:
    if row is None:
        return 0
    return sum(len(value) if isinstance(value, bytes | str) else 8 for value in row)


def _of(tables: Tables, table: str, *start: object) -> list[Row]:
    """The rows whose key begins with `start`, in key order."""
    held = tables[table]
    if len(start) == _KEYS[table]:
        return [held[start]] if start in held else []
    return [held[key] for key in held.beginning(start)]


def _capped(rows: list[Row], column: int, bytes_max: int) -> list[Row]:
    for index, row in enumerate(rows):
        bytes_max -= len(row[column])
        if index and bytes_max < 0:
            return rows[:index]
    return rows


def _page(
    tables: Tables, table: str, column: int, state: str, before_ms: int | None, before_key: bytes | None, limit: int
) -> list[Row]:
    start = page_start(before_ms, before_key)
    rows = [row for row in tables[table].values() if (not state or row[1] == state) and (row[column], row[0]) < start]
    return sorted(rows, key=lambda row: (row[column], row[0]), reverse=True)[:limit]


def _by_prefix(tables: Tables, prefix: str, limit: int) -> list[Row]:
    low, high = prefix_bounds(prefix)
    return [row for row in _of(tables, "tasks") if low <= row[0] <= high][:limit]


def _by_key(tables: Tables, key: str) -> list[Row]:
    rows = [row for row in tables["tasks"].values() if key and row[4] == key]
    return sorted(rows, key=lambda row: (row[2], row[0]), reverse=True)


def _task_states(tables: Tables) -> list[Row]:
    counts: dict[str, int] = {}
    for row in tables["tasks"].values():
        counts[row[1]] = counts.get(row[1], 0) + 1
    return sorted(counts.items())


def _balances_page(tables: Tables, before: int | None, limit: int) -> list[Row]:
    return [row for row in reversed(_of(tables, "balances")) if before is None or row[0] < before][:limit]


def _entries_of_task(tables: Tables, account: bytes, prefix: str, limit: int) -> list[Row]:
    low, high = prefix_bounds(prefix)
    about = [row for row in tables["entry_tasks"].values() if low <= row[1] <= high]
    balances = tables["balances"]
    return [
        (*entry, *row[1:], *(balances[(seq,)][1] if (seq,) in balances else 0 for seq in (row[0], row[0] - 1)))
        for row in sorted(about, key=lambda row: (row[1], -row[0], row[2]))
        for entry in _of(tables, "entries", account, row[0])
    ][:limit]


def _jobs_expired(tables: Tables, before_ms: int, limit: int) -> list[Row]:
    owed = {row[3] for row in tables["outbox"].values()}
    rows = [row for row in _of(tables, "jobs") if row[1] in JOB_FINAL and row[2] < before_ms and row[0] not in owed]
    return [(row[0],) for row in rows[:limit]]


def _heads(tables: Tables) -> list[Row]:
    heads: dict[bytes, int] = {}
    for account, seq in tables["entries"]:
        heads[account] = max(seq, heads.get(account, 0))
    return sorted(heads.items())


def _expired(tables: Tables, before_ms: int, limit: int, *, with_results: bool) -> list[Row]:
    holding = {key[0] for table in ("results", "blob_grants") for key in tables[table]}
    rows = [
        row
        for key, row in tables["tasks"].items()
        if key not in tables["unsettled"]
        and row[1] in TASK_FINAL
        and max(row[2], row[3]) < before_ms
        and (not with_results or row[0] in holding)
    ]
    return [(row[0],) for row in sorted(rows, key=lambda row: (row[2], row[0]))[:limit]]


_ANSWERS: Final[dict[str, Callable[..., list[Row]]]] = {
    "tasks_open": lambda t: sorted(
        (row for row in t["tasks"].values() if row[1] not in TASK_FINAL), key=lambda row: (row[2], row[0])
    ),
    "tasks_page": lambda t, *args: _page(t, "tasks", 2, *args),
    "task": lambda t, task_id: _of(t, "tasks", task_id),
    "task_by_prefix": _by_prefix,
    "task_by_key": _by_key,
    "balances_page": _balances_page,
    "task_states": _task_states,
    "document": lambda t, task_id: _of(t, "documents", task_id),
    "transitions": lambda t, task_id: _of(t, "transitions", task_id),
    "bids": lambda t, task_id: _of(t, "bids", task_id),
    "results": lambda t, task_id: _of(t, "results", task_id),
    "result": lambda t, task_id, attempt: _of(t, "results", task_id, attempt),
    "jobs_open": lambda t: [row for row in _of(t, "jobs") if row[1] not in JOB_FINAL],
    "jobs_page": lambda t, *args: _page(t, "jobs", 2, *args),
    "job": lambda t, job: _of(t, "jobs", job),
    "entry": lambda t, account, seq: _of(t, "entries", account, seq),
    "entries_range": lambda t, account, low, high, bytes_max: _capped(
        [row for row in _of(t, "entries", account) if low <= row[1] <= high], 3, bytes_max
    ),
    "entries_page": lambda t, account, before, limit: [
        row for row in reversed(_of(t, "entries", account)) if before is None or row[1] < before
    ][:limit],
    "entry_tasks": lambda t, low, high, limit: sorted(
        (row for row in t["entry_tasks"].values() if low <= row[0] <= high), key=lambda row: (-row[0], *row[1:3])
    )[:limit],
    "entries_of_task": _entries_of_task,
    "entry_heads": _heads,
    "segments": lambda t, account: _of(t, "segments", account),
    "proof": lambda t, account: _of(t, "proofs", account),
    "tasks_expired": lambda t, before_ms, limit: _expired(t, before_ms, limit, with_results=False),
    "results_expired": lambda t, before_ms, limit: _expired(t, before_ms, limit, with_results=True),
    "jobs_expired": _jobs_expired,
}
