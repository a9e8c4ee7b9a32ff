"""Storms on a real daemon: what was accepted ends, memory keeps its bounds, others are answered, nobody else is cut."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from clawnet import limits
from clawnet.observe.logs import LINES_OF_EVENT_A_MINUTE
from tests.cli import pressure
from tests.cli.harness import Node, Nodes, free_port, join
from tests.cli.pressure import Figures
from tests.cli.test_hostile_peer import Victim

pytestmark = pytest.mark.slow

GROWTH_MIB_MAX = 150.0
"""What a storm may add to the memory of the daemon at most; measured is a third of it."""


@pytest.fixture(scope="module")
def victim() -> Iterator[Victim]:
    nodes = Nodes()
    try:
        port = free_port()
        node = nodes("victim", CLAWNET_METRICS_PORT=str(port), CLAWNET_NETWORK_PING_INTERVAL="1s").start()
        friend = nodes("friend").start()
        join(node, friend)
        yield Victim(node, friend, port)
    finally:
        nodes.close()


@pytest.fixture
def node(victim: Victim) -> Node:
    return victim.node


def bore(found: Figures) -> None:
    """Held its bounds, stayed the same process, and wrote no flood of lines."""
    assert not found.failures
    assert found.rss_peak_mib - found.rss_before_mib < GROWTH_MIB_MAX, found
    # Lines of one event are bounded by the clock's minute, and a new one may have begun meanwhile.
    assert found.log_lines < 2 * LINES_OF_EVENT_A_MINUTE + 20, found


@pytest.mark.alone
@pytest.mark.parametrize("clients", [1, 100])
def test_submissions_all_at_once_are_all_accepted_and_all_end(node: Node, clients: int) -> None:
    found = asyncio.run(pressure.storm_of_submissions(node, 1_500, clients))
    bore(found)
    assert found.accepted == 1_500 and not found.refused
    assert found.ended == {"settled": 1_500}


def test_followers_that_never_read_cost_little_and_hold_nobody_up(node: Node) -> None:
    found = asyncio.run(pressure.silent_followers(node, 4, 20))
    assert found.ended == {"settled": 1}
    assert not found.failures
    room_mib = limits.RPC_QUEUES_BYTES_MAX / limits.MIB
    assert found.rss_peak_mib - found.rss_before_mib < room_mib + GROWTH_MIB_MAX, found


def test_askers_that_never_read_are_not_asked_for_more(node: Node) -> None:
    bore(asyncio.run(pressure.silent_askers(node, 10, 1_000)))


@pytest.mark.parametrize("kind", sorted(pressure.flood_messages(bytes(32))))
def test_a_flood_of_any_kind_is_borne(victim: Victim, kind: str) -> None:
    found = asyncio.run(pressure.flood(victim, kind, pressure.flood_messages(bytes(32))[kind], 1.0))
    bore(found)
    assert found.sent
    assert "friend" in {peer["name"] for peer in victim.node.ask("peer.list")["items"] if peer["state"] == "connected"}


@pytest.mark.alone
def test_a_restart_with_much_open_goes_on_with_all_of_it(node: Node) -> None:
    found = asyncio.run(pressure.restart_with_open_tasks(node, 1_000))
    assert not found.failures
    assert sum(found.ended.values()) == found.accepted == 1_000
