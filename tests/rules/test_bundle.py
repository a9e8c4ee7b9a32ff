"""The result bundle and its seal: nothing changed opens, nothing short opens, and no key but the right one."""

from __future__ import annotations

import os
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nacl import bindings

from clawnet import limits
from clawnet.errors import VerificationError
from clawnet.execution import bundle
from clawnet.execution.bundle import CHUNK_BYTES, Bundle, Head, Usage

KEY = bytes(range(32))


class _Memory:
    """A blob store in memory, as far as bundles use one."""

    def __init__(self) -> None:
        self.blobs: dict[bytes, bytes] = {}

    def put_bytes(self, data: bytes) -> bytes:
        self.blobs[sha256(data).digest()] = data
        return sha256(data).digest()

    def writer(self) -> _Writer:
        return _Writer(self)

    def path(self, blob: bytes) -> Path:
        raise AssertionError("bundles never ask where a blob lies")


class _Writer:
    def __init__(self, store: _Memory) -> None:
        self._store, self._parts = store, list[bytes]()

    def write(self, data: bytes) -> None:
        self._parts.append(data)

    def commit(self) -> bytes:
        return self._store.put_bytes(b"".join(self._parts))

    def abort(self) -> None:
        self._parts = []


def _fixed(size: int) -> bytes:
    return bytes(size)


@given(st.binary(max_size=300), st.binary(max_size=300), st.text(max_size=50), st.integers(0, 255) | st.none())
def test_a_bundle_comes_back_whole(stdout: bytes, stderr: bytes, text: str, code: int | None) -> None:
    there = Bundle(code, None if code is not None else 9, stdout, stderr, text, Usage(1.5, 0.5, 10))
    assert bundle.decode(bundle.encode(there)) == there


@given(st.binary(max_size=400))
def test_garbage_is_no_bundle(data: bytes) -> None:
    for plain in (data, b"CWB1" + data, b"CWB1\0\0\0\5" + data):
        with pytest.raises(VerificationError):
            bundle.decode(plain)


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES])
def test_sealing_adds_what_it_says_and_opens_again(size: int) -> None:
    plain = os.urandom(size)
    sealed = bundle.seal(plain, KEY, os.urandom)
    assert len(sealed) == bundle.sealed_size(size)
    assert bundle.unseal(sealed, KEY) == plain
    assert bundle.seal(plain, KEY, os.urandom) != sealed, "the header is fresh each time"
    assert bundle.seal(plain, KEY, _fixed) == bundle.seal(plain, KEY, _fixed), "and comes from the entropy given"


def test_it_is_libsodiums_secretstream() -> None:
    state = bindings.crypto_secretstream_xchacha20poly1305_state()
    header = bindings.crypto_secretstream_xchacha20poly1305_init_push(state, KEY)
    final = bindings.crypto_secretstream_xchacha20poly1305_TAG_FINAL
    theirs = header + bindings.crypto_secretstream_xchacha20poly1305_push(state, b"hello", None, final)
    assert bundle.unseal(theirs, KEY) == b"hello"
    ours = bundle.seal(b"hello", KEY, os.urandom)
    state = bindings.crypto_secretstream_xchacha20poly1305_state()
    bindings.crypto_secretstream_xchacha20poly1305_init_pull(state, ours[:24], KEY)
    assert bindings.crypto_secretstream_xchacha20poly1305_pull(state, ours[24:], None) == (b"hello", final)


def test_no_changed_byte_opens() -> None:
    sealed = bundle.seal(b"some result", KEY, os.urandom)
    for place in range(len(sealed)):
        changed = bytearray(sealed)
        changed[place] ^= 1
        with pytest.raises(VerificationError):
            bundle.unseal(bytes(changed), KEY)
    with pytest.raises(VerificationError):
        bundle.unseal(sealed, bytes(32))


def test_no_other_length_opens() -> None:
    plain = os.urandom(2 * CHUNK_BYTES + 100)
    sealed = bundle.seal(plain, KEY, os.urandom)
    whole = CHUNK_BYTES + bundle.TAIL_BYTES
    for cut in (0, 10, 24, 24 + whole, 24 + 2 * whole, len(sealed) - 1):
        with pytest.raises(VerificationError):
            bundle.unseal(sealed[:cut], KEY)
    for longer in (sealed + b"x", sealed + sealed[24:], sealed + bytes(whole)):
        with pytest.raises(VerificationError):
            bundle.unseal(longer, KEY)
    swapped = sealed[:24] + sealed[24 + whole : 24 + 2 * whole] + sealed[24 : 24 + whole] + sealed[24 + 2 * whole :]
    with pytest.raises(VerificationError):
        bundle.unseal(swapped, KEY)


@given(st.lists(st.binary(max_size=90_000), max_size=4), st.integers(1, 100_000))
def test_the_pieces_in_which_it_comes_do_not_matter(pieces: list[bytes], step: int) -> None:
    plain = b"".join(pieces)
    sealed = b"".join(bundle.seal_parts(pieces, KEY, _fixed))
    assert sealed == bundle.seal(plain, KEY, _fixed)
    parts = [sealed[at : at + step] for at in range(0, len(sealed), step)]
    assert b"".join(bundle.open_parts(parts, KEY)) == plain


@pytest.mark.parametrize("key", [None, KEY])
@pytest.mark.parametrize("size", [0, 1_000, limits.RESULT_INLINE_BYTES_MAX, 2_000_000])
def test_packing_stores_what_is_long_and_opens_to_the_same(key: bytes | None, size: int) -> None:
    store, data = _Memory(), os.urandom(size)
    packed = bundle.pack(Head(0, None, size, 3), iter([data, b"err"]), key, os.urandom, store)
    assert bool(packed.inline) == (packed.blob_bytes <= limits.RESULT_INLINE_BYTES_MAX)
    stored = packed.inline or store.blobs[packed.blob]
    assert len(stored) == packed.blob_bytes
    assert (data in stored) == (key is None or not data)
    found = bundle.unpack([stored[at : at + 70_000] for at in range(0, len(stored), 70_000)], key, store)
    assert found.sha256 == packed.plain_hash
    assert (found.stdout_bytes, found.stderr_bytes, found.exit_code) == (size, 3, 0)
    if size + 3 <= limits.RESULT_JSON_BYTES_MAX:
        assert (found.stdout, found.stderr) == (data, b"err")
    else:
        assert (found.stdout, found.stderr) == (None, None)
        assert (store.blobs[found.stdout_blob], store.blobs[found.stderr_blob]) == (data, b"err")


@pytest.mark.parametrize(("said", "given"), [(5, 4), (5, 6), (2_000_000, 1_999_999), (2_000_000, 2_000_001)])
def test_a_head_that_lies_about_lengths_is_refused(said: int, given: int) -> None:
    plain = bundle.encode_head(Head(0, None, said, 0)) + bytes(given)
    with pytest.raises(VerificationError):
        bundle.unpack([plain], None, _Memory())
    with pytest.raises(VerificationError):
        bundle.unpack([bundle.seal(plain, KEY, os.urandom)], KEY, _Memory())
