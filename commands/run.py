"""`clawnet run -- CMD ARG...`: a command on whichever machine takes it, as if it ran here."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Annotated, Any

import typer

from clawnet.api import Client
from clawnet.errors import TimedOutError, UnreachableError, UsageError

from . import accepting, approving, following, modules, outputs, piped, submission, waiting
from .invocation import Invocation, NodeCommand, group, here
from .options import (
    ACCEPT,
    ATTACH,
    BID_TIMEOUT,
    BUDGET,
    CPU,
    DEADLINE,
    ENV,
    EXCLUDE,
    FROM_END,
    FUEL,
    GITIGNORE,
    GPU,
    IDEMPOTENCY_KEY,
    INPUT,
    LABEL,
    MEMORY,
    MIN_REPUTATION,
    MODEL,
    NO_STDIN,
    OS,
    OUTPUT,
    OUTPUT_DIR,
    PEER,
    PREFER,
    PRIORITY,
    REQUIRE,
    RETRIES,
    RING,
    SPEC,
    STATUS_FILE,
    STREAM,
    WASM,
)
from .progress_bar import Bar
from .render import json_line, short, write

DEADLINE_S = 3600.0

app = group("Run a command on whichever machine takes it; its output and exit code come back.")


@app.command("run", cls=NodeCommand, context_settings={"allow_interspersed_args": False})
def run(
    context: typer.Context,
    command: Annotated[list[str] | None, typer.Argument(metavar="-- CMD [ARG]...", show_default=False)] = None,
    wasm: WASM = None,
    fuel: FUEL = None,
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
    gitignore: GITIGNORE = False,
    output: OUTPUT = None,
    output_dir: OUTPUT_DIR = None,
    accept: ACCEPT = None,
    env: ENV = None,
    retries: RETRIES = None,
    priority: PRIORITY = None,
    idempotency_key: IDEMPOTENCY_KEY = None,
    stream: STREAM = False,
    spec: SPEC = None,
    status_file: STATUS_FILE = None,
    no_stdin: NO_STDIN = False,
    attach: ATTACH = None,
    from_end: FROM_END = False,
) -> None:
    """Run a command on whichever machine takes it: own machines first, then this one, then members.

    Its output comes back on stdout and stderr as it is written, its exit code is the exit code of this command. A
    directory given with --input becomes its working directory. Ctrl-C cancels it; a second one leaves at once.
    --timeout cancels it too (exit code 124). Files that --output names are brought back when it has ended, whatever its
    exit code: all of them, verified, or none. --attach TASK takes the place of a `run` whose terminal is gone: all the
    output from its first byte (--from-end: from now on), the exit code, and Ctrl-C and --timeout cancel as before;
    `market logs -f` watches without that. --wasm MODULE runs a WebAssembly program in place of a command: the words
    after -- are its arguments, it sees the inputs and nothing of the machine, and the same input gives the same output
    on whichever machine; its output comes when it has ended.
    """
    invocation = here(context)
    with waiting.status_file(invocation, status_file) as note:
        if attach is not None or from_end:
            files = outputs.checked(invocation.home, output_dir) if output_dir else None
            task, code = _attach(context, invocation, attach, files, from_end=from_end, as_lines=stream)
            note(task)
            raise typer.Exit(code)
        task_spec = submission.build(
            submission.from_file(spec) if spec else {},
            argv=command,
            wasm=wasm,
            fuel=fuel,
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
            gitignore=gitignore or None,
            outputs=output,
            accept=accepting.conditions(accept or []),
            env=submission.environment(env or []),
            retries=retries,
            priority=priority,
            idempotency_key=idempotency_key,
            stream=True,
        )
        _complete(task_spec)
        files = outputs.place(invocation, task_spec, output_dir)
        data = piped.standard_input(wanted=not no_stdin and spec != "-")
        submission.attach_stdin(task_spec, data)
        task, code = _run(invocation, task_spec, data, files, as_lines=stream)
        note(task)
    raise typer.Exit(code)


def _complete(spec: dict[str, Any]) -> None:
    """What `run` adds to a task: its type, its longer deadline, the directory it works in."""
    module = modules.look(spec)
    if spec.setdefault("type", "shell") != "shell" and not module:
        raise UsageError("`run` is for shell tasks", hint="`clawnet market submit` takes the other types")
    if not module and not spec.get("argv") and not spec.get("script"):
        raise UsageError("no command given", hint="clawnet run [OPTIONS] -- CMD ARG..., or --wasm MODULE -- ARG...")
    spec.setdefault("deadline_s", DEADLINE_S)
    trees = [item["name"] for item in spec.get("inputs", []) if Path(item["path"]).is_dir()]
    if trees:
        spec.setdefault("cwd", trees[0])


def _run(
    invocation: Invocation, spec: dict[str, Any], data: piped.Piped | None, files: Path | None, *, as_lines: bool
) -> tuple[dict[str, Any], int]:
    """Submits, follows, and returns the task as it ended with the exit code of this command."""
    with invocation.client(create_home=True) as client:
        submission.resolve_peers(client, spec, invocation.say)
        with piped.handed_over(client, spec, data):
            limit, bar = invocation.deadline(), Bar(invocation)
            accepted = following.submit(client, spec, awaited=True, deadline=limit, say=invocation.say, bar=bar)
        outputs.tell_inputs(invocation, accepted)
        printer = following.Printer(invocation, client, as_lines=invocation.json)
        return _follow(invocation, client, accepted, printer, files, as_lines=as_lines)


WITH_ATTACH = frozenset(("attach", "from_end", "stream", "status_file", "no_stdin", "output_dir"))


def _attach(
    context: typer.Context,
    invocation: Invocation,
    name: str | None,
    files: Path | None,
    *,
    from_end: bool,
    as_lines: bool,
) -> tuple[dict[str, Any], int]:
    """Follows a task that was submitted before, as the `run` that submitted it would have."""
    if name is None:
        raise UsageError("--from-end goes with --attach TASK")
    more = [key for key, value in context.params.items() if value and key not in WITH_ATTACH]
    if more:
        what = "a command" if more[0] == "command" else "--" + more[0].removesuffix("_family").replace("_", "-")
        raise UsageError(f"--attach follows a task that exists; {what} does not go with it")
    with invocation.client() as client:
        found = client.call("task.get", {"task": name})
        printer = following.Printer(invocation, client, as_lines=invocation.json, from_end=from_end)
        return _follow(invocation, client, found, printer, files, as_lines=as_lines)


def _follow(
    invocation: Invocation,
    client: Client,
    accepted: dict[str, Any],
    printer: following.Printer,
    files: Path | None,
    *,
    as_lines: bool,
) -> tuple[dict[str, Any], int]:
    """The task as it ended, its output printed and its files saved, with the exit code of this command."""
    task_id, ends_at = accepted["task_id"], accepted.get("deadline")
    approving.tell(invocation, accepted)
    quiet = invocation.json and not as_lines
    shown = None if quiet else printer
    with following.interrupts(invocation, client, task_id) as interrupts:
        timed_out = False
        patience = following.Patience(client, deadline=invocation.deadline(), ends_at=ends_at, say=invocation.say)
        try:
            task = following.follow(
                client,
                task_id,
                printer=shown,
                bar=Bar(invocation),
                patience=patience,
                connected=interrupts.connected,
            )
        except TimedOutError as error:
            timed_out = True
            limit = waiting.pause_until(None, following.CANCEL_WAIT_S)
            try:
                client.send("task.cancel", {"task": task_id, "reason": "timed out"})
                task = following.follow(client, task_id, printer=shown, deadline=limit)
            except (UnreachableError, TimedOutError):
                found = waiting.present(invocation, task_id, error.as_dict())
                if found is None:
                    raise error from None
                return found, _leave_late(invocation, found, error)
        if not quiet:
            printer.rest(task, patience)
        if timed_out and task["state"] == "cancelled":
            text = f"task {short(task_id)} was not done within {invocation.timeout_s:g} s and was cancelled"
            return task, _leave_late(invocation, task, TimedOutError(text, task_id=task_id))
        if interrupts.signal and task["state"] == "cancelled":
            _leave_interrupted(invocation, task, interrupts.signal)
            return task, 128 + interrupts.signal
    kept = outputs.after(invocation, client, task, files, patience)
    return outputs.noted(task, kept), outputs.ended(invocation, waiting.finish(invocation, task), kept)


def _leave_late(invocation: Invocation, task: dict[str, Any], error: TimedOutError) -> int:
    """The end by --timeout: the task as it stands on stdout with --json, what happened on stderr."""
    from .app import report

    if invocation.json:
        write(json_line(task))
    return report(error, as_json=invocation.json)


def _leave_interrupted(invocation: Invocation, task: dict[str, Any], number: int) -> None:
    if invocation.json:
        write(json_line(task))
    invocation.say(f"task {short(task['task_id'])} cancelled ({signal.Signals(number).name}, pid {os.getpid()})")
