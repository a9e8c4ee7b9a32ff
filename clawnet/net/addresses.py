"""The addresses that this machine goes by, and a mark that changes with its network."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

HOSTS_MAX: Final = 6
"""Loopback comes beside these: with two transports a card's sixteen addresses are just filled."""

_INTERFACES = Path("/sys/class/net")
_UNPLUGGED: Final = ("down", "lowerlayerdown")


class OwnNetwork(NamedTuple):
    """`hosts` are this machine's IP addresses but loopback, the one used towards the internet first.

    `mark` is equal as long as interfaces, their addresses, their carriers and the routes outward are the same.
    """

    hosts: tuple[str, ...]
    mark: frozenset[tuple[str, ...]]


def own_network() -> OwnNetwork:
    """What this machine's network looks like now. Half a millisecond; nothing is sent."""
    mark: set[tuple[str, ...]] = set()
    found: list[str] = []
    for family in ("ip4", "ip6"):
        if host := outward_address(family):
            found.append(host)
            mark.add((family, host))
    others: list[str] = []
    for interface, host in _of_interfaces():
        state = _state(interface)
        mark.add((interface, host, state))
        if state not in _UNPLUGGED:
            others.append(host)
    others.sort(key=lambda host: ":" in host)
    return OwnNetwork(tuple(dict.fromkeys((*found, *others)))[:HOSTS_MAX], frozenset(mark))


def outward_address(family: str) -> str:
    """The address this machine uses towards the internet, or "". Nothing is sent: a UDP connect only picks a route."""
    target = ("192.0.2.1", 9) if family == "ip4" else ("2001:db8::1", 9)
    try:
        with socket.socket(socket.AF_INET if family == "ip4" else socket.AF_INET6, socket.SOCK_DGRAM) as probe:
            probe.connect(target)
            host: str = probe.getsockname()[0]
    except OSError:
        return ""
    return host if is_dialable(host) else ""


def is_dialable(host: str) -> bool:
    """Whether an IP address means this machine, and no other, to its neighbours as well."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return not (address.is_loopback or address.is_link_local or address.is_unspecified or address.is_multicast)


def _of_interfaces() -> Iterator[tuple[str, str]]:
    """(interface, address) of every address that others can dial; none where the system does not tell."""
    import ifaddr

    try:
        for adapter in ifaddr.get_adapters():
            for address in adapter.ips:
                host = address.ip if isinstance(address.ip, str) else address.ip[0]
                if is_dialable(host):
                    yield str(adapter.name), host
    except OSError:
        return


def _state(interface: str) -> str:
    """Up or down, as Linux tells it; elsewhere an interface that is down has no address."""
    try:
        return (_INTERFACES / interface / "operstate").read_text().strip()
    except OSError:
        return ""
