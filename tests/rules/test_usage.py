"""What a requester believes of a cost record: whatever is possible as it is told, whatever is not within its bound."""

from __future__ import annotations

import math
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from clawnet import limits
from clawnet.market.usage import SLACK_S, Cost, believed, kept

HONEST = {
    "duration_s": 1.5,
    "cpu_s": 1.25,
    "memory_bytes_max": 4096,
    "tokens_in": 3,
    "tokens_out": 5,
    "model": "small",
    "finish_reason": "stop",
}


def test_an_honest_record_stays_as_it_is() -> None:
    assert believed(Cost(1.5, 1.25, 4096, 10), 2.0) == Cost(1.5, 1.25, 4096, 10)
    assert kept(HONEST, 2.0) == HONEST


def test_no_run_is_longer_than_the_time_it_had() -> None:
    cost = believed(Cost(1e9, 1e9, 2**62, 2**62), 10.0)
    assert cost.duration_s == 10.0 + SLACK_S
    assert cost.cpu_s <= (10.0 + 2 * SLACK_S) * limits.PROCESSORS_MAX
    assert cost.memory_bytes_max == limits.MEMORY_BYTES_MAX and cost.output_bytes == limits.RESULT_BYTES_MAX


def test_a_clock_that_was_set_back_leaves_the_slack() -> None:
    assert believed(Cost(3.0, 0.0, 0, 0), -3600.0).duration_s == 3.0


def test_words_of_a_liar_are_cut() -> None:
    told = kept({**HONEST, "model": "m" * 10_000, "finish_reason": "f" * 10_000, "tokens_in": 2**63}, 2.0)
    assert len(told["model"]) <= 256 and len(told["finish_reason"]) <= 64 and told["tokens_in"] == limits.TOKENS_MAX


ANY = st.floats() | st.integers(-(2**63), 2**64 - 1)


@given(
    duration=st.floats(), cpu=st.floats(), memory=st.integers(-(2**63), 2**64), out=ANY, elapsed=st.floats(-1e6, 1e6)
)
def test_whatever_is_told_what_is_kept_is_finite_and_possible(
    duration: float, cpu: float, memory: int, out: Any, elapsed: float
) -> None:
    cost = believed(Cost(duration, cpu, memory, out), elapsed)
    assert 0 <= cost.duration_s <= max(0.0, elapsed) + SLACK_S
    assert cost.cpu_s >= 0 and math.isfinite(cost.cpu_s)
    assert 0 <= cost.memory_bytes_max <= limits.MEMORY_BYTES_MAX
    assert 0 <= cost.output_bytes <= limits.RESULT_BYTES_MAX
