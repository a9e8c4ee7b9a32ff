"""Worker processes that a module has taken over: whatever they say, the node keeps to its bounds and goes on."""

from __future__ import annotations

import asyncio
import sys

import msgspec
import pytest

from clawnet import limits
from clawnet.execution.compute import ComputePool
from clawnet.execution.computing import _ended
from clawnet.execution.wasmruns import WasmEnded

WORKER = """
import socket, msgspec
link = socket.socket(fileno=0)
def frame(value):
    data = value if isinstance(value, bytes) else msgspec.msgpack.encode(value)
    return len(data).to_bytes(4, "big") + data
link.sendall(frame([0]))
data = b""
while len(data) < 4 or len(data) < 4 + int.from_bytes(data[:4], "big"):
    data += link.recv(65536)
number = msgspec.msgpack.decode(data[4:])[0]
try:
    SAYS
    while link.recv(65536):
        pass
except OSError:
    pass
"""
LIES = {
    "a frame without end": 'link.sendall(b"\\xff" * 4); [link.sendall(bytes(65536)) for _ in range(1000)]',
    "a frame longer than what was asked for": "link.sendall(frame([number, bytes(1000000), '', 0.0]))",
    "an answer longer than what was asked for": "link.sendall(frame([number, bytes(1001), '', 0.0]))",
    "no answer": 'link.sendall(frame(b"garbage"))',
    "text for bytes": "link.sendall(frame([number, 'text', '', 0.0]))",
    "what was not asked": "link.sendall(frame([number + 7, b'', '', 0.0]))",
    "no time": "link.sendall(frame([number, b'', '', float('nan')]))",
    "ready for ever": "[link.sendall(frame([0])) for _ in range(1000000)]",
}


@pytest.mark.parametrize("lie", LIES)
def test_a_worker_that_does_not_keep_to_its_frames_is_ended(lie: str) -> None:
    async def main() -> None:
        answered: asyncio.Future[tuple[bytes, str]] = asyncio.get_running_loop().create_future()

        def answer(data: bytes, reason: str, cpu_s: float) -> None:
            answered.set_result((data, reason))

        argv = (sys.executable, "-c", WORKER.replace("SAYS", LIES[lie]))
        pool = ComputePool(argv, asyncio.get_running_loop(), workers_max=1)
        pool.start()
        try:
            pool.submit(b"j", "sha256", {}, [b"abc"], time_s=20, answer_bytes_max=1_000, answer=answer)
            async with asyncio.timeout(60):
                assert await answered == (b"", "the worker process died")
        finally:
            pool.stop()

    asyncio.run(main())


def test_the_end_of_a_module_is_believed_only_where_it_can_be_so() -> None:
    def told(**fields: object) -> WasmEnded | None:
        values = {"exit_code": 0, "stdout_bytes": 3, "stderr_bytes": 0, "stdout": b"abc", "stderr": b""} | fields
        return _ended(msgspec.msgpack.encode([*values.values(), 5, 6]), 2 * limits.WASM_OUTPUT_HELD_BYTES)

    large = limits.WASM_OUTPUT_HELD_BYTES + 1
    assert told() == WasmEnded(0, 3, 0, b"abc", b"", 5, 6)
    assert told(stdout_bytes=large, stdout=None) is not None
    for lie in (
        {"stdout_bytes": 4},
        {"stdout_bytes": -3},
        {"stdout": None},
        {"exit_code": 256},
        {"stdout_bytes": 2 * large, "stdout": None},
        {"stderr": "text"},
    ):
        assert told(**lie) is None
    assert _ended(b"garbage", limits.MIB) is None
