"""Offers by hearsay: a task that too few known members could do is passed on, and whoever can do it dials and bids.

What goes round is the author's own signed statement with the content of a direct offer, its addresses and its
certificates. A bid goes to the author alone, over a link of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from clawnet import limits
from clawnet.errors import ClawnetError, WireError
from clawnet.identity.keys import peer_id_of
from clawnet.identity.membership import verify_keys
from clawnet.market.records import Task
from clawnet.node.context import Context
from clawnet.wire.codec import decode_struct, encode
from clawnet.wire.events import MessageIn
from clawnet.wire.hearsay import OpenOffer
from clawnet.wire.messages import Bid, Gossip, Kind, Offer, Relayed

if TYPE_CHECKING:
    from clawnet.node.kernel import Rooms

MINUTE_MS: Final = 60_000
RINGS: Final = ("own", "member")


class Rate:
    """How often each of many has done something within the present minute. Bounded by who is counted at all."""

    def __init__(self, per_minute: int, keys_max: int) -> None:
        self._per_minute = per_minute
        self._keys_max = keys_max
        self._minute = 0
        self._counts: dict[str, int] = {}

    def take(self, key: str, now_ms: int) -> bool:
        """False when this one has had its share of the minute, or too many others are counted."""
        minute = now_ms // MINUTE_MS
        if minute != self._minute:
            self._minute = minute
            self._counts.clear()
        count = self._counts.get(key, 0)
        if count >= self._per_minute or (not count and len(self._counts) >= self._keys_max):
            return False
        self._counts[key] = count + 1
        return True


class Gossiping:
    """Own offers that go round, one of a kind at a time; others', judged, answered or passed on once."""

    def __init__(self, ctx: Context, rooms: Rooms) -> None:
        self._ctx = ctx
        self._rooms = rooms
        self._lanes: dict[bytes, bytes] = {}
        self._in_vain: dict[bytes, int] = {}
        self._own = Rate(limits.GOSSIP_PER_AUTHOR_PER_MINUTE, 1)
        self._authors = Rate(limits.GOSSIP_PER_AUTHOR_PER_MINUTE, limits.GOSSIP_AUTHORS_MAX)
        self._carriers = Rate(limits.GOSSIP_PER_PEER_PER_MINUTE, limits.GOSSIP_AUTHORS_MAX)

    # --- own offers

    def is_worth_it(self, task: Task, ring: str, lane: bytes) -> bool:
        """Whether members that this node does not know could do it: few that it knows can, and not all are connected.

        In a mesh where everybody is connected to everybody there is nobody to be found.
        """
        rooms, ctx = self._rooms, self._ctx
        self._in_vain = {key: until for key, until in self._in_vain.items() if until > ctx.now}
        return (
            ring in RINGS
            and not task.spec["peer"]
            and lane not in self._in_vain
            and bool(self._hearers(ring))
            and any(True for _ in rooms.reaching.others())
            and rooms.offers.are_few(task, ring)
            and not (ring == "member" and rooms.spending.exhausted(task))
        )

    def is_under_way(self, lane: bytes) -> bool:
        """Whether another task of this kind goes round, or as many as a minute allows have."""
        if self._lanes.get(lane) in self._rooms.auctions.live:
            return True
        return not self._own.take("", self._ctx.now)

    def begins(self, task: Task, lane: bytes) -> None:
        """The offer of this task goes round."""
        live = self._rooms.auctions.live
        self._lanes = {key: task_id for key, task_id in self._lanes.items() if task_id in live}
        self._lanes[lane] = task.task_id

    def was_in_vain(self, lane: bytes) -> None:
        """Nobody who heard of it took it: the next of its kind does not ask around for a while."""
        self._in_vain[lane] = self._ctx.now + limits.GOSSIP_FRUITLESS_MS

    def tell(self, offer: Offer, ring: str) -> None:
        """An own offer, to RELAY_DEGREE of those who may see it."""
        rooms, ctx = self._rooms, self._ctx
        cards = rooms.cards.own
        body = encode(OpenOffer(offer, ring, cards.addresses, cards.certificates, cards.rotations))
        message = Gossip(*rooms.relay.state(Kind.MARKET_TASK_ANNOUNCE, body), 0)
        ctx.count("offers_gossiped_total")
        rooms.relay.pass_on(message, ctx.me, "", self._hearers(ring))

    def _hearers(self, ring: str) -> list[str]:
        return [peer for peer, link in self._ctx.links.items() if ring == "member" or link.ring == "own"]

    # --- others' offers

    def heard(self, event: MessageIn, message: Gossip) -> None:
        """An offer that somebody passed on: a bid where this node can do it, else one hop more. Once for each.

        Raises WireError or SignatureRefused for what no member may send.
        """
        rooms, ctx = self._rooms, self._ctx
        if not self._carriers.take(event.peer, ctx.now):
            ctx.count("relayed_refused_total", "carrier_rate")
            return
        read = rooms.relay.read(Kind.MARKET_TASK_ANNOUNCE, message)
        if read is None or rooms.members.banned(ctx.ids.inner(read.author)):
            return
        called = decode_struct(OpenOffer, read.body, limits.GOSSIP_BYTES_MAX)
        if called.ring not in RINGS:
            raise WireError(f"an offer to ring {called.ring!r}")
        if called.offer.close_ms <= ctx.now:
            ctx.count("relayed_refused_total", "offer_over")
            return
        rooms.relay.check(message, read)
        ring = self._ring_of(read, called)
        if not ring or (called.ring == "own" and ring != "own"):
            ctx.count("relayed_refused_total", "ring")
            return
        author = ctx.ids.inner(read.author)
        if not self._authors.take(author, ctx.now):
            ctx.count("relayed_refused_total", "author_rate")
            return
        if rooms.relay.fresh(read) and not self._bids(author, called, ring):
            rooms.relay.pass_on(message, author, event.peer, self._hearers(called.ring))

    def _ring_of(self, read: Relayed, called: OpenOffer) -> str:
        """The author's ring here, by its certificates; "" for who is no member."""
        members = self._rooms.members
        facts = members.facts
        try:
            keys = self._rooms.successions.keys_shown(read.author, called.rotations)
            proven = verify_keys(facts.charter, facts.mesh, called.certificates, keys)
        except ClawnetError as error:
            self._ctx.count("relayed_refused_total", error.code)
            return ""
        if members.banned(peer_id_of(keys[0])) or self._rooms.removals.reason(called.certificates):
            self._ctx.count("relayed_refused_total", "membership_over")
            return ""
        if self._rooms.successions.refusal(keys, ""):
            self._ctx.count("relayed_refused_total", "key_given_up")
            return ""
        self._rooms.successions.learn(keys, called.rotations)
        return "own" if proven.owner == facts.owner else "member"

    def _bids(self, author: str, called: OpenOffer, ring: str) -> bool:
        """A bid over a link to the author, made for it where there is none; False: this node does not want the task.

        Where it bids the offer goes no further this way: so an offer that many could take does not reach them all.
        """
        answer = self._rooms.bidding.answer(author, called.offer, ring)
        if not isinstance(answer, Bid):
            return False
        return self._rooms.reaching.send(author, answer, called.offer.close_ms, called.addresses)
