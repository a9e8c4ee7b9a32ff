"""QUIC beyond the contract: worthless certificates are refused, floods and garbage held off, and links move."""

from __future__ import annotations

import asyncio
import datetime
import os
import socket
import ssl
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aioquic.asyncio.client import connect
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection
from aioquic.quic.events import QuicEvent
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from clawnet import limits
from clawnet.errors import LinkError, WireError
from clawnet.identity.keys import KeyPair
from clawnet.net import multistream, quic_tls
from clawnet.net.ping import Pinger
from clawnet.net.port import Connection
from clawnet.net.quic import QuicListener, QuicTransport

ALICE = KeyPair.from_seed(b"a" * 32)
BOB = KeyPair.from_seed(b"b" * 32)
SINK = "/test/sink/1"
NOW = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)

Certificate = tuple[x509.Certificate, ec.EllipticCurvePrivateKey]


def certificate_with(
    *extensions: x509.UnrecognizedExtension,
    critical: bool = False,
    until: datetime.datetime = NOW + datetime.timedelta(days=9_999),
    signer: ec.EllipticCurvePrivateKey | None = None,
) -> Certificate:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "anybody")])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(7).not_valid_before(NOW - datetime.timedelta(days=1)).not_valid_after(until)
    for extension in extensions:
        builder = builder.add_extension(extension, critical=critical)
    return builder.sign(signer or key, hashes.SHA256()), key


def proof_of(certificate: x509.Certificate) -> x509.UnrecognizedExtension:
    value = certificate.extensions.get_extension_for_oid(quic_tls.EXTENSION).value
    assert isinstance(value, x509.UnrecognizedExtension)
    return value


def test_a_certificate_proves_its_identity() -> None:
    certificate, _ = quic_tls.make_certificate(ALICE)
    assert quic_tls.peer_of(certificate, NOW) == ALICE.peer_id


