"""Token buckets, patience, bans and arrivals, on a clock of numbers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from clawnet import limits
from clawnet.net.ratelimit import Arrivals, Bans, Patience, TokenBucket


@given(st.lists(st.tuples(st.floats(0, 3), st.integers(1, 30)), max_size=50))
def test_a_bucket_never_lets_more_pass_than_depth_and_rate_allow(events: list[tuple[float, int]]) -> None:
    bucket, now_s, passed = TokenBucket(10, 40, 0.0), 0.0, 0
    for wait_s, units in events:
        now_s += wait_s
        if bucket.take(units, now_s):
            passed += units
        assert passed <= 40 + 10 * now_s + 1e-6


def test_a_bucket_fills_again_up_to_its_depth() -> None:
    bucket = TokenBucket(10, 40, 0.0)
    assert bucket.take(40, 0.0)
    assert not bucket.take(1, 0.05)
    assert bucket.take(1, 0.1)
    assert not bucket.take(41, 1_000.0)
    assert bucket.take(40, 1_000.0)
    assert not bucket.take(1, 999.0)


def test_patience_is_told_once_a_spell_and_ends_when_it_goes_on() -> None:
    patience = Patience()
    assert not patience.strained(0.0)
    assert [patience.over(now_s) for now_s in (1.0, 2.0, 3.0)] == [True, False, False]
    assert not patience.strained(3.0)
    assert patience.strained(1.1 + limits.RATE_SPELL_S)
    assert patience.over(20.0)
    assert not patience.strained(20.0)


def test_bans_double_are_forgotten_and_can_be_lifted() -> None:
    bans = Bans()
    assert bans.left_s("eve", 0.0) == 0
    assert bans.ban("eve", 0.0) == limits.BAN_MIN_S
    assert bans.left_s("eve", 10.0) == limits.BAN_MIN_S - 10
    assert bans.left_s("eve", 31.0) == 0
    assert bans.ban("eve", 31.0) == 2 * limits.BAN_MIN_S
    for _ in range(10):
        last_s = bans.ban("eve", 100.0)
    assert last_s == limits.BAN_MAX_S
    assert bans.ban("eve", 100.0 + 2 * limits.BAN_MAX_S + 1) == limits.BAN_MIN_S
    bans.lift("eve")
    assert bans.left_s("eve", 0.0) == 0


def test_the_ban_table_is_bounded() -> None:
    bans = Bans()
    for n in range(limits.BANS_MAX + 5):
        bans.ban(str(n), 0.0)
    assert bans.left_s("0", 1.0) == 0
    assert bans.left_s(str(limits.BANS_MAX + 4), 1.0) > 0


def test_arrivals_are_counted_by_address_in_a_bounded_table() -> None:
    arrivals = Arrivals(per_minute=2)
    assert [arrivals.take("a", 0.0) for _ in range(3)] == [True, True, False]
    assert arrivals.take("b", 0.0)
    assert arrivals.take("a", 31.0)
    for n in range(limits.ARRIVAL_ADDRESSES_MAX):
        arrivals.take(str(n), 40.0)
    assert not arrivals.take("new", 41.0)
    assert arrivals.take("new", 120.0)
