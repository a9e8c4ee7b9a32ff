"""`wallet export`: pages of a chain with every field decoded and the bytes as signed, for eyes outside the mesh."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from clawnet import limits
from clawnet.errors import DataError
from clawnet.ledger.entries import Parsed, parse
from clawnet.money import format_credits
from clawnet.node.context import Context
from clawnet.node.history import Parts, parts
from clawnet.node.params import Params, integer

if TYPE_CHECKING:
    from clawnet.node.kernel import Rooms

SEQ_MAX = 2**62


class Export:
    """One page: entries of an account from a sequence number on, with balances where the account is our own."""

    def __init__(self, ctx: Context, rooms: Rooms, call: int, params: Params) -> None:
        self._ctx = ctx
        self._rooms = rooms
        self._call = call
        text = str(params.get("account") or ctx.account.hex())
        try:
            self._account = bytes.fromhex(text)
        except ValueError:
            raise DataError(f"{text!r} is no account: 64 hexadecimal digits are needed") from None
        self._from = max(0, integer(params, "from", 0))
        self._to = min(integer(params, "to", SEQ_MAX), SEQ_MAX)

    def start(self) -> None:
        """Reads the entries, then what the account could spend after each."""
        args = (self._account, self._from, self._to, limits.EXPORT_PAGE_BYTES)
        self._rooms.loads.ask("entries_range", args, self._entries, call=self._call)

    def _entries(self, rows: tuple[Any, ...]) -> None:
        if not rows or self._account != self._ctx.account:
            self._reply(rows, {}, {})
            return
        args = (rows[-1][1] + 1, len(rows) + 1)
        loads = self._rooms.loads
        loads.ask("balances_page", args, lambda found: self._tasks(rows, dict(found)), call=self._call)

    def _tasks(self, rows: tuple[Any, ...], balances: dict[int, int]) -> None:
        args = (rows[0][1], rows[-1][1], limits.EXPORT_PAGE_BYTES)  # no item of an entry is as short as a byte
        loads = self._rooms.loads
        loads.ask("entry_tasks", args, lambda found: self._reply(rows, balances, parts(found)), call=self._call)

    def _reply(self, rows: tuple[Any, ...], balances: dict[int, int], about: dict[int, Parts]) -> None:
        head = self._rooms.books.book.head(self._account)
        last = min(self._to, -1 if head is None else head[0])
        items = [self._item(parse(row[-1]), row[-1], balances, about.get(row[1], [])) for row in rows]
        following = rows[-1][1] + 1 if rows and rows[-1][1] < last else None
        self._ctx.reply(self._call, {"items": items, "next": following, "last": last})

    def _item(self, entry: Parsed, raw: bytes, balances: dict[int, int], about: Parts) -> dict[str, Any]:
        own = self._account == self._ctx.account
        told = self._rooms.history.entry(entry, balances, about)
        after_ucr = balances.get(entry.seq)
        return {
            "chain": "own" if own else "income",
            "account": self._account.hex(),
            "seq": entry.seq,
            "kind": told["kind"],
            "at": told["at"],
            "hash": entry.hash.hex(),
            "prev": entry.prev.hex(),
            "amount": told["amount"] if own else None,
            "balance": None if after_ucr is None else format_credits(after_ucr),
            "counterparty": told["counterparty"],
            "task_id": told["task_id"],
            "tasks": told["tasks"],
            "body": plain(entry.body),
            "raw_b64": base64.b64encode(raw).decode(),
        }


def plain(value: Any) -> Any:
    """A body as JSON has it: structs as objects, bytes as hexadecimal digits."""
    if isinstance(value, Struct):
        return {name: plain(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
