"""The decoders against damaged input: a committed corpus, then mutations of it; only the wire's errors come out."""

from __future__ import annotations

import random
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

from clawnet import limits
from clawnet.errors import MessageTooOld, SignatureRefused, WireError
from clawnet.net.blobs import BlobAnswer, BlobRequest
from clawnet.wire.batch import Frames, decode_batch, verify_evidence
from clawnet.wire.codec import decode_payload, decode_struct
from clawnet.wire.envelope import decode_envelope
from clawnet.wire.messages import PAYLOADS, Hello, JoinAnswer, JoinAsk, PeerCard, Relayed
from clawnet.wire.session import Handshake, HelloFacts, SignedHello

CORPUS = sorted((Path(__file__).parent / "corpus" / "wire").glob("*.bin"))
MUTANTS = 300
REFUSALS = (WireError, SignatureRefused, MessageTooOld)


def _envelope(raw: bytes) -> None:
    decode_envelope(raw).message()


def _batch(raw: bytes) -> None:
    for envelope in decode_batch(raw).envelopes:
        try:
            _envelope(envelope)
        except WireError:
            continue


def _payloads(raw: bytes) -> None:
    for kind in PAYLOADS:
        try:
            decode_payload(kind, raw)
        except WireError:
            continue


def _hello(raw: bytes) -> None:
    handshake = Handshake(
        "me",
        "you",
        HelloFacts(bytes(32), "n", []),
        agent="clawnet/fuzz",
        nonce=bytes(32),
        now_ms=0,
        sign=lambda message: bytes(64),
        verify=lambda message, signature: True,
    )
    handshake.receive(raw, 0)


def _structs(raw: bytes) -> None:
    for struct in (Hello, JoinAsk, JoinAnswer, PeerCard, Relayed, SignedHello, BlobRequest, BlobAnswer):
        try:
            decode_struct(struct, raw, limits.HELLO_BYTES_MAX)
        except WireError:
            continue


def _evidence(raw: bytes) -> None:
    verify_evidence(raw, lambda peer, message, signature: True)


def _frames(raw: bytes) -> None:
    frames = Frames(1_000)
    for at in range(0, len(raw), 7):
        for body in frames.feed(raw[at : at + 7]):
            assert len(body) <= 1_000


READERS: dict[str, Callable[[bytes], None]] = {
    "envelope": _envelope,
    "batch": _batch,
    "payloads": _payloads,
    "hello": _hello,
    "structs": _structs,
    "evidence": _evidence,
    "frames": _frames,
}


def _mutant(raw: bytes, chance: random.Random) -> bytes:
    data = bytearray(raw)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data) + 1)
        match chance.randrange(5):
            case 0:
                data[at : at + 1] = bytes([chance.randrange(256)])
            case 1:
                data[at:at] = chance.randbytes(chance.randint(1, 8))
            case 2:
                del data[at : at + chance.randint(1, 16)]
            case 3:
                data[at : at + 5] = bytes([chance.choice((0xC6, 0xDB, 0xDD, 0xDF, 0xC9))]) + b"\xff\xff\xff\xff"
            case _:
                data[at:at] = bytes([chance.choice((0x91, 0x81, 0xC0, 0xC1, 0xCF))]) * chance.randint(1, 2_000)
    return bytes(data)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
def test_damaged_input_is_refused_in_the_wires_own_words(path: Path, reader: str) -> None:
    raw = path.read_bytes()
    chance = random.Random(int.from_bytes(sha256(raw + reader.encode()).digest()[:8], "big"))
    for data in (raw, *(_mutant(raw, chance) for _ in range(MUTANTS))):
        try:
            READERS[reader](data)
        except REFUSALS:
            continue


def test_the_corpus_is_there_and_its_good_inputs_are_taken() -> None:
    good = {path.stem: path.read_bytes() for path in CORPUS if path.stem.startswith("good-")}
    assert {"good-batch", "good-bid", "good-evidence", "good-hello", "good-join-ask"} <= good.keys()
    _batch(good["good-batch"])
    _envelope(good["good-bid"])
    _evidence(good["good-evidence"])
    decode_struct(SignedHello, good["good-hello"])
    decode_struct(JoinAsk, good["good-join-ask"])
