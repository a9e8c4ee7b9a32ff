"""A worker between requesters: it runs no more than it declared, each gets a part, and bids tell the true wait."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clawnet import limits
from clawnet.wire import events as e
from clawnet.wire.messages import Bid, Offer, Requirements, Winner
from tests.node.meshkit import Member, Mesh, echo
from tests.node.trades import CREDIT, SELFLESS, compute, laws, one_slot, shell, tasks

GIB = 2**30
WORDS = ("compute", "op:primes", "op:sha256", "op:sort", "op:wordcount", "shell-execution")


def with_gpus(member: Member, count: int) -> None:
    """The member's machine is found to have four processors, 4 GiB, and so many GPUs."""
    member.feed(e.CapacityChanged(WORDS, ("own", "member"), 4, 4 * GIB, count))


def market(**keys: str) -> tuple[Mesh, Member, Member, Member]:
    """Two requesters, each of an owner of its own, and a worker whose runs end when the test says so."""
    mesh = Mesh()
    alice = mesh.found("alice", **SELFLESS)
    carol = mesh.join(alice, "carol", credits_ucr=9_000 * CREDIT, **SELFLESS)
    bob = mesh.join(alice, "bob", credits_ucr=100 * CREDIT, **SELFLESS, **keys)
    mesh.link_all()
    mesh.run(2)
    bob.runner = lambda member, run: None
    return mesh, alice, bob, carol


def flood(mesh: Mesh, member: Member, count: int, **spec: Any) -> None:
    """So many tasks for bob, accepted or waiting for room there."""
    for _ in range(count):
        compute(member, peer=["bob"], deadline_s=20_000, budget_ucr=3 * CREDIT, **spec)
    mesh.run(1)


def end_one(mesh: Mesh, worker: Member, seconds: float = 0.01) -> None:
    """The run that began first ends."""
    run = next(run for run in worker.runs if run.job in worker.node.rooms.jobs.running)
    ended = echo(worker, run)
    assert ended is not None
    worker.feed(msgspec.structs.replace(ended, duration_s=seconds))
    mesh.run(seconds)


def whose(worker: Member, run: e.Run) -> str:
    """The name of the member that a run is for."""
    job = worker.node.rooms.jobs.jobs.get(run.job)
    return "" if job is None else worker.mesh.members[job.peer].name


def check_machine(worker: Member) -> None:
    """What runs is within what the worker declared, by what was handed to the execution adapters."""
    rooms = worker.node.rooms
    specs = {run.job: run.spec for run in worker.runs}
    card, worker_max = rooms.cards.own, worker.config.integer("execution.queue_max")
    running = [rooms.jobs.jobs[job] for job in rooms.jobs.running if job in rooms.jobs.jobs]
    shorts = [
        job
        for job in running
        if job.kind == "compute" and job.estimated_s <= limits.SHORT_RUN_S and not (job.cpu or job.memory_bytes)
    ]
    held = [*(job for job in running if job not in shorts), *shorts[:1]]
    if not card.slots:
        assert not running, "nothing starts before the machine is known"
        return
    share = card.cpu / card.slots
    assert len(held) <= card.slots
    assert sum(job.cpu or share for job in held) <= card.cpu
    assert sum(specs[job.job].memory_bytes_max for job in held) <= card.memory_bytes
    gpus = [number for job in held for number in specs[job.job].gpus]
    assert len(gpus) == len(set(gpus)) == sum(job.gpu for job in held) <= card.gpu
    assert all(0 <= number < card.gpu for number in gpus)
    waiting = sum(job.state in ("queued", "fetching") for job in rooms.jobs.jobs.values())
    assert waiting <= card.slots + worker_max


# --- fairness


