"""Keys that seal results until they are paid for: derived, so that a restarted payee can always show them again."""

from __future__ import annotations

import hmac
from hashlib import sha256
from typing import Final

SEAL_TAG: Final = b"clawnet/seal-key/1"
CONTENT_TAG: Final = b"clawnet/content-key/1"


def _hkdf(key: bytes, salt: bytes, info: bytes) -> bytes:
    """32 bytes of HKDF-SHA256 (RFC 5869); one output block is all that 32 bytes need."""
    extracted = hmac.digest(salt, key, "sha256")
    return hmac.digest(extracted, info + b"\x01", "sha256")


def derive_key(escrow_seed: bytes, mesh: bytes, payer: bytes, lock_hash: bytes, line: int, part: int) -> bytes:
    """The key `k` of one part of one line: what the payee shows inside its claim."""
    info = mesh + payer + lock_hash + line.to_bytes(8, "big") + part.to_bytes(8, "big")
    return _hkdf(escrow_seed, SEAL_TAG, info)


def key_hash(key: bytes) -> bytes:
    """What note and release name a key by."""
    return sha256(key).digest()


def content_key(key: bytes, secret: bytes) -> bytes:
    """The key that seals the bytes. It also needs the task document's secret, which no auditor ever sees."""
    return _hkdf(key + secret, CONTENT_TAG, b"")
