"""`clawnet init`: a home with its configuration, its keys, and a mesh of one."""

from __future__ import annotations

import os
import time
from typing import Annotated

import typer

from .invocation import here
from .render import show


def init(
    context: typer.Context,
    name: Annotated[
        str, typer.Option("--name", metavar="NAME", help="The name peers see (default: the host name).")
    ] = "",
    force: Annotated[
        bool, typer.Option("--force", help="Write the configuration anew; keys and mesh stay, the old file is kept.")
    ] = False,
) -> None:
    """Make a home: configuration, keys, a mesh of one. A second run changes nothing and says so."""
    from clawnet.home import initialise

    invocation = here(context)
    ready = initialise(
        invocation.home,
        os.environ,
        invocation.flags,
        entropy=os.urandom,
        now_ms=int(time.time() * 1000),
        name=name,
        force=force,
    )
    charter, mesh, _ = ready.membership.verified(ready.node.public)
    if not ready.made:
        invocation.warn(f"{ready.home.dir} is initialised already; nothing was changed")
        if name and name != ready.config.text("node.name"):
            invocation.warn(
                f"this node is still named {ready.config.text('node.name')}: clawnet config set node.name {name}"
            )
    value = {
        "home": str(ready.home.dir),
        "config_file": str(ready.home.config_file),
        "peer_id": ready.node.peer_id,
        "name": ready.config.text("node.name"),
        "mesh": mesh.hex(),
        "made": list(ready.made),
    }
    lines = [
        ("home", value["home"]),
        ("config", value["config_file"]),
        ("peer id", value["peer_id"]),
        ("name", value["name"]),
        ("mesh", f"{charter.name} ({mesh.hex()[:8]})"),
        ("next", "clawnet run -- echo hello; clawnet peer invite" if ready.made else ""),
    ]
    show(invocation, value, bare=value["peer_id"], lines=lines)
