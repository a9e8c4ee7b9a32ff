"""WebAssembly in real worker processes: what modules see, that they see the same everywhere, and what ends them."""

from __future__ import annotations

import asyncio
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import wasmtime

from clawnet import limits
from clawnet.execution import bundle
from clawnet.execution.archive import Member, Writing
from clawnet.execution.spec import InputRef
from clawnet.wire.events import CapacityChanged, TaskExited
from tests.adapters.execution_bench import Bench, with_bench

OFF = {"shell_own": "off", "shell_member": "off"}
HERE = Path(__file__).parent
EXAMPLES = HERE.parents[1] / "examples" / "wasm"
WORDFREQ = EXAMPLES / "wordfreq.wasm"
COLUMN = EXAMPLES / "column.wasm"
FILES = HERE / "wasm" / "files.wasm"

IMPORTS = {
    "fd_write": "i32 i32 i32 i32",
    "fd_read": "i32 i32 i32 i32",
    "proc_exit": "",
    "clock_time_get": "i32 i64 i32",
    "random_get": "i32 i32",
    "poll_oneoff": "i32 i32 i32 i32",
}


def program(body: str, *, uses: Sequence[str] = ("fd_write",), memory: str = "1", more: str = "") -> bytes:
    """A module whose _start is `body`; $say writes so many bytes from address 64 on to standard output."""
    imported = "".join(
        f'(import "wasi_snapshot_preview1" "{name}" (func ${name} (param {IMPORTS[name] or "i32"})'
        f" {'(result i32)' if IMPORTS[name] else ''}))"
        for name in uses
    )
    say = """(func $say (param $size i32)
        (i32.store (i32.const 0) (i32.const 64)) (i32.store (i32.const 4) (local.get $size))
        (drop (call $fd_write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8))))"""
    text = f"""(module {imported} (memory (export "memory") {memory}) {more}
        {say if "fd_write" in uses else ""} (func (export "_start") {body}))"""
    return bytes(wasmtime.wat2wasm(text))


HELLO = program("(call $say (i32.const 6))", more='(data (i32.const 64) "hello\\n")')


def module(bench: Bench, code: bytes | Path) -> InputRef:
    data = code.read_bytes() if isinstance(code, Path) else code
    return InputRef("module", "file", bench.blobs.put_bytes(data), len(data))


def file(bench: Bench, name: str, data: bytes) -> InputRef:
    return InputRef(name, "file", bench.blobs.put_bytes(data), len(data))


def tree(bench: Bench, name: str, files: dict[str, bytes], links: dict[str, str] | None = None) -> InputRef:
    into = io.BytesIO()
    writing = Writing(into)
    for path, data in files.items():
        writing.add(Member(path, "file", len(data)), io.BytesIO(data))
    for path, target in (links or {}).items():
        writing.add(Member(path, "link", target=target))
    writing.close()
    data = into.getvalue()
    return InputRef(name, "tree", bench.blobs.put_bytes(data), len(data))


def start(bench: Bench, code: bytes | Path, *words: str, inputs: Sequence[InputRef] = (), **fields: Any) -> bytes:
    everything = [module(bench, code), *inputs]
    return bench.start(kind="compute", module="module", argv=list(words), inputs=everything, **fields)


async def run(bench: Bench, code: bytes | Path, *words: str, **fields: Any) -> tuple[TaskExited, bundle.Bundle | None]:
    exited = await bench.exited(start(bench, code, *words, **fields))
    if exited.ended != "exit":
        return exited, None
    sealed = exited.inline or bench.blobs.path(exited.blob).read_bytes()
    return exited, bundle.decode(sealed)


async def done(bench: Bench, code: bytes | Path, *words: str, **fields: Any) -> bundle.Bundle:
    exited, found = await run(bench, code, *words, **fields)
    assert found is not None, exited
    return found


def nothing_left(bench: Bench) -> bool:
    runs = bench.home.wasm_runs_dir
    return not runs.exists() or not any(runs.iterdir())


# --- what they do


