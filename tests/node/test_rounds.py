"""Every auction of a task has a number of its own, over restarts too."""

from __future__ import annotations

from clawnet.market.records import decode_task
from clawnet.wire.events import MessageIn
from clawnet.wire.messages import Decline, Message, Offer
from tests.node.meshkit import Member, Mesh


def test_the_number_of_a_round_is_on_the_disk_when_its_offer_goes_out() -> None:
    """Whoever was full is asked again later, in the same state of the task: the row is written all the same."""
    mesh = Mesh()
    alice = mesh.found("alice", **{"market.self": "never"})
    mesh.join(alice, "bob")
    mesh.link_all()
    mesh.run(2)
    rounds: list[tuple[int, int]] = []

    def fate(sender: Member, receiver: Member, message: Message) -> int:
        if not isinstance(message, Offer):
            return 1
        kept = decode_task(alice.store.tables["tasks"][(message.task_id,)][-1])
        rounds.append((message.round, kept.round))
        if len(rounds) == 3:
            return 1
        full = Decline(message.task_id, message.round, "full")
        alice.feed(MessageIn(receiver.peer, bytes([len(rounds)]) * 16, full, None, None))
        return 0

    mesh.fate = fate
    call = alice.call("task.submit", spec={"type": "compute", "op": "sha256", "description": "x", "ring": "member"})
    mesh.run(60)
    assert rounds == [(1, 1), (2, 2), (3, 3)]
    assert alice.task(call)["state"] == "settled"
    mesh.check()
