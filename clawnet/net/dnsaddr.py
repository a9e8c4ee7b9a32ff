"""The TXT record of libp2p's mDNS: one `dnsaddr=` string an address, and beside them clawnet's own tag.

https://github.com/libp2p/specs/blob/master/discovery/mdns.md. Raw bytes, since a dictionary cannot repeat a key. The
tag is for members of the announcer's mesh alone: a MAC under the mesh key over its peer id, so to all others it is
noise, and no two members have the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from clawnet import limits
from clawnet.errors import DataError
from clawnet.identity import multiaddr
from clawnet.net.addresses import is_dialable

ADDRESS_KEY: Final = b"dnsaddr="
TAG_KEY: Final = b"clawnet="
_STRING_BYTES_MAX: Final = 255


class Announced(NamedTuple):
    """What one TXT record says: who listens where. `tag` is empty for a libp2p node that is no clawnet node."""

    peer: str
    addresses: tuple[str, ...]
    tag: bytes


class Announcement(NamedTuple):
    """What this node tells its network: a TXT record, the hosts that it stands for, and the port of one listener."""

    instance: str
    text: bytes
    hosts: tuple[str, ...]
    port: int


def write_txt(addresses: Iterable[str], tag: bytes) -> bytes:
    """The record of these multiaddrs, each with its /p2p/ part: as many as fit, loopback left out."""
    out = bytearray(_string(TAG_KEY + tag.hex().encode()) if tag else b"")
    for text in addresses:
        string = _string(ADDRESS_KEY + text.encode())
        if is_dialable(multiaddr.parse(text).host) and len(out) + len(string) <= limits.MDNS_TXT_BYTES_MAX:
            out += string
    return bytes(out)


def read_txt(data: bytes) -> Announced | None:
    """What a record from anybody says; None when it names no address that could be dialled, or several peers."""
    if len(data) > limits.MDNS_TXT_BYTES_MAX:
        return None
    peers: set[str] = set()
    addresses: dict[str, None] = {}
    tag = b""
    for string in _strings(data):
        if string.startswith(TAG_KEY):
            tag = _tag(string[len(TAG_KEY) :]) or tag
        elif string.startswith(ADDRESS_KEY) and len(addresses) < limits.NEIGHBOUR_ADDRESSES_MAX:
            try:
                where = multiaddr.parse(string[len(ADDRESS_KEY) :].decode("ascii"))
            except (DataError, UnicodeDecodeError):
                continue
            if where.peer is not None and where.port and is_dialable(where.host):
                peers.add(where.peer)
                addresses[str(where)] = None
    if len(peers) != 1:
        return None
    return Announced(peers.pop(), tuple(addresses), tag)


def _string(data: bytes) -> bytes:
    assert len(data) <= _STRING_BYTES_MAX
    return bytes((len(data),)) + data


def _strings(data: bytes) -> Iterable[bytes]:
    at = 0
    while at < len(data):
        end = at + 1 + data[at]
        if end > len(data):
            return
        yield data[at + 1 : end]
        at = end


def _tag(digits: bytes) -> bytes:
    try:
        tag = bytes.fromhex(digits.decode("ascii"))
    except (ValueError, UnicodeDecodeError):
        return b""
    return tag if len(tag) == limits.MDNS_TAG_BYTES else b""
