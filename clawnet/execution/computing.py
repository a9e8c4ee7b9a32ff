"""Compute tasks on this machine: built-in operations and WebAssembly modules, both in the worker processes.

A module sees its inputs and nothing else (execution/wasi.py), so it needs neither a sandbox nor a working directory; a
directory is made only for what does not fit in an answer, and goes with the run.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Struct

from clawnet import limits
from clawnet.errors import DataError
from clawnet.execution import bundle, delivery, feeding, inputs
from clawnet.execution.compute import ComputePool
from clawnet.execution.spec import BlobPort, ExecutionSettings, InputRef, JobSpec
from clawnet.execution.threads import in_thread
from clawnet.execution.wasmruns import (
    ENGINE_TROUBLE,
    LIMIT_WORDS,
    NO_WASM_REMEDY,
    WASM,
    InputFile,
    WasmEnded,
    WasmRequest,
    engine_trouble,
    told,
)
from clawnet.execution.workdirs import remove_tree
from clawnet.paths import Home, make_private_dir

MODULE_NAME: Final = "module"
"""What a module finds as its own name, wherever and under whatever name it came."""
_READ_BYTES: Final = 256 * limits.KIB
_FEW: Final = 64
_ENDED_BYTES_MAX: Final = 2 * limits.WASM_OUTPUT_HELD_BYTES + limits.KIB
_decode: Final = msgspec.msgpack.Decoder(WasmEnded).decode


class Computed(Struct, frozen=True):
    """How a run ended: with a head and its streams, or `how` (a word of TaskExited.ended) and why there are none.

    `close` lets go of what the run left, and is called in any case.
    """

    usage: bundle.Usage
    how: str = "exit"
    reason: str = ""
    head: bundle.Head | None = None
    streams: Iterable[bytes] = ()
    files: delivery.Files | None = None
    close: Callable[[], None] = lambda: None


class WasmRun(Struct, frozen=True):
    """What a module is given: arguments after its name, environment, standard input (bytes, or a blob), and files.

    `stdin_path`, with the hash of its content, and `given` are files of this machine that are no blobs.
    """

    module: InputRef
    argv: Sequence[str] = ()
    env: dict[str, str] = {}
    stdin: bytes = b""
    stdin_blob: bytes = b""
    stdin_path: str = ""
    stdin_key: str = ""
    given: Sequence[InputFile] = ()
    files: Sequence[InputRef] = ()
    cwd_input: str = ""
    fuel: int = 0
    memory_bytes_max: int = 256 * limits.MIB
    output_bytes_max: int = limits.RUN_OUTPUT_BYTES_MAX
    outputs: Sequence[str] = ()
    outputs_bytes_max: int = limits.OUTPUTS_BYTES_MAX


class Computing:
    """Runs compute tasks in the pool. `on_change` is called when modules turn out not to run here."""

    def __init__(
        self,
        pool: ComputePool,
        home: Home,
        blobs: BlobPort,
        settings: Callable[[], ExecutionSettings],
        loop: asyncio.AbstractEventLoop,
        on_change: Callable[[], None],
    ) -> None:
        self._pool = pool
        self._home = home
        self._blobs = blobs
        self._settings = settings
        self._loop = loop
        self._on_change = on_change
        self.trouble = engine_trouble()
        self._walled: bool | None = None

    def sweep(self) -> None:
        """Makes the cache's directory, and removes what runs of an earlier life left; raises OSError, ConfigError."""
        remove_tree(self._home.wasm_runs_dir)
        if not self.trouble:
            make_private_dir(self._home.wasm_cache_dir)
            make_private_dir(self._home.wasm_runs_dir)

    def finding(self) -> dict[str, str]:
        """What `doctor` tells."""
        if self.trouble:
            return {"check": WASM, "level": "warn", "message": self.trouble, "remedy": NO_WASM_REMEDY}
        walls = {None: "", True: ", walled in by Landlock", False: "; this system has no Landlock to wall them in"}
        return {"check": WASM, "level": "ok", "message": f"WebAssembly modules run{walls[self._walled]}", "remedy": ""}

    def start(self, spec: JobSpec, ended: Callable[[Computed], None]) -> None:
        """Begins a compute task; `ended` is called once unless the pool forgets the job. Raises DataError."""
        if spec.module:
            self._start_module(spec, ended)
        else:
            self._start_operation(spec, ended)

    def cancel(self, job: bytes) -> bool:
        """Forgets a job; True if it was known. What its module has left goes when its worker is surely gone."""
        if not self._pool.cancel(job):
            return False
        directory = self._home.wasm_runs_dir / job.hex()
        if not self.trouble:
            self._loop.call_later(limits.KILL_GRACE_S, self._clear, directory)
        return True

    def _clear(self, directory: Path) -> None:
        if not in_thread(self._loop, lambda done: None, _cleared, directory):
            _cleared(directory)

    # --- operations

    def _start_operation(self, spec: JobSpec, ended: Callable[[Computed], None]) -> None:
        sources: list[Any] = [[item.name, str(self._blobs.path(item.blob))] for item in feeding.placed(spec)]
        if any(item.kind != "file" for item in spec.inputs):
            raise DataError("built-in operations take files, not directories")
        piped = feeding.stdin_path(spec, self._blobs)
        began_s = self._loop.time()

        def answered(data: bytes, reason: str, cpu_s: float) -> None:
            usage = bundle.Usage(self._loop.time() - began_s, cpu_s, 0)
            if reason:
                how = reason if reason in LIMIT_WORDS else "failed"
                ended(Computed(usage, how, reason))
                return
            ended(Computed(usage, head=bundle.Head(0, None, len(data), 0, "", usage), streams=(data,)))

        self._pool.submit(
            spec.job,
            spec.op,
            spec.op_args,
            sources or [spec.stdin or b"" if piped is None else ["", str(piped)]],
            time_s=spec.wall_s,
            answer_bytes_max=spec.output_bytes_max,
            answer=answered,
        )

    # --- modules

    def _start_module(self, spec: JobSpec, ended: Callable[[Computed], None]) -> None:
        by_name = {item.name: item for item in spec.inputs}
        stdin = feeding.stdin_path(spec, self._blobs)
        run = WasmRun(
            by_name[spec.module],
            argv=spec.argv or [],
            env=spec.env,
            stdin=spec.stdin or b"",
            stdin_blob=by_name[spec.stdin_input].blob if stdin is not None else b"",
            files=[item for item in feeding.placed(spec) if item.name != spec.module],
            cwd_input=spec.cwd_input,
            fuel=spec.fuel,
            memory_bytes_max=spec.memory_bytes_max,
            output_bytes_max=spec.output_bytes_max,
            outputs=spec.outputs,
            outputs_bytes_max=spec.outputs_bytes_max,
        )
        self.run_module(spec.job, run, wall_s=spec.wall_s, ended=ended)

    def run_module(self, job: bytes, run: WasmRun, *, wall_s: float, ended: Callable[[Computed], None]) -> None:
        """Runs a module; `ended` is called once, unless the pool is told to forget `job`. Raises DataError."""
        if self.trouble:
            raise DataError(self.trouble, hint=NO_WASM_REMEDY)
        directory = self._home.wasm_runs_dir / job.hex()
        request = self._request(run, directory)
        began_s = self._loop.time()

        def close() -> None:
            if _holds_few(directory):
                _cleared(directory)
            else:
                self._clear(directory)

        def answered(data: bytes, reason: str, cpu_s: float) -> None:
            took_s = self._loop.time() - began_s
            if reason:
                if reason.startswith(ENGINE_TROUBLE) and not self.trouble:
                    self.trouble = reason
                    self._on_change()
                how, sentence = told(reason, request, wall_s)
                ended(Computed(bundle.Usage(took_s, cpu_s, 0), how, sentence, close=close))
                return
            found = _ended(data, run.output_bytes_max)
            if found is None:
                usage = bundle.Usage(took_s, cpu_s, 0)
                ended(Computed(usage, "failed", "the worker process answered what is no end of a run", close=close))
                return
            self._walled = found.walled
            usage = bundle.Usage(took_s, cpu_s, found.memory_bytes)
            head = bundle.Head(found.exit_code, None, found.stdout_bytes, found.stderr_bytes, "", usage)
            files = delivery.Files(directory / "files", list(run.outputs), run.outputs_bytes_max)
            ended(
                Computed(
                    usage,
                    head=head,
                    streams=_Streams(directory, found),
                    files=files if run.outputs else None,
                    close=close,
                )
            )

        self._pool.submit(job, WASM, request, [], time_s=wall_s, answer_bytes_max=_ENDED_BYTES_MAX, answer=answered)

    def _request(self, run: WasmRun, directory: Path) -> WasmRequest:
        names = [inputs.check_name(item.name) for item in run.files]
        if len({name.casefold() for name in names}) != len(names):
            raise DataError("two inputs have the same name")
        if run.cwd_input and not any(item.name == run.cwd_input and item.kind == "tree" for item in run.files):
            raise DataError(f"no directory among the inputs is called {run.cwd_input[:60]!r}")
        settings, module = self._settings(), self._blobs.path(run.module.blob)
        return WasmRequest(
            module=str(module),
            key=run.module.blob.hex(),
            argv=[MODULE_NAME, *run.argv],
            env=run.env,
            stdin=run.stdin,
            stdin_path=str(self._blobs.path(run.stdin_blob)) if run.stdin_blob else run.stdin_path,
            stdin_key=run.stdin_blob.hex() or run.stdin_key,
            files=[*(self._file(item, run.cwd_input) for item in run.files), *run.given],
            fuel=run.fuel,
            memory_bytes_max=run.memory_bytes_max,
            output_bytes_max=run.output_bytes_max,
            directory=str(directory),
            outputs=list(run.outputs),
            blobs=str(module.parent.parent),
            cache=str(self._home.wasm_cache_dir),
            cache_bytes_max=settings.wasm_cache_bytes_max,
            outputs_bytes_max=run.outputs_bytes_max,
        )

    def _file(self, item: InputRef, cwd_input: str) -> InputFile:
        name = "" if item.kind == "tree" and item.name == cwd_input else item.name
        path = str(self._blobs.path(item.blob))
        return InputFile(name, item.kind, path, item.size, item.mode, item.blob.hex())


