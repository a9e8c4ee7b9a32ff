"""The envelope around every control message: version, kind, id, what it answers, what it obliges to, payload."""

from __future__ import annotations

from typing import Annotated, Final

from msgspec import Meta, Raw, Struct
from msgspec.msgpack import Decoder

from clawnet import limits
from clawnet.errors import InternalError, WireError
from clawnet.wire.codec import MALFORMED, decode_payload, encode
from clawnet.wire.messages import Bytes16, Kind, Message

ENVELOPE_VERSION: Final = 1


class Envelope(Struct, frozen=True, array_like=True, gc=False, forbid_unknown_fields=True):
    """One message as it travels; `payload` is still the MessagePack bytes of the kind's struct."""

    version: Annotated[int, Meta(ge=0, le=255)]
    kind: Annotated[int, Meta(ge=0, le=65_535)]
    id: Bytes16
    reply_to: Bytes16 | None
    obligation: Bytes16 | None
    payload: Raw

    def message(self) -> Message:
        """The payload, decoded; WireError when it is not what the kind promises."""
        return decode_payload(self.kind, self.payload)


_decoder: Final = Decoder(Envelope)


def encode_envelope(
    kind: Kind, message_id: bytes, reply_to: bytes | None, obligation: bytes | None, payload: bytes
) -> bytes:
    """Envelope bytes. An envelope over the limit is a defect of the sender's node, not of the network."""
    raw = encode(Envelope(ENVELOPE_VERSION, int(kind), message_id, reply_to, obligation, Raw(payload)))
    if len(raw) > limits.ENVELOPE_BYTES_MAX:
        raise InternalError(f"a {kind.name} of {len(raw)} bytes was to be sent; {limits.ENVELOPE_BYTES_MAX} fit")
    return raw


def decode_envelope(raw: bytes) -> Envelope:
    """The envelope that `raw` holds; WireError for one that is too large, malformed, or of another version."""
    if len(raw) > limits.ENVELOPE_BYTES_MAX:
        raise WireError(f"envelope of {len(raw)} bytes; at most {limits.ENVELOPE_BYTES_MAX} are taken")
    try:
        envelope = _decoder.decode(raw)
    except MALFORMED as problem:
        raise WireError(f"malformed envelope: {problem}") from problem
    if envelope.version != ENVELOPE_VERSION:
        raise WireError(f"envelope version {envelope.version} is not known here")
    return envelope
