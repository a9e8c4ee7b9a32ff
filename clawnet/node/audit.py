"""`wallet audit`: chains verified anew from their first entry, read from the database page by page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clawnet import limits
from clawnet.errors import NotFoundError
from clawnet.identity.keys import peer_id_of, verify
from clawnet.ledger.audit import AuditReport, audit_chains
from clawnet.money import format_credits
from clawnet.node.context import Context

if TYPE_CHECKING:
    from clawnet.node.kernel import Rooms


class Audit:
    """One audit in progress: it reads every chain, then judges them together."""

    def __init__(self, ctx: Context, rooms: Rooms, call: int, params: dict[str, Any]) -> None:
        self._ctx = ctx
        self._rooms = rooms
        self._call = call
        self._peer = str(params.get("peer") or "")
        self._only: bytes | None = None
        self._todo: list[bytes] = []
        self._chains: dict[bytes, list[bytes]] = {}
        self._segments: dict[bytes, list[bytes]] = {}
        self._entries = 0

    def start(self) -> None:
        """Reads the first chain; raises NotFoundError for a peer that is not known."""
        if self._peer:
            self._only = self._rooms.members.account_of(self._rooms.members.resolve(self._peer))
            if self._rooms.books.book.head(self._only) is None:
                raise NotFoundError("no entry of that peer's chain is held here", hint="connect to it, then try again")
        self._todo = sorted(self._rooms.books.book.accounts())
        self._next(-1)

    def _next(self, last_seq: int) -> None:
        loads = self._rooms.loads
        if not self._todo:
            self._finish()
            return
        account = self._todo[-1]
        args = (account, last_seq + 1, 2**62, 4 * limits.MIB)
        loads.ask("entries_range", args, lambda rows: self._read(account, rows), call=self._call)

    def _read(self, account: bytes, rows: tuple[Any, ...]) -> None:
        if rows:
            self._chains.setdefault(account, []).extend(row[-1] for row in rows)
            self._entries += len(rows)
            self._next(rows[-1][1])
            return
        self._rooms.loads.ask("segments", (account,), lambda found: self._beside(account, found), call=self._call)

    def _beside(self, account: bytes, rows: tuple[Any, ...]) -> None:
        if rows:
            self._segments[account] = [row[-1] for row in rows]
        self._todo.pop()
        self._next(-1)

    def _finish(self) -> None:
        books = self._rooms.books
        report = audit_chains(books.terms, books.mesh, self._chains, verify, segments=self._segments)
        self._ctx.reply(self._call, self._view(report))

    def _view(self, report: AuditReport) -> dict[str, Any]:
        problems = {problem.account: problem.text for problem in report.problems}
        items = []
        for account, audit in report.accounts.items():
            if self._only is not None and account != self._only:
                continue
            items.append(
                {
                    "account": account.hex(),
                    "peer": self._rooms.views.account_party(account),
                    "entries": audit.entries,
                    "head": audit.head.hex(),
                    "available": format_credits(audit.available_ucr),
                    "locked": format_credits(audit.open_ucr),
                    "ok": account not in problems,
                    "problem": problems.get(account, ""),
                }
            )
        forks = [peer_id_of(a) for a in self._rooms.books.book.accounts() if self._rooms.books.convicted(a)]
        shown = [item for item in items if not item["ok"]]
        return {
            "ok": not shown and (report.conserved or self._only is not None) and not forks,
            "complete": report.conserved and not report.problems,
            "accounts": items,
            "granted": format_credits(report.granted_ucr),
            "available": format_credits(report.available_ucr),
            "locked": format_credits(report.open_ucr),
            "unclaimed": format_credits(report.unclaimed_ucr),
            "forks": forks,
        }
