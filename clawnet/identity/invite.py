"""Invites: one line of text that lets its holder join a mesh, made for copying and safe against a slip in it."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

from clawnet.errors import DataError
from clawnet.identity import multiaddr
from clawnet.identity.keys import peer_id_of, public_of

PREFIX: Final = "clawnet1"
TEXT_CHARS_MAX: Final = 4_096
ADDRESSES_MAX: Final = 16
CHECKSUM_BYTES: Final = 4
SECRET_BYTES: Final = 16

_LETTERS = re.compile(r"[A-Za-z0-9_-]*\Z")
_HINT = "copy the whole line that clawnet peer invite printed"


class Invite(Struct, frozen=True):
    """What a token says. `inviter` is the peer id of the one node that redeems it; `secret` is the right to join."""

    mesh: bytes
    inviter: str
    addresses: tuple[str, ...]
    secret: bytes
    ring: str
    expires_ms: int

    def encode(self) -> str:
        """The token: `clawnet1` and base64url of the fields and a checksum, without spaces or padding."""
        body = msgspec.msgpack.encode(
            _Wire(
                self.mesh,
                public_of(self.inviter),
                tuple(
                    multiaddr.parse(address).with_peer(None).to_bytes() for address in self.addresses[:ADDRESSES_MAX]
                ),
                self.secret,
                self.ring,
                self.expires_ms,
            )
        )
        return PREFIX + base64.urlsafe_b64encode(body + _checksum(body)).rstrip(b"=").decode()


class _Wire(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    mesh: Annotated[bytes, Meta(min_length=32, max_length=32)]
    inviter: Annotated[bytes, Meta(min_length=32, max_length=32)]
    addresses: Annotated[
        tuple[Annotated[bytes, Meta(max_length=multiaddr.BYTES_MAX)], ...], Meta(min_length=1, max_length=ADDRESSES_MAX)
    ]
    secret: Annotated[bytes, Meta(min_length=SECRET_BYTES, max_length=SECRET_BYTES)]
    ring: Annotated[str, Meta(pattern="^(own|member)$")]
    expires_ms: Annotated[int, Meta(ge=0, le=2**63 - 1)]


def decode(text: str) -> Invite:
    """The invite in a token; space around it and line breaks in it do not matter.

    Raises DataError that says whether it is no invite at all, cut off or mistyped, or made by a newer clawnet.
    """
    token = "".join(text.split()) if len(text) <= 2 * TEXT_CHARS_MAX else text
    if len(token) > TEXT_CHARS_MAX:
        raise DataError(f"this is no invite: it has more than {TEXT_CHARS_MAX} characters", hint=_HINT)
    if not token.startswith(PREFIX):
        newer = re.match(r"clawnet\d", token)
        reason = (
            "this invite was made by a newer clawnet" if newer else f"this is no invite: it must start with {PREFIX}"
        )
        raise DataError(reason, hint="install the version that made it" if newer else _HINT)
    body64 = token.removeprefix(PREFIX)
    try:
        data = base64.urlsafe_b64decode(body64 + "=" * (-len(body64) % 4)) if _LETTERS.match(body64) else b""
    except (binascii.Error, ValueError):
        data = b""
    body, checksum = data[:-CHECKSUM_BYTES], data[-CHECKSUM_BYTES:]
    if not body or _checksum(body) != checksum:
        raise DataError("this invite is incomplete or mistyped (its checksum is wrong)", hint=_HINT)
    try:
        wire = msgspec.msgpack.decode(body, type=_Wire)
        addresses = tuple(str(multiaddr.Multiaddr.from_bytes(address)) for address in wire.addresses)
    except (ValueError, RecursionError, DataError) as error:
        raise DataError(f"this invite is malformed: {error}", hint=_HINT) from error
    return Invite(wire.mesh, peer_id_of(wire.inviter), addresses, wire.secret, wire.ring, wire.expires_ms)


def _checksum(body: bytes) -> bytes:
    return hashlib.sha256(b"clawnet/invite/1" + body).digest()[:CHECKSUM_BYTES]
