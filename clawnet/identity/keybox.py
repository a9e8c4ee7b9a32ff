"""Sealing the mesh key: libsodium's sealed box to the X25519 form of a node key, with entropy from the caller."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Final

from nacl import bindings
from nacl.exceptions import CryptoError

from clawnet.errors import DataError

MESH_KEY_BYTES: Final = 32
_NONCE_BYTES: Final = bindings.crypto_secretbox_NONCEBYTES
_POINT_BYTES: Final = 32


def seal_to(node: bytes, secret: bytes, entropy: Callable[[int], bytes]) -> bytes:
    """A sealed box that only the holder of this Ed25519 node key opens. Raises DataError for a key that is no point."""
    try:
        receiver = bindings.crypto_sign_ed25519_pk_to_curve25519(node)
        public, private = bindings.crypto_box_seed_keypair(entropy(_POINT_BYTES))
        return bytes(public + bindings.crypto_box(secret, _nonce(public, receiver), receiver, private))
    except (CryptoError, ValueError, RuntimeError) as error:
        raise DataError("nothing can be sealed to this node key") from error


def _nonce(public: bytes, receiver: bytes) -> bytes:
    """As libsodium's crypto_box_seal makes it: BLAKE2b over both public keys."""
    return hashlib.blake2b(public + receiver, digest_size=_NONCE_BYTES).digest()


def lock(data: bytes, key: bytes, entropy: Callable[[int], bytes]) -> bytes:
    """Nonce and secretbox of some bytes under a mesh key."""
    nonce = entropy(_NONCE_BYTES)
    return nonce + bindings.crypto_secretbox(data, nonce, key)


def unlock(locked: bytes, key: bytes) -> bytes | None:
    """What `lock` took; None when it was another key, or the bytes are not whole."""
    if len(locked) < _NONCE_BYTES + bindings.crypto_secretbox_MACBYTES or len(key) != MESH_KEY_BYTES:
        return None
    try:
        return bytes(bindings.crypto_secretbox_open(locked[_NONCE_BYTES:], locked[:_NONCE_BYTES], key))
    except CryptoError:
        return None
