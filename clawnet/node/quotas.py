"""How much this node takes on its disk for others: for one task by the requester's ring, for one requester, in all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from clawnet.market.reasons import Reason
from clawnet.market.records import Job
from clawnet.node.context import Context

if TYPE_CHECKING:
    from clawnet.node.kernel import Rooms


class Quotas:
    """Asked when an offer comes, before anybody locks a credit, and again when its document is here."""

    def __init__(self, ctx: Context, rooms: Rooms) -> None:
        self._ctx = ctx
        self._rooms = rooms

    def input_bytes_max(self, ring: str) -> int:
        """The most that the inputs of one task of this ring may be."""
        return self._ctx.config.integer(f"execution.input_max.{ring}")

    def held_bytes(self, peer: str) -> int:
        """What is kept here for a requester: the inputs of its unfinished tasks, its results until it has paid them.

        All nodes of an owner are one requester.
        """
        jobs = self._rooms.jobs
        held = 0
        for job in self._of_owner(peer, jobs.jobs.values()):
            document = jobs.documents.get(job.job)
            if document is not None:
                held += sum(item.bytes for item in document.inputs)
            if not job.inline:
                held += job.blob_bytes
        return held

    def _unpaid_bytes(self, peer: str) -> int:
        """The part of it that is results: large ones, which lie on the disk until they are paid."""
        large = [job for job in self._rooms.jobs.jobs.values() if job.blob_bytes and not job.inline]
        return sum(job.blob_bytes for job in self._of_owner(peer, large))

    def _of_owner(self, peer: str, jobs: Iterable[Job]) -> Iterator[Job]:
        owner = self.owner_of(peer)
        return (job for job in jobs if job.peer == peer or self.owner_of(job.peer) == owner)

    def owner_of(self, peer: str) -> bytes:
        """The key by which all nodes of a peer's owner are one."""
        record = self._rooms.members.records.get(peer)
        return record.owner if record is not None and record.owner else self._rooms.members.account_of(peer)

    def refusal(self, peer: str, ring: str, input_bytes: int) -> Reason | None:
        """Why inputs of this size are not taken; None when they are.

        Who leaves results unpaid gets nothing more, also nothing without inputs: it would fill the disk with results.
        """
        share = self._ctx.config.integer("storage.requester_max")
        if not input_bytes:
            return Reason.QUOTA if ring != "own" and self._unpaid_bytes(peer) > share else None
        if input_bytes > self.input_bytes_max(ring) or (ring != "own" and input_bytes > share):
            return Reason.TOO_LARGE  # also when nothing else is kept here
        if ring != "own" and self.held_bytes(peer) + input_bytes > share:
            return Reason.QUOTA
        if peer != self._ctx.me and input_bytes > self._ctx.ports.room_bytes():
            return Reason.STORAGE_FULL
        return None
