"""WebAssembly modules for tests, and how they are run on a bench: made from text, or compiled beside their sources."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import wasmtime

from clawnet.execution import bundle
from clawnet.execution.archive import Member, Writing
from clawnet.execution.spec import InputRef
from clawnet.wire.events import TaskExited
from tests.adapters.execution_bench import Bench

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
    return not any(bench.home.wasm_runs_dir.iterdir())
