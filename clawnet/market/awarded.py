"""What this requester awarded to whom: whose turn it is among equals, and what a bid could not know of. Pure."""

from __future__ import annotations

from typing import Final

from msgspec import Struct

from clawnet import limits


class Given(Struct, frozen=True, gc=False):
    """All that a peer was ever awarded: how many tasks, and how long they were estimated to run."""

    tasks: int = 0
    work_s: float = 0.0

    def wait_behind_s(self, now: Given, *, slots: int, load: float) -> float:
        """How long one more task would wait for those that were awarded between this state and `now`.

        Links keep their order, so a bid tells nothing of what its maker was awarded after the offer went out. As many
        as it had slots free (`load` is the share of its slots that was taken) wait for nothing.
        """
        count = now.tasks - self.tasks
        if count <= 0:
            return 0.0
        each_s = max(0.0, now.work_s - self.work_s) / count
        free = round(max(slots, 1) * (1 - min(max(load, 0.0), 1.0)))
        return max(0, count + 1 - max(free, 1)) * each_s / max(slots, 1)


_NOTHING: Final = Given()


class AwardOrder:
    """Which peer this requester awarded how long ago, and how much. Bounded."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[int, Given]] = {}
        self._count = 0

    def note(self, peer: str, estimated_s: float) -> None:
        """`peer` was just awarded a task that it promised to run in `estimated_s`."""
        self._count += 1
        given = self._last.pop(peer, (0, _NOTHING))[1]
        self._last[peer] = (self._count, Given(given.tasks + 1, given.work_s + estimated_s))
        if len(self._last) > limits.CAPABILITY_CARDS_MAX:
            del self._last[next(iter(self._last))]

    def of(self, peer: str) -> int:
        """A number that rises with every award; 0 for a peer never awarded (or long ago)."""
        return self._last.get(peer, (0, _NOTHING))[0]

    def given(self, peer: str) -> Given:
        """All that the peer was awarded until now."""
        return self._last.get(peer, (0, _NOTHING))[1]
