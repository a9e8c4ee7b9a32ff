"""The conditions of an acceptance contract as execution is given them, and how each of them came out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta, Struct

from clawnet import limits
from clawnet.errors import WireError
from clawnet.wire.jobspec import Check

__all__ = [
    "Check",
    "Judged",
    "Outcome",
    "Verdict",
    "decode_report",
    "encode_report",
    "failure",
    "judged",
    "without_words",
]

EXIT_CODE: Final = "exit_code"
OUTPUT_SHA256: Final = "output_sha256"
OUTPUT_SCHEMA: Final = "output_schema"
VERIFIER_COMMAND: Final = "verifier_command"
VERIFIER_WASM: Final = "verifier_wasm"

CONTRACT: Final = "contract"
"""The word of TaskExited.ended and TASK_WAIVER for a run whose result did not pass its contract."""

UNTOLD: Final = "its executor tells no more before it is paid"
"""The detail of a condition whose own words might tell of the result."""

Outcome = Literal["passed", "failed", "broken", "skipped"]
"""How a condition came out. `broken`: its verifier came to no verdict (it crashed, or did not end in time), which is no
acceptance; `skipped`: it was not judged, for the reason beside it."""


class Judged(Struct, frozen=True, array_like=True, gc=False, forbid_unknown_fields=True):
    """How condition `n` of the contract came out, why, and the end of what a verifier said on its stderr."""

    n: Annotated[int, Meta(ge=0, lt=limits.CONTRACT_CONDITIONS_MAX)]
    outcome: Outcome
    detail: Annotated[str, Meta(max_length=limits.CONTRACT_DETAIL_CHARS_MAX)] = ""
    stderr: Annotated[bytes, Meta(max_length=limits.VERIFIER_STDERR_BYTES_MAX)] = b""


Verdict = tuple[Judged, ...]
_Report = Annotated[list[Judged], Meta(min_length=1, max_length=limits.CONTRACT_CONDITIONS_MAX)]
_encode: Final = msgspec.msgpack.Encoder().encode
_decoder: Final = msgspec.msgpack.Decoder(_Report)


def judged(n: int, outcome: Outcome, detail: str = "", stderr: bytes = b"") -> Judged:
    """A Judged within its bounds, whatever was said."""
    most = limits.CONTRACT_DETAIL_CHARS_MAX
    cut = detail if len(detail) <= most else detail[: most - 1] + "…"
    return Judged(n, outcome, cut, stderr[-limits.VERIFIER_STDERR_BYTES_MAX :])


def failure(verdict: Sequence[Judged]) -> Judged | None:
    """The condition that the result did not pass, if any."""
    return next((one for one in verdict if one.outcome in ("failed", "broken")), None)


def encode_report(verdict: Sequence[Judged]) -> bytes:
    """The failure report of TASK_WAIVER: what was judged, in the contract's order, up to the condition that failed."""
    return _encode(list(verdict))


def decode_report(report: bytes, conditions: int, *, failed: bool = True) -> Verdict:
    """A report on so many conditions; raises WireError unless it is one, and unless one of them `failed` by it."""
    try:
        verdict = tuple(_decoder.decode(report))
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise WireError(f"not a failure report: {error}") from error
    numbers = [one.n for one in verdict]
    if numbers != sorted(set(numbers)) or numbers[-1] >= conditions:
        raise WireError("not a failure report: it is of another contract")
    if failed and failure(verdict) is None:
        raise WireError("not a failure report: no condition failed by it")
    return verdict


def without_words(report: bytes) -> bytes:
    """The same report for somebody who may not see a result before it is paid: which conditions failed, and no more.

    A verifier is its author's own program, and could say the whole result.
    """
    return _encode([Judged(one.n, one.outcome, UNTOLD * (one.outcome != "passed")) for one in _decoder.decode(report)])
