"""Addresses of peers as multiaddrs: `/ip4/203.0.113.7/tcp/4002/p2p/12D3...`, in text and in libp2p's binary form.

The forms clawnet dials and no others: ip4, ip6, dns, dns4 or dns6, then tcp or udp with quic-v1, then at most one p2p
(https://github.com/multiformats/multiaddr).
"""

from __future__ import annotations

import ipaddress
import re
from typing import NamedTuple

from clawnet.errors import DataError
from clawnet.identity.keys import base58_decode, peer_id_of, public_of

TEXT_CHARS_MAX = 256
BYTES_MAX = 512

_HOST_CODES = {"ip4": 4, "ip6": 41, "dns": 53, "dns4": 54, "dns6": 55}
_HOST_FAMILIES = {code: family for family, code in _HOST_CODES.items()}
_TCP = 6
_UDP = 273
_QUIC_V1 = 461
_P2P = 421
_DNS_NAME = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9_]([A-Za-z0-9_-]{0,62})(\.[A-Za-z0-9_]([A-Za-z0-9_-]{0,62}))*\.?\Z")
_EXAMPLE = "such as /ip4/203.0.113.7/tcp/4002/p2p/12D3KooW..."


class Multiaddr(NamedTuple):
    """One address. `transport` is "tcp" or "quic-v1"; `family` is ip4, ip6, dns, dns4 or dns6; `peer` a peer id."""

    host: str
    port: int
    transport: str = "tcp"
    peer: str | None = None
    family: str = "ip4"

    def __str__(self) -> str:
        carrier = f"tcp/{self.port}" if self.transport == "tcp" else f"udp/{self.port}/quic-v1"
        tail = f"/p2p/{self.peer}" if self.peer else ""
        return f"/{self.family}/{self.host}/{carrier}{tail}"

    def with_peer(self, peer: str | None) -> Multiaddr:
        """The same place with another (or no) peer id."""
        return self._replace(peer=peer)

    def to_bytes(self) -> bytes:
        """The binary form: protocol codes and values as varints and bytes."""
        out = bytearray(_varint(_HOST_CODES[self.family]))
        if self.family in ("ip4", "ip6"):
            out += ipaddress.ip_address(self.host).packed
        else:
            name = self.host.encode("ascii")
            out += _varint(len(name)) + name
        port = self.port.to_bytes(2, "big")
        if self.transport == "tcp":
            out += _varint(_TCP) + port
        else:
            out += _varint(_UDP) + port + _varint(_QUIC_V1)
        if self.peer:
            multihash = base58_decode(self.peer)
            out += _varint(_P2P) + _varint(len(multihash)) + multihash
        return bytes(out)

    @classmethod
    def from_bytes(cls, data: bytes) -> Multiaddr:
        """The address in its binary form; raises DataError for every other form, foreign protocols included."""
        return _decode(data)


def of_socket(host: str, port: int, transport: str = "tcp", peer: str | None = None) -> Multiaddr:
    """The multiaddr of an IP address as sockets give it (an IPv6 zone is dropped)."""
    address = ipaddress.ip_address(host.partition("%")[0])
    return Multiaddr(str(address), port, transport, peer, f"ip{address.version}")


