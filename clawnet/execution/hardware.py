"""What this machine has: processors and memory, as far as this process may use them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from clawnet import limits

_CGROUP_LIMITS: Final = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
UNKNOWN_BYTES: Final = 2**62
"""For a system that does not tell: then the configured bound is what counts."""


def processors() -> int:
    """Processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def physical_memory() -> int:
    """Bytes of memory this machine has, or the container that this process lives in."""
    try:
        found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        found = UNKNOWN_BYTES
    for path in _CGROUP_LIMITS:
        try:
            text = path.read_text("ascii", "replace").strip()
        except OSError:
            continue
        if text.isdigit():
            found = min(found, int(text))
    return found


def memory_for_runs(configured_bytes: int) -> int:
    """Bytes that all runs together may have: as configured, else three quarters; never more than there is."""
    physical = physical_memory()
    return min(max(configured_bytes, limits.RUN_MEMORY_BYTES_MIN), physical) if configured_bytes else physical // 4 * 3
