"""Bids: what this node asks for a task it is offered, or the reason why it does not want it."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from clawnet.ledger import taskdoc
from clawnet.market.pricing import Durations, Rates, Workload, is_prompt, metered, quote, rates_from
from clawnet.market.reasons import Reason
from clawnet.market.records import Job
from clawnet.node.context import Context
from clawnet.wire.events import MessageIn, TaskExited
from clawnet.wire.messages import Bid, Decline, Offer

if TYPE_CHECKING:
    from clawnet.node.kernel import Rooms


PROMISES_MAX = 65_536


class Bidding:
    """Prices from learned durations and load; nothing is promised beyond the slots and the queue."""

    def __init__(self, ctx: Context, rooms: Rooms) -> None:
        self._ctx = ctx
        self._rooms = rooms
        self.durations = Durations()
        self.rates: Rates
        self._enabled: bool
        self.reloaded()
        self._queue_max = ctx.config.integer("execution.queue_max")
        self.promised: OrderedDict[tuple[str, bytes], int] = OrderedDict()
        """What was last asked for a task: an award for less is refused. Forgotten over a restart, like the bids."""

    def reloaded(self) -> None:
        """What the configuration says now; read here so that an offer costs no look-up."""
        self.rates = rates_from(self._ctx.config)
        self._enabled = self._ctx.config.flag("market.enabled")

    def workload(self, kind: str) -> Workload:
        """What stands before one more task of this kind: prompts have slots of their own."""
        jobs = self._rooms.jobs
        if is_prompt(kind):
            names = (*jobs.prompting, *jobs.prompts)
            ahead_s = sum(job.estimated_s for name in names if (job := jobs.jobs.get(name)))
            return Workload(self._ctx.config.integer("execution.prompt_slots"), len(names), ahead_s, self._queue_max)
        committed = (
            len(jobs.running)
            - len(jobs.prompting)
            + len(jobs.queue)
            + sum(1 for job in jobs.jobs.values() if job.state == "fetching")
        )
        names = tuple(name for name in (*jobs.running, *jobs.queue) if name not in jobs.prompting)
        ahead_s = sum(job.estimated_s for name in names if (job := jobs.jobs.get(name)))
        return Workload(jobs.slots, committed, ahead_s, self._queue_max)

    def metered(self, job: Job, document: taskdoc.TaskDocument | None, event: TaskExited) -> int:
        """What a finished job asks: its price, and of a prompt the part of it that was used."""
        if job.kind != "prompt" or document is None or not job.price_ucr:
            return job.price_ucr
        size = len(taskdoc.encode(document))
        return metered(self.rates, job.price_ucr, size, event.tokens_in, event.tokens_out)

    def offer(self, event: MessageIn, offer: Offer) -> None:
        """A fixed price for the whole task, or the reason why not."""
        self._ctx.send(event.peer, self.answer(event.peer, offer, self._rooms.members.ring_of(event.peer)), event.id)

    def answer(self, peer: str, offer: Offer, ring: str) -> Bid | Decline:
        """What this node says to an offer of a peer of `ring`, be it connected or not."""
        ctx, rooms = self._ctx, self._rooms
        refusal = None
        if ring != "own":
            refusal = self._refusal(peer, ring) if self._enabled else Reason.POLICY
        terms = refusal or quote(
            offer,
            card=rooms.cards.own,
            ring=ring,
            workload=self.workload(offer.kind),
            durations=self.durations,
            rates=self.rates,
            now_ms=ctx.now,
            draining=ctx.draining,
        )
        if isinstance(terms, Reason):
            return Decline(offer.task_id, offer.round, terms.value)
        if ring != "own":
            self._promise(peer, offer.task_id, terms.price_ucr)
        account = rooms.members.account_of(peer)
        head = rooms.books.book.head(account) if account != ctx.account else None
        return Bid(
            task_id=offer.task_id,
            round=offer.round,
            price_ucr=terms.price_ucr,
            estimated_s=terms.estimated_s,
            queue_wait_s=terms.queue_wait_s,
            confidence=terms.confidence,
            capability_hash=rooms.cards.own_hash,
            load=terms.load,
            energy_cost=terms.energy_cost,
            nonce=ctx.entropy(16),
            known_seq=head[0] if head else -1,
            known_hash=head[1] if head else bytes(32),
        )

    def _refusal(self, peer: str, ring: str) -> Reason | None:
        """Why this node takes no paid work from this requester now, whatever the task."""
        members, books = self._rooms.members, self._rooms.books
        if ring == "stranger" or members.banned(peer):
            return Reason.NOT_TRUSTED
        if members.clock_off():
            return Reason.CLOCK
        account = members.account_of(peer)
        if books.dead(account):
            return Reason.CANNOT_AUDIT
        if books.book.exposure_ucr(account, self._ctx.account) >= self._ctx.config.amount_ucr("ledger.exposure_max"):
            return Reason.FULL
        return None

    def _promise(self, peer: str, task_id: bytes, price_ucr: int) -> None:
        self.promised[(peer, task_id)] = price_ucr
        self.promised.move_to_end((peer, task_id))
        if len(self.promised) > PROMISES_MAX:
            self.promised.popitem(last=False)
