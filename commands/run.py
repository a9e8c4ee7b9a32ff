"""`clawnet run -- CMD ARG...`: a command on whichever machine takes it, as if it ran here."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Annotated, Any

import typer

from clawnet.errors import TimedOutError, UsageError

from . import submission, waiting
from .invocation import Invocation, NodeCommand, group, here
from .options import (
    BID_TIMEOUT,
    BUDGET,
    CPU,
    DEADLINE,
    ENV,
    EXCLUDE,
    GPU,
    IDEMPOTENCY_KEY,
    INPUT,
    LABEL,
    MEMORY,
    MIN_REPUTATION,
    MODEL,
    NO_STDIN,
    OS,
    PEER,
    PREFER,
    PRIORITY,
    REQUIRE,
    RETRIES,
    RING,
    SPEC,
    STATUS_FILE,
    STREAM,
)
from .render import short

DEADLINE_S = 3600.0

app = group("Run a command on whichever machine takes it; its output and exit code come back.")


@app.command("run", cls=NodeCommand, context_settings={"allow_interspersed_args": False})
def run(
    context: typer.Context,
    command: Annotated[list[str] | None, typer.Argument(metavar="-- CMD [ARG]...", show_default=False)] = None,
    budget: BUDGET = None,
    deadline: DEADLINE = None,
    bid_timeout: BID_TIMEOUT = None,
    min_reputation: MIN_REPUTATION = None,
    require: REQUIRE = None,
    cpu: CPU = None,
    memory: MEMORY = None,
    gpu: GPU = None,
    model: MODEL = None,
    label: LABEL = None,
    os_family: OS = None,
    peer: PEER = None,
    exclude: EXCLUDE = None,
    ring: RING = None,
    prefer: PREFER = None,
    input: INPUT = None,  # noqa: A002 - typer names the option after it
    env: ENV = None,
    retries: RETRIES = None,
    priority: PRIORITY = None,
    idempotency_key: IDEMPOTENCY_KEY = None,
    stream: STREAM = False,
    spec: SPEC = None,
    status_file: STATUS_FILE = None,
    no_stdin: NO_STDIN = False,
) -> None:
    """Run a command on whichever machine takes it: own machines first, then this one, then members.

    Its output comes back on stdout and stderr as it is written, its exit code is the exit code of this command. A
    directory given with --input becomes its working directory. Ctrl-C cancels it; a second one leaves at once.
    --timeout cancels it too (exit code 124).
    """
    invocation = here(context)
    with waiting.status_file(status_file) as note:
        task_spec = submission.build(
            submission.from_file(spec) if spec else {},
            argv=command,
            budget_ucr=budget,
            deadline_s=deadline,
            bid_timeout_s=bid_timeout,
            min_reputation=min_reputation,
            require=require,
            cpu=cpu,
            memory_bytes=memory,
            gpu=gpu,
            model=model,
            labels=label,
            os=os_family,
            peer=peer,
            exclude=exclude,
            ring=ring,
            prefer=prefer,
            inputs=submission.inputs(input or []),
            env=submission.environment(env or []),
            retries=retries,
            priority=priority,
            idempotency_key=idempotency_key,
            stream=True,
        )
        _complete(task_spec)
        submission.attach_stdin(task_spec, submission.standard_input(wanted=not no_stdin and spec != "-"))
        task, code = _run(invocation, task_spec, as_lines=stream)
        note(task)
    raise typer.Exit(code)


def _complete(spec: dict[str, Any]) -> None:
    """What `run` adds to a task: its type, its longer deadline, the directory it works in."""
    if spec.setdefault("type", "shell") != "shell":
        raise UsageError("`run` is for shell tasks", hint="`clawnet market submit` takes the other types")
    if not spec.get("argv") and not spec.get("script"):
        raise UsageError("no command given", hint="clawnet run [OPTIONS] -- CMD ARG...")
    spec.setdefault("deadline_s", DEADLINE_S)
    trees = [item["name"] for item in spec.get("inputs", []) if Path(item["path"]).is_dir()]
    if trees:
        spec.setdefault("cwd", trees[0])


def _run(invocation: Invocation, spec: dict[str, Any], *, as_lines: bool) -> tuple[dict[str, Any], int]:
    """Submits, follows, and returns the task as it ended with the exit code of this command."""
    with invocation.client(create_home=True) as client:
        submission.resolve_peers(client, spec, invocation.say)
        task_id = client.call("task.submit", {"spec": spec})["task_id"]
        printer = waiting.Printer(invocation, client, as_lines=invocation.json)
        quiet = invocation.json and not as_lines
        with waiting.interrupts(invocation, client, task_id) as interrupts:
            timed_out = False
            output = None if quiet else printer.chunk
            try:
                task = waiting.follow(client, task_id, output=output, deadline=invocation.deadline())
            except TimedOutError:
                timed_out = True
                client.send("task.cancel", {"task": task_id, "reason": "timed out"})
                limit = waiting.pause_until(None, waiting.CANCEL_WAIT_S)
                task = waiting.follow(client, task_id, output=output, deadline=limit)
            if not quiet:
                printer.rest(task)
            if timed_out and task["state"] == "cancelled":
                raise TimedOutError(
                    f"task {short(task_id)} was not done within {invocation.timeout_s:g} s and was cancelled",
                    task_id=task_id,
                )
            if interrupts.signal and task["state"] == "cancelled":
                _leave_interrupted(invocation, task, interrupts.signal)
                return task, 128 + interrupts.signal
        return task, waiting.finish(invocation, task)


def _leave_interrupted(invocation: Invocation, task: dict[str, Any], number: int) -> None:
    if invocation.json:
        from .render import json_line, write

        write(json_line(task))
    invocation.say(f"task {short(task['task_id'])} cancelled ({signal.Signals(number).name}, pid {os.getpid()})")
