"""Chains between peers: heads, pulls, pushes, keepers, the check of the own head after a start, and fork proofs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clawnet import limits
from clawnet.errors import DataError
from clawnet.ledger.entries import EntryKind, Parsed
from clawnet.ledger.outcomes import Forked, NotYet
from clawnet.node.context import Context
from clawnet.node.restore import Restore
from clawnet.reputation.receipts import Outcome
from clawnet.wire.events import Hangup
from clawnet.wire.messages import Head, LedgerPull, LedgerPush

if TYPE_CHECKING:
    from clawnet.node.books import Books
    from clawnet.node.kernel import Rooms

PULL_AGAIN_MS = 1_000
PULLS_MAX = 1_024
FORWARD_MAX = 1_024
SEQ_MAX = 2**62
SUSPECT_LOOKUPS_MAX = 64


class Chains:
    """What each connected peer holds of the own chain, which pulls are out, and what is owed to third parties."""

    def __init__(self, ctx: Context, rooms: Rooms, books: Books) -> None:
        self._ctx = ctx
        self._rooms = rooms
        self._books = books
        self._held: dict[str, int] = {}
        self._pulls: dict[tuple[str, bytes], int] = {}
        self._forward: dict[tuple[bytes, bytes], bytes] = {}
        self._told_proofs: dict[str, set[bytes]] = {}
        self.checking = False
        self._unchecked: dict[str, None] = {}
        self._suspects: dict[str, tuple[int, int]] = {}
        self._doubted: dict[bytes, int] = {}
        self.restore = Restore(ctx, rooms, books)

    # --- the check after a start (LEDGER.md section 9)

    @property
    def waiting(self) -> bool:
        """True for the seconds in which others are asked whether this chain is whole: what is to be written waits."""
        return self.checking or bool(self._suspects)

    def start_check(self, keepers: list[str]) -> None:
        """Before the first entry after a start every reachable keeper is asked for our own head."""
        self._unchecked = dict.fromkeys(keepers)
        if self._unchecked:
            self.checking = True
            self._ctx.wake(("start_check",), self._ctx.now + limits.START_CHECK_MS)

    def checked(self, peer: str) -> None:
        """This keeper has shown what it holds of our chain (or cannot be reached)."""
        self._unchecked.pop(peer, None)
        if not self._unchecked:
            self.checking = False

    def check_ends(self) -> None:
        """Ten seconds are over: who did not answer is not reachable, who claimed to hold more has not shown it."""
        self.checking = False
        for peer in list(self._suspects):
            self._ctx.log("security", "ledger.head_not_shown", peer=peer)
            self._waited_for(peer)
        self.reconsider()

    def _waited_for(self, peer: str) -> None:
        """This peer is no longer waited for: it has shown entries of the own chain, or claimed for nothing.

        What was claimed for nothing is remembered over links, by owner, so that claims made in turn, by however many
        nodes of one owner, do not hold the wallet: who so often (CLAIMS_BELIEVED) left or took it back, or once showed
        nothing in all its time, is asked but not waited for.
        """
        if peer not in self._suspects:
            return
        before, since_ms = self._suspects.pop(peer)
        if self._own_seq() > before:
            self._doubted.pop(self._doubtful(peer), None)
            return
        long = self._ctx.now >= since_ms + limits.START_CHECK_MS
        who = self._doubtful(peer)
        self._doubted[who] = self._doubted.pop(who, 0) + (limits.CLAIMS_BELIEVED if long else 1)
        while len(self._doubted) > limits.DOUBTED_MAX:
            del self._doubted[next(iter(self._doubted))]

    def _doubtful(self, peer: str) -> bytes:
        """Whose word it is: its owner's, who can have any number of nodes; an own machine answers for itself."""
        record = self._rooms.members.get(peer)
        return record.owner if record is not None and record.ring != "own" else peer.encode()

    def _answered(self, peer: str) -> None:
        """This peer holds nothing of the own chain that is not here."""
        self.checked(peer)
        self._waited_for(peer)
        self.restore.answered(peer)
        self.reconsider()

    def reconsider(self) -> None:
        """Whether the own chain may be written now."""
        if self._books.convicted(self._ctx.account):
            reason = "two histories of this account exist"
        else:
            reason = self._rooms.twins.reason() or self.restore.reason
        self._books.purse.read_only_reason = reason

    def _own_seq(self) -> int:
        head = self._books.book.head(self._ctx.account)
        return -1 if head is None else head[0]

    def _suspect(self, peer: str, head: Head, relation: str) -> None:
        """A peer says that it holds more, or another branch, of this chain: it must show entries signed by us."""
        if peer not in self._suspects and self._doubted.get(self._doubtful(peer), 0) < limits.CLAIMS_BELIEVED:
            self._ctx.log("warn", "ledger.head_ahead", peer=peer, seq=head.seq)
            if not self.waiting:  # else its end stands: a claim more does not put it off
                self._ctx.wake(("start_check",), self._ctx.now + limits.START_CHECK_MS)
            self._suspects[peer] = (self._own_seq(), self._ctx.now)
        if relation == "differs":
            self.pull(peer, self._ctx.account, head.seq, head.seq)
        else:
            self.pull(peer, self._ctx.account)

    def _own_from_peer(self, peer: str, message: LedgerPush) -> None:
        before = self._own_seq()
        self._books.take(peer, message.entries)
        if self._own_seq() >= 0:
            self.restore.chain_shown()
        if self._own_seq() > before:
            self.restore.begin(f"{self._rooms.members.name_of(peer)} held entries of this chain that are not here")
        ahead = any(h.account == self._ctx.account and h.seq > self._own_seq() for h in message.heads)
        if ahead or not message.end:
            self.pull(peer, self._ctx.account)
        else:
            self._answered(peer)

    def keepers(self) -> list[str]:
        """Own machines first, then the inviter, then members known longest: three in all."""
        members = self._rooms.members
        inviter = self._ctx.ids.inner(members.facts.inviter)
        known = [
            record
            for record in members.records.values()
            if record.last_ms and not (record.banned or record.ended or self._rooms.throwaways.holds(record.account))
        ]
        known.sort(key=lambda r: (r.ring != "own", r.peer != inviter, r.first_ms, r.peer))
        return [record.peer for record in known[: limits.KEEPERS]]

    # --- links

    def peer_up(self, peer: str) -> None:
        """Heads and proofs go out."""
        self._held.pop(peer, None)
        heads = [Head(*head) for head in self._books.book.heads_changed_last(limits.HEADS_MAX)]
        own = self._books.book.head(self._ctx.account)
        if own is not None and all(head.account != self._ctx.account for head in heads):
            heads = [Head(self._ctx.account, *own), *heads[: limits.HEADS_MAX - 1]]
        self._ctx.send(peer, LedgerPush(self._ctx.account, [], heads))
        self.restore.peer_up(peer)
        self._bring(peer)
        for account, proof in self._books.book.proofs():
            self._tell_proof(peer, account, proof)

    def peer_down(self, peer: str) -> None:
        """What was on its way may be lost."""
        self._held.pop(peer, None)
        self._told_proofs.pop(peer, None)
        self._waited_for(peer)
        for key in [key for key in self._pulls if key[0] == peer]:
            del self._pulls[key]

    def base(self, peer: str) -> int:
        """The highest own seq that `peer` holds as far as we know; -1: nothing."""
        return self._held.get(peer, -1)

    def sent(self, peer: str, seq: int) -> None:
        """Entries up to `seq` are on their way to a connected peer."""
        if peer in self._ctx.links and seq > self._held.get(peer, -1):
            self._held[peer] = seq

    def push_own(self, peer: str, head_seq: int) -> None:
        """The own entries that a keeper lacks."""
        if self.base(peer) < head_seq:
            entries = self._books.shipping.segment(peer, self.base(peer), head_seq)
            if entries:
                self._ctx.send(peer, LedgerPush(self._ctx.account, entries))

    def gossip_heads(self) -> None:
        """Every minute: heads to one random peer; claims of others to their payers, payments to their payees."""
        ctx = self._ctx
        ctx.wake(("heads",), ctx.now + limits.HEADS_EVERY_MS)
        links = list(ctx.links)
        if links:
            peer = links[self._rooms.members.pick(len(links))]
            heads = [Head(*head) for head in self._books.book.heads_changed_last(limits.HEADS_MAX)]
            ctx.send(peer, LedgerPush(ctx.account, [], heads))
        self._books.countersigns.ask()
        forward, self._forward = self._forward, {}
        for (party, author), raw in forward.items():
            peer_of = self._rooms.members.peer_of(party)
            if peer_of in ctx.links:
                ctx.send(peer_of, LedgerPush(author, [raw], end=False))

    def forward(self, party: bytes, entry: Parsed, source: str) -> None:
        """A claim counted here is sent to its payer once, a plain payment to its payee.

        Within a minute, as it usually has it from its author.
        """
        if self._rooms.members.peer_of(party) != source and len(self._forward) < FORWARD_MAX:
            self._forward[(party, entry.account)] = entry.raw

    def _bring(self, peer: str) -> None:
        """Plain payments of others to this peer that it has not claimed: it may never have met who paid it."""
        payee = self._rooms.members.account_of(peer)
        for payable in self._books.book.incomes(payee):
            if payable.kind == EntryKind.SEND and payable.payer not in (payee, self._ctx.account):
                args = (payable.payer, payable.seq)
                self._rooms.loads.ask("entry", args, lambda rows: self._brought(peer, rows))

    def _brought(self, peer: str, rows: tuple[Any, ...]) -> None:
        for row in rows:
            self._ctx.send(peer, LedgerPush(row[0], [row[-1]], end=False))

    # --- pulling and serving

    def pull(self, peer: str, account: bytes, first: int | None = None, last: int = SEQ_MAX) -> None:
        """Asks for entries of an account; not again within a second."""
        ctx = self._ctx
        head = self._books.book.head(account)
        start = (0 if head is None else head[0] + 1) if first is None else first
        key = (peer, account + start.to_bytes(8, "big"))
        if ctx.now - self._pulls.get(key, -PULL_AGAIN_MS) < PULL_AGAIN_MS or peer not in ctx.links:
            return
        if len(self._pulls) >= PULLS_MAX:
            self._pulls.clear()
        self._pulls[key] = ctx.now
        ctx.send(peer, LedgerPull(account, start, min(last, SEQ_MAX)))

    def missing(self, outcome: NotYet, peer: str) -> None:
        """What an entry waits for is asked of whoever sent it, or read from the own database."""
        if outcome.need in ("gap", "payer", "branch"):
            self.pull(peer, outcome.need_account, outcome.need_from, outcome.need_to)
        elif outcome.need == "lookup":
            self._rooms.loads.ask(
                "entry", (outcome.need_account, outcome.need_from), lambda rows: self._looked_up(rows, peer)
            )
        elif outcome.need == "future":
            self._ctx.wake(("drain",), outcome.retry_at_ms)

    def _looked_up(self, rows: tuple[Any, ...], peer: str) -> None:
        for row in rows:
            try:
                self._books.book.supply(row[-1])
            except DataError as error:
                self._ctx.log("error", "ledger.lookup", reason=error.message)
        self._books.drain(peer)

    def pulled(self, peer: str, message: LedgerPull) -> None:
        """Serves any chain that this node keeps, void segments included."""
        if message.account == self._ctx.account:
            self._rooms.awards.pulled(peer)
        first = message.from_seq
        if message.account == self._ctx.account and first == 0:
            first = self._books.countersigns.show(peer, -1) + 1
        args = (message.account, first, message.to_seq, limits.SEGMENT_BYTES_MAX)
        self._rooms.loads.ask("entries_range", args, lambda rows: self._serve(peer, message, rows))
        if self._books.convicted(message.account):
            self._rooms.loads.ask("segments", (message.account,), lambda rows: self._serve_beside(peer, message, rows))

    def _serve_beside(self, peer: str, message: LedgerPull, rows: tuple[Any, ...]) -> None:
        """The other branch of a forker: who claims on it must be able to show it."""
        part, size = [], 0
        for row in rows:
            size += len(row[-1])
            if message.from_seq <= row[1] <= message.to_seq and size <= limits.SEGMENT_BYTES_MAX:
                part.append(row[-1])
        if part:
            self._ctx.send(peer, LedgerPush(message.account, part))

    def branched(self, account: bytes, peer: str) -> None:
        """Entries off the held chain came in: that branch is judged from where it leaves it, for claims on it."""
        self._read_chain(account, peer, [])

    def _read_chain(self, account: bytes, peer: str, raws: list[bytes]) -> None:
        args = (account, len(raws), SEQ_MAX, limits.MIB)

        def read(rows: tuple[Any, ...]) -> None:
            if rows and rows[0][1] == len(raws):
                raws.extend(row[-1] for row in rows)
                self._read_chain(account, peer, raws)
                return
            missing = self._books.book.check_branch(account, raws, self._ctx.now)
            if missing is not None and missing.need in ("gap", "payer", "branch"):
                self.pull(peer, missing.account, missing.first, missing.last)
            self._books.drain(peer)

        self._rooms.loads.ask("entries_range", args, read)

    def _serve(self, peer: str, message: LedgerPull, rows: tuple[Any, ...]) -> None:
        head = self._books.book.head(message.account)
        last = rows[-1][1] if rows else message.to_seq
        end = head is None or last >= min(head[0], message.to_seq)
        heads = [Head(message.account, *head)] if head is not None else []
        self._ctx.send(peer, LedgerPush(message.account, [row[-1] for row in rows], heads, end=end))
        if message.account == self._ctx.account and rows:
            self.sent(peer, last)

    def pushed(self, peer: str, message: LedgerPush) -> None:
        """Entries, heads and proofs from a peer."""
        books = self._books
        if self._pulls:
            for key in [key for key in self._pulls if key[0] == peer and key[1].startswith(message.account)]:
                del self._pulls[key]
        for proof in message.proofs:
            outcome = books.book.learn_proof(proof)
            if isinstance(outcome, Forked):
                self.forked(outcome)
        if message.account == self._ctx.account and (message.entries or not message.heads):
            self._own_from_peer(peer, message)
        stuck = b""
        if message.account != self._ctx.account and message.entries:
            before = books.book.head(message.account)
            books.take(peer, message.entries)
            if books.book.head(message.account) == before:
                stuck = message.account  # they wait for something else: to ask for the same again would never end
            elif not message.end:
                self.pull(peer, message.account)
        for head in message.heads:
            self._head(peer, head, follow=head.account != stuck)

    def _head(self, peer: str, head: Head, *, follow: bool = True) -> None:
        ctx, book = self._ctx, self._books.book
        if head.account == ctx.account:
            self._own_head(peer, head)
            return
        relation = book.compare_head(head.account, head.seq, head.hash)
        if relation in ("same", "ahead") and self._rooms.members.account_of(peer) != head.account:
            return
        if self._books.convicted(head.account):
            return  # both branches are known of; to ask each other for them would never end
        if relation in ("differs", "lookup"):
            if follow:
                self.pull(peer, head.account, head.seq, head.seq)
        elif relation == "behind":
            if follow and self._wanted(peer, head.account):
                self.pull(peer, head.account)
        else:
            held = book.head(head.account)
            assert held is not None, "a head that is not behind has an account here"
            ctx.send(peer, LedgerPush(head.account, [], [Head(head.account, *held)]))

    def _wanted(self, peer: str, account: bytes) -> bool:
        """Chains worth following before anybody works for them: of whom we paid, who still owes us a line, or whose
        grant we have not seen.

        Where all members fit into the links of a node, every chain that it hears of; in a larger mesh this peer's own,
        if it is held (by its keepers, above all). Any other is asked for when there is work with its author: what a
        node holds and asks for does not grow with the mesh.
        """
        book, members = self._books.book, self._rooms.members
        held = book.head(account) is not None
        own = members.account_of(peer) == account
        if held if own else held and self._rooms.reaching.all_fit:
            return True
        if self._may_pay(account, held):
            return True
        return own and (self._rooms.reaching.all_fit or members.ring_of(peer) == "own")

    def _may_pay(self, account: bytes, held: bool) -> bool:
        """Whether a key, a release, or the grant to this node may be in what is new of that chain."""
        book, me, issuers = self._books.book, self._ctx.account, self._books.terms.issuers
        if book.payables(me, account) or (held and book.exposure_ucr(account, me)):
            return True
        return account in issuers and me not in issuers and book.cursor(me, account) is None

    def _own_head(self, peer: str, head: Head) -> None:
        """What a peer holds of the own chain: less is pushed when it asks; more, or another hash, must be shown."""
        relation = self._books.book.compare_head(self._ctx.account, head.seq, head.hash)
        if relation in ("behind", "differs") and not self._books.convicted(self._ctx.account):
            self._suspect(peer, head, relation)
            return
        self._held[peer] = max(head.seq, self._held.get(peer, -1))
        self._answered(peer)

    # --- forks

    def forked(self, outcome: Forked) -> None:
        """A proof: stored, obeyed, passed on once a peer."""
        ctx = self._ctx
        ctx.put("proofs", outcome.account, outcome.proof)
        if outcome.parsed is not None:
            parsed = outcome.parsed
            ctx.put("segments", parsed.account, parsed.seq, parsed.hash, parsed.raw)
        self.reconsider()
        peer = self._rooms.members.peer_of(outcome.account)
        ctx.log("security", "chain.forked", account=outcome.account.hex()[:16], peer=peer or "")
        ctx.count("forks_total")
        for link in ctx.links:
            if link != peer:
                self._tell_proof(link, outcome.account, outcome.proof)
        if peer is not None and peer != ctx.me:
            self._rooms.members.observe_requester(peer, Outcome.FRAUD)
            self._rooms.jobs.stop_for(outcome.account)
            self._rooms.members.index.remove(peer)
            self.restore.answered(peer)  # it could not do so any more
            ctx.out.append(Hangup(peer, "two histories of one account"))

    def _tell_proof(self, peer: str, account: bytes, proof: bytes) -> None:
        told = self._told_proofs.setdefault(peer, set())
        if account not in told:
            told.add(account)
            self._ctx.send(peer, LedgerPush(account, [], [], [proof]))
