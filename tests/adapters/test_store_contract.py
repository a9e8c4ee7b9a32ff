"""What every store promises, run on the SQLite file and on its twin in memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from clawnet.errors import DataError, InternalError, NotFoundError
from clawnet.market import records
from clawnet.storage import schema
from clawnet.storage.memory import _ANSWERS, MemoryStore
from clawnet.storage.queries import QUERIES, Row
from clawnet.storage.retention import RULES, deletions
from clawnet.storage.store import Store
from clawnet.wire.events import Delete, Put

AnyStore = Store | MemoryStore


@pytest.fixture(params=["sqlite", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[AnyStore]:
    opened: AnyStore = Store.open(tmp_path / "clawnet.db") if request.param == "sqlite" else MemoryStore()
    yield opened
    opened.close()


def task(n: int, state: str = "executing", created_ms: int = 0, key: str = "", updated_ms: int = 0) -> Put:
    return Put("tasks", (bytes([n]) * 16, state, created_ms or 1_000 + n, updated_ms or 2_000 + n, key, b"body%d" % n))


def entry(seq: int, raw: bytes = b"raw", account: bytes = b"A" * 32, hash_: bytes = b"h") -> Put:
    return Put("entries", (account, seq, hash_, raw))


def ids(rows: list[Row]) -> list[int]:
    return [row[0][0] for row in rows]


def test_a_row_written_is_read_back_and_written_again_is_replaced(store: AnyStore) -> None:
    store.commit([Put("meta", ("a", b"1")), Put("meta", ("b", b"2"))])
    store.commit([Put("meta", ("a", b"3"))])
    assert list(store.load_all("meta")) == [("a", b"3"), ("b", b"2")]


def test_the_last_word_of_a_turn_on_a_key_stands(store: AnyStore) -> None:
    store.commit([Put("meta", ("a", b"1")), Put("meta", ("b", b"1")), Delete("meta", ("b",)), Put("meta", ("a", b"2"))])
    store.commit([Delete("meta", ("a",)), Put("meta", ("a", b"3")), Put("meta", ("c", b"1"))])
    assert list(store.load_all("meta")) == [("a", b"3"), ("c", b"1")]


def test_a_short_key_deletes_all_rows_that_begin_with_it(store: AnyStore) -> None:
    bids = [Put("bids", (b"t" * 16, n, f"peer{n}", b"")) for n in range(3)]
    store.commit([*bids, Put("bids", (b"u" * 16, 0, "peer0", b""))])
    store.commit([Put("bids", (b"t" * 16, 9, "late", b"")), Delete("bids", (b"t" * 16,)), Put("meta", ("x", b""))])
    assert [row[0] for row in store.load_all("bids")] == [b"u" * 16]


def test_all_tables_come_back_in_key_order(store: AnyStore) -> None:
    kinds = {"TEXT": "k", "BLOB": b"k", "INTEGER": 1}
    for table in schema.TABLES.values():
        low = tuple(kinds[column.split()[1]] for column in table.columns)
        high = tuple(value * 2 for value in low)  # type: ignore[operator]
        store.commit([Put(table.name, high), Put(table.name, low)])
        assert list(store.load_all(table.name)) == [low, high]


def test_a_second_entry_for_one_seq_breaks_the_transaction(store: AnyStore) -> None:
    store.commit([entry(1, hash_=b"first")])
    store.commit([entry(1, hash_=b"first")])
    with pytest.raises(InternalError):
        store.commit([entry(2), entry(1, hash_=b"other")])
    with pytest.raises(InternalError):
        store.commit([entry(1, hash_=b"other")])
    assert [row[1:3] for row in store.load_all("entries")] == [(1, b"first")]
    store.commit([Delete("entries", (b"A" * 32, 1)), entry(1, hash_=b"other"), entry(2)])
    assert [row[2] for row in store.load_all("entries")] == [b"other", b"h"]


def test_a_row_of_the_wrong_width_breaks_the_transaction(store: AnyStore) -> None:
    store.commit([Put("meta", ("a", b"1"))])
    for wrong in (("c", None), ("c",), ("c", b"1", b"2")):
        with pytest.raises(InternalError):
            store.commit([Put("meta", ("b", b"1")), Put("meta", wrong)])
        with pytest.raises(InternalError):
            store.commit([Put("meta", wrong)])
    assert list(store.load_all("meta")) == [("a", b"1")]


def test_an_empty_turn_is_no_transaction(store: AnyStore) -> None:
    before = store.commits_total
    store.commit([], durable=True)
    assert store.commits_total == before


def test_birth_columns_keep_their_first_value(store: AnyStore) -> None:
    store.commit([task(1, "draft", created_ms=5, key="k")])
    store.commit([Put("tasks", (b"\x01" * 16, "settled", 99, 7, "other", b"new"))])
    assert list(store.load_all("tasks")) == [(b"\x01" * 16, "settled", 5, 7, "k", b"new")]


def test_open_rows_are_those_not_final(store: AnyStore) -> None:
    store.commit([task(n, state) for n, state in enumerate((*schema.TASK_FINAL, "draft", "disputed"))])
    assert ids(store.query("tasks_open")) == [6, 7]
    store.commit([Put("jobs", (bytes([n]), state, n, b"")) for n, state in enumerate((*schema.JOB_FINAL, "running"))])
    assert ids(store.query("jobs_open")) == [4]
    assert store.query("task_states")[0] == ("cancelled", 1)


def test_final_words_are_those_of_the_market() -> None:
    assert frozenset(schema.TASK_FINAL) == records.FINAL_STATES
    assert frozenset(schema.JOB_FINAL) == records.JOB_FINAL


def test_pages_go_from_new_to_old(store: AnyStore) -> None:
    store.commit([task(n, "failed" if n % 2 else "settled", created_ms=n // 2 + 1) for n in range(6)])
    first = store.query("tasks_page", ("", None, None, 4))
    assert ids(first) == [5, 4, 3, 2]
    assert ids(store.query("tasks_page", ("", first[-1][2], first[-1][0], 4))) == [1, 0]
    assert ids(store.query("tasks_page", ("failed", None, None, 2))) == [5, 3]
    store.commit([Put("jobs", (bytes([n]), "done", 10 - n, b"")) for n in range(3)])
    assert ids(store.query("jobs_page", ("", None, None, 2))) == [0, 1]
    assert ids(store.query("jobs_page", ("done", 9, b"\x01", 2))) == [2]


def test_a_task_is_found_by_the_beginning_of_its_id_and_by_its_key(store: AnyStore) -> None:
    store.commit([task(0x1A, key="daily"), task(0x1B), task(0x2A, key="daily")])
    assert ids(store.query("task_by_prefix", ("1", 10))) == [0x1A, 0x1B]
    assert ids(store.query("task_by_prefix", ("1B1", 10))) == [0x1B]
    assert ids(store.query("task_by_prefix", ("1", 1))) == [0x1A]
    assert ids(store.query("task_by_key", ("daily",))) == [0x2A, 0x1A]
    assert store.query("task_by_key", ("",)) == []
    with pytest.raises(DataError):
        store.query("task_by_prefix", ("xyz", 10))


def test_rows_of_one_task(store: AnyStore) -> None:
    t, u = b"t" * 16, b"u" * 16
    store.commit(
        [Put("transitions", (whose, n, n, "s", "")) for whose in (t, u) for n in (2, 1)]
        + [Put("bids", (t, 1, "b", b"")), Put("bids", (t, 0, "z", b"")), Put("bids", (t, 0, "a", b""))]
        + [Put("results", (t, 1, b"r1")), Put("results", (t, 0, b"r0")), Put("documents", (t, b"doc"))]
    )
    assert [row[1] for row in store.query("transitions", (t,))] == [1, 2]
    assert [row[1:3] for row in store.query("bids", (t,))] == [(0, "a"), (0, "z"), (1, "b")]
    assert [row[2] for row in store.query("results", (t,))] == [b"r0", b"r1"]
    assert store.query("result", (t, 1)) == [(t, 1, b"r1")]
    assert store.query("document", (t,)) == [(t, b"doc")]


def test_entries_by_range_and_by_page(store: AnyStore) -> None:
    store.commit([entry(n, b"x" * 100) for n in range(10)] + [entry(0, account=b"B" * 32)])
    a = b"A" * 32
    assert [row[1] for row in store.query("entries_range", (a, 2, 5, 10_000))] == [2, 3, 4, 5]
    assert [row[1] for row in store.query("entries_range", (a, 2, 9, 250))] == [2, 3]
    assert [row[1] for row in store.query("entries_range", (a, 2, 9, 1))] == [2]
    assert [row[1] for row in store.query("entries_page", (a, None, 3))] == [9, 8, 7]
    assert [row[1] for row in store.query("entries_page", (a, 1, 3))] == [0]
    assert store.query("entry", (a, 4))[0][1] == 4
    store.commit([Put("balances", (n, -n)) for n in range(5)])
    assert store.query("balances_page", (None, 2)) == [(4, -4), (3, -3)]
    assert store.query("balances_page", (2, 9)) == [(1, -1), (0, 0)]
    assert store.query("entry_heads") == [(a, 9), (b"B" * 32, 0)]
    store.commit([Put("segments", (a, 3, b"h", b"void")), Put("proofs", (a, b"proof"))])
    assert store.query("segments", (a,)) == [(a, 3, b"h", b"void")]
    assert store.query("proof", (a,)) == [(a, b"proof")]


def test_the_sweep_finds_only_what_is_final_and_old(store: AnyStore) -> None:
    rows = [task(n, "settled", created_ms=n, updated_ms=n + 1) for n in range(1, 5)]
    rows.append(task(9, "executing", created_ms=1, updated_ms=1))
    rows += [Put("results", (bytes([n]) * 16, 0, b"r")) for n in (1, 3, 9)]
    rows += [Put("jobs", (bytes([n]) * 16, "done", n, b"")) for n in (1, 5)]
    store.commit(rows)
    assert ids(store.query("tasks_expired", (4, 10))) == [1, 2]
    assert ids(store.query("results_expired", (100, 10))) == [1, 3]
    assert ids(store.query("jobs_expired", (5, 10))) == [1]
    store.commit([Put("unsettled", (b"\x02" * 16,)), Put("outbox", (b"o", "p", 1, b"\x05" * 16, 13, b""))])
    assert ids(store.query("tasks_expired", (4, 10))) == [1]
    assert ids(store.query("jobs_expired", (9, 10))) == [1]
    store.commit([Delete("unsettled", (b"\x02" * 16,)), Delete("outbox", (b"o",))])
    for rule in RULES:
        old = [row[0] for row in store.query(rule.query, (100, 10))]
        store.commit(deletions(rule, old, kept={b"\x03" * 16}))
    assert ids(list(store.load_all("tasks"))) == [3, 9]
    assert ids(list(store.load_all("results"))) == [3, 9]
    assert list(store.load_all("jobs")) == []


def test_the_worker_answers_and_reports_what_goes_wrong(store: AnyStore) -> None:
    store.commit([task(1)])
    answers: list[object] = []
    store.query_later("task", (b"\x01" * 16,), answers.append)
    store.query_later("task_by_prefix", ("no hex", 1), answers.append)
    store.close()
    assert ids(answers[0]) == [1]  # type: ignore[arg-type]
    assert isinstance(answers[1], DataError)


def test_an_unknown_query_is_named(store: AnyStore) -> None:
    with pytest.raises(NotFoundError, match="nonsense"):
        store.query("nonsense")


def test_the_twin_knows_every_query() -> None:
    assert set(_ANSWERS) == set(QUERIES)
