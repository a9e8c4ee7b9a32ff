"""/noise: the libp2p secure channel, Noise_XX_25519_ChaChaPoly_SHA256 with the identity proof in its payload. Pure.

https://github.com/libp2p/specs/blob/master/noise/README.md; the stream muxer may be agreed in the same payloads
(connections/inlined-muxer-negotiation.md). The ephemeral and static Curve25519 keys are made by the noiseprotocol
library for every handshake; what lasts is the Ed25519 identity that signs the static key.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from noise.connection import NoiseConnection
from noise.exceptions import NoiseHandshakeError, NoiseInvalidMessage, NoiseValueError

from clawnet import limits
from clawnet.errors import LinkError, WireError
from clawnet.identity.keys import KeyPair, peer_id_of, verify
from clawnet.net import protobuf
from clawnet.net.identify import decode_key, encode_key

PROTOCOL = "/noise"
NAME = b"Noise_XX_25519_ChaChaPoly_SHA256"
FRAME_BYTES_MAX = 65_535
TAG_BYTES = 16
PLAIN_BYTES_MAX = FRAME_BYTES_MAX - TAG_BYTES
FRAME_BYTES_MORE = 2 + TAG_BYTES  # what a frame has on the wire besides its content

_SIGNED_PREFIX = b"noise-libp2p-static-key:"
_IDENTITY_KEY, _IDENTITY_SIGNATURE, _EXTENSIONS = 1, 2, 4
_MUXERS = 2
_MUXERS_MAX = 32


class Payload:
    """What a handshake message proves and offers: the identity key, its signature, the muxers it can speak."""

    __slots__ = ("muxers", "public", "signature")

    def __init__(self, public: bytes, signature: bytes, muxers: Sequence[str]) -> None:
        self.public = public
        self.signature = signature
        self.muxers = tuple(muxers)

    def encode(self) -> bytes:
        """The NoiseHandshakePayload message."""
        extensions = protobuf.encode((_MUXERS, muxer.encode()) for muxer in self.muxers)
        fields: list[tuple[int, int | bytes]] = [
            (_IDENTITY_KEY, encode_key(self.public)),
            (_IDENTITY_SIGNATURE, self.signature),
        ]
        if extensions:
            fields.append((_EXTENSIONS, extensions))
        return protobuf.encode(fields)

    @classmethod
    def decode(cls, data: bytes) -> Payload:
        """Raises WireError when the bytes are no payload or the key is no Ed25519 key."""
        if len(data) > limits.NOISE_PAYLOAD_BYTES_MAX:
            raise WireError(f"a noise payload of {len(data)} bytes is too long")
        fields = protobuf.decode(data)
        extensions = protobuf.decode(protobuf.one_bytes(fields, _EXTENSIONS))
        muxers = protobuf.all_bytes(extensions, _MUXERS)[:_MUXERS_MAX]
        return cls(
            decode_key(protobuf.one_bytes(fields, _IDENTITY_KEY)),
            protobuf.one_bytes(fields, _IDENTITY_SIGNATURE),
            [muxer.decode("utf-8", "replace") for muxer in muxers],
        )

    def peer(self, static: bytes) -> str:
        """The peer id this proves for the static key of the channel; WireError when the proof is wrong."""
        if not verify(self.public, _SIGNED_PREFIX + static, self.signature):
            raise WireError("the peer's noise key is not signed by its identity key")
        return peer_id_of(self.public)


class Handshake:
    """One side of the handshake: `start` (the initiator), then `receive` whole messages until `done`.

    After that `peer` is proven, `muxer` is what both agreed on ("" when the peer offers none here) and `channel` is
    ready. Message framing (two length bytes) is the caller's, as `frame` does it.
    """

    def __init__(self, identity: KeyPair, *, initiator: bool, expected: str | None, muxers: Sequence[str]) -> None:
        self.peer = ""
        self.muxer = ""
        self.done = False
        self._answered = False
        self._identity = identity
        self._initiator = initiator
        self._expected = expected
        self._muxers = tuple(muxers)
        self._noise = NoiseConnection.from_name(NAME)
        if initiator:
            self._noise.set_as_initiator()
        else:
            self._noise.set_as_responder()
        static: Any = self._noise.noise_protocol.dh_fn.generate_keypair()
        self._noise.noise_protocol.keypairs["s"] = static
        self._static_public: bytes = static.public_bytes
        self._noise.start_handshake()
        # The library forgets this object when the handshake ends, and with it the other side's static key.
        self._state: Any = self._noise.noise_protocol.handshake_state

    def start(self) -> bytes:
        """The initiator's first message: an ephemeral key alone."""
        return self._write(b"")

    def receive(self, message: bytes) -> bytes:
        """Takes the peer's next message and returns the answer, b"" when none is due.

        Raises WireError (no valid handshake) or LinkError (another peer than expected).
        """
        payload = self._read(message)
        if self._initiator:
            self._check(payload)
            answer = self._write(self._payload())
            self.done = True
            return answer
        if not self._answered:
            # The first message is not encrypted yet; the specification puts nothing into its payload.
            self._answered = True
            return self._write(self._payload())
        self._check(payload)
        self.done = True
        return b""

    def channel(self) -> Channel:
        """The encrypted channel; once `done`."""
        assert self.done, "the handshake is not over"
        protocol = self._noise.noise_protocol
        return Channel(protocol.cipher_state_encrypt.cipher.cipher, protocol.cipher_state_decrypt.cipher.cipher)

    def _payload(self) -> bytes:
        signature = self._identity.sign(_SIGNED_PREFIX + self._static_public)
        return Payload(self._identity.public, signature, self._muxers).encode()

    def _check(self, raw: bytes) -> None:
        payload = Payload.decode(raw)
        self.peer = payload.peer(self._state.rs.public_bytes)
        if self._expected is not None and self.peer != self._expected:
            raise LinkError(f"the other side is {self.peer}, not {self._expected}", found=self.peer)
        preferred, known = (self._muxers, payload.muxers) if self._initiator else (payload.muxers, self._muxers)
        self.muxer = next((muxer for muxer in preferred if muxer in known), "")

    def _read(self, message: bytes) -> bytes:
        try:
            return bytes(self._noise.read_message(message))
        except (InvalidTag, NoiseHandshakeError, NoiseInvalidMessage, NoiseValueError, ValueError) as error:
            raise WireError("the noise handshake failed") from error

    def _write(self, payload: bytes) -> bytes:
        try:
            return bytes(self._noise.write_message(payload))
        except ValueError as error:
            raise WireError("the noise handshake failed") from error


