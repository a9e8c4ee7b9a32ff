"""The executor: what the runtime asks (run, stop, pack, open) and what it hears back, over all kinds of runs.

Everything is called in the node's loop and returns at once; answers are stimuli. Work on more than
RUN_INLINE_WORK_BYTES_MAX bytes goes to a few threads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final, TypeVar

from clawnet import limits
from clawnet.errors import ClawnetError, DataError
from clawnet.execution import bundle, delivery, feeding, gpu, inputs, threads, verify
from clawnet.execution.compute import ComputePool
from clawnet.execution.computing import Computed, Computing
from clawnet.execution.endings import Ended, ProbeResult, without_result
from clawnet.execution.endpoint import Answer
from clawnet.execution.hardware import memory_for_runs, processors
from clawnet.execution.localfiles import LocalFiles
from clawnet.execution.opening import Opener
from clawnet.execution.outgoing import Contents, Outgoing
from clawnet.execution.prompt import PromptRunner, finding, prompt_text
from clawnet.execution.shells import Places, ShellRun
from clawnet.execution.spec import COMPUTE, OPERATIONS, PROMPT, SHELL, BlobPort, ExecutionSettings, JobSpec, check
from clawnet.execution.wasmruns import WASM
from clawnet.execution.workdirs import JobDirs, WorkDirs
from clawnet.paths import Home
from clawnet.wire.events import (
    CapacityChanged,
    InputsReady,
    Open,
    OutputKept,
    PackInputs,
    ReadOutput,
    Stimulus,
    TaskOutput,
)
from clawnet.wire.fileevents import SaveOutputs

_THREADS: Final = 4
T = TypeVar("T")


class Executor:
    """Runs tasks on this machine.

    `probe` is the sandbox probe's result (for doctor), None before `start`. `deliver` takes the stimuli TaskOutput,
    OutputKept, TaskExited, InputsReady, Opened and CapacityChanged.
    """

    def __init__(
        self,
        settings: ExecutionSettings,
        home: Home,
        blobs: BlobPort,
        *,
        entropy: Callable[[int], bytes],
        deliver: Callable[[Stimulus], None],
    ) -> None:
        self.settings = settings
        self.probe: ProbeResult | None = None
        self._home = home
        self._blobs = blobs
        self._entropy = entropy
        self._deliver = deliver
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="clawnet-execution")
        # What this node's own user waits for is not held up by what others have made it do, nor the reverse.
        self._own_threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="clawnet-own")
        self._running: dict[bytes, ShellRun] = {}
        self._preparing: dict[bytes, JobSpec] = {}
        self._stop_asked: dict[bytes, str] = {}
        self._computing: dict[bytes, JobSpec] = {}
        self._prompts = PromptRunner(settings.prompts, self._retell)
        self._busy: set[Future[Any]] = set()
        self._gpus = gpu.Found()
        self._started = False
        self._early: list[Open] = []
        """Results that the node wants opened at its start, which is before the executor's."""
        self._idle: asyncio.Event
        self._pool: ComputePool
        self._computer: Computing
        self._judge: verify.Judge
        self._opener: Opener
        self._files: LocalFiles
        self._outgoing: Outgoing

    # --- life

    async def start(self) -> CapacityChanged:
        """Cleans up after an earlier life, starts the worker, probes sandbox and endpoint, tells what can be done."""
        self._loop = asyncio.get_running_loop()
        self._idle = asyncio.Event()
        self._pool = ComputePool(
            self.settings.worker_argv, self._loop, workers_max=self.settings.slots, on_broken=self._on_broken
        )
        self._computer = Computing(self._pool, self._home, self._blobs, lambda: self.settings, self._loop, self._retell)
        self._gpus = await gpu.find()
        self._places = Places(self.settings, self._home, self._gpus.gpus)
        self._dirs: WorkDirs = self._places.dirs
        self._judge = verify.Judge(
            verify.Bench(
                self._pool,
                self._in_thread,
                self.shell_mode,
                self._places,
                self._note_idle,
                lambda: self.settings,
                self._loop,
                self._computer,
                self._home.wasm_runs_dir,
            )
        )
        self._files = LocalFiles(
            self._home, self._blobs, self._entropy, self._in_own_thread, self._deliver, self._loop.call_soon_threadsafe
        )
        self._opener = Opener(self._blobs, self._judge, self._in_own_thread, self._deliver)
        self._outgoing = Outgoing(self._blobs, self._judge, self._entropy, self._in_thread, self._deliver)
        feeding.sweep(self._home)
        self._files.recover()
        self._computer.sweep()
        self._started = True
        if COMPUTE in self.settings.offers:
            self._pool.start()
        self.probe = await self._places.open()
        await self._prompts.start()
        while self._early:
            self._opener.open(self._early.pop(0))
        return self._tell()

    def configure(self, settings: ExecutionSettings) -> None:
        """The policy from now on; what can be done is delivered again."""
        self.settings = settings
        self._prompts.configure(settings.prompts)
        self._tell()

    def findings(self) -> list[dict[str, str]]:
        """What `doctor` tells of sandbox and AI endpoint."""
        found = [finding(self.settings.prompts, self._prompts.serving)]
        if self.probe is not None:
            level, text = ("ok", "shell tasks run sandboxed") if self.probe.passed else ("warn", self.probe.reason)
            found.insert(0, {"check": "sandbox", "level": level, "message": text, "remedy": self.probe.remedy})
        if COMPUTE in self.settings.offers:
            found.append(self._computer.finding())
        return [*found, *gpu.findings(self._gpus, self.settings.gpus)]

    async def close(self) -> None:
        """Ends everything that runs (TaskExited says cancelled) and leaves no process and no file behind.

        Also after a start that failed, or none.
        """
        if not self._started:
            self._threads.shutdown()
            self._own_threads.shutdown()
            return
        for job in [*self._running, *self._preparing, *self._computing]:
            self._stop(job, "the node stops")
        self._judge.stop_all("the node stops")
        await self._prompts.close()
        while self._running or self._preparing or self._busy or self._judge.busy:
            self._idle.clear()
            await self._idle.wait()
        self._pool.stop()
        self._threads.shutdown(wait=True)
        self._own_threads.shutdown(wait=True)
        self._places.close()

    def shell_mode(self, ring: str) -> str:
        """How a shell task from this ring runs here: sandboxed, host or off; before the start, off."""
        if not self._started or SHELL not in self.settings.offers:
            return "off"
        return self._places.mode(ring)

    def capacity(self) -> CapacityChanged:
        """What can be done now."""
        rings = tuple(ring for ring in ("own", "member", "stranger") if self.shell_mode(ring) != "off")
        words = [SHELL] if rings else []
        if COMPUTE in self.settings.offers and not self._pool.broken:
            words += [COMPUTE, *(f"op:{name}" for name in OPERATIONS), *([] if self._computer.trouble else [WASM])]
        serving = self._prompts.serving
        if serving.up:
            words.append(PROMPT)
        return CapacityChanged(
            capabilities=tuple(sorted(words)),
            shell_rings=rings,
            cpu=min(self.settings.cpus or limits.CPUS_MAX, processors()),
            memory_bytes=memory_for_runs(self.settings.memory_bytes_total),
            gpu=min(self.settings.gpus, len(self._gpus.gpus)),
            models=(serving.model,) if serving.up and serving.model else (),
            prompt_rings=serving.rings if serving.up else (),
            prompt_trouble=serving.reason if self.settings.prompts.endpoint else "",
        )

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the compute workers."""
        return self._pool.pids

    def _tell(self) -> CapacityChanged:
        capacity = self.capacity()
        self._deliver(capacity)
        return capacity

    def _retell(self) -> None:
        self._tell()

    def _on_broken(self, reason: str) -> None:
        self._loop.call_soon(self._tell)

    # --- runs

    def run(self, job: bytes, spec: JobSpec) -> None:
        """Starts a job; TaskExited tells its end, also when it cannot be started."""
        spec = self._cut(job, spec)
        try:
            check(spec)
            if spec.kind == "compute":
                self._run_compute(spec)
            elif spec.kind == "prompt":
                self._run_prompt(spec)
            else:
                self._run_shell(spec)
        except ClawnetError as error:
            self._refuse(job, _sentence(error))
        except OSError as error:
            self._refuse(job, f"the run cannot be prepared: {error.strerror or error}")

    def stop(self, job: bytes) -> None:
        """Cancels a job: TaskExited(ended="cancelled") follows unless it had already ended."""
        self._stop(job, "cancelled")

    def read_output(self, effect: ReadOutput) -> None:
        """What a running job wrote earlier; OutputKept tells it, empty when the run is over."""
        run = self._running.get(effect.job)
        data = b"" if run is None else run.written(effect.stream, effect.offset, effect.length)
        self._deliver(OutputKept(effect.job, effect.stream, effect.offset, data))

    def _stop(self, job: bytes, reason: str) -> None:
        run = self._running.get(job)
        if run is not None:
            run.stop("cancelled", reason)
        elif job in self._preparing:
            self._stop_asked[job] = reason
        elif job in self._computing and self._computer.cancel(job):
            del self._computing[job]
            self._loop.call_soon(self._deliver, without_result(job, "cancelled", reason))
        elif not self._judge.stop(job, reason):
            self._prompts.cancel(job)

    def _cut(self, job: bytes, spec: JobSpec) -> JobSpec:
        import msgspec

        settings = self.settings
        return msgspec.structs.replace(
            spec,
            job=job,
            wall_s=min(spec.wall_s, settings.wall_s_max, limits.RUN_WALL_S_MAX),
            memory_bytes_max=min(spec.memory_bytes_max, memory_for_runs(settings.memory_bytes_total)),
            output_bytes_max=min(spec.output_bytes_max, settings.output_bytes_max, limits.RUN_OUTPUT_BYTES_MAX),
            outputs_bytes_max=min(spec.outputs_bytes_max, settings.outputs_bytes_max),
        )

    def _refuse(self, job: bytes, reason: str) -> None:
        self._loop.call_soon(self._deliver, without_result(job, "failed", reason))

    # compute

    def _run_compute(self, spec: JobSpec) -> None:
        if COMPUTE not in self.settings.offers:
            raise DataError("compute tasks are not offered here")
        self._computing[spec.job] = spec

        def ended(end: Computed) -> None:
            del self._computing[spec.job]
            if end.head is not None:
                self._outgoing.send(spec, end.head, end.streams, end.close, end.files)
                return
            end.close()
            usage = end.usage
            self._deliver(
                without_result(spec.job, end.how, end.reason, usage.duration_s, usage.cpu_s, usage.memory_bytes_max)
            )

        try:
            self._computer.start(spec, ended)
        except (ClawnetError, OSError):
            del self._computing[spec.job]
            raise

    # prompts

    def _run_prompt(self, spec: JobSpec) -> None:
        if spec.ring not in self._prompts.serving.rings:
            raise DataError(f"prompts of ring {spec.ring[:20]!r} are not answered here")

        def answered(answer: Answer | None, how: str, reason: str, took_s: float) -> None:
            if answer is None:
                self._deliver(without_result(spec.job, how, reason, took_s))
                return
            usage = bundle.Usage(
                took_s, 0.0, 0, answer.tokens_in, answer.tokens_out, answer.model, answer.finish_reason
            )
            self._outgoing.send(spec, bundle.Head(0, None, 0, 0, answer.text, usage), ())

        self._prompts.run(
            spec.job,
            prompt_text(spec.prompt, spec.stdin),
            wall_s=spec.wall_s,
            answer_bytes_max=min(spec.output_bytes_max, limits.PROMPT_ANSWER_BYTES_MAX),
            answered=answered,
        )

    # shell

    def _run_shell(self, spec: JobSpec) -> None:
        mode = self.shell_mode(spec.ring)
        if mode == "off":
            detail = f": {self.probe.reason}" if self.probe is not None and self.probe.reason else ""
            raise DataError(f"shell tasks of ring {spec.ring[:20]!r} do not run here{detail}")
        if spec.sandbox == "sandboxed" and mode != "sandboxed":
            raise DataError("there is no sandbox here, and the task insists on one")
        if spec.sandbox == "host" and (spec.ring != "own" or self.settings.shell_own not in ("auto", "host")):
            raise DataError("the policy here does not let this task run on the host")
        if spec.sandbox == "host":
            mode = "host" if self._places.host_allowed else mode
        dirs = self._dirs.make(spec.job)
        owner = self._dirs.owner
        placed = feeding.placed(spec)
        small = sum(item.size for item in placed) <= limits.RUN_INLINE_WORK_BYTES_MAX
        if small and all(item.kind == "file" for item in placed):
            try:
                inputs.place_inputs(placed, spec.cwd_input, dirs.work, self._blobs, owner)
                self._start_shell(spec, dirs, mode)
            except (ClawnetError, OSError):
                self._remove(dirs)
                raise
            return
        self._preparing[spec.job] = spec

        def ready(future: Future[None]) -> None:
            del self._preparing[spec.job]
            stopped = self._stop_asked.pop(spec.job, None)
            try:
                future.result()
                if stopped is None:
                    self._start_shell(spec, dirs, mode)
                    return
                exited = without_result(spec.job, "cancelled", stopped)
            except ClawnetError as error:
                exited = without_result(spec.job, "failed", _sentence(error))
            except OSError as error:
                exited = without_result(spec.job, "failed", f"the inputs cannot be placed: {error.strerror or error}")
            self._remove(dirs)
            self._deliver(exited)

        self._in_thread(ready, inputs.place_inputs, placed, spec.cwd_input, dirs.work, self._blobs, owner)

    def _start_shell(self, spec: JobSpec, dirs: JobDirs, mode: str) -> None:
        job = spec.job

        def on_output(stream: int, offset: int, data: bytes) -> None:
            self._deliver(TaskOutput(job, stream, offset, data))

        def on_end(ended: Ended) -> None:
            del self._running[job]
            self._shell_ended(spec, run, ended, dirs)

        place, stdin = self._places.place(mode), feeding.stdin_path(spec, self._blobs)
        room = self.settings.disk_bytes_max + sum(item.size for item in feeding.placed(spec))
        run = ShellRun(spec, dirs.work, place, stdin=stdin, disk_bytes_max=room, on_output=on_output, on_end=on_end)
        run.start()
        self._running[job] = run

    def _shell_ended(self, spec: JobSpec, run: ShellRun, ended: Ended, dirs: JobDirs) -> None:
        kept = [stream.kept for stream in run.streams]
        sizes = [stream.size for stream in run.streams]

        def close() -> None:
            for file in kept:
                file.close()
            self._remove(dirs)
            self._note_idle()

        if ended.how != "exit":
            close()
            self._deliver(
                without_result(
                    spec.job, ended.how, ended.reason, ended.duration_s, ended.cpu_s, ended.memory_bytes_max, sum(sizes)
                )
            )
            return
        usage = bundle.Usage(ended.duration_s, ended.cpu_s, ended.memory_bytes_max)
        head = bundle.Head(ended.exit_code, ended.signal, sizes[0], sizes[1], "", usage)
        files = None
        if spec.outputs:
            files = delivery.Files(dirs.work, spec.outputs, spec.outputs_bytes_max, self._dirs.owner)
        self._outgoing.send(spec, head, Contents(kept), close, files)

    # --- results

    def open_result(self, effect: Open) -> None:
        """Unseals a result; Opened tells its Summary (execution/bundle.py) or why it does not open."""
        if self._started:
            self._opener.open(effect)
        else:
            self._early.append(effect)

    def stop_judging(self, request: bytes) -> None:
        """Nobody waits for the verdict on an opened result any longer; Opened follows."""
        self._judge.stop(request, "nobody waits for it any longer")

    # --- inputs

    def pack(
        self,
        request: bytes,
        paths: tuple[tuple[str, str], ...],
        schemas: tuple[tuple[str, bytes], ...] = (),
        gitignore: bool = False,
    ) -> None:
        """Looks at schemas, stores local files and directories as blobs; InputsReady tells them, or the first error."""

        def looked_at(error: DataError | None) -> None:
            if error is None:
                self._files.pack(PackInputs(request, paths, (), gitignore))
            else:
                self._deliver(InputsReady(request, (), error.as_dict()))

        self._judge.check_schemas(request, schemas, looked_at)

    def save(self, effect: SaveOutputs) -> None:
        """Puts output files into a directory; OutputsSaved tells how many, or why none."""
        self._files.save(effect)

    # --- threads

    def _in_thread(self, done: Callable[[Future[T]], None], work: Callable[..., T], *args: Any) -> None:
        self._watch(threads.submit(self._threads, work, *args), done)

    def _in_own_thread(self, done: Callable[[Future[T]], None], work: Callable[..., T], *args: Any) -> None:
        self._watch(threads.submit(self._own_threads, work, *args), done)

    def _watch(self, future: Future[T], done: Callable[[Future[T]], None]) -> None:
        self._busy.add(future)

        def back() -> None:
            self._busy.discard(future)
            done(future)
            self._note_idle()

        future.add_done_callback(lambda _: self._loop.call_soon_threadsafe(back))

    def _note_idle(self) -> None:
        self._idle.set()

    def _remove(self, dirs: JobDirs) -> None:
        self._in_thread(lambda future: future.result(), dirs.remove)  # a busy disk takes its time over it


def _sentence(error: ClawnetError) -> str:
    return f"{error.message} ({error.hint})" if error.hint else error.message
