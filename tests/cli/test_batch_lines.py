"""The lines of a batch without a node: what is read, what is told of a bad one, which key each gets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from clawnet import limits
from clawnet.commands.batch_lines import Keys, Line, Source
from clawnet.paths import Home

DEFAULTS = {"type": "compute", "op": "sha256", "budget_ucr": 2_000_000}


def read(path: Path, data: bytes, **defaults: Any) -> list[Line]:
    """The lines of a file with this content."""
    path.write_bytes(data)
    source = Source(str(path), Home(path.parent))
    try:
        return list(source.lines({**DEFAULTS, **defaults}))
    finally:
        source.close()


def keys(found: list[Line], name: str = "") -> list[str]:
    """The keys that these lines get in a run of this name."""
    giver = Keys(name)
    for line in found:
        giver.give(line.spec)
    giver.close()
    return [line.spec["idempotency_key"] for line in found]


def test_a_line_says_what_it_says_and_the_options_the_rest(tmp_path: Path) -> None:
    data = b'\xef\xbb\xbf{"description": "a", "budget": "0.5"}\r\n\n  \n{"description": "b", "deadline": "5m"}'
    first, second = read(tmp_path / "f", data)
    assert (first.number, second.number) == (1, 4)
    assert (first.spec["budget_ucr"], second.spec["budget_ucr"]) == (500_000, 2_000_000)
    assert second.spec["deadline_s"] == 300 and second.spec["op"] == "sha256"


def test_numbers_are_seconds_and_bytes_and_null_is_nothing_said(tmp_path: Path) -> None:
    line = b'{"description": "a", "deadline": 60, "bid_timeout": 0.5, "memory": 1024, "budget": null, "model": null}'
    (found,) = read(tmp_path / "f", line)
    spec = {key: found.spec[key] for key in ("deadline_s", "bid_timeout_s", "memory_bytes", "budget_ucr")}
    assert spec == {"deadline_s": 60, "bid_timeout_s": 0.5, "memory_bytes": 1024, "budget_ucr": 2_000_000}
    assert not {"deadline", "bid_timeout", "memory", "budget", "model"} & set(found.spec)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{", "not valid JSON"),
        (b"\xff", "not UTF-8"),
        (b"[" * 20_000, "nested too deeply"),
        (b"7", "no task"),
        (b'{"description": ""}' + b" " * limits.BATCH_LINE_BYTES_MAX, "longer than 512KiB"),
        (b'{"type": "storage"}', "later version"),
        (b'{"budget": "much", "description": "x"}', "budget"),
        (b'{"description": "a", "description": "b"}', "'description' is given twice"),
        (b'{"description": "x", "env": {"A": "1", "A": "2"}}', "'A' is given twice"),
        (b'{"description": "x \\ud800"}', "\\ud800 is half of a character"),
        (b'{"inputs": ["/no/such"], "description": "x"}', "/no/such"),
    ],
)
def test_a_bad_line_is_told_and_those_around_it_are_read(tmp_path: Path, line: bytes, words: str) -> None:
    before, bad, after = read(tmp_path / "f", b'{"description": "a"}\n' + line + b'\n{"description": "b"}\n')
    assert bad.number == 2 and bad.error is not None and words in bad.error.message
    assert before.error is None and (after.number, after.spec["description"]) == (3, "b")


def test_a_key_is_of_the_content_and_its_number_among_equal_lines(tmp_path: Path) -> None:
    task = {"description": "a", "retries": 1}
    lines = [task, {"retries": 1, "description": "a"}, {"description": "b"}, {**task, "idempotency_key": "mine"}]
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    first = keys(read(tmp_path / "f", data))
    assert first[0] != first[1] and first[0][:-1] == first[1][:-1] and first[3] == "mine"
    assert keys(read(tmp_path / "f", data, budget_ucr=1, deadline_s=7)) == first, "how it is done is not what is done"
    for other in (keys(read(tmp_path / "f", data, op="sort")), keys(read(tmp_path / "f", data), "tonight")):
        assert not set(first[:3]) & set(other) and other[3] == "mine"
