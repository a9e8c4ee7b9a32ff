"""Ledger entries: their formats (final), their hashes and signatures, strict parsing and building.

An entry on the wire and on disk is its MessagePack bytes followed by a 64-byte signature. Hash and signature cover the
exact bytes received; those bytes are kept and never encoded again (docs/LEDGER.md sections 2 and 3).
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from hashlib import sha256
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Raw, Struct

from clawnet import limits
from clawnet.errors import WireError
from clawnet.money import AMOUNT_UCR_MAX

ENTRY_VERSION: Final = 1
ENTRY_TAG: Final = b"clawnet/entry/1"
ENTRY_SIGNATURE_TAG: Final = b"clawnet/entry-signature/1"
POSSESSION_TAG: Final = b"clawnet/possession/1"
POW_TAG: Final = b"clawnet/pow/1"
SIGNATURE_BYTES: Final = 64
ZERO_HASH: Final = bytes(32)

Verify = Callable[[bytes, bytes, bytes], bool]
"""(public key, message, signature) -> does it verify; never raises."""
Sign = Callable[[bytes], bytes]

U64 = Annotated[int, Meta(ge=0)]  # MessagePack holds nothing above 2**64 - 1
Amount = Annotated[int, Meta(gt=0, le=AMOUNT_UCR_MAX)]
Bytes16 = Annotated[bytes, Meta(min_length=16, max_length=16)]
Bytes32 = Annotated[bytes, Meta(min_length=32, max_length=32)]
Bytes64 = Annotated[bytes, Meta(min_length=64, max_length=64)]


class EntryKind(IntEnum):
    """Numbers of the entry kinds. Verdict and roster belong to a later increment: recognised, not judged."""

    GENESIS = 0
    GRANT = 1
    SEND = 2
    LOCK = 3
    RELEASE = 4
    REFUND = 5
    CLAIM = 6
    CHECKPOINT = 7
    ROTATE = 8
    VERDICT = 9
    ROSTER = 10


class Body(Struct, frozen=True, array_like=True, gc=False, forbid_unknown_fields=True):
    """Base of all that lies inside an entry."""


class Proof(Body, frozen=True):
    """Evidence inside a refund or a claim: form 1 is a waiver (then the payee's rotate entries, if any).

    Other forms are certificates of witnesses, which this increment does not judge.
    """

    form: U64
    statements: Annotated[list[bytes], Meta(min_length=1, max_length=64)]


WAIVER_FORM: Final = 1


class Genesis(Body, frozen=True):
    """Opens a chain. `revocation` is a public key from the recovery phrase (zeros: none)."""

    revocation: Bytes32
    pow: Annotated[bytes, Meta(max_length=64)] | None


class Grant(Body, frozen=True):
    """An issuer creates `amount_ucr` for `payee`, once per payee."""

    payee: Bytes32
    amount_ucr: Amount
    invite: Bytes16


class Send(Body, frozen=True):
    """A plain payment."""

    payee: Bytes32
    amount_ucr: Amount
    memo_hash: Bytes32


class LockLine(Body, frozen=True):
    """One bound amount: `task` is the salted hash of a task document; paid in up to `parts` parts."""

    task: Bytes32
    payee: Bytes32
    amount_ucr: Amount
    parts: Annotated[int, Meta(ge=1, le=limits.PARTS_MAX)]


class Lock(Body, frozen=True):
    """Binds amounts to payees until `expiry_ms`. `epoch` null: unwitnessed."""

    deliver_by_ms: U64
    expiry_ms: U64
    epoch: U64 | None
    lines: Annotated[list[LockLine], Meta(min_length=1, max_length=limits.LOCK_LINES_MAX)]


class ReleaseItem(Body, frozen=True):
    """Pays one part of a line to whoever shows the key whose hash is `key_hash`: the payer's receipt."""

    lock_seq: U64
    line: U64
    part: U64
    amount_ucr: Amount
    key_hash: Bytes32
    note_hash: Bytes32


class Release(Body, frozen=True):
    """Receipts for delivered parts."""

    items: Annotated[list[ReleaseItem], Meta(min_length=1, max_length=limits.ENTRY_ITEMS_MAX)]


class RefundItem(Body, frozen=True):
    """Returns what is left of a line to its payer: at expiry, or before it with a proof."""

    lock_seq: U64
    line: U64
    proof: Proof | None


class Refund(Body, frozen=True):
    """Lines taken back."""

    items: Annotated[list[RefundItem], Meta(min_length=1, max_length=limits.ENTRY_ITEMS_MAX)]


class ClaimItem(Body, frozen=True):
    """Counts one payment: item `index` of the payer's entry (seq, hash); `key` opens a released result."""

    payer: Bytes32
    seq: U64
    hash: Bytes32
    index: U64
    amount_ucr: Amount
    key: Bytes32 | None
    proof: Proof | None


class Claim(Body, frozen=True):
    """Incomes."""

    items: Annotated[list[ClaimItem], Meta(min_length=1, max_length=limits.ENTRY_ITEMS_MAX)]


class Checkpoint(Body, frozen=True):
    """States the hash of the account's state before this entry, so that an audit may start here."""

    state_hash: Bytes32


class Rotate(Body, frozen=True):
    """From the next entry on `new_key` signs; `possession` shows that the author holds it."""

    new_key: Bytes32
    possession: Bytes64


BODIES: Final[dict[int, type[Body]]] = {
    EntryKind.GENESIS: Genesis,
    EntryKind.GRANT: Grant,
    EntryKind.SEND: Send,
    EntryKind.LOCK: Lock,
    EntryKind.RELEASE: Release,
    EntryKind.REFUND: Refund,
    EntryKind.CLAIM: Claim,
    EntryKind.CHECKPOINT: Checkpoint,
    EntryKind.ROTATE: Rotate,
}
LATER_KINDS: Final = frozenset({EntryKind.VERDICT, EntryKind.ROSTER})


class Entry(Struct, frozen=True, array_like=True, gc=False, forbid_unknown_fields=True):
    """The header with its body still encoded, as hashed and signed."""

    v: U64
    mesh: Bytes32
    account: Bytes32
    seq: U64
    prev: Bytes32
    time_ms: U64
    kind: U64
    body: Raw


class Parsed(Struct, frozen=True, gc=False):
    """One entry taken apart; nothing in it is trusted until a book has judged it.

    `raw` is what is stored and sent (entry and signature). With a `defect` the signed header holds a body that is no
    body of its kind (`body` is None): an invalid entry. With `upgrade` it holds a construct of a later increment.
    """

    raw: bytes
    hash: bytes
    mesh: bytes
    account: bytes
    seq: int
    prev: bytes
    time_ms: int
    kind: int
    body: Body | None
    defect: str = ""
    upgrade: str = ""

    @property
    def signature(self) -> bytes:
        """The author's signature over the entry's hash."""
        return self.raw[-SIGNATURE_BYTES:]


_ENTRY_DECODER = msgspec.msgpack.Decoder(Entry)
_BODY_DECODERS: Final = {int(kind): msgspec.msgpack.Decoder(body) for kind, body in BODIES.items()}
_ENCODER = msgspec.msgpack.Encoder()
_UNDECODABLE = (msgspec.MsgspecError, RecursionError, UnicodeDecodeError)


def entry_hash(entry: bytes) -> bytes:
    """The hash by which an entry (its bytes without the signature) is named and linked."""
    return sha256(ENTRY_TAG + entry).digest()


def parse(raw: bytes) -> Parsed:
    """Takes apart one entry with its signature, which is not verified here.

    Raises WireError for bytes that are no entry at all; a well-formed header with a wrong body is a Parsed with a
    `defect`, since its author can be held to it.
    """
    if not SIGNATURE_BYTES < len(raw) <= limits.ENTRY_BYTES_MAX + SIGNATURE_BYTES:
        raise WireError(f"an entry of {len(raw)} bytes")
    signed = raw[:-SIGNATURE_BYTES]
    try:
        header = _ENTRY_DECODER.decode(signed)
    except _UNDECODABLE as error:
        raise WireError(f"not a ledger entry: {error}") from error
    body: Body | None = None
    defect = upgrade = ""
    decoder = _BODY_DECODERS.get(header.kind)
    if header.v != ENTRY_VERSION:
        upgrade = f"entry version {header.v}"
    elif decoder is None:
        upgrade = f"entry kind {header.kind}"
    else:
        try:
            body = decoder.decode(header.body)
        except _UNDECODABLE as error:
            defect = f"malformed {EntryKind(header.kind).name.lower()}: {error}"
        else:
            upgrade = _later_construct(body)
    return Parsed(
        raw,
        sha256(ENTRY_TAG + signed).digest(),
        header.mesh,
        header.account,
        header.seq,
        header.prev,
        header.time_ms,
        header.kind,
        body,
        defect,
        upgrade,
    )


def _later_construct(body: Body) -> str:
    """Names what in this body only a later increment can judge; empty for everything of this one."""
    if isinstance(body, Claim):
        for item in body.items:
            if item.proof is not None:
                return "a claim by certificate"
    elif isinstance(body, Refund):
        if any(item.proof is not None and item.proof.form != WAIVER_FORM for item in body.items):
            return "a refund by certificate"
    elif isinstance(body, Lock) and body.epoch is not None:
        return "a witnessed lock"
    return ""


def kind_of(body: Body) -> EntryKind:
    """The kind number that goes with a body."""
    return _KIND_OF[type(body)]


_KIND_OF: Final = {body: EntryKind(kind) for kind, body in BODIES.items()}


def build(mesh: bytes, account: bytes, seq: int, prev: bytes, time_ms: int, body: Body, sign: Sign) -> Parsed:
    """Encodes and signs one entry. Whether it is valid is the caller's to know *before* this is called."""
    draft_entry = draft(mesh, account, seq, prev, time_ms, body)
    return with_signature(draft_entry, sign(ENTRY_SIGNATURE_TAG + draft_entry.hash))


def draft(mesh: bytes, account: bytes, seq: int, prev: bytes, time_ms: int, body: Body) -> Parsed:
    """An entry without its signature (64 zero bytes stand there), so that it can be judged before it is signed."""
    kind = _KIND_OF[type(body)]
    header = Entry(ENTRY_VERSION, mesh, account, seq, prev, time_ms, int(kind), Raw(_ENCODER.encode(body)))
    encoded = _ENCODER.encode(header)
    return Parsed(
        encoded + bytes(SIGNATURE_BYTES),
        sha256(ENTRY_TAG + encoded).digest(),
        mesh,
        account,
        seq,
        prev,
        time_ms,
        int(kind),
        body,
        "",
        _later_construct(body),
    )


def with_signature(entry: Parsed, signature: bytes) -> Parsed:
    """The same entry carrying this signature."""
    return msgspec.structs.replace(entry, raw=entry.raw[:-SIGNATURE_BYTES] + signature)


def signed_by(entry: Parsed, key: bytes, verify: Verify) -> bool:
    """Whether `key` signed this entry."""
    return verify(key, ENTRY_SIGNATURE_TAG + entry.hash, entry.raw[-SIGNATURE_BYTES:])


def possession_message(account: bytes, seq: int, prev: bytes) -> bytes:
    """What the new key signs in a rotate entry at this place of this chain."""
    return POSSESSION_TAG + account + seq.to_bytes(8, "big") + prev


def pow_bits_of(mesh: bytes, account: bytes, nonce: bytes) -> int:
    """Leading zero bits of the proof of work `nonce` for opening `account` in `mesh`."""
    value = int.from_bytes(sha256(POW_TAG + mesh + account + nonce).digest(), "big")
    return 256 - value.bit_length()
