"""Cards: what this node says of itself, what others said of themselves, and how a card gets round the mesh."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from clawnet import __version__, limits
from clawnet.errors import ClawnetError, WireError
from clawnet.identity.keys import peer_id_of
from clawnet.identity.membership import verify_keys
from clawnet.market.capability import AI, capability_hash, draw
from clawnet.market.machine import MILLI, Amounts
from clawnet.market.taskspec import WASM
from clawnet.mesh.roster import PeerRecord
from clawnet.node.context import Context
from clawnet.node.gossiping import Rate
from clawnet.wire.codec import decode_struct, encode
from clawnet.wire.events import CapacityChanged, Listening, MessageIn
from clawnet.wire.messages import RELAYED_BYTES_MAX, Kind, PeerCard, PeerInfo, Relayed

if TYPE_CHECKING:
    from clawnet.node.kernel import Rooms

FIRST_HOP = limits.RELAY_HOPS_MAX - limits.CARD_HOPS
"""A card's first `hops`, to CARD_HEARERS of those connected: they pass it on. To the others it is theirs alone, so that
one change costs a message a link and CARD_HEARERS squared more, however large the mesh.

Who is farther off hears of it by introductions.
"""


class Cards:
    """The own card, signed, and everybody's newest; the capability index is fed from here."""

    def __init__(self, ctx: Context, rooms: Rooms) -> None:
        self._ctx = ctx
        self._rooms = rooms
        self.addresses: list[str] = []
        self.capacity = CapacityChanged((), (), 0, 0, 0)
        self._serial = 0
        self._made_ms = 0
        self._stated_ms = 0
        self._hearers = 0
        """How many more may be asked to pass the present card on."""
        self._greeting: dict[str, None] = {}
        """Connected peers whose first card on this link has not come yet."""
        self._introduced = Rate(limits.CARDS_INTRODUCED_PER_MINUTE, 1)
        self._told: dict[str, int] = {}
        """By connected peer: up to which mark of the index the cards here were told to it."""
        self._statement = b""
        self._signature = b""
        self.own = self._make()
        self.own_hash = capability_hash(self.own)

    # --- the own card

    def _make(self) -> PeerCard:
        config, capacity = self._ctx.config, self.capacity
        declared = set(config.words("node.capabilities"))
        computing = [word for word in capacity.capabilities if word.startswith("op:") or word == WASM]
        offered = [word for word in capacity.capabilities if word in declared and word not in computing]
        if "compute" in offered:
            offered += computing
        shell = list(capacity.shell_rings) if "shell-execution" in offered else []
        prompts = list(capacity.prompt_rings) if AI in offered else []
        jobs = getattr(self._rooms, "jobs", None)
        members = self._rooms.members
        return PeerCard(
            peer=self._ctx.wire_me,
            serial=self._serial,
            name=members.name,
            version=f"clawnet/{__version__}",
            addresses=self.addresses[:16],
            capabilities=sorted(offered),
            labels=list(config.words("node.labels")),
            os=getattr(jobs, "os_family", ""),
            cpu=capacity.cpu,
            memory_bytes=capacity.memory_bytes,
            gpu=capacity.gpu,
            models=list(capacity.models) if prompts else [],
            slots=getattr(jobs, "slots", 0),
            running=len(jobs.running) if jobs is not None else 0,
            queued=0,
            shell_rings=shell,
            certificates=members.facts.certificates,
            prompt_rings=prompts,
            rotations=members.facts.rotations,
        )

    def refresh(self) -> None:
        """What this node can do, or where it listens, has changed: a new card, signed, to all that are connected."""
        ctx = self._ctx
        self._serial = max(self._serial + 1, ctx.now)
        self._made_ms = ctx.now
        self.own = self._make()
        self.own_hash = capability_hash(self.own)
        self._statement, self._signature = self._rooms.relay.state(Kind.PEER_INFO, encode(self.own))
        self._hearers = limits.CARD_HEARERS
        hearers = draw(list(ctx.links), limits.CARD_HEARERS, self._rooms.members.pick)
        for peer in dict.fromkeys((*hearers, *ctx.links)):
            self.tell(peer)

    def tell(self, peer: str) -> None:
        """Our own card to one peer. The first one to be told of it waits for the disk; one that nobody hears is not
        written, so that a node that begins again on a full disk still answers.
        """
        if not self._statement:
            self.refresh()
        if self._stated_ms != self._made_ms:
            self._stated_ms = self._made_ms
            self._rooms.twins.stated(self._made_ms)
        hops = FIRST_HOP if self._hearers > 0 else limits.RELAY_HOPS_MAX
        self._hearers -= 1
        self._ctx.send(peer, PeerInfo(self._statement, self._signature, hops))

    def capacity_changed(self, event: CapacityChanged) -> None:
        """The execution adapters have probed what they can do."""
        if event.prompt_trouble != self.capacity.prompt_trouble or event.prompt_rings != self.capacity.prompt_rings:
            rings, reason = " ".join(event.prompt_rings), event.prompt_trouble
            self._ctx.log("warn" if reason else "info", "endpoint.changed", rings=rings, reason=reason)
        self.capacity = event
        slots = self._ctx.config.integer("execution.slots") or max(2, event.cpu)
        self._rooms.jobs.resized(Amounts(slots, event.cpu * MILLI, event.memory_bytes, event.gpu))
        self.refresh()

    def listening(self, event: Listening) -> None:
        """The switch listens at these multiaddrs."""
        self.addresses = list(event.addresses)
        self.refresh()

    def take_over(self, previous: Cards) -> None:
        """A node built again while the process lives: capacity and addresses are still what they were."""
        self.addresses, self.capacity = previous.addresses, previous.capacity
        self._rooms.jobs.resized(previous._rooms.placing.capacity)
        self.refresh()

    # --- others' cards

    def load(self, record: PeerRecord) -> None:
        """The card of a stored peer; one that this version cannot read is told again when its author is connected."""
        if not record.card or record.banned or record.ended:
            return
        try:
            relayed = decode_struct(Relayed, record.card, RELAYED_BYTES_MAX)
            card = decode_struct(PeerCard, relayed.body)
            self._rooms.members.index.put(msgspec.structs.replace(card, peer=record.peer), record.ring)
        except WireError:
            record.card = record.signature = b""

    def introduce(self, newcomer: str, count: int) -> None:
        """Some of the cards known here, picked at random, as they are: whoever hears them passes them on no further.

        Where many connect within a minute the later ones get fewer, and hear the rest as news.
        """
        members, ctx = self._rooms.members, self._ctx
        since_ms = ctx.now - limits.CARD_AGE_MS
        known = [peer for peer in members.index.newest(4 * limits.CARDS_PER_MINUTE, since_ms) if peer != newcomer]
        for _ in range(min(count, len(known))):
            if not self._introduced.take("", ctx.now):
                return
            at = members.pick(len(known))
            known[at], known[-1] = known[-1], known[at]
            record = members.records.get(known.pop())
            if record is not None and record.card and not members.banned(record.peer):
                ctx.send(newcomer, PeerInfo(record.card, record.signature, limits.RELAY_HOPS_MAX))

    def greet(self, peer: str) -> None:
        """A peer is connected: it is told our card, and its own comes."""
        self._greeting[peer] = None
        self.tell(peer)

    def _show_own(self, peer: str, statement: bytes) -> None:
        """The first card of a link is not the one that is known here of `peer`: it is shown that one.

        One that it did not make tells it of a twin (twins.py).
        """
        del self._greeting[peer]
        record = self._rooms.members.records.get(peer)
        if record is not None and record.card and record.card != statement:
            self._ctx.send(peer, PeerInfo(record.card, record.signature, limits.RELAY_HOPS_MAX))

    def outdo(self, read: Relayed) -> None:
        """A card in our name that we did not make: the next one of ours is newer."""
        if read.kind == Kind.PEER_INFO:
            self._serial = max(self._serial, decode_struct(PeerCard, read.body).serial)

    def keep_up(self) -> None:
        """Every minute: news to a peer that lacks most of them; old cards go, the own one is made anew in time."""
        ctx, index = self._ctx, self._rooms.members.index
        for peer in index.stale(ctx.now - limits.CARD_AGE_MS):
            if peer not in ctx.links:
                index.remove(peer)
        self._told = {peer: mark for peer, mark in self._told.items() if peer in ctx.links}
        self._greeting = {peer: None for peer in self._greeting if peer in ctx.links}
        lacking = [peer for peer in ctx.links if self._told.get(peer, 0) < index.heard_total]
        if lacking:
            least = min(self._told.get(peer, 0) for peer in lacking)
            lacking = [peer for peer in lacking if self._told.get(peer, 0) == least]
            self._tell_news(lacking[self._rooms.members.pick(len(lacking))])
        if self._statement and ctx.now - self._made_ms >= limits.CARD_REFRESH_MS:
            self.refresh()

    def _tell_news(self, hearer: str) -> None:
        """The cards that came since this peer was told last, some a time: each goes to it once.

        Where enough are known, a few of members met here: so what a node is told does not grow with the mesh.
        """
        members = self._rooms.members
        index, records = members.index, members.records
        all_of_them = len(index) <= limits.CARDS_ENOUGH
        news = [
            (peer, mark)
            for peer, mark in index.heard_since(self._told.get(hearer, 0))
            if all_of_them or ((record := records.get(peer)) is not None and record.last_ms)
        ]
        most = limits.CARDS_PER_MINUTE if all_of_them else limits.CARDS_MET_PER_MINUTE
        self._told[hearer] = news[most - 1][1] if len(news) > most else index.heard_total
        for peer, _ in news[:most]:
            record = records.get(peer)
            if peer != hearer and record is not None and record.card and not members.banned(peer):
                self._ctx.send(hearer, PeerInfo(record.card, record.signature, limits.RELAY_HOPS_MAX))

    def heard(self, event: MessageIn, message: PeerInfo) -> None:
        """A card, from its author or passed on: kept when it is newer, passed on when it is fresh and not older.

        Raises WireError or SignatureRefused for what no member may send.
        """
        relay, members = self._rooms.relay, self._rooms.members
        if event.peer in self._greeting:
            self._show_own(event.peer, message.statement)
        read = relay.read(Kind.PEER_INFO, message)
        if read is None:
            return
        travels = message.hops < limits.RELAY_HOPS_MAX
        held = members.records.get(self._ctx.ids.inner(read.author))
        if held is not None and (held.banned or held.ended):
            return
        if held is not None and held.card == message.statement and not travels and members.index.card(held.peer):
            return
        card = decode_struct(PeerCard, read.body)
        if card.peer != read.author:
            raise WireError(f"a card of {card.peer[-8:]} stated by {read.author[-8:]}")
        keys = self._rooms.successions.keys_shown(card.peer, card.rotations)
        card = msgspec.structs.replace(card, peer=peer_id_of(keys[0]))
        known = members.index.card(card.peer)
        if known is not None and (known.serial > card.serial or (known.serial == card.serial and not travels)):
            return
        if card.serial > self._ctx.now + limits.MESSAGE_AGE_MS or card.serial < self._ctx.now - limits.CARD_AGE_MS:
            self._ctx.count("relayed_refused_total", "card_age")
            return
        relay.check(message, read)
        if self._rooms.successions.refusal(keys, ""):
            self._ctx.count("relayed_refused_total", "key_given_up")
            return
        record = members.records.get(card.peer) or self._meet(card, keys)
        if record is None or record.banned or record.ended:
            return
        if card.rotations:
            self._rooms.successions.learn(keys, card.rotations)
        if travels and relay.fresh(read):
            relay.pass_on(message, card.peer, event.peer, degree=limits.CARD_HEARERS)
        if members.index.put(card, record.ring) or not record.card:
            record.card, record.signature, record.addresses = message.statement, message.signature, _merge(card, record)
            members.save(record)
            if card.peer in self._ctx.links and (known is None or known.addresses != card.addresses):
                members.reach(card.peer, ())
            else:
                members.redial(record)

    def _meet(self, card: PeerCard, keys: list[bytes]) -> PeerRecord | None:
        """A member we only heard of: its certificates are in its card, so it is known before it is ever connected."""
        members = self._rooms.members
        try:
            proven = verify_keys(members.facts.charter, members.facts.mesh, card.certificates, keys)
        except ClawnetError as error:
            self._ctx.count("relayed_refused_total", error.code)
            return None
        if self._rooms.removals.reason(card.certificates):
            self._ctx.count("relayed_refused_total", "membership_over")
            return None
        if not members.may_hear_of(proven.owner):
            self._ctx.count("relayed_refused_total", "owner_share")
            return None
        record = members.remember(card.peer, card.name, card.certificates, proven)
        record.rotations = list(card.rotations)
        return record


def _merge(card: PeerCard, record: PeerRecord) -> list[str]:
    return [*card.addresses, *(a for a in record.addresses if a not in card.addresses)][: limits.DIAL_ADDRESSES_MAX]
