"""Where the node listens, and under which addresses others may find it there."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from errno import EADDRINUSE, EADDRNOTAVAIL, EAFNOSUPPORT
from typing import Any, Final

from clawnet.errors import ConfigError, LinkError
from clawnet.identity import multiaddr
from clawnet.identity.multiaddr import Multiaddr
from clawnet.net.port import ConnectionHandler, Listener, Transport
from clawnet.net.settings import SwitchSettings

Note = Callable[..., None]

_ANYWHERE: Final = ("0.0.0.0", "::")  # noqa: S104  # what a peer-to-peer node listens on unless told otherwise
_NO_SUCH_FAMILY: Final = (EAFNOSUPPORT, EADDRNOTAVAIL)


async def listen(
    name: str, transport: Transport, settings: SwitchSettings, on_connection: ConnectionHandler, note: Note
) -> list[Listener]:
    """Listens at the multiaddrs set for this transport, or on every interface at its port.

    A port that nobody set gives way to a free one when it is taken, with a warning; else that is a ConfigError.
    """
    port, port_is_set, key = settings.port(name)
    if settings.listen_addrs:
        wanted = [where for where in map(multiaddr.parse, settings.listen_addrs) if where.transport == name]
        return [await _bind(transport, where.host, where.port, key, on_connection) for where in wanted]
    try:
        first = await _bind(transport, _ANYWHERE[0], port, key, on_connection)
    except ConfigError as taken:
        if port_is_set or taken.details.get("errno") != EADDRINUSE:
            raise
        first = await _bind(transport, _ANYWHERE[0], 0, key, on_connection)
        note("warn", "listen.port_taken", transport=name, port=port, instead=first.addresses[0].port)
    try:
        return [first, await transport.listen(_ANYWHERE[1], first.addresses[0].port, on_connection)]
    except LinkError as problem:
        level = "debug" if problem.details.get("errno") in _NO_SUCH_FAMILY else "warn"
        note(level, "listen.no_ipv6", transport=name, problem=problem.message)
        return [first]


async def _bind(transport: Transport, host: str, port: int, key: str, on_connection: ConnectionHandler) -> Listener:
    try:
        return await transport.listen(host, port, on_connection)
    except LinkError as problem:
        details: dict[str, Any] = {"errno": problem.details.get("errno")}
        raise ConfigError(
            problem.message, hint=f"set {key} or node.listen_addrs to a free port", **details
        ) from problem


def reachable(listeners: Sequence[Listener], peer: str) -> list[str]:
    """The listeners' multiaddrs with the peer id; "every interface" becomes the addresses that this machine goes by."""
    found: list[Multiaddr] = []
    for listener in listeners:
        for address in listener.addresses:
            if address.host not in _ANYWHERE:
                found.append(address)
                continue
            own = (outward_address(address.family), "127.0.0.1" if address.family == "ip4" else "::1")
            found += [address._replace(host=host) for host in own if host]
    ordered = sorted(dict.fromkeys(found), key=lambda address: address.host in ("127.0.0.1", "::1"))
    return [str(address.with_peer(peer)) for address in ordered]


def outward_address(family: str) -> str:
    """The address this machine uses towards the internet, or "". Nothing is sent: a UDP connect only picks a route."""
    target = ("192.0.2.1", 9) if family == "ip4" else ("2001:db8::1", 9)
    try:
        with socket.socket(socket.AF_INET if family == "ip4" else socket.AF_INET6, socket.SOCK_DGRAM) as probe:
            probe.connect(target)
            host: str = probe.getsockname()[0]
    except OSError:
        return ""
    return "" if host.startswith(("0.", "127.", "fe80:")) or host in ("::", "::1") else host
