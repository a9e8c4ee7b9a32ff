"""Who starts next on a worker: fair between requesters, never more than there is, and nobody passed over for ever."""

from __future__ import annotations

import heapq
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clawnet import limits
from clawnet.market.machine import Amounts, Entry, Machine
from clawnet.market.queueing import OWN_WEIGHT, FairQueue

FOUR = Amounts(4, 4_000, 4_096, 2)
SHARE = Amounts(1, 1_000, 1_024, 0)


class Shop:
    """A machine with its queue on a clock: runs end after `took_s` of their job, by default as estimated."""

    def __init__(self, capacity: Amounts = FOUR) -> None:
        self.machine, self.queue = Machine(), FairQueue()
        self.machine.resize(capacity)
        self.now_ms = 0
        self.started: list[tuple[int, str]] = []
        self.gpus: dict[str, tuple[int, ...]] = {}
        self.ends: list[tuple[int, str]] = []
        self.took_s: dict[str, float] = {}

    def add(self, job: str, flow: str = "A", needs: Amounts = SHARE, estimated_s: float = 1.0, **more: Any) -> Entry:
        own = more.pop("own", flow == "own")
        took_s = more.pop("took_s", estimated_s)
        entry = Entry(job.encode(), flow.encode(), own, needs, estimated_s, **more)
        self.took_s[job] = took_s
        self.queue.push(entry, self.machine.cost_s(entry))
        return entry

    def pump(self) -> None:
        while (entry := self.queue.pick(self.machine, self.now_ms)) is not None:
            job = entry.job.decode()
            self.gpus[job] = self.machine.start(entry, self.now_ms)
            assert self.machine.used.within(self.machine.capacity)
            self.started.append((self.now_ms, job))
            heapq.heappush(self.ends, (self.now_ms + round(1000 * self.took_s[job]), job))

    def end_one(self) -> None:
        self.now_ms, job = heapq.heappop(self.ends)
        entry = self.machine.end(job.encode())
        assert entry is not None
        self.queue.ended(entry, self.machine.cost_s(entry, self.took_s[job]))
        self.gpus.pop(job)

    def run(self, starts: int = 10**6) -> list[str]:
        """Until so many have started, or nothing is left; the jobs in the order of their starts."""
        self.pump()
        while self.ends and len(self.started) < starts:
            self.end_one()
            self.pump()
        return [job for _, job in self.started[:starts]]

    def when(self, job: str) -> int:
        return next(at_ms for at_ms, name in self.started if name == job)


def test_jobs_of_one_requester_start_in_the_order_they_came() -> None:
    shop = Shop()
    for n in range(9):
        shop.add(f"{n}")
    assert shop.run() == [f"{n}" for n in range(9)]
    assert [at_ms for at_ms, _ in shop.started] == [0] * 4 + [1_000] * 4 + [2_000]


def test_a_flood_does_not_make_another_wait_more_than_one_round() -> None:
    shop = Shop()
    for n in range(1_000):
        shop.add(f"A{n}")
    shop.run(starts=400)
    shop.add("B0", "B")
    before = len(shop.started)
    shop.run()
    assert [job for _, job in shop.started].index("B0") - before < 4
    assert len(shop.started) == 1_001


def test_requesters_that_all_flood_get_equal_parts_whenever_they_came() -> None:
    shop = Shop()
    for n in range(300):
        shop.add(f"A{n}")
    shop.run(starts=100)
    for n in range(100):
        for flow in "BCD":
            shop.add(f"{flow}{n}", flow)
    begun = len(shop.started)
    shop.run(starts=begun + 160)
    parts = Counter(job[0] for _, job in shop.started[begun:])
    assert all(abs(count - 40) <= 4 for count in parts.values()), f"what already ran counts: {parts}"


def test_nobody_saves_up_a_right_by_staying_away() -> None:
    shop = Shop()
    for n in range(200):
        shop.add(f"A{n}")
    shop.run(starts=100)
    for n in range(100):
        shop.add(f"B{n}", "B")
    begun = len(shop.started)
    shop.run(starts=begun + 80)
    assert abs(Counter(job[0] for _, job in shop.started[begun:])["A"] - 40) <= 4


