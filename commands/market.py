"""`clawnet market`: submit tasks, look at them, follow them, see who bid and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from clawnet.errors import NotFoundError, TimedOutError, UsageError

from . import accepting, approving, batch, following, outputs, paging, piped, submission, waiting
from . import options as o
from .invocation import Invocation, NodeCommand, group, here
from .progress_bar import Bar
from .render import (
    Column,
    clean,
    clean_lines,
    json_line,
    on_terminal,
    pairs,
    seconds,
    short,
    show,
    size,
    table,
    who,
    write,
)

FINAL = ["settled", "refunded", "no_bids", "cancelled", "failed", "timed_out"]
OPEN = [
    *("draft", "announced", "bidding", "awarded", "executing"),
    *("reassigned", "delivered", "verified", "disputed"),
]
TASKS = Annotated[list[str], typer.Argument(metavar="TASK...", help="Task ids, or their starts.", show_default=False)]
RESULT_DIR = Annotated[
    str | None,
    typer.Option("--output-dir", metavar="DIR", help="Put its output files there.", show_default=False),
]
ROLE = Annotated[
    str, typer.Option("--role", metavar="requester|executor", help="Whose tasks: submitted here, or done for others.")
]
FOLLOW = Annotated[bool, typer.Option("--follow", "-f", help="Go on until the task ends.")]

app = group("Submit tasks, follow them, see who bid and why.")


@app.command(cls=NodeCommand)
def submit(
    context: typer.Context,
    description: Annotated[
        str | None, typer.Argument(metavar="[DESCRIPTION | -]", help="What is wanted; for shell, the script.")
    ] = None,
    type_: o.TYPE = None,
    op: o.OP = None,
    budget: o.BUDGET = None,
    deadline: o.DEADLINE = None,
    bid_timeout: o.BID_TIMEOUT = None,
    min_reputation: o.MIN_REPUTATION = None,
    require: o.REQUIRE = None,
    cpu: o.CPU = None,
    memory: o.MEMORY = None,
    gpu: o.GPU = None,
    model: o.MODEL = None,
    label: o.LABEL = None,
    os_family: o.OS = None,
    peer: o.PEER = None,
    exclude: o.EXCLUDE = None,
    ring: o.RING = None,
    prefer: o.PREFER = None,
    input: o.INPUT = None,  # noqa: A002 - typer names the option after it
    gitignore: o.GITIGNORE = False,
    output: o.OUTPUT = None,
    output_dir: o.OUTPUT_DIR = None,
    accept: o.ACCEPT = None,
    env: o.ENV = None,
    retries: o.RETRIES = None,
    priority: o.PRIORITY = None,
    idempotency_key: o.IDEMPOTENCY_KEY = None,
    wait: o.WAIT = False,
    stream: o.STREAM = False,
    spec: o.SPEC = None,
    status_file: o.STATUS_FILE = None,
    no_stdin: o.NO_STDIN = False,
) -> None:
    """Submit a task. Prints its id as soon as this node has durably accepted it; with --wait, its result."""
    invocation = here(context)
    if (stream or status_file) and not wait:
        raise UsageError("--stream and --status-file go with --wait")
    if output_dir and not wait:
        hint = "without it: clawnet market result TASK --output-dir DIR, when the task has ended"
        raise UsageError("--output-dir goes with --wait", hint=hint)
    with waiting.status_file(invocation, status_file) as note:
        base = submission.from_file(spec) if spec else {}
        text, data = submission.described(description, no_stdin=no_stdin or spec == "-")
        task_spec = submission.build(
            base,
            type=submission.task_type(type_) if type_ else None,
            op=op,
            description=text,
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
        )
        submission.complete(task_spec, data)
        files = outputs.place(invocation, task_spec, output_dir)
        with invocation.client(create_home=True) as client:
            submission.resolve_peers(client, task_spec, invocation.say)
            limit = invocation.deadline()
            with piped.handed_over(client, task_spec, data):
                bar = Bar(invocation)
                accepted = following.submit(
                    client, task_spec, awaited=wait, deadline=limit, say=invocation.say, bar=bar
                )
            approving.tell(invocation, accepted)
            outputs.tell_inputs(invocation, accepted)
            if not wait:
                show(invocation, accepted, bare=accepted["task_id"])
                _already_over(client, task_spec, accepted)
                return
            try:
                task = _follow_one(invocation, client, accepted, stream=stream)
            except (TimedOutError, KeyboardInterrupt) as error:
                _note_present(invocation, accepted["task_id"], error, note)
                raise
            kept = outputs.after(invocation, client, task, files, _patience(invocation, client, task["deadline"]))
            note(outputs.noted(task, kept))
            code = outputs.ended(invocation, waiting.finish(invocation, task), kept)
    raise typer.Exit(code)


def _note_present(
    invocation: Invocation,
    task_id: str,
    error: TimedOutError | KeyboardInterrupt,
    note: Callable[[dict[str, Any]], None],
) -> None:
    """This command leaves and the task goes on: how it stands now is put into the status file."""
    if isinstance(error, TimedOutError):
        why = error.as_dict()
    else:
        why = waiting.interruption(waiting.number_of(error))
    task = waiting.present(invocation, task_id, why)
    if task is not None:
        note(task)


def _already_over(client: Any, spec: dict[str, Any], accepted: dict[str, Any]) -> None:
    """A prompt that no peer can answer has ended before its id is printed: that is told, with its exit code."""
    if spec["type"] == "prompt" and accepted["created"]:
        task = client.call("task.get", {"task": accepted["task_id"]})
        error = waiting.task_error(task) if task["state"] == "no_bids" else None
        if error is not None:
            raise error


def _follow_one(invocation: Invocation, client: Any, accepted: dict[str, Any], *, stream: bool) -> dict[str, Any]:
    """Waits; the output comes as it is written with `stream`, else at the end; with --json only streamed lines."""
    printer = following.Printer(invocation, client, as_lines=invocation.json)
    name = short(accepted["task_id"])
    patience = _patience(invocation, client, accepted.get("deadline"))
    try:
        task = following.follow(
            client,
            accepted["task_id"],
            printer=printer if stream else None,
            bar=Bar(invocation),
            patience=patience,
        )
    except KeyboardInterrupt:
        invocation.say(f"task {name} goes on; `clawnet market wait {name}` waits for it")
        raise
    if stream or not invocation.json:
        printer.rest(task, patience)
        _print_text(invocation, task)
    return task


def _patience(invocation: Invocation, client: Any, ends_at: str | None) -> following.Patience:
    return following.Patience(client, deadline=invocation.deadline(), ends_at=ends_at, say=invocation.say)


def _print_text(invocation: Invocation, task: dict[str, Any]) -> None:
    """The text of a prompt, where the answer is not stdout itself."""
    result = task.get("result") or {}
    text = result.get("text")
    if text and not invocation.json and not result.get("stdout") and not result.get("stdout_bytes"):
        text = clean_lines(text) if on_terminal() else text
        write(text if text.endswith("\n") else text + "\n")


app.command("batch", cls=NodeCommand)(batch.batch)


# --- looking


_COLUMNS = (
    ("TASK", lambda task: task["task_id"]),
    ("STATE", lambda task: task["state"]),
    ("TYPE", lambda task: task["type"]),
    ("PRICE", lambda task: task["price"]),
    ("EXECUTOR", lambda task: (task["executor"] or {}).get("name") or short((task["executor"] or {}).get("peer_id"))),
    ("EXIT", lambda task: task["exit_code"]),
    ("CREATED", lambda task: task["created_at"]),
    ("DESCRIPTION", lambda task: task["description"][:60]),
)
_HELD = ("HELD", lambda task: task.get("held") and f"until {task['held']['until']}: {task['held']['reason']}")


@app.command("list", cls=NodeCommand)
def list_(context: typer.Context, limit: o.LIMIT = 100) -> None:
    """Open tasks, newest first; of one that waits for approval until when, and why."""
    _list(
        here(context), OPEN, limit, (*_COLUMNS, _HELD), "no open task; `clawnet market history` shows those that ended"
    )


@app.command(cls=NodeCommand)
def history(context: typer.Context, limit: o.LIMIT = 100, role: ROLE = "requester") -> None:
    """Tasks that have ended, newest first: those submitted here, or those that this node did for others."""
    invocation = here(context)
    if role == "requester":
        _list(invocation, FINAL, limit, _COLUMNS, "no task has ended yet")
        return
    if role != "executor":
        raise UsageError(f"--role is {role!r}; it is requester or executor")
    with invocation.client() as client:
        found = paging.first(client, "job.list", {}, limit)
    table(invocation, found, _JOB_COLUMNS, empty="this node has done nothing for others yet")


def _told(name: str, of: Callable[[Any], str]) -> Callable[[dict[str, Any]], str]:
    """A column of a job's cost record."""
    return lambda job: of(job["usage"][name]) if job["usage"] else ""


