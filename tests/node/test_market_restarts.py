"""Either side killed after every one of its turns: the task ends, is paid at most once, and the books agree."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.node.meshkit import Member, Mesh
from tests.node.trades import compute, laws, only, paid, pair, shell

TURNS = range(1, 13)
HOUR_S = 3_600
Submit = Callable[[Member], int]


def as_compute(member: Member) -> int:
    return compute(member, deadline_s=120)


def as_shell(member: Member) -> int:
    return shell(member, "echo", "hello", deadline_s=120)


def as_blob(member: Member) -> int:
    member.packed["/in"] = b"input" * 100
    return compute(member, deadline_s=120, inputs=[{"name": "in", "path": "/in"}])


@pytest.mark.parametrize("mode", ["after", "before-speaking", "power"])
@pytest.mark.parametrize("who", ["alice", "bob", "both"])
@pytest.mark.parametrize("submit", [as_compute, as_shell, as_blob])
@pytest.mark.parametrize("turn", TURNS)
def test_a_crash_after_any_turn(turn: int, submit: Submit, who: str, mode: str) -> None:
    mesh = Mesh(f"{turn}")
    alice, bob = pair(mesh)
    submit(alice)
    for member in (alice, bob):
        if who in (member.name, "both"):
            member.crash_at = member.turns + turn
            member.crash_after_commit, member.power_cut = mode != "after", mode == "power"
    mesh.run(30)
    mesh.run(2 * HOUR_S)
    laws(mesh)
    ran = len(bob.runs)
    assert ran <= 1 or submit is not as_shell, "a shell task of retries 0 never runs twice"
    if not list(alice.store.load_all("tasks")):
        assert submit is as_blob or mode == "power", "killed before it was accepted"
        return
    task = only(alice)
    if task.state == "settled":
        assert task.result is not None and sum(paid(mesh).values()) == 1
    elif task.state == "no_bids":
        # The only candidate was gone before it could bid, or had forgotten, by a power cut, what may be run again.
        assert who != "alice" and (turn == 1 or (mode == "power" and submit is not as_shell))
    else:
        assert submit is as_shell and task.error_code == "executor_lost", (task.state, task.error_text)
