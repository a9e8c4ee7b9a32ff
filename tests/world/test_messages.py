"""What a task costs in messages does not grow with the mesh: counts of the simulated network, not times."""

from __future__ import annotations

import pytest

from tests.world.messages import Figures, measure

MORE_AT_MOST = 1.5


@pytest.fixture(scope="module")
def small() -> Figures:
    return measure(20)


def compare(small: Figures, large: Figures) -> None:
    assert small.tasks >= small.nodes and large.tasks >= large.nodes
    assert large.paid > large.tasks * 0.8, "most of them are done and paid"
    assert large.of_a_task["MARKET_TASK_ANNOUNCE"] < 17, "at most sixteen are asked"
    assert "MARKET_GOSSIP" not in large.of_a_task, "enough who can do it are known"
    assert large.total <= MORE_AT_MOST * small.total, (large.of_a_task, small.of_a_task)


@pytest.mark.slow
def test_a_task_costs_as_many_messages_among_a_hundred_as_among_twenty(small: Figures) -> None:
    compare(small, measure(100))


@pytest.mark.long
def test_a_task_costs_as_many_messages_among_a_thousand_as_among_twenty(small: Figures) -> None:
    compare(small, measure(1_000))
