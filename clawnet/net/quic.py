"""libp2p over QUIC: one UDP socket an address, dials from the same port, and the limits on handshakes under way.

Above a quarter of the handshakes allowed, a newcomer has to prove its address first (RFC 9000, section 8.1.2).
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import ssl
import struct
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

from aioquic._buffer import Buffer
from aioquic.quic.configuration import SMALLEST_MAX_DATAGRAM_SIZE, QuicConfiguration
from aioquic.quic.crypto import CryptoPair
from aioquic.quic.packet import (
    QuicErrorCode,
    QuicFrameType,
    QuicPacketType,
    QuicProtocolVersion,
    encode_quic_retry,
    encode_quic_version_negotiation,
    pull_quic_header,
)
from aioquic.quic.packet_builder import QuicPacketBuilder
from aioquic.quic.retry import QuicRetryTokenHandler

from clawnet import limits
from clawnet.errors import LinkError
from clawnet.identity.keys import KeyPair
from clawnet.identity.multiaddr import Multiaddr, of_socket
from clawnet.net import identify, ping
from clawnet.net.doors import Doors
from clawnet.net.port import ConnectionHandler, expected_peer
from clawnet.net.quic_link import Address, QuicLink, QuicPlan
from clawnet.net.quic_tls import make_certificate
from clawnet.net.ratelimit import TokenBucket

_ALPN = "libp2p"
_CID_BYTES = 8
_FIXED_BIT = 0x40
_LONG_HEADER = 0x80
_DATAGRAM_BYTES_MAX = 65_536
_BEHIND_MAX = 0 if sys.platform == "win32" else 63  # there asyncio itself has a read under way
_CLOSE_FRAME_BYTES = 32
_IDLE_S = 2 * limits.KEEPALIVE_S + 5.0
_ERROR_QUEUE = getattr(socket, "MSG_ERRQUEUE", 0)
_RECEIVE_ERRORS = {socket.AF_INET: (socket.IPPROTO_IP, 11), socket.AF_INET6: (socket.IPPROTO_IPV6, 25)}
"""IP_RECVERR and IPV6_RECVERR of Linux: the kernel then tells which destination is unreachable."""

_ANYWHERE = {socket.AF_INET: "0.0.0.0", socket.AF_INET6: "::"}  # noqa: S104  # a dial leaves by whatever interface leads there


class QuicTransport:
    """See port.Transport."""

    name = "quic-v1"

    def __init__(self, identity: KeyPair, protocols: Sequence[str] = (), agent: str = "clawnet") -> None:
        self.identity = identity
        self._protocols = tuple(protocols)
        known = (*self._protocols, ping.PROTOCOL, identify.PROTOCOL)
        self._identify = identify.answerer(identity.public, known, agent)
        certificate, key = make_certificate(identity)
        common: dict[str, Any] = {
            "alpn_protocols": [_ALPN],
            "certificate": certificate,
            "private_key": key,
            "verify_mode": ssl.CERT_NONE,
            "connection_id_length": _CID_BYTES,
            "idle_timeout": _IDLE_S,
            "max_data": limits.STREAM_WINDOW_BYTES_MAX,
            "max_stream_data": limits.STREAM_WINDOW_BYTES,
            "supported_versions": [QuicProtocolVersion.VERSION_1],
        }
        self.accepting = QuicConfiguration(is_client=False, **common)
        self._dialling = QuicConfiguration(is_client=True, **common)
        self.doors = Doors()
        self._endpoints: dict[Endpoint, None] = {}
        self._links: dict[QuicLink, asyncio.Future[None]] = {}
        logging.getLogger("quic").setLevel(logging.CRITICAL)

    async def dial(
        self, address: Multiaddr, peer: str | None, timeout_s: float = limits.HANDSHAKE_TIMEOUT_S
    ) -> QuicLink:
        """See port.Transport.dial."""
        expected = expected_peer(address, peer, self.identity.peer_id)
        if address.transport != self.name:
            raise LinkError(f"{address} is no QUIC address", address=str(address))
        link: QuicLink | None = None
        ready: asyncio.Future[QuicLink] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout_s):
                inet6 = address.family == "ip6"
                where: Address = (address.host, address.port, 0, 0) if inet6 else (address.host, address.port)
                endpoint = await self._outward(socket.AF_INET6 if inet6 else socket.AF_INET)
                plan = self.plan(endpoint, lambda link: ready.set_result(link))
                link = QuicLink(plan, self._dialling, where, expected)
                self._links[link] = asyncio.get_running_loop().create_future()
                endpoint.add(link, link.cids)
                link.connect()
                await asyncio.wait((ready, link.closed), return_when=asyncio.FIRST_COMPLETED)
        except TimeoutError as error:
            raise LinkError(f"{address} did not answer within {timeout_s:g} s", address=str(address)) from error
        except (OSError, UnicodeError) as error:
            raise LinkError(f"cannot connect to {address}: {_said(error)}", address=str(address)) from error
        finally:
            if link is not None and not ready.done():
                link.abort("the dial was given up")
        if link.closed.done():
            raise LinkError(
                f"cannot connect to {address}: {link.closed.result()}", address=str(address), found=link.found
            )
        return link

    async def listen(self, host: str, port: int, on_connection: ConnectionHandler) -> QuicListener:
        """See port.Transport.listen."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            endpoint = await self._bind(family, host, port)
        except (OSError, UnicodeError) as error:
            number = error.errno if isinstance(error, OSError) else 0
            raise LinkError(f"cannot listen on {host} UDP port {port}: {_said(error)}", errno=number) from error
        endpoint.on_connection = on_connection
        return QuicListener(endpoint)

    async def close(self) -> None:
        """See port.Transport.close."""
        for link in list(self._links):
            link.close("this node stops")
        if self._links:
            await asyncio.wait(list(self._links.values()))
        endpoints, self._endpoints = self._endpoints, {}
        for endpoint in endpoints:
            endpoint.close()
        if endpoints:
            await asyncio.wait([endpoint.gone for endpoint in endpoints])

    def plan(self, endpoint: Endpoint, on_ready: Any) -> QuicPlan:
        """What a link over that socket needs to know."""
        return QuicPlan(
            own_peer=self.identity.peer_id,
            protocols=self._protocols,
            identify=self._identify,
            send=endpoint.send,
            on_ready=on_ready,
            on_cid=endpoint.on_cid,
            on_gone=partial(self._link_gone, endpoint),
        )

    def accepted(self, link: QuicLink) -> None:
        """An inbound handshake begins."""
        self._links[link] = asyncio.get_running_loop().create_future()

    def _link_gone(self, endpoint: Endpoint, link: QuicLink) -> None:
        endpoint.forget(link)
        gone = self._links.pop(link, None)
        if gone is not None and not gone.done():
            gone.set_result(None)

    async def _outward(self, family: socket.AddressFamily) -> Endpoint:
        """The socket to dial from: a listening one where it can reach there, else one of our own."""
        for endpoint in self._endpoints:
            if endpoint.family == family and endpoint.host == _ANYWHERE[family]:
                return endpoint
        return await self._bind(family, _ANYWHERE[family], 0)

    async def _bind(self, family: socket.AddressFamily, host: str, port: int) -> Endpoint:
        loop = asyncio.get_running_loop()
        raw = _udp_socket(family, host, port)
        try:
            _, endpoint = await loop.create_datagram_endpoint(lambda: Endpoint(self, raw, host), sock=raw)
        except OSError:
            raw.close()
            raise
        self._endpoints[endpoint] = None
        return endpoint


