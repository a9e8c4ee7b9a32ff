"""A node's keys and membership as one passphrase-encrypted file, and back into an empty home."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct
from nacl import bindings
from nacl.exceptions import CryptoError

from clawnet import limits, paths
from clawnet.errors import DataError, NotPermittedError
from clawnet.identity.keys import KeyPair
from clawnet.identity.membership import (
    LocalMembership,
    is_initialised,
    load_escrow_seed,
    load_membership,
    load_mesh_key,
    save_escrow_seed,
    save_membership,
    save_mesh_key,
)
from clawnet.paths import Home

FORMAT: Final = "clawnet-identity"
PASSPHRASE_CHARS_MIN: Final = 8
OPS: Final = bindings.crypto_pwhash_argon2id_OPSLIMIT_MODERATE
MEMORY_BYTES: Final = bindings.crypto_pwhash_argon2id_MEMLIMIT_MODERATE
OPS_MAX: Final = 16
MEMORY_BYTES_MAX: Final = 1_024 * limits.MIB
FILE_BYTES_MAX: Final = limits.JOIN_BYTES_MAX


class Identity(Struct, frozen=True):
    """What is inside: everything that makes this node who it is. `owner_seed` is empty where the key lies elsewhere."""

    node_seed: bytes
    owner_seed: bytes
    mesh_key: bytes
    escrow_seed: bytes
    membership: LocalMembership


Ops = Annotated[int, Meta(ge=1, le=OPS_MAX)]
MemoryBytes = Annotated[int, Meta(ge=8 * limits.MIB, le=MEMORY_BYTES_MAX)]


class _Envelope(Struct, frozen=True):
    format: str
    v: int
    kdf: str
    ops: Ops
    memory_bytes: MemoryBytes
    salt: bytes
    box: bytes


def export_identity(
    home: Home, passphrase: str, entropy: Callable[[int], bytes], *, check_permissions: bool = True
) -> bytes:
    """The encrypted file: argon2id over the passphrase, then XSalsa20-Poly1305 over the keys and mesh.json.

    Raises DataError for a passphrase that is too short, ConfigError when the home is not initialised.
    """
    check_passphrase(passphrase)
    identity = collect(home, check_permissions=check_permissions)
    salt = entropy(bindings.crypto_pwhash_SALTBYTES)
    nonce = entropy(bindings.crypto_secretbox_NONCEBYTES)
    key = derive(passphrase, salt, OPS, MEMORY_BYTES)
    box = nonce + bindings.crypto_secretbox(msgspec.msgpack.encode(identity), nonce, key)
    envelope = _Envelope(FORMAT, 1, "argon2id13", OPS, MEMORY_BYTES, salt, box)
    return msgspec.json.format(msgspec.json.encode(envelope), indent=2) + b"\n"


def import_identity(home: Home, data: bytes, passphrase: str) -> str:
    """Writes the keys and membership of an exported file into a home without any; returns the peer id.

    Raises NotPermittedError when the home has keys already, DataError for a file or a passphrase that is wrong.
    """
    if is_initialised(home) or home.half_restored or home.node_key.exists() or home.database.exists():
        raise NotPermittedError(
            f"{home.dir} already holds a node; its keys are not overwritten",
            hint="import into an empty home: clawnet --home DIR identity import FILE",
        )
    identity = _open(data, passphrase)
    node = KeyPair.from_seed(identity.node_seed)
    identity.membership.verified(node.public)
    for directory in (home.dir, home.keys_dir, home.run_dir, home.data_dir, home.logs_dir):
        paths.make_private_dir(directory)
    install(home, identity)
    return node.peer_id


def collect(home: Home, *, check_permissions: bool = True) -> Identity:
    """Keys and membership of a home; raises ConfigError when it is not initialised."""
    check, owner = check_permissions, home.owner_key
    return Identity(
        node_seed=KeyPair.load(home.node_key, check_permissions=check).seed,
        owner_seed=KeyPair.load(owner, check_permissions=check).seed if owner.exists() else b"",
        mesh_key=load_mesh_key(home, check_permissions=check),
        escrow_seed=load_escrow_seed(home, check_permissions=check),
        membership=load_membership(home, check_permissions=check),
    )


def install(home: Home, identity: Identity) -> None:
    """Writes keys and membership; mesh.json last, and marked: these keys had a life elsewhere."""
    KeyPair.from_seed(identity.node_seed).save(home.node_key)
    if identity.owner_seed:
        KeyPair.from_seed(identity.owner_seed).save(home.owner_key)
    save_mesh_key(home, identity.mesh_key)
    save_escrow_seed(home, identity.escrow_seed)
    save_membership(home, msgspec.structs.replace(identity.membership, imported=True))


def _open(data: bytes, passphrase: str) -> Identity:
    if len(data) > FILE_BYTES_MAX:
        raise DataError(f"this is no exported identity: it has more than {FILE_BYTES_MAX} bytes")
    try:
        envelope = msgspec.json.decode(data, type=_Envelope)
    except (ValueError, RecursionError) as error:
        raise DataError("this is no exported identity", hint="clawnet identity export makes one") from error
    if envelope.format != FORMAT or envelope.v != 1 or envelope.kdf != "argon2id13":
        raise DataError("this identity was exported by a newer version of clawnet", hint="install that version")
    nonce_bytes = bindings.crypto_secretbox_NONCEBYTES
    if len(envelope.salt) != bindings.crypto_pwhash_SALTBYTES or len(envelope.box) <= nonce_bytes:
        raise DataError("the exported identity is damaged")
    key = derive(passphrase, envelope.salt, envelope.ops, envelope.memory_bytes)
    try:
        plain = bindings.crypto_secretbox_open(envelope.box[nonce_bytes:], envelope.box[:nonce_bytes], key)
        return msgspec.msgpack.decode(plain, type=Identity)
    except CryptoError as error:
        raise DataError("the passphrase is wrong, or the exported identity is damaged") from error
    except (ValueError, RecursionError) as error:
        raise DataError("the exported identity is damaged") from error


def derive(passphrase: str, salt: bytes, ops: int, memory_bytes: int) -> bytes:
    """The key that a passphrase stands for: argon2id."""
    return bindings.crypto_pwhash_alg(
        bindings.crypto_secretbox_KEYBYTES,
        passphrase.encode(),
        salt,
        ops,
        memory_bytes,
        bindings.crypto_pwhash_ALG_ARGON2ID13,
    )


def check_passphrase(passphrase: str) -> None:
    """Raises DataError for a passphrase that is too short to protect anything."""
    if len(passphrase) < PASSPHRASE_CHARS_MIN:
        raise DataError(
            f"the passphrase has {len(passphrase)} characters; it needs at least {PASSPHRASE_CHARS_MIN}",
            hint="the passphrase is the first line of --passphrase-file",
        )
