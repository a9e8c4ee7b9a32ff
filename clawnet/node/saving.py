"""Output files at the requester: what may come as such, how they are shown, and their way into a directory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clawnet import limits
from clawnet.errors import DataError, NotFoundError, VerificationError, WireError, from_dict
from clawnet.market.records import FINAL_STATES, Task
from clawnet.node.context import Context, job_id
from clawnet.node.params import Params, integer
from clawnet.node.retained import forgotten
from clawnet.wire.fileevents import Moved, OutputsSaved, SaveOutputs
from clawnet.wire.globs import Globs

if TYPE_CHECKING:
    from clawnet.node.kernel import Rooms

RESULT = b"result:"
"""Begins the name of a fetch of a result; the attempt it is of follows."""
PROGRESS = "task.progress"
_OTHER_BYTES = limits.RUN_OUTPUT_BYTES_MAX + 2 * limits.MIB
"""What a result without files can be, sealed: its output, its head, and what the seal adds."""


def most(ctx: Context) -> int:
    """How long the archive of a result's files may be."""
    return ctx.config.integer("market.outputs_max")


def result_most(ctx: Context, task: Task) -> int:
    """How long the sealed result of this task may be. Sealing adds 17 bytes to every 64 KiB."""
    return _OTHER_BYTES + (most(ctx) + most(ctx) // 2_048 if task.spec.get("outputs") else 0)


def check_outputs(payload: dict[str, Any]) -> None:
    """Raises WireError for patterns in a task document that are none."""
    patterns, size = payload.get("outputs", []), payload.get("outputs_bytes_max", 0)
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
        raise WireError("not a payload: its outputs are no patterns")
    if type(size) is not int or not 0 <= size <= limits.OUTPUTS_BYTES_MAX:
        raise WireError("not a payload: the bound of its outputs is no size")
    try:
        if patterns:
            Globs(patterns)
    except DataError as error:
        raise WireError(f"not a payload: {error.message}") from error


def shown(result: dict[str, Any]) -> dict[str, Any]:
    """The files of an opened result as its JSON has them; results of older versions have none."""
    return {
        "outputs": result["outputs"],
        "outputs_count": result.get("outputs_count", 0),
        "outputs_bytes": result.get("outputs_bytes", 0),
        "outputs_missing": result.get("outputs_missing", []),
        "outputs_left_out": result.get("outputs_left_out", []),
        "outputs_left_out_count": result.get("outputs_left_out_count", 0),
    }


def left_behind(inputs: list[dict[str, Any]]) -> dict[str, Any]:
    """What of a submission's directories did not go along (execution/inputs.py)."""
    return {
        "left_out": [f"{item['name']}/{name}" for item in inputs for name in item.get("left_out", [])],
        "left_out_count": sum(item.get("left_out_count", 0) for item in inputs),
        "ignored": sum(item.get("ignored", 0) for item in inputs),
    }


class Saving:
    """The call task.save: {task, directory, umask}."""

    def __init__(self, ctx: Context, rooms: Rooms) -> None:
        self._ctx = ctx
        self._rooms = rooms
        self._asked: dict[int, tuple[bytes, str]] = {}

    def save(self, call: int, params: Params, task: Task) -> None:
        """Writes the files of a finished task; nothing of a result that did not pass."""
        directory, umask = params.get("directory"), integer(params, "umask", 0o077)
        if not isinstance(directory, str) or not directory or "\0" in directory:
            raise DataError("task.save needs the absolute path of a directory")
        if not 0 <= umask <= 0o777:
            raise DataError(f"{umask} is no umask")
        name = task.task_id.hex()[:8]
        if task.state not in FINAL_STATES:
            raise NotFoundError(
                f"task {name} has no output files yet (it is {task.state})", hint=f"`clawnet market wait {name}` waits"
            )
        if task.error_code == VerificationError.code:
            raise VerificationError(f"the result of task {name} did not pass; its files stay where they are")
        if not task.spec.get("outputs"):
            raise NotFoundError(f"task {name} has no output files", hint="it was submitted without --output")
        if task.result is None:
            raise NotFoundError(f"task {name} left no result", hint=f"`clawnet market show {name}` says why")
        blob = task.result.get("outputs_blob") or b""
        if not blob:
            self._ctx.reply(call, {"task_id": task.task_id.hex(), "directory": directory, "files": 0, "bytes": 0})
            return
        patterns = tuple(task.spec.get("outputs") or ())
        self._asked[call] = task.task_id, directory
        self._ctx.out.append(SaveOutputs(call, blob, patterns, directory, umask, params.get("progress") is True))

    def moved(self, event: Moved) -> None:
        """How far a long transfer is, to those who asked to hear of it."""
        value = {"what": event.what, "done": event.done, "total": event.total}
        if isinstance(event.about, int):
            if event.about in self._asked:
                self._ctx.notify(event.about, PROGRESS, value)
            return
        tasks = self._rooms.tasks
        if event.what == "packing":
            for call in tasks.draft_calls(event.about, told=True):
                self._ctx.notify(call, PROGRESS, value)
        elif event.what == "fetching":
            found = self._rooms.awards.of_about(event.about.removeprefix(RESULT))
            if found is not None:
                tasks.followers.moved(found[0].task_id, value)
        else:
            me = self._ctx.me
            for task_id in tasks.followers.told:
                task = tasks.open.get(task_id)
                if task is not None and task.attempts and job_id(me, task_id, task.attempts[-1].n) == event.about:
                    tasks.followers.moved(task_id, value)

    def saved(self, event: OutputsSaved) -> None:
        """All files are in their places, or none is."""
        found = self._asked.pop(event.call, None)
        if found is None:
            return
        task_id, directory = found
        if event.error is not None:
            error = from_dict(event.error)
            lost = isinstance(error, NotFoundError) and "blob" in error.details
            self._ctx.fail(event.call, forgotten(task_id, "the output") if lost else error)
            return
        done = {"task_id": task_id.hex(), "directory": directory, "files": event.files, "bytes": event.bytes}
        self._ctx.reply(event.call, done)
