"""Known bugs, put into the product one at a time. The laws must find each of them."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from clawnet import limits
from clawnet.ledger import purse, rules, state, terms
from clawnet.ledger.entries import EntryKind
from clawnet.node import books, chains, context, jobs, leases, locks, pay, relay, results, taking
from clawnet.runtime import Runtime
from clawnet.wire import events as e
from clawnet.wire.messages import Result

Patch = Callable[[Any], Any]
PLANTS: dict[str, Callable[[], Iterator[str]]] = {}
SETTINGS: dict[str, dict[str, Any]] = {
    "key_on_a_poisoned_chain": {"lies": ("poisons",)},
    "release_not_compared": {"lies": ("underpays",)},
    "future_stamps": {"lies": ("refunds_by_a_false_time",)},
    "no_forwarding": {"lies": ("hides_claim",)},
    "margin_without_transit": {"late": True},
}
"""What the world must be like for a bug to come to light, where the usual one is too kind."""


def plant(work: Callable[[], Iterator[str]]) -> Callable[[], Iterator[str]]:
    """A generator that changes the product, yields, and leaves the undoing to `planted`."""
    PLANTS[work.__name__] = work
    return work


_undo: list[tuple[Any, str, Any]] = []


def _replace(where: Any, name: str, make: Patch) -> str:
    """Puts make(original) in the place of where.name, which it gives back."""
    original = getattr(where, name)
    _undo.append((where, name, original))
    setattr(where, name, make(original))
    return name


@contextmanager
def planted(name: str) -> Iterator[None]:
    """While it is open the product has this bug."""
    for _ in PLANTS[name]():
        pass
    try:
        yield
    finally:
        while _undo:
            where, attribute, original = _undo.pop()
            setattr(where, attribute, original)


@plant
def send_before_append() -> Iterator[str]:
    """Messages leave before the transaction that they speak of is committed."""

    def make(original: Any) -> Any:
        def perform(self: Runtime, out: list[e.Effect], handled: list[e.Stimulus]) -> None:
            for effect in out:
                if type(effect) is e.Send and effect.peer != self.me:
                    self.switch.send(effect.peer, [(effect.message, effect.reply_to, effect.obligation)])
            rest = [effect for effect in out if type(effect) is not e.Send or effect.peer == self.me]
            original(self, rest, handled)

        return perform

    yield _replace(Runtime, "_perform", make)


@plant
def reply_before_append() -> Iterator[str]:
    """A submission is answered before its task is on the disk."""

    def make(original: Any) -> Any:
        def perform(self: Runtime, out: list[e.Effect], handled: list[e.Stimulus]) -> None:
            for effect in out:
                if type(effect) is e.Reply and effect.error is None:
                    self._reply(effect)
            rest = [effect for effect in out if type(effect) is not e.Reply or effect.error is not None]
            original(self, rest, handled)

        return perform

    yield _replace(Runtime, "_perform", make)


@plant
def entry_not_synced() -> Iterator[str]:
    """An own entry is committed, but not synced, before it leaves."""
    yield _replace(context.Context, "durable", lambda original: lambda self: None)


@plant
def outbox_not_drained() -> Iterator[str]:
    """What is owed to a peer goes out once; nobody sends it again."""
    _replace(context.Outbox, "peer_up", lambda original: lambda self, peer: None)
    yield _replace(context.Outbox, "timer", lambda original: lambda self: None)


@plant
def outbox_row_forgotten() -> Iterator[str]:
    """An obligation is kept in memory only: a restart forgets it."""

    def make(original: Any) -> Any:
        def put(self: context.Context, table: str, *row: Any) -> None:
            if table != "outbox":
                original(self, table, *row)

        return put

    yield _replace(context.Context, "put", make)


@plant
def timer_not_rearmed() -> Iterator[str]:
    """A task's timer, once it has fired, is not set again for what is due later."""

    def make(original: Any) -> Any:
        def timer(self: leases.Leases, task: Any) -> None:
            arm = leases.Leases.arm
            leases.Leases.arm = lambda self, task: None  # type: ignore[method-assign]
            try:
                original(self, task)
            finally:
                leases.Leases.arm = arm  # type: ignore[method-assign]

        return timer

    yield _replace(leases.Leases, "timer", make)


