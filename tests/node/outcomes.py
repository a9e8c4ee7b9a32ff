"""How what a member of meshkit asks for ends: runs, stopped runs, dials."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from clawnet.execution import bundle
from clawnet.wire import events as e
from clawnet.wire.blobid import blob_id
from clawnet.wire.verdict import (
    CONTRACT,
    EXIT_CODE,
    OUTPUT_SHA256,
    Check,
    Judged,
    Verdict,
    encode_report,
    failure,
    judged,
)

if TYPE_CHECKING:
    from tests.node.meshkit import Member


def echo(member: Member, run: e.Run) -> e.TaskExited | None:
    """Runs a job by answering with its operation or command as stdout, in no time."""
    spec = run.spec
    return answer(member, run, (spec.op or " ".join(spec.argv or []) or spec.script or "").encode())


def answer(member: Member, run: e.Run, text: bytes, code: int = 0, *, honest: bool = True) -> e.TaskExited:
    """A job that ended with this text and code; what does not pass its contract is delivered by a liar only."""
    spec = run.spec
    verdict = judge(spec.acceptance, code, text)
    if honest and failure(verdict) is not None:
        report = encode_report(verdict)
        return e.TaskExited(
            run.job, CONTRACT, "", None, None, b"", b"", 0, bytes(32), len(text), 0.01, 0.01, 1024, report=report
        )
    plain = bundle.encode(bundle.Bundle(code, None, text, b"", "", bundle.Usage(0.01, 0.01, 1024)))
    sealed = plain if spec.seal_key is None else bundle.seal(plain, spec.seal_key, member.entropy)
    return e.TaskExited(
        job=run.job,
        ended="exit",
        reason="",
        exit_code=code,
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


def judge(acceptance: tuple[Check, ...], code: int | None, text: bytes) -> Verdict:
    """A contract of exit codes and hashes, up to the condition that fails; verifiers and schemas are skipped."""
    verdict: list[Judged] = []
    for n, check in enumerate(acceptance):
        passed = {
            EXIT_CODE: lambda value: int(value) == code,
            OUTPUT_SHA256: lambda value: hashlib.sha256(text).digest() == value,
        }.get(check.kind)
        if passed is None:
            verdict.append(judged(n, "skipped", "not judged in this test"))
            continue
        verdict.append(judged(n, "passed") if passed(check.value) else judged(n, "failed", f"exit code {code}"))
        if failure(verdict) is not None:
            break
    return tuple(verdict)


def summary_of(opened: bundle.Bundle, plain: bytes) -> bundle.Summary:
    """What the real adapter tells of an opened bundle."""
    return bundle.Summary(
        opened.exit_code,
        opened.signal,
        opened.text,
        opened.usage,
        [],
        hashlib.sha256(plain).digest(),
        len(opened.stdout),
        len(opened.stderr),
        opened.stdout,
        opened.stderr,
    )


def stopped(job: bytes) -> e.TaskExited:
    """What the executor answers when a run was stopped before it left anything."""
    return e.TaskExited(job, "cancelled", "stopped", None, None, b"", b"", 0, bytes(32), 0, 0.0, 0.0, 0)


def unreachable(dial: e.Dial) -> e.DialEnded:
    """Nobody answers."""
    return e.DialEnded(dial.call, dial.peer, "it cannot be reached")
