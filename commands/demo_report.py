"""What the demo shows: a line for each step while it works, and the whole story on stdout when it is over."""

from __future__ import annotations

import io
import shutil
import sys
import time
from typing import Any

from .invocation import Invocation
from .render import clean, json_line, on_terminal, seconds, short, who, write

WIDTH_PIPED = 120
TERMS = ("price", "reputation", "latency", "confidence")
OUTPUT_LINES = 3


class Progress:
    """The steps on stderr: a spinner at a terminal, plain lines with --verbose, else nothing."""

    def __init__(self, invocation: Invocation) -> None:
        self._invocation = invocation
        self._status: Any = None
        self._step = ""
        self._began = time.monotonic()

    def __enter__(self) -> Progress:
        if not self._invocation.quiet and sys.stderr is not None and sys.stderr.isatty():
            from rich.console import Console

            self._status = Console(stderr=True, highlight=False, markup=False).status("")
            self._status.start()
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        if self._status is not None:
            if kind is None:
                self._done()
            self._status.stop()

    def step(self, text: str) -> None:
        """The next step begins; the one before is done."""
        if self._status is None:
            self._invocation.say(text)
            return
        self._done()
        self._step, self._began = text, time.monotonic()
        self._status.update(text)

    def _done(self) -> None:
        if self._step:
            self._status.console.print(f"  {self._step} ({seconds(time.monotonic() - self._began)})", style="dim")


def show(invocation: Invocation, answer: dict[str, Any]) -> None:
    """The whole answer: as one JSON object, or told to a person."""
    if invocation.json:
        import msgspec

        from clawnet.answers_demo import Demo

        write(json_line(msgspec.to_builtins(msgspec.convert(answer, Demo))))
        return
    from rich.console import Console

    # Drawn in memory: rich ends the process with a code of its own when nobody reads stdout any longer.
    told = io.StringIO()
    width = shutil.get_terminal_size().columns if on_terminal() else WIDTH_PIPED
    console = Console(
        file=told, width=width, force_terminal=on_terminal(), highlight=False, markup=False, emoji=False, soft_wrap=True
    )
    _nodes(console, answer)
    for number, outcome in enumerate(answer["tasks"], start=1):
        _task(console, number, outcome)
    _books(console, answer["books"])
    _end(console, answer)
    write("".join(f"{line.rstrip()}\n" for line in told.getvalue().splitlines()))


def _table(*columns: str, right: tuple[str, ...] = ()) -> Any:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", no_wrap=True)
    return table


def _heading(console: Any, text: str) -> None:
    console.print()
    console.print(text, style="bold")


def _nodes(console: Any, answer: dict[str, Any]) -> None:
    console.print(f"{len(answer['nodes'])} nodes, each a daemon with its own home, keys and database", style="bold")
    table = _table("NODE", "PID", "PEER", "LISTENS AT", "JOINED BY", right=("PID",))
    for node in answer["nodes"]:
        listens = ", ".join(address.partition("/p2p/")[0] for address in node["listen"])
        joined_by = node["joined_by"] or "founded the mesh"
        table.add_row(node["name"], str(node["pid"]), short(node["peer_id"]), listens, joined_by)
    console.print(table)
    sandbox = answer["sandbox"]
    if sandbox["passed"]:
        console.print("members' shell tasks run in a sandbox that passed its probe")
    else:
        console.print(f"The sandbox does not work here: {clean(sandbox['reason'])}", style="yellow")
        console.print("So shell tasks run on the node that submits them, at price 0.", style="yellow")
        if sandbox["remedy"]:
            console.print(f"Remedy: {clean(sandbox['remedy'])}", style="yellow")


def _task(console: Any, number: int, outcome: dict[str, Any]) -> None:
    task, why = outcome["task"], outcome["why"]
    _heading(console, f"Task {number}, {outcome['name']}: {outcome['title']}")
    for auction in why["rounds"]:
        asked = ", ".join(who(peer["peer"]) for peer in auction["peers"])
        console.print(f"asked: {asked or 'nobody'}; closed by {auction['closed_by'].replace('_', ' ')}")
        for peer in auction["peers"]:
            if peer["answer"] != "bid":
                console.print(f"  {who(peer['peer'])}: {peer['answer']} {clean(peer['reason'])}".rstrip())
    bids = [peer["bid"] for auction in why["rounds"] for peer in auction["peers"] if peer["bid"]]
    if bids:
        table = _table("BIDDER", "PRICE", *TERMS, "SCORE", "", right=("PRICE", *TERMS, "SCORE"))
        for bid in sorted(bids, key=lambda bid: -bid["score"]):
            terms = [f"{bid['terms'][name]:.4f}" for name in TERMS]
            table.add_row(who(bid["bidder"]), bid["price"], *terms, f"{bid['score']:.4f}", "won" if bid["won"] else "")
        console.print(table)
    executor, price = who(task["executor"]) or "nobody", task["price"] or "0"
    escrow = task["escrow"]["state"]
    paid = f"price {price}, escrow {escrow}" if escrow != "none" else "nothing paid"
    console.print(f"winner: {executor}, {paid}; {clean(why['summary'])}")
    _result(console, task)
    console.print(f"{task['state'].replace('_', ' ')}: {clean(outcome['finding'])}", style=_style(outcome["ok"]))
    if task["error"] and task["error"]["hint"]:
        console.print(f"  {clean(task['error']['hint'])}", style="dim")


def _result(console: Any, task: dict[str, Any]) -> None:
    result = task["result"]
    if not result:
        return
    took = seconds(result["duration_s"])
    console.print(f"result: exit code {result['exit_code']} after {took}, sha256 {result['sha256'][:16]}")
    for stream in ("stdout", "stderr"):
        lines = (result[stream] or "").splitlines()
        if len(lines) > OUTPUT_LINES:
            lines = [*lines[: OUTPUT_LINES - 1], f"({len(lines) - OUTPUT_LINES} more lines)", lines[-1]]
        for line in lines:
            console.print(f"  {stream}: {clean(line)[:100]}", style="dim")


def _books(console: Any, books: dict[str, Any]) -> None:
    _heading(console, "The books")
    table = _table("WALLET", "BEFORE", "AFTER", "CHANGE", "LOCKED", right=("BEFORE", "AFTER", "CHANGE", "LOCKED"))
    for one in books["wallets"]:
        table.add_row(one["node"], one["before"], one["after"], one["change"], one["locked"])
    console.print(table)
    for audit in books["audits"]:
        verdict = "every signature and every income good" if audit["ok"] else "; ".join(audit["problems"])
        console.print(f"{audit['node']} audited {audit['chains']} chains, {audit['entries']} entries: {clean(verdict)}")
    relation = "equals" if books["agree"] else "does NOT agree with"
    text = f"the sum of all credits, {books['total']}, {relation} what was granted, {books['granted']}"
    console.print(text, style=_style(books["agree"]))


def _style(ok: bool) -> str:
    return "green" if ok else "bold red"


def _end(console: Any, answer: dict[str, Any]) -> None:
    console.print()
    took = seconds(answer["duration_s"])
    if not answer["kept"]:
        console.print(f"{took}; every process has ended and every file is gone")
        return
    console.print(f"{took}; everything is kept in {answer['kept']}. To reach the nodes:")
    for node in answer["nodes"]:
        console.print(f"  clawnet --home {node['home']} market history")
    console.print("To end them and leave nothing:")
    for node in answer["nodes"]:
        console.print(f"  clawnet --home {node['home']} daemon stop")
    console.print(f"  rm -r {answer['kept']}")