def test_one_that_was_here_before_and_comes_back_has_saved_up_nothing_either() -> None:
    shop = Shop()
    shop.add("B", "B")
    for n in range(200):
        shop.add(f"A{n}")
    shop.run(starts=100)
    for n in range(100):
        shop.add(f"B{n}", "B")
    begun = len(shop.started)
    shop.run(starts=begun + 80)
    assert abs(Counter(job[0] for _, job in shop.started[begun:])["A"] - 40) <= 4


def test_what_takes_more_of_the_machine_counts_for_more() -> None:
    shop = Shop()
    for n in range(100):
        shop.add(f"A{n}", "A", Amounts(1, 2_000, 0, 0))
        shop.add(f"B{n}", "B", Amounts(1, 1_000, 0, 0))
    parts = Counter(job[0] for job in shop.run(starts=60))
    assert abs(parts["B"] - 2 * parts["A"]) <= 3, parts


def test_own_work_goes_first_and_leaves_the_others_their_part() -> None:
    shop = Shop(Amounts(1, 1_000, 1_024, 0))
    for n in range(100):
        shop.add(f"m{n}", "A")
        shop.add(f"o{n}", "own")
    order = "".join(job[0] for job in shop.run(starts=100))
    assert order.startswith("o")
    part = order.count("o") / 100
    assert abs(part - OWN_WEIGHT / (OWN_WEIGHT + 1)) < 0.03
    assert "o" * 7 not in order, "others wait a bounded time"


def test_own_work_has_saved_up_nothing_while_there_was_none() -> None:
    shop = Shop(Amounts(1, 1_000, 1_024, 0))
    for n in range(200):
        shop.add(f"m{n}", "A")
    shop.run(starts=100)
    for n in range(100):
        shop.add(f"o{n}", "own")
    order = "".join(job[0] for job in shop.run(starts=150)[100:])
    assert 8 <= order.count("m") <= 12 and "o" * 7 not in order, order


def test_own_work_that_comes_into_a_flood_of_others_is_next() -> None:
    shop = Shop()
    for n in range(200):
        shop.add(f"m{n}", "ABCDEFGHIJ"[n % 10])
    shop.run(starts=50)
    shop.add("mine", "own")
    begun = len(shop.started)
    shop.run(starts=begun + 4)
    assert "mine" in [job for _, job in shop.started[begun:]]


def test_priority_orders_a_requesters_own_jobs_and_passes_nobody_else() -> None:
    shop = Shop(Amounts(1, 1_000, 1_024, 0))
    for n in range(4):
        shop.add(f"B{n}", "B")
    for n, priority in enumerate((0, 100, -100, 100)):
        shop.add(f"A{n}", "A", priority=priority)
    order = shop.run()
    assert [job for job in order if job[0] == "A"] == ["A1", "A3", "A0", "A2"]
    assert [job[0] for job in order] == ["B", "A"] * 4


def test_who_runs_longer_than_estimated_makes_up_for_it() -> None:
    shop = Shop(Amounts(1, 1_000, 1_024, 0))
    for n in range(40):
        shop.add(f"A{n}", "A", took_s=3.0)
        shop.add(f"B{n}", "B")
    shop.run(starts=40)
    parts = Counter(job[0] for _, job in shop.started)
    assert abs(parts["B"] - 3 * parts["A"]) <= 4, parts


@pytest.mark.parametrize("took_s", [0.01, 0.5, 7.0])
@pytest.mark.parametrize("flow", ["B", "own"])
def test_wrong_estimates_change_nobodys_part(took_s: float, flow: str) -> None:
    shop = Shop()
    for n in range(300):
        shop.add(f"A{n}", took_s=took_s)
    shop.run(starts=30)
    for n in range(200):
        shop.add(f"{flow[0]}{n}", flow, took_s=took_s)
    begun = len(shop.started)
    shop.run(starts=begun + 100)
    count = Counter(job[0] for _, job in shop.started[begun:])
    expected = 20 if flow == "own" else 50
    assert abs(count["A"] - expected) <= 6, count


