"""What a node remembers of a task it submitted (Task, Attempt) and of one it runs for somebody (Job).

These are the bodies of the rows `tasks` and `jobs`. Payloads, documents and results are rows of their own, written
once. Times are Unix milliseconds; 0 means "not yet".
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
from msgspec import Struct, field

from clawnet.wire.messages import Requirements


class Attempt(Struct, array_like=True):
    """One award of a task. `paying` is the slot of LEDGER.md section 6: only the attempt that holds it may be paid."""

    n: int
    peer: str
    account: bytes
    ring: str
    price_ucr: int
    estimated_s: float
    confidence: float
    state: str = "awarded"
    awarded_ms: int = 0
    accepted_ms: int = 0
    heard_ms: int = 0
    delivered_ms: int = 0
    deliver_by_ms: int = 0
    expiry_ms: int = 0
    lock_seq: int = -1
    lock_hash: bytes = b""
    line: int = 0
    known_seq: int = -1
    paying: bool = True
    released_seq: int = -1
    released_ucr: int = 0
    key_hash: bytes = b""
    key: bytes = b""
    note: bytes = b""
    waiver: bytes = b""
    inline: bool = True
    blob: bytes = b""
    blob_bytes: int = 0
    cpu_s: float = 0.0
    memory_bytes_max: int = 0
    duration_s: float = 0.0
    escrow: str = "none"
    refunded: bool = False
    closed: bool = False
    reason: str = ""
    locked_ms: int = 0
    ended_ms: int = 0
    lost: bool = False
    """It fell silent, stopped or was restarted: where nobody else takes the task its executor may be asked again."""
    report: bytes = b""
    """How the conditions of the contract came out (wire/verdict.py): by the executor's report, or as judged here."""
    output_bytes: int = 0
    """What the run wrote: as its executor tells it, and as it is once the result is open."""


class Task(Struct, array_like=True):
    """A task as its requester keeps it. `spec` is the normalised submission (market/taskspec.py)."""

    task_id: bytes
    created_ms: int
    kind: str
    description: str
    spec: dict[str, Any]
    secret: bytes
    deadline_ms: int
    max_budget_ucr: int
    state: str = "draft"
    updated_ms: int = 0
    task_hash: bytes = b""
    document_bytes: int = 0
    inputs: list[dict[str, Any]] = field(default_factory=list)
    input_bytes: int = 0
    attempts: list[Attempt] = field(default_factory=list)
    stages: list[str] = field(default_factory=list)
    stage: int = 0
    round: int = 0
    refused: list[str] = field(default_factory=list)
    retries_left: int = 0
    bids: int = 0
    error_code: str = ""
    error_text: str = ""
    error_hint: str = ""
    result: dict[str, Any] | None = None
    transitions: int = 0
    shown_lost: bool = False
    backoff_ms: int = 0
    refusals: dict[str, int] = field(default_factory=dict)
    content: str = ""
    moves: list[tuple[int, int, str, str]] = field(default_factory=list)
    """The newest transitions (n, time, state, reason): they get rows together, at the latest at the end."""
    credential: str = ""
    """Who submitted it (RpcCall.credential): its spend limits bound what is locked for the task."""
    held_until_ms: int = 0
    """A draft that waits for approval, until when; 0 for one that was never held, or is approved."""
    held_reason: str = ""
    """Why it was held, kept when it no longer is."""

    @property
    def paying(self) -> Attempt | None:
        """The attempt that holds the paying slot, if any."""
        for attempt in reversed(self.attempts):
            if attempt.paying:
                return attempt
        return None

    @property
    def requirements(self) -> Requirements:
        """What the offer asks of a candidate."""
        return Requirements(**self.spec["requirements"])


class Job(Struct, array_like=True):
    """A task as its executor keeps it. `job` is derived from requester, task id and attempt (job_id)."""

    job: bytes
    peer: str
    account: bytes
    ring: str
    task_id: bytes
    attempt: int
    kind: str
    price_ucr: int
    deadline_ms: int
    deliver_by_ms: int
    received_ms: int
    task_hash: bytes
    stream_output: bool
    locked: bool
    lease_s: int
    state: str = "awaiting_lock"
    duration_key: str = ""
    lock_seq: int = -1
    lock_hash: bytes = b""
    line: int = 0
    started_ms: int = 0
    starts: int = 0
    ended_ms: int = 0
    retries: int = 0
    estimated_s: float = 0.0
    amount_ucr: int = 0
    key_hash: bytes = b""
    note: bytes = b""
    note_hash: bytes = b""
    waiver: bytes = b""
    inline: bool = True
    blob: bytes = b""
    blob_bytes: int = 0
    output_bytes: int = 0
    cpu_s: float = 0.0
    memory_bytes_max: int = 0
    duration_s: float = 0.0
    claimed_seq: int = -1
    released_seq: int = -1
    cancelled: bool = False
    reason: str = ""
    report: bytes = b""
    pulls: int = 0
    description: str = ""
    cpu: int = 0
    memory_bytes: int = 0
    gpu: int = 0
    priority: int = 0
    input_bytes: int = 0
    """What came for it: the document, with standard input in it, and the inputs."""


FINAL_STATES: Final = frozenset({"settled", "refunded", "no_bids", "cancelled", "failed", "timed_out"})
JOB_FINAL: Final = frozenset({"done", "rejected", "waived", "forfeited"})

_task_decoder = msgspec.msgpack.Decoder(Task)
_job_decoder = msgspec.msgpack.Decoder(Job)
_encoder = msgspec.msgpack.Encoder()


def encode(record: Task | Job) -> bytes:
    """The row body of a record."""
    return _encoder.encode(record)


def decode_task(body: bytes) -> Task:
    """Inverse of encode for tasks; raises msgspec.DecodeError for a body of another shape."""
    return _task_decoder.decode(body)


def decode_job(body: bytes) -> Job:
    """Inverse of encode for jobs; raises msgspec.DecodeError for a body of another shape."""
    return _job_decoder.decode(body)