_JOB_COLUMNS = (
    ("TASK", lambda job: job["task_id"]),
    ("STATE", lambda job: job["state"]),
    ("TYPE", lambda job: job["type"]),
    ("FOR", lambda job: who(job["requester"])),
    ("EARNED", lambda job: job["earned"]),
    ("RECEIVED", lambda job: job["received_at"]),
    ("TOOK", _told("duration_s", seconds)),
    ("PROCESSOR", _told("cpu_s", seconds)),
    ("MEMORY", _told("memory_bytes_max", size)),
    ("IN", _told("bytes_in", str)),
    ("OUT", _told("bytes_out", str)),
    ("REASON", lambda job: job["reason"]),
)


def _list(invocation: Invocation, states: list[str], limit: int, columns: Sequence[Column], empty: str) -> None:
    with invocation.client() as client:
        found = paging.first(client, "task.list", {"states": states}, limit)
    table(invocation, found, columns, empty=empty)


@app.command(cls=NodeCommand)
def status(
    context: typer.Context,
    task: Annotated[str | None, typer.Argument(metavar="[TASK]", show_default=False)] = None,
) -> None:
    """The state of one task; without one, how many are in each state (with --json: what `daemon status` prints)."""
    invocation = here(context)
    if task is not None:
        found = invocation.call("task.get", {"task": task})
        show(invocation, found, bare=found["state"], lines=_task_lines(found)[:6])
        return
    found = {"running": True, **invocation.call("status")}
    counts = sorted(found["tasks"].items())
    pairs(invocation, found, [*counts, ("running here", f"{found['runs']} of {found['slots']}")])


