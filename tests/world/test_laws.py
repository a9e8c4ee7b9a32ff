"""Each law has been seen to fail: entries that no rule would let pass, and meshes that somebody has tampered with."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from clawnet import limits
from clawnet.identity.keys import KeyPair
from clawnet.ledger.entries import (
    Body,
    Claim,
    ClaimItem,
    Genesis,
    Grant,
    Lock,
    LockLine,
    Refund,
    RefundItem,
    Release,
    ReleaseItem,
    Send,
    build,
    parse,
)
from clawnet.wire import events as e
from clawnet.wire.messages import Kind
from tests.node.meshkit import START_MS
from tests.world import laws
from tests.world.clock import LawBroken
from tests.world.liars import HABITS
from tests.world.plants import PLANTS
from tests.world.referee import Referee
from tests.world.signer import signer
from tests.world.world import World

MESH = bytes(range(32))
ISSUER = KeyPair.from_seed(bytes([1]) * 32)
PAYEE = KeyPair.from_seed(bytes([2]) * 32)
KEY = bytes([7]) * 32
TASK = bytes([9]) * 32


class Author:
    """A chain told to the referee entry by entry."""

    def __init__(self, referee: Referee, key: KeyPair) -> None:
        self.referee = referee
        self.key = key
        self.prev = bytes(32)
        self.seq = 0

    def write(self, body: Body, *, time_ms: int = START_MS, durable: bool = True, keeper: bytes = b"") -> bytes:
        """The next entry, on the disk of its author unless another keeper is named; its hash."""
        entry = build(MESH, self.key.public, self.seq, self.prev, time_ms, body, self.key.sign)
        self.referee.saw(keeper or self.key.public, self.key.public, entry.seq, entry.hash, entry.raw, durable)
        self.prev, self.seq = entry.hash, self.seq + 1
        return entry.hash


def opened() -> tuple[Author, Author]:
    """A payer with 100 from a grant to itself, and a payee; the payer's line 0 of 10 stands at seq 3."""
    referee = Referee({})
    payer, payee = Author(referee, ISSUER), Author(referee, PAYEE)
    payer.write(Genesis(bytes(32), None))
    granted = payer.write(Grant(ISSUER.public, 100, bytes(16)))
    payer.write(Claim([ClaimItem(ISSUER.public, 1, granted, 0, 100, None, None)]))
    payer.write(Lock(START_MS + 1_000, START_MS + 301_000, None, [LockLine(TASK, PAYEE.public, 10, 1)]))
    payee.write(Genesis(bytes(32), None))
    return payer, payee


def release(amount: int = 10, seq: int = 3) -> Release:
    return Release([ReleaseItem(seq, 0, 1, amount, hashlib.sha256(KEY).digest(), bytes(32))])


def refund(seq: int = 3) -> Refund:
    return Refund([RefundItem(seq, 0, None)])


def test_the_referee_lets_an_honest_life_pass() -> None:
    payer, payee = opened()
    paid = payer.write(release())
    payee.write(Claim([ClaimItem(ISSUER.public, 4, paid, 0, 10, KEY, None)]))
    assert payer.referee.conservation() == (100, 100)
    assert not payer.referee.line_ends() and not payer.referee.unclaimed()


def again(payer: Author, payee: Author) -> None:
    paid = payer.write(release())
    for _ in range(2):
        payee.write(Claim([ClaimItem(ISSUER.public, 4, paid, 0, 10, KEY, None)]))


def wrong_key(payer: Author, payee: Author) -> None:
    paid = payer.write(release())
    payee.write(Claim([ClaimItem(ISSUER.public, 4, paid, 0, 10, bytes(32), None)]))


def two_lines(payer: Author, payee: Author) -> None:
    payer.write(release())
    payer.write(Lock(START_MS + 1_000, START_MS + 301_000, None, [LockLine(TASK, PAYEE.public, 10, 1)]))
    payer.write(release(seq=5))


def forked(payer: Author, payee: Author) -> None:
    payer.seq, payer.prev = 3, bytes(32)
    payer.write(Send(PAYEE.public, 1, bytes(32)))


def gap(payer: Author, payee: Author) -> None:
    payer.seq += 1
    payer.write(Send(PAYEE.public, 1, bytes(32)))


def late_refund_of_a_release(payer: Author, payee: Author) -> None:
    payer.write(release())
    payer.write(refund(), time_ms=START_MS + 400_000)


ENTRIES: list[tuple[Callable[[Author, Author], object], str]] = [
    (forked, "the chain forks"),
    (gap, "a gap"),
    (lambda payer, payee: payer.write(Send(PAYEE.public, 91, bytes(32))), "available falls to -1"),
    (lambda payer, payee: payer.write(release(), durable=False), "without a sync"),
    (lambda payer, payee: payer.write(release(), keeper=PAYEE.public), "spoke too early"),
    (lambda payer, payee: payer.write(release(11)), "releases 11"),
    (lambda payer, payee: (payer.write(release()), payer.write(release(1))), "releases 1"),
    (late_refund_of_a_release, "refunds line"),
    (lambda payer, payee: payer.write(refund()), "before expiry"),
    (two_lines, "paid twice"),
    (again, "claims"),
    (wrong_key, "not the released one"),
]


@pytest.mark.parametrize(("write", "why"), ENTRIES, ids=[why for _, why in ENTRIES])
def test_the_referee_stops_at(write: Callable[[Author, Author], object], why: str) -> None:
    payer, payee = opened()
    with pytest.raises(LawBroken, match=why):
        write(payer, payee)


# --- a mesh that has come to rest, and is tampered with