def test_the_examples_do_what_their_readme_says() -> None:
    async def body(bench: Bench) -> None:
        text = b"the cat and the dog and the bird"
        found = await done(bench, WORDFREQ, "-n", "2", stdin=text)
        assert (found.exit_code, found.stdout, found.stderr) == (0, b"3 the\n2 and\n", b"")
        folder = tree(bench, "in", {"a.txt": b"x y x", "b.txt": b"y x"})
        found = await done(bench, WORDFREQ, "a.txt", "in/b.txt", inputs=[folder, file(bench, "a.txt", b"only")])
        assert found.stdout == b"1 only\n1 x\n1 y\n"
        found = await done(bench, WORDFREQ, "a.txt", "b.txt", "c.txt", inputs=[folder], cwd_input="in")
        assert (found.exit_code, found.stdout) == (1, b"3 x\n2 y\n")
        assert found.stderr == b"wordfreq: cannot read c.txt\n"
        found = await done(bench, COLUMN, "n", stdin=b"name,n\na,1.5\nb,2.5\n")
        assert found.stdout == b"count 2\nsum 4.0\nmin 1.5\nmax 2.5\nmean 2.0\n"
        found = await done(bench, COLUMN, "m", stdin=b"name,n\na,1.5\n")
        assert (found.exit_code, found.stderr) == (2, b"column: there is no column m\n")

    with_bench(body, **OFF)


def test_standard_input_may_be_a_file_among_the_inputs() -> None:
    async def body(bench: Bench) -> None:
        text = b"word " * 1_000_000
        found = await done(bench, WORDFREQ, inputs=[file(bench, "stdin", text)], stdin_input="stdin")
        assert found.stdout == b"1000000 word\n"

    with_bench(body, **OFF)


def test_the_file_calls_say_what_those_of_the_engine_say(tmp_path: Path) -> None:
    """One program in C through both implementations; what a machine's own file system answers is left out."""
    ours: list[bundle.Bundle] = []

    async def body(bench: Bench) -> None:
        inputs = [
            file(bench, "note.txt", b"a note"),
            tree(bench, "tree", {"inner.txt": b"inner"}, {"link.txt": "inner.txt"}),
        ]
        ours.append(await done(bench, FILES, "last", env={"COLOUR": "red"}, inputs=inputs))

    with_bench(body, **OFF)
    theirs, code = with_the_engines_own_calls(tmp_path)
    assert (ours[0].exit_code, ours[0].stderr) == (code, b"done\n")
    lines, expected = ours[0].stdout.decode().splitlines(), theirs.decode().splitlines()
    removed = next(n for n, line in enumerate(lines) if line.startswith("removed while listing"))
    assert lines[removed : removed + 2] == [f"{'removed while listing':28} 300 ", "a/c has 2: ./3 ../3"]
    # Of a directory that is emptied while it is read some systems pass over entries.
    del lines[removed : removed + 2], expected[removed : removed + 2]
    assert lines == expected


def with_the_engines_own_calls(root: Path) -> tuple[bytes, int]:
    (root / "top" / "tree").mkdir(parents=True)
    (root / "top" / "note.txt").write_text("a note")
    (root / "top" / "tree" / "inner.txt").write_text("inner")
    (root / "top" / "tree" / "link.txt").symlink_to("inner.txt")
    engine = wasmtime.Engine()
    linker = wasmtime.Linker(engine)
    linker.define_wasi()
    wasi = wasmtime.WasiConfig()
    wasi.argv, wasi.env = ["module", "last"], [("COLOUR", "red")]
    wasi.preopen_dir(str(root / "top"), "/")
    wasi.stdout_file = str(root / "out")
    wasi.stderr_file = str(root / "err")
    with wasmtime.Store(engine) as store:
        store.set_wasi(wasi)
        with pytest.raises(wasmtime.ExitTrap) as ended:
            linker.instantiate(store, wasmtime.Module(engine, FILES.read_bytes())).exports(store)["_start"](store)
    return (root / "out").read_bytes(), ended.value.code


def test_exit_codes_are_the_modules_own_and_a_trap_is_134() -> None:
    async def body(bench: Bench) -> None:
        for code, told in ((0, 0), (1, 1), (77, 77), (255, 255), (256, 0)):
            found = await done(bench, program(f"(call $proc_exit (i32.const {code}))", uses=["proc_exit"]))
            assert found.exit_code == told
        for text, reason in (
            ("unreachable", "unreachable code was reached"),
            ("(drop (i32.div_s (i32.const 1) (i32.const 0)))", "integer division by zero"),
            ("(drop (i32.load (i32.const 0x7fffffff)))", "memory access out of bounds"),
            ("(call $deeper)", "its call stack is exhausted"),
        ):
            found = await done(bench, program(text, more="(func $deeper (call $deeper) (call $deeper))"))
            assert found.exit_code == 134
            assert found.stderr.startswith(f"clawnet: the module trapped: {reason}\n".encode())

    with_bench(body, **OFF)


