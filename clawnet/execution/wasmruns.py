"""What the node and its workers say to each other about WebAssembly runs, and whether such can be done here at all."""

from __future__ import annotations

import os
import sys
from typing import Final

from msgspec import Struct

from clawnet import limits

WASM: Final = "wasm"
LIMIT_WORDS: Final = frozenset(("wall_limit", "memory_limit", "output_limit", "fuel_limit"))
ENGINE_TROUBLE: Final = "the engine for WebAssembly does not load here: "
OUTPUTS_LIMIT: Final = "outputs_limit"
"""A worker's word for output files beyond their bound: to the node's an output_limit as any."""
BAD_INPUT: Final = "bad_input"
"""The word of TaskExited.ended for a module that cannot be run anywhere: its requester's fault."""
TRAPPED: Final = 134
"""The exit code of a module that trapped, as of a program that was aborted."""
NO_WASM: Final = "wasmtime is not installed here, so WebAssembly modules do not run"
NO_WASM_REMEDY: Final = "pip install wasmtime, then `clawnet daemon restart`"
NOT_HERE: Final = "wasmtime is installed, but has no engine for this system"
_LIBRARIES: Final = {"linux": "_libwasmtime.so", "android": "_libwasmtime.so", "darwin": "_libwasmtime.dylib"}
_MACHINES: Final = {"AMD64": "x86_64", "arm64": "aarch64", "ARM64": "aarch64"}


class InputFile(Struct, frozen=True, array_like=True, gc=False):
    """An input as the module finds it; a tree without a name is its root. `key` names the content."""

    name: str
    kind: str
    path: str
    size: int
    mode: int
    key: str


class WasmRequest(Struct, frozen=True, array_like=True, gc=False):
    """One run. `key` names the module's content and `module` is its file; `argv` begins with the program's name.

    Standard input is `stdin`, or the file `stdin_path` whose content `stdin_key` names. `directory` is the run's own;
    it is made when long streams, or files that match `outputs`, are to be left in it. All files that
    are read lie in `blobs`, compiled modules in `cache`.
    """

    module: str
    key: str
    argv: list[str]
    env: dict[str, str] = {}
    stdin: bytes = b""
    stdin_path: str = ""
    stdin_key: str = ""
    files: list[InputFile] = []
    fuel: int = 0
    memory_bytes_max: int = 1024 * limits.MIB
    output_bytes_max: int = limits.RUN_OUTPUT_BYTES_MAX
    directory: str = ""
    outputs: list[str] = []
    blobs: str = ""
    cache: str = ""
    cache_bytes_max: int = 0
    outputs_bytes_max: int = limits.OUTPUTS_BYTES_MAX


class WasmEnded(Struct, frozen=True, array_like=True, gc=False):
    """How a run ended: streams are bytes, or None when they lie in the run's directory as stream-1 and stream-2.

    `walled` tells whether the process had given up what it does not need (execution/landlock.py).
    """

    exit_code: int
    stdout_bytes: int
    stderr_bytes: int
    stdout: bytes | None
    stderr: bytes | None
    fuel: int
    memory_bytes: int
    walled: bool = False


def engine_trouble() -> str:
    """Why no module can run here; "" when one can. Looks at what is installed and loads nothing."""
    import platform
    from importlib import util

    spec = util.find_spec("wasmtime")
    if spec is None or spec.origin is None:
        return NO_WASM
    system = "android" if hasattr(sys, "getandroidapilevel") else sys.platform
    machine = _MACHINES.get(platform.machine(), platform.machine())
    library = _LIBRARIES.get(system, "_wasmtime.dll")
    path = os.path.join(os.path.dirname(spec.origin), f"{system}-{machine}", library)
    return "" if os.path.isfile(path) else NOT_HERE


def told(reason: str, request: WasmRequest, time_s: float) -> tuple[str, str]:
    """A worker's reason as the word of TaskExited.ended and a sentence."""
    if reason in LIMIT_WORDS:
        return reason, said(reason, request, time_s)
    if reason == OUTPUTS_LIMIT:
        most = f"{request.outputs_bytes_max} bytes, or {limits.TREE_FILES_MAX} files"
        return "output_limit", f"the outputs are more than {most}"
    word, colon, sentence = reason.partition(": ")
    return (word, sentence) if colon and word == BAD_INPUT else ("failed", reason)


def said(word: str, request: WasmRequest, time_s: float) -> str:
    """The sentence for a bound that ended a run."""
    return {
        "wall_limit": f"the module ran longer than {time_s:g} s",
        "fuel_limit": f"the module used up its fuel of {request.fuel or limits.WASM_FUEL_MAX}",
        "memory_limit": f"the module wants more memory than {request.memory_bytes_max} bytes",
        "output_limit": f"the module wrote more than {request.output_bytes_max} bytes",
    }.get(word, word)
