"""What the node asks the execution adapters to run: one frozen description of a job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from msgspec import Meta, Struct

from clawnet import limits


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


class Check(Struct, frozen=True, gc=False):
    """One condition of an acceptance contract, checked by whoever took in the task document (wire/verdict.py).

    `value` is of its kind: the exit code in decimal digits, 32 bytes of SHA-256, or a JSON Schema. `argv` is a verifier
    command, to which the exit code is added as a last argument, `module` where the bytes of a verifier module are.
    """

    kind: str
    value: bytes = b""
    argv: tuple[str, ...] = ()
    module: InputRef | None = None


class JobSpec(Struct, frozen=True, gc=False):
    """One run.

    Shell: `argv`, or `script` for `sh -c`. Compute: `op` with `op_args`, over the inputs in their order, else over
    `stdin`; or the WebAssembly program in the input named `module`, with `argv` after its name, and at most `fuel` (0:
    what this node allows). Prompt: `prompt`, and after it the text on `stdin`. File inputs lie in the working directory
    under their names; the tree input named `cwd_input` becomes the working directory itself, other trees are folders
    in it; the file input named `stdin_input` is no file there but what the command reads on standard input, instead of
    `stdin`.
    What `outputs` name in the directory (wire/globs.py) when the command has ended comes back with the result.
    `gpus` are the numbers of those that are this run's own, in the order in which the machine was found to have them.
    `sandbox` is "" (the machine's policy for `ring` decides), "sandboxed" (insist) or "host" (ring own only, and only
    where the policy allows it). With `seal_key` the result leaves the executor sealed only, and with an `acceptance`
    contract only when it passes; that too is over `until_s` seconds after the start.
    """

    job: bytes
    kind: str
    argv: list[str] | None = None
    script: str | None = None
    op: str = ""
    op_args: dict[str, Any] = {}
    module: str = ""
    fuel: Annotated[int, Meta(ge=0)] = 0
    env: dict[str, str] = {}
    inputs: list[InputRef] = []
    stdin: bytes | None = None
    stdin_input: str = ""
    prompt: str = ""
    cwd_input: str = ""
    ring: str = "own"
    sandbox: str = ""
    seal_key: bytes | None = None
    wall_s: float = 3_600.0
    memory_bytes_max: int = 1024 * limits.MIB
    gpus: tuple[int, ...] = ()
    output_bytes_max: int = limits.RUN_OUTPUT_BYTES_MAX
    outputs: list[str] = []
    outputs_bytes_max: int = limits.OUTPUTS_BYTES_MAX
    acceptance: tuple[Check, ...] = ()
    until_s: float = 3_600.0
