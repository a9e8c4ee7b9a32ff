"""The SQLite store alone: files and modes, versions, locks, damage, full disks, syncs, and what SIGKILL leaves."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from clawnet.errors import ClawnetError, ConfigError, NotFoundError, StorageError, StorageFullError
from clawnet.storage import store as store_module
from clawnet.storage.migrations import SCHEMA_VERSION
from clawnet.storage.queries import Row
from clawnet.storage.store import Store
from clawnet.wire.events import Delete, Put


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "home" / "clawnet.db"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    opened = Store.open(path)
    yield opened
    opened.close()


def meta(key: str, value: bytes = b"v") -> Put:
    return Put("meta", (key, value))


def keys(store: Store) -> list[str]:
    return [row[0] for row in store.load_all("meta")]


def traced(store: Store) -> list[str]:
    statements: list[str] = []
    store._writer.set_trace_callback(statements.append)
    return statements


@pytest.mark.skipif(sys.platform == "win32", reason="modes are POSIX")
def test_only_the_owner_can_read_any_of_the_files(path: Path) -> None:
    path.parent.mkdir(mode=0o755)
    path.touch(mode=0o644)
    store = Store.open(path)
    store.commit([meta("a")])
    modes = {file.name: oct(file.stat().st_mode & 0o777) for file in path.parent.iterdir()}
    assert sorted(modes) == ["clawnet.db", "clawnet.db-shm", "clawnet.db-wal", "clawnet.db.lock"]
    assert set(modes.values()) == {"0o600"}
    store.close()


def test_the_disk_is_synced_for_durable_turns_and_no_others(store: Store) -> None:
    store.commit([meta("a")])
    statements = traced(store)
    store.commit([meta("b")])
    store.commit([meta("c")], durable=True)
    store.commit([meta("d")], durable=True)
    store.commit([meta("e")])
    assert [text for text in statements if "synchronous" in text] == [
        "PRAGMA synchronous = FULL",
        "PRAGMA synchronous = NORMAL",
    ]
    order = [text.split()[0] for text in statements]
    assert order == ["BEGIN", "INSERT", "COMMIT", "PRAGMA"] + ["BEGIN", "INSERT", "COMMIT"] * 2 + ["PRAGMA"] + [
        "BEGIN",
        "INSERT",
        "COMMIT",
    ]
    assert (store.commits_total, store.durable_total) == (5, 2)


def test_settings_that_durability_rests_on(store: Store) -> None:
    def setting(name: str) -> object:
        return store._writer.execute(f"PRAGMA {name}").fetchone()[0]

    assert setting("journal_mode") == "wal"
    assert setting("wal_autocheckpoint") == 0
    assert setting("fullfsync") == 1
    assert setting("checkpoint_fullfsync") == 1
    assert setting("user_version") == SCHEMA_VERSION
    assert setting("synchronous") == 2


def test_rows_of_a_turn_go_table_by_table(store: Store) -> None:
    statements = traced(store)
    turn = [row for n in range(3) for row in (meta(str(n)), Put("durations", (str(n), b"")))]
    store.commit([*turn, meta("0", b"later")])
    inserts = [text.split()[2] for text in statements if text.startswith("INSERT")]
    assert inserts == ["meta"] * 3 + ["durations"] * 3


def test_rows_survive_reopening(path: Path) -> None:
    store = Store.open(path)
    store.commit([meta("a"), meta("b")])
    store.close()
    store = Store.open(path)
    assert keys(store) == ["a", "b"]
    store.close()


def test_a_newer_database_is_refused_and_left_alone(path: Path) -> None:
    Store.open(path).close()
    with sqlite3.connect(path) as raw:
        raw.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    raw.close()
    with pytest.raises(ConfigError, match="newer clawnet") as caught:
        Store.open(path)
    assert caught.value.exit_code == 78
    assert caught.value.hint
    with pytest.raises(ConfigError, match="newer clawnet"):
        Store.open(path)


def test_a_second_daemon_is_told_who_has_it(store: Store, path: Path) -> None:
    with pytest.raises(ConfigError, match=f"in use by another process .pid {os.getpid()}"):
        Store.open(path)
    assert keys(store) == []


def test_a_foreign_writer_is_an_error_that_names_the_file(
    store: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    store._writer.execute("PRAGMA busy_timeout = 0")
    with pytest.raises(StorageError, match="locked by another process"):
        store.commit([meta("a")])
    other.execute("ROLLBACK")
    other.close()
    store.commit([meta("b")])
    assert keys(store) == ["b"]


@pytest.mark.parametrize("damage", [b"no database at all" * 300, b"SQLite format 3\0" + b"\xff" * 8_000])
def test_a_damaged_file_is_named_with_what_to_do(path: Path, damage: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(damage)
    with pytest.raises(ConfigError, match="is damaged") as caught:
        Store.open(path)
    assert str(path) in caught.value.message
    assert "backup" in caught.value.hint
    assert path.read_bytes() == damage


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot open the database"):
        Store.open(tmp_path / "file" / "clawnet.db")


def fill(store: Store) -> int:
    """Commits rows until there is no room; the number of those committed."""
    for n in range(10_000):
        try:
            store.commit([meta(f"{n:05}", os.urandom(8_000)), Put("durations", (f"{n:05}", b"beside"))])
        except StorageFullError as full:
            assert full.code == "storage_full"
            assert "room" in full.hint
            return n
    raise AssertionError("the disk never filled")


def check_full(store: Store, committed: int) -> None:
    """The turn that met the full disk left nothing, not even its small row."""
    assert len(keys(store)) == committed
    assert len(list(store.load_all("durations"))) == committed


def test_a_database_at_its_page_limit_rolls_back_and_goes_on(store: Store) -> None:
    pages = store._writer.execute("PRAGMA page_count").fetchone()[0]
    store._writer.execute(f"PRAGMA max_page_count = {pages + 40}")
    committed = fill(store)
    check_full(store, committed)
    store.commit([Delete("meta", ("00000",)), Delete("meta", ("00001",)), Delete("meta", ("00002",))])
    store.commit([meta("later")], durable=True)
    assert "later" in keys(store)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte, where this machine lets us mount one; else a reason to skip."""
    where = tmp_path / "small"
    where.mkdir()
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root on Linux")
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(where)], capture_output=True)
    if mount.returncode != 0:
        pytest.skip("mounting a small file system needs CAP_SYS_ADMIN")
    yield where
    subprocess.run(["umount", str(where)], check=True)


