"""Files and directories that travel with a task: packed into blobs at the requester, placed at the executor.

A file is its bytes, a directory an archive (execution/trees.py).
"""

from __future__ import annotations

import os
import stat
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

from clawnet import limits
from clawnet.errors import DataError, NotFoundError, NotPermittedError, StorageFullError
from clawnet.execution import trees
from clawnet.execution.spec import BlobPort, BlobWriter, InputRef

Moved = Callable[[int], None]

LEFT_OUT_NAMED_MAX: Final = 20
_COPY_BYTES: Final = 256 * limits.KIB


def check_name(name: str) -> str:
    """An input's name: one path component that means the same everywhere; raises DataError.

    Not allowed: separators, control characters, characters or names that Windows reserves, a leading dash or a
    trailing dot or space, "." and "..", text that is not in Unicode's composed form.
    """
    reason = ""
    if not name or name in (".", "..") or len(name.encode("utf-8", "surrogateescape")) > trees.NAME_BYTES_MAX:
        reason = f"is empty, a dot, or longer than {trees.NAME_BYTES_MAX} bytes"
    elif any(ord(c) < 32 or ord(c) == 127 or c in '/\\:*?"<>|' or 0xD800 <= ord(c) <= 0xDFFF for c in name):
        reason = "contains a separator, a control character, or one that Windows reserves"
    elif name[0] == "-" or name[-1] in ". ":
        reason = "starts with a dash, or ends with a dot or a space"
    elif trees.reserved(name):
        reason = "is a name that Windows reserves"
    elif unicodedata.normalize("NFC", name) != name:
        reason = "is not in Unicode's composed form (NFC)"
    if reason:
        raise DataError(f"the input name {name[:60]!r} {reason}", hint="name it yourself: --input NAME=PATH", name=name)
    return name


def pack_path(
    name: str,
    path: str,
    blobs: BlobPort,
    *,
    private: tuple[Path, ...] = (),
    gitignore: bool = False,
    moved: Moved = lambda size: None,
) -> dict[str, Any]:
    """Stores one local file or directory: {name, kind, blob, bytes, mode, left_out, left_out_count, ignored}.

    `private` are directories that never travel (the node's own home): naming something inside is refused, and a
    directory around one goes without it. `left_out` names what could not go along (sockets, devices, links that lead
    outside); `ignored` counts what `gitignore` kept back. `moved` hears of bytes as they are stored. Raises DataError,
    NotFoundError, NotPermittedError or StorageFullError.
    """
    check_name(name)
    where = Path(path)
    try:
        real = where.resolve(strict=True)
        if any(real == secret or secret in real.parents for secret in private):
            raise NotPermittedError(
                f"{path} lies in clawnet's own home, which never leaves this machine",
                hint="copy what you need elsewhere",
            )
        info = real.stat()
        if stat.S_ISDIR(info.st_mode):
            return _pack_tree(name, real, blobs, private, gitignore, moved)
        if not stat.S_ISREG(info.st_mode):
            raise DataError(f"{path} is neither a file nor a directory", hint="inputs are files and directories")
        return _pack_file(name, real, info, blobs, moved)
    except FileNotFoundError as error:
        raise NotFoundError(f"no such file or directory: {error.filename or path}", path=path) from error
    except PermissionError as error:
        raise NotPermittedError(f"{error.filename or path} cannot be read", hint="check its mode", path=path) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise _translated(error, path) from error


def _translated(error: Exception, path: str) -> DataError | StorageFullError:
    import errno

    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageFullError("the disk is full: the inputs cannot be stored", hint="free some space")
    return DataError(f"{path} cannot be read: {error}", path=path)


def _too_big(path: Path) -> DataError:
    return DataError(
        f"{path} is larger than an input may be ({limits.INPUT_BYTES_MAX // limits.MIB} MiB)",
        hint="send a smaller file or directory",
        path=str(path),
    )


def are_small(paths: Iterable[str]) -> bool:
    """Whether these are files that are packed at once, together no more than is done outside of threads."""
    left = limits.RUN_INLINE_WORK_BYTES_MAX
    for path in paths:
        try:
            info = os.stat(path)
        except (OSError, ValueError):
            return True  # the error is told at once
        left -= info.st_size
        if left < 0 or not stat.S_ISREG(info.st_mode):
            return False
    return True


