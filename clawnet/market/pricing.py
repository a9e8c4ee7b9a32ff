"""What a worker asks for a task, and when it declines. Pure.

    price = (task rate + cpu rate x expected cpu seconds + energy cost x expected seconds) x load factor,
            rounded up to the bid step

A prompt's expected cpu seconds are nothing; its tokens take their place, counted as if the model wrote as much as it
may. That price is a cap: what is asked in the end is the part of it that the tokens used are of those counted.

The load factor is 0.9 + 0.6 x c / (c + slots), with c the slots committed (running and waiting): 0.9 when idle, 1.2
when every slot is taken, below 1.5 whatever waits. Money is integer arithmetic throughout.

Expected times are learned (Durations): an exponentially weighted mean and variance per kind of task, operation and
size class. A bidder knows no more than the offer says, so neither does the key. The estimate that a bid promises is
the mean plus one standard deviation; the confidence is 0.5 with nothing learned and moves, with the number of runs
seen, towards 1 / (1 + relative spread).
"""

from __future__ import annotations

import math
from typing import Final

import msgspec
from msgspec import Struct

from clawnet import limits
from clawnet.config import Config
from clawnet.market.capability import AI, CAPABILITY_OF_KIND, unmet
from clawnet.market.reasons import Reason
from clawnet.market.taskspec import WASM
from clawnet.money import UCR_PER_CREDIT, round_up
from clawnet.wire.messages import Offer, PeerCard, Requirements

LOAD_IDLE_PERMILLE: Final = 900
LOAD_SPAN_PERMILLE: Final = 600
LEARNING_RATE: Final = 0.2
CONFIDENCE_UNKNOWN: Final = 0.5
CONFIDENCE_SAMPLES: Final = 4.0
JITTER_S: Final = 0.25
"""Spread is judged against at least this much: a run of 2 ms that took 6 is not an uncertain one."""
RUN_S_MAX: Final = float(limits.RUN_WALL_S_MAX)
SAMPLES_TO_REFUSE: Final = 3
"""So many runs must have been seen before a learned duration is a ground to decline a deadline."""
GUESS_S: Final[dict[str, float]] = {"shell-execution": 5.0, "compute": 1.0, "ai-inference": 10.0}
GUESS_OTHER_S: Final = 10.0


class Rates(Struct, frozen=True, gc=False):
    """What this node asks. `energy_ucr` is what a second of work costs in energy: in the price, and told in the bid.

    `tokens_in_ucr` and `tokens_out_ucr` are for a thousand tokens; `answer_tokens_max` is how long an answer may get.
    """

    task_ucr: int = UCR_PER_CREDIT
    cpu_second_ucr: int = UCR_PER_CREDIT // 10
    energy_ucr: int = 0
    step_ucr: int = UCR_PER_CREDIT // 10
    tokens_in_ucr: int = UCR_PER_CREDIT // 10
    tokens_out_ucr: int = 3 * UCR_PER_CREDIT // 10
    answer_tokens_max: int = 4_096


def rates_from(config: Config) -> Rates:
    """The rates of `market.rates.*`, `market.energy_cost` and `market.min_bid_increment`."""
    return Rates(
        task_ucr=config.amount_ucr("market.rates.task"),
        cpu_second_ucr=config.amount_ucr("market.rates.cpu_second"),
        energy_ucr=round(config.number("market.energy_cost") * UCR_PER_CREDIT),
        step_ucr=max(1, config.amount_ucr("market.min_bid_increment")),
        tokens_in_ucr=config.amount_ucr("market.rates.tokens_in"),
        tokens_out_ucr=config.amount_ucr("market.rates.tokens_out"),
        answer_tokens_max=config.integer("openclaw.max_tokens"),
    )


class Learned(Struct, array_like=True):
    """What past runs of one key took: weighted mean and variance of wall seconds, mean of cpu seconds, runs seen."""

    runs: int = 0
    wall_s: float = 0.0
    variance: float = 0.0
    cpu_s: float = 0.0

    def add(self, wall_s: float, cpu_s: float) -> None:
        """One more run; the first few count as a plain average, later ones with LEARNING_RATE."""
        self.runs += 1
        rate = max(LEARNING_RATE, 1 / self.runs)
        step = wall_s - self.wall_s
        self.wall_s += rate * step
        self.variance = (1 - rate) * (self.variance + rate * step * step)
        self.cpu_s += rate * (cpu_s - self.cpu_s)


class Estimate(Struct, frozen=True, gc=False):
    """How long a task is expected to run. `estimated_s` is what a bid promises; `runs` is what it rests on."""

    estimated_s: float
    cpu_s: float
    confidence: float
    runs: int


def size_class(size_bytes: int) -> int:
    """Sizes within a factor of four share a class: 0 for nothing, then 1 up to 3 bytes, 2 up to 15, 3 up to 63 ..."""
    return (size_bytes.bit_length() + 1) // 2


