"""Tasks that wait for `clawnet market approve`: held before anybody hears of them, released, or ended in time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clawnet import limits
from clawnet.answers_market import time_text
from clawnet.errors import BusyError, DataError, NotPermittedError
from clawnet.market import approval
from clawnet.market.records import FINAL_STATES, Task
from clawnet.market.spending import KINDS
from clawnet.node.context import Context
from clawnet.node.params import Params

if TYPE_CHECKING:
    from clawnet.node.kernel import Rooms


class Approvals:
    """Held tasks are drafts with `held_until_ms`: nothing is announced, nothing is locked."""

    def __init__(self, ctx: Context, rooms: Rooms) -> None:
        self._ctx = ctx
        self._rooms = rooms
        self._held: dict[bytes, None] = {}

    # --- holding

    def reason(self, kind: str, stages: list[str], budget_ucr: int) -> str:
        """Why a submission is to be held, "" when it is not; raises BusyError when too many are.

        What only own machines may see costs nothing and never waits.
        """
        if "member" not in stages:
            return ""
        read = self._ctx.config.allowance_ucr
        keys = ("market.approve.above", *([f"market.approve.{kind}"] if kind in KINDS else []))
        hold = approval.check(budget_ucr, {key: read(key) for key in keys})
        if hold is None:
            return ""
        if len(self._held) >= limits.HELD_TASKS_MAX:
            raise BusyError(
                f"{limits.HELD_TASKS_MAX} tasks wait for approval already",
                hint="clawnet market approve lists them; clawnet market cancel TASK drops one",
            )
        return hold.text

    def until_ms(self, deadline_ms: int) -> int:
        """Until when a task that is held now may be approved."""
        return approval.held_until(self._ctx.now, self._ctx.config.millis("market.approve.timeout"), deadline_ms)

    def hold(self, task: Task) -> None:
        """The task stays a draft; its row is written in this turn, and its timer is that of the hold."""
        self._held[task.task_id] = None
        task.transitions += 1
        task.moves.append((task.transitions, self._ctx.now, task.state, f"held: {task.held_reason}"))
        self._rooms.tasks.touch(task)
        self._ctx.durable()
        self._ctx.count("tasks_held_total")

    def resume(self, task: Task) -> None:
        """A held task after a restart; its timer is armed with those of all tasks."""
        self._held[task.task_id] = None

    def drop(self, task: Task) -> None:
        """The task is held no longer."""
        self._held.pop(task.task_id, None)

    # --- releasing

    def approve(self, call: int, params: Params, task: Task) -> None:
        """Releases a held task into the auction. Once more changes nothing; the answer says so."""
        ctx = self._ctx
        if not approval.may_approve(ctx.credential):
            raise NotPermittedError(
                "only a user of this machine may approve a task", hint="clawnet market approve, as the node's own user"
            )
        name = task.task_id.hex()
        if not is_held(task):
            if not task.held_reason:
                raise DataError(f"task {name[:8]} is not held (it is {task.state})", hint="nothing waits for approval")
            if task.held_until_ms:
                raise DataError(
                    f"task {name[:8]} is held no longer: {task.error_text or task.state}", hint="submit it again"
                )
            ctx.reply(call, {"task_id": name, "state": task.state, "changed": False})
            return
        self.drop(task)
        task.held_until_ms = 0
        self._rooms.tasks.announce(task, f"approved by {ctx.credential}")
        self._rooms.leases.arm(task)
        ctx.durable()
        ctx.log("info", "task.approved", task=name, by=ctx.credential)
        ctx.reply(call, {"task_id": name, "state": task.state, "changed": True})

    def timer(self, task: Task) -> None:
        """Nobody approved it in time: it has failed, and its key is free again."""
        if self._ctx.now < task.held_until_ms:
            return
        deadline = task.held_until_ms >= task.deadline_ms
        error = NotPermittedError(
            f"not approved in time: {task.held_reason}",
            hint="--deadline allows more time" if deadline else "market.approve.timeout allows more time",
        )
        self._rooms.tasks.finish(task, "failed", error, "not approved in time")

    # --- showing

    def findings(self) -> list[dict[str, str]]:
        """What `doctor` tells of it."""
        count = len(self._held)
        if not count:
            return []
        text = "1 task waits" if count == 1 else f"{count} tasks wait"
        remedy = "clawnet market approve lists what waits; with TASK it lets it go, clawnet market cancel drops it"
        return [{"check": "approval", "level": "warn", "message": f"{text} for approval", "remedy": remedy}]

    @staticmethod
    def view(task: Task) -> dict[str, Any] | None:
        """Why a task is held and until when; None for one that is not."""
        if not is_held(task):
            return None
        return {"reason": task.held_reason, "until": time_text(task.held_until_ms)}


def is_held(task: Task) -> bool:
    """Whether it waits for approval now."""
    return task.held_until_ms > 0 and task.state not in FINAL_STATES
