"""Built-in operations in real worker processes: results, bad arguments, limits, dying workers."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import signal
import subprocess
import sys
import threading
from typing import Any

import pytest

from clawnet import limits
from clawnet.execution import bundle, compute
from clawnet.execution.compute import ComputePool
from clawnet.execution.spec import InputRef
from clawnet.wire.events import CapacityChanged, TaskExited
from tests.adapters.execution_bench import WORKER, Bench, with_bench

OFF = {"shell_own": "off", "shell_member": "off"}


def _file(bench: Bench, name: str, data: bytes) -> InputRef:
    return InputRef(name, "file", bench.blobs.put_bytes(data), len(data))


def test_operations_give_what_the_usual_programs_give() -> None:
    async def body(bench: Bench) -> None:
        big = os.urandom(1_000_000)
        text = b"pear\napple\n\nfig tree\napple"
        two = [_file(bench, "a", big), _file(bench, "b", text)]
        table: list[tuple[dict[str, Any], bytes]] = [
            ({"op": "sha256", "stdin": b"abc"}, hashlib.sha256(b"abc").hexdigest().encode() + b"\n"),
            (
                {"op": "sha256", "inputs": two},
                f"{hashlib.sha256(big).hexdigest()}  a\n{hashlib.sha256(text).hexdigest()}  b\n".encode(),
            ),
            ({"op": "sha256"}, hashlib.sha256(b"").hexdigest().encode() + b"\n"),
            ({"op": "sort", "stdin": text}, b"\napple\napple\nfig tree\npear\n"),
            ({"op": "sort", "stdin": text, "op_args": {"unique": True, "reverse": True}}, b"pear\nfig tree\napple\n\n"),
            ({"op": "sort", "stdin": b""}, b""),
            ({"op": "wordcount", "stdin": text}, b"4 5 26\n"),
            ({"op": "primes", "stdin": b"20\n"}, b"2\n3\n5\n7\n11\n13\n17\n19\n"),
            ({"op": "primes", "op_args": {"count": 5}}, b"2\n3\n5\n7\n11\n"),
            ({"op": "primes", "op_args": {"limit": 2}}, b"2\n"),
            ({"op": "primes", "op_args": {"count": 0}}, b""),
        ]
        for fields, wanted in table:
            exited, found = await bench.run(kind="compute", **fields)
            assert found is not None, exited
            assert (found.stdout, found.exit_code, found.stderr) == (wanted, 0, b""), fields
        _, found = await bench.run(kind="compute", op="wordcount", inputs=two)
        assert found is not None
        lines = found.stdout.decode().splitlines()
        assert lines[1] == "4 5 26 b"
        assert lines[0] == f"{big.count(10)} {len(big.split())} 1000000 a"
        assert lines[2] == f"{big.count(10) + 4} {len(big.split()) + 5} 1000026 total"

    with_bench(body, **OFF)


def test_the_ten_thousandth_prime() -> None:
    async def body(bench: Bench) -> None:
        _, found = await bench.run(kind="compute", op="primes", op_args={"count": 10_000})
        assert found is not None
        assert found.stdout.endswith(b"\n104729\n")
        assert found.stdout.count(b"\n") == 10_000

    with_bench(body, **OFF)


def test_bad_requests_fail_cleanly_and_the_worker_lives_on() -> None:
    async def body(bench: Bench) -> None:
        pids = bench.executor.worker_pids
        tree = InputRef("t", "tree", bytes(32), 0)
        missing = InputRef("gone", "file", bytes(32), 5)
        for fields in (
            {"op": "format-disk"},
            {"op": "sha256", "op_args": {"size": 1}},
            {"op": "sort", "op_args": {"reverse": "yes"}},
            {"op": "primes"},
            {"op": "primes", "op_args": {"count": -1}},
            {"op": "primes", "op_args": {"count": True}},
            {"op": "primes", "op_args": {"limit": 10**12}},
            {"op": "primes", "op_args": {"limit": 5, "count": 5}},
            {"op": "primes", "stdin": b"many"},
            {"op": "sha256", "inputs": [tree]},
            {"op": "sha256", "inputs": [missing]},
        ):
            exited, _ = await bench.run(kind="compute", **fields)
            assert exited.ended == "failed", fields
            assert exited.reason
        assert (await bench.run(kind="compute", op="sha256"))[0].ended == "exit"
        assert bench.executor.worker_pids == pids

    with_bench(body, **OFF)


def test_limits_of_time_output_and_memory_fail_one_job_only() -> None:
    async def body(bench: Bench) -> None:
        jobs = {
            "wall_limit": bench.start(kind="compute", op="primes", op_args={"limit": 10_000_000}, wall_s=0.05),
            "output_limit": bench.start(kind="compute", op="primes", op_args={"limit": 100_000}, output_bytes_max=1000),
            "exit": bench.start(kind="compute", op="sha256", stdin=b"x"),
        }
        for how, job in jobs.items():
            assert (await bench.exited(job)).ended == how

    with_bench(body, **OFF)


@pytest.mark.slow
def test_memory_is_bounded() -> None:
    async def body(bench: Bench) -> None:
        lines = _file(bench, "lines", b"ab\n" * 20_000_000)
        exited, _ = await bench.run(kind="compute", op="sort", inputs=[lines])
        assert exited.ended == "memory_limit", "twenty million lines want more than a worker has"
        assert (await bench.run(kind="compute", op="sha256"))[0].ended == "exit"

    with_bench(body, **OFF)


def test_a_worker_killed_early_costs_nothing_and_one_killed_at_work_costs_that() -> None:
    async def body(bench: Bench) -> None:
        assert (await bench.run(kind="compute", op="sha256"))[0].ended == "exit"
        (pid,) = bench.executor.worker_pids
        os.kill(pid, signal.SIGSTOP)  # so that what follows is certainly not answered yet
        jobs = [bench.start(kind="compute", op="sha256", stdin=bytes([n])) for n in range(5)]
        await asyncio.get_running_loop().run_in_executor(None, lambda: None)
        os.kill(pid, signal.SIGKILL)
        ends = [(await bench.exited(job)).ended for job in jobs]
        assert ends == ["exit"] * 5, "which of them it was at nobody knows: each is asked again, alone"
        (second,) = bench.executor.worker_pids
        assert second != pid
        job = bench.start(kind="compute", op="primes", op_args={"limit": 10_000_000})
        await asyncio.get_running_loop().run_in_executor(None, lambda: None)
        await bench.kill_worker()
        await bench.kill_worker()
        exited = await bench.exited(job)
        assert (exited.ended, exited.reason) == ("failed", "the worker process died")

    with_bench(body, slots=1, **OFF)


def test_an_idle_worker_that_dies_is_replaced_at_no_cost() -> None:
    async def body(bench: Bench) -> None:
        assert (await bench.run(kind="compute", op="sha256"))[0].ended == "exit"
        os.kill(bench.executor.worker_pids[0], signal.SIGKILL)
        for _ in range(3):
            assert (await bench.run(kind="compute", op="sha256"))[0].ended == "exit"

    with_bench(body, **OFF)


def test_quick_operations_do_not_wait_behind_a_long_one() -> None:
    async def body(bench: Bench) -> None:
        long = bench.start(kind="compute", op="primes", op_args={"limit": 10_000_000}, wall_s=50)
        quick = [bench.start(kind="compute", op="sha256", stdin=bytes([n])) for n in range(20)]
        for job in quick:
            assert (await bench.exited(job)).ended == "exit"
        assert not any(isinstance(e, TaskExited) and e.job == long for e in bench.events)
        assert len(bench.executor.worker_pids) == 2
        bench.executor.stop(long)
        assert (await bench.exited(long)).ended == "cancelled"
        assert (await bench.run(kind="compute", op="sha256"))[0].ended == "exit"

    with_bench(body, slots=2, **OFF)


def test_many_at_once_are_all_answered_once() -> None:
    async def body(bench: Bench) -> None:
        jobs = [bench.start(kind="compute", op="sha256", stdin=str(n).encode()) for n in range(1_000)]
        for number, job in enumerate(jobs):
            exited = await bench.exited(job)
            found = bundle.decode(exited.inline)
            assert found.stdout == hashlib.sha256(str(number).encode()).hexdigest().encode() + b"\n"
        assert sum(isinstance(e, TaskExited) for e in bench.events) == 1_000

    with_bench(body, **OFF)


def test_large_results_are_blobs() -> None:
    async def body(bench: Bench) -> None:
        exited, found = await bench.run(kind="compute", op="primes", op_args={"limit": 2_000_000})
        assert found is not None
        assert exited.inline == b""
        assert exited.blob_bytes > limits.RESULT_INLINE_BYTES_MAX
        assert found.stdout.endswith(b"\n1999993\n")

    with_bench(body, **OFF)


def test_a_worker_that_never_starts_takes_compute_off_the_offer() -> None:
    async def body(bench: Bench) -> None:
        exited, _ = await bench.run(kind="compute", op="sha256")
        assert exited.ended == "failed"
        assert "does not start" in exited.reason
        await bench.until(lambda: any(isinstance(e, CapacityChanged) and not e.capabilities for e in bench.events))
        assert bench.executor.capacity().capabilities == ()
        assert (await bench.run(kind="compute", op="sha256"))[0].ended == "failed"

    with_bench(body, worker_argv=(sys.executable, "-c", "raise SystemExit(1)"), **OFF)


def test_pipes_serve_where_a_socket_cannot_be_handed_over() -> None:
    async def main() -> None:
        answers: list[tuple[bytes, str]] = []
        heard = asyncio.Event()
        pool = ComputePool(WORKER, asyncio.get_running_loop(), pipes=True)
        pool.start()

        def answer(data: bytes, reason: str, cpu_s: float) -> None:
            answers.append((data, reason))
            heard.set()

        for op in ("sha256", "nothing"):
            heard.clear()
            pool.submit(b"j", op, {}, [b"abc"], time_s=5, answer_bytes_max=1000, answer=answer)
            async with asyncio.timeout(30):
                await heard.wait()
        pool.stop()
        assert answers[0] == (hashlib.sha256(b"abc").hexdigest().encode() + b"\n", "")
        assert answers[1][1]

    asyncio.run(main())


def test_a_worker_ends_when_its_node_is_gone() -> None:
    import socket

    ours, theirs = socket.socketpair()
    with subprocess.Popen(WORKER, stdin=theirs.fileno()) as worker:
        theirs.close()
        assert ours.recv(100)
        ours.close()
        assert worker.wait(10) == 0


def test_a_worker_imports_little() -> None:
    code = "import clawnet.execution.worker, sys; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout.split()
    assert not {"asyncio", "sqlite3", "yaml", "nacl", "typer", "clawnet.config", "clawnet.execution.executor"} & {
        *loaded
    }


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux")
def test_a_worker_is_started_without_the_nodes_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CLAWNET_OPENCLAW_TOKEN", "CLAWNET_JOIN", "CLAWNET_PASSPHRASE"):
        monkeypatch.setenv(name, "only-the-node-knows")
    monkeypatch.setenv("CLAWNET_LOG_LEVEL", "info")

    async def body(bench: Bench) -> None:
        assert (await bench.run(kind="compute", op="sha256"))[0].ended == "exit"
        (pid,) = bench.executor.worker_pids
        with open(f"/proc/{pid}/environ", "rb") as file:
            given = file.read()
        assert b"only-the-node-knows" not in given
        assert b"CLAWNET_LOG_LEVEL=info" in given

    with_bench(body, **OFF)


class _Lacking:
    """Starts no worker so many times, for want of `number`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        self.times = 0
        self.refused = 0
        self._number = number
        self._real = subprocess.Popen
        monkeypatch.setattr(compute.subprocess, "Popen", self._start)
        monkeypatch.setattr(compute, "_TRY_AGAIN_S", 0.0)

    def _start(self, *args: Any, **words: Any) -> Any:
        if self.times:
            self.times -= 1
            self.refused += 1
            raise OSError(self._number, os.strerror(self._number))
        return self._real(*args, **words)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EAGAIN])
