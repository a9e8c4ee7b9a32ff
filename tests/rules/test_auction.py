"""The auction: the score formula, when it closes, who wins a tie, and what is kept to explain it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clawnet.config import Config
from clawnet.errors import ConfigError
from clawnet.market.auction import (
    Auction,
    Candidate,
    Weights,
    decode_record,
    encode_record,
    explain,
    score,
    weights_from,
)
from clawnet.market.awarded import AwardOrder
from clawnet.wire.messages import Bid

CREDIT = 1_000_000
TASK = bytes(16)


def bid(
    price: int = CREDIT, *, run_s: float = 0.1, wait_s: float = 0.0, confidence: float = 0.8, number: int = 1
) -> Bid:
    return Bid(
        task_id=TASK,
        round=number,
        price_ucr=price,
        estimated_s=run_s,
        queue_wait_s=wait_s,
        confidence=confidence,
        capability_hash=bytes(32),
        load=0.0,
        energy_cost=0.0,
        nonce=bytes(16),
        known_seq=-1,
        known_hash=bytes(32),
    )


def auction(*peers: str, rtt_ms: float = 1.0, missed: tuple[str, ...] = (), **terms: Any) -> Auction:
    candidates = {peer: Candidate(rtt_ms, peer in missed) for peer in peers}
    bounds: dict[str, Any] = {
        "opened_ms": 1_000,
        "close_ms": 31_000,
        "soft_close_ms": 500,
        "max_budget_ucr": 10 * CREDIT,
    }
    return Auction(TASK, 1, candidates, **{**bounds, **terms})


def test_a_clock_that_is_set_back_ends_it() -> None:
    room = auction("a", "b")
    offer(room, "a", 1_100)
    assert not room.is_closed(1_200) and not room.is_closed(900)
    assert room.is_closed(-3_600_000)


def offer(room: Auction, peer: str, at_ms: int, terms: Bid | None = None, reputation: float = 0.5) -> str:
    return room.add_bid(peer, terms or bid(), at_ms, reputation=reputation, confidence=0.4)


# --- the score


@pytest.mark.parametrize(
    ("price_ucr", "latency_s", "reputation", "confidence", "total"),
    [
        (CREDIT, 1.0, 1.0, 1.0, 1.0),
        (0, 0.0, 0.0, 0.0, 0.5),
        (10_000, 0.5, 0.5, 0.5, 0.40 + 0.15 + 0.10 + 0.10),
        (2 * CREDIT, 4.0, 0.5, 0.9, 0.20 + 0.15 + 0.025 + 0.18),
        (8 * CREDIT, 100.0, 0.0, 0.0, 0.05 + 0.001),
    ],
)
def test_score_is_the_formula_with_floors_at_one(
    price_ucr: int, latency_s: float, reputation: float, confidence: float, total: float
) -> None:
    result = score(price_ucr, latency_s, reputation, confidence, Weights())
    assert result.total == pytest.approx(total)
    assert result.total == pytest.approx(result.price + result.reputation + result.latency + result.confidence)


@given(
    st.integers(0, 10**15),
    st.floats(0, 1e9),
    st.floats(-1, 2, allow_nan=False),
    st.floats(-1, 2, allow_nan=False),
)
def test_no_term_leaves_its_weight(price_ucr: int, latency_s: float, reputation: float, confidence: float) -> None:
    result = score(price_ucr, latency_s, reputation, confidence, Weights())
    for term, weight in (
        (result.price, 0.4),
        (result.reputation, 0.3),
        (result.latency, 0.1),
        (result.confidence, 0.2),
    ):
        assert 0 <= term <= weight
    assert 0 <= result.total <= 1 + 1e-9


@given(st.integers(0, 10**12), st.integers(0, 10**12))
def test_a_dearer_bid_never_scores_higher(one: int, other: int) -> None:
    low, high = sorted((one, other))
    assert score(high, 1, 0.5, 0.5, Weights()).total <= score(low, 1, 0.5, 0.5, Weights()).total


def test_weights_come_from_the_configuration_and_must_sum_to_one() -> None:
    assert weights_from(Config.defaults()) == Weights(0.4, 0.3, 0.1, 0.2)
    with pytest.raises(ConfigError, match="add up to"):
        weights_from(Config.defaults({"market.weights.price": "0.5"}))


def test_other_weights_change_the_winner() -> None:
    winners = []
    for weights in (Weights(), Weights(price=0.1, reputation=0.8, latency=0.05, confidence=0.05)):
        room = auction("cheap", "good", weights=weights)
        offer(room, "cheap", 1_001, bid(CREDIT), reputation=0.2)
        offer(room, "good", 1_002, bid(3 * CREDIT), reputation=0.9)
        winners.append(room.ranking()[0][0].peer)
    assert winners == ["cheap", "good"]


def test_latency_is_queue_wait_and_run_time_and_round_trip() -> None:
    room = auction("a", rtt_ms=500.0)
    offer(room, "a", 1_001, bid(run_s=2.0, wait_s=1.5))
    assert room.ranking()[0][1].latency == pytest.approx(0.1 / 4)


# --- when it closes


def test_closes_at_once_when_nobody_is_there() -> None:
    room = auction()
    assert room.is_closed(1_000)
    record = room.record(1_000)
    assert (record.closed_by, record.winner, record.why) == ("nobody", "", "no acceptable bid")


def test_closes_when_everybody_has_answered() -> None:
    room = auction("a", "b", "c")
    offer(room, "a", 1_010)
    assert room.add_decline("b", 1, "full", 1_020)
    assert not room.is_closed(1_020)
    room.peer_gone("c", 1_030)
    assert room.is_closed(1_030)
    assert room.record(1_030).closed_by == "all_answered"
    assert room.record(1_030).closed_ms == 1_030


def test_soft_close_counts_from_the_first_acceptable_bid() -> None:
    room = auction("a", "b", "c")
    assert room.closes_at(1_000) == 31_000
    assert offer(room, "a", 1_100, bid(11 * CREDIT)) == "price"
    assert room.closes_at(1_100) == 31_000
    assert offer(room, "b", 1_200) == ""
    assert room.closes_at(1_200) == 1_700
    assert not room.is_closed(1_699)
    assert room.is_closed(1_700)
    record = room.record(1_700)
    assert (record.closed_by, record.silent, record.winner) == ("soft_close", ["c"], "b")


def test_soft_close_allows_three_round_trips_of_the_slowest() -> None:
    candidates = {"a": Candidate(10), "b": Candidate(400), "c": Candidate(9_000, missed_last=True)}
    room = Auction(TASK, 1, candidates, opened_ms=0, close_ms=30_000, soft_close_ms=500, max_budget_ucr=CREDIT)
    offer(room, "a", 100)
    assert room.closes_at(100) == 1_300


def test_the_outer_bound_holds() -> None:
    room = auction("a", "b", close_ms=1_300)
    offer(room, "a", 1_100)
    assert room.closes_at(1_100) == 1_300
    assert room.record(1_300).closed_by == "bid_timeout"
    assert offer(room, "b", 1_301) == "closed"


def test_one_that_missed_its_last_offer_is_not_waited_for() -> None:
    room = auction("a", "slow", missed=("slow",))
    offer(room, "a", 1_010)
    assert room.is_closed(1_010)


def test_an_answer_of_one_not_waited_for_does_not_stand_for_that_of_another() -> None:
    room = auction("a", "b", "slow", missed=("slow",))
    offer(room, "slow", 1_010)
    offer(room, "a", 1_020)
    assert not room.is_closed(1_020)
    offer(room, "b", 1_030)
    assert room.is_closed(1_030)


def test_one_that_missed_its_last_offer_can_come_back_where_it_is_the_only_one() -> None:
    room = auction("slow", missed=("slow",))
    assert not room.is_closed(1_100)
    assert room.closes_at(1_000) == 1_500
    offer(room, "slow", 1_200)
    assert room.is_closed(1_200)
    assert room.ranking()[0][0].peer == "slow"


def test_a_bidder_whose_link_broke_does_not_win_and_starts_no_soft_close() -> None:
    room = auction("a", "b")
    offer(room, "a", 1_100)
    room.peer_gone("a", 1_200)
    assert room.ranking() == []
    assert room.closes_at(1_200) == 31_000
    room.peer_back("a")
    assert [facts.peer for facts, _ in room.ranking()] == ["a"]


@given(
    st.lists(
        st.tuples(st.sampled_from("abcd"), st.sampled_from(["bid", "dear", "decline", "gone"]), st.integers(0, 900))
    )
)
def test_it_never_stays_open_beyond_its_bound_nor_with_nobody_left(events: list[tuple[str, str, int]]) -> None:
    room, now, seen = auction("a", "b", "c", "d"), 1_000, set()
    for peer, what, later in events:
        now += later
        if what == "decline":
            room.add_decline(peer, 1, "cpu", now)
        elif what == "gone":
            room.peer_gone(peer, now)
        else:
            offer(room, peer, now, bid(CREDIT if what == "bid" else 20 * CREDIT))
        seen.add(peer)
        assert now <= room.closes_at(now) <= max(now, 31_000)
        assert room.is_closed(now) == (room.closes_at(now) <= now)
        assert room.is_closed(now) or len(seen) < 4
    assert room.is_closed(31_000)


# --- who answers


def test_only_those_asked_and_only_once() -> None:
    room = auction("a", "b")
    assert offer(room, "stranger", 1_001) == "not_asked"
    assert offer(room, "a", 1_001, bid(number=2)) == "not_asked"
    assert offer(room, "a", 1_001) == ""
    assert offer(room, "a", 1_002, bid(CREDIT // 2)) == "twice"
    assert not room.add_decline("a", 1, "full", 1_003)
    assert not room.add_decline("b", 7, "full", 1_003)
    assert [facts.price_ucr for facts in room.bids] == [CREDIT]


def test_min_reputation_is_the_requesters_own_view() -> None:
    room = auction("a", "b", min_reputation=0.6)
    assert offer(room, "a", 1_001, reputation=0.59) == "reputation"
    assert offer(room, "b", 1_002, reputation=0.6) == ""
    assert [facts.peer for facts, _ in room.ranking()] == ["b"]


# --- ties


def test_equal_scores_go_to_the_lower_price() -> None:
    room = auction("a", "b")
    offer(room, "a", 1_001, bid(CREDIT))
    offer(room, "b", 1_002, bid(CREDIT // 2))
    assert [facts.peer for facts, _ in room.ranking()] == ["b", "a"]
    assert room.record(1_002).why == "equal score, lower price"


def test_equal_offers_share_the_work() -> None:
    order, wins = AwardOrder(), {"a": 0, "b": 0, "c": 0}
    for _ in range(30):
        room = auction("a", "b", "c")
        for peer in ("a", "b", "c"):
            offer(room, peer, 1_001)
        winner = room.ranking(order.of)[0][0].peer
        order.note(winner, 1.0)
        wins[winner] += 1
    assert wins == {"a": 10, "b": 10, "c": 10}


def test_of_equal_offers_never_awarded_the_earlier_wins() -> None:
    room = auction("a", "b")
    offer(room, "b", 1_001)
    offer(room, "a", 1_002)
    assert room.ranking(AwardOrder().of)[0][0].peer == "b"


def test_a_better_score_beats_recency() -> None:
    order = AwardOrder()
    order.note("a", 1.0)
    room = auction("a", "b")
    offer(room, "a", 1_001, bid(CREDIT))
    offer(room, "b", 1_002, bid(CREDIT * 11 // 10))
    assert room.ranking(order.of)[0][0].peer == "a"


# --- why


def test_the_record_explains_everything_and_survives_storage() -> None:
    room = auction("a", "b", "c", "d", "e", "f", "g", missed=("g",), ring="member")
    offer(room, "a", 1_010, bid(2 * CREDIT, run_s=2.0), reputation=0.7)
    offer(room, "b", 1_020, bid(CREDIT))
    offer(room, "c", 1_030, bid(99 * CREDIT))
    room.add_decline("d", 1, "no_gpu", 1_040)
    room.add_decline("e", 1, "no_gpu", 1_050)
    room.add_decline("f", 1, "\x1b[31mmake something up", 1_060)
    record = room.record(1_600)
    assert decode_record(encode_record(record)) == record
    told = json.loads(json.dumps(explain(record)))
    assert told["declined"] == {"no_gpu": 2, "other": 1, "price": 1}
    assert [row["peer"] for row in told["peers"]] == ["b", "a", "c", "d", "e", "f", "g"]
    assert [row["answer"] for row in told["peers"]] == ["bid"] * 3 + ["declined"] * 3 + ["silent"]
    assert told["winner"] == "b"
    assert told["asked"] == 7
    best = told["peers"][0]["bid"]
    assert best["price"] == "1"
    assert best["terms"] == pytest.approx({"price": 0.4, "reputation": 0.15, "latency": 0.1, "confidence": 0.08})
    assert best["score"] == pytest.approx(0.73)
    assert best["won"] is True
    assert told["reason"] == "highest score: 0.7300 against 0.5400"


def test_a_record_without_winner_says_what_stood_against_it() -> None:
    room = auction("a", "b", "c")
    for peer in ("a", "b"):
        room.add_decline(peer, 1, "no_gpu", 1_010)
    offer(room, "c", 1_020, bid(11 * CREDIT))
    record = room.record(1_020)
    assert record.winner == ""
    assert record.why == "no acceptable bid (2 no_gpu, 1 price)"


def test_the_next_best_bid_is_named_as_such() -> None:
    room = auction("a", "b")
    offer(room, "a", 1_010)
    offer(room, "b", 1_020, bid(3 * CREDIT))
    assert room.record(1_020, winner="b").why == "next best bid (rank 2 of 2)"


def test_an_auction_cut_short_has_no_winner() -> None:
    room = auction("a", "b")
    offer(room, "a", 1_010)
    record = room.record(1_100, closed_by="cancelled")
    assert (record.winner, record.closed_by, record.closed_ms) == ("", "cancelled", 1_100)
