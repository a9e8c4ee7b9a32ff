"""A daemon ends: no new work, what runs may finish, what is owed to connected peers is settled, then out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clawnet import limits
from clawnet.node.context import Context

if TYPE_CHECKING:
    from clawnet.node.kernel import Rooms


class Draining:
    """How far the drain is. Whatever it leaves undone is on the disk, and the next start goes on with it."""

    def __init__(self, ctx: Context, rooms: Rooms) -> None:
        self._ctx = ctx
        self._rooms = rooms
        self._settling = False
        self._over = False
        self._done = False

    def begin(self) -> None:
        """No new bids or tasks; what has not started is handed back; what runs may finish in `daemon.drain_timeout`."""
        ctx = self._ctx
        if not ctx.draining:
            ctx.draining = True
            self._rooms.jobs.drain()
            ctx.wake(("drain_timeout",), ctx.now + ctx.config.millis("daemon.drain_timeout"))

    def timed_out(self) -> None:
        """What still runs is stopped and handed back."""
        self._rooms.jobs.drain_now()

    def settled(self) -> None:
        """Peers had their time to acknowledge, to release and to be shown keys."""
        self._over = True

    def ended(self) -> bool:
        """True once: nothing runs, and nothing is owed that a connected peer could take now."""
        ctx = self._ctx
        if not ctx.draining or self._done or self._rooms.jobs.running or self._rooms.throwaways.busy:
            return False
        if not self._over and self.owed():
            if not self._settling:
                self._settling = True
                ctx.wake(("drain_settle",), ctx.now + limits.DRAIN_SETTLE_MS)
            return False
        self._done = True
        return True

    def owed(self) -> bool:
        """Whether a peer that is connected still has to take, to pay or to open something."""
        ctx, rooms = self._ctx, self._rooms
        if any(ctx.connected(row.peer) for row in rooms.outbox.rows.values()):
            return True
        if any(job.state == "delivered" and ctx.connected(job.peer) for job in rooms.jobs.jobs.values()):
            return True
        return any(
            attempt.state in ("fetching", "delivering", "released", "claimed") and ctx.connected(attempt.peer)
            for task in rooms.tasks.open.values()
            for attempt in task.attempts
            if not attempt.closed
        )
