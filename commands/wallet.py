"""`clawnet wallet`: what this node may spend, where credits went, what is locked, and whether the books are right."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from clawnet import money
from clawnet.errors import VerificationError

from . import options as o
from . import paging, wallet_files
from .invocation import NodeCommand, group, here
from .render import json_line, on_terminal, pairs, short, show, table, who, write

AUDIT_TIMEOUT_S = 600.0

OF_TASK = Annotated[str | None, typer.Option("--task", metavar="TASK", help="Only what is about this task.")]

app = group("Balance, history, escrows, sending credits, audit.")


@app.command(cls=NodeCommand)
def balance(context: typer.Context) -> None:
    """What may be spent; at a terminal also what is locked and on its way."""
    invocation = here(context)
    found = invocation.call("wallet.balance")
    show(
        invocation,
        found,
        bare=found["available"],
        lines=[
            ("available", found["available"]),
            ("locked", f"{found['locked']} in {found['open_lines']} open lines"),
            ("incoming", found["incoming"]),
            ("spend limits", _limits(found.get("spend"))),
            ("read-only", found["read_only"]),
            ("account", found["account"]),
        ],
    )


def _limits(spend: dict[str, Any] | None) -> str:
    """The limits of market.spend that are set, with what is left of them; an older daemon knows none."""
    if spend is None:
        return ""
    parts = _limits_of(spend, "")
    for kind in spend.get("kinds", []):
        parts += _limits_of(kind, f" for {kind['kind']} tasks")
    return ", ".join(parts)


def _limits_of(section: dict[str, Any], whose: str) -> list[str]:
    task, day, bound = section["per_task"], section["per_day"], section["open"]
    parts = [f"{task['limit']} for one task{whose}"] if task["limit"] is not None else []
    if day["limit"] is not None:
        parts.append(f"{day['left']} of {day['limit']} left{whose} until {day['resets_at']}")
    if bound["limit"] is not None:
        parts.append(f"{bound['left']} of {bound['limit']} left to lock at once{whose}")
    return parts


@app.command(cls=NodeCommand)
def history(context: typer.Context, limit: o.LIMIT = 50, task: OF_TASK = None) -> None:
    """The entries of this node's own chain, newest first; with --task, what was locked, paid or earned for it.

    An entry may gather several tasks: with --task AMOUNT is that task's share of it.
    """
    invocation = here(context)
    columns = (
        ("SEQ", lambda entry: entry["seq"]),
        ("AT", lambda entry: entry["at"]),
        ("KIND", lambda entry: entry["kind"]),
        ("AMOUNT", lambda entry: entry["amount"] if task is None else _share(entry)),
        ("BALANCE", lambda entry: entry["balance"]),
        ("WITH", lambda entry: who(entry["counterparty"])),
        ("TASK", _tasks),
    )
    with invocation.client() as client:
        found = paging.first(client, "wallet.history", {} if task is None else {"task": task}, limit)
    table(invocation, found, columns, empty="no entries yet" if task is None else "nothing was locked or paid for it")


def _share(entry: dict[str, Any]) -> str:
    """What of an entry is for the one task asked for."""
    return money.format_credits(sum(money.parse_credits(part["amount"]) for part in entry["tasks"]))


def _tasks(entry: dict[str, Any]) -> str:
    """The tasks that an entry is about, as many as a person takes in; all of them for a program."""
    names = list(dict.fromkeys(part["task_id"] for part in entry.get("tasks", []))) or [entry["task_id"] or ""]
    if not on_terminal():
        return ",".join(names)
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(short(name) for name in names[:2]) + more


@app.command(cls=NodeCommand)
def escrows(context: typer.Context) -> None:
    """Open lines: what this node has locked for others, and others for it."""
    invocation = here(context)
    columns = (
        ("ESCROW", lambda line: line["id"]),
        ("ROLE", lambda line: line["role"]),
        ("STATE", lambda line: line["state"]),
        ("AMOUNT", lambda line: line["amount"]),
        ("WITH", lambda line: who(line["counterparty"])),
        ("TASK", lambda line: line["task_id"]),
        ("EXPIRES", lambda line: line["expires_at"]),
    )
    table(invocation, invocation.call("wallet.escrows"), columns, empty="nothing is locked")


@app.command(cls=NodeCommand)
def send(
    context: typer.Context,
    peer: o.PEER_ARGUMENT,
    amount: Annotated[str, typer.Argument(metavar="AMOUNT", help="Credits.", show_default=False)],
    memo: Annotated[str, typer.Option("--memo", metavar="TEXT", help="Kept here; the chain holds its hash.")] = "",
) -> None:
    """Send credits to a member. This cannot be undone."""
    invocation = here(context)
    amount_ucr = money.parse_credits(amount)
    params = {"peer": peer, "amount": money.format_credits(amount_ucr), "memo": memo}
    found = invocation.call("wallet.send", params)
    to = found["to"]
    invocation.say(f"sent {found['amount']} credits to {who(to)}, {to['peer_id']}")
    show(
        invocation,
        found,
        bare=(to["peer_id"], found["amount"], found["seq"]),
        lines=[
            ("to", f"{who(to)} {to['peer_id']}"),
            ("amount", found["amount"]),
            ("entry", f"{found['seq']} {found['hash']}"),
        ],
    )


@app.command(cls=NodeCommand)
def audit(
    context: typer.Context,
    peer: Annotated[str | None, typer.Argument(metavar="[PEER]", show_default=False)] = None,
) -> None:
    """Verify every chain this node holds (or one peer's) from its first entry, and add up the books."""
    invocation = here(context)
    found = invocation.call("wallet.audit", {"peer": peer} if peer else {}, timeout_s=AUDIT_TIMEOUT_S)
    if invocation.json:
        write(json_line(found))
    else:
        columns = (
            ("ACCOUNT", lambda one: one["account"]),
            ("PEER", lambda one: who(one["peer"])),
            ("ENTRIES", lambda one: one["entries"]),
            ("AVAILABLE", lambda one: one["available"]),
            ("LOCKED", lambda one: one["locked"]),
            ("VALID", lambda one: one["ok"]),
            ("PROBLEM", lambda one: one["problem"]),
        )
        table(invocation, {"items": found["accounts"], "next": None}, columns)
        pairs(invocation, found, _sums(found))
    if not found["ok"]:
        bad = [one["account"] for one in found["accounts"] if not one["ok"]]
        raise VerificationError(
            f"{len(bad)} of {len(found['accounts'])} chains are not valid" if bad else "the books do not add up",
            hint="`clawnet wallet audit --json` holds the details",
            accounts=bad,
        )


wallet_files.add(app)


def _sums(found: dict[str, Any]) -> list[tuple[str, Any]]:
    return [
        ("granted", found["granted"] if found["complete"] else f"{found['granted']} (not all chains are known here)"),
        ("available", found["available"]),
        ("locked", found["locked"]),
        ("unclaimed", found["unclaimed"]),
        ("forks", ", ".join(found["forks"])),
    ]
