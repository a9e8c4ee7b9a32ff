"""Well-typed messages that make no sense, from a member: nothing raises, nothing is paid twice, the books agree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clawnet.market.records import FINAL_STATES
from clawnet.wire import events as e
from clawnet.wire.codec import decode_payload, encode_payload
from clawnet.wire.messages import Message
from tests.node.meshkit import Member, Mesh, echo
from tests.node.trades import compute, paid, shell, tasks, three
from tests.rules.wire_messages import CONTROL

Pools = dict[type, list[Any]]


class Tap:
    """Every message of a mesh, and the values of their fields by type."""

    def __init__(self, mesh: Mesh) -> None:
        self.seen: list[tuple[str, str, Message]] = []
        self.pools: Pools = {bytes: [], int: [0, 1, 2**32 - 1], str: [""], list: [[]]}
        mesh.fate = self.fate

    def fate(self, sender: Member, receiver: Member, message: Message) -> int:
        if len(self.seen) < 400:
            self.seen.append((sender.name, receiver.name, message))
            for name in message.__struct_fields__:
                value = getattr(message, name)
                pool = self.pools.get(type(value))
                if pool is not None and len(pool) < 300:
                    pool.append(value)
        return 1


def garbled(message: Message, pools: Pools, choice: Callable[[int], int]) -> Message | None:
    """The message with some of its fields replaced by values that other messages had; None when it is not one then."""
    fields = {name: getattr(message, name) for name in message.__struct_fields__}
    for name, value in fields.items():
        pool = [other for other in pools.get(type(value), ()) if _fits(value, other)]
        if pool and choice(3) == 0:
            fields[name] = pool[choice(len(pool))]
    changed = type(message)(**fields)
    kind, payload = encode_payload(changed)
    try:
        return decode_payload(int(kind), payload)
    except Exception:  # noqa: BLE001 - the codec refuses it, as it would on the wire
        return None


def rolls(seed: int) -> Callable[[int], int]:
    """Numbers below a bound, one after the other, from a seed."""
    state = [seed]

    def choice(count: int) -> int:
        state[0] = (state[0] * 6364136223846793005 + 1442695040888963407) % 2**64
        return (state[0] >> 33) % max(1, count)

    return choice


def _fits(value: Any, other: Any) -> bool:
    return not isinstance(value, bytes) or len(value) not in (16, 32) or len(other) == len(value)


def running(seed: str) -> tuple[Mesh, Tap]:
    """A mesh in the middle of things: one task settled, two run, one with output, one is auctioned."""
    mesh = Mesh(seed)
    tap = Tap(mesh)
    alice, bob, carol = three(mesh)
    compute(alice)
    mesh.run(3)
    bob.runner = carol.runner = lambda member, run: None
    compute(alice, deadline_s=300)
    shell(alice, "echo", "x", deadline_s=300)
    compute(bob, deadline_s=300, exclude=["alice"])
    mesh.run(1)
    return mesh, tap


def finish(mesh: Mesh) -> None:
    """Whatever was said, everything comes to an end, and the money is where it should be."""
    for member in mesh.members.values():
        member.runner = echo
        for run in list(member.runs):
            ended = echo(member, run)
            assert ended is not None
            member.feed(ended)
    mesh.run(5)
    mesh.run(3 * 3_600)
    for member in mesh.members.values():
        assert all(task.state in FINAL_STATES for task in tasks(member))
        assert not member.node.rooms.tasks.open, [
            [(a.state, a.closed) for a in task.attempts] for task in member.node.rooms.tasks.open.values()
        ]
    assert all(count == 1 for count in paid(mesh).values())
    mesh.check()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(messages=st.lists(st.tuples(CONTROL, st.integers(0, 2**32)), min_size=5, max_size=25))
def test_messages_made_up(messages: list[tuple[Message, int]]) -> None:
    mesh, tap = running("made up")
    alice, bob, _ = mesh.members.values()
    for number, (message, dice) in enumerate(messages):
        for one in (message, garbled(message, tap.pools, rolls(dice))):
            if one is not None:
                sender, receiver = (alice, bob) if dice % 2 else (bob, alice)
                obligation = number.to_bytes(16, "big") if dice % 3 else None
                receiver.feed(e.MessageIn(sender.peer, number.to_bytes(16, "big"), one, None, obligation))
        mesh.settle()
    finish(mesh)


@pytest.mark.parametrize("seed", range(40))
def test_messages_garbled(seed: int) -> None:
    mesh, tap = running(f"garbled {seed}")
    names = {member.name: member for member in mesh.members.values()}
    dice = names["alice"].entropy

    def choice(count: int) -> int:
        return int.from_bytes(dice(4), "big") % max(1, count)

    for number in range(120):
        sender, receiver, message = tap.seen[choice(len(tap.seen))]
        if choice(4) == 0:
            sender, receiver = receiver, sender
        one = garbled(message, tap.pools, choice)
        if one is not None:
            obligation = number.to_bytes(16, "big") if choice(3) else None
            names[receiver].feed(e.MessageIn(names[sender].peer, number.to_bytes(16, "big"), one, None, obligation))
        if choice(2):
            mesh.settle()
        if choice(20) == 0:
            mesh.run(choice(40))
    finish(mesh)


def test_the_tools_of_this_test_do_garble() -> None:
    _, tap = running("tools")
    changed = 0
    for number, (_, _, message) in enumerate(tap.seen):
        one = garbled(message, tap.pools, lambda count, n=number: n % max(1, count))  # type: ignore[misc]
        changed += one is not None and msgspec.msgpack.encode(one) != msgspec.msgpack.encode(message)
    assert changed > 10 and len({type(message) for _, _, message in tap.seen}) >= 11
