"""The options that describe a task, written once for `run` and `market submit`."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def _text(name: str, metavar: str, text: str) -> Any:
    return typer.Option(name, metavar=metavar, help=text, show_default=False)


BUDGET = Annotated[str | None, _text("--budget", "CREDITS", "The most that may be paid in all (default 10).")]
DEADLINE = Annotated[str | None, _text("--deadline", "DURATION", "When the task must be done (300s; run: 1h).")]
BID_TIMEOUT = Annotated[str | None, _text("--bid-timeout", "DURATION", "The longest an auction may take.")]
MIN_REPUTATION = Annotated[float | None, _text("--min-reputation", "0..1", "Nobody below this reputation.")]
REQUIRE = Annotated[list[str] | None, _text("--require", "CAPABILITY", "A capability it needs (repeatable).")]
CPU = Annotated[int | None, _text("--cpu", "N", "Processor cores it needs; set aside while it runs.")]
MEMORY = Annotated[str | None, _text("--memory", "SIZE", "Memory it needs, such as 2GiB; it gets no more.")]
GPU = Annotated[int | None, _text("--gpu", "N", "GPUs it needs, for itself alone.")]
MODEL = Annotated[str | None, _text("--model", "NAME", "The model a prompt is for.")]
LABEL = Annotated[list[str] | None, _text("--label", "LABEL", "A label the executor must have (repeatable).")]
OS = Annotated[str | None, _text("--os", "FAMILY", "linux, darwin, windows or any (shell: this machine's).")]
PEER = Annotated[list[str] | None, _text("--peer", "PEER", "Only this peer (repeatable).")]
EXCLUDE = Annotated[list[str] | None, _text("--exclude", "PEER", "Not this peer (repeatable).")]
RING = Annotated[str | None, _text("--ring", "own|member", "The outermost ring that may see the task.")]
PREFER = Annotated[str | None, _text("--prefer", "market", "Ask members first, own machines after.")]
INPUT = Annotated[list[str] | None, _text("--input", "[NAME=]PATH", "A file or directory to take along (repeatable).")]
GITIGNORE = Annotated[
    bool, typer.Option("--gitignore", help="Of directories leave behind what Git ignores there, and .git itself.")
]
OUTPUT = Annotated[
    list[str] | None,
    _text("--output", "GLOB", "Files to bring back from its working directory, such as 'dist/*' (repeatable)."),
]
OUTPUT_DIR = Annotated[
    str | None, _text("--output-dir", "DIR", "Where they are put, all of them or none (the current directory).")
]
ACCEPT = Annotated[
    list[str] | None,
    _text("--accept", "CONDITION", "What the result must pass: exit:0, sha256:H, schema:FILE, test:CMD, wasm:MODULE."),
]
ENV = Annotated[list[str] | None, _text("--env", "NAME=VALUE", "An environment variable (repeatable).")]
RETRIES = Annotated[int | None, _text("--retries", "N", "How often it may start again elsewhere (shell: 0).")]
PRIORITY = Annotated[int | None, _text("--priority", "N", "Higher goes first among this node's tasks.")]
IDEMPOTENCY_KEY = Annotated[str | None, _text("--idempotency-key", "KEY", "The same key and task run once.")]
STREAM = Annotated[bool, typer.Option("--stream", help="Output as it comes; with --json as JSON lines.")]
SPEC = Annotated[str | None, _text("--spec", "FILE|-", "The whole task as JSON or YAML; options go over it.")]
STATUS_FILE = Annotated[str | None, _text("--status-file", "FILE", "Write the task's JSON here at the end.")]
NO_STDIN = Annotated[bool, typer.Option("--no-stdin", "-n", help="Do not read standard input.")]
ATTACH = Annotated[str | None, _text("--attach", "TASK", "Follow a task that runs or has ended, instead of a command.")]
FROM_END = Annotated[bool, typer.Option("--from-end", help="Only the output that comes from now on.")]
WAIT = Annotated[bool, typer.Option("--wait", help="Wait for the result.")]
TYPE = Annotated[str | None, _text("--type", "TYPE", "prompt (the default), shell or compute.")]
OP = Annotated[str | None, _text("--op", "NAME", "The operation of a compute task: sha256, sort, wordcount, primes.")]
WASM = Annotated[
    str | None, _text("--wasm", "MODULE", "Run this WebAssembly program (WASI) with the arguments after --.")
]
FUEL = Annotated[int | None, _text("--fuel", "N", "The most instructions a module may run (0: the executor's bound).")]
TASK = Annotated[str, typer.Argument(metavar="TASK", help="A task id, or the start of one.", show_default=False)]
PEER_ARGUMENT = Annotated[str, typer.Argument(metavar="PEER", help="A peer's id, or its name.", show_default=False)]
LIMIT = Annotated[int, typer.Option("--limit", metavar="N", min=1, help="At most so many.")]
