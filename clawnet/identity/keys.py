"""Ed25519 keys, signatures, and the libp2p peer ids they have.

A peer id is the base58 form of the identity multihash of the key's protobuf
(https://github.com/libp2p/specs/blob/master/peer-ids/peer-ids.md), which for Ed25519 always reads `12D3KooW...`.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

from nacl import bindings
from nacl.exceptions import CryptoError

from clawnet import paths
from clawnet.errors import ConfigError, DataError

PUBLIC_BYTES = 32
SEED_BYTES = 32
SIGNATURE_BYTES = 64

_MULTIHASH_PREFIX = bytes.fromhex("002408011220")
_CID_PREFIX = bytes.fromhex("0172")
_FILE_PREFIX = "clawnet-ed25519-1:"
_BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_BASE58_VALUE = {letter: value for value, letter in enumerate(_BASE58)}
_PEER_ID_CHARS_MAX = 128


class KeyPair:
    """A secret Ed25519 key with its public half; its repr never shows the secret."""

    __slots__ = ("_secret", "peer_id", "public", "signed_total")

    def __init__(self, seed: bytes) -> None:
        if len(seed) != SEED_BYTES:
            raise DataError(f"an Ed25519 seed has {SEED_BYTES} bytes, not {len(seed)}")
        self.public: bytes
        self.public, self._secret = bindings.crypto_sign_seed_keypair(seed)
        self.peer_id = peer_id_of(self.public)
        self.signed_total = 0

    @classmethod
    def from_seed(cls, seed: bytes) -> KeyPair:
        """The key pair of 32 secret bytes."""
        return cls(seed)

    @classmethod
    def generate(cls, entropy: Callable[[int], bytes]) -> KeyPair:
        """A new key pair from `entropy(n)`, which returns n unpredictable bytes."""
        return cls(entropy(SEED_BYTES))

    @classmethod
    def load(cls, path: Path, *, check_permissions: bool = True) -> KeyPair:
        """The key pair in a file written by `save`.

        Raises ConfigError when the file is missing, is no key, or others may read it.
        """
        return cls(read_secret(path, _FILE_PREFIX, check_permissions=check_permissions))

    def save(self, path: Path) -> None:
        """Writes the seed as one line of text, mode 0600, in one step."""
        write_secret(path, _FILE_PREFIX, self.seed)

    @property
    def seed(self) -> bytes:
        """The 32 secret bytes; for saving and sealing only."""
        return self._secret[:SEED_BYTES]

    def sign(self, message: bytes) -> bytes:
        """The 64-byte signature of a message."""
        self.signed_total += 1
        return bindings.crypto_sign(message, self._secret)[:SIGNATURE_BYTES]

    def unseal(self, sealed: bytes) -> bytes | None:
        """What was sealed to this key's X25519 form (keybox.seal_to, crypto_box_seal); None when it does not open."""
        try:
            public = bindings.crypto_sign_ed25519_pk_to_curve25519(self.public)
            private = bindings.crypto_sign_ed25519_sk_to_curve25519(self._secret)
            return bytes(bindings.crypto_box_seal_open(sealed, public, private))
        except (CryptoError, ValueError, TypeError):
            return None

    def __repr__(self) -> str:
        return f"KeyPair({self.peer_id})"


def verify(public: bytes, message: bytes, signature: bytes) -> bool:
    """Whether the signature of this message was made by the holder of this public key.

    Never raises for bad input: a key or a signature of the wrong length verifies nothing.
    """
    if len(public) != PUBLIC_BYTES or len(signature) != SIGNATURE_BYTES:
        return False
    try:
        bindings.crypto_sign_open(signature + message, public)
    except CryptoError:
        return False
    return True


@lru_cache(maxsize=8_192)
def peer_id_of(public: bytes) -> str:
    """The peer id of a public key."""
    if len(public) != PUBLIC_BYTES:
        raise DataError(f"an Ed25519 public key has {PUBLIC_BYTES} bytes, not {len(public)}")
    return base58_encode(_MULTIHASH_PREFIX + public)


