"""Who has spent what: the limits of market.spend, asked before every lock and payment, and kept over a restart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

from clawnet.answers_market import time_text
from clawnet.errors import FundsError
from clawnet.market import spending as rule
from clawnet.market.records import Attempt, Task
from clawnet.market.spending import Hit, SpendLimits, Spent
from clawnet.money import format_credits
from clawnet.node.context import Context

if TYPE_CHECKING:
    from clawnet.node.kernel import Rooms

ROW: Final = "spent:"
"""Row keys of `meta`: this and the credential; the value maps UTC days to micro-credits."""

_WORDS: Final = {
    rule.PER_TASK: "a task",
    rule.PER_DAY: "a day (UTC)",
    rule.OPEN: "in open escrow at once",
}


class Spending:
    """A day's total lies in a row written with what it counts; what is open is counted from the tasks at start-up."""

    def __init__(self, ctx: Context, rooms: Rooms) -> None:
        self._ctx = ctx
        self._rooms = rooms
        self._spent: dict[str, Spent] = {}

    # --- keeping

    def load(self, key: str, body: bytes) -> None:
        """Takes in a row of `meta` whose key begins with ROW."""
        self.of(key.removeprefix(ROW)).days = msgspec.msgpack.decode(body, type=dict[int, int])

    def load_task(self, task: Task) -> None:
        """Takes in the open lines of a task at start-up."""
        for attempt in task.attempts:
            if attempt.lock_seq >= 0 and not attempt.refunded:
                self.of(task.credential).open_ucr += _bound_ucr(attempt)

    def of(self, credential: str) -> Spent:
        """What this credential has spent."""
        spent = self._spent.get(credential)
        if spent is None:
            spent = self._spent[credential] = Spent()
        return spent

    def _save(self, credential: str) -> None:
        self._ctx.put("meta", ROW + credential, msgspec.msgpack.encode(self.of(credential).days))

    @property
    def limits(self) -> SpendLimits:
        """What the configuration says now."""
        read = self._ctx.config.allowance_ucr
        return SpendLimits(read(rule.PER_TASK), read(rule.PER_DAY), read(rule.OPEN))

    # --- asking

    def check_submission(self, budget_ucr: int, given: bool) -> int:
        """The budget that a task for members may have; raises FundsError for one that was asked for and cannot fit.

        A default budget gives way to the limit of one task; what is open may end before the task needs its lock.
        """
        limits, spent = self.limits, self.of(self._ctx.credential)
        if not given:
            return budget_ucr if limits.per_task_ucr is None else min(budget_ucr, limits.per_task_ucr)
        hit = rule.check_lock(self._ctx.now, limits, Spent(spent.days), 0, budget_ucr)
        if hit is not None:
            raise self.error(hit)
        return budget_ucr

    def capped(self, task: Task, budget_ucr: int) -> int:
        """What of a budget may be offered: a bid above what the limits leave could not be taken."""
        left_ucr = rule.left_ucr(self._ctx.now, self.limits, self.of(task.credential), _promised_ucr(task))
        return budget_ucr if left_ucr is None else min(left_ucr, budget_ucr)

    def exhausted(self, task: Task) -> bool:
        """Whether nothing at all may be locked for the task now: members need not be asked."""
        return self.blocked(task, 1) is not None

    def blocked(self, task: Task, amount_ucr: int) -> FundsError | None:
        """The error of a task for which `amount_ucr` more cannot be locked."""
        hit = rule.check_lock(self._ctx.now, self.limits, self.of(task.credential), _promised_ucr(task), amount_ucr)
        return None if hit is None else self.error(hit)

    def error(self, hit: Hit) -> FundsError:
        """Which limit, its value, what is used, what was asked, and how to have more."""
        limit, used = format_credits(hit.limit_ucr), format_credits(hit.used_ucr)
        raised = format_credits(hit.used_ucr + hit.asked_ucr)
        hint = f"clawnet config set {hit.limit} {raised} raises it (none: no limit)"
        if hit.resets_ms:
            hint += f"; the next day begins at {time_text(hit.resets_ms)}"
        elif hit.limit == rule.OPEN:
            hint += "; lines come free as tasks end (clawnet wallet escrows)"
        return FundsError(
            f"{hit.limit} allows {limit} credits {_WORDS[hit.limit]}: {used} are used, "
            f"{format_credits(hit.asked_ucr)} were asked for",
            hint=hint,
            limit=hit.limit,
            limit_credits=limit,
            used_credits=used,
            asked_credits=format_credits(hit.asked_ucr),
        )

    # --- what happens

    def lock(self, task: Task, attempt: Attempt) -> FundsError | None:
        """Counts the line of this attempt, or says which limit forbids it."""
        now_ms, spent = self._ctx.now, self.of(task.credential)
        others_ucr = _promised_ucr(task) - attempt.price_ucr
        hit = rule.check_lock(now_ms, self.limits, spent, others_ucr, attempt.price_ucr)
        if hit is not None:
            return self.error(hit)
        attempt.locked_ms = now_ms
        spent.bind(now_ms, attempt.price_ucr)
        spent.open_ucr += attempt.price_ucr
        self._save(task.credential)
        return None

    def unlocked(self, task: Task, attempt: Attempt) -> None:
        """The line was counted and not written after all, or all or the rest of it came back."""
        amount_ucr = _bound_ucr(attempt)
        spent = self.of(task.credential)
        spent.open_ucr = max(0, spent.open_ucr - amount_ucr)
        if attempt.locked_ms and amount_ucr:
            spent.give_back(attempt.locked_ms, amount_ucr)
            self._save(task.credential)

    def paid(self, task: Task, attempt: Attempt) -> None:
        """The line, or the part named in the release, is open no longer; it stays spent."""
        spent = self.of(task.credential)
        spent.open_ucr = max(0, spent.open_ucr - attempt.released_ucr)

    def check_payment(self, credential: str, amount_ucr: int) -> None:
        """Raises FundsError for a payment that the day's limit forbids."""
        hit = rule.check_send(self._ctx.now, self.limits, self.of(credential), amount_ucr)
        if hit is not None:
            raise self.error(hit)

    def payment(self, credential: str, amount_ucr: int) -> None:
        """A payment was written."""
        self.of(credential).bind(self._ctx.now, amount_ucr)
        self._save(credential)

    # --- showing

    def view(self) -> dict[str, Any]:
        """Limits, use and rest, for whoever asks."""
        now_ms, limits, spent = self._ctx.now, self.limits, self.of(self._ctx.credential)
        resets = time_text((rule.day_of(now_ms) + 1) * rule.DAY_MS)
        return {
            "credential": self._ctx.credential,
            "per_task": {**_shown(limits.per_task_ucr, 0), "used": None},
            "per_day": {**_shown(limits.per_day_ucr, spent.today_ucr(now_ms)), "resets_at": resets},
            "open": _shown(limits.open_ucr, spent.open_ucr),
        }


def _shown(limit_ucr: int | None, used_ucr: int) -> dict[str, Any]:
    return {
        "limit": None if limit_ucr is None else format_credits(limit_ucr),
        "used": format_credits(used_ucr),
        "left": None if limit_ucr is None else format_credits(max(0, limit_ucr - used_ucr)),
        "resets_at": None,
    }


def _bound_ucr(attempt: Attempt) -> int:
    """What of an attempt's line is neither paid nor refunded."""
    return attempt.price_ucr - (attempt.released_ucr if attempt.released_seq >= 0 else 0)


def _promised_ucr(task: Task) -> int:
    """What may yet be paid for a task, or was: lines of attempts that lost their slot come back."""
    return sum(a.released_ucr or a.price_ucr for a in task.attempts if a.paying or a.released_seq >= 0)
