"""The connections that are open, with what goes over each: how many may stay without a membership, and for how long."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from clawnet import limits
from clawnet.errors import LinkError
from clawnet.net.control import Link, LinkState
from clawnet.net.doors import FAILED
from clawnet.net.joining import place_of
from clawnet.net.port import Connection
from clawnet.net.ratelimit import Arrivals


class Visit:
    """One connection and what goes over it; without a link, or blobs of a peer linked elsewhere, it ends soon."""

    __slots__ = ("blobs", "connection", "link", "place", "timer")

    def __init__(self, connection: Connection, place: str, timer: asyncio.TimerHandle) -> None:
        self.connection = connection
        self.link: Link | None = None
        self.blobs = 0
        self.place = place
        self.timer = timer


class VisitOwner(Protocol):
    """What the visits ask of, and tell, the switch that owns them."""

    def ban(self, peer: str, reason: str) -> None:
        """The peer broke the rules beyond patience."""

    def note(self, level: str, event: str, **fields: Any) -> None:
        """A log event."""

    def count(self, name: str, by: int = 1) -> None:
        """A counter goes up."""


class Visits:
    """Every connection from its beginning to its end. `on_end` is called once for each."""

    def __init__(self, owner: VisitOwner, on_end: Callable[[Connection], None]) -> None:
        self._owner = owner
        self._on_end = on_end
        self._open: dict[Connection, Visit] = {}
        self._strangers: Counter[str] = Counter()
        self._dials = Arrivals(limits.DIALS_PER_ADDRESS_PER_MINUTE)

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[Visit]:
        return iter(list(self._open.values()))

    def welcome(self, connection: Connection, peers_max: int, *, known: bool) -> bool:
        """Whether an inbound connection may stay; `known` is of a peer that is linked. If not, it is closed."""
        place = place_of(connection.address)
        if len(self._open) >= peers_max + limits.PENDING_HANDSHAKES_MAX:
            reason = "this node has no room for more connections"
        elif not known and self._strangers[place] >= limits.VISITORS_PER_ADDRESS_MAX:
            reason = "too many connections from there show no membership"
        else:
            return True
        self._owner.count("connections_refused")
        self._owner.note("security", "connection.refused", address=place, reason=reason)
        connection.close(reason)
        return False

    def watch(self, connection: Connection, *, known: bool) -> Visit:
        """A connection begins; without a membership shown on it it ends after CONNECTION_IDLE_S."""
        loop = asyncio.get_running_loop()
        place = place_of(connection.address) if connection.inbound and not known else ""
        visit = Visit(connection, place, loop.call_later(limits.CONNECTION_IDLE_S, self._over, connection))
        self._open[connection] = visit
        if place:
            self._strangers[place] += 1
        connection.closed.add_done_callback(lambda _: self._ended(connection))
        return visit

    def linked(self, connection: Connection) -> None:
        """The peer has shown its membership."""
        visit = self._open.get(connection)
        if visit is not None:
            self._no_stranger(visit)

    def may_dial(self, host: str, now_s: float) -> None:
        """Raises LinkError when that address was dialled too often: a card may name the address of anybody."""
        if not self._dials.take(host, now_s):
            self._owner.count("dials_refused")
            raise LinkError(f"{host} was dialled {limits.DIALS_PER_ADDRESS_PER_MINUTE} times within a minute")

    def at_the_door(self, what: str, place: str, reason: str) -> None:
        """See doors.Doors.tell."""
        self._owner.count(what)
        event = "handshake.failed" if what == FAILED else "connection.refused"
        self._owner.note("security", event, address=place, reason=reason)

    def cut(self, connection: Connection) -> None:
        """Counts, logs and bans if the connection has ended for what its peer did."""
        if connection.offence:
            self._owner.count("connections_cut")
            fields = {"peer": connection.peer, "address": connection.address, "reason": connection.offence}
            self._owner.note("security", "connection.cut", **fields)
            self._owner.ban(connection.peer, connection.offence)

    def _over(self, connection: Connection) -> None:
        visit = self._open[connection]
        if visit.blobs:
            loop = asyncio.get_running_loop()
            visit.timer = loop.call_later(limits.CONNECTION_IDLE_S, self._over, connection)
        elif visit.link is None or visit.link.state is not LinkState.UP:
            self._owner.count("visits_ended")
            connection.close(f"no membership shown within {limits.CONNECTION_IDLE_S:g} s")

    def _ended(self, connection: Connection) -> None:
        visit = self._open.pop(connection)
        visit.timer.cancel()
        self._no_stranger(visit)
        self._on_end(connection)
        self.cut(connection)

    def _no_stranger(self, visit: Visit) -> None:
        if visit.place:
            self._strangers[visit.place] -= 1
            if not self._strangers[visit.place]:
                del self._strangers[visit.place]
            visit.place = ""
