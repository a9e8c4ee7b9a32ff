"""Tasks waiting for auctions: order, lanes that are held while everybody is full, and none that waits for ever."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from clawnet.market.waiting import PAUSE_MAX_MS, PAUSE_MIN_MS, Waiting

A, B = b"lane a", b"lane b"


def ids(count: int, lane: bytes = A) -> list[bytes]:
    return [lane + n.to_bytes(2, "big") for n in range(count)]


def filled(count: int, lane: bytes = A) -> Waiting:
    waiting = Waiting()
    for task_id in ids(count, lane):
        waiting.push(lane, 0, task_id)
    return waiting


def drained(waiting: Waiting) -> list[bytes]:
    found = []
    while (task_id := waiting.pop()) is not None:
        found.append(task_id)
    return found


def test_priority_first_then_arrival_and_each_once() -> None:
    waiting = Waiting()
    for priority, task_id in ((0, b"1"), (5, b"2"), (0, b"3"), (5, b"4"), (0, b"1")):
        waiting.push(A, priority, task_id)
    assert len(waiting) == 4
    assert drained(waiting) == [b"2", b"4", b"1", b"3"] and not len(waiting)


def test_a_full_lane_is_held_and_the_others_are_not() -> None:
    waiting = filled(3)
    first = waiting.pop()
    assert first is not None and waiting.full(A, 0, first) == PAUSE_MIN_MS
    assert waiting.full(A, 0, b"late") == 0, "one pause is enough"
    waiting.push(B, 0, b"other")
    assert drained(waiting) == [b"other"] and len(waiting) == 4


def test_after_a_pause_one_tries_and_two_for_each_that_is_taken() -> None:
    waiting = filled(20)
    first = waiting.pop()
    assert first is not None
    waiting.full(A, 0, first)
    assert waiting.pause_over(A) == 2 * PAUSE_MIN_MS
    assert len(drained(waiting)) == 1
    waiting.taken(A)
    assert len(drained(waiting)) == 2
    waiting.taken(A)
    waiting.full(A, 0, b"refused")
    assert drained(waiting) == [], "one that finds nobody ends it"
    waiting.taken(A)
    assert drained(waiting) == []
    waiting.ended(A)
    assert len(drained(waiting)) == 1, "a place that is free is filled"


def test_the_pause_grows_to_a_bound_and_is_short_again_after_an_award() -> None:
    waiting = filled(2)
    first = waiting.pop()
    assert first is not None
    waiting.full(A, 0, first)
    pauses = []
    for _ in range(10):
        pauses.append(waiting.pause_over(A))
        for task_id in drained(waiting):
            waiting.full(A, 0, task_id)
    assert pauses == sorted(pauses) and pauses[-1] == PAUSE_MAX_MS
    waiting.pause_over(A)
    waiting.taken(A)
    assert waiting.pause_over(A) == 2 * PAUSE_MIN_MS


def test_held_lanes_take_turns_at_the_places_that_come_free() -> None:
    waiting = filled(100)
    for n in range(100):
        waiting.push(B, 0, ids(100, B)[n])
    for lane in (A, B):
        waiting.full(lane, 0, lane + b"x")
    drained(waiting)
    tried = []
    for _ in range(20):
        waiting.ended(A)
        tried += [task_id[: len(A)] for task_id in drained(waiting)]
    assert tried.count(B) == 20


def test_what_is_forgotten_is_never_given_and_takes_no_room() -> None:
    waiting = Waiting()
    waiting.full(A, 0, b"first")
    drained(waiting)
    for n in range(20_000):
        task_id = n.to_bytes(4, "big")
        waiting.push(A, 0, task_id)
        drained(waiting)
        waiting.forget(task_id)
    assert len(waiting) == 1
    assert len(waiting._ready) + len(waiting._held[A].parked) < 3_000
    waiting.forget(b"first")
    assert waiting.pause_over(A) == 0 and not waiting.held(A)


EVENTS = ("push", "pop", "take", "full", "end", "pause", "forget")
STEPS = st.lists(st.tuples(st.sampled_from(EVENTS), st.integers(0, 9)))


@given(steps=STEPS)
def test_nothing_is_lost_and_all_comes_out_in_the_end(steps: list[tuple[str, int]]) -> None:
    waiting, inside, out = Waiting(), set(), set()
    lane_of = {n.to_bytes(1, "big"): A if n % 2 else B for n in range(10)}
    armed: set[bytes] = set()
    for what, number in steps:
        task_id = number.to_bytes(1, "big")
        lane = lane_of[task_id]
        if what == "push" and task_id not in out:
            waiting.push(lane, number % 3, task_id)
            inside.add(task_id)
        elif what == "pop" and (popped := waiting.pop()) is not None:
            inside.remove(popped)
            out.add(popped)
        elif what == "take" and task_id in out:
            out.remove(task_id)
            waiting.taken(lane)
        elif what == "full" and task_id in out:
            out.remove(task_id)
            inside.add(task_id)
            if waiting.full(lane, number % 3, task_id):
                armed.add(lane)
        elif what == "end":
            waiting.ended(lane)
        elif what == "pause" and lane in armed and not waiting.pause_over(lane):
            armed.remove(lane)
        elif what == "forget":
            waiting.forget(task_id)
            inside.discard(task_id)
        assert len(waiting) == len(inside)
        assert {one for one in (A, B) if waiting.held(one)} <= armed, "a held lane has a pause under way"
    for _ in range(100):
        for popped in drained(waiting):
            inside.remove(popped)
        for lane in list(armed):
            if not waiting.pause_over(lane):
                armed.remove(lane)
    assert not inside and not armed