@pytest.mark.slow
def test_a_flood_by_one_does_not_make_another_wait() -> None:
    mesh, alice, bob, carol = market()
    flood(mesh, alice, 1_000)
    for _ in range(30):
        end_one(mesh, bob)
    begun = len(bob.runs)
    compute(carol, peer=["bob"], deadline_s=20_000, budget_ucr=3 * CREDIT)
    mesh.run(1)
    for _ in range(4):
        end_one(mesh, bob)
    assert "carol" in [whose(bob, run) for run in bob.runs[begun:]], "one round of four slots is all she waits"


@pytest.mark.slow
def test_two_that_flood_get_equal_parts() -> None:
    mesh, alice, bob, carol = market()
    flood(mesh, alice, 300)
    flood(mesh, carol, 300)
    for _ in range(20):
        end_one(mesh, bob)
    order: list[str] = []
    for _ in range(60):
        begun = len(bob.runs)
        end_one(mesh, bob)
        order += [whose(bob, run) for run in bob.runs[begun:]]
    count = Counter(order)
    assert abs(count["alice"] - count["carol"]) <= 4, count


@pytest.mark.slow
def test_the_nodes_of_one_owner_share_one_part() -> None:
    mesh, alice, bob, carol = market()
    for n in range(4):
        mesh.join(alice, f"attic{n}", ring="own", credits_ucr=0, **SELFLESS)
    attics = [member for member in mesh.members.values() if member.name.startswith("attic")]
    for attic in attics:
        alice.node.rooms.books.grant(attic.account, 500 * CREDIT, bytes(15) + attic.name[-1:].encode())
        alice.perform(alice.node.end_turn(mesh.now_ms))
        for other in (alice, bob, carol):
            mesh.link(attic, other)
    mesh.run(2)
    for member in (*attics, carol):
        flood(mesh, member, 40)
    for _ in range(8):
        end_one(mesh, bob)
    order: list[str] = []
    for _ in range(48):
        begun = len(bob.runs)
        end_one(mesh, bob)
        order += [whose(bob, run)[:5] for run in bob.runs[begun:]]
    count = Counter(order)
    assert set(count) == {"attic", "carol"} and abs(count["attic"] - count["carol"]) <= 4, count


def test_places_in_the_line_are_shared_too() -> None:
    mesh, alice, bob, carol = market(**{"execution.queue_max": "8"})
    flood(mesh, alice, 60)
    jobs = bob.node.rooms.jobs.jobs
    assert Counter(job.state for job in jobs.values()) == {"running": 4, "queued": 4}
    why = {word for task in tasks(alice) for word in task.refusals} | {
        attempt.reason for task in tasks(alice) for attempt in task.attempts
    }
    assert "full" in why or alice.node.rooms.auctions.waiting, "the others wait at home"
    compute(carol, peer=["bob"], deadline_s=20_000, budget_ucr=3 * CREDIT)
    mesh.run(1)
    assert [task.state for task in tasks(carol)] == ["executing"]


def test_priority_orders_ones_own_tasks_at_the_worker_and_nobody_elses() -> None:
    mesh, alice, bob, carol = market()
    one_slot(bob)
    for priority in (0, -5, 50):
        flood(mesh, alice, 2, priority=priority)
    flood(mesh, carol, 2)
    while bob.node.rooms.jobs.running:
        end_one(mesh, bob)
    seen = [job.priority for job in (carried(bob, run) for run in bob.runs)]
    names = [bob.mesh.members[carried(bob, run).peer].name for run in bob.runs]
    assert [p for p, name in zip(seen, names, strict=True) if name == "alice"] == [0, 50, 50, 0, -5, -5]
    assert names.index("carol") <= 2, names


_JOBS: dict[bytes, Any] = {}


def carried(worker: Member, run: e.Run) -> Any:
    """The job of a run, from the disk, where finished ones are too."""
    from clawnet.market.records import decode_job

    for row in worker.store.load_all("jobs"):
        _JOBS[row[0]] = decode_job(row[-1])
    return _JOBS[run.job]


# --- amounts


