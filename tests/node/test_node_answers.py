"""Every method of the local socket answers in the shape of answers.py; a caller's mistakes are told, never raised."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from clawnet import answers
from tests.node.meshkit import Member, Mesh
from tests.node.trades import CREDIT, compute, pair, shell


def ask(mesh: Mesh, member: Member, method: str, **params: Any) -> Any:
    call = member.call(method, **params)
    mesh.settle()
    return member.replies[call]


def fits(value: Any, shape: Any) -> None:
    """The value has every field of the shape, of its type, and none beside."""
    plain = msgspec.json.decode(msgspec.json.encode(value))
    read = msgspec.convert(plain, type=shape, strict=True)
    known = msgspec.json.decode(msgspec.json.encode(read))
    assert _beside(plain, known) == []


def _beside(value: Any, known: Any, at: str = "") -> list[str]:
    if isinstance(value, dict) and isinstance(known, dict):
        return [
            word
            for name, item in value.items()
            for word in (_beside(item, known[name], f"{at}.{name}") if name in known else [f"{at}.{name}"])
        ]
    if isinstance(value, list):
        return [word for one, other in zip(value, known, strict=True) for word in _beside(one, other, at + "[]")]
    return []


@pytest.fixture(scope="module")
def used() -> tuple[Mesh, Member, Member, list[str]]:
    """A mesh with tasks settled, running, cancelled and unwanted, and some payments."""
    mesh = Mesh()
    alice, bob = pair(mesh)
    calls = [compute(alice), shell(alice, "echo", "x", idempotency_key="k"), compute(alice, budget="0.1")]
    mesh.run(5)
    bob.runner = lambda member, run: None
    calls.append(compute(alice, deadline_s=86_000))
    mesh.run(1)
    calls.append(compute(alice, deadline_s=86_000))
    mesh.run(1)
    alice.call("task.cancel", task=alice.replies[calls[-1]]["task_id"])
    alice.call("wallet.send", peer="bob", amount="1.5", memo="thanks")
    mesh.run(2)
    return mesh, alice, bob, [alice.replies[call]["task_id"] for call in calls]


Used = tuple[Mesh, Member, Member, list[str]]


def test_tasks(used: Used) -> None:
    mesh, alice, _, ids = used
    states = set()
    for identifier in ids:
        task = ask(mesh, alice, "task.get", task=identifier[:12])
        fits(task, answers.Task)
        states.add(task["state"])
        fits(ask(mesh, alice, "task.why", task=identifier), answers.Why)
        fits(ask(mesh, alice, "task.bids", task=identifier), answers.BidList)
    assert states == {"settled", "no_bids", "executing", "cancelled"}
    fits(ask(mesh, alice, "task.list", limit=2), answers.TaskList)
    fits(ask(mesh, alice, "task.list", states=["open"]), answers.TaskList)
    fits(ask(mesh, alice, "task.list", states=["settled"]), answers.TaskList)
    fits(ask(mesh, alice, "task.follow", task=ids[0]), answers.Task)
    fits(ask(mesh, alice, "task.read", task=ids[0], stream="stdout"), answers.ReadAnswer)
    fits(ask(mesh, alice, "task.cancel", task=ids[0]), answers.CancelAnswer)


def test_a_list_goes_on_where_it_stopped(used: Used) -> None:
    mesh, alice, _, ids = used
    seen, after = [], None
    for _ in range(10):
        page = ask(mesh, alice, "task.list", limit=2, after=after)
        seen += [item["task_id"] for item in page["items"]]
        after = page["next"]
        if after is None:
            break
    assert sorted(seen) == sorted(ids)


def test_submissions(used: Used) -> None:
    mesh, alice, _, _ = used
    call = shell(alice, "echo", "x", idempotency_key="k")
    mesh.settle()
    fits(alice.replies[call], answers.Submitted)
    assert alice.replies[call]["created"] is False


def test_peers(used: Used) -> None:
    mesh, alice, bob, _ = used
    fits(ask(mesh, alice, "peer.list"), answers.PeerList)
    fits(ask(mesh, alice, "peer.show", peer="bob"), answers.Peer)
    fits(ask(mesh, alice, "peer.reputation"), answers.ReputationList)
    fits(ask(mesh, alice, "peer.invite", ring="member", credits_ucr=CREDIT), answers.Invite)
    fits(ask(mesh, alice, "peer.ban", peer=bob.peer), answers.PeerChanged)
    fits(ask(mesh, alice, "peer.unban", peer="bob"), answers.PeerChanged)
    fits(ask(mesh, alice, "peer.disconnect", peer="bob"), answers.PeerChanged)
    mesh.link(alice, bob)
    mesh.settle()


def test_wallet_and_status(used: Used) -> None:
    mesh, alice, _, _ = used
    fits(ask(mesh, alice, "wallet.balance"), answers.Balance)
    fits(ask(mesh, alice, "wallet.escrows"), answers.EscrowList)
    history = ask(mesh, alice, "wallet.history", limit=3)
    fits(history, answers.History)
    assert len(history["items"]) == 3 and history["next"]
    fits(ask(mesh, alice, "wallet.history", limit=3, after=history["next"]), answers.History)
    fits(ask(mesh, alice, "wallet.send", peer="bob", amount="0.25"), answers.Sent)
    mesh.run(2)
    report = ask(mesh, alice, "wallet.audit")
    fits(report, answers.AuditReport)
    assert report["ok"] and report["complete"]
    status = {**ask(mesh, alice, "node.status"), "home": "", "activity": {}}
    fits(status, answers.DaemonStatus)


METHODS = (
    *(
        "task.submit",
        "task.check",
        "task.get",
        "task.bids",
        "task.why",
        "task.follow",
        "task.read",
        "task.cancel",
        "task.approve",
        "task.list",
        "job.list",
    ),
    *("peer.list", "peer.show", "peer.connect", "peer.disconnect", "peer.invite", "peer.join", "peer.ban"),
    *("peer.reputation", "wallet.history", "wallet.send", "wallet.audit", "no.such"),
)
NONSENSE: tuple[Any, ...] = (None, "", "x", -1, 2**70, 1.5, [], ["x"], {}, {"a": 1}, True, "\x00", float("inf"))
PARAMS = (
    *("task", "peer", "limit", "after", "states", "stream", "offset", "length", "amount", "amount_ucr", "uses"),
    *("expires_s", "credits_ucr", "ring", "token", "address", "spec", "memo", "reason", "from", "output", "specs"),
)


@pytest.mark.parametrize("method", METHODS)
def test_nonsense_is_answered(method: str) -> None:
    mesh = Mesh(method)
    alice, _ = pair(mesh)
    compute(alice)
    mesh.run(1)
    calls = [alice.call(method)]
    calls += [alice.call(method, **{name: value}) for name in PARAMS for value in NONSENSE]
    good = {"task": "0" * 32, "peer": "bob", "amount": "1"}
    calls += [alice.call(method, **{**good, name: value}) for name in PARAMS for value in NONSENSE]
    mesh.settle()
    for call in calls:
        answer = alice.replies.get(call)
        assert isinstance(answer, dict) or method == "peer.connect", (method, call)
        assert not isinstance(answer, dict) or answer.get("code") != "internal"


@pytest.mark.parametrize(
    "field", ["argv", "op_args", "inputs", "env", "require", "cpu", "deadline_s", "peer", "budget", "stdin_b64"]
)
def test_nonsense_in_a_task_is_answered(field: str) -> None:
    mesh = Mesh(field)
    alice, _ = pair(mesh)
    calls = [compute(alice, **{field: value}) for value in NONSENSE]
    mesh.run(1)
    assert all(call in alice.replies for call in calls)
