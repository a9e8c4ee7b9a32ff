"""What is no longer kept of a finished task: the errors that say so, and for how long things are kept."""

from __future__ import annotations

from clawnet.errors import NotFoundError
from clawnet.limits import RESULT_RETENTION_MS, TASK_RETENTION_MS

DAY_MS = 86_400_000


def forgotten(task_id: bytes, what: str) -> NotFoundError:
    """The error of whoever asks for what a task left after its time."""
    name = task_id.hex()[:8]
    return NotFoundError(
        f"{what} of task {name} is forgotten: results are kept for {RESULT_RETENTION_MS // DAY_MS} days after the end",
        hint=f"`clawnet market show {name}` tells what is kept for {TASK_RETENTION_MS // DAY_MS} days",
        task_id=task_id.hex(),
    )


def unknown(text: str) -> NotFoundError:
    """The error of an id, or the start of one, that no kept task has."""
    days = TASK_RETENTION_MS // DAY_MS
    return NotFoundError(
        f"no task {text!r}", hint=f"clawnet market history lists those that are kept: {days} days after their end"
    )
