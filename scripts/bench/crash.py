#!/usr/bin/env python3
"""Kills daemons under load and holds what is left against the laws: nothing lost, nothing created, nothing run twice.

Usage: python scripts/bench/crash.py [--seconds 60] [--nodes 5] [--kill-every 1] [--seed N] [--rate 6] [--json]
Real daemons on loopback in one mesh take tasks of every sort; one of them (now and then two) is ended by SIGKILL every
second and started again; clients are killed too. Then all that is owed comes to its end, and an auditor reads the
databases. The exit code is 1 when a law is broken. Figures of a shared machine vary.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import msgspec
from machine import machine

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.cli.soak import Figures, Soak


def show(figures: Figures) -> None:
    """The figures as text."""
    lines = {
        "kills": figures.kills,
        "restarts": figures.restarts,
        "clients killed": figures.clients_killed,
        "tasks accepted": figures.tasks_accepted,
        "settled": figures.tasks_settled,
        "other ends": ", ".join(f"{n} {state}" for state, n in figures.states.items() if state != "settled") or "none",
        "lost": figures.tasks_lost,
        "credits created or destroyed (ucr)": figures.credits_off,
        "duplicates executed": figures.duplicates_executed,
        "processes left behind": figures.orphans,
        "restart to a task taken": f"p50 {figures.answer_p50_s} s, longest {figures.answer_longest_s} s",
        "restart to a task settled": f"p50 {figures.recovery_p50_s} s, longest {figures.recovery_longest_s} s",
        "until nothing was owed any more": f"{figures.rest_s} s",
        "refused": figures.refused or "none",
    }
    for name, value in lines.items():
        print(f"  {name:36} {value}")
    for text in figures.broken:
        print(f"BROKEN: {text}")
    print("every law held" if not figures.broken else f"{len(figures.broken)} laws broken (seed {figures.seed})")


def main() -> int:
    """Parses the options, storms, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long daemons are killed")
    parser.add_argument("--nodes", type=int, default=5, help="daemons")
    parser.add_argument("--kill-every", type=float, default=1.0, help="seconds between kills")
    parser.add_argument("--seed", type=int, default=1, help="of the choices of this program")
    parser.add_argument("--rate", type=float, default=6.0, help="submissions a second of each of the three clients")
    parser.add_argument("--json", action="store_true", help="one object on standard output")
    options = parser.parse_args()

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    described = machine()
    if not options.json:
        print(described, flush=True)
    soak = Soak(
        seconds=options.seconds,
        nodes=options.nodes,
        kill_every_s=options.kill_every,
        seed=options.seed,
        rate=options.rate,
        say=say,
    )
    figures = soak.run()
    if options.json:
        print(json.dumps({"machine": described, **msgspec.to_builtins(figures)}, indent=2))
    else:
        show(figures)
    return 1 if figures.broken else 0


if __name__ == "__main__":
    sys.exit(main())
