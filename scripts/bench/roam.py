#!/usr/bin/env python3
"""How long members need to find each other on a local network, and a mesh to heal after whatever moves.

Usage: sudo python scripts/bench/roam.py [--rounds 3] [--json]
Real daemons in network namespaces on one bridge. A mesh has healed when both ends hear each other over a link again;
then a task runs from one to the other. Figures of a shared machine vary; the exit code is 1 when nothing heals.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from machine import machine

sys.path.insert(0, str(Path(__file__).parents[2]))

from clawnet.errors import ClawnetError
from tests.cli.harness import Node, connected, join, until
from tests.cli.netns import Lan, possible

PATIENCE_S = 120.0
OUTAGE_S = 40.0
HEALED_WITHIN_S = 30.0
FOUND_WITHIN_S = 3.0


def hears(node: Node, other: Node) -> bool:
    """Whether a ping to the other comes back."""
    if other.name not in connected(node):
        return False
    try:
        return bool(node.ask("peer.ping", peer=other.name, count=1)["received"])
    except ClawnetError:
        return False


def heals(alice: Node, bob: Node, began: float) -> float:
    """Seconds until both hear each other; a task runs after that."""
    for node, other in ((alice, bob), (bob, alice)):
        until(f"{node.name} hears {other.name}", lambda node=node, other=other: hears(node, other), PATIENCE_S)
    seconds = time.monotonic() - began
    done = alice("market", "submit", "--type", "compute", "--op", "sha256", "abc", "--peer", bob.name, "--wait")
    assert done.code == 0, done.err
    return seconds


def moved(lan: Lan, alice: Node, bob: Node, number: int) -> float:
    """Bob's address changes."""
    began = time.monotonic()
    lan.hosts["bob"].move(100 + number)
    return heals(alice, bob, began)


def unplugged(lan: Lan, alice: Node, bob: Node, number: int) -> float:
    """Bob's cable is out for a while."""
    lan.hosts["bob"].unplug()
    time.sleep(OUTAGE_S)
    lan.hosts["bob"].plug()
    return heals(alice, bob, time.monotonic())


def cut(lan: Lan, alice: Node, bob: Node, number: int) -> float:
    """The same further on, where neither machine sees it."""
    lan.hosts["bob"].block()
    time.sleep(OUTAGE_S)
    lan.hosts["bob"].plug()
    return heals(alice, bob, time.monotonic())


def asleep(lan: Lan, alice: Node, bob: Node, number: int) -> float:
    """Bob's process is stopped for a while."""
    pid = bob.pid
    os.kill(pid, signal.SIGSTOP)
    time.sleep(OUTAGE_S)
    os.kill(pid, signal.SIGCONT)
    return heals(alice, bob, time.monotonic())


def other_ports(lan: Lan, alice: Node, bob: Node, number: int) -> float:
    """Bob restarts at other ports and another address; counted from the start of the command that starts it."""
    assert bob("daemon", "stop").code == 0
    lan.hosts["bob"].move(200 + number)
    bob.environ |= {"CLAWNET_TCP_PORT": str(5000 + number), "CLAWNET_QUIC_PORT": str(6000 + number)}
    began = time.monotonic()
    bob.start()
    return heals(alice, bob, began)


CASES: dict[str, tuple[Callable[[Lan, Node, Node, int], float], float]] = {
    "found with no address known, from the start": (other_ports, FOUND_WITHIN_S),
    "address changed": (moved, HEALED_WITHIN_S),
    f"own cable out for {OUTAGE_S:g} s": (unplugged, HEALED_WITHIN_S),
    f"cable further on out for {OUTAGE_S:g} s": (cut, HEALED_WITHIN_S),
    f"asleep for {OUTAGE_S:g} s": (asleep, HEALED_WITHIN_S),
}


def main() -> int:
    """Measures, prints, and judges."""
    parser = argparse.ArgumentParser(description="Seconds to find each other and to heal, on a network of namespaces.")
    parser.add_argument("--rounds", type=int, default=3, help="of each case")
    parser.add_argument("--json", action="store_true", help="for programs")
    options = parser.parse_args()
    if why := possible():
        print(why, file=sys.stderr)
        return 2
    figures: dict[str, list[float]] = {name: [] for name in CASES}
    lan = Lan()
    try:
        alice, bob = (lan.host(name).start() for name in ("alice", "bob"))
        join(alice, bob)
        pid = alice.pid
        for number in range(options.rounds):
            for name, (case, _) in CASES.items():
                figures[name].append(round(case(lan, alice, bob, number), 2))
                if not options.json:
                    print(f"{name}: {figures[name][-1]} s", flush=True)
        assert alice.pid == pid, "a daemon restarted"
    finally:
        lan.close()
    worst = {name: max(found) for name, found in figures.items()}
    if options.json:
        print(json.dumps({"machine": machine(), "seconds": figures}))
    else:
        print(f"\non {machine()}")
        for name, (_, within_s) in CASES.items():
            print(f"{name}: worst {worst[name]} s of {len(figures[name])}, wanted within {within_s:g} s")
    return int(any(worst[name] > within_s for name, (_, within_s) in CASES.items()))


if __name__ == "__main__":
    raise SystemExit(main())
