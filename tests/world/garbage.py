"""Cycles of dead objects, for which the whole mesh would be searched again and again: seldom, and memory is bounded."""

from __future__ import annotations

import gc
from types import TracebackType

NEW_MIN = 8_000_000
"""So many containers more than there were, or twice as many if that is more: then dead cycles are looked for."""


class SeldomCollected:
    """While a mesh runs nothing is collected but by `tidy`."""

    def __init__(self) -> None:
        self._most = NEW_MIN

    def __enter__(self) -> SeldomCollected:
        gc.collect()
        gc.disable()
        return self

    def tidy(self) -> None:
        """Between two stretches of simulated time."""
        if gc.get_count()[0] > self._most:
            gc.collect()
            self._most = max(NEW_MIN, len(gc.get_objects()))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        gc.enable()
