"""A sealed auction: who was asked, what came back, when it closes, who wins, and why. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec
from msgspec import Struct

from clawnet import limits
from clawnet.config import Config
from clawnet.market.awarded import Given
from clawnet.market.reasons import Reason, count_reasons, reason_of
from clawnet.money import UCR_PER_CREDIT, format_credits
from clawnet.wire.messages import Bid

SOFT_CLOSE_ROUND_TRIPS: Final = 3
EQUAL_WITHIN: Final = 1e-9
SET_BACK_MS = 1_000


class Weights(Struct, frozen=True, gc=False):
    """What the four terms of a score count; they sum to 1."""

    price: float = 0.40
    reputation: float = 0.30
    latency: float = 0.10
    confidence: float = 0.20


class Score(Struct, frozen=True, gc=False, array_like=True):
    """The four weighted terms of a bid and their sum. Every term lies between 0 and its weight."""

    price: float
    reputation: float
    latency: float
    confidence: float
    total: float


def weights_from(config: Config) -> Weights:
    """The weights of `market.weights.*` (the configuration refuses ones that do not sum to 1)."""
    return Weights(
        price=config.number("market.weights.price"),
        reputation=config.number("market.weights.reputation"),
        latency=config.number("market.weights.latency"),
        confidence=config.number("market.weights.confidence"),
    )


def score(price_ucr: int, latency_s: float, reputation: float, confidence: float, weights: Weights) -> Score:
    """DESIGN section 5: price in credits and latency in seconds, both floored at 1, so that no term leaves its weight.

    `latency_s` is queue wait + estimated run time + round trip; `reputation` is the requester's own view of the bidder,
    `confidence` the bidder's own word after the discount for past words that did not hold. Shares outside 0..1 are
    cut to it.
    """
    price_term = weights.price / max(price_ucr / UCR_PER_CREDIT, 1.0)
    reputation_term = weights.reputation * min(max(reputation, 0.0), 1.0)
    latency_term = weights.latency / max(latency_s, 1.0)
    confidence_term = weights.confidence * min(max(confidence, 0.0), 1.0)
    return Score(
        price_term,
        reputation_term,
        latency_term,
        confidence_term,
        price_term + reputation_term + latency_term + confidence_term,
    )


class Candidate(Struct, frozen=True, gc=False):
    """A peer that is asked: its round trip, and whether it left its last offer unanswered; its slots, by its card, and
    what it had been awarded when it was asked."""

    rtt_ms: float = 0.0
    missed_last: bool = False
    slots: int = 1
    given: Given = Given()


class BidFacts(Struct, frozen=True, gc=False, array_like=True):
    """A bid as the requester judged it. `refusal` is empty for one that could win. `at_ms` is when it came.

    `own_ahead_s` is how much longer than it told it would take, for what the bidder was awarded here since the offer.
    """

    peer: str
    price_ucr: int
    estimated_s: float
    queue_wait_s: float
    rtt_s: float
    confidence_claimed: float
    confidence: float
    reputation: float
    load: float
    energy_cost: float
    score: Score
    at_ms: int
    refusal: str = ""
    own_ahead_s: float = 0.0


class AuctionRecord(Struct, frozen=True, array_like=True):
    """All that `market why` tells of one auction; kept with the task for ever (encode_record, explain).

    `closed_by` is all_answered, soft_close, bid_timeout, nobody, gossip_over, or a word of the caller (inner_ring,
    cancelled).
    `bids` are best first, unacceptable ones last. `silent` are those asked that had not answered at the close,
    `gone` those whose link broke before they had.
    """

    round: int
    ring: str
    opened_ms: int
    closed_ms: int
    closed_by: str
    max_budget_ucr: int
    min_reputation: float
    weights: tuple[float, float, float, float]
    asked: list[str]
    bids: list[BidFacts]
    declines: list[tuple[str, str]]
    silent: list[str]
    gone: list[str]
    winner: str
    why: str


class Auction:
    """One round of asking for bids: the `number`-th of its task, in `ring`.

    It closes (closes_at) as soon as every candidate has bid, declined or gone; at once when there is none;
    max(soft_close_ms, 3 round trips of the slowest candidate) after the first acceptable bid; at `close_ms` at the
    latest. A candidate that missed its last offer is not waited for, except that, while no acceptable bid is in and
    nobody else is left to answer, it has as long as a soft close from the opening: else a peer that once was slow
    could never come back where it is the only one.

    With `gossip_ms` nobody is asked by name: those who hear of the task say so by a bid (join), until so long after
    the opening.
    """

    def __init__(
        self,
        task_id: bytes,
        number: int,
        candidates: Mapping[str, Candidate],
        *,
        opened_ms: int,
        close_ms: int,
        soft_close_ms: int,
        max_budget_ucr: int,
        min_reputation: float = 0.0,
        weights: Weights | None = None,
        ring: str = "",
        gossip_ms: int = 0,
    ) -> None:
        self.task_id = task_id
        self.round = number
        self.ring = ring
        self.opened_ms = opened_ms
        self.close_ms = close_ms
        self.max_budget_ucr = max_budget_ucr
        self.min_reputation = min_reputation
        self.weights = weights or Weights()
        self.gossiped = gossip_ms > 0
        self._gossip_until_ms = min(close_ms, opened_ms + gossip_ms)
        self._candidates = dict(candidates)
        slowest_ms = max((c.rtt_ms for c in candidates.values() if not c.missed_last), default=0.0)
        self._soft_ms = max(soft_close_ms, math.ceil(SOFT_CLOSE_ROUND_TRIPS * slowest_ms))
        self._open = dict.fromkeys(candidates)
        self._awaited = sum(not c.missed_last for c in candidates.values())
        self._answered_ms = opened_ms
        self._first_good_ms: int | None = None
        self._bids: dict[str, BidFacts] = {}
        self._declines: dict[str, str] = {}
        self._gone: dict[str, None] = {}

    # --- what comes in

    def join(self, peer: str, candidate: Candidate) -> bool:
        """Somebody who was not asked by name may bid in a gossiped round; False when as many as may have done so."""
        if not self.gossiped or (peer not in self._candidates and len(self._candidates) >= limits.CANDIDATES_MAX):
            return False
        if peer not in self._candidates:
            self._candidates[peer] = candidate
            self._open[peer] = None
            self._awaited += not candidate.missed_last
        return True

    def add_bid(self, peer: str, bid: Bid, now_ms: int, *, reputation: float, confidence: float) -> str:
        """Takes a bid; returns "" or why it cannot win (a Reason), or "not_asked" or "twice" (then it is not kept).

        `reputation` and `confidence` (after the discount) are the requester's view at this moment. The first answer
        of a candidate stands.
        """
        if peer not in self._candidates or bid.round != self.round:
            return "not_asked"
        if peer in self._bids or peer in self._declines:
            return "twice"
        refusal = ""
        if now_ms > self.close_ms:
            refusal = Reason.CLOSED.value
        elif bid.price_ucr > self.max_budget_ucr:
            refusal = Reason.PRICE.value
        elif reputation < self.min_reputation:
            refusal = Reason.REPUTATION.value
        rtt_s = self._candidates[peer].rtt_ms / 1000
        latency_s = bid.queue_wait_s + bid.estimated_s + rtt_s
        self._bids[peer] = BidFacts(
            peer=peer,
            price_ucr=bid.price_ucr,
            estimated_s=bid.estimated_s,
            queue_wait_s=bid.queue_wait_s,
            rtt_s=rtt_s,
            confidence_claimed=bid.confidence,
            confidence=confidence,
            reputation=reputation,
            load=bid.load,
            energy_cost=bid.energy_cost,
            score=score(bid.price_ucr, latency_s, reputation, confidence, self.weights),
            at_ms=now_ms,
            refusal=refusal,
        )
        if not refusal and self._first_good_ms is None:
            self._first_good_ms = now_ms
        self._settled(peer, now_ms)
        return refusal

    def add_decline(self, peer: str, number: int, reason: str, now_ms: int) -> bool:
        """Takes a decline; False when the peer was not asked in this round or has already answered."""
        if peer not in self._candidates or number != self.round or peer in self._bids or peer in self._declines:
            return False
        self._declines[peer] = reason_of(reason).value
        self._settled(peer, now_ms)
        return True

    def peer_gone(self, peer: str, now_ms: int) -> None:
        """The link to `peer` is gone: it is waited for no longer, and a bid of its cannot win until it is back."""
        if peer in self._candidates:
            self._gone[peer] = None
            self._settled(peer, now_ms)
            self._note_first_good()

    def peer_back(self, peer: str) -> None:
        """The link to `peer` is up again: a bid it made stands."""
        self._gone.pop(peer, None)
        self._note_first_good()

    def _note_first_good(self) -> None:
        good_ms = [bid.at_ms for bid in self._bids.values() if not bid.refusal and bid.peer not in self._gone]
        self._first_good_ms = min(good_ms, default=None)

    def _settled(self, peer: str, now_ms: int) -> None:
        if peer in self._open:
            del self._open[peer]
            self._awaited -= not self._candidates[peer].missed_last
            self._answered_ms = max(self._answered_ms, now_ms)

    def weigh_again(self, given: Callable[[str], Given]) -> None:
        """Takes into account what bidders were awarded since they were asked, of which their bids tell nothing.

        It comes on top of the latency that was told, and by as much as that no longer holds, so does the confidence in
        it. Otherwise all tasks that are put up at the same moment would go to one bidder.
        """
        for peer, bid in self._bids.items():
            asked = self._candidates[peer]
            own_ahead_s = asked.given.wait_behind_s(given(peer), slots=asked.slots, load=bid.load)
            if own_ahead_s != bid.own_ahead_s:
                told_s = bid.queue_wait_s + bid.estimated_s + bid.rtt_s
                now_s = told_s + own_ahead_s
                confidence = bid.confidence * max(told_s, 1.0) / max(now_s, 1.0)
                judged = score(bid.price_ucr, now_s, bid.reputation, confidence, self.weights)
                self._bids[peer] = msgspec.structs.replace(bid, own_ahead_s=own_ahead_s, score=judged)

    # --- when it closes

    def _close(self) -> tuple[int, str]:
        if self.gossiped:
            until_ms = self._gossip_until_ms
            if self._first_good_ms is None or self._first_good_ms + self._soft_ms >= until_ms:
                return until_ms, "gossip_over"
            return self._first_good_ms + self._soft_ms, "soft_close"
        if not self._candidates:
            return self.opened_ms, "nobody"
        if not self._open:
            return min(self._answered_ms, self.close_ms), "all_answered"
        soft_ms = None if self._first_good_ms is None else self._first_good_ms + self._soft_ms
        if not self._awaited:
            if soft_ms is not None:
                return min(self._answered_ms, self.close_ms), "all_answered"
            return min(max(self._answered_ms, self.opened_ms + self._soft_ms), self.close_ms), "soft_close"
        if soft_ms is not None and soft_ms < self.close_ms:
            return soft_ms, "soft_close"
        return self.close_ms, "bid_timeout"

    def closes_at(self, now_ms: int) -> int:
        """When it closes if nothing more comes in; `now_ms` itself once it is closed."""
        return max(self._close()[0], now_ms)

    def is_closed(self, now_ms: int) -> bool:
        """Whether the auction is over; also when the clock was set back behind its beginning."""
        return self._close()[0] <= now_ms or now_ms < self.opened_ms - SET_BACK_MS

    # --- who wins

    @property
    def asked(self) -> list[str]:
        """All candidates, in the order asked."""
        return list(self._candidates)

    @property
    def silent(self) -> list[str]:
        """Those that have not answered (and whose link stands): they missed this offer."""
        return list(self._open)

    @property
    def bids(self) -> list[BidFacts]:
        """All bids, in the order they came."""
        return list(self._bids.values())

    def refusals(self) -> dict[str, int]:
        """Why there was no acceptable bid: declines and refused bids, counted by reason."""
        refused = [bid.refusal for bid in self._bids.values() if bid.refusal]
        return count_reasons([*self._declines.values(), *refused])

    def ranking(self, last_award: Callable[[str], int] | None = None) -> list[tuple[BidFacts, Score]]:
        """Acceptable bids of connected peers, best first.

        Equal scores (within 1e-9) go to the lower price; equal prices then to the peer this requester awarded least
        recently (`last_award`, see AwardOrder), then to the earlier bid. Without the third rule one of several equal
        workers gets nearly all tasks.
        """
        recency: Callable[[str], int] = last_award or (lambda peer: 0)

        def key(bid: BidFacts) -> tuple[int, int, int]:
            return (-round(bid.score.total / EQUAL_WITHIN), bid.price_ucr, recency(bid.peer))

        good = [bid for bid in self._bids.values() if not bid.refusal and bid.peer not in self._gone]
        return [(bid, bid.score) for bid in sorted(good, key=key)]

    def record(
        self, now_ms: int, *, last_award: Callable[[str], int] | None = None, winner: str = "", closed_by: str = ""
    ) -> AuctionRecord:
        """What to keep. `winner` is whom the caller awarded (by default the best); `closed_by` overrides the reason."""
        ranked = [bid for bid, _ in self.ranking(last_award)]
        if not winner and ranked and not closed_by:
            winner = ranked[0].peer
        at_ms, word = self._close()
        good = {bid.peer for bid in ranked}
        return AuctionRecord(
            round=self.round,
            ring=self.ring,
            opened_ms=self.opened_ms,
            closed_ms=min(at_ms, now_ms),
            closed_by=closed_by or word,
            max_budget_ucr=self.max_budget_ucr,
            min_reputation=self.min_reputation,
            weights=(self.weights.price, self.weights.reputation, self.weights.latency, self.weights.confidence),
            asked=self.asked,
            bids=[*ranked, *(bid for bid in self._bids.values() if bid.peer not in good)],
            declines=list(self._declines.items()),
            silent=self.silent,
            gone=[peer for peer in self._gone if peer not in self._declines],
            winner=winner,
            why=_why(ranked, winner, self.refusals()),
        )


def _why(ranked: list[BidFacts], winner: str, refusals: dict[str, int]) -> str:
    """One sentence: why the winner won, or why nobody did."""
    if not winner:
        reasons = ", ".join(f"{count} {word}" for word, count in refusals.items())
        return f"no acceptable bid ({reasons})" if reasons else "no acceptable bid"
    place = next((n for n, bid in enumerate(ranked) if bid.peer == winner), None)
    if place is None:
        return "chosen outside the ranking"
    if place:
        return f"next best bid (rank {place + 1} of {len(ranked)})"
    if len(ranked) == 1:
        return "the only acceptable bid"
    first, second = ranked[0], ranked[1]
    if round(first.score.total / EQUAL_WITHIN) != round(second.score.total / EQUAL_WITHIN):
        return f"highest score: {first.score.total:.4f} against {second.score.total:.4f}"
    if first.price_ucr != second.price_ucr:
        return "equal score, lower price"
    return "equal score and price: the one awarded less recently, or the earlier bid"


_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(AuctionRecord)


def encode_record(record: AuctionRecord) -> bytes:
    """The stored form of a record."""
    return _encoder.encode(record)


def decode_record(body: bytes) -> AuctionRecord:
    """Inverse of encode_record; raises msgspec.DecodeError for a body of another shape."""
    return _decoder.decode(body)


def explain(record: AuctionRecord) -> dict[str, Any]:
    """The record as JSON-able facts: one entry a peer (its answer, and its bid in four terms), reasons counted."""
    by_peer = {bid.peer: bid for bid in record.bids}
    declines = dict(record.declines)
    peers: list[dict[str, Any]] = []
    for peer in [*(bid.peer for bid in record.bids), *(p for p in record.asked if p not in by_peer)]:
        bid = by_peer.get(peer)
        if bid is not None:
            answer, reason = "bid", bid.refusal
        elif peer in declines:
            answer, reason = "declined", declines[peer]
        else:
            answer, reason = "silent", "gone" if peer in record.gone else ""
        facts = None if bid is None else _bid_facts(record, bid)
        peers.append({"peer": peer, "answer": answer, "reason": reason, "bid": facts})
    refused = [bid.refusal for bid in record.bids if bid.refusal]
    return {
        "round": record.round,
        "ring": record.ring,
        "opened_ms": record.opened_ms,
        "closed_ms": record.closed_ms,
        "closed_by": record.closed_by,
        "max_budget": format_credits(record.max_budget_ucr),
        "min_reputation": record.min_reputation,
        "weights": dict(zip(("price", "reputation", "latency", "confidence"), record.weights, strict=True)),
        "asked": len(record.asked),
        "declined": count_reasons([*declines.values(), *refused]),
        "peers": peers,
        "winner": record.winner or None,
        "reason": record.why,
    }


def _bid_facts(record: AuctionRecord, bid: BidFacts) -> dict[str, Any]:
    return {
        "round": record.round,
        "price": format_credits(bid.price_ucr),
        "price_ucr": bid.price_ucr,
        "estimated_s": bid.estimated_s,
        "queue_wait_s": bid.queue_wait_s,
        "own_ahead_s": bid.own_ahead_s,
        "rtt_s": bid.rtt_s,
        "confidence": bid.confidence,
        "confidence_claimed": bid.confidence_claimed,
        "reputation": bid.reputation,
        "load": bid.load,
        "energy_cost": bid.energy_cost,
        "score": bid.score.total,
        "terms": {
            "price": bid.score.price,
            "reputation": bid.score.reputation,
            "latency": bid.score.latency,
            "confidence": bid.score.confidence,
        },
        "at_ms": bid.at_ms,
        "won": bid.peer == record.winner,
    }