def test_a_full_disk_rolls_back_and_room_made_is_used(small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(300_000))
    store = Store.open(small_disk / "clawnet.db")
    committed = fill(store)
    assert committed > 0
    check_full(store, committed)
    with pytest.raises(StorageFullError):
        store.commit([meta("x", bytes(200_000))], durable=True)
    ballast.unlink()
    store.commit([meta("later")], durable=True)
    assert keys(store)[-1] == "later"
    store.close()
    again = Store.open(small_disk / "clawnet.db")
    assert len(keys(again)) == committed + 1
    again.close()


def test_the_log_is_folded_in_beside_the_writer(store: Store, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "WAL_SOFT_BYTES", 64 * 1024)
    begin_checkpoint(store)
    assert not store._checkpointing
    assert path.stat().st_size > 64 * 1024
    store.commit([meta("last")])
    assert "last" in keys(store)


def begin_checkpoint(store: Store) -> None:
    """Commits until the worker has one to do, and waits for its end."""
    for n in range(40):
        store.commit([meta(str(n), bytes(8_000))])
        if store._worker is not None:
            break
    assert store._worker is not None
    store._worker.shutdown(wait=True)
    store._worker = None


def test_a_checkpoint_that_can_open_no_file_is_made_later(
    store: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_table(path: Path, *, read_only: bool = False) -> sqlite3.Connection:
        raise sqlite3.OperationalError("unable to open database file")

    monkeypatch.setattr(store_module, "WAL_SOFT_BYTES", 64 * 1024)
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "_connect", full_table)
        begin_checkpoint(store)
        assert path.stat().st_size < 64 * 1024
    begin_checkpoint(store)
    assert path.stat().st_size > 64 * 1024


@contextlib.contextmanager
def no_threads() -> Iterator[None]:
    """As where the user has as many processes as allowed."""

    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "start", refused)
        yield


def test_a_commit_succeeds_where_no_thread_can_be_started_for_the_checkpoint(
    store: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "WAL_SOFT_BYTES", 64 * 1024)
    with no_threads():
        for n in range(40):
            store.commit([meta(str(n), bytes(8_000))])
    assert (len(keys(store)), store._worker) == (40, None)
    begin_checkpoint(store)
    assert path.stat().st_size > 64 * 1024


def test_a_query_that_gets_no_thread_is_answered_once_with_the_error(store: Store) -> None:
    answers: list[list[Row] | ClawnetError] = []
    with no_threads():
        store.query_later("no such query", (), answers.append)
    store.query_later("no such query", (), answers.append)
    assert store._worker is not None
    store._worker.shutdown(wait=True)
    assert [type(answer) for answer in answers] == [StorageError, NotFoundError]


def test_a_log_beyond_the_hard_bound_is_emptied(store: Store, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "WAL_SOFT_BYTES", 64 * 1024)
    monkeypatch.setattr(store_module, "WAL_HARD_BYTES", 64 * 1024)
    store.commit([meta(str(n), bytes(8_000)) for n in range(40)])
    assert store._worker is not None
    store._worker.shutdown(wait=True)
    store._worker = None
    assert Path(f"{path}-wal").stat().st_size == 0
    assert len(keys(store)) == 40


KILLED = """
import sys
from pathlib import Path
from clawnet.storage.store import Store
from clawnet.wire.events import Put
store = Store.open(Path(sys.argv[1]))
n = 0
while True:
    store.commit([Put("meta", (f"{n:06}", b"v")), Put("durations", (f"{n:06}", b"v"))], durable=n % 10 == 0)
    print(n, flush=True)
    n += 1
"""


def test_what_was_committed_outlives_the_process(path: Path) -> None:
    writer = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    said = -1
    for line in writer.stdout:
        said = int(line)
        if said >= 200:
            break
    writer.send_signal(signal.SIGKILL if sys.platform != "win32" else signal.SIGTERM)
    rest = writer.stdout.read().split()
    writer.wait()
    writer.stdout.close()
    said = int(rest[-1]) if rest else said
    store = Store.open(path)
    found = keys(store)
    assert found[: said + 1] == [f"{n:06}" for n in range(said + 1)]
    assert len(found) in (said + 1, said + 2)
    assert [row[0] for row in store.load_all("durations")] == found
    store.close()
