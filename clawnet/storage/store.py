"""The database: one SQLite file, one writer in the loop's thread, one transaction a turn, readers beside it."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, cast

from clawnet.errors import ClawnetError, ConfigError, InternalError, NotFoundError, StorageError, StorageFullError
from clawnet.limits import KIB, MIB
from clawnet.storage.filelock import FileLock
from clawnet.storage.migrations import forget_copies, migrate
from clawnet.storage.queries import QUERIES, Row
from clawnet.storage.schema import TABLES, delete_sql, load_sql, put_sql
from clawnet.wire.events import Delete, Put

Done = Callable[[list[Row] | ClawnetError], None]

BUSY_MS: Final = 5_000
PAGE_BYTES: Final = 4 * KIB
# A checkpoint starts when about this much may lie in the write-ahead log; above the hard bound it also empties the log,
# for which the writer waits.
WAL_SOFT_BYTES: Final = 16 * MIB
WAL_HARD_BYTES: Final = 128 * MIB
COMMITS_BETWEEN_SIZES: Final = 256

_KEYS: Final = {name: table.keys for name, table in TABLES.items()}
_PUT: Final = {name: put_sql(table) for name, table in TABLES.items()}
_DELETE: Final = {
    (name, keys): delete_sql(table, keys) for name, table in TABLES.items() for keys in range(1, table.keys + 1)
}


class Pending:
    """What one transaction does to one table, in its shortest form: deletions first, then one row per key."""

    __slots__ = ("deletes", "puts")

    def __init__(self) -> None:
        self.deletes: dict[Row, None] = {}
        self.puts: dict[Row, Row] = {}


def fold(rows: Sequence[Put | Delete]) -> dict[str, Pending]:
    """Sorts the rows of a turn by table and drops what a later row of the turn replaces.

    A Delete with fewer values than the key has columns takes every row that begins with them.
    """
    tables: dict[str, Pending] = {}
    for row in rows:
        table = row.table
        pending = tables.get(table)
        if pending is None:
            pending = tables[table] = Pending()
        keys = _KEYS[table]
        if type(row) is Put:
            pending.puts[row.row[:keys]] = row.row
            continue
        key = cast(Delete, row).key
        assert 1 <= len(key) <= keys, f"a Delete in {table} names {len(key)} of {keys} key columns"
        pending.deletes[key] = None
        if len(key) == keys:
            pending.puts.pop(key, None)
        else:
            for other in [other for other in pending.puts if other[: len(key)] == key]:
                del pending.puts[other]
    return tables


class Store:
    """The open database. All methods but `query_later` belong to the loop's thread."""

    def __init__(self, path: Path, lock: FileLock, writer: sqlite3.Connection, reader: sqlite3.Connection) -> None:
        self.path = path
        self._lock = lock
        self._writer = writer
        self._reader = reader
        self._worker: ThreadPoolExecutor | None = None
        self._worker_reader: sqlite3.Connection | None = None
        self._full = True
        self._wal_bytes = 0
        self._commits = 0
        self._checkpointing = False
        self.commits_total = 0
        self.durable_total = 0

    @classmethod
    def open(cls, path: Path) -> Store:
        """Opens or creates the database file, readable by this user alone, and brings its schema up to date.

        Raises ConfigError when another process has it, when it comes from a newer clawnet or is damaged, and
        StorageError when the disk does not let us.
        """
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = FileLock.take(path.with_name(path.name + ".lock"), what=f"the database {path}")
        except OSError as err:
            raise StorageError(f"cannot open the database {path}: {err.strerror}", path=str(path)) from err
        with contextlib.ExitStack() as failed:
            failed.callback(lock.release)
            try:
                os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
                path.chmod(0o600)
                writer = _connect(path)
                failed.callback(writer.close)
                _configure(writer)
                migrate(writer, path)
                reader = _connect(path, read_only=True)
            except OSError as err:
                raise StorageError(f"cannot open the database {path}: {err.strerror}", path=str(path)) from err
            except sqlite3.Error as err:
                raise translate(err, path) from err
            failed.pop_all()
        return cls(path, lock, writer, reader)

    # --- writing

    def commit(self, rows: Sequence[Put | Delete], durable: bool = False) -> None:
        """One transaction with all these rows; `durable` ones are on the disk when this returns.

        On any failure nothing of it remains: StorageFullError when there is no room, StorageError otherwise.
        """
        if not rows:
            return
        run = self._writer.execute
        try:
            if durable != self._full:
                run("PRAGMA synchronous = FULL" if durable else "PRAGMA synchronous = NORMAL")
                self._full = durable
            run("BEGIN IMMEDIATE")
            written = self._write(rows)
            run("COMMIT")
        except sqlite3.Error as err:
            raise translate(err, self.path) from err
        finally:
            self._roll_back()
        self.commits_total += 1
        self.durable_total += durable
        # Each row touches a page of its table and perhaps one of an index; the checkpoint reports the true count.
        self._wal_bytes += written * 2 * PAGE_BYTES
        self._commits += 1
        if self._wal_bytes > WAL_SOFT_BYTES or self._commits >= COMMITS_BETWEEN_SIZES:
            self._watch_log()

    def _write(self, rows: Sequence[Put | Delete]) -> int:
        run, many = self._writer.execute, self._writer.executemany
        if len(rows) == 1:
            row = rows[0]
            if type(row) is Put:
                run(_PUT[row.table], row.row)
            else:
                key = cast(Delete, row).key
                run(_DELETE[row.table, len(key)], key)
            return 1
        written = 0
        for table, pending in fold(rows).items():
            for key in pending.deletes:
                run(_DELETE[table, len(key)], key)
            puts = pending.puts
            if len(puts) > 1:
                many(_PUT[table], puts.values())
            elif puts:
                run(_PUT[table], next(iter(puts.values())))
            written += len(puts) + len(pending.deletes)
        return written

    def _roll_back(self) -> None:
        """Undoes a transaction that was not committed; after a commit there is none."""
        if self._writer.in_transaction:
            self._writer.execute("ROLLBACK")

    # --- reading

    def load_all(self, table: str) -> Iterator[Row]:
        """All rows of a table in key order; read to the end before the next commit, for it holds a snapshot."""
        try:
            yield from self._reader.execute(load_sql(TABLES[table]))
        except sqlite3.Error as err:
            raise translate(err, self.path) from err

    def query(self, name: str, args: Row = ()) -> list[Row]:
        """The rows of a named query (storage/queries.py), here and now."""
        return _run(self._reader, self.path, name, args)

    def query_later(self, name: str, args: Row, done: Done) -> None:
        """The same in the worker thread; `done` is called there with the rows, or with the error.

        Where there is no such thread `done` is called at once, with a StorageError.
        """
        if not self._submit(self._query_in_worker, name, args, done):
            done(
                StorageError(
                    f"the database {self.path} cannot be read now: the system gives no thread",
                    hint="end what else runs for this user, or raise the limit of its processes",
                    path=str(self.path),
                )
            )

    def _query_in_worker(self, name: str, args: Row, done: Done) -> None:
        try:
            if self._worker_reader is None:
                self._worker_reader = _connect(self.path, read_only=True)
            rows = _run(self._worker_reader, self.path, name, args)
        except sqlite3.Error as err:
            done(translate(err, self.path))
        except ClawnetError as err:
            done(err)
        else:
            done(rows)

    def _submit(self, work: Callable[..., None], *args: Any) -> bool:
        """False when the system gives no thread: the work is not done then, nor later."""
        worker = self._worker or ThreadPoolExecutor(1, thread_name_prefix="clawnet-store")
        try:
            worker.submit(work, *args)
        except RuntimeError:
            # The work lies in this executor's queue all the same, so the next gets a new one.
            return False
        self._worker = worker
        return True

    # --- upkeep

    def size(self) -> int:
        """Bytes of the database and its write-ahead log."""
        return sum(_file_bytes(Path(f"{self.path}{suffix}")) for suffix in ("", "-wal"))

    def _watch_log(self) -> None:
        self._commits = 0
        if self._checkpointing:
            return
        log_bytes = _file_bytes(Path(f"{self.path}-wal"))
        if log_bytes < WAL_SOFT_BYTES // 4:
            self._wal_bytes = min(self._wal_bytes, log_bytes)
        elif self._wal_bytes > WAL_SOFT_BYTES or log_bytes > WAL_HARD_BYTES:
            self._checkpointing = True
            if not self._submit(self._checkpoint, log_bytes > WAL_HARD_BYTES):
                # What called this is committed and must not seem to have failed; the next commits try again.
                self._checkpointing = False
                self._wal_bytes = WAL_SOFT_BYTES // 2

    def _checkpoint(self, empty: bool) -> None:
        """In the worker thread: copies the log into the database beside the writer; `empty` stops it briefly."""
        # Nothing is lost by a checkpoint that fails, be it that no file can be opened: the next commits trigger
        # another, and a full disk shows there.
        left = WAL_SOFT_BYTES // 2
        try:
            with contextlib.suppress(sqlite3.Error, OSError), contextlib.closing(_connect(self.path)) as connection:
                _, frames, copied = connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
                if empty:
                    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                    frames = copied = 0
                left = (frames - copied) * PAGE_BYTES
        finally:
            self._wal_bytes = left
            self._checkpointing = False

    def served(self) -> None:
        """A daemon has run on this database from start to end: copies of older schemas are no longer needed."""
        forget_copies(self.path)

    def close(self) -> None:
        """Waits for reads under way, folds the log into the file and lets the database go."""
        if self._worker is not None:
            self._worker.shutdown(wait=True)
        for connection in (self._worker_reader, self._reader, self._writer):
            if connection is not None:
                connection.close()
        self._lock.release()