class QuicListener:
    """See port.Listener."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.addresses = (of_socket(endpoint.address[0], endpoint.address[1], "quic-v1"),)
        self._endpoint = endpoint

    @property
    def handshakes(self) -> int:
        """Inbound handshakes under way."""
        return self._endpoint.handshakes

    async def close(self) -> None:
        """See port.Listener.close; handshakes under way are dropped, the socket lives as long as its connections."""
        self._endpoint.stop_accepting()
        await asyncio.sleep(0)


class Endpoint(asyncio.DatagramProtocol):
    """One UDP socket: tells connections apart by their id, accepts new ones while somebody listens."""

    def __init__(self, transport: QuicTransport, raw: socket.socket, host: str) -> None:
        self.family = raw.family
        self.host = host
        self.address: Address = raw.getsockname()
        self.on_connection: ConnectionHandler | None = None
        self._owner = transport
        self._raw = raw
        self._socket: asyncio.DatagramTransport | None = None
        self._links: dict[bytes, QuicLink] = {}
        self._cids: dict[QuicLink, set[bytes]] = {}
        self._handshakes: dict[QuicLink, bool] = {}
        """Inbound handshakes under way, and whether their address was proven before they began."""
        self._doors = transport.doors
        now_s = asyncio.get_running_loop().time()
        self._answers = TokenBucket(limits.STATELESS_ANSWERS_PER_S, limits.STATELESS_ANSWERS_PER_S, now_s)
        self._retry = QuicRetryTokenHandler()
        self._stopped = False
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    # --- asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The socket is open."""
        self._socket = cast(asyncio.DatagramTransport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """The socket is closed."""
        self.gone.set_result(None)

    def datagram_received(self, data: bytes, addr: Address) -> None:
        """A datagram arrived: it and those that wait behind it are taken in, then every link touched answers once."""
        touched: dict[QuicLink, None] = {}
        self._take(data, addr, touched)
        for _ in range(_BEHIND_MAX):
            try:
                data, addr = self._raw.recvfrom(_DATAGRAM_BYTES_MAX)
            except OSError:
                break
            self._take(data, addr, touched)
        for link in touched:
            self._guarded(link, link.received)

    def _take(self, data: bytes, addr: Address, touched: dict[QuicLink, None]) -> None:
        """What is not QUIC v1 for one of ours is dropped without an answer, or told the version."""
        if not data or not data[0] & _FIXED_BIT:
            return
        if data[0] & _LONG_HEADER:
            try:
                header = pull_quic_header(Buffer(data=data), host_cid_length=_CID_BYTES)
            except ValueError:
                return
            link = self._links.get(header.destination_cid)
            if link is None and len(data) >= SMALLEST_MAX_DATAGRAM_SIZE:
                link = self._on_stranger(header, addr)
        else:
            link = self._links.get(data[1 : 1 + _CID_BYTES])
        if link is not None:
            self._guarded(link, partial(link.receive, data, addr))
            touched[link] = None

    def _guarded(self, link: QuicLink, step: Callable[[], None]) -> None:
        """A defect that one peer brings about ends its link; the others on this socket go on."""
        try:
            step()
        except Exception as defect:  # noqa: BLE001 - aioquic asserts
            context = {"message": "a QUIC link failed", "exception": defect}
            asyncio.get_running_loop().call_exception_handler(context)
            link.abort("this node failed on what came")

    def error_received(self, exc: Exception) -> None:
        """The kernel knows of unreachable destinations: handshakes with them need not wait for their time-out."""
        for address in self._unreachable():
            for link in [link for link in self._cids if not link.ready and link.remote[:2] == address]:
                link.abort("nobody listens there")

    @property
    def handshakes(self) -> int:
        """Inbound handshakes under way."""
        return len(self._handshakes)

    # --- the links' side

    def send(self, data: bytes, address: Address) -> None:
        """Writes a datagram."""
        if self._socket is not None and not self._socket.is_closing():
            self._socket.sendto(data, address)

    def add(self, link: QuicLink, cids: Sequence[bytes]) -> None:
        """Datagrams for these ids are the link's."""
        for cid in cids:
            self.on_cid(cid, link)

    def on_cid(self, cid: bytes, link: QuicLink | None) -> None:
        """A connection id was issued for a link, or retired."""
        if link is not None:
            self._links[cid] = link
            self._cids.setdefault(link, set()).add(cid)
            return
        owner = self._links.pop(cid, None)
        if owner is not None:
            self._cids[owner].discard(cid)

    def forget(self, link: QuicLink) -> None:
        """The link is gone."""
        self._settle(link)
        for cid in self._cids.pop(link, ()):
            self._links.pop(cid, None)
        if self._stopped and not self._cids:
            self.close()

    # --- the owner's side

    def stop_accepting(self) -> None:
        """No new connections; the socket closes with its last one."""
        self.on_connection = None
        self._stopped = True
        for link in list(self._handshakes):
            link.abort("this node stops listening")
        if not self._cids:
            self.close()

    def close(self) -> None:
        """Closes the socket."""
        if self._socket is not None:
            self._socket.close()

    # --- strangers

    def _on_stranger(self, header: Any, addr: Address) -> QuicLink | None:
        if header.version is None or header.packet_type == QuicPacketType.VERSION_NEGOTIATION:
            return None
        if header.version != QuicProtocolVersion.VERSION_1:
            versions: list[int] = [QuicProtocolVersion.VERSION_1]
            self._answer(
                encode_quic_version_negotiation(
                    source_cid=header.destination_cid, destination_cid=header.source_cid, supported_versions=versions
                ),
                addr,
            )
            return None
        if header.packet_type != QuicPacketType.INITIAL:
            return None
        return self._admit(header, addr)

    def _admit(self, header: Any, addr: Address) -> QuicLink | None:
        """The first datagram of a handshake: a link for it, or an answer that keeps nothing of it."""
        host, now_s = str(addr[0]), asyncio.get_running_loop().time()
        handshake: dict[str, Any] = {"original_destination_connection_id": header.destination_cid}
        if self.on_connection is not None and (header.token or self._doors.is_strict(host, now_s)):
            proven = self._proven(header, addr)
            if proven is None:
                return None
            handshake = {
                "original_destination_connection_id": proven,
                "retry_source_connection_id": header.destination_cid,
            }
        enter = (
            partial(self._doors.enter, now_s=now_s) if "retry_source_connection_id" in handshake else self._doors.begin
        )
        if self.on_connection is None or enter(host):
            self._answer(_refusal(header), addr)
            return None
        plan = self._owner.plan(self, self._ready)
        link = QuicLink(plan, self._owner.accepting, addr, None, **handshake)
        self._owner.accepted(link)
        self._handshakes[link] = "retry_source_connection_id" in handshake
        self.add(link, (header.destination_cid, *link.cids))
        return link

    def _proven(self, header: Any, addr: Address) -> bytes | None:
        """The first destination id of a client that proved its address; None after asking it to."""
        now = asyncio.get_running_loop().time()
        if header.token:
            try:
                return self._retry.validate_token(
                    address=addr, destination_cid=header.destination_cid, token=header.token, now=now
                )
            except ValueError:
                return None
        source_cid = os.urandom(_CID_BYTES)
        token = self._retry.create_token(
            address=addr,
            original_destination_connection_id=header.destination_cid,
            retry_source_connection_id=source_cid,
            now=now,
        )
        retry = encode_quic_retry(
            version=header.version,
            source_cid=source_cid,
            destination_cid=header.source_cid,
            original_destination_cid=header.destination_cid,
            retry_token=token,
        )
        self._answer(retry, addr)
        return None

    def _answer(self, data: bytes, address: Address) -> None:
        """To a datagram that nothing is kept of; whose address it bears may be anybody's, so not without end."""
        if self._answers.take(1, asyncio.get_running_loop().time()):
            self.send(data, address)

    def _ready(self, link: QuicLink) -> None:
        late = self._handshakes.get(link) is False
        self._settle(link)
        if self.on_connection is None:
            link.abort("this node stops listening")
        elif late and (refusal := self._doors.prove(link.host, asyncio.get_running_loop().time())):
            link.abort(refusal)
        else:
            self.on_connection(link)

    def _settle(self, link: QuicLink) -> None:
        """An inbound handshake is over, one way or the other."""
        if link in self._handshakes:
            del self._handshakes[link]
            self._doors.leave(link.host, "" if link.ready else link.offence)

    def _unreachable(self) -> list[Address]:
        """The destinations in the socket's error queue (Linux)."""
        found: list[Address] = []
        while _ERROR_QUEUE and len(found) < limits.DIALS_MAX:
            try:
                _, _, _, address = self._raw.recvmsg(0, 512, _ERROR_QUEUE)
            except OSError:
                break
            if address:
                found.append(address[:2])
        return found


def _refusal(header: Any) -> bytes:
    """The answer to a first datagram that is not taken: a close with CONNECTION_REFUSED (RFC 9000, section 5.2.2)."""
    keys = CryptoPair()
    keys.setup_initial(cid=header.destination_cid, is_client=False, version=header.version)
    builder = QuicPacketBuilder(
        host_cid=header.destination_cid,
        is_client=False,
        max_datagram_size=SMALLEST_MAX_DATAGRAM_SIZE,
        peer_cid=header.source_cid,
        version=header.version,
    )
    builder.start_packet(QuicPacketType.INITIAL, keys)
    frame = builder.start_frame(QuicFrameType.TRANSPORT_CLOSE, capacity=_CLOSE_FRAME_BYTES)
    for field in (QuicErrorCode.CONNECTION_REFUSED, QuicFrameType.PADDING, 0):
        frame.push_uint_var(field)
    datagrams, _ = builder.flush()
    return datagrams[0]


def _udp_socket(family: socket.AddressFamily, host: str, port: int) -> socket.socket:
    raw = socket.socket(family, socket.SOCK_DGRAM)
    try:
        raw.setblocking(False)
        if family == socket.AF_INET6:
            raw.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if _ERROR_QUEUE:
            level, option = _RECEIVE_ERRORS[family]
            raw.setsockopt(level, option, struct.pack("i", 1))
        for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
            raw.setsockopt(socket.SOL_SOCKET, option, limits.DATAGRAM_BUFFER_BYTES)
        raw.bind((host, port))
    except OSError:
        raw.close()
        raise
    return raw


def _said(error: OSError | UnicodeError) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error)
