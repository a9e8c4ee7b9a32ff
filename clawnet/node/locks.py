"""The locks that a turn owes: one entry for all awards that share their times, within funds, lines and spend limits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clawnet import limits
from clawnet.errors import ClawnetError, FundsError, TimedOutError
from clawnet.ledger.entries import LockLine
from clawnet.market.records import FINAL_STATES, Attempt, Task
from clawnet.money import format_credits
from clawnet.node.context import Context

if TYPE_CHECKING:
    from clawnet.node.books import Books
    from clawnet.node.kernel import Rooms


class Locks:
    """Awards with a price wait here for the end of the turn."""

    def __init__(self, ctx: Context, rooms: Rooms, books: Books) -> None:
        self._ctx = ctx
        self._rooms = rooms
        self._books = books
        self._asked: list[tuple[Task, Attempt]] = []
        self.asked_ucr = 0
        """What this turn is about to lock."""

    def ask(self, task: Task, attempt: Attempt) -> None:
        """A line for this attempt, in this turn's lock entry."""
        self._asked.append((task, attempt))
        self.asked_ucr += attempt.price_ucr

    @property
    def waiting(self) -> bool:
        """Whether this turn has asked for a line."""
        return bool(self._asked)

    def fail(self, error: ClawnetError) -> None:
        """No entry may be written now: the tasks end with the reason."""
        asked, self._asked, self.asked_ucr = self._asked, [], 0
        for task, attempt in asked:
            self._rooms.awards.lock_failed(task, attempt, error)

    def write(self) -> None:
        """Writes what was asked for."""
        groups: dict[tuple[int, int], list[tuple[Task, Attempt]]] = {}
        asked, self._asked, self.asked_ucr = self._asked, [], 0
        for task, attempt in asked:
            if task.state in FINAL_STATES:
                # It was cancelled, or its deadline passed, while the wallet could not be written.
                self._rooms.awards.lock_failed(task, attempt, TimedOutError("the lock came too late"))
                continue
            groups.setdefault((attempt.deliver_by_ms, attempt.expiry_ms), []).append((task, attempt))
        for (deliver_by_ms, expiry_ms), members in groups.items():
            for at in range(0, len(members), limits.LOCK_LINES_MAX):
                self._write(deliver_by_ms, expiry_ms, members[at : at + limits.LOCK_LINES_MAX])

    def _write(self, deliver_by_ms: int, expiry_ms: int, members: list[tuple[Task, Attempt]]) -> None:
        """One entry for the lines that funds, the open-line limit and the spend limits allow; the rest fail."""
        books, rooms = self._books, self._rooms
        allowed = self._allowed(members)
        if not allowed:
            return
        lines = [LockLine(task.task_hash, attempt.account, attempt.price_ucr, 1) for task, attempt in allowed]
        try:
            entry = books.purse.lock(lines, deliver_by_ms, expiry_ms, self._ctx.now)
        except ClawnetError as error:
            for task, attempt in allowed:
                rooms.spending.unlocked(task, attempt)
                rooms.awards.lock_failed(task, attempt, error)
            return
        books.wrote(entry)
        for line, (task, attempt) in enumerate(allowed):
            attempt.lock_seq, attempt.lock_hash, attempt.line = entry.seq, entry.hash, line
            rooms.awards.locked(task, attempt, books.chains.base(attempt.peer))

    def _allowed(self, members: list[tuple[Task, Attempt]]) -> list[tuple[Task, Attempt]]:
        """Those whose line can be written now; each is counted as spent before the next is judged."""
        books, rooms = self._books, self._rooms
        available_ucr = left_ucr = books.purse.available_ucr
        lines = books.terms.open_lines_max - books.book.view(self._ctx.account).open_lines
        allowed: list[tuple[Task, Attempt]] = []
        for task, attempt in members:
            if lines <= 0:
                rooms.awards.no_line(task, attempt)
                continue
            error: ClawnetError | None
            if attempt.price_ucr > left_ucr:
                error = FundsError(
                    f"the bid asks {format_credits(attempt.price_ucr)} credits, "
                    f"{format_credits(available_ucr)} are available",
                    hint="clawnet wallet escrows shows what is bound, and until when",
                )
            else:
                error = rooms.spending.lock(task, attempt)
            if error is not None:
                rooms.awards.lock_failed(task, attempt, error)
                continue
            allowed.append((task, attempt))
            left_ucr -= attempt.price_ucr
            lines -= 1
        return allowed
