"""What a run is: its specification, the settings of this machine, and the blob store as execution needs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, Protocol

from msgspec import Struct, field

from clawnet import limits
from clawnet.config import Config
from clawnet.errors import DataError
from clawnet.execution.prompt import PromptSettings
from clawnet.wire.globs import Globs
from clawnet.wire.jobspec import InputRef, JobSpec

__all__ = ["BlobPort", "BlobWriter", "ExecutionSettings", "InputRef", "JobSpec", "check"]

SHELL: Final = "shell-execution"
COMPUTE: Final = "compute"
PROMPT: Final = "ai-inference"
OPERATIONS: Final = ("sha256", "sort", "wordcount", "primes")


class ExecutionSettings(Struct, frozen=True):
    """The machine's policy (configuration section `execution`).

    `shell_own` is auto, sandboxed, host or off; `shell_member` and `shell_stranger` are sandboxed or off. `user` is
    whom tasks run as when this node runs as root: a name, a number, or empty (then no host runs as root). A run's
    own limits are cut down to the maxima here. All runs together have `cpus` processors and `memory_bytes_total` bytes
    (0: what the machine has, of memory three quarters), and of its GPUs the first `gpus`. `backlog` tells whether the
    node has more waiting than it should: then output is left in the pipes for a while, and the writing task waits.
    """

    shell_own: str = "auto"
    shell_member: str = "sandboxed"
    shell_stranger: str = "off"
    user: str = "nobody"
    slots: int = 0
    memory_bytes_max: int = 1024 * limits.MIB
    cpus: int = 0
    memory_bytes_total: int = 0
    gpus: int = limits.GPUS_MAX
    disk_bytes_max: int = limits.RUN_DISK_BYTES_MAX
    wall_s_max: float = 3_600.0
    output_bytes_max: int = limits.RUN_OUTPUT_BYTES_MAX
    verifier_s_max: float = 60.0
    outputs_bytes_max: int = limits.OUTPUTS_BYTES_MAX
    wasm_cache_bytes_max: int = 256 * limits.MIB
    offers: tuple[str, ...] = (COMPUTE, SHELL)
    worker_argv: tuple[str, ...] = ()
    backlog: Callable[[], bool] = field(default=lambda: False)
    prompts: PromptSettings = PromptSettings()

    @classmethod
    def of(
        cls,
        read: Config,
        environ: Mapping[str, str],
        *,
        worker_argv: tuple[str, ...] = (),
        backlog: Callable[[], bool] = lambda: False,
    ) -> ExecutionSettings:
        """From the configuration; raises ConfigError for an AI endpoint's token that cannot be used."""
        offers = read.words("node.capabilities")
        return cls(
            shell_own=read.text("execution.shell.own"),
            shell_member=read.text("execution.shell.member"),
            shell_stranger=read.text("execution.shell.stranger"),
            user=read.text("execution.user"),
            slots=read.integer("execution.slots"),
            memory_bytes_max=read.integer("execution.memory_max"),
            cpus=read.integer("execution.cpus"),
            memory_bytes_total=read.integer("execution.memory_total"),
            gpus=read.integer("execution.gpus"),
            disk_bytes_max=read.integer("execution.disk_max"),
            wall_s_max=read.seconds("execution.wall_max"),
            output_bytes_max=read.integer("execution.output_max"),
            verifier_s_max=read.seconds("execution.verifier_wall_max"),
            outputs_bytes_max=read.integer("execution.outputs_max"),
            wasm_cache_bytes_max=read.integer("execution.wasm_cache"),
            offers=tuple(word for word in (COMPUTE, SHELL) if word in offers),
            worker_argv=worker_argv,
            backlog=backlog,
            prompts=PromptSettings.of(read, environ),
        )


class BlobWriter(Protocol):
    """A blob being written; nothing is visible before `commit`."""

    def write(self, data: bytes) -> object: ...
    def commit(self) -> bytes:
        """The blob's id; the blob is in the store now."""
        ...

    def abort(self) -> None:
        """Forgets what was written; after commit it does nothing."""


class BlobPort(Protocol):
    """What execution asks of the blob store."""

    def put_bytes(self, data: bytes) -> bytes: ...
    def writer(self) -> BlobWriter: ...
    def path(self, blob: bytes) -> Path: ...


def check(spec: JobSpec) -> None:
    """Raises DataError when no runner could make sense of `spec`, which may have come from a peer."""
    Globs(spec.outputs)
    if spec.kind == "compute" and spec.module:
        _check_module(spec)
        return
    if spec.kind == "compute":
        if spec.op not in OPERATIONS:
            raise DataError(f"there is no operation {spec.op[:40]!r}", hint="known: " + ", ".join(OPERATIONS))
        return
    if spec.kind == "prompt":
        if len(spec.prompt.encode()) + len(spec.stdin or b"") > limits.TASK_DOCUMENT_BYTES_MAX or spec.inputs:
            raise DataError("a prompt is one text, and no longer than a task document")
        return
    if spec.kind != "shell":
        raise DataError(f"no runner for tasks of kind {spec.kind[:40]!r}")
    command = spec.argv if spec.argv is not None else [spec.script or ""]
    if not command or not command[0] or any("\0" in word for word in command):
        raise DataError("a shell task needs a command without NUL characters")
    if spec.argv is not None and command[0].startswith("-"):
        raise DataError(f"a command cannot start with '-': {command[0][:40]!r}", hint="write ./ before a file's name")
    if sum(len(word) + 1 for word in command) > limits.ARGV_BYTES_MAX:
        raise DataError(f"the command is longer than {limits.ARGV_BYTES_MAX} bytes")
    _check_environment(spec)


def _check_environment(spec: JobSpec) -> None:
    for name, value in spec.env.items():
        if not name or "=" in name or "\0" in name or "\0" in value:
            raise DataError(f"no environment variable can be called {name[:40]!r}")
    if sum(len(name) + len(value) + 2 for name, value in spec.env.items()) > limits.ENV_BYTES_MAX:
        raise DataError(f"the environment is larger than {limits.ENV_BYTES_MAX} bytes")


def _check_module(spec: JobSpec) -> None:
    if spec.op or not any(item.name == spec.module and item.kind == "file" for item in spec.inputs):
        raise DataError(f"no file among the inputs is called {spec.module[:60]!r}, which was to be the module")
    if any("\0" in word for word in spec.argv or ()):
        raise DataError("a module's arguments hold no NUL characters")
    if sum(len(word) + 1 for word in spec.argv or ()) > limits.ARGV_BYTES_MAX:
        raise DataError(f"the arguments are longer than {limits.ARGV_BYTES_MAX} bytes")
    _check_environment(spec)
