"""The real program as an executor that lies about output files: it sends the archive of a trick in their place.

The trick is the name in the file `trick` of the working directory; all else is production code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from clawnet.commands.app import main
from clawnet.execution import delivery
from clawnet.execution.archive import Member
from clawnet.execution.outputs import Collected
from tests.adapters.hostile_trees import TRICKS


class Lie(Collected):
    """Says that it found what was asked for, and is something else."""

    def __init__(self, root: Path, data: bytes) -> None:
        super().__init__(root, None)
        self.members = [Member("dist/x", "file")]
        self.size = len(data)
        self._data = data

    def parts(self) -> Iterator[bytes]:
        yield self._data


_honest = delivery.collect


def collect(work_dir: Path, patterns: Sequence[str], **more: Any) -> Collected:
    """In place of execution/outputs.py's."""
    trick = work_dir / "trick"
    if not trick.exists():
        return _honest(work_dir, patterns, **more)
    return Lie(work_dir, TRICKS[trick.read_text().strip()])


delivery.collect = collect  # type: ignore[attr-defined]

if __name__ == "__main__":
    main()
