"""Who fits a task, and whom to ask: cards, requirements, rings, exploration, and a cost that does not grow."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clawnet import limits
from clawnet.market.capability import CapabilityIndex, capability_hash, draw, unmet
from clawnet.market.reasons import MEANING, Reason, count_reasons, reason_of
from clawnet.wire.messages import PeerCard, Requirements

GIB = 2**30


def card(peer: str = "p", serial: int = 1, **claims: Any) -> PeerCard:
    fields: dict[str, Any] = {
        "name": peer,
        "version": "1",
        "addresses": [],
        "capabilities": ["compute", "op:sha256", "shell-execution"],
        "labels": ["eu"],
        "os": "linux",
        "cpu": 4,
        "memory_bytes": 8 * GIB,
        "gpu": 0,
        "models": [],
        "slots": 4,
        "running": 0,
        "queued": 0,
        "shell_rings": ["own"],
    }
    return PeerCard(peer=peer, serial=serial, **{**fields, **claims})


def pick_of(seed: int) -> Any:
    return random.Random(seed).randrange


# --- fit


@pytest.mark.parametrize(
    ("kind", "needs", "ring", "reason"),
    [
        ("compute", {}, "member", None),
        ("compute", {"capabilities": ["compute", "op:sha256"]}, "member", None),
        ("compute", {"capabilities": ["op:primes"]}, "member", Reason.NO_CAPABILITY),
        ("prompt", {}, "own", Reason.NO_CAPABILITY),
        ("no-such-kind", {}, "own", Reason.NO_CAPABILITY),
        ("shell", {}, "own", None),
        ("shell_task", {"capabilities": ["shell"]}, "own", None),
        ("shell", {}, "member", Reason.POLICY),
        ("shell", {"os": "linux"}, "own", None),
        ("shell", {"os": "darwin"}, "own", Reason.OS),
        ("compute", {"gpu": 1}, "own", Reason.NO_GPU),
        ("compute", {"model": "llama3"}, "own", Reason.NO_MODEL),
        ("compute", {"cpu": 4, "memory_bytes": 8 * GIB}, "own", None),
        ("compute", {"cpu": 5}, "own", Reason.CPU),
        ("compute", {"memory_bytes": 8 * GIB + 1}, "own", Reason.MEMORY),
        ("compute", {"labels": ["eu"]}, "own", None),
        ("compute", {"labels": ["eu", "ssd"]}, "own", Reason.LABELS),
    ],
)
def test_the_first_unmet_requirement_is_named(
    kind: str, needs: dict[str, Any], ring: str, reason: Reason | None
) -> None:
    assert unmet(kind, Requirements(**needs), card(), ring) == reason


def test_the_capability_hash_covers_claims_and_not_load() -> None:
    base = capability_hash(card())
    assert len(base) == 32
    assert capability_hash(card("q", 9, running=3, queued=7, addresses=["/ip4/127.0.0.1/tcp/1"])) == base
    assert capability_hash(card(capabilities=["shell-execution", "op:sha256", "compute"])) == base
    for changed in ({"cpu": 5}, {"gpu": 1}, {"labels": []}, {"slots": 5}, {"shell_rings": []}, {"os": "darwin"}):
        assert capability_hash(card(**changed)) != base


# --- the index


def test_the_newest_serial_wins() -> None:
    index = CapabilityIndex()
    assert index.put(card(serial=5), "member")
    assert not index.put(card(serial=5, cpu=99), "member")
    assert not index.put(card(serial=4, cpu=99), "member")
    assert index.put(card(serial=6, cpu=8), "member")
    known = index.card("p")
    assert known is not None
    assert known.cpu == 8
    assert index.capability_hash("p") == capability_hash(known)


def test_a_card_that_changes_its_claims_changes_who_fits() -> None:
    index, needs = CapabilityIndex(), Requirements(gpu=1)
    index.put(card(), "member")
    assert index.eligible("compute", needs, "member") == []
    index.put(card(serial=2, gpu=1), "member")
    assert index.eligible("compute", needs, "member") == ["p"]
    index.put(card(serial=3, gpu=1, capabilities=["storage"]), "member")
    assert index.eligible("compute", needs, "member") == []
    index.put(card(serial=4, gpu=1, running=1), "own")
    index.put(card(serial=5, gpu=1), "own")
    assert index.eligible("compute", needs, "own") == ["p"]
    assert index.eligible("compute", needs, "member") == []
    assert not index.put(card(serial=5, gpu=1), "member")
    assert index.eligible("compute", needs, "member") == ["p"]
    index.remove("p")
    assert index.eligible("compute", needs, "member") == []
    assert index.unmet("compute", needs, "p") == Reason.OTHER


def test_only_exclude_among_and_usable_narrow_the_choice() -> None:
    index, needs = CapabilityIndex(), Requirements()
    for name in "abcdef":
        index.put(card(name), "member")
    index.put(card("mine"), "own")
    assert index.eligible("compute", needs, "member") == list("abcdef")
    assert index.eligible("compute", needs, "member", exclude=["b"]) == list("acdef")
    assert index.eligible("compute", needs, "member", only=["e", "zz", "a"]) == ["e", "a"]
    assert index.eligible("compute", needs, "member", only=["e", "a"], exclude=["a"]) == ["e"]
    assert index.eligible("compute", needs, "member", among={"c": 1, "mine": 1}) == ["c"]
    assert index.eligible("compute", needs, "member", usable=lambda peer: peer > "d") == ["e", "f"]
    assert index.eligible("shell", needs, "own") == ["mine"]
    assert index.eligible("shell", needs, "member") == []


def test_the_index_is_bounded_and_forgets_the_card_heard_longest_ago() -> None:
    index = CapabilityIndex(cards_max=3)
    for name in "abc":
        index.put(card(name), "member")
    index.put(card("a", 2), "member")
    index.put(card("d"), "member")
    assert len(index) == 3
    assert index.eligible("compute", Requirements(), "member") != []
    assert index.card("b") is None
    assert index.card("a") is not None


@given(
    st.lists(
        st.tuples(st.sampled_from("abcde"), st.integers(1, 9), st.integers(0, 2), st.sampled_from(["own", "member"]))
    )
)
def test_the_index_agrees_with_looking_at_every_card(puts: list[tuple[str, int, int, str]]) -> None:
    index, needs = CapabilityIndex(), Requirements(gpu=1)
    cards: dict[str, PeerCard] = {}
    rings: dict[str, str] = {}
    for peer, serial, gpu, ring in puts:
        new = card(peer, serial, gpu=gpu, capabilities=["compute"] if gpu < 2 else ["storage"])
        rings[peer] = ring
        if peer not in cards or serial > cards[peer].serial:
            cards[peer] = new
        index.put(new, ring)
        for wanted in ("own", "member"):
            truth = {p for p, c in cards.items() if rings[p] == wanted and unmet("compute", needs, c, wanted) is None}
            assert set(index.eligible("compute", needs, wanted)) == truth


# --- candidates


def crowd(count: int) -> CapabilityIndex:
    index = CapabilityIndex()
    for n in range(count):
        index.put(card(f"p{n:04}"), "member")
    return index


def test_with_few_all_are_asked_and_no_luck_is_needed() -> None:
    def never(bound: int) -> int:
        raise AssertionError("no random choice among so few")

    found = crowd(16).candidates("compute", Requirements(), "member", score_hint=lambda peer: 0.0, pick=never)
    assert found == [f"p{n:04}" for n in range(16)]


def test_the_best_are_asked_and_three_others_by_lot() -> None:
    index = crowd(60)
    explorers: set[str] = set()
    for seed in range(40):
        found = index.candidates(
            "compute", Requirements(), "member", score_hint=lambda peer: int(peer[1:]) / 60, pick=pick_of(seed)
        )
        assert len(found) == len(set(found)) == limits.CANDIDATES_MAX
        assert found[:13] == [f"p{n:04}" for n in range(59, 46, -1)]
        explorers.update(found[13:])
    assert len(explorers) > 30


def test_equal_hints_are_drawn_by_lot() -> None:
    index, first = crowd(200), set()
    for seed in range(60):
        found = index.candidates("compute", Requirements(), "member", score_hint=lambda peer: 0.5, pick=pick_of(seed))
        first.add(found[0])
    assert len(first) > 30


def test_the_work_of_a_choice_does_not_grow_with_the_mesh() -> None:
    looked: dict[int, int] = {}
    for count in (200, 1_000, 3_000):
        index, calls = crowd(count), [0]

        def hint(peer: str, calls: list[int] = calls) -> float:
            calls[0] += 1
            return 0.5

        connected = {f"p{n:04}": None for n in range(100)}
        index.candidates("compute", Requirements(), "member", score_hint=hint, pick=pick_of(1))
        looked[count] = calls[0]
        calls[0] = 0
        usable: list[str] = []
        index.candidates(
            *("compute", Requirements(), "member"),
            score_hint=hint,
            pick=pick_of(1),
            among=connected,
            usable=lambda peer, usable=usable: usable.append(peer) is None,
        )
        assert len(usable) == 100
        assert calls[0] == 100
    assert set(looked.values()) == {limits.CANDIDATE_POOL_MAX}


def test_the_same_seed_chooses_the_same() -> None:
    one, other = (
        crowd(300).candidates("compute", Requirements(), "member", score_hint=lambda peer: 0.5, pick=pick_of(7))
        for _ in range(2)
    )
    assert one == other


@given(st.integers(0, 40), st.integers(0, 50), st.integers(0, 2**32))
def test_draw_takes_different_items(size: int, count: int, seed: int) -> None:
    items = [str(n) for n in range(size)]
    drawn = draw(items, count, pick_of(seed))
    assert len(drawn) == len(set(drawn)) == min(size, count)
    assert set(drawn) <= set(items)
    assert items == [str(n) for n in range(size)]


# --- reasons


def test_every_reason_has_a_meaning_and_fits_the_wire() -> None:
    assert set(MEANING) == set(Reason)
    assert all(len(reason.value) <= 64 for reason in Reason)
    assert msgspec.json.encode(Reason.NO_GPU) == b'"no_gpu"'


def test_reasons_are_counted_most_frequent_first_and_unknown_ones_are_other() -> None:
    assert reason_of("no_gpu") is Reason.NO_GPU
    assert reason_of("\x1b]0;owned") is Reason.OTHER
    counted = count_reasons(["price", "no_gpu", "no_gpu", "what", "policy", "no_gpu", "no_gpu", "price"])
    assert list(counted.items()) == [("no_gpu", 4), ("price", 2), ("other", 1), ("policy", 1)]
