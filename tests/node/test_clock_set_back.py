"""The clock is set back while something runs: what is sent then can still be read."""

from __future__ import annotations

from tests.node.meshkit import Mesh
from tests.node.trades import pair, shell


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
