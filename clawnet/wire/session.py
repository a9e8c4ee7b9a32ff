"""A control stream's session: both sides' signed Hello, then sealed batches each way; no I/O, clock or entropy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from hashlib import blake2b, sha256
from typing import Annotated, Final

from msgspec import Meta, Struct

from clawnet import limits
from clawnet.errors import InternalError, LinkError, MessageTooOld, Replayed, SignatureRefused, WireError
from clawnet.wire.batch import (
    BATCH_OVERHEAD_BYTES,
    ENVELOPE_OVERHEAD_BYTES,
    Batch,
    Verify,
    decode_batch,
    evidence,
    frame,
    hashes_of,
    signed_bytes,
)
from clawnet.wire.codec import decode_struct, encode, encode_payload
from clawnet.wire.envelope import encode_envelope
from clawnet.wire.messages import U32, Address, Bytes32, Bytes64, Hello, Kind, Message, Word

PROTOCOL_VERSION: Final = (1, 0)
HELLO_TAG: Final = b"clawnet/hello/1"
SESSION_TAG: Final = b"clawnet/session/1"

Sign = Callable[[bytes], bytes]
Item = tuple[Message, bytes | None, bytes | None]
"""A message with its reply_to and its obligation."""

Encoded = tuple[Kind, bytes, bytes | None, bytes | None]
"""The same with the payload encoded: kind, payload, reply_to, obligation."""


class HelloFacts(Struct, frozen=True):
    """What this node says of itself in every Hello."""

    mesh: bytes
    name: str
    certificates: list[bytes]
    rotations: list[bytes] = []


class SignedHello(Struct, frozen=True, array_like=True, gc=False, forbid_unknown_fields=True):
    """The first frame: the bytes of a Hello, and its author's signature over a domain tag and them."""

    hello: Annotated[bytes, Meta(max_length=limits.HELLO_BYTES_MAX)]
    signature: Bytes64


class HelloHead(Struct, frozen=True, array_like=True, gc=False):
    """The part of a Hello that no version changes, so that a version that is not served gets its refusal."""

    version: Annotated[list[U32], Meta(min_length=2, max_length=2)]
    agent: Word
    peer: Address
    remote: Address
    mesh: Bytes32
    nonce: Bytes32


def session_id(peer: str, nonce: bytes, other_peer: str, other_nonce: bytes) -> bytes:
    """The same 32 bytes at both sides, new for every control stream."""
    sides = sorted(((peer.encode(), nonce), (other_peer.encode(), other_nonce)))
    parts = [SESSION_TAG, *(bytes([len(name)]) + name for name, _ in sides), *(fresh for _, fresh in sides)]
    return sha256(b"".join(parts)).digest()


def version_refusal(version: list[int]) -> str:
    """Empty when a peer of this version is served: the same, or one minor step to either side (the newer serves)."""
    major, minor = PROTOCOL_VERSION
    if version[0] == major and abs(version[1] - minor) <= 1:
        return ""
    theirs = f"{version[0]}.{version[1]}"
    newer = tuple(version) > PROTOCOL_VERSION
    return f"protocol {theirs} is not served by {major}.{minor}; update " + ("this node" if newer else "the other node")


def clock_refusal(time_ms: int, now_ms: int, what: str) -> str:
    """Empty when `time_ms` is near enough to this node's clock."""
    ahead_ms = time_ms - now_ms
    if abs(ahead_ms) <= limits.MESSAGE_AGE_MS:
        return ""
    return f"{what} is {abs(ahead_ms) // 1000} s {'ahead of' if ahead_ms > 0 else 'behind'} this node's clock"


class Handshake:
    """One side of a control stream before its session: `frame` goes out, the peer's first frame goes to receive."""

    def __init__(
        self,
        local: str,
        remote: str,
        facts: HelloFacts,
        *,
        agent: str,
        nonce: bytes,
        now_ms: int,
        sign: Sign,
        verify: Verify,
    ) -> None:
        if len(nonce) != 32:
            raise InternalError(f"a Hello needs 32 fresh bytes, not {len(nonce)}")
        self.local = local
        self.remote = remote
        self.session: Session | None = None
        self._nonce = nonce
        self._sign = sign
        self._verify = verify
        hello = encode(
            Hello(
                version=list(PROTOCOL_VERSION),
                agent=agent,
                peer=local,
                remote=remote,
                mesh=facts.mesh,
                nonce=nonce,
                time_ms=now_ms,
                name=facts.name,
                certificates=facts.certificates,
                rotations=facts.rotations,
            )
        )
        self.frame = frame(encode(SignedHello(hello, sign(HELLO_TAG + hello))))

    def receive(self, body: bytes, now_ms: int) -> Hello:
        """The other side's Hello, checked for signature, names, version and clock.

        `session` is set as soon as the signature and the names hold, so a refusal for another reason (LinkError for a
        version, MessageTooOld for a clock) can still be told in a sealed Disconnect.
        """
        signed = decode_struct(SignedHello, body, limits.HELLO_BYTES_MAX)
        if not self._verify(HELLO_TAG + signed.hello, signed.signature):
            raise SignatureRefused(f"the hello is not signed by {self.remote}")
        head = decode_struct(HelloHead, signed.hello, limits.HELLO_BYTES_MAX)
        if head.peer != self.remote:
            raise SignatureRefused(f"the hello names {head.peer}, the connection is with {self.remote}")
        if head.remote != self.local:
            raise SignatureRefused(f"the hello is meant for {head.remote}, not for {self.local}")
        self.session = Session(
            session_id(self.local, self._nonce, self.remote, head.nonce),
            self.local,
            self.remote,
            sign=self._sign,
            verify=self._verify,
        )
        if refusal := version_refusal(head.version):
            raise LinkError(refusal)
        hello = decode_struct(Hello, signed.hello, limits.HELLO_BYTES_MAX)
        if refusal := clock_refusal(hello.time_ms, now_ms, f"the clock of {self.remote}"):
            raise MessageTooOld(refusal)
        return hello