@lru_cache(maxsize=8_192)
def public_of(peer_id: str) -> bytes:
    """The public key in a peer id, written as base58 multihash or as CIDv1 (`bafz...`).

    Raises DataError for anything else, peer ids of other key types included.
    """
    multihash = _multihash_of(peer_id)
    if len(multihash) != len(_MULTIHASH_PREFIX) + PUBLIC_BYTES or not multihash.startswith(_MULTIHASH_PREFIX):
        raise DataError(
            f"{_shown(peer_id)} is not the peer id of an Ed25519 key",
            hint="a clawnet peer id starts with 12D3KooW and has 52 characters",
        )
    return multihash[len(_MULTIHASH_PREFIX) :]


def base58_encode(data: bytes) -> str:
    """Bytes in Bitcoin's base58 alphabet; leading zero bytes become leading ones."""
    number = int.from_bytes(data, "big")
    letters: list[str] = []
    while number:
        number, value = divmod(number, 58)
        letters.append(_BASE58[value])
    zeros = len(data) - len(data.lstrip(b"\0"))
    return "1" * zeros + "".join(reversed(letters))


def base58_decode(text: str) -> bytes:
    """The bytes of a base58 text; raises DataError for a letter outside the alphabet."""
    number = 0
    for letter in text:
        value = _BASE58_VALUE.get(letter)
        if value is None:
            raise DataError(f"{letter!r} is not a base58 letter")
        number = number * 58 + value
    zeros = len(text) - len(text.lstrip("1"))
    return bytes(zeros) + number.to_bytes((number.bit_length() + 7) // 8, "big")


def write_secret(path: Path, prefix: str, secret: bytes) -> None:
    """Writes secret bytes as one line `prefix` + base64, mode 0600, in one step."""
    paths.write_private(path, f"{prefix}{base64.b64encode(secret).decode()}\n".encode())


def read_secret(path: Path, prefix: str, *, check_permissions: bool = True) -> bytes:
    """The 32 bytes that `write_secret` wrote; raises ConfigError for any other file or one that others may read."""
    if check_permissions:
        paths.check_private(path, secret=True)
    try:
        text = path.read_bytes()[:4_096].decode("ascii", "replace").strip()
    except FileNotFoundError as error:
        raise ConfigError(f"there is no key file {path}", hint="clawnet init makes the keys of a new home") from error
    except OSError as error:
        raise ConfigError(f"cannot read the key file {path}: {error.strerror}") from error
    try:
        secret = base64.b64decode(text.removeprefix(prefix), validate=True)
    except (binascii.Error, ValueError):
        secret = b""
    if not text.startswith(prefix) or len(secret) != SEED_BYTES:
        raise ConfigError(
            f"{path} is no key file of this kind (it must start with {prefix!r})",
            hint="restore it from a backup or with: clawnet identity import",
        )
    return secret


def _multihash_of(peer_id: str) -> bytes:
    if not 0 < len(peer_id) <= _PEER_ID_CHARS_MAX:
        raise DataError(f"{_shown(peer_id)} is not a peer id")
    if peer_id.startswith(("1", "Qm")):
        try:
            return base58_decode(peer_id)
        except DataError as error:
            raise DataError(f"{_shown(peer_id)} is not a peer id: {error.message}") from error
    if peer_id.startswith("b"):
        body = peer_id[1:].upper()
        try:
            data = base64.b32decode(body + "=" * (-len(body) % 8))
        except (binascii.Error, ValueError) as error:
            raise DataError(f"{_shown(peer_id)} is not a peer id") from error
        if data.startswith(_CID_PREFIX):
            return data[len(_CID_PREFIX) :]
    raise DataError(f"{_shown(peer_id)} is not a peer id", hint="a clawnet peer id starts with 12D3KooW")


def _shown(text: str) -> str:
    return repr(text if len(text) <= 64 else text[:61] + "...")
