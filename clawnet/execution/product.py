"""What a run left, as its contract is judged by it: before it is packed, and again after it was opened."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Final

from msgspec import Struct

from clawnet import limits
from clawnet.execution import trees
from clawnet.execution.archive import Index
from clawnet.execution.bundle import Head, Summary
from clawnet.execution.delivery import Files
from clawnet.execution.outputs import collect
from clawnet.execution.spec import BlobPort
from clawnet.execution.wasmruns import InputFile

STDOUT_NAME: Final = ".clawnet-stdout"
STDERR_NAME: Final = ".clawnet-stderr"
_ARCHIVE: Final = "files"
_READ_BYTES: Final = 256 * limits.KIB


class Product(Struct, frozen=True):
    """What a run left. `answer` gives stdout, or the text of a prompt; `files` puts the output files into a directory,
    `archive` gives them as one (nothing: there are none).

    All of them may be asked for several times, in any thread.
    """

    exit_code: int | None
    signal: int | None
    answer: Callable[[], Iterable[bytes]]
    answer_bytes: int
    stderr: Callable[[], Iterable[bytes]]
    files: Callable[[Path, int | None], None] = lambda directory, owner: None
    archive: Callable[[], Iterable[bytes]] = lambda: ()


def of_run(head: Head, streams: Iterable[bytes], files: Files | None) -> Product:
    """What a run left that is not packed yet. `streams` gives stdout and then stderr, each time it is asked."""
    out, err = head.stdout_bytes, head.stderr_bytes
    text = head.text.encode()

    def place(directory: Path, owner: int | None) -> None:
        if files is not None:
            parts = archive()
            if first := next(parts, b""):
                trees.unpack_tree(_Reading(chain((first,), parts)), directory, owner, bytes_max=files.bytes_max)

    def archive() -> Iterator[bytes]:
        if files is not None:
            yield from collect(files.work, files.patterns, bytes_max=files.bytes_max, owner=files.owner).parts()

    return Product(
        exit_code=head.exit_code,
        signal=head.signal,
        answer=(lambda: (text,)) if text and not out else lambda: span(streams, 0, out),
        answer_bytes=out or len(text),
        stderr=lambda: span(streams, out, err),
        files=place,
        archive=archive,
    )


def of_summary(found: Summary, blobs: BlobPort) -> Product:
    """What was opened."""
    text = found.text.encode()

    def stream(data: bytes | None, blob: bytes) -> Iterator[bytes]:
        if data is not None:
            yield data
        elif blob:
            with blobs.path(blob).open("rb") as file:
                while piece := file.read(_READ_BYTES):
                    yield piece

    def place(directory: Path, owner: int | None) -> None:
        if found.outputs_blob:
            with blobs.path(found.outputs_blob).open("rb") as file:
                trees.unpack_tree(file, directory, owner, bytes_max=limits.OUTPUTS_BYTES_MAX)

    whole = text if text and not found.stdout_bytes else None
    return Product(
        exit_code=found.exit_code,
        signal=found.signal,
        answer=lambda: stream(found.stdout, found.stdout_blob) if whole is None else (whole,),
        answer_bytes=found.stdout_bytes if whole is None else len(whole),
        stderr=lambda: stream(found.stderr, found.stderr_blob),
        files=place,
        archive=lambda: stream(None, found.outputs_blob),
    )


class Laid(Struct, frozen=True):
    """Where a verifier finds what the run wrote: names in its directory, which no output file has.

    `key` is the SHA-256 of its standard input, `files` what a module is given.
    """

    stdout: str
    stderr: str
    key: str = ""
    files: list[InputFile] = []


def prepare(product: Product, directory: Path, owner: int | None) -> Laid:
    """For a verifier command: the output files, and beside them what the run wrote."""
    product.files(directory, owner)
    stdout, stderr = (
        _free(name, lambda found: os.path.lexists(directory / found)) for name in (STDOUT_NAME, STDERR_NAME)
    )
    for name, parts in ((stdout, product.answer), (stderr, product.stderr)):
        path = directory / name
        _write(path, parts())
        if owner is not None:
            os.chown(path, owner, owner)
    return Laid(stdout, stderr)


def lay_out(product: Product, directory: Path) -> Laid:
    """For a verifier module: the same in a directory of the node's own."""
    directory.mkdir(mode=0o700, parents=True)
    key, size = _write(directory / STDOUT_NAME, product.answer())
    err_key, err_size = _write(directory / STDERR_NAME, product.stderr())
    tree = directory / _ARCHIVE
    tree_key, tree_size = _write(tree, product.archive())
    taken = _tops(tree) if tree_size else set[str]()
    stdout, stderr = (_free(name, taken.__contains__) for name in (STDOUT_NAME, STDERR_NAME))
    files = [
        InputFile(stdout, "file", str(directory / STDOUT_NAME), size, 0o644, key),
        InputFile(stderr, "file", str(directory / STDERR_NAME), err_size, 0o644, err_key),
    ]
    if tree_size:
        files.append(InputFile("", "tree", str(tree), tree_size, 0o644, tree_key))
    return Laid(stdout, stderr, key, files)


def _free(name: str, taken: Callable[[str], bool]) -> str:
    """This name, or the first like it that is not taken: a run may leave output files of any name."""
    found, n = name, 1
    while taken(found):
        n += 1
        found = f"{name}-{n}"
    return found


def _tops(tree: Path) -> set[str]:
    """The names at the top of an archive."""
    with tree.open("rb") as file:
        return {member.name.partition("/")[0] for member in Index(file)}


def _write(path: Path, parts: Iterable[bytes]) -> tuple[str, int]:
    """Writes a new file; its SHA-256 and size."""
    hasher, size = hashlib.sha256(), 0
    with path.open("xb") as file:
        for part in parts:
            file.write(part)
            hasher.update(part)
            size += len(part)
    return hasher.hexdigest(), size


class _Reading:
    """Reads pieces as a file is read."""

    def __init__(self, parts: Iterator[bytes]) -> None:
        self._parts = parts
        self._held = b""

    def read(self, size: int = -1, /) -> bytes:
        found = []
        while size:
            if not self._held:
                self._held = next(self._parts, b"")
                if not self._held:
                    break
            piece = self._held if size < 0 else self._held[:size]
            self._held = self._held[len(piece) :]
            size -= len(piece) if size > 0 else 0
            found.append(piece)
        return b"".join(found)


def digest(parts: Iterable[bytes]) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()


def span(parts: Iterable[bytes], start: int, size: int) -> Iterator[bytes]:
    """The `size` bytes from `start` on of what comes in pieces."""
    if not size:
        return
    for part in parts:
        if start >= len(part):
            start -= len(part)
            continue
        piece = part[start : start + size]
        start, size = 0, size - len(piece)
        yield piece
        if not size:
            return
