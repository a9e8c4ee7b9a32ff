"""Spend limits in a mesh: asked before every lock, per credential, exact over races, refunds, midnight and restarts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from clawnet.config import Config
from clawnet.ledger.entries import Lock, Refund, Release, Send, parse
from clawnet.market.spending import DAY_MS
from clawnet.money import format_credits, parse_credits
from clawnet.wire.events import RpcCall
from tests.node.meshkit import Member, Mesh, stopped
from tests.node.trades import CREDIT, SELFLESS, compute, laws, pair, tasks, three

DAY = "market.spend.per_day"
TASK = "market.spend.per_task"
OPEN = "market.spend.open"


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    built = Mesh()
    # Noon, so that no test meets a midnight that it did not ask for.
    built.now_ms = built.now_ms // DAY_MS * DAY_MS + DAY_MS // 2
    yield built
    built.run(2 * 3_600)
    laws(built)
    for member in built.members.values():
        assert sum(spent(member).values()) == bound_by_the_chain(member), member.name
        member.boot()
        assert sum(spent(member).values()) == bound_by_the_chain(member), member.name
        assert not any(each.open_ucr for each in member.node.rooms.spending._spent.values()), "nothing is open at rest"
        built.settle()


def spent(member: Member) -> dict[str, int]:
    """What every credential has spent, over all days."""
    return {name: sum(each.days.values()) for name, each in member.node.rooms.spending._spent.items()}


def bound_by_the_chain(member: Member) -> int:
    """The same of all credentials together, by the entries of the own chain: locked and sent, less refunded."""
    total, lines = 0, {}
    for row in member.store.load_all("entries"):
        entry = parse(row[-1])
        if entry.account != member.key.public:
            continue
        body = entry.body
        if isinstance(body, Send):
            total += body.amount_ucr
        elif isinstance(body, Lock):
            for number, line in enumerate(body.lines):
                lines[entry.seq, number] = line.amount_ucr
                total += line.amount_ucr
        elif isinstance(body, Release):
            for item in body.items:
                lines[item.lock_seq, item.line] -= item.amount_ucr
        elif isinstance(body, Refund):
            total -= sum(lines.pop((item.lock_seq, item.line)) for item in body.items)
    return total


def as_user(member: Member, credential: str, method: str, **params: Any) -> int:
    number = member.mesh.next_call()
    member.feed(RpcCall(number, method, params, 0, credential))
    return number


def submit(member: Member, credential: str = "", **spec: Any) -> int:
    task = {"type": "compute", "op": "primes", "op_args": {"limit": 10}, "ring": "member", **spec}
    return as_user(member, credential, "task.submit", spec=task)


def limits_of(mesh: Mesh, member: Member, credential: str = "") -> dict[str, Any]:
    number = as_user(member, credential, "wallet.balance")
    mesh.settle()
    found: dict[str, Any] = member.replies[number]["spend"]
    return found


def price_of_one(mesh: Mesh, alice: Member) -> int:
    """What one task costs here, by having one done."""
    call = compute(alice)
    mesh.run(2)
    price = parse_credits(alice.task(call)["price"])
    assert price > 0
    return price


def states(member: Member) -> dict[str, int]:
    found: dict[str, int] = {}
    for task in tasks(member):
        found[task.state] = found.get(task.state, 0) + 1
    return found


def quiet(member: Member, run: Any) -> None:
    """A worker that never ends what it runs."""


def test_a_budget_above_the_limit_of_a_task_is_refused_at_once(mesh: Mesh) -> None:
    alice, _ = pair(mesh, **{TASK: "2"})
    call = compute(alice, budget="2.5")
    mesh.settle()
    error = alice.replies[call]
    assert error["code"] == "funds" and error["exit_code"] == 79
    for word in (TASK, "2 credits", "2.5 were asked"):
        assert word in error["message"]
    assert f"config set {TASK} 2.5" in error["hint"] and error["limit"] == TASK
    assert not tasks(alice)


def test_a_default_budget_gives_way_to_the_limit_of_a_task(mesh: Mesh) -> None:
    alice, _ = pair(mesh, **{TASK: "2"})
    call = compute(alice)
    mesh.run(2)
    assert alice.task(call)["state"] == "settled" and alice.task(call)["max_budget"] == "2"


def test_a_hundred_at_once_lock_what_the_day_allows_and_no_more(mesh: Mesh) -> None:
    alice, bob = pair(mesh)
    price = price_of_one(mesh, alice)
    bob.runner = quiet
    allowed = 7
    reconfigure(alice, **{DAY: in_credits((allowed + 1) * price + price // 2)})
    calls = [submit(alice, deadline_s=60) for _ in range(100)]
    mesh.run(5)
    assert states(alice) == {"settled": 1, "executing": allowed, "failed": 100 - allowed}
    failed = next(view for call in calls if (view := alice.task(call))["state"] == "failed")
    assert failed["error"]["exit_code"] == 79 and DAY in failed["error"]["message"]
    number = alice.call("task.why", task=failed["task_id"])
    mesh.settle()
    assert DAY in alice.replies[number]["summary"] and "raises it" in alice.replies[number]["hint"]


def in_credits(amount_ucr: int) -> str:
    whole, part = divmod(amount_ucr, CREDIT)
    return f"{whole}.{part:06d}"


def configured(member: Member, **keys: str) -> Config:
    """The member's configuration with these keys changed, as after a reload."""
    held = {name: member.config.shown(name) for name in member.config.names() if member.config.is_set(name)}
    return Config.defaults({**held, **keys})


