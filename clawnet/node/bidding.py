"""Bids: what this node asks for a task it is offered, or the reason why it does not want it."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

from msgspec import Struct

from clawnet.ledger import taskdoc
from clawnet.market.pricing import Durations, Rates, metered, quote, rates_from
from clawnet.market.reasons import Reason
from clawnet.market.records import Job
from clawnet.node.context import Context
from clawnet.wire.events import MessageIn, TaskExited
from clawnet.wire.messages import Bid, Decline, Offer, Requirements

if TYPE_CHECKING:
    from clawnet.node.kernel import Rooms


PROMISES_MAX = 65_536


class Promise(Struct, frozen=True, gc=False):
    """What a bid was for, and at what price."""

    price_ucr: int
    requirements: Requirements

    def covers(self, job: Job) -> bool:
        """Whether an award is what was bid for: for no less, and with no greater needs."""
        asked = self.requirements
        needs_more = job.cpu > asked.cpu or job.memory_bytes > asked.memory_bytes or job.gpu > asked.gpu
        return job.price_ucr >= self.price_ucr and not needs_more


class Bidding:
    """Prices from learned durations and load; nothing is promised beyond the slots and the queue."""

    def __init__(self, ctx: Context, rooms: Rooms) -> None:
        self._ctx = ctx
        self._rooms = rooms
        self.durations = Durations()
        self.rates: Rates
        self._enabled: bool
        self.reloaded()
        self.promised: OrderedDict[tuple[str, bytes], Promise] = OrderedDict()
        """What was last bid for a task: an award of anything else is refused. Forgotten over a restart, like the bids.
        """

    def reloaded(self) -> None:
        """What the configuration says now; read here so that an offer costs no look-up."""
        self.rates = rates_from(self._ctx.config)
        self._enabled = self._ctx.config.flag("market.enabled")

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
            workload=rooms.placing.workload(offer.kind, peer, ring, offer.requirements),
            durations=self.durations,
            rates=self.rates,
            now_ms=ctx.now,
            input_bytes_max=rooms.quotas.input_bytes_max(ring),
            draining=ctx.draining,
        )
        if not isinstance(terms, Reason):
            terms = rooms.quotas.refusal(peer, ring, offer.input_bytes) or terms
        if isinstance(terms, Reason):
            return Decline(offer.task_id, offer.round, terms.value)
        if ring != "own":
            self._promise(peer, offer.task_id, Promise(terms.price_ucr, offer.requirements))
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

    def _promise(self, peer: str, task_id: bytes, promise: Promise) -> None:
        self.promised[(peer, task_id)] = promise
        self.promised.move_to_end((peer, task_id))
        if len(self.promised) > PROMISES_MAX:
            self.promised.popitem(last=False)
