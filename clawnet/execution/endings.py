"""How a run ended and what the start-up probe found, and how the node is told: with a result, or why there is none."""

from __future__ import annotations

from msgspec import Struct

from clawnet.execution import bundle
from clawnet.wire.events import TaskExited


class Ended(Struct, frozen=True, gc=False):
    """How a run ended, in TaskExited's words, and what it cost."""

    how: str
    reason: str
    exit_code: int | None
    signal: int | None
    duration_s: float
    cpu_s: float
    memory_bytes_max: int


class ProbeResult(Struct, frozen=True):
    """What the probe found. `passed`: shell may be offered beyond ring own; else `reason` and `remedy` say why not."""

    passed: bool
    reason: str = ""
    remedy: str = ""
    checks: dict[str, str] = {}


def with_result(job: bytes, head: bundle.Head, packed: bundle.Packed) -> TaskExited:
    """The command ran, whatever its code; its bundle is packed."""
    return TaskExited(
        job=job,
        ended="exit",
        reason="",
        exit_code=head.exit_code,
        signal=head.signal,
        inline=packed.inline,
        blob=packed.blob,
        blob_bytes=packed.blob_bytes,
        plain_hash=packed.plain_hash,
        output_bytes=head.stdout_bytes + head.stderr_bytes + len(head.text.encode()),
        duration_s=head.usage.duration_s,
        cpu_s=head.usage.cpu_s,
        memory_bytes_max=head.usage.memory_bytes_max,
        tokens_in=head.usage.tokens_in,
        tokens_out=head.usage.tokens_out,
    )


def without_result(
    job: bytes,
    how: str,
    reason: str,
    duration_s: float = 0.0,
    cpu_s: float = 0.0,
    memory_bytes_max: int = 0,
    output_bytes: int = 0,
) -> TaskExited:
    """There is no result: `how` is the word for it, `reason` the sentence."""
    return TaskExited(
        job=job,
        ended=how,
        reason=reason,
        exit_code=None,
        signal=None,
        inline=b"",
        blob=b"",
        blob_bytes=0,
        plain_hash=b"",
        output_bytes=output_bytes,
        duration_s=duration_s,
        cpu_s=cpu_s,
        memory_bytes_max=memory_bytes_max,
    )
