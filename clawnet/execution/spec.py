"""What a run is: its specification, the settings of this machine, and the blob store as execution needs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

from msgspec import Struct, field

from clawnet import limits
from clawnet.errors import DataError

SHELL: Final = "shell-execution"
COMPUTE: Final = "compute"
OPERATIONS: Final = ("sha256", "sort", "wordcount", "primes")


class InputRef(Struct, frozen=True, gc=False):
    """One input of a run: a blob in this node's store.

    `kind` is "file" or "tree" (an uncompressed tar, execution/inputs.py); `mode` is 0o755 for an executable file.
    """

    name: str
    kind: str
    blob: bytes
    size: int
    mode: int = 0o644

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> InputRef:
        """From an item of InputsReady or of a task document: {name, kind, blob, bytes, mode}."""
        return cls(fields["name"], fields["kind"], fields["blob"], fields["bytes"], fields.get("mode", 0o644))


class JobSpec(Struct, frozen=True, gc=False):
    """One run.

    Shell: `argv`, or `script` for `sh -c`. Compute: `op` with `op_args`, over the inputs in their order, else over
    `stdin`. File inputs lie in the working directory under their names; the tree input named `cwd_input` becomes the
    working directory itself, other trees are directories in it. `sandbox` is "" (the machine's policy for `ring`
    decides), "sandboxed" (insist) or "host" (ring own only, and only where the policy allows it). With `seal_key`
    the result leaves the executor sealed only.
    """

    job: bytes
    kind: str
    argv: list[str] | None = None
    script: str | None = None
    op: str = ""
    op_args: dict[str, Any] = {}
    env: dict[str, str] = {}
    inputs: list[InputRef] = []
    stdin: bytes | None = None
    cwd_input: str = ""
    ring: str = "own"
    sandbox: str = ""
    seal_key: bytes | None = None
    wall_s: float = 3_600.0
    memory_bytes_max: int = 1024 * limits.MIB
    output_bytes_max: int = limits.RUN_OUTPUT_BYTES_MAX


class ExecutionSettings(Struct, frozen=True):
    """The machine's policy (configuration section `execution`).

    `shell_own` is auto, sandboxed, host or off; `shell_member` and `shell_stranger` are sandboxed or off. `user` is
    whom tasks run as when this node runs as root: a name, a number, or empty (then no host runs as root). A run's
    own limits are cut down to the maxima here. `backlog` tells whether the node has more waiting than it should:
    then output is left in the pipes for a while, and the writing task waits.
    """

    shell_own: str = "auto"
    shell_member: str = "sandboxed"
    shell_stranger: str = "off"
    user: str = "nobody"
    slots: int = 0
    memory_bytes_max: int = 1024 * limits.MIB
    wall_s_max: float = 3_600.0
    output_bytes_max: int = limits.RUN_OUTPUT_BYTES_MAX
    offers: tuple[str, ...] = (COMPUTE, SHELL)
    worker_argv: tuple[str, ...] = ()
    backlog: Callable[[], bool] = field(default=lambda: False)


class BlobWriter(Protocol):
    """A blob being written; nothing is visible before `commit`."""

    def write(self, data: bytes) -> object: ...
    def commit(self) -> bytes:
        """The blob's id; the blob is in the store now."""
        ...

    def abort(self) -> None: ...


class BlobPort(Protocol):
    """What execution asks of the blob store."""

    def put_bytes(self, data: bytes) -> bytes: ...
    def writer(self) -> BlobWriter: ...
    def path(self, blob: bytes) -> Path: ...


def check(spec: JobSpec) -> None:
    """Raises DataError when no runner could make sense of `spec`; the node checks its own, but this came from a peer."""
    if spec.kind == "compute":
        if spec.op not in OPERATIONS:
            raise DataError(f"there is no operation {spec.op[:40]!r}", hint="known: " + ", ".join(OPERATIONS))
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
    for name, value in spec.env.items():
        if not name or "=" in name or "\0" in name or "\0" in value:
            raise DataError(f"no environment variable can be called {name[:40]!r}")
    if sum(len(name) + len(value) + 2 for name, value in spec.env.items()) > limits.ENV_BYTES_MAX:
        raise DataError(f"the environment is larger than {limits.ENV_BYTES_MAX} bytes")
