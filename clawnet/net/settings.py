"""The switch's part of the configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from msgspec import Struct, structs

from clawnet.identity.multiaddr import Multiaddr


class SwitchSettings(Struct, frozen=True):
    """Where to listen, how, and how many peers to hold. A port that nobody set gives way when it is taken."""

    listen_addrs: tuple[str, ...] = ()
    tcp_port: int = 4002
    tcp_port_is_set: bool = False
    enable_tcp: bool = True
    quic_port: int = 4001
    quic_port_is_set: bool = False
    enable_quic: bool = True
    max_peers: int = 100
    connection_timeout_s: float = 30.0
    ping_interval_s: float = 15.0
    agent: str = "clawnet"

    @classmethod
    def of(cls, config: ConfigView, agent: str) -> SwitchSettings:
        """Read from the configuration."""
        return cls(
            listen_addrs=tuple(config.words("node.listen_addrs")),
            tcp_port=config.integer("network.tcp_port"),
            tcp_port_is_set=config.is_set("network.tcp_port"),
            enable_tcp=config.flag("network.enable_tcp"),
            quic_port=config.integer("network.quic_port"),
            quic_port_is_set=config.is_set("network.quic_port"),
            enable_quic=config.flag("network.enable_quic"),
            max_peers=config.integer("node.max_peers"),
            connection_timeout_s=config.seconds("network.connection_timeout"),
            ping_interval_s=config.seconds("network.ping_interval"),
            agent=agent,
        )

    def at(self, addresses: Sequence[Multiaddr]) -> SwitchSettings:
        """The same, at the ports where a node listens already."""
        ports = {address.transport: address.port for address in addresses}
        return structs.replace(
            self,
            listen_addrs=tuple(map(str, addresses)) if self.listen_addrs else (),
            tcp_port=ports.get("tcp", self.tcp_port),
            quic_port=ports.get("quic-v1", self.quic_port),
        )

    @property
    def links_max(self) -> int:
        """A quarter more than `node.max_peers`, for a moment: whoever is needed is let in, and an idle one leaves."""
        return self.max_peers + (-(-self.max_peers // 4) if self.max_peers > 1 else 0)

    def port(self, transport: str) -> tuple[int, bool, str]:
        """A transport's port, whether somebody set it, and the key that does."""
        if transport == "tcp":
            return self.tcp_port, self.tcp_port_is_set, "network.tcp_port"
        return self.quic_port, self.quic_port_is_set, "network.quic_port"


class ConfigView(Protocol):
    """What SwitchSettings.of needs of config.Config."""

    def words(self, name: str) -> Sequence[str]: ...
    def integer(self, name: str) -> int: ...
    def seconds(self, name: str) -> float: ...
    def flag(self, name: str) -> bool: ...
    def is_set(self, name: str) -> bool: ...
