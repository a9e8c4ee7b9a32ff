"""Spend limits: what a credential may bind for one task, in a UTC day, and at once. Pure; the time is an argument.

A credential is whoever asks as the node itself knows it (the user behind the local socket, by the kernel's word), never
a name that a caller gives itself. Credits count when they are locked or sent, and what is refunded no longer counts on
the day of its lock. A day's total never passes its limit, whatever the clock does: spending dated later than now (the
clock was set back) counts as today's.
"""

from __future__ import annotations

from typing import Final

from msgspec import Struct, field

DAY_MS: Final = 86_400_000
DAYS_KEPT: Final = 32

SECTION: Final = "market.spend."
PER_TASK: Final = "market.spend.per_task"
PER_DAY: Final = "market.spend.per_day"
OPEN: Final = "market.spend.open"
KINDS: Final = ("shell", "compute", "prompt")


class SpendLimits(Struct, frozen=True):
    """The limits of one credential in micro-credits; None is no limit, 0 is nothing at all.

    `kind` is that of the tasks they bind; "" for those that bind whatever is spent.
    """

    per_task_ucr: int | None = None
    per_day_ucr: int | None = None
    open_ucr: int | None = None
    kind: str = ""

    def name(self, limit: str) -> str:
        """The configuration key of a limit: market.spend.per_day, or market.spend.shell.per_day."""
        return SECTION + (self.kind and self.kind + ".") + limit.removeprefix(SECTION)


class Spent(Struct):
    """What one credential has bound: by UTC day (less what came back), and what lies in open lines now."""

    days: dict[int, int] = field(default_factory=dict)
    open_ucr: int = 0

    def today_ucr(self, now_ms: int) -> int:
        """What counts against the limit of the day that `now_ms` lies in."""
        today = day_of(now_ms)
        return sum(amount_ucr for day, amount_ucr in self.days.items() if day >= today)

    def bind(self, now_ms: int, amount_ucr: int) -> None:
        """Credits leave what may be spent: a line that is locked, or a payment."""
        today = day_of(now_ms)
        self.days[today] = self.days.get(today, 0) + amount_ucr
        for day in [day for day in self.days if day < today - DAYS_KEPT]:
            del self.days[day]

    def give_back(self, bound_ms: int, amount_ucr: int) -> None:
        """Credits bound at `bound_ms` came back: the day of that lock has spent less."""
        day = day_of(bound_ms)
        if day in self.days:
            self.days[day] = max(0, self.days[day] - amount_ucr)


class Hit(Struct, frozen=True):
    """A limit that an amount would pass: which, its value, what is used of it, and what was asked for.

    `limit` is its configuration key; `kind` the only kind of tasks that it binds, if it is one of those.
    """

    limit: str
    limit_ucr: int
    used_ucr: int
    asked_ucr: int
    resets_ms: int = 0
    kind: str = ""

    @property
    def what(self) -> str:
        """The last word of the key: per_task, per_day or open."""
        return self.limit.rpartition(".")[2]

    @property
    def left_ucr(self) -> int:
        """What it still allows."""
        return max(0, self.limit_ucr - self.used_ucr)


def day_of(at_ms: int) -> int:
    """The number of the UTC day."""
    return at_ms // DAY_MS


def check_lock(now_ms: int, limits: SpendLimits, spent: Spent, of_task_ucr: int, amount_ucr: int) -> Hit | None:
    """What limit a lock of `amount_ucr` would pass, for a task that has `of_task_ucr` promised or paid already."""
    if limits.per_task_ucr is not None and of_task_ucr + amount_ucr > limits.per_task_ucr:
        return Hit(limits.name(PER_TASK), limits.per_task_ucr, of_task_ucr, amount_ucr, kind=limits.kind)
    if limits.open_ucr is not None and spent.open_ucr + amount_ucr > limits.open_ucr:
        return Hit(limits.name(OPEN), limits.open_ucr, spent.open_ucr, amount_ucr, kind=limits.kind)
    return check_send(now_ms, limits, spent, amount_ucr)


def check_send(now_ms: int, limits: SpendLimits, spent: Spent, amount_ucr: int) -> Hit | None:
    """What limit a payment would pass; it is no task and leaves no line open, so the day's limit alone bounds it."""
    used_ucr = spent.today_ucr(now_ms)
    if limits.per_day_ucr is not None and used_ucr + amount_ucr > limits.per_day_ucr:
        resets_ms = (day_of(now_ms) + 1) * DAY_MS
        return Hit(limits.name(PER_DAY), limits.per_day_ucr, used_ucr, amount_ucr, resets_ms, limits.kind)
    return None


def left_ucr(now_ms: int, limits: SpendLimits, spent: Spent, of_task_ucr: int) -> int | None:
    """The largest lock that every limit still allows; None without any limit."""
    left = []
    if limits.per_task_ucr is not None:
        left.append(limits.per_task_ucr - of_task_ucr)
    if limits.per_day_ucr is not None:
        left.append(limits.per_day_ucr - spent.today_ucr(now_ms))
    if limits.open_ucr is not None:
        left.append(limits.open_ucr - spent.open_ucr)
    return max(0, min(left)) if left else None
