"""Messages lost, repeated and out of order on a link that stands: paid exactly once, and nothing stays owed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from clawnet.wire.messages import Message
from tests.node.meshkit import Member, Mesh
from tests.node.trades import claims, compute, laws, only, paid, pair, shell

KINDS = ("Winner", "EscrowLock", "Accept", "Result", "Settlement", "Ack", "LedgerPush", "LedgerPull", "Progress")
Fate = Callable[[Member, Member, Message], int]


def first(kind: str, times: int, fate: int, sender_name: str = "") -> Fate:
    """The first `times` messages of this kind (of that sender) have this fate."""
    left = [times]

    def decide(sender: Member, receiver: Member, message: Message) -> int:
        if type(message).__name__ != kind or left[0] == 0 or sender_name not in ("", sender.name):
            return 1
        left[0] -= 1
        return fate

    return decide


def settled_once(mesh: Mesh, alice: Member, bob: Member) -> None:
    mesh.run(30)
    mesh.run(3_600)
    laws(mesh)
    task = only(alice)
    assert task.state == "settled" and task.result is not None, (task.state, task.error_text)
    assert list(paid(mesh).values()) == [1] and claims(bob) == 1
    assert len(bob.runs) == 1


@pytest.mark.parametrize("submit", [compute, shell])
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_lost_messages_are_sent_again(kind: str, times: int, submit: Callable[[Member], int]) -> None:
    mesh = Mesh(kind)
    alice, bob = pair(mesh)
    mesh.fate = first(kind, times, 0)
    submit(alice)
    settled_once(mesh, alice, bob)


@pytest.mark.parametrize("sender", ["alice", "bob"])
def test_a_lost_settlement_of_either_side_is_sent_again(sender: str) -> None:
    mesh = Mesh(sender)
    alice, bob = pair(mesh)
    mesh.fate = first("Settlement", 3, 0, sender)
    compute(alice)
    settled_once(mesh, alice, bob)


@pytest.mark.parametrize("kind", KINDS)
def test_a_message_repeated_changes_nothing(kind: str) -> None:
    mesh = Mesh(kind)
    alice, bob = pair(mesh)
    mesh.fate = first(kind, 1_000, 3)
    compute(alice)
    settled_once(mesh, alice, bob)


def test_everything_repeated_and_the_award_out_of_order() -> None:
    mesh = Mesh()
    alice, bob = pair(mesh)
    mesh.fate = lambda sender, receiver, message: 2
    mesh.reorder = lambda sender, receiver, message: type(message).__name__ in ("Winner", "Accept", "Settlement")
    compute(alice)
    settled_once(mesh, alice, bob)


@pytest.mark.parametrize("kind", KINDS)
def test_late_messages(kind: str) -> None:
    mesh = Mesh(kind)
    alice, bob = pair(mesh)
    mesh.reorder = lambda sender, receiver, message: type(message).__name__ == kind
    compute(alice)
    settled_once(mesh, alice, bob)


@pytest.mark.parametrize("seed", range(20))
def test_a_link_that_loses_and_repeats_at_random(seed: int) -> None:
    mesh = Mesh(f"random {seed}")
    alice, bob = pair(mesh)
    chance = bob.entropy

    def fate(sender: Member, receiver: Member, message: Message) -> int:
        if type(message).__name__ in ("Offer", "Bid"):
            return 1
        return (0, 1, 1, 1, 2)[chance(1)[0] % 5] if mesh.now_ms < calm_ms else 1

    calm_ms = mesh.now_ms + 14_000
    mesh.fate = fate
    shell(alice)
    settled_once(mesh, alice, bob)


def test_a_result_as_a_blob_survives_a_fetch_that_fails() -> None:
    mesh = Mesh()
    alice, bob = pair(mesh)
    bob.inline_max = 0
    mesh.fetching = False
    compute(alice, deadline_s=600)
    mesh.run(3)
    assert only(alice).attempts[0].state == "fetching"
    mesh.fetching = True
    mesh.cut(alice, bob)
    alice.restart()
    mesh.link(alice, bob)
    settled_once(mesh, alice, bob)
    assert not alice.blobs and not bob.blobs
