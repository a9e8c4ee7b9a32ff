"""libp2p over TCP: dialling by IPv4 and IPv6, listening, and the limits on handshakes under way."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial

from clawnet import limits
from clawnet.errors import LinkError
from clawnet.identity.keys import KeyPair
from clawnet.identity.multiaddr import Multiaddr, of_socket
from clawnet.net import identify, ping
from clawnet.net.doors import Doors
from clawnet.net.link import Link, LinkPlan
from clawnet.net.port import Connection, ConnectionHandler, expected_peer

_ACCEPT_BACKLOG = 256


class TcpTransport:
    """See port.Transport."""

    name = "tcp"

    def __init__(self, identity: KeyPair, protocols: Sequence[str] = (), agent: str = "clawnet") -> None:
        self._identity = identity
        self._protocols = tuple(protocols)
        known = (*self._protocols, ping.PROTOCOL, identify.PROTOCOL)
        self._identify = identify.answerer(identity.public, known, agent)
        self._links: dict[Link, asyncio.Future[None]] = {}
        self.doors = Doors()

    @property
    def handshakes(self) -> int:
        """Inbound handshakes under way."""
        return self.doors.pending

    async def dial(self, address: Multiaddr, peer: str | None, timeout_s: float = limits.HANDSHAKE_TIMEOUT_S) -> Link:
        """See port.Transport.dial."""
        expected = expected_peer(address, peer, self._identity.peer_id)
        if address.transport != "tcp":
            raise LinkError(f"{address} is no TCP address", address=str(address))
        ready: asyncio.Future[Connection] = asyncio.get_running_loop().create_future()
        link = Link(self._plan(ready.set_result), inbound=False, expected=expected)
        up = False
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.get_running_loop().create_connection(lambda: link, address.host, address.port)
                await asyncio.wait((ready, link.closed), return_when=asyncio.FIRST_COMPLETED)
            up = ready.done()
        except TimeoutError as error:
            raise LinkError(f"{address} did not answer within {timeout_s:g} s", address=str(address)) from error
        except (OSError, UnicodeError) as error:
            raise LinkError(f"cannot connect to {address}: {_said(error)}", address=str(address)) from error
        finally:
            if not up:
                link.abort("the dial was given up")
        if link.closed.done():
            raise LinkError(
                f"cannot connect to {address}: {link.closed.result()}", address=str(address), found=link.found
            )
        return link

    async def listen(self, host: str, port: int, on_connection: ConnectionHandler) -> TcpListener:
        """See port.Transport.listen."""
        links: set[Link] = set()
        plan = self._plan(on_connection, links)
        try:
            server = await asyncio.get_running_loop().create_server(
                lambda: Link(plan, inbound=True, expected=None), host, port, backlog=_ACCEPT_BACKLOG
            )
        except (OSError, UnicodeError) as error:
            number = error.errno if isinstance(error, OSError) else 0
            raise LinkError(f"cannot listen on {host} port {port}: {_said(error)}", errno=number) from error
        return TcpListener(server, links)

    async def close(self) -> None:
        """See port.Transport.close."""
        for link in list(self._links):
            if link.ready:
                link.close("this node stops")
            else:
                link.abort("this node stops")
        if self._links:
            await asyncio.wait(list(self._links.values()))

    def _plan(self, on_ready: ConnectionHandler, listened: set[Link] | None = None) -> LinkPlan:
        return LinkPlan(
            identity=self._identity,
            protocols=self._protocols,
            identify=self._identify,
            may_start=partial(self._started, listened),
            on_ready=partial(self._ready, on_ready, listened),
            on_end=partial(self._ended, listened),
        )

    def _started(self, listened: set[Link] | None, link: Link) -> bool:
        self._links[link] = asyncio.get_running_loop().create_future()
        if listened is None:
            return True
        if self.doors.enter(link.host, asyncio.get_running_loop().time()):
            return False
        listened.add(link)
        return True

    def _ready(self, on_ready: ConnectionHandler, listened: set[Link] | None, link: Link) -> None:
        self._settle(listened, link)
        on_ready(link)

    def _ended(self, listened: set[Link] | None, link: Link) -> None:
        self._settle(listened, link)
        gone = self._links.pop(link, None)
        if gone is not None and not gone.done():
            gone.set_result(None)

    def _settle(self, listened: set[Link] | None, link: Link) -> None:
        """A handshake is over, one way or the other."""
        if listened is not None and link in listened:
            listened.remove(link)
            self.doors.leave(link.host, "" if link.ready else link.offence)


class TcpListener:
    """See port.Listener."""

    def __init__(self, server: asyncio.Server, handshakes: set[Link]) -> None:
        self.addresses = tuple(of_socket(*sock.getsockname()[:2]) for sock in server.sockets)
        self._server = server
        self._handshakes = handshakes

    async def close(self) -> None:
        """See port.Listener.close; handshakes under way are dropped."""
        self._server.close()
        for link in list(self._handshakes):
            link.abort("this node stops listening")
        await asyncio.sleep(0)


def _said(error: OSError | UnicodeError) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error)