def parse(text: str) -> Multiaddr:
    """The address written in `text`, with the IP address and the peer id in their usual form.

    Raises DataError that says which part is wrong.
    """
    if not 0 < len(text) <= TEXT_CHARS_MAX:
        raise DataError(f"a multiaddr has at most {TEXT_CHARS_MAX} characters", hint=_EXAMPLE)
    parts = text.split("/")
    if parts[0] or len(parts) < 5:
        raise _bad(text, "it must start with /ip4, /ip6 or /dns and name a port")
    family, host, carrier, port_text, *rest = parts[1:]
    if family not in _HOST_CODES:
        raise _bad(text, f"{family!r} is none of {', '.join(_HOST_CODES)}")
    host = _checked_host(text, family, host)
    if re.fullmatch(r"\d{1,5}", port_text, re.ASCII) is None or int(port_text) > 65_535:
        raise _bad(text, f"{port_text!r} is not a port (0 to 65535)")
    if carrier == "tcp":
        transport = "tcp"
    elif carrier == "udp" and rest[:1] == ["quic-v1"]:
        transport = "quic-v1"
        rest = rest[1:]
    else:
        raise _bad(text, "after the host comes /tcp/PORT or /udp/PORT/quic-v1")
    peer: str | None = None
    if rest:
        if len(rest) != 2 or rest[0] != "p2p":
            raise _bad(text, f"{'/' + '/'.join(rest)!r} is not /p2p/PEER-ID")
        peer = peer_id_of(public_of(rest[1]))
    return Multiaddr(host, int(port_text), transport, peer, family)


def _checked_host(text: str, family: str, host: str) -> str:
    if family in ("ip4", "ip6"):
        try:
            address = ipaddress.ip_address(host)
        except ValueError as error:
            raise _bad(text, f"{host!r} is not an IP address") from error
        if f"ip{address.version}" != family or "%" in host:
            raise _bad(text, f"{host!r} is not an {family} address")
        return str(address)
    if _DNS_NAME.match(host) is None:
        raise _bad(text, f"{host!r} is not a host name")
    return host


def _bad(text: str, why: str) -> DataError:
    return DataError(f"{text!r} is not an address clawnet can use: {why}", hint=_EXAMPLE)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


class _Cursor:
    """Reads a binary multiaddr from front to back; running out of bytes is a DataError."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, count: int) -> bytes:
        if self.at + count > len(self.data):
            raise DataError("a binary multiaddr ends too early")
        self.at += count
        return self.data[self.at - count : self.at]

    def varint(self) -> int:
        value = 0
        for shift in range(0, 28, 7):
            byte = self.take(1)[0]
            value |= (byte & 0x7F) << shift
            if not byte & 0x80:
                return value
        raise DataError("a binary multiaddr holds a number that is too long")

    @property
    def done(self) -> bool:
        return self.at == len(self.data)


def _decode(data: bytes) -> Multiaddr:
    if len(data) > BYTES_MAX:
        raise DataError(f"a binary multiaddr has at most {BYTES_MAX} bytes")
    cursor = _Cursor(data)
    family = _HOST_FAMILIES.get(cursor.varint())
    if family is None:
        raise DataError("a binary multiaddr starts with a protocol that clawnet does not dial")
    if family in ("ip4", "ip6"):
        host = str(ipaddress.ip_address(cursor.take(4 if family == "ip4" else 16)))
    else:
        raw = cursor.take(cursor.varint())
        host = raw.decode("ascii", "replace")
        if _DNS_NAME.match(host) is None:
            raise DataError("a binary multiaddr holds a malformed host name")
    carrier = cursor.varint()
    port = int.from_bytes(cursor.take(2), "big") if carrier in (_TCP, _UDP) else 0
    if carrier == _TCP:
        transport = "tcp"
    elif carrier == _UDP and not cursor.done and cursor.varint() == _QUIC_V1:
        transport = "quic-v1"
    else:
        raise DataError("a binary multiaddr names a transport that clawnet does not dial")
    peer: str | None = None
    if not cursor.done:
        if cursor.varint() != _P2P:
            raise DataError("a binary multiaddr goes on after its transport with something else than a peer id")
        peer = _peer_of(cursor.take(cursor.varint()))
    if not cursor.done:
        raise DataError("a binary multiaddr goes on after its end")
    return Multiaddr(host, port, transport, peer, family)


def _peer_of(multihash: bytes) -> str:
    prefix = bytes.fromhex("002408011220")
    if len(multihash) != len(prefix) + 32 or not multihash.startswith(prefix):
        raise DataError("a binary multiaddr names a peer whose key is not Ed25519")
    return peer_id_of(multihash[len(prefix) :])
