"""The cost record of a run as its executor tells it, and how much of that a requester believes. Pure.

An executor may say anything: what it says is shown, paid for within its line alone, and bounded here by what can be at
all, so that a liar's figures break no sum and no table.
"""

from __future__ import annotations

from typing import Any, Final

from msgspec import Struct

from clawnet import limits

SLACK_S: Final = 5.0
"""A run may seem longer than the time between its award and its end, by clocks and rounding."""


class Cost(Struct, frozen=True, gc=False):
    """Wall-clock and processor seconds, the most memory held at once, and what was written."""

    duration_s: float
    cpu_s: float
    memory_bytes_max: int
    output_bytes: int


def believed(told: Cost, elapsed_s: float) -> Cost:
    """The same within what can be: no longer than since the award, no more processors, memory or output than there are.

    `elapsed_s` is the requester's own measure; a clock that was set back makes it nothing, and SLACK_S is left.
    """
    duration_s = _within(told.duration_s, max(0.0, elapsed_s) + SLACK_S)
    return Cost(
        duration_s,
        _within(told.cpu_s, (duration_s + SLACK_S) * limits.PROCESSORS_MAX),
        int(_within(told.memory_bytes_max, limits.MEMORY_BYTES_MAX)),
        int(_within(told.output_bytes, limits.RESULT_BYTES_MAX)),
    )


def _within(value: float, high: float) -> float:
    """A value between 0 and `high`; what is no number at all is 0."""
    if value > high:
        return high
    return value if value >= 0 else 0


def kept(told: dict[str, Any], elapsed_s: float) -> dict[str, Any]:
    """The usage of a result's bundle as the requester keeps it: the same bounds, also for what a prompt tells."""
    cost = believed(Cost(told["duration_s"], told["cpu_s"], told["memory_bytes_max"], 0), elapsed_s)
    return {
        **told,
        "duration_s": cost.duration_s,
        "cpu_s": cost.cpu_s,
        "memory_bytes_max": cost.memory_bytes_max,
        "tokens_in": int(_within(told["tokens_in"], limits.TOKENS_MAX)),
        "tokens_out": int(_within(told["tokens_out"], limits.TOKENS_MAX)),
        "model": told["model"][: limits.NAME_CHARS_MAX * 4],
        "finish_reason": told["finish_reason"][: limits.NAME_CHARS_MAX],
    }
