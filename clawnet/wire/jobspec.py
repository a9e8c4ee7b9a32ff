"""What the node asks the execution adapters to run: one frozen description of a job."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from msgspec import Struct

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


class JobSpec(Struct, frozen=True, gc=False):
    """One run.

    Shell: `argv`, or `script` for `sh -c`. Compute: `op` with `op_args`, over the inputs in their order, else over
    `stdin`. Prompt: `prompt`, and after it the text on `stdin`. File inputs lie in the working directory under their
    names; the tree input named `cwd_input` becomes the working directory itself, other trees are directories in it; the
    file input named `stdin_input` is no file there but what the command reads on standard input, instead of `stdin`.
    `gpus` are the numbers of those that are this run's own, in the order in which the machine was found to have them.
    `sandbox` is "" (the machine's policy for `ring` decides), "sandboxed" (insist) or "host" (ring own only, and only
    where the policy allows it). With `seal_key` the result leaves the executor sealed only.
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
