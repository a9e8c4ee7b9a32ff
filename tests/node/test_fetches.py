"""Bulk data between nodes: tried again so often and no more, what a failure means for pay, and what is not taken in."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from msgspec.structs import replace

from clawnet import limits
from clawnet.market.records import FINAL_STATES, Attempt, Task
from clawnet.reputation.receipts import Outcome
from clawnet.wire import events as e
from tests.node.meshkit import Member, Mesh
from tests.node.outcomes import answer
from tests.node.trades import CREDIT, SELFLESS, compute, laws, only, paid, pair, tasks

HOUR_S = 3_600
SIZE = 500


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    built = Mesh()
    yield built
    built.run(2 * HOUR_S)
    laws(built)


def with_input(member: Member, size: int = SIZE, **spec: object) -> int:
    """Submits a task with one input of this size."""
    member.packed["/in"] = bytes(size)
    return compute(member, inputs=[{"name": "in", "path": "/in"}], **{"deadline_s": 600, **spec})


class Failing:
    """Fetches of one node fail so often, with this fault, so many bytes having come; then they go as they should."""

    def __init__(self, member: Member, times: int, fault: str = e.LINK, received: Callable[[int], int] = lambda n: 0):
        self.times = times
        self.fault = fault
        self.received = received
        self.asked_ms: list[int] = []
        self.member = member
        member.fetch_fails = self

    def __call__(self, effect: e.Fetch) -> e.BlobReady | None:
        self.asked_ms.append(self.member.mesh.now_ms)
        if len(self.asked_ms) > self.times:
            return None
        return e.BlobReady(effect.request, "it did not come", b"", self.fault, self.received(len(self.asked_ms)))

    @property
    def pauses_s(self) -> list[int]:
        return [(later - sooner) // 1000 for sooner, later in zip(self.asked_ms, self.asked_ms[1:], strict=False)]


def attempt(alice: Member) -> Attempt:
    return only(alice).attempts[0]


@pytest.mark.parametrize("where", ["inputs", "result"])
def test_what_is_cut_is_asked_for_again_with_growing_pauses(mesh: Mesh, where: str) -> None:
    alice, bob = pair(mesh)
    bob.inline_max = 0
    failing = Failing(bob if where == "inputs" else alice, limits.FETCH_TRIES_MAX - 1)
    with_input(alice)
    mesh.run(300)
    assert failing.pauses_s == [1, 2, 4, 8, 16, 30, 30]
    assert only(alice).state == "settled" and len(bob.runs) == 1


def test_as_long_as_something_comes_nothing_is_given_up(mesh: Mesh) -> None:
    alice, bob = pair(mesh)
    failing = Failing(bob, 20, received=lambda n: 1)
    with_input(alice)
    mesh.run(300)
    assert failing.pauses_s == [1] * 20
    assert only(alice).state == "settled"


def test_inputs_that_never_come_end_the_attempt_with_the_reason(mesh: Mesh) -> None:
    alice, bob = pair(mesh)
    failing = Failing(bob, 100)
    with_input(alice, retries=0)
    mesh.run(300)
    assert len(failing.asked_ms) == limits.FETCH_TRIES_MAX
    task = only(alice)
    assert task.state == "failed" and "it did not come" in task.error_text
    assert attempt(alice).refunded and not bob.runs and not bob.blobs


@pytest.mark.parametrize(("fault", "reason"), [(e.CONTENT, "inputs"), (e.STORAGE, "storage_full")])
def test_inputs_that_are_a_lie_or_have_no_room_end_the_attempt_at_once(mesh: Mesh, fault: str, reason: str) -> None:
    alice, bob = pair(mesh)
    failing = Failing(bob, 100, fault)
    with_input(alice, retries=0)
    mesh.run(10)
    assert len(failing.asked_ms) == 1
    assert only(alice).state == "failed" and "it did not come" in only(alice).error_text
    assert attempt(alice).refunded and attempt(alice).reason == reason


def test_inputs_that_drip_end_with_the_deadline(mesh: Mesh) -> None:
    alice, bob = pair(mesh)
    Failing(bob, 10_000, received=lambda n: 1)
    with_input(alice, deadline_s=60, retries=0)
    mesh.run(100)
    assert only(alice).state == "timed_out"
    assert not bob.node.rooms.jobs.jobs


def test_nothing_is_asked_of_a_holder_that_is_away_and_all_when_it_is_back(mesh: Mesh) -> None:
    alice, bob = pair(mesh)
    failing = Failing(bob, 2)
    with_input(alice)
    mesh.run(2)
    mesh.cut(alice, bob)
    asked = len(failing.asked_ms)
    mesh.run(25)
    assert len(failing.asked_ms) == asked
    mesh.link(alice, bob)
    mesh.run(60)
    assert only(alice).state == "settled"


@pytest.mark.parametrize(
    ("fault", "tries", "outcome"),
    [
        (e.LINK, limits.FETCH_TRIES_MAX, Outcome.LOST),
        (e.CONTENT, 1, Outcome.BAD_RESULT),
        (e.STORAGE, limits.FETCH_TRIES_MAX, None),
    ],
)
def test_a_result_that_cannot_be_had_is_not_paid_and_the_line_comes_back(
    mesh: Mesh, fault: str, tries: int, outcome: Outcome | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    alice, bob = pair(mesh)
    bob.inline_max = 0
    failing = Failing(alice, 10_000, fault)
    told = noted(alice, monkeypatch)
    compute(alice, deadline_s=600, retries=0)
    mesh.run(200)
    assert len(failing.asked_ms) == tries
    task = only(alice)
    assert task.state == "failed"
    assert "its result could not be fetched: it did not come" in task.error_text
    assert told == ([outcome] if outcome else [])
    assert not attempt(alice).refunded and not paid(mesh)
    mesh.run(HOUR_S)
    assert attempt(alice).refunded and not alice.blobs and not bob.blobs
    laws(mesh)


def noted(member: Member, monkeypatch: pytest.MonkeyPatch) -> list[Outcome]:
    """What this node notes of executors from now on."""
    told: list[Outcome] = []
    receipt = member.node.rooms.members.receipt

    def heard(one: Attempt, how: Outcome, task: Task) -> None:
        told.append(how)
        receipt(one, how, task)

    monkeypatch.setattr(member.node.rooms.members, "receipt", heard)
    return told


def test_who_delivered_in_time_is_not_late_because_the_fetch_is_slow(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    alice, bob = pair(mesh)
    bob.inline_max = 0
    told = noted(alice, monkeypatch)
    alice.fetch_fails = lambda effect: e.BlobReady(effect.request, "no room", b"", e.STORAGE, 1)
    compute(alice, deadline_s=60, retries=0)
    mesh.run(100)
    assert only(alice).state == "timed_out" and "the result is there" in only(alice).error_text
    assert attempt(alice).state == "fetching" and told == []
    alice.fetch_fails = lambda effect: None
    mesh.run(60)
    assert paid(mesh) and told == [], "what was done in time is paid as soon as it is here"


def test_who_is_away_with_its_result_when_its_line_ends_was_lost(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    alice, bob = pair(mesh)
    bob.inline_max = 0
    told = noted(alice, monkeypatch)
    alice.fetch_fails = lambda effect: e.BlobReady(effect.request, "cut", b"", e.LINK, 1)
    compute(alice, deadline_s=60, retries=0)
    mesh.run(40)
    mesh.cut(alice, bob)
    mesh.run(100)
    assert only(alice).state == "timed_out" and told == []
    mesh.run(600)
    mesh.link(alice, bob)
    mesh.run(30)
    assert attempt(alice).refunded and not paid(mesh)
    assert told == [Outcome.LOST]


def test_a_result_withheld_goes_to_another_where_the_retries_allow(mesh: Mesh) -> None:
    alice = mesh.found("alice", **SELFLESS)
    bob = mesh.join(alice, "bob", credits_ucr=CREDIT, **{"market.rates.task": "0.01"})
    carol = mesh.join(alice, "carol", credits_ucr=CREDIT)
    mesh.link_all()
    mesh.run(2)
    bob.inline_max = 0
    failing = Failing(alice, 10_000)
    alice.fetch_fails = lambda effect: failing(effect) if effect.peer == bob.peer else None
    compute(alice, deadline_s=600, retries=1)
    mesh.run(300)
    task = only(alice)
    assert task.state == "settled" and [one.peer for one in task.attempts] == [bob.peer, carol.peer]


@pytest.mark.parametrize(("retries", "away_s", "takers"), [(1, 45, "bc"), (1, 20, "b"), (0, 45, "b")])
def test_who_goes_away_with_its_result_is_waited_for_as_long_as_its_lease_unless_nobody_else_may(
    mesh: Mesh, retries: int, away_s: int, takers: str
) -> None:
    alice = mesh.found("alice", **SELFLESS)
    bob = mesh.join(alice, "bob", credits_ucr=CREDIT, **{"market.rates.task": "0.01"})
    carol = mesh.join(alice, "carol", credits_ucr=CREDIT)
    mesh.link_all()
    mesh.run(2)
    bob.inline_max = 0
    alice.fetch_fails = lambda effect: e.BlobReady(effect.request, "cut", b"", e.LINK, 1)
    compute(alice, deadline_s=300, retries=retries)
    mesh.run(40)
    assert attempt(alice).state == "fetching", "as long as it is there it is not silent"
    mesh.cut(alice, bob)
    alice.fetch_fails = lambda effect: None
    mesh.run(away_s)
    mesh.link(alice, bob)
    mesh.run(30)
    task = only(alice)
    assert task.state == "settled" and paid(mesh)
    assert [one.peer for one in task.attempts] == [{"b": bob, "c": carol}[name].peer for name in takers]


def test_the_deadline_tells_why_a_result_that_is_there_is_not_here(mesh: Mesh) -> None:
    alice, bob = pair(mesh)
    bob.inline_max = 0
    Failing(alice, 10_000, received=lambda n: 1)
    compute(alice, deadline_s=60, retries=0)
    mesh.run(100)
    task = only(alice)
    assert task.state == "timed_out"
    assert "could not be fetched: it did not come" in task.error_text
    mesh.run(HOUR_S)
    assert attempt(alice).refunded
    laws(mesh)


# --- what is taken in


@pytest.mark.parametrize(("size", "state"), [(SIZE, "settled"), (SIZE + 1, "no_bids")])
def test_inputs_above_the_rings_bound_are_declined_before_anything_is_locked(mesh: Mesh, size: int, state: str) -> None:
    alice = mesh.found("alice", **SELFLESS)
    bob = mesh.join(alice, "bob", credits_ucr=CREDIT, **{"execution.input_max.member": str(SIZE)})
    mesh.link_all()
    mesh.run(2)
    with_input(alice, size)
    mesh.run(60)
    task = only(alice)
    assert task.state == state
    if state == "no_bids":
        assert "too_large" in task.error_text and not task.attempts
        assert "EscrowLock" not in [kind for _, kind in alice.sent]
    assert bool(bob.runs) == (state == "settled")


def test_one_requester_fills_no_more_than_its_share(mesh: Mesh) -> None:
    alice = mesh.found("alice", **SELFLESS)
    bob = mesh.join(alice, "bob", credits_ucr=CREDIT, **{"storage.requester_max": str(limits.MIB)})
    mesh.link_all()
    mesh.run(2)
    bob.runner = lambda member, run: None
    half = limits.MIB // 2 + 1
    with_input(alice, half)
    mesh.run(5)
    assert len(bob.runs) == 1
    assert bob.node.rooms.quotas.held_bytes(alice.peer) == half
    with_input(alice, half)
    mesh.run(5)
    assert len(bob.runs) == 1
    assert bob.node.rooms.quotas.refusal(alice.peer, "member", half) == "quota"
    assert bob.node.rooms.quotas.refusal(alice.peer, "own", half) is None


def submitted(member: Member) -> list[Task]:
    """Its tasks, oldest first."""
    return sorted(tasks(member), key=lambda task: task.created_ms)


def test_who_holds_its_share_already_is_asked_again_when_some_of_it_has_ended(mesh: Mesh) -> None:
    alice = mesh.found("alice", **SELFLESS)
    bob = mesh.join(alice, "bob", credits_ucr=CREDIT, **{"storage.requester_max": str(limits.MIB)})
    mesh.link_all()
    mesh.run(2)
    runner, bob.runner = bob.runner, lambda member, run: None
    with_input(alice, limits.MIB, deadline_s=60, retries=0)
    mesh.run(5)
    bob.runner = runner
    with_input(alice, limits.MIB // 2)
    mesh.run(30)
    first, second = submitted(alice)
    assert first.state == "executing" and second.state not in FINAL_STATES and not second.attempts
    compute(alice)
    mesh.run(5)
    assert submitted(alice)[2].state == "settled", "who asks for no room on the disk waits for none"
    mesh.run(60)
    assert [task.state for task in submitted(alice)] == ["timed_out", "settled", "settled"]
    with_input(alice, limits.MIB + 1)
    mesh.run(5)
    assert "too_large" in submitted(alice)[3].error_text, "what is never taken is not waited for"


def test_all_nodes_of_an_owner_are_one_requester(mesh: Mesh) -> None:
    alice = mesh.found("alice", **SELFLESS)
    attic = mesh.join(alice, "attic", ring="own", credits_ucr=0, **SELFLESS)
    bob = mesh.join(alice, "bob", credits_ucr=CREDIT, **{"storage.requester_max": str(limits.MIB)})
    carol = mesh.join(alice, "carol", credits_ucr=CREDIT)
    mesh.link_all()
    mesh.run(2)
    bob.runner = lambda member, run: None
    half = limits.MIB // 2 + 1
    with_input(alice, half, peer=["bob"])
    mesh.run(5)
    assert len(bob.runs) == 1
    quotas = bob.node.rooms.quotas
    assert [quotas.held_bytes(one.peer) for one in (alice, attic, carol)] == [half, half, 0]
    assert [quotas.refusal(one.peer, "member", half) for one in (attic, carol)] == ["quota", None]


def test_all_nodes_of_an_owner_are_one_sender(mesh: Mesh) -> None:
    alice = mesh.found("alice", **SELFLESS)
    attic = mesh.join(alice, "attic", ring="own", credits_ucr=CREDIT, **SELFLESS)
    carol = mesh.join(alice, "carol", credits_ucr=CREDIT, **SELFLESS)
    bob = mesh.join(alice, "bob", credits_ucr=CREDIT)
    mesh.link_all()
    mesh.run(2)
    sources: list[str] = []
    bob.fetch_fails = lambda effect: sources.append(effect.source)
    for one in (alice, attic, carol):
        with_input(one, peer=["bob"])
        mesh.run(5)
    assert sources[0] == sources[1] != sources[2]


def test_whoever_leaves_results_unpaid_fills_no_more_than_its_share_with_them(mesh: Mesh) -> None:
    alice = mesh.found("alice", **SELFLESS)
    bob = mesh.join(alice, "bob", credits_ucr=CREDIT, **{"storage.requester_max": str(limits.MIB)})
    mesh.link_all()
    mesh.run(2)
    bob.inline_max = 0
    bob.runner = lambda member, run: answer(member, run, bytes(limits.MIB))
    alice.fetch_fails = lambda effect: e.BlobReady(effect.request, "not now", b"", e.LINK, 1)
    compute(alice, deadline_s=600)
    mesh.run(5)
    assert len(bob.runs) == 1 and bob.node.rooms.quotas.held_bytes(alice.peer) > limits.MIB
    compute(alice, deadline_s=600)
    mesh.run(20)
    assert len(bob.runs) == 1
    alice.fetch_fails = lambda effect: None
    mesh.run(60)
    compute(alice, deadline_s=600)
    mesh.run(20)
    assert len(bob.runs) > 1, "what is paid is no longer counted"


def test_what_has_no_room_is_declined_until_there_is(mesh: Mesh) -> None:
    alice, bob = pair(mesh)
    room = [SIZE - 1]
    bob.node.ctx.ports = replace(bob.node.ctx.ports, room_bytes=lambda: room[0])
    with_input(alice)
    mesh.run(30)
    assert bob.node.rooms.quotas.refusal(alice.peer, "member", SIZE) == "storage_full"
    assert only(alice).state == "bidding" and not only(alice).attempts
    assert "EscrowLock" not in [kind for _, kind in alice.sent]
    room[0] = SIZE
    mesh.run(60)
    assert only(alice).state == "settled"
