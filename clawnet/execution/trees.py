"""Directories as one run of bytes: packed the same for the same content, unpacked by rules of our own.

Sorted, without owners or times, symbolic links only where they stay inside. What comes from a peer is unpacked into a
fresh directory, files created exclusively, links made last, so that no name can lead outside.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Final

from msgspec import Struct

from clawnet import limits
from clawnet.errors import DataError
from clawnet.execution.archive import Member, Reader, Source, Writing
from clawnet.execution.ignoring import GitIgnore

NAME_BYTES_MAX: Final = 255
_COPY_BYTES: Final = 256 * limits.KIB
RESERVED: Final = frozenset(
    ["CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"]
    + [f"{word}{n}" for word in ("COM", "LPT") for n in "123456789\u00b9\u00b2\u00b3"]
)
"""Names that Windows keeps for devices, with whatever extension."""


def reserved(name: str) -> bool:
    """Whether Windows would take this name for a device."""
    return name.split(".")[0].rstrip(" ").upper() in RESERVED


class LeftOut(Struct):
    """What did not go along: `names` of what cannot travel, and how many entries git ignores."""

    names: list[str]
    ignored: int = 0


def pack_tree(root: Path, target: Any, *, private: tuple[Path, ...] = (), gitignore: bool = False) -> LeftOut:
    """Writes the directory as an archive into something with `write`; what stayed behind.

    `private` are directories that never travel; with `gitignore` neither does what its Git repository ignores. Raises
    DataError for a tree that changes meanwhile, and OSError.
    """
    left = LeftOut([])
    tar = Writing(target)
    for count, (path, relative) in enumerate(_walk(root, private, left, gitignore), start=1):
        if count > limits.TREE_FILES_MAX:
            raise DataError(f"{root} holds more than {limits.TREE_FILES_MAX} files", path=str(root))
        _add(tar, path, relative, left.names)
    tar.close()
    return left


def _walk(root: Path, private: tuple[Path, ...], left: LeftOut, gitignore: bool) -> Iterator[tuple[Path, str]]:
    """Everything below `root`, a directory before what is in it, each level sorted by name."""
    rules = GitIgnore(root) if gitignore else None
    waiting = [("", root)]
    while waiting:
        prefix, directory = waiting.pop()
        if rules is not None and prefix:
            rules.enter(directory)
        below: list[tuple[str, Path]] = []
        for entry in sorted(os.scandir(directory), key=lambda item: os.fsencode(item.name)):
            path, relative, is_dir = Path(entry.path), prefix + entry.name, entry.is_dir(follow_symlinks=False)
            if rules is not None and rules.left(directory, entry.name, is_dir=is_dir):
                left.ignored += 1
                continue
            if path in private or not storable(relative):
                left.names.append(relative)
                continue
            yield path, relative
            if is_dir:
                below.append((relative + "/", path))
        waiting.extend(reversed(below))


def storable(name: str) -> bool:
    """Whether a name is text: what is no UTF-8 comes from the file system as half of surrogate pairs."""
    return not any(0xD800 <= ord(c) <= 0xDFFF for c in name)


def _add(tar: Writing, path: Path, relative: str, left_out: list[str]) -> None:
    info = path.lstat()
    if stat.S_ISDIR(info.st_mode):
        tar.add(Member(relative, "dir"))
    elif stat.S_ISLNK(info.st_mode):
        target = os.readlink(path)
        if not stays_inside(relative, target) or not storable(target):
            left_out.append(relative)
            return
        tar.add(Member(relative, "link", target=target))
    elif stat.S_ISREG(info.st_mode):
        with path.open("rb") as source:
            opened = os.fstat(source.fileno())
            tar.add(Member(relative, "file", opened.st_size, bool(opened.st_mode & 0o111)), source)
            check_unchanged(source.fileno(), opened, path)
    else:
        left_out.append(relative)


def check_unchanged(descriptor: int, before: os.stat_result, path: Path) -> None:
    """Raises DataError when somebody wrote to the file while it was read: what was read is then nobody's content."""
    after = os.fstat(descriptor)
    if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise DataError(
            f"{path} changed while it was read", hint="submit again when nothing writes to it", path=str(path)
        )


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


# --- unpacking


def unpack_tree(source: Source, directory: Path, owner: int | None = None, *, bytes_max: int | None = None) -> None:
    """Unpacks a tree into an empty directory; raises DataError for anything that pack_tree would not have written.

    With `owner` all is given to that uid and gid. `bytes_max` bounds the files together (None: as an input's).
    """
    links: list[tuple[Path, str]] = []
    directories = {""}
    most = limits.INPUT_BYTES_MAX if bytes_max is None else bytes_max
    tar = Reader(source, files_max=limits.TREE_FILES_MAX, bytes_max=most)
    try:
        for member in tar:
            path = directory.joinpath(*components(member.name))
            # Nothing lies below a link: through one of this tree another could be made anywhere on this machine.
            if member.name.rpartition("/")[0] not in directories:
                raise DataError("the tree names a file twice, or one without its directory")
            if member.kind == "dir":
                make_dir(path, owner)
                directories.add(member.name)
            elif member.kind == "link":
                if not stays_inside(member.name, member.target):
                    raise DataError(f"the link {member.name[:60]!r} leads out of its tree")
                links.append((path, member.target))
            else:
                write_new(path, tar.content(), member.size, 0o755 if member.executable else 0o644, owner)
        for path, target in links:
            os.symlink(target, path)
            if owner is not None:
                os.chown(path, owner, owner, follow_symlinks=False)
    except (FileExistsError, FileNotFoundError, NotADirectoryError) as error:
        raise DataError("the tree names a file twice, or one without its directory") from error


def components(name: str) -> list[str]:
    """The parts of a name in a tree; raises DataError for one that no system could place, or not this one."""
    parts = name.split("/")
    if len(name) > limits.TREE_PATH_CHARS_MAX or any(
        part in ("", ".", "..") or "\0" in part or len(part.encode("utf-8", "surrogateescape")) > NAME_BYTES_MAX
        for part in parts
    ):
        raise DataError(f"the tree holds the name {name[:60]!r}")
    if os.name == "nt" and any(
        set(part) & set('\\:*?"<>|') or part[-1] in ". " or reserved(part) or not part.isprintable() for part in parts
    ):
        raise DataError(f"the name {name[:60]!r} cannot be made on Windows")
    return parts


def make_dir(path: Path, owner: int | None) -> None:
    """A directory that was not there."""
    os.mkdir(path, 0o755)
    if owner is not None:
        os.chown(path, owner, owner, follow_symlinks=False)


def write_new(path: Path, content: Iterator[bytes], size: int, mode: int, owner: int | None) -> None:
    """A file that was not there, of exactly this size; raises DataError."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags, 0o600)
    except FileExistsError as error:
        raise DataError(f"an input would overwrite {path.name[:60]!r}") from error
    with os.fdopen(descriptor, "wb") as target:
        written = 0
        for data in content:
            target.write(data)
            written += len(data)
        if written != size:
            raise DataError(f"the input {path.name[:60]!r} is shorter than declared")
        if os.name != "nt":
            os.fchmod(descriptor, mode)
            if owner is not None:
                os.fchown(descriptor, owner, owner)


def pieces(read: Callable[[int], bytes], size: int) -> Iterator[bytes]:
    """At most `size` bytes of what `read` gives, in pieces."""
    left = size
    while left and (data := read(min(left, _COPY_BYTES))):
        left -= len(data)
        yield data
