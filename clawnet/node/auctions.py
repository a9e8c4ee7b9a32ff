"""Rounds of asking for bids: whom, in which ring first, until when, and what follows from the answers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import msgspec

from clawnet import limits
from clawnet.errors import FundsError, NoBidError, TimedOutError
from clawnet.market import taskspec
from clawnet.market.auction import Auction, Candidate, encode_record, weights_from
from clawnet.market.awarded import AwardOrder
from clawnet.market.capability import AI
from clawnet.market.reasons import PASSING, Reason
from clawnet.market.records import FINAL_STATES, Task
from clawnet.market.waiting import Waiting
from clawnet.money import format_credits
from clawnet.node.context import Context
from clawnet.node.widening import Widening
from clawnet.wire.messages import Bid, Decline

if TYPE_CHECKING:
    from clawnet.node.kernel import Rooms

MINUTE_MS = 60_000
BACKOFF_MIN_MS = 100
BACKOFF_MAX_MS = 5_000
RESUME_MS = 5_000
PATIENCE_MS = 10_000
"""How long those who were slow before are waited for at most where nobody else is left."""
SPEND = "spend"
"""Counted among the refusals: members that were not asked, for the limits of market.spend left nothing to offer."""


def _lane(task: Task) -> bytes:
    """Tasks that the same candidates would take or refuse for want of room; 8 bytes, so that it is no task's id.

    Room on a disk is for those alone that have inputs.
    """
    spec = task.spec
    asked = [task.kind, spec["requirements"], spec["peer"], spec["exclude"], task.stages, bool(task.inputs)]
    return hashlib.blake2b(msgspec.msgpack.encode(asked), digest_size=8).digest()


class Auctions:
    """Live auctions by task, the queue of tasks that wait for one, and who was awarded how long ago."""

    def __init__(self, ctx: Context, rooms: Rooms) -> None:
        self._ctx = ctx
        self._rooms = rooms
        self.live: dict[bytes, Auction] = {}
        self.waiting = Waiting()
        self._widening = Widening(ctx, rooms)
        self._order = AwardOrder()
        self._missed: dict[str, None] = {}
        self._expected: dict[str, None] = {}
        self._held_until_ms = 0
        self._away: dict[str, int] = {}
        self._parked: dict[bytes, None] = {}
        self._short: dict[bytes, FundsError] = {}
        self._unheard: dict[bytes, bool] = {}
        """Open tasks that candidates have not answered; whether these are now waited for, however slow they were."""
        self._minute = 0
        self._bids_in: dict[bytes, dict[str, int]] = {}
        self.reloaded()

    def reloaded(self) -> None:
        """What the configuration says now; an auction under way keeps the rules it was opened with."""
        read = self._ctx.config
        self._weights = weights_from(read)
        self._live_max = read.integer("market.max_concurrent_auctions")
        self._soft_close_ms = read.millis("market.soft_close")

    # --- opening

    def queue(self, task: Task) -> None:
        """Holds an auction for the task, now or when one of the running ones has ended."""
        task.stage = 0
        self.waiting.push(_lane(task), task.spec["priority"], task.task_id)
        self._rooms.tasks.touch(task)

    def expect(self, peers: Iterable[str]) -> None:
        """At the start: no auction opens before those who could bid are connected or known to be out of reach.

        Once one is there the others have a moment more; RESUME_MS is the longest that is waited.
        """
        self._expected = dict.fromkeys(peers)
        self._away = dict.fromkeys(peers, self._ctx.now + RESUME_MS)
        if self._expected:
            self._hold_until(self._ctx.now + RESUME_MS)

    def met(self, peer: str, *, connected: bool) -> None:
        """One of those who were dialled at the start is here, or cannot be reached; or one that was lost is back."""
        if connected:
            self._away.pop(peer, None)
            parked, self._parked = self._parked, {}
            for task_id in parked:
                self.timer(task_id)
        if self._expected.pop(peer, 0) is None or connected:
            if not self._expected:
                self._held_until_ms = 0
            elif connected and self._held_until_ms > self._ctx.now + RESUME_MS // 10:
                self._hold_until(self._ctx.now + RESUME_MS // 10)

    def _hold_until(self, at_ms: int) -> None:
        self._held_until_ms = at_ms
        self._ctx.wake(("auctions",), at_ms)

    def pump(self) -> None:
        """At the end of a turn: opens waiting auctions while there is room."""
        if not self.waiting:
            return
        if self._ctx.now < self._held_until_ms <= self._ctx.now + RESUME_MS or not self._rooms.cards.capacity.cpu:
            return  # the others, or what this node itself can do, are not known yet
        while len(self.live) < self._live_max:
            task_id = self.waiting.pop()
            if task_id is None:
                return
            task = self._rooms.tasks.open.get(task_id)
            if (
                task is not None
                and task.state in ("announced", "bidding", "reassigned")
                and task.task_id not in self.live
            ):
                self._open_stage(task)

    def drop(self, task: Task) -> None:
        """The task is final: its auction, if any, is over."""
        self._bids_in.pop(task.task_id, None)
        self._parked.pop(task.task_id, None)
        self._short.pop(task.task_id, None)
        self._unheard.pop(task.task_id, None)
        self.waiting.forget(task.task_id)
        auction = self.live.pop(task.task_id, None)
        if auction is not None:
            self._ctx.sleep(("auction", task.task_id))
            self._keep(task, auction, closed_by=task.state)

    def _open_stage(self, task: Task) -> None:
        """Asks the next ring that has anybody to ask; none left: the task ends without a bid."""
        while task.stage < len(task.stages):
            ring = task.stages[task.stage]
            candidates = self._candidates(task, ring)
            if ring == "member" and candidates and self._rooms.spending.exhausted(task):
                task.refusals[SPEND] = task.refusals.get(SPEND, 0) + len(candidates)
            elif candidates:
                self._announce(task, ring, candidates)
                return
            elif self._ask_around(task, ring):
                return
            task.stage += 1
        self._exhausted(task)

    def _ask_around(self, task: Task, ring: str) -> bool:
        """Where too few are known who could do it, members that this node does not know may hear of it by others."""
        gossiping = self._rooms.gossiping
        lane = _lane(task)
        if not gossiping.is_worth_it(task, ring, lane):
            return False
        if gossiping.is_under_way(lane):
            self.later(task)  # whoever answers to the other task is known afterwards
        else:
            gossiping.begins(task, lane)
            self._announce(task, ring, [], limits.GOSSIP_WAIT_MS)
        return True

    def _candidates(self, task: Task, ring: str, among: Mapping[str, object] | None = None) -> list[str]:
        ctx, named = self._ctx, task.spec["peer"]
        excluded = [*task.spec["exclude"], *task.refused]
        if ring == "self":
            if task.kind == "prompt" and AI not in self._rooms.cards.own.capabilities:
                task.refusals[Reason.NO_CAPABILITY.value] = 1  # not worth a round: the submitter hears of it at once
                return []
            return [ctx.me] if ctx.me not in excluded and (not named or ctx.me in named) else []
        return self._rooms.offers.candidates(task, ring, excluded, among)

    def budget_left(self, task: Task) -> int:
        """What may still be promised: attempts that may yet be paid count against the budget."""
        bound = sum(a.released_ucr or a.price_ucr for a in task.attempts if a.paying or a.released_seq >= 0)
        return max(0, task.max_budget_ucr - bound)

    def _affordable(self, task: Task, budget_ucr: int) -> int:
        """What of a budget members may be offered; what keeps it below that is remembered, to be told at the end."""
        available_ucr = max(0, self._rooms.books.available())
        offered_ucr = self._rooms.spending.capped(task, min(budget_ucr, available_ucr))
        self._short.pop(task.task_id, None)
        if offered_ucr < budget_ucr:
            short = self._rooms.spending.blocked(task, budget_ucr) if offered_ucr < available_ucr else None
            self._short[task.task_id] = short or FundsError(
                f"{format_credits(available_ucr)} credits are available, and nobody does it for that",
                hint="clawnet wallet escrows shows what is bound, and until when",
            )
        return offered_ucr

    def _announce(self, task: Task, ring: str, candidates: list[str], gossip_ms: int = 0) -> None:
        ctx = self._ctx
        task.round += 1
        patient = self._unheard.get(task.task_id, False)
        open_ms = taskspec.seconds_to_ms(task.spec["bid_timeout_s"])
        close_ms = min(ctx.now + (min(open_ms, PATIENCE_MS) if patient else open_ms), task.deadline_ms)
        budget = self.budget_left(task)
        if ring == "member":
            budget = self._affordable(task, budget)
        auction = Auction(
            task.task_id,
            task.round,
            {peer: self._candidate(peer, patient=patient) for peer in candidates},
            opened_ms=ctx.now,
            close_ms=close_ms,
            soft_close_ms=self._soft_close_ms,
            max_budget_ucr=budget,
            min_reputation=task.requirements.min_reputation if ring == "member" else 0.0,
            weights=self._weights,
            ring=ring,
            gossip_ms=gossip_ms,
        )
        self.live[task.task_id] = auction
        if task.state != "bidding":
            whom = "members not known here" if gossip_ms else str(len(candidates))
            self._rooms.tasks.move(task, "bidding", f"{whom} asked in ring {ring}")
        # A round that is opened again without another state has its number on the disk too: none comes twice.
        self._rooms.tasks.touch(task)
        offer = self._rooms.offers.make(task, budget, close_ms)
        if gossip_ms:
            self._rooms.gossiping.tell(offer, ring)
        for peer in candidates:
            if not self._rooms.reaching.send(peer, offer, close_ms):
                auction.peer_gone(peer, ctx.now)
        self._arm(auction)

    def _arm(self, auction: Auction) -> None:
        self._ctx.wake(("auction", auction.task_id), auction.closes_at(self._ctx.now))

    # --- answers

    def bid(self, peer: str, bid: Bid) -> None:
        """A sealed bid."""
        auction = self.live.get(bid.task_id)
        if auction is None or self._too_many(peer, bid.task_id):
            return
        members = self._rooms.members
        if auction.gossiped and not self._joins(peer, auction):
            return
        auction.add_bid(
            peer,
            bid,
            self._ctx.now,
            reputation=members.reputation.score(peer, self._ctx.now).total,
            confidence=members.reputation.confidence(peer, bid.confidence, self._ctx.now),
        )
        self._answered(peer, auction)

    def _joins(self, peer: str, auction: Auction) -> bool:
        """Whether somebody who heard of a task by others may bid: it is one that could have been asked."""
        task = self._rooms.tasks.open.get(auction.task_id)
        if task is None or not self._rooms.offers.may_bid(task, peer, auction.ring):
            self._ctx.count("messages_refused_total", "bid_unasked")
            return False
        return auction.join(peer, self._candidate(peer))

    def _candidate(self, peer: str, *, patient: bool = False) -> Candidate:
        card = self._rooms.members.index.card(peer)
        return Candidate(
            self._rooms.members.rtt_ms(peer),
            peer in self._missed and not patient,
            self._rooms.jobs.slots if card is None else card.slots,
            self._order.given(peer),
        )

    def _too_many(self, peer: str, task_id: bytes) -> bool:
        """More bids of a peer for one task within a minute than `market.rate_limit_bids` are not looked at."""
        minute = self._ctx.now // MINUTE_MS
        if minute != self._minute:
            self._minute = minute
            self._bids_in.clear()
        of_task = self._bids_in.setdefault(task_id, {})
        count = of_task[peer] = of_task.get(peer, 0) + 1
        if count <= self._ctx.config.integer("market.rate_limit_bids"):
            return False
        self._ctx.count("messages_refused_total", "bid_rate")
        return True

    def decline(self, peer: str, decline: Decline) -> None:
        """A refusal to bid, with its reason."""
        auction = self.live.get(decline.task_id)
        if auction is not None and auction.add_decline(peer, decline.round, decline.reason, self._ctx.now):
            self._answered(peer, auction)

    def _answered(self, peer: str, auction: Auction) -> None:
        self._missed.pop(peer, None)
        if auction.is_closed(self._ctx.now):
            self._close(auction)
        else:
            self._arm(auction)

    def peer_back(self, peer: str) -> None:
        """A peer is connected again: the bids it made in auctions still open count."""
        for auction in self.live.values():
            auction.peer_back(peer)

    def peer_down(self, peer: str) -> None:
        """Nobody waits for the answer of a peer that is gone; what nobody else can do waits a moment for its return."""
        now_ms = self._ctx.now
        self._away = {other: until for other, until in self._away.items() if until > now_ms}
        self._away[peer] = now_ms + RESUME_MS
        self.out_of_reach(peer)

    def out_of_reach(self, peer: str) -> None:
        """A candidate is not connected and will not be: nobody waits for its answer."""
        for auction in list(self.live.values()):
            auction.peer_gone(peer, self._ctx.now)
            if auction.is_closed(self._ctx.now):
                self._close(auction)

    def timer(self, task_id: bytes) -> None:
        """A close may be due, or the end of a pause after which it, or one of a lane, is tried again."""
        if self.waiting.held(task_id):
            self._hold(task_id, self.waiting.pause_over(task_id))
            return
        self._parked.pop(task_id, None)
        auction = self.live.get(task_id)
        if auction is not None:
            if auction.is_closed(self._ctx.now):
                self._close(auction)
            else:
                self._arm(auction)
            return
        task = self._rooms.tasks.open.get(task_id)
        if task is not None and task.state in ("announced", "bidding", "reassigned"):
            self.queue(task)

    # --- closing

    def _keep(self, task: Task, auction: Auction, *, winner: str = "", closed_by: str = "") -> None:
        record = auction.record(self._ctx.now, last_award=self._order.of, winner=winner, closed_by=closed_by)
        task.bids += len(record.bids)
        self._ctx.put("bids", task.task_id, task.round, "", encode_record(record))
        self._rooms.tasks.touch(task)

    def _close(self, auction: Auction) -> None:
        del self.live[auction.task_id]
        self._ctx.sleep(("auction", auction.task_id))
        task = self._rooms.tasks.open.get(auction.task_id)
        if task is None or task.state in FINAL_STATES:
            return
        for peer in auction.silent:
            self._missed[peer] = None
            if self._ctx.now < auction.close_ms:
                self._unheard.setdefault(task.task_id, False)
        auction.weigh_again(self._order.given)
        ranking = auction.ranking(self._order.of)
        self._keep(task, auction)
        if ranking:
            best = ranking[0][0]
            self._order.note(best.peer, best.estimated_s)
            self._bids_in.pop(task.task_id, None)
            self.waiting.taken(_lane(task))
            self._rooms.awards.award(task, best)
            return
        refusals = auction.refusals()
        task.refusals.update(refusals)
        if auction.gossiped:
            self._rooms.gossiping.was_in_vain(_lane(task))
        elif not (auction.ring == "member" and self._rooms.spending.exhausted(task)) and self._ask_around(
            task, auction.ring
        ):
            return
        if task.stage + 1 < len(task.stages):
            task.stage += 1
            self._open_stage(task)
        else:
            self._exhausted(task)

    def _exhausted(self, task: Task) -> None:
        """Nobody in any ring takes it: later, where somebody was only full, else never."""
        lost = {peer for peer, gone in {one.peer: one.lost for one in task.attempts}.items() if gone}
        if PASSING & set(task.refusals) and self._ctx.now < task.deadline_ms:
            self.pause(task)
        elif SPEND in task.refusals:
            self._no_bid(task)
        elif self._unheard.get(task.task_id) is False and self._ctx.now < task.deadline_ms:
            # Nobody is left but those that were not waited for, since they once were slow.
            self._unheard[task.task_id] = True
            self.queue(task)
        elif lost and self._ctx.now < task.deadline_ms:
            # Nobody is left but those that were lost: until the deadline they may come back.
            task.refused = [peer for peer in task.refused if peer not in lost]
            self._parked[task.task_id] = None
            self.later(task)
        elif back_ms := self._back_ms(task):
            self._parked[task.task_id] = None
            self._ctx.wake(("auction", task.task_id), min(back_ms, task.deadline_ms))
        else:
            self._no_bid(task)

    def _back_ms(self, task: Task) -> int:
        """Until when somebody who could do it, and was here a moment ago, is waited for; 0: there is nobody."""
        away = {peer: until for peer, until in self._away.items() if until > self._ctx.now}
        able = [peer for ring in task.stages if ring != "self" for peer in self._candidates(task, ring, away)]
        return max((away[peer] for peer in able), default=0)

    def pause(self, task: Task) -> None:
        """Everybody who could is full: it is asked again when a place may be free, until the deadline."""
        task.stage = 0
        task.refusals.clear()
        lane = _lane(task)
        self._hold(lane, self.waiting.full(lane, task.spec["priority"], task.task_id))

    def _hold(self, lane: bytes, pause_ms: int) -> None:
        if pause_ms:
            self._ctx.wake(("auction", lane), self._ctx.now + pause_ms + self._rooms.members.pick(pause_ms))

    def attempt_ended(self, task: Task) -> None:
        """An executor has a place again."""
        self.waiting.ended(_lane(task))

    def later(self, task: Task) -> None:
        """Somebody may take this task yet: ask again after a pause that grows, until the deadline."""
        task.backoff_ms = min(max(BACKOFF_MIN_MS, task.backoff_ms * 2), BACKOFF_MAX_MS)
        task.refusals.clear()
        spread = self._rooms.members.pick(task.backoff_ms)
        self._ctx.wake(("auction", task.task_id), min(self._ctx.now + task.backoff_ms + spread, task.deadline_ms))

    def _no_bid(self, task: Task) -> None:
        refusals = task.refusals
        if self._ctx.now >= task.deadline_ms:
            error = TimedOutError(
                "the deadline passed before anybody could take the task", hint="--deadline allows more"
            )
            self._rooms.tasks.finish(task, "timed_out", error)
            return
        failed = self._rooms.verdicts.nobody_left(task)
        if failed is not None:
            self._rooms.tasks.finish(task, "failed", failed)
            return
        short = self._short.get(task.task_id) or self._rooms.spending.blocked(task, max(1, self.budget_left(task)))
        if short is not None and {SPEND, "price"} & set(refusals):
            self._rooms.tasks.finish(task, "failed", short)
            return
        unfit = self._widening.unfit(task)
        told = refusals or unfit
        reasons = ", ".join(f"{count} {word}" for word, count in sorted(told.items()))
        asked = f"nobody can take it ({reasons})" if reasons else "nobody allowed to see it can do it"
        if task.attempts:
            last = task.attempts[-1]
            asked += f"; attempt {len(task.attempts)} had ended before: {last.reason or last.state}"
        error_hint = self._widening.hint(task, refusals, unfit)
        self._rooms.tasks.finish(
            task, "no_bids", NoBidError(f"no acceptable bid: {asked}", hint=error_hint, refusals=refusals)
        )
