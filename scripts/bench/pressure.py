#!/usr/bin/env python3
"""Storms on one daemon: memory at its peak, how long another client waits meanwhile, and how all of it ended.

Usage: python scripts/bench/pressure.py [--tasks 10000] [--flood-s 5] [--only WORD] [--json]
Submissions all at once by 1, 10 and 200 clients; clients that never read while a task prints 50 MB, and while they ask
for long lists; a member that floods each kind of message; a restart with thousands of tasks open. The exit code is 1
when something accepted did not reach a final state. Figures of a shared machine vary.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
from machine import machine

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.cli import pressure
from tests.cli.harness import Node, Nodes, free_port, join
from tests.cli.pressure import Figures
from tests.cli.test_hostile_peer import Victim


def storms(victim: Victim, options: argparse.Namespace) -> dict[str, Callable[[], Awaitable[Figures]]]:
    """The storms by name, in their order."""
    node: Node = victim.node
    found: dict[str, Callable[[], Awaitable[Figures]]] = {}
    for clients in (1, 10, 200):
        found[f"submit-{clients}"] = lambda clients=clients: pressure.storm_of_submissions(node, options.tasks, clients)
    found["silent-1"] = lambda: pressure.silent_followers(node, 1, 50)
    found["silent-20"] = lambda: pressure.silent_followers(node, 20, 50)
    found["silent-askers"] = lambda: pressure.silent_askers(node, 20, 2_000)
    for name, make in pressure.flood_messages(bytes(32)).items():
        found[f"flood-{name}"] = lambda name=name, make=make: pressure.flood(victim, name, make, options.flood_s)
    found["restart"] = lambda: pressure.restart_with_open_tasks(node, options.tasks)
    return found


def show(figures: Figures) -> None:
    """One storm as text."""
    print(f"\n{figures.storm}: {figures.seconds} s")
    rss = f"{figures.rss_before_mib:g} before, peak {figures.rss_peak_mib:g}, {figures.rss_after_mib:g} after"
    lines = {
        "memory (MiB)": rss,
        "accepted / refused": f"{figures.accepted} in {figures.accepted_s} s / {figures.refused or 0}",
        "ended": figures.ended,
        "another client's balance (ms)": "p50 {:g}, p99 {:g}, max {:g}".format(*figures.balance_ms),
        "another client's submit (ms)": "p50 {:g}, p99 {:g}, max {:g}".format(*figures.submit_ms),
        "messages sent by the peer": figures.sent,
        "dropped": figures.dropped,
        "log lines": figures.log_lines,
        "storage (MiB)": figures.storage_mib,
    }
    for name, value in lines.items():
        if value:
            print(f"  {name:32} {value}")
    for text in figures.failures:
        print(f"  BROKEN: {text}")


def main() -> int:
    """Parses the options, storms, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=10_000, help="submissions of each storm")
    parser.add_argument("--flood-s", type=float, default=5.0, help="how long a peer floods")
    parser.add_argument("--only", default="", help="only storms whose name contains this")
    parser.add_argument("--json", action="store_true", help="one object on standard output")
    options = parser.parse_args()
    if not options.json:
        print(machine(), flush=True)
    nodes = Nodes()
    found: list[Figures] = []
    try:
        port = free_port()
        node = nodes("victim", CLAWNET_METRICS_PORT=str(port), CLAWNET_NETWORK_PING_INTERVAL="1s")
        node.start()
        friend = nodes("friend").start()
        join(node, friend)
        victim = Victim(node, friend, port)
        print(f"idle: {pressure.rss_mib(node.pid):g} MiB", file=sys.stderr if options.json else sys.stdout)
        for name, storm in storms(victim, options).items():
            if options.only in name:
                found.append(asyncio.run(storm()))
                if not options.json:
                    show(found[-1])
                    sys.stdout.flush()
    finally:
        nodes.close()
    if options.json:
        print(json.dumps([msgspec.to_builtins(one) for one in found], indent=2))
    return 1 if any(one.failures for one in found) else 0


if __name__ == "__main__":
    sys.exit(main())