class Refusals:
    """How many batches of this session were not taken, by reason."""

    __slots__ = ("age", "format", "sequence", "signature")

    def __init__(self) -> None:
        self.format = 0
        self.signature = 0
        self.sequence = 0
        self.age = 0


class Session:
    """Seals what goes out and opens what comes in; a batch is valid once, at one place of one session."""

    __slots__ = ("_ids", "_ids_key", "_seq_in", "_seq_out", "_sign", "_verify", "id", "local", "refused", "remote")

    def __init__(self, session: bytes, local: str, remote: str, *, sign: Sign, verify: Verify) -> None:
        self.id = session
        self.local = local
        self.remote = remote
        self.refused = Refusals()
        self._sign = sign
        self._verify = verify
        self._seq_out = 0
        self._seq_in = 0
        self._ids = 0
        self._ids_key = sha256(session + local.encode()).digest()

    def seal(self, items: Iterable[Item], now_ms: int) -> bytes:
        """Frames that hold these messages in order: one batch, one signature, unless the limits ask for more."""
        encoded: list[Encoded] = []
        for message, reply_to, obligation in items:
            kind, payload = encode_payload(message)
            encoded.append((kind, payload, reply_to, obligation))
        return self.seal_encoded(encoded, now_ms)

    def seal_encoded(self, items: Iterable[Encoded], now_ms: int) -> bytes:
        """As seal, for payloads that are encoded already (one message to many peers)."""
        frames: list[bytes] = []
        envelopes: list[bytes] = []
        room = limits.BATCH_BYTES_MAX - BATCH_OVERHEAD_BYTES
        for kind, payload, reply_to, obligation in items:
            envelope = encode_envelope(kind, self._next_id(), reply_to, obligation, payload)
            need = len(envelope) + ENVELOPE_OVERHEAD_BYTES
            if envelopes and (need > room or len(envelopes) == limits.BATCH_ENVELOPES_MAX):
                frames.append(self._batch(envelopes, now_ms))
                envelopes = []
                room = limits.BATCH_BYTES_MAX - BATCH_OVERHEAD_BYTES
            envelopes.append(envelope)
            room -= need
        if envelopes:
            frames.append(self._batch(envelopes, now_ms))
        return frames[0] if len(frames) == 1 else b"".join(frames)

    def open(self, body: bytes, now_ms: int) -> Batch:
        """The batch in a frame, proven to be the peer's, new, and of now. Payloads are still undecoded.

        WireError, SignatureRefused (not the peer's), Replayed (out of its place) or MessageTooOld otherwise, each
        counted.
        """
        try:
            batch = decode_batch(body)
        except WireError:
            self.refused.format += 1
            raise
        if batch.session != self.id or batch.seq <= self._seq_in:
            self.refused.sequence += 1
            raise Replayed(f"batch {batch.seq} of {self.remote} is out of sequence or of another session")
        if not self._verify(
            signed_bytes(batch.session, batch.seq, batch.time_ms, hashes_of(batch.envelopes)), batch.signature
        ):
            self.refused.signature += 1
            raise SignatureRefused(f"batch {batch.seq} is not signed by {self.remote}")
        self._seq_in = batch.seq
        if refusal := clock_refusal(batch.time_ms, now_ms, f"batch {batch.seq} of {self.remote}"):
            self.refused.age += 1
            raise MessageTooOld(refusal)
        return batch

    def evidence(self, batch: Batch, index: int) -> bytes:
        """Proof for third parties that the peer sent the envelope at `index` of this batch (batch.verify_evidence)."""
        return evidence(batch, index, self.remote)

    def _batch(self, envelopes: list[bytes], now_ms: int) -> bytes:
        self._seq_out += 1
        seq = self._seq_out
        signature = self._sign(signed_bytes(self.id, seq, now_ms, hashes_of(envelopes)))
        return frame(encode(Batch(self.id, seq, now_ms, envelopes, signature)))

    def _next_id(self) -> bytes:
        self._ids += 1
        return blake2b(self._ids.to_bytes(8, "big"), digest_size=16, key=self._ids_key).digest()
