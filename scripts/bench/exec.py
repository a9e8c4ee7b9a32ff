#!/usr/bin/env python3
"""Measures what people send and what runs it, with real daemons on loopback, one section after the other.

Usage: python scripts/bench/exec.py [blob | shell | wasm ...] [--mib 1024] [--runs 200] [--json]
  blob   a file of --mib MiB from its requester to a worker: throughput on the way, and the memory of both daemons
  wasm   a module inside a worker; 1,000 tasks of a module of 1 ms through the market, 64 in flight
  shell  `true` as a plain process, on the host and sandboxed, in turns; a remote command's lines as they are written
Figures of a shared machine vary; the line that describes it is printed first, the targets and how they fared last.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import blobs
import modules
import shells
from machine import machine

Section = Callable[[Path, argparse.Namespace], Awaitable[dict[str, Any]]]
SECTIONS: dict[str, tuple[Section, tuple[tuple[str, str, float], ...]]] = {
    "blob": (blobs.measured, blobs.TARGETS),
    "shell": (shells.measured, shells.TARGETS),
    "wasm": (modules.measured, modules.TARGETS),
}
"""By name: what measures it in a directory, and its targets: (figure, "<=" or ">=", bound)."""


def main() -> None:
    """Runs the sections named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], default=[])
    parser.add_argument("--mib", type=int, default=1024, help="the size of the blob")
    parser.add_argument("--runs", type=int, default=200, help="how often `true`, or a module, is run each way")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    where = machine()
    if not options.json:
        print(where)
    found: dict[str, Any] = {"machine": where}
    for name in options.sections or SECTIONS:
        measure, targets = SECTIONS[name]
        with tempfile.TemporaryDirectory(prefix="clawnet-bench-") as directory:
            figures = found[name] = asyncio.run(measure(Path(directory), options))
        if options.json:
            continue
        for figure, value in figures.items():
            print(f"{name:8}{figure:32}{value}")
        for figure, sign, bound in targets:
            good = figures[figure] <= bound if sign == "<=" else figures[figure] >= bound
            print(f"{name:8}{figure:32}target {sign} {bound:g}: {'met' if good else 'MISSED'}")
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