class Channel:
    """The two directions after the handshake. The nonce counts frames, so order and completeness are proven too."""

    __slots__ = ("_decrypt", "_encrypt", "_encrypt_into", "_received", "_sent")

    def __init__(self, sending: ChaCha20Poly1305, receiving: ChaCha20Poly1305) -> None:
        self._encrypt = sending.encrypt
        self._encrypt_into: Any = getattr(sending, "encrypt_into", None) or self._encrypt_and_copy
        self._decrypt = receiving.decrypt
        self._sent = 0
        self._received = 0

    def seal(self, plain: bytes) -> bytes | bytearray:
        """What goes on the wire for it: frames one after the other, length bytes included."""
        if len(plain) <= PLAIN_BYTES_MAX:
            sealed = self._encrypt(b"\0\0\0\0" + self._sent.to_bytes(8, "little"), plain, None)
            self._sent += 1
            return len(sealed).to_bytes(2, "big") + sealed
        view = memoryview(plain)
        starts = range(0, len(view), PLAIN_BYTES_MAX)
        out = bytearray(len(view) + len(starts) * FRAME_BYTES_MORE)
        wire = memoryview(out)
        at = 0
        for start in starts:
            part = view[start : start + PLAIN_BYTES_MAX]
            stop = at + len(part) + FRAME_BYTES_MORE
            wire[at : at + 2] = (len(part) + TAG_BYTES).to_bytes(2, "big")
            self._encrypt_into(b"\0\0\0\0" + self._sent.to_bytes(8, "little"), part, None, wire[at + 2 : stop])
            self._sent += 1
            at = stop
        return out

    def _encrypt_and_copy(self, nonce: bytes, data: memoryview, associated: None, buf: memoryview) -> None:
        """What encrypt_into does, for releases of cryptography that do not have it yet."""
        buf[:] = self._encrypt(nonce, data, associated)

    def open(self, frame: bytes | memoryview) -> bytes:
        """The content of one frame without its length bytes; WireError when it was tampered with or is out of order."""
        try:
            plain = self._decrypt(b"\0\0\0\0" + self._received.to_bytes(8, "little"), frame, None)
        except (InvalidTag, ValueError) as error:
            raise WireError("an encrypted frame does not authenticate") from error
        self._received += 1
        return plain


def frame(message: bytes) -> bytes:
    """A handshake message with its two length bytes."""
    return len(message).to_bytes(2, "big") + message
