"""Holding a submission: above the lowest threshold and not at it, never beyond the deadline; who may approve."""

from __future__ import annotations

import pytest

from clawnet.market.approval import check, held_until, may_approve

ABOVE, SHELL = "market.approve.above", "market.approve.shell"


def test_a_budget_is_held_above_the_threshold_and_not_at_it() -> None:
    assert check(5, {ABOVE: 5}) is None
    hold = check(6, {ABOVE: 5})
    assert hold is not None and (hold.limit, hold.limit_ucr, hold.budget_ucr) == (ABOVE, 5, 6)


def test_nothing_is_held_without_a_threshold_and_all_that_may_cost_anything_at_zero() -> None:
    assert check(10**15, {ABOVE: None, SHELL: None}) is None
    assert check(0, {ABOVE: 0}) is None
    assert check(1, {ABOVE: 0}) is not None


@pytest.mark.parametrize(
    ("above", "shell", "limit"), [(9, 3, SHELL), (3, 9, ABOVE), (None, 3, SHELL), (3, None, ABOVE)]
)
def test_the_lower_of_two_thresholds_holds_and_is_named(above: int | None, shell: int | None, limit: str) -> None:
    hold = check(4, {ABOVE: above, SHELL: shell})
    assert hold is not None and hold.limit == limit and hold.limit_ucr == 3
    assert check(3, {ABOVE: above, SHELL: shell}) is None


def test_the_reason_names_budget_threshold_and_value() -> None:
    hold = check(20_500_000, {ABOVE: 5_000_000})
    assert hold is not None and hold.text == "its budget of 20.5 credits is above market.approve.above, which is 5"


def test_a_hold_never_outlasts_the_deadline() -> None:
    assert held_until(1_000, 500, 9_000) == 1_500
    assert held_until(1_000, 500, 1_200) == 1_200


@pytest.mark.parametrize("credential", ["uid:0", "uid:1000", "local"])
def test_a_user_at_the_local_socket_may_approve(credential: str) -> None:
    assert may_approve(credential)


@pytest.mark.parametrize("credential", ["", "http:ci", "mcp:1", "localhost", "token:uid:0"])
def test_nobody_else_may(credential: str) -> None:
    assert not may_approve(credential)
