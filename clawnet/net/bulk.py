"""Which connection bulk data takes: TCP carries tens of times more a second than QUIC, so it is tried beside it.

Such a connection has no control stream: the peer is known by the link that is up, and only blobs may pass.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

from clawnet import limits
from clawnet.errors import LinkError
from clawnet.identity.multiaddr import Multiaddr
from clawnet.net.dialling import parsed
from clawnet.net.port import Connection

Dial = Callable[[str, Sequence[Multiaddr]], Awaitable[Connection]]


class BulkRoutes:
    """The bulk connections this node made, one a peer; closed when their link is, or idle for BULK_IDLE_S."""

    def __init__(self, dial: Dial, addresses_of: Callable[[str], Sequence[str]]) -> None:
        self._dial = dial
        self._addresses_of = addresses_of
        self._open: dict[str, Connection] = {}
        self._making: dict[str, asyncio.Lock] = {}
        self._users: dict[Connection, int] = {}
        self._idle: dict[str, asyncio.TimerHandle] = {}

    @asynccontextmanager
    async def route(self, link: Connection, size: int) -> AsyncIterator[Connection]:
        """The connection to fetch `size` bytes over: `link` itself when it is TCP, they are few, or TCP is closed."""
        peer = link.peer
        known: Connection | None = None
        if link.transport == "quic-v1" and size >= limits.BULK_BYTES_MIN:
            async with self._making.setdefault(peer, asyncio.Lock()):
                known = self._open.get(peer)
                if known is None or known.closed.done():
                    known = await self._make(link)
        if known is None or link.closed.done():
            yield link
            return
        self._users[known] = self._users.get(known, 0) + 1
        self._stop_clock(peer)
        try:
            yield known
        finally:
            self._users[known] -= 1
            if not self._users[known]:
                del self._users[known]
                loop = asyncio.get_running_loop()
                self._idle[peer] = loop.call_later(limits.BULK_IDLE_S, self._over, peer, known)

    def link_down(self, peer: str) -> None:
        """Without its link nobody vouches for the connection."""
        self._making.pop(peer, None)
        self._stop_clock(peer)
        connection = self._open.pop(peer, None)
        if connection is not None:
            connection.close("its link is gone")

    async def _make(self, link: Connection) -> Connection | None:
        peer = link.peer
        try:
            addresses = [where for where in parsed(self._addresses_of(peer)) if where.transport == "tcp"]
            async with asyncio.timeout(limits.BULK_DIAL_S):
                made = await self._dial(peer, addresses) if addresses else None
        except (LinkError, TimeoutError):
            return None
        if made is not None and link.closed.done():
            made.close("its link is gone")
            return None
        if made is not None:
            self._open[peer] = made
        return made

    def _stop_clock(self, peer: str) -> None:
        timer = self._idle.pop(peer, None)
        if timer is not None:
            timer.cancel()

    def _over(self, peer: str, connection: Connection) -> None:
        self._idle.pop(peer, None)
        if self._open.get(peer) is connection:
            del self._open[peer]
        connection.close("bulk data is done")
