"""What a member of the small mesh has around its node: entropy, an executor's shape, its key on the disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from clawnet.identity.membership import Handover
from clawnet.mesh.ids import HANDOVER_ROW, HandoverRow
from clawnet.wire import events as e

if TYPE_CHECKING:
    from tests.node.meshkit import Member


class Entropy:
    """Bytes from a seed, the same under every PYTHONHASHSEED."""

    def __init__(self, seed: str) -> None:
        self._seed = seed.encode()
        self._count = 0

    def __call__(self, count: int) -> bytes:
        self._count += 1
        return hashlib.shake_128(self._seed + self._count.to_bytes(8, "big")).digest(count)


Runner = Callable[["Member", e.Run], "e.TaskExited | None"]


def settle_key(member: Member) -> None:
    """At a start: a change of key that is in the chain is finished, any other is taken back (clawnet/handover.py)."""
    row = next((body for name, body in member.store.load_all("meta") if name == HANDOVER_ROW), None)
    written = None if row is None else msgspec.msgpack.decode(row, type=HandoverRow)
    if member.next_key is not None and written is not None and written.new_key == member.next_key.public:
        go_over(member, written)
    member.next_key = None


def go_over(member: Member, row: HandoverRow) -> None:
    """The member has its next key, and goes by that id in the same place of the mesh's order."""
    local = member.local
    handovers = (*local.handovers, Handover(row.key, row.entry))
    member.local = msgspec.structs.replace(local, handovers=handovers, certificates=row.certificates)
    assert member.next_key is not None
    member.key, member.next_key = member.next_key, None
    mesh = member.mesh
    mesh.members = {one.peer if one is member else peer: one for peer, one in mesh.members.items()}
