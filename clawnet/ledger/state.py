"""What a book remembers of one account: the state that its chain adds up to, and the payments it still owes keys for.

Bodies are not kept: heads, balances, open lines, cursors and unclaimed payables are.
"""

from __future__ import annotations

from hashlib import sha256
from typing import Annotated, Final

import msgspec
from msgspec import Meta, Struct

from clawnet.errors import DataError, WireError
from clawnet.ledger.entries import ZERO_HASH, Bytes32, EntryKind, Parsed

STATE_TAG: Final = b"clawnet/state/1"
HASHES_KEPT: Final = 256
HASHES_IN_SNAPSHOT: Final = 64
STATE_BYTES_MAX: Final = 512 * 1024

LineKey = tuple[int, int]
"""(lock_seq, line)"""
Place = tuple[int, int]
"""(seq, index) of a payment on its payer's chain"""


class Line(Struct, array_like=True, gc=False):
    """An open line of a lock; only `left_ucr` and `parts_done` ever change."""

    lock_seq: int
    line: int
    lock_hash: bytes
    task: bytes
    payee: bytes
    amount_ucr: int
    left_ucr: int
    parts: int
    parts_done: int
    deliver_by_ms: int
    expiry_ms: int
    time_ms: int

    @property
    def key(self) -> LineKey:
        """Where the line is on its payer's chain."""
        return (self.lock_seq, self.line)


class Payable(Struct, frozen=True, array_like=True, gc=False):
    """A payment that its payee can claim: a grant, a send, or a release (then `key_hash` and the fields after it)."""

    payer: bytes
    payee: bytes
    seq: int
    index: int
    hash: bytes
    kind: int
    amount_ucr: int
    key_hash: bytes | None = None
    note_hash: bytes | None = None
    lock_seq: int = 0
    line: int = 0
    part: int = 0
    task: bytes | None = None

    @property
    def place(self) -> Place:
        """The cursor's view of it."""
        return (self.seq, self.index)


