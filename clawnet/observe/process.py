"""What the operating system says of this process."""

from __future__ import annotations

import asyncio
import os
import platform
import signal
import sys
from collections.abc import Callable
from pathlib import Path


def rss_bytes() -> int:
    """This process's resident memory; 0 where the platform does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        pass
    if sys.platform == "win32":
        return 0
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if platform.system() == "Darwin" else used * 1024


def on_signals(loop: asyncio.AbstractEventLoop, drain: Callable[[str], None], reload: Callable[[], object]) -> None:
    """SIGTERM and SIGINT drain; SIGHUP, where there is one, has the configuration read again."""
    if sys.platform == "win32":
        signal.signal(signal.SIGINT, lambda *_: loop.call_soon_threadsafe(drain, "SIGINT"))
        signal.signal(signal.SIGTERM, lambda *_: loop.call_soon_threadsafe(drain, "SIGTERM"))
        return
    loop.add_signal_handler(signal.SIGTERM, drain, "SIGTERM")
    loop.add_signal_handler(signal.SIGINT, drain, "SIGINT")
    loop.add_signal_handler(signal.SIGHUP, reload)
