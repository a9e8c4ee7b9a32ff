"""`clawnet peer`: the mesh. Who is there, inviting and joining, connecting, banning, reputation."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

from clawnet import limits, money, units
from clawnet.errors import DataError, UsageError

from . import options as o
from .invocation import Invocation, NodeCommand, group, here
from .render import json_line, pairs, seconds, show, table, who, write

JOIN_TIMEOUT_S = 120.0
TOKEN_CHARS_MAX = 16_384

app = group("The mesh: invite, join, connect, ban, reputation.")


@app.command("list", cls=NodeCommand)
def list_(
    context: typer.Context,
    nearby: Annotated[
        bool, typer.Option("--nearby", help="Who announces itself on this network instead, of whatever mesh.")
    ] = False,
) -> None:
    """The peers this node knows: own machines first, then members."""
    invocation = here(context)
    if nearby:
        _nearby(invocation)
        return
    columns = (
        ("PEER", lambda peer: peer["peer_id"]),
        ("NAME", lambda peer: peer["name"]),
        ("RING", lambda peer: peer["ring"]),
        ("STATE", lambda peer: peer["state"]),
        ("RTT", lambda peer: seconds(peer["rtt_s"])),
        ("REPUTATION", lambda peer: f"{peer['reputation']:.2f}"),
        ("ADDRESS", lambda peer: peer["address"]),
        ("TRANSPORT", lambda peer: peer["transport"]),
        ("LOAD", lambda peer: f"{peer['load']:.2f}"),
        ("CAN", lambda peer: ",".join(peer["capabilities"])),
        ("VERSION", lambda peer: peer["version"]),
        ("SINCE", lambda peer: peer["connected_at"] or peer["last_seen"]),
        ("CAME BY", lambda peer: peer["came_by"]),
        ("INVITED BY", lambda peer: peer["invited_by"]["name"] if peer["invited_by"] else ""),
    )
    empty = "no peers yet; `clawnet peer invite` makes a token for one"
    table(invocation, invocation.call("peer.list"), columns, empty=empty)


def _nearby(invocation: Invocation) -> None:
    columns = (
        ("PEER", lambda one: one["peer_id"]),
        ("NAME", lambda one: one["name"]),
        ("MESH", lambda one: "this" if one["same_mesh"] else "other"),
        ("STATE", lambda one: one["state"]),
        ("SINCE", lambda one: one["since"]),
        ("ADDRESSES", lambda one: " ".join(one["addresses"])),
    )
    empty = "nobody announces itself on this network; `clawnet doctor` tells whether this node can hear"
    table(invocation, invocation.call("peer.nearby"), columns, empty=empty)


@app.command("show", cls=NodeCommand)
def show_(context: typer.Context, peer: o.PEER_ARGUMENT) -> None:
    """Everything this node knows about a peer."""
    invocation = here(context)
    found = invocation.call("peer.show", {"peer": peer})
    rows = [
        (
            name.removesuffix("_s").replace("_", " "),
            ", ".join(map(str, value)) if isinstance(value, list) else who(value) if isinstance(value, dict) else value,
        )
        for name, value in found.items()
    ]
    pairs(invocation, found, rows)


@app.command(cls=NodeCommand)
def connect(
    context: typer.Context,
    multiaddr: Annotated[str, typer.Argument(metavar="MULTIADDR", show_default=False)],
) -> None:
    """Dial a peer, such as /ip4/203.0.113.7/tcp/4002/p2p/12D3KooW..."""
    if not multiaddr.startswith("/"):
        raise DataError(
            f"{multiaddr!r} is not a multiaddr", hint="write it like /ip4/203.0.113.7/tcp/4002/p2p/12D3KooW..."
        )
    _change(context, "peer.connect", {"address": multiaddr})


@app.command(cls=NodeCommand)
def disconnect(context: typer.Context, peer: o.PEER_ARGUMENT) -> None:
    """Close the link to a peer and do not dial it again by itself."""
    _change(context, "peer.disconnect", {"peer": peer})


@app.command(cls=NodeCommand)
def ban(context: typer.Context, peer: o.PEER_ARGUMENT) -> None:
    """Refuse a peer from now on: this node's own decision, other nodes go on with it."""
    _change(context, "peer.ban", {"peer": peer})
    here(context).say("this is a local refusal; other nodes still deal with that peer")


