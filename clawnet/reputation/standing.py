"""Subjective reputation: five decayed factors a peer, in two roles, and how far its confidence can be believed. Pure.

    score = 0.30 completion + 0.20 on_time + 0.20 accuracy + 0.20 (1 - dispute ratio) + 0.10 swarm

A factor is (PRIOR_WEIGHT x 0.5 + good) / (PRIOR_WEIGHT + seen). Both sums fade by the decay rate a day, so an idle
peer drifts back to 0.5, and `seen` is held at EVIDENCE_MAX, so that the last hundred tasks decide and a long good name
cannot be spent for long. Hence a score has a floor (SCORE_FLOOR: even a hundred failures leave what a newcomer would
get for its prior) and can recover. A proven fraud makes the score 0 for good. The swarm factor stays at its prior
until swarms exist.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

import msgspec
from msgspec import Struct, field

from clawnet import limits
from clawnet.reputation.receipts import EFFECTS, Effect, Outcome, Receipt, Role

PRIOR: Final = 0.5
PRIOR_WEIGHT: Final = 4.0
EVIDENCE_MAX: Final = 100.0
DAY_MS: Final = 86_400_000
WEIGHTS: Final = {"completion": 0.30, "on_time": 0.20, "accuracy": 0.20, "undisputed": 0.20, "swarm": 0.10}
SCORE_FLOOR: Final = 0.9 * PRIOR_WEIGHT * PRIOR / (PRIOR_WEIGHT + EVIDENCE_MAX) + 0.1 * PRIOR
"""What is left when every factor has EVIDENCE_MAX bad observations and no good one, fraud apart."""
CONFIDENCE_PRIOR_CLAIMED: Final = 2.0
CONFIDENCE_PRIOR_HELD: Final = 1.0


class Average(Struct, array_like=True):
    """A decayed average: weight of good observations, and of all."""

    good: float = 0.0
    seen: float = 0.0

    def add(self, value: int, weight: float) -> None:
        """One observation (1 good, 0 bad); above EVIDENCE_MAX the older ones shrink to make room."""
        self.good += value * weight
        self.seen += weight
        if self.seen > EVIDENCE_MAX:
            self.good *= EVIDENCE_MAX / self.seen
            self.seen = EVIDENCE_MAX

    def fade(self, share: float) -> None:
        """Keeps `share` of the evidence."""
        self.good *= share
        self.seen *= share

    def value(self, share: float = 1.0) -> float:
        """The average with its prior, as it stands when `share` of the evidence is left."""
        return (PRIOR_WEIGHT * PRIOR + self.good * share) / (PRIOR_WEIGHT + self.seen * share)


class Side(Struct, array_like=True):
    """What was seen of a peer in one role."""

    completion: Average = field(default_factory=Average)
    on_time: Average = field(default_factory=Average)
    accuracy: Average = field(default_factory=Average)
    dispute: Average = field(default_factory=Average)

    @property
    def averages(self) -> tuple[Average, Average, Average, Average]:
        """All four, for fading."""
        return self.completion, self.on_time, self.accuracy, self.dispute


class Record(Struct, array_like=True):
    """All that is kept of a peer. Evidence stands as of `as_of_ms`; `counts` (by outcome) never fade: for people.

    `claimed` and `held` sum the confidence of past bids and how often it held; `held` is never above `claimed`, so
    that modest bids save up no credit for a bold one.
    """

    version: int = 1
    as_of_ms: int = 0
    executor: Side = field(default_factory=Side)
    requester: Side = field(default_factory=Side)
    claimed: float = 0.0
    held: float = 0.0
    frauds: int = 0
    counts: dict[str, int] = field(default_factory=dict)


class Score(Struct, frozen=True, gc=False):
    """A peer's score now, with its factors (each 0..1), the evidence it rests on (a decayed number of tasks), and
    `confidence_discount`, the factor its own confidence is multiplied with."""

    total: float
    completion: float
    on_time: float
    accuracy: float
    dispute_ratio: float
    swarm: float
    evidence: float
    confidence_discount: float
    frauds: int


class Reputation:
    """The node's own view of every peer it worked with. Bounded; records go by age, those with a fraud proof last."""

    def __init__(self, decay_per_day: float, peers_max: int = limits.REPUTATION_PEERS_MAX) -> None:
        self.fade(decay_per_day)
        self._peers_max = peers_max
        self._records: dict[str, Record] = {}

    def fade(self, decay_per_day: float) -> None:
        """From now on this part of old evidence fades in a day."""
        self._keep_per_day_log = math.log1p(-min(max(decay_per_day, 0.0), 0.999999))

    def __len__(self) -> int:
        return len(self._records)

    def peers(self) -> Iterator[str]:
        """All peers with a record, the one observed longest ago first."""
        return iter(tuple(self._records))

    def observe(self, receipt: Receipt, now_ms: int) -> list[str]:
        """Takes a receipt; returns peers whose records were dropped to make room (usually none).

        A receipt from the past counts with what is left of it; one stamped later than now counts as of now.
        """
        record = self._records.pop(receipt.peer, None) or Record(as_of_ms=now_ms)
        self._records[receipt.peer] = record
        if now_ms > record.as_of_ms:
            share = self._share(now_ms - record.as_of_ms)
            for average in (*record.executor.averages, *record.requester.averages):
                average.fade(share)
            record.claimed *= share
            record.held *= share
            record.as_of_ms = now_ms
        weight = self._share(max(0, record.as_of_ms - receipt.at_ms))
        record.counts[receipt.outcome.value] = record.counts.get(receipt.outcome.value, 0) + 1
        effect = EFFECTS[receipt.outcome]
        if receipt.outcome is Outcome.FRAUD:
            record.frauds += 1
        _count(record.executor if effect.role is Role.EXECUTOR else record.requester, effect, receipt, weight)
        if effect.tests_confidence and receipt.confidence > 0:
            self._count_confidence(record, effect, receipt, weight)
        return self._make_room()

    @staticmethod
    def _count_confidence(record: Record, effect: Effect, receipt: Receipt, weight: float) -> None:
        held = effect.completion == 1 and effect.on_time == 1 and receipt.within_promise
        record.claimed += min(receipt.confidence, 1.0) * weight
        record.held = min(record.held + (weight if held else 0.0), record.claimed)
        if record.claimed > EVIDENCE_MAX:
            record.held *= EVIDENCE_MAX / record.claimed
            record.claimed = EVIDENCE_MAX

    def score(self, peer: str, now_ms: int, role: Role = Role.EXECUTOR) -> Score:
        """The peer's score in a role; 0.5 in every factor for one never seen, total 0 for one with a fraud proof."""
        record = self._records.get(peer)
        if record is None:
            return UNKNOWN
        share = self._share(max(0, now_ms - record.as_of_ms))
        side = record.executor if role is Role.EXECUTOR else record.requester
        completion, on_time, accuracy = (average.value(share) for average in side.averages[:3])
        dispute_ratio = side.dispute.value(share)
        total = (
            WEIGHTS["completion"] * completion
            + WEIGHTS["on_time"] * on_time
            + WEIGHTS["accuracy"] * accuracy
            + WEIGHTS["undisputed"] * (1 - dispute_ratio)
            + WEIGHTS["swarm"] * PRIOR
        )
        return Score(
            total=0.0 if record.frauds else total,
            completion=completion,
            on_time=on_time,
            accuracy=accuracy,
            dispute_ratio=dispute_ratio,
            swarm=PRIOR,
            evidence=side.completion.seen * share,
            confidence_discount=_discount(record, share),
            frauds=record.frauds,
        )

    def confidence(self, peer: str, claimed: float, now_ms: int = 0) -> float:
        """The confidence of a bid, discounted by how often the peer's past confidence held.

        The discount is (1 + held) / (2 + claimed): half the word of a newcomer counts; one whose runs end as promised
        as often as it said comes close to its full word; one that says 1 and holds every other time stays at half.
        Without `now_ms` the evidence counts as of the last receipt.
        """
        record = self._records.get(peer)
        if record is None:
            return min(max(claimed, 0.0), 1.0) * UNKNOWN.confidence_discount
        share = self._share(max(0, now_ms - record.as_of_ms))
        return min(max(claimed, 0.0), 1.0) * _discount(record, share)

    def notes(self, peer: str) -> list[str]:
        """What people should know of a peer: each outcome seen, with its number, and frauds first."""
        record = self._records.get(peer)
        if record is None:
            return []
        lines = [f"{record.frauds} fraud proof{'s' if record.frauds > 1 else ''}: score 0"] if record.frauds else []
        counts = sorted(record.counts.items(), key=lambda item: (-item[1], item[0]))
        return [*lines, *(f"{count} {word}" for word, count in counts if word != Outcome.FRAUD.value)]

    def to_bytes(self, peer: str) -> bytes:
        """The row body of a peer's record; raises KeyError for one without."""
        return msgspec.msgpack.encode(self._records[peer])

    def from_bytes(self, peer: str, body: bytes) -> None:
        """Takes a stored record; raises msgspec.DecodeError for a body of another shape."""
        self._records[peer] = msgspec.msgpack.decode(body, type=Record)

    def _share(self, elapsed_ms: int) -> float:
        """What is left of evidence after this time."""
        return math.exp(self._keep_per_day_log * elapsed_ms / DAY_MS)

    def _make_room(self) -> list[str]:
        dropped: list[str] = []
        while len(self._records) > self._peers_max:
            clean = (peer for peer, record in self._records.items() if not record.frauds)
            oldest = next(clean, next(iter(self._records)))
            del self._records[oldest]
            dropped.append(oldest)
        return dropped


def _count(side: Side, effect: Effect, receipt: Receipt, weight: float) -> None:
    on_time = effect.on_time
    if on_time == 1 and effect.tests_confidence and receipt.promised_s > 0 and not receipt.within_promise:
        on_time = 0
    for average, value in (
        (side.completion, effect.completion),
        (side.on_time, on_time),
        (side.accuracy, effect.accuracy),
        (side.dispute, effect.disputed),
    ):
        if value is not None:
            average.add(value, weight)


def _discount(record: Record, share: float) -> float:
    return (CONFIDENCE_PRIOR_HELD + record.held * share) / (CONFIDENCE_PRIOR_CLAIMED + record.claimed * share)


UNKNOWN: Final = Score(
    PRIOR, PRIOR, PRIOR, PRIOR, PRIOR, PRIOR, 0.0, CONFIDENCE_PRIOR_HELD / CONFIDENCE_PRIOR_CLAIMED, 0
)
