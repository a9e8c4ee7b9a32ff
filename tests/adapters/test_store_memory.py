"""The in-memory twin's own gifts: a disk that fills, fails once, or loses what was not synced."""

from __future__ import annotations

import pytest

from clawnet.errors import StorageError, StorageFullError
from clawnet.storage.memory import MemoryStore
from clawnet.wire.events import Delete, Put


def meta(key: str, value: bytes = b"v") -> Put:
    return Put("meta", (key, value))


def test_a_small_disk_refuses_what_does_not_fit_and_takes_deletions() -> None:
    store = MemoryStore(bytes_max=100)
    store.commit([meta("a", bytes(80))])
    with pytest.raises(StorageFullError):
        store.commit([meta("b", bytes(50)), meta("c")])
    assert [row[0] for row in store.load_all("meta")] == ["a"]
    store.commit([Delete("meta", ("a",)), meta("b", bytes(50))])
    assert store.size() == 51


def test_a_failure_asked_for_happens_once_and_leaves_nothing() -> None:
    store = MemoryStore()
    store.fail_next = StorageError("broken")
    with pytest.raises(StorageError, match="broken"):
        store.commit([meta("a")])
    store.commit([meta("b")])
    assert [row[0] for row in store.load_all("meta")] == ["b"]


def test_power_loss_keeps_what_was_durable_and_the_rest_is_gone() -> None:
    store = MemoryStore()
    store.commit([meta("a", b"1"), meta("gone", b"1")])
    store.commit([meta("own entry")], durable=True)
    store.commit([meta("a", b"2"), meta("b"), Delete("meta", ("gone",))])
    store.commit([meta("a", b"3")])
    store.cut_power()
    assert list(store.load_all("meta")) == [("a", b"1"), ("gone", b"1"), ("own entry", b"v")]
    assert store.size() == sum(len(key) + len(value) for key, value in store.load_all("meta"))
