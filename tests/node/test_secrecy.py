"""Who hears what of a task: who loses or looks on gets kinds, sizes and salted hashes, never a word of the task."""

from __future__ import annotations

import base64
from typing import Any

import msgspec

from clawnet.storage.schema import TABLES
from clawnet.wire import events as e
from clawnet.wire.codec import encode_payload
from tests.node.meshkit import Member, Mesh

PROMPT, ARGV, ENV, INPUT = b"marker-in-prompt", b"marker-in-argv", b"marker-in-environment", b"marker-in-stdin"
MARKERS = (PROMPT, ARGV, ENV, INPUT)


class Tapped(Mesh):
    """A mesh that keeps what every member was sent, as the bytes of the messages before any encryption."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: dict[str, list[bytes]] = {}

    def carry(self, sender: Member, effect: e.Send) -> None:
        if effect.peer != sender.peer:
            self.heard.setdefault(effect.peer, []).append(encode_payload(effect.message)[1])
        super().carry(sender, effect)


def disk(member: Member) -> bytes:
    """Everything in a member's database."""
    rows = [tuple(member.store.load_all(name)) for name in TABLES]
    return msgspec.msgpack.encode(rows)


def shell(member: Member, **spec: Any) -> int:
    """Submits a command that carries a marker in every part."""
    argv = ["echo", ARGV.decode()]
    data = base64.b64encode(INPUT).decode()
    plain = {"type": "shell", "description": PROMPT.decode(), "argv": argv, "env": {"SECRET": ENV.decode()}}
    return member.call("task.submit", spec={**plain, "stdin_b64": data, "ring": "member", **spec})


def test_only_the_winner_learns_what_the_task_is() -> None:
    mesh = Tapped()
    alice = mesh.found("alice", **{"market.self": "never"})
    bob = mesh.join(alice, "bob", credits_ucr=100_000_000)
    carol = mesh.join(alice, "carol", **{"market.rates.task": "3"})
    mesh.link_all()
    mesh.run(2)
    call = shell(alice)
    mesh.run(90)
    task = alice.task(call)
    assert (task["state"], task["executor"]["name"], task["bids"]) == ("settled", "bob", 2)
    told = {member.name: b"".join(mesh.heard[member.peer]) for member in (alice, bob, carol)}
    # That the search finds what is there is seen at the winner and at the requester.
    assert [marker in told["bob"] for marker in (ARGV, ENV, INPUT)] == [True, True, True]
    assert all(marker in disk(alice) for marker in (PROMPT, ARGV, ENV))
    assert len(told["carol"]) > 1_000
    for marker in MARKERS:
        assert marker not in told["carol"]
        assert marker not in disk(carol)


def test_a_task_that_nobody_takes_is_told_to_nobody() -> None:
    mesh = Tapped()
    alice = mesh.found("alice", **{"market.self": "never"})
    dear = mesh.join(alice, "bob", **{"market.rates.task": "50"})
    mesh.link_all()
    mesh.run(2)
    call = shell(alice)
    mesh.run(60)
    assert alice.task(call)["state"] == "no_bids"
    told = b"".join(mesh.heard[dear.peer])
    assert [marker for marker in MARKERS if marker in told or marker in disk(dear)] == []


def test_equal_tasks_look_unequal_to_whoever_loses() -> None:
    """The salted hash: a loser who guesses the command cannot check the guess."""
    mesh = Tapped()
    alice = mesh.found("alice", **{"market.self": "never"})
    mesh.join(alice, "bob", credits_ucr=100_000_000)
    carol = mesh.join(alice, "carol", **{"market.rates.task": "3"})
    mesh.link_all()
    mesh.run(2)
    hashes = []
    for _ in range(2):
        call = shell(alice)
        mesh.run(30)
        task_id = bytes.fromhex(alice.task(call)["task_id"])
        hashes.append(alice.node.rooms.tasks.get(task_id))
    first, second = hashes
    assert first is not None and second is not None
    assert first.attempts[0].lock_hash != second.attempts[0].lock_hash
    told = b"".join(mesh.heard[carol.peer])
    assert not any(marker in told for marker in MARKERS)
