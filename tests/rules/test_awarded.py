"""What a bid could not know of: tasks that its maker was awarded after it was asked."""

from __future__ import annotations

import pytest

from clawnet.market.auction import Auction, Candidate, decode_record, encode_record, explain
from clawnet.market.awarded import AwardOrder, Given
from clawnet.wire.messages import Bid

UCR = 1_000_000


def bid(estimated_s: float, *, load: float = 0.0, confidence: float = 0.5, wait_s: float = 0.0) -> Bid:
    return Bid(bytes(16), 1, UCR, estimated_s, wait_s, confidence, bytes(32), load, 0.0, bytes(16), -1, bytes(32))


@pytest.mark.parametrize(
    ("tasks", "slots", "load", "wait_s"),
    [
        (0, 4, 0.0, 0.0),
        (3, 4, 0.0, 0.0),
        (4, 4, 0.0, 2.5),
        (5, 4, 0.0, 5.0),
        (1, 4, 0.75, 2.5),
        (1, 4, 1.0, 2.5),
        (2, 4, 1.0, 5.0),
        (2, 0, 9.0, 20.0),
    ],
)
def test_as_many_as_there_are_free_slots_wait_for_nothing(tasks: int, slots: int, load: float, wait_s: float) -> None:
    asked = Given(7, 70.0)
    assert asked.wait_behind_s(Given(7 + tasks, 70.0 + 10 * tasks), slots=slots, load=load) == wait_s


def test_who_was_forgotten_waits_for_nothing() -> None:
    assert Given(7, 70.0).wait_behind_s(Given(), slots=1, load=1.0) == 0


def test_the_order_tells_what_each_was_given() -> None:
    order = AwardOrder()
    order.note("a", 3.0)
    order.note("b", 1.0)
    order.note("a", 2.0)
    assert order.given("a") == Given(2, 5.0) and order.given("c") == Given()
    assert order.of("a") > order.of("b") > order.of("c") == 0


def test_bids_made_at_one_moment_are_awarded_by_turns() -> None:
    order, won = AwardOrder(), dict.fromkeys("abc", 0)
    auctions = []
    for number in range(36):
        candidates = {peer: Candidate(1.0, slots=4, given=order.given(peer)) for peer in won}
        auction = Auction(
            number.to_bytes(16, "big"), 1, candidates, opened_ms=0, close_ms=9, soft_close_ms=1, max_budget_ucr=9 * UCR
        )
        for peer in won:
            auction.add_bid(peer, bid(10.0), 1, reputation={"a": 0.52}.get(peer, 0.5), confidence=0.5)
        auctions.append(auction)
    for auction in auctions:
        auction.weigh_again(order.given)
        best = auction.ranking(order.of)[0][0]
        won[best.peer] += 1
        order.note(best.peer, best.estimated_s)
    assert won["a"] >= won["b"] and min(won.values()) >= 9, won
    last = decode_record(encode_record(auctions[-1].record(2, last_award=order.of)))
    told = {peer["peer"]: peer["bid"] for peer in explain(last)["peers"]}
    assert told["a"]["own_ahead_s"] > 0 and told["a"]["queue_wait_s"] == 0
    assert told["a"]["terms"]["confidence"] < 0.1


def test_a_much_better_one_may_be_worth_waiting_for() -> None:
    order = AwardOrder()
    candidates = {peer: Candidate(1.0, slots=1, given=order.given(peer)) for peer in "ab"}
    auction = Auction(bytes(16), 1, candidates, opened_ms=0, close_ms=9, soft_close_ms=1, max_budget_ucr=9 * UCR)
    auction.add_bid("a", bid(10.0), 1, reputation=0.95, confidence=0.5)
    auction.add_bid("b", bid(10.0), 1, reputation=0.2, confidence=0.5)
    order.note("a", 10.0)
    auction.weigh_again(order.given)
    auction.weigh_again(order.given)
    (first, score), (second, _) = auction.ranking(order.of)
    assert first.peer == "a" and first.own_ahead_s == 10.0 and second.own_ahead_s == 0
    assert score.total == first.score.total < 0.40 + 0.30 * 0.95 + 0.01 + 0.1
