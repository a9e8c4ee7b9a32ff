"""Signed statements that are no entries: note, waiver, countersign. Each has its own domain tag.

A statement travels as a MessagePack array [payload bytes, signature]; the signature covers tag and payload exactly as
received.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256
from typing import Annotated, ClassVar, Final, Self

import msgspec
from msgspec import Meta, Struct

from clawnet.errors import SignatureRefused, WireError
from clawnet.ledger.entries import U64, Amount, Bytes32, Bytes64, Sign, Verify

STATEMENT_BYTES_MAX: Final = 4_096


class _Signed(Struct, frozen=True, array_like=True, gc=False, forbid_unknown_fields=True):
    payload: Annotated[bytes, Meta(max_length=STATEMENT_BYTES_MAX)]
    signature: Bytes64


_ENCODER = msgspec.msgpack.Encoder()
_SIGNED_DECODER = msgspec.msgpack.Decoder(_Signed)
_UNDECODABLE = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError)


class Statement(Struct, frozen=True, array_like=True, gc=False, forbid_unknown_fields=True):
    """Base: how a statement is encoded, signed and verified."""

    TAG: ClassVar[bytes] = b""

    def signed(self, sign: Sign) -> bytes:
        """The statement as it travels, signed with `sign`."""
        payload = _ENCODER.encode(self)
        return _ENCODER.encode(_Signed(payload, sign(self.TAG + payload)))

    @classmethod
    def read(cls, statement: bytes) -> Self:
        """Decodes without verifying. Raises WireError for anything that is not such a statement."""
        return cls._open(statement)[0]

    @classmethod
    def verified(cls, statement: bytes, signer: bytes, verify: Verify) -> Self:
        """Decodes what `signer` (a public key) signed.

        Raises WireError for anything that is not such a statement, SignatureRefused when the signature is not by
        `signer` over these bytes under this statement's tag.
        """
        body, signed = cls._open(statement)
        if not verify(signer, cls.TAG + signed.payload, signed.signature):
            raise SignatureRefused(f"the {cls.__name__.lower()} is not signed by the account it speaks for")
        return body

    @classmethod
    def verified_by_any(cls, statement: bytes, signers: Iterable[bytes], verify: Verify) -> Self:
        """As `verified`, for an account that had several keys: by whichever of them. Raises as that does."""
        body, signed = cls._open(statement)
        if not any(verify(signer, cls.TAG + signed.payload, signed.signature) for signer in signers):
            raise SignatureRefused(f"the {cls.__name__.lower()} is not signed by the account it speaks for")
        return body

    @classmethod
    def _open(cls, statement: bytes) -> tuple[Self, _Signed]:
        if len(statement) > STATEMENT_BYTES_MAX:
            raise WireError(f"a statement of {len(statement)} bytes")
        try:
            signed = _SIGNED_DECODER.decode(statement)
            return msgspec.msgpack.decode(signed.payload, type=cls), signed
        except _UNDECODABLE as error:
            raise WireError(f"not a {cls.__name__.lower()}: {error}") from error


class Note(Statement, frozen=True):
    """The payee's delivery of one part: what it asks, and which sealed bytes it stands by.

    `ct_hash` is the blob id of the sealed bytes, `key_hash` the SHA-256 of their key: together they fix the plaintext.
    `plain_hash` is only set where replicas are compared. `status` is the run's exit status word.
    """

    TAG = b"clawnet/note/1"

    mesh: Bytes32
    payer: Bytes32
    lock_hash: Bytes32
    line: U64
    part: U64
    amount_ucr: Amount
    ct_hash: Bytes32
    ct_bytes: U64
    key_hash: Bytes32
    status: Annotated[str, Meta(max_length=64)]
    plain_hash: Bytes32 | None
    time_ms: U64


class Waiver(Statement, frozen=True):
    """The payee gives back whatever of a line is not released by part `after_part` (0: everything)."""

    TAG = b"clawnet/waiver/1"

    mesh: Bytes32
    payer: Bytes32
    lock_hash: Bytes32
    line: U64
    after_part: U64


class Countersign(Statement, frozen=True):
    """Its signer audited this chain up to here, incomes included, and signed no other hash at this seq.

    `epoch` is 0 for an auditor; witnesses (a later increment) name theirs.
    """

    TAG = b"clawnet/countersign/1"

    mesh: Bytes32
    account: Bytes32
    seq: U64
    hash: Bytes32
    epoch: U64 = 0


def note_hash(note: bytes) -> bytes:
    """The hash of a signed note, by which a release names it."""
    return sha256(Note.TAG + note).digest()
