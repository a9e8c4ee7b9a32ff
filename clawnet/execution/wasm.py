"""WebAssembly in a worker process: a WASI preview 1 command is compiled, or found compiled, and run within its bounds.

Imported by the worker when its first module comes, never by the node itself. The engine's settings leave nothing to the
machine (NaNs in one form, no threads, no relaxed SIMD), the module's surroundings come from execution/wasi.py, and what
it may use up is bounded: fuel, memory, tables, stack, output, and the wall clock through the engine's epoch.
"""

from __future__ import annotations

import ctypes
import io
import os
import threading
import time
from collections import OrderedDict
from hashlib import sha256
from importlib import metadata
from typing import IO, Final

import wasmtime
from wasmtime import TrapCode

from clawnet import limits
from clawnet.errors import DataError
from clawnet.execution.wasi import Exited, TooMuchOutput, Wasi, perform
from clawnet.execution.wasiabi import CALLS, MODULE
from clawnet.execution.wasifiles import File
from clawnet.execution.wasmcache import Cache
from clawnet.execution.wasmruns import BAD_INPUT, OUTPUTS_LIMIT, TRAPPED, WasmEnded, WasmRequest
from clawnet.modulefile import LOOK_BYTES, magic_trouble
from clawnet.wire.globs import Globs

_MASKS: Final = {"i": 2**32 - 1, "I": 2**64 - 1}
_TICK_S: Final = 0.02
_QUICK_S: Final = 0.005
_FRAMES_SHOWN: Final = 16
_START: Final = "_start"
_TRAPS: Final = {
    TrapCode.STACK_OVERFLOW: "its call stack is exhausted",
    TrapCode.MEMORY_OUT_OF_BOUNDS: "memory access out of bounds",
    TrapCode.TABLE_OUT_OF_BOUNDS: "table access out of bounds",
    TrapCode.INDIRECT_CALL_TO_NULL: "call of an empty table element",
    TrapCode.BAD_SIGNATURE: "call of a function of another type",
    TrapCode.INTEGER_OVERFLOW: "integer overflow",
    TrapCode.INTEGER_DIVISION_BY_ZERO: "integer division by zero",
    TrapCode.BAD_CONVERSION_TO_INTEGER: "conversion of a number that is no integer",
    TrapCode.UNREACHABLE: "unreachable code was reached",
}


class Failed(Exception):
    """The module was stopped: the text is a word of TaskExited.ended."""


class Bad(Failed):
    """The module cannot be run, here or elsewhere; a sentence says why."""

    def __init__(self, sentence: str) -> None:
        super().__init__(f"{BAD_INPUT}: {sentence}")


class _Watch:
    """Ends what runs too long: a thread that moves the engine's epoch on when the deadline has passed."""

    def __init__(self, engine: wasmtime.Engine) -> None:
        self._engine = engine
        self._moved = threading.Condition()
        self._deadline_s: float | None = None
        self._asleep = False
        threading.Thread(target=self._watch, name="clawnet-wasm-clock", daemon=True).start()

    def begin(self, store: wasmtime.Store, deadline_s: float) -> None:
        """`store` is interrupted at this time of time.monotonic."""
        with self._moved:
            store.set_epoch_deadline(1)
            self._deadline_s = deadline_s
            if self._asleep:
                self._moved.notify()

    def end(self) -> None:
        """Nothing runs."""
        with self._moved:
            self._deadline_s = None

    def _watch(self) -> None:
        idle = 0
        while True:
            with self._moved:
                if self._deadline_s is None and idle > 10:
                    # Woken by the next run; until now the clock just went on, so that short runs cost no wake-up.
                    self._asleep = True
                    self._moved.wait()
                    self._asleep, idle = False, 0
                idle = idle + 1 if self._deadline_s is None else 0
                if self._deadline_s is not None and time.monotonic() >= self._deadline_s:
                    self._engine.increment_epoch()
                    self._deadline_s = None
            time.sleep(_TICK_S)


