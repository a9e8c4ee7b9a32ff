"""Threads where a machine may have none left to give: what they were for is done without, or later.

A pool of Python's begins a thread only when there is work for it. Near the bound of a user's processes that fails in
the middle of things, for the one who brings the work.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


def submit(pool: ThreadPoolExecutor, work: Callable[..., T], *args: Any) -> Future[T]:
    """Has the pool do it; where there is no thread for it, it is done here and now. RuntimeError after its shutdown."""
    future: Future[T] = Future()
    begun = threading.Lock()

    def do() -> None:
        if not begun.acquire(blocking=False):
            return  # the pool keeps what it had no thread for, too
        try:
            value = work(*args)
        except BaseException as error:  # noqa: BLE001 -- as a pool does it: whoever waits for the work gets it
            future.set_exception(error)
        else:
            future.set_result(value)

    try:
        pool.submit(do)
    except RuntimeError as error:
        if "thread" not in str(error):
            raise
        do()
    return future


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
