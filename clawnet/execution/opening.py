"""The results that come back: unsealed, and judged by the contract of their task."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import IO, Any, Final

from clawnet import limits
from clawnet.errors import ClawnetError, StorageError
from clawnet.execution import bundle, verify
from clawnet.execution.product import of_summary
from clawnet.execution.spec import BlobPort
from clawnet.wire.events import STORAGE, Open, Opened, Stimulus
from clawnet.wire.verdict import Verdict

_READ_BYTES: Final = 256 * limits.KIB


class Opener:
    """Answers Open with Opened: the Summary (execution/bundle.py) and the verdict, or why it does not open."""

    def __init__(
        self,
        blobs: BlobPort,
        judge: verify.Judge,
        in_thread: Callable[..., None],
        deliver: Callable[[Stimulus], None],
    ) -> None:
        self._blobs = blobs
        self._judge = judge
        self._in_thread = in_thread
        self._deliver = deliver

    def open(self, effect: Open) -> None:
        """Long results in a thread, and those that may hold files: a liar's take long to look at, all are written."""

        def done(future: Future[bundle.Summary]) -> None:
            try:
                self._opened(effect, future.result())
            except StorageError as error:
                self._deliver(Opened(effect.request, error.message, fault=STORAGE))
            except ClawnetError as error:
                self._deliver(Opened(effect.request, error.message))
            except OSError as error:
                self._deliver(Opened(effect.request, error.strerror or str(error), fault=STORAGE))

        if len(effect.inline) > limits.RUN_INLINE_WORK_BYTES_MAX or not effect.inline or effect.outputs:
            self._in_thread(done, self._unpacked, effect)
            return
        future: Future[Any] = Future()
        try:
            future.set_result(self._unpacked(effect))
        except (ClawnetError, OSError) as error:
            future.set_exception(error)
        done(future)

    def _unpacked(self, effect: Open) -> bundle.Summary:
        words: dict[str, Any] = {"outputs": effect.outputs} if effect.outputs else {}
        if effect.outputs_bytes_max:
            words["outputs_bytes_max"] = effect.outputs_bytes_max
        if effect.inline or not effect.blob_bytes:
            return bundle.unpack((effect.inline,), effect.key, self._blobs, **words)
        with self._blobs.path(effect.blob).open("rb") as file:
            return bundle.unpack(_pieces(file), effect.key, self._blobs, **words)

    def _opened(self, effect: Open, found: bundle.Summary) -> None:
        if not effect.acceptance:
            self._deliver(Opened(effect.request, "", found))
            return

        def done(verdict: Verdict, stopped: str) -> None:
            self._deliver(Opened(effect.request, "", found, verdict))

        product = of_summary(found, self._blobs)
        wall_s = limits.RUN_WALL_S_MAX
        self._judge.judge(
            effect.request, effect.acceptance, product, ring="own", within_s=wall_s, again=True, done=done
        )


def _pieces(file: IO[bytes]) -> Iterator[bytes]:
    while data := file.read(_READ_BYTES):
        yield data
