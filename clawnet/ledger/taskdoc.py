"""The task document: what a payer and a payee agree on, named on both chains by its salted hash alone."""

from __future__ import annotations

from hashlib import sha256
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta, Struct

from clawnet import limits
from clawnet.errors import WireError
from clawnet.ledger.entries import U64, Bytes32

TASK_TAG: Final = b"clawnet/task/1"

Name = Annotated[str, Meta(max_length=limits.TEXT_CHARS_MAX)]
Word = Annotated[str, Meta(max_length=64)]


class _Part(Struct, frozen=True, array_like=True, gc=False, forbid_unknown_fields=True):
    pass


class TaskInput(_Part, frozen=True):
    """One input: a file, or a directory as a tar, content-addressed by `blob`. `mode` holds the permission bits."""

    name: Name
    kind: Literal["file", "tree"]
    blob: Bytes32
    bytes: U64
    mode: U64


class Condition(_Part, frozen=True):
    """One condition of the acceptance contract, such as ("exit_code", b"0") or ("output_sha256", 32 bytes)."""

    kind: Word
    value: Annotated[bytes, Meta(max_length=limits.CONTRACT_VALUE_BYTES_MAX)]


class TaskDocument(_Part, frozen=True):
    """All that the winner learns and both are bound by.

    `payload` is the encoded work itself, in the form that its kind defines. Delivery is acceptance where `acceptance`
    is empty. `secret` (32 random bytes) salts the hash and takes part in the seal of the result.
    """

    kind: Word
    payload: Annotated[bytes, Meta(max_length=limits.TASK_DOCUMENT_BYTES_MAX)]
    inputs: Annotated[list[TaskInput], Meta(max_length=limits.INPUTS_MAX)]
    acceptance: Annotated[list[Condition], Meta(max_length=limits.CONTRACT_CONDITIONS_MAX)]
    lease_s: Annotated[int, Meta(ge=1, le=86_400)]
    compare: bool
    dispute_s: Annotated[int, Meta(ge=0, le=30 * 86_400)]
    secret: Bytes32


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(TaskDocument)


def encode(document: TaskDocument) -> bytes:
    """The document's bytes, which are hashed, sent and kept as they are."""
    return _ENCODER.encode(document)


def decode(document: bytes) -> TaskDocument:
    """Raises WireError for anything that is not a task document within its bounds."""
    if len(document) > limits.TASK_DOCUMENT_BYTES_MAX:
        raise WireError(f"a task document of {len(document)} bytes")
    try:
        return _DECODER.decode(document)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise WireError(f"not a task document: {error}") from error


def task_hash(document: bytes) -> bytes:
    """The `task` of offers and lock lines."""
    return sha256(TASK_TAG + document).digest()
