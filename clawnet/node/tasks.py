"""The requester's register: submissions, states, followers, final states. Auctions and awards move tasks through it."""

from __future__ import annotations

import base64
import hashlib
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct, field

from clawnet import limits
from clawnet.errors import (
    BusyError,
    CancelledError,
    ClawnetError,
    DataError,
    FundsError,
    from_dict,
)
from clawnet.ledger.taskdoc import Condition, TaskDocument, TaskInput, task_hash
from clawnet.ledger.taskdoc import encode as encode_document
from clawnet.market import contracts, taskspec
from clawnet.market.records import FINAL_STATES, Task, decode_task, encode
from clawnet.market.states import TASK_MOVES, TaskState, advance
from clawnet.money import format_credits
from clawnet.node import saving
from clawnet.node.approvals import is_held
from clawnet.node.context import Context, held_as
from clawnet.node.output import Followers, Start
from clawnet.wire.events import GrantBlob, InputsReady, PackInputs

if TYPE_CHECKING:
    from clawnet.node.kernel import Rooms

LATER = frozenset(("accept", "fuel", "module", "outputs", "stdin_input", "wasm"))
"""Fields that came after the first: where they say nothing, content is the same as it was without them."""
UNLIKE = frozenset(("gitignore", "idempotency_key", "stream"))
"""Fields that say nothing about the content: what git ignores shows in the bytes of the inputs."""
FINISHED_KEPT_MAX = 512
MOVES_KEPT_MAX = 16


class _Draft(Struct):
    """A submission on its way: its inputs are being read, or the task of its key is looked for."""

    call: int
    task_id: bytes
    spec: dict[str, Any]
    retry_before_ms: int
    credential: str
    awaited: bool
    told: bool = False
    inputs: list[dict[str, Any]] = field(default_factory=list)


