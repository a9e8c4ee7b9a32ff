"""`clawnet demo`: a throw-away mesh of real daemons, real tasks through the whole market, and the books."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from clawnet import money
from clawnet.errors import VerificationError

from . import demo_tasks
from .demo_mesh import NAMES, POLL_S, Mesh, mesh
from .invocation import Invocation, NodeCommand, group, here

BOOKS_TIMEOUT_S = 10.0

app = group("A throw-away mesh on this machine, with real tasks through the whole market.")


@app.command("demo", cls=NodeCommand)
def demo(
    context: typer.Context,
    nodes: Annotated[int, typer.Option("--nodes", metavar="N", min=2, max=len(NAMES), help="Daemons to start.")] = 3,
    input_dir: Annotated[
        str | None,
        typer.Option("--input-dir", metavar="DIR", help="The files the first task hashes (default: clawnet's own)."),
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the daemons running and their homes in place.")] = False,
) -> None:
    """A throw-away mesh on this machine, with real tasks through the whole market, and the books afterwards.

    Each daemon is a process with its own home, keys, database and loopback port; members join by invite. Nothing is
    left behind, and the node of this user is not touched. Exit code 80 when a result or the books are wrong.
    """
    from .demo_report import Progress, show

    invocation = here(context)
    began = time.monotonic()
    with Progress(invocation) as progress, mesh(nodes, keep=keep) as made:
        answer = _perform(invocation, made, input_dir, progress)
        progress.step("leaving everything in place" if keep else "taking everything down")
    answer["kept"] = str(made.directory) if keep else None
    answer["duration_s"] = round(time.monotonic() - began, 3)
    show(invocation, answer)
    if answer["problems"]:
        raise VerificationError("; ".join(answer["problems"]), hint="`clawnet demo --keep` leaves the nodes to look at")


def _perform(invocation: Invocation, made: Mesh, input_dir: str | None, progress: Any) -> dict[str, Any]:
    """Everything between the first process and the last figure."""
    progress.step("reading the files that will travel")
    files = demo_tasks.files_of(input_dir, made.directory)
    progress.step(f"starting {len(made.nodes)} daemons")
    made.start()
    progress.step(f"joining the others by invite: {', '.join(node.name for node in made.nodes[1:])}")
    made.join()
    sandbox = _sandbox(made)
    before = _wallets(made)
    outcomes = []
    for asked in demo_tasks.tasks(files):
        progress.step(f"task {asked.name}: {asked.title.partition(':')[0]}")
        outcome = demo_tasks.perform(made, asked, invocation.deadline())
        outcomes.append(_excused(outcome, sandbox))
    progress.step("reading and auditing the books")
    books = _books(made, before)
    problems = [f"{outcome.name}: {outcome.problem}" for outcome in outcomes if outcome.problem]
    if not books["agree"]:
        problems.append(f"the books do not agree: {books['total']} in wallets, {books['granted']} granted")
    return {
        "ok": not problems,
        "sandbox": sandbox,
        "input": {"path": str(files.shown), "files": len(files.hashes), "bytes": files.size},
        "nodes": [_node(made, number) for number in range(len(made.nodes))],
        "tasks": [{**outcome._asdict(), "ok": not outcome.problem} for outcome in outcomes],
        "books": books,
        "problems": problems,
    }


def _sandbox(made: Mesh) -> dict[str, Any]:
    """What the probe of the sandbox found; all nodes are on one machine, so one probe tells for all."""
    findings = made.founder.client.call("doctor")["findings"]
    found = next((finding for finding in findings if finding["check"] == "sandbox"), None)
    passed = all(node.status["shell"]["member"] == "sandboxed" for node in made.nodes)
    if found is None:
        return {"passed": passed, "reason": "no probe was made", "remedy": "run `clawnet doctor`"}
    return {"passed": passed, "reason": found["message"], "remedy": found["remedy"]}


def _excused(outcome: demo_tasks.Outcome, sandbox: dict[str, Any]) -> demo_tasks.Outcome:
    """Without a sandbox a shell task may find nobody at all, where even this machine must not run it unconfined."""
    if sandbox["passed"] or not outcome.problem or outcome.task["state"] != "no_bids":
        return outcome
    return outcome._replace(problem="", finding=f"no sandbox here, so nobody took it ({outcome.problem})")


def _node(made: Mesh, number: int) -> dict[str, Any]:
    node = made.nodes[number]
    names = ("peer_id", "pid", "home", "listen", "shell")
    joined_by = "" if number == 0 else f"invite of {made.founder.name}"
    return {"name": node.name, "joined_by": joined_by, **{name: node.status[name] for name in names}}


# --- the books


def _wallets(made: Mesh) -> list[dict[str, int]]:
    """Every node's credits in ucr, by its own word."""
    found = [node.client.call("wallet.balance") for node in made.nodes]
    return [{name: money.parse_credits(one[name]) for name in ("available", "locked", "incoming")} for one in found]


def _books(made: Mesh, before: list[dict[str, int]]) -> dict[str, Any]:
    """All wallets and all audits, once nothing is on its way any longer (or the time for that is over)."""
    deadline = time.monotonic() + BOOKS_TIMEOUT_S
    while True:
        after = _wallets(made)
        audits = [node.client.call("wallet.audit") for node in made.nodes]
        books = _summed(made, before, after, audits)
        if books["agree"] or time.monotonic() > deadline:
            return books
        time.sleep(POLL_S)


def _summed(
    made: Mesh, before: list[dict[str, int]], after: list[dict[str, int]], audits: list[dict[str, Any]]
) -> dict[str, Any]:
    granted = money.parse_credits(audits[0]["granted"])
    total = sum(one["available"] + one["locked"] for one in after)
    sound = all(audit["ok"] for audit in audits) and audits[0]["complete"]
    audited = {account["account"] for account in audits[0]["accounts"]}
    everyone = {node.status["account"] for node in made.nodes} == audited
    shown = money.format_credits
    return {
        "granted": shown(granted),
        "total": shown(total),
        "agree": sound and everyone and total == granted,
        "wallets": [
            {
                "node": node.name,
                "before": shown(old["available"]),
                "after": shown(new["available"]),
                "change": _signed(new["available"] - old["available"]),
                "locked": shown(new["locked"]),
            }
            for node, old, new in zip(made.nodes, before, after, strict=True)
        ],
        "audits": [
            {
                "node": node.name,
                "ok": audit["ok"],
                "complete": audit["complete"],
                "chains": len(audit["accounts"]),
                "entries": sum(account["entries"] for account in audit["accounts"]),
                "problems": [account["problem"] for account in audit["accounts"] if account["problem"]],
            }
            for node, audit in zip(made.nodes, audits, strict=True)
        ],
    }


def _signed(amount_ucr: int) -> str:
    return ("+" if amount_ucr > 0 else "") + money.format_credits(amount_ucr)
