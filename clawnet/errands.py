"""Work of the daemon itself that takes its time: one for a local call ends in its answer, whatever happens to it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

from clawnet.errors import ClawnetError
from clawnet.undone import internal

Answer = Callable[[int, Any, dict[str, Any] | None], None]
End = Callable[[], Coroutine[Any, Any, None]]
Report = Callable[[str, str, BaseException], str]


async def end_all(*rounds: Sequence[End]) -> list[BaseException]:
    """Ends those of a round together, round after round; what fails is returned and keeps no other from its end."""
    failed: list[BaseException] = []
    for ends in rounds:
        found = await asyncio.gather(*(end() for end in ends), return_exceptions=True)
        failed += [error for error in found if error is not None]
    return failed


class Errands:
    """What is under way, by its call. `answer` is told the end; `report` logs a defect and returns its id."""

    def __init__(self, answer: Answer, report: Report) -> None:
        self._answer = answer
        self._report = report
        self._under_way: dict[int, asyncio.Task[None]] = {}
        self._for_caller: set[int] = set()

    def begin(self, call: int, name: str, work: Callable[[], Awaitable[Any]], *, for_caller: bool = False) -> None:
        """Begins with work whose value, or error, is the answer. `for_caller`: it ends when the caller goes away."""
        self._under_way[call] = asyncio.get_running_loop().create_task(self._do(call, name, work))
        if for_caller:
            self._for_caller.add(call)
        self._under_way[call].add_done_callback(lambda done: self._over(call))

    def gone(self, call: int) -> None:
        """The caller went away."""
        if call in self._for_caller:
            self._under_way[call].cancel()

    def stop(self) -> None:
        """Ends all of it; the calls are left to whoever stops the daemon."""
        for task in self._under_way.values():
            task.cancel()

    async def _do(self, call: int, name: str, work: Callable[[], Awaitable[Any]]) -> None:
        try:
            value = await work()
        except ClawnetError as error:
            self._answer(call, None, error.as_dict())
        except Exception as error:  # noqa: BLE001 -- the edge of a task that nobody awaits: it is logged and answered
            self._answer(call, None, internal(self._report("daemon.errand_failed", name, error)).as_dict())
        else:
            self._answer(call, value, None)

    def _over(self, call: int) -> None:
        self._under_way.pop(call, None)
        self._for_caller.discard(call)
