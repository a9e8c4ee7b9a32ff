"""Datagrams for the QUIC endpoint: a corpus and its mutants, bytes that hypothesis makes up, and sound packets whose
frames are nonsense. Nothing of it may raise out of the endpoint, keep more than the bounds, or harm an honest peer.
"""

from __future__ import annotations

import asyncio
import random
import ssl
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from aioquic import tls
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.packet import QuicFrameType
from hypothesis import given, settings
from hypothesis import strategies as st

from clawnet import limits
from clawnet.identity.keys import KeyPair
from clawnet.net.doors import Doors
from clawnet.net.ping import Pinger
from clawnet.net.port import Connection
from clawnet.net.quic import Endpoint, QuicTransport
from clawnet.net.quic_tls import make_certificate

HERE = Path(__file__).parent / "corpus" / "quic"
CORPUS = sorted(HERE.glob("*.bin"))
ALICE, BOB = (KeyPair.from_seed(sha256(name).digest()) for name in (b"alice", b"bob"))
CERTIFICATE = make_certificate(ALICE)
FROM = ("127.0.0.1", 9)
MUTANTS = 120


def client() -> QuicConnection:
    """A dialler whose packets are sound until a test bends them."""
    configuration = QuicConfiguration(
        is_client=True, alpn_protocols=["libp2p"], verify_mode=ssl.CERT_NONE, connection_id_length=8
    )
    configuration.certificate, configuration.private_key = CERTIFICATE
    return QuicConnection(configuration=configuration)


def at_an_endpoint(body: Callable[[Endpoint], None]) -> None:
    """Runs `body` with a listening endpoint, then lets an honest peer in."""

    async def all_of_it() -> None:
        bob, alice = QuicTransport(BOB, [], "b"), QuicTransport(ALICE, [], "a")
        loop = asyncio.get_running_loop()
        raised: list[dict[str, Any]] = []
        loop.set_exception_handler(lambda _, context: raised.append(context))
        arrived: list[Connection] = []
        listener = await bob.listen("127.0.0.1", 0, arrived.append)
        (endpoint,) = bob._endpoints
        try:
            body(endpoint)
            assert endpoint.handshakes <= limits.PENDING_HANDSHAKES_MAX
            await asyncio.sleep(0)
            for link in list(endpoint._handshakes):
                link.abort("the fuzzer is done")
            link = await alice.dial(listener.addresses[0], BOB.peer_id)
            await Pinger(link).ping()
        finally:
            await listener.close()
            await alice.close()
            await bob.close()
        assert not raised, raised

    asyncio.run(asyncio.wait_for(all_of_it(), 60))


def mutants(raw: bytes, seed: int) -> list[bytes]:
    """Copies with flipped, cut, doubled and spliced bytes; most keep the size that a first datagram needs."""
    chance = random.Random(seed)
    made: list[bytes] = []
    for _ in range(MUTANTS):
        copy = bytearray(raw)
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(min(len(copy), 64) if chance.random() < 0.7 else len(copy) + 1)
            match chance.randrange(4):
                case 0:
                    copy[at : at + 1] = bytes([chance.choice((0, 1, 0x40, 0x7F, 0x80, 0xC0, 0xFF))])
                case 1:
                    del copy[at : at + chance.randint(1, 16)]
                case 2:
                    copy[at:at] = copy[: chance.randint(0, 40)]
                case _:
                    copy[at : at + 4] = chance.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\0\0\0\1"))
        made.append(bytes(copy).ljust(1200, b"\0") if chance.random() < 0.7 else bytes(copy))
    return made


def test_the_corpus_is_there() -> None:
    assert {path.stem for path in CORPUS} >= {"initial", "version", "retry", "short", "handshake", "token"}


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
def test_the_corpus_and_its_mutants(path: Path) -> None:
    raw = path.read_bytes()

    def body(endpoint: Endpoint) -> None:
        for data in (raw, *mutants(raw, int.from_bytes(sha256(raw).digest()[:8], "big"))):
            endpoint.datagram_received(data, FROM)

    at_an_endpoint(body)


