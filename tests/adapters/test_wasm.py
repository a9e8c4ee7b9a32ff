"""WebAssembly in real worker processes: what modules do and see, and that they see the same everywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import wasmtime

from clawnet.execution import bundle
from tests.adapters.execution_bench import Bench, with_bench
from tests.adapters.modules import (
    COLUMN,
    FILES,
    OFF,
    WORDFREQ,
    done,
    file,
    nothing_left,
    program,
    run,
    tree,
)

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
