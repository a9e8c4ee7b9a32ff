"""The node's side of the worker processes: requests of one turn leave together, answers come back by number.

One worker is started with the node. When an operation keeps it busy, what waits behind is given to another, up to
WORKERS_MAX. A worker that dies, or that is killed for overrunning a time limit, costs the operation it was at; all
others are pure and are simply asked again of the next. Where it is not certain which one that was, each of those that
were under way is asked again alone.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec

from clawnet import limits
from clawnet.config_endpoint import without_secrets
from clawnet.execution.wasmruns import WASM
from clawnet.execution.workerlink import WorkerPipes, WorkerSocket

DEFAULT_ARGV: Final = (sys.executable, "-m", "clawnet.commands", "_worker")
_OVERRUN_S: Final = 1.0
_START_S: Final = 30.0
_FAILED_STARTS_MAX: Final = 3
_PASSING: Final = (errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_TRY_AGAIN_S: Final = 1.0
_TRIES_MAX: Final = 3
_REAP_S: Final = 0.05
_FRAME_MORE_BYTES: Final = 64 * limits.KIB
_FRAME_S: Final = 10.0
_encode: Final = msgspec.msgpack.Encoder().encode

Answer = Callable[[bytes, str, float], None]
"""(data, reason, cpu_s); the reason is empty, a word of TaskExited.ended, or a sentence."""


def _nobody(data: bytes, reason: str, cpu_s: float) -> None:
    """Hears the answer to what was cancelled."""


class _Answer(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """A frame of a worker's; number 0 says that it is ready."""

    number: int
    data: bytes = b""
    reason: str = ""
    cpu_s: float = 0.0


_decode: Final = msgspec.msgpack.Decoder(_Answer).decode
_inf: Final = float("inf")


class _Asked:
    """An operation that somebody waits for. `answer_bytes_max` is how long its answer may be."""

    __slots__ = ("alone", "answer", "answer_bytes_max", "job", "request", "time_s")

    def __init__(self, job: bytes, request: list[Any], time_s: float, answer: Answer) -> None:
        self.job = job
        self.request = request
        self.time_s = time_s
        self.alone = False
        self.answer = answer
        self.answer_bytes_max = min(int(request[5]), limits.WORKER_FRAME_BYTES_MAX)


class _Worker(asyncio.Protocol):
    """One worker process and what it was asked and has not answered, oldest first.

    Modules of strangers run in it, so that its words are a stranger's: a frame is no longer than the longest answer
    that was asked for, and the first that is none, or answers what was not asked, ends the worker.
    """

    def __init__(self, pool: ComputePool) -> None:
        self.unanswered: dict[int, _Asked] = {}
        self.process: subprocess.Popen[bytes] | None = None
        self.out: Any = None
        self.ready = False
        self.gone = False
        self.since_s = 0.0
        self._pool = pool
        self._held = bytearray()
        self._began_s = 0.0
        self._frame_bytes_max = _FRAME_MORE_BYTES
        self._given_away: set[int] = set()

    def ask(self, number: int, asked: _Asked) -> None:
        """It is about to be asked this."""
        self.unanswered[number] = asked
        if asked.answer_bytes_max + _FRAME_MORE_BYTES > self._frame_bytes_max:
            self._frame_bytes_max = asked.answer_bytes_max + _FRAME_MORE_BYTES

    def give_away(self) -> None:
        """All but what it is at is asked of another; that it comes to answer it all the same is known."""
        _, *others = self.unanswered
        self._given_away.update(others)

    def data_received(self, data: bytes) -> None:
        held, now_s = self._held, self._pool.loop.time()
        if not held:
            self._began_s = now_s
        held += data
        if now_s - self._began_s < _FRAME_S:  # it is not stuck while an answer arrives, except byte by byte
            self.since_s = now_s
        while len(held) >= 4 and not self.gone:
            size = int.from_bytes(held[:4], "big")
            if size <= self._frame_bytes_max and len(held) < 4 + size:
                break
            if size > self._frame_bytes_max or not self._heard(bytes(held[4 : 4 + size])):
                held.clear()
                self.connection_lost(None)
                return
            del held[: 4 + size]
            self._began_s = now_s
        if not self.unanswered:
            self._pool.reap_later()
        self._pool.flush_soon()

    def _heard(self, frame: bytes) -> bool:
        """Hands an answer on; False when it is none."""
        try:
            answer = _decode(frame)
        except msgspec.DecodeError:
            return False
        if answer.number == 0:
            if self.ready:
                return False
            self.ready = True
            self._pool.on_ready()
            return True
        asked = self.unanswered.pop(answer.number, None)
        if asked is None:
            known = answer.number in self._given_away
            self._given_away.discard(answer.number)
            return known
        if len(answer.data) > asked.answer_bytes_max or not 0 <= answer.cpu_s < _inf:
            self.unanswered = {answer.number: asked, **self.unanswered}
            return False
        asked.answer(answer.data, answer.reason[: limits.TEXT_CHARS_MAX], answer.cpu_s)
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.gone:
            self.gone = True
            self._pool.on_gone(self)

    @property
    def alone(self) -> bool:
        """Whether it is at an operation that may cost it its life."""
        return any(asked.alone for asked in self.unanswered.values())

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()


