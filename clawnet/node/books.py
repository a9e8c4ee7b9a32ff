"""The node's ledger: gathers what a turn owes into entries of the own chain, and takes in the chains of others."""

from __future__ import annotations

import contextlib
import hashlib
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from clawnet import limits
from clawnet.errors import ClawnetError, ConfigError, NotPermittedError, SignatureRefused
from clawnet.identity.keys import peer_id_of, verify
from clawnet.ledger.book import Book
from clawnet.ledger.entries import (
    Claim,
    ClaimItem,
    EntryKind,
    Parsed,
    Proof,
    Refund,
    RefundItem,
    ReleaseItem,
    Send,
    Sign,
)
from clawnet.ledger.lockcheck import check_release
from clawnet.ledger.outcomes import Added, Branch, Forked, Invalid, NotYet, Outcome, Rejected, Unauditable
from clawnet.ledger.purse import Purse, claim_item
from clawnet.ledger.state import Payable
from clawnet.ledger.statements import Waiver
from clawnet.ledger.succession import recorded
from clawnet.ledger.terms import LedgerTerms
from clawnet.market.records import Attempt, Job, Task
from clawnet.money import format_credits
from clawnet.node.chains import Chains
from clawnet.node.context import Context
from clawnet.node.countersigns import Countersigns
from clawnet.node.locks import Locks
from clawnet.node.shipping import CLAIM, RELEASE, Shipping
from clawnet.wire.messages import Kind

if TYPE_CHECKING:
    from clawnet.node.kernel import Rooms

SNAPSHOT_EVERY = 512
KEEPERS_MS = 50


class _Release(Struct):
    task: Task
    attempt: Attempt
    item: ReleaseItem


class _Refund(Struct):
    task: Task
    attempt: Attempt
    item: RefundItem


