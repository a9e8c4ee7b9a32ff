"""The cheap signer: blake2b keyed by an identity's secret, and an oracle that verifies; put in here and nowhere else.

An identity can sign only with the secret that it holds, the oracle alone knows them all, and any changed byte is
detected: what honest nodes do is the same as with Ed25519, at a fortieth of the cost. Peers that lie are tried under
Ed25519 (`ed25519=True` leaves everything as it is shipped).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b

from clawnet.identity import keys

_real_verify = keys.verify
_real_sign = keys.KeyPair.sign


class Oracle:
    """Knows the secret of every identity that has ever signed; counts what real signatures would have cost."""

    def __init__(self) -> None:
        self._secrets: dict[bytes, bytes] = {}
        self.signed_total = 0
        self.verified_total = 0

    def sign(self, key: keys.KeyPair, message: bytes) -> bytes:
        """64 bytes that only the holder of this key's seed can make."""
        secret = self._secrets.get(key.public)
        if secret is None:
            secret = self._secrets[key.public] = key.seed
        key.signed_total += 1
        self.signed_total += 1
        return blake2b(message, key=secret, digest_size=64).digest()

    def verify(self, public: bytes, message: bytes, signature: bytes) -> bool:
        """Whether the holder of `public` signed this message."""
        self.verified_total += 1
        secret = self._secrets.get(public)
        return secret is not None and blake2b(message, key=secret, digest_size=64).digest() == signature


@contextmanager
def signer(ed25519: bool = False) -> Iterator[Oracle]:
    """While it is open every room of clawnet signs and verifies through the oracle."""
    oracle = Oracle()
    if ed25519:
        yield oracle
        return
    places = [
        module
        for name, module in sorted(sys.modules.items())
        if name.startswith("clawnet") and getattr(module, "verify", None) is _real_verify
    ]

    def sign(self: keys.KeyPair, message: bytes) -> bytes:
        return oracle.sign(self, message)

    keys.KeyPair.sign = sign  # type: ignore[method-assign]
    for module in places:
        module.verify = oracle.verify  # type: ignore[attr-defined]
    try:
        yield oracle
    finally:
        keys.KeyPair.sign = _real_sign  # type: ignore[method-assign]
        for module in places:
            module.verify = _real_verify  # type: ignore[attr-defined]
