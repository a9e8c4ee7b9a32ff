"""Frames and batches on the control stream, and the evidence that one envelope of a batch gives to a third party.

A frame is a big-endian u32 length and that many bytes. The first frame of each side holds its Hello, all others a
batch: MessagePack [session id, sequence, time, [envelope, ...], signature], where the signature is the sender's over a
domain tag, the first three and the SHA-256 of every envelope.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from hashlib import sha256
from struct import Struct as Layout
from typing import Annotated, Final

from msgspec import Meta, Struct
from msgspec.msgpack import Decoder

from clawnet import limits
from clawnet.errors import SignatureRefused, WireError
from clawnet.wire.codec import MALFORMED, encode
from clawnet.wire.envelope import Envelope, decode_envelope
from clawnet.wire.messages import U64, Address, Bytes32, Bytes64

BATCH_TAG: Final = b"clawnet/batch/1"
BATCH_OVERHEAD_BYTES: Final = 160
ENVELOPE_OVERHEAD_BYTES: Final = 5

_LENGTH: Final = Layout(">I")
_HEADER: Final = Layout(">QQ")

Verify = Callable[[bytes, bytes], bool]
"""(message, signature) -> whether the one key that this function stands for made it."""

EnvelopeBytes = Annotated[bytes, Meta(min_length=1, max_length=limits.ENVELOPE_BYTES_MAX)]


class Batch(Struct, frozen=True, array_like=True, gc=False, forbid_unknown_fields=True):
    """What one side had for the other in one turn."""

    session: Bytes32
    seq: U64
    time_ms: U64
    envelopes: Annotated[list[EnvelopeBytes], Meta(min_length=1, max_length=limits.BATCH_ENVELOPES_MAX)]
    signature: Bytes64


class Evidence(Struct, frozen=True, array_like=True, gc=False, forbid_unknown_fields=True):
    """Proof that `author` sent `envelope` in `session` at `time_ms`; of the batch's others only hashes show."""

    author: Address
    session: Bytes32
    seq: U64
    time_ms: U64
    hashes: Annotated[list[Bytes32], Meta(min_length=1, max_length=limits.BATCH_ENVELOPES_MAX)]
    index: Annotated[int, Meta(ge=0, lt=limits.BATCH_ENVELOPES_MAX)]
    envelope: EnvelopeBytes
    signature: Bytes64


_batch_decoder: Final = Decoder(Batch)
_evidence_decoder: Final = Decoder(Evidence)


def signed_bytes(session: bytes, seq: int, time_ms: int, hashes: list[bytes]) -> bytes:
    """What the signature of a batch covers."""
    return b"".join((BATCH_TAG, session, _HEADER.pack(seq, time_ms), *hashes))


def hashes_of(envelopes: list[bytes]) -> list[bytes]:
    """SHA-256 of every envelope, in order."""
    return [sha256(envelope).digest() for envelope in envelopes]


def decode_batch(raw: bytes) -> Batch:
    """The batch that a frame holds, its signature not yet checked; WireError when it is none."""
    if len(raw) > limits.BATCH_BYTES_MAX:
        raise WireError(f"batch of {len(raw)} bytes; at most {limits.BATCH_BYTES_MAX} are taken")
    try:
        return _batch_decoder.decode(raw)
    except MALFORMED as problem:
        raise WireError(f"malformed batch: {problem}") from problem


def frame(body: bytes) -> bytes:
    """`body` with its length before it."""
    return _LENGTH.pack(len(body)) + body


def evidence(batch: Batch, index: int, author: str) -> bytes:
    """The envelope at `index` of a batch that `author` signed, with all a third party needs to verify it."""
    return encode(
        Evidence(
            author,
            batch.session,
            batch.seq,
            batch.time_ms,
            hashes_of(batch.envelopes),
            index,
            batch.envelopes[index],
            batch.signature,
        )
    )


def verify_evidence(raw: bytes, verify: Callable[[str, bytes, bytes], bool]) -> tuple[Evidence, Envelope]:
    """What the evidence proves; WireError or SignatureRefused when it proves nothing.

    `verify(peer id, message, signature)` checks against the key that the peer id names.
    """
    if len(raw) > limits.BATCH_BYTES_MAX:
        raise WireError(f"evidence of {len(raw)} bytes; at most {limits.BATCH_BYTES_MAX} are taken")
    try:
        shown = _evidence_decoder.decode(raw)
    except MALFORMED as problem:
        raise WireError(f"malformed evidence: {problem}") from problem
    if shown.index >= len(shown.hashes) or sha256(shown.envelope).digest() != shown.hashes[shown.index]:
        raise SignatureRefused("the evidence's envelope is not the one that was signed")
    if not verify(shown.author, signed_bytes(shown.session, shown.seq, shown.time_ms, shown.hashes), shown.signature):
        raise SignatureRefused(f"the evidence is not signed by {shown.author}")
    return shown, decode_envelope(shown.envelope)


class Frames:
    """Cuts a byte stream into frames. Holds one unfinished frame at most, and no room for bytes that have not come."""

    __slots__ = ("_pending", "bytes_max")

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self._pending = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Every frame that `data` completes, in order. A declared length of 0 or over the limit is a WireError.

        Consume the iterator before the next feed; `bytes_max` may change between two frames.
        """
        pending = self._pending
        if pending:
            pending += data
            data = bytes(pending) if self._complete(pending) else b""
            if not data:
                return
            pending.clear()
        start, end = 0, len(data)
        while end - start >= 4:
            length = self._length(data, start)
            if end - start - 4 < length:
                break
            yield data[start + 4 : start + 4 + length]
            start += 4 + length
        pending += data[start:]

    @property
    def unfinished(self) -> bool:
        """Whether a frame has begun that is not whole yet."""
        return bool(self._pending)

    def _complete(self, pending: bytearray) -> bool:
        return len(pending) >= 4 and len(pending) - 4 >= self._length(pending, 0)

    def _length(self, data: bytes | bytearray, start: int) -> int:
        length: int = _LENGTH.unpack_from(data, start)[0]
        if not 0 < length <= self.bytes_max:
            raise WireError(f"frame of {length} bytes; 1 to {self.bytes_max} are taken")
        return length
