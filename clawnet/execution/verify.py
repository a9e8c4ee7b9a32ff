"""Acceptance contracts: a result is judged by its conditions, one after the other, up to the first it does not pass.

Exit code and hash are compared here, a schema is applied in the worker process, a verifier command runs as shell tasks
do, in a fresh directory of its own. Each has a bound on its time; whoever asked can stop it, and nothing lives on.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Final

from msgspec import Struct

from clawnet import limits
from clawnet.errors import ClawnetError, DataError
from clawnet.execution.compute import ComputePool
from clawnet.execution.computing import Computed, Computing, WasmRun
from clawnet.execution.endings import Ended
from clawnet.execution.product import STDOUT_NAME, Laid, Product, digest, lay_out, prepare, span
from clawnet.execution.sandbox_bwrap import JOB_DIR
from clawnet.execution.shells import Places, ShellRun
from clawnet.execution.spec import ExecutionSettings, JobSpec
from clawnet.execution.wasmruns import TRAPPED
from clawnet.execution.workdirs import JobDirs, remove_tree
from clawnet.wire import verdict as v
from clawnet.wire.verdict import Check, Judged, judged

_NOT_FOUND: Final = (126, 127)
_STEP_S: Final = 0.05


class Bench(Struct, frozen=True):
    """What judging needs of the executor: its worker processes, threads, shell places, its policy."""

    pool: ComputePool
    in_thread: Callable[..., None]
    shell_mode: Callable[[str], str]
    places: Places
    note_idle: Callable[[], None]
    settings: Callable[[], ExecutionSettings]
    loop: asyncio.AbstractEventLoop
    computer: Computing
    scratch: Path


class _Trial:
    """One result being judged."""

    def __init__(
        self,
        name: bytes,
        checks: Sequence[Check],
        product: Product,
        ring: str,
        again: bool,
        ends_s: float,
        done: Callable[[v.Verdict, str], None],
    ) -> None:
        self.name = name
        self.checks = checks
        self.product = product
        self.ring = ring
        self.again = again
        self.ends_s = ends_s
        self.done = done
        self.verdict: list[Judged] = []
        self.stopped = ""
        self.kill: Callable[[], None] = lambda: None

    @property
    def n(self) -> int:
        return len(self.verdict)


class Judge:
    """Judges results; the settings bound the time of each verifier and each schema, and a verifier's memory."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._loop = bench.loop
        self._trials: dict[bytes, _Trial] = {}
        self._again = 0
        self._waiting: deque[_Trial] = deque()

    @property
    def busy(self) -> bool:
        """Whether anything is being judged."""
        return bool(self._trials)

    def knows(self, name: bytes) -> bool:
        """Whether this result is being judged."""
        return name in self._trials

    def judge(
        self,
        name: bytes,
        checks: Sequence[Check],
        product: Product,
        *,
        ring: str,
        within_s: float,
        done: Callable[[v.Verdict, str], None],
        again: bool = False,
    ) -> None:
        """`done(verdict, stopped)` is called once, perhaps before this returns; `stopped` says why it was broken off.

        `ring` is whose verifier it is. `again`: the executor has judged this before, and what cannot be judged here is
        skipped; a verifier runs in a sandbox only, for the result is of somebody else.
        """
        earlier = self._trials.pop(name, None)
        if earlier is not None:
            earlier.stopped = "it is judged again"
            earlier.kill()
        trial = _Trial(name, checks, product, ring, again, self._loop.time() + within_s, done)
        self._trials[name] = trial
        self._next(trial)

    def stop(self, name: bytes, reason: str) -> bool:
        """Ends a trial, killing what runs for it; True if there was one."""
        trial = self._trials.get(name)
        if trial is None:
            return False
        trial.stopped = trial.stopped or reason
        trial.kill()
        return True

    def stop_all(self, reason: str) -> None:
        """Ends all trials."""
        for name in list(self._trials):
            self.stop(name, reason)

    # --- one condition after the other

    def _next(self, trial: _Trial) -> None:
        trial.kill = lambda: self._end_soon(trial)
        if trial.stopped or trial.n == len(trial.checks) or v.failure(trial.verdict[-1:]) is not None:
            self._end(trial)
            return
        check = trial.checks[trial.n]
        {
            v.EXIT_CODE: self._exit_code,
            v.OUTPUT_SHA256: self._sha256,
            v.OUTPUT_SCHEMA: self._schema,
            v.VERIFIER_COMMAND: self._command,
            v.VERIFIER_WASM: self._module,
        }.get(check.kind, self._unknown)(trial, check)

    def _end_soon(self, trial: _Trial) -> None:
        self._loop.call_soon(self._end, trial)

    def _end(self, trial: _Trial) -> None:
        if self._trials.get(trial.name) is trial:
            del self._trials[trial.name]
            trial.done(tuple(trial.verdict), trial.stopped)
            self._bench.note_idle()

    def _tell(self, trial: _Trial, outcome: v.Outcome, detail: str = "", stderr: bytes = b"") -> None:
        trial.verdict.append(judged(trial.n, outcome, detail, stderr))
        self._next(trial)

    def _cannot(self, trial: _Trial, why: str) -> None:
        """This condition cannot be judged here: of a result to be delivered that is no acceptance."""
        self._tell(trial, "skipped" if trial.again else "broken", why)

    def _left_s(self, trial: _Trial) -> float:
        return min(self._bench.settings().verifier_s_max, trial.ends_s - self._loop.time())

    def _unknown(self, trial: _Trial, check: Check) -> None:
        self._cannot(trial, f"conditions of kind {check.kind[:40]!r} are not judged here")

    def _exit_code(self, trial: _Trial, check: Check) -> None:
        wanted, got = int(check.value), trial.product.exit_code
        if got == wanted:
            self._tell(trial, "passed")
            return
        ended = f"exit code {got}" if got is not None else f"ended by signal {trial.product.signal}"
        self._tell(trial, "failed", f"{ended}; {wanted} is wanted")

    def _sha256(self, trial: _Trial, check: Check) -> None:
        def told(found: bytes) -> None:
            if found == check.value:
                self._tell(trial, "passed")
            else:
                self._tell(trial, "failed", f"the SHA-256 is {found.hex()}; {check.value.hex()} is wanted")

        self._read(trial, lambda: digest(trial.product.answer()), told)

    def _read(self, trial: _Trial, work: Callable[[], bytes], told: Callable[[bytes], None]) -> None:
        """Reads the answer, here or, when it is long, in a thread."""
        if trial.product.answer_bytes <= limits.RUN_INLINE_WORK_BYTES_MAX:
            try:
                found = work()
            except (OSError, ClawnetError) as error:
                self._tell(trial, "broken", f"the result cannot be read: {error}")
                return
            told(found)
            return

        def done(future: Future[bytes]) -> None:
            try:
                found = future.result()
            except (OSError, ClawnetError) as error:
                self._tell(trial, "broken", f"the result cannot be read: {error}")
                return
            if trial.stopped:
                self._end(trial)
            else:
                told(found)

        trial.kill = lambda: None  # it is over in a moment
        self._bench.in_thread(done, work)

    # --- schemas

    def _schema(self, trial: _Trial, check: Check) -> None:
        most = limits.CONTRACT_JSON_BYTES_MAX
        if trial.product.answer_bytes > most:
            self._tell(trial, "failed", f"it is {trial.product.answer_bytes} bytes; a schema judges at most {most}")
            return

        def told(answer: bytes) -> None:
            trial.kill = lambda: self._cancel(trial)
            self._ask_worker(trial.name, (check.value, answer), self._left_s(trial), answered)

        def answered(found: str, reason: str) -> None:
            if reason:
                self._tell(trial, "broken", reason)
            else:
                self._tell(trial, "failed" if found else "passed", found)

        self._read(trial, lambda: b"".join(trial.product.answer()), told)

    def _cancel(self, trial: _Trial) -> None:
        self._bench.pool.cancel(trial.name)
        self._end_soon(trial)

    def _ask_worker(
        self, name: bytes, sources: tuple[bytes, ...], time_s: float, answered: Callable[[str, str], None]
    ) -> None:
        """Asks the worker what is wrong with a schema, or with an answer by it: (what, why that could not be told)."""

        def told(data: bytes, reason: str, cpu_s: float) -> None:
            words = {"wall_limit": f"it took longer than {time_s:.3g} s", "memory_limit": "it takes too much memory"}
            answered(data.decode("utf-8", "replace"), words.get(reason, reason))

        pool = self._bench.pool
        if not pool.pids:
            pool.start()
        time_s = max(time_s, _STEP_S)
        pool.submit(
            name,
            "schema",
            {},
            list(sources),
            time_s=time_s,
            answer_bytes_max=limits.CONTRACT_VALUE_BYTES_MAX,
            answer=told,
        )

    def check_schemas(
        self, name: bytes, schemas: Sequence[tuple[str, bytes]], done: Callable[[DataError | None], None]
    ) -> None:
        """Looks at each schema, with the words it is called by, before anybody is asked to judge by it."""
        if not schemas or self._bench.pool.broken:
            done(None)
            return
        (text, schema), *rest = schemas

        def answered(found: str, reason: str) -> None:
            if not (found or reason):
                self.check_schemas(name, rest, done)
                return
            why = found or f"it cannot be looked at: {reason}"
            hint = "correct it; see json-schema.org for the language"
            done(DataError(f"acceptance condition {text!r}: {why}", hint=hint, field="accept"))

        self._ask_worker(name, (schema,), limits.SCHEMA_CHECK_S, answered)

    # --- verifier commands

    @staticmethod
    def _number(trial: _Trial) -> bytes:
        """The name of a verifier's run, as a job has one."""
        return hashlib.blake2b(trial.name + trial.n.to_bytes(4, "big"), digest_size=16).digest()

    def _command(self, trial: _Trial, check: Check) -> None:
        mode = self._bench.shell_mode(trial.ring)
        if mode == "off" or (trial.again and mode != "sandboxed"):
            self._cannot(trial, "no verifier command runs here" if mode == "off" else "there is no sandbox here")
            return
        if self._left_s(trial) <= 0:
            self._tell(trial, "broken", "no time is left to judge it")
            return
        if trial.again and self._again >= limits.VERIFIERS_AT_ONCE_MAX:
            self._waiting.append(trial)
            return
        places = self._bench.places
        number = self._number(trial)
        try:
            dirs = places.dirs.make(number)
        except OSError as error:
            self._tell(trial, "broken", f"no directory for its verifier: {error.strerror or error}")
            return

        def prepared(future: Future[Laid]) -> None:
            try:
                laid = future.result()
                if not trial.stopped:
                    self._start(trial, check, dirs, number, mode, laid)
                    return
            except (OSError, ClawnetError) as error:
                trial.verdict.append(judged(trial.n, "broken", f"its verifier cannot be started: {error}"))
            self._remove(trial, dirs)

        self._again += trial.again
        trial.kill = lambda: None  # it is over in a moment
        self._bench.in_thread(prepared, prepare, trial.product, dirs.work, places.dirs.owner)

    def _start(self, trial: _Trial, check: Check, dirs: JobDirs, number: bytes, mode: str, laid: Laid) -> None:
        product = trial.product
        inside = Path(JOB_DIR) if mode == "sandboxed" else dirs.work
        code = "" if product.exit_code is None else str(product.exit_code)
        spec = JobSpec(
            job=number,
            kind="shell",
            argv=[*check.argv, code],
            env=_environment(product, str(inside / laid.stdout), str(inside / laid.stderr)),
            ring=trial.ring,
            wall_s=self._left_s(trial),
            memory_bytes_max=self._bench.settings().memory_bytes_max,
            output_bytes_max=limits.VERIFIER_OUTPUT_BYTES_MAX,
        )

        def ended(end: Ended) -> None:
            errors = run.streams[1].kept
            errors.seek(max(0, run.streams[1].size - limits.VERIFIER_STDERR_BYTES_MAX))
            said = errors.read(limits.VERIFIER_STDERR_BYTES_MAX)
            for stream in run.streams:
                stream.kept.close()
            if not trial.stopped:
                trial.verdict.append(_told(trial, end, said))
            self._remove(trial, dirs)

        places = self._bench.places
        run = ShellRun(
            spec,
            dirs.work,
            places.place(mode),
            stdin=dirs.work / laid.stdout,
            on_output=lambda stream, offset, data: None,
            on_end=ended,
        )
        run.start()
        trial.kill = lambda: run.stop("cancelled", trial.stopped)

    def _remove(self, trial: _Trial, dirs: JobDirs) -> None:
        """The directory goes before anybody hears of the verdict."""

        trial.kill = lambda: None
        self._bench.in_thread(lambda future: self._removed(trial, future), dirs.remove)

    def _removed(self, trial: _Trial, future: Future[None]) -> None:
        try:
            future.result()
        finally:
            self._again -= trial.again
            self._next(trial)
            while self._waiting and self._again < limits.VERIFIERS_AT_ONCE_MAX:
                self._next(self._waiting.popleft())

    # --- verifier modules

    def _module(self, trial: _Trial, check: Check) -> None:
        """Beside its arguments and standard input a module finds the output files, in memory as every module does."""
        computer = self._bench.computer
        if computer.trouble:
            self._cannot(trial, computer.trouble)
            return
        if trial.again and self._again >= limits.VERIFIERS_AT_ONCE_MAX:
            self._waiting.append(trial)
            return
        number = self._number(trial)
        directory = self._bench.scratch / f"{number.hex()}-judged"

        def prepared(future: Future[Laid]) -> None:
            try:
                laid = future.result()
                if not trial.stopped:
                    self._run_module(trial, check, number, directory, laid)
                    return
            except (OSError, ClawnetError) as error:
                trial.verdict.append(judged(trial.n, "broken", f"its verifier cannot be started: {error}"))
            self._clear(trial, directory)

        self._again += trial.again
        trial.kill = lambda: None  # it is over in a moment
        self._bench.in_thread(prepared, lay_out, trial.product, directory)

    def _run_module(self, trial: _Trial, check: Check, number: bytes, directory: Path, laid: Laid) -> None:
        product, module = trial.product, check.module
        assert module is not None, "whoever took in the document has seen to that"
        code = "" if product.exit_code is None else str(product.exit_code)
        run = WasmRun(
            module,
            argv=[code],
            env=_environment(product, laid.stdout, laid.stderr),
            stdin_path=str(directory / STDOUT_NAME),
            stdin_key=laid.key,
            given=laid.files,
            memory_bytes_max=self._bench.settings().memory_bytes_max,
            output_bytes_max=limits.VERIFIER_OUTPUT_BYTES_MAX,
        )

        def ended(computed: Computed) -> None:
            if trial.again and computed.head is None and self._bench.computer.trouble:
                trial.verdict.append(judged(trial.n, "skipped", self._bench.computer.trouble))
            else:
                trial.verdict.append(_told_by_module(trial, computed))
            computed.close()
            self._clear(trial, directory)

        def kill() -> None:
            if self._bench.pool.cancel(number):
                self._clear(trial, directory)

        trial.kill = kill
        wall_s = max(self._left_s(trial), _STEP_S)
        self._bench.computer.run_module(number, run, wall_s=wall_s, ended=ended)

    def _clear(self, trial: _Trial, directory: Path) -> None:
        trial.kill = lambda: None
        self._bench.in_thread(lambda future: self._removed(trial, future), remove_tree, directory)


