"""Files and directories that travel with a task: packed into blobs at the requester, unpacked at the executor.

A file is its bytes. A directory is an uncompressed tar, the same bytes for the same content: sorted, without owners or
times, symbolic links only where they stay inside. What comes from a peer is unpacked by rules of our own instead of
tarfile's: into a fresh directory, files created exclusively, links made last, so that no name can lead outside.
"""

from __future__ import annotations

import os
import stat
import tarfile
import unicodedata
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, Final, cast

from clawnet import limits
from clawnet.errors import DataError, NotFoundError, NotPermittedError, StorageFullError
from clawnet.execution.spec import BlobPort, BlobWriter, InputRef

NAME_BYTES_MAX: Final = 255
LEFT_OUT_NAMED_MAX: Final = 20
_COPY_BYTES: Final = 256 * limits.KIB
_RESERVED: Final = frozenset(
    ["CON", "PRN", "AUX", "NUL", *(f"COM{n}" for n in range(1, 10)), *(f"LPT{n}" for n in range(1, 10))]
)


def check_name(name: str) -> str:
    """An input's name: one path component that means the same everywhere; raises DataError.

    Not allowed: separators, control characters, characters or names that Windows reserves, a leading dash or a
    trailing dot or space, "." and "..", text that is not in Unicode's composed form.
    """
    reason = ""
    if not name or name in (".", "..") or len(name.encode("utf-8", "surrogateescape")) > NAME_BYTES_MAX:
        reason = f"is empty, a dot, or longer than {NAME_BYTES_MAX} bytes"
    elif any(ord(c) < 32 or ord(c) == 127 or c in '/\\:*?"<>|' or 0xD800 <= ord(c) <= 0xDFFF for c in name):
        reason = "contains a separator, a control character, or one that Windows reserves"
    elif name[0] == "-" or name[-1] in ". ":
        reason = "starts with a dash, or ends with a dot or a space"
    elif name.split(".")[0].upper() in _RESERVED:
        reason = "is a name that Windows reserves"
    elif unicodedata.normalize("NFC", name) != name:
        reason = "is not in Unicode's composed form (NFC)"
    if reason:
        raise DataError(f"the input name {name[:60]!r} {reason}", hint="name it yourself: --input NAME=PATH", name=name)
    return name


