"""Blob ids and the replay window: the same bytes have one id however they come, and nothing is taken twice."""

from __future__ import annotations

from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clawnet import limits
from clawnet.errors import MessageTooOld, RateLimited
from clawnet.wire.blobid import BlobHasher, blob_id, id_of_leaves, leaf, leaf_count
from clawnet.wire.replay import ReplayWindow

CHUNK = limits.BLOB_CHUNK_BYTES
NOW_MS = 1_800_000_000_000


def test_the_id_is_what_the_specification_says() -> None:
    data = b"a" * CHUNK + b"b"
    leaves = [sha256(b"\x00" + part).digest() for part in (b"a" * CHUNK, b"b")]
    expected = sha256(b"\x01" + len(data).to_bytes(8, "big") + b"".join(leaves)).digest()
    assert blob_id(data) == expected == id_of_leaves(len(data), leaves)
    assert [leaf(b"a" * CHUNK), leaf(b"b")] == leaves
    assert blob_id(b"") == sha256(b"\x01" + bytes(8)).digest()


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 3 * CHUNK - 1])
def test_pieces_do_not_change_the_id(size: int) -> None:
    data = bytes(n * 7 % 251 for n in range(64)) * (size // 64 + 1)
    data = data[:size]
    hasher = BlobHasher()
    for at in range(0, size, 65_537):
        hasher.update(data[at : at + 65_537])
    assert hasher.digest() == blob_id(data)
    assert (hasher.size, len(hasher.leaves)) == (size, leaf_count(size))


def test_a_leaf_list_is_no_blob_of_the_same_id() -> None:
    leaves = [leaf(b"a" * CHUNK), leaf(b"b")]
    assert blob_id(b"".join(leaves)) != id_of_leaves(CHUNK + 1, leaves)
    assert id_of_leaves(CHUNK + 1, leaves) != id_of_leaves(CHUNK + 2, leaves)


def test_a_statement_is_taken_once() -> None:
    window = ReplayWindow()
    assert window.admit("alice", b"1", NOW_MS, NOW_MS)
    assert not window.admit("alice", b"1", NOW_MS, NOW_MS)
    assert window.admit("bob", b"1", NOW_MS, NOW_MS)


@pytest.mark.parametrize("off_ms", [-limits.MESSAGE_AGE_MS - 1, limits.MESSAGE_AGE_MS + 1])
def test_a_statement_off_the_clock_is_refused(off_ms: int) -> None:
    with pytest.raises(MessageTooOld):
        ReplayWindow().admit("alice", b"1", NOW_MS + off_ms, NOW_MS)


def test_one_author_cannot_fill_the_window() -> None:
    window = ReplayWindow(ids_max=64, author_share=4)
    for n in range(16):
        assert window.admit("eve", bytes([n]), NOW_MS + 1, NOW_MS)
    with pytest.raises(RateLimited):
        window.admit("eve", b"more", NOW_MS + 1, NOW_MS)
    assert window.admit("alice", b"1", NOW_MS, NOW_MS)
    later = NOW_MS + limits.MESSAGE_AGE_MS + 2
    assert window.admit("eve", b"more", later, later)
    assert len(window) == 1


Events = st.lists(
    st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 5), st.integers(-400_000, 400_000), st.integers(0, 100_000)),
    max_size=60,
)


@given(Events, st.integers(0, 60))
def test_nothing_is_ever_taken_twice_whatever_is_forgotten_or_restored(
    events: list[tuple[str, int, int, int]], restart_at: int
) -> None:
    window, now_ms = ReplayWindow(ids_max=8, author_share=2), NOW_MS
    stamped: dict[tuple[str, bytes], int] = {}
    taken: set[tuple[str, bytes]] = set()
    for count, (author, number, off_ms, passed_ms) in enumerate(events):
        now_ms += passed_ms
        if count == restart_at:
            rows, floor_ms = list(window.rows()), window.floor_ms
            window = ReplayWindow(ids_max=8, author_share=2)
            window.restore(rows, floor_ms)
        name = (author, bytes([number]))
        time_ms = stamped.setdefault(name, now_ms + off_ms)
        try:
            fresh = window.admit(*name, time_ms, now_ms)
        except (MessageTooOld, RateLimited):
            continue
        assert not (fresh and name in taken)
        assert fresh or name in taken
        taken.add(name)
        assert len(window) <= 8
