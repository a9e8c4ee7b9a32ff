"""Members that lie to stand in the way: of the wallet, of tasks, of what comes back, of the one that is no twin."""

from __future__ import annotations

import msgspec

from clawnet import limits
from clawnet.ledger.entries import Send
from clawnet.ledger.taskdoc import encode
from clawnet.wire import events as e
from clawnet.wire.codec import decode_payload, encode_payload
from clawnet.wire.messages import EscrowLock, Head, LedgerPush, PeerInfo, Winner
from tests.node.meshkit import Member, Mesh
from tests.node.test_market_hostile import forged, head
from tests.node.trades import CREDIT, compute, one_slot, only, pair, shell, tasks, three


def tell(sender: Member, receiver: Member, message: object) -> None:
    """A message of a sender whose node knows nothing of it."""
    kind, payload = encode_payload(message)  # type: ignore[arg-type]
    receiver.feed(e.MessageIn(sender.peer, bytes(16), decode_payload(int(kind), payload), None, bytes(16)))
    sender.mesh.settle()


def test_heads_that_are_never_shown_do_not_keep_the_wallet_waiting() -> None:
    mesh = Mesh()
    alice, bob, carol = three(mesh)
    mesh.fate = lambda one, other, message: 0 if isinstance(message, LedgerPush) and other is alice else 1
    written = []
    for turn in range(20):
        # Two that take turns: one of them always has a claim of more under way, and leaves before it must show it.
        liar, other = (bob, carol) if turn % 2 else (carol, bob)
        head = alice.node.rooms.books.book.head(alice.key.public)
        assert head is not None
        tell(liar, alice, LedgerPush(alice.key.public, [], [Head(alice.key.public, head[0] + 7, bytes(32))]))
        mesh.run(6)
        mesh.cut(alice, other)
        mesh.settle()
        mesh.link(alice, other)
        mesh.settle()
        written.append(not alice.node.rooms.books.chains.waiting)
    assert any(written[-10:]), "it is believed for a while, not for ever"


def test_one_card_of_a_twin_holds_the_wallet_once() -> None:
    mesh = Mesh()
    alice, bob = pair(mesh)
    # What a second program on a copy of this home would have said.
    twin = Member(mesh, "alice", alice.key, alice.owner, alice.local)
    twin.store = alice.store.twin()
    mesh.run(1)
    twin.boot()
    twin.turn()
    twin.node.rooms.cards.refresh()
    cards = twin.node.rooms.cards
    said = PeerInfo(cards._statement, cards._signature, limits.RELAY_HOPS_MAX)
    for _ in range(5):
        tell(bob, alice, said)
        mesh.run(limits.TWIN_HOLD_MS / 1000 * 0.75)
    assert alice.node.rooms.twins.reason() == ""
    assert alice.node.rooms.books.purse.read_only_reason == ""


def test_one_that_always_bids_and_never_takes_does_not_use_up_the_attempts() -> None:
    mesh = Mesh()
    alice, bob, carol = three(mesh)
    bob.node.rooms.taking._objection = lambda award: "full"  # type: ignore[method-assign]
    for worker, price_ucr in ((bob, 1), (carol, 5 * CREDIT)):
        bidding = worker.node.rooms.bidding
        bidding.rates = msgspec.structs.replace(bidding.rates, task_ucr=price_ucr)
    compute(alice, deadline_s=600)
    mesh.run(120)
    task = only(alice)
    assert task.state == "settled", (task.state, task.error_text)
    assert len(task.attempts) > 1 and task.attempts[-1].peer == carol.peer


def test_who_hands_back_as_it_ends_gets_the_task_again_when_it_is_back() -> None:
    mesh = Mesh()
    alice, bob = pair(mesh)
    one_slot(bob)
    bob.runner = lambda member, run: None
    shell(alice, "first", deadline_s=600)
    shell(alice, "second", deadline_s=600)
    mesh.run(1)
    bob.feed(e.Drain())
    mesh.run(1)
    bob.restart()
    mesh.run(30)
    states = {tuple(task.spec["argv"]): task.state for task in tasks(alice)}
    assert states[("second",)] in ("executing", "settled"), states


