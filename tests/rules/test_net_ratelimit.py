"""Token buckets, patience, bans and arrivals, on a clock of numbers."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clawnet import limits
from clawnet.net.ratelimit import Arrivals, Bans, Patience, TokenBucket, place_of
from clawnet.net.rates import CLASS_OF, Rates, Verdict
from clawnet.wire.messages import Kind


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


def test_patience_is_told_once_a_spell_and_counts_how_long_it_goes_on() -> None:
    patience = Patience()
    assert patience.lasted_s(1.0) == 0
    assert [patience.over(now_s) for now_s in (1.0, 2.0, 3.0)] == [True, False, False]
    assert patience.lasted_s(3.0) == 2.0
    assert patience.over(20.0)
    assert patience.lasted_s(20.0) == 0


def test_what_may_be_owed_passes_and_says_when_it_would_have_been_due() -> None:
    bucket = TokenBucket(10, 40, 0.0)
    assert bucket.owe(40, 0.0) == 0
    assert bucket.owe(5, 0.0) == 0.5
    assert bucket.owe(5, 1.0) == 0
    assert bucket.left(0.5) == 0 and bucket.left(1.5) == 5 and bucket.left(1_000.0) == 40


@pytest.mark.parametrize(
    ("host", "place"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8::1", "2001:db8::/64"),
        ("2001:db8::ffff:1", "2001:db8::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("no:address", "no:address"),
    ],
)
def test_an_address_counts_as_one_host_or_one_network(host: str, place: str) -> None:
    assert place_of(host) == place


# --- classes of messages


def test_every_kind_has_a_class() -> None:
    assert set(CLASS_OF) == set(Kind)


@pytest.mark.parametrize("kind", Kind, ids=lambda kind: kind.name)
def test_a_flood_of_any_kind_is_dropped_then_held_back_then_banned(kind: Kind) -> None:
    """As fast as the link allows, for as long as it does: what passes is bounded, and the end is a ban."""
    rates, now_s, passed, pauses = Rates(0.0), 0.0, 0, []
    seen: list[Verdict] = []
    while Verdict.BAN not in seen:
        verdict = rates.take(kind, 100, now_s)
        passed += verdict is Verdict.PASS
        if verdict is not Verdict.PASS and (not seen or seen[-1] is not verdict):
            seen.append(verdict)
        if rates.pause_s:
            pauses.append(rates.pause_s)
            now_s += rates.pause_s
            rates.pause_s = 0.0
        else:
            now_s += 0.000_05
    assert seen[:2] == [Verdict.TELL, Verdict.DROP]
    assert pauses[0] == limits.RATE_PAUSE_MIN_S and pauses[-1] == limits.RATE_PAUSE_MAX_S
    assert all(later >= earlier for earlier, later in pairwise(pauses))
    assert limits.RATE_SPELL_S < now_s < limits.RATE_BURST_S + 3 * limits.RATE_SPELL_S
    per_s = {
        "session": limits.RATE_SESSION_PER_S,
        "answers": limits.RATE_ANSWERS_PER_S,
        "market": limits.RATE_MARKET_PER_S,
        "ledger": limits.RATE_LEDGER_PER_S,
        "relay": limits.RATE_RELAY_PER_S,
        "output": limits.RATE_OUTPUT_PER_S,
    }[CLASS_OF[kind]]
    assert passed <= per_s * (limits.RATE_BURST_S + now_s) + 1


def test_one_class_over_its_rate_takes_nothing_from_another() -> None:
    rates = Rates(0.0)
    while rates.take(Kind.PING, 10, 0.0) is Verdict.PASS:
        pass
    assert rates.take(Kind.MARKET_BID, 10, 0.0) is Verdict.PASS
    assert rates.take(Kind.LEDGER_PUSH, 10, 0.0) is Verdict.PASS


def test_a_kind_nobody_knows_counts_among_the_fewest() -> None:
    rates = Rates(0.0)
    most = limits.RATE_SESSION_PER_S * limits.RATE_BURST_S
    assert all(rates.take(250, 10, 0.0) is Verdict.PASS for _ in range(most))
    assert rates.take(250, 10, 0.0) is Verdict.TELL


def test_bytes_beyond_their_rate_are_late_and_not_lost() -> None:
    rates, now_s = Rates(0.0), 0.0
    size, total = limits.ENVELOPE_BYTES_MAX, 0
    while now_s < 60:
        assert rates.take(Kind.TASK_RESULT, size, now_s) is Verdict.PASS
        total += size
        now_s += 0.001 + rates.pause_s
        rates.pause_s = 0.0
    assert total <= limits.RATE_BYTES_PER_S * (limits.RATE_BURST_S + now_s) + size


def test_seven_hundred_tasks_a_second_trip_nothing() -> None:
    """One requester's whole load on one executor, ungathered: far more messages a task than were ever counted."""
    rates, now_s = Rates(0.0), 0.0
    of_a_task = (
        *(Kind.MARKET_TASK_ANNOUNCE, Kind.MARKET_WINNER, Kind.MARKET_ESCROW_LOCK, Kind.MARKET_SETTLEMENT),
        *(Kind.TASK_ACCEPT, Kind.TASK_RESULT),
        *(Kind.ACK, Kind.ACK, Kind.ACK, Kind.LEDGER_PUSH, Kind.LEDGER_PULL),
        *(Kind.TASK_OUTPUT, Kind.TASK_OUTPUT),
    )
    for _ in range(700 * 60):
        for kind in of_a_task:
            assert rates.take(kind, 2_000, now_s) is Verdict.PASS
        assert not rates.pause_s
        now_s += 1 / 700


def test_a_burst_now_and_then_is_no_flood() -> None:
    rates, now_s = Rates(0.0), 0.0
    for _ in range(20):
        for _ in range(limits.RATE_BURST_S * limits.RATE_RELAY_PER_S + 5):
            assert rates.take(Kind.MEMBERSHIP, 100, now_s) is not Verdict.BAN
        assert not rates.pause_s
        now_s += 1.5 * limits.RATE_SPELL_S


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
    assert arrivals.spent("a", 1.0) and not arrivals.spent("a", 31.0) and not arrivals.spent("c", 0.0)
    assert arrivals.take("a", 31.0)
    for n in range(limits.ARRIVAL_ADDRESSES_MAX):
        arrivals.take(str(n), 40.0)
    assert not arrivals.take("new", 41.0)
    assert arrivals.take("new", 120.0)