def test_any_datagrams_at_all() -> None:
    def body(endpoint: Endpoint) -> None:
        @settings(max_examples=300, deadline=None, database=None)
        @given(
            st.sampled_from([b"", b"\x40", b"\xc0\0\0\0\1", b"\xf0\0\0\0\1\x08", b"\xc3\x6b\x33\x43\xcf"]), st.binary()
        )
        def check(head: bytes, tail: bytes) -> None:
            for data in (head + tail, (head + tail).ljust(1200, b"\0")):
                endpoint.datagram_received(data, FROM)

        check()

    at_an_endpoint(body)


FRAMES = st.one_of(
    st.binary(min_size=1, max_size=60),
    st.builds(
        lambda kind, numbers, tail: bytes([kind]) + b"".join(_number(n) for n in numbers) + tail,
        st.integers(0, 0x31),
        st.lists(st.one_of(st.integers(0, 70), st.sampled_from([255, 1024, 2**30, 2**62 - 1])), max_size=6),
        st.binary(max_size=30),
    ),
)


def _number(value: int) -> bytes:
    """A variable-length integer of RFC 9000, section 16."""
    for size, bound in ((1, 2**6), (2, 2**14), (4, 2**30), (8, 2**62)):
        if value < bound:
            return (value | (size.bit_length() - 1) << (8 * size - 2)).to_bytes(size, "big")
    raise ValueError(value)


class Exchange:
    """A dialler at an endpoint without a network between them."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.quic: Any = client()
        self._endpoint = endpoint
        self._back: list[bytes] = []
        endpoint.send = lambda data, address: self._back.append(data)  # type: ignore[method-assign]
        self.quic.connect(FROM, now=0.0)

    def turn(self) -> None:
        """What the dialler has to say, and what comes back."""
        for data, _ in self.quic.datagrams_to_send(now=0.0):
            self._endpoint.datagram_received(data, FROM)
        back, self._back[:] = list(self._back), []
        for data in back:
            self.quic.receive_datagram(data, FROM, now=0.0)

    def say(self, frames: bytes) -> None:
        """Any bytes in a sealed packet of an established connection, behind a PING."""

        def write(builder: Any, *_: Any, **__: Any) -> None:
            builder.start_frame(QuicFrameType.PING, capacity=1 + len(frames)).push_bytes(frames)

        self.quic._write_ping_frame = write
        self.quic.send_ping(0)
        self.turn()


def test_any_frames_in_sound_packets() -> None:
    def body(endpoint: Endpoint) -> None:
        send = endpoint.send

        @settings(max_examples=150, deadline=None, database=None)
        @given(st.lists(FRAMES, min_size=1, max_size=4))
        def check(said: list[bytes]) -> None:
            endpoint._doors = Doors()
            them = Exchange(endpoint)
            for _ in range(4):
                them.turn()
            assert them.quic._handshake_complete
            for frames in said:
                them.say(frames)
            for link in list(endpoint._cids):
                link.abort("enough")

        check()
        endpoint.send = send  # type: ignore[method-assign]

    at_an_endpoint(body)


@pytest.mark.parametrize("flight", [1, 2], ids=["client hello", "certificate"])
def test_any_change_to_the_tls_messages(flight: int) -> None:
    """Sound packets again, whose handshake messages are bent: the parser of TLS and of certificates reads them."""

    def body(endpoint: Endpoint) -> None:
        send = endpoint.send
        epoch = (None, tls.Epoch.INITIAL, tls.Epoch.HANDSHAKE)[flight]

        @settings(max_examples=150, deadline=None, database=None)
        @given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4))
        def check(changes: list[tuple[float, int]]) -> None:
            endpoint._doors = Doors()
            them = Exchange(endpoint)
            for _ in range(flight - 1):
                them.turn()
            sender = them.quic._crypto_streams[epoch].sender
            assert sender._buffer
            for where, value in changes:
                sender._buffer[int(where * (len(sender._buffer) - 1))] = value
            for _ in range(3):
                them.turn()
            for link in list(endpoint._cids):
                link.abort("enough")

        check()
        endpoint.send = send  # type: ignore[method-assign]

    at_an_endpoint(body)