def _pack_file(name: str, path: Path, info: os.stat_result, blobs: BlobPort, moved: Moved) -> dict[str, Any]:
    if info.st_size > limits.INPUT_BYTES_MAX:
        raise _too_big(path)
    mode = 0o755 if info.st_mode & 0o111 else 0o644
    if info.st_size <= limits.RUN_INLINE_WORK_BYTES_MAX:
        with path.open("rb") as source:
            opened = os.fstat(source.fileno())
            data = source.read(limits.RUN_INLINE_WORK_BYTES_MAX + 1)
            trees.check_unchanged(source.fileno(), opened, path)
        if len(data) <= limits.RUN_INLINE_WORK_BYTES_MAX:
            moved(len(data))
            # One that is here already is not written again: a module goes along with a thousand tasks.
            return _input(name, "file", blobs.put_bytes(data), len(data), mode, trees.LeftOut([]))
    writer = _Bounded(blobs.writer(), path, moved)
    try:
        with path.open("rb") as source:
            opened = os.fstat(source.fileno())
            while data := source.read(_COPY_BYTES):
                writer.write(data)
            trees.check_unchanged(source.fileno(), opened, path)
        blob = writer.commit()
    finally:
        writer.abort()
    return _input(name, "file", blob, writer.size, mode, trees.LeftOut([]))


def _input(name: str, kind: str, blob: bytes, size: int, mode: int, left: trees.LeftOut) -> dict[str, Any]:
    return {
        "name": name,
        "kind": kind,
        "blob": blob,
        "bytes": size,
        "mode": mode,
        # A name that is no UTF-8 stays behind for that very reason; it is told in a form that can be stored.
        "left_out": [name.encode("utf-8", "backslashreplace").decode() for name in left.names[:LEFT_OUT_NAMED_MAX]],
        "left_out_count": len(left.names),
        "ignored": left.ignored,
    }


class _Bounded:
    """A blob writer that refuses to grow beyond an input's size; enough of a file for an archive to be written to."""

    def __init__(self, writer: BlobWriter, path: Path, moved: Moved) -> None:
        self._writer = writer
        self._path = path
        self._moved = moved
        self.size = 0

    def write(self, data: bytes) -> int:
        self.size += len(data)
        if self.size > limits.INPUT_BYTES_MAX:
            raise _too_big(self._path)
        self._writer.write(data)
        self._moved(len(data))
        return len(data)

    def commit(self) -> bytes:
        return self._writer.commit()

    def abort(self) -> None:
        self._writer.abort()


def _pack_tree(
    name: str, root: Path, blobs: BlobPort, private: tuple[Path, ...], gitignore: bool, moved: Moved
) -> dict[str, Any]:
    writer = _Bounded(blobs.writer(), root, moved)
    try:
        left = trees.pack_tree(root, writer, private=private, gitignore=gitignore)
        blob = writer.commit()
    finally:
        writer.abort()
    return _input(name, "tree", blob, writer.size, 0o755, left)


def place_inputs(inputs: list[InputRef], cwd_input: str, directory: Path, blobs: BlobPort, owner: int | None) -> None:
    """Puts a run's inputs into its fresh working directory; with `owner` everything is given to that uid and gid.

    Raises DataError for names, archives or sizes that break the rules.
    """
    names = [check_name(item.name) for item in inputs]
    if len({name.casefold() for name in names}) != len(names):
        raise DataError("two inputs have the same name")
    if cwd_input and not any(item.name == cwd_input and item.kind == "tree" for item in inputs):
        raise DataError(f"no directory among the inputs is called {cwd_input[:60]!r}")
    # The tree that is the working directory comes first: the others are placed into it.
    for item in sorted(inputs, key=lambda item: item.name != cwd_input):
        if item.size > limits.INPUT_BYTES_MAX:
            raise DataError(f"the input {item.name!r} is larger than {limits.INPUT_BYTES_MAX} bytes")
        with blobs.path(item.blob).open("rb") as source:
            if item.kind == "file":
                mode = 0o755 if item.mode & 0o111 else 0o644
                trees.write_new(directory / item.name, trees.pieces(source.read, item.size), item.size, mode, owner)
            elif item.kind == "tree":
                target = directory if item.name == cwd_input else directory / item.name
                if target is not directory:
                    trees.make_dir(target, owner)
                trees.unpack_tree(source, target, owner)
            else:
                raise DataError(f"an input cannot be a {item.kind[:20]!r}")
