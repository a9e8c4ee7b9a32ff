"""The line that describes the machine a figure was measured on."""

from __future__ import annotations

import os
import platform
import statistics
from pathlib import Path
from time import perf_counter


def machine() -> str:
    """One line: processor, cores, system, Python, and how busy the machine is."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    python = f"{platform.python_implementation()} {platform.python_version()}"
    return f"{model}, {os.cpu_count()} cores, {platform.system()} {platform.release()}, {python}, load {load:.1f}"


def fsync_ms(directory: Path) -> float:
    """The median of writing and syncing 16 KiB to a file in this directory, in milliseconds."""
    times = []
    with (directory / "fsync").open("wb", buffering=0) as file:
        for _ in range(50):
            started = perf_counter()
            file.write(bytes(16 * 1024))
            os.fsync(file.fileno())
            times.append(perf_counter() - started)
    (directory / "fsync").unlink()
    return round(1000 * statistics.median(times), 2)
