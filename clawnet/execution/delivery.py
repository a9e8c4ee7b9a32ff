"""A run's result on its way out: its streams and the files it was asked for, in one bundle."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path

import msgspec
from msgspec import Struct

from clawnet.errors import DataError
from clawnet.execution import bundle
from clawnet.execution.bundle import Head, Outputs, Packed
from clawnet.execution.endings import without_result
from clawnet.execution.outputs import OverLimit, collect
from clawnet.execution.spec import BlobPort
from clawnet.wire.events import TaskExited


class Files(Struct, frozen=True):
    """Where to look for a run's output files: below `work`, whose files are `owner`'s (None: this process's)."""

    work: Path
    patterns: list[str]
    bytes_max: int
    owner: int | None = None


def pack(
    head: Head,
    streams: Iterable[bytes],
    key: bytes | None,
    entropy: Callable[[int], bytes],
    blobs: BlobPort,
    files: Files | None = None,
) -> tuple[Head, Packed]:
    """The bundle with the files in it, and the head that tells of them.

    Raises OverLimit for more than may be delivered, DataError for files that change meanwhile, StorageError, OSError.
    """
    if files is not None:
        found = collect(files.work, files.patterns, bytes_max=files.bytes_max, owner=files.owner)
        told = Outputs(found.size, found.left_out, found.left_out_count)
        head, streams = msgspec.structs.replace(head, outputs=told), chain(streams, found.parts())
    return head, bundle.pack(head, streams, key, entropy, blobs)


def failure(job: bytes, head: Head, error: Exception) -> TaskExited:
    """There is no result though the command has ended: its files are too many, or nothing can be stored."""
    how, reason = "failed", f"the result cannot be stored: {error}"
    if isinstance(error, OverLimit):
        how, reason = "output_limit", error.message
    elif isinstance(error, DataError):
        reason = error.message
    usage = head.usage
    return without_result(job, how, reason, usage.duration_s, usage.cpu_s, usage.memory_bytes_max)