def test_a_note_for_less_that_gives_the_rest_not_back_is_not_taken() -> None:
    """Its line would stay bound beside a key that is withheld, and count as open escrow for ever."""
    for withheld in (False, True):
        mesh = Mesh()
        alice, bob = pair(mesh, **{"market.spend.open": "50"})

        bob.node.rooms.bidding.metered = lambda job, document, event: 1  # type: ignore[method-assign]
        bob.node.rooms.pay.waiver = lambda *args: b""  # type: ignore[method-assign]
        if withheld:
            bob.node.rooms.books._claimable = lambda payable: (None, None)  # type: ignore[method-assign]
        before = alice.node.rooms.books.purse.available_ucr
        compute(alice, deadline_s=60)
        mesh.run(1_200)
        assert not alice.node.rooms.books.book.open_lines(alice.key.public), withheld
        assert alice.node.rooms.books.purse.available_ucr == before, "what gave nothing back is not taken"
        (spent,) = alice.node.rooms.spending._spent.values()
        assert spent.open_ucr == 0, (withheld, spent)
        mesh.check()


def test_news_of_a_task_that_is_over_leaves_nothing_behind() -> None:
    mesh = Mesh()
    alice, bob = pair(mesh)
    bob.runner = lambda member, run: None
    bob.stopper = lambda member, job: None
    for _ in range(3):
        call = shell(alice, "long", deadline_s=600)
        mesh.run(1)
        alice.call("task.cancel", task=alice.replies[call]["task_id"])
        mesh.run(31)
    assert not alice.node.rooms.tasks.followers._previews


def test_a_payment_of_a_forker_does_not_hold_up_the_claims_on_others() -> None:
    mesh = Mesh()
    alice, bob, carol = three(mesh)
    seq, prev = head(bob, carol)
    one, two = (forged(carol, seq + 1, prev, Send(bob.key.public, amount, bytes(32))) for amount in (1, 2))
    three_ = forged(carol, seq + 2, one.hash, Send(bob.key.public, 3, bytes(32)))
    before = bob.node.rooms.books.available()
    alice.call("wallet.send", peer="bob", amount="5")
    alice.turn()
    for entry in (one, two, three_):
        kind, payload = encode_payload(LedgerPush(carol.key.public, [entry.raw]))
        bob.feed(e.MessageIn(carol.peer, bytes(16), decode_payload(int(kind), payload), None, bytes(16)))
    mesh.run(5)
    assert bob.node.rooms.books.book.proof(carol.key.public)
    assert bob.node.rooms.books.available() >= before + 5 * CREDIT
    assert not [log for log in bob.logs if log.event == "ledger.entry_refused"]


def test_awards_without_locks_push_out_nobody_elses() -> None:
    mesh = Mesh()
    alice, bob, carol = three(mesh)
    mesh.fate = lambda one, other, message: 0 if isinstance(message, EscrowLock) else 1
    compute(alice, peer=["bob"])
    mesh.settle()
    taking = bob.node.rooms.taking
    (honest,) = taking._waiting.values()
    for big in (False, True):
        for number in range(1_000):
            payload = msgspec.msgpack.encode({**honest.payload, "stdin": bytes(250_000 * big)})
            padded = msgspec.structs.replace(honest.document, payload=payload)
            task_id = number.to_bytes(16, "big")
            winner = Winner(task_id, 0, encode(padded), 1, 0, 0, False, True, "")
            bob.feed(e.MessageIn(carol.peer, bytes(16), winner, None, bytes(16)))
        bob.turn()
        assert honest.job.job in taking._waiting
        assert len(taking._waiting) <= 257
