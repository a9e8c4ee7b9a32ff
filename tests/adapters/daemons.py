"""Daemons of two kinds for one test: one that is root, and gives its rights up for runs, and one that has none."""

from __future__ import annotations

import ctypes
import os
import pickle
import traceback
import warnings
from collections.abc import Awaitable, Callable
from typing import Any, Final

import pytest

from tests.adapters.execution_bench import Bench, with_bench

NOBODY: Final = 65_534
ROOT: Final = os.getuid() == 0
DAEMON = pytest.mark.parametrize(
    "daemon",
    [pytest.param("root", marks=pytest.mark.skipif(not ROOT, reason="the daemon must be root for it")), "user"],
)
_PR_SET_DUMPABLE: Final = 4


def as_daemon(daemon: str, body: Callable[[Bench], Awaitable[Any]], **settings: Any) -> Any:
    """The body's value, on a bench of a daemon that is root, or of one that is an ordinary user's."""
    settings = {"offers": ("shell-execution",), **settings}
    if daemon == "root" or not ROOT:
        kept: list[Any] = []

        async def keep(bench: Bench) -> None:
            kept.append(await body(bench))

        with_bench(keep, **settings)
        return kept[0]
    return _as_nobody(lambda: as_daemon("root", body, **settings))


def _as_nobody(work: Callable[[], Any]) -> Any:
    """The work's value, done by a process of nobody's that was root's only before."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # this process has one thread
        child = os.fork()
    if not child:
        code = 1
        try:
            os.close(reading)
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)  # as after an exec: its /proc is its own
            os.chdir("/")
            try:
                told: tuple[bool, Any] = (True, work())
            except BaseException:  # noqa: BLE001 - it is told to the other process
                told = (False, traceback.format_exc())
            with os.fdopen(writing, "wb") as pipe:
                pickle.dump(told, pipe)
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        data = pipe.read()
    os.waitpid(child, 0)
    assert data, "the process of nobody's ended without a word"
    good, value = pickle.loads(data)
    assert good, value
    return value
