"""The delivered result on the requester's side: note checked, sealed bytes stored, released, opened, kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clawnet import limits
from clawnet.errors import RemoteError
from clawnet.identity.keys import verify
from clawnet.ledger import statements
from clawnet.ledger.entries import ReleaseItem
from clawnet.ledger.seal import content_key
from clawnet.market import usage
from clawnet.market.records import FINAL_STATES, Attempt, Task
from clawnet.node import saving
from clawnet.node.awards import about, note_cost
from clawnet.node.context import Context, held_as, job_id
from clawnet.node.views import SMALL_STREAMS_BYTES, written
from clawnet.reputation.receipts import Outcome
from clawnet.wire.blobid import blob_id
from clawnet.wire.events import CONTENT, STORAGE, BlobReady, MessageIn, Open, Opened
from clawnet.wire.messages import Accept, Cancel, Kind, Result

if TYPE_CHECKING:
    from clawnet.node.kernel import Rooms

RESULT = saving.RESULT


class Results:
    """What comes back from executors. `sealed` holds inline results between their storing and their opening."""

    def __init__(self, ctx: Context, rooms: Rooms) -> None:
        self._ctx = ctx
        self._rooms = rooms
        self.sealed: dict[bytes, bytes] = {}
        self._tries: dict[bytes, int] = {}

    def result(self, event: MessageIn, message: Result) -> None:
        """The sealed result (LEDGER.md section 6, step 5), or in ring own the plain one."""
        found = self._rooms.awards.find(event, message.task_id, message.attempt)
        if found is None:
            self._rooms.awards.acknowledge(event)
            return
        task, attempt = found
        if attempt.state in ("awarded", "locked"):
            self._rooms.awards.accept(event, Accept(message.task_id, message.attempt))
        if attempt.state != "accepted":
            if attempt.state not in ("delivering", "fetching"):
                self._rooms.awards.acknowledge(event)
            return
        self._rooms.outbox.settle(Kind.TASK_CANCEL, event.peer, about(task.task_id, attempt.n))
        reason = self._bytes_wrong(task, message) or (
            self._note_wrong(attempt, message) if attempt.lock_seq >= 0 else ""
        )
        if reason:
            self._rooms.awards.acknowledge(event)
            self._refused(task, attempt, f"its result was refused: {reason}", Outcome.BAD_RESULT)
            return
        attempt.delivered_ms = attempt.heard_ms = self._ctx.now
        attempt.waiver = message.waiver
        note_cost(attempt, message, self._ctx.now)
        attempt.inline, attempt.blob, attempt.blob_bytes = bool(message.inline), message.blob, message.blob_bytes
        if message.inline:
            self.stored(task, attempt, message.inline)
            if attempt.lock_seq < 0:
                self._rooms.awards.acknowledge(event)
        else:
            self.fetch(task, attempt)
        self._rooms.tasks.touch(task)
        self._rooms.leases.arm(task)

    def _note_wrong(self, attempt: Attempt, message: Result) -> str:
        """Why nothing can be released for this note; "" when it is the payee's word for this line and these bytes."""
        try:
            keys = self._rooms.books.keys_of(attempt.account)
            note = statements.Note.verified_by_any(message.note, keys, verify)
        except RemoteError as error:
            return error.message
        place = (self._rooms.books.mesh, self._ctx.account, attempt.lock_hash, attempt.line, 1)
        if (note.mesh, note.payer, note.lock_hash, note.line, note.part) != place:
            return "the note is of another line"
        if not 0 < note.amount_ucr <= attempt.price_ucr:
            return "the note asks more than is bound"
        if (note.ct_hash, note.ct_bytes) != (message.blob, message.blob_bytes):
            return "the note is of other bytes"
        if note.amount_ucr < attempt.price_ucr and not self._rest_waived(attempt, message.waiver):
            return "the note asks less than is bound, and gives the rest not back"
        attempt.note, attempt.key_hash, attempt.released_ucr = message.note, note.key_hash, note.amount_ucr
        return ""

    def _rest_waived(self, attempt: Attempt, waiver: bytes) -> bool:
        """Whether this frees what of the line is not paid; else that stays bound, and counts as open, to its end."""
        books = self._rooms.books
        try:
            terms = statements.Waiver.verified_by_any(waiver, books.keys_of(attempt.account), verify)
        except RemoteError:
            return False
        bound = (books.mesh, self._ctx.account, attempt.lock_hash, attempt.line, 1)
        return (terms.mesh, terms.payer, terms.lock_hash, terms.line, terms.after_part) == bound

    def fetch(self, task: Task, attempt: Attempt) -> None:
        """Fetches the sealed blob, which is checked against its id chunk by chunk, and holds it until it is opened."""
        ctx = self._ctx
        attempt.state = "fetching"
        award = job_id(ctx.me, task.task_id, attempt.n)
        ctx.hold(held_as(award, "sealed"), attempt.blob)
        blobs = ((attempt.blob, attempt.blob_bytes),)
        self._rooms.fetches.begin(_request(task, attempt), attempt.peer, award, blobs, patient=True)

    def forget(self, task: Task, attempt: Attempt) -> None:
        """The attempt is closed: its sealed bytes are not needed any more."""
        self.sealed.pop(about(task.task_id, attempt.n), None)
        if not attempt.inline and attempt.blob:
            self._rooms.fetches.forget(_request(task, attempt))
            self._ctx.let_go(held_as(job_id(self._ctx.me, task.task_id, attempt.n), "sealed"))

    def blob_ready(self, event: BlobReady) -> None:
        """The sealed blob is here and synced, or cannot be had."""
        found = self._rooms.awards.of_about(event.request[len(RESULT) :])
        if found is None or found[1].state != "fetching":
            return
        task, attempt = found
        if event.reason:
            ours = event.fault == STORAGE
            outcome = Outcome.BAD_RESULT if event.fault == CONTENT else None if ours else Outcome.LOST
            self._refused(task, attempt, f"its result could not be fetched: {event.reason}", outcome)
            return
        self.stored(task, attempt, b"")
        self._rooms.tasks.touch(task)
        self._rooms.leases.arm(task)

    def holder_away(self, request: bytes) -> None:
        """Whoever holds a result that is being fetched has gone: its lease begins now."""
        found = self._rooms.awards.of_about(request[len(RESULT) :]) if request.startswith(RESULT) else None
        if found is not None and found[1].state == "fetching":
            found[1].heard_ms = self._ctx.now
            self._rooms.leases.arm(found[0])

    def withheld(self, task: Task, attempt: Attempt, why: str) -> None:
        """Its executor stayed away for longer than its lease, and another one may do the task."""
        self._refused(task, attempt, why, Outcome.LOST)

    def _refused(self, task: Task, attempt: Attempt, why: str, outcome: Outcome | None) -> None:
        """What this executor delivered is none: nothing is released for it, and a line comes back at its expiry."""
        rooms = self._rooms
        self._ctx.log("security", "result.refused", peer=attempt.peer, task=task.task_id.hex(), reason=why)
        if outcome is not None:
            rooms.members.receipt(attempt, outcome, task)
        held = attempt.paying
        if attempt.lock_seq < 0:
            rooms.awards.close(task, attempt, "lost", why)
        else:
            self.forget(task, attempt)
            attempt.state, attempt.reason = "unpaid", why
        if held:
            rooms.awards.move_slot(task, attempt, why)
        rooms.tasks.touch(task)
        rooms.leases.arm(task)

    def trouble(self, task: Task) -> str:
        """Why the result that this task waits for could not be fetched so far; empty when nothing stands in the way."""
        attempt = task.paying
        return self._rooms.fetches.trouble(_request(task, attempt)) if attempt is not None else ""

    def stored(self, task: Task, attempt: Attempt, inline: bytes) -> None:
        """The sealed result is durable with this turn: with a lock the release is written beside it."""
        ctx, rooms = self._ctx, self._rooms
        if inline:
            ctx.put("results", task.task_id, attempt.n, inline)
            self.sealed[about(task.task_id, attempt.n)] = inline
        if attempt.paying and task.state in ("awarded", "executing"):
            if task.state == "awarded":
                rooms.tasks.move(task, "executing", "accepted")
            rooms.tasks.move(task, "delivered", "result received")
        if attempt.lock_seq < 0:
            rooms.awards.remembered(task, attempt)
            if not attempt.paying:
                rooms.awards.close(task, attempt, "unpaid", "another attempt has the task")
                return
            attempt.state = "claimed"
            self.open(task, attempt)
        elif not attempt.paying:
            attempt.state = "unpaid"
            name = about(task.task_id, attempt.n)
            rooms.outbox.oblige(attempt.peer, Cancel(task.task_id, attempt.n, "slot moved"), name)
        else:
            attempt.state = "delivering"
            item = ReleaseItem(
                attempt.lock_seq,
                attempt.line,
                1,
                attempt.released_ucr,
                attempt.key_hash,
                statements.note_hash(attempt.note),
            )
            rooms.books.release(task, attempt, item)

    def released(self, task: Task, attempt: Attempt, seq: int) -> None:
        """The release is in the own chain, in the transaction that holds the sealed result."""
        attempt.state, attempt.escrow, attempt.released_seq = "released", "released", seq
        self._rooms.spending.paid(task, attempt)
        self._rooms.history.about(seq, task.task_id, attempt.n, attempt.released_ucr)
        if attempt.released_ucr < attempt.price_ucr and attempt.waiver:
            self._rooms.books.refund(task, attempt, attempt.waiver)
        self._rooms.tasks.touch(task)
        self._rooms.leases.arm(task)

    def claimed(self, task: Task, attempt: Attempt, key: bytes) -> None:
        """The executor's claim is in its valid chain; the key in it opens the result."""
        if attempt.state != "released":
            return
        attempt.state, attempt.escrow, attempt.key = "claimed", "claimed", key
        self._rooms.tasks.touch(task)
        self.open(task, attempt)

    def open(self, task: Task, attempt: Attempt) -> None:
        """Unseals what was delivered, from memory, from its row, or from its blob."""
        name = about(task.task_id, attempt.n)
        inline = self.sealed.pop(name, b"")
        key = content_key(attempt.key, task.secret) if attempt.key else None
        if not inline and attempt.inline:
            self._rooms.loads.ask("result", (task.task_id, attempt.n), lambda rows: self._reopen(name, rows))
            return
        acceptance = self._rooms.verdicts.acceptance(task, attempt)
        outputs = tuple(task.spec.get("outputs") or ())
        self._ctx.out.append(
            Open(name, key, inline, attempt.blob, attempt.blob_bytes, acceptance, outputs, saving.most(self._ctx))
        )

    def _reopen(self, name: bytes, rows: tuple[object, ...]) -> None:
        found = self._rooms.awards.of_about(name)
        if found is None:
            return
        task, attempt = found
        row = rows[0] if rows else None
        if not isinstance(row, tuple):
            self._ctx.log("error", "result.missing", task=task.task_id.hex())
            return
        self.sealed[name] = row[-1]
        self.open(task, attempt)

    def opened(self, event: Opened) -> None:
        """The outcome is known; the task is settled, or the proof against the executor is kept."""
        found = self._rooms.awards.of_about(event.request)
        if found is None or found[1].state != "claimed":
            return
        task, attempt = found
        rooms = self._rooms
        if event.fault == STORAGE and self._again(event.request):
            self._ctx.log("warn", "result.cannot_be_stored", task=task.task_id.hex(), reason=event.reason)
            return
        self._tries.pop(event.request, None)
        error, outcome = rooms.verdicts.opened(task, attempt, event)
        if error is not None and not attempt.inline:
            self._ctx.hold(task.task_id, attempt.blob)  # sealed as it came, it is part of the proof
        rooms.awards.close(task, attempt, "done", event.reason)
        if task.state not in FINAL_STATES:
            rooms.members.receipt(attempt, outcome, task)
            self._keep(task, attempt, event.bundle, proof=error is not None)
            rooms.tasks.move(task, "verified", attempt.reason if error is not None else "opened")
            rooms.tasks.finish(task, "settled", error)
        elif event.bundle is not None and task.result is None:
            self._keep(task, attempt, event.bundle, proof=error is not None)
        rooms.tasks.touch(task)

    def _again(self, name: bytes) -> bool:
        """There is no room here for what is in the result: later there may be, so often and no more."""
        tries = self._tries[name] = self._tries.get(name, 0) + 1
        if tries >= limits.FETCH_TRIES_MAX:
            return False
        wait_ms = min(limits.FETCH_AGAIN_MIN_MS << (tries - 1), limits.FETCH_AGAIN_MAX_MS)
        self._ctx.wake(("open", name), self._ctx.now + wait_ms)
        return True

    def timer(self, name: bytes) -> None:
        """The pause before a result is opened again is over."""
        found = self._rooms.awards.of_about(name)
        if found is not None and found[1].state == "claimed":
            self.open(*found)

    def _keep(self, task: Task, attempt: Attempt, bundle: Any, *, proof: bool) -> None:
        """The opened result: small output in the task's row, larger in a row of its own in place of the sealed one.

        As a proof the sealed one stays beside it.
        """
        if bundle is None:
            return
        ctx = self._ctx
        for blob in (bundle.stdout_blob, bundle.stderr_blob, bundle.outputs_blob):
            if blob:
                ctx.hold(task.task_id, blob)
        result = {name: getattr(bundle, name) for name in bundle.__struct_fields__}
        result["attempt"] = attempt.n
        told = {name: getattr(bundle.usage, name) for name in bundle.usage.__struct_fields__}
        result["usage"] = usage.kept(told, (ctx.now - attempt.awarded_ms) / 1000)
        attempt.output_bytes = written(result)
        stdout, stderr = result["stdout"], result["stderr"]
        row = attempt.n + limits.ATTEMPTS_MAX if proof else attempt.n
        if stdout is None or stderr is None:
            if not proof:
                ctx.delete("results", task.task_id, attempt.n)
        elif len(stdout) + len(stderr) <= SMALL_STREAMS_BYTES:
            if attempt.inline and not proof:
                ctx.delete("results", task.task_id, attempt.n)
        else:
            result["stdout"] = result["stderr"] = None
            result["row"] = row
            ctx.put("results", task.task_id, row, len(stdout).to_bytes(4, "big") + stdout + stderr)
            self._rooms.views.keep_streams(task.task_id, stdout, stderr)
        task.result = result

    def _bytes_wrong(self, task: Task, message: Result) -> str:
        """Why these are no sealed bytes of a result: inline ones must be the blob that the message names."""
        bytes_max = saving.result_most(self._ctx, task)
        if not 0 < message.blob_bytes <= bytes_max:
            return f"it has {message.blob_bytes} bytes, and at most {bytes_max} are taken"
        if message.inline and (len(message.inline), blob_id(message.inline)) != (message.blob_bytes, message.blob):
            return "the bytes are not those named"
        return ""


def _request(task: Task, attempt: Attempt) -> bytes:
    return RESULT + about(task.task_id, attempt.n)
