"""The power fails: what was not synced is gone, and still nothing that may run once runs twice."""

from __future__ import annotations

from clawnet.wire import events as e
from tests.node.meshkit import Member, Mesh, stopped
from tests.node.trades import SELFLESS, one_slot, pair, shell, tasks, three


def test_a_command_that_waited_for_a_slot_does_not_start_again() -> None:
    mesh = Mesh()
    alice, bob = pair(mesh)
    one_slot(bob)
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


def machines(mesh: Mesh) -> tuple[Member, Member, Member]:
    """A requester and two other machines of its owner."""
    alice = mesh.found("alice", **SELFLESS)
    bob, carol = (mesh.join(alice, name, ring="own") for name in ("bob", "carol"))
    mesh.link_all()
    mesh.run(2)
    return alice, bob, carol


def test_own_machines_run_a_command_once_though_its_requester_loses_its_power() -> None:
    mesh = Mesh()
    alice, bob, carol = machines(mesh)
    for worker in (bob, carol):
        worker.runner = lambda member, run: None
    shell(alice, "once", ring="own")
    mesh.run(1)
    assert len(bob.runs) + len(carol.runs) == 1
    runs, idle = (bob, carol) if bob.runs else (carol, bob)
    alice.store.cut_power()
    for worker in (runs, idle):
        mesh.cut(alice, worker)
    alice.boot()
    mesh.link(alice, idle)
    mesh.run(120)
    assert not idle.runs, "it runs on the other machine already"


def test_a_result_for_nothing_is_synced_before_its_executor_hears_that_it_came() -> None:
    mesh = Mesh()
    alice, bob, carol = machines(mesh)
    shell(alice, "once", ring="own")
    mesh.settle()
    alice.store.cut_power()
    alice.boot()
    for worker in (bob, carol):
        mesh.link(alice, worker)
    mesh.run(120)
    assert len(bob.runs) + len(carol.runs) == 1
    assert [task.state for task in tasks(alice)] == ["settled"]


def test_what_was_handed_back_does_not_start_after_a_power_loss() -> None:
    mesh = Mesh()
    alice, bob, carol = three(mesh)
    one_slot(bob)
    bob.runner = lambda member, run: None
    for word in ("first", "second"):
        shell(alice, word, peer=["bob", "carol"] if word == "second" else ["bob"], exclude=[])
        mesh.fate = lambda one, other, message: 0 if other is carol else 1
        mesh.run(1)
    mesh.fate = lambda one, other, message: 1
    (second,) = [job for job in bob.node.rooms.jobs.jobs.values() if job.state == "queued"]
    bob.feed(e.Drain())
    mesh.settle()
    bob.store.cut_power()
    bob.boot()
    mesh.link(alice, bob)
    mesh.run(30)
    assert [run.spec.argv for run in carol.runs] == [["second"]], "it was handed back and went on elsewhere"
    assert second.job not in [run.job for run in bob.runs], "it started here too"


def test_an_idempotency_key_outlives_a_power_loss_whoever_waits() -> None:
    mesh = Mesh()
    alice, bob, carol = machines(mesh)
    spec = {"type": "shell", "argv": ["pay"], "ring": "own", "idempotency_key": "monday"}
    alice.call("task.submit", spec=spec, awaited=True)
    mesh.settle()
    alice.store.cut_power()
    alice.boot()
    for worker in (bob, carol):
        mesh.link(alice, worker)
    alice.call("task.submit", spec=spec, awaited=True)
    mesh.run(60)
    assert len(bob.runs) + len(carol.runs) == 1