def test_output_that_is_long_comes_whole_and_leaves_nothing() -> None:
    write = """(local $n i32) (loop $again (call $say (i32.const 60000))
        (local.set $n (i32.add (local.get $n) (i32.const 1)))
        (br_if $again (i32.lt_u (local.get $n) (i32.const 100))))"""

    async def body(bench: Bench) -> None:
        found = await done(bench, program(write))
        assert found.stdout == bytes(6_000_000)
        assert nothing_left(bench)

    with_bench(body, **OFF)


def test_what_a_module_leaves_comes_back_where_it_is_asked_for() -> None:
    async def body(bench: Bench) -> None:
        inputs = [file(bench, "note.txt", b"a note"), tree(bench, "tree", {"inner.txt": b"inner"})]
        exited, found = await run(bench, FILES, "last", inputs=inputs, outputs=["a/*", "tree/*.txt", "*.none"])
        assert found is not None, exited
        assert exited.ended == "exit"
        plain = exited.inline or bench.blobs.path(exited.blob).read_bytes()
        assert b"NOTEte" in plain, "a/note.txt as the module changed and moved it"
        assert b"new" in plain
        assert nothing_left(bench)

    with_bench(body, **OFF)


# --- the same everywhere

LOOKS_AROUND = """
    (drop (call $clock_time_get (i32.const 0) (i64.const 0) (i32.const 64)))
    (drop (call $clock_time_get (i32.const 1) (i64.const 0) (i32.const 72)))
    (drop (call $random_get (i32.const 80) (i32.const 64)))
    (f64.store (i32.const 144) (f64.div (f64.const 0) (f64.const 0)))
    (f64.store (i32.const 152) (f64.sqrt (f64.const -1)))
    (f64.store (i32.const 160) (f64.add (f64.reinterpret_i64 (i64.const 0x7ff0dead0000beef)) (f64.const 1)))
    (call $say (i32.const 104))"""


def test_the_same_input_gives_the_same_output_on_every_executor_with_cold_and_warm_cache() -> None:
    looks = program(LOOKS_AROUND, uses=["fd_write", "clock_time_get", "random_get"])
    seen: dict[str, set[bytes]] = {"looks": set(), "files": set(), "other input": set()}

    async def body(bench: Bench) -> None:
        inputs = [file(bench, "note.txt", b"a note"), tree(bench, "tree", {"z": b"1", "inner.txt": b"2", "b": b"3"})]
        for _ in range(2):
            seen["looks"].add((await done(bench, looks)).stdout)
            seen["files"].add((await done(bench, FILES, inputs=inputs)).stdout)
            seen["other input"].add((await done(bench, looks, stdin=b"another")).stdout)
        await bench.kill_worker()  # the next one reads what this one compiled
        seen["looks"].add((await done(bench, looks)).stdout)
        assert len(list(bench.home.wasm_cache_dir.iterdir())) == 2

    with_bench(body, **OFF)
    with_bench(body, **OFF)
    assert {name: len(outputs) for name, outputs in seen.items()} == {"looks": 1, "files": 1, "other input": 1}
    (looked,), (other,) = seen["looks"], seen["other input"]
    assert len(looked) == 104
    assert looked[16:80] != other[16:80], "random bytes come from the input"
    assert looked[80:] == 3 * bytes.fromhex("000000000000f87f"), "one NaN for all"


def test_a_sleep_takes_no_time_and_moves_the_modules_clock() -> None:
    ask = """(i64.store (i32.const 200) (i64.const 5)) (i32.store (i32.const 216) (i32.const 1))
        (i64.store (i32.const 224) (i64.const 3600000000000))
        (drop (call $poll_oneoff (i32.const 200) (i32.const 300) (i32.const 1) (i32.const 400)))
        (drop (call $clock_time_get (i32.const 1) (i64.const 0) (i32.const 64))) (call $say (i32.const 8))"""

    async def body(bench: Bench) -> None:
        found = await done(bench, program(ask, uses=["fd_write", "clock_time_get", "poll_oneoff"]), wall_s=30)
        assert int.from_bytes(found.stdout, "little") == 3_600_000_000_000 + 1_000_000

    with_bench(body, **OFF)


