"""The end of a run that went well: its result is judged by its contract, packed and sealed, and told to the node."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, Final

import msgspec

from clawnet import limits
from clawnet.errors import ClawnetError
from clawnet.execution import bundle, delivery, verify
from clawnet.execution.endings import with_result, without_result
from clawnet.execution.product import of_run
from clawnet.execution.spec import BlobPort, JobSpec
from clawnet.wire.events import Stimulus, TaskExited
from clawnet.wire.verdict import CONTRACT, Verdict, encode_report, failure

_READ_BYTES: Final = 256 * limits.KIB


def _nothing() -> None:
    return


class Outgoing:
    """Makes TaskExited of what a run left."""

    def __init__(
        self,
        blobs: BlobPort,
        judge: verify.Judge,
        entropy: Callable[[int], bytes],
        in_thread: Callable[..., None],
        deliver: Callable[[Stimulus], None],
    ) -> None:
        self._blobs = blobs
        self._judge = judge
        self._entropy = entropy
        self._in_thread = in_thread
        self._deliver = deliver

    def send(
        self,
        spec: JobSpec,
        head: bundle.Head,
        parts: Iterable[bytes],
        close: Callable[[], None] = _nothing,
        files: delivery.Files | None = None,
    ) -> None:
        """`parts` gives the streams each time it is asked; `close` is called once, before the end is told.

        What does not pass its contract is not delivered: a report goes in its place.
        """
        if not spec.acceptance:
            self._pack(spec, head, parts, close, files)
            return

        def done(verdict: Verdict, stopped: str) -> None:
            exited = refusal(spec.job, head, verdict, stopped)
            if exited is None:
                self._pack(spec, head, parts, close, files)
                return
            close()
            self._deliver(exited)

        product = of_run(head, parts, files)
        left_s = spec.until_s - head.usage.duration_s
        self._judge.judge(spec.job, spec.acceptance, product, ring=spec.ring, within_s=left_s, done=done)

    def _pack(
        self,
        spec: JobSpec,
        head: bundle.Head,
        parts: Iterable[bytes],
        close: Callable[[], None],
        files: delivery.Files | None,
    ) -> None:
        args = (head, parts, spec.seal_key, self._entropy, self._blobs, files)
        if files is None and head.stdout_bytes + head.stderr_bytes <= limits.RUN_INLINE_WORK_BYTES_MAX:
            told, packed = delivery.pack(*args)
            close()
            self._deliver(with_result(spec.job, told, packed))
            return

        def done(future: Future[tuple[bundle.Head, bundle.Packed]]) -> None:
            close()
            try:
                exited = with_result(spec.job, *future.result())
            except (OSError, ClawnetError) as error:
                exited = delivery.failure(spec.job, head, error)
            self._deliver(exited)

        self._in_thread(done, delivery.pack, *args)


def refusal(job: bytes, head: bundle.Head, verdict: Verdict, stopped: str) -> TaskExited | None:
    """The end of a run whose result is not delivered; None when it passed."""
    usage = head.usage
    figures = (usage.duration_s, usage.cpu_s, usage.memory_bytes_max, head.stdout_bytes + head.stderr_bytes)
    if stopped:
        return without_result(job, "cancelled", stopped, *figures)
    if failure(verdict) is None:
        return None
    exited = without_result(job, CONTRACT, "the result does not pass its contract", *figures)
    return msgspec.structs.replace(exited, report=encode_report(verdict))


class Contents:
    """What these files hold, one after the other, each time it is asked for."""

    def __init__(self, files: Sequence[Any]) -> None:
        self._files = files

    def __iter__(self) -> Iterator[bytes]:
        for file in self._files:
            file.seek(0)
            while data := file.read(_READ_BYTES):
                yield data
