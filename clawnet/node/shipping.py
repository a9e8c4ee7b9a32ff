"""Own entries on their way to others: segments after what a peer holds, settlements until they are acknowledged."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from clawnet import limits
from clawnet.market.records import Job
from clawnet.node.context import Context
from clawnet.wire.messages import Kind, Settlement

if TYPE_CHECKING:
    from clawnet.node.books import Books
    from clawnet.node.kernel import Rooms

RECENT_MAX = 4_096
RELEASE = b"release"
CLAIM = b"claim"


class Shipping:
    """The newest own entries at hand, and the releases and claims that their payees and payers must have."""

    def __init__(self, ctx: Context, rooms: Rooms, books: Books) -> None:
        self._ctx = ctx
        self._rooms = rooms
        self._books = books
        self.recent: deque[tuple[int, bytes]] = deque(maxlen=RECENT_MAX)
        self._claimed_jobs: dict[int, list[Job]] = {}
        rooms.outbox.register(Kind.MARKET_SETTLEMENT, self._rebuild_settlement)

    def settle(self, peers: dict[str, None], what: bytes, seq: int) -> None:
        for peer in peers:
            message = Settlement(self._ctx.account, self.segment(peer, -1, seq), [])
            self._rooms.outbox.oblige(peer, message, what + seq.to_bytes(8, "big"))

    def _rebuild_settlement(self, about: bytes) -> Settlement:
        seq = int.from_bytes(about[-8:], "big")
        # One that is no longer at hand is pulled by its receiver, for which what follows it shows the gap.
        late = not self.recent or self.recent[0][0] > seq
        entries = [raw for at, raw in self.recent if late or at <= seq]
        return Settlement(self._ctx.account, _newest(entries), [])

    def segment(self, peer: str, known_seq: int, upto_seq: int, *, again: bool = True) -> list[bytes]:
        """Own entries that `peer` lacks up to `upto_seq`, the newest SEGMENT_BYTES_MAX; it pulls older ones itself.

        With `again` that last one is among them even if it was sent before.
        """
        base = self._books.countersigns.show(peer, max(known_seq, self._books.chains.base(peer)))
        entries = [
            raw for seq, raw in self._recent_from(min(base + 1, upto_seq) if again else base + 1) if seq <= upto_seq
        ]
        self._books.chains.sent(peer, upto_seq)
        return _newest(entries)

    def _recent_from(self, first: int) -> list[tuple[int, bytes]]:
        if not self.recent:
            return []
        skip = first - self.recent[0][0]
        if skip <= 0:
            return list(self.recent)
        size = len(self.recent)
        return [self.recent[at] for at in range(max(skip, 0), size)] if skip < size else []

    def acknowledged(self, peer: str, about: bytes) -> None:
        """The payer has our claim: the jobs it paid are done."""
        if about.startswith(CLAIM):
            seq = int.from_bytes(about[-8:], "big")
            jobs = self._claimed_jobs.pop(seq, [])
            others = [job for job in jobs if job.peer != peer]
            if others:
                self._claimed_jobs[seq] = others
            for job in jobs:
                if job.peer == peer:
                    self._rooms.pay.acknowledged(job)

    def claimed(self, seq: int, jobs: list[Job]) -> None:
        """The own entry at `seq` claims the pay of these jobs; they are done when their payers have it."""
        self._claimed_jobs[seq] = jobs

    def load_claimed(self, job: Job) -> None:
        """At start-up: a job whose claim its payer has not acknowledged."""
        self._claimed_jobs.setdefault(job.claimed_seq, []).append(job)


def _newest(entries: list[bytes]) -> list[bytes]:
    size, start = 0, len(entries)
    while start > 0 and size + len(entries[start - 1]) + 5 <= limits.SEGMENT_BYTES_MAX:
        start -= 1
        size += len(entries[start]) + 5
    return entries[start:]