def test_a_worker_that_cannot_be_started_for_now_is_started_later(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(bench: Bench) -> None:
        lacking = _Lacking(monkeypatch, number)
        lacking.times = 2
        await bench.kill_worker()
        assert lacking.refused == 2
        assert "compute" in bench.executor.capacity().capabilities
        assert (await bench.run(kind="compute", op="sha256"))[0].ended == "exit"

    with_bench(body, **OFF)


def test_what_waits_long_for_a_worker_fails_and_what_comes_later_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(bench: Bench) -> None:
        lacking = _Lacking(monkeypatch, errno.EMFILE)
        lacking.times = 10**9
        (pid,) = bench.executor.worker_pids
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(60):
            while not lacking.refused:
                await asyncio.sleep(0)
        for _ in range(2):
            exited, _ = await bench.run(kind="compute", op="sha256")
            assert (exited.ended, exited.reason) == (
                "failed",
                f"the worker process does not start: {os.strerror(errno.EMFILE)}",
            )
        lacking.times = 0
        assert (await bench.run(kind="compute", op="sha256"))[0].ended == "exit"

    with_bench(body, **OFF)


def test_one_worker_serves_all_while_no_second_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(bench: Bench) -> None:
        lacking = _Lacking(monkeypatch, errno.EMFILE)
        lacking.times = 10**9
        pool = bench.executor._pool
        jobs = [bench.start(kind="compute", op="sha256") for _ in range(5)]
        for asked in pool._waiting:
            asked.alone = True  # none is asked beside another: a second worker would take the next
        assert [(await bench.exited(job)).ended for job in jobs] == ["exit"] * 5
        assert lacking.refused
        assert not pool.broken

    with_bench(body, slots=2, **OFF)


def test_a_worker_is_replaced_where_no_thread_is_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def body(bench: Bench) -> None:
        (pid,) = bench.executor.worker_pids
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            await bench.kill_worker()
            assert (await bench.run(kind="compute", op="sha256"))[0].ended == "exit"
        async with asyncio.timeout(60):
            while os.path.exists(f"/proc/{pid}"):
                await asyncio.sleep(0)  # until it is reaped

    with_bench(body, **OFF)
