"""The window against replay of relayed statements (gossip, peer info): what was seen is known until it is too old.

Batches need none of this: a session and a sequence number place each of them. A relayed statement carries its author's
own id and time, so it is refused when seen before, older than MESSAGE_AGE_MS, or older than what a full window forgot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from heapq import heapify, heappop, heappush

from clawnet import limits
from clawnet.errors import MessageTooOld, RateLimited

Seen = tuple[int, str, bytes]
"""Time (ms), author, id: one row of the window as it is stored."""


class ReplayWindow:
    """Takes each (author, statement id) once. One author fills a share of it at most, and flushes out no other.

    Neither do all authors of one group (`group_of`: whoever can make as many authors as he likes is one).
    """

    def __init__(
        self,
        ids_max: int = limits.REPLAY_WINDOW_MAX,
        author_share: int = 16,
        group_max: int = limits.REPLAY_OF_OWNER_MAX,
    ) -> None:
        self._ids_max = ids_max
        self._author_max = max(1, ids_max // author_share)
        self._group_max = group_max
        self._heap: list[Seen] = []
        self._known: set[tuple[str, bytes]] = set()
        self._per_author: dict[str, int] = {}
        self._per_group: dict[bytes, int] = {}
        self._groups: dict[str, bytes] = {}
        self.group_of: Callable[[str], bytes] = str.encode
        self.floor_ms = 0
        self.forgotten: Callable[[Seen], None] = lambda row: None
        """Told of every row that leaves the window, so that whoever stores it can delete it."""

    def __len__(self) -> int:
        return len(self._heap)

    def seen(self, author: str, statement: bytes) -> bool:
        """Whether this statement was taken and is still within the window."""
        return (author, statement) in self._known

    def admit(self, author: str, statement: bytes, time_ms: int, now_ms: int) -> bool:
        """True the first time, False for a repetition (normal in gossip).

        MessageTooOld outside the window of time; RateLimited when `author` or its group has filled its share.
        """
        if (author, statement) in self._known:
            return False
        if time_ms <= self.floor_ms or abs(time_ms - now_ms) > limits.MESSAGE_AGE_MS:
            raise MessageTooOld(f"a statement of {author} is {abs(now_ms - time_ms) // 1000} s off this node's clock")
        self._forget_before(now_ms - limits.MESSAGE_AGE_MS)
        if self._per_author.get(author, 0) >= self._author_max:
            raise RateLimited(f"{author} sent {self._author_max} statements within {limits.MESSAGE_AGE_MS // 1000} s")
        if self._per_group.get(self._group(author), 0) >= self._group_max:
            raise RateLimited(f"{author} and others of its owner sent {self._group_max} statements")
        self._add((time_ms, author, statement))
        if len(self._heap) > self._ids_max:
            self._forget_oldest()
        return True

    def rows(self) -> Iterator[Seen]:
        """The window, to be stored."""
        return iter(self._heap)

    def restore(self, rows: Iterable[Seen], floor_ms: int) -> None:
        """The window as stored. `floor_ms` is that of the stored window."""
        self._heap.clear()
        self._known.clear()
        self._per_author.clear()
        self._per_group.clear()
        self._groups.clear()
        self.floor_ms = floor_ms
        for row in rows:
            self._add(row)
        heapify(self._heap)
        while len(self._heap) > self._ids_max:
            self._forget_oldest()

    def _add(self, row: Seen) -> None:
        heappush(self._heap, row)
        self._known.add((row[1], row[2]))
        group = self._groups.setdefault(row[1], self._group(row[1]))
        self._per_author[row[1]] = self._per_author.get(row[1], 0) + 1
        self._per_group[group] = self._per_group.get(group, 0) + 1

    def _group(self, author: str) -> bytes:
        """The group that an author's statements are counted with, the same as long as there is one of them here."""
        return self._groups.get(author) or self.group_of(author)

    def _forget_before(self, time_ms: int) -> None:
        while self._heap and self._heap[0][0] < time_ms:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        row = time_ms, author, statement = heappop(self._heap)
        self._known.discard((author, statement))
        self.floor_ms = max(self.floor_ms, time_ms)
        group = self._groups[author]
        left = self._per_author[author] - 1
        if left:
            self._per_author[author] = left
        else:
            del self._per_author[author], self._groups[author]
        left = self._per_group[group] - 1
        if left:
            self._per_group[group] = left
        else:
            del self._per_group[group]
        self.forgotten(row)
