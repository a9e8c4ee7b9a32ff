"""Files of this machine's user, in threads: inputs packed into blobs, output files put into a directory."""

from __future__ import annotations

import errno
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from clawnet.errors import ClawnetError, DataError, StorageFullError
from clawnet.execution import feeding, inputs
from clawnet.execution.progress import Progress
from clawnet.execution.saving import Saved, Saver
from clawnet.execution.spec import BlobPort
from clawnet.paths import Home
from clawnet.wire.events import InputsReady, PackInputs, Stimulus
from clawnet.wire.fileevents import Moved, OutputsSaved, SaveOutputs


class LocalFiles:
    """Answers PackInputs with InputsReady and SaveOutputs with OutputsSaved; Moved tells how far they are."""

    def __init__(
        self,
        home: Home,
        blobs: BlobPort,
        entropy: Callable[[int], bytes],
        in_thread: Callable[..., None],
        deliver: Callable[[Stimulus], None],
        from_thread: Callable[..., object],
    ) -> None:
        """`from_thread` calls a function with arguments in the loop's thread."""
        self._home = home
        self._private = (home.dir.resolve(), home.data_dir.resolve())
        self._blobs = blobs
        self._in_thread = in_thread
        self._deliver = deliver
        self._from_thread = from_thread
        self._saver = Saver(home, entropy)

    def recover(self) -> None:
        """Ends what an earlier life of this node was saving."""
        self._saver.recover()

    def _moved(self, what: str, about: bytes | int, total: int) -> Progress:
        return Progress(total, lambda done, of: self._from_thread(self._deliver, Moved(what, about, done, of)))

    def pack(self, effect: PackInputs) -> None:
        """Stores local files and directories as blobs; InputsReady tells them, or the first error."""

        def work() -> tuple[dict[str, Any], ...]:
            moved = self._moved("packing", effect.request, 0)
            return tuple(
                inputs.pack_path(
                    name,
                    path,
                    self._blobs,
                    private=feeding.private_but(self._home, path, self._private),
                    gitignore=effect.gitignore,
                    moved=moved.more,
                )
                for name, path in effect.paths
            )

        def done(packed: Callable[[], tuple[dict[str, Any], ...]]) -> None:
            try:
                ready = InputsReady(effect.request, packed())
            except ClawnetError as error:
                ready = InputsReady(effect.request, (), error.as_dict())
            except OSError as error:
                full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                kind = StorageFullError if full else DataError
                ready = InputsReady(effect.request, (), kind(f"the inputs cannot be stored: {error}").as_dict())
            self._deliver(ready)

        if inputs.are_small(path for _, path in effect.paths):
            done(work)
        else:
            self._in_thread(lambda future: done(future.result), work)

    def save(self, effect: SaveOutputs) -> None:
        """Puts output files into a directory; OutputsSaved tells how many, or why none."""

        def work() -> Saved:
            archive = self._blobs.path(effect.blob)
            moved = self._moved("saving", effect.call, _size(archive)).more if effect.told else _nothing
            return self._saver.save(archive, effect.blob, effect.outputs, effect.directory, effect.umask, moved)

        def done(future: Future[Saved]) -> None:
            try:
                saved = future.result()
                ended = OutputsSaved(effect.call, saved.files, saved.bytes)
            except ClawnetError as error:
                ended = OutputsSaved(effect.call, 0, 0, error.as_dict())
            self._deliver(ended)

        self._in_thread(done, work)


def _size(archive: Path) -> int:
    """How long it is; 0 where that cannot be told, which whoever reads it says better."""
    try:
        return archive.stat().st_size
    except OSError:
        return 0


def _nothing(size: int) -> None:
    """Nobody wants to hear of it."""