def test_processors_and_memory_are_set_aside_while_a_task_runs() -> None:
    mesh, alice, bob, carol = market()
    flood(mesh, alice, 5, cpu=2, memory_bytes=GIB // 2)
    assert len(bob.runs) == 2 and {run.spec.memory_bytes_max for run in bob.runs} == {GIB // 2}
    check_machine(bob)
    end_one(mesh, bob)
    assert len(bob.runs) == 3
    mesh, alice, bob, carol = market()
    flood(mesh, alice, 3, memory_bytes=3 * GIB)
    assert len(bob.runs) == 1
    flood(mesh, carol, 3, memory_bytes=GIB)
    assert len(bob.runs) == 2, "what does not keep the larger one waiting"
    check_machine(bob)


def test_a_task_that_asks_for_nothing_gets_a_slots_share_and_is_held_to_it() -> None:
    mesh, alice, bob, _carol = market(**{"execution.slots": "8"})
    flood(mesh, alice, 10)
    assert len(bob.runs) == 8 and {run.spec.memory_bytes_max for run in bob.runs} == {GIB // 2}
    mesh, alice, bob, _carol = market(**{"execution.memory_max": "64MiB"})
    flood(mesh, alice, 10)
    assert len(bob.runs) == 4 and {run.spec.memory_bytes_max for run in bob.runs} == {64 * 2**20}


def test_gpus_are_given_to_those_that_ask_and_to_one_at_a_time() -> None:
    mesh, alice, bob, _carol = market()
    with_gpus(bob, 2)
    mesh.run(1)
    flood(mesh, alice, 3, gpu=1)
    flood(mesh, alice, 1)
    assert sorted(run.spec.gpus for run in bob.runs) == [(), (0,), (1,)]
    end_one(mesh, bob)
    assert bob.runs[-1].spec.gpus == (0,)
    check_machine(bob)


@pytest.mark.parametrize(
    ("asked", "reason"), [({"cpu": 5}, "cpu"), ({"memory_bytes": 5 * GIB}, "memory"), ({"gpu": 1}, "no_gpu")]
)
def test_what_the_machine_does_not_have_is_not_taken_on(asked: dict[str, int], reason: str) -> None:
    mesh, alice, bob, _carol = market()
    call = compute(alice, peer=["bob"], **asked)
    mesh.run(2)
    assert alice.task(call)["state"] == "no_bids" and not bob.runs
    # One whose requester does not care what the card says:
    peer = alice.peer
    offer = Offer(bytes(16), 1, "compute", bytes(32), 9, 0, CREDIT, mesh.now_ms + 9_000, mesh.now_ms + 9_000, 30,
                  Requirements(["compute"], **asked))  # fmt: skip
    answer = bob.node.rooms.bidding.answer(peer, offer, "member")
    assert getattr(answer, "reason", "") == reason


def test_an_award_that_needs_more_than_was_bid_for_is_refused() -> None:
    mesh, alice, bob, _carol = market()

    def lie(effect: e.Send) -> e.Send:
        if isinstance(effect.message, Offer):
            modest = msgspec.structs.replace(effect.message, requirements=Requirements(["compute"]))
            return msgspec.structs.replace(effect, message=modest)
        return effect

    honest = mesh.carry
    mesh.carry = lambda sender, effect: honest(sender, lie(effect))  # type: ignore[method-assign]
    compute(alice, peer=["bob"], cpu=4, deadline_s=30)
    mesh.run(40)
    assert not bob.runs
    (task,) = tasks(alice)
    assert {attempt.reason for attempt in task.attempts} == {"no_bid"}


@pytest.mark.parametrize("value", [-1, 2**60, 1.5, "4", None, True])
def test_amounts_that_are_none_are_refused(value: Any) -> None:
    mesh, alice, bob, _carol = market()
    compute(alice, peer=["bob"], deadline_s=5)

    def spoil(effect: e.Send) -> e.Send:
        from clawnet.ledger import taskdoc

        if isinstance(effect.message, Winner):
            document = taskdoc.decode(effect.message.document)
            payload = {**msgspec.msgpack.decode(document.payload), "cpu": value}
            changed = msgspec.structs.replace(document, payload=msgspec.msgpack.encode(payload))
            message = msgspec.structs.replace(effect.message, document=taskdoc.encode(changed))
            return msgspec.structs.replace(effect, message=message)
        return effect

    honest = mesh.carry
    mesh.carry = lambda sender, effect: honest(sender, spoil(effect))  # type: ignore[method-assign]
    mesh.run(10)
    assert not bob.runs
    (task,) = tasks(alice)
    assert {attempt.reason for attempt in task.attempts} <= {"invalid", ""}


def test_a_machine_that_shrinks_hands_back_what_it_can_do_no_longer() -> None:
    mesh, alice, bob, _carol = market()
    with_gpus(bob, 1)
    mesh.run(1)
    flood(mesh, alice, 2, gpu=1, retries=0)
    with_gpus(bob, 0)
    mesh.run(1)
    assert len(bob.runs) == 1
    states = Counter(task.state for task in tasks(alice))
    assert states == {"executing": 1, "no_bids": 1}, "nobody else has one"
    check = [(one.state, one.reason) for task in tasks(alice) for one in task.attempts if one.reason]
    assert check == [("rejected", "capacity")]


# --- what bids tell


def bid_of(bob: Member, member: Member, **asked: int) -> Bid:
    now_ms = bob.now_ms
    offer = Offer(bytes(16), 1, "compute", bytes(32), 9, 0, 9 * CREDIT, now_ms + 900_000, now_ms + 900_000, 30,
                  Requirements(["compute"], **asked))  # fmt: skip
    answer = bob.node.rooms.bidding.answer(member.peer, offer, "member")
    assert isinstance(answer, Bid), answer
    return answer


def test_a_bid_tells_each_requester_its_own_wait() -> None:
    mesh, alice, bob, carol = market()
    assert bid_of(bob, alice).queue_wait_s == 0
    flood(mesh, alice, 100)
    flooded, other = bid_of(bob, alice).queue_wait_s, bid_of(bob, carol).queue_wait_s
    assert flooded > 20 and 0 < other < 2.5, (flooded, other)


def test_a_task_that_needs_the_whole_machine_is_told_when_it_is_free() -> None:
    mesh, alice, bob, carol = market()
    flood(mesh, alice, 1)
    assert bid_of(bob, carol).queue_wait_s == 0
    assert 0 < bid_of(bob, carol, cpu=4).queue_wait_s <= 1


def test_won_twice_it_waits_as_long_as_it_is_told_and_no_more_are_taken_on_than_there_are_places() -> None:
    mesh, alice, bob, carol = market(**{"execution.queue_max": "2"})
    one_slot(bob)
    # All three bids are made before any of the awards comes: more is promised than there is room for.
    late: list[Any] = []
    honest = mesh.carry

    def hold(sender: Member, effect: e.Send) -> None:
        if isinstance(effect.message, Winner) and len(late) < 8:
            late.append((sender, effect))
        else:
            honest(sender, effect)

    mesh.carry = hold  # type: ignore[method-assign]
    for _ in range(4):
        shell(alice, "x", peer=["bob"], deadline_s=3_000)
        shell(carol, "x", peer=["bob"], deadline_s=3_000)
    mesh.run(1)
    assert len(late) == 8 and not bob.runs
    mesh.carry = honest  # type: ignore[method-assign]
    for sender, effect in late:
        honest(sender, effect)
    mesh.run(1)
    states = Counter(job.state for job in bob.node.rooms.jobs.jobs.values())
    assert states["running"] == 1 and states["queued"] <= 2, states
    while bob.node.rooms.jobs.running:
        end_one(mesh, bob)
        mesh.run(10)
    mesh.run(600)
    assert {task.state for task in [*tasks(alice), *tasks(carol)]} == {"settled"}


@pytest.mark.slow
def test_what_is_put_up_at_one_moment_is_spread_over_equal_machines() -> None:
    mesh = Mesh()
    alice = mesh.found("alice", **SELFLESS)
    machines = [mesh.join(alice, name, ring="own", **SELFLESS) for name in ("attic", "cellar", "shed")]
    mesh.link_all()
    mesh.run(2)
    for machine in machines:
        machine.runner = lambda member, run: None
    for _ in range(3):  # the first is known better than the others
        shell(alice, "x", ring="own", peer=["attic"])
        mesh.run(1)
        end_one(mesh, machines[0], 10.0)
    for _ in range(48):
        shell(alice, "x", ring="own", deadline_s=3_000)
    mesh.run(1)
    parts = [sum(job.state in ("queued", "running") for job in m.node.rooms.jobs.jobs.values()) for m in machines]
    assert sum(parts) == 48 and min(parts) >= 10, parts


# --- laws

asked = st.fixed_dictionaries(
    {},
    optional={
        "cpu": st.integers(1, 4),
        "memory_bytes": st.sampled_from([1, GIB // 4, GIB, 3 * GIB, 4 * GIB]),
        "gpu": st.integers(1, 2),
        "priority": st.integers(-3, 3),
    },
)
story = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(0, 3), asked),
        st.tuples(st.sampled_from(["end", "end", "fail", "cancel", "restart", "cut", "wait"]), st.integers(0, 99)),
    ),
    max_size=25,
)


@pytest.mark.slow
@given(story, st.integers(0, 3), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_a_worker_never_runs_more_than_it_declared(told: list[Any], queue_max: int, slots: int) -> None:
    mesh, alice, bob, carol = market(**{"execution.queue_max": f"{queue_max}", "execution.slots": f"{slots}"})
    with_gpus(bob, 2)
    mesh.run(1)
    before = bob.boot

    def boot() -> None:
        before()
        with_gpus(bob, 2)

    bob.boot = boot  # type: ignore[method-assign]
    for step in told:
        if step[0] == "submit":
            member, kind = (alice, carol)[step[1] % 2], (compute, shell)[step[1] // 2]
            kind(member, peer=["bob"], deadline_s=400, **step[2])
        else:
            act(mesh, bob, (alice, carol), *step)
        for _ in range(200):
            if not any(member.turn() for member in mesh.members.values()):
                break
            check_machine(bob)
        mesh.settle()
        check_machine(bob)
    bob.runner = echo
    for run in bob.runs:
        if run.job in bob.node.rooms.jobs.running:
            ended = echo(bob, run)
            assert ended is not None
            bob.feed(ended)
    mesh.run(2 * 3_600)
    check_machine(bob)
    laws(mesh)


def act(mesh: Mesh, bob: Member, requesters: tuple[Member, Member], what: str, number: int) -> None:
    """One thing that may happen to a worker."""
    running = [run for run in bob.runs if run.job in bob.node.rooms.jobs.running]
    if what in ("end", "fail") and running:
        run = running[number % len(running)]
        ended = echo(bob, run)
        assert ended is not None
        took_s = random.Random(number).choice([0.01, 1.0, 60.0])
        if what == "fail":
            ended = e.TaskExited(run.job, "failed", "x", None, None, b"", b"", 0, bytes(32), 0, took_s, 0.0, 0)
        bob.feed(msgspec.structs.replace(ended, duration_s=took_s))
    elif what == "cancel":
        member = requesters[number % 2]
        found = tasks(member)
        if found:
            member.call("task.cancel", task=found[number % len(found)].task_id.hex())
    elif what == "restart":
        bob.restart()
    elif what == "cut":
        mesh.cut(bob, requesters[number % 2])
        mesh.relink.append((bob, requesters[number % 2]))
    elif what == "wait":
        mesh.run(number / 10)
