"""Who has spent what: the limits of market.spend, asked before every lock and payment, and kept over a restart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

from clawnet.answers_market import time_text
from clawnet.config import Config
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
KIND_ROW: Final = "spent_of:"
"""The same for tasks of one kind: this, the kind, a colon and the credential."""

_WORDS: Final = {"per_task": "a task", "per_day": "a day (UTC)", "open": "in open escrow at once"}


class Spending:
    """A day's total lies in a row written with what it counts; what is open is counted from the tasks at start-up."""

    def __init__(self, ctx: Context, rooms: Rooms) -> None:
        self._ctx = ctx
        self._rooms = rooms
        self._spent: dict[str, Spent] = {}
        self._spent_of: dict[tuple[str, str], Spent] = {}

    # --- keeping

    def load(self, key: str, body: bytes) -> None:
        """Takes in a row of `meta` whose key begins with ROW or KIND_ROW."""
        days = msgspec.msgpack.decode(body, type=dict[int, int])
        if key.startswith(ROW):
            self.of(key.removeprefix(ROW)).days = days
            return
        kind, _, credential = key.removeprefix(KIND_ROW).partition(":")
        self.of_kind(credential, kind).days = days

    def load_task(self, task: Task) -> None:
        """Takes in the open lines of a task at start-up."""
        for attempt in task.attempts:
            if attempt.lock_seq >= 0 and not attempt.refunded:
                for spent in self._both(task):
                    spent.open_ucr += _bound_ucr(attempt)

    def of(self, credential: str) -> Spent:
        """What this credential has spent."""
        spent = self._spent.get(credential)
        if spent is None:
            spent = self._spent[credential] = Spent()
        return spent

    def of_kind(self, credential: str, kind: str) -> Spent:
        """What of it went into tasks of one kind."""
        spent = self._spent_of.get((credential, kind))
        if spent is None:
            spent = self._spent_of[credential, kind] = Spent()
        return spent

    def _both(self, task: Task) -> tuple[Spent, Spent]:
        """What the task's submitter has spent in all, and on tasks of its kind."""
        return self.of(task.credential), self.of_kind(task.credential, task.kind)

    def _save(self, credential: str, kind: str = "") -> None:
        self._ctx.put("meta", ROW + credential, msgspec.msgpack.encode(self.of(credential).days))
        if kind:
            days = self.of_kind(credential, kind).days
            self._ctx.put("meta", f"{KIND_ROW}{kind}:{credential}", msgspec.msgpack.encode(days))

    @property
    def limits(self) -> SpendLimits:
        """What the configuration says now of whatever is spent."""
        return self._ctx.config.derived(_limits_by_kind)[""]

    def limits_of(self, kind: str) -> SpendLimits:
        """What it says now of tasks of one kind; storage and swarm tasks have no limits of their own yet."""
        return self._ctx.config.derived(_limits_by_kind).get(kind) or SpendLimits(kind=kind)

    # --- asking

    def check_submission(self, kind: str, budget_ucr: int, given: bool) -> int:
        """The budget that a task for members may have; raises FundsError for one that was asked for and cannot fit.

        A default budget gives way to the limits of one task; what is open may end before the task needs its lock.
        """
        credential = self._ctx.credential
        pairs = (self.limits, self.of(credential)), (self.limits_of(kind), self.of_kind(credential, kind))
        for limits, spent in pairs:
            if not given:
                budget_ucr = budget_ucr if limits.per_task_ucr is None else min(budget_ucr, limits.per_task_ucr)
                continue
            hit = rule.check_lock(self._ctx.now, limits, Spent(spent.days), 0, budget_ucr)
            if hit is not None:
                raise self.error(hit)
        return budget_ucr

    def capped(self, task: Task, budget_ucr: int) -> int:
        """What of a budget may be offered: a bid above what the limits leave could not be taken."""
        promised_ucr = _promised_ucr(task)
        for limits, spent in self._limits(task):
            left_ucr = rule.left_ucr(self._ctx.now, limits, spent, promised_ucr)
            budget_ucr = budget_ucr if left_ucr is None else min(left_ucr, budget_ucr)
        return budget_ucr

    def _limits(self, task: Task) -> tuple[tuple[SpendLimits, Spent], ...]:
        """The limits that bind a task, each with what counts against it."""
        every, of_kind = self._both(task)
        return (self.limits, every), (self.limits_of(task.kind), of_kind)

    def exhausted(self, task: Task) -> bool:
        """Whether nothing at all may be locked for the task now: members need not be asked."""
        return self.blocked(task, 1) is not None

    def blocked(self, task: Task, amount_ucr: int) -> FundsError | None:
        """The error of a task for which `amount_ucr` more cannot be locked."""
        return self._hit(task, _promised_ucr(task), amount_ucr)

    def _hit(self, task: Task, of_task_ucr: int, amount_ucr: int) -> FundsError | None:
        for limits, spent in self._limits(task):
            hit = rule.check_lock(self._ctx.now, limits, spent, of_task_ucr, amount_ucr)
            if hit is not None:
                return self.error(hit)
        return None

    def error(self, hit: Hit) -> FundsError:
        """Which limit, its value, what is used, what was asked, and how to have more."""
        limit, used = format_credits(hit.limit_ucr), format_credits(hit.used_ucr)
        raised = format_credits(hit.used_ucr + hit.asked_ucr)
        hint = f"clawnet config set {hit.limit} {raised} raises it (none: no limit)"
        if hit.resets_ms:
            hint += f"; the next day begins at {time_text(hit.resets_ms)}"
        elif hit.what == "open":
            hint += "; lines come free as tasks end (clawnet wallet escrows)"
        return FundsError(
            f"{hit.limit} allows {limit} credits {_WORDS[hit.what]}: {used} are used, "
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
        error = self._hit(task, _promised_ucr(task) - attempt.price_ucr, attempt.price_ucr)
        if error is not None:
            return error
        attempt.locked_ms = self._ctx.now
        for spent in self._both(task):
            spent.bind(self._ctx.now, attempt.price_ucr)
            spent.open_ucr += attempt.price_ucr
        self._save(task.credential, task.kind)
        return None

    def unlocked(self, task: Task, attempt: Attempt) -> None:
        """The line was counted and not written after all, or all or the rest of it came back."""
        amount_ucr = _bound_ucr(attempt)
        for spent in self._both(task):
            spent.open_ucr = max(0, spent.open_ucr - amount_ucr)
            if attempt.locked_ms and amount_ucr:
                spent.give_back(attempt.locked_ms, amount_ucr)
        if attempt.locked_ms and amount_ucr:
            self._save(task.credential, task.kind)

    def paid(self, task: Task, attempt: Attempt) -> None:
        """The line, or the part named in the release, is open no longer; it stays spent."""
        for spent in self._both(task):
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
        """Limits, use and rest, for whoever asks: of everything, and of each kind of task."""
        credential = self._ctx.credential
        kinds = [
            {"kind": kind, **self._section(self.limits_of(kind), self.of_kind(credential, kind))} for kind in rule.KINDS
        ]
        return {"credential": credential, **self._section(self.limits, self.of(credential)), "kinds": kinds}

    def _section(self, limits: SpendLimits, spent: Spent) -> dict[str, Any]:
        now_ms = self._ctx.now
        resets = time_text((rule.day_of(now_ms) + 1) * rule.DAY_MS)
        return {
            "per_task": {**_shown(limits.per_task_ucr, 0), "used": None},
            "per_day": {**_shown(limits.per_day_ucr, spent.today_ucr(now_ms)), "resets_at": resets},
            "open": _shown(limits.open_ucr, spent.open_ucr),
        }


def _limits_by_kind(config: Config) -> dict[str, SpendLimits]:
    """The limits of each kind of task; under "" those of whatever is spent."""
    read = config.allowance_ucr
    found = {"": SpendLimits(read(rule.PER_TASK), read(rule.PER_DAY), read(rule.OPEN))}
    for kind in rule.KINDS:
        section = f"market.spend.{kind}"
        found[kind] = SpendLimits(
            read(section + ".per_task"), read(section + ".per_day"), read(section + ".open"), kind
        )
    return found


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
