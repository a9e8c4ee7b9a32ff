"""The link's decoders against damaged input: a committed corpus, mutations of it, and bytes hypothesis makes up.

Whatever arrives, a decoder returns or raises its own WireError or LinkError, and holds no more than its bound.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clawnet import limits
from clawnet.errors import LinkError, WireError
from clawnet.identity.keys import KeyPair
from clawnet.net import identify, multistream, protobuf
from clawnet.net.noise import Handshake, Payload
from clawnet.net.upgrade import Upgrade
from clawnet.net.yamux import MuxedStream, Session

HERE = Path(__file__).parent / "corpus" / "net"
OURS = KeyPair.from_seed(b"f" * 32)
MUTANTS = 150


def _multistream(raw: bytes) -> None:
    for side in (multistream.Responder(["/noise", "/a"]), multistream.Proposer(["/noise", "/a"])):
        try:
            for at in range(0, len(raw), 7):
                side.receive(raw[at : at + 7])
                # Only a proposer that is answered out of turn, or an agreement, leaves more than one line behind.
                assert side.agreed or len(side.rest) <= limits.MULTISTREAM_LINE_BYTES_MAX + 16
        except (WireError, LinkError):
            continue


def _payload(raw: bytes) -> None:
    Payload.decode(raw).peer(bytes(32))


def _identify(raw: bytes) -> None:
    said = identify.decode(raw, OURS.peer_id)
    assert len(said.protocols) <= limits.LIST_ITEMS_MAX and len(said.addresses) <= limits.DIAL_ADDRESSES_MAX


def _protobuf(raw: bytes) -> None:
    fields = protobuf.decode(raw)
    assert sum(map(len, fields.values())) <= protobuf.FIELDS_MAX


def _handshake(raw: bytes) -> None:
    acceptor = Handshake(OURS, initiator=False, expected=None, muxers=())
    acceptor.receive(raw[:100])
    acceptor.receive(raw[100:])


def _upgrade(raw: bytes) -> None:
    for side in (Upgrade(OURS, initiator=False, expected=None), Upgrade(OURS, initiator=True, expected=None)):
        side.start()
        try:
            side.receive(raw)
        except (WireError, LinkError):
            continue
        assert not side.done


def _yamux(raw: bytes) -> None:
    async def body() -> None:
        accepted: list[MuxedStream] = []
        session = Session(
            cast(Any, SimpleNamespace(peer="somebody")),
            initiator=False,
            send=lambda data: None,
            push=lambda: None,
            is_open=lambda: True,
            accept=accepted.append,
            now=lambda: 0.0,
        )
        session.open().write_nowait(b"x")
        try:
            for at in range(0, len(raw), 5):
                session.receive(raw[at : at + 5])
        finally:
            assert len(session.streams) <= limits.STREAM_BACKLOG_MAX + 1
            assert all(stream.unread <= limits.STREAM_WINDOW_BYTES for stream in accepted)
            session.lost("over")
            assert not session.streams

    asyncio.run(body())


DECODERS: dict[str, Callable[[bytes], None]] = {
    "multistream": _multistream,
    "payload": _payload,
    "identify": _identify,
    "protobuf": _protobuf,
    "handshake": _handshake,
    "upgrade": _upgrade,
    "yamux": _yamux,
}
CORPUS = sorted(HERE.glob("*.bin"))


def _try(decode: Callable[[bytes], None], raw: bytes) -> None:
    with contextlib.suppress(WireError, LinkError):
        decode(raw)


def _mutants(raw: bytes, seed: int) -> list[bytes]:
    """Copies with flipped, cut, doubled and spliced bytes."""
    chance = random.Random(seed)
    made: list[bytes] = []
    for _ in range(MUTANTS):
        copy = bytearray(raw)
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(copy) + 1)
            match chance.randrange(4):
                case 0:
                    copy[at : at + 1] = bytes([chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))])
                case 1:
                    del copy[at : at + chance.randint(1, 16)]
                case 2:
                    copy[at:at] = copy[: chance.randint(0, 40)]
                case _:
                    copy[at : at + 4] = chance.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x80\0\0\0"))
        made.append(bytes(copy))
    return made


def test_the_corpus_is_there() -> None:
    assert {path.name.partition("-")[0] for path in CORPUS} == set(DECODERS)


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
def test_the_corpus_and_its_mutants(path: Path) -> None:
    raw = path.read_bytes()
    decode = DECODERS[path.name.partition("-")[0]]
    _try(decode, raw)
    for mutant in _mutants(raw, int.from_bytes(sha256(raw).digest()[:8], "big")):
        _try(decode, mutant)


@pytest.mark.parametrize("name", DECODERS)
def test_any_bytes_at_all(name: str) -> None:
    @settings(max_examples=60, deadline=None, database=None)
    @given(st.binary(max_size=400))
    def check(raw: bytes) -> None:
        _try(DECODERS[name], raw)

    check()


_FRAMES = st.lists(
    st.builds(
        lambda kind, flags, number, value, data: (
            bytes([0, kind])
            + flags.to_bytes(2, "big")
            + number.to_bytes(4, "big")
            + (len(data) if kind == 0 else value).to_bytes(4, "big")
            + (data if kind == 0 else b"")
        ),
        st.integers(0, 3),
        st.integers(0, 15),
        st.integers(0, 5),
        st.integers(0, 2**32 - 1),
        st.binary(max_size=20),
    ),
    max_size=30,
)


@settings(max_examples=150, deadline=None, database=None)
@given(_FRAMES)
def test_any_sequence_of_well_formed_yamux_frames(frames: list[bytes]) -> None:
    _try(_yamux, b"".join(frames))
