"""What is done again and again is done again after it failed."""

from __future__ import annotations

import asyncio

import pytest

from clawnet.timers import every
from tests.node.runtimekit import Loop


def test_work_that_fails_is_told_and_done_again(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop()
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: loop)
    done_ms: list[int] = []

    def work() -> None:
        done_ms.append(loop.now_ms)
        if len(done_ms) < 3:
            raise OSError("a file that cannot be read")

    start_ms = loop.now_ms
    every(10.0, work, first_s=1.0)
    for wait_ms in (1_000, 10_000):
        with pytest.raises(OSError, match="cannot be read"):
            loop.advance(wait_ms)
    loop.advance(20_000)
    assert [at - start_ms for at in done_ms] == [1_000, 11_000, 21_000, 31_000]