class _Output:
    """What a module writes to its two streams: in memory up to WASM_OUTPUT_HELD_BYTES, then in files."""

    def __init__(self, directory: str, bytes_max: int) -> None:
        self._directory = directory
        self._left = bytes_max
        self._held: dict[int, bytearray] = {1: bytearray(), 2: bytearray()}
        self._files: dict[int, IO[bytes]] = {}
        self.sizes: dict[int, int] = {1: 0, 2: 0}

    def write(self, stream: int, data: bytes) -> None:
        self._left -= len(data)
        if self._left < 0:
            raise TooMuchOutput
        self.sizes[stream] += len(data)
        file = self._files.get(stream)
        if file is not None:
            file.write(data)
            return
        held = self._held[stream]
        held += data
        if len(held) > limits.WASM_OUTPUT_HELD_BYTES:
            os.makedirs(self._directory, mode=0o700, exist_ok=True)
            # The directory is the run's alone, and what is in it goes with the run.
            self._files[stream] = open(os.path.join(self._directory, f"stream-{stream}"), "xb")  # noqa: SIM115
            self._files[stream].write(held)
            held.clear()

    def close(self) -> tuple[bytes | None, bytes | None]:
        """The two streams; None for one that lies in its file."""
        for file in self._files.values():
            file.close()
        out, err = (None if stream in self._files else bytes(self._held[stream]) for stream in (1, 2))
        return out, err


