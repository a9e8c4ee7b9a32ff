"""What the node asks the execution adapters to run: one frozen description of a job."""

from __future__ import annotations

from typing import Any

from msgspec import Struct


class InputRef(Struct, frozen=True):
    """One input of a job: `kind` is "file" or "tree" (a tar); `blob` names its stored bytes."""

    name: str
    kind: str
    blob: bytes
    bytes: int
    mode: int = 0o644


class JobSpec(Struct, frozen=True):
    """A job: `kind` is shell (argv, or script for `sh -c`) or compute (op, op_args).

    `cwd_input` names the tree input that becomes the working directory ("": a fresh one). `ring` and the node's
    policy decide the sandbox. With `seal_key` the result bundle leaves the adapter sealed. Sizes in bytes.
    """

    job: bytes
    kind: str
    ring: str
    argv: list[str] | None = None
    script: str | None = None
    op: str = ""
    op_args: dict[str, Any] = {}
    env: dict[str, str] = {}
    inputs: list[InputRef] = []
    stdin: bytes | None = None
    cwd_input: str = ""
    seal_key: bytes | None = None
    wall_s: float = 3600.0
    memory_bytes_max: int = 0
    output_bytes_max: int = 0
