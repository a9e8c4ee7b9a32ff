"""What a worker asks and when it declines: rates, load, learned durations, confidence, deadlines."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clawnet.config import Config
from clawnet.market.pricing import (
    Durations,
    Quote,
    Rates,
    Workload,
    duration_keys,
    load_permille,
    offer_keys,
    price,
    quote,
    rates_from,
    size_class,
)
from clawnet.market.reasons import Reason
from clawnet.wire.messages import Offer, PeerCard, Requirements

CREDIT = 1_000_000
NOW = 1_700_000_000_000
IDLE = Workload(slots=4)
SHA256 = Requirements(capabilities=["compute", "op:sha256"])

CARD = PeerCard(
    peer="worker",
    serial=1,
    name="worker",
    version="1",
    addresses=[],
    capabilities=["compute", "op:sha256", "shell-execution"],
    labels=[],
    os="linux",
    cpu=4,
    memory_bytes=2**33,
    gpu=0,
    models=[],
    slots=4,
    running=0,
    queued=0,
    shell_rings=["own", "member"],
)


def offer(**changes: Any) -> Offer:
    fields: dict[str, Any] = {
        "task_id": bytes(16),
        "round": 1,
        "kind": "compute",
        "task": bytes(32),
        "payload_bytes": 200,
        "input_bytes": 0,
        "max_budget_ucr": 10 * CREDIT,
        "deadline_ms": NOW + 300_000,
        "close_ms": NOW + 30_000,
        "lease_s": 30,
        "requirements": SHA256,
    }
    return Offer(**{**fields, **changes})


def ask(given_offer: Offer | None = None, **changes: Any) -> Quote | Reason:
    terms: dict[str, Any] = {
        "card": CARD,
        "ring": "member",
        "workload": IDLE,
        "durations": Durations(),
        "rates": Rates(),
        "now_ms": NOW,
    }
    return quote(given_offer or offer(), **{**terms, **changes})


def terms_of(given_offer: Offer | None = None, **changes: Any) -> Quote:
    result = ask(given_offer, **changes)
    assert isinstance(result, Quote)
    return result


def learned(times_s: list[float], kind: str = "compute", needs: Requirements = SHA256, size: int = 200) -> Durations:
    durations = Durations()
    for time_s in times_s:
        durations.learn(duration_keys(kind, needs, size)[0], time_s, time_s)
    return durations


# --- price


def test_default_rates_are_those_of_the_configuration() -> None:
    assert rates_from(Config.defaults()) == Rates()
    dear = Config.defaults({"market.rates.task": "2.5", "market.energy_cost": "0.25"})
    assert rates_from(dear) == Rates(task_ucr=2_500_000, energy_ucr=250_000)


@pytest.mark.parametrize(
    ("rates", "cpu_s", "workload", "price_ucr"),
    [
        (Rates(), 0.0, IDLE, 900_000),
        (Rates(), 0.001, IDLE, 1_000_000),
        (Rates(), 10.0, IDLE, 1_800_000),
        (Rates(), 0.0, Workload(slots=4, committed=4), 1_200_000),
        (Rates(), 0.0, Workload(slots=4, committed=12), 1_400_000),
        (Rates(energy_ucr=100_000), 10.0, IDLE, 2_700_000),
        (Rates(task_ucr=0, cpu_second_ucr=0), 100.0, IDLE, 0),
        (Rates(task_ucr=1, cpu_second_ucr=0), 0.0, IDLE, 100_000),
        (Rates(step_ucr=1), 0.5, IDLE, 945_000),
    ],
)
def test_price_is_rates_times_load_rounded_up_to_the_step(
    rates: Rates, cpu_s: float, workload: Workload, price_ucr: int
) -> None:
    assert price(rates, cpu_s, workload, wall_s=cpu_s) == price_ucr


@given(st.integers(1, 64), st.integers(0, 5_000), st.integers(0, 10**9), st.floats(0, 1e5), st.integers(1, CREDIT))
def test_price_is_bounded_steps_of_the_bid_increment(
    slots: int, committed: int, task_ucr: int, cpu_s: float, step_ucr: int
) -> None:
    rates = Rates(task_ucr=task_ucr, step_ucr=step_ucr)
    busy = price(rates, cpu_s, Workload(slots, committed))
    idle = price(rates, cpu_s, Workload(slots))
    base_ucr = task_ucr + 0.1 * CREDIT * (cpu_s + 0.001)
    assert busy % step_ucr == 0
    assert idle <= busy <= 1.5 * base_ucr + step_ucr + 2
    assert price(rates, cpu_s, Workload(slots, committed + 1)) >= busy


@given(st.integers(0, 64), st.integers(0, 10**6))
def test_the_load_factor_rises_from_nine_tenths_and_stays_below_one_and_a_half(slots: int, committed: int) -> None:
    factor = load_permille(Workload(slots, committed))
    assert 900 <= factor < 1_500
    assert factor <= load_permille(Workload(slots, committed + 1))


def test_own_machines_pay_nothing_but_learn_the_energy_cost() -> None:
    terms = terms_of(offer(max_budget_ucr=0), ring="own", rates=Rates(energy_ucr=500_000))
    assert terms.price_ucr == 0
    assert terms.energy_cost == pytest.approx(0.5)


def test_a_longer_run_costs_more() -> None:
    short = terms_of(durations=learned([0.5] * 5))
    long = terms_of(durations=learned([50.0] * 5))
    assert (short.price_ucr, long.price_ucr) == (1_000_000, 5_400_000)
    assert (short.estimated_s, long.estimated_s) == (0.5, 50.0)


# --- what waits


def test_load_and_queue_wait_follow_the_slots() -> None:
    assert terms_of(workload=Workload(4, 3, 90.0)).queue_wait_s == 0
    assert terms_of(workload=Workload(4, 3, 90.0)).load == 0.75
    full = terms_of(workload=Workload(4, 4, 90.0, queue_max=2))
    assert (full.queue_wait_s, full.load) == (22.5, 1.0)
    assert ask(workload=Workload(4, 6, 90.0, queue_max=2)) == Reason.FULL
    assert ask(workload=Workload(4, 4)) == Reason.FULL
    assert ask(workload=Workload(0)) == Reason.FULL


# --- declines


@pytest.mark.parametrize(
    ("changes", "context", "reason"),
    [
        ({}, {"draining": True}, Reason.DRAINING),
        ({"kind": "openclaw_prompt"}, {}, Reason.NO_CAPABILITY),
        ({"requirements": Requirements(capabilities=["op:primes"])}, {}, Reason.NO_CAPABILITY),
        ({"requirements": Requirements(gpu=1)}, {}, Reason.NO_GPU),
        ({"requirements": Requirements(os="windows")}, {}, Reason.OS),
        ({"kind": "shell_task", "requirements": Requirements()}, {"ring": "stranger"}, Reason.POLICY),
        ({"input_bytes": 2**34 + 1}, {}, Reason.TOO_LARGE),
        ({"input_bytes": 11}, {"input_bytes_max": 10}, Reason.TOO_LARGE),
        ({"payload_bytes": 2**18 + 1}, {}, Reason.TOO_LARGE),
        ({"deadline_ms": NOW}, {}, Reason.DEADLINE),
        ({"max_budget_ucr": 999_999}, {}, Reason.PRICE),
    ],
)
def test_every_ground_to_decline_is_named(changes: dict[str, Any], context: dict[str, Any], reason: Reason) -> None:
    assert isinstance(ask(), Quote)
    assert ask(offer(**changes), **context) == reason


def test_a_deadline_is_refused_on_knowledge_not_on_a_guess() -> None:
    soon = offer(deadline_ms=NOW + 400)
    assert isinstance(ask(soon), Quote)
    assert isinstance(ask(soon, durations=learned([5.0] * 2)), Quote)
    assert ask(soon, durations=learned([5.0] * 3)) == Reason.DEADLINE
    waiting = Workload(4, 4, work_ahead_s=40.0, queue_max=4)
    assert ask(offer(deadline_ms=NOW + 14_000), durations=learned([5.0] * 3), workload=waiting) == Reason.DEADLINE
    assert isinstance(ask(offer(deadline_ms=NOW + 16_000), durations=learned([5.0] * 3), workload=waiting), Quote)


# --- learning


def test_size_classes_are_factors_of_four() -> None:
    assert [size_class(size) for size in (0, 1, 3, 4, 15, 16, 63, 64)] == [0, 1, 1, 2, 2, 3, 3, 4]
    assert size_class(2**26) == 14


def test_keys_hold_what_an_offer_says_and_kinds_under_both_names_agree() -> None:
    exact, base = offer_keys(
        offer(kind="shell_task", requirements=Requirements(capabilities=["shell"]), input_bytes=800)
    )
    assert (exact, base) == ("shell-execution|||5", "shell-execution||")
    assert duration_keys("shell", Requirements(), 1_000) == (exact, base)
    assert offer_keys(offer()) == ("compute|sha256||4", "compute|sha256|")


def test_nothing_learned_means_a_guess_at_half_confidence() -> None:
    terms = terms_of()
    assert (terms.estimated_s, terms.confidence) == (1.0, 0.5)
    assert terms_of(offer(kind="shell", requirements=Requirements())).estimated_s == 5.0


def test_steady_runs_earn_confidence_and_erratic_ones_lose_it() -> None:
    few, many = terms_of(durations=learned([2.0] * 3)), terms_of(durations=learned([2.0] * 50))
    erratic = terms_of(durations=learned([0.5, 8.0] * 25))
    assert 0.5 < few.confidence < many.confidence < 1
    assert erratic.confidence < few.confidence
    assert erratic.estimated_s > 4


def test_jitter_of_milliseconds_is_no_uncertainty() -> None:
    assert terms_of(durations=learned([0.002, 0.006] * 20)).confidence > 0.9


def test_another_size_borrows_from_the_kind_with_less_confidence() -> None:
    durations = learned([3.0] * 10, size=200)
    same, other = terms_of(durations=durations), terms_of(offer(input_bytes=2**20), durations=durations)
    assert other.estimated_s == pytest.approx(same.estimated_s)
    assert 0.5 < other.confidence < same.confidence
    assert isinstance(ask(offer(input_bytes=2**20, deadline_ms=NOW + 10), durations=durations), Quote)


def test_estimates_follow_a_change_of_pace() -> None:
    durations = learned([1.0] * 50 + [9.0] * 20)
    assert terms_of(durations=durations).estimated_s == pytest.approx(9.0, abs=1.0)


def test_learned_times_survive_storage() -> None:
    durations, again = Durations(), Durations()
    for time_s in (1.0, 2.0, 3.0):
        rows, dropped = durations.learn(offer_keys(offer())[0], time_s, time_s / 2)
        assert [key for key, _ in rows] == list(offer_keys(offer()))
        assert dropped == []
    for key, body in rows:
        again.load(key, body)
    assert terms_of(durations=again) == terms_of(durations=durations)
    with pytest.raises(msgspec.DecodeError):
        again.load("compute|sha256||4", b"\xa3abc")


def test_learning_is_bounded_and_forgets_what_was_used_longest_ago() -> None:
    durations = Durations(keys_max=4)
    dropped: list[str] = []
    for size in (1, 10, 100, 1_000):
        dropped += durations.learn(duration_keys("compute", SHA256, size)[0], 1.0, 1.0)[1]
    assert len(durations) == 4
    assert dropped == [duration_keys("compute", SHA256, 1)[0]]


@given(st.lists(st.tuples(st.floats(), st.floats()), max_size=30))
def test_no_measurement_whatever_spoils_an_estimate(runs: list[tuple[float, float]]) -> None:
    durations = Durations()
    for wall_s, cpu_s in runs:
        durations.learn(offer_keys(offer())[0], wall_s, cpu_s)
    expected = durations.estimate(offer_keys(offer()), "compute")
    assert 0 <= expected.confidence <= 1
    assert 0 <= expected.estimated_s <= 4 * 86_400
    assert 0 <= expected.cpu_s < float("inf")
    assert isinstance(price(Rates(), expected.cpu_s, IDLE, wall_s=expected.estimated_s), int)
