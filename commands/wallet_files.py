"""`clawnet wallet backup`, `restore` and `export`: the wallet as a file, and its chain for outside eyes."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from enum import StrEnum
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clawnet import paths
from clawnet.errors import DataError, NotFoundError, NotPermittedError, StorageFullError, UsageError
from clawnet.paths import Home

from .invocation import Invocation, NodeCommand, here
from .passphrase import PassphraseFile, passphrase, standard_input
from .render import json_line, on_terminal, short, show, to_stdout

if TYPE_CHECKING:
    from clawnet.api import Client
    from clawnet.backup import Told
    from clawnet.config import Config

RISK = (
    "if an entry of this chain is missing here, the next one written forks it, and a fork convicts: "
    "every member then refuses this account for ever"
)


class Form(StrEnum):
    """How the chain is written out."""

    JSONL = "jsonl"
    CSV = "csv"


def add(app: typer.Typer) -> None:
    """Adds these commands to the group `wallet`."""
    app.command("backup", cls=NodeCommand)(backup)
    app.command("restore", cls=NodeCommand)(restore)
    app.command("export", cls=NodeCommand)(export)


def backup(
    context: typer.Context,
    file: Annotated[str, typer.Argument(metavar="FILE", help="Where to write, or - for a pipe.", show_default=False)],
    passphrase_file: PassphraseFile = "",
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write the whole wallet as one encrypted file: keys, membership, chains, peers, open lines. The node may run."""
    from clawnet.backup import back_up
    from clawnet.handover import settle

    invocation = here(context)
    home, settings = _home(invocation)
    check, name = settings.flag("security.check_permissions"), settings.text("node.name")
    settle(home, check_permissions=check)
    target = Path(file).absolute()
    if file != "-":
        if target.exists() and not force:
            raise NotPermittedError(f"{target} exists; it is not overwritten", hint="name another file, or add --force")
        if not target.parent.is_dir():
            raise NotFoundError(f"there is no directory {target.parent}")
    elif on_terminal():
        raise UsageError("a wallet is never written to a terminal", hint="name a file: clawnet wallet backup FILE")
    secret = passphrase(passphrase_file, confirm=True)
    if file == "-":
        with to_stdout() as stream:
            back_up(home, stream.buffer, secret, name=name, check_permissions=check)
        return
    told = back_up(home, target, secret, name=name, check_permissions=check)
    _show(invocation, told, "written")


def restore(
    context: typer.Context,
    file: Annotated[
        str, typer.Argument(metavar="[FILE]", help="A file that `wallet backup` wrote, or -.", show_default=False)
    ] = "",
    passphrase_file: PassphraseFile = "",
    force: Annotated[bool, typer.Option("--force", help="Move the node that is here to the archive first.")] = False,
    accept_risk: Annotated[
        bool,
        typer.Option(
            "--accept-risk", help="Without FILE, after 24 h: write the chain again though not all peers have answered."
        ),
    ] = False,
) -> None:
    """Bring a backup into an empty home, with its daemon stopped. Of two homes with these keys only one may ever run.

    The restored chain is read-only until every peer that the backup names has shown what it holds of it; `wallet
    balance` says who has not. What they hold and the backup lacks is taken in.
    """
    invocation = here(context)
    if accept_risk:
        if file:
            raise UsageError("--accept-risk is for a wallet that is restored already: it takes no FILE")
        _accept_risk(invocation)
        return
    if not file:
        raise UsageError("which backup?", hint="clawnet wallet restore FILE")
    from clawnet.backup import restore as put_back

    home, _ = _home(invocation)
    secret = passphrase(passphrase_file, confirm=False)
    if file == "-":
        told = put_back(home, standard_input(), secret, force=force)
    else:
        try:
            with Path(file).open("rb") as source:
                told = put_back(home, source, secret, force=force)
        except FileNotFoundError as error:
            raise NotFoundError(f"there is no file {file}") from error
        except IsADirectoryError as error:
            raise DataError(f"{file} is a directory") from error
    invocation.warn("run this wallet on one machine only: stop and remove it where it came from")
    _show(invocation, told, "restored")


COLUMNS = ("at", "kind", "counterparty", "amount", "balance", "task_id", "seq", "hash")