class ComputePool:
    """The workers. `on_broken(reason)` is called when none can be started any longer."""

    def __init__(
        self,
        argv: Sequence[str],
        loop: asyncio.AbstractEventLoop,
        *,
        workers_max: int = 0,
        on_broken: Callable[[str], None] = lambda reason: None,
        pipes: bool = sys.platform == "win32",
    ) -> None:
        self.loop = loop
        self.broken = ""
        self._argv = list(argv or DEFAULT_ARGV)
        self._workers: list[_Worker] = []
        self._workers_max = max(1, min(workers_max or os.cpu_count() or 1, limits.WORKERS_MAX))
        self._waiting: deque[_Asked] = deque()
        self._number = 0
        self._failed_starts = 0
        self._flushing = False
        self._checking = False
        self._reaping = False
        self._stopped = False
        self._on_broken = on_broken
        self._pipes = pipes
        self._dying: set[subprocess.Popen[bytes]] = set()
        self._trying: asyncio.TimerHandle | None = None
        self._tries = 0

    def start(self) -> None:
        """Starts the first worker; it answers when it is ready, requests may be made at once."""
        self._start_worker()

    def submit(
        self,
        job: bytes,
        op: str,
        args: Any,
        sources: list[Any],
        *,
        time_s: float,
        answer_bytes_max: int,
        answer: Answer,
    ) -> None:
        """Asks for one operation; `answer` is called once, unless the job is cancelled."""
        if self.broken:
            self.loop.call_soon(answer, b"", self.broken, 0.0)
            return
        self._waiting.append(_Asked(job, [0, op, args, sources, time_s, answer_bytes_max], time_s, answer))
        self.flush_soon()

    def cancel(self, job: bytes) -> bool:
        """Forgets a job, killing the worker if it is busy with it; True if it was known. Its answer never comes."""
        for asked in self._waiting:
            if asked.job == job:
                self._waiting.remove(asked)
                return True
        for worker in self._workers:
            for index, (number, asked) in enumerate(worker.unanswered.items()):
                if asked.job == job:
                    silent = self.loop.time() - worker.since_s > limits.WORKER_STUCK_S
                    if index == 0 and (silent or asked.request[1] == WASM):
                        del worker.unanswered[number]
                        self._retire(worker)
                    else:
                        # The worker may come to it, or has just begun: it gets no time beyond the usual grace.
                        asked.job, asked.answer, asked.time_s = b"", _nobody, 0.0
                    return True
        return False

    def stop(self) -> None:
        """Ends all workers; what they had not answered is not answered any more."""
        self._stopped = True
        self._waiting.clear()
        for worker in self._workers:
            worker.unanswered.clear()
            worker.kill()
            if worker.out is not None:
                worker.out.close()
        for worker in self._workers:
            worker.gone = True
            if worker.process is not None:
                worker.process.wait()
        for process in self._dying:
            process.wait()

    @property
    def pids(self) -> list[int]:
        """The workers' process ids."""
        return [worker.process.pid for worker in self._workers if worker.process is not None]

    # --- between the pool and its workers

    def flush_soon(self) -> None:
        if self._waiting and not self._flushing:
            self._flushing = True
            self.loop.call_soon(self._flush)

    def on_ready(self) -> None:
        self._failed_starts = 0
        self.flush_soon()

    def on_gone(self, worker: _Worker) -> None:
        """A worker died: the operation it was at fails, the others are asked again."""
        if self._stopped:
            return
        if not worker.ready:
            self._failed_starts += 1
        asked = None
        if worker.ready and worker.unanswered:
            number, first = next(iter(worker.unanswered.items()))
            if first.alone or self._is_stuck(worker):
                asked = worker.unanswered.pop(number)
            for each in worker.unanswered.values() if asked is None else ():
                each.alone = True
        self._retire(worker)
        if asked is not None:
            asked.answer(b"", "the worker process died", 0.0)

    def _retire(self, worker: _Worker) -> None:
        """Kills a worker and forgets it; what it had not answered is asked of another."""
        worker.gone = True
        self._workers.remove(worker)
        self._requeue(worker)
        worker.kill()
        if worker.out is not None:
            worker.out.close()
        if worker.process is not None:
            self._bury(worker.process)
        if self._failed_starts >= _FAILED_STARTS_MAX:
            self._break("the worker process does not start: " + " ".join(self._argv))
        elif not self._workers:
            self._start_worker()
        self.flush_soon()

    def _bury(self, process: subprocess.Popen[bytes]) -> None:
        """Reaps a worker that was killed, without waiting for it."""
        self._dying.discard(process)
        if process.poll() is None:
            self._dying.add(process)
            self.loop.call_later(_REAP_S, self._bury, process)

    def _break(self, reason: str) -> None:
        self.broken = reason
        while self._waiting:
            self._waiting.popleft().answer(b"", reason, 0.0)
        self._on_broken(reason)

    def _requeue(self, worker: _Worker) -> None:
        self._waiting.extendleft(each for each in reversed(worker.unanswered.values()) if each.answer is not _nobody)
        worker.unanswered.clear()

    def _start_worker(self) -> bool:
        """True when there is one more; the first is tried again where the machine only lacks something for now."""
        worker = _Worker(self)
        worker.since_s = self.loop.time()
        try:
            self._spawn(worker)
        except OSError as error:
            reason = f"the worker process does not start: {error.strerror or error}"
            if error.errno not in _PASSING:
                self._break(reason)
            elif not self._workers and self._trying is None:
                self._trying = self.loop.call_later(_TRY_AGAIN_S, self._try_again, reason)
            return False
        self._workers.append(worker)
        self._tries = 0
        self._check_later()
        return True

    def _try_again(self, reason: str) -> None:
        """There is no worker; what has waited for one through several tries fails."""
        self._trying = None
        if self._stopped or self._workers:
            return
        if self._start_worker():
            self.flush_soon()
            return
        self._tries += 1
        if self._tries >= _TRIES_MAX:
            failed = list(self._waiting)
            self._waiting.clear()
            for asked in failed:
                asked.answer(b"", reason, 0.0)

    def _spawn(self, worker: _Worker) -> None:
        environ = without_secrets(os.environ)
        if self._pipes:
            worker.process = subprocess.Popen(self._argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ)
            try:
                worker.out = WorkerPipes(worker.process, worker, self.loop)
            except RuntimeError as error:  # no thread is to be had to read from it
                worker.kill()
                self._bury(worker.process)
                raise OSError(errno.EAGAIN, str(error)) from error
            return
        ours, theirs = socket.socketpair()
        try:
            worker.process = subprocess.Popen(
                self._argv, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, env=environ, start_new_session=True
            )
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        ours.setblocking(False)
        worker.out = WorkerSocket(ours, worker, self.loop)

    def _flush(self) -> None:
        self._flushing = False
        while self._waiting and self._workers:
            free = [each for each in self._workers if not each.unanswered or not (self._waiting[0].alone or each.alone)]
            if not free:
                if len(self._workers) < self._workers_max and self._start_worker():
                    continue
                break
            worker = min(free, key=lambda each: (self._is_stuck(each), len(each.unanswered)))
            room = limits.WORKER_UNANSWERED_MAX - len(worker.unanswered)
            if room <= 0:
                break
            share = 1 if self._waiting[0].alone else min(room, -(-len(self._waiting) // len(self._workers)))
            if not worker.unanswered:
                worker.since_s = self.loop.time()
            frames: list[bytes] = []
            for _ in range(share):
                if self._waiting[0].alone and share > 1:
                    break
                asked = self._waiting.popleft()
                self._number += 1
                asked.request[0] = self._number
                worker.ask(self._number, asked)
                frame = _encode(asked.request)
                frames.append(len(frame).to_bytes(4, "big"))
                frames.append(frame)
            worker.out.write(b"".join(frames))
        self._check_later()

    def reap_later(self) -> None:
        """Workers beyond the first go again when nothing has come for them in a while."""
        if len(self._workers) > 1 and not self._reaping:
            self._reaping = True
            self.loop.call_later(limits.WORKER_IDLE_S, self._reap)

    def _reap(self) -> None:
        self._reaping = False
        if self._stopped:
            return
        before_s = self.loop.time() - limits.WORKER_IDLE_S
        for worker in self._workers[1:]:
            if not worker.unanswered and worker.ready and worker.since_s <= before_s:
                self._retire(worker)
        self.reap_later()

    def _is_stuck(self, worker: _Worker) -> bool:
        return bool(worker.unanswered) and self.loop.time() - worker.since_s > limits.WORKER_STUCK_S

    def _check_later(self) -> None:
        if not self._checking and any(not each.ready or each.unanswered for each in self._workers):
            self._checking = True
            self.loop.call_later(limits.WORKER_STUCK_S, self._check)

    def _check(self) -> None:
        """Kills workers that overran, and frees what waits behind a long operation."""
        self._checking = False
        if self._stopped:
            return
        now_s = self.loop.time()
        for worker in list(self._workers):
            age_s = now_s - worker.since_s
            if not worker.ready:
                if age_s > _START_S:
                    self._failed_starts += 1
                    self._retire(worker)
            elif worker.unanswered and age_s > limits.WORKER_STUCK_S:
                self._check_busy(worker, age_s)
        self.flush_soon()
        self._check_later()

    def _check_busy(self, worker: _Worker, age_s: float) -> None:
        number, head = next(iter(worker.unanswered.items()))
        if age_s > head.time_s + _OVERRUN_S:
            del worker.unanswered[number]
            self._retire(worker)
            head.answer(b"", "wall_limit", age_s)
        elif len(worker.unanswered) > 1 and self._other_for(worker):
            worker.give_away()
            del worker.unanswered[number]
            self._requeue(worker)
            worker.unanswered[number] = head

    def _other_for(self, worker: _Worker) -> bool:
        if any(not self._is_stuck(each) for each in self._workers if each is not worker):
            return True
        if len(self._workers) >= self._workers_max:
            return False
        return self._start_worker()
