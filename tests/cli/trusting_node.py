"""The real program as an executor that delivers whatever came of a run: it judges no contract."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from clawnet.commands.app import main
from clawnet.execution import verify
from clawnet.wire.verdict import Verdict

_honest = verify.Judge.judge


def judge(
    self: verify.Judge,
    *what: Any,
    done: Callable[[Verdict, str], None],
    again: bool = False,
    **more: Any,
) -> None:
    """In place of execution/verify.py's."""
    if again:
        _honest(self, *what, done=done, again=again, **more)
    else:
        done((), "")


verify.Judge.judge = judge  # type: ignore[method-assign]

if __name__ == "__main__":
    main()