def export(
    context: typer.Context,
    form: Annotated[Form, typer.Option("--format", help="JSON lines, or CSV of the own chain.")] = Form.JSONL,
    output: Annotated[str, typer.Option("--output", metavar="FILE", help="Write there, mode 0600.")] = "",
) -> None:
    """The own chain, oldest entry first; as JSON lines also the chains of payers that prove its incomes.

    Every JSON line holds the entry as it was signed: docs/LEDGER.md shows how to check one without clawnet.
    """
    invocation = here(context)
    with invocation.client() as client:
        lines = _csv(_entries(client)) if form is Form.CSV else _json_lines(client)
        if output:
            count = _to_file(Path(output).absolute(), lines)
            invocation.say(f"{count} lines written to {output}")
            return
        with to_stdout() as stream:
            stream.writelines(lines)


def _entries(client: Client, account: str = "", last: int | None = None) -> Iterator[dict[str, Any]]:
    """All entries of a chain, page by page, to the head it had at the first page."""
    following: int | None = 0
    while following is not None and (last is None or following <= last):
        params = {"account": account, "from": following} | ({} if last is None else {"to": last})
        page = client.call("wallet.export", params)
        last = page["last"] if last is None else last
        yield from page["items"]
        following = page["next"]


def _json_lines(client: Client) -> Iterator[str]:
    """The own chain, then each payer's up to the last of its entries that was claimed."""
    proving: dict[str, int] = {}
    for entry in _entries(client):
        for item in entry["body"]["items"] if entry["kind"] == "claim" else ():
            proving[item["payer"]] = max(item["seq"], proving.get(item["payer"], 0))
        own = entry["account"]
        yield json_line(entry)
    for payer, last in proving.items():
        if payer != own:
            for entry in _entries(client, payer, last):
                yield json_line(entry)


def _csv(entries: Iterator[dict[str, Any]]) -> Iterator[str]:
    """Rows with a header. What a release or a refund is about stands in the lock before it."""
    import csv
    import io

    def row(values: Iterable[Any]) -> str:
        text = io.StringIO()
        csv.writer(text).writerow(values)
        return text.getvalue()

    locks: dict[int, tuple[str, str]] = {}
    # A header alone would look like an empty chain: it comes when the node has answered.
    begun = [*islice(entries, 1)]
    yield row(COLUMNS)
    for entry in chain(begun, entries):
        party, task = entry["counterparty"], entry["task_id"] or ""
        name = party["peer_id"] if party else ""
        if entry["kind"] == "lock" and len(entry["body"]["lines"]) == 1:
            locks[entry["seq"]] = name, task
        elif entry["kind"] in ("release", "refund"):
            about = dict.fromkeys(locks.get(item["lock_seq"], ("", "")) for item in entry["body"]["items"])
            name, task = next(iter(about)) if len(about) == 1 else ("", "")
        told = {**entry, "counterparty": name, "task_id": task}
        yield row(told[column] for column in COLUMNS)


def _to_file(target: Path, lines: Iterable[str]) -> int:
    """Writes the lines so that the file is there whole or not at all; how many there were."""
    count = 0
    try:
        with paths.whole(target) as file:
            for line in lines:
                file.write(line.encode())
                count += 1
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFullError(f"cannot write {target}: {error.strerror}", hint="make room on the disk") from error
        raise DataError(f"cannot write {target}: {error.strerror}") from error
    return count


def _accept_risk(invocation: Invocation) -> None:
    balance = invocation.call("wallet.balance")
    if balance["restore"] is not None:
        invocation.warn(RISK)
    found = invocation.call("wallet.resume")
    show(
        invocation,
        found,
        bare=found["available"],
        lines=[("available", found["available"]), ("read-only", found["read_only"] or "no longer")],
    )


def _show(invocation: Invocation, told: Told, word: str) -> None:
    value = {
        "peer_id": told.peer_id,
        "path": told.path,
        "made_at": _time(told.made_ms),
        "seq": told.seq if told.seq >= 0 else None,
        "entries": told.entries,
        "peers": [{"peer_id": one.peer, "name": one.name, "ring": one.ring} for one in told.peers],
        "bytes": told.bytes,
    }
    names = ", ".join(f"{one.name} ({short(one.peer)})" for one in told.peers)
    lines = [
        (word, told.path),
        ("peer id", told.peer_id),
        ("made at", value["made_at"]),
        ("own chain", f"up to entry {told.seq}" if told.seq >= 0 else "none"),
        ("peers", names or "none"),
    ]
    show(invocation, value, bare=told.path, lines=lines)


def _time(at_ms: int) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _home(invocation: Invocation) -> tuple[Home, Config]:
    """The home with its data directory, and its configuration."""
    from clawnet import config

    settings = config.load(invocation.home, os.environ, invocation.flags)
    return settings.home(invocation.home), settings
