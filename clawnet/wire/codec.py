"""Payload bytes to messages and back: one strict decoder per kind, every failure one WireError."""

from __future__ import annotations

from typing import Any, Final, TypeVar

import msgspec

from clawnet import limits
from clawnet.errors import InternalError, WireError
from clawnet.wire.messages import KIND_OF, PAYLOADS, JoinAnswer, JoinAsk, Kind, Message, PeerCard, Relayed

S = TypeVar("S", bound=msgspec.Struct)

MALFORMED: Final = (ValueError, RecursionError)
"""What msgspec raises on hostile bytes: its own errors and UnicodeDecodeError are ValueErrors; deep nesting is not."""

_encoder: Final = msgspec.msgpack.Encoder()
encode: Final = _encoder.encode
"""MessagePack of any struct of ours."""

_PAYLOAD_DECODERS: Final[dict[int, msgspec.msgpack.Decoder[Message]]] = {
    kind.value: msgspec.msgpack.Decoder(payload) for kind, payload in PAYLOADS.items()
}
_STRUCTS: Final[tuple[type[Any], ...]] = (*PAYLOADS.values(), JoinAsk, JoinAnswer, PeerCard, Relayed)
_STRUCT_DECODERS: Final[dict[type[Any], msgspec.msgpack.Decoder[Any]]] = {
    struct: msgspec.msgpack.Decoder(struct) for struct in _STRUCTS
}


def encode_payload(message: Message) -> tuple[Kind, bytes]:
    """The kind and the payload bytes of a control message."""
    kind = KIND_OF.get(type(message))
    if kind is None:
        raise InternalError(f"{type(message).__name__} is no control message")
    return kind, encode(message)


def decode_payload(kind: int, raw: bytes | memoryview | msgspec.Raw) -> Message:
    """The message of this kind that `raw` holds; WireError for an unknown kind or anything malformed."""
    decoder = _PAYLOAD_DECODERS.get(kind)
    if decoder is None:
        raise WireError(f"message kind {kind} is not known here")
    try:
        return decoder.decode(raw)
    except MALFORMED as problem:
        raise WireError(f"malformed {Kind(kind).name}: {problem}") from problem


def decode_struct(struct: type[S], raw: bytes | memoryview, bytes_max: int = limits.ENVELOPE_BYTES_MAX) -> S:
    """One struct that travels outside batches (Hello, JoinAsk, PeerCard ...); its size is checked before parsing."""
    if len(raw) > bytes_max:
        raise WireError(f"{struct.__name__} of {len(raw)} bytes; at most {bytes_max} are taken")
    decoder = _STRUCT_DECODERS.get(struct)
    if decoder is None:
        decoder = _STRUCT_DECODERS[struct] = msgspec.msgpack.Decoder(struct)
    try:
        decoded: S = decoder.decode(raw)
    except MALFORMED as problem:
        raise WireError(f"malformed {struct.__name__}: {problem}") from problem
    return decoded
