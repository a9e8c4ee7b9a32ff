"""Spend limits: never passed in any order of locks, refunds, midnights and set-back clocks; exact at the limit."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from clawnet.market.spending import (
    DAY_MS,
    DAYS_KEPT,
    OPEN,
    PER_DAY,
    PER_TASK,
    SpendLimits,
    Spent,
    check_lock,
    check_send,
    day_of,
    left_ucr,
)

NOON_MS = 20_000 * DAY_MS + DAY_MS // 2


def test_without_limits_anything_fits() -> None:
    spent = Spent({day_of(NOON_MS): 10**14}, 10**14)
    assert check_lock(NOON_MS, SpendLimits(), spent, 10**14, 10**14) is None
    assert left_ucr(NOON_MS, SpendLimits(), spent, 10**14) is None


def test_a_limit_is_reached_and_not_passed() -> None:
    limits = SpendLimits(per_task_ucr=5, per_day_ucr=20, open_ucr=9)
    spent = Spent({day_of(NOON_MS): 12}, 6)
    assert check_lock(NOON_MS, limits, spent, 2, 3) is None
    for used, asked, limit in ((3, 3, PER_TASK), (0, 4, OPEN)):
        hit = check_lock(NOON_MS, limits, spent, used, asked)
        assert hit is not None and hit.limit == limit and hit.left_ucr < asked
    hit = check_lock(NOON_MS, limits, Spent({day_of(NOON_MS): 18}), 0, 3)
    assert hit is not None and (hit.limit, hit.limit_ucr, hit.used_ucr, hit.asked_ucr) == (PER_DAY, 20, 18, 3)
    assert hit.resets_ms == (day_of(NOON_MS) + 1) * DAY_MS


def test_nothing_means_nothing() -> None:
    for limits in (SpendLimits(per_task_ucr=0), SpendLimits(per_day_ucr=0), SpendLimits(open_ucr=0)):
        assert check_lock(NOON_MS, limits, Spent(), 0, 1) is not None
        assert left_ucr(NOON_MS, limits, Spent(), 0) == 0


def test_a_payment_is_bound_by_the_day_alone() -> None:
    limits = SpendLimits(per_task_ucr=1, per_day_ucr=20, open_ucr=1)
    assert check_send(NOON_MS, limits, Spent(), 20) is None
    assert check_send(NOON_MS, limits, Spent(), 21) is not None


def test_midnight_is_exact() -> None:
    limits, spent = SpendLimits(per_day_ucr=10), Spent()
    midnight_ms = (day_of(NOON_MS) + 1) * DAY_MS
    spent.bind(midnight_ms - 1, 10)
    assert check_send(midnight_ms - 1, limits, spent, 1) is not None
    assert check_send(midnight_ms, limits, spent, 10) is None
    spent.bind(midnight_ms, 10)
    assert check_send(midnight_ms, limits, spent, 1) is not None


def test_a_clock_set_back_brings_no_second_allowance() -> None:
    limits, spent = SpendLimits(per_day_ucr=10), Spent()
    spent.bind(NOON_MS, 8)
    assert check_send(NOON_MS - DAY_MS, limits, spent, 3) is not None
    assert left_ucr(NOON_MS - DAY_MS, limits, spent, 0) == 2


def test_a_refund_counts_for_the_day_of_its_lock() -> None:
    limits, spent = SpendLimits(per_day_ucr=10), Spent()
    spent.bind(NOON_MS, 10)
    spent.bind(NOON_MS + DAY_MS, 10)
    spent.give_back(NOON_MS, 10)
    assert check_send(NOON_MS + DAY_MS, limits, spent, 1) is not None
    spent.give_back(NOON_MS + DAY_MS, 4)
    assert left_ucr(NOON_MS + DAY_MS, limits, spent, 0) == 4


def test_the_days_kept_are_bounded() -> None:
    spent = Spent()
    for day in range(500):
        spent.bind(NOON_MS + day * DAY_MS, 1)
    assert len(spent.days) <= DAYS_KEPT + 1


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("lock"), st.integers(1, 12)),
        st.tuples(st.just("send"), st.integers(1, 12)),
        st.tuples(st.just("pay"), st.integers(0, 50)),
        st.tuples(st.just("refund"), st.integers(0, 50)),
        st.tuples(st.just("clock"), st.integers(-2 * DAY_MS, 2 * DAY_MS)),
    ),
    max_size=60,
)


@given(steps=STEPS, per_day=st.integers(0, 30), at_once=st.integers(0, 30))
def test_no_order_of_events_passes_a_limit(steps: list[tuple[str, int]], per_day: int, at_once: int) -> None:
    limits, spent, now_ms = SpendLimits(per_day_ucr=per_day, open_ucr=at_once), Spent(), NOON_MS
    lines: list[tuple[int, int]] = []
    truth: dict[int, int] = {}

    def bind(amount: int) -> None:
        spent.bind(now_ms, amount)
        truth[day_of(now_ms)] = truth.get(day_of(now_ms), 0) + amount

    for what, number in steps:
        if what == "clock":
            now_ms += number
        elif what == "send" and check_send(now_ms, limits, spent, number) is None:
            bind(number)
        elif what == "lock":
            left = left_ucr(now_ms, limits, spent, 0)
            fits = check_lock(now_ms, limits, spent, 0, number) is None
            assert left is not None and fits == (number <= left)
            if fits:
                bind(number)
                spent.open_ucr += number
                lines.append((now_ms, number))
        elif what in ("pay", "refund") and lines:
            at_ms, amount = lines.pop(number % len(lines))
            spent.open_ucr -= amount
            if what == "refund":
                spent.give_back(at_ms, amount)
                truth[day_of(at_ms)] -= amount
        assert spent.open_ucr == sum(amount for _, amount in lines) <= max(at_once, 0)
        kept: dict[int, Any] = {day: total for day, total in truth.items() if day in spent.days}
        assert kept == spent.days
        assert all(0 <= total <= per_day for total in truth.values())
