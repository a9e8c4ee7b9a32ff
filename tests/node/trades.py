"""What the tests of the market between nodes share: small meshes, submissions, and the laws that always hold."""

from __future__ import annotations

from typing import Any

import msgspec

from clawnet.ledger.entries import Claim, Release, parse
from clawnet.market.records import FINAL_STATES, Task, decode_task
from tests.node.meshkit import Member, Mesh

CREDIT = 1_000_000
SELFLESS = {"market.self": "never"}


def pair(mesh: Mesh, **keys: str) -> tuple[Member, Member]:
    """A requester that never works for itself, and one worker with credits."""
    alice = mesh.found("alice", **SELFLESS, **keys)
    bob = mesh.join(alice, "bob", credits_ucr=100 * CREDIT)
    mesh.link_all()
    mesh.run(2)
    return alice, bob


def three(mesh: Mesh, **keys: str) -> tuple[Member, Member, Member]:
    """A requester and two workers."""
    alice = mesh.found("alice", **SELFLESS, **keys)
    bob = mesh.join(alice, "bob", credits_ucr=100 * CREDIT)
    carol = mesh.join(alice, "carol", credits_ucr=100 * CREDIT)
    mesh.link_all()
    mesh.run(2)
    return alice, bob, carol


def compute(member: Member, **spec: Any) -> int:
    """Submits a small operation; the number of the call."""
    task = {"type": "compute", "op": "primes", "op_args": {"limit": 10}, "ring": "member", **spec}
    return member.call("task.submit", spec=task)


def shell(member: Member, *argv: str, **spec: Any) -> int:
    """Submits a command to members."""
    task = {"type": "shell", "argv": list(argv) or ["echo"], "ring": "member", **spec}
    return member.call("task.submit", spec=task)


def tasks(member: Member) -> list[Task]:
    """All tasks on the member's disk."""
    return [decode_task(row[-1]) for row in member.store.load_all("tasks")]


def only(member: Member) -> Task:
    """The one task of the member, as its disk has it."""
    (task,) = tasks(member)
    return task


def paid(mesh: Mesh) -> dict[bytes, int]:
    """How often each task was released, by the salted hash of its lock line, over the own chains of all members."""
    count: dict[bytes, int] = {}
    for member in mesh.members.values():
        lines: dict[tuple[int, int], bytes] = {}
        for row in member.store.load_all("entries"):
            entry = parse(row[-1])
            if entry.account != member.account:
                continue
            for number, line in enumerate(getattr(entry.body, "lines", ())):
                lines[(entry.seq, number)] = line.task
            if isinstance(entry.body, Release):
                for item in entry.body.items:
                    task = lines[(item.lock_seq, item.line)]
                    count[task] = count.get(task, 0) + 1
    return count


def claims(member: Member) -> int:
    """How many releases the member has claimed."""
    entries = [parse(row[-1]) for row in member.store.load_all("entries")]
    mine = [entry.body for entry in entries if entry.account == member.account and isinstance(entry.body, Claim)]
    return sum(item.key is not None for body in mine for item in body.items)


def one_slot(member: Member) -> None:
    """Only one of its jobs runs at a time."""
    jobs = member.node.rooms.jobs
    jobs.resized(msgspec.structs.replace(member.node.rooms.placing.capacity, slots=1))


def laws(mesh: Mesh) -> None:
    """At rest: every task is final, none is paid twice, no line is open, nothing is owed, every book is conserved."""
    for member in mesh.members.values():
        for task in tasks(member):
            assert task.state in FINAL_STATES, (member.name, task.state, [a.state for a in task.attempts])
            assert all(attempt.closed for attempt in task.attempts), [a.state for a in task.attempts]
        assert not member.node.rooms.outbox.rows, (member.name, member.node.rooms.outbox.rows)
        assert not list(member.store.load_all("outbox"))
        assert not member.node.rooms.books.book.open_lines(member.account), member.name
        assert not member.node.rooms.jobs.jobs, (member.name, [j.state for j in member.node.rooms.jobs.jobs.values()])
        assert not member.node.rooms.tasks.open
        proofs = {task.task_id for task in tasks(member) if task.error_code == "verification_failed"}
        assert {row[0] for row in member.store.load_all("blob_grants")} <= proofs, member.name
    assert all(count == 1 for count in paid(mesh).values())
    mesh.check()
