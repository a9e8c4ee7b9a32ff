"""`clawnet market approve`: what waits for approval, and its release; the notice of a command whose task waits so."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from . import paging
from .invocation import Invocation, here
from .render import json_line, short, show, table, write

HELD = {"states": ["draft"]}
TASKS = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[TASK]...", help="Task ids, or their starts; without any, what is held.", show_default=False
    ),
]


def approve(context: typer.Context, task: TASKS = None) -> None:
    """Release tasks that wait for approval (market.approve) into their auctions; without a task, list them.

    A held task was announced to nobody, and nothing is locked for it; `market cancel` drops it. It fails with exit code
    77 when nobody approves it in time, at its deadline at the latest.
    """
    invocation = here(context)
    with invocation.client() as client:
        if not task:
            held = paging.everything(client, "task.list", HELD)
            table(invocation, held, _COLUMNS, empty="nothing waits for approval")
            return
        # All of them are found before the first is released.
        names = [client.call("task.get", {"task": one})["task_id"] for one in task]
        done = [client.call("task.approve", {"task": name}) for name in names]
    for one in done:
        if not one["changed"]:
            invocation.say(f"task {short(one['task_id'])} was approved before")
    if len(done) == 1 and not invocation.json:
        show(invocation, done[0], bare=done[0]["state"])
    elif invocation.json:
        write(json_line({"items": done, "next": None}))
    else:
        table(invocation, {"items": done}, (("TASK", lambda one: one["task_id"]), ("STATE", lambda one: one["state"])))


_COLUMNS = (
    ("TASK", lambda task: task["task_id"]),
    ("TYPE", lambda task: task["type"]),
    ("BUDGET", lambda task: task["max_budget"]),
    ("UNTIL", lambda task: task["held"]["until"]),
    ("WHY", lambda task: task["held"]["reason"]),
    ("DESCRIPTION", lambda task: task["description"][:60]),
)


def tell(invocation: Invocation, task: dict[str, Any]) -> None:
    """Says that a task waits for approval, until when, and how it is given; nothing of any other task."""
    held = task.get("held")
    if held:
        name = short(task["task_id"])
        invocation.warn(
            f"task {name} waits for approval until {held['until']}: {held['reason']}; "
            f"`clawnet market approve {name}` lets it go, `clawnet market cancel {name}` drops it"
        )