def test_fuel_is_counted_exactly() -> None:
    counts = """(local $n i32) (loop $again (local.set $n (i32.add (local.get $n) (i32.const 1)))
        (br_if $again (i32.lt_u (local.get $n) (i32.const 1000))))"""

    async def body(bench: Bench) -> None:
        code = program(counts)
        ends = [(await run(bench, code, fuel=fuel))[0].ended for fuel in (1, 100, 5_000, 20_000)]
        assert ends == ["fuel_limit", "fuel_limit", "fuel_limit", "exit"]
        low, high = 5_000, 20_000
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if (await run(bench, code, fuel=middle))[1] else (middle, high)
        for _ in range(3):
            assert (await run(bench, code, fuel=high))[0].ended == "exit"
            assert (await run(bench, code, fuel=low))[0].ended == "fuel_limit"

    with_bench(body, **OFF)


# --- the cache


def test_a_cache_entry_that_is_not_as_it_was_written_is_compiled_again() -> None:
    async def body(bench: Bench) -> None:
        assert (await done(bench, HELLO)).stdout == b"hello\n"
        (entry,) = bench.home.wasm_cache_dir.iterdir()
        whole = entry.read_bytes()
        assert entry.stat().st_mode & 0o777 == 0o600
        assert bench.home.wasm_cache_dir.stat().st_mode & 0o777 == 0o700
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 1
        for bad in (b"", whole[:100], whole[:-1], bytes(flipped), b"\x7fELF" + whole):
            entry.write_bytes(bad)
            await bench.kill_worker()
            assert (await done(bench, HELLO)).stdout == b"hello\n"
            assert entry.read_bytes()[:4] == b"CWC1"
            assert entry.stat().st_size == len(whole)

    with_bench(body, **OFF)


def test_entries_that_others_could_have_written_are_not_loaded() -> None:
    async def body(bench: Bench) -> None:
        cache = bench.home.wasm_cache_dir
        assert (await done(bench, HELLO)).stdout == b"hello\n"
        (entry,) = cache.iterdir()
        content = entry.read_bytes()
        entry.chmod(0o666)
        before = entry.stat().st_mtime_ns
        await bench.kill_worker()
        assert (await done(bench, HELLO)).stdout == b"hello\n"
        assert (entry.stat().st_mode & 0o777, entry.stat().st_mtime_ns > before) == (0o600, True), "compiled again"
        elsewhere = bench.public / "elsewhere"
        elsewhere.write_bytes(content)
        entry.unlink()
        entry.symlink_to(elsewhere)
        await bench.kill_worker()
        assert (await done(bench, HELLO)).stdout == b"hello\n"
        assert not entry.is_symlink()
        cache.chmod(0o777)
        entry.unlink()
        await bench.kill_worker()
        assert (await done(bench, HELLO)).stdout == b"hello\n"
        assert not list(cache.iterdir()), "nothing is kept where everybody may write"

    with_bench(body, **OFF)


def test_the_cache_has_a_size_and_drops_what_was_used_longest_ago() -> None:
    codes = [program("(call $say (i32.const 6))", more=f'(data (i32.const 64) "hello{n}")') for n in range(4)]

    async def body(bench: Bench) -> None:
        await done(bench, codes[0])
        (first,) = bench.home.wasm_cache_dir.iterdir()
        size = first.stat().st_size
        os.utime(first, (1, 1))
        bench.executor.configure(_with_cache(bench, 3 * size + 100))
        for code in codes[1:]:
            await done(bench, code)
        kept = sorted(path.name for path in bench.home.wasm_cache_dir.iterdir())
        assert len(kept) == 3
        assert first.name not in kept
        bench.executor.configure(_with_cache(bench, 0))
        await bench.kill_worker()
        assert (await done(bench, codes[0])).stdout == b"hello0"
        assert sorted(path.name for path in bench.home.wasm_cache_dir.iterdir()) == kept

    with_bench(body, **OFF)


def _with_cache(bench: Bench, size: int) -> Any:
    import msgspec

    return msgspec.structs.replace(bench.settings, wasm_cache_bytes_max=size)


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
            assert exited.ended == "failed", (name, exited)
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
            assert (exited.ended, reason in exited.reason) == ("failed", True), (fields, exited)

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

    import sys

    with_bench(body, worker_argv=(sys.executable, "-c", script), **OFF)
