"""The transports of this machine: TCP always, QUIC where its library is."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Final

from clawnet.identity.keys import KeyPair
from clawnet.net.port import Transport
from clawnet.net.settings import SwitchSettings
from clawnet.net.tcp import TcpTransport

NO_QUIC: Final = "aioquic is not installed here, so peers are reached over TCP alone"
NO_QUIC_REMEDY: Final = "pip install aioquic, then `clawnet daemon restart`"


def has_quic() -> bool:
    """Whether QUIC's library is here; on Android it has to be built first."""
    return importlib.util.find_spec("aioquic") is not None


def carriers(identity: KeyPair, protocols: Sequence[str], settings: SwitchSettings) -> dict[str, Transport]:
    """The transports that are enabled and can work here, by the multiaddr's word for each."""
    found: dict[str, Transport] = {}
    if settings.enable_tcp:
        found["tcp"] = TcpTransport(identity, protocols, settings.agent)
    if settings.enable_quic and has_quic():
        from clawnet.net.quic import QuicTransport

        found["quic-v1"] = QuicTransport(identity, protocols, settings.agent)
    return found