class Runner:
    """The engine of this process, its compiled modules, and the one run that is on."""

    def __init__(self) -> None:
        config = wasmtime.Config()
        config.cranelift_nan_canonicalization = True
        config.wasm_threads = False
        config.wasm_relaxed_simd = False
        config.wasm_memory64 = False
        config.wasm_multi_memory = False
        config.consume_fuel = True
        config.epoch_interruption = True
        config.parallel_compilation = False  # a slot is one processor
        config.max_wasm_stack = limits.WASM_STACK_BYTES_MAX
        self._engine = wasmtime.Engine(config)
        self._version = metadata.version("wasmtime")
        self._watch = _Watch(self._engine)
        self._linker = wasmtime.Linker(self._engine)
        self._ready: OrderedDict[str, tuple[wasmtime.Module, float, int]] = OrderedDict()
        self._wasi: Wasi | None = None
        self._memory: wasmtime.Memory | None = None
        self._view: tuple[int, int, memoryview] = (0, 0, memoryview(b""))
        for name, parameters in CALLS.items():
            self._define(name, parameters)

    def _define(self, name: str, parameters: str) -> None:
        types = {"i": wasmtime.ValType.i32(), "I": wasmtime.ValType.i64()}
        results = [] if name == "proc_exit" else [types["i"]]
        masks = [_MASKS[each] for each in parameters]

        def call(caller: wasmtime.Caller, *args: int) -> int | None:
            assert self._wasi is not None
            unsigned = tuple([arg & mask for arg, mask in zip(args, masks, strict=True)])
            answer = perform(self._wasi, name, self._memory_of(caller), unsigned)
            return answer if results else None

        kind = wasmtime.FuncType([types[each] for each in parameters], results)
        self._linker.define_func(MODULE, name, kind, call, access_caller=True)

    def _memory_of(self, caller: wasmtime.Caller) -> memoryview:
        memory = self._memory
        if memory is None:
            found = caller.get("memory")
            if not isinstance(found, wasmtime.Memory):
                raise Bad('the module exports no memory named "memory", through which WASI speaks with it')
            memory = self._memory = found
        size = memory.data_len(caller)
        address = ctypes.addressof(memory.data_ptr(caller).contents) if size else 0
        if self._view[:2] != (address, size):
            view = memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B") if size else memoryview(b"")
            self._view = (address, size, view)
        return self._view[2]

    def is_quick(self, key: str) -> bool:
        """Whether this module is at hand and its last run was over at once."""
        found = self._ready.get(key)
        return found is not None and found[1] < _QUICK_S

    # --- modules

    def _module(self, request: WasmRequest) -> wasmtime.Module:
        found = self._ready.get(request.key)
        if found is not None:
            self._ready.move_to_end(request.key)
            return found[0]
        cache = Cache(request.cache, request.cache_bytes_max, self._version)
        module = None
        encoded = cache.get(request.key)
        if encoded is not None:
            try:
                module = wasmtime.Module.deserialize(self._engine, encoded)
            except wasmtime.WasmtimeError:
                encoded = None  # of another build or processor: compiled again
        if module is None:
            module = self._compile(request.module)
            encoded = bytes(module.serialize())
            cache.put(request.key, encoded)
        assert encoded is not None
        self._keep(request.key, module, len(encoded))
        return module

    def _keep(self, key: str, module: wasmtime.Module, size: int) -> None:
        self._ready[key] = (module, _QUICK_S, size)
        while len(self._ready) > 1 and (
            len(self._ready) > limits.WASM_MODULES_READY_MAX
            or sum(each[2] for each in self._ready.values()) > limits.WASM_MODULES_READY_BYTES_MAX
        ):
            self._ready.popitem(last=False)

    def _compile(self, path: str) -> wasmtime.Module:
        with open(path, "rb") as file:
            code = file.read(limits.WASM_MODULE_BYTES_MAX + 1)
        trouble = magic_trouble(code[:LOOK_BYTES], len(code))
        if trouble:
            raise Bad(f"the module {trouble}")
        try:
            module = wasmtime.Module(self._engine, code)
        except wasmtime.WasmtimeError as error:
            raise Bad(f"the module is not valid WebAssembly: {_brief(error)}") from error
        self._check(module)
        return module

    @staticmethod
    def _check(module: wasmtime.Module) -> None:
        """What the module wants and has; raises Failed for one that is no WASI command."""
        missing = [
            f"{each.module}.{each.name}"
            for each in module.imports
            if each.module != MODULE or each.name not in CALLS or not isinstance(each.type, wasmtime.FuncType)
        ]
        if missing:
            more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
            raise Bad(
                f"the module imports what is not given here: {', '.join(missing[:8])[:500]}{more}"
                " (a module gets WASI preview 1 and nothing else)"
            )
        start = next((each.type for each in module.exports if each.name == _START), None)
        if not isinstance(start, wasmtime.FuncType) or start.params or start.results:
            raise Bad(
                f"the module exports no function {_START} without parameters: build it as a WASI command (a program"
                " with a main function), not as a library"
            )

    # --- one run

    def run(self, request: WasmRequest, time_s: float) -> WasmEnded:
        """Runs a module to its end; raises Failed, also when a bound ended it."""
        deadline_s = time.monotonic() + time_s
        module = self._module(request)
        began_s = time.monotonic()
        output = _Output(request.directory, request.output_bytes_max)
        with _stdin(request) as stdin:
            wasi = Wasi(
                [word.encode("utf-8", "surrogateescape") for word in request.argv],
                [f"{name}={value}".encode("utf-8", "surrogateescape") for name, value in request.env.items()],
                stdin,
                output.write,
                files_bytes_max=request.memory_bytes_max,
                seed=_seed(request),
            )
            try:
                self._place(wasi, request)
                ended = self._execute(module, wasi, output, request, deadline_s)
                if request.outputs and ended.exit_code is not None:
                    _keep_files(wasi, request)
            finally:
                wasi.files.close()
        self._ready[request.key] = (module, time.monotonic() - began_s, self._ready[request.key][2])
        return ended

    @staticmethod
    def _place(wasi: Wasi, request: WasmRequest) -> None:
        try:
            for each in sorted(request.files, key=lambda each: bool(each.name)):
                if each.kind == "tree":
                    wasi.files.add_tree(each.name, each.path)
                else:
                    wasi.files.add_file(each.name, each.path, each.size, executable=bool(each.mode & 0o111))
        except DataError as error:
            raise Bad(error.message) from error

    def _execute(
        self, module: wasmtime.Module, wasi: Wasi, output: _Output, request: WasmRequest, deadline_s: float
    ) -> WasmEnded:
        fuel = min(request.fuel or limits.WASM_FUEL_MAX, limits.WASM_FUEL_MAX)
        self._wasi = wasi
        with wasmtime.Store(self._engine) as store:
            store.set_fuel(fuel)
            store.set_limits(
                memory_size=request.memory_bytes_max,
                table_elements=limits.WASM_TABLE_ELEMENTS_MAX,
                instances=1,
                tables=limits.WASM_TABLES_MAX,
                memories=1,
            )
            self._watch.begin(store, deadline_s)
            try:
                code = self._start(store, module, output)
            finally:
                self._watch.end()
                held = self._memory.data_len(store) if self._memory is not None else 0
                self._wasi = self._memory = None
                self._view = (0, 0, memoryview(b""))
            used = fuel - store.get_fuel()
        out, err = output.close()
        sizes = output.sizes
        return WasmEnded(code & 0xFF, sizes[1], sizes[2], out, err, used, held + wasi.files.held)

    def _start(self, store: wasmtime.Store, module: wasmtime.Module, output: _Output) -> int:
        try:
            instance = self._linker.instantiate(store, module)
            start = instance.exports(store)[_START]
            assert isinstance(start, wasmtime.Func)
            start(store)
        except Exited as error:
            return error.code
        except TooMuchOutput:
            raise Failed("output_limit") from None
        except MemoryError:
            raise Failed("memory_limit") from None
        except wasmtime.Trap as trap:
            return _trapped(trap, output)
        except wasmtime.WasmtimeError as error:
            text = _brief(error)
            if "exceeds" in text and "limit" in text:
                raise Failed("memory_limit") from error
            raise Bad(f"the module cannot be started: {text}") from error
        return 0


