"""The power fails: what was not synced is gone, and still nothing that may run once runs twice."""

from __future__ import annotations

from tests.node.meshkit import Mesh, stopped
from tests.node.trades import pair, shell, tasks


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


def test_a_task_that_was_accepted_is_still_there_and_one_whose_caller_stays_need_not_be() -> None:
    mesh = Mesh()
    alice, _ = pair(mesh)
    spec = {"type": "shell", "argv": ["true"], "ring": "member"}
    told, stays = alice.call("task.submit", spec=spec), alice.call("task.submit", spec=spec, awaited=True)
    alice.turn()
    kept = alice.replies[told]["task_id"]
    assert alice.replies[stays]["task_id"] != kept
    alice.call("task.submit", spec=spec, awaited=True)
    alice.turn()
    alice.store.cut_power()
    alice.boot()
    assert kept in {task.task_id.hex() for task in tasks(alice)}
    assert len(tasks(alice)) == 2, "what came in the same turn was synced with it, the last one not"
