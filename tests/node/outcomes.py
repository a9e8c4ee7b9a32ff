"""How what a member of meshkit asks for ends: runs, stopped runs, dials."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from clawnet.execution import bundle
from clawnet.wire import events as e
from clawnet.wire.blobid import blob_id

if TYPE_CHECKING:
    from tests.node.meshkit import Member


def echo(member: Member, run: e.Run) -> e.TaskExited | None:
    """Runs a job by answering with its operation or command as stdout, in no time."""
    spec = run.spec
    text = (spec.op or " ".join(spec.argv or []) or spec.script or "").encode()
    plain = bundle.encode(bundle.Bundle(0, None, text, b"", "", bundle.Usage(0.01, 0.01, 1024)))
    sealed = plain if spec.seal_key is None else bundle.seal(plain, spec.seal_key, member.entropy)
    return e.TaskExited(
        job=run.job,
        ended="exit",
        reason="",
        exit_code=0,
        signal=None,
        inline=sealed if len(sealed) <= member.inline_max else member.keep(sealed),
        blob=blob_id(sealed),
        blob_bytes=len(sealed),
        plain_hash=hashlib.sha256(plain).digest(),
        output_bytes=len(text),
        duration_s=0.01,
        cpu_s=0.01,
        memory_bytes_max=1024,
    )


def stopped(job: bytes) -> e.TaskExited:
    """What the executor answers when a run was stopped before it left anything."""
    return e.TaskExited(job, "cancelled", "stopped", None, None, b"", b"", 0, bytes(32), 0, 0.0, 0.0, 0)


def unreachable(dial: e.Dial) -> e.DialEnded:
    """Nobody answers."""
    return e.DialEnded(dial.call, dial.peer, "it cannot be reached")
