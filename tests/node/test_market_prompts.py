"""Prompts between production nodes: capped by the bid, metered by tokens, for whom they are, in their own slots."""

from __future__ import annotations

from collections.abc import Iterator
from decimal import Decimal

import msgspec
import pytest

from clawnet.execution import bundle
from clawnet.wire import events as e
from clawnet.wire.blobid import blob_id
from clawnet.wire.messages import LedgerPush, Message, Offer, Settlement
from tests.node.meshkit import Member, Mesh

RINGS = ("own", "member")


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    built = Mesh()
    yield built
    built.run(60)
    built.check()


def serve(member: Member, *rings: str, model: str = "tiny") -> None:
    """The member's endpoint answers for these rings; for none, it is down."""
    words = ("ai-inference", "compute", "op:primes") if rings else ("compute", "op:primes")
    models = (model,) if rings else ()
    member.feed(e.CapacityChanged(words, (), 4, 2**32, 0, models, rings, "" if rings else "it cannot be reached"))


def answering(tokens_in: int, tokens_out: int) -> object:
    """A runner whose answer is the prompt itself."""

    def run(member: Member, effect: e.Run) -> e.TaskExited:
        spec = effect.spec
        text = spec.prompt + "|" + (spec.stdin or b"").decode()
        usage = bundle.Usage(0.5, 0.0, 0, tokens_in, tokens_out, "tiny", "stop")
        plain = bundle.encode(bundle.Bundle(0, None, text=text, usage=usage))
        sealed = plain if spec.seal_key is None else bundle.seal(plain, spec.seal_key, member.entropy)
        fields = (effect.job, "exit", "", 0, None, sealed, blob_id(sealed), len(sealed), bytes(32), len(text))
        return e.TaskExited(*fields, 0.5, 0.0, 0, tokens_in, tokens_out)

    return run


def pair(mesh: Mesh, **keys: str) -> tuple[Member, Member]:
    alice = mesh.found("alice")
    bob = mesh.join(alice, "bob", credits_ucr=100_000_000, **keys)
    bob.runner = answering(1_000, 2_000)  # type: ignore[assignment]
    mesh.link_all()
    mesh.run(2)
    serve(alice)
    serve(bob, *RINGS)
    mesh.run(1)
    return alice, bob


def ask(member: Member, text: str = "hello", **spec: object) -> int:
    return member.call("task.submit", spec={"type": "prompt", "description": text, **spec})