def duration_keys(kind: str, requirements: Requirements, size_bytes: int) -> tuple[str, str]:
    """Where runs of such tasks are learned: the exact key (kind, operation, size class) and the one without size."""
    words = (word for word in requirements.capabilities if word.startswith("op:") or word == WASM)
    operation = next(words, "").removeprefix("op:")
    base = f"{CAPABILITY_OF_KIND.get(kind, kind)}|{operation}|{requirements.model}"
    return f"{base}|{size_class(size_bytes)}", base


def offer_keys(offer: Offer) -> tuple[str, str]:
    """duration_keys of an offer: all that a bidder knows of the task."""
    return duration_keys(offer.kind, offer.requirements, offer.payload_bytes + offer.input_bytes)


class Durations:
    """What runs took, by key. Bounded; the key used longest ago is forgotten first."""

    def __init__(self, keys_max: int = limits.DURATION_KEYS_MAX) -> None:
        self._keys_max = keys_max
        self._learned: dict[str, Learned] = {}

    def __len__(self) -> int:
        return len(self._learned)

    def learn(self, key: str, wall_s: float, cpu_s: float) -> tuple[list[tuple[str, bytes]], list[str]]:
        """Takes a finished run; returns the rows to store (key, body) and the keys whose rows to delete.

        `key` is the exact one of duration_keys; the key without size learns along. Feed runs that ended by
        themselves, not those that were killed: they say nothing of how long the work takes.
        """
        if not (math.isfinite(wall_s) and math.isfinite(cpu_s)) or wall_s < 0 or cpu_s < 0:
            return [], []
        wall_s, cpu_s = min(wall_s, RUN_S_MAX), min(cpu_s, RUN_S_MAX)
        rows: list[tuple[str, bytes]] = []
        for name in (key, key.rpartition("|")[0]):
            learned = self._learned.pop(name, None) or Learned()
            learned.add(wall_s, cpu_s)
            self._learned[name] = learned
            rows.append((name, msgspec.msgpack.encode(learned)))
        dropped: list[str] = []
        while len(self._learned) > self._keys_max:
            oldest = next(iter(self._learned))
            del self._learned[oldest]
            dropped.append(oldest)
        return rows, dropped

    def load(self, key: str, body: bytes) -> None:
        """Takes a stored row; raises msgspec.DecodeError for a body of another shape."""
        self._learned[key] = msgspec.msgpack.decode(body, type=Learned)
        if len(self._learned) > self._keys_max:
            del self._learned[next(iter(self._learned))]

    def estimate(self, keys: tuple[str, str], kind: str) -> Estimate:
        """What to expect: of the exact key, else of its kind and operation at any size (with half the runs' weight)."""
        for key, trust in zip(keys, (1.0, 0.5), strict=True):
            learned = self._learned.get(key)
            if learned is not None and learned.runs:
                return _expect(learned, trust)
        guess_s = GUESS_S.get(CAPABILITY_OF_KIND.get(kind, ""), GUESS_OTHER_S)
        return Estimate(guess_s, guess_s, CONFIDENCE_UNKNOWN, 0)


def _expect(learned: Learned, trust: float) -> Estimate:
    spread_s = math.sqrt(max(learned.variance, 0.0))
    steadiness = 1 / (1 + spread_s / max(learned.wall_s, JITTER_S))
    weight = learned.runs * trust / (learned.runs * trust + CONFIDENCE_SAMPLES)
    confidence = CONFIDENCE_UNKNOWN + (steadiness - CONFIDENCE_UNKNOWN) * weight
    runs = learned.runs if trust == 1.0 else 0
    return Estimate(learned.wall_s + spread_s, learned.cpu_s, min(max(confidence, 0.0), 1.0), runs)


class Workload(Struct, frozen=True, gc=False):
    """What stands before a new task: slots in all, slots committed (running, awarded, waiting), and the expected
    slot-seconds of all the work that goes before it. `opens_s` is when what it needs should be free. Beyond `slots` +
    `queue_max` commitments the node is full, and for this requester where it `has_place` no longer."""

    slots: int
    committed: int = 0
    work_ahead_s: float = 0.0
    queue_max: int = 0
    opens_s: float = 0.0
    has_place: bool = True

    @property
    def is_full(self) -> bool:
        """Whether nothing more is taken on."""
        return self.slots <= 0 or not self.has_place or self.committed >= self.slots + self.queue_max

    @property
    def load(self) -> float:
        """The share of slots taken, for the bid."""
        return min(self.committed / self.slots, 1.0) if self.slots else 1.0

    @property
    def queue_wait_s(self) -> float:
        """How long until it can start: until what it needs is free, and the work ahead, spread over the slots, done."""
        if self.committed < self.slots:
            return self.opens_s
        return max(self.opens_s, self.work_ahead_s / max(self.slots, 1))