@app.command("show", cls=NodeCommand)
def show_(context: typer.Context, task: o.TASK) -> None:
    """Everything about a task."""
    invocation = here(context)
    found = invocation.call("task.get", {"task": task})
    pairs(invocation, found, _task_lines(found))


def _task_lines(task: dict[str, Any]) -> list[tuple[str, Any]]:
    result, error = task.get("result") or {}, task.get("error") or {}
    rows: list[tuple[str, Any]] = [
        ("task", task["task_id"]),
        ("state", task["state"]),
        ("type", task["type"]),
        ("executor", who(task["executor"])),
        ("price", f"{task['price'] or '-'} of {task['max_budget']}"),
        ("error", error.get("message")),
        ("held", task.get("held") and f"until {task['held']['until']}: {task['held']['reason']}"),
        ("description", task["description"]),
        ("created", task["created_at"]),
        ("deadline", task["deadline"]),
        ("bids", task["bids"]),
        ("escrow", f"{task['escrow']['state']} {task['escrow']['amount']}"),
        ("exit code", result.get("exit_code")),
        ("signal", result.get("signal")),
        ("took", seconds(result.get("duration_s"))),
        *_usage_lines(result.get("usage") or {}),
        ("result sha256", result.get("sha256")),
        *_output_lines(result),
        *accepting.lines(task),
        ("idempotency key", task["idempotency_key"]),
    ]
    rows += _attempt_lines(task["attempts"])
    return rows + [(f"{t['at']}", f"{t['state']} {t['reason']}") for t in task.get("transitions", [])]


