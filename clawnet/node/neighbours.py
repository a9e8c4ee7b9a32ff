"""Neighbours: who announces itself on the local network, who of them is of this mesh, and dialling those.

An announcement proves nothing: it only saves knowing an address. Who is reached there is proven by the handshake, and
whether it is a member by its certificates.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct

from clawnet import limits
from clawnet.answers_market import time_text
from clawnet.node.context import Context
from clawnet.wire.events import Hangup, NeighbourGone, NeighbourSeen

if TYPE_CHECKING:
    from clawnet.node.kernel import Rooms

TAG_DOMAIN: Final = b"clawnet/mdns-tag/1"


def mesh_tag(mesh_key: bytes, peer: str) -> bytes:
    """What a member announces of its mesh: other members know it, for anybody else it is noise and links nothing."""
    return hmac.digest(mesh_key, TAG_DOMAIN + peer.encode(), hashlib.sha256)[: limits.MDNS_TAG_BYTES]


class Neighbour(Struct):
    """One peer on the local network."""

    peer: str
    addresses: tuple[str, ...]
    ours: bool
    since_ms: int


class Neighbours:
    """The present ones by peer id; how many there can be at all is bounded where they are heard (net/nearby.py)."""

    def __init__(self, ctx: Context, rooms: Rooms) -> None:
        self._ctx = ctx
        self._rooms = rooms
        self.present: dict[str, Neighbour] = {}

    def tag(self) -> bytes:
        """This node's own; empty for a member without the mesh's key, whom no tag can tell from a stranger."""
        return b"" if self._keyless() else mesh_tag(self._rooms.members.facts.mesh_key, self._ctx.wire_me)

    def is_ours(self, peer: str, tag: bytes) -> bool:
        """Whether whoever announces this peer with this tag holds the mesh's key."""
        return not self._keyless() and hmac.compare_digest(tag, mesh_tag(self._rooms.members.facts.mesh_key, peer))

    def _keyless(self) -> bool:
        return not any(self._rooms.members.facts.mesh_key)

    def seen(self, event: NeighbourSeen) -> None:
        """It announces itself, or elsewhere than before: one of this mesh is dialled at once."""
        known = self.present.get(event.peer)
        ours = self.is_ours(event.peer, event.tag)
        fresh = known is None or known.ours != ours
        since_ms = self._ctx.now if known is None else known.since_ms
        self.present[event.peer] = Neighbour(event.peer, event.addresses, ours, since_ms)
        if fresh:
            self._ctx.log("info", "neighbour.seen", peer=event.peer, same_mesh=ours, addresses=len(event.addresses))
        if ours:
            self._rooms.members.reach(self._ctx.ids.inner(event.peer), event.addresses[: limits.NEIGHBOUR_DIALLED_MAX])

    def gone(self, event: NeighbourGone) -> None:
        """It announces itself no longer; who was never met is dialled no more."""
        known = self.present.pop(event.peer, None)
        if known is None:
            return
        self._ctx.log("info", "neighbour.gone", peer=event.peer, same_mesh=known.ours)
        peer = self._ctx.ids.inner(event.peer)
        if known.ours and peer not in self._rooms.members.records and peer not in self._ctx.links:
            self._ctx.out.append(Hangup(event.peer, "it left the network"))

    def items(self) -> list[dict[str, Any]]:
        """As `peer list --nearby` shows them: this mesh first."""
        members = self._rooms.members
        found = sorted(self.present.values(), key=lambda one: (not one.ours, one.since_ms, one.peer))
        return [
            {
                "peer_id": one.peer,
                "name": members.name_of(peer) if (peer := self._ctx.ids.inner(one.peer)) in members.records else None,
                "same_mesh": one.ours,
                "state": self._state(self._ctx.ids.inner(one.peer)),
                "addresses": list(one.addresses),
                "since": time_text(one.since_ms),
            }
            for one in found
        ]

    def _state(self, peer: str) -> str:
        if self._rooms.members.banned(peer):
            return "banned"
        if peer in self._ctx.links:
            return "connected"
        return "known" if peer in self._rooms.members.records else "seen"