def _stdin(request: WasmRequest) -> IO[bytes]:
    if request.stdin_path:
        return open(request.stdin_path, "rb")
    return io.BytesIO(request.stdin)


def _seed(request: WasmRequest) -> bytes:
    """What random bytes come from: everything that the module is given, so that the same input draws the same."""
    hasher = sha256(b"clawnet/wasm-random/1")
    parts = [
        request.key,
        *request.argv,
        *(f"{name}={value}" for name, value in sorted(request.env.items())),
        *(f"{each.name}/{each.kind}/{each.key}" for each in sorted(request.files, key=lambda each: each.name)),
    ]
    for part in (*(part.encode("utf-8", "surrogateescape") for part in parts), request.stdin_key.encode()):
        hasher.update(len(part).to_bytes(8, "big") + part)
    if not request.stdin_key:
        hasher.update(request.stdin)
    return hasher.digest()


def _trapped(trap: wasmtime.Trap, output: _Output) -> int:
    """The exit code of a module that trapped, told on its standard error; raises Failed where a bound did it."""
    try:
        code = trap.trap_code
    except ValueError:
        code = None  # one that this version of the binding has no name for
    if code == TrapCode.OUT_OF_FUEL:
        raise Failed("fuel_limit")
    if code == TrapCode.INTERRUPT:
        raise Failed("wall_limit")
    reason = _TRAPS.get(code) if code is not None else None
    lines = [f"clawnet: the module trapped: {reason or trap.message.splitlines()[0]}"]
    lines += [
        f"    at {(frame.func_name or f'function {frame.func_index}')[:200]} (0x{frame.module_offset:x})"
        for frame in trap.frames[:_FRAMES_SHOWN]
    ]
    try:
        output.write(2, ("\n".join(lines) + "\n").encode("utf-8", "replace"))
    except TooMuchOutput:
        raise Failed("output_limit") from None
    return TRAPPED


def _brief(error: wasmtime.WasmtimeError) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    causes = [line.split(": ", 1)[-1] for line in lines if line[0].isdigit()]
    return "; ".join(lines[:1] + causes[-1:])[:500]


def _keep_files(wasi: Wasi, request: WasmRequest) -> None:
    """Writes those of the module's files that its task asks for where results are gathered.

    A file has as many names as the module gives it, and each becomes one of its own: they are bounded before any is.
    """
    globs, made = Globs(request.outputs), set[str]()
    top = os.path.join(request.directory, "files")
    os.makedirs(top, mode=0o700, exist_ok=True)
    wanted: list[tuple[str, File]] = []
    left = request.outputs_bytes_max
    for name, file in wasi.files.all_files():
        if globs.covers(name.split("/")):
            wanted.append((name, file))
            left -= file.size
            if left < 0 or len(wanted) > limits.TREE_FILES_MAX:
                raise Failed(OUTPUTS_LIMIT)
    for name, file in wanted:
        path = os.path.join(top, *name.split("/"))
        above = os.path.dirname(path)
        if above not in made:
            os.makedirs(above, mode=0o700, exist_ok=True)
            made.add(above)
        with open(path, "xb") as target:
            for piece in file.pieces():
                target.write(piece)
        if file.executable:
            os.chmod(path, 0o700)


_runner: Runner | None = None


def runner() -> Runner:
    """The process's one runner."""
    global _runner
    if _runner is None:
        _runner = Runner()
    return _runner