def reconfigure(member: Member, **keys: str) -> None:
    member.config = configured(member, **keys)
    member.node.ctx.config = member.config


def test_what_is_open_is_bounded_and_comes_free(mesh: Mesh) -> None:
    alice, bob = pair(mesh)
    price = price_of_one(mesh, alice)
    held: list[Any] = []
    runner, bob.runner = bob.runner, lambda member, run: held.append(run)
    reconfigure(alice, **{OPEN: in_credits(3 * price)})
    for _ in range(5):
        submit(alice, deadline_s=600)
    mesh.run(2)
    assert states(alice) == {"settled": 1, "executing": 3, "failed": 2}
    assert limits_of(mesh, alice)["open"]["left"] == "0"
    bob.runner = runner
    for run in held:
        ended = runner(bob, run)
        assert ended is not None
        bob.feed(ended)
    mesh.run(2)
    assert limits_of(mesh, alice)["open"]["used"] == "0"
    submit(alice)
    mesh.run(2)
    assert states(alice) == {"settled": 5, "failed": 2}


def test_a_refund_returns_the_allowance(mesh: Mesh) -> None:
    alice, bob = pair(mesh)
    price = price_of_one(mesh, alice)
    reconfigure(alice, **{DAY: in_credits(2 * price)})
    runner, bob.runner = bob.runner, quiet
    call = submit(alice)
    mesh.run(2)
    assert limits_of(mesh, alice)["per_day"]["left"] == "0"
    refused = submit(alice)
    mesh.run(2)
    assert alice.task(refused)["error"]["exit_code"] == 79
    bob.stopper = lambda member, job: stopped(job)
    alice.call("task.cancel", task=alice.replies[call]["task_id"])
    mesh.run(2)
    assert limits_of(mesh, alice)["per_day"]["used"] == in_credits(price).rstrip("0").rstrip(".")
    bob.runner = runner
    again = submit(alice)
    mesh.run(2)
    assert alice.task(again)["state"] == "settled"


def test_each_credential_has_its_own(mesh: Mesh) -> None:
    alice, _ = pair(mesh)
    price = price_of_one(mesh, alice)
    reconfigure(alice, **{DAY: in_credits(price)})
    first, second, other = submit(alice, "uid:1"), submit(alice, "uid:1"), submit(alice, "uid:2")
    mesh.run(2)
    assert [alice.task(call)["state"] for call in (first, second, other)] == ["settled", "failed", "settled"]
    assert limits_of(mesh, alice, "uid:3")["per_day"]["used"] == "0"
    assert spent(alice) == {"": price, "uid:1": price, "uid:2": price, "uid:3": 0}


def test_a_name_in_the_request_is_no_credential(mesh: Mesh) -> None:
    alice, _ = pair(mesh, **{DAY: "0"})
    spec = {"type": "compute", "op": "primes", "op_args": {"limit": 10}, "credential": "uid:2"}
    call = as_user(alice, "uid:1", "task.submit", spec=spec)
    mesh.settle()
    assert alice.replies[call]["code"] == "bad_input"


def test_payments_count(mesh: Mesh) -> None:
    alice, _ = pair(mesh, **{DAY: "5"})
    ok = as_user(alice, "uid:1", "wallet.send", peer="bob", amount="4")
    over = as_user(alice, "uid:1", "wallet.send", peer="bob", amount="1.5")
    elsewhere = as_user(alice, "uid:2", "wallet.send", peer="bob", amount="1.5")
    invite = as_user(alice, "uid:1", "peer.invite", ring="own", credits="2")
    mesh.settle()
    assert alice.replies[ok]["amount"] == "4" and alice.replies[elsewhere]["amount"] == "1.5"
    assert alice.replies[over]["exit_code"] == 79 and "4 are used" in alice.replies[over]["message"]
    assert alice.replies[invite]["exit_code"] == 79
    task = submit(alice, "uid:1", budget="1.5")
    mesh.settle()
    assert alice.replies[task]["exit_code"] == 79


