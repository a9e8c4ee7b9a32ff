"""`clawnet identity`: show, export, import and rotate."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from clawnet import paths
from clawnet.errors import NotPermittedError, UsageError

from .invocation import Invocation, NodeCommand, group, here
from .passphrase import PassphraseFile, passphrase, read, standard_input
from .render import on_terminal, pairs, show, write_bytes

if TYPE_CHECKING:
    from clawnet.config import Config

ROTATE_TIMEOUT_S = 60.0

app = group("This node's keys.")


@app.command("show", cls=NodeCommand)
def show_identity(context: typer.Context) -> None:
    """Who this node is: peer id, account, owner, mesh. No secret is shown."""
    from clawnet import handover
    from clawnet.identity.keys import KeyPair
    from clawnet.identity.membership import load_membership

    invocation = here(context)
    config = _config(invocation)
    check = config.flag("security.check_permissions")
    home = config.home(invocation.home)
    handover.settle(home, check_permissions=check)
    membership = load_membership(home, check_permissions=check)
    node = KeyPair.load(home.node_key, check_permissions=check)
    charter, mesh, member = membership.verified(node.public)
    account = membership.account(node.public)
    value = {
        "peer_id": node.peer_id,
        "account": account.hex(),
        "owner": member.owner.hex(),
        "mesh": mesh.hex(),
        "mesh_name": charter.name,
        "founded": membership.founded,
        "issuer": account in charter.issuers,
        "may_invite": member.may_invite,
        "owner_key_here": home.owner_key.exists(),
        "inviter": membership.inviter,
        "rotations": len(membership.handovers),
        "home": str(home.dir),
    }
    pairs(invocation, value, [(label.replace("_", " "), text) for label, text in value.items()])


@app.command("export", cls=NodeCommand)
def export(
    context: typer.Context,
    file: Annotated[
        str, typer.Argument(metavar="[FILE]", help="Where to write (default: the pipe stdout leads to).")
    ] = "",
    passphrase_file: PassphraseFile = "",
) -> None:
    """Write keys and membership as one encrypted file, mode 0600; never to a terminal."""
    from clawnet import handover
    from clawnet.identity.export import export_identity
    from clawnet.identity.membership import load_membership

    invocation = here(context)
    config = _config(invocation)
    home = config.home(invocation.home)
    target = Path(file).absolute() if file and file != "-" else None
    if target is None and on_terminal():
        raise UsageError("an identity is never written to a terminal", hint="name a file: clawnet identity export FILE")
    if target is not None and target.exists():
        raise NotPermittedError(f"{target} exists; it is not overwritten", hint="name another file")
    check = config.flag("security.check_permissions")
    handover.settle(home, check_permissions=check)
    load_membership(home, check_permissions=check)
    typed = passphrase(passphrase_file, confirm=True)
    data = export_identity(home, typed, os.urandom, check_permissions=check)
    if target is None:
        write_bytes(data)
        return
    paths.write_private(target, data)
    value = {"peer_id": _peer_id(home, check=check), "path": str(target)}
    show(invocation, value, bare=str(target), lines=[("written", str(target)), ("peer id", value["peer_id"])])


@app.command("import", cls=NodeCommand)
def import_(
    context: typer.Context,
    file: Annotated[str, typer.Argument(metavar="FILE", help="A file that `identity export` wrote, or -.")],
    passphrase_file: PassphraseFile = "",
) -> None:
    """Bring keys and membership of an exported file into a home that has none.

    Of the two homes only one may run from then on: two that sign with one key convict each other.
    """
    from clawnet.identity.export import FILE_BYTES_MAX, import_identity

    invocation = here(context)
    if file == "-":
        data = standard_input().read(FILE_BYTES_MAX + 1)
    else:
        data = read(Path(file), FILE_BYTES_MAX + 1)
    home = _config(invocation).home(invocation.home)
    peer_id = import_identity(home, data, passphrase(passphrase_file, confirm=False))
    invocation.warn("run this identity on one machine only: stop and remove it where it came from")
    show(invocation, {"peer_id": peer_id, "path": str(home.dir)}, bare=peer_id, lines=[("peer id", peer_id)])


@app.command("rotate", cls=NodeCommand)
def rotate(context: typer.Context) -> None:
    """Go on under a new node key; the old one is destroyed, and no peer admits it any longer.

    The account, its balance, open tasks and escrows, name, standing and membership stay; peers follow by themselves,
    those that are away when they are back. Exports, backups and invites made before are of the old key: make new ones.
    """
    invocation = here(context)
    done = invocation.call("identity.rotate", timeout_s=ROTATE_TIMEOUT_S)
    invocation.warn("make a new backup: those made before hold the old key, which no peer admits any longer")
    void = done["invites_void"]
    show(
        invocation,
        done,
        bare=done["peer_id"],
        lines=[
            ("peer id", done["peer_id"]),
            ("before", done["previous"]),
            ("account", done["account"]),
            ("told", f"{done['told']} connected peers"),
            ("invites", f"{void} given before cannot be redeemed any longer" if void else ""),
        ],
    )


def _config(invocation: Invocation) -> Config:
    from clawnet import config

    return config.load(invocation.home, os.environ, invocation.flags)


def _peer_id(home: paths.Home, *, check: bool) -> str:
    from clawnet.identity.keys import KeyPair

    return KeyPair.load(home.node_key, check_permissions=check).peer_id
