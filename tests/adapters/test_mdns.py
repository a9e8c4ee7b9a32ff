"""What anybody may announce on the local network, as zeroconf reads it from the packet."""

from __future__ import annotations

import struct
from types import SimpleNamespace
from typing import Any, cast

import pytest
from zeroconf import RecordUpdate
from zeroconf._protocol.incoming import DNSIncoming

from clawnet.net.mdns import SERVICE, Records


def heard(*labels: bytes) -> list[str]:
    """The names that are handed on of a packet with a TXT record under this one."""
    name = b"".join(bytes([len(part)]) + part for part in (*labels, b"_p2p", b"_udp", b"local")) + b"\0"
    text = b"\x05a=bcd"
    packet = struct.pack(">HHHHHH", 0, 0x8400, 0, 1, 0, 0) + name
    incoming = DNSIncoming(packet + struct.pack(">HHIH", 16, 0x8001, 120, len(text)) + text)
    assert len(incoming.answers()) == 1
    told: list[str] = []
    updates = [cast(RecordUpdate, SimpleNamespace(new=record, old=None)) for record in incoming.answers()]
    nobody: Any = None
    Records(lambda name, text, held_s: told.append(name)).async_update_records(nobody, incoming.now, updates)
    return told


def test_a_name_that_can_be_asked_for_is_handed_on() -> None:
    assert heard(b"abcdefgh") == [f"abcdefgh.{SERVICE}"]
    assert heard(b"x" * 63) == [f"{'x' * 63}.{SERVICE}"]


@pytest.mark.parametrize("label", [b"\xff" * 40, "İ".encode() * 31], ids=["no UTF-8", "longer in lower case"])
def test_a_name_that_grows_where_it_is_read_is_dropped(label: bytes) -> None:
    """Asked for, it would raise where the network is watched, and where a broken link is told."""
    assert heard(label) == []
