"""How far a long transfer is, told so rarely that telling costs nothing."""

from __future__ import annotations

import time
from collections.abc import Callable

from clawnet import limits


class Progress:
    """Counts bytes in any thread; `tell(done, total)` is called at most every PROGRESS_S, and for little never.

    `total` 0: it is not known.
    """

    def __init__(self, total: int, tell: Callable[[int, int], object]) -> None:
        self.total = total
        self.done = 0
        self._tell = tell
        self._told_s = time.monotonic()

    def more(self, size: int) -> None:
        """So many bytes more are done."""
        self.done += size
        now_s = time.monotonic()
        if now_s - self._told_s >= limits.PROGRESS_S:
            self._told_s = now_s
            self._tell(self.done, self.total)
