"""What a node saw of a task it was party to (Receipt), and what each outcome says of the other side (EFFECTS)."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from msgspec import Struct

ON_TIME_FACTOR: Final = 1.5
ON_TIME_GRACE_S: Final = 1.0
"""A run is on time up to its promise x 1.5 + 1 s: a promise is an estimate, not a contract to the millisecond."""


class Role(StrEnum):
    """In which part the other side is judged. Kept apart: paying well for small tasks buys no name as a worker."""

    EXECUTOR = "executor"
    REQUESTER = "requester"


class Outcome(StrEnum):
    """How a task ended for us. A provider's fault counts; a task's own fault (TASK_FAULT, CANCELLED) does not."""

    SETTLED = "settled"
    LATE = "late"
    FAILED = "failed"
    LOST = "lost"
    REJECTED = "rejected"
    KEY_WITHHELD = "key_withheld"
    BAD_RESULT = "bad_result"
    TASK_FAULT = "task_fault"
    CANCELLED = "cancelled"
    PAID = "paid"
    RECEIPT_REFUSED = "receipt_refused"
    UNDERPAID = "underpaid"
    BAD_LOCK = "bad_lock"
    FRAUD = "fraud"


class Receipt(Struct, frozen=True, gc=False):
    """One observation of `peer`: `promised_s` and `confidence` are its bid's, `actual_s` what the run took."""

    peer: str
    outcome: Outcome
    at_ms: int
    promised_s: float = 0.0
    actual_s: float = 0.0
    confidence: float = 0.0

    @property
    def within_promise(self) -> bool:
        """Whether it took no longer than promised, with the grace of ON_TIME_FACTOR and ON_TIME_GRACE_S."""
        return self.actual_s <= self.promised_s * ON_TIME_FACTOR + ON_TIME_GRACE_S


class Effect(Struct, frozen=True, gc=False):
    """What an outcome adds to each factor: 1 good, 0 bad, None nothing. `disputed`: 1 a broken promise about money or
    result, 0 a clean ending. `tests_confidence`: whether it shows if the bid's confidence held."""

    role: Role
    completion: int | None = None
    on_time: int | None = None
    accuracy: int | None = None
    disputed: int | None = None
    tests_confidence: bool = False
    meaning: str = ""


_E, _R = Role.EXECUTOR, Role.REQUESTER
EFFECTS: Final[dict[Outcome, Effect]] = {
    Outcome.SETTLED: Effect(_E, 1, 1, 1, 0, True, "delivered before the deadline, opened, accepted"),
    Outcome.LATE: Effect(_E, 0, 0, None, 0, True, "let the deadline pass without a result"),
    Outcome.FAILED: Effect(_E, 0, None, None, 0, True, "gave the task back by its own fault (crash, limit, shutdown)"),
    Outcome.LOST: Effect(_E, 0, 0, None, 0, True, "fell silent beyond its lease, or never answered the award"),
    Outcome.REJECTED: Effect(_E, 0, None, None, 0, False, "bid, and then refused the award"),
    Outcome.KEY_WITHHELD: Effect(_E, 0, None, None, 1, True, "was paid and kept the key"),
    Outcome.BAD_RESULT: Effect(_E, 1, None, 0, 1, True, "delivered what does not open or does not pass its contract"),
    Outcome.TASK_FAULT: Effect(_E, meaning="the task itself could not succeed: nobody's reputation moves"),
    Outcome.CANCELLED: Effect(_E, meaning="the requester cancelled: nobody's reputation moves"),
    Outcome.PAID: Effect(_R, 1, 1, 1, 0, False, "released what was agreed"),
    Outcome.RECEIPT_REFUSED: Effect(_R, 0, 0, None, 1, False, "took the sealed result and never released"),
    Outcome.UNDERPAID: Effect(_R, 0, None, 0, 1, False, "released less than agreed, or for another key"),
    Outcome.BAD_LOCK: Effect(_R, 0, None, 0, None, False, "sent an award whose lock is not good"),
    Outcome.FRAUD: Effect(_E, disputed=1, meaning="signed two histories: proven, counts in both roles, never fades"),
}

_TASK_FAULTS: Final = frozenset(
    ("wall_limit", "memory_limit", "disk_limit", "output_limit", "fuel_limit", "contract", "bad_input")
)


def outcome_of_waiver(reason: str) -> Outcome:
    """What a task handed back after it had started says of its executor, by the reason given (TASK_WAIVER).

    A limit that the run hit, or a contract it failed, is the task's fault by the executor's word alone: it earns and
    costs nothing. Any other reason is the executor's own fault.
    """
    if reason == "cancelled":
        return Outcome.CANCELLED
    return Outcome.TASK_FAULT if reason in _TASK_FAULTS else Outcome.FAILED
