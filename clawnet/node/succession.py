"""Keys that change: this node's own (`identity rotate`), and peers that go on under another key.

The rooms know a peer by its first id for ever (mesh/ids.py). Here, at the edge of the node, what comes in is told by
that id, and what goes out by the id that the wire knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from clawnet import limits
from clawnet.errors import ClawnetError, NotPermittedError, WireError
from clawnet.identity.certificates import certify_node
from clawnet.identity.keys import KeyPair, peer_id_of, public_of, verify
from clawnet.ledger.succession import recorded, succession
from clawnet.market.capability import draw
from clawnet.mesh.ids import HANDOVER_ROW, HandoverRow
from clawnet.mesh.roster import PeerRecord
from clawnet.node.context import Context
from clawnet.wire import events as e
from clawnet.wire.codec import decode_struct, encode
from clawnet.wire.hearsay import Rotated
from clawnet.wire.messages import Kind, Membership, Succession

if TYPE_CHECKING:
    from clawnet.node.kernel import Rooms

_NAMES_A_PEER = frozenset((e.MessageIn, e.DialEnded))
_FIRST_HOP = limits.RELAY_HOPS_MAX - limits.SUCCESSION_HOPS


class Successions:
    """Who goes by which id, and how that is proven; the change of the own key."""

    def __init__(self, ctx: Context, rooms: Rooms) -> None:
        self._ctx = ctx
        self._rooms = rooms
        self._linked: dict[str, str] = {}
        self._unmet: dict[str, None] = {}

    # --- the edge of the node

    def inward(self, event: e.Stimulus) -> e.Stimulus | None:
        """What happened, told by the ids that the rooms know; None when it is of no meaning any longer."""
        ids, kind = self._ctx.ids, type(event)
        if isinstance(event, e.PeerUp):
            return self._up(event)
        if not ids:
            return event
        if isinstance(event, e.PeerDown):
            return self._down(event)
        if kind in _NAMES_A_PEER:
            named: Any = event
            peer = ids.inner(named.peer)
            return event if peer == named.peer else msgspec.structs.replace(named, peer=peer)
        return event

    def _up(self, event: e.PeerUp) -> e.PeerUp | None:
        """A connection: whom it is with, and which connection of the same node it replaces; None: it is not kept."""
        ids = self._ctx.ids
        if not event.hello.rotations and not ids:
            return event
        keys = self.keys_shown(event.peer, event.hello.rotations)
        first = peer_id_of(keys[0])
        if refusal := self.refusal(keys, ""):  # another link, or news, came between its admission and now
            self._ctx.out.append(e.Hangup(event.peer, refusal))
            return None
        if first in self._ctx.links and self._linked.get(first, first) != event.peer:
            self._rooms.members.down(e.PeerDown(first, "it goes on under another key"))
        if event.hello.rotations:
            self.learn(keys, event.hello.rotations)
            self._linked[first] = event.peer
        return msgspec.structs.replace(event, peer=first)

    def _down(self, event: e.PeerDown) -> e.PeerDown | None:
        ids = self._ctx.ids
        peer = ids.inner(event.peer)
        if self._linked.get(peer, peer) != event.peer:
            return None  # of a key that was given up, while the new one is connected already
        self._linked.pop(peer, None)
        if peer == event.peer and not ids.given_up(peer):
            return event
        self._rooms.members.down(msgspec.structs.replace(event, peer=peer))
        record = self._rooms.members.records.get(peer)
        if record is not None:
            self._rooms.members.redial(record)
        return None

    def outward(self, effects: list[e.Effect]) -> list[e.Effect]:
        """What is to be done, told by the ids that the wire knows."""
        outer = self._ctx.ids.outer
        for at, effect in enumerate(effects):
            if isinstance(effect, e.Send | e.Dial | e.Hangup | e.Fetch | e.GrantBlob):
                peer = outer(effect.peer)
                if peer != effect.peer:
                    effects[at] = msgspec.structs.replace(effect, peer=peer)
        return effects

    # --- what is known of others

    def keys_shown(self, peer: str, rotations: Sequence[bytes]) -> list[bytes]:
        """All keys that a peer proves to have had, its account first. Raises NotPermittedError or DataError."""
        return succession(rotations, public_of(peer), self._rooms.members.facts.mesh, verify)

    def keys_of(self, first: str) -> list[bytes]:
        """All keys known of a peer (or of this node), its account first."""
        return recorded(self.rotations_of(first)) or [public_of(first)]

    def rotations_of(self, first: str) -> list[bytes]:
        """The rotate entries that lead to the key it has now."""
        members = self._rooms.members
        if first == self._ctx.me:
            return members.facts.rotations
        record = members.records.get(first)
        return record.rotations if record is not None else []

    def refusal(self, keys: Sequence[bytes], wanted: str) -> str:
        """Why a proven row of keys is not admitted: it is behind what is known, beside it, or not whom we dialled."""
        first = peer_id_of(keys[0])
        known = self.keys_of(first)
        if len(keys) == len(known) == 1 and first != self._ctx.me and not wanted:
            return ""  # neither here nor there was a key ever changed
        if len(keys) < len(known) and known[: len(keys)] == list(keys):
            return f"that key was given up: its node goes on as {peer_id_of(known[-1])}"
        if list(keys[: len(known)]) != known:
            return "another change of key by the same node is known here"
        if first == self._ctx.me:
            return "that is this node's own identity"
        if self._anothers(keys):
            return "one of those keys is another node's"
        if wanted and self._ctx.ids.inner(wanted) != first and wanted not in map(peer_id_of, keys):
            return f"it is {peer_id_of(keys[-1])} there, not {wanted}, nor does it follow it"
        return ""

    def _anothers(self, keys: Sequence[bytes]) -> bool:
        """Whether the row leads to a key that is known as another node's, or that this node gave up.

        Else one certificate would make any number of nodes, and a key that was given up a way back in.
        """
        first = peer_id_of(keys[0])
        inner, members = self._ctx.ids.inner, self._rooms.members
        later = [peer_id_of(key) for key in keys[1:]] if first != self._ctx.me else []
        return any(peer in members.records or members.is_me(peer) or inner(peer) not in (peer, first) for peer in later)

    def load(self, record: PeerRecord) -> None:
        """A stored peer."""
        if record.rotations:
            self._ctx.ids.learn([peer_id_of(key) for key in recorded(record.rotations)])

    def learn(self, keys: Sequence[bytes], rotations: Sequence[bytes]) -> bool:
        """A proven row of keys, in place of a shorter one: rows and rooms stay, the id on the wire changes.

        False when nothing is new.
        """
        ctx, members = self._ctx, self._rooms.members
        ids = [peer_id_of(key) for key in keys]
        first, before = ids[0], ctx.ids.outer(ids[0])
        known = self.keys_of(first)
        if list(keys[: len(known)]) != known or (len(keys) == len(known) and before == ids[-1]):
            return False
        if self._anothers(keys):
            ctx.count("relayed_refused_total", "key_given_up")
            return False
        ctx.ids.learn(ids)
        record = members.records.get(first)
        if record is None:
            self._remember_unmet(first)
            return True
        record.rotations = list(rotations)
        record.card = record.signature = b""
        record.addresses = [text.replace(before, ids[-1]) for text in record.addresses]
        members.save(record)
        ctx.log("security", "peer.rotated", peer=ids[-1], before=before, name=record.shown)
        ctx.out.append(e.Succeeded(before, ids[-1]))
        members.redial(record)
        return True

    def _remember_unmet(self, first: str) -> None:
        """Who has no row yet is known by its keys for as long as so many others are not heard of after it."""
        self._unmet.pop(first, None)
        self._unmet[first] = None
        if len(self._unmet) > limits.REACH_PEERS_MAX:
            oldest = next(iter(self._unmet))
            del self._unmet[oldest]
            if oldest not in self._rooms.members.records:
                self._ctx.ids.forget(oldest)

    def told(self, event: e.MessageIn, message: Membership) -> None:
        """Successions that a member brings or passes on; raises WireError or NotPermittedError for false ones."""
        for said in message.successions:
            self._heard(event.peer, said)

    def _heard(self, sender: str, said: Succession) -> None:
        relay = self._rooms.relay
        read = relay.read(Kind.MEMBERSHIP, said)
        if read is None:
            return
        body = decode_struct(Rotated, read.body)
        if not body.rotations:
            raise WireError("a succession without a rotate entry")
        last = recorded(body.rotations)[-1]
        keys = succession(body.rotations, last, self._rooms.members.facts.mesh, verify)
        if peer_id_of(keys[-2]) != read.author:
            raise WireError(f"a succession of another key, stated by {read.author[-8:]}")
        relay.check(said, read)
        first = peer_id_of(keys[0])
        if first == self._ctx.me or first not in self._rooms.members.records:
            return  # who never met it sees all of it in its HELLO or its card
        news = self.learn(keys, body.rotations)
        if news and relay.fresh(read):
            self._pass_on(said, first, sender)

    def _pass_on(self, said: Succession, first: str, sender: str) -> None:
        if said.hops >= limits.RELAY_HOPS_MAX:
            return
        peers = [peer for peer in self._ctx.links if peer not in (first, sender)]
        onward = Membership([], [], [msgspec.structs.replace(said, hops=said.hops + 1)])
        for peer in draw(peers, limits.RELAY_DEGREE, self._rooms.members.pick):
            self._ctx.send(peer, onward)

    # --- the own key

    def present(self) -> str:
        """This node's id as the wire knows it."""
        rotations = self._rooms.members.facts.rotations
        return peer_id_of(recorded(rotations)[-1]) if rotations else self._ctx.me

    def rotate(self, call: int, params: dict[str, Any]) -> None:
        """Local call: from its entry on this node goes on under the key that the daemon made.

        Waits for the check after a start; raises NotPermittedError while the chain is read-only.
        """
        key = params.get("key")
        if not isinstance(key, KeyPair):
            raise NotPermittedError("only the daemon makes this node's keys", hint="clawnet identity rotate")
        if len(self._rooms.members.facts.rotations) >= limits.ROTATIONS_MAX:
            raise NotPermittedError(
                f"this identity has changed its key {limits.ROTATIONS_MAX} times, which is all a HELLO can show",
                hint="start a new node in a new --home, and send it the credits",
            )
        self._rooms.writes.once_checked(("call", call), lambda: self._try(call, key))

    def _try(self, call: int, key: KeyPair) -> None:
        try:
            self._write(call, key)
        except ClawnetError as error:
            self._ctx.fail(call, error)

    def _write(self, call: int, key: KeyPair) -> None:
        """The entry, its row, the statement to everybody connected, and the order to change files and connections."""
        ctx, members = self._ctx, self._rooms.members
        if ctx.draining:
            raise NotPermittedError("the node is stopping", hint="start it again, then: clawnet identity rotate")
        before = ctx.wire_me
        entry = self._rooms.books.rotate(key.public, key.sign)
        certificates = self._certificates(key.public)
        row = HandoverRow(public_of(before), entry.raw, key.public, tuple(certificates))
        ctx.put("meta", HANDOVER_ROW, encode(row))
        rotations = [*members.facts.rotations, entry.raw]
        statement = self._rooms.relay.state(Kind.MEMBERSHIP, encode(Rotated(rotations)))
        told = Membership([], [], [Succession(*statement, _FIRST_HOP)])
        for peer in ctx.links:
            ctx.send(peer, told)
        members.facts = msgspec.structs.replace(members.facts, rotations=rotations, certificates=certificates)
        ctx.ports = msgspec.structs.replace(ctx.ports, sign=key.sign, unseal=key.unseal)
        ctx.wire_me = key.peer_id
        void = self._rooms.invites.void()
        ctx.log("security", "identity.rotated", peer=key.peer_id, before=before)
        value = {
            "peer_id": key.peer_id,
            "previous": before,
            "account": ctx.account.hex(),
            "rotations": len(rotations),
            "told": len(ctx.links),
            "invites_void": void,
        }
        ctx.out.append(e.Rotated(call, key, row, value))

    def _certificates(self, public: bytes) -> list[bytes]:
        """Of the new key where the owner's lies here; else the old ones, which count with the rotate entry."""
        owner, facts = self._ctx.ports.owner, self._rooms.members.facts
        if owner is None or owner.public != facts.owner:
            return facts.certificates
        node = certify_node(owner, facts.mesh, public, issued_ms=self._ctx.now, inviter=facts.inviter)
        return [*facts.certificates[:-1], node]
