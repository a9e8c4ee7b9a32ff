"""Files in and out, for people: what stays behind; --output-dir, whether it can be, and its files at the end."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from clawnet import rpc
from clawnet.api import Client
from clawnet.errors import ClawnetError, DataError, NotPermittedError, TimedOutError, UnreachableError, UsageError
from clawnet.paths import Home

from . import following
from .invocation import Invocation
from .progress_bar import Bar
from .render import clean, short


def place(invocation: Invocation, spec: dict[str, Any], named: str | None) -> Path | None:
    """The directory for a task's files: --output-dir, else the spec's, else the current one; None when it leaves none.

    Raises UsageError, DataError or NotPermittedError before anything is submitted.
    """
    directory = named or taken(spec)
    if not spec.get("outputs"):
        if directory:
            raise UsageError("--output-dir goes with --output", hint="--output 'dist/*' --output-dir .")
        return None
    return checked(invocation.home, directory or ".")


def taken(spec: dict[str, Any]) -> str | None:
    """The directory that a task's own output_dir names; it is for this command, and taken out of what is submitted."""
    own = spec.pop("output_dir", None)
    if own is not None and (not isinstance(own, str) or not own):
        raise DataError("output_dir is no path")
    return own


def checked(home: Home, name: str) -> Path:
    """The same directory from wherever it is looked at; raises NotPermittedError or DataError where it is no good."""
    directory = Path(name).expanduser().absolute()
    there = directory
    while not os.path.lexists(there):
        there = there.parent
    if not there.is_dir():
        raise DataError(f"--output-dir {name}: {there} is not a directory")
    if not os.access(there, os.W_OK | os.X_OK):
        raise NotPermittedError(f"--output-dir {name}: {there} cannot be written to", hint="check its owner and mode")
    secret, real = home.dir.resolve(), directory.resolve()
    if real == secret or secret in real.parents:
        raise NotPermittedError(f"--output-dir {name} lies in clawnet's own home", hint="name another directory")
    return directory


def tell_inputs(invocation: Invocation, accepted: dict[str, Any]) -> None:
    """What of the input directories stays behind, for people."""
    left, ignored = accepted.get("left_out") or [], accepted.get("ignored") or 0
    more = (accepted.get("left_out_count") or 0) - len(left)
    for name in left:
        invocation.say(f"{clean(name)} stays behind: it is no file, or a link that leads outside")
    if more > 0:
        invocation.say(f"{more} more stay behind")
    if ignored:
        invocation.say(f"{ignored} that Git ignores {'stays' if ignored == 1 else 'stay'} behind")


def save(
    invocation: Invocation,
    client: Client,
    task: dict[str, Any],
    directory: Path,
    patience: following.Patience | None = None,
) -> dict[str, Any]:
    """Has the daemon put the files of a finished task there, and tells what is missing. Raises ClawnetError."""
    params = wish(task["task_id"], directory)
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
    tell(invocation, task, saved)
    return saved


def wish(task_id: str, directory: Path) -> dict[str, Any]:
    """The params of task.save: new files get the modes that this process would give them."""
    umask = os.umask(0o077)
    os.umask(umask)
    return {"task": task_id, "directory": str(directory), "umask": umask}


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


def tell(invocation: Invocation, task: dict[str, Any], saved: dict[str, Any]) -> None:
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


def noted(task: dict[str, Any], error: ClawnetError | None) -> dict[str, Any]:
    """The task for a status file: a result whose files are not in their place is not all that was wanted."""
    if error is None:
        return task
    told = {"code": error.code, "message": error.message, "hint": error.hint, "exit_code": error.exit_code}
    return {**task, "error": told}


def ended(invocation: Invocation, code: int, error: ClawnetError | None) -> int:
    """Reports what kept the files; the exit code is that of the task unless it was good."""
    from .app import report

    if error is None:
        return code
    failed = report(error, as_json=invocation.json)
    return code or failed