def _connect(path: Path, *, read_only: bool = False) -> sqlite3.Connection:
    mode = "ro" if read_only else "rw"
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}",
        uri=True,
        timeout=BUSY_MS / 1000,
        isolation_level=None,
        check_same_thread=False,
        cached_statements=256,
    )
    if not read_only:
        # macOS's fsync leaves data in the drive's cache; elsewhere these two change nothing.
        connection.execute("PRAGMA fullfsync = 1")
        connection.execute("PRAGMA checkpoint_fullfsync = 1")
    return connection


def _configure(writer: sqlite3.Connection) -> None:
    writer.execute(f"PRAGMA page_size = {PAGE_BYTES}")
    writer.execute("PRAGMA journal_mode = WAL")
    writer.execute("PRAGMA wal_autocheckpoint = 0")
    writer.execute(f"PRAGMA journal_size_limit = {2 * WAL_SOFT_BYTES}")
    writer.execute("PRAGMA cache_size = -8192")
    writer.execute("PRAGMA temp_store = MEMORY")
    writer.execute("PRAGMA synchronous = FULL")


def _run(connection: sqlite3.Connection, path: Path, name: str, args: Row) -> list[Row]:
    query = QUERIES.get(name)
    if query is None:
        raise NotFoundError(f"there is no query {name!r}")
    assert len(args) == len(query.args), f"query {name} takes {query.args}"
    column = query.bytes_column
    bytes_left = 0
    if column >= 0:
        args, bytes_left = args[:-1], int(args[-1])
    if query.prepare is not None:
        args = query.prepare(args)
    try:
        cursor = connection.execute(query.sql, args)
        if column < 0:
            return cursor.fetchall()
        rows: list[Row] = []
        for row in cursor:
            bytes_left -= len(row[column])
            if rows and bytes_left < 0:
                break
            rows.append(row)
        cursor.close()
        return rows
    except sqlite3.Error as err:
        raise translate(err, path) from err


def _file_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def translate(err: sqlite3.Error, path: Path) -> ClawnetError:
    """SQLite's error as ours: no room, damaged, in use, our own mistake, or the disk."""
    code = getattr(err, "sqlite_errorcode", 0) & 0xFF
    where = str(path)
    if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
        return StorageFullError(
            f"cannot write to the database {where}: {err}",
            hint="make room on the disk (`clawnet doctor` shows what takes it), then try again",
            path=where,
        )
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return ConfigError(
            f"the database {where} is damaged: {err}",
            hint="restore it from a backup (`clawnet wallet restore`), or move it away to start anew",
            path=where,
        )
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return StorageError(
            f"the database {where} is locked by another process",
            hint="stop what has it open; only the daemon may write to it",
            path=where,
        )
    if code in (sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH) or isinstance(err, sqlite3.ProgrammingError):
        return InternalError(f"a row contradicts one already in the database {where}: {err}", path=where)
    return StorageError(f"the database {where} does not work: {err}", path=where)
