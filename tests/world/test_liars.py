"""Members that lie, under real signatures: every honest book holds, and nobody loses more than section 7 says."""

from __future__ import annotations

import pytest

from tests.world.clock import LawBroken
from tests.world.liars import CONVICTED, HABITS, lies_of
from tests.world.signer import signer
from tests.world.world import World

SEEDS = range(1, 7)


def live(seed: int, *lies: str, nodes: int = 4, seconds: float = 25.0) -> World:
    """One mesh with its liars, from its beginning to the last law."""
    with signer(ed25519=True):
        world = World(seed, nodes, seconds, tasks_per_minute=10, lies=lies)
        try:
            world.run()
        except LawBroken as broken:
            story = "\n".join(list(world.clock.story)[-60:])
            pytest.fail(f"seed {seed}, liars {lies}: {broken}\n{story}", pytrace=False)
    return world


def condemned(world: World) -> int:
    """In how many honest books a liar's chain counts no further."""
    found = 0
    for machine in world.honest:
        book = machine.node.rooms.books.book
        views = [(book.view(account), book.proof(account)) for account in world.referee.liars]
        found += any(view.ended or view.forked or proof is not None for view, proof in views)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", HABITS)
def test_honest_members_get_on_beside_a_liar(name: str) -> None:
    told = paid = seen = 0
    for seed in SEEDS:
        world = live(seed, name)
        told += sum(liar.lies for liar in world.liars.values())
        paid += world.referee.releases_total
        seen += condemned(world) if told else 0
        if told and paid and (seen or name not in CONVICTED):
            break
    assert told, "nobody lied in any of these seeds"
    assert paid, "and honest members go on to trade"
    assert bool(seen) == (name in CONVICTED), "who leaves evidence is condemned, and nobody else is"


@pytest.mark.long
@pytest.mark.timeout(3_600)
def test_every_law_holds_beside_any_two_liars() -> None:
    for seed in range(len(HABITS) * (len(HABITS) - 1)):
        live(seed, *lies_of(seed, "all"), nodes=5)


@pytest.mark.slow
def test_results_at_the_last_moment_by_clocks_far_apart_have_the_time_to_arrive() -> None:
    with signer():
        for seed in range(20):
            World(seed, 4, 30.0, tasks_per_minute=4, late=True).run()