def test_certificates_that_prove_nothing_are_refused() -> None:
    stolen = proof_of(quic_tls.make_certificate(ALICE)[0])
    unknown = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00")
    bad: dict[str, Certificate] = {
        "names no libp2p identity": certificate_with(),
        "not signed by its identity key": certificate_with(stolen),
        "unknown critical extension": certificate_with(unknown, critical=True),
        "not valid now": certificate_with(stolen, until=NOW - datetime.timedelta(hours=1)),
        "not a sound self-signed": certificate_with(stolen, signer=ec.generate_private_key(ec.SECP256R1())),
    }
    for why, (certificate, _) in bad.items():
        with pytest.raises(WireError, match=why):
            quic_tls.peer_of(certificate, NOW)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_no_bent_proof_is_taken(data: st.DataObject) -> None:
    proof = bytearray(proof_of(quic_tls.make_certificate(ALICE)[0]).value)
    for _ in range(data.draw(st.integers(1, 3))):
        proof[data.draw(st.integers(0, len(proof) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(proof[: data.draw(st.integers(0, len(proof)))])
    certificate, _ = certificate_with(x509.UnrecognizedExtension(quic_tls.EXTENSION, cut))
    with pytest.raises(WireError):
        quic_tls.peer_of(certificate, NOW)


class Stage:
    """A listening transport, what came in, and its address."""

    def __init__(self, transport: QuicTransport, listener: QuicListener, arrived: asyncio.Queue[Connection]) -> None:
        self.transport, self.listener, self.arrived = transport, listener, arrived
        self.port = listener.addresses[0].port


def run(body: Callable[[Stage], Awaitable[None]]) -> None:
    async def all_of_it() -> None:
        transport = QuicTransport(BOB, [SINK], "b/1")
        arrived: asyncio.Queue[Connection] = asyncio.Queue()
        listener = await transport.listen("127.0.0.1", 0, arrived.put_nowait)
        try:
            await body(Stage(transport, listener, arrived))
        finally:
            await listener.close()
            await transport.close()

    asyncio.run(asyncio.wait_for(all_of_it(), 60))


async def good_link_works(stage: Stage) -> None:
    """An honest peer is served, whatever came before."""
    alice = QuicTransport(ALICE, [], "a/1")
    link = await alice.dial(stage.listener.addresses[0], BOB.peer_id)
    assert (await stage.arrived.get()).peer == ALICE.peer_id
    assert await Pinger(link).ping() >= 0
    link.close("done")
    await alice.close()


def client(certificate: Certificate | None, alpn: str = "libp2p") -> QuicConfiguration:
    configuration = QuicConfiguration(is_client=True, alpn_protocols=[alpn], verify_mode=ssl.CERT_NONE)
    if certificate is not None:
        configuration.certificate, configuration.private_key = certificate
    return configuration


class Deaf(QuicConnectionProtocol):
    """A client that does nothing with what it is sent."""

    def quic_event_received(self, event: QuicEvent) -> None:
        return


@pytest.mark.parametrize("shown", ["nothing", "no identity", "a stolen proof"])
def test_a_client_without_a_sound_certificate_never_becomes_a_connection(shown: str) -> None:
    stolen = proof_of(quic_tls.make_certificate(ALICE)[0])
    certificate = {"nothing": None, "no identity": certificate_with(), "a stolen proof": certificate_with(stolen)}

    async def body(stage: Stage) -> None:
        async with connect("127.0.0.1", stage.port, configuration=client(certificate[shown])) as protocol:
            await protocol.wait_closed()
        assert stage.arrived.empty()
        await good_link_works(stage)

    run(body)


def test_another_application_protocol_is_refused() -> None:
    async def body(stage: Stage) -> None:
        with pytest.raises(ConnectionError):
            async with connect("127.0.0.1", stage.port, configuration=client(certificate_with(), "h3")):
                pass
        assert stage.arrived.empty()
        await good_link_works(stage)

    run(body)


def test_garbage_and_other_versions_harm_nobody_who_comes_after() -> None:
    async def body(stage: Stage) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as raw:
            raw.connect(("127.0.0.1", stage.port))
            for i in range(2_000):
                head = (b"", b"\x40", b"\xc0\x00\x00\x00\x01\x08", b"\xc3\x6b\x33\x43\xcf\x08")[i % 4]
                raw.send((head + os.urandom(1_200))[: 1_200 if i % 3 else i % 64])
            await good_link_works(stage)

    run(body)


def test_half_open_handshakes_are_bounded_and_must_prove_their_address() -> None:
    async def body(stage: Stage) -> None:
        count = 4 * limits.PENDING_HANDSHAKES_MAX
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as raw:
            raw.connect(("127.0.0.1", stage.port))
            for _ in range(count):
                quic = QuicConnection(configuration=client(certificate_with()))
                quic.connect(("127.0.0.1", stage.port), now=0.0)
                raw.send(quic.datagrams_to_send(now=0.0)[0][0])
            await good_link_works(stage)
            assert 0 < stage.listener.handshakes <= limits.PENDING_HANDSHAKES_MAX // 4

    run(body)


def test_nobody_listening_is_told_at_once() -> None:
    async def body(stage: Stage) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        with pytest.raises(LinkError, match="nobody listens there"):
            await stage.transport.dial(stage.listener.addresses[0]._replace(port=port), ALICE.peer_id, 30.0)

    run(body)


def test_a_link_outlives_a_change_of_the_peers_port() -> None:
    """What a home router does after a pause: the same connection comes from another port (RFC 9000, section 9)."""

    async def body(stage: Stage) -> None:
        loop = asyncio.get_running_loop()
        relay = Relay(("127.0.0.1", stage.port))
        front, _ = await loop.create_datagram_endpoint(lambda: relay, local_addr=("127.0.0.1", 0))
        await relay.move()
        alice = QuicTransport(ALICE, [], "a/1")
        port = front.get_extra_info("sockname")[1]
        link = await alice.dial(stage.listener.addresses[0]._replace(port=port), BOB.peer_id)
        far = await stage.arrived.get()
        pinger = Pinger(link)
        await pinger.ping()
        before = far.address
        await relay.move()
        for _ in range(3):
            await pinger.ping()
        assert far.address != before and not far.closed.done()
        link.close("done")
        await alice.close()
        front.close()
        relay.close()

    run(body)


class Relay(asyncio.DatagramProtocol):
    """Passes datagrams on from a port of its own, which it can change."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._client: Any = None
        self._back: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._front: Any = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self._client = addr
        assert self._back is not None
        self._back.sendto(data)

    async def move(self) -> None:
        self.close()
        relay = self

        class Back(asyncio.DatagramProtocol):
            def datagram_received(self, data: bytes, addr: Any) -> None:
                relay._front.sendto(data, relay._client)

        self._back, _ = await asyncio.get_running_loop().create_datagram_endpoint(Back, remote_addr=self._target)

    def close(self) -> None:
        if self._back is not None:
            self._back.close()


def test_streams_beyond_the_limit_cost_the_peer_its_connection() -> None:
    async def body(stage: Stage) -> None:
        certificate = quic_tls.make_certificate(ALICE)

        async with connect("127.0.0.1", stage.port, configuration=client(certificate)) as protocol:
            await stage.arrived.get()
            quic: Any = protocol._quic
            quic._remote_max_streams_bidi = 10**6
            for number in range(limits.STREAMS_PER_CONNECTION_MAX + 1):
                quic.send_stream_data(4 * number, b"x")
            protocol.transmit()
            await protocol.wait_closed()
        await good_link_works(stage)

    run(body)


def test_data_beyond_the_window_costs_the_peer_its_connection() -> None:
    async def body(stage: Stage) -> None:
        certificate = quic_tls.make_certificate(ALICE)
        async with connect(
            "127.0.0.1", stage.port, configuration=client(certificate), create_protocol=Deaf
        ) as protocol:
            far = await stage.arrived.get()
            quic: Any = protocol._quic
            asked = multistream.Proposer([SINK]).start()
            quic.send_stream_data(0, asked + bytes(limits.STREAM_WINDOW_BYTES))
            quic._streams[0].max_stream_data_remote = 2**40
            protocol.transmit()
            await far.closed
        await good_link_works(stage)

    run(body)


@pytest.mark.parametrize("act", ["write", "end"])
def test_what_is_said_on_a_stream_in_the_moment_its_peer_cuts_it_harms_nobody(act: str) -> None:
    async def body(stage: Stage) -> None:
        transport = QuicTransport(ALICE, [], "a/1")
        link: Any = await transport.dial(stage.listener.addresses[0], BOB.peer_id)
        far = await stage.arrived.get()
        inbound: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        far.set_stream_handler(inbound.set_result)
        stream = await link.open_stream([SINK])
        said: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        take_in = link.received

        def received() -> None:
            # The core has read the datagram, and the stream has not been told yet.
            if link._core.dropped(stream.number) and not said.done():
                try:
                    stream.write_nowait(b"x") if act == "write" else stream.close_write()
                except RuntimeError as error:  # what aioquic says of a stream that is reset
                    said.set_exception(error)
                else:
                    said.set_result(None)
            take_in()

        link.received = received
        (await inbound).reset()
        await said
        assert await Pinger(link).ping() >= 0
        link.close("done")
        await transport.close()

    run(body)
