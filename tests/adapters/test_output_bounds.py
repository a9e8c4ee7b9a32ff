"""Sets of output files that are as large, or as deep, as a liar can make them: what it costs to look at one."""

from __future__ import annotations

import io
import threading
from typing import Any

import pytest

from clawnet import limits
from clawnet.errors import DataError
from clawnet.execution import bundle
from clawnet.execution.bundle import Outputs
from clawnet.execution.outputs import Listing, listing
from clawnet.wire.events import Open, Opened
from clawnet.wire.globs import Globs, State
from tests.adapters.execution_bench import Bench, with_bench
from tests.adapters.hostile_trees import file, tree

DIST = ("dist/*",)


def test_a_directory_is_looked_at_once_however_much_lies_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real, looked = Globs.step, list[str]()

    def step(globs: Globs, state: State, name: str) -> State:
        looked.append(name)
        return real(globs, state, name)

    monkeypatch.setattr(Globs, "step", step)
    below = "dist/" + "/".join(["d"] * (limits.OUTPUT_DEPTH_MAX - 2))
    told = listing(io.BytesIO(tree(*(file(f"{below}/{n}") for n in range(200)))), DIST, bytes_max=2**40)
    assert told.count == 200
    assert len(looked) < limits.OUTPUT_DEPTH_MAX + 200


def test_directories_that_are_only_on_the_way_count_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "TREE_FILES_MAX", 20)
    each = [file(f"dist/{n}/a/b/c/d/e/f") for n in range(4)]
    assert listing(io.BytesIO(tree(*each[:2])), DIST, bytes_max=2**40).count == 2
    with pytest.raises(DataError, match="beyond the 20 files and directories"):
        listing(io.BytesIO(tree(*each)), DIST, bytes_max=2**40)


def test_files_are_not_looked_at_in_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    real, looked = bundle.listing, list[int]()

    def listing(*args: Any, **words: Any) -> Listing:
        looked.append(threading.get_ident())
        return real(*args, **words)

    monkeypatch.setattr(bundle, "listing", listing)

    async def body(bench: Bench) -> None:
        plain = bundle.encode(bundle.Bundle(0, None, b"out", outputs=Outputs(), files=tree(file("dist/x"))))
        bench.executor.open_result(Open(b"r", None, plain, b"", len(plain), (), DIST))
        opened = await bench.until(lambda: next((e for e in bench.events if isinstance(e, Opened)), None))
        assert opened.bundle.outputs_count == 1
        assert looked and threading.get_ident() not in looked

    with_bench(body)