class HashTail:
    """The newest entry hashes of one chain, 32 bytes each, in one buffer."""

    __slots__ = ("_buffer", "_first")

    def __init__(self, first: int = 0, hashes: bytes = b"") -> None:
        self._first = first
        self._buffer = bytearray(hashes)

    def append(self, entry_hash: bytes) -> None:
        """The next entry's hash; the oldest ones are forgotten in blocks."""
        self._buffer += entry_hash
        if len(self._buffer) >= 64 * HASHES_KEPT:
            del self._buffer[: 32 * HASHES_KEPT]
            self._first += HASHES_KEPT

    def get(self, seq: int) -> bytes | None:
        """The hash at `seq`, or None when it is no longer (or not yet) kept."""
        at = 32 * (seq - self._first)
        if at < 0 or at >= len(self._buffer):
            return None
        return bytes(self._buffer[at : at + 32])

    def newest(self, count: int) -> tuple[int, bytes]:
        """(seq of the first, concatenated hashes) of the newest `count`."""
        kept = min(count, len(self._buffer) // 32)
        return self._first + len(self._buffer) // 32 - kept, bytes(self._buffer[len(self._buffer) - 32 * kept :])


class Account:
    """The state of one chain in one book, at the head that this book holds."""

    __slots__ = (
        "account",
        "available_ucr",
        "base_seq",
        "branch",
        "checkpoint_seq",
        "claimed_ucr",
        "cursors",
        "ended",
        "ended_reason",
        "good_seq",
        "granted",
        "hash",
        "issued_ucr",
        "key",
        "lines",
        "open_ucr",
        "opening_ucr",
        "paid_ucr",
        "payables",
        "released",
        "rotations",
        "seq",
        "spilled_seq",
        "suspect",
        "tail",
        "time_ms",
        "unclaimed",
        "upgrade",
        "void_ucr",
    )

    def __init__(self, account: bytes) -> None:
        self.account = account
        self.key = account
        self.seq = -1
        self.hash = ZERO_HASH
        self.time_ms = 0
        self.available_ucr = 0
        """By section 5, voids not subtracted: the amount that validity and checkpoints speak of."""
        self.opening_ucr = 0
        self.issued_ucr = 0
        self.granted: set[bytes] = set()
        self.lines: dict[LineKey, Line] = {}
        self.open_ucr = 0
        self.cursors: dict[bytes, Place] = {}
        self.rotations: list[tuple[int, bytes, bytes]] = []
        """(seq, new key, raw) of every rotate entry, from the first."""
        self.paid_ucr = 0
        """Grants, sends and releases written."""
        self.claimed_ucr = 0
        """Claims that count in this book."""
        self.void_ucr = 0
        """Claims on branches that this book does not hold."""
        self.payables: dict[bytes, dict[Place, Payable]] = {}
        self.released: dict[tuple[int, int, int], Payable] = {}
        """Unclaimed releases by (lock_seq, line, part)."""
        self.unclaimed = 0
        self.spilled_seq = -1
        """Payables up to this seq may be missing from memory; they are looked up when a claim names one."""
        self.base_seq = 0
        """Where the audit began: 0, or a countersigned checkpoint."""
        self.checkpoint_seq = 0
        self.tail = HashTail()
        self.ended: Parsed | None = None
        self.ended_reason = ""
        self.upgrade = ""
        self.suspect = ""
        """Why two branches of this chain must exist, before there is a proof to show."""
        self.good_seq = -1
        """The head at that moment: releases up to it were in this book before, and stay good."""
        self.branch: dict[bytes, Parsed] = {}
        """Entries off the held branch, by hash: evidence, never counted."""

    @property
    def head_available_ucr(self) -> int:
        """What it can spend as this book sees it: void income is a debt at the head."""
        return self.available_ucr - self.void_ucr

    def key_at(self, seq: int) -> bytes:
        """The key that signs the entry at `seq` of the held branch."""
        key = self.account
        for rotated_seq, new_key, _ in self.rotations:
            if rotated_seq >= seq:
                break
            key = new_key
        return key

    def distrust(self, why: str) -> None:
        """Notes the first sign of a second branch."""
        if not self.suspect:
            self.suspect = why
            self.good_seq = self.seq

    def add_payable(self, payable: Payable) -> None:
        """Remembers a payment until its payee's cursor passes it."""
        self.payables.setdefault(payable.payee, {})[(payable.seq, payable.index)] = payable
        self.unclaimed += 1
        if payable.kind == EntryKind.RELEASE:
            self.released[(payable.lock_seq, payable.line, payable.part)] = payable

    def pass_cursor(self, payee: bytes, cursor: Place) -> None:
        """Forgets the payables to `payee` up to its cursor: claimed, or forfeited by being skipped."""
        waiting = self.payables.get(payee)
        if waiting is None:
            return
        while waiting:
            place = next(iter(waiting))
            if place > cursor:
                return
            self._forget(waiting, place)
        del self.payables[payee]

    def spill(self, count_max: int) -> None:
        """Drops the oldest payables beyond `count_max` from memory; they stay claimable."""
        if self.unclaimed <= count_max:
            return
        places = sorted((place, payee) for payee, waiting in self.payables.items() for place in waiting)
        for place, payee in places[: self.unclaimed - count_max // 2]:
            self._forget(self.payables[payee], place)
            self.spilled_seq = max(self.spilled_seq, place[0])
            if not self.payables[payee]:
                del self.payables[payee]

    def _forget(self, waiting: dict[Place, Payable], place: Place) -> None:
        payable = waiting.pop(place)
        self.unclaimed -= 1
        if payable.kind == EntryKind.RELEASE:
            self.released.pop((payable.lock_seq, payable.line, payable.part), None)


class StateDocument(Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a checkpoint hashes (docs/LEDGER.md section 4), everything in a fixed order."""

    key: Bytes32
    available_ucr: Annotated[int, Meta(ge=0)]
    issued_ucr: Annotated[int, Meta(ge=0)]
    granted: list[Bytes32]
    lines: list[Line]
    cursors: list[tuple[Bytes32, int, int]]


_ENCODER = msgspec.msgpack.Encoder()
_STATE_DECODER = msgspec.msgpack.Decoder(StateDocument)


def state_bytes(state: Account) -> bytes:
    """The state document of an account at its head: a function of its chain alone, equal in every book."""
    return _ENCODER.encode(
        StateDocument(
            state.key,
            state.available_ucr,
            state.issued_ucr,
            sorted(state.granted),
            [state.lines[key] for key in sorted(state.lines)],
            sorted((payer, seq, index) for payer, (seq, index) in state.cursors.items()),
        )
    )


def state_hash(document: bytes) -> bytes:
    """What a checkpoint entry states."""
    return sha256(STATE_TAG + document).digest()


def read_state(document: bytes) -> StateDocument:
    """Raises WireError for anything that is not a state document."""
    if len(document) > STATE_BYTES_MAX:
        raise WireError(f"a state document of {len(document)} bytes")
    try:
        return _STATE_DECODER.decode(document)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise WireError(f"not a state document: {error}") from error


class _Snapshot(Struct, frozen=True, array_like=True):
    version: int
    account: bytes
    key: bytes
    seq: int
    hash: bytes
    time_ms: int
    available_ucr: int
    opening_ucr: int
    issued_ucr: int
    granted: list[bytes]
    lines: list[Line]
    cursors: dict[bytes, Place]
    rotations: list[tuple[int, bytes, bytes]]
    paid_ucr: int
    claimed_ucr: int
    void_ucr: int
    payables: list[Payable]
    spilled_seq: int
    base_seq: int
    checkpoint_seq: int
    tail_first: int
    tail: bytes
    ended: bytes
    ended_reason: str
    upgrade: str
    suspect: str
    good_seq: int
    branch: list[bytes]


SNAPSHOT_VERSION: Final = 1
_SNAPSHOT_DECODER = msgspec.msgpack.Decoder(_Snapshot)


def encode_snapshot(state: Account) -> bytes:
    """Everything of one account's state, for this node's own database."""
    first, tail = state.tail.newest(HASHES_IN_SNAPSHOT)
    return _ENCODER.encode(
        _Snapshot(
            SNAPSHOT_VERSION,
            state.account,
            state.key,
            state.seq,
            state.hash,
            state.time_ms,
            state.available_ucr,
            state.opening_ucr,
            state.issued_ucr,
            sorted(state.granted),
            list(state.lines.values()),
            state.cursors,
            state.rotations,
            state.paid_ucr,
            state.claimed_ucr,
            state.void_ucr,
            [payable for waiting in state.payables.values() for payable in waiting.values()],
            state.spilled_seq,
            state.base_seq,
            state.checkpoint_seq,
            first,
            tail,
            state.ended.raw if state.ended is not None else b"",
            state.ended_reason,
            state.upgrade,
            state.suspect,
            state.good_seq,
            [entry.raw for entry in state.branch.values()],
        )
    )


def decode_snapshot(data: bytes) -> tuple[Account, bytes, list[bytes]]:
    """(state, raw of the entry that ended the chain or b"", raws of the void branch).

    Raises DataError when the database holds something else (it is this node's own, so that is damage).
    """
    try:
        kept = _SNAPSHOT_DECODER.decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise DataError(f"a ledger snapshot in the database cannot be read: {error}") from error
    if kept.version != SNAPSHOT_VERSION:
        raise DataError(f"a ledger snapshot in the database has the unknown version {kept.version}")
    state = Account(kept.account)
    state.key = kept.key
    state.seq = kept.seq
    state.hash = kept.hash
    state.time_ms = kept.time_ms
    state.available_ucr = kept.available_ucr
    state.opening_ucr = kept.opening_ucr
    state.issued_ucr = kept.issued_ucr
    state.granted = set(kept.granted)
    state.lines = {line.key: line for line in kept.lines}
    state.open_ucr = sum(line.left_ucr for line in kept.lines)
    state.cursors = kept.cursors
    state.rotations = kept.rotations
    state.paid_ucr = kept.paid_ucr
    state.claimed_ucr = kept.claimed_ucr
    state.void_ucr = kept.void_ucr
    for payable in kept.payables:
        state.add_payable(payable)
    state.spilled_seq = kept.spilled_seq
    state.base_seq = kept.base_seq
    state.checkpoint_seq = kept.checkpoint_seq
    state.tail = HashTail(kept.tail_first, kept.tail)
    state.ended_reason = kept.ended_reason
    state.upgrade = kept.upgrade
    state.suspect = kept.suspect
    state.good_seq = kept.good_seq
    return state, kept.ended, kept.branch
