"""Entries that somebody asks for while the own chain is still being checked: they wait, and are written then."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from clawnet import limits
from clawnet.errors import BusyError
from clawnet.node.context import Context

if TYPE_CHECKING:
    from clawnet.node.kernel import Rooms


class Writes:
    """What waits for the check after a start (LEDGER.md section 9), in the order it came."""

    def __init__(self, ctx: Context, rooms: Rooms) -> None:
        self._ctx = ctx
        self._rooms = rooms
        self._held: dict[tuple[Any, ...], Callable[[], None]] = {}

    def once_checked(self, name: tuple[Any, ...], write: Callable[[], None]) -> None:
        """Calls `write` at once, or when the check is over. Raises BusyError when too many wait already."""
        if not self._rooms.books.chains.waiting:
            write()
            return
        if len(self._held) >= limits.HELD_WRITES_MAX:
            raise BusyError("the wallet is being checked with its keepers", hint="try again in ten seconds")
        self._held[name] = write

    def drop(self, name: tuple[Any, ...]) -> None:
        """Whoever asked for it has gone: it is not written."""
        self._held.pop(name, None)

    def flush(self) -> None:
        """At the end of a turn: writes what waited, once nothing stands in its way."""
        if self._held and not self._rooms.books.chains.waiting:
            held, self._held = self._held, {}
            for write in held.values():
                write()
