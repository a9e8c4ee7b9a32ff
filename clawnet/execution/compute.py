"""The node's side of the worker processes: requests of one turn leave together, answers come back by number.

One worker is started with the node. When an operation keeps it busy, what waits behind is given to another, up to
WORKERS_MAX. A worker that dies, or that is killed for overrunning a time limit, costs the operation it was at; all
others are pure and are simply asked again of the next. Where it is not certain which one that was, each of those that
were under way is asked again alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec

from clawnet import limits
from clawnet.config_endpoint import without_secrets
from clawnet.execution.wasmruns import WASM

DEFAULT_ARGV: Final = (sys.executable, "-m", "clawnet.commands", "_worker")
_OVERRUN_S: Final = 1.0
_START_S: Final = 30.0
_FAILED_STARTS_MAX: Final = 3
_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder(list[Any]).decode

Answer = Callable[[bytes, str, float], None]
"""(data, reason, cpu_s); the reason is empty, a word of TaskExited.ended, or a sentence."""


def _nobody(data: bytes, reason: str, cpu_s: float) -> None:
    """Hears the answer to what was cancelled."""


class _Asked:
    __slots__ = ("alone", "answer", "job", "request", "time_s")

    def __init__(self, job: bytes, request: list[Any], time_s: float, answer: Answer) -> None:
        self.job = job
        self.request = request
        self.time_s = time_s
        self.alone = False
        self.answer = answer


class _Pipes:
    """Standard input and output of a worker where no socket can be handed over: a thread reads."""

    def __init__(self, process: subprocess.Popen[bytes], worker: _Worker, loop: asyncio.AbstractEventLoop) -> None:
        self._process = process
        self._worker = worker
        self._loop = loop
        threading.Thread(target=self._read, name="clawnet-worker-pipe", daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        try:
            while data := os.read(descriptor, 256 * limits.KIB):
                self._loop.call_soon_threadsafe(self._worker.data_received, data)
            self._loop.call_soon_threadsafe(self._worker.connection_lost, None)
        except (OSError, RuntimeError):
            return  # closed from this side, or the loop is gone

    def write(self, data: bytes) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(data)
            self._process.stdin.flush()
        except OSError:
            self._process.kill()  # its end is heard through the other pipe

    def close(self) -> None:
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what was not flushed goes nowhere
                    pipe.close()


class _Worker(asyncio.Protocol):
    """One worker process and what it was asked and has not answered, oldest first."""

    def __init__(self, pool: ComputePool) -> None:
        self.unanswered: dict[int, _Asked] = {}
        self.process: subprocess.Popen[bytes] | None = None
        self.out: Any = None
        self.ready = False
        self.gone = False
        self.since_s = 0.0
        self._pool = pool
        self._held = bytearray()

    def data_received(self, data: bytes) -> None:
        held = self._held
        held += data
        self.since_s = self._pool.loop.time()
        while len(held) >= 4:
            size = int.from_bytes(held[:4], "big")
            if len(held) < 4 + size:
                break
            answer = _decode(bytes(held[4 : 4 + size]))
            del held[: 4 + size]
            if answer[0] == 0:
                self.ready = True
                self._pool.on_ready()
                continue
            asked = self.unanswered.pop(answer[0], None)
            if asked is not None:
                asked.answer(answer[1], answer[2], answer[3])
        if not self.unanswered:
            self._pool.reap_later()
        self._pool.flush_soon()

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
            threading.Thread(target=worker.process.wait, name="clawnet-worker-wait", daemon=True).start()
        if self._failed_starts >= _FAILED_STARTS_MAX:
            self._break("the worker process does not start: " + " ".join(self._argv))
        elif not self._workers:
            self._start_worker()
        self.flush_soon()

    def _break(self, reason: str) -> None:
        self.broken = reason
        while self._waiting:
            self._waiting.popleft().answer(b"", reason, 0.0)
        self._on_broken(reason)

    def _requeue(self, worker: _Worker) -> None:
        self._waiting.extendleft(each for each in reversed(worker.unanswered.values()) if each.answer is not _nobody)
        worker.unanswered.clear()

    def _start_worker(self) -> None:
        worker = _Worker(self)
        worker.since_s = self.loop.time()
        try:
            self._spawn(worker)
        except OSError as error:
            self._break(f"the worker process does not start: {error.strerror or error}")
            return
        self._workers.append(worker)
        self._check_later()

    def _spawn(self, worker: _Worker) -> None:
        environ = without_secrets(os.environ)
        if self._pipes:
            worker.process = subprocess.Popen(self._argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ)
            worker.out = _Pipes(worker.process, worker, self.loop)
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
        worker.out = _SocketOut(ours, worker, self.loop)

    def _flush(self) -> None:
        self._flushing = False
        while self._waiting and self._workers:
            free = [each for each in self._workers if not each.unanswered or not (self._waiting[0].alone or each.alone)]
            if not free:
                if len(self._workers) < self._workers_max:
                    self._start_worker()
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
                worker.unanswered[self._number] = asked
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
            del worker.unanswered[number]
            self._requeue(worker)
            worker.unanswered[number] = head

    def _other_for(self, worker: _Worker) -> bool:
        if any(not self._is_stuck(each) for each in self._workers if each is not worker):
            return True
        if len(self._workers) >= self._workers_max:
            return False
        self._start_worker()
        return True


class _SocketOut:
    """Our end of a worker's socket; unlike an asyncio transport it is made without awaiting."""

    def __init__(self, sock: socket.socket, worker: _Worker, loop: asyncio.AbstractEventLoop) -> None:
        self._sock = sock
        self._worker = worker
        self._loop = loop
        self._unsent = bytearray()
        loop.add_reader(sock, self._on_readable)

    def _on_readable(self) -> None:
        try:
            data = self._sock.recv(256 * limits.KIB)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if data:
            self._worker.data_received(data)
        else:
            self.close()
            self._worker.connection_lost(None)

    def write(self, data: bytes) -> None:
        if self._sock.fileno() < 0:
            return
        if not self._unsent:
            try:
                data = data[self._sock.send(data) :]
            except (BlockingIOError, InterruptedError):
                pass
            except OSError:
                return  # its end is heard by reading
            if not data:
                return
            self._loop.add_writer(self._sock, self._on_writable)
        self._unsent += data

    def _on_writable(self) -> None:
        try:
            del self._unsent[: self._sock.send(self._unsent)]
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._unsent.clear()
        if not self._unsent:
            self._loop.remove_writer(self._sock)

    def close(self) -> None:
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock)
            self._loop.remove_writer(self._sock)
            self._sock.close()
