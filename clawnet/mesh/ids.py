"""Peer ids of nodes that have changed their keys: what this node calls a peer within, and what the wire calls it.

Inside the node a peer goes for ever by its first id, which is its account's: tasks, escrows, debts and reputation keep
it through every change of key. On connections, in cards and before people it goes by its present one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from msgspec import Struct

HANDOVER_ROW: Final = "handover"
"""The row of `meta` that says which change of this node's own key its chain holds last."""


class HandoverRow(Struct, frozen=True, array_like=True):
    """That row: the key given up, the rotate entry, the new key, and the certificates that go with it."""

    key: bytes
    entry: bytes
    new_key: bytes
    certificates: tuple[bytes, ...]


class PeerIds:
    """Both directions, for the few that ever changed; everybody else has one id."""

    __slots__ = ("_first", "_present")

    def __init__(self) -> None:
        self._first: dict[str, str] = {}
        self._present: dict[str, str] = {}

    def __bool__(self) -> bool:
        return bool(self._first)

    def learn(self, ids: Sequence[str]) -> None:
        """All ids that one node had, in their order; the last one is its present id."""
        for peer in ids:
            self._first[peer], self._present[peer] = ids[0], ids[-1]

    def forget(self, first: str) -> None:
        """The peer is not remembered any longer."""
        for peer in [peer for peer, known in self._first.items() if known == first]:
            del self._first[peer], self._present[peer]

    def inner(self, peer: str) -> str:
        """The id by which the node's rooms and rows know a peer, whichever of its ids was named."""
        return self._first.get(peer, peer)

    def outer(self, peer: str) -> str:
        """The id that a peer has now, whichever of its ids was named."""
        return self._present.get(peer, peer)

    def given_up(self, peer: str) -> bool:
        """Whether the key of this id was given up for another one."""
        return self._present.get(peer, peer) != peer
