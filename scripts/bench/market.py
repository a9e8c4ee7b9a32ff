#!/usr/bin/env python3
"""Measures trivial compute tasks through the whole market: three daemons, real auction, locks, sealed results, claims.

Usage: python scripts/bench/market.py [--tasks 1000] [--latency-tasks 200] [--in-flight 64] [--repeat 3] [--json]
Starts three daemons on loopback in homes of their own, joined through real invites. A task counts when it is settled
on both sides: the requester has opened the result, the executor has its pay and the acknowledgement of its claim.
Loads: one in flight; so many in flight with equal run times (lock-step) and with exponential rests (jittered); Poisson
arrivals. Celery with Redis runs in the same alternation where both are installed. Figures of a shared machine vary.
Targets: p50 <= 10 ms with one in flight; >= 500 tasks/s with 64 in flight and jittered run times.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import shutil
import signal
import statistics
import sys
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from time import perf_counter
from typing import Any

from celery_side import Celery, celery_missing
from machine import fsync_ms, machine
from mesh import Mesh, percentile

TARGET_P50_MS = 10.0
TARGET_TASKS_PER_S = 500.0
MEAN_REST_S = 0.010

Go = Callable[[], Awaitable[None]]
"""Does one task, to its end."""


async def in_flight(go: Go, count: int, width: int, *, jitter: bool = False) -> list[float]:
    """`count` tasks, `width` at a time; the seconds that each took.

    With `jitter` each of the `width` rests for an exponential time before its next task, as if its run had taken that
    much longer: nothing on the way stays in step. The rest is in the rate, and not in the task's time.
    """
    times: list[float] = []
    chance = random.Random(11)
    left = count

    async def one_after_the_other() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            if jitter:
                await asyncio.sleep(chance.expovariate(1 / MEAN_REST_S))
            started = perf_counter()
            await go()
            times.append(perf_counter() - started)

    await asyncio.gather(*(one_after_the_other() for _ in range(width)))
    return times


async def arrivals(go: Go, count: int, per_s: float) -> list[float]:
    """`count` tasks that arrive at random, `per_s` a second on average, whether or not the earlier ones are done."""
    times: list[float] = []
    chance = random.Random(7)

    async def one(due: float) -> None:
        await go()
        times.append(perf_counter() - due)

    started: list[asyncio.Future[None]] = []
    due = perf_counter()
    for _ in range(count):
        due += chance.expovariate(per_s)
        await asyncio.sleep(max(0.0, due - perf_counter()))
        started.append(asyncio.ensure_future(one(due)))
    await asyncio.gather(*started)
    return times


def summary(times: list[float], wall_s: float) -> dict[str, Any]:
    """What a load came to."""
    return {
        "tasks": len(times),
        "tasks_per_s": round(len(times) / wall_s, 1),
        "p50_ms": round(1000 * percentile(times, 50), 2),
        "p95_ms": round(1000 * percentile(times, 95), 2),
    }


def loads(options: argparse.Namespace) -> dict[str, Callable[[Go], Awaitable[list[float]]]]:
    """The loads by name, in the order in which each round runs them."""
    many, width = options.tasks, options.in_flight
    return {
        "one in flight": lambda go: in_flight(go, options.latency_tasks, 1),
        f"{width} in flight, lock-step": lambda go: in_flight(go, many, width),
        f"{width} in flight, jittered": lambda go: in_flight(go, many, width, jitter=True),
        f"Poisson {options.rate:g}/s": lambda go: arrivals(go, many, options.rate),
    }


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All rounds; for each load the round with the median throughput, and how far the rounds lie apart."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    missing = "it was not asked for" if options.no_celery else celery_missing(options.celery)
    directory = Path(tempfile.mkdtemp(prefix="clawnet-bench-", dir=options.dir or None))
    synced_ms = fsync_ms(directory)
    try:
        async with contextlib.AsyncExitStack() as stack:
            mesh = await stack.enter_async_context(Mesh.running(directory, options.slots))
            rival = None if missing else await stack.enter_async_context(Celery.running(directory, options.celery))
            await in_flight(mesh.task, 200, 16)
            for _ in range(options.repeat):
                for name, load in loads(options).items():
                    if options.only and options.only not in name:
                        continue
                    result = await mesh.measured(load, summary, both=name == "one in flight")
                    found.setdefault("clawnet", {}).setdefault(name, []).append(result)
                    if rival is not None:
                        found.setdefault("celery", {}).setdefault(name, []).append(await rival.measured(load, summary))
            books = await mesh.books()
    finally:
        if options.keep:
            print(f"kept: {directory}", file=sys.stderr)
        else:
            shutil.rmtree(directory, ignore_errors=True)
    return {
        "loads": {side: medians(rounds) for side, rounds in found.items()},
        "celery": missing,
        "books": books,
        "fsync_p50_ms": synced_ms,
    }


def medians(rounds: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The middle round of each load, by tasks per second."""
    chosen = {}
    for name, results in rounds.items():
        results.sort(key=lambda result: result["tasks_per_s"])
        middle = dict(results[len(results) // 2])
        middle["p50_ms"] = round(statistics.median(result["p50_ms"] for result in results), 2)
        middle["tasks_per_s_range"] = [results[0]["tasks_per_s"], results[-1]["tasks_per_s"]]
        chosen[name] = middle
    return chosen


def show(found: dict[str, Any]) -> None:
    """The figures as text."""
    print(f"an fsync of 16 KiB takes {found['fsync_p50_ms']} ms here")
    for side, results in found["loads"].items():
        print(f"\n{side}")
        for name, result in results.items():
            low, high = result["tasks_per_s_range"]
            print(
                f"  {name:28} {result['tasks_per_s']:8.1f} tasks/s ({low:g} to {high:g})"
                f"   p50 {result['p50_ms']:7.2f} ms   p95 {result['p95_ms']:7.2f} ms"
            )
            for node, cost in result.get("per_task", {}).items():
                print("      " + f"{node:10} " + "  ".join(f"{what} {value:g}" for what, value in cost.items()))
    if found["celery"]:
        print(f"\nCelery with Redis did not run: {found['celery']}")
    print(f"\nbooks: {found['books']}")
    for line in verdicts(found["loads"]["clawnet"]):
        print(line)


def verdicts(results: dict[str, Any]) -> list[str]:
    """Measured against the targets."""
    lines = []
    for name, result in results.items():
        if name == "one in flight":
            reached = "reached" if result["p50_ms"] <= TARGET_P50_MS else "missed"
            lines.append(f"target p50 <= {TARGET_P50_MS:g} ms with one in flight: {reached} ({result['p50_ms']} ms)")
        if "jittered" in name:
            reached = "reached" if result["tasks_per_s"] >= TARGET_TASKS_PER_S else "missed"
            lines.append(f"target >= {TARGET_TASKS_PER_S:g} tasks/s, {name}: {reached} ({result['tasks_per_s']})")
    return lines


def main() -> int:
    """Parses the options, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=1000, help="tasks of each load but the first")
    parser.add_argument("--latency-tasks", type=int, default=200, help="tasks with one in flight")
    parser.add_argument("--in-flight", type=int, default=64, help="tasks in flight at once")
    parser.add_argument("--rate", type=float, default=300.0, help="Poisson arrivals a second")
    parser.add_argument("--repeat", type=int, default=3, help="rounds; the median counts")
    parser.add_argument("--slots", type=int, default=0, help="execution.slots of the workers; 0: their default")
    parser.add_argument("--only", default="", help="only loads whose name contains this")
    parser.add_argument("--celery", default="", metavar="PYTHON", help="a Python that has celery and redis")
    parser.add_argument("--no-celery", action="store_true", help="leave Celery out")
    parser.add_argument("--dir", default="", help="where the homes lie: the disk whose fsyncs count")
    parser.add_argument("--keep", action="store_true", help="keep the homes and their logs")
    parser.add_argument("--json", action="store_true", help="one object on standard output")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the daemons end with us
    described = machine()
    if not options.json:
        print(described, flush=True)
    found = {"machine": described, **asyncio.run(measure(options))}
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        show(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