def test_a_free_task_is_never_refused(mesh: Mesh) -> None:
    alice = mesh.found("alice", **{DAY: "0", TASK: "0", OPEN: "0"})
    mesh.join(alice, "attic", ring="own")
    bob = mesh.join(alice, "bob")
    mesh.link_all()
    mesh.run(2)
    own = compute(alice)
    mesh.run(2)
    assert alice.task(own)["state"] == "settled" and alice.task(own)["executor"]["name"] == "attic"
    only_bob = compute(alice, peer=["bob"])
    mesh.run(2)
    assert alice.task(only_bob)["error"]["exit_code"] == 79 and not bob.runs


def test_the_same_after_a_restart_at_any_turn(mesh: Mesh) -> None:
    alice, _ = pair(mesh)
    price = price_of_one(mesh, alice)
    reconfigure(alice, **{DAY: in_credits(6 * price)})
    for after_commit in (False, True):
        for turn in range(1, 4):
            alice.crash_at, alice.crash_after_commit = alice.turns + turn, after_commit
            submit(alice, retries=2, deadline_s=100)
            submit(alice, retries=2, deadline_s=100)
            mesh.run(300)
            assert sum(spent(alice).values()) == bound_by_the_chain(alice) <= 6 * price
    assert sum(spent(alice).values()) == 6 * price, "and all of it could be used"


