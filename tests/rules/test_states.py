"""The three state machines: what may follow what, what is final, and what an impossible move says."""

from __future__ import annotations

from enum import StrEnum
from itertools import pairwise

import pytest

from clawnet.market import records
from clawnet.market.states import (
    ATTEMPT_FINAL,
    FINAL,
    JOB_FINAL,
    MACHINES,
    AttemptState,
    ImpossibleTransition,
    JobState,
    Step,
    TaskState,
    advance,
    is_final,
    may,
    mermaid,
    transition_rows,
)

PATHS: list[tuple[type[StrEnum], str]] = [
    (TaskState, "draft announced bidding awarded executing delivered verified settled"),
    (TaskState, "announced bidding announced bidding no_bids"),
    (TaskState, "awarded reassigned bidding awarded executing reassigned announced awarded delivered settled"),
    (TaskState, "verified disputed refunded"),
    (TaskState, "delivered disputed settled"),
    (AttemptState, "awarded locked accepted fetching delivering released claimed done"),
    (AttemptState, "accepted fetching accepted delivering"),
    (AttemptState, "awarded accepted claimed done"),
    (AttemptState, "locked rejected"),
    (AttemptState, "accepted unpaid refunded"),
    (JobState, "awaiting_lock fetching queued running sealed delivered released claimed done"),
    (JobState, "running queued running cancelled waived"),
    (JobState, "delivered forfeited"),
]


@pytest.mark.parametrize(("machine", "path"), PATHS, ids=[path for _, path in PATHS])
def test_known_ways_are_in_the_tables(machine: type[StrEnum], path: str) -> None:
    for frm, to in pairwise(path.split()):
        assert advance([], machine(frm), machine(to), "test") is machine(to)


@pytest.mark.parametrize(
    ("frm", "to"),
    [
        (TaskState.SETTLED, TaskState.EXECUTING),
        (TaskState.NO_BIDS, TaskState.ANNOUNCED),
        (TaskState.DRAFT, TaskState.AWARDED),
        (TaskState.DELIVERED, TaskState.REASSIGNED),
        (TaskState.EXECUTING, TaskState.REFUNDED),
        (TaskState.BIDDING, TaskState.BIDDING),
        (AttemptState.RELEASED, AttemptState.REFUNDED),
        (AttemptState.DELIVERING, AttemptState.REFUNDED),
        (AttemptState.AWARDED, AttemptState.RELEASED),
        (JobState.QUEUED, JobState.DELIVERED),
        (JobState.RUNNING, JobState.REJECTED),
        (JobState.DONE, JobState.RUNNING),
    ],
)
def test_what_must_never_happen_is_not(frm: StrEnum, to: StrEnum) -> None:
    assert not may(frm, to)
    with pytest.raises(ImpossibleTransition):
        advance("x", frm, to, "test")


@pytest.mark.parametrize("state", [state for state in TaskState if state not in FINAL and state != TaskState.DISPUTED])
def test_every_open_task_can_be_cancelled_fail_or_time_out(state: TaskState) -> None:
    for end in (TaskState.CANCELLED, TaskState.FAILED, TaskState.TIMED_OUT):
        assert may(state, end)


def test_final_states_are_those_that_the_records_name() -> None:
    assert set(FINAL) == set(records.FINAL_STATES)
    assert set(JOB_FINAL) == set(records.JOB_FINAL)
    assert {state.value for state in ATTEMPT_FINAL} == {"done", "rejected", "waived", "lost", "refunded", "unfunded"}
    assert is_final(TaskState.SETTLED)
    assert not is_final(TaskState.DELIVERED)


def test_an_impossible_move_tells_the_story() -> None:
    story = [Step(1_000, "draft"), Step(1_002, "announced", "2 asked"), Step(1_010, "bidding")]
    with pytest.raises(ImpossibleTransition) as caught:
        advance(story, TaskState.BIDDING, TaskState.SETTLED, "release seen")
    assert caught.value.message == (
        "a task cannot go from bidding to settled (release seen); "
        "so far: +0 ms draft; +2 ms announced (2 asked); +10 ms bidding"
    )
    assert caught.value.exit_code == 70


@pytest.mark.parametrize("machine", ["task", "attempt", "job"])
def test_every_state_is_reached_from_the_first_and_leads_to_an_end(machine: str) -> None:
    table = MACHINES[machine]
    states = list(type(next(iter(table))))

    def reachable(start: StrEnum) -> set[StrEnum]:
        seen, todo = {start}, [start]
        while todo:
            for after in table.get(todo.pop(), ()):
                if after not in seen:
                    seen.add(after)
                    todo.append(after)
        return seen

    assert reachable(states[0]) == set(states)
    for state in states:
        assert any(is_final(end) for end in reachable(state))


@pytest.mark.parametrize("machine", ["task", "attempt", "job"])
def test_the_diagram_shows_the_table_and_nothing_else(machine: str) -> None:
    lines = mermaid(machine).splitlines()
    assert lines[0] == "stateDiagram-v2"
    arrows = {tuple(line.split(" --> ")) for line in map(str.strip, lines[2:])}
    expected = {(frm, to) for frm, targets in transition_rows(machine) for to in targets or ["[*]"]}
    assert arrows == expected
    assert len(lines) == len(set(lines))