class Quote(Struct, frozen=True, gc=False):
    """The terms of a bid; field by field as in wire.messages.Bid. `duration_key` is where the run will be learned."""

    price_ucr: int
    estimated_s: float
    queue_wait_s: float
    confidence: float
    load: float
    energy_cost: float
    duration_key: str


def load_permille(workload: Workload) -> int:
    """The load factor in thousandths, 900 to 1,499: cheaper when idle, dearer when busy."""
    committed = max(workload.committed, 0)
    return LOAD_IDLE_PERMILLE + LOAD_SPAN_PERMILLE * committed // (committed + max(workload.slots, 1))


def price(rates: Rates, cpu_s: float, workload: Workload, *, wall_s: float = 0.0) -> int:
    """Micro-credits for work of `cpu_s` that takes `wall_s` (energy is paid by that), rounded up to the bid step;
    never less than one step unless all rates are 0."""
    cpu_ms, wall_ms = math.ceil(cpu_s * 1000), math.ceil(wall_s * 1000)
    cost_ucr = rates.task_ucr + (rates.cpu_second_ucr * cpu_ms + rates.energy_ucr * wall_ms) // 1000
    return _priced(rates, cost_ucr, workload)


def _priced(rates: Rates, cost_ucr: int, workload: Workload) -> int:
    return round_up(-(-cost_ucr * load_permille(workload) // 1000), rates.step_ucr)


def is_prompt(kind: str) -> bool:
    """Whether tasks of this kind are answered by an AI endpoint, and so metered by tokens."""
    return CAPABILITY_OF_KIND.get(kind) == AI


def _prompt_cost(rates: Rates, tokens_in: int, tokens_out: int) -> int:
    return rates.task_ucr + -(-(rates.tokens_in_ucr * tokens_in + rates.tokens_out_ucr * tokens_out) // 1000)


def _prompt_cap(rates: Rates, size_bytes: int) -> int:
    """The cost of a prompt of so many bytes if the answer is as long as it may be."""
    tokens_in = -(-size_bytes // limits.PROMPT_BYTES_PER_TOKEN)
    return _prompt_cost(rates, tokens_in, rates.answer_tokens_max)


def metered(rates: Rates, price_ucr: int, size_bytes: int, tokens_in: int, tokens_out: int) -> int:
    """What a prompt bid for at `price_ucr` costs in the end: the part of it that its tokens are of those it was bid
    for, at least one micro-credit and never more than the bid."""
    cap_ucr = _prompt_cap(rates, size_bytes)
    used_ucr = _prompt_cost(rates, tokens_in, tokens_out)
    return min(price_ucr, max(1, -(-price_ucr * used_ucr // cap_ucr))) if cap_ucr else price_ucr


def quote(
    offer: Offer,
    *,
    card: PeerCard,
    ring: str,
    workload: Workload,
    durations: Durations,
    rates: Rates,
    now_ms: int,
    input_bytes_max: int = limits.INPUT_BYTES_MAX,
    draining: bool = False,
) -> Quote | Reason:
    """The terms this node (of `card`) offers a requester of `ring`, or why it declines.

    Own machines pay nothing. The deadline is a ground to decline when it has passed, or when enough runs were seen
    to know that the work takes longer.
    """
    if draining:
        return Reason.DRAINING
    lacking = unmet(offer.kind, offer.requirements, card, ring)
    if lacking is not None:
        return lacking
    if offer.input_bytes > input_bytes_max or offer.payload_bytes > limits.TASK_DOCUMENT_BYTES_MAX:
        return Reason.TOO_LARGE
    if workload.is_full:
        return Reason.FULL
    keys = offer_keys(offer)
    expected = durations.estimate(keys, offer.kind)
    left_s = (offer.deadline_ms - now_ms) / 1000
    if left_s <= 0:
        return Reason.DEADLINE
    wait_s = workload.queue_wait_s
    if expected.runs >= SAMPLES_TO_REFUSE and wait_s + expected.estimated_s > left_s:
        return Reason.DEADLINE
    if ring == "own":
        price_ucr = 0
    elif is_prompt(offer.kind):
        energy_ucr = rates.energy_ucr * math.ceil(expected.estimated_s)
        price_ucr = _priced(rates, _prompt_cap(rates, offer.payload_bytes) + energy_ucr, workload)
    else:
        price_ucr = price(rates, expected.cpu_s, workload, wall_s=expected.estimated_s)
    if price_ucr > offer.max_budget_ucr:
        return Reason.PRICE
    return Quote(
        price_ucr=price_ucr,
        estimated_s=expected.estimated_s,
        queue_wait_s=wait_s,
        confidence=expected.confidence,
        load=workload.load,
        energy_cost=rates.energy_ucr * expected.estimated_s / UCR_PER_CREDIT,
        duration_key=keys[0],
    )
