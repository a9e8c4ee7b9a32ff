"""What the daemon itself does for a local call ends in one answer, or with its caller; parts end whatever others do."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from clawnet.errands import Errands, end_all
from clawnet.errors import DataError


class Desk:
    """Answers and reports, as they come."""

    def __init__(self) -> None:
        self.answers: list[tuple[int, Any, dict[str, Any] | None]] = []
        self.reports: list[tuple[str, str, str]] = []
        self.errands = Errands(lambda *answer: self.answers.append(answer), self.report)

    def report(self, event: str, about: str, error: BaseException) -> str:
        self.reports.append((event, about, repr(error)))
        return "id-7"

    async def over(self) -> None:
        while self.errands._under_way:
            await asyncio.sleep(0)


def play(test: Callable[[Desk], Awaitable[None]]) -> Desk:
    async def go() -> Desk:
        unhandled: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: unhandled.append(context))
        desk = Desk()
        await test(desk)
        await desk.over()
        assert not unhandled
        return desk

    return asyncio.run(go())


async def forty_two() -> int:
    return 42


async def refused() -> None:
    raise DataError("count is 'many'")


async def broken() -> None:
    raise ValueError("secret words")


async def forever() -> None:
    await asyncio.Event().wait()


def test_each_call_has_one_answer_whatever_happens() -> None:
    async def test(desk: Desk) -> None:
        for call, work in enumerate((forty_two, refused, broken), 1):
            desk.errands.begin(call, "peer.ping", work)

    desk = play(test)
    assert [(call, value, error and error["code"]) for call, value, error in desk.answers] == [
        (1, 42, None),
        (2, None, "bad_input"),
        (3, None, "internal"),
    ]
    told = desk.answers[2][2]
    assert told is not None and "id-7" in told["message"] and "secret" not in told["message"]
    assert desk.reports == [("daemon.errand_failed", "peer.ping", "ValueError('secret words')")]


def test_what_is_for_its_caller_alone_ends_with_it_and_the_rest_goes_on() -> None:
    async def test(desk: Desk) -> None:
        goes_on = asyncio.Event()

        async def waits() -> str:
            await goes_on.wait()
            return "done"

        desk.errands.begin(1, "peer.ping", forever, for_caller=True)
        desk.errands.begin(2, "peer.join", waits)
        for call in (1, 2, 3):
            desk.errands.gone(call)
        await asyncio.sleep(0)
        goes_on.set()

    desk = play(test)
    assert desk.answers == [(2, "done", None)]
    assert desk.reports == []


def test_all_of_it_ends_when_the_daemon_stops() -> None:
    async def test(desk: Desk) -> None:
        desk.errands.begin(1, "peer.ping", forever)
        desk.errands.stop()

    assert play(test).answers == []


def test_a_part_that_does_not_end_well_keeps_no_other_from_its_end() -> None:
    ended: list[str] = []

    async def well() -> None:
        await asyncio.sleep(0)
        ended.append("well")

    failed = asyncio.run(end_all([broken, well], [], [broken], [well]))
    assert [type(error) for error in failed] == [ValueError, ValueError]
    assert ended == ["well", "well"]
