"""--output and --output-dir: where a task's files go, whether that can be, and putting them there at the end."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from clawnet import rpc
from clawnet.api import Client
from clawnet.errors import ClawnetError, DataError, NotPermittedError, TimedOutError, UnreachableError, UsageError

from . import following
from .invocation import Invocation
from .progress_bar import Bar
from .render import clean, short


def place(invocation: Invocation, spec: dict[str, Any], named: str | None) -> Path | None:
    """The directory for a task's files: --output-dir, else the spec's, else the current one; None when it leaves none.

    Raises UsageError, DataError or NotPermittedError before anything is submitted.
    """
    own = spec.pop("output_dir", None)
    if own is not None and (not isinstance(own, str) or not own):
        raise DataError("output_dir in the task is no path")
    directory = named or own
    if not spec.get("outputs"):
        if directory:
            raise UsageError("--output-dir goes with --output", hint="--output 'dist/*' --output-dir .")
        return None
    return checked(invocation, directory or ".")


def checked(invocation: Invocation, name: str) -> Path:
    """The same directory from wherever it is looked at; raises NotPermittedError or DataError where it is no good."""
    directory = Path(name).expanduser().absolute()
    there = directory
    while not os.path.lexists(there):
        there = there.parent
    if not there.is_dir():
        raise DataError(f"--output-dir {name}: {there} is not a directory")
    if not os.access(there, os.W_OK | os.X_OK):
        raise NotPermittedError(f"--output-dir {name}: {there} cannot be written to", hint="check its owner and mode")
    home, real = invocation.home.dir.resolve(), directory.resolve()
    if real == home or home in real.parents:
        raise NotPermittedError(f"--output-dir {name} lies in clawnet's own home", hint="name another directory")
    return directory


def save(
    invocation: Invocation,
    client: Client,
    task: dict[str, Any],
    directory: Path,
    patience: following.Patience | None = None,
) -> dict[str, Any]:
    """Has the daemon put the files of a finished task there, and tells what is missing. Raises ClawnetError."""
    umask = os.umask(0o077)
    os.umask(umask)
    params = {"task": task["task_id"], "directory": str(directory), "umask": umask}
    saved: dict[str, Any]
    while True:
        try:
            with Bar(invocation) as bar:
                saved = _asked(invocation, client, params, bar)
            break
        except UnreachableError as error:
            if patience is None or not following.is_loss(error):
                raise
            patience.again(error)
    _tell(invocation, task, saved)
    return saved


def _asked(invocation: Invocation, client: Client, params: dict[str, Any], bar: Bar) -> dict[str, Any]:
    call = client.send("task.save", {**params, "progress": bar.wanted})
    while True:
        try:
            event = client.receive(call, deadline=invocation.deadline())
        except TimedOutError as error:
            name = short(params["task"])
            raise TimedOutError(
                f"the files of task {name} were not saved in time",
                hint=f"`clawnet market result {name} --output-dir DIR` saves them",
            ) from error
        if event.error is not None:
            raise event.error
        if not event.method:
            saved: dict[str, Any] = event.value
            return saved
        if event.method == rpc.PROGRESS:
            bar.moved(event.value)


def _tell(invocation: Invocation, task: dict[str, Any], saved: dict[str, Any]) -> None:
    """How many came; a pattern that matched nothing, and a file that could not travel, must not be missed."""
    result = task.get("result") or {}
    for pattern in result.get("outputs_missing") or []:
        invocation.warn(f"no file matched --output {clean(pattern)!r}")
    left = result.get("outputs_left_out_count") or 0
    for why in result.get("outputs_left_out") or []:
        invocation.warn(f"not among the output files: {clean(why)}")
    more = left - len(result.get("outputs_left_out") or [])
    if more > 0:
        invocation.warn(f"{more} more files are not among the output files")
    files = saved["files"]
    invocation.say(f"{files} output file{'' if files == 1 else 's'} in {clean(saved['directory'])}")


def after(
    invocation: Invocation,
    client: Client,
    task: dict[str, Any],
    directory: Path | None,
    patience: following.Patience | None = None,
) -> ClawnetError | None:
    """Saves the files of a task that was waited for, whatever its exit code; the error that kept them from it, if any.

    A task without a good result has none.
    """
    if directory is None or task.get("result") is None or task.get("error"):
        return None
    try:
        save(invocation, client, task, directory, patience)
    except ClawnetError as error:
        return error
    return None


def ended(invocation: Invocation, code: int, error: ClawnetError | None) -> int:
    """Reports what kept the files; the exit code is that of the task unless it was good."""
    from .app import report

    if error is None:
        return code
    failed = report(error, as_json=invocation.json)
    return code or failed
