"""Modules that are none, never end, or want too much: each ends with the reason, and the workers go on."""

from __future__ import annotations

import asyncio
import io
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import wasmtime

from clawnet import limits
from clawnet.execution import computing, wasm
from clawnet.execution.spec import InputRef
from clawnet.execution.wasi import Wasi
from clawnet.execution.wasmruns import WasmRequest, told
from clawnet.wire.events import CapacityChanged
from tests.adapters.execution_bench import Bench, with_bench
from tests.adapters.modules import (
    HELLO,
    HERE,
    OFF,
    done,
    file,
    module,
    nothing_left,
    program,
    run,
    start,
    tree,
)

# --- what is bad


def leb(number: int) -> bytes:
    found = bytearray()
    while number >= 128:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "a text": (b"#!/bin/sh\necho no\n", "is no WebAssembly"),
    "a native program": (b"\x7fELF" + bytes(100), "is no WebAssembly"),
    "wat": (b"(module)", "compile it first"),
    "a component": (b"\0asm\x0d\0\1\0", "is a component"),
    "another version": (b"\0asm\2\0\0\0", "of a version"),
    "cut": (HELLO[:-10], "is not valid WebAssembly"),
    "one byte changed": (HELLO[:60] + bytes([HELLO[60] ^ 0x40]) + HELLO[61:], "the module"),
    "threads": (wasmtime.wat2wasm('(module (memory (export "memory") 1 1 shared))'), "is not valid WebAssembly"),
    "no start": (wasmtime.wat2wasm('(module (func (export "main")))'), "exports no function _start"),
    "another start": (wasmtime.wat2wasm('(module (func (export "_start") (param i32)))'), "exports no function _start"),
    "foreign imports": (
        wasmtime.wat2wasm(
            '(module (import "env" "system" (func)) (import "wasi:http/x" "y" (func)) (func (export "_start")))'
        ),
        "env.system, wasi:http/x.y",
    ),
    "imported memory": (
        wasmtime.wat2wasm('(module (import "env" "memory" (memory 1)) (func (export "_start")))'),
        "env.memory",
    ),
    "another type of import": (
        wasmtime.wat2wasm(
            '(module (import "wasi_snapshot_preview1" "fd_write" (func (param i64))) (func (export "_start")))'
        ),
        "fd_write",
    ),
    "no memory": (
        wasmtime.wat2wasm(
            '(module (import "wasi_snapshot_preview1" "random_get" (func $r (param i32 i32) (result i32)))'
            '(func (export "_start") (drop (call $r (i32.const 0) (i32.const 0)))))'
        ),
        "exports no memory",
    ),
}


def test_modules_that_are_none_fail_with_the_reason_and_the_worker_lives_on() -> None:
    async def body(bench: Bench) -> None:
        assert (await done(bench, HELLO)).exit_code == 0
        pids = bench.executor.worker_pids
        for name, (code, reason) in BAD.items():
            exited, _ = await run(bench, bytes(code))
            assert exited.ended == "bad_input", (name, exited)
            assert reason in exited.reason, name
        exited, _ = await run(bench, b"\0asm\1\0\0\0" + bytes(limits.WASM_MODULE_BYTES_MAX))
        assert "larger than a module may be" in exited.reason
        assert bench.executor.worker_pids == pids
        assert nothing_left(bench)

    with_bench(body, **OFF)


def test_what_asks_for_no_module_or_bad_names_is_refused() -> None:
    async def body(bench: Bench) -> None:
        hello = module(bench, HELLO)
        folder = tree(bench, "module", {"a": b""})
        table: list[tuple[dict[str, Any], str]] = [
            ({"module": "nothing", "inputs": [hello]}, "no file among the inputs is called 'nothing'"),
            ({"module": "module", "inputs": [folder]}, "no file among the inputs"),
            ({"module": "module", "inputs": [hello], "op": "sha256"}, "no file among the inputs"),
            ({"module": "module", "inputs": [hello], "argv": ["a\0b"]}, "NUL"),
            ({"module": "module", "inputs": [hello], "env": {"A=B": "c"}}, "environment"),
            ({"module": "module", "inputs": [hello], "stdin_input": "gone"}, "standard input"),
            ({"module": "module", "inputs": [hello, file(bench, "../up", b"")]}, "separator"),
            ({"module": "module", "inputs": [hello, InputRef("t", "tree", hello.blob, hello.size)]}, "no archive"),
            ({"module": "module", "inputs": [hello], "cwd_input": "none"}, "no directory among the inputs"),
        ]
        for fields, reason in table:
            exited, _ = await bench.run(kind="compute", **fields)
            assert exited.ended in ("failed", "bad_input"), fields
            assert reason in exited.reason, fields

    with_bench(body, **OFF)


