"""The own chain as its owner reads it: what each entry did, with whom, and for which tasks; also of one task alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from clawnet import limits
from clawnet.errors import NotFoundError
from clawnet.ledger.entries import Claim, EntryKind, Grant, Lock, Parsed, Send, parse
from clawnet.money import format_credits
from clawnet.node.context import Context
from clawnet.node.params import Params, integer, task_digits

if TYPE_CHECKING:
    from clawnet.node.kernel import Rooms

PAGE_MAX: Final = 500
OF_TASK_MAX: Final = 256
"""Entries of one task that are read at most: no task has more attempts than ATTEMPTS_MAX, with three entries each."""

Parts = list[tuple[bytes, int, int]]
"""Task, attempt and amount of each line, receipt, return or claim in an entry that belongs to a task."""


class History:
    """Which tasks an entry is about stands in rows beside the chain, which names them by a salted hash alone."""

    def __init__(self, ctx: Context, rooms: Rooms) -> None:
        self._ctx = ctx
        self._rooms = rooms

    # --- writing

    def about(self, seq: int, task_id: bytes, attempt: int, amount_ucr: int) -> None:
        """An own entry locks, releases, takes back or claims this much for an attempt of a task."""
        self._ctx.put("entry_tasks", seq, task_id, attempt, amount_ucr)

    # --- reading

    def page(self, call: int, params: Params) -> None:
        """Entries, newest first; with `task`, those of one task, whether it was submitted here or run here."""
        if params.get("task") is not None:
            self._of_task(call, task_digits(params))
            return
        limit = max(1, min(integer(params, "limit", 20), PAGE_MAX))
        before = integer(params, "after", 0) if params.get("after") not in (None, "") else None
        loads = self._rooms.loads

        def entries(rows: tuple[Any, ...]) -> None:
            loads.ask("balances_page", (before, limit + 1), lambda found: tasks(rows, dict(found)), call=call)

        def tasks(rows: tuple[Any, ...], balances: dict[int, int]) -> None:
            low, high = (rows[-1][1], rows[0][1]) if rows else (0, 0)
            most = limits.ENTRY_TASKS_PAGE_MAX
            loads.ask("entry_tasks", (low, high, most), lambda found: done(rows, balances, found), call=call)

        def done(rows: tuple[Any, ...], balances: dict[int, int], found: tuple[Any, ...]) -> None:
            more = len(rows) == limit
            if len(found) == limits.ENTRY_TASKS_PAGE_MAX:
                # Of the oldest entry reached perhaps not all tasks were read: the next page begins with it.
                rows, more = tuple(row for row in rows if row[1] > found[-1][0]) or rows[:1], True
            about = parts(found)
            items = [self.entry(parse(row[-1]), balances, about.get(row[1], [])) for row in rows]
            more = more and rows[-1][1] > 0
            self._ctx.reply(call, {"items": items, "next": str(rows[-1][1]) if more else None})

        loads.ask("entries_page", (self._ctx.account, before, limit), entries, call=call)

    def _of_task(self, call: int, digits: str) -> None:
        """The entries of the one task whose id begins so; none at all for one that cost nothing."""
        loads = self._rooms.loads

        def entries(rows: tuple[Any, ...]) -> None:
            loads.ask("task_by_prefix", (digits, 9), lambda known: done(rows, known), call=call)

        def done(rows: tuple[Any, ...], known: tuple[Any, ...]) -> None:
            names = sorted({row[4].hex() for row in rows} | {row[0].hex() for row in known})
            if not names:
                raise NotFoundError(f"no task {digits!r}", hint="clawnet wallet history names the tasks of its entries")
            if len(names) > 1:
                shown = ", ".join(name[:12] for name in names[:8])
                raise NotFoundError(f"{digits!r} begins several task ids: {shown}", hint="give more of the id")
            items: dict[int, tuple[Any, Parts]] = {}
            for row in rows:
                items.setdefault(row[1], (row, []))[1].append((row[4], row[5], row[6]))
            told = [
                self.entry(parse(row[3]), {row[1]: row[7], row[1] - 1: row[8]}, about) for row, about in items.values()
            ]
            self._ctx.reply(call, {"items": told, "next": None})

        loads.ask("entries_of_task", (self._ctx.account, digits, OF_TASK_MAX), entries, call=call)

    def entry(self, entry: Parsed, balances: dict[int, int], about: Parts) -> dict[str, Any]:
        """One entry of the own chain: what it did to the available amount, with whom, and for which tasks."""
        body, other, task = entry.body, None, None
        after_ucr = balances.get(entry.seq, 0)
        amount_ucr = after_ucr - balances.get(entry.seq - 1, 0)
        if isinstance(body, (Grant, Send)):
            other = body.payee
        elif isinstance(body, Lock):
            other, task = body.lines[0].payee, self._rooms.tasks.task_of_hash(body.lines[0].task)
        elif isinstance(body, Claim):
            other = body.items[0].payer
        return {
            "seq": entry.seq,
            "kind": EntryKind(entry.kind).name.lower(),
            "at": self._rooms.views.time(entry.time_ms),
            "amount": format_credits(amount_ucr),
            "balance": format_credits(after_ucr),
            "counterparty": None if other is None else self._rooms.views.account_party(other),
            "task_id": about[0][0].hex() if about else task,
            "tasks": [
                {"task_id": task_id.hex(), "attempt": attempt, "amount": format_credits(part_ucr)}
                for task_id, attempt, part_ucr in about
            ],
            "hash": entry.hash.hex(),
        }


def parts(rows: tuple[Any, ...]) -> dict[int, Parts]:
    """Rows of `entry_tasks` by the entry that they are about."""
    found: dict[int, Parts] = {}
    for seq, task_id, attempt, amount_ucr in rows:
        found.setdefault(seq, []).append((task_id, attempt, amount_ucr))
    return found
