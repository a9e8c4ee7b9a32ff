"""Peers of the mesh as this node knows them: admission, cards, links, bans, reputation, and whom to call how."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from clawnet import limits
from clawnet.errors import DataError, NotPermittedError, RemoteError
from clawnet.identity import multiaddr
from clawnet.identity.certificates import Charter, Membership
from clawnet.identity.keys import peer_id_of, public_of
from clawnet.identity.membership import LocalMembership, verify_keys
from clawnet.market.capability import CapabilityIndex
from clawnet.market.records import Attempt, Task
from clawnet.mesh.roster import PeerRecord, pin_name, resolve
from clawnet.node.context import Context, Link
from clawnet.reputation.receipts import Outcome, Receipt
from clawnet.reputation.standing import Reputation
from clawnet.wire.events import Dial, Hangup, MeetPeers, PeerDown, PeerUp, Reloaded
from clawnet.wire.messages import Hello

if TYPE_CHECKING:
    from clawnet.node.kernel import Rooms


class MeshFacts(msgspec.Struct, frozen=True):
    """This node's own membership: charter, mesh id, ring-deciding owner key, certificates, who let it in."""

    charter: Charter
    charter_bytes: bytes
    mesh: bytes
    owner: bytes
    certificates: list[bytes]
    mesh_key: bytes
    inviter: str
    founded: bool
    imported: bool = False
    lease_s: int = 0
    rotations: list[bytes] = []

    @classmethod
    def of(cls, local: LocalMembership, node_public: bytes, mesh_key: bytes) -> MeshFacts:
        """What lies in the home, checked for this key. Raises ConfigError."""
        charter, mesh, proven = local.verified(node_public)
        return cls(
            charter=charter,
            charter_bytes=local.charter,
            mesh=mesh,
            owner=proven.owner,
            certificates=list(local.certificates),
            mesh_key=mesh_key,
            inviter=local.inviter,
            founded=local.founded,
            imported=local.imported,
            lease_s=local.lease_s,
            rotations=local.rotations(),
        )