def test_what_never_ends_is_ended_and_others_go_on() -> None:
    async def body(bench: Bench) -> None:
        await done(bench, HELLO)
        forever = program("(loop $again (br $again))")
        exited, _ = await run(bench, forever, wall_s=0.3)
        assert (exited.ended, exited.reason) == ("wall_limit", "the module ran longer than 0.3 s")
        exited, _ = await run(bench, forever, fuel=10_000_000)
        assert (exited.ended, exited.reason) == ("fuel_limit", "the module used up its fuel of 10000000")
        at_start = wasmtime.wat2wasm('(module (func $f (loop $l (br $l))) (start $f) (func (export "_start")))')
        assert (await run(bench, bytes(at_start), wall_s=0.3))[0].ended == "wall_limit"
        busy_calls = program(
            "(loop $again (drop (call $random_get (i32.const 0) (i32.const 65536))) (br $again))", uses=["random_get"]
        )
        assert (await run(bench, busy_calls, wall_s=0.3))[0].ended == "wall_limit"
        long = start(bench, forever, wall_s=60)
        assert (await done(bench, HELLO)).stdout == b"hello\n", "another worker takes what waits behind"
        bench.executor.stop(long)
        assert (await bench.exited(long)).ended == "cancelled"
        await bench.until(lambda: len(bench.executor.worker_pids) == 1 or None)
        assert (await done(bench, HELLO)).exit_code == 0

    with_bench(body, slots=2, **OFF)


def test_a_module_that_is_cancelled_as_soon_as_it_began_does_not_go_on() -> None:
    async def body(bench: Bench) -> None:
        await done(bench, HELLO)
        (pid,) = bench.executor.worker_pids
        jobs = [start(bench, program("(loop $again (br $again))"), wall_s=3600) for _ in range(3)]
        await asyncio.get_running_loop().run_in_executor(None, lambda: None)
        for job in jobs:
            bench.executor.stop(job)
        for job in jobs:
            assert (await bench.exited(job)).ended == "cancelled"
        assert (await done(bench, HELLO)).exit_code == 0
        assert pid not in bench.executor.worker_pids

    with_bench(body, slots=1, **OFF)


def test_what_a_cancelled_module_has_written_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "KILL_GRACE_S", 0.05)
    writes = """(local $n i32) (loop $again (call $say (i32.const 60000))
        (local.set $n (i32.add (local.get $n) (i32.const 1)))
        (br_if $again (i32.lt_u (local.get $n) (i32.const 100)))) (loop $forever (br $forever))"""

    async def body(bench: Bench) -> None:
        job = start(bench, program(writes), wall_s=3600)
        async with asyncio.timeout(60):
            while nothing_left(bench):
                await done(bench, HELLO)
            bench.executor.stop(job)
            assert (await bench.exited(job)).ended == "cancelled"
            while not nothing_left(bench):
                await done(bench, HELLO)

    with_bench(body, slots=2, **OFF)


def test_many_files_that_a_module_has_left_are_removed_beside_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(computing, "_FEW", 1)
    cleared, told_in = computing._cleared, list[threading.Thread]()

    def noted(directory: Path) -> None:
        told_in.append(threading.current_thread())
        cleared(directory)

    monkeypatch.setattr(computing, "_cleared", noted)

    async def body(bench: Bench) -> None:
        inputs = [file(bench, "note.txt", b"a note"), tree(bench, "tree", {"inner.txt": b"inner"})]
        await done(bench, HERE / "wasm" / "files.wasm", "last", inputs=inputs, outputs=["a/*", "tree/*.txt"])
        async with asyncio.timeout(60):
            while not nothing_left(bench):
                await done(bench, HELLO)
        assert told_in[0] is not threading.main_thread()

    with_bench(body, **OFF)


def test_a_file_of_many_names_is_not_written_beyond_what_outputs_may_be(tmp_path: Path) -> None:
    wasi = Wasi([], [], io.BytesIO(), lambda stream, data: None, files_bytes_max=2_000, seed=b"")
    content = wasi.files.create(wasi.files.root, "a")
    wasi.files.write(content, 0, bytes(1_000))
    for number in range(10):
        wasi.files.link(content, wasi.files.root, f"b{number}")
    request = WasmRequest("", "", [], directory=str(tmp_path / "run"), outputs=["b*"], outputs_bytes_max=9_999)
    with pytest.raises(wasm.Failed) as stopped:
        wasm._keep_files(wasi, request)
    assert told(str(stopped.value), request, 1.0)[0] == "output_limit"
    assert not list(tmp_path.rglob("b*"))


