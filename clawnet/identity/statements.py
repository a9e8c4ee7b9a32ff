"""Signed statements: MessagePack of [payload bytes, signature]; the signature covers a domain tag and those bytes."""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Any, Final, TypeVar

import msgspec
from msgspec import Meta, Struct

from clawnet import limits
from clawnet.errors import NotPermittedError
from clawnet.identity.keys import KeyPair

STATEMENT_BYTES_MAX: Final = 4 * limits.KIB

_Body = TypeVar("_Body")


class Statement(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The two parts; the payload is kept as it came, so that nothing is ever re-encoded."""

    payload: Annotated[bytes, Meta(max_length=STATEMENT_BYTES_MAX)]
    signature: Annotated[bytes, Meta(min_length=64, max_length=64)]


_encode = msgspec.msgpack.Encoder().encode
_statement = msgspec.msgpack.Decoder(Statement)


def sign_statement(tag: bytes, body: Struct, key: KeyPair) -> bytes:
    """The statement of `body` by `key`."""
    payload = _encode(body)
    statement = _encode(Statement(payload, key.sign(tag + payload)))
    assert len(statement) <= STATEMENT_BYTES_MAX
    return statement


def open_statement(statement: bytes, what: str) -> Statement:
    """Payload and signature, the latter not verified; raises NotPermittedError when it is malformed or too large."""
    if len(statement) > STATEMENT_BYTES_MAX:
        raise NotPermittedError(f"the {what} has {len(statement)} bytes; the limit is {STATEMENT_BYTES_MAX}")
    try:
        return _statement.decode(statement)
    except (ValueError, RecursionError) as error:
        raise NotPermittedError(f"the {what} is malformed") from error


def decode_body(payload: bytes, kind: type[_Body], what: str) -> _Body:
    """The body of a statement; raises NotPermittedError when it is none of this kind."""
    try:
        return _decoder(kind).decode(payload)  # type: ignore[no-any-return, arg-type]
    except (ValueError, RecursionError) as error:
        raise NotPermittedError(f"the {what} is malformed: {error}") from error


@lru_cache(maxsize=16)
def _decoder(kind: Any) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(kind)
