"""Meshes in which not everybody is connected: who dials whom, who heard what, and dials that reach or do not."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from clawnet.wire import events as e
from tests.node.meshkit import Member, Mesh
from tests.node.outcomes import unreachable
from tests.node.trades import CREDIT, SELFLESS

Reaches = Callable[[Member, Member], bool]


class Dials:
    """The dials of a mesh, in order; `reaches` says which end in a link."""

    def __init__(self, mesh: Mesh, reaches: Reaches = lambda dialler, other: True) -> None:
        self.mesh = mesh
        self.reaches = reaches
        self.made: list[tuple[str, str]] = []
        self.silent = False
        """Dials that do not reach never end."""
        mesh.dialled = self._dialled

    def _dialled(self, dialler: Member, dial: e.Dial) -> None:
        other = next((m for m in self.mesh.members.values() if m.peer == dial.peer), None)
        assert other is not None
        assert dial.addresses
        self.made.append((dialler.name, other.name))
        if not self.reaches(dialler, other):
            if not self.silent:
                dialler.feed(unreachable(dial))
        elif other not in self.mesh.linked(dialler):
            self.mesh.link(other, dialler)


def row(mesh: Mesh, *names: str, **of: dict[str, str]) -> list[Member]:
    """Members in a row, each connected to the next alone; the first works for nobody. `of`: configuration by name."""
    founder = mesh.found(names[0], **SELFLESS, **of.get(names[0], {}))
    members = [founder, *(mesh.join(founder, name, credits_ucr=9 * CREDIT, **of.get(name, {})) for name in names[1:])]
    mesh.settle()
    for one, other in pairwise(members):
        mesh.link(one, other)
    mesh.run(1)
    return members


def sent(member: Member, kind: str) -> int:
    """How many messages of a kind this member has sent."""
    return sum(1 for _, what in member.sent if what == kind)