def _usage_lines(usage: dict[str, Any]) -> list[tuple[str, str]]:
    """What a run cost."""
    if not usage:
        return []
    return [
        ("processor", seconds(usage["cpu_s"])),
        ("peak memory", size(usage["memory_bytes_max"]) if usage["memory_bytes_max"] else "not measured"),
        ("bytes in", str(usage.get("bytes_in", ""))),
        ("bytes out", str(usage.get("bytes_out", ""))),
    ]


def _output_lines(result: dict[str, Any]) -> list[tuple[str, str]]:
    """The files it left: each with its size and hash, as far as they are listed."""
    listed = result.get("outputs") or []
    rows = [("output", f"{one['name']}  {one['bytes']} bytes  sha256 {one['sha256']}") for one in listed]
    more = (result.get("outputs_count") or 0) - len(listed)
    rows += [("output", f"and {more} more files; {result['outputs_bytes']} bytes in all")] if more > 0 else []
    rows += [("no output", pattern) for pattern in result.get("outputs_missing") or []]
    return rows + [("left out", why) for why in result.get("outputs_left_out") or []]


def _attempt_lines(attempts: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Who tried, how it ended and why, when, at which price, and what became of the escrow."""
    return [
        (
            f"attempt {one['attempt'] + 1}",
            f"{who(one['executor'])} {one['state']}"
            + (f" ({one['reason']})" if one["reason"] else "")
            + f", {one['started_at']} to {one['ended_at'] or 'now'}, {one['price']} credits"
            + (f", escrow {one['escrow']['state']}" if one["escrow"]["id"] else "")
            + "".join(f", {label} {told}" for label, told in _usage_lines(one.get("usage") or {})),
        )
        for one in attempts
    ]


@app.command(cls=NodeCommand)
def bids(context: typer.Context, task: o.TASK) -> None:
    """The bids for a task with the four terms of their scores, best first."""
    invocation = here(context)
    columns = (
        ("BIDDER", lambda bid: who(bid["bidder"])),
        ("PRICE", lambda bid: bid["price"]),
        ("SCORE", lambda bid: f"{bid['score']:.4f}"),
        ("price", lambda bid: f"{bid['terms']['price']:.4f}"),
        ("reputation", lambda bid: f"{bid['terms']['reputation']:.4f}"),
        ("latency", lambda bid: f"{bid['terms']['latency']:.4f}"),
        ("confidence", lambda bid: f"{bid['terms']['confidence']:.4f}"),
        ("ROUND", lambda bid: bid["round"]),
        ("WON", lambda bid: bid["won"]),
        ("WAIT", lambda bid: seconds(bid.get("queue_wait_s", 0.0) + bid.get("own_ahead_s", 0.0))),
    )
    table(invocation, invocation.call("task.bids", {"task": task}), columns, empty="nobody bid")


@app.command(cls=NodeCommand)
def why(context: typer.Context, task: o.TASK) -> None:
    """Who was asked, who declined and why, how each bid scored, why the winner won."""
    invocation = here(context)
    found = invocation.call("task.why", {"task": task})
    if invocation.json:
        write(json_line(found))
        return
    lines = [found["summary"]]
    for auction in found["rounds"]:
        declined = ", ".join(f"{count} {reason}" for reason, count in sorted(auction["declined"].items()))
        lines.append(
            f"round {auction['round']} ({auction['ring']}): {auction['asked']} asked, closed by {auction['closed_by']}"
            + (f"; declined: {declined}" if declined else "")
        )
        for peer in auction["peers"]:
            bid = peer["bid"]
            told = f"{peer['answer']} {peer['reason']}".rstrip()
            if bid:
                terms = " + ".join(f"{name} {value:.4f}" for name, value in bid["terms"].items())
                told = f"bid {bid['price']}: score {bid['score']:.4f} = {terms}" + (" (won)" if bid["won"] else "")
            lines.append(f"  {who(peer['peer'])}: {told}")
        if auction["reason"]:
            lines.append(f"  {auction['reason']}")
    if len(found["attempts"]) > 1 or any(one["reason"] for one in found["attempts"]):
        lines += [f"{label}: {told}" for label, told in _attempt_lines(found["attempts"])]
    if found["hint"]:
        lines.append(found["hint"])
    write("".join(clean(line) + "\n" for line in lines))


# --- results


@app.command(cls=NodeCommand)
def result(context: typer.Context, task: o.TASK, output_dir: RESULT_DIR = None) -> None:
    """The result of a task that has ended: its output on stdout and stderr, its exit code as this command's.

    With --output-dir its output files are put there, all of them, verified, or none.
    """
    invocation = here(context)
    files = outputs.checked(invocation.home, output_dir) if output_dir else None
    with invocation.client() as client:
        found = client.call("task.get", {"task": task})
        if found["state"] not in FINAL:
            raise NotFoundError(
                f"task {short(found['task_id'])} has no result yet (it is {found['state']})",
                hint=f"`clawnet market wait {short(found['task_id'])}` waits for it",
            )
        if not invocation.json:
            following.Printer(invocation, client).rest(found)
            _print_text(invocation, found)
        kept = outputs.after(invocation, client, found, files)
        code = outputs.ended(invocation, waiting.finish(invocation, found), kept)
    raise typer.Exit(code)


@app.command(cls=NodeCommand)
def logs(context: typer.Context, task: o.TASK, follow: FOLLOW = False, from_end: o.FROM_END = False) -> None:
    """What a task has written so far, from its result when it has ended; with -f, until it ends."""
    invocation = here(context)
    with invocation.client() as client:
        printer = following.Printer(invocation, client, as_lines=invocation.json, from_end=from_end)
        found = client.call("task.get", {"task": task})
        patience = _patience(invocation, client, found["deadline"])
        so_far = not (follow or found["state"] in FINAL)
        ended = following.follow(client, found["task_id"], printer=printer, so_far=so_far, patience=patience)
        printer.rest(ended, patience)


@app.command(cls=NodeCommand)
def wait(context: typer.Context, task: TASKS) -> None:
    """Wait until tasks have ended. One task: its exit code; several: 0 when all succeeded, else 1."""
    invocation = here(context)
    with waiting.terminable(), invocation.client() as client:
        tasks = following.first_look(client, task)
        for one in tasks:
            approving.tell(invocation, one)
        patience = _patience(invocation, client, max(one["deadline"] for one in tasks))
        found = following.follow_all(client, tasks, patience=patience, deadline=invocation.deadline())
    codes = [waiting.exit_code(one) for one in found]
    columns = (
        ("TASK", lambda one: one["task_id"]),
        ("STATE", lambda one: one["state"]),
        ("EXIT", lambda one: waiting.exit_code(one)),
    )
    table(invocation, {"items": found, "next": None}, columns)
    raise typer.Exit(codes[0] if len(codes) == 1 else int(any(codes)))


app.command("approve", cls=NodeCommand)(approving.approve)


@app.command(cls=NodeCommand)
def cancel(
    context: typer.Context,
    task: o.TASK,
    reason: Annotated[str, typer.Option("--reason", metavar="TEXT", help="Told to the executor.")] = "cancelled",
) -> None:
    """Cancel a task: before it runs at no cost, while it runs for the metered part at most."""
    invocation = here(context)
    found = invocation.call("task.cancel", {"task": task, "reason": reason})
    show(invocation, found, bare=found["state"])
