"""From raw bytes to an encrypted, multiplexed connection: multistream, noise, muxer. Pure: bytes in, bytes out.

The dialling side sends "/noise" and its first handshake message in one flight, since it would accept nothing else. The
muxer comes from the handshake's payloads when both sides know that extension, else from a second multistream round.
"""

from __future__ import annotations

from clawnet import limits
from clawnet.errors import WireError
from clawnet.identity.keys import KeyPair
from clawnet.net import multistream, noise, yamux

MUXERS = (yamux.PROTOCOL,)


class Upgrade:
    """One side of the upgrade: send `start()`, then feed `receive` and send what it returns until `done`.

    Then `peer` is proven, `channel` encrypts, `plain` holds decrypted bytes that belong to the muxer already, and
    `raw` those that were not decrypted yet.
    """

    def __init__(self, identity: KeyPair, *, initiator: bool, expected: str | None) -> None:
        self.done = False
        self.peer = ""
        self.plain = b""
        self.raw = bytearray()
        self.channel: noise.Channel | None = None
        self._handshake = noise.Handshake(identity, initiator=initiator, expected=expected, muxers=MUXERS)
        self._initiator = initiator
        self._select = _select(initiator, noise.PROTOCOL)

    def start(self) -> bytes:
        """The first flight: empty for the accepting side."""
        if isinstance(self._select, multistream.Responder):
            return b""
        return self._select.start() + noise.frame(self._handshake.start())

    def receive(self, data: bytes) -> bytes:
        """Takes what arrived and returns what to send; raises WireError or LinkError when this cannot succeed."""
        self.raw += data
        out = b""
        if not self._select.agreed and self.channel is None:
            taken, self.raw = bytes(self.raw), bytearray()
            out += self._select.receive(taken)
            if not self._select.agreed:
                return out
            self.raw += self._select.rest
        while not self.done:
            message = self._next_frame()
            if message is None:
                break
            out += self._on_handshake(message) if self.channel is None else self._on_muxer(message)
        return out

    def _next_frame(self) -> bytes | None:
        if len(self.raw) < 2:
            return None
        size = int.from_bytes(self.raw[:2], "big")
        if self.channel is None and size > limits.NOISE_PAYLOAD_BYTES_MAX:
            raise WireError(f"a noise handshake message of {size} bytes is too long")
        if len(self.raw) < 2 + size:
            return None
        message = bytes(self.raw[2 : 2 + size])
        del self.raw[: 2 + size]
        return message

    def _on_handshake(self, message: bytes) -> bytes:
        answer = self._handshake.receive(message)
        out = noise.frame(answer) if answer else b""
        if not self._handshake.done:
            return out
        self.peer = self._handshake.peer
        self.channel = self._handshake.channel()
        if self._handshake.muxer:
            self.done = True
            return out
        self._select = _select(self._initiator, yamux.PROTOCOL)
        if isinstance(self._select, multistream.Proposer):
            out += self.channel.seal(self._select.start())
        return out

    def _on_muxer(self, message: bytes) -> bytes:
        assert self.channel is not None
        answer = self._select.receive(self.channel.open(message))
        if self._select.agreed:
            self.plain = self._select.rest
            self.done = True
        return bytes(self.channel.seal(answer)) if answer else b""


def _select(initiator: bool, protocol: str) -> multistream.Proposer | multistream.Responder:
    return multistream.Proposer([protocol]) if initiator else multistream.Responder([protocol])
