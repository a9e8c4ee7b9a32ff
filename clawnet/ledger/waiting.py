"""Entries that cannot be judged yet, kept aside within bounds, and what each of them waits for."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from msgspec import Struct

from clawnet import limits
from clawnet.ledger.entries import Parsed
from clawnet.ledger.rules import Missing


class Waiting(Struct, frozen=True, gc=False):
    """One entry set aside. `key` is the key under which its signature was verified."""

    entry: Parsed
    key: bytes
    missing: Missing | None


class Aside:
    """At most NOT_YET_ENTRIES_MAX entries and NOT_YET_BYTES_MAX bytes, of at most a quarter of that per account."""

    def __init__(
        self, entries_max: int = limits.NOT_YET_ENTRIES_MAX, bytes_max: int = limits.NOT_YET_BYTES_MAX
    ) -> None:
        self._entries_max = entries_max
        self._bytes_max = bytes_max
        self._entries: dict[bytes, dict[int, Waiting]] = {}
        self._bytes: dict[bytes, int] = {}
        self._count = 0
        self._bytes_all = 0
        self._awaited: dict[bytes, dict[bytes, None]] = {}
        self._timed: list[tuple[int, bytes]] = []

    def __len__(self) -> int:
        return self._count

    def get(self, account: bytes, seq: int) -> Waiting | None:
        """What is kept for this place."""
        return self._entries.get(account, {}).get(seq)

    def holds(self, account: bytes) -> bool:
        """Whether anything is kept of this account."""
        return account in self._entries

    def keep(self, waiting: Waiting) -> bool:
        """Sets an entry aside; False when there is no room for it (it must come again)."""
        entry = waiting.entry
        held = self._entries.setdefault(entry.account, {})
        old = held.get(entry.seq)
        if old is None:
            size = len(entry.raw)
            if (
                self._count >= self._entries_max
                or self._bytes_all + size > self._bytes_max
                or len(held) >= self._entries_max // 4
                or self._bytes.get(entry.account, 0) + size > self._bytes_max // 4
            ):
                if not held:
                    del self._entries[entry.account]
                return False
            self._count += 1
            self._bytes_all += size
            self._bytes[entry.account] = self._bytes.get(entry.account, 0) + size
        held[entry.seq] = waiting
        if waiting.missing is not None:
            self._awaited.setdefault(waiting.missing.account, {})[entry.account] = None
        return True

    def keep_until(self, waiting: Waiting, at_ms: int) -> bool:
        """Sets aside an entry from the future."""
        old = self.get(waiting.entry.account, waiting.entry.seq)
        if old is not None and old.missing == waiting.missing:
            return True
        if not self.keep(waiting):
            return False
        heapq.heappush(self._timed, (at_ms, waiting.entry.account))
        return True

    def take(self, account: bytes, seq: int) -> Waiting | None:
        """Removes what is kept for this place, and anything before it."""
        held = self._entries.get(account)
        if held is None:
            return None
        found: Waiting | None = None
        for old in [kept for kept in held if kept <= seq]:
            waiting = held.pop(old)
            self._count -= 1
            self._bytes_all -= len(waiting.entry.raw)
            self._bytes[account] -= len(waiting.entry.raw)
            if old == seq:
                found = waiting
        if not held:
            del self._entries[account]
            del self._bytes[account]
        return found

    def drop(self, account: bytes) -> None:
        """Forgets everything of an account whose chain has ended."""
        held = self._entries.get(account)
        if held:
            self.take(account, max(held))

    def waiting_for(self, account: bytes) -> Iterator[bytes]:
        """Accounts whose next entry waits for this one's chain; they stop waiting by being named."""
        yield from self._awaited.pop(account, ())

    def due(self, now_ms: int) -> Iterator[bytes]:
        """Accounts whose next entry came from the future that is now."""
        while self._timed and self._timed[0][0] <= now_ms:
            yield heapq.heappop(self._timed)[1]
