"""Acceptance contracts between node and execution: what is judged, what a verdict does to task and reputation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clawnet.errors import ClawnetError, ExecutorLostError, StorageFullError, VerificationError, WireError
from clawnet.ledger import taskdoc
from clawnet.market import contracts
from clawnet.market.capability import SHELL
from clawnet.market.reasons import Reason
from clawnet.market.records import FINAL_STATES, Attempt, Task
from clawnet.node.awards import about
from clawnet.node.context import Context
from clawnet.reputation.receipts import Outcome
from clawnet.wire import verdict as v
from clawnet.wire.events import STORAGE, Opened, StopJudging
from clawnet.wire.jobspec import InputRef
from clawnet.wire.messages import PeerCard

if TYPE_CHECKING:
    from clawnet.node.kernel import Rooms

WORD_OF = {kind: word for word, kind in contracts.WORDS.items()}


def _conditions(document: taskdoc.TaskDocument) -> list[tuple[str, bytes]]:
    return [(one.kind, one.value) for one in document.acceptance]


def checks_of(document: taskdoc.TaskDocument) -> tuple[v.Check, ...]:
    """What a result of this document is judged by; raises WireError for a contract that nobody can judge."""
    if not document.acceptance:
        return ()
    inputs = {item.name: InputRef(item.name, item.kind, item.blob, item.bytes, item.mode) for item in document.inputs}
    return contracts.checks(_conditions(document), inputs)


def files_of(document: taskdoc.TaskDocument) -> list[InputRef]:
    """The inputs that are the task's own: all but the verifier modules."""
    hidden = contracts.verifier_names(_conditions(document)) if document.acceptance else ()
    inputs = [InputRef(item.name, item.kind, item.blob, item.bytes, item.mode) for item in document.inputs]
    return [item for item in inputs if item.name not in hidden]


def cannot_judge(document: taskdoc.TaskDocument, ring: str, card: PeerCard) -> Reason | None:
    """Why the node of `card` takes no task with this contract from `ring`: it cannot, or may not, run its verifier."""
    try:
        kinds = {one.kind for one in checks_of(document)}
    except WireError:
        return Reason.NO_CAPABILITY
    if v.VERIFIER_COMMAND in kinds:
        if SHELL not in card.capabilities:
            return Reason.NO_CAPABILITY
        if ring not in card.shell_rings:
            return Reason.POLICY
    if v.VERIFIER_WASM in kinds and contracts.WASM not in card.capabilities:
        return Reason.NO_CAPABILITY
    return None


def _accept(task: Task) -> list[dict[str, Any]]:
    """The conditions of a task, also of one from before there were any."""
    return task.spec.get("accept") or []