def test_what_one_has_to_make_up_for_is_bounded() -> None:
    shop = Shop(Amounts(1, 1_000, 1_024, 0))
    shop.add("A0", "A", took_s=100_000.0)
    for n in range(1_000):
        shop.add(f"B{n}", "B")
    shop.add("A1", "A")
    shop.run()
    assert shop.when("A1") - 100_000_000 <= 1000 * (limits.QUEUE_DEBT_S + 2)


def test_when_all_is_done_all_is_forgotten() -> None:
    shop = Shop(Amounts(1, 1_000, 1_024, 0))
    shop.add("A0", "A", took_s=500.0)
    shop.run()
    shop.queue.rest()
    shop.add("A1", "A")
    shop.add("B1", "B")
    assert shop.run()[1:] == ["A1", "B1"]


# --- what there is


def test_nothing_starts_beyond_slots_processors_memory_or_gpus() -> None:
    for needs, most in (
        (Amounts(1), 4),
        (Amounts(1, 2_000), 2),
        (Amounts(1, 0, 3_000), 1),
        (Amounts(1, 0, 0, 1), 2),
    ):
        shop = Shop()
        for n in range(6):
            shop.add(f"{n}", needs=needs)
        shop.pump()
        assert len(shop.started) == most, needs


def test_gpus_are_the_runs_own_until_it_ends() -> None:
    shop = Shop(Amounts(4, 4_000, 4_096, 3))
    for name, count in (("a", 1), ("b", 2), ("c", 1), ("none", 0)):
        shop.add(name, needs=Amounts(1, 500, 100, count), estimated_s={"b": 5.0}.get(name, 1.0))
    shop.pump()
    assert shop.gpus == {"a": (0,), "b": (1, 2), "none": ()}
    shop.end_one()
    shop.pump()
    assert shop.gpus["c"] == (0,)


def test_a_large_job_starts_when_it_should_and_small_ones_run_meanwhile() -> None:
    shop = Shop()
    shop.add("long", estimated_s=10.0)
    shop.pump()
    shop.add("whole", "B", Amounts(1, 4_000, 1_024, 0), 5.0)
    for n in range(100):
        shop.add(f"small{n}", "A" if n % 2 else "C")
    shop.run()
    assert shop.when("whole") == 10_000
    meanwhile = [job for at_ms, job in shop.started if at_ms < 10_000 and job.startswith("small")]
    assert len(meanwhile) == 30, "three slots, ten seconds"


def test_one_that_would_keep_the_large_one_waiting_does_not_start() -> None:
    shop = Shop()
    shop.add("long", estimated_s=10.0)
    shop.pump()
    shop.add("whole", "B", Amounts(1, 4_000, 1_024, 0), 5.0)
    shop.add("eleven", "C", estimated_s=11.0)
    shop.add("nine", "C", estimated_s=9.0)
    assert shop.run() == ["long", "nine", "whole", "eleven"]


def test_what_fits_beside_the_large_one_may_start_and_take_its_time() -> None:
    shop = Shop()
    shop.add("long", needs=Amounts(1, 3_000, 0, 0), estimated_s=10.0)
    shop.pump()
    shop.add("large", "B", Amounts(1, 3_000, 0, 0), 5.0)
    shop.add("beside", "C", Amounts(1, 1_000, 0, 0), 60.0)
    shop.add("too much", "D", Amounts(1, 1_000, 0, 0), 60.0)
    shop.run()
    assert shop.when("beside") == 0 and shop.when("large") == 10_000
    assert shop.when("too much") == 15_000


def test_what_starts_beside_the_large_one_leaves_it_room_together() -> None:
    shop = Shop()
    shop.add("long", needs=Amounts(1, 1_000, 0, 0), estimated_s=10.0)
    shop.pump()
    shop.add("large", "B", Amounts(1, 3_500, 0, 0), 5.0)
    for n in range(3):
        shop.add(f"{n}", "CDE"[n], Amounts(1, 400, 0, 0), 60.0)
    shop.run()
    assert shop.when("0") == 0 and shop.when("large") == 10_000 and shop.when("1") == 15_000


