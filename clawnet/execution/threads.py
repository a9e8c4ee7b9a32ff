"""Threads where a machine may have none left to give: begun before they are needed, or done without.

A pool of Python's begins a thread only when there is work for it. Near the bound of a user's processes that fails in
the middle of things, for the one who brings the work.
"""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def begin(pool: ThreadPoolExecutor, count: int) -> None:
    """Begins all the threads of an unused pool, `count` of them: to submit work never fails then. Raises OSError."""
    together = threading.Barrier(count)
    try:
        for _ in range(count):
            pool.submit(together.wait)
    except RuntimeError as error:
        together.abort()
        raise OSError(errno.EAGAIN, str(error)) from error


def in_thread(
    loop: asyncio.AbstractEventLoop, done: Callable[[asyncio.Future[T]], None], work: Callable[..., T], *args: Any
) -> bool:
    """Has the loop's own threads do it, and tells `done`; False where no thread is to be had, and nothing is done."""
    wanted = True

    def do() -> Any:
        return work(*args) if wanted else None  # a pool keeps what it had no thread for until it has one

    try:
        future: asyncio.Future[T] = loop.run_in_executor(None, do)
    except RuntimeError:
        wanted = False
        return False
    future.add_done_callback(done)
    return True
