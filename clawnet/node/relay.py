"""What members pass on for each other: signed statements, each taken once over restarts too, degree and hops bounded.

A message class that carries one has the fields of PeerInfo (statement, signature, hops). Its handler asks `fresh`
whether the statement is new here, and calls `pass_on` when it is worth a hop more.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar

import msgspec

from clawnet import limits
from clawnet.errors import RemoteError
from clawnet.market.capability import draw
from clawnet.node.context import Context
from clawnet.wire.messages import Kind, PeerInfo, Relayed
from clawnet.wire.relayed import check_relayed, make_relayed, read_relayed
from clawnet.wire.replay import ReplayWindow, Seen

if TYPE_CHECKING:
    from clawnet.node.kernel import Rooms

FLOOR_KEY = "relay_floor"
Carrier = TypeVar("Carrier", bound=PeerInfo)


class Relay:
    """The replay window of relayed statements (table `relayed`), and the choice of those who hear them next."""

    def __init__(self, ctx: Context, rooms: Rooms) -> None:
        self._ctx = ctx
        self._rooms = rooms
        self.window = ReplayWindow()
        self.window.forgotten = self._forgotten
        self.window.group_of = self._group_of

    def load(self, rows: list[Seen], floor_ms: int) -> None:
        """The window as the database holds it."""
        self.window.restore(rows, floor_ms)

    def _forgotten(self, row: Seen) -> None:
        self._ctx.delete("relayed", row[1], row[2])

    def _group_of(self, author: str) -> bytes:
        """One owner can have any number of nodes: what they say is counted together, but for own machines."""
        record = self._rooms.members.get(self._ctx.ids.inner(author))
        return record.owner if record is not None and record.ring != "own" else author.encode()

    def state(self, kind: Kind, body: bytes) -> tuple[bytes, bytes]:
        """A statement of this node's own: (statement, signature)."""
        ctx = self._ctx
        return make_relayed(
            ctx.wire_me, kind, body, identifier=self._rooms.twins.identifier(), time_ms=ctx.now, sign=ctx.ports.sign
        )

    def read(self, kind: Kind, message: PeerInfo) -> Relayed | None:
        """What a message says, still unverified; None for this node's own statements and those known already.

        A card that was heard before and is not held any more (a ban, no room) is no known one. Raises WireError.
        """
        read = read_relayed(kind, message.statement)
        if read.author == self._ctx.wire_me:
            self._rooms.twins.heard(message, read)
            return None
        if kind is not Kind.MEMBERSHIP and (self._ctx.ids.given_up(read.author) or self._own_before(read.author)):
            self._ctx.count("relayed_refused_total", "key_given_up")
            return None
        if self.window.seen(read.author, read.id) and not (kind is Kind.PEER_INFO and self._lacks_card(read.author)):
            self._ctx.count("relayed_repeated_total", kind.name)
            return None
        return read

    def _lacks_card(self, author: str) -> bool:
        return self._rooms.members.index.card(self._ctx.ids.inner(author)) is None

    def _own_before(self, author: str) -> bool:
        """Whether this node gave up the key of this id: what is still said under it is not its word."""
        return self._ctx.me != self._ctx.wire_me and self._rooms.members.is_me(author)

    @staticmethod
    def check(message: PeerInfo, read: Relayed) -> None:
        """Raises SignatureRefused unless its author signed it. Before anything is believed or admitted."""
        check_relayed(read, message.statement, message.signature)

    def fresh(self, read: Relayed) -> bool:
        """True the first time, and never again for this statement, whatever happens to the process in between.

        False for one from outside the window of time, and when its author has filled its share of the window.
        """
        ctx, floor_ms = self._ctx, self.window.floor_ms
        try:
            taken = self.window.admit(read.author, read.id, read.time_ms, ctx.now)
        except RemoteError as error:
            ctx.count("relayed_refused_total", error.code)
            return False
        if taken:
            ctx.put("relayed", read.author, read.id, read.time_ms)
        if self.window.floor_ms != floor_ms:
            ctx.put("meta", FLOOR_KEY, str(self.window.floor_ms).encode())
        return taken

    def pass_on(
        self,
        message: Carrier,
        author: str,
        sender: str,
        among: Iterable[str] | None = None,
        degree: int = limits.RELAY_DEGREE,
    ) -> None:
        """One hop more, to `degree` connected peers at random that are neither author nor sender.

        `among`: to none but these.
        """
        if message.hops >= limits.RELAY_HOPS_MAX:
            return
        peers = [peer for peer in (self._ctx.links if among is None else among) if peer not in (author, sender)]
        onward = msgspec.structs.replace(message, hops=message.hops + 1)
        for peer in draw(peers, degree, self._rooms.members.pick):
            self._ctx.send(peer, onward)