def test_when_the_first_in_line_goes_away_the_others_start() -> None:
    shop = Shop()
    shop.add("long", needs=Amounts(1, 1_000, 0, 0), estimated_s=10.0)
    shop.pump()
    shop.add("whole", "B", Amounts(1, 4_000, 0, 0), 5.0)
    shop.add("eleven", "C", estimated_s=11.0)
    shop.pump()
    shop.queue.discard(b"whole")
    shop.pump()
    assert [job for _, job in shop.started] == ["long", "eleven"]


def test_one_that_comes_behind_a_blocked_line_starts_where_it_fits() -> None:
    shop = Shop()
    shop.add("long", needs=Amounts(1, 1_000, 0, 0), estimated_s=10.0)
    shop.add("whole", "B", Amounts(1, 4_000, 0, 0), 5.0)
    shop.pump()
    shop.add("brief", "C")
    shop.pump()
    assert [job for _, job in shop.started] == ["long", "brief"]


def test_lies_and_wrong_estimates_delay_a_large_job_by_one_run_at_most() -> None:
    shop = Shop()
    shop.add("first", took_s=8.0)
    shop.pump()
    shop.add("whole", "B", Amounts(1, 4_000, 1_024, 0), 5.0)
    for n in range(500):
        shop.add(f"small{n}", "A", estimated_s=0.5, took_s=8.0)
    shop.run()
    assert shop.when("whole") <= 16_000


def test_shorts_share_a_slot() -> None:
    shop = Shop(Amounts(1, 1_000, 1_024, 0))
    for n in range(limits.SHORT_RUNS_MAX + 6):
        shop.add(f"{n}", estimated_s=0.01, short=True)
    shop.pump()
    assert len(shop.started) == limits.SHORT_RUNS_MAX and shop.machine.used == SHARE
    shop.run()
    assert len(shop.started) == limits.SHORT_RUNS_MAX + 6 and shop.machine.used == Amounts()


def test_a_stream_of_shorts_does_not_keep_a_slot_for_ever() -> None:
    shop = Shop(Amounts(1, 1_000, 1_024, 0))
    for n in range(300):
        shop.add(f"{n}", "A", estimated_s=0.01, short=True)
    shop.pump()
    shop.add("long", "B", estimated_s=5.0)
    shop.run()
    assert shop.when("long") < 2_000


# --- places


def test_one_that_floods_leaves_places_to_others() -> None:
    queue = FairQueue()
    entry = Entry(b"", b"A", False, SHARE, 1.0)
    count = Counter[str]()
    for round_ in range(300):
        for flow in "AB":
            if queue.has_place(flow.encode(), 256):
                count[flow] += 1
                queue.expect(f"{flow}{round_}".encode(), flow.encode())
    assert count["A"] <= 128 and count["B"] >= 80 and len(queue) < 200
    assert queue.has_place(b"late", 256) and entry.flow == b"A"


@pytest.mark.parametrize(("places", "alone"), [(0, 0), (1, 1), (4, 2), (256, 128)])
def test_alone_one_gets_half_of_the_places(places: int, alone: int) -> None:
    queue = FairQueue()
    taken = 0
    while queue.has_place(b"A", places):
        queue.expect(taken.to_bytes(2, "big"), b"A")
        taken += 1
    assert taken == alone


def test_a_place_is_kept_from_the_award_to_the_start() -> None:
    shop = Shop()
    shop.queue.expect(b"x", b"A")
    assert len(shop.queue) == 1 and b"x" not in shop.queue
    shop.add("x")
    assert len(shop.queue) == 1 and b"x" in shop.queue
    shop.pump()
    assert len(shop.queue) == 0
    shop.queue.expect(b"y", b"A")
    shop.queue.discard(b"y")
    shop.queue.discard(b"y")
    assert len(shop.queue) == 0 and shop.queue.has_place(b"A", 1)


