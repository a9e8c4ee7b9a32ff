"""A clock that was off and is set right: measured again, the node writes again without a new connection."""

from __future__ import annotations

import msgspec

from tests.node.meshkit import Mesh


def test_a_measured_skew_counts_more_than_the_hello() -> None:
    mesh = Mesh()
    alice = mesh.found("alice")
    bob = mesh.join(alice, "bob")
    mesh.link_all()
    mesh.run(2)
    members = alice.node.rooms.members
    skew = {bob.peer: 90_000}
    ports = msgspec.structs.replace(alice.node.ctx.ports, skew_ms=skew.get)
    alice.node.ctx.ports = ports
    assert members.clock_off()
    skew[bob.peer] = 10
    assert not members.clock_off()
    del skew[bob.peer]
    assert members.skew_ms() == 0, "before the first answer the time in HELLO counts"
