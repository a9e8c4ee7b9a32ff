"""The inbox: order within a source, turns for everybody, bounds that one source cannot use up for the others."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clawnet import limits
from clawnet.inbox import Inbox
from clawnet.wire import events as e
from clawnet.wire.messages import Ping

ME = "me"


def message(peer: str, number: int = 0) -> e.MessageIn:
    return e.MessageIn(peer, b"", Ping(number, 0))


def call(number: int) -> e.RpcCall:
    return e.RpcCall(number, "task.submit", {})


def sources(stimuli: list[e.Stimulus]) -> Counter[str]:
    return Counter(getattr(one, "peer", "local") for one in stimuli)


def test_one_source_alone_has_the_whole_turn() -> None:
    for make in (lambda n: call(n), lambda n: message("bob", n), lambda n: message(ME, n)):
        inbox = Inbox(ME)
        for number in range(1_000):
            inbox.put(make(number))
        assert len(list(inbox.turn())) == limits.INBOX_TURN_MAX
        assert len(inbox) == 1_000 - limits.INBOX_TURN_MAX


def test_a_flood_leaves_half_a_turn_to_what_is_local_and_their_share_to_other_peers() -> None:
    inbox = Inbox(ME)
    for number in range(4_000):
        inbox.put(message("flood", number))
        inbox.put(call(number))
    for number in range(40):
        inbox.put(message("bob", number))
        inbox.put(message("carol", number))
    first, second = sources(list(inbox.turn())), sources(list(inbox.turn()))
    assert first["local"] == second["local"] == limits.INBOX_TURN_MAX // 2
    assert first["bob"] + second["bob"] == first["carol"] + second["carol"] == 40
    assert first["flood"] == limits.INBOX_TURN_MAX // 2 - 80


def test_a_peer_that_floods_is_bounded_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "INBOX_OF_PEER_MAX", 3)
    inbox = Inbox(ME)
    for number in range(3):
        inbox.put(message("flood", number))
    assert not inbox.has_room(message("flood"))
    assert inbox.has_room(message("bob")) and inbox.has_room(call(1)) and inbox.has_room(message(ME))
    assert inbox.has_room(e.PeerDown("flood", "gone")), "news of a link always fits"


def test_peers_that_flood_together_leave_a_share_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "INBOX_MAX", 100)
    inbox = Inbox(ME)
    for number in range(50):
        inbox.put(message("flood", number))
        inbox.put(message("torrent", number))
    assert not inbox.has_room(message("flood")) and not inbox.has_room(message("torrent"))
    for number in range(limits.INBOX_SHARE):
        assert inbox.has_room(message("bob"))
        inbox.put(message("bob", number))
    assert not inbox.has_room(message("bob")) and inbox.has_room(message("carol"))


def test_calls_are_counted_until_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "INBOX_MAX", 2)
    inbox = Inbox(ME)
    inbox.put(call(1))
    inbox.put(call(2))
    assert inbox.calls == 2 and not inbox.has_room(call(3)) and inbox.has_room(e.CallGone(1))
    assert len(list(inbox.turn())) == 2 and inbox.calls == 0 and inbox.has_room(call(3))


def test_what_is_to_be_alone_comes_first_and_alone() -> None:
    inbox = Inbox(ME)
    inbox.put(call(3))
    inbox.put_alone([call(1), message("bob")])
    assert [len(list(inbox.turn())) for _ in range(4)] == [1, 1, 1, 0]


PUTS = st.lists(st.tuples(st.sampled_from(["bob", "carol", ME, "call", "up"]), st.booleans()), max_size=300)


@given(puts=PUTS, broken_off=st.integers(0, 5))
def test_nothing_is_lost_and_every_source_keeps_its_order(puts: list[tuple[str, bool]], broken_off: int) -> None:
    inbox = Inbox(ME)
    put: dict[str, list[e.Stimulus]] = {}
    got: dict[str, list[e.Stimulus]] = {}

    def note(where: dict[str, list[e.Stimulus]], stimulus: e.Stimulus) -> None:
        peer = getattr(stimulus, "peer", ME)
        where.setdefault(peer, []).append(stimulus)

    for number, (what, take) in enumerate(puts):
        stimulus: e.Stimulus = message(what, number)
        if what == "call":
            stimulus = call(number)
        elif what == "up":
            stimulus = e.PeerDown("bob", str(number))
        inbox.put(stimulus)
        note(put, stimulus)
        if take:
            for at, taken in enumerate(inbox.turn()):
                note(got, taken)
                if at == broken_off:
                    break  # a step that raises leaves the rest of the turn in its place
    assert len(inbox) == len(list(inbox))
    while len(inbox):
        for taken in inbox.turn():
            note(got, taken)
    assert got == put and inbox.calls == 0
