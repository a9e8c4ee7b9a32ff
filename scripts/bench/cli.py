#!/usr/bin/env python3
"""Measures what a user waits for and what an idle node costs: a command against a bare Python, memory, processor.

Usage: python scripts/bench/cli.py [--runs 30] [--idle-s 20] [--json]
`clawnet wallet balance` and `python -c pass` run in turns; the ratio of their medians counts, for a busy machine slows
both. The idle figures are of one daemon that has just answered them.
Targets: ratio <= 8, resident memory <= 70 MB, <= 1 % of a core when idle.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from time import perf_counter
from typing import Any

from machine import machine
from mesh import children, cpu_s

TARGET_RATIO = 8.0
TARGET_RSS_MB = 70.0
TARGET_CPU_PERCENT = 1.0
COMMAND = [str(Path(sys.executable).with_name("clawnet"))]


def run(argv: list[str], environ: dict[str, str]) -> tuple[float, str]:
    """Seconds that a command took, and what it printed; a failure ends the measurement."""
    started = perf_counter()
    done = subprocess.run(argv, env=environ, capture_output=True, text=True, check=False)
    taken = perf_counter() - started
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(argv)} exited with {done.returncode}: {done.stderr.strip()}")
    return taken, done.stdout


def rss_mb(pid: int) -> float:
    """Resident memory of a process, in MB."""
    words = Path(f"/proc/{pid}/status").read_text().split()
    return int(words[words.index("VmRSS:") + 1]) * 1024 / 1e6


def measure(options: argparse.Namespace, home: Path) -> dict[str, Any]:
    """Commands in turns with a bare Python, then a while of doing nothing."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("CLAWNET_")}
    environ |= {"CLAWNET_HOME": str(home), "CLAWNET_NODE_LISTEN_ADDRS": "/ip4/127.0.0.1/tcp/0"}
    run([*COMMAND, "init", "-q"], environ)
    run([*COMMAND, "daemon", "start", "-q"], environ)
    try:
        bare, command = [], []
        for _ in range(options.runs):
            bare.append(run([sys.executable, "-c", "pass"], environ)[0])
            command.append(run([*COMMAND, "wallet", "balance"], environ)[0])
        pid = json.loads(run([*COMMAND, "daemon", "status", "--json"], environ)[1])["pid"]
        time.sleep(1.0)
        pids = [pid, *children(pid)]
        before, began = [cpu_s(each) for each in pids], perf_counter()
        time.sleep(options.idle_s)
        seconds = perf_counter() - began
        used = [cpu_s(each) - earlier for each, earlier in zip(pids, before, strict=True)]
        memory = [rss_mb(each) for each in pids]
    finally:
        run([*COMMAND, "daemon", "stop", "-q"], environ)
    return {
        "python_pass_p50_ms": round(1000 * statistics.median(bare), 1),
        "wallet_balance_p50_ms": round(1000 * statistics.median(command), 1),
        "ratio": round(statistics.median(command) / statistics.median(bare), 2),
        "daemon_rss_mb": round(memory[0], 1),
        "compute_worker_rss_mb": round(sum(memory[1:]), 1),
        "idle_cpu_percent_of_a_core": round(100 * sum(used) / seconds, 2),
    }


def main() -> int:
    """Parses the options, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=30, help="runs of each command")
    parser.add_argument("--idle-s", type=float, default=20.0, help="how long the idle daemon is watched")
    parser.add_argument("--json", action="store_true", help="one object on standard output")
    options = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="clawnet-bench-"))
    try:
        found = {"machine": machine(), **measure(options, home)}
    finally:
        shutil.rmtree(home, ignore_errors=True)
    if options.json:
        print(json.dumps(found))
        return 0
    for name, value in found.items():
        print(f"{name:28} {value}")
    targets = [
        ("ratio", TARGET_RATIO),
        ("daemon_rss_mb", TARGET_RSS_MB),
        ("idle_cpu_percent_of_a_core", TARGET_CPU_PERCENT),
    ]
    for name, limit in targets:
        print(f"target {name} <= {limit:g}: {'reached' if found[name] <= limit else 'MISSED'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
