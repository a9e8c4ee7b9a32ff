"""What a book holds, and every question that can be put to it. Judging is book.py's."""

from __future__ import annotations

from collections.abc import Iterator

from clawnet import limits
from clawnet.ledger.entries import Claim, Parsed, parse
from clawnet.ledger.outcomes import AccountView, Totals
from clawnet.ledger.state import (
    Account,
    Line,
    Payable,
    Place,
    decode_snapshot,
    encode_snapshot,
    state_bytes,
    state_hash,
)
from clawnet.ledger.terms import LedgerTerms


class Records:
    """The accounts of one mesh as one node sees them, and the proofs against some of them."""

    def __init__(self, terms: LedgerTerms, mesh: bytes) -> None:
        self.terms = terms
        self.mesh = mesh
        self.urgent = False
        """Something happened that the entries alone do not tell (a void, an end, a fork): snapshot this turn."""
        self._accounts: dict[bytes, Account] = {}
        self._changed: dict[bytes, None] = {}
        self._dirty: dict[bytes, None] = {}
        self._proofs: dict[bytes, bytes] = {}
        self._branch_bytes = 0

    def _next_seq(self, account: bytes) -> int:
        state = self._accounts.get(account)
        return 0 if state is None else state.seq + 1

    def _of(self, account: bytes) -> Account:
        return self._accounts.get(account) or self._new(account)

    def _new(self, account: bytes) -> Account:
        """A chain that begins here: where its author is known to have forked, nothing of it was here before that."""
        state = Account(account)
        if account in self._proofs:
            state.distrust("a fork was proven before anything of the chain was here")
        return state

    def _note(self, state: Account, *, urgent: bool) -> None:
        account = state.account
        self._accounts[account] = state
        self._changed.pop(account, None)
        self._changed[account] = None
        self._dirty[account] = None
        self.urgent = self.urgent or urgent

    def has_room(self) -> bool:
        """Whether one more account can be held."""
        return len(self._accounts) < limits.ACCOUNTS_MAX

    def proof(self, account: bytes) -> bytes | None:
        """The fork proof against an account, if there is one."""
        return self._proofs.get(account)

    def proofs(self) -> list[tuple[bytes, bytes]]:
        """(account, proof) of every fork that is proven."""
        return list(self._proofs.items())

    def condemned(self) -> set[bytes]:
        """Accounts whose chain has ended here, or against which a fork is proven."""
        return {*self._proofs, *(account for account, state in self._accounts.items() if state.ended is not None)}

    def head(self, account: bytes) -> tuple[int, bytes] | None:
        """(seq, hash) of the newest entry held, or None."""
        state = self._accounts.get(account)
        return None if state is None or state.seq < 0 else (state.seq, state.hash)

    entry_pos = head

    def view(self, account: bytes) -> AccountView:
        """The account at its head; seq is -1 for one that this book does not know."""
        state = self._of(account)
        forked = account in self._proofs
        refuse = ""
        if forked or state.suspect:
            refuse = "forked"
        elif state.seq < 0:
            refuse = "unknown"
        elif state.ended is not None:
            refuse = "invalid"
        elif state.upgrade:
            refuse = "upgrade"
        elif state.head_available_ucr < 0:
            refuse = "debt"
        return AccountView(
            account,
            state.seq,
            state.hash,
            state.key,
            state.time_ms,
            state.head_available_ucr,
            state.open_ucr,
            len(state.lines),
            state.issued_ucr,
            state.void_ucr,
            state.base_seq,
            state.checkpoint_seq,
            forked,
            state.good_seq,
            state.ended_reason if state.ended is not None else "",
            f"cannot audit beyond seq {state.seq}, upgrade ({state.upgrade})" if state.upgrade else "",
            refuse,
        )

    def accounts(self) -> Iterator[bytes]:
        """Every account held, in no particular order."""
        return iter(self._accounts)

    def line(self, account: bytes, lock_seq: int, line: int) -> Line | None:
        """An open line; None when it never was, is paid out, or was refunded."""
        state = self._accounts.get(account)
        return None if state is None else state.lines.get((lock_seq, line))

    def open_lines(self, account: bytes) -> list[Line]:
        """All open lines of a payer, oldest first."""
        state = self._accounts.get(account)
        return [] if state is None else list(state.lines.values())

    def exposure_ucr(self, payer: bytes, payee: bytes) -> int:
        """What is left in the payer's open lines for this payee."""
        return sum(line.left_ucr for line in self.open_lines(payer) if line.payee == payee)

    def payables(self, payer: bytes, payee: bytes) -> list[Payable]:
        """Payments of `payer` that `payee` can still claim, in claiming order."""
        state = self._accounts.get(payer)
        waiting = state.payables.get(payee) if state is not None else None
        return [] if waiting is None else list(waiting.values())

    def incomes(self, payee: bytes) -> list[Payable]:
        """Everything that `payee` can still claim, from all payers; a walk over all accounts, for start-up."""
        return [payable for account in self._accounts for payable in self.payables(account, payee)]

    def find_release(self, payer: bytes, lock_seq: int, line: int, part: int) -> Payable | None:
        """The release of this part, while it is not claimed."""
        state = self._accounts.get(payer)
        return None if state is None else state.released.get((lock_seq, line, part))

    def cursor(self, payee: bytes, payer: bytes) -> Place | None:
        """The last payment of `payer` that `payee` has claimed."""
        state = self._accounts.get(payee)
        return None if state is None else state.cursors.get(payer)

    def rotations(self, account: bytes) -> list[bytes]:
        """The account's rotate entries: what a handshake under its present key shows."""
        state = self._accounts.get(account)
        return [] if state is None else [raw for _, _, raw in state.rotations]

    def compare_head(self, account: bytes, seq: int, entry_hash: bytes) -> str:
        """A peer's head against this book: "same", "behind" (pull), "ahead" (push), "differs", "lookup"."""
        state = self._accounts.get(account)
        if state is None or seq > state.seq:
            return "behind"
        held = state.hash if seq == state.seq else state.tail.get(seq)
        if held is None:
            return "lookup"
        if held != entry_hash:
            return "differs"
        return "same" if seq == state.seq else "ahead"

    def segment_needs(self, claim: Parsed) -> list[tuple[bytes, int, int]]:
        """(payer, first seq, last seq) of the foreign entries that this book lacks to judge a claim."""
        needs: dict[bytes, tuple[int, int]] = {}
        if isinstance(claim.body, Claim):
            for item in claim.body.items:
                held = self._next_seq(item.payer) - 1
                if item.payer != claim.account and item.seq > held:
                    needs[item.payer] = (held + 1, max(item.seq, needs.get(item.payer, (0, 0))[1]))
        return [(payer, first, last) for payer, (first, last) in needs.items()]

    def heads_changed_last(self, count: int) -> list[tuple[bytes, int, bytes]]:
        """(account, seq, hash) of the chains that changed last, newest first."""
        heads: list[tuple[bytes, int, bytes]] = []
        for account in reversed(self._changed):
            if len(heads) >= count:
                break
            state = self._accounts[account]
            if state.seq >= 0:
                heads.append((account, state.seq, state.hash))
        return heads

    def conservation(self) -> Totals:
        """Both sides of the equation of section 5 over everything held; `conserved` is a law of every book.

        It speaks of chains audited from genesis (AccountView.base_seq 0).
        """
        available = opened = unclaimed = granted = 0
        for state in self._accounts.values():
            available += state.head_available_ucr
            opened += state.open_ucr
            unclaimed += state.paid_ucr - state.claimed_ucr
            granted += state.issued_ucr + state.opening_ucr
        return Totals(available, opened, unclaimed, granted)

    # --- what a checkpoint states, and what start-up reads

    def state_bytes(self, account: bytes) -> bytes:
        """The state document at the account's head."""
        return state_bytes(self._of(account))

    def state_hash(self, account: bytes) -> bytes:
        """What a checkpoint written now would state."""
        return state_hash(self.state_bytes(account))

    def snapshots(self) -> list[tuple[bytes, bytes]]:
        """(account, snapshot) of every account that changed since the last call. Write them in one transaction."""
        taken = [(account, encode_snapshot(self._accounts[account])) for account in self._dirty]
        self._dirty = {}
        self.urgent = False
        return taken

    def snapshot(self, account: bytes) -> bytes:
        """One account's state as it is now."""
        return encode_snapshot(self._of(account))

    def restore(self, snapshot: bytes) -> int:
        """Takes an account back from its snapshot and returns its seq: apply later entries with `trusted`.

        Accounts may come in any order; a payment that its payee had claimed by its own snapshot is forgotten here.
        """
        state, ended, branch = decode_snapshot(snapshot)
        if ended:
            state.ended = parse(ended)
        for raw in branch:
            entry = parse(raw)
            state.branch[entry.hash] = entry
            self._branch_bytes += len(raw)
        self.install(state)
        self._dirty.pop(state.account, None)
        return state.seq

    def install(self, state: Account) -> None:
        """Takes in an account state that was established elsewhere: a snapshot, or a countersigned checkpoint."""
        account = state.account
        self._note(state, urgent=False)
        for payee in list(state.payables):
            claimant = self._accounts.get(payee)
            if claimant is not None and account in claimant.cursors:
                state.pass_cursor(payee, claimant.cursors[account])
        for payer, cursor in state.cursors.items():
            held = self._accounts.get(payer)
            if held is not None:
                held.pass_cursor(account, cursor)

    def holds(self, account: bytes, seq: int, entry_hash: bytes) -> bool:
        """Whether the held chain has this very entry there, as far back as memory goes."""
        state = self._accounts.get(account)
        return state is not None and state.tail.get(seq) == entry_hash