@app.command(cls=NodeCommand)
def unban(context: typer.Context, peer: o.PEER_ARGUMENT) -> None:
    """Deal with a banned peer again."""
    _change(context, "peer.unban", {"peer": peer})


@app.command(cls=NodeCommand)
def remove(
    context: typer.Context,
    peer: o.PEER_ARGUMENT,
    machine: Annotated[
        bool, typer.Option("--machine", help="This machine alone; its owner and the owner's other machines stay.")
    ] = False,
) -> None:
    """End a membership for good, in the whole mesh: an owner with all its machines. The founder's alone."""
    invocation = here(context)
    found = invocation.call("peer.remove", {"peer": peer, "machine": machine})
    invocation.say("its key never comes back; whoever is to return joins from a new home")
    show(
        invocation,
        found,
        bare=(found["peer"]["peer_id"], found["removed"]),
        lines=[
            ("removed", who(found["peer"])),
            ("with it", ", ".join(who(one) for one in found["machines"] if one != found["peer"])),
            ("stay", ", ".join(who(one) for one in found["kept"])),
            ("mesh key", f"number {found['key_epoch']}, sealed to those who remain"),
            ("told", f"{found['told']} connected peers; the others as they meet one"),
        ],
    )


def _change(context: typer.Context, method: str, params: dict[str, Any]) -> None:
    invocation = here(context)
    found = invocation.call(method, params)
    show(
        invocation,
        found,
        bare=(found["peer"]["peer_id"], found["state"]),
        lines=[
            ("peer", who(found["peer"])),
            ("state", found["state"] + ("" if found["changed"] else " (as before)")),
        ],
    )


