"""SIGKILL under load, for a minute (ten with --long): nothing is lost, nothing created, nothing run twice."""

from __future__ import annotations

import pytest

from tests.cli.soak import Figures, Soak


def held(figures: Figures) -> None:
    """Every law held, and there was a storm to hold in."""
    assert not figures.broken, "\n".join([f"seed {figures.seed}", *figures.broken])
    assert figures.tasks_lost == figures.duplicates_executed == figures.orphans == 0
    assert figures.credits_off == "0"
    assert figures.kills > figures.seconds / 4
    assert figures.clients_killed and figures.recoveries
    assert figures.tasks_settled > figures.tasks_accepted / 2


@pytest.mark.slow
def test_a_minute_of_sigkills() -> None:
    held(Soak(seconds=60.0, seed=3).run())


@pytest.mark.long
@pytest.mark.alone
@pytest.mark.timeout(1_500)
def test_ten_minutes_of_sigkills() -> None:
    held(Soak(seconds=600.0, seed=4).run())
