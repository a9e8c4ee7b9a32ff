"""The chain as its owner reads it: every entry names the tasks it is about, and these add up."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from clawnet import limits
from clawnet.money import parse_credits
from clawnet.node import tasks as register
from tests.node.meshkit import Member, Mesh, stopped
from tests.node.trades import compute, laws, pair, tasks


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    built = Mesh()
    yield built
    built.run(2 * 3_600)
    laws(built)
    for member in built.members.values():
        adds_up(built, member)


def ask(mesh: Mesh, member: Member, method: str, **params: Any) -> Any:
    number = member.call(method, **params)
    mesh.settle()
    return member.replies[number]


def whole(mesh: Mesh, member: Member, limit: int = 100) -> list[dict[str, Any]]:
    """The history, page by page."""
    items: list[dict[str, Any]] = []
    after = None
    while True:
        page = ask(mesh, member, "wallet.history", limit=limit, **({"after": after} if after else {}))
        items += page["items"]
        after = page["next"]
        if after is None:
            return items


def adds_up(mesh: Mesh, member: Member) -> None:
    """What was locked for tasks was released or came back, and locks, returns and claims make up what was available."""
    sums = dict.fromkeys(("lock", "release", "refund", "claim"), 0)
    for entry in whole(mesh, member):
        parts_ucr = sum(parse_credits(part["amount"]) for part in entry["tasks"])
        if entry["kind"] in sums:
            sums[entry["kind"]] += parts_ucr
            sign = {"lock": -1, "release": 0, "refund": 1, "claim": 1}[entry["kind"]]
            if entry["kind"] != "claim" or entry["tasks"]:
                assert signed(entry["amount"]) == sign * parts_ucr, entry
        else:
            assert entry["tasks"] == []
    assert sums["lock"] == sums["release"] + sums["refund"]


def signed(text: str) -> int:
    return -parse_credits(text[1:]) if text.startswith("-") else parse_credits(text)


def test_a_task_names_its_entries_on_both_sides(mesh: Mesh) -> None:
    alice, bob = pair(mesh)
    call = compute(alice)
    other = compute(alice)
    mesh.run(5)
    view = alice.task(call)
    price = view["price"]
    mine = ask(mesh, alice, "wallet.history", task=view["task_id"])["items"]
    assert [(entry["kind"], entry["tasks"]) for entry in mine] == [
        (kind, [{"task_id": view["task_id"], "attempt": 0, "amount": price}]) for kind in ("release", "lock")
    ]
    theirs = ask(mesh, bob, "wallet.history", task=view["task_id"][:10])["items"]
    assert [(entry["kind"], entry["tasks"][0]["amount"]) for entry in theirs] == [("claim", price)]
    assert theirs[0]["counterparty"]["name"] == "alice"
    named = {part["task_id"] for entry in whole(mesh, alice, 1) for part in entry["tasks"]}
    assert named == {view["task_id"], alice.replies[other]["task_id"]}


def test_what_came_back_is_told(mesh: Mesh) -> None:
    alice, bob = pair(mesh)
    bob.runner = lambda member, run: None
    bob.stopper = lambda member, job: stopped(job)
    call = compute(alice)
    mesh.run(2)
    task = alice.replies[call]["task_id"]
    price = alice.task(call)["price"]
    for member in (alice, bob):
        (line,) = ask(mesh, member, "wallet.escrows")["items"]
        assert (line["task_id"], line["amount"]) == (task, price)
    ask(mesh, alice, "task.cancel", task=task)
    mesh.run(2)
    items = ask(mesh, alice, "wallet.history", task=task)["items"]
    assert [(entry["kind"], entry["amount"]) for entry in items] == [("refund", price), ("lock", "-" + price)]


def test_finished_tasks_are_named_when_the_memory_has_forgotten_them(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(register, "FINISHED_KEPT_MAX", 0)
    alice, bob = pair(mesh)
    call = compute(alice)
    mesh.run(5)
    task = alice.replies[call]["task_id"]
    alice.restart()
    mesh.run(5)
    assert {entry["task_id"] for entry in whole(mesh, alice) if entry["kind"] == "lock"} == {task}
    lines = ask(mesh, alice, "wallet.export")["items"]
    assert {line["task_id"] for line in lines if line["kind"] in ("lock", "release")} == {task}
    foreign = ask(mesh, alice, "wallet.export", account=bob.account.hex())["items"]
    assert all(line["tasks"] == [] for line in foreign)


def test_a_free_task_has_no_entries_and_an_unknown_one_is_no_task(mesh: Mesh) -> None:
    alice = mesh.found("alice")
    call = compute(alice, ring="own")
    mesh.run(2)
    task = alice.replies[call]["task_id"]
    assert ask(mesh, alice, "wallet.history", task=task) == {"items": [], "next": None}
    assert ask(mesh, alice, "wallet.history", task="ab" * 16)["exit_code"] == 66
    assert ask(mesh, alice, "wallet.history", task="xyz")["exit_code"] == 65
    assert ask(mesh, alice, "wallet.history", task="")["exit_code"] == 65


def test_a_start_of_several_ids_names_them(mesh: Mesh) -> None:
    alice, _ = pair(mesh)
    for _ in range(17):
        compute(alice)
    mesh.run(5)
    starts = sorted(task.task_id.hex()[0] for task in tasks(alice))
    digit = next(a for a, b in itertools.pairwise(starts) if a == b)
    error = ask(mesh, alice, "wallet.history", task=digit)
    assert error["exit_code"] == 66 and "begins several task ids" in error["message"]


def test_a_page_ends_early_rather_than_name_half_of_an_entry(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    alice, _ = pair(mesh)
    calls = [compute(alice) for _ in range(6)]
    mesh.run(5)
    want = whole(mesh, alice)
    monkeypatch.setattr(limits, "ENTRY_TASKS_PAGE_MAX", 7)
    assert whole(mesh, alice) == want
    assert len({part["task_id"] for entry in want for part in entry["tasks"]}) == len(calls)


def test_crashes_at_any_turn_leave_no_entry_without_its_task(mesh: Mesh) -> None:
    alice, bob = pair(mesh)
    for member in (alice, bob):
        for after_commit in (False, True):
            for turn in range(1, 5):
                member.crash_at, member.crash_after_commit = member.turns + turn, after_commit
                compute(alice, retries=2, deadline_s=100)
                mesh.run(300)
    unnamed = [entry for entry in whole(mesh, alice) if entry["kind"] in ("lock", "release") and not entry["tasks"]]
    assert not unnamed
