"""Parties that lie about money (LEDGER.md section 7): keys, forks, hidden claims, poisoned chains, old disks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from clawnet import limits
from clawnet.ledger.entries import Body, Lock, LockLine, Parsed, Release, ReleaseItem, Send, build
from clawnet.market.records import Job
from clawnet.wire import events as e
from clawnet.wire.codec import decode_payload, encode_payload
from clawnet.wire.messages import Cancel, EscrowLock, Head, LedgerPush, Settlement, Winner
from tests.node.meshkit import Member, Mesh
from tests.node.trades import CREDIT, claims, compute, laws, only, paid, pair, tasks, three


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    built = Mesh()
    yield built
    for member in built.members.values():
        totals = member.node.rooms.books.book.conservation()
        assert totals.conserved, (member.name, totals)


def forged(member: Member, seq: int, prev: bytes, body: Body) -> Parsed:
    """What a member signs whatever the rules say."""
    mesh = member.node.rooms.books.mesh
    return build(mesh, member.key.public, seq, prev, member.now_ms, body, member.key.sign)


def tell(sender: Member, receiver: Member, *messages: object) -> None:
    """Messages of a sender whose node knows nothing of them."""
    for message in messages:
        kind, payload = encode_payload(message)  # type: ignore[arg-type]
        receiver.feed(e.MessageIn(sender.peer, bytes(16), decode_payload(int(kind), payload), None, bytes(16)))
    sender.mesh.settle()


def delivered(mesh: Mesh, alice: Member, bob: Member) -> Job:
    """A job of bob's that is delivered, and of which alice's node says nothing more."""
    mesh.fate = lambda one, other, message: 0 if one is alice and type(message).__name__ == "Settlement" else 1
    compute(alice, deadline_s=3_000)
    mesh.settle()
    (job,) = bob.node.rooms.jobs.jobs.values()
    assert job.state == "delivered"
    return job


def head(member: Member, of: Member) -> tuple[int, bytes]:
    found = member.node.rooms.books.book.head(of.key.public)
    assert found is not None
    return found


def state(member: Member, job: Job) -> str:
    kept = member.node.rooms.jobs.jobs.get(job.job)
    return kept.state if kept is not None else job.state


# --- releases


@pytest.mark.parametrize("lie", ["amount", "key", "note"])
def test_a_release_that_is_not_of_the_note_gets_no_key(mesh: Mesh, lie: str) -> None:
    alice, bob = pair(mesh)
    job = delivered(mesh, alice, bob)
    seq, prev = head(bob, alice)
    assert seq == job.lock_seq
    amount = 1 if lie == "amount" else job.amount_ucr
    key = bytes(32) if lie == "key" else job.key_hash
    note = bytes(32) if lie == "note" else job.note_hash
    item = ReleaseItem(job.lock_seq, job.line, 1, amount, key, note)
    release = forged(alice, seq + 1, prev, Release([item]))
    tell(alice, bob, Settlement(alice.key.public, [release.raw], []))
    assert claims(bob) == 0 and state(bob, job) == "forfeited"


def test_the_right_release_gets_it(mesh: Mesh) -> None:
    alice, bob = pair(mesh)
    job = delivered(mesh, alice, bob)
    seq, prev = head(bob, alice)
    item = ReleaseItem(job.lock_seq, job.line, 1, job.amount_ucr, job.key_hash, job.note_hash)
    tell(alice, bob, Settlement(alice.key.public, [forged(alice, seq + 1, prev, Release([item])).raw], []))
    assert claims(bob) == 1


def test_a_poisoned_chain_gets_no_key(mesh: Mesh) -> None:
    alice, bob = pair(mesh)
    job = delivered(mesh, alice, bob)
    seq, prev = head(bob, alice)
    now = alice.now_ms
    greedy = Lock(now + 60_000, now + 400_000, None, [LockLine(bytes(32), bob.key.public, 10**14, 1)])
    poison = forged(alice, seq + 1, prev, greedy)
    item = ReleaseItem(job.lock_seq, job.line, 1, job.amount_ucr, job.key_hash, job.note_hash)
    release = forged(alice, seq + 2, poison.hash, Release([item]))
    tell(alice, bob, Settlement(alice.key.public, [poison.raw, release.raw], []))
    assert claims(bob) == 0 and state(bob, job) == "delivered"


# --- forks


def test_two_locks_for_one_place_convict_and_get_nothing(mesh: Mesh) -> None:
    alice, bob, carol = three(mesh)
    mesh.cut(bob, carol)
    mesh.fate = lambda one, other, message: 0 if one is alice and other is carol else 1
    compute(alice, peer=["bob"], deadline_s=3_000)
    mesh.fate = lambda one, other, message: (
        0 if one is alice and (other is carol or type(message).__name__ == "Settlement") else 1
    )
    mesh.settle()
    (job,) = bob.node.rooms.jobs.jobs.values()
    lock_seq = job.lock_seq
    seq, prev = head(carol, alice)
    assert seq == lock_seq - 1
    now = alice.now_ms
    body = Lock(now + 60_000, now + 400_000, None, [LockLine(bytes(32), carol.key.public, CREDIT, 1)])
    other = forged(alice, lock_seq, prev, body)
    tell(alice, carol, LedgerPush(alice.key.public, [other.raw]))
    assert head(carol, alice) == (lock_seq, other.hash) != head(bob, alice)
    mesh.link(bob, carol)
    mesh.run(130)
    for member in (bob, carol):
        assert member.node.rooms.books.book.proof(alice.key.public) is not None, member.name
        assert member.node.rooms.members.banned(alice.peer)
        assert alice not in mesh.linked(member), "the forker is hung up on"
        assert list(member.store.load_all("proofs"))
    item = ReleaseItem(job.lock_seq, job.line, 1, job.amount_ucr, job.key_hash, job.note_hash)
    release = forged(alice, lock_seq + 1, job.lock_hash, Release([item]))
    tell(alice, bob, Settlement(alice.key.public, [release.raw], []))
    assert claims(bob) == 0, "no key for what was released after the fork was known"
    bob.restart()
    mesh.run(5)
    assert bob.node.rooms.members.banned(alice.peer) and claims(bob) == 0
    hello = alice.node.hello_facts()
    assert hello[0] == bob.node.hello_facts()[0]


def test_income_from_the_other_branch_is_void_here_and_convicts_only_the_forker(mesh: Mesh) -> None:
    alice, bob, carol = three(mesh)
    mesh.cut(bob, carol)
    seq, prev = head(alice, alice)
    for payee in (bob, carol):
        paying = forged(alice, seq + 1, prev, Send(payee.key.public, 7 * CREDIT, bytes(32)))
        tell(alice, payee, LedgerPush(alice.key.public, [paying.raw]))
    mesh.cut(alice, bob)
    mesh.cut(alice, carol)
    mesh.run(1)
    mesh.link(bob, carol)
    mesh.run(130)
    for one, other in ((bob, carol), (carol, bob)):
        book = one.node.rooms.books.book
        assert book.proof(alice.key.public) is not None
        assert head(one, other) == head(other, other), "the other's claim is judged, not stuck"
        assert book.view(other.key.public).void_ucr == 7 * CREDIT
        assert book.view(other.key.public).refuse == "" and not one.node.rooms.members.banned(other.peer)
    compute(bob, peer=["carol"])
    mesh.run(10)
    assert claims(carol) == 1, "they go on to trade"


# --- awards


def spy(mesh: Mesh, alice: Member, bob: Member) -> tuple[Winner, EscrowLock]:
    """What alice sends to bob for one task, which bob takes."""
    seen: dict[str, object] = {}

    def fate(one: Member, other: Member, message: object) -> int:
        if one is alice and type(message).__name__ in ("Winner", "EscrowLock"):
            seen[type(message).__name__] = message
        return 1

    mesh.fate = fate
    bob.runner = lambda member, run: None
    compute(alice, deadline_s=3_000)
    mesh.settle()
    winner, lock = seen["Winner"], seen["EscrowLock"]
    assert isinstance(winner, Winner) and isinstance(lock, EscrowLock)
    return winner, lock


def test_a_line_that_is_worked_on_is_never_waived(mesh: Mesh) -> None:
    alice, bob = pair(mesh)
    winner, lock = spy(mesh, alice, bob)
    fake = b"another task id."
    replace = {"task_id": fake}
    again = Winner(**{n: getattr(winner, n) for n in winner.__struct_fields__} | replace)
    named = EscrowLock(**{n: getattr(lock, n) for n in lock.__struct_fields__} | replace)
    before = len(bob.node.rooms.outbox.rows)
    tell(alice, bob, again, named)
    tell(alice, bob, Cancel(b"a third task id.", 0, ""))
    third = EscrowLock(**{n: getattr(lock, n) for n in lock.__struct_fields__} | {"task_id": b"a third task id."})
    tell(alice, bob, third)
    assert len(bob.runs) == 1, "one line pays one run"
    assert len(bob.node.rooms.outbox.rows) >= before
    rejects = [row[-1] for row in bob.store.load_all("outbox") if row[4] == 12]
    assert all(b"clawnet" not in body for body in rejects)
    for identifier in (fake, b"a third task id."):
        assert not any(identifier in body and len(body) > 120 for body in rejects), "a waiver went out"


def test_refusals_that_are_never_acknowledged_stop_costing_rows(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "REFUSALS_OWED_MAX", 5)
    alice, bob = pair(mesh)
    mesh.fate = lambda one, other, message: 0 if one is alice else 1
    late = mesh.now_ms + 60_000
    tell(alice, bob, *(Winner(n.to_bytes(16, "big"), 0, b"no document", 1, late, late, True, True) for n in range(40)))
    assert len(list(bob.store.load_all("outbox"))) == 5
    mesh.fate = lambda one, other, message: 1
    mesh.run(120)
    assert not list(bob.store.load_all("outbox"))


def test_an_award_below_the_bid_is_refused(mesh: Mesh) -> None:
    alice, bob = pair(mesh)
    original = alice.node.rooms.auctions._close

    def cheap(auction: object) -> None:
        for bid in auction._bids.values():  # type: ignore[attr-defined]
            auction._bids[bid.peer] = type(bid)(  # type: ignore[attr-defined]
                **{n: getattr(bid, n) for n in bid.__struct_fields__} | {"price_ucr": 1}
            )
        original(auction)  # type: ignore[arg-type]

    alice.node.rooms.auctions._close = cheap  # type: ignore[method-assign,assignment]
    compute(alice, deadline_s=5)
    mesh.run(10)
    assert not bob.runs and only(alice).state == "timed_out"
    assert {attempt.reason for attempt in only(alice).attempts} == {"no_bid"}


# --- chains


def test_a_claim_hidden_from_its_payer_is_passed_on(mesh: Mesh) -> None:
    alice, bob, _ = three(mesh)
    hidden = ("Settlement", "LedgerPush")
    mesh.fate = lambda one, other, message: 0 if (one, other) == (bob, alice) and _is(message, hidden) else 1
    compute(alice, peer=["bob"], deadline_s=3_000)
    mesh.run(200)
    assert only(alice).state == "settled", "carol, who counts the claim, told alice"


def _is(message: object, names: tuple[str, ...]) -> bool:
    return type(message).__name__ in names


def test_a_payer_that_earned_elsewhere_shows_where_its_money_is_from(mesh: Mesh) -> None:
    alice = mesh.found("alice", **{"market.self": "never"})
    bob = mesh.join(alice, "bob", **{"market.self": "never"}, credits_ucr=0)
    carol = mesh.join(alice, "carol", credits_ucr=50 * CREDIT, **{"market.self": "never"})
    dave = mesh.join(alice, "dave")
    for one, other in ((alice, bob), (alice, carol), (bob, carol)):
        mesh.link(one, other)
    mesh.run(2)
    compute(carol, peer=["bob"])
    mesh.run(5)
    assert claims(bob) == 1
    for one, other in ((alice, bob), (alice, carol), (bob, carol)):
        mesh.cut(one, other)
    mesh.link(bob, dave)
    mesh.run(1)
    compute(bob, peer=["dave"])
    mesh.run(20)
    assert [task.state for task in tasks(bob)] == ["settled"]
    book = dave.node.rooms.books.book
    assert book.head(carol.key.public) is not None, "carol's chain came by way of bob"


def test_long_chains_are_pulled_in_pieces(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SEGMENT_BYTES_MAX", 1_500)
    alice, bob = pair(mesh)
    mesh.cut(alice, bob)
    for _ in range(40):
        alice.call("wallet.send", peer="bob", amount="0.1")
        mesh.settle()
    mesh.link(alice, bob)
    compute(alice)
    mesh.run(60)
    laws(mesh)
    assert only(alice).state == "settled" and head(bob, alice) == head(alice, alice)


def test_a_chain_longer_than_is_audited_before_work_is_refused(mesh: Mesh) -> None:
    alice = mesh.found("alice", **{"market.self": "never"})
    bob = mesh.join(alice, "bob", **{"ledger.audit_entries_max": "100"})
    carol = mesh.join(alice, "carol")
    mesh.link(alice, carol)
    mesh.run(2)
    for _ in range(120):
        alice.call("wallet.send", peer="carol", amount="0.1")
        mesh.settle()
    mesh.fate = lambda one, other, message: 0 if one is alice and _is(message, ("LedgerPush",)) else 1
    mesh.link(alice, bob)
    mesh.run(1)
    compute(alice, peer=["bob"])
    mesh.run(5)
    assert only(alice).attempts[0].reason == "cannot_audit" and not bob.runs
    assert only(alice).attempts[0].refunded, "with a waiver"
    mesh.fate = lambda *_: 1
    mesh.run(10)
    assert not paid(mesh)


# --- the own chain


def test_a_disk_from_yesterday_is_read_only_until_everybody_has_answered(mesh: Mesh) -> None:
    alice, bob, carol = three(mesh)
    yesterday = alice.store.twin().tables
    compute(alice)
    mesh.run(10)
    lost_seq = head(alice, alice)[0]
    for other in (bob, carol):
        mesh.cut(alice, other)
    alice.store.tables = yesterday
    alice.boot()
    assert head(alice, alice)[0] < lost_seq
    mesh.link(alice, bob)
    mesh.run(15)
    assert head(alice, alice)[0] == lost_seq, "the entries came back"
    assert alice.node.rooms.books.purse.read_only_reason, "carol has not answered"
    alice.restart()
    mesh.run(15)
    assert alice.node.rooms.books.purse.read_only_reason, "it is remembered"
    call = alice.call("wallet.send", peer="bob", amount="1")
    mesh.settle()
    assert alice.replies[call]["exit_code"] == 77
    mesh.link(alice, carol)
    mesh.run(15)
    assert not alice.node.rooms.books.purse.read_only_reason
    call = alice.call("wallet.send", peer="bob", amount="1")
    mesh.run(70)
    assert "seq" in alice.replies[call]
    for member in (bob, carol):
        assert member.node.rooms.books.book.proof(alice.key.public) is None
        assert head(member, alice) == head(alice, alice)
    mesh.check()


def test_a_peer_that_only_says_it_holds_more_stops_nothing(mesh: Mesh) -> None:
    alice, bob = pair(mesh)
    mesh.fate = lambda one, other, message: 0 if one is bob and _is(message, ("LedgerPush",)) else 1
    tell(bob, alice, LedgerPush(bob.key.public, [], [Head(alice.key.public, 10**6, bytes(32))]))
    compute(alice)
    mesh.run(1)
    assert only(alice).attempts[0].state == "awarded", "nothing is written while bob may show it"
    mesh.run(20)
    assert only(alice).state == "settled"
    tell(bob, alice, LedgerPush(bob.key.public, [], [Head(alice.key.public, 10**6, bytes(32))]))
    assert not alice.node.rooms.books.chains.waiting, "the second time it is not believed"
    laws(mesh)


def test_a_clock_far_off_stamps_nothing_and_says_so(mesh: Mesh) -> None:
    alice = mesh.found("alice", **{"market.self": "never"})
    bob = mesh.join(alice, "bob")
    carol = mesh.join(alice, "carol")
    alice.skew_ms = 90_000
    mesh.link_all()
    mesh.run(2)
    seq = head(alice, alice)[0]
    call = alice.call("wallet.send", peer="bob", amount="1")
    compute(alice)
    status = alice.call("node.status")
    mesh.run(10)
    assert alice.replies[call]["exit_code"] == 77 and "clock" in alice.replies[call]["message"]
    assert "clock" in only(alice).error_text and only(alice).state == "failed"
    assert any("clock" in text for text in alice.replies[status]["warnings"])
    assert head(alice, alice)[0] == seq
    assert not bob.node.rooms.members.clock_off() and not carol.node.rooms.members.clock_off()