# --- what a bid says of the wait


def told_s(shop: Shop, flow: str, *, own: bool = False) -> float:
    work_s = shop.machine.work_s(shop.now_ms) + shop.queue.ahead_s(flow.encode(), own=own)
    return work_s / shop.machine.capacity.slots


@pytest.mark.parametrize("backlog", [1, 10, 100])
def test_the_wait_told_is_that_of_the_requester(backlog: int) -> None:
    for flow, own in (("A", False), ("B", False), ("C", False), ("own", True)):
        shop = Shop()
        for n in range(4 + 4 * backlog):
            shop.add(f"A{n}", "A")
        for n in range(3):
            shop.add(f"B{n}", "B")
        shop.pump()
        told = told_s(shop, flow, own=own)
        shop.add("new", flow)
        shop.run()
        assert abs(shop.when("new") / 1000 - told) <= 1.5, (flow, told, shop.when("new"))


def test_own_work_ahead_of_members_is_told() -> None:
    shop = Shop(Amounts(1, 1_000, 1_024, 0))
    for n in range(100):
        shop.add(f"o{n}", "own")
    for n in range(10):
        shop.add(f"m{n}", "A")
    shop.pump()
    told = told_s(shop, "A")
    shop.add("new", "A")
    shop.run()
    assert abs(shop.when("new") / 1000 - told) <= 6, (told, shop.when("new"))


def test_an_overdue_run_is_taken_to_be_overdue_as_long_again() -> None:
    shop = Shop(Amounts(1, 1_000, 1_024, 0))
    shop.add("x", estimated_s=2.0, took_s=100.0)
    shop.pump()
    assert [round(shop.machine.work_s(at_ms), 1) for at_ms in (0, 1_500, 2_000, 12_000)] == [2, 0.5, 0, 10]


# --- laws

jobs = st.tuples(
    st.sampled_from(["A", "B", "C", "own"]),
    st.builds(Amounts, st.just(1), st.integers(0, 4_000), st.integers(0, 4_096), st.sampled_from([0, 0, 0, 1, 2])),
    st.floats(0.0, 20.0),
    st.floats(0.0, 40.0),
    st.integers(-2, 2),
    st.booleans(),
)
steps = st.lists(
    st.one_of(st.tuples(st.just("add"), jobs), st.tuples(st.sampled_from(["end", "drop", "pump"]), st.integers(0, 99))),
    max_size=120,
)


@given(steps)
@settings(deadline=None)
def test_whatever_comes_nothing_runs_beyond_what_there_is_and_everything_starts_once(story: list[Any]) -> None:
    shop = Shop()
    waiting: set[str] = set()
    dropped: set[str] = set()
    for number, (what, given_) in enumerate(story):
        if what == "add":
            flow, needs, estimated_s, took_s, priority, short = given_
            short = short and not needs.gpu
            estimated_s = estimated_s / 400 if short else estimated_s
            more = {"priority": priority, "short": short, "took_s": took_s}
            shop.add(f"{number}", flow, SHARE if short else needs, estimated_s, **more)
            waiting.add(f"{number}")
        elif what == "end" and shop.ends:
            shop.end_one()
        elif what == "drop" and waiting:
            job = sorted(waiting)[given_ % len(waiting)]
            shop.queue.discard(job.encode())
            waiting.discard(job)
            dropped.add(job)
        shop.pump()
        waiting -= {job for _, job in shop.started}
        assert len(shop.queue) == len(waiting)
        held = [number for gpus in shop.gpus.values() for number in gpus]
        assert len(held) == len(set(held)) == shop.machine.used.gpu
    shop.run()
    started = [job for _, job in shop.started]
    assert sorted(started) == sorted(set(started)) and not dropped & set(started)
    assert len(started) + len(dropped) == sum(what == "add" for what, _ in story)
    assert shop.machine.used == Amounts() and len(shop.queue) == 0 and not len(shop.machine)
