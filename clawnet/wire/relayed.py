"""Statements that travel on from node to node under their author's own signature, whoever carries them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from clawnet.errors import DataError, SignatureRefused, WireError
from clawnet.identity.keys import public_of, verify
from clawnet.wire.codec import decode_struct, encode
from clawnet.wire.messages import RELAYED_BYTES_MAX, Kind, Relayed

RELAYED_TAG: Final = b"clawnet/relayed/1"


def make_relayed(
    author: str, kind: Kind, body: bytes, *, identifier: bytes, time_ms: int, sign: Callable[[bytes], bytes]
) -> tuple[bytes, bytes]:
    """Statement and signature, as every carrier passes them on: the bytes are never encoded again."""
    statement = encode(Relayed(author, identifier, time_ms, kind, body))
    return statement, sign(RELAYED_TAG + statement)


def read_relayed(kind: Kind, statement: bytes) -> Relayed:
    """What a statement says, its signature still unchecked; WireError when it is malformed or of another kind."""
    read = decode_struct(Relayed, statement, RELAYED_BYTES_MAX)
    if read.kind != kind:
        raise WireError(f"a relayed statement of kind {read.kind} in a {kind.name}")
    return read


def check_relayed(read: Relayed, statement: bytes, signature: bytes) -> None:
    """SignatureRefused unless the author named signed these bytes."""
    try:
        public = public_of(read.author)
    except DataError as error:
        raise WireError(f"a relayed statement without an author: {error.message}") from error
    if not verify(public, RELAYED_TAG + statement, signature):
        raise SignatureRefused(f"a relayed statement is not signed by {read.author[-8:]}")
