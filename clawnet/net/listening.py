"""Where the node listens, and under which addresses others may find it there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from errno import EADDRINUSE, EADDRNOTAVAIL, EAFNOSUPPORT
from typing import Any, Final

from clawnet.errors import ConfigError, LinkError
from clawnet.identity import multiaddr
from clawnet.identity.multiaddr import Multiaddr
from clawnet.net.addresses import is_dialable, own_network
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


def gave_way(settings: SwitchSettings, addresses: Sequence[str]) -> list[str]:
    """A port that nobody asked for gives way when it is taken; whoever forwards it must hear of that."""
    if settings.listen_addrs:
        return []
    got = {where.transport: where.port for where in map(multiaddr.parse, addresses)}
    found = []
    for transport, port in got.items():
        wanted, _, _ = settings.port(transport)
        if wanted and port != wanted:
            kind = "UDP port" if transport == "quic-v1" else "port"
            found.append(f"{kind} {wanted} is taken, so this node listens at {port}")
    return found


def ports_findings(settings: SwitchSettings, addresses: Sequence[str]) -> list[dict[str, str]]:
    """What `doctor` shows of a running node's ports."""
    if not addresses:
        text = "listening nowhere: other machines cannot connect"
        remedy = "clawnet config set network.enable_tcp true, then clawnet daemon restart"
        return [{"check": "ports", "level": "warn", "message": text, "remedy": remedy}]
    text = "listening at " + ", ".join(addresses)
    found = [{"check": "ports", "level": "ok", "message": text, "remedy": ""}]
    for text in gave_way(settings, addresses):
        remedy = "end what holds it and run clawnet daemon restart, or set the port in the configuration"
        found.append({"check": "ports", "level": "warn", "message": text, "remedy": remedy})
    if not any(is_dialable(multiaddr.parse(address).host) for address in addresses):
        text = "listening on loopback alone: other machines cannot connect"
        remedy = "clear node.listen_addrs" if settings.listen_addrs else "connect this machine to a network"
        found.append({"check": "ports", "level": "ok", "message": text, "remedy": remedy})
    return found


def reachable(listeners: Sequence[Listener], peer: str) -> list[str]:
    """The listeners' multiaddrs with the peer id; "every interface" becomes the addresses that this machine goes by."""
    found: list[Multiaddr] = []
    own: tuple[str, ...] | None = None
    for listener in listeners:
        for address in listener.addresses:
            if address.host not in _ANYWHERE:
                found.append(address)
                continue
            own = own_network().hosts if own is None else own
            is_ip6 = address.family == "ip6"
            hosts = (*(host for host in own if (":" in host) == is_ip6), "::1" if is_ip6 else "127.0.0.1")
            found += [address._replace(host=host) for host in hosts]
    ordered = sorted(dict.fromkeys(found), key=lambda address: address.host in ("127.0.0.1", "::1"))
    return [str(address.with_peer(peer)) for address in ordered]
