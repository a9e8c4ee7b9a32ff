"""What a running job wrote can be read again while it runs, and reading it changes nothing."""

from __future__ import annotations

import asyncio

from clawnet import limits
from clawnet.wire.events import OutputKept, ReadOutput
from tests.adapters.execution_bench import Bench, with_bench

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
