"""The power fails: what was not synced is gone, and still nothing that may run once runs twice."""

from __future__ import annotations

from tests.node.meshkit import Mesh, stopped
from tests.node.trades import pair, shell


def test_a_command_that_waited_for_a_slot_does_not_start_again() -> None:
    mesh = Mesh()
    alice, bob = pair(mesh)
    bob.node.rooms.jobs.slots = 1
    bob.runner = lambda member, run: None
    shell(alice, "first")
    shell(alice, "second")
    mesh.run(1)
    assert len(bob.runs) == 1, "the second waits"
    bob.feed(stopped(bob.runs[0].job))
    bob.turn()
    assert len(bob.runs) == 2, "its turn has come"
    bob.store.cut_power()
    bob.boot()
    mesh.run(60)
    assert len(bob.runs) == 2, "it is handed back, not run again"
