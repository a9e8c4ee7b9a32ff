"""Which submissions wait for a person's word before anybody is asked (market.approve), and whose word counts. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from msgspec import Struct

from clawnet.money import format_credits

LOCAL: Final = "local"
USER: Final = "uid:"


class Hold(Struct, frozen=True):
    """The threshold that a budget passes: its configuration key, its value, and the budget."""

    limit: str
    limit_ucr: int
    budget_ucr: int

    @property
    def text(self) -> str:
        """Why the task waits."""
        budget, limit = format_credits(self.budget_ucr), format_credits(self.limit_ucr)
        return f"its budget of {budget} credits is above {self.limit}, which is {limit}"


def check(budget_ucr: int, thresholds: Mapping[str, int | None]) -> Hold | None:
    """The lowest of some thresholds, if the budget is above it; a threshold of None holds nothing."""
    passed = [(limit_ucr, key) for key, limit_ucr in thresholds.items() if limit_ucr is not None]
    if not passed:
        return None
    limit_ucr, key = min(passed)
    return Hold(key, limit_ucr, budget_ucr) if budget_ucr > limit_ucr else None


def held_until(now_ms: int, timeout_ms: int, deadline_ms: int) -> int:
    """When a held task has waited long enough: its deadline counts from its submission, held or not."""
    return min(now_ms + timeout_ms, deadline_ms)


def may_approve(credential: str) -> bool:
    """Whether this credential is a user at this machine's own socket, by the kernel's word; nobody else may say yes."""
    return credential == LOCAL or credential.startswith(USER)
