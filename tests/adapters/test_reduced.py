"""A database in small: what a backup takes along."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

from clawnet.storage.reduced import reduce
from clawnet.storage.store import Store
from clawnet.wire.events import Put


def test_what_was_spent_today_is_in_a_backup_and_the_stamp_of_the_place_is_not(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "whole.db")
    store.commit([Put("meta", (key, b"x")) for key in ("spent:uid 1000", "checkpoint", "host", "stated")])
    store.close()
    before = {path.name for path in tmp_path.iterdir()}
    found = reduce(tmp_path / "whole.db", bytes(32), lambda body: None)
    made = {path.name for path in tmp_path.iterdir()} - before
    assert made <= {"whole.db-wal", "whole.db-shm"}, "nothing in plain is written beside the database"
    with contextlib.closing(sqlite3.connect(":memory:")) as small:
        small.deserialize(found.image)
        kept = {row[0] for row in small.execute("SELECT key FROM meta")}
    assert kept == {"spent:uid 1000", "checkpoint"}, "a restore does not open the limits of the day anew"
