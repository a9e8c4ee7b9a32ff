"""The three machines of the market as tables: a task and its attempts (requester), a job (executor). Pure.

States are stored as their words. `advance` is for our own moves and raises when the table lacks one, telling the story
so far; whether a peer's message may move anything is asked with `may` first, so that no peer can trip it. The
diagrams in docs/ are drawn from these tables (mermaid).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Final, TypeVar

from msgspec import Struct

from clawnet.errors import InternalError


class TaskState(StrEnum):
    """DESIGN section 5, as the requester sees its task."""

    DRAFT = "draft"
    """Durably accepted from the client; held until somebody approves it (market.approve)."""
    ANNOUNCED = "announced"
    """An offer went to the candidates of a ring."""
    BIDDING = "bidding"
    """Bids or declines are coming in."""
    AWARDED = "awarded"
    """A winner is chosen, the lock (if any) and the document are on their way."""
    EXECUTING = "executing"
    """The executor has durably taken it."""
    REASSIGNED = "reassigned"
    """The executor was lost or gave the task back; the paying slot moves on."""
    DELIVERED = "delivered"
    """The sealed result is durably here."""
    VERIFIED = "verified"
    """It was opened and passed its acceptance contract (or has none)."""
    DISPUTED = "disputed"
    """An arbiter decides (a later increment)."""
    SETTLED = "settled"
    REFUNDED = "refunded"
    NO_BIDS = "no_bids"
    CANCELLED = "cancelled"
    FAILED = "failed"
    TIMED_OUT = "timed_out"


class AttemptState(StrEnum):
    """One award of a task, as the requester sees it. In ring own nothing is locked or released.

    Whether money is still bound is told beside the state (records.Attempt: refunded, closed): a rejected, waived or
    lost attempt may wait for its line.
    """

    AWARDED = "awarded"
    """The winner is chosen; a lock is being written where there is a price."""
    LOCKED = "locked"
    """The lock is on our chain; award and lock are on their way."""
    ACCEPTED = "accepted"
    """The executor has durably taken it."""
    FETCHING = "fetching"
    """The note is here, the sealed bytes are being fetched."""
    DELIVERING = "delivering"
    """The sealed result is durable; its release is being written."""
    UNPAID = "unpaid"
    """A result came after the paying slot had moved; the line waits for its waiver or expiry."""
    RELEASED = "released"
    """The release is on our chain; the key is awaited."""
    CLAIMED = "claimed"
    """The key is here (or none is needed); the result is being opened."""
    DONE = "done"
    REJECTED = "rejected"
    """Refused by the executor, which had not started."""
    WAIVED = "waived"
    """Handed back by the executor (cancelled, failed, contract not met)."""
    LOST = "lost"
    """Nothing was heard until its expiry, and there was no lock."""
    REFUNDED = "refunded"
    """The line came back at its expiry."""
    UNFUNDED = "unfunded"
    """No lock could be written."""


class JobState(StrEnum):
    """A task that this node runs for somebody."""

    AWAITING_LOCK = "awaiting_lock"
    """The document is here; the lock is being checked (and the requester's chain audited)."""
    FETCHING = "fetching"
    """Accepted; inputs are being fetched."""
    QUEUED = "queued"
    """Everything is here; a slot is waited for."""
    RUNNING = "running"
    SEALED = "sealed"
    """The run ended; its sealed result and the note are durable."""
    DELIVERED = "delivered"
    """The result was sent and is re-sent until the release or its acknowledgement."""
    RELEASED = "released"
    """The requester's release is in a valid chain."""
    CLAIMED = "claimed"
    """Our claim is on our chain, and is sent until acknowledged."""
    CANCELLED = "cancelled"
    """The requester cancelled; the process group is being killed."""
    DONE = "done"
    REJECTED = "rejected"
    WAIVED = "waived"
    FORFEITED = "forfeited"
    """The line ended without a release of ours to claim."""


S = TypeVar("S", bound=StrEnum)


def _table(rows: Mapping[S, Iterable[S]], *, anywhere: Iterable[S] = ()) -> dict[S, frozenset[S]]:
    """The table of `rows`, whose states are all open, with every state of `anywhere` reachable from each of them."""
    everywhere = tuple(anywhere)
    return {state: frozenset((*targets, *everywhere)) - {state} for state, targets in rows.items()}


_T = TaskState
TASK_TRANSITIONS: Final[Mapping[TaskState, frozenset[TaskState]]] = {
    **_table(
        {
            _T.DRAFT: (_T.ANNOUNCED, _T.NO_BIDS),
            _T.ANNOUNCED: (_T.BIDDING, _T.AWARDED, _T.NO_BIDS),
            _T.BIDDING: (_T.AWARDED, _T.ANNOUNCED, _T.NO_BIDS),
            _T.AWARDED: (_T.EXECUTING, _T.DELIVERED, _T.REASSIGNED, _T.DISPUTED),
            _T.EXECUTING: (_T.DELIVERED, _T.REASSIGNED, _T.DISPUTED),
            _T.REASSIGNED: (_T.ANNOUNCED, _T.BIDDING, _T.AWARDED, _T.NO_BIDS),
            _T.DELIVERED: (_T.VERIFIED, _T.SETTLED, _T.DISPUTED),
            _T.VERIFIED: (_T.SETTLED, _T.DISPUTED),
        },
        anywhere=(_T.CANCELLED, _T.FAILED, _T.TIMED_OUT),
    ),
    _T.DISPUTED: frozenset((_T.SETTLED, _T.REFUNDED)),
}
"""From the open states to the next. A bid may come in the turn of the announcement, a result before its ACCEPT was
seen (it acknowledges the award), and the next ring is announced when one has no bid."""

_A = AttemptState
ATTEMPT_TRANSITIONS: Final[Mapping[AttemptState, frozenset[AttemptState]]] = _table(
    {
        _A.AWARDED: (_A.LOCKED, _A.UNFUNDED, _A.ACCEPTED, _A.REJECTED, _A.WAIVED, _A.LOST),
        _A.LOCKED: (_A.ACCEPTED, _A.REJECTED, _A.WAIVED, _A.REFUNDED),
        _A.ACCEPTED: (
            *(_A.FETCHING, _A.DELIVERING, _A.CLAIMED, _A.UNPAID),
            *(_A.REJECTED, _A.WAIVED, _A.LOST, _A.REFUNDED),
        ),
        _A.FETCHING: (_A.ACCEPTED, _A.DELIVERING, _A.CLAIMED, _A.UNPAID, _A.REFUNDED),
        _A.DELIVERING: (_A.RELEASED,),
        _A.UNPAID: (_A.WAIVED, _A.REFUNDED),
        _A.RELEASED: (_A.CLAIMED,),
        _A.CLAIMED: (_A.DONE,),
    }
)
"""From a durable result held by the paying slot the only way is forward: it is released, never refunded. A fetch that
fails leads back to accepted, where the result is asked for again."""

_J = JobState
JOB_TRANSITIONS: Final[Mapping[JobState, frozenset[JobState]]] = _table(
    {
        _J.AWAITING_LOCK: (_J.FETCHING, _J.QUEUED, _J.RUNNING, _J.REJECTED, _J.CANCELLED, _J.WAIVED),
        _J.FETCHING: (_J.QUEUED, _J.RUNNING, _J.REJECTED, _J.CANCELLED, _J.WAIVED, _J.FORFEITED),
        _J.QUEUED: (_J.RUNNING, _J.REJECTED, _J.CANCELLED, _J.WAIVED, _J.FORFEITED),
        _J.RUNNING: (_J.SEALED, _J.QUEUED, _J.DELIVERED, _J.CANCELLED, _J.WAIVED, _J.FORFEITED, _J.DONE),
        _J.SEALED: (_J.DELIVERED, _J.WAIVED, _J.FORFEITED),
        _J.DELIVERED: (_J.RELEASED, _J.CLAIMED, _J.DONE, _J.WAIVED, _J.FORFEITED),
        _J.RELEASED: (_J.CLAIMED, _J.FORFEITED),
        _J.CLAIMED: (_J.DONE,),
        _J.CANCELLED: (_J.WAIVED, _J.REJECTED, _J.SEALED, _J.DELIVERED, _J.FORFEITED, _J.DONE),
    }
)
"""A job goes back from running to queued only after a restart, where its task allows a second start. A cancelled one
may have ended by itself a moment before: then its result is delivered all the same."""


def _ends(table: Mapping[S, frozenset[S]], states: Iterable[S]) -> frozenset[S]:
    return frozenset(state for state in states if state not in table)


def _widen(table: Mapping[S, frozenset[S]]) -> dict[StrEnum, frozenset[StrEnum]]:
    return {state: frozenset[StrEnum](targets) for state, targets in table.items()}


FINAL: Final = _ends(TASK_TRANSITIONS, TaskState)
ATTEMPT_FINAL: Final = _ends(ATTEMPT_TRANSITIONS, AttemptState)
JOB_FINAL: Final = _ends(JOB_TRANSITIONS, JobState)
MACHINES: Final[dict[str, Mapping[StrEnum, frozenset[StrEnum]]]] = {
    "task": _widen(TASK_TRANSITIONS),
    "attempt": _widen(ATTEMPT_TRANSITIONS),
    "job": _widen(JOB_TRANSITIONS),
}
_TABLE_OF: Final[dict[type[StrEnum], Mapping[StrEnum, frozenset[StrEnum]]]] = {
    TaskState: MACHINES["task"],
    AttemptState: MACHINES["attempt"],
    JobState: MACHINES["job"],
}


TASK_MOVES: Final[Mapping[str, frozenset[str]]] = {
    str(frm): frozenset(map(str, to)) for frm, to in MACHINES["task"].items()
}
"""The moves of a task by their words, as its row holds them."""


class Step(Struct, frozen=True, gc=False, array_like=True):
    """One line of a story: the state entered, when (Unix milliseconds), and why."""

    at_ms: int
    state: str
    reason: str = ""


class ImpossibleTransition(InternalError):
    """A defect of clawnet: code asked for a move that the table of the machine lacks. The message tells the story."""


def may(frm: StrEnum, to: StrEnum) -> bool:
    """Whether the table of their machine has the move `frm` -> `to`."""
    return to in _TABLE_OF[type(frm)].get(frm, frozenset())


def is_final(state: StrEnum) -> bool:
    """Whether no move leaves this state."""
    return state not in _TABLE_OF[type(state)]


def advance(story: Sequence[Step] | str, frm: S, to: S, reason: str) -> S:
    """Returns `to` if the table has the move; raises ImpossibleTransition otherwise.

    `story` is what happened so far, or the name of the thing where its story lies in the store; it goes into the
    message.
    """
    if may(frm, to):
        return to
    what = type(frm).__name__.removesuffix("State").lower()
    told = story if isinstance(story, str) else "; ".join(_line(step, story[0].at_ms) for step in story)
    raise ImpossibleTransition(
        f"a {what} cannot go from {frm.value} to {to.value} ({reason}); so far: {told or 'nothing'}",
        hint="this is a defect of clawnet: please report it with this message",
    )


def _line(step: Step, start_ms: int) -> str:
    why = f" ({step.reason})" if step.reason else ""
    return f"+{step.at_ms - start_ms} ms {step.state}{why}"


def mermaid(machine: str) -> str:
    """The diagram of a machine ("task", "attempt", "job") as mermaid text, in the order of its states."""
    table = MACHINES[machine]
    states = list(type(next(iter(table))))
    lines = ["stateDiagram-v2", f"    [*] --> {states[0].value}"]
    for state in states:
        targets = table.get(state, frozenset())
        lines.extend(f"    {state.value} --> {to.value}" for to in states if to in targets)
        if state not in table:
            lines.append(f"    {state.value} --> [*]")
    return "\n".join(lines) + "\n"


def transition_rows(machine: str) -> list[tuple[str, list[str]]]:
    """The table of a machine as words, for docs: each state and where it may go (nothing: it is final)."""
    table = MACHINES[machine]
    states = list(type(next(iter(table))))
    return [(state.value, [to.value for to in states if to in table.get(state, frozenset())]) for state in states]