class Verdicts:
    """The requester's side: reports of executors, and what the own judgement of an opened result says."""

    def __init__(self, ctx: Context, rooms: Rooms) -> None:
        self._ctx = ctx
        self._rooms = rooms

    # --- judged by the executor

    def sent_back(self, task: Task, attempt: Attempt, report: bytes) -> None:
        """The executor says that its result did not pass (LEDGER.md section 6, acceptance): the slot moves, or the task
        has failed. That is the task's fault by its word alone; a word that tells of no such condition is its own."""
        try:
            verdict = v.decode_report(report, len(_accept(task)))
        except WireError as error:
            self._ctx.log("security", "report.refused", peer=attempt.peer, reason=error.message)
            attempt.reason = "contract: by a report that tells of no condition of it"
            outcome = Outcome.FAILED
        else:
            attempt.report = v.encode_report(verdict)
            attempt.reason = f"contract: {self._sentence(task, verdict)}"
            outcome = Outcome.TASK_FAULT
        self._rooms.members.receipt(attempt, outcome, task)
        self._rooms.awards.move_slot(task, attempt, attempt.reason)

    def given_up(self, task: Task, attempt: Attempt, why: str) -> ClawnetError:
        """The error of a task that this attempt was the last of: its report, where its result did not pass."""
        name = self._rooms.members.name_of(attempt.peer)
        if attempt.report:
            return VerificationError(
                f"the result of {name} did not pass: {why.removeprefix('contract: ')}",
                hint="nothing was paid for it; clawnet market show tells more",
            )
        return ExecutorLostError(f"{name} did not finish the task: {why}", hint="clawnet market show tells more")

    def nobody_left(self, task: Task) -> ClawnetError | None:
        """The error of a task that nobody takes any more after a result of it did not pass."""
        if not task.attempts or not task.attempts[-1].report:
            return None
        return self.given_up(task, task.attempts[-1], task.attempts[-1].reason + "; nobody else takes the task")

    # --- judged here

    def acceptance(self, task: Task, attempt: Attempt) -> tuple[v.Check, ...]:
        """What the opened result is judged by here: nothing where this node itself did so before it delivered."""
        document = self._rooms.awards.documents.get(task.task_id)
        if not _accept(task) or document is None or attempt.peer == self._ctx.me or task.state in FINAL_STATES:
            return ()
        return checks_of(taskdoc.decode(document))

    def opened(self, task: Task, attempt: Attempt, event: Opened) -> tuple[ClawnetError | None, Outcome]:
        """What an opened result means: the error that its task ends with, if any, and what it says of its executor."""
        name = self._rooms.members.name_of(attempt.peer)
        hint = "it was paid, and the proof is kept with the task" if attempt.released_ucr else "nothing was paid for it"
        if event.fault == STORAGE:
            text = f"the result of {name} is here and cannot be stored: {event.reason}"
            return StorageFullError(text, hint="make room on the disk; the sealed result is kept"), Outcome.TASK_FAULT
        if event.reason:
            return VerificationError(
                f"the result of {name} does not open: {event.reason}", hint=hint
            ), Outcome.BAD_RESULT
        if event.verdict:
            attempt.report = v.encode_report(event.verdict)
        failed = v.failure(event.verdict)
        if failed is None:
            return None, Outcome.SETTLED
        attempt.reason = f"contract: {self._sentence(task, event.verdict)}"
        text = f"{name} delivered what does not pass here: {attempt.reason.removeprefix('contract: ')}"
        # A verifier that came to no verdict here says nothing of the executor, where it had come to one.
        outcome = Outcome.TASK_FAULT if failed.outcome == "broken" else Outcome.BAD_RESULT
        return VerificationError(text, hint=hint), outcome

    def task_final(self, task: Task) -> None:
        """What judges a result that nobody waits for any longer is stopped."""
        for attempt in task.attempts:
            if attempt.state == "claimed" and not attempt.closed and _accept(task):
                self._ctx.out.append(StopJudging(about(task.task_id, attempt.n)))

    # --- in words

    @staticmethod
    def _sentence(task: Task, verdict: v.Verdict) -> str:
        failed = v.failure(verdict)
        assert failed is not None
        return contracts.sentence(_accept(task)[failed.n]["text"], failed)

    def view(self, task: Task, attempt: Attempt | None) -> list[dict[str, Any]]:
        """The contract's conditions and how they came out for the attempt that stands for the task."""
        accept = _accept(task)
        if not accept:
            return []
        found: dict[int, v.Judged] = {}
        if attempt is not None and attempt.report:
            found = {one.n: one for one in v.decode_report(attempt.report, len(accept), failed=False)}
        delivered = attempt is not None and task.result is not None
        return [self._shown(one, found.get(n), delivered, task.state) for n, one in enumerate(accept)]

    @staticmethod
    def _shown(accept: dict[str, Any], one: v.Judged | None, delivered: bool, state: str) -> dict[str, Any]:
        outcome, by, detail = "pending" if state not in FINAL_STATES else "not_judged", None, ""
        if one is not None and one.outcome != "skipped":
            outcome, by, detail = one.outcome, "requester" if delivered else "executor", one.detail
        elif delivered:
            outcome, by, detail = "passed", "executor", "" if one is None else f"not judged again here: {one.detail}"
        return {
            "kind": WORD_OF.get(accept["kind"], accept["kind"]),
            "value": accept["text"],
            "outcome": outcome,
            "judged_by": by,
            "detail": detail,
            "stderr": "" if one is None else one.stderr.decode("utf-8", "replace"),
        }
