"""Jobs of this node as an executor: inputs are fetched, runs started within the slots, ended, handed back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from clawnet import limits
from clawnet.ledger import taskdoc
from clawnet.ledger.seal import content_key, key_hash
from clawnet.market.machine import Amounts
from clawnet.market.pricing import Workload, price
from clawnet.market.records import Job, encode
from clawnet.node.context import Context, held_as, job_id
from clawnet.node.pay import PULLS_MS
from clawnet.node.taking import payload_of
from clawnet.node.verdicts import checks_of, files_of
from clawnet.node.worked import received
from clawnet.wire.events import STORAGE, BlobReady, MessageIn, Run, StopRun, TaskExited
from clawnet.wire.jobspec import JobSpec
from clawnet.wire.messages import Ack, Cancel, Reject, Waiver
from clawnet.wire.verdict import without_words

if TYPE_CHECKING:
    from clawnet.node.kernel import Rooms

INPUTS = b"inputs:"
ACTIVE = ("fetching", "queued", "running")
PAYLOAD_KEPT_BYTES = 4 * limits.KIB
"""Up to here a job's payload stays as it was read when the award came; a longer one is read again when it runs."""


class Jobs:
    """Jobs by id; which run, which wait."""

    def __init__(self, ctx: Context, rooms: Rooms, os_family: str) -> None:
        self._ctx = ctx
        self._rooms = rooms
        self.os_family = os_family
        self.jobs: dict[bytes, Job] = {}
        self.running: dict[bytes, None] = {}
        self.documents: dict[bytes, taskdoc.TaskDocument] = {}
        self._payloads: dict[bytes, dict[str, Any]] = {}
        self._dirty: dict[bytes, Job] = {}
        self._progress_armed = False

    @property
    def slots(self) -> int:
        """How many may run at once, prompts apart; 0 before it is known what the machine can do."""
        return self._rooms.placing.capacity.slots

    def resized(self, capacity: Amounts) -> None:
        """What the machine has, as the execution adapters found it; what it no longer has room for is handed back."""
        for job in self._rooms.placing.resize(capacity):
            self._return(job, "capacity", "this machine no longer has what the task needs")

    # --- running

    def begin(self, job: Job, document: taskdoc.TaskDocument, payload: dict[str, Any]) -> None:
        """Takes on an accepted award; `payload` is what its document asks for."""
        self.jobs[job.job] = job
        self.documents[job.job] = document
        if len(document.payload) <= PAYLOAD_KEPT_BYTES:
            self._payloads[job.job] = payload
        job.input_bytes = received(document)
        self._start(job, document)

    def _start(self, job: Job, document: taskdoc.TaskDocument) -> None:
        """Inputs first; then a slot."""
        job.state = "fetching" if document.inputs else "queued"
        self.touch(job)
        self._arm_progress()
        if not document.inputs:
            self._rooms.placing.wait(job)
            return
        self._rooms.placing.expect(job)
        for item in document.inputs:
            self._ctx.hold(held_as(job.job, "inputs"), item.blob)
        blobs = tuple((item.blob, item.bytes) for item in document.inputs)
        self._rooms.fetches.begin(INPUTS + job.job, job.peer, job.job, blobs)
        self._ctx.wake(("job", job.job), min(job.deadline_ms, job.deliver_by_ms))

    def inputs_fetched(self, event: BlobReady) -> None:
        """All inputs are here, or cannot be had."""
        job = self.jobs.get(event.request[len(INPUTS) :])
        if job is None or job.state != "fetching":
            return
        if event.reason:
            self._give_up(job, "storage_full" if event.fault == STORAGE else "inputs", event.reason)
            return
        job.state = "queued"
        self._rooms.placing.wait(job)
        self.touch(job)

    def timer(self, identifier: bytes) -> None:
        """A deadline has passed for inputs that never came; or the pay of a delivered job is waited for."""
        job = self.jobs.get(identifier)
        if job is not None and job.state == "fetching":
            if self._ctx.now >= min(job.deadline_ms, job.deliver_by_ms):
                trouble = self._rooms.fetches.trouble(INPUTS + identifier)
                text = "they could not be fetched in time"
                self._give_up(job, "inputs", f"{text}: {trouble}" if trouble else text)
        elif job is not None:
            self._rooms.pay.timer(job)

    def pump(self) -> None:
        """At the end of a turn: starts the jobs whose turn it is (market/queueing.py)."""
        for identifier, gpus in self._rooms.placing.due():
            job = self.jobs.get(identifier)
            if job is not None and job.state == "queued":
                self._run(job, gpus)
            if identifier not in self.running:
                self._rooms.placing.end(identifier, 0.0)

    def _run(self, job: Job, gpus: tuple[int, ...]) -> None:
        ctx = self._ctx
        document = self.documents.get(job.job)
        left_s = (min(job.deadline_ms, job.deliver_by_ms) - ctx.now) / 1000
        if document is None or left_s <= 0:
            self._give_up(job, "deadline", "its deadline passed before a slot was free")
            return
        payload = self._payloads.pop(job.job, None)
        if payload is None:
            payload = payload_of(document)
        key = None
        if job.lock_seq >= 0:
            secret = self._rooms.pay.key_of(job)
            job.key_hash, key = key_hash(secret), content_key(secret, document.secret)
        try:
            spec = msgspec.convert(
                {
                    "job": job.job,
                    "kind": job.kind,
                    "ring": job.ring,
                    "argv": payload.get("argv"),
                    "script": payload.get("script"),
                    "op": payload.get("op") or "",
                    "op_args": payload.get("op_args") or {},
                    "module": payload.get("module") or "",
                    "fuel": payload.get("fuel") or 0,
                    "env": payload.get("env") or {},
                    "inputs": files_of(document),
                    "stdin": payload.get("stdin"),
                    "stdin_input": payload.get("stdin_input") or "",
                    "prompt": payload.get("prompt") or "",
                    "cwd_input": payload.get("cwd") or "",
                    "seal_key": key,
                    "wall_s": min(left_s, ctx.config.seconds("execution.wall_max")),
                    "memory_bytes_max": self._rooms.placing.memory_bytes_max(job),
                    "gpus": gpus,
                    "output_bytes_max": min(ctx.config.integer("execution.output_max"), limits.RESULT_BYTES_MAX),
                    "outputs": payload.get("outputs") or [],
                    "outputs_bytes_max": min(
                        ctx.config.integer("execution.outputs_max"), payload.get("outputs_bytes_max", 0)
                    ),
                    "acceptance": checks_of(document),
                    "until_s": left_s,
                },
                JobSpec,
            )
        except msgspec.ValidationError as error:
            self._give_up(job, "invalid", str(error))
            return
        job.state, job.started_ms, job.starts = "running", ctx.now, job.starts + 1
        self.running[job.job] = None
        self.touch(job)
        if job.retries == 0:
            ctx.durable()  # that it began is remembered even when the power fails: it may not begin twice
        self._rooms.streaming.begin(job)
        ctx.out.append(Run(job.job, spec))

    def _arm_progress(self) -> None:
        if not self._progress_armed:
            self._progress_armed = True
            self._ctx.wake(("progress",), self._ctx.now + limits.LEASE_S * 1000 // 3)

    def progress(self) -> None:
        """Every third of a lease: what is alive says so."""
        ctx = self._ctx
        active = [job for job in self.jobs.values() if job.state in ACTIVE]
        self._progress_armed = False
        for job in active:
            ctx.send(job.peer, self._rooms.streaming.progress(job))
        if active:
            self._arm_progress()

    # --- the end of a run

    def exited(self, event: TaskExited) -> None:
        """Delivers the sealed bundle, or hands the line back with a report."""
        job = self.jobs.get(event.job)
        self.running.pop(event.job, None)
        self._rooms.streaming.over(event.job)
        self._rooms.placing.end(event.job, event.duration_s)
        if job is None or job.state != "running":
            return
        job.ended_ms, job.duration_s, job.cpu_s = self._ctx.now, event.duration_s, event.cpu_s
        job.memory_bytes_max, job.output_bytes = event.memory_bytes_max, event.output_bytes
        has_bundle = bool(event.inline) or event.blob_bytes > 0
        if event.ended == "exit" and has_bundle:
            rows, dropped = self._rooms.bidding.durations.learn(job.duration_key, event.duration_s, event.cpu_s)
            for name, body in rows:
                self._ctx.put("durations", name, body)
            for name in dropped:
                self._ctx.delete("durations", name)
            amount_ucr = self._rooms.bidding.metered(job, self.documents.get(job.job), event)
            self._rooms.pay.deliver(job, event, amount_ucr)
        elif job.cancelled and has_bundle and job.lock_seq >= 0:
            metered_ucr = price(self._rooms.bidding.rates, event.cpu_s, Workload(1))
            self._rooms.pay.deliver(job, event, max(1, min(job.price_ucr, metered_ucr)))
        elif job.cancelled:
            self._give_up(job, "cancelled", event.reason)
        else:
            self._give_up(job, event.ended, event.reason, self._told(job, event.report))

    def _told(self, job: Job, report: bytes) -> bytes:
        """What a requester hears of a result that did not pass and is not paid: words only where it may see output."""
        if not report or job.lock_seq < 0 or job.ring in self._ctx.config.words("market.preview"):
            return report
        return without_words(report)

    def _give_up(self, job: Job, reason: str, text: str, report: bytes = b"") -> None:
        """No result: a waiver frees the line at once; `report` tells of a contract that the result did not pass."""
        self.leave(job)
        job.state, job.reason = "waived", reason
        self._rooms.streaming.over(job.job)
        self._rooms.taking.over(job.job)
        waiver = self._rooms.pay.waiver(job.account, job.lock_hash, job.line) if job.lock_seq >= 0 else b""
        message = Waiver(job.task_id, job.attempt, waiver, reason[:64], report or text.encode()[:2000])
        self._oblige(job, message)
        self._ctx.count("jobs_total", "waived")

    def cancel(self, event: MessageIn, message: Cancel) -> None:
        """Stops what runs; what was never started is refused when its award arrives."""
        job = self.jobs.get(job_id(event.peer, message.task_id, message.attempt))
        if job is None:
            self._rooms.taking.cancelled(event, message)
        elif job.state in ACTIVE:
            job.cancelled = True
            if job.state == "running":
                self.touch(job)
                self._ctx.out.append(StopRun(job.job))
            else:
                self._give_up(job, "cancelled", message.reason)
        elif event.obligation is not None:
            self._ctx.send(event.peer, Ack(event.obligation), event.id)

    def stop(self, job: Job) -> None:
        """Nothing more is done for this job; its slot is free when the run has ended."""
        if job.state == "running":
            self._ctx.out.append(StopRun(job.job))
        self.leave(job)

    def leave(self, job: Job) -> None:
        """The job needs neither document nor inputs nor a place in the queue."""
        document = self.documents.pop(job.job, None)
        self._payloads.pop(job.job, None)
        if document is not None and document.inputs:
            self._rooms.fetches.forget(INPUTS + job.job)
            self._ctx.let_go(held_as(job.job, "inputs"))
        self._rooms.placing.leave(job)

    def stop_for(self, account: bytes, *, own: bool = False) -> None:
        """A fork is proven against this requester, or its membership is over: nothing more runs for it."""
        for job in [job for job in self.jobs.values() if job.account == account and (own or job.ring != "own")]:
            if job.state == "running":
                job.cancelled = True
                self.touch(job)
                self._ctx.out.append(StopRun(job.job))
            elif job.state in ("fetching", "queued"):
                self._give_up(job, "not_trusted", "")

    # --- saving and loading

    def touch(self, job: Job) -> None:
        """The job changed; its row is written once at the end of the turn."""
        self._dirty[job.job] = job

    def flush(self) -> None:
        """Writes the rows of all jobs that changed in this turn; finished ones leave the memory."""
        if not self._dirty:
            return
        for job in self._dirty.values():
            self._ctx.put("jobs", job.job, job.state, self._ctx.now, encode(job))
            if job.state in ("done", "rejected", "waived", "forfeited"):
                self.jobs.pop(job.job, None)
                self._ctx.sleep(("job", job.job))
        self._dirty.clear()

    def load(self, job: Job, document: bytes | None) -> None:
        """Takes in an unfinished job at start-up."""
        self.jobs[job.job] = job
        if job.lock_seq >= 0:
            self._rooms.pay.bind(job)
        if document is not None:
            self.documents[job.job] = taskdoc.decode(document)

    def resume(self) -> None:
        """After a restart (LEDGER.md section 9): a second start where one is allowed, else a waiver; wait for pay."""
        for job in sorted(self.jobs.values(), key=lambda job: job.received_ms):
            if job.state == "running" and job.cancelled:
                self._give_up(job, "cancelled", "")
            elif job.state == "running" and (job.retries == 0 or self._ctx.now >= job.deliver_by_ms):
                self._give_up(job, "restarted", "the executor was restarted while the task ran")
            elif job.state in ACTIVE and job.job in self.documents:
                self._start(job, self.documents[job.job])
            elif job.state in ACTIVE:
                self._give_up(job, "restarted", "its document is lost")
            elif job.state == "delivered" and job.lock_seq >= 0:
                self._ctx.wake(("job", job.job), self._ctx.now + PULLS_MS[0])

    def drain(self) -> None:
        """Hands back what has not started."""
        for job in [job for job in self.jobs.values() if job.state in ("fetching", "queued")]:
            self._return(job, "draining", "the executor is stopping")

    def _return(self, job: Job, reason: str, text: str) -> None:
        """A job that does not run now: by a REJECT where it never did, so that the slot may move at once."""
        (self._give_up if job.starts else self._hand_back)(job, reason, text)

    def _hand_back(self, job: Job, reason: str, text: str) -> None:
        """Durably not started, and never to be."""
        self.leave(job)
        job.state, job.reason = "rejected", reason
        self._rooms.taking.over(job.job)
        waiver = self._rooms.pay.waiver(job.account, job.lock_hash, job.line) if job.lock_seq >= 0 else b""
        self._oblige(job, Reject(job.task_id, job.attempt, reason, text, waiver))
        self._ctx.count("jobs_total", "rejected")

    def _oblige(self, job: Job, message: Reject | Waiver) -> None:
        """Says that the job is over here. What may run once stays over though the power fails: another may have it."""
        if isinstance(message, Waiver):
            cost = (job.duration_s, job.cpu_s, job.memory_bytes_max, job.output_bytes)
            message = msgspec.structs.replace(
                message, duration_s=cost[0], cpu_s=cost[1], memory_bytes_max=cost[2], output_bytes=cost[3]
            )
        self._rooms.outbox.oblige(job.peer, message, job.job)
        self.touch(job)
        if job.retries == 0 and job.peer != self._ctx.me:
            self._ctx.durable()

    def drain_now(self) -> None:
        """The drain timeout is over: what still runs is stopped and handed back."""
        for identifier in self.running:
            self._ctx.out.append(StopRun(identifier))