class Members:
    """All peers by id; the connected ones are ctx.links."""

    def __init__(self, ctx: Context, rooms: Rooms, facts: MeshFacts, name: str) -> None:
        self._ctx = ctx
        self._rooms = rooms
        self.facts = facts
        self.name = name
        self.records: dict[str, PeerRecord] = {}
        self._accounts: dict[bytes, str] = {ctx.account: ctx.me}
        self._shown: set[str] = set()
        self._heard: dict[bytes, set[str]] = {}
        self.index = CapabilityIndex()
        self.reputation = Reputation(ctx.config.number("market.reputation_decay_rate"))

    # --- loading

    def load(self, body: bytes) -> None:
        """Takes in a stored peer."""
        record = msgspec.msgpack.decode(body, type=PeerRecord)
        self.records[record.peer] = record
        self._accounts[record.account] = record.peer
        self._shown.add(record.shown)
        self._count_heard(record)
        self._rooms.successions.load(record)
        self._rooms.cards.load(record)

    def save(self, record: PeerRecord) -> None:
        """Writes a peer's row."""
        self._ctx.put("peers", record.peer, msgspec.msgpack.encode(record))

    def start(self) -> None:
        """Dials every member whose address is known, and the bootstrap peers of the configuration."""
        for text in self._ctx.config.words("node.bootstrap_peers"):
            address = multiaddr.parse(text)
            if address.peer is not None and not self.is_me(address.peer):
                self._ctx.out.append(Dial(0, self._ctx.ids.inner(address.peer), (text,)))
        self.redial_all()

    def redial_all(self) -> None:
        """Has as many members connected as may be."""
        self._rooms.reaching.start()

    def keep_up(self) -> None:
        """Every minute: cards go round, links turn over or are made again."""
        self._rooms.cards.keep_up()
        self._rooms.reaching.keep_up()

    def redial(self, record: PeerRecord) -> None:
        """Has a member connected that is neither banned nor disconnected by hand, as far as there is room."""
        if (
            record.addresses
            and not self.banned(record.peer)
            and not record.muted
            and record.peer not in self._ctx.links
        ):
            self._rooms.reaching.connect(record)

    def reach(self, peer: str, addresses: Sequence[str]) -> None:
        """A member is said to be at these addresses now: it is dialled there and where it was before.

        Of one that is connected the switch takes note for the day on which its link breaks.
        """
        record = self.records.get(peer)
        known = record.addresses if record is not None else []
        where = tuple(dict.fromkeys((*addresses, *known)))[: limits.DIAL_ADDRESSES_MAX]
        room = len(self._ctx.links) < self._ctx.config.integer("node.max_peers")
        muted = record is not None and record.muted
        if where and not muted and not self.banned(peer) and (room or peer in self._ctx.links):
            self._ctx.out.append(Dial(0, peer, where))

    # --- admission and links

    def admit(self, peer: str, hello: Hello, wanted: str = "") -> str:
        """ "" when this peer may speak on the control stream, else the refusal it is told (read-only).

        `wanted` is whom this node dialled where it found another id: only who follows that one may speak then.
        """
        if hello.mesh != self.facts.mesh:
            return "another mesh"
        try:
            keys = self._rooms.successions.keys_shown(peer, hello.rotations)
            if self.banned(peer_id_of(keys[0])):
                return self._rooms.removals.reason(hello.certificates) or "banned"
            verify_keys(self.facts.charter, self.facts.mesh, hello.certificates, keys)
        except (NotPermittedError, DataError, RemoteError) as error:
            return f"not a member: {error.message}"
        return self._rooms.removals.reason(hello.certificates) or self._rooms.successions.refusal(keys, wanted)

    def up(self, event: PeerUp) -> None:
        """A member is connected: it is remembered, told our card and heads, and what we owe it goes out."""
        ctx = self._ctx
        hello = event.hello
        over = self._rooms.removals.reason(hello.certificates)
        if over:  # it was admitted before this node learnt of it
            ctx.out.append(Hangup(event.peer, over))
            return
        keys = self._rooms.successions.keys_shown(hello.peer, hello.rotations)
        proven = verify_keys(self.facts.charter, self.facts.mesh, hello.certificates, keys)
        record = self.remember(event.peer, hello.name, hello.certificates, proven)
        record.rotations = list(hello.rotations)
        if event.address and not event.inbound and event.address not in record.addresses:
            record.addresses = [event.address, *record.addresses][:16]
        missed_ms = ctx.now - record.last_ms
        record.last_ms = ctx.now
        self._count_heard(record)
        record.muted = False
        self.save(record)
        ctx.links[event.peer] = Link(
            event.peer,
            record.account,
            record.ring,
            event.hello.time_ms - ctx.now,
            event.address,
            event.transport,
            event.inbound,
            ctx.now,
        )
        ctx.log("info", "peer.up", peer=event.peer, name=record.shown, ring=record.ring, inbound=event.inbound)
        self._rooms.cards.greet(event.peer)
        self._rooms.reaching.up(event.peer)
        if missed_ms > limits.CARDS_MISSED_MS:
            self._rooms.cards.introduce(event.peer, limits.CARDS_INTRODUCED)
        self._rooms.removals.peer_up(event.peer, event.inbound)
        self._rooms.books.peer_up(event.peer)
        self._rooms.outbox.peer_up(event.peer)
        self._rooms.auctions.peer_back(event.peer)
        self._rooms.auctions.met(event.peer, connected=True)
        self._rooms.fetches.peer_up(event.peer)
        self._rooms.tasks.followers.peer_up(event.peer)

    def remember(self, peer: str, name: str, certificates: list[bytes], membership: Membership) -> PeerRecord:
        """The record of a proven member, made when it is new. The caller saves it."""
        ring = "own" if membership.owner == self.facts.owner else "member"
        record = self.records.get(peer)
        if record is None:
            account = public_of(peer)
            record = PeerRecord(
                peer,
                account,
                ring,
                name,
                pin_name(name, lambda text: text == self.name or text in self._shown),
                membership.owner,
                membership.inviter,
                [],
                self._ctx.now,
            )
            self.records[peer] = record
            self._accounts[account] = peer
            self._shown.add(record.shown)
            self._make_room(peer)
        self._uncount_heard(record)
        record.ring, record.owner, record.inviter = ring, membership.owner, membership.inviter
        record.certificates = list(certificates)
        self._count_heard(record)
        return record

    def _count_heard(self, record: PeerRecord) -> None:
        """Keeps count of each owner's nodes that are known by their cards alone."""
        if not record.last_ms:
            self._heard.setdefault(record.owner, set()).add(record.peer)
        else:
            self._uncount_heard(record)

    def _uncount_heard(self, record: PeerRecord) -> None:
        heard = self._heard.get(record.owner)
        if heard is not None:
            heard.discard(record.peer)
            if not heard:
                del self._heard[record.owner]

    def may_hear_of(self, owner: bytes) -> bool:
        """Whether one node more of this owner is remembered on its card's word; the longest silent makes room for it.

        An owner can certify any number: so many, and no more, are taken without ever having been met.
        """
        heard = self._heard.get(owner, set())
        if owner == self.facts.owner or len(heard) < limits.HEARD_OF_OWNER_MAX:
            return True
        idle = [self.records[peer] for peer in heard if peer not in self._ctx.links and not self.records[peer].banned]
        oldest = min(idle, key=lambda record: record.first_ms, default=None)
        if oldest is None or oldest.first_ms > self._ctx.now - limits.CARD_AGE_MS:
            return False
        self.forget(oldest)
        return True

    def _make_room(self, newcomer: str) -> None:
        if len(self.records) <= limits.PEER_RECORDS_MAX:
            return
        stays = self._ctx.links.keys() | {newcomer}
        idle = (r for r in self.records.values() if r.peer not in stays and not r.banned)
        oldest = min(idle, key=lambda record: record.last_ms, default=None)
        if oldest is not None:
            self.forget(oldest)

    def forget(self, record: PeerRecord) -> None:
        """Nothing is remembered of a peer that is not connected; its name is free."""
        del self.records[record.peer]
        self._accounts.pop(record.account, None)
        self._shown.discard(record.shown)
        self._uncount_heard(record)
        self.index.remove(record.peer)
        self._ctx.ids.forget(record.peer)
        self._ctx.delete("peers", record.peer)

    def down(self, event: PeerDown) -> None:
        """The link is gone: auctions do not wait for it; the switch redials."""
        if self._ctx.links.pop(event.peer, None) is None:
            return
        self._ctx.log("info", "peer.down", peer=event.peer, reason=event.reason)
        record = self.records.get(event.peer)
        if record is not None:
            record.last_ms = self._ctx.now
            self.save(record)
        self._rooms.removals.peer_down(event.peer)
        self._rooms.reaching.down(event.peer, event.reason)
        self._rooms.auctions.peer_down(event.peer)
        self._rooms.books.peer_down(event.peer)
        self._rooms.fetches.peer_down(event.peer)
        self._rooms.tasks.followers.peer_down(event.peer)

    def meet(self, event: MeetPeers) -> None:
        """Members the inviter named: they are dialled; their certificates are checked at the handshake."""
        for peer in event.peers:
            if not self.is_me(peer.peer) and peer.addresses:
                self._ctx.out.append(Dial(0, self._ctx.ids.inner(peer.peer), tuple(peer.addresses)))

    def reloaded(self, event: Reloaded) -> None:
        """The configuration changed: what the card says may have, and every figure that is not read when it is used."""
        self.name = self._ctx.config.text("node.name")
        self.reputation.fade(self._ctx.config.number("market.reputation_decay_rate"))
        self._rooms.bidding.reloaded()
        self._rooms.reaching.reloaded()
        self._rooms.auctions.reloaded()
        self._rooms.cards.refresh()

    # --- who is who

    def get(self, peer: str) -> PeerRecord | None:
        """The record of a peer."""
        return self.records.get(peer)

    def addresses(self, peer: str) -> list[str]:
        """Where a peer says that it listens."""
        record = self.records.get(peer)
        return record.addresses if record is not None else []

    def account_of(self, peer: str) -> bytes:
        """The account a peer pays and is paid by."""
        if peer == self._ctx.me:
            return self._ctx.account
        record = self.records.get(peer)
        return record.account if record is not None else public_of(peer)

    def peer_of(self, account: bytes) -> str | None:
        """The peer of an account, where known."""
        return self._accounts.get(account)

    def is_me(self, peer: str) -> bool:
        """Whether this is an id of this node, the present one or an earlier one."""
        return peer in map(peer_id_of, self._rooms.successions.keys_of(self._ctx.me))

    def ring_of(self, peer: str) -> str:
        """own (this node included), member or stranger."""
        if peer == self._ctx.me:
            return "own"
        record = self.records.get(peer)
        return record.ring if record is not None else "stranger"

    def name_of(self, peer: str) -> str:
        """How a peer is shown."""
        if peer == self._ctx.me:
            return self.name
        record = self.records.get(peer)
        return record.shown if record is not None else self._ctx.ids.outer(peer)[-8:]

    def resolve(self, text: str) -> str:
        """A peer id from a name, id or part of one; raises NotFoundError."""
        if text in (self.name, "self") or self.is_me(text):
            return self._ctx.me
        return resolve(self._ctx.ids.inner(text), self.records.values(), self._ctx.ids.outer)

    def party(self, peer: str) -> dict[str, Any]:
        """A peer as JSON answers show it."""
        ring = "own" if peer == self._ctx.me else self.ring_of(peer)
        present = self._ctx.wire_me if peer == self._ctx.me else self._ctx.ids.outer(peer)
        return {"peer_id": present, "name": self.name_of(peer), "ring": ring}

    def rtt_ms(self, peer: str) -> float:
        """The last measured round trip; 0 for this node itself or when unknown."""
        return 0.0 if peer == self._ctx.me else self._ctx.ports.rtt_ms(self._ctx.ids.outer(peer))

    def pick(self, count: int) -> int:
        """A random number below `count`, from the injected entropy."""
        return int.from_bytes(self._ctx.entropy(8), "big") % count

    def usable(self, peer: str) -> bool:
        """Whether work may be offered to this peer."""
        return not self.banned(peer)

    def banned(self, peer: str) -> bool:
        """A local refusal, by hand or after a proof of fraud, or the end of its membership."""
        record = self.records.get(peer)
        return record is not None and (
            record.banned or bool(record.ended) or self._rooms.books.convicted(record.account)
        )

    def ban(self, peer: str, on: bool) -> bool:
        """Refuses a peer from now on (or no longer); False when it was so before."""
        record = self.records[peer]
        if record.banned == on:
            return False
        record.banned = on
        self.save(record)
        self._ctx.log("security", "peer.banned" if on else "peer.unbanned", peer=peer)
        if on:
            self.index.remove(peer)
            self._rooms.books.chains.restore.answered(peer)  # it could not do so any more
            self._ctx.out.append(Hangup(peer, "banned"))
        else:
            self._rooms.cards.load(record)
            self.redial(record)
        return True

    # --- reputation

    def receipt(self, attempt: Attempt, outcome: Outcome, task: Task) -> None:
        """What this node saw of an executor; own machines and itself are not rated."""
        if attempt.ring in ("own", "self"):
            return
        actual_s = max(0, (attempt.delivered_ms or self._ctx.now) - attempt.awarded_ms) / 1000
        if outcome is Outcome.SETTLED and attempt.delivered_ms > task.deadline_ms:
            outcome = Outcome.LATE
        self._observe(Receipt(attempt.peer, outcome, self._ctx.now, attempt.estimated_s, actual_s, attempt.confidence))

    def observe_requester(self, peer: str, outcome: Outcome) -> None:
        """What this node saw of a requester it worked for."""
        if self.ring_of(peer) == "member":
            self._observe(Receipt(peer, outcome, self._ctx.now))

    def _observe(self, receipt: Receipt) -> None:
        for dropped in self.reputation.observe(receipt, self._ctx.now):
            self._ctx.delete("reputation", dropped)
        self._ctx.put("reputation", receipt.peer, self.reputation.to_bytes(receipt.peer))

    def _skew_of(self, link: Link) -> int:
        measure = self._ctx.ports.skew_ms
        measured = measure(self._ctx.ids.outer(link.peer)) if measure is not None else None
        return link.skew_ms if measured is None else measured

    def skew_ms(self) -> int | None:
        """The median of how far peers' clocks are ahead of ours (of two the nearer); None without a peer."""
        skews = sorted(self._skew_of(link) for link in self._ctx.links.values())
        return min(skews[(len(skews) - 1) // 2], skews[len(skews) // 2], key=abs) if skews else None

    def clock_off(self) -> bool:
        """Whether this clock is so far off its peers' that nothing may be stamped by it (LEDGER.md section 8)."""
        stop_ms = limits.CLOCK_STOP_MS
        if all(-stop_ms <= self._skew_of(link) <= stop_ms for link in self._ctx.links.values()):
            return False
        skew_ms = self.skew_ms()
        return skew_ms is not None and abs(skew_ms) > stop_ms

    def warnings(self) -> list[str]:
        """What the owner should know of this node's peers and clock."""
        return [self.clock_warning()] if self.clock_off() else []

    def clock_warning(self) -> str:
        """How far this clock is off, and what follows."""
        seconds = abs(self.skew_ms() or 0) / 1000
        return f"this machine's clock is {seconds:.0f} s off its peers'; nothing is written to the ledger"