@plant
def no_dedup() -> Iterator[str]:
    """A repeated award begins anew instead of having its answer repeated."""
    _replace(pay.Pay, "bound", lambda original: lambda self, lock_hash, line: False)
    _replace(taking.Taking, "_objection", lambda original: lambda self, award: "")

    def make(original: Any) -> Any:
        return lambda self, event, identifier: False

    yield _replace(taking.Taking, "_answered", make)


@plant
def retry_of_started_shell() -> Iterator[str]:
    """After a restart of its executor a shell command is simply run again."""

    def make(original: Any) -> Any:
        def resume(self: jobs.Jobs) -> None:
            for job in self.jobs.values():
                job.retries = 1
            original(self)

        return resume

    yield _replace(jobs.Jobs, "resume", make)


@plant
def slot_not_exclusive() -> Iterator[str]:
    """An attempt that has lost the paying slot is paid all the same when its result comes."""

    def make(original: Any) -> Any:
        def stored(self: results.Results, task: Any, attempt: Any, inline: bytes) -> None:
            held, attempt.paying = attempt.paying, attempt.paying or attempt.lock_seq >= 0
            original(self, task, attempt, inline)
            attempt.paying = held

        return stored

    yield _replace(results.Results, "stored", make)


@plant
def release_before_disk() -> Iterator[str]:
    """The receipt is written though the sealed result is in memory only."""

    def make(original: Any) -> Any:
        def put(self: context.Context, table: str, *row: Any) -> None:
            if table != "results":
                original(self, table, *row)

        return put

    yield _replace(context.Context, "put", make)


@plant
def refund_after_receipt() -> Iterator[str]:
    """A released line is still taken for an open one: at its expiry the attempt ends as refunded."""

    def make(original: Any) -> Any:
        def released(self: results.Results, task: Any, attempt: Any, seq: int) -> None:
            original(self, task, attempt, seq)
            attempt.state, attempt.escrow = "accepted", "locked"

        return released

    yield _replace(results.Results, "released", make)


@plant
def refund_without_waiver() -> Iterator[str]:
    """A line is taken back before its expiry without the payee's word, and no book objects."""
    for name, room in sorted(sys.modules.items()):
        if name.startswith("clawnet.ledger") and hasattr(room, "waived"):
            _replace(room, "waived", lambda original: lambda *args: True)

    def make(original: Any) -> Any:
        return lambda self, task, attempt: attempt.lock_seq >= 0 and self._rooms.books.refund(task, attempt, None)

    yield _replace(leases.Leases, "_silence", make)


@plant
def key_before_release() -> Iterator[str]:
    """The executor sends the key along with the sealed result."""

    def make(original: Any) -> Any:
        def deliver(self: pay.Pay, job: Any, event: Any, amount_ucr: int) -> None:
            outbox = self._rooms.outbox
            oblige = outbox.oblige

            def leaky(peer: str, message: Any, about: bytes) -> bytes:
                if job.lock_seq >= 0 and isinstance(message, Result):
                    message = msgspec.structs.replace(message, waiver=self.key_of(job))
                return oblige(peer, message, about)

            outbox.oblige = leaky  # type: ignore[method-assign]
            try:
                original(self, job, event, amount_ucr)
            finally:
                del outbox.oblige

        return deliver

    yield _replace(pay.Pay, "deliver", make)


@plant
def claim_twice() -> Iterator[str]:
    """A claim names every payment twice, and no book's cursor stands in the way."""
    _check(EntryKind.CLAIM, _without_cursors)

    def make(original: Any) -> Any:
        return lambda self, items, now_ms: original(self, [*items, *items], now_ms)

    yield _replace(purse.Purse, "claim", make)


@plant
def no_cursor() -> Iterator[str]:
    """Books keep no cursor: a payment stays claimable, and whoever starts again claims it again."""
    _check(EntryKind.CLAIM, _without_cursors)
    yield _replace(state.Account, "pass_cursor", lambda original: lambda self, payee, cursor: None)


@plant
def balance_after_lock() -> Iterator[str]:
    """Nobody looks at the balance before a lock is written."""
    _replace(purse.Purse, "available_ucr", lambda original: property(lambda self: 10**12))
    _replace(purse.Purse, "_check_standing", lambda original: lambda self, entry: None)
    yield _check(EntryKind.LOCK, _with_plenty)


