"""Compiled modules on disk, whom they are taken from, and the wall around the processes that load them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.adapters.execution_bench import Bench, with_bench
from tests.adapters.modules import (
    HELLO,
    OFF,
    WORDFREQ,
    done,
    file,
    program,
)

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
    return msgspec.structs.replace(bench.settings, wasm_cache_bytes_max=size)


# --- the wall

GETS_OUT = """
import os, signal, socket, sys
from clawnet.execution.landlock import confine
read, write, secret, port = sys.argv[1:5]
def tries():
    def said(attempt):
        try:
            attempt()
        except OSError:
            return "no"
        return "yes"
    def starts():
        pid = os.fork()
        if not pid:
            try:
                os.execv("/bin/true", ["true"])
            except OSError:
                os._exit(1)
        if os.waitpid(pid, 0)[1]:
            raise OSError
    return [said(attempt) for attempt in (
        lambda: open(os.path.join(read, "blob")).close(),
        lambda: open(os.path.join(write, "entry"), "w").close(),
        lambda: open(secret).close(),
        lambda: open(os.path.join(read, "new"), "w").close(),
        starts,
        lambda: socket.create_connection(("127.0.0.1", int(port))).close(),
        lambda: os.kill(os.getppid(), 0),
    )]
before = tries()
os.unlink(os.path.join(read, "new"))
walled = confine([*filter(None, sys.path), read], [write])
print(walled, *before, *tries())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Landlock is Linux'")
def test_the_second_wall_leaves_the_blobs_and_takes_the_rest(tmp_path: Path) -> None:
    for name in ("read", "write"):
        (tmp_path / name).mkdir()
    (tmp_path / "read" / "blob").write_text("input")
    (tmp_path / "secret").write_text("a key")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        arguments = [tmp_path / "read", tmp_path / "write", tmp_path / "secret", listener.getsockname()[1]]
        done = subprocess.run(
            [sys.executable, "-c", GETS_OUT, *map(str, arguments)], capture_output=True, text=True, check=True
        )
    walled, *answers = done.stdout.split()
    if walled == "False":
        pytest.skip("this kernel has no Landlock")
    assert answers[:7] == ["yes"] * 7, "outside each of them succeeds"
    assert answers[7:12] == ["yes", "yes", "no", "no", "no"]
    assert set(answers[12:]) <= {"no", "yes"}, "dialling and signals are refused by newer kernels"


@pytest.mark.skipif(sys.platform != "linux", reason="Landlock is Linux'")
def test_a_worker_walls_itself_in_with_its_first_module_and_works_on() -> None:
    async def body(bench: Bench) -> None:
        (pid,) = bench.executor.worker_pids
        assert (await bench.run(kind="compute", op="sha256"))[0].ended == "exit"
        assert "NoNewPrivs:\t0" in Path(f"/proc/{pid}/status").read_text()
        await done(bench, WORDFREQ, stdin=b"a b")
        walled = "walled in" in next(each for each in bench.executor.findings() if each["check"] == "wasm")["message"]
        assert f"NoNewPrivs:\t{int(walled)}" in Path(f"/proc/{pid}/status").read_text()
        found = await done(bench, HELLO)
        assert found.stdout == b"hello\n", "another module is compiled and kept by the same worker"
        assert len(list(bench.home.wasm_cache_dir.iterdir())) == 2
        exited, _ = await bench.run(kind="compute", op="sha256", inputs=[file(bench, "a", b"x" * 500_000)])
        assert exited.ended == "exit"
        assert bench.executor.worker_pids == [pid]

    with_bench(body, slots=1, **OFF)
