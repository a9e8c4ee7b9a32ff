"""`clawnet wallet backup`, `restore` and `export`: the wallet as a file, and its chain for outside eyes."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clawnet.errors import DataError, NotFoundError, NotPermittedError, UsageError
from clawnet.paths import Home

from .invocation import Invocation, NodeCommand, here
from .passphrase import PassphraseFile, passphrase
from .render import short, show

if TYPE_CHECKING:
    from clawnet.backup import Told

RISK = (
    "if an entry of this chain is missing here, the next one written forks it, and a fork convicts: "
    "every member then refuses this account for ever"
)


def add(app: typer.Typer) -> None:
    """Adds these commands to the group `wallet`."""
    app.command("backup", cls=NodeCommand)(backup)
    app.command("restore", cls=NodeCommand)(restore)


def backup(
    context: typer.Context,
    file: Annotated[str, typer.Argument(metavar="FILE", help="Where to write, or - for a pipe.", show_default=False)],
    passphrase_file: PassphraseFile = "",
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write the whole wallet as one encrypted file: keys, membership, chains, peers, open lines. The node may run."""
    from clawnet.backup import back_up

    invocation = here(context)
    home, check = _home(invocation)
    target: Any = sys.stdout.buffer
    if file != "-":
        target = Path(file).absolute()
        if target.exists() and not force:
            raise NotPermittedError(f"{target} exists; it is not overwritten", hint="name another file, or add --force")
        if not target.parent.is_dir():
            raise NotFoundError(f"there is no directory {target.parent}")
    elif sys.stdout.isatty():
        raise UsageError("a wallet is never written to a terminal", hint="name a file: clawnet wallet backup FILE")
    told = back_up(home, target, passphrase(passphrase_file, confirm=True), check_permissions=check)
    if file == "-":
        sys.stdout.buffer.flush()
        return
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
        told = put_back(home, sys.stdin.buffer, secret, force=force)
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


def _home(invocation: Invocation) -> tuple[Home, bool]:
    """The home with its data directory, and whether modes are checked."""
    from clawnet import config

    settings = config.load(invocation.home, os.environ, invocation.flags)
    return settings.home(invocation.home), settings.flag("security.check_permissions")