def _told(trial: _Trial, end: Ended, said: bytes) -> Judged:
    """How a verifier command that has ended judged."""
    if end.how == "wall_limit":
        return judged(trial.n, "broken", f"its verifier did not end: {end.reason}", said)
    if end.how != "exit":
        return judged(trial.n, "broken", f"its verifier came to no verdict: {end.reason}", said)
    if end.exit_code == 0:
        return judged(trial.n, "passed")
    if end.exit_code is None:
        return judged(trial.n, "broken", f"its verifier crashed (signal {end.signal})", said)
    if trial.again and end.exit_code in _NOT_FOUND:
        return judged(trial.n, "skipped", f"its verifier cannot run here (exit code {end.exit_code})", said)
    return judged(trial.n, "failed", f"its verifier ended with exit code {end.exit_code}", said)


def _environment(product: Product, stdout: str, stderr: str) -> dict[str, str]:
    """What a verifier is told of the run whose result it judges."""
    return {
        "CLAWNET_EXIT_CODE": "" if product.exit_code is None else str(product.exit_code),
        "CLAWNET_SIGNAL": "" if product.signal is None else str(product.signal),
        "CLAWNET_STDOUT": stdout,
        "CLAWNET_STDERR": stderr,
    }


def _told_by_module(trial: _Trial, computed: Computed) -> Judged:
    """How a verifier module that has ended judged."""
    head = computed.head
    if head is None:
        return judged(trial.n, "broken", f"its verifier came to no verdict: {computed.reason}")
    if head.exit_code == 0:
        return judged(trial.n, "passed")
    start = max(0, head.stderr_bytes - limits.VERIFIER_STDERR_BYTES_MAX)
    said = b"".join(span(computed.streams, head.stdout_bytes + start, head.stderr_bytes - start))
    how = "trapped" if head.exit_code == TRAPPED else f"ended with exit code {head.exit_code}"
    return judged(trial.n, "failed", f"its verifier {how}", said)