def up(dividend: int, divisor: int) -> int:
    """Division rounded up."""
    return -(-dividend // divisor)


def available(member: Member) -> Decimal:
    call = member.call("wallet.balance")
    member.mesh.settle()
    return Decimal(member.replies[call]["available"])


def test_what_the_tokens_come_to_is_paid_and_the_rest_comes_back(mesh: Mesh) -> None:
    alice, bob = pair(mesh)
    had = available(alice)
    offers: list[Offer] = []

    def fate(sender: Member, receiver: Member, message: Message) -> int:
        if isinstance(message, Offer):
            offers.append(message)
        return 1

    mesh.fate = fate
    call = ask(alice, "Summarize", stdin_b64="bm90ZXM=")
    mesh.run(3)
    task = alice.task(call)
    assert (task["state"], task["result"]["text"]) == ("settled", "Summarize|notes")
    usage = task["result"]["usage"]
    assert [usage[name] for name in ("tokens_in", "tokens_out", "model")] == [1_000, 2_000, "tiny"]
    (offer,) = offers
    assert b"Summarize" not in msgspec.msgpack.encode(offer)
    cap = 1_000_000 + up(100_000 * up(offer.payload_bytes, 3) + 300_000 * 4_096, 1000)
    bid = up(up(cap * 900, 1000), 100_000) * 100_000
    (why,) = _why(alice, task)["rounds"]
    assert Decimal(why["peers"][0]["bid"]["price"]) == Decimal(bid) / 1_000_000
    paid = Decimal(up(bid * (1_000_000 + 100_000 + 600_000), cap)) / 1_000_000
    assert Decimal(task["price"]) == paid < Decimal(bid) / 1_000_000
    mesh.run(60)
    assert (available(alice), available(bob)) == (had - paid, 100 + paid)


def _why(member: Member, task: dict[str, object]) -> dict[str, list[dict[str, list[dict[str, dict[str, str]]]]]]:
    call = member.call("task.why", task=task["task_id"])
    member.mesh.settle()
    found: dict[str, list[dict[str, list[dict[str, dict[str, str]]]]]] = member.replies[call]
    return found


def test_more_tokens_than_the_bid_allowed_for_cost_the_bid(mesh: Mesh) -> None:
    alice, bob = pair(mesh)
    bob.runner = answering(10**6, 10**6)  # type: ignore[assignment]
    call = ask(alice)
    mesh.run(3)
    task = alice.task(call)
    assert task["price"] == _why(alice, task)["rounds"][0]["peers"][0]["bid"]["price"]


def test_the_rest_taken_back_beside_the_release_takes_nothing_from_the_executor(mesh: Mesh) -> None:
    """Release and refund of the rest may come in one turn: the release is claimed, and shows the key, all the same."""
    alice, bob = pair(mesh)
    held: list[Message] = []

    def fate(sender: Member, receiver: Member, message: Message) -> int:
        if sender is alice and isinstance(message, Settlement | LedgerPush):
            held.append(message)
            return 0
        return 1

    mesh.fate = fate
    call = ask(alice)
    mesh.run(20)
    assert alice.task(call)["state"] == "delivered"
    mesh.fate = lambda sender, receiver, message: 1
    entries = [raw for _, raw in alice.node.rooms.books.shipping.recent]
    bob.feed(e.MessageIn(alice.peer, bytes(16), Settlement(alice.key.public, entries, [])))
    mesh.run(60)
    task = alice.task(call)
    assert held and (task["state"], task["escrow"]["state"]) == ("settled", "claimed")
    assert available(bob) == 100 + Decimal(task["price"])


@pytest.mark.parametrize("rings", [(), ("own",)])
def test_a_member_is_not_asked_where_its_prompts_are_not_answered(mesh: Mesh, rings: tuple[str, ...]) -> None:
    alice, bob = pair(mesh)
    serve(bob, *rings)
    mesh.run(1)
    call = ask(alice)
    mesh.run(1)
    task = alice.task(call)
    assert (task["state"], task["error"]["exit_code"]) == ("no_bids", 75)
    assert "--type shell" in task["error"]["hint"] and "does not serve: it cannot be reached" in task["error"]["hint"]
    assert bob.runs == []


def test_an_award_for_an_endpoint_that_has_gone_down_is_refused(mesh: Mesh) -> None:
    alice, bob = pair(mesh)
    down = False

    def fate(sender: Member, receiver: Member, message: Message) -> int:
        nonlocal down
        if type(message).__name__ == "Winner" and not down:
            down = True
            serve(bob)
        return 1

    mesh.fate = fate
    had = available(alice)
    call = ask(alice, retries=0)
    mesh.run(5)
    assert alice.task(call)["state"] in ("failed", "no_bids")
    assert bob.runs == [] and available(alice) == had


def test_prompts_have_slots_of_their_own(mesh: Mesh) -> None:
    alice, bob = pair(mesh, **{"execution.prompt_slots": "1", "execution.slots": "1"})
    bob.runner = lambda member, run: None
    for n in range(3):
        ask(alice, f"prompt {n}")
    mesh.run(3)
    assert [run.spec.kind for run in bob.runs] == ["prompt"]
    spec = {"type": "compute", "op": "primes", "op_args": {"limit": 9}, "ring": "member", "prefer": "market"}
    alice.call("task.submit", spec=spec)
    mesh.run(3)
    assert [run.spec.kind for run in bob.runs] == ["prompt", "compute"]
    bob.feed(answering(1, 1)(bob, bob.runs[0]))  # type: ignore[operator]
    mesh.run(3)
    assert [run.spec.kind for run in bob.runs] == ["prompt", "compute", "prompt"]


def test_a_prompt_that_waited_over_a_restart_is_asked_when_the_executor_has_spoken(mesh: Mesh) -> None:
    alice, bob = pair(mesh)
    bob.runner = lambda member, run: None
    call = ask(alice)
    mesh.run(2)
    assert len(bob.runs) == 1
    bob.runner = answering(1, 1)  # type: ignore[assignment]
    bob.restart()
    assert len(bob.runs) == 1 or bob.node.rooms.jobs.slots
    serve(bob, *RINGS)
    mesh.run(30)
    assert alice.task(call)["state"] == "settled"
    assert len(bob.runs) == 2
