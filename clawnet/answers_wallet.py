"""The answers about credits: balance, limits, history, escrows, audits, files of the wallet."""

from __future__ import annotations

from typing import Any, Final, Literal

from msgspec import field

from clawnet.answers_market import Answer, EscrowState, Party


class SpendLimit(Answer):
    """One limit of `market.spend`; `limit` and `left` are null when there is none, `used` is null for one of a task."""

    limit: str | None
    used: str | None
    left: str | None
    resets_at: str | None


class SpendKind(Answer):
    """The limits of `market.spend.KIND`, which bind tasks of that kind besides those that bind everything."""

    kind: str
    per_task: SpendLimit
    per_day: SpendLimit
    open: SpendLimit


class Spend(Answer):
    """What `credential`, whoever asks, may spend and has spent; `kinds` tells the same of each kind of task."""

    credential: str
    per_task: SpendLimit
    per_day: SpendLimit
    open: SpendLimit
    kinds: list[SpendKind] = field(default_factory=list)


class Restore(Answer):
    """Why the own chain is read-only until peers have shown what they hold of it (LEDGER.md, crash and recovery).

    `unanswered` are those that have not; `chain_unseen` tells that not even the chain itself is here yet. From
    `override_from` on the owner may do without them.
    """

    reason: str
    since: str
    override_from: str
    unanswered: list[Party]
    chain_unseen: bool


class Balance(Answer):
    """`available` may be spent; `locked` lies in open escrow lines; `incoming` is claimable and not yet claimed."""

    available: str
    locked: str
    incoming: str
    account: str
    mesh: str
    open_lines: int
    spend: Spend
    read_only: str | None = None
    restore: Restore | None = None


class WalletFile(Answer):
    """A backup that was written or restored: whose, from when, up to which entry of the own chain, and its peers.

    `wallet restore --accept-risk` answers as `wallet balance` does.
    """

    peer_id: str
    path: str
    made_at: str
    seq: int | None
    entries: int
    peers: list[Party]
    bytes: int


class EntryTask(Answer):
    """A task that an entry is about: `amount` was locked, released, returned or claimed for this attempt of it."""

    task_id: str
    attempt: int
    amount: str


class HistoryEntry(Answer):
    """One entry of the own chain; `amount` is signed: what it did to `available`.

    An entry may gather the lines of several tasks: `tasks` are those, in full or, where one was asked for, that one;
    `task_id` is the first. Tasks of entries that an older version wrote may be missing.
    """

    seq: int
    kind: str
    at: str
    amount: str
    balance: str
    counterparty: Party | None
    task_id: str | None
    hash: str
    tasks: list[EntryTask] = field(default_factory=list)


class History(Answer):
    """Newest first."""

    items: list[HistoryEntry]
    next: str | None = None


class ExportedEntry(Answer):
    """One line of `wallet export`: an entry of the own chain, or of a payer's chain that proves an income.

    `body` holds the fields of its kind, bytes as hexadecimal digits; `raw_b64` is the entry as signed, with its
    signature behind it (docs/LEDGER.md, which shows how to check it). `amount` and `balance` are of the own chain only.
    """

    chain: Literal["own", "income"]
    account: str
    seq: int
    kind: str
    at: str
    hash: str
    prev: str
    amount: str | None
    balance: str | None
    counterparty: Party | None
    task_id: str | None
    tasks: list[EntryTask]
    body: Any
    raw_b64: str


class Escrow(Answer):
    """A line of a lock of ours (`role` payer) or to us (payee)."""

    id: str
    role: Literal["payer", "payee"]
    state: EscrowState
    amount: str
    counterparty: Party
    task_id: str | None
    locked_at: str
    deliver_by: str
    expires_at: str


class EscrowList(Answer):
    """Open lines, oldest first."""

    items: list[Escrow]
    next: str | None = None


class Sent(Answer):
    """Credits sent: the entry is durable; the payee claims it when it hears of it."""

    to: Party
    amount: str
    seq: int
    hash: str


class AuditedAccount(Answer):
    """One chain, verified from its first entry; `problem` is empty when it is valid."""

    account: str
    peer: Party
    entries: int
    head: str
    available: str
    locked: str
    ok: bool
    problem: str


class AuditReport(Answer):
    """All chains that this node holds. `granted` = available + locked + unclaimed where `complete`."""

    ok: bool
    complete: bool
    accounts: list[AuditedAccount]
    granted: str
    available: str
    locked: str
    unclaimed: str
    forks: list[str] = field(default_factory=list)


WALLET_ANSWERS: Final[dict[str, Any]] = {
    "wallet audit": AuditReport,
    "wallet backup": WalletFile,
    "wallet balance": Balance,
    "wallet escrows": EscrowList,
    "wallet export": ExportedEntry,
    "wallet history": History,
    "wallet restore": WalletFile,
    "wallet send": Sent,
}
