"""The collector of cycles, which would walk over the whole mesh again and again: it looks at what is new, and seldom."""

from __future__ import annotations

import gc
from types import TracebackType

NEW_MAX = 2_000_000
"""So many new containers may live before they are searched for dead cycles."""


class SeldomCollected:
    """While a mesh runs nothing is collected but by `tidy`; what survives that is not looked at again before the end."""

    def __enter__(self) -> SeldomCollected:
        gc.collect()
        gc.freeze()
        gc.disable()
        return self

    def tidy(self) -> None:
        """Between two stretches of simulated time."""
        if gc.get_count()[0] > NEW_MAX:
            gc.collect()
            gc.freeze()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        gc.unfreeze()
        gc.enable()
