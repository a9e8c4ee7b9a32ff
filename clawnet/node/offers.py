"""Offers: whom a task is offered to directly, be it connected or not, and what an offer says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from clawnet import limits
from clawnet.market.records import Task
from clawnet.node.context import Context
from clawnet.wire.messages import Offer

if TYPE_CHECKING:
    from clawnet.node.kernel import Rooms


class Offers:
    """At most CANDIDATES_MAX are asked, however large the mesh: the connected first, others where they are few."""

    def __init__(self, ctx: Context, rooms: Rooms) -> None:
        self._ctx = ctx
        self._rooms = rooms

    def candidates(
        self, task: Task, ring: str, excluded: Iterable[str], among: Mapping[str, object] | None = None
    ) -> list[str]:
        """Whom to ask in a ring: the best and some at random of the connected (or of `among`, and then no others).

        With fewer than CANDIDATES_NEAR of these, members known by their cards alone fill up, to be dialled for it; one
        such is asked now and then in any case, so that who is connected to us has no privilege.
        """
        ctx, members = self._ctx, self._rooms.members
        named = task.spec["peer"]
        excluded = frozenset(excluded)
        near = members.index.candidates(
            task.kind,
            task.requirements,
            ring,
            score_hint=lambda peer: members.reputation.score(peer, ctx.now).total,
            pick=members.pick,
            among=ctx.links if among is None else among,
            only=named,
            exclude=excluded,
            usable=members.usable,
        )
        if among is not None:
            return near
        wanted = limits.CANDIDATES_MAX if named else limits.CANDIDATES_NEAR
        count = wanted - len(near)
        if count <= 0:
            if named or members.pick(limits.EXPLORE_FAR_ONE_IN):
                return near
            count = 1
        fitting = members.index.fitting(task.kind, task.requirements, ring)
        if named:
            fitting = {peer: None for peer in named if peer in fitting}
        far = self._rooms.reaching.far(fitting, count, excluded)
        return [*near[: limits.CANDIDATES_MAX - len(far)], *far]

    def are_few(self, task: Task, ring: str) -> bool:
        """Whether so few members are known who could do it that others may be asked by hearsay."""
        members = self._rooms.members
        known = 0
        for peer in members.index.fitting(task.kind, task.requirements, ring):
            known += members.usable(peer) and (peer in self._ctx.links or self._rooms.reaching.can_dial(peer))
            if known >= limits.CANDIDATES_FEW:
                return False
        return True

    def may_bid(self, task: Task, peer: str, ring: str) -> bool:
        """Whether this connected peer, which was not asked by name, is one that could have been."""
        members, named = self._rooms.members, task.spec["peer"]
        return (
            members.ring_of(peer) == ring
            and members.usable(peer)
            and peer not in task.spec["exclude"]
            and peer not in task.refused
            and (not named or peer in named)
            and members.index.unmet(task.kind, task.requirements, peer) is None
        )

    @staticmethod
    def make(task: Task, budget_ucr: int, close_ms: int) -> Offer:
        """All that anyone but the winner ever sees of a task."""
        return Offer(
            task_id=task.task_id,
            round=task.round,
            kind=task.kind,
            task=task.task_hash,
            payload_bytes=task.document_bytes,
            input_bytes=task.input_bytes,
            max_budget_ucr=budget_ucr,
            deadline_ms=task.deadline_ms,
            close_ms=close_ms,
            lease_s=limits.LEASE_S,
            requirements=task.requirements,
            retries=task.spec["retries"],
        )