def test_memory_tables_stack_and_output_are_bounded() -> None:
    grows = """(loop $again (br_if $again (i32.ne (memory.grow (i32.const 16)) (i32.const -1))))
        (i32.store (i32.const 64) (memory.size)) (call $say (i32.const 4))"""
    writes = "(loop $again (call $say (i32.const 60000)) (br $again))"

    async def body(bench: Bench) -> None:
        found = await done(bench, program(grows), memory_bytes_max=32 * limits.MIB)
        assert int.from_bytes(found.stdout, "little") * 65_536 <= 32 * limits.MIB
        exited, _ = await run(bench, program("", memory="1024"), memory_bytes_max=32 * limits.MIB)
        assert (exited.ended, "more memory" in exited.reason) == ("memory_limit", True)
        exited, _ = await run(bench, program("", more="(table 10000000 funcref)"))
        assert exited.ended == "memory_limit"
        tables = "(drop (table.grow 0 (ref.null func) (i32.const 100000000)))"
        assert (await done(bench, program(tables, more="(table 1 funcref)"))).exit_code == 0
        exited, _ = await run(bench, program(writes), output_bytes_max=5 * limits.MIB)
        assert (exited.ended, exited.reason) == ("output_limit", "the module wrote more than 5242880 bytes")
        assert nothing_left(bench)

    with_bench(body, **OFF)


def test_files_a_module_writes_are_bounded_as_its_memory_is() -> None:
    async def body(bench: Bench) -> None:
        room = 16 * limits.MIB
        found = await done(bench, HERE / "wasm" / "fills.wasm", memory_bytes_max=room)
        assert found.stdout == b"full after 16 MiB: No space left on device\nfull again after 16 MiB\n"

    with_bench(body, **OFF)


@pytest.mark.slow
def test_a_module_of_fifty_megabytes_ends_within_its_bounds() -> None:
    """A hundred thousand functions: compiling them is bounded by the wall clock, whatever it takes here."""
    one = b"\0" + b"\x41\1\x1a" * 150 + b"\x0b"
    body_ = leb(len(one)) + one
    count = 110_000
    types = b"\1\4\1\x60\0\0"
    functions = leb(count) + bytes(count)
    exports = b"\1\6_start\0\0"
    code = leb(count) + body_ * count
    big = b"\0asm\1\0\0\0" + types
    for number, content in ((3, functions), (7, exports), (10, code)):
        big += bytes([number]) + leb(len(content)) + content
    assert 48_000_000 < len(big) < limits.WASM_MODULE_BYTES_MAX

    async def body(bench: Bench) -> None:
        exited, _ = await run(bench, big, wall_s=2.0)
        assert exited.ended == "wall_limit"
        assert (await done(bench, HELLO)).stdout == b"hello\n"

    with_bench(body, **OFF)


def test_a_worker_that_dies_under_a_module_fails_that_one_and_the_pool_recovers() -> None:
    async def body(bench: Bench) -> None:
        await done(bench, HELLO)
        job = start(bench, program("(loop $again (br $again))"), wall_s=60)
        await asyncio.get_running_loop().run_in_executor(None, lambda: None)
        await bench.kill_worker()
        await bench.kill_worker()  # once it is asked again, in case another operation was to blame
        exited = await bench.exited(job)
        assert (exited.ended, exited.reason) == ("failed", "the worker process died")
        assert (await done(bench, HELLO)).stdout == b"hello\n"
        assert nothing_left(bench)

    with_bench(body, slots=1, **OFF)


def test_without_an_engine_the_node_says_so_and_offers_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clawnet.execution.computing.engine_trouble", lambda: "there is no engine here")

    async def body(bench: Bench) -> None:
        said = [event for event in bench.events if isinstance(event, CapacityChanged)][-1]
        assert "compute" in said.capabilities
        assert "wasm" not in said.capabilities
        (found,) = [item for item in bench.executor.findings() if item["check"] == "wasm"]
        assert (found["level"], found["message"]) == ("warn", "there is no engine here")
        assert "pip install wasmtime" in found["remedy"]
        exited, _ = await run(bench, HELLO)
        assert (exited.ended, "there is no engine here" in exited.reason) == ("failed", True)

    with_bench(body, **OFF)


def test_an_engine_that_does_not_load_is_found_out_by_the_first_module() -> None:
    script = "import sys; sys.modules['wasmtime'] = None;from clawnet.execution.worker import main; main()"

    async def body(bench: Bench) -> None:
        exited, _ = await run(bench, HELLO)
        assert (exited.ended, "does not load here" in exited.reason) == ("failed", True)
        said = [event for event in bench.events if isinstance(event, CapacityChanged)][-1]
        assert "wasm" not in said.capabilities
        assert "compute" in said.capabilities

    with_bench(body, worker_argv=(sys.executable, "-c", script), **OFF)