@pytest.fixture
def world() -> Iterator[World]:
    with signer():
        calm = World(4, 3, 10.0, faults=False, tasks_per_minute=12)
        calm.run()
        assert calm.referee.releases_total > 0
        yield calm


def credit_from_nowhere(world: World) -> None:
    next(iter(world.referee.chains.values())).available_ucr += 1


def book_off(world: World) -> None:
    state = world.machines[1].node.rooms.books.book._accounts[world.machines[1].key.public]
    state.available_ucr += 1


def too_many_waiting(world: World) -> None:
    runtime = world.machines[1].runtime
    for _ in range(limits.INBOX_MAX + 1):
        runtime._inbox._alone.append(e.TimerFired(("heads",)))


def forgotten_outbox(world: World) -> None:
    rooms = world.machines[1].node.rooms
    rooms.outbox.load((bytes(16), world.machines[0].peer, 0, bytes(16), int(Kind.TASK_RESULT), b""))


def owed_for_ever(world: World) -> None:
    forgotten_outbox(world)
    row = (bytes(16), world.machines[0].peer, 0, bytes(16), int(Kind.TASK_RESULT), b"")
    world.machines[1].disk.tables["outbox"][row[:1]] = row


def lost_task(world: World) -> None:
    (peer, task_id), _ = next(iter(world.client.accepted.items()))
    del world.by_peer[peer].disk.tables["tasks"][bytes.fromhex(task_id),]


def settled_and_unpaid(world: World) -> None:
    for chain in world.referee.chains.values():
        for payment in chain.payments.values():
            if payment.line is not None:
                payment.line = None


def nobody_claimed(world: World) -> None:
    chain = next(chain for chain in world.referee.chains.values() if chain.payments)
    next(iter(chain.payments.values())).claimed = False
    world.referee.granted_ucr += next(iter(chain.payments.values())).amount_ucr


def line_open_for_ever(world: World) -> None:
    chain = next(chain for chain in world.referee.chains.values() if chain.lines)
    next(iter(chain.lines.values())).left_ucr = 1
    world.referee.granted_ucr += 1


def condemned(world: World) -> None:
    state = world.machines[1].node.rooms.books.book._accounts[world.machines[0].key.public]
    state.ended = parse(world.referee.chains[world.machines[0].key.public].raws[0])
    state.ended_reason = "balance"


def key_rotated_in_memory(world: World) -> None:
    book = world.machines[0].node.rooms.books.book
    book._accounts[world.machines[1].key.public].cursors.clear()
    world.rng.sample = lambda population, k: list(world.honest)  # type: ignore[assignment,method-assign,misc]


TAMPERED: list[tuple[Callable[[World], None], str]] = [
    (credit_from_nowhere, "credits: "),
    (book_off, "does not add up"),
    (too_many_waiting, "stimuli that wait"),
    (forgotten_outbox, "the outbox"),
    (owed_for_ever, "the outbox still holds"),
    (lost_task, "accepted task"),
    (settled_and_unpaid, "was settled, and 0 of its lines were paid"),
    (nobody_claimed, "payment "),
    (line_open_for_ever, "is still open|Line"),
    (condemned, "holds honest m0 for condemned"),
    (key_rotated_in_memory, "replays to"),
]


@pytest.mark.parametrize(("tamper", "why"), TAMPERED, ids=[work.__name__ for work, _ in TAMPERED])
def test_a_tampered_mesh_breaks_its_law(world: World, tamper: Callable[[World], None], why: str) -> None:
    tamper(world)
    with pytest.raises(LawBroken, match=why):
        laws.end(world)


def test_a_shell_command_that_starts_twice_is_seen(world: World) -> None:
    mark = next(mark for mark, wish in world.client.wishes.items() if wish.once and wish.task_id)
    wish = world.client.wishes[mark]
    where = (wish.machine.peer, bytes.fromhex(wish.task_id))
    job = next((job for job, place in world.task_of_job.items() if place == where), None)
    if job is None:
        world.task_of_job[b"job"] = where
        job = b"job"
    world.starts_of[where] = 1
    other = next(machine for machine in world.machines if machine is not wish.machine)

    class Spec:
        env = {"MARK": mark}

    spec = Spec()
    spec.job = job  # type: ignore[attr-defined]
    with pytest.raises(LawBroken, match="starts twice"):
        world.started(other, spec)


def test_a_statement_taken_twice_is_seen(world: World) -> None:
    rows = [e.Put("relayed", ("somebody", bytes(16), 1))]
    world.committed(world.machines[1], rows, False)
    with pytest.raises(LawBroken, match="a second time"):
        world.committed(world.machines[1], rows, False)


def test_the_table_of_promises_names_what_exists() -> None:
    here = Path(__file__).parent
    table = (here / "README.md").read_text(encoding="utf-8")
    source = "\n".join(path.read_text(encoding="utf-8") for path in here.parent.glob("*/test_*.py"))
    missing = [name for name in re.findall(r"\btest_\w+(?!\w|\.py)", table) if f"def {name}(" not in source]
    assert not missing
    plants = {name for names in re.findall(r"plants? ([\w, ]+)", table) for name in re.findall(r"\w+_\w+", names)}
    assert plants <= PLANTS.keys(), plants - PLANTS.keys()
    rows = [line.split("|")[2] for line in table.partition("## Section 9")[0].splitlines() if line.startswith("|")]
    told = {name for cell in rows[2:] for name in re.findall(r"\b\w+(?:_\w+)+|\w+", cell.partition("(")[0])}
    assert told == HABITS.keys(), told ^ HABITS.keys()
