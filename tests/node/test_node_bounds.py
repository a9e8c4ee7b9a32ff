"""What is over leaves the memory: rooms hold no more after many tasks than after few; limits bound the rest."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Any

import pytest

from clawnet.node.kernel import Rooms
from clawnet.wire import events as e
from clawnet.wire.messages import Output
from tests.node.meshkit import Member, Mesh, echo
from tests.node.trades import compute, laws, only, pair, tasks

# Kept on purpose, each within a bound of its own: what was seen lately, and what must not begin twice.
KEPT = {
    *("finished", "_over", "recent", "_last", "_learned", "keys", "tail", "streams", "_spent"),
    *("cursors", "released", "payables", "_by_hash"),
}


def sizes(member: Member) -> dict[str, int]:
    """The length of every container in the rooms of a node, by its path."""
    found: dict[str, int] = {}
    seen: set[int] = set()

    def walk(thing: Any, path: str, depth: int) -> None:
        if id(thing) in seen or depth > 6:
            return
        seen.add(id(thing))
        name = path.rpartition(".")[2]
        if name in KEPT or name in ("config", "_ctx", "_rooms", "ports", "rooms"):
            return
        if isinstance(thing, dict | list | set | deque | OrderedDict):
            found[path] = len(thing)
            for item in list(thing.values() if isinstance(thing, dict) else thing)[:50]:
                walk(item, f"{path}[]", depth + 1)
        elif type(thing).__module__.startswith("clawnet"):
            names = getattr(thing, "__struct_fields__", None) or list(getattr(thing, "__dict__", {}))
            for field in names:
                walk(getattr(thing, field), f"{path}.{field}", depth + 1)

    for name in Rooms.__annotations__:
        walk(getattr(member.node.rooms, name), name, 0)
    return {path: size for path, size in found.items() if "[]" not in path}


def work(mesh: Mesh, alice: Member, count: int) -> None:
    alice.packed["/in"] = b"x" * 100
    for number in range(count):
        inputs = [{"name": "in", "path": "/in"}] if number % 2 else []
        compute(alice, deadline_s=60, inputs=inputs)
        mesh.run(1)
    mesh.run(200)


def test_finished_work_leaves_nothing_behind() -> None:
    mesh = Mesh()
    alice, bob = pair(mesh)
    work(mesh, alice, 8)
    before = [sizes(alice), sizes(bob)]
    work(mesh, alice, 24)
    after = [sizes(alice), sizes(bob)]
    laws(mesh)
    assert {task.state for task in tasks(alice)} == {"settled"}
    for few, many in zip(before, after, strict=True):
        grown = {path: (few.get(path, 0), size) for path, size in many.items() if size > few.get(path, 0) + 4}
        assert not grown


def test_a_requester_is_trusted_with_so_much_work_and_no_more() -> None:
    mesh = Mesh()
    alice = mesh.found("alice", **{"market.self": "never"})
    bob = mesh.join(alice, "bob", **{"ledger.exposure_max": "2", "market.rates.task": "1"})
    mesh.link_all()
    mesh.run(2)
    unsaid = ("Settlement", "LedgerPush")
    mesh.fate = lambda one, other, message: 0 if one is alice and type(message).__name__ in unsaid else 1
    for _ in range(5):
        compute(alice, deadline_s=900)
        mesh.run(3)
    assert len(bob.runs) <= 3, "what is delivered and not released is bounded"
    mesh.fate = lambda *_: 1
    mesh.run(120)
    assert {task.state for task in tasks(alice)} == {"settled"}
    mesh.run(3_600)
    laws(mesh)


def test_previews_are_bounded_and_end_with_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = Mesh()
    alice, bob = pair(mesh)
    bob.runner = lambda member, run: None
    compute(alice)
    mesh.run(1)
    task = only(alice)
    for number in range(40):
        chunk = Output(task.task_id, 0, 1, number * 65_536, bytes(65_536))
        alice.feed(e.MessageIn(bob.peer, number.to_bytes(16, "big"), chunk))
    mesh.settle()
    previews = alice.node.rooms.tasks.followers._previews
    assert sum(len(stream) for preview in previews.values() for stream in preview.streams) == 2**20
    ended = echo(bob, bob.runs[0])
    assert ended is not None
    bob.feed(ended)
    mesh.run(2)
    late = Output(task.task_id, 0, 1, 0, b"late")
    alice.feed(e.MessageIn(bob.peer, bytes(16), late))
    mesh.settle()
    assert not previews and alice.node.rooms.tasks.followers._kept_bytes == 0


def test_bids_beyond_the_limit_are_not_looked_at() -> None:
    mesh = Mesh()
    alice, _ = pair(mesh, **{"market.rate_limit_bids": "3"})
    seen: list[Any] = []

    def fate(one: Member, other: Member, message: Any) -> int:
        if type(message).__name__ == "Bid":
            seen.append(message)
            return 10
        return 1

    mesh.fate = fate
    compute(alice)
    mesh.run(2)
    assert only(alice).state == "settled" and seen


def test_known_and_bootstrap_peers_are_dialled() -> None:
    mesh = Mesh()
    alice = mesh.found("alice")
    address = f"/ip4/127.0.0.1/tcp/4001/p2p/{alice.peer}"
    bob = mesh.join(alice, "bob", **{"node.bootstrap_peers": address, "node.min_peers": "2"})
    dialled: list[e.Dial] = []
    bob._do_dial = dialled.append  # type: ignore[attr-defined]
    bob.boot()
    assert [(dial.peer, dial.addresses) for dial in dialled] == [(alice.peer, (address,))]
    mesh.link(alice, bob)
    mesh.run(2)
    mesh.cut(alice, bob)
    dialled.clear()
    mesh.run(61)
    assert alice.peer in {dial.peer for dial in dialled}, "below node.min_peers known members are dialled"