@app.command(cls=NodeCommand)
def ping(
    context: typer.Context,
    peer: o.PEER_ARGUMENT,
    count: Annotated[
        int, typer.Option("--count", "-c", metavar="N", min=1, max=limits.PINGS_MAX, help="So many times.")
    ] = 4,
) -> None:
    """Measure the round trip to a connected peer."""
    invocation = here(context)
    found = invocation.call("peer.ping", {"peer": peer, "count": count})
    if invocation.json:
        write(json_line(found))
        return
    times = sorted(found["rtts_s"])
    middle = times[len(times) // 2] if times else None
    show(
        invocation,
        found,
        bare=[f"{value:.6f}" for value in found["rtts_s"]],
        lines=[
            ("peer", who(found["peer"])),
            ("answered", f"{found['received']} of {found['sent']}"),
            ("fastest", seconds(times[0] if times else None)),
            ("median", seconds(middle)),
            ("slowest", seconds(times[-1] if times else None)),
        ],
    )


@app.command(cls=NodeCommand)
def invite(
    context: typer.Context,
    ring: Annotated[str, typer.Option("--ring", metavar="own|member", help="What the newcomer becomes.")] = "member",
    expires: Annotated[str, typer.Option("--expires", metavar="DURATION", help="How long it can be used.")] = "1h",
    uses: Annotated[int, typer.Option("--uses", metavar="N", min=1, max=1000, help="How often.")] = 1,
    ephemeral: Annotated[
        bool,
        typer.Option("--ephemeral", help="Each join makes a throw-away member: for CI jobs, with credits of yours."),
    ] = False,
    credits: Annotated[  # noqa: A002 - typer names the option after it
        str | None, typer.Option("--credits", metavar="CREDITS", help="What each newcomer is given.")
    ] = None,
) -> None:
    """Print a one-line token. Whoever holds it may join this mesh: hand it over secretly."""
    invocation = here(context)
    if ring not in ("own", "member"):
        raise UsageError(f"--ring is own or member, not {ring!r}")
    if ring == "own" and uses != 1:
        raise UsageError("an own invite works once", hint="make one token for each machine")
    params: dict[str, Any] = {
        "ring": ring,
        "expires_s": units.parse_duration_ms(expires, what="--expires") / 1000,
        "uses": uses,
        "ephemeral": ephemeral,
    }
    if credits is not None:
        params["credits"] = money.format_credits(money.parse_credits(credits, what="--credits"))
    found = invocation.call("peer.invite", params)
    grants = "full control of this owner's machines" if ring == "own" else "membership"
    if ephemeral:
        grants = "throw-away membership"
    invocation.say(
        f"grants {grants} ({found['uses']} use{'s' if found['uses'] != 1 else ''}, {found['credits']} credits, "
        f"until {found['expires_at']}); this node must be online when it is used"
    )
    show(invocation, found, bare=found["token"])


@app.command(cls=NodeCommand)
def join(
    context: typer.Context,
    token: Annotated[
        str | None,
        typer.Argument(metavar="[TOKEN | -]", help="The token; better: - for stdin, CLAWNET_JOIN, or the prompt."),
    ] = None,
    leave: Annotated[
        bool, typer.Option("--leave", help="Leave the present mesh and its books; they are archived.")
    ] = False,
) -> None:
    """Join the mesh of whoever made the token."""
    invocation = here(context)
    text = _token(token)
    os.environ.pop("CLAWNET_JOIN", None)  # the daemon that this may start is told below, with --leave or without
    with invocation.client(create_home=True) as client:
        timeout_s = invocation.timeout_s or JOIN_TIMEOUT_S
        found = client.call("peer.join", {"token": text, "leave": leave}, timeout_s=timeout_s)
    show(
        invocation,
        found,
        bare=found["mesh"],
        lines=[
            ("mesh", found["mesh"]),
            ("as", found["ring"]),
            ("by", who(found["inviter"])),
            ("peers", found["peers"]),
            ("granted", found["granted"]),
        ],
    )


def _token(argument: str | None) -> str:
    """The token from where it was put: argument, stdin, CLAWNET_JOIN, or a prompt that does not show it."""
    if argument == "-":
        text = sys.stdin.readline(TOKEN_CHARS_MAX) if sys.stdin is not None else ""
    elif argument is not None:
        text = argument
    elif os.environ.get("CLAWNET_JOIN"):
        text = os.environ["CLAWNET_JOIN"]
    elif sys.stdin is not None and sys.stdin.isatty():
        import getpass

        text = getpass.getpass("Invite token: ")
    else:
        raise UsageError("no token given", hint="clawnet peer join TOKEN, or - to read it from standard input")
    text = text.strip()
    if not text.startswith("clawnet1"):
        raise DataError("this is not an invite token", hint="a token begins with clawnet1; copy the whole line")
    return text


@app.command(cls=NodeCommand)
def reputation(
    context: typer.Context,
    peer: Annotated[str | None, typer.Argument(metavar="[PEER]", show_default=False)] = None,
) -> None:
    """This node's own view of its peers, from what it saw itself and what their books prove."""
    invocation = here(context)
    columns = (
        ("PEER", lambda one: one["peer"]["peer_id"]),
        ("NAME", lambda one: one["peer"]["name"]),
        ("SCORE", lambda one: f"{one['score']:.3f}"),
        ("COMPLETION", lambda one: f"{one['factors']['completion']:.3f}"),
        ("ON TIME", lambda one: f"{one['factors']['on_time']:.3f}"),
        ("ACCURACY", lambda one: f"{one['factors']['accuracy']:.3f}"),
        ("DISPUTES", lambda one: f"{one['factors']['dispute_ratio']:.3f}"),
        ("SWARM", lambda one: f"{one['factors']['swarm']:.3f}"),
        ("EVIDENCE", lambda one: f"{one['evidence']:.1f}"),
    )
    table(invocation, invocation.call("peer.reputation", {"peer": peer} if peer else {}), columns, empty="no peers yet")
