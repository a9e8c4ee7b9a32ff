"""Standard input that is too long for the task document: where the client leaves it, how a command reads it.

The client writes it to a file in the home's run directory, the daemon packs that as an input blob, the client removes
the file; whoever died in between leaves one that the next sweep finds. At the executor the blob goes into a pipe: not
through this process's memory, and not as a file of the store, which a command could open again and change.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

from clawnet import limits
from clawnet.errors import DataError
from clawnet.execution.spec import BlobPort, InputRef, JobSpec
from clawnet.execution.threads import in_thread
from clawnet.paths import Home

_PIPE_BYTES: Final = limits.MIB
_AHEAD_BYTES: Final = 4 * limits.MIB
_READ_BYTES: Final = 256 * limits.KIB
_AGAIN_S: Final = 0.05
_F_SETPIPE_SZ: Final = 1031


def aside(spec: JobSpec) -> frozenset[str]:
    """The names of the inputs that are not placed in the working directory."""
    return frozenset((spec.stdin_input,)) if spec.stdin_input else frozenset()


def placed(spec: JobSpec) -> list[InputRef]:
    """The inputs that lie in the working directory."""
    names = aside(spec)
    return [item for item in spec.inputs if item.name not in names]


def stdin_path(spec: JobSpec, blobs: BlobPort) -> Path | None:
    """The blob that is the run's standard input, if one is; raises DataError when the task names none of its files."""
    if not spec.stdin_input:
        return None
    for item in spec.inputs:
        if item.name == spec.stdin_input and item.kind == "file":
            return blobs.path(item.blob)
    raise DataError(f"no file among the inputs is called {spec.stdin_input[:60]!r}, which was to be standard input")


if sys.platform != "win32":

    class Feed:
        """A file on its way into a pipe, as fast as the command reads. `reading` is the command's end.

        A disk may take its time, and the node would stand still: a thread reads ahead, and what is moved here is in
        memory by then. `on_error` is called once when the file cannot be read on. Whoever starts the command closes
        `reading`; `close` ends the rest at any time. POSIX.
        """

        def __init__(self, path: Path, loop: asyncio.AbstractEventLoop, on_error: Callable[[str], None]) -> None:
            """Raises OSError."""
            self._loop = loop
            self._on_error = on_error
            self._source = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._sink = -1
            self._moved = self._ahead = 0
            self._looking = self._pushing = False
            try:
                self.reading, self._sink = os.pipe()
            except OSError:
                os.close(self._source)
                raise
            os.set_blocking(self._sink, False)
            if sys.platform == "linux":
                import fcntl

                with contextlib.suppress(OSError):  # a user may own so many pages of pipes: then it is a short one
                    fcntl.fcntl(self._sink, _F_SETPIPE_SZ, _PIPE_BYTES)
                os.posix_fadvise(self._source, 0, 0, os.POSIX_FADV_SEQUENTIAL)

        def start(self) -> None:
            """Begins; the command need not run yet."""
            self._look_ahead()

        def _look_ahead(self) -> None:
            if not self._looking:
                self._looking = True
                if not in_thread(self._loop, self._looked, read_ahead, self._source, self._ahead):
                    self._loop.call_later(_AGAIN_S, self._look_again)

        def _look_again(self) -> None:
            self._looking = False
            if self._sink < 0:
                os.close(self._source)
            else:
                self._look_ahead()

        def _looked(self, future: asyncio.Future[None]) -> None:
            self._looking = False
            if self._sink < 0:
                os.close(self._source)
                return
            self._ahead += _AHEAD_BYTES
            if not self._pushing:
                self._pushing = True
                self._loop.add_writer(self._sink, self._push)

        def _push(self) -> None:
            try:
                moved = self._move(min(_PIPE_BYTES, self._ahead - self._moved))
            except (BlockingIOError, InterruptedError):
                return
            except BrokenPipeError:
                moved = 0  # the command has closed its standard input, or has ended
            except OSError as error:
                self.close()
                self._on_error(f"its standard input cannot be read: {error.strerror or error}")
                return
            if not moved:
                self.close()
                return
            self._moved += moved
            left = self._ahead - self._moved
            if left <= _AHEAD_BYTES // 2:
                self._look_ahead()
            if not left:
                self._pushing = False
                self._loop.remove_writer(self._sink)

        def _move(self, most: int) -> int:
            if sys.platform == "linux":
                return os.splice(self._source, self._sink, most)
            data = os.read(self._source, min(most, limits.OUTPUT_CHUNK_BYTES_MAX))
            written = os.write(self._sink, data) if data else 0
            if written < len(data):
                os.lseek(self._source, written - len(data), os.SEEK_CUR)
            return written

        def close(self) -> None:
            """Lets go of file and pipe."""
            if self._sink >= 0:
                self._loop.remove_writer(self._sink)
                os.close(self._sink)
                self._sink = -1
                if not self._looking:
                    os.close(self._source)

    def read_ahead(descriptor: int, start: int) -> None:
        """Brings the next part of a file into memory; who reads it there says what is wrong with it."""
        with contextlib.suppress(OSError):
            for at in range(start, start + _AHEAD_BYTES, _READ_BYTES):
                if not os.pread(descriptor, _READ_BYTES, at):
                    return


# --- the client's file


def private_but(home: Home, path: str, private: tuple[Path, ...]) -> tuple[Path, ...]:
    """What never travels, except that the client's file of standard input does."""
    if not os.path.basename(path).startswith(home.STDIN_PREFIX):
        return private
    try:
        return () if home.is_stdin_file(Path(path).resolve()) else private
    except (OSError, ValueError, RuntimeError):
        return private  # whoever opens it says what is wrong with it


def sweep(home: Home) -> None:
    """Removes the files of clients that died; that of one that lives is locked by it."""
    try:
        found = list(home.run_dir.glob(home.STDIN_PREFIX + "*"))
    except OSError:
        return
    for path in found:
        with contextlib.suppress(OSError):  # held open by a client on Windows, or gone by now
            if not _in_use(path):
                path.unlink()


def _in_use(path: Path) -> bool:
    if sys.platform == "win32":
        return False  # what is open there cannot be removed anyway
    import fcntl

    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
