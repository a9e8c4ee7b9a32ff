"""Countersigned checkpoints (LEDGER.md section 10): asked for, given, kept, shown where a chain is too long."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct

from clawnet.errors import NotPermittedError, RemoteError
from clawnet.identity.keys import verify
from clawnet.ledger import checkpoint
from clawnet.ledger.entries import Parsed, parse
from clawnet.ledger.statements import Countersign as Statement
from clawnet.node.context import Context
from clawnet.wire.messages import Countersign

if TYPE_CHECKING:
    from clawnet.node.kernel import Rooms

ASKED_MAX = 8
STATEMENTS_MAX = 4
OFFERS_MAX = 64


class Kept(Struct, array_like=True):
    """The newest own checkpoint: where it stands, the state document it hashes, who has countersigned it."""

    seq: int
    hash: bytes
    document: bytes
    statements: dict[str, bytes]


class Countersigns:
    """The own newest checkpoint with its countersigns, and those that peers have shown of theirs."""

    def __init__(self, ctx: Context, rooms: Rooms) -> None:
        self._ctx = ctx
        self._rooms = rooms
        self.own: Kept | None = None
        self._offered: dict[bytes, tuple[Countersign, str]] = {}
        self._shown: set[str] = set()

    def peer_down(self, peer: str) -> None:
        """What was shown on that connection may be shown again; on one connection once, since it may be refused."""
        self._shown.discard(peer)

    def load(self, body: bytes) -> None:
        """Takes in the stored checkpoint at start-up."""
        self.own = msgspec.msgpack.decode(body, type=Kept)

    def _save(self) -> None:
        if self.own is not None:
            self._ctx.put("meta", "checkpoint", msgspec.msgpack.encode(self.own))

    def written(self, entry: Parsed, document: bytes) -> None:
        """An own checkpoint is in the chain: auditors that others believe are asked to countersign it."""
        self.own = Kept(entry.seq, entry.hash, document, {})
        self._save()
        self.ask()

    def ask(self) -> None:
        """Asks connected issuers and own machines, until some have answered; they must have audited up to there."""
        kept = self.own
        if kept is None or len(kept.statements) >= STATEMENTS_MAX:
            return
        asked = [peer for peer in self._ctx.links if peer not in kept.statements and self._counts(peer)]
        for peer in asked[:ASKED_MAX]:
            self._rooms.books.chains.push_own(peer, kept.seq)
            self._ctx.send(peer, Countersign(self._ctx.account, kept.seq, kept.hash, b""))

    def _counts(self, peer: str) -> bool:
        members = self._rooms.members
        return members.ring_of(peer) == "own" or members.account_of(peer) in self._rooms.books.terms.issuers

    def _auditors(self) -> list[bytes]:
        """Keys whose countersign counts for this node: issuers', and its own machines'."""
        books, members = self._rooms.books, self._rooms.members
        own = [record.account for record in members.records.values() if record.ring == "own"]
        return [key for account in (*books.terms.issuers, *own, self._ctx.account) for key in books.keys_of(account)]

    def message(self, peer: str, message: Countersign) -> None:
        """A request, an answer to ours, or a checkpoint shown to us."""
        if message.state:
            self._offered[message.account] = (message, peer)
            while len(self._offered) > OFFERS_MAX:
                del self._offered[next(iter(self._offered))]
        elif message.statement:
            self._answered(peer, message)
        else:
            self._asked(peer, message)

    def _asked(self, peer: str, message: Countersign) -> None:
        book, ctx = self._rooms.books.book, self._ctx
        if message.account != self._rooms.members.account_of(peer):
            return
        try:
            said = checkpoint.countersign(book, message.account, message.seq, message.hash, ctx.ports.sign)
        except NotPermittedError as error:
            ctx.log("debug", "countersign.refused", peer=peer, reason=error.message)
            return
        ctx.send(peer, Countersign(message.account, message.seq, message.hash, said))

    def _answered(self, peer: str, message: Countersign) -> None:
        kept = self.own
        if kept is None or (message.account, message.seq, message.hash) != (self._ctx.account, kept.seq, kept.hash):
            return
        signers = self._rooms.books.keys_of(self._rooms.members.account_of(peer))
        try:
            said = Statement.verified_by_any(message.statement, signers, verify)
        except RemoteError as error:
            self._ctx.log("security", "countersign.bad", peer=peer, reason=error.message)
            return
        if (said.mesh, said.account, said.seq, said.hash) == (
            self._rooms.books.mesh,
            self._ctx.account,
            kept.seq,
            kept.hash,
        ):
            kept.statements[peer] = message.statement
            self._save()

    # --- starting an audit there

    def show(self, peer: str, known_seq: int) -> int:
        """Shows the checkpoint to a peer that would have to audit too much; returns from which seq on it needs entries.

        `known_seq` is the head of our chain that it holds. An audit is started at a checkpoint only where it is none.
        """
        kept = self.own
        limit = self._ctx.config.integer("ledger.audit_entries_max")
        if kept is None or known_seq >= 0 or not kept.statements or kept.seq < limit or peer in self._shown:
            return known_seq
        self._shown.add(peer)
        for statement in kept.statements.values():
            self._ctx.send(peer, Countersign(self._ctx.account, kept.seq, kept.hash, statement, kept.document))
        return kept.seq - 1

    def offered_seq(self, account: bytes) -> int:
        """Where the checkpoint stands that an account has shown; -1: it has shown none."""
        offer = self._offered.get(account)
        return offer[0].seq if offer is not None else -1

    def adopt(self, entries: list[bytes]) -> list[bytes]:
        """Starts an unknown account at the checkpoint it has shown, if these entries hold it; those after it."""
        if not self._offered or not entries:
            return entries
        books = self._rooms.books
        try:
            first = parse(entries[0])
        except RemoteError:
            return entries
        offer = self._offered.get(first.account)
        if offer is None or books.book.head(first.account) is not None or offer[0].hash != first.hash:
            return entries
        message = offer[0]
        del self._offered[first.account]
        reason = checkpoint.adopt(
            books.book, entries[0], message.state, [message.statement], self._auditors(), [], verify
        )
        if reason:
            self._ctx.log("warn", "checkpoint.refused", account=first.account.hex()[:16], reason=reason)
            return entries
        self._ctx.put("entries", first.account, first.seq, first.hash, first.raw)
        books.snapshot(force=True)
        return entries[1:]
