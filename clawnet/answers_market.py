"""The answers about tasks, bids and auctions; clawnet/answers.py holds the rest and the rules that bind all."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

from msgspec import UNSET, Struct, UnsetType, field

Ring = Literal["own", "member", "stranger"]
EscrowState = Literal["none", "locked", "released", "claimed", "refunded"]


class Answer(Struct, kw_only=True):
    """Base of all answers."""


def time_text(at_ms: int) -> str:
    """RFC 3339 in UTC with milliseconds, of Unix milliseconds (by the calendar alone; no clock is read)."""
    seconds, millis = divmod(at_ms, 1000)
    return f"{_second_text(seconds)}.{millis:03}Z"


@lru_cache(maxsize=256)
def _second_text(seconds: int) -> str:
    days, second = divmod(seconds, 86_400)
    # Days are counted from 1 March of year 0, so that the leap day is the last of a year (Hinnant, civil_from_days).
    era, day_of_era = divmod(days + 719_468, 146_097)
    year = (day_of_era - day_of_era // 1_460 + day_of_era // 36_524 - day_of_era // 146_096) // 365
    day_of_year = day_of_era - (365 * year + year // 4 - year // 100)
    march_month = (5 * day_of_year + 2) // 153
    day = day_of_year - (153 * march_month + 2) // 5 + 1
    month = march_month + 3 if march_month < 10 else march_month - 9
    full_year = year + era * 400 + (month <= 2)
    hours, minutes = second // 3_600, second // 60 % 60
    return f"{full_year:04}-{month:02}-{day:02}T{hours:02}:{minutes:02}:{second % 60:02}"


class Held(Answer):
    """The task is a draft that waits for `market approve`: why, and until when; then it has failed (77)."""

    reason: str
    until: str


class Submitted(Answer):
    """The task is durably accepted by the local node. `created` is false when an idempotency key found it.

    Of the input directories `left_out` are the first of the `left_out_count` entries that cannot travel (sockets, links
    that lead outside, clawnet's own home), and `ignored` entries stayed behind for --gitignore.
    """

    task_id: str
    created: bool
    deadline: str = ""
    held: Held | None = None
    left_out: list[str] = []
    left_out_count: int = 0
    ignored: int = 0


class Party(Answer):
    """A peer as seen from this node; `name` is empty for one never admitted."""

    peer_id: str
    name: str
    ring: Ring


class Usage(Answer):
    """The cost record of a run; of a prompt also its tokens, the model that answered, and why it stopped there.

    `bytes_in` is what went to the executor (the task with its standard input, and the inputs), `bytes_out` what the run
    brought: both streams and output files. `memory_bytes_max` is 0 when the run was over before it was measured.
    Seconds, memory and, of a run without a result, `bytes_out` are its executor's word, within what is possible.

    `finish_reason` is the endpoint's own word: "length" means that the answer was cut at the longest that is allowed.
    """

    duration_s: float
    cpu_s: float
    memory_bytes_max: int
    output_bytes: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    tokens_in: int | UnsetType = UNSET
    tokens_out: int | UnsetType = UNSET
    model: str | UnsetType = UNSET
    finish_reason: str | UnsetType = UNSET


class OutputFile(Answer):
    """A file that the task wrote and that was asked for."""

    name: str
    bytes: int
    sha256: str


class Result(Answer):
    """What a task left. Streams over 1 MiB are not inlined: they are null here, and `market result` streams them.

    `text` is the answer of a prompt or of a compute operation. `sha256` is of the whole result before sealing.
    `outputs` are the first of the `outputs_count` files that it left, of `outputs_bytes` together; `outputs_missing`
    are the patterns that matched none, `outputs_left_out` the first of the files that cannot travel, with the reasons.
    """

    exit_code: int | None
    signal: int | None
    stdout: str | None
    stderr: str | None
    text: str | None
    outputs: list[OutputFile]
    sha256: str
    duration_s: float
    usage: Usage
    stdout_b64: str | UnsetType = UNSET
    stderr_b64: str | UnsetType = UNSET
    stdout_bytes: int = 0
    stderr_bytes: int = 0
    blob: str | None = None
    outputs_count: int = 0
    outputs_bytes: int = 0
    outputs_missing: list[str] = []
    outputs_left_out: list[str] = []
    outputs_left_out_count: int = 0


class TaskError(Answer):
    """Why a task has no good result; `code` and `exit_code` are those of the error a waiting command ends with."""

    code: str
    message: str
    hint: str = ""
    exit_code: int = 70


class Condition(Answer):
    """One condition of the acceptance contract and how it came out for the attempt that stands for the task.

    `value` is the condition as `--accept` takes it. `outcome` is passed, failed, broken (its verifier came to no
    verdict: it crashed, or did not end in time; that is no acceptance), pending, or not_judged; `judged_by` tells whose
    word that is. `stderr` is the end of what a verifier said there.
    """

    kind: Literal["exit", "sha256", "schema", "test", "wasm"]
    value: str
    outcome: Literal["passed", "failed", "broken", "pending", "not_judged"]
    judged_by: Literal["executor", "requester"] | None
    detail: str
    stderr: str = ""


class EscrowRef(Answer):
    """The escrow of the paying attempt: `id` is lock hash and line ("none" state: ring own, nothing was locked)."""

    id: str | None
    state: EscrowState
    amount: str


class Attempt(Answer):
    """One executor's try at the task; `state` is awarded, locked, accepted, delivering, released, claimed, done, or how
    it ended: rejected, waived, refunded, unpaid, or lost, whose escrow is still locked until a hand-back or its expiry.
    `usage` is null where nothing ran, or nothing was told of it.
    """

    attempt: int
    executor: Party
    state: str
    price: str
    started_at: str
    ended_at: str | None
    reason: str
    escrow: EscrowRef
    usage: Usage | None = None


class Transition(Answer):
    """The task entered `state` at `at`, because of `reason`."""

    state: str
    at: str
    reason: str


class Task(Answer):
    """A task as JSON. `price` is null until awarded; `bids` counts them; `final` tells that nothing will change."""

    task_id: str
    state: str
    type: str
    description: str
    created_at: str
    deadline: str
    max_budget: str
    price: str | None
    ring: Ring | None
    executor: Party | None
    attempts: list[Attempt]
    bids: int
    escrow: EscrowRef
    result: Result | None
    error: TaskError | None
    idempotency_key: str | None
    acceptance: list[Condition] = field(default_factory=list)
    final: bool = False
    ended_at: str | None = None
    transitions: list[Transition] = field(default_factory=list)
    held: Held | None = None


class TaskSummary(Answer):
    """A task in a list."""

    task_id: str
    state: str
    type: str
    description: str
    created_at: str
    ended_at: str | None
    max_budget: str
    price: str | None
    executor: Party | None
    exit_code: int | None
    error: TaskError | None
    held: Held | None = None


class TaskList(Answer):
    """Newest first; `next` continues the list."""

    items: list[TaskSummary]
    next: str | None = None


class TaskItems(Answer):
    """Several whole tasks, in the order asked for (`market wait A B`)."""

    items: list[Task]
    next: str | None = None


class OutputChunk(Answer):
    """A streamed piece of a running task; `offset` is its place in that stream of that attempt."""

    stream: Literal["stdout", "stderr"]
    offset: int
    attempt: int
    data: str | UnsetType = UNSET
    data_b64: str | UnsetType = UNSET


class OutputPlace(Answer):
    """Where a follower's output goes on: from these bytes of this attempt.

    `again`: an earlier attempt was lost after some of its output had been shown; that of this one starts at byte 0.
    """

    attempt: int
    stdout: int
    stderr: int
    again: bool


class StreamLine(Answer):
    """One line of `run --stream --json`, before the task object."""

    stream: Literal["stdout", "stderr"]
    data: str | UnsetType = UNSET
    data_b64: str | UnsetType = UNSET


class AttemptLine(Answer):
    """Among those lines: what was shown of an earlier attempt is void, the output of this one starts at byte 0."""

    attempt: int
    again: Literal[True]


class StateChange(Answer):
    """A followed task entered a state."""

    task_id: str
    state: str
    reason: str
    at: str


class ReadAnswer(Answer):
    """A piece of a stored stream; `size` is the whole stream's."""

    data_b64: str
    size: int
    eof: bool


class CancelAnswer(Answer):
    """The state after the request; a task that runs elsewhere ends when its executor answers."""

    task_id: str
    state: str


class Job(Answer):
    """A task that this node took for somebody and that has ended: done, rejected, waived (handed back) or forfeited.

    `price` was bound for it, `earned` is what was claimed; `usage` is null where no run came to an end.
    """

    task_id: str
    attempt: int
    requester: Party
    type: str
    state: str
    reason: str
    price: str
    earned: str
    received_at: str
    started_at: str | None
    ended_at: str | None
    usage: Usage | None


class JobList(Answer):
    """What `market history --role executor` tells, newest first."""

    items: list[Job]
    next: str | None = None


class Approval(Answer):
    """The state after the approval; `changed` is false for a task that was approved before."""

    task_id: str
    state: str
    changed: bool


class ApprovalList(Answer):
    """In the order of the tasks named (`market approve A B`); without any, `market approve` lists what is held."""

    items: list[Approval]
    next: str | None = None


class Terms(Answer):
    """The four weighted terms of a bid's score."""

    price: float
    reputation: float
    latency: float
    confidence: float


class Bid(Answer):
    """A bid as the requester judged it; `score` is the sum of `terms`.

    `confidence` is the bidder's `confidence_claimed` after the discount; `rtt_s` is the round trip to it. `own_ahead_s`
    is how much longer than told it would take for what the bidder was awarded here since it was asked; the term of
    confidence is less by as much as the latency that it told no longer holds.
    """

    round: int
    bidder: Party
    price: str
    estimated_s: float
    queue_wait_s: float
    confidence: float
    reputation: float
    load: float
    energy_cost: float
    score: float
    terms: Terms
    at: str
    won: bool
    rtt_s: float = 0.0
    confidence_claimed: float = 0.0
    own_ahead_s: float = 0.0


class BidList(Answer):
    """Best score first."""

    items: list[Bid]
    next: str | None = None


class WhyPeer(Answer):
    """What one peer that was asked answered: bid, declined (with `reason`) or silent; `excluded` was not asked."""

    peer: Party
    answer: Literal["bid", "declined", "silent", "excluded"]
    reason: str
    bid: Bid | None = None


class WhyRound(Answer):
    """One auction. `closed_by` says what ended it: all_answered, soft_close, bid_timeout, nobody, inner_ring.

    `max_budget` is what was offered at most, `weights` what the four terms of a score counted.
    """

    round: int
    opened_at: str
    closed_at: str | None
    closed_by: str
    ring: str
    asked: int
    declined: dict[str, int]
    peers: list[WhyPeer]
    winner: Party | None
    reason: str
    max_budget: str = "0"
    min_reputation: float = 0.0
    weights: Terms | None = None


class Why(Answer):
    """Who was asked, who declined and why, how each bid scored, why the winner won; `hint` widens the choice."""

    task_id: str
    state: str
    summary: str
    hint: str
    rounds: list[WhyRound]
    attempts: list[Attempt] = field(default_factory=list)
    transitions: list[Transition] = field(default_factory=list)
