"""Bulk data on its way to this node: what is cut goes on where it was, so often and no more, then it is over.

A fetch that brings nothing is tried FETCH_TRIES_MAX times, with growing pauses, while its holder is connected; every
byte that came begins the count anew. While the holder is away nothing is counted: it is asked when it is back. How long
all of it may take is for whoever waits: a job has its deadline, a line its expiry, a task with retries its lease.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct

from clawnet import limits
from clawnet.node.context import Context
from clawnet.wire.events import CONTENT, STORAGE, BlobReady, Fetch

if TYPE_CHECKING:
    from clawnet.node.kernel import Rooms


class Fetching(Struct):
    """One fetch. `patient`: where there is no room here now it is tried again, else that ends it."""

    effect: Fetch
    patient: bool
    tries: int = 0
    under_way: bool = True
    trouble: str = ""


class Fetches:
    """Fetches by their request, from the first try to the end."""

    def __init__(self, ctx: Context, rooms: Rooms) -> None:
        self._ctx = ctx
        self._rooms = rooms
        self._fetching: dict[bytes, Fetching] = {}

    def begin(
        self, request: bytes, peer: str, award: bytes, blobs: tuple[tuple[bytes, int], ...], *, patient: bool = False
    ) -> None:
        """Fetches the blobs (id, size) of an award; one that is here counts if this peer has sent it, or is our own.

        All nodes of an owner are one sender. Whose machine has the owner's key may have what this one has; anybody else
        must not get, by naming another's file, to have it here or to learn that it is.
        """
        source = "" if self._rooms.members.ring_of(peer) == "own" else self._rooms.quotas.owner_of(peer).hex()
        effect = Fetch(request, peer, award, blobs, 0, source)
        self._fetching[request] = Fetching(effect, patient)
        self._ctx.out.append(effect)

    def over(self, event: BlobReady) -> bool:
        """Whether a fetch is over, well or for good; one that can be gone on with is tried again."""
        fetching = self._fetching.get(event.request)
        if fetching is None:
            return False
        if not event.reason or event.fault == CONTENT or (event.fault == STORAGE and not fetching.patient):
            self.forget(event.request)
            return True
        fetching.under_way, fetching.trouble = False, event.reason
        if event.received:
            fetching.tries = 0
        if not self._ctx.connected(fetching.effect.peer):
            return False  # it is asked when it is back
        fetching.tries += 1
        if fetching.tries >= limits.FETCH_TRIES_MAX:
            self.forget(event.request)
            return True
        wait_ms = min(limits.FETCH_AGAIN_MIN_MS << (fetching.tries - 1), limits.FETCH_AGAIN_MAX_MS)
        self._ctx.wake(("fetch", event.request), self._ctx.now + wait_ms)
        return False

    def timer(self, request: bytes) -> None:
        """The pause before another try is over."""
        fetching = self._fetching.get(request)
        if fetching is not None and self._ctx.connected(fetching.effect.peer):
            self._again(fetching)

    def peer_up(self, peer: str) -> None:
        """A holder is back: what could not be had from it is asked for again."""
        for fetching in self._fetching.values():
            if fetching.effect.peer == peer:
                self._again(fetching)

    def peer_down(self, peer: str) -> None:
        """A holder is away: whoever waits for a result of it begins to count."""
        for fetching in self._fetching.values():
            if fetching.effect.peer == peer:
                self._rooms.results.holder_away(fetching.effect.request)

    def _again(self, fetching: Fetching) -> None:
        if not fetching.under_way:
            fetching.under_way = True
            self._ctx.out.append(fetching.effect)

    def forget(self, request: bytes) -> None:
        """Nobody waits for it any longer."""
        if self._fetching.pop(request, None) is not None:
            self._ctx.sleep(("fetch", request))

    def trouble(self, request: bytes) -> str:
        """Why the last try failed; empty when none did, or nothing is fetched."""
        fetching = self._fetching.get(request)
        return fetching.trouble if fetching is not None else ""
