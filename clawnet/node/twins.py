"""Two programs with one identity: how a node notices that another one speaks with its key, and what it does then."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clawnet import limits
from clawnet.node.context import Context
from clawnet.wire.messages import PeerInfo, Relayed
from clawnet.wire.relayed import check_relayed

if TYPE_CHECKING:
    from clawnet.node.kernel import Rooms

TAG_BYTES = 8
STATED_KEY = "stated"
HEARD_MAX = 1_024


class Twins:
    """Statements of this node carry a tag of this very run in their ids. One that is signed with its key, carries
    another tag and is younger than this run was made by somebody else: a copied home that lives, or a stolen key.

    Members send whoever connects the newest card they have of it, so of two that connect in turn each hears of the
    other. Both say so, and write nothing as long as they hear of each other.
    """

    def __init__(self, ctx: Context, rooms: Rooms) -> None:
        self._ctx = ctx
        self._rooms = rooms
        self._tag = ctx.entropy(TAG_BYTES)
        self._started_ms = 0
        self._heard_ms = 0
        self._stated_ms = 0
        self._heard: dict[bytes, None] = {}

    def load(self, body: bytes) -> None:
        """When the last card that an earlier run told was made, by its clock: that may have been set back since."""
        self._stated_ms = int(body)

    def start(self) -> None:
        """The run begins now: whatever is older was said by an earlier one."""
        self._started_ms = max(self._ctx.now, self._stated_ms)

    def stated(self, made_ms: int) -> None:
        """A card leaves: synced before is when it was made, so that no later run takes it for another program's."""
        self._ctx.put("meta", STATED_KEY, str(made_ms).encode())
        self._ctx.durable()

    def identifier(self) -> bytes:
        """The id of a statement of this run."""
        return self._tag + self._ctx.entropy(16 - TAG_BYTES)

    def heard(self, message: PeerInfo, read: Relayed) -> None:
        """A statement in this node's own name came in; raises RemoteError when it is forged."""
        ctx = self._ctx
        if read.id[:TAG_BYTES] == self._tag or read.time_ms <= self._started_ms or read.id in self._heard:
            return  # what was heard before says nothing of whether the other one still lives
        check_relayed(read, message.statement, message.signature)
        self._heard[read.id] = None
        while len(self._heard) > HEARD_MAX:
            del self._heard[next(iter(self._heard))]
        first = not self.reason()
        self._heard_ms = ctx.now
        self._rooms.cards.outdo(read)
        if first:
            ctx.log("security", "identity.twin", said_at=self._rooms.views.time(read.time_ms))
            ctx.count("identity_twins_total")
            self._rooms.books.chains.restore.begin("another program ran with this node's identity")
            ctx.wake(("twin",), ctx.now)
        self._rooms.books.chains.reconsider()

    def timer(self) -> None:
        """Says again that this one lives, for the other to hear; after a time without a word of it, goes on alone."""
        ctx = self._ctx
        if self.reason():
            self._rooms.cards.refresh()
            ctx.wake(("twin",), min(ctx.now + limits.TWIN_TELL_MS, self._heard_ms + limits.TWIN_HOLD_MS))
        self._rooms.books.chains.reconsider()

    def reason(self) -> str:
        """Why nothing may be written while the other one lives; "" when none does."""
        if self._heard_ms and self._ctx.now < self._heard_ms + limits.TWIN_HOLD_MS:
            return "another program runs with this node's identity: stop one of the two, and remove it"
        return ""
