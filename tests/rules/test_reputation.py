"""Reputation from receipts: the five factors, the prior, fading, fraud, roles, and the discount on confidence."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clawnet.reputation.receipts import EFFECTS, Outcome, Receipt, Role, outcome_of_waiver
from clawnet.reputation.standing import DAY_MS, EVIDENCE_MAX, SCORE_FLOOR, UNKNOWN, WEIGHTS, Reputation

T0 = 1_700_000_000_000
DECAY = 0.01
GOOD, BAD = Outcome.SETTLED, Outcome.LOST

outcomes = st.sampled_from(list(Outcome))
receipts = st.lists(st.tuples(outcomes, st.integers(0, 40 * DAY_MS), st.floats(0, 1), st.floats(0, 100)), max_size=40)


def receipt(outcome: Outcome, at_ms: int = T0, *, confidence: float = 0.8, actual_s: float = 1.0) -> Receipt:
    return Receipt("p", outcome, at_ms, promised_s=1.0, actual_s=actual_s, confidence=confidence)


def after(*seen: Outcome, at_ms: int = T0) -> Reputation:
    reputation = Reputation(DECAY)
    for outcome in seen:
        reputation.observe(receipt(outcome, at_ms), at_ms)
    return reputation


def fed(history: list[tuple[Outcome, int, float, float]]) -> tuple[Reputation, int]:
    reputation, now = Reputation(DECAY), T0
    for outcome, later_ms, confidence, actual_s in history:
        now += later_ms
        reputation.observe(receipt(outcome, now, confidence=confidence, actual_s=actual_s), now)
    return reputation, now


# --- the score


def test_an_unknown_peer_has_the_prior_everywhere() -> None:
    assert Reputation(DECAY).score("p", T0) == UNKNOWN
    assert UNKNOWN.total == 0.5
    assert sum(WEIGHTS.values()) == pytest.approx(1)


def test_the_factors_add_up_with_their_weights() -> None:
    score = after(GOOD, GOOD, Outcome.BAD_RESULT).score("p", T0)
    assert score.completion == pytest.approx((2 + 3) / (4 + 3))
    assert score.on_time == pytest.approx((2 + 2) / (4 + 2))
    assert score.accuracy == pytest.approx((2 + 2) / (4 + 3))
    assert score.dispute_ratio == pytest.approx((2 + 1) / (4 + 3))
    assert score.swarm == 0.5
    assert score.total == pytest.approx(
        0.3 * score.completion
        + 0.2 * score.on_time
        + 0.2 * score.accuracy
        + 0.2 * (1 - score.dispute_ratio)
        + 0.1 * score.swarm
    )
    assert score.evidence == 3


@given(receipts)
def test_every_figure_stays_within_its_bounds(history: list[tuple[Outcome, int, float, float]]) -> None:
    reputation, now = fed(history)
    for role in Role:
        score = reputation.score("p", now, role)
        for figure in (score.completion, score.on_time, score.accuracy, score.dispute_ratio, score.confidence_discount):
            assert 0 < figure < 1
        assert 0 <= score.evidence <= EVIDENCE_MAX
        assert score.total == 0 if score.frauds else SCORE_FLOOR - 1e-9 <= score.total < 1
    assert 0 <= reputation.confidence("p", 1.0, now) <= 1


@given(receipts)
def test_one_more_good_task_never_lowers_a_score_and_a_lost_one_never_raises_it(
    history: list[tuple[Outcome, int, float, float]],
) -> None:
    before = fed(history)[0].score("p", fed(history)[1]).total
    (good, now), (bad, _) = fed(history), fed(history)
    good.observe(receipt(GOOD, now), now)
    bad.observe(receipt(BAD, now), now)
    assert good.score("p", now).total >= before - 1e-12
    assert bad.score("p", now).total <= before + 1e-12


@pytest.mark.parametrize("outcome", [Outcome.TASK_FAULT, Outcome.CANCELLED])
def test_faults_of_the_task_move_nothing(outcome: Outcome) -> None:
    reputation = after(GOOD, GOOD)
    before = reputation.score("p", T0)
    reputation.observe(receipt(outcome), T0)
    assert reputation.score("p", T0) == before
    assert f"1 {outcome.value}" in reputation.notes("p")


@pytest.mark.parametrize(
    "outcome",
    [o for o in Outcome if EFFECTS[o].completion == 0 or EFFECTS[o].disputed == 1 or EFFECTS[o].accuracy == 0],
)
def test_every_fault_lowers_the_score_of_its_role_alone(outcome: Outcome) -> None:
    score = after(outcome)
    role = EFFECTS[outcome].role
    assert score.score("p", T0, role).total < 0.5
    other = Role.REQUESTER if role is Role.EXECUTOR else Role.EXECUTOR
    assert score.score("p", T0, other).total == pytest.approx(0.0 if outcome is Outcome.FRAUD else 0.5)


def test_what_a_requester_does_is_told_apart_from_what_an_executor_does() -> None:
    of_requesters = {outcome for outcome, effect in EFFECTS.items() if effect.role is Role.REQUESTER}
    assert of_requesters == {Outcome.PAID, Outcome.RECEIPT_REFUSED, Outcome.UNDERPAID, Outcome.BAD_LOCK}


def test_paying_well_buys_no_name_as_a_worker() -> None:
    reputation = after(*[Outcome.PAID] * 50)
    assert reputation.score("p", T0, Role.REQUESTER).total > 0.9
    assert reputation.score("p", T0, Role.EXECUTOR).total == pytest.approx(0.5)


def test_a_run_much_longer_than_promised_is_not_on_time() -> None:
    prompt, slow = Reputation(DECAY), Reputation(DECAY)
    prompt.observe(receipt(GOOD, actual_s=2.5), T0)
    slow.observe(receipt(GOOD, actual_s=2.6), T0)
    assert prompt.score("p", T0).on_time > 0.5 > slow.score("p", T0).on_time
    assert prompt.score("p", T0).completion == slow.score("p", T0).completion


@pytest.mark.parametrize(
    ("reason", "outcome"),
    [
        ("cancelled", Outcome.CANCELLED),
        ("memory_limit", Outcome.TASK_FAULT),
        ("contract", Outcome.TASK_FAULT),
        ("draining", Outcome.FAILED),
        ("anything else", Outcome.FAILED),
    ],
)
def test_what_a_waiver_says_of_the_executor(reason: str, outcome: Outcome) -> None:
    assert outcome_of_waiver(reason) is outcome


# --- time


@given(receipts, st.integers(0, 400))
def test_an_idle_peer_drifts_to_the_prior(history: list[tuple[Outcome, int, float, float]], days: int) -> None:
    reputation, now = fed([row for row in history if row[0] is not Outcome.FRAUD])
    scores = [reputation.score("p", now + d * DAY_MS) for d in (0, days, days + 1)]
    for factor in ("completion", "on_time", "accuracy", "dispute_ratio"):
        far, nearer, nearest = (abs(getattr(score, factor) - 0.5) for score in scores)
        assert far >= nearer - 1e-12
        assert nearer >= nearest - 1e-12
    assert abs(reputation.score("p", now + 5_000 * DAY_MS).total - 0.5) < 1e-9


def test_evidence_fades_by_the_rate_a_day() -> None:
    score = after(GOOD).score("p", T0 + 10 * DAY_MS)
    assert score.evidence == pytest.approx(0.99**10)


def test_looking_changes_nothing_and_the_way_there_does_not_matter() -> None:
    watched, alone = after(GOOD, BAD), after(GOOD, BAD)
    for day in range(30):
        watched.score("p", T0 + day * DAY_MS)
    later = T0 + 30 * DAY_MS
    watched.observe(receipt(GOOD, later), later)
    alone.observe(receipt(GOOD, later), later)
    assert watched.score("p", later) == alone.score("p", later)


def test_a_receipt_from_the_past_counts_with_what_is_left_of_it_and_one_from_the_future_as_now() -> None:
    old, ahead = Reputation(DECAY), Reputation(DECAY)
    old.observe(receipt(GOOD, T0 - 100 * DAY_MS), T0)
    ahead.observe(receipt(GOOD, T0 + 100 * DAY_MS), T0)
    assert old.score("p", T0).evidence == pytest.approx(0.99**100)
    assert ahead.score("p", T0).evidence == 1.0


def test_a_decay_rate_of_zero_or_one_is_allowed() -> None:
    for rate, evidence in ((0.0, 1.0), (1.0, 0.0)):
        reputation = Reputation(rate)
        reputation.observe(receipt(GOOD), T0)
        assert reputation.score("p", T0 + DAY_MS).evidence == pytest.approx(evidence, abs=1e-5)


# --- floor, recovery, fraud


def test_a_score_has_a_floor_and_recovers() -> None:
    reputation = after(*[Outcome.LOST, Outcome.BAD_RESULT, Outcome.KEY_WITHHELD] * 400)
    assert SCORE_FLOOR <= reputation.score("p", T0).total < 0.3
    for _ in range(150):
        reputation.observe(receipt(GOOD), T0)
    assert reputation.score("p", T0).total > 0.7


def test_a_long_good_name_is_spent_within_a_hundred_tasks() -> None:
    reputation = after(*[GOOD] * 5_000)
    assert reputation.score("p", T0).total > 0.9
    for _ in range(100):
        reputation.observe(receipt(BAD), T0)
    assert reputation.score("p", T0).total < 0.65


@given(receipts, st.integers(0, 10_000))
def test_fraud_never_fades(history: list[tuple[Outcome, int, float, float]], days: int) -> None:
    reputation, now = fed([(Outcome.FRAUD, 0, 0.0, 0.0), *history])
    later = now + days * DAY_MS
    for role in Role:
        assert reputation.score("p", later, role).total == 0.0
    again = Reputation(DECAY)
    again.from_bytes("p", reputation.to_bytes("p"))
    assert again.score("p", later).total == 0.0
    assert again.notes("p")[0].endswith("score 0")


# --- confidence


def test_a_newcomers_word_counts_half() -> None:
    assert Reputation(DECAY).confidence("p", 0.8) == 0.4


def test_a_word_that_holds_is_believed_and_one_that_does_not_is_discounted() -> None:
    honest, boaster = Reputation(DECAY), Reputation(DECAY)
    for n in range(40):
        honest.observe(receipt(GOOD, confidence=0.9), T0)
        boaster.observe(receipt(GOOD if n % 2 else BAD, confidence=1.0), T0)
    assert honest.confidence("p", 0.9, T0) > 0.85
    assert boaster.confidence("p", 1.0, T0) == pytest.approx(0.5)


def test_a_modest_word_that_holds_as_often_as_it_says_is_believed() -> None:
    reputation = Reputation(DECAY)
    for n in range(100):
        reputation.observe(receipt(GOOD if n % 2 else BAD, confidence=0.5), T0)
    assert reputation.confidence("p", 0.5, T0) > 0.48


def test_modest_words_save_up_no_credit_for_a_bold_one() -> None:
    saver, plain = Reputation(DECAY), Reputation(DECAY)
    for _ in range(100):
        saver.observe(receipt(GOOD, confidence=0.01), T0)
        plain.observe(receipt(GOOD, confidence=0.0), T0)
    for reputation in (saver, plain):
        for _ in range(10):
            reputation.observe(receipt(BAD, confidence=1.0), T0)
    assert saver.confidence("p", 1.0, T0) - plain.confidence("p", 1.0, T0) < 0.1
    assert saver.confidence("p", 1.0, T0) < 0.2


def test_the_discount_fades_too() -> None:
    reputation = Reputation(DECAY)
    for _ in range(20):
        reputation.observe(receipt(BAD, confidence=1.0), T0)
    assert reputation.confidence("p", 1.0, T0) < 0.1
    assert reputation.confidence("p", 1.0, T0 + 5_000 * DAY_MS) == pytest.approx(0.5)


# --- storage and bounds


@given(receipts)
def test_a_record_survives_storage(history: list[tuple[Outcome, int, float, float]]) -> None:
    reputation, now = fed([*history, (GOOD, 0, 0.5, 1.0)])
    again = Reputation(DECAY)
    again.from_bytes("p", reputation.to_bytes("p"))
    for role in Role:
        assert again.score("p", now + DAY_MS, role) == reputation.score("p", now + DAY_MS, role)
    assert again.notes("p") == reputation.notes("p")


def test_a_record_of_another_shape_is_refused() -> None:
    with pytest.raises(msgspec.DecodeError):
        Reputation(DECAY).from_bytes("p", b"\x93\x01\x02\xa1x")


def test_records_are_bounded_and_frauds_are_kept_longest() -> None:
    reputation = Reputation(DECAY, peers_max=3)
    reputation.observe(Receipt("fraud", Outcome.FRAUD, T0), T0)
    dropped: list[str] = []
    for peer in ("a", "b", "a", "c", "d"):
        dropped += reputation.observe(Receipt(peer, GOOD, T0), T0)
    assert dropped == ["b", "a"]
    assert list(reputation.peers()) == ["fraud", "c", "d"]


def test_every_outcome_says_what_it_means() -> None:
    assert set(EFFECTS) == set(Outcome)
    assert all(effect.meaning for effect in EFFECTS.values())
