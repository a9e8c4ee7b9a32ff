"""Answers about memberships that end."""

from __future__ import annotations

from typing import Any, Final

from clawnet.answers_market import Answer, Party


class Removed(Answer):
    """`peer remove`: an owner with all its machines, or one machine (`removed`), is out of the mesh for good.

    `machines` are those known that are out now; `kept` are members that the removed owner had invited and that stay.
    `key_epoch` is the number of the mesh's new key; `told` how many connected peers were told at once.
    """

    peer: Party
    removed: str
    machines: list[Party]
    kept: list[Party]
    key_epoch: int
    told: int


class Left(Answer):
    """How a throw-away member left: what it `returned` to the inviter, and whether that was `accepted` in time.

    `bound` lay in open escrow lines and `kept` could not be sent: both are lost to the mesh with this home.
    """

    inviter: Party
    returned: str
    accepted: bool
    kept: str
    bound: str
    told: int


class Stopped(Answer):
    """The daemon goes: `pid` is watched by the command until it is gone. `left`: with --leave."""

    pid: int
    draining: bool
    left: Left | None = None


MESH_ANSWERS: Final[dict[str, Any]] = {
    "daemon stop": Stopped,
    "peer remove": Removed,
}
