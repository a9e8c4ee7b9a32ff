"""What is remembered of peers and invites (the rows `peers` and `invites`), and the names people call peers by."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from typing import Final

import msgspec
from msgspec import Struct, field

from clawnet import limits
from clawnet.errors import NotFoundError

JOIN_TAG: Final = b"clawnet/join-ask/1"
_PRINTABLE_MIN: Final = 32


class PeerRecord(Struct, array_like=True):
    """A member this node has met or heard of. `shown` is its pinned name; `card` the newest statement of its card.

    `last_ms` 0: known by its card alone, never connected. `ended`: its membership is over, and for what cause
    (identity/revocations.py).
    """

    peer: str
    account: bytes
    ring: str
    name: str
    shown: str
    owner: bytes
    inviter: str
    addresses: list[str]
    first_ms: int
    last_ms: int = 0
    banned: bool = False
    muted: bool = False
    card: bytes = b""
    signature: bytes = b""
    certificates: list[bytes] = field(default_factory=list)
    ended: str = ""
    rotations: list[bytes] = field(default_factory=list)
    """The rotate entries that lead from its account, which `peer` is the id of, to the key it has now."""


class InviteRecord(Struct, array_like=True):
    """An invite of ours. `credits_ucr` -1: the mesh's own grant. `redeemed` are node keys, so a lost answer repeats."""

    invite: bytes
    secret_hash: bytes
    ring: str
    expires_ms: int
    uses_left: int
    credits_ucr: int
    created_ms: int
    redeemed: list[bytes] = field(default_factory=list)
    credential: str = ""
    ephemeral: bool = False


def join_bytes(mesh: bytes, secret: bytes, node_key: bytes, owner_key: bytes, name: str, time_ms: int) -> bytes:
    """What both proofs of a JoinAsk sign."""
    return JOIN_TAG + msgspec.msgpack.encode(
        [mesh, hashlib.sha256(secret).digest(), node_key, owner_key, name, time_ms]
    )


def secret_hash(secret: bytes) -> bytes:
    """How an invite is stored: whoever reads the database cannot redeem it."""
    return hashlib.sha256(b"clawnet/invite/1" + secret).digest()


def clean_name(name: str) -> str:
    """A name as it may be shown at a terminal: printable, no control characters, bounded, never empty."""
    if name.isalnum() and name.isascii():
        return name[: limits.NAME_CHARS_MAX]
    text = "".join(c for c in name if ord(c) >= _PRINTABLE_MIN and c.isprintable() and c not in "~/\\")
    return text[: limits.NAME_CHARS_MAX].strip() or "unnamed"


def pin_name(wanted: str, taken: Callable[[str], bool]) -> str:
    """The name a newcomer is shown by: its own, or `alice~2` when alice is another."""
    name = clean_name(wanted)
    if not taken(name):
        return name
    number = 2
    while taken(f"{name}~{number}"):
        number += 1
    return f"{name}~{number}"


def resolve(text: str, records: Iterable[PeerRecord], present: Callable[[str], str] = lambda peer: peer) -> str:
    """The peer id that a name, an id or an unambiguous prefix (or suffix, as shown) of one stands for.

    `present` tells the id by which a record's peer goes now. Raises NotFoundError when none matches or several do; the
    message lists those.
    """
    found: list[PeerRecord] = []
    for record in records:
        if record.peer == text or record.shown == text:
            return record.peer
        peer = present(record.peer)
        if len(text) >= 4 and (peer.startswith(text) or peer.endswith(text)):
            found.append(record)
    if len(found) == 1:
        return found[0].peer
    if found:
        names = ", ".join(f"{record.shown} ({present(record.peer)[-8:]})" for record in found[:8])
        raise NotFoundError(f"{text!r} stands for several peers: {names}", hint="give more of the id, or the name")
    raise NotFoundError(f"no peer {text!r} is known", hint="clawnet peer list shows names and ids")
