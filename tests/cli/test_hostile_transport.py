"""Attacks below and beside the protocol on a real daemon, over TCP and QUIC, while an honest peer's tasks run.

Each is refused or cut off within bounds, counted, logged with who did it, and costs the daemon little memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.connection import QuicConnection

from clawnet import limits
from clawnet.errors import LinkError
from clawnet.identity import multiaddr
from clawnet.identity.keys import KeyPair
from clawnet.net import multistream
from clawnet.net.quic_tls import make_certificate
from clawnet.net.rates import CLASS_OF
from clawnet.net.switch import PROTOCOLS
from clawnet.net.yamux import DATA, SYN, WINDOW
from clawnet.wire.codec import encode_payload
from clawnet.wire.messages import Ack, Kind, LedgerPull, Message
from tests.cli.harness import until
from tests.cli.test_hostile_peer import CARRIERS, WAIT_S, Intruder, Victim, intruder, now_ms, victim

pytestmark = pytest.mark.slow
__all__ = ["victim"]

MEMORY_BYTES_MAX = 400 * limits.MIB
KINDS = pytest.mark.parametrize("kind", CARRIERS)


@pytest.fixture(autouse=True)
def bounded(victim: Victim) -> Iterator[None]:
    """After each attack: the same process, serving as ever, in little memory."""
    yield
    victim.serves()
    pages = int(Path(f"/proc/{victim.pid}/statm").read_text().split()[1])
    assert pages * os.sysconf("SC_PAGE_SIZE") < MEMORY_BYTES_MAX


async def while_it_serves(victim: Victim, attack: Any) -> None:
    """The attack and honest work at once."""
    await asyncio.gather(attack, asyncio.to_thread(victim.serves))


# --- streams and windows


async def ten_thousand_streams(them: Intruder) -> None:
    link: Any = them.connection
    if link.transport == "tcp":
        for number in range(101, 101 + 20_000, 2):
            link._session.frame(WINDOW, SYN, number, 0)
    else:
        link._core._remote_max_streams_bidi = 10**6
        for number in range(10_000):
            link._core.send_stream_data(4 * (number + 100), b"x")
        link.flush_soon()


async def data_beyond_the_window(them: Intruder) -> None:
    link: Any = them.connection
    if link.transport == "tcp":
        link._session.frame(DATA, SYN, 101, limits.STREAM_WINDOW_BYTES_MAX + 1)
        return
    number = link._core.get_next_available_stream_id()
    link._core.send_stream_data(number, b"")
    stream = link._core._streams[number]
    stream.max_stream_data_remote = 2**40
    stream.sender._buffer_start = stream.sender._buffer_stop = limits.STREAM_WINDOW_BYTES + 1
    link._core.send_stream_data(number, b"x")
    link.flush_soon()


async def a_window_without_end(them: Intruder) -> None:
    link: Any = them.connection
    if link.transport == "tcp":
        for _ in range(2):
            link._session.frame(WINDOW, 0, 1, 2**32 - 1)
        return
    # QUIC lets nobody say too much of its own window; what it refuses is a stream that the peer never opened.
    link._core.send_stream_data(0, b"")
    link._core._streams[1] = link._core._streams.pop(0)
    link._core._streams[1].stream_id = 1
    link._core.send_stream_data(1, b"x")
    link.flush_soon()


@KINDS
@pytest.mark.parametrize("attack", [ten_thousand_streams, data_beyond_the_window, a_window_without_end])
@pytest.mark.parametrize("greeted", [True, False], ids=["linked", "unlinked"])
def test_a_breach_of_the_transport_cuts_its_author_off(victim: Victim, kind: str, attack: Any, greeted: bool) -> None:
    before = victim.counters().get("net_connections_cut_total", 0)

    async def body() -> str:
        async with intruder(victim, kind=kind) as them:
            if greeted:
                await them.greet()

            async def all_of_it() -> None:
                await attack(them)
                await asyncio.wait_for(asyncio.shield(them.connection.closed), WAIT_S)

            await while_it_serves(victim, all_of_it())
            return them.key.peer_id

    peer = asyncio.run(body())
    until("it is counted", lambda: victim.counters()["net_connections_cut_total"] > before)
    (cut,) = until("it is logged", lambda: victim.told("connection.cut", peer=peer))
    assert cut["address"].startswith("/ip4/127.0.0.1/") and cut["reason"]
    (ban,) = until("it is banned", lambda: victim.told("peer.banned", peer=peer))
    assert ban["seconds"] >= limits.BAN_MIN_S and ban["reason"] == cut["reason"]


# --- handshakes


async def a_byte_a_second(victim: Victim) -> None:
    where = multiaddr.parse(victim.addresses["tcp"])
    reader, writer = await asyncio.open_connection(where.host, where.port)
    with contextlib.suppress(OSError):
        for byte in multistream.line(multistream.HEADER) + multistream.line("/noise") + bytes(60):
            writer.write(bytes([byte]))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1):
                    while await reader.read(4096):
                        pass
                    break
    writer.close()


async def half_a_handshake(victim: Victim) -> None:
    where = multiaddr.parse(victim.addresses["tcp"])
    reader, writer = await asyncio.open_connection(where.host, where.port)
    writer.write(multistream.line(multistream.HEADER) + multistream.line("/noise") + b"\x00\x20" + bytes(16))
    with contextlib.suppress(OSError):
        while await reader.read(4096):
            pass
    writer.close()


async def half_a_quic_handshake(victim: Victim) -> None:
    where = multiaddr.parse(victim.addresses["quic-v1"])
    certificate, key = make_certificate(KeyPair.generate(os.urandom))
    configuration = QuicConfiguration(is_client=True, alpn_protocols=["libp2p"], verify_mode=ssl.CERT_NONE)
    configuration.certificate, configuration.private_key = certificate, key
    quic = QuicConnection(configuration=configuration)
    quic.connect((where.host, where.port), now=0.0)
    (first, _), *_ = quic.datagrams_to_send(now=0.0)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as raw:
        raw.connect((where.host, where.port))
        # The same first flight once a second: alive, and never a step further.
        before = len(victim.told("handshake.failed"))
        while len(victim.told("handshake.failed")) == before:
            raw.send(first)
            await asyncio.sleep(1)


@pytest.mark.parametrize("attack", [a_byte_a_second, half_a_handshake, half_a_quic_handshake])
def test_a_handshake_that_never_ends_is_ended(victim: Victim, attack: Any) -> None:
    before = victim.counters().get("net_handshakes_failed_total", 0)

    async def body() -> None:
        await while_it_serves(victim, asyncio.wait_for(attack(victim), 2 * WAIT_S))

    asyncio.run(body())
    until("it is counted", lambda: victim.counters()["net_handshakes_failed_total"] > before)
    failed = until("it is logged", lambda: victim.told("handshake.failed", address="127.0.0.1"))
    assert failed[-1]["reason"] == "the handshake took too long"


@KINDS
def test_connections_that_never_say_hello_are_few(victim: Victim, kind: str) -> None:
    before = victim.counters().get("net_connections_refused_total", 0)

    async def body() -> None:
        transports, kept, most = [], [], limits.VISITORS_PER_ADDRESS_MAX
        where = multiaddr.parse(victim.addresses[kind])
        try:
            for _ in range(most + 4):
                transports.append(CARRIERS[kind](KeyPair.generate(os.urandom), PROTOCOLS, "quiet"))
                # The refusal follows the handshake at once: it may be there before the dial has returned.
                with contextlib.suppress(LinkError):
                    kept.append(await transports[-1].dial(where, victim.peer_id, WAIT_S))
            async with asyncio.timeout(WAIT_S):
                while len(kept) > most:
                    await asyncio.wait([one.closed for one in kept], return_when=asyncio.FIRST_COMPLETED)
                    kept = [one for one in kept if not one.closed.done()]
            # The honest peer lives at the same address: what it has open without a link counts with these.
            assert len(kept) >= most - 4
        finally:
            for transport in transports:
                await transport.close()

    asyncio.run(body())
    until("they are counted", lambda: victim.counters()["net_connections_refused_total"] >= before + 4)
    assert victim.told(
        "connection.refused", address="127.0.0.1", reason="too many connections from there show no membership"
    )


# --- floods

FLOOD: dict[Kind, Message] = {
    Kind.ACK: Ack(bytes(16)),
    Kind.LEDGER_PULL: LedgerPull(bytes(32), 1, 2),
}


@KINDS
@pytest.mark.parametrize(
    "flooded",
    [Kind.ACK, Kind.LEDGER_PULL, Kind.MARKET_GOSSIP, Kind.MARKET_BID, Kind.MEM_UPDATE],
    ids=lambda one: one.name,
)
def test_a_flood_is_dropped_held_back_and_ends_in_a_ban(victim: Victim, kind: str, flooded: Kind) -> None:
    """Messages of every class: sound ones go over the rate, those that are none are refused; both end in a ban."""
    payload = encode_payload(FLOOD[flooded])[1] if flooded in FLOOD else b"\x90"
    items = [(int(flooded), payload, None, None)] * limits.BATCH_ENVELOPES_MAX

    async def body() -> str:
        async with intruder(victim, kind=kind) as them:
            await them.greet()

            async def pour() -> None:
                with contextlib.suppress(LinkError):
                    while not them.connection.closed.done():
                        await them.stream.write(them.session.seal_encoded(items, now_ms()))
                        await asyncio.sleep(0)
                await them.connection.closed

            await while_it_serves(victim, asyncio.wait_for(pour(), 4 * WAIT_S))
            return them.key.peer_id

    peer = asyncio.run(body())
    (ban,) = until("it is banned", lambda: victim.told("peer.banned", peer=peer))
    assert ban["reason"]
    if flooded in FLOOD:
        assert victim.counters()[f"net_messages_over_rate_{CLASS_OF[flooded]}_total"] > 0
        assert victim.told("rate.exceeded", peer=peer)[0]["of"] == CLASS_OF[flooded]
        # A line a spell, not a message; where the machine is slow, so is the flood, and it comes in a few spells.
        assert len(victim.told("rate.exceeded", peer=peer)) < 10
        assert CLASS_OF[flooded] in ban["reason"]
    else:
        refused = victim.told("message.refused", peer=peer)
        assert 0 < len(refused) <= limits.OFFENCES_MAX and refused[0]["problem"]