def _holds_few(directory: Path) -> bool:
    """Whether removing it takes no time worth a thread."""
    held = 0
    for _, inner, files in os.walk(directory):
        held += len(inner) + len(files)
        if held > _FEW:
            return False
    return True


def _cleared(directory: Path) -> None:
    """Removes what a run has left; what cannot be removed now goes with the next start."""
    with contextlib.suppress(OSError):
        if directory.exists():
            remove_tree(directory)


def _ended(data: bytes, output_bytes_max: int) -> WasmEnded | None:
    """What a worker says of a run, where it can be so: who breaks out of the engine may say anything."""
    try:
        found = _decode(data)
    except msgspec.DecodeError:
        return None
    sizes, streams = (found.stdout_bytes, found.stderr_bytes), (found.stdout, found.stderr)
    if not (0 <= found.exit_code <= 255 and min(*sizes, found.memory_bytes) >= 0 and sum(sizes) <= output_bytes_max):
        return None
    for stream, size in zip(streams, sizes, strict=True):
        if size <= limits.WASM_OUTPUT_HELD_BYTES if stream is None else len(stream) != size:
            return None
    return found


class _Streams:
    """The streams' bytes, standard output first, each time they are asked for: as many as were told of."""

    def __init__(self, directory: Path, found: WasmEnded) -> None:
        self._directory = directory
        self._found = found

    def __iter__(self) -> Iterator[bytes]:
        found = self._found
        for number, data, left in ((1, found.stdout, found.stdout_bytes), (2, found.stderr, found.stderr_bytes)):
            if data is not None:
                yield data
                continue
            with open(os.path.join(self._directory, f"stream-{number}"), "rb") as file:
                while left:
                    piece = file.read(min(left, _READ_BYTES))
                    if not piece:
                        raise DataError("the module's output is shorter than it was")
                    left -= len(piece)
                    yield piece
