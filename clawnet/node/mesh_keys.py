"""The mesh key: a new one after every removal, sealed by the founder to each member that remains."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from clawnet import limits
from clawnet.errors import DataError
from clawnet.identity.keybox import MESH_KEY_BYTES, lock, seal_to, unlock
from clawnet.identity.keys import KeyPair, peer_id_of, public_of
from clawnet.identity.revocations import KeyShare, MeshKey, sign_mesh_key
from clawnet.mesh.roster import PeerRecord
from clawnet.node.context import Context
from clawnet.wire.events import KeepMeshKey

if TYPE_CHECKING:
    from clawnet.node.kernel import Rooms


class MeshKeys:
    """The key of the newest epoch that this node can open; the founder's node makes them."""

    def __init__(self, ctx: Context, rooms: Rooms) -> None:
        self._ctx = ctx
        self._rooms = rooms
        self.epoch = 0
        self.older: list[bytes] = []
        """The keys before the present one, newest first, for what was written under them."""

    @property
    def current(self) -> bytes:
        """The key under which is written now; zeros: this membership came without one."""
        return self._rooms.members.facts.mesh_key

    @property
    def behind(self) -> bool:
        """Whether there is a newer key that this node was not given yet."""
        return self._rooms.removals.ends.epoch > self.epoch

    def adopt(self) -> None:
        """Opens the newest epoch, once a statement of it has a share for this node or its own key turns out newest."""
        ends = self._rooms.removals.ends
        if self.epoch >= ends.epoch:
            return
        me = public_of(self._ctx.wire_me)
        for body in ends.key_statements.values():
            key, older = self.current, unlock(body.previous, self.current)
            for share in body.shares if older is None else ():
                opened = self._ctx.ports.unseal(share.sealed) if share.node == me else None
                if opened is not None and len(opened) == MESH_KEY_BYTES:
                    key, older = opened, unlock(body.previous, opened)
            if older is not None:
                self._take(body.epoch, key, older)
                return

    def _take(self, epoch: int, key: bytes, older: bytes) -> None:
        members = self._rooms.members
        self.epoch = epoch
        self.older = [older[at : at + MESH_KEY_BYTES] for at in range(0, len(older), MESH_KEY_BYTES)]
        if key != members.facts.mesh_key:
            members.facts = msgspec.structs.replace(members.facts, mesh_key=key)
            numbered = {epoch - 1 - place: one for place, one in enumerate(self.older)}
            self._ctx.out.append(KeepMeshKey(epoch, key, numbered))
            self._ctx.log("security", "mesh_key.rotated", epoch=epoch)

    # --- the founder's part

    def _founder(self) -> KeyPair | None:
        owner = self._ctx.ports.owner
        return owner if owner is not None and owner.public == self._rooms.members.facts.charter.founder else None

    def rotate(self) -> None:
        """A new key for all that are members now; who is none can open nothing that is written from here on."""
        founder, ends = self._founder(), self._rooms.removals.ends
        if founder is None:
            return
        key = self._ctx.entropy(MESH_KEY_BYTES)
        older = b"".join([self.current, *self.older][: limits.MESH_KEYS_KEPT])
        epoch = ends.epoch + 1
        previous = lock(older, key, self._ctx.entropy)
        records = [one for one in self._rooms.members.records.values() if self._entitled(one)]
        others = [public_of(self._ctx.ids.outer(one.peer)) for one in records]
        self._share(founder, epoch, key, previous, [public_of(self._ctx.wire_me), *others])

    def keep_up(self) -> None:
        """Every minute: a share for members met since, and a new key when one who was given this one is out."""
        founder, ends = self._founder(), self._rooms.removals.ends
        if founder is None or not ends.epoch or self.behind:
            return
        shared = {share.node for body in ends.key_statements.values() for share in body.shares}
        members = self._rooms.members
        for node in shared.difference(self._rooms.successions.keys_of(self._ctx.me)):
            record = members.get(self._ctx.ids.inner(peer_id_of(node)))
            if record is None or record.ended:
                self.rotate()
                return
        entitled = [one.peer for one in members.records.values() if self._entitled(one)]
        known = [public_of(self._ctx.wire_me), *(public_of(self._ctx.ids.outer(peer)) for peer in entitled)]
        lacking = [node for node in known if node not in shared]
        if lacking:
            previous = next(iter(ends.key_statements.values())).previous
            self._share(founder, ends.epoch, self.current, previous, lacking)

    def _entitled(self, record: PeerRecord) -> bool:
        throwaway = self._rooms.throwaways.holds(record.account)
        return bool(record.certificates) and not record.ended and not throwaway

    def _share(self, founder: KeyPair, epoch: int, key: bytes, previous: bytes, nodes: list[bytes]) -> None:
        ctx, facts = self._ctx, self._rooms.members.facts
        shares = []
        for node in nodes:
            try:
                shares.append(KeyShare(node, seal_to(node, key, ctx.entropy)))
            except DataError as error:
                ctx.log("security", "mesh_key.not_sealed", node=node.hex()[:16], reason=error.message)
        parts = [
            shares[at : at + limits.MESH_KEY_SHARES_MAX] for at in range(0, len(shares), limits.MESH_KEY_SHARES_MAX)
        ]
        bodies = [MeshKey(facts.mesh, epoch, ctx.now, previous, tuple(part)) for part in parts]
        self._rooms.removals.publish([sign_mesh_key(body, founder) for body in bodies])