def test_a_new_day_at_midnight_and_no_second_one_for_a_clock_set_back(mesh: Mesh) -> None:
    alice, _ = pair(mesh)
    price = price_of_one(mesh, alice)
    reconfigure(alice, **{DAY: in_credits(price)})
    assert [outcome(mesh, alice)] == ["failed"]
    midnight_ms = (mesh.now_ms // DAY_MS + 1) * DAY_MS
    assert limits_of(mesh, alice)["per_day"]["resets_at"].endswith("T00:00:00.000Z")
    mesh.run((midnight_ms - mesh.now_ms) / 1000)
    assert mesh.now_ms == midnight_ms
    assert [outcome(mesh, alice), outcome(mesh, alice)] == ["settled", "failed"]
    alice.skew_ms = midnight_ms - 5_000 - mesh.now_ms
    assert limits_of(mesh, alice)["per_day"]["left"] == "0"
    assert outcome(mesh, alice) == "failed"
    alice.skew_ms = 0


def outcome(mesh: Mesh, member: Member) -> str:
    call = submit(member)
    mesh.run(1)
    return str(member.task(call)["state"])


def test_a_dearer_bid_than_the_rest_of_the_day_leaves_the_cheaper_one(mesh: Mesh) -> None:
    alice = mesh.found("alice", **SELFLESS)
    cheap = mesh.join(alice, "cheap", credits_ucr=100 * CREDIT)
    mesh.join(alice, "dear", credits_ucr=100 * CREDIT, **{"market.rates.task": "5"})
    mesh.link_all()
    mesh.run(2)
    price = price_of_one(mesh, alice)
    cheap.runs.clear()
    reconfigure(alice, **{DAY: in_credits(2 * price)})
    assert outcome(mesh, alice) == "settled" and len(cheap.runs) == 1


def test_who_could_offer_too_little_hears_of_the_limit_though_it_is_free_again(mesh: Mesh) -> None:
    alice, _ = pair(mesh)
    price = price_of_one(mesh, alice)
    reconfigure(alice, **{OPEN: in_credits(price // 2)})
    call = submit(alice, deadline_s=60)
    while alice.turn():
        pass
    assert alice.node.rooms.auctions.live, "bob is asked and has not answered"
    reconfigure(alice, **{OPEN: "none"})
    mesh.run(2)
    error = alice.task(call)["error"]
    assert error["exit_code"] == 79 and OPEN in error["message"], error


def test_a_balance_below_every_price_is_no_matter_of_the_budget(mesh: Mesh) -> None:
    alice, bob = pair(mesh)
    price = price_of_one(mesh, alice)
    too_much = alice.node.rooms.books.available() - price // 2
    as_user(alice, "", "wallet.send", peer=bob.peer, amount=in_credits(too_much))
    mesh.run(1)
    call = submit(alice)
    mesh.run(2)
    error = alice.task(call)["error"]
    assert error["exit_code"] == 79 and f"{format_credits(price // 2)} credits are available" in error["message"], error


def test_a_moved_slot_is_judged_anew(mesh: Mesh) -> None:
    alice, bob, carol = three(mesh)
    price = price_of_one(mesh, alice)
    for worker in (bob, carol):
        worker.runner = quiet
    reconfigure(alice, **{DAY: in_credits(2 * price)})
    call = submit(alice, retries=2, deadline_s=200)
    mesh.run(2)
    executor = next(worker for worker in (bob, carol) if worker.peer == alice.task(call)["executor"]["peer_id"])
    mesh.cut(alice, executor)
    mesh.run(60)
    view = alice.task(call)
    assert len(view["attempts"]) <= 2 and sum(spent(alice).values()) <= 2 * price
    assert view["state"] == "failed" and view["error"]["exit_code"] == 79, view["error"]
    mesh.link(alice, executor)


def test_a_paid_invite_is_counted_for_who_made_it(mesh: Mesh) -> None:
    alice, _ = pair(mesh, **{DAY: "5"})
    number = as_user(alice, "uid:7", "peer.invite", ring="own", credits="4")
    mesh.settle()
    (record,) = alice.node.rooms.invites._records.values()
    assert alice.replies[number]["credits"] == "4" and record.credential == "uid:7"
    assert spent(alice).get("uid:7", 0) == 0, "a promise is not yet a payment"


@pytest.mark.parametrize("what", ["per_task", "per_day", "open"])
def test_a_limit_of_one_kind_binds_that_kind_alone(mesh: Mesh, what: str) -> None:
    alice, bob = pair(mesh)
    price = price_of_one(mesh, alice)
    key = f"market.spend.compute.{what}"
    reconfigure(alice, **{key: in_credits(price if what == "open" else price * 3 // 2)})
    if what == "open":
        bob.runner = quiet
    if what == "per_task":
        call = submit(alice, budget=in_credits(2 * price))
        mesh.run(1)
        error = alice.replies[call]
    else:
        calls = [submit(alice, deadline_s=60) for _ in range(3)]
        mesh.run(2)
        failed = [view for call in calls if (view := alice.task(call))["state"] == "failed"]
        assert len(failed) == (3 if what == "per_day" else 2)
        error = failed[0]["error"]
    assert error["exit_code"] == 79 and key in error["message"] and f"config set {key}" in error["hint"]
    bob.runs.clear()
    other = as_user(alice, "", "task.submit", spec={"type": "shell", "argv": ["true"], "ring": "member"})
    mesh.run(2)
    assert bob.runs, alice.task(other)
    shown = {kind["kind"]: kind[what] for kind in limits_of(mesh, alice)["kinds"]}
    assert shown["compute"]["limit"] is not None and shown["shell"]["limit"] is None


def test_both_limits_hold_and_the_one_that_is_hit_is_named(mesh: Mesh) -> None:
    alice, _ = pair(mesh, **{"market.spend.compute.per_task": "4", TASK: "2"})
    calls = [compute(alice, budget=budget) for budget in ("3", "5", "2")]
    mesh.run(2)
    assert f"{TASK} allows 2" in alice.replies[calls[0]]["message"]
    assert f"{TASK} allows 2" in alice.replies[calls[1]]["message"]
    assert alice.task(calls[2])["state"] == "settled"
    reconfigure(alice, **{"market.spend.compute.per_task": "1", TASK: "2"})
    default = compute(alice)
    mesh.run(2)
    assert alice.task(default)["max_budget"] == "1", "a default budget gives way to the lower of the two"


def test_what_each_kind_has_spent_is_kept_over_a_restart_and_comes_back_with_a_refund(mesh: Mesh) -> None:
    alice, bob = pair(mesh)
    price = price_of_one(mesh, alice)

    def used(what: str) -> str:
        return str(next(kind[what]["used"] for kind in limits_of(mesh, alice)["kinds"] if kind["kind"] == "compute"))

    bob.runner = quiet
    call = submit(alice, deadline_s=600)
    mesh.run(2)
    assert (used("per_day"), used("open")) == (format_credits(2 * price), format_credits(price))
    alice.restart()
    mesh.run(2)
    assert (used("per_day"), used("open")) == (format_credits(2 * price), format_credits(price))
    alice.call("task.cancel", task=next(t.task_id.hex() for t in tasks(alice) if t.state == "executing"))
    mesh.run(2)
    assert (used("per_day"), used("open")) == (format_credits(price), "0"), call
