"""The clock is set back while something runs: what is sent then can still be read."""

from __future__ import annotations

from clawnet.wire.messages import Accept, Result
from tests.node.meshkit import Member, Mesh
from tests.node.trades import compute, pair, shell, three


def test_progress_never_runs_backwards() -> None:
    mesh = Mesh()
    alice, bob = pair(mesh)
    bob.runner = lambda member, run: None
    shell(alice, "long")
    mesh.run(1)
    (job,) = bob.node.rooms.jobs.jobs.values()
    job.received_ms += 60_000  # by a clock that was that far ahead
    mesh.run(15)
    assert ("alice", "Progress") in [(mesh.members[peer].name, kind) for peer, kind in bob.sent]
    assert alice.node.rooms.tasks.open, "the attempt lives"


def set_back(member: Member, ms: int) -> None:
    """The clock goes back; the runtime's timers go with it (clawnet/timers.py)."""
    member.skew_ms -= ms
    member.timers = [(at_ms - ms, number, key) for at_ms, number, key in member.timers]
    member.due = {key: (at_ms - ms, number) for key, (at_ms, number) in member.due.items()}


def test_a_lease_ends_though_the_clock_was_set_back() -> None:
    mesh = Mesh()
    alice, bob, carol = three(mesh)
    for worker in (bob, carol):
        worker.runner = lambda member, run: None
    compute(alice, deadline_s=6_000, retries=1)
    mesh.run(1)
    assert len(bob.runs) + len(carol.runs) == 1
    silent, other = (bob, carol) if bob.runs else (carol, bob)
    mesh.fate = lambda one, to, message: 0 if one is silent else 1
    for member in mesh.members.values():
        set_back(member, 3_600_000)
    mesh.run(80)
    assert other.runs, "who was silent for a lease is replaced"


def test_what_was_not_acknowledged_is_said_again_though_the_clock_was_set_back() -> None:
    mesh = Mesh()
    alice, bob = pair(mesh)
    mesh.fate = lambda one, to, message: 0 if isinstance(message, (Accept, Result)) else 1
    compute(alice, deadline_s=6_000, retries=0)
    mesh.run(1)
    for member in mesh.members.values():
        set_back(member, 3_600_000)
    mesh.fate = lambda one, to, message: 1
    bob.sent.clear()
    mesh.run(60)
    assert (alice.peer, "Result") in bob.sent