def pack_path(name: str, path: str, blobs: BlobPort, *, private: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Stores one local file or directory: {name, kind, blob, bytes, mode, left_out, left_out_count}.

    `private` are directories that never travel (the node's own home): naming something inside is refused, and a
    directory around one goes without it. `left_out` names what could not go along (sockets, devices, links that lead
    outside). Raises DataError, NotFoundError, NotPermittedError or StorageFullError.
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
            return _pack_tree(name, real, blobs, private)
        if not stat.S_ISREG(info.st_mode):
            raise DataError(f"{path} is neither a file nor a directory", hint="inputs are files and directories")
        return _pack_file(name, real, info, blobs)
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


def _pack_file(name: str, path: Path, info: os.stat_result, blobs: BlobPort) -> dict[str, Any]:
    if info.st_size > limits.INPUT_BYTES_MAX:
        raise _too_big(path)
    writer = _Bounded(blobs.writer(), path)
    try:
        with path.open("rb") as source:
            while data := source.read(_COPY_BYTES):
                writer.write(data)
        blob = writer.commit()
    finally:
        writer.abort()
    mode = 0o755 if info.st_mode & 0o111 else 0o644
    return _input(name, "file", blob, writer.size, mode, [])


def _input(name: str, kind: str, blob: bytes, size: int, mode: int, left_out: list[str]) -> dict[str, Any]:
    return {
        "name": name,
        "kind": kind,
        "blob": blob,
        "bytes": size,
        "mode": mode,
        # A name that is no UTF-8 stays behind for that very reason; it is told in a form that can be stored.
        "left_out": [name.encode("utf-8", "backslashreplace").decode() for name in left_out[:LEFT_OUT_NAMED_MAX]],
        "left_out_count": len(left_out),
    }


class _Bounded:
    """A blob writer that refuses to grow beyond an input's size; enough of a file for tarfile to write to."""

    def __init__(self, writer: BlobWriter, path: Path) -> None:
        self._writer = writer
        self._path = path
        self.size = 0

    def write(self, data: bytes) -> int:
        self.size += len(data)
        if self.size > limits.INPUT_BYTES_MAX:
            raise _too_big(self._path)
        self._writer.write(data)
        return len(data)

    def commit(self) -> bytes:
        return self._writer.commit()

    def abort(self) -> None:
        self._writer.abort()


def _pack_tree(name: str, root: Path, blobs: BlobPort, private: tuple[Path, ...]) -> dict[str, Any]:
    writer = _Bounded(blobs.writer(), root)
    left_out: list[str] = []
    try:
        # Plain stream mode pads to 10 KiB records; the tar is bounded by what is written, not by what is read.
        with tarfile.open(mode="w|", fileobj=cast(Any, writer), format=tarfile.PAX_FORMAT, encoding="utf-8") as tar:
            for count, (path, relative) in enumerate(_walk(root, private, left_out), start=1):
                if count > limits.TREE_FILES_MAX:
                    raise DataError(f"{root} holds more than {limits.TREE_FILES_MAX} files", path=str(root))
                _add(tar, root, path, relative, left_out)
        blob = writer.commit()
    finally:
        writer.abort()
    return _input(name, "tree", blob, writer.size, 0o755, left_out)


def _walk(root: Path, private: tuple[Path, ...], left_out: list[str]) -> Iterator[tuple[Path, str]]:
    """Everything below `root`, a directory before what is in it, each level sorted by name."""
    waiting = [("", root)]
    while waiting:
        prefix, directory = waiting.pop()
        below: list[tuple[str, Path]] = []
        for entry in sorted(os.scandir(directory), key=lambda item: os.fsencode(item.name)):
            path, relative = Path(entry.path), prefix + entry.name
            if path in private or not _storable(relative):
                left_out.append(relative)
                continue
            yield path, relative
            if entry.is_dir(follow_symlinks=False):
                below.append((relative + "/", path))
        waiting.extend(reversed(below))


def _storable(relative: str) -> bool:
    return not any(0xD800 <= ord(c) <= 0xDFFF for c in relative)


def _add(tar: tarfile.TarFile, root: Path, path: Path, relative: str, left_out: list[str]) -> None:
    info = path.lstat()
    member = tarfile.TarInfo(relative)
    if stat.S_ISDIR(info.st_mode):
        member.type, member.mode = tarfile.DIRTYPE, 0o755
        tar.addfile(member)
    elif stat.S_ISLNK(info.st_mode):
        target = os.readlink(path)
        if not stays_inside(relative, target) or not _storable(target):
            left_out.append(relative)
            return
        member.type, member.mode, member.linkname = tarfile.SYMTYPE, 0o777, target
        tar.addfile(member)
    elif stat.S_ISREG(info.st_mode):
        with path.open("rb") as source:
            opened = os.fstat(source.fileno())
            member.size, member.mode = opened.st_size, 0o755 if opened.st_mode & 0o111 else 0o644
            tar.addfile(member, source)
    else:
        left_out.append(relative)


def stays_inside(relative: str, target: str) -> bool:
    """Whether a symbolic link at `relative` with this target stays in its tree, by its text alone.

    Judged by text: on the way no ".." may come after a name, since that name could be a link itself.
    """
    if not target or target.startswith(("/", "\\")) or "\0" in target or "\\" in target or ":" in target:
        return False
    depth = len(PurePosixPath(relative).parts) - 1
    seen_name = False
    for part in target.split("/"):
        if part in ("", "."):
            continue
        if part == "..":
            depth -= 1
            if seen_name or depth < 0:
                return False
        else:
            seen_name = True
    return True


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
                _write_new(directory / item.name, source, item.size, 0o755 if item.mode & 0o111 else 0o644, owner)
            elif item.kind == "tree":
                target = directory if item.name == cwd_input else directory / item.name
                if target is not directory:
                    _make_dir(target, owner)
                unpack_tree(source, target, owner)
            else:
                raise DataError(f"an input cannot be a {item.kind[:20]!r}")


def unpack_tree(source: IO[bytes], directory: Path, owner: int | None = None) -> None:
    """Unpacks a tree into an empty directory; raises DataError for anything that pack_path would not have written."""
    links: list[tuple[Path, str]] = []
    left = limits.INPUT_BYTES_MAX
    try:
        with tarfile.open(mode="r|", fileobj=source, encoding="utf-8") as tar:
            for count, member in enumerate(tar, start=1):
                if count > limits.TREE_FILES_MAX:
                    raise DataError(f"the tree holds more than {limits.TREE_FILES_MAX} files")
                path = directory.joinpath(*_components(member.name))
                if member.isdir():
                    _make_dir(path, owner)
                elif member.issym():
                    if not stays_inside(member.name, member.linkname):
                        raise DataError(f"the link {member.name[:60]!r} leads out of its tree")
                    links.append((path, member.linkname))
                elif member.isreg() and not member.issparse():
                    left -= member.size
                    content = tar.extractfile(member)
                    if left < 0 or content is None:
                        raise DataError("the tree is larger than an input may be")
                    _write_new(path, content, member.size, 0o755 if member.mode & 0o111 else 0o644, owner)
                else:
                    raise DataError(f"{member.name[:60]!r} is neither a file, a directory nor a link")
        for path, target in links:
            os.symlink(target, path)
            if owner is not None:
                os.chown(path, owner, owner, follow_symlinks=False)
    except (tarfile.TarError, UnicodeError, EOFError) as error:
        raise DataError("the tree is no archive of ours") from error
    except (FileExistsError, FileNotFoundError, NotADirectoryError) as error:
        raise DataError("the tree names a file twice, or one without its directory") from error


def _components(name: str) -> list[str]:
    parts = name.rstrip("/").split("/")
    if len(name) > 4_096 or any(part in ("", ".", "..") or "\0" in part or len(part) > 255 for part in parts):
        raise DataError(f"the tree holds the name {name[:60]!r}")
    if os.name == "nt" and any(set(part) & set('\\:*?"<>|') for part in parts):
        raise DataError(f"the name {name[:60]!r} cannot be made on Windows")
    return parts


def _make_dir(path: Path, owner: int | None) -> None:
    os.mkdir(path, 0o755)
    if owner is not None:
        os.chown(path, owner, owner, follow_symlinks=False)


def _write_new(path: Path, source: IO[bytes], size: int, mode: int, owner: int | None) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags, 0o600)
    except FileExistsError as error:
        raise DataError(f"an input would overwrite {path.name[:60]!r}") from error
    with os.fdopen(descriptor, "wb") as target:
        left = size
        while left and (data := source.read(min(left, _COPY_BYTES))):
            target.write(data)
            left -= len(data)
        if left:
            raise DataError(f"the input {path.name[:60]!r} is shorter than declared")
        if os.name != "nt":
            os.fchmod(descriptor, mode)
            if owner is not None:
                os.fchown(descriptor, owner, owner)
