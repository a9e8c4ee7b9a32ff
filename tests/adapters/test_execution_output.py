"""What a job wrote can be read again while it runs, which changes nothing; what is not whole is no result."""

from __future__ import annotations

import asyncio
import errno
import tempfile
from typing import Any

import pytest

from clawnet import limits
from clawnet.execution import shell
from clawnet.wire.events import OutputKept, ReadOutput
from tests.adapters.execution_bench import Bench, needs_bubblewrap, with_bench

_SPOOLED = tempfile.SpooledTemporaryFile
SIZE = 3 * limits.MIB
"""More than a stream keeps in memory."""


def read(bench: Bench, job: bytes, stream: int, offset: int, length: int) -> bytes:
    before = len(bench.events)
    bench.executor.read_output(ReadOutput(job, stream, offset, length))
    (kept,) = [event for event in bench.events[before:] if isinstance(event, OutputKept)]
    assert (kept.job, kept.stream, kept.offset) == (job, stream, offset)
    return kept.data


def test_pieces_from_anywhere_and_the_result_is_whole() -> None:
    async def body(bench: Bench) -> None:
        script = f"yes | head -c {SIZE}; echo oops >&2; echo half; sleep 0.3; echo whole"
        job = bench.start(kind="shell", script=script, sandbox="host")
        await bench.said(job, b"half\n")
        while read(bench, job, 2, 0, 10) != b"oops\n":
            await asyncio.sleep(0)
        whole = bench.output(job)
        for offset in (0, 1, limits.MIB - 1, SIZE, len(whole) - 3):
            assert read(bench, job, 1, offset, 1_000) == whole[offset : offset + 1_000]
        assert read(bench, job, 1, len(whole), 10) == read(bench, job, 1, 2**62, 10) == b""
        assert read(bench, job, 2, 2, 10) == b"ps\n"
        assert read(bench, bytes(16), 1, 0, 10) == b""
        exited = await bench.exited(job)
        assert exited.output_bytes == SIZE + len(b"oops\nhalf\nwhole\n")
        assert bench.output(job) == b"y\n" * (SIZE // 2) + b"half\nwhole\n"
        assert read(bench, job, 1, 0, 10) == b""

    with_bench(body)


@pytest.mark.parametrize("sandbox", [pytest.param("sandboxed", marks=needs_bubblewrap), "host"])
def test_more_than_the_limit_is_no_result_also_when_it_is_read_after_the_end(sandbox: str) -> None:
    async def body(bench: Bench) -> None:
        script = "head -c 50000 /dev/zero; echo oops >&2"
        exited, _ = await bench.run(kind="shell", script=script, sandbox=sandbox, output_bytes_max=20_000)
        assert (exited.ended, exited.reason) == ("output_limit", "the run wrote more than 20000 bytes")
        assert (exited.output_bytes, exited.inline, exited.blob_bytes) == (20_000, b"", 0)
        _, found = await bench.run(kind="shell", script=script, sandbox=sandbox, output_bytes_max=50_005)
        assert found is not None
        assert (len(found.stdout), found.stderr) == (50_000, b"oops\n")

    with_bench(body, backlog=lambda: True)  # nothing is read before the command has ended


class _Full:
    """The file of a stream, on a disk that is full."""

    def __init__(self, **words: Any) -> None:
        self._kept = _SPOOLED(**words)

    def write(self, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kept, name)


def test_what_cannot_be_kept_is_no_result_also_when_it_is_read_after_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shell.tempfile, "SpooledTemporaryFile", _Full)

    async def body(bench: Bench) -> None:
        exited, _ = await bench.run(kind="shell", script="echo out", sandbox="host")
        assert (exited.ended, exited.reason) == ("failed", "its output cannot be kept: No space left on device")

    with_bench(body, backlog=lambda: True)