class Books:
    """The own purse and the book of everybody's chains."""

    def __init__(self, ctx: Context, rooms: Rooms, terms: LedgerTerms, mesh: bytes) -> None:
        self._ctx = ctx
        self._rooms = rooms
        self.terms = terms
        self.mesh = mesh
        self.book = Book(terms, mesh, verify)
        self.purse = Purse(self.book, ctx.account, ctx.ports.sign)
        self.chains = Chains(ctx, rooms, self)
        self.countersigns = Countersigns(ctx, rooms)
        self.shipping = Shipping(ctx, rooms, self)
        self.locks = Locks(ctx, rooms, self)
        self._releases: list[_Release] = []
        self._refunds: list[_Refund] = []
        self._claim_from: dict[bytes, None] = {}
        self._gather_ms = 0
        self._since_snapshot = 0
        self._moved: dict[bytes, None] = {}
        self._branched: dict[bytes, None] = {}
        self._push_armed = False

    # --- what others ask

    def available(self) -> int:
        """What can be spent now, less what this turn is about to lock."""
        return self.purse.available_ucr - self.locks.asked_ucr

    def convicted(self, account: bytes) -> bool:
        """A fork is proven against this account."""
        return self.book.proof(account) is not None

    def dead(self, account: bytes) -> bool:
        """No further entry of this account will count (invalid, forked, or beyond this version)."""
        view = self.book.view(account)
        return bool(view.ended or view.forked or view.upgrade)

    def keys_of(self, account: bytes) -> list[bytes]:
        """All keys that ever signed for an account, the present one first: what each of them stated stands."""
        held = recorded(self.book.rotations(account)) or [account]
        shown = self._rooms.successions.keys_of(self._rooms.members.peer_of(account) or peer_id_of(account))
        return max(held, shown, key=len)[::-1]

    # --- start

    def start(self) -> None:
        """Opens the chain of a new account.

        Raises ConfigError when a configured grant is above what the mesh's charter allows.
        """
        if self._ctx.account in self.terms.issuers:
            self._check_grant("mesh.member_grant")
            if not self.purse.opened:
                self._check_grant("market.initial_wallet_balance")
        if self.purse.opened:
            self.claim_all()
            return
        if self._rooms.members.facts.imported:
            self.chains.restore.begin_import()
        else:
            self.open_chain()

    def open_chain(self) -> None:
        """Genesis, and for an issuer the grant to itself and its claim."""
        initial_ucr = self._ctx.config.amount_ucr("market.initial_wallet_balance")
        now = self._ctx.now
        self.wrote(self.purse.genesis(now))
        if self._ctx.account in self.terms.issuers and initial_ucr > 0:
            self.wrote(self.purse.grant(self._ctx.account, initial_ucr, bytes(16), now))
            items = [claim_item(payable, None) for payable in self.book.payables(self._ctx.account, self._ctx.account)]
            self.wrote(self.purse.claim(items, now))

    def _check_grant(self, name: str) -> None:
        if self._ctx.config.amount_ucr(name) > self.terms.grant_max_ucr:
            most = format_credits(self.terms.grant_max_ucr)
            raise ConfigError(
                f"{name} is {self._ctx.config.shown(name)}, and this mesh's charter lets one grant be {most} at most",
                hint=f"set it to {most} or less, or found another mesh in another --home",
            )

    def claim_all(self) -> None:
        """Everything that can be claimed from anybody is."""
        for payable in self.book.incomes(self._ctx.account):
            self._claim_from[payable.payer] = None

    def held_reason(self) -> str:
        """Why no entry may be written now (what is owed waits); "" when it may."""
        if self.purse.read_only_reason:
            return f"the wallet is read-only: {self.purse.read_only_reason}"
        if self._rooms.members.clock_off():
            return self._rooms.members.clock_warning()
        return ""

    # --- gathering

    def release(self, task: Task, attempt: Attempt, item: ReleaseItem) -> None:
        """The receipt for a delivered result, in the next release entry (this turn's, or within GATHER_MS)."""
        self._releases.append(_Release(task, attempt, item))

    def refund(self, task: Task, attempt: Attempt, waiver: bytes | None) -> None:
        """Takes a line back: with the payee's waiver, or at expiry."""
        if any(waiting.attempt is attempt for waiting in self._refunds):
            return
        proof = Proof(1, [waiver, *self._rotations_before(attempt.account, waiver)]) if waiver else None
        self._refunds.append(_Refund(task, attempt, RefundItem(attempt.lock_seq, attempt.line, proof)))

    def _rotations_before(self, account: bytes, waiver: bytes) -> list[bytes]:
        """The rotate entries up to the key that signed this waiver: by them its proof is judged."""
        rotations = self._rooms.successions.rotations_of(self._rooms.members.peer_of(account) or peer_id_of(account))
        rotations = max(rotations, self.book.rotations(account), key=len)
        for count, key in enumerate(recorded(rotations)):
            with contextlib.suppress(SignatureRefused):
                Waiver.verified(waiver, key, verify)
                return rotations[:count]
        return []

    def flush(self) -> None:
        """At the end of a turn: writes the entries that are due."""
        if not (self._releases or self._refunds or self._claim_from or self.locks.waiting) or self.chains.waiting:
            return
        held = self.held_reason()
        if held:
            self.locks.fail(NotPermittedError(held, hint="clawnet doctor tells more"))
            return
        self.locks.write()
        waiting = len(self._releases) + len(self._refunds) + len(self._claim_from)
        if not waiting:
            return
        ctx = self._ctx
        busy = len(self._rooms.tasks.open) + len(self._rooms.jobs.jobs)
        if busy > limits.GATHER_ABOVE_TASKS and waiting < limits.ENTRY_ITEMS_MAX:
            if self._gather_ms == 0 or self._gather_ms > ctx.now + limits.GATHER_MS:
                self._gather_ms = ctx.now + limits.GATHER_MS
                ctx.wake(("gather",), self._gather_ms)
            if ctx.now < self._gather_ms:
                return
        self._gather_ms = 0
        self._write_releases()
        self._write_refunds()
        self._write_claims()

    def _write_releases(self) -> None:
        # A line may have ended by an own entry that was not here while its release waited for the wallet.
        self._releases = [one for one in self._releases if one.attempt.state == "delivering"]
        while self._releases:
            part, self._releases = self._releases[: limits.ENTRY_ITEMS_MAX], self._releases[limits.ENTRY_ITEMS_MAX :]
            entry = self._try(lambda items: self.purse.release(items, self._ctx.now), [one.item for one in part])
            if entry is None:
                self._releases = [*part, *self._releases]
                return
            peers: dict[str, None] = {}
            for one in part:
                self._rooms.results.released(one.task, one.attempt, entry.seq)
                peers[one.attempt.peer] = None
            self.shipping.settle(peers, RELEASE, entry.seq)

    def _write_refunds(self) -> None:
        while self._refunds:
            part, self._refunds = self._refunds[: limits.ENTRY_ITEMS_MAX], self._refunds[limits.ENTRY_ITEMS_MAX :]
            part = [one for one in part if self._refundable(one)]
            if not part:
                continue
            entry = self._try(lambda items: self.purse.refund(items, self._ctx.now), [one.item for one in part])
            if entry is not None:
                for one in part:
                    self._rooms.awards.refunded(one.task, one.attempt, entry.seq)

    def _refundable(self, one: _Refund) -> bool:
        """One bad waiver must not spoil the entry for the others."""
        if self.book.line(self._ctx.account, one.attempt.lock_seq, one.attempt.line) is None:
            self._rooms.awards.refunded(one.task, one.attempt)
            return False
        return self.book.refundable(self._ctx.account, one.item, self._ctx.now)

    def refund_orphans(self) -> None:
        """Expired own lines that no attempt knows of (a restored chain) come back too."""
        ctx = self._ctx
        if self.chains.waiting or self.held_reason():
            return
        lines = self.book.open_lines(ctx.account)
        past = [x for x in lines if x.expiry_ms <= ctx.now and not self._rooms.awards.knows(x.lock_seq, x.line)]
        if past:
            items = [RefundItem(line.lock_seq, line.line, None) for line in past[: limits.ENTRY_ITEMS_MAX]]
            self._try(lambda batch: self.purse.refund(batch, ctx.now), items)

    def _write_claims(self) -> None:
        """Claims for everything that can be claimed now, in claiming order, entry by entry."""
        while self._claim_from:
            payers, self._claim_from = self._claim_from, {}
            items: list[ClaimItem] = []
            jobs: list[Job] = []
            owed: dict[str, None] = {}
            told: dict[str, None] = {}
            for payer in payers:
                for payable in self.book.payables(payer, self._ctx.account):
                    if len(items) >= limits.ENTRY_ITEMS_MAX:
                        self._claim_from[payer] = None
                        break
                    item, job = self._claimable(payable)
                    if item is not None:
                        items.append(item)
                        (told if item.key is None else owed)[self._rooms.members.peer_of(payer) or ""] = None
                    if job is not None:
                        jobs.append(job)
            if not items:
                return
            entry = self._try(lambda batch: self.purse.claim(batch, self._ctx.now), items)
            if entry is None:
                self._claim_from.update(payers)
                return
            self.shipping.claimed(entry.seq, jobs)
            for job in jobs:
                self._rooms.pay.paid(job, entry.seq)
            self.shipping.settle({peer: None for peer in owed if peer and peer != self._ctx.me}, CLAIM, entry.seq)
            for peer in told:
                if peer not in owed and peer in self._ctx.links:
                    self.chains.push_own(peer, entry.seq)

    def _claimable(self, payable: Payable) -> tuple[ClaimItem | None, Job | None]:
        """LEDGER.md section 6, step 7: the key is shown only for a release of this job's note, at its full amount.

        A release that cannot be claimed is passed over: its job was never delivered by us, or it pays too little.
        """
        if payable.kind != EntryKind.RELEASE:
            return claim_item(payable, None), None
        job = self._rooms.pay.released(payable.payer, payable.lock_seq, payable.line)
        if job is None or job.state != "delivered":
            return None, None
        if check_release(self.book, payable, job.amount_ucr, job.key_hash, job.note_hash):
            self._rooms.pay.underpaid(job)
            return None, None
        return claim_item(payable, self._rooms.pay.key_of(job)), job

    def owes(self, payer: bytes, lock_seq: int, line: int) -> bool:
        """Whether a release of this line waits to be claimed."""
        return any(
            payable.kind == EntryKind.RELEASE and (payable.lock_seq, payable.line) == (lock_seq, line)
            for payable in self.book.payables(payer, self._ctx.account)
        )

    def _try(self, write: Any, items: list[Any]) -> Parsed | None:
        """One entry, or a log line when the ledger refuses it now; the caller keeps what it owes."""
        try:
            entry: Parsed = write(items)
        except ClawnetError as error:
            self._ctx.log("error", "ledger.entry_refused", reason=error.message)
            return None
        self.wrote(entry)
        return entry

    def wrote(self, entry: Parsed) -> None:
        """An own entry: durable with this turn, kept at hand, and on its way to the keepers."""
        ctx = self._ctx
        ctx.put("entries", entry.account, entry.seq, entry.hash, entry.raw)
        ctx.put("balances", entry.seq, self.book.view(ctx.account).available_ucr)
        ctx.durable()
        self.shipping.recent.append((entry.seq, entry.raw))
        self._since_snapshot += 1
        if not self._push_armed:
            self._push_armed = True
            ctx.wake(("keepers",), ctx.now + KEEPERS_MS)
        if self.purse.checkpoint_due and entry.kind != EntryKind.CHECKPOINT:
            document = self.book.state_bytes(ctx.account)
            written = self.purse.checkpoint(ctx.now)
            self.wrote(written)
            self.countersigns.written(written, document)

    def push_keepers(self) -> None:
        """Own entries go to the keepers too (LEDGER.md section 9), gathered for KEEPERS_MS."""
        self._push_armed = False
        head = self.book.head(self._ctx.account)
        if head is not None:
            for peer in self.chains.keepers():
                if peer in self._ctx.links:
                    self.chains.push_own(peer, head[0])

    # --- entries of others

    def take(self, peer: str, entries: list[bytes]) -> bool:
        """Judges entries from a peer; what they lack is pulled from it. True when nothing is missing."""
        complete = True
        for raw in self.countersigns.adopt(entries):
            complete = self._outcome(self.book.apply(raw, self._ctx.now), peer) and complete
        self.drain(peer)
        return complete

    def drain(self, peer: str) -> None:
        """Entries set aside may be judgeable now; awards that waited for them are judged."""
        for outcome in self.book.drain(self._ctx.now):
            self._outcome(outcome, peer)
        branched, self._branched = self._branched, {}
        for account in branched:
            self.chains.branched(account, peer)
        moved, self._moved = self._moved, {}
        for account in moved:
            self._rooms.taking.book_moved(account)

    def _outcome(self, outcome: Outcome, peer: str) -> bool:
        ctx = self._ctx
        if isinstance(outcome, Added):
            self._added(outcome, peer)
        elif isinstance(outcome, NotYet):
            self.chains.missing(outcome, peer)
            return False
        elif isinstance(outcome, Invalid):
            self._moved[outcome.account] = None
            ctx.log(
                "security", "chain.invalid", account=outcome.account.hex()[:16], seq=outcome.seq, reason=outcome.text
            )
            ctx.count("chains_refused_total", outcome.reason)
        elif isinstance(outcome, Forked):
            self.chains.forked(outcome)
            if outcome.parsed is not None:
                self._branched[outcome.account] = None
        elif isinstance(outcome, Branch):
            parsed = outcome.parsed
            ctx.put("segments", parsed.account, parsed.seq, parsed.hash, parsed.raw)
            self._branched[parsed.account] = None
        elif isinstance(outcome, Unauditable):
            ctx.log(
                "warn", "chain.unauditable", account=outcome.account.hex()[:16], seq=outcome.seq, reason=outcome.text
            )
        elif isinstance(outcome, Rejected):
            ctx.log("security", "entry.rejected", peer=peer, reason=outcome.reason)
            ctx.count("messages_refused_total", "entry")
        return True

    def _added(self, outcome: Added, peer: str) -> None:
        """A foreign entry counts: it is stored, and what it means for tasks and jobs of this node is done."""
        parsed = outcome.parsed
        ctx = self._ctx
        ctx.put("entries", parsed.account, parsed.seq, parsed.hash, parsed.raw)
        self._since_snapshot += 1
        self._moved[parsed.account] = None
        if parsed.account == ctx.account:
            ctx.put("balances", parsed.seq, self.book.view(ctx.account).available_ucr)
            self.shipping.recent.append((parsed.seq, parsed.raw))
            self.chains.restore.begin(f"{self._rooms.members.name_of(peer)} held entries that are not here")
            self.chains.restore.taken(outcome)
            return
        body = parsed.body
        if isinstance(body, Claim):
            self._claims_seen(parsed, outcome, peer)
        elif isinstance(body, Refund):
            for item in body.items:
                self._rooms.pay.line_ended(parsed.account, item.lock_seq, item.line)
        elif any(payable is not None and payable.payee == ctx.account for payable in outcome.payables):
            self._claim_from[parsed.account] = None
        elif isinstance(body, Send):
            self.chains.forward(body.payee, parsed, peer)

    def _claims_seen(self, parsed: Parsed, outcome: Added, peer: str) -> None:
        """Claims on this account's payments show keys; claims on others' are passed on to their payer once.

        Whoever brought it: a payment that was claimed has arrived, and its payee is no longer owed the news of it.
        """
        foreign: dict[bytes, None] = {}
        author = self._rooms.members.peer_of(parsed.account) or ""
        assert isinstance(parsed.body, Claim)
        keys = {(item.payer, item.seq, item.index): item.key for item in parsed.body.items}
        for payable in outcome.payables:
            if payable is None:
                continue
            if payable.payer != self._ctx.account:
                foreign[payable.payer] = None
                continue
            self._rooms.outbox.settle(Kind.MARKET_SETTLEMENT, author, RELEASE + payable.seq.to_bytes(8, "big"))
            key = keys.get((payable.payer, payable.seq, payable.index))
            if payable.kind == EntryKind.RELEASE and key:
                self._rooms.awards.key_shown(payable.lock_seq, payable.line, key)
        for payer in foreign:
            self.chains.forward(payer, parsed, peer)

    # --- other writes

    def send(self, payee: bytes, amount_ucr: int, memo_hash: bytes) -> Parsed:
        """A plain payment; raises FundsError or NotPermittedError."""
        self._check_writable()
        entry = self.purse.send(payee, amount_ucr, memo_hash, self._ctx.now)
        self.wrote(entry)
        peer = self._rooms.members.peer_of(payee)
        if peer is not None:
            self.shipping.settle({peer: None}, RELEASE, entry.seq)
        return entry

    def rotate(self, new_key: bytes, new_sign: Sign) -> Parsed:
        """Hands the own chain to a new key; raises NotPermittedError while nothing may be written."""
        self._check_writable()
        entry = self.purse.rotate(new_key, new_sign, self._ctx.now)
        self.wrote(entry)
        return entry

    @staticmethod
    def memo_hash(memo: str) -> bytes:
        """How a memo stands on the chain; zeros for none."""
        return hashlib.sha256(b"clawnet/memo/1" + memo.encode()).digest() if memo else bytes(32)

    def grant(self, payee: bytes, amount_ucr: int, invite: bytes) -> None:
        """An issuer's grant to a newcomer."""
        self._check_writable()
        self.wrote(self.purse.grant(payee, amount_ucr, invite, self._ctx.now))

    def _check_writable(self) -> None:
        if self.chains.waiting and not self.chains.restore.reason:
            raise NotPermittedError("the wallet is being checked with its keepers", hint="try again in ten seconds")
        held = self.held_reason()
        if held:
            raise NotPermittedError(held, hint="clawnet doctor tells more")

    # --- snapshots

    def snapshot(self, *, force: bool = False) -> None:
        """Account states, so that a start need not read whole chains: every SNAPSHOT_EVERY entries."""
        if force or self.book.urgent or self._since_snapshot >= SNAPSHOT_EVERY:
            self._since_snapshot = 0
            for account, body in self.book.snapshots():
                self._ctx.put("accounts", account, body)

    def peer_up(self, peer: str) -> None:
        """Tells heads and fork proofs, and asks a keeper for our own chain."""
        self.chains.peer_up(peer)

    def peer_down(self, peer: str) -> None:
        """What was sent on the old connection may not have arrived."""
        self.chains.peer_down(peer)
        self.countersigns.peer_down(peer)

    def pull(self, peer: str, account: bytes) -> None:
        """Asks a peer for what it has of a chain beyond ours."""
        self.chains.pull(peer, account)