class Tasks:
    """Open tasks by id, the newest finished ones, and whoever waits for them."""

    def __init__(self, ctx: Context, rooms: Rooms) -> None:
        self._ctx = ctx
        self._rooms = rooms
        self.open: dict[bytes, Task] = {}
        self.finished: OrderedDict[bytes, Task] = OrderedDict()
        self._by_hash: dict[bytes, bytes] = {}
        self.keys: dict[str, bytes] = {}
        self.followers = Followers(ctx, self.open.get, lambda call, task: ctx.reply(call, rooms.views.task(task)))
        self._drafts: dict[bytes, _Draft] = {}
        self._dirty: dict[bytes, Task] = {}
        self._ended: dict[bytes, Task] = {}
        self._unsettled: dict[bytes, None] = {}

    # --- loading and saving

    def load(self, body: bytes) -> Task:
        """Takes in an unfinished task at start-up."""
        task = decode_task(body)
        self.open[task.task_id] = task
        self._by_hash[task.task_hash] = task.task_id
        self._rooms.spending.load_task(task)
        if task.state in FINAL_STATES:
            self._unsettled[task.task_id] = None
        over = task.state in FINAL_STATES and not (task.state == "settled" and task.result is not None)
        if task.spec["idempotency_key"] and not over:
            self.keys[task.spec["idempotency_key"]] = task.task_id
        return task

    def resume(self, task: Task) -> None:
        """Goes on with a loaded task: before an award the auction is held again, after it the attempt's timers run."""
        if is_held(task):
            self._rooms.approvals.resume(task)
        elif task.state in ("draft", "announced", "bidding", "reassigned"):
            self._rooms.auctions.queue(task)
        self._rooms.awards.resume(task)

    def touch(self, task: Task) -> None:
        """The task changed; its row is written once at the end of the turn."""
        self._dirty[task.task_id] = task

    def flush(self) -> None:
        """Answers who waits for tasks that ended, and writes the rows of all that changed in this turn.

        The entries of the turn are written by now: the answer tells what has become of the escrow.
        """
        ctx = self._ctx
        if not self._dirty and not self._ended:
            return
        for task in self._ended.values():
            self.answer(task)
        self._ended.clear()
        for task in self._dirty.values():
            task.updated_ms = ctx.now
            if task.moves and (task.state in FINAL_STATES or len(task.moves) >= MOVES_KEPT_MAX):
                for n, at_ms, state, reason in task.moves:
                    ctx.put("transitions", task.task_id, n, at_ms, state, reason)
                task.moves.clear()
            ctx.put(
                "tasks",
                task.task_id,
                task.state,
                task.created_ms,
                task.updated_ms,
                task.spec["idempotency_key"],
                encode(task),
            )
            if task.state not in FINAL_STATES:
                continue
            if not self._settled_up(task):
                if task.task_id not in self._unsettled:
                    self._unsettled[task.task_id] = None
                    ctx.put("unsettled", task.task_id)
                continue
            if task.task_id in self._unsettled:
                del self._unsettled[task.task_id]
                ctx.delete("unsettled", task.task_id)
            if self.open.pop(task.task_id, None) is not None:
                ctx.sleep(("task", task.task_id))
                self.finished[task.task_id] = task
                while len(self.finished) > FINISHED_KEPT_MAX:
                    old = self.finished.popitem(last=False)[1]
                    self._forget_key(old)
                    self._by_hash.pop(old.task_hash, None)
        self._dirty.clear()

    @staticmethod
    def _settled_up(task: Task) -> bool:
        """True when no attempt still has an open line or an answer owed."""
        return all(attempt.closed for attempt in task.attempts)

    def get(self, task_id: bytes) -> Task | None:
        """A task held in memory: open, or finished lately."""
        return self.open.get(task_id) or self.finished.get(task_id)

    def task_of_hash(self, wanted: bytes) -> str | None:
        """The id of the open or lately finished task with this salted hash."""
        task_id = self._by_hash.get(wanted)
        return None if task_id is None else task_id.hex()

    # --- states

    def move(self, task: Task, state: str, reason: str = "") -> None:
        """One transition, with its time and reason; an impossible one raises (a defect of ours)."""
        if state not in TASK_MOVES.get(task.state, ()):
            advance(task.task_id.hex(), TaskState(task.state), TaskState(state), reason)
        ctx = self._ctx
        task.state = state
        task.transitions += 1
        task.moves.append((task.transitions, ctx.now, state, reason))
        self.touch(task)
        self.followers.state(task.task_id, state, reason, ctx.now)

    def finish(self, task: Task, state: str, error: ClawnetError | None = None, reason: str = "") -> None:
        """The final state; everybody who waits gets the task, and its place in the auction queue is free."""
        if task.state in FINAL_STATES:
            return
        if error is not None:
            task.error_code, task.error_text, task.error_hint = error.code, error.message, error.hint
        else:
            task.error_code = task.error_text = task.error_hint = ""
        self.move(task, state, reason or task.error_code)
        self._ctx.count("tasks_total", state)
        self._rooms.auctions.drop(task)
        self._rooms.approvals.drop(task)
        if state != "settled" or task.result is None:
            self._forget_key(task)
        self._ended[task.task_id] = task
        self._rooms.awards.task_final(task)

    def _forget_key(self, task: Task) -> None:
        """The key no longer stands for this task, or the database alone knows that it does."""
        key = task.spec["idempotency_key"]
        if key and self.keys.get(key) == task.task_id:
            del self.keys[key]

    def answer(self, task: Task) -> None:
        """Gives the task as it stands to everybody who waits for its end."""
        view = self._rooms.views.task(task)
        streams = self._rooms.views.streams.get(task.task_id)
        for call in self.followers.finish(task, streams):
            self._ctx.reply(call, view)

    # --- submissions

    def normal(self, spec: Any) -> dict[str, Any]:
        """A submission with every default filled in and peers by their ids; raises what is wrong with it."""
        found = taskspec.normalise(spec, self._ctx.config, family=self._rooms.jobs.os_family)
        for named in ("peer", "exclude"):
            found[named] = [self._rooms.members.resolve(name) for name in found[named]]
        return found

    def submit(
        self, call: int, spec: dict[str, Any], retry_before_ms: int = 0, *, awaited: bool = False, told: bool = False
    ) -> None:
        """Accepts a submission, or answers with the error that says what is wrong with it.

        A finished task of the same idempotency key stands for it, unless its command failed and it was submitted
        before `retry_before_ms`: then the key passes on to the new task. The answer outlives a power loss, unless the
        caller says that it stays until the end (`awaited`) and gives no key: then it would go down with this machine
        anyway, and nobody could ask for the same again. `told`: the call hears how far its inputs are stored.
        """
        ctx = self._ctx
        if ctx.draining:
            raise BusyError("the daemon is stopping and takes no new task", hint="try again when it is back")
        if len(self.open) + len(self._drafts) >= limits.OPEN_TASKS_MAX:
            raise BusyError(f"{limits.OPEN_TASKS_MAX} tasks are open already", hint="try again when some have ended")
        draft = _Draft(call, ctx.entropy(16), self.normal(spec), retry_before_ms, ctx.credential, awaited, told)
        schemas = contracts.schemas(draft.spec)
        if not draft.spec["inputs"] and not schemas:
            self._look_up(draft)
            return
        if not draft.spec["idempotency_key"]:
            self._budget(draft.spec)  # no file is copied for what cannot be paid
        request = b"inputs:" + draft.task_id
        self._drafts[request] = draft
        paths = tuple((item["name"], item["path"]) for item in draft.spec["inputs"])
        ctx.out.append(PackInputs(request, paths, schemas, draft.spec["gitignore"]))

    def inputs_ready(self, event: InputsReady) -> None:
        """The input files are stored (or cannot be read): the submission is accepted (or refused) now."""
        draft = self._drafts.pop(event.request, None)
        if draft is None:
            return
        if event.error is not None:
            raise from_dict(event.error)
        ctx = self._ctx
        ctx.credential = draft.credential
        draft.inputs = list(event.inputs)
        for item in draft.inputs:
            ctx.out.append(GrantBlob(held_as(draft.task_id, "inputs"), ctx.me, item["blob"]))
        if any(item["name"] == draft.spec["stdin_input"] and item["kind"] != "file" for item in draft.inputs):
            self._drop(draft)
            raise DataError("stdin_path names a directory, and standard input is a file", field="stdin_path")
        size = sum(int(item["bytes"]) for item in draft.inputs)
        if size > limits.INPUT_BYTES_MAX:
            self._drop(draft)
            raise DataError(
                f"the inputs are {size} bytes, above the limit of {limits.INPUT_BYTES_MAX}",
                hint="send less, or in several tasks",
            )
        self._look_up(draft)

    def _drop(self, draft: _Draft) -> None:
        """Its inputs are of no use: it became no task."""
        if draft.inputs:
            self._ctx.let_go(held_as(draft.task_id, "inputs"))

    def _look_up(self, draft: _Draft) -> None:
        """The task that has this key already, else a new one."""
        key = draft.spec["idempotency_key"]
        try:
            if not key:
                self._begin(draft)
            elif not self._known(draft):
                # Of the finished tasks only the newest are held in memory; the database knows the others.
                self._rooms.loads.ask("task_by_key", (key,), lambda rows: self._looked_up(draft, rows), draft.call)
        except ClawnetError:
            self._drop(draft)
            raise

    def _known(self, draft: _Draft) -> bool:
        """Whether the task of this key is at hand; then it is the answer."""
        known = self.keys.get(draft.spec["idempotency_key"])
        task = self.get(known) if known is not None else None
        return task is not None and self._stands(draft, task)

    def _looked_up(self, draft: _Draft, rows: tuple[Any, ...]) -> None:
        """The tasks of this key, newest first; meanwhile another call may have brought one."""
        try:
            if self._known(draft):
                return
            settled = (decode_task(row[-1]) for row in rows if row[1] == "settled")
            task = next((task for task in settled if task.result is not None), None)
            if task is None or not self._stands(draft, task):
                self._begin(draft)
        except ClawnetError:
            self._drop(draft)
            raise

    def _stands(self, draft: _Draft, task: Task) -> bool:
        """Answers with the task that has this key already; False when it failed and is to be tried again."""
        result = task.result or {}
        failed = task.error_code or result.get("exit_code") or result.get("signal")
        if task.state in FINAL_STATES and failed and task.created_ms < draft.retry_before_ms:
            return False
        key = draft.spec["idempotency_key"]
        if task.content != self.content_hash(draft.spec, draft.inputs):
            raise DataError(
                f"the idempotency key {key!r} belongs to another task ({task.task_id.hex()[:8]})",
                hint="use a new key for new content",
                task_id=task.task_id.hex(),
            )
        self._drop(draft)
        self._submitted(draft.call, task, created=False)
        return True

    def _submitted(self, call: int, task: Task, *, created: bool) -> None:
        deadline = self._rooms.views.time(task.deadline_ms)
        held = self._rooms.approvals.view(task)
        told = {"task_id": task.task_id.hex(), "created": created, "deadline": deadline, "held": held}
        self._ctx.reply(call, {**told, **saving.left_behind(task.inputs)})

    def _budget(self, normal: dict[str, Any]) -> tuple[list[str], int]:
        """The rings to ask, and the most that may be paid; raises what the balance or a spend limit forbids."""
        stages = taskspec.stages(normal, self._ctx.config)
        available = self._rooms.books.available()
        if normal["budget_given"] and "member" in stages and normal["budget_ucr"] > available:
            raise FundsError(
                f"the budget of {format_credits(normal['budget_ucr'])} is above the balance of "
                f"{format_credits(available)}",
                hint="lower --budget, or --ring own to use your own machines at no price",
            )
        budget_ucr = normal["budget_ucr"]
        if "member" in stages:
            budget_ucr = self._rooms.spending.check_submission(normal["type"], budget_ucr, normal["budget_given"])
        return stages, budget_ucr

    def _begin(self, draft: _Draft) -> None:
        """A new task."""
        ctx, normal = self._ctx, draft.spec
        stages, budget_ucr = self._budget(normal)
        deadline_ms = ctx.now + taskspec.seconds_to_ms(normal["deadline_s"])
        held = self._rooms.approvals.reason(normal["type"], stages, budget_ucr)
        task = Task(
            task_id=draft.task_id,
            created_ms=ctx.now,
            kind=normal["type"],
            description=normal["description"] or self._describe(normal),
            spec=normal,
            secret=ctx.entropy(32),
            deadline_ms=deadline_ms,
            max_budget_ucr=budget_ucr,
            stages=stages,
            credential=draft.credential,
            retries_left=normal["retries"],
            content=self.content_hash(normal, draft.inputs) if normal["idempotency_key"] else "",
            inputs=draft.inputs,
            input_bytes=sum(int(item["bytes"]) for item in draft.inputs),
            held_until_ms=self._rooms.approvals.until_ms(deadline_ms) if held else 0,
            held_reason=held,
        )
        self._accept(draft.call, task)
        if not draft.awaited or normal["idempotency_key"]:
            ctx.durable()

    @staticmethod
    def _describe(spec: dict[str, Any]) -> str:
        if spec["op"]:
            return f"compute {spec['op']}"
        words = [*(["wasm"] if spec["module"] else []), *(spec["argv"] or [])]
        text = " ".join(words) if words else str(spec["script"] or "")
        return text if len(text) <= 200 else text[:197] + "..."

    @staticmethod
    def content_hash(spec: dict[str, Any], inputs: list[dict[str, Any]]) -> str:
        """What "same content" means for an idempotency key: everything but the key; of inputs their bytes, no paths."""
        stable = {k: v for k, v in spec.items() if k not in UNLIKE and (v or k not in LATER)}
        stable["inputs"] = [[item["name"], item["kind"], item["blob"].hex(), item.get("mode", 0)] for item in inputs]
        return hashlib.sha256(msgspec.json.encode(stable, order="deterministic")).hexdigest()

    def draft_calls(self, request: bytes, *, told: bool = False) -> list[int]:
        """Whose submission a pack request belongs to; with `told` only of who hears how far it is."""
        draft = self._drafts.get(request)
        return [draft.call] if draft is not None and (draft.told or not told) else []

    def _accept(self, call: int, task: Task) -> None:
        ctx = self._ctx
        document = encode_document(self._document(task))
        if len(document) > limits.TASK_DOCUMENT_BYTES_MAX:
            raise DataError(
                f"the task is {len(document)} bytes, above the limit of {limits.TASK_DOCUMENT_BYTES_MAX}",
                hint="send large content as a file with --input",
            )
        task.task_hash = task_hash(document)
        self._by_hash[task.task_hash] = task.task_id
        task.document_bytes = len(document)
        self.open[task.task_id] = task
        if task.spec["idempotency_key"]:
            self.keys[task.spec["idempotency_key"]] = task.task_id
        ctx.put("documents", task.task_id, document)
        for item in task.inputs:
            ctx.hold(held_as(task.task_id, "inputs"), item["blob"])
        self._rooms.awards.documents[task.task_id] = document
        task.spec = {**task.spec, "script": None, "argv": None, "stdin_b64": ""} if len(document) > 4096 else task.spec
        task.spec = {**task.spec, "accept": contracts.told(task.spec)} if task.spec["accept"] else task.spec
        if task.held_until_ms:
            self._rooms.approvals.hold(task)
        else:
            self.announce(task, "accepted")
        self._submitted(call, task, created=True)
        self._rooms.leases.arm(task)

    def announce(self, task: Task, reason: str) -> None:
        """The task leaves its draft: an auction is held for it."""
        self.move(task, "announced", reason)
        self._rooms.auctions.queue(task)

    def _document(self, task: Task) -> TaskDocument:
        spec = task.spec
        stdin = base64.b64decode(spec["stdin_b64"]) if spec["stdin_b64"] else None
        if stdin is None and task.kind == "compute" and spec["description"] and not contracts.files(task.inputs, spec):
            stdin = spec["description"].encode()
        payload = {
            "argv": spec["argv"],
            "script": spec["script"],
            "op": spec["op"],
            "op_args": spec["op_args"],
            "module": spec["module"],
            "fuel": spec["fuel"],
            "env": spec["env"],
            "stdin": stdin,
            "stdin_input": spec["stdin_input"],
            "cwd": spec["cwd"],
            "prompt": spec["description"] if task.kind == "prompt" else "",
            **{name: value for name in ("cpu", "memory_bytes", "gpu") if (value := spec["requirements"][name])},
            **({"priority": spec["priority"]} if spec["priority"] else {}),
            **({"outputs": spec["outputs"], "outputs_bytes_max": saving.most(self._ctx)} if spec["outputs"] else {}),
        }
        return TaskDocument(
            kind=taskspec.KINDS[task.kind],
            payload=msgspec.msgpack.encode(payload),
            inputs=[
                TaskInput(item["name"], item["kind"], item["blob"], item["bytes"], item.get("mode", 0))
                for item in task.inputs
            ],
            acceptance=[Condition(one["kind"], one["value"]) for one in spec["accept"]],
            lease_s=limits.LEASE_S,
            compare=False,
            dispute_s=0,
            secret=task.secret,
        )

    # --- cancelling and following

    def cancel(self, task: Task, reason: str) -> None:
        """The requester's own cancel: final at once; what an executor is still owed is settled behind it."""
        if task.state in FINAL_STATES:
            return
        self._rooms.awards.cancel(task, reason)
        self.finish(task, "cancelled", CancelledError("the task was cancelled", hint=reason), reason or "cancelled")

    def follow(self, call: int, task: Task, *, output: bool, start: Start) -> None:
        """Streams what comes and answers when the task is final (or at once when it is)."""
        if task.state not in FINAL_STATES:
            self.followers.add(call, task, output=output, start=start)
            return
        if output and task.result is not None:
            self.followers.add(call, task, output=True, start=start)
            self.followers.finish(task, self._rooms.views.streams.get(task.task_id))
        self._ctx.reply(call, self._rooms.views.task(task))
