"""Reaching members that are not connected: dialled for a message when there is one, and let go when nothing is left.

A mesh may be larger than `node.max_peers`. Then a node is connected to some of it at random, and the choice turns over;
whom it needs for a task it dials for that task. A few links above the bound are taken for a moment (the switch's
bound), and idle ones leave for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Final, NamedTuple

from clawnet import limits
from clawnet.market.capability import draw
from clawnet.mesh.roster import PeerRecord
from clawnet.node.context import Context
from clawnet.wire.events import Dial, Hangup
from clawnet.wire.messages import Message

if TYPE_CHECKING:
    from clawnet.node.kernel import Rooms

ON_DEMAND: Final = -1
"""The call under which the node dials for itself, once: DialEnded comes back here."""
LET_GO: Final = "room is needed; dial again when there is work"
FULL: Final = "peers already"
"""In the reason of a switch that has as many links as it may have."""


class Letter(NamedTuple):
    """A message that waits for its receiver to be connected, and until when it is of use."""

    message: Message
    until_ms: int


class Unreachable(NamedTuple):
    """A member that could not be dialled: not tried again for a task until then; how long that pause is."""

    until_ms: int
    pause_ms: int


class Reaching:
    """What waits for a connection by peer; who was lost or could not be reached; which links stay."""

    def __init__(self, ctx: Context, rooms: Rooms) -> None:
        self._ctx = ctx
        self._rooms = rooms
        self._letters: dict[str, list[Letter]] = {}
        self._unreachable: dict[str, Unreachable] = {}
        self._lost: dict[str, int] = {}
        self._visited: set[str] = set()
        """Dialled from here and not kept by the switch: it does not dial them again when the link breaks."""
        self._dialling: set[str] = set()
        self._turned_ms = 0
        self.reloaded()

    def reloaded(self) -> None:
        """How many links there may be is read anew. In a large mesh half as many are wanted, so that others find room,
        but not fewer than the least.
        """
        config = self._ctx.config
        self._links_max = config.integer("node.max_peers")
        self._links_wanted = min(self._links_max, max(self._links_max // 2, config.integer("node.min_peers")))

    # --- who could be reached

    def lively(self, record: PeerRecord) -> bool:
        """Whether a member that is not connected is likely to run: its card is fresh, and it was not lost since."""
        peer, serial = record.peer, self._serial(record.peer)
        return (
            serial >= self._ctx.now - limits.CARD_AGE_MS
            and self._lost.get(peer, 0) < max(1, serial)
            and peer not in self._ctx.links
            and not record.muted
            and not self._rooms.members.banned(peer)
        )

    def can_dial(self, peer: str) -> bool:
        """Whether a task may be offered to this member though it is not connected."""
        record = self._rooms.members.records.get(peer)
        return record is not None and self.lively(record) and self._may_dial(record)

    def _may_dial(self, record: PeerRecord) -> bool:
        """Whether there is where to dial it, and it did not fail just now."""
        failed = self._unreachable.get(record.peer)
        return (
            bool(record.addresses)
            and not record.muted
            and not self._rooms.members.banned(record.peer)
            and (failed is None or failed.until_ms <= self._ctx.now)
        )

    def _serial(self, peer: str) -> int:
        card = self._rooms.members.index.card(peer)
        return card.serial if card is not None else 0

    def others(self) -> Iterable[PeerRecord]:
        """Members that are likely to run, and not connected."""
        return (record for record in self._rooms.members.records.values() if self.lively(record))

    def far(self, fitting: Mapping[str, object], count: int, barred: frozenset[str]) -> list[str]:
        """At most `count` of these that are not connected and may be dialled, picked at random."""
        pick = self._rooms.members.pick
        found: list[str] = []
        for peer in draw(list(fitting), min(len(fitting), limits.CANDIDATE_POOL_MAX), pick):
            if len(found) >= count:
                break
            if peer not in barred and peer not in self._ctx.links and self.can_dial(peer):
                found.append(peer)
        return found

    # --- messages for which a link is made

    def send(self, peer: str, message: Message, until_ms: int, addresses: Iterable[str] = ()) -> bool:
        """Sends now, or once the peer is connected, which is tried for REACH_MS at most; False: it is not tried."""
        ctx = self._ctx
        if ctx.connected(peer):
            ctx.send(peer, message)
            return True
        record = self._rooms.members.records.get(peer)
        known = record.addresses if record is not None else []
        where = tuple(dict.fromkeys((*addresses, *known)))[: limits.DIAL_ADDRESSES_MAX]
        waiting = self._letters.get(peer)
        if waiting is None:
            if not where or len(self._letters) >= limits.REACH_PEERS_MAX:
                return False
            waiting = self._letters[peer] = []
            self._make_room(1)
            self._visit(peer, where)
            ctx.wake(("reach", peer), ctx.now + limits.REACH_MS)
            ctx.count("dialled_on_demand_total")
        if len(waiting) >= limits.REACH_MESSAGES_PER_PEER_MAX:
            return False
        waiting.append(Letter(message, until_ms))
        return True

    def _visit(self, peer: str, addresses: Iterable[str]) -> None:
        self._visited.add(peer)
        self._dialling.add(peer)
        self._ctx.out.append(Dial(ON_DEMAND, peer, tuple(addresses)))

    def up(self, peer: str) -> None:
        """A peer is connected: what waited for it goes out; idle links leave where there are too many."""
        ctx = self._ctx
        self._dialling.discard(peer)
        self._lost.pop(peer, None)
        self._unreachable.pop(peer, None)
        letters = self._letters.pop(peer, None)
        if letters is not None:
            ctx.sleep(("reach", peer))
        for letter in letters or ():
            if letter.until_ms >= ctx.now:
                ctx.send(peer, letter.message)
        self._make_room(0)

    def down(self, peer: str, reason: str) -> None:
        """A link is gone. One that was let go stays a member to call; any other may have been switched off.

        Where work is under way the link has to come back, whoever made it: the other side may know of nothing that it
        would dial for.
        """
        record = self._rooms.members.records.get(peer)
        self._visited.discard(peer)
        if LET_GO in reason:
            self._ctx.out.append(Hangup(peer, LET_GO))  # else the switch would dial it again for ever
            return
        self._lost[peer] = self._ctx.now
        if record is not None and record.addresses and peer in self._busy():
            self._ctx.out.append(Dial(0, peer, tuple(record.addresses)))

    def dial_ended(self, peer: str, reason: str) -> None:
        """A member could not be reached, now or for a first time."""
        self._visited.discard(peer)
        self._dialling.discard(peer)
        if FULL in reason:
            self._ctx.out.append(Hangup(peer, LET_GO))
        self._give_up(peer)

    def timer(self, peer: str) -> None:
        """What waited for this peer has waited long enough; without a peer: there were more links than may be."""
        if not peer:
            self._make_room(0)
        elif peer in self._letters:
            self._give_up(peer)

    def _give_up(self, peer: str) -> None:
        """Nobody waits for this peer, and for a while no task dials it."""
        earlier = self._unreachable.pop(peer, None)
        pause_ms = min(2 * earlier.pause_ms, limits.UNREACHABLE_MAX_MS) if earlier else limits.UNREACHABLE_MIN_MS
        self._unreachable[peer] = Unreachable(self._ctx.now + pause_ms, pause_ms)
        if len(self._unreachable) > limits.CAPABILITY_CARDS_MAX:
            del self._unreachable[next(iter(self._unreachable))]
        if self._letters.pop(peer, None) is not None:
            self._ctx.sleep(("reach", peer))
            self._rooms.auctions.out_of_reach(peer)

    # --- which links there are

    def start(self) -> None:
        """Dials the members known: all for good where there is room for all, else some at random, and who is owed."""
        members = self._rooms.members
        records = [r for r in members.records.values() if r.addresses and not r.muted and not members.banned(r.peer)]
        if len(records) <= self._links_max:
            for record in sorted(records, key=lambda record: -record.last_ms):
                members.redial(record)
            return
        busy = self._busy()
        for record in (record for record in records if record.peer in busy):
            self._ctx.out.append(Dial(0, record.peer, tuple(record.addresses)))
        for record in self._drawn([record for record in records if record.peer not in busy], self._links_wanted):
            self._visit(record.peer, record.addresses)

    def keep_up(self) -> None:
        """Every minute: as many links as are wanted; in a mesh larger than may be connected they turn over."""
        ctx = self._ctx
        self._dialling.clear()
        self._make_room(0)
        self._forget()
        self._call_again()
        if self.all_fit:
            if len(ctx.links) < ctx.config.integer("node.min_peers"):
                self.start()
            return
        count = min(limits.LINKS_DIALLED_PER_MINUTE, self._links_wanted - len(ctx.links))
        if count <= 0 and ctx.now - self._turned_ms >= limits.LINKS_TURNED_EVERY_MS:
            self._turned_ms = ctx.now
            count = self._let_go(1)
        if count > 0:
            for record in self._drawn([r for r in self.others() if self.can_dial(r.peer)], count):
                self._visit(record.peer, record.addresses)

    def _call_again(self) -> None:
        """Members with whom something is under way and who let the link go, some a minute: what is owed must arrive."""
        ctx, members = self._ctx, self._rooms.members
        away = [
            record
            for peer in self._busy()
            if peer not in ctx.links and (record := members.records.get(peer)) is not None and self._may_dial(record)
        ]
        for record in self._drawn(sorted(away, key=lambda record: record.peer), limits.LINKS_DIALLED_PER_MINUTE):
            self._visit(record.peer, record.addresses)

    def connect(self, record: PeerRecord) -> None:
        """A member that may be connected for good, if there is room: kept where all fit, else until it is let go."""
        if self.all_fit:
            if len(self._ctx.links) < self._links_max:
                self._ctx.out.append(Dial(0, record.peer, tuple(record.addresses)))
        elif len(self._ctx.links) + len(self._dialling) < self._links_wanted:
            self._visit(record.peer, record.addresses)

    @property
    def all_fit(self) -> bool:
        """Whether a node can be connected to all members that it knows."""
        return len(self._rooms.members.records) <= self._links_max

    def _drawn(self, records: list[PeerRecord], count: int) -> list[PeerRecord]:
        by_peer = {record.peer: record for record in records}
        return [by_peer[peer] for peer in draw(list(by_peer), count, self._rooms.members.pick)]

    def _make_room(self, more: int) -> None:
        """Lets idle links go until `more` fit below the bound; those made just now get a moment to be of use."""
        count = len(self._ctx.links) + more - self._links_max
        if count > self._let_go(count) and not more:
            self._ctx.wake(("reach", ""), self._ctx.now + limits.LINK_IDLE_MS)

    def _let_go(self, count: int) -> int:
        """Ends at most `count` links, at random, of members that nothing is under way with; how many it ended."""
        if count <= 0:
            return 0
        ctx = self._ctx
        busy = self._busy()
        oldest_ms = ctx.now - limits.LINK_IDLE_MS
        idle = [
            p for p, link in ctx.links.items() if p not in busy and link.ring != "own" and link.since_ms <= oldest_ms
        ]
        gone = draw(idle, count, self._rooms.members.pick)
        for peer in gone:
            ctx.out.append(Hangup(peer, LET_GO))
        return len(gone)

    def _busy(self) -> set[str]:
        """Peers that a task, a job, an auction, or a message that must arrive needs."""
        rooms = self._rooms
        busy = {row.peer for row in rooms.outbox.rows.values()}
        busy.update(job.peer for job in rooms.jobs.jobs.values())
        busy.update(attempt.peer for task in rooms.tasks.open.values() for attempt in task.attempts)
        busy.update(peer for auction in rooms.auctions.live.values() for peer in auction.asked)
        busy.update(self._letters)
        return busy

    def _forget(self) -> None:
        """Who was lost before its card was made is no news any longer."""
        oldest_ms = self._ctx.now - limits.CARD_AGE_MS
        self._lost = {peer: at_ms for peer, at_ms in self._lost.items() if at_ms > oldest_ms}
        self._visited &= self._ctx.links.keys() | self._letters.keys()
