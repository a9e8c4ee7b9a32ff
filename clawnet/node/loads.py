"""Reads of the database that a step asks for, and who goes on with the rows in a later one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from clawnet.errors import ClawnetError
from clawnet.node.context import Context
from clawnet.wire.events import Load, Loaded


class Loads:
    """Reads of the database in progress: who goes on with the rows when they come."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._waiting: dict[int, tuple[Callable[[tuple[Any, ...]], None], int, str]] = {}
        self._next = 0

    def ask(self, query: str, args: tuple[Any, ...], then: Callable[[tuple[Any, ...]], None], call: int = 0) -> None:
        """Reads rows; `then` goes on with them in a later turn. Errors of `then` answer `call` when there is one."""
        self._next += 1
        self._waiting[self._next] = (then, call, self._ctx.credential)
        self._ctx.out.append(Load((self._next,), query, args))

    def loaded(self, event: Loaded) -> None:
        """The rows are here."""
        then, call, self._ctx.credential = self._waiting.pop(event.request[0])
        try:
            then(event.rows)
        except ClawnetError as error:
            if not call:
                raise
            self._ctx.fail(call, error)