@plant
def lock_reused() -> Iterator[str]:
    """An open line of the same payee serves for a second task, and the payee does not compare."""
    _replace(taking, "check_lock", lambda original: lambda *args: "")
    _replace(pay.Pay, "bound", lambda original: lambda self, lock_hash, line: False)

    def make(original: Any) -> Any:
        def write(self: locks.Locks, deliver_by_ms: int, expiry_ms: int, members: list[Any]) -> None:
            left, books = [], self._rooms.books
            for task, attempt in members:
                open_lines = books.book.open_lines(self._ctx.account)
                line = next((line for line in open_lines if line.payee == attempt.account), None)
                if line is None:
                    left.append((task, attempt))
                    continue
                attempt.lock_seq, attempt.lock_hash, attempt.line = line.lock_seq, line.lock_hash, line.line
                self._rooms.awards.locked(task, attempt, books.chains.base(attempt.peer))
            if left:
                original(self, deliver_by_ms, expiry_ms, left)

        return write

    yield _replace(locks.Locks, "_write", make)


@plant
def seal_key_of_the_day() -> Iterator[str]:
    """The seal's key depends on more than the wallet and the line: after a restart another one is derived."""

    def make(original: Any) -> Any:
        def key_of(self: pay.Pay, job: Any) -> bytes:
            salt = getattr(self, "_salt", None)
            if salt is None:
                salt = self._ctx.entropy(32)
                self._salt = salt  # type: ignore[attr-defined]
            return hashlib.sha256(original(self, job) + salt).digest()

        return key_of

    yield _replace(pay.Pay, "key_of", make)


@plant
def replay_window_lost() -> Iterator[str]:
    """A restart forgets which relayed statements were taken."""
    yield _replace(relay.Relay, "load", lambda original: lambda self, rows, floor_ms: None)


@plant
def key_on_a_poisoned_chain() -> Iterator[str]:
    """The payee shows its key without auditing the payer's chain up to the release."""
    yield _check(EntryKind.LOCK, _with_plenty)


@plant
def release_not_compared() -> Iterator[str]:
    """The payee shows its key for any release of its line, whatever the amount."""
    yield _replace(books, "check_release", lambda original: lambda *args: "")


@plant
def future_stamps() -> Iterator[str]:
    """Entries stamped far ahead are taken at once."""
    yield _replace(limits, "CLOCK_AHEAD_MS", lambda original: 10**12)


@plant
def margin_without_transit() -> Iterator[str]:
    """A line expires as soon as two clocks 120 s off can both have passed its delivery time, and not a moment later."""
    yield _replace(terms.LedgerTerms, "margin_ms", lambda original: property(lambda self: 240_000))


@plant
def no_forwarding() -> Iterator[str]:
    """Who counts a claim keeps it from its payer, and a payer asks nobody but its payee."""
    _replace(chains.Chains, "forward", lambda original: lambda self, payer, claim, source: None)

    def make(original: Any) -> Any:
        return lambda self, peer, account: self._rooms.members.account_of(peer) == account

    yield _replace(chains.Chains, "_wanted", make)


def _check(kind: EntryKind, make: Patch) -> str:
    """Puts make(original) in the place of the rule for entries of this kind."""
    return _replace(_Rules(), kind.name, make)


class _Rules:
    """The rules of the ledger, by the names of the kinds."""

    def __getattr__(self, name: str) -> Any:
        return rules._CHECKS[EntryKind[name]]

    def __setattr__(self, name: str, value: Any) -> None:
        rules._CHECKS[EntryKind[name]] = value


def _without_cursors(original: Any) -> Any:
    def check(court: Any, account: Any, entry: Any, body: Any) -> Any:
        change = rules.Change()
        for item in body.items:
            account.cursors, kept = {}, account.cursors
            try:
                found = original(court, account, entry, type(body)([item]))
            finally:
                account.cursors = kept
            if not isinstance(found, rules.Change):
                return found
            change.available_ucr += found.available_ucr
            change.claimed_ucr += found.claimed_ucr
            change.consumed += found.consumed
            change.cursors.update(found.cursors)
        return change

    return check


def _with_plenty(original: Any) -> Any:
    def check(court: Any, account: Any, entry: Any, body: Any) -> Any:
        account.available_ucr += 10**15
        try:
            return original(court, account, entry, body)
        finally:
            account.available_ucr -= 10**15

    return check
