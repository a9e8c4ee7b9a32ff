"""The files that a task is asked to leave: found where it ran, packed, and checked by whoever asked for them.

At the executor `collect` looks for them when the command has ended, following no link; at the requester `listing` reads
what came as an archive of a possible liar. Both keep to the same names: what could lead out of a directory, or would
mean another file on another system, does not travel, and refuses the whole set where it comes all the same.
"""

from __future__ import annotations

import os
import stat
import unicodedata
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from msgspec import Struct

from clawnet import limits
from clawnet.errors import DataError
from clawnet.execution import archive
from clawnet.execution.archive import Member, Reader, Source
from clawnet.execution.beneath import Beneath
from clawnet.execution.trees import NAME_BYTES_MAX, reserved, stays_inside, storable
from clawnet.wire.globs import Globs, State

NAMED_MAX: Final = 20
_READ_BYTES: Final = 256 * limits.KIB


class OverLimit(DataError):
    """The files are more, or more bytes, than may be delivered."""


def trouble(name: str) -> str:
    """Why a path cannot travel as an output; "" when it can."""
    parts = name.split("/")
    if not storable(name) or any(unicodedata.category(c) == "Cc" for c in name):
        return "is no text, or holds a control character"
    if any(part in ("", ".", "..") for part in parts):
        return "leads out of its directory, or has an empty part"
    if len(name) > limits.TREE_PATH_CHARS_MAX or any(len(part.encode()) > NAME_BYTES_MAX for part in parts):
        return "is too long"
    if len(parts) > limits.OUTPUT_DEPTH_MAX:
        return f"lies more than {limits.OUTPUT_DEPTH_MAX} directories deep"
    if any(reserved(part) for part in parts):
        return "is a name that Windows reserves"
    if "\\" in name or (os.name == "nt" and any(set(part) & set(':*?"<>|') or part[-1] in ". " for part in parts)):
        return "holds a character that is none of a name everywhere"
    return ""


def _same(name: str) -> str:
    """What two names have in common that some file system takes for one: case, Unicode's forms, invisible signs."""
    text = "".join(c for c in unicodedata.normalize("NFKC", name) if unicodedata.category(c) != "Cf")
    return unicodedata.normalize("NFKC", text.casefold()).rstrip(". ")


class _Names:
    """Paths so far, to find two that would be one file somewhere, and a path through what is no directory."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, ...], tuple[str, str]] = {}

    def clash(self, name: str, kind: str) -> str:
        """Why this path does not go with those before it; "" when it does, and then it counts."""
        parts = name.split("/")
        keys = tuple(_same(part) for part in parts)
        found: list[tuple[tuple[str, ...], tuple[str, str]]] = []
        for depth in range(1, len(parts) + 1):
            here = "/".join(parts[:depth])
            what = kind if depth == len(parts) else "dir"
            known = self._known.get(keys[:depth])
            if known is None:
                found.append((keys[:depth], (here, what)))
            elif known[0] != here:
                return f"would be the same file as {known[0][:60]!r} on some systems"
            elif known[1] != "dir" or what != "dir":
                return "is there twice, or lies in what is no directory"
        self._known.update(found)
        return ""


# --- the executor's side


class Collected:
    """The files of a run, found and not yet read. `size` is that of the archive `parts` will give."""

    def __init__(self, root: Path, owner: int | None) -> None:
        self._root = root
        self._owner = owner
        self.members: list[Member] = []
        self.size = 0
        self.left_out: list[str] = []
        self.left_out_count = 0

    def leave(self, name: str, why: str) -> None:
        """One that cannot travel; the first are told by name."""
        self.left_out_count += 1
        if len(self.left_out) < NAMED_MAX:
            told = name.encode("utf-8", "backslashreplace").decode()
            self.left_out.append(f"{told[:200]} {why}")

    def parts(self) -> Iterator[bytes]:
        """The archive. Raises DataError when a file is not what it was when it was found."""
        if not self.members:
            return
        written = 0
        with Beneath.opened(self._root) as root:
            chain = _Chain(root)
            try:
                for member in self.members:
                    written += len(head := archive.header(member))
                    yield head
                    if member.kind != "file":
                        continue
                    yield from self._content(chain, member)
                    pad = archive.padding(member.size)
                    written += member.size + len(pad)
                    yield pad
            finally:
                chain.close()
        yield archive.end(written)

    def _content(self, chain: _Chain, member: Member) -> Iterator[bytes]:
        *above, name = member.name.split("/")
        with os.fdopen(chain.at(above).read(name), "rb") as file:
            info = os.fstat(file.fileno())
            if info.st_size != member.size or not _ours(info, self._owner):
                raise DataError(f"the output {member.name[:60]!r} changed while it was read")
            left = member.size
            while left:
                piece = file.read(min(left, _READ_BYTES))
                if not piece:
                    raise DataError(f"the output {member.name[:60]!r} became shorter while it was read")
                left -= len(piece)
                yield piece


class _Chain:
    """The directories down to where the last file lay, held open: files come directory by directory."""

    def __init__(self, root: Beneath) -> None:
        self._open = [root]
        self._names: list[str] = []

    def at(self, names: list[str]) -> Beneath:
        """The directory of this path."""
        common = 0
        while common < min(len(names), len(self._names)) and names[common] == self._names[common]:
            common += 1
        self._cut(common)
        for name in names[common:]:
            self._open.append(self._open[-1].child(name))
            self._names.append(name)
        return self._open[-1]

    def _cut(self, depth: int) -> None:
        while len(self._names) > depth:
            self._names.pop()
            self._open.pop().close()

    def close(self) -> None:
        """All but the root, which is its opener's."""
        self._cut(0)


def _ours(info: os.stat_result, owner: int | None) -> bool:
    """A file of the run's own: a second name that it gave to somebody else's file is none."""
    return stat.S_ISREG(info.st_mode) and (owner is None or info.st_uid == owner)


def collect(work_dir: Path, patterns: Sequence[str], *, bytes_max: int, owner: int | None = None) -> Collected:
    """What the patterns name below a directory in which nothing runs any longer.

    `owner` is the uid of the run where it is not this process's own: of other users' files none is read. `bytes_max`
    bounds the archive; beyond it, and beyond the number of files a tree may hold, OverLimit. Raises DataError for
    patterns that are none, and OSError.
    """
    globs = Globs(patterns)
    found = Collected(work_dir, owner)
    search = _Search(globs, found, bytes_max)
    with Beneath.opened(work_dir) as root:
        start = globs.start
        search.walk(root, "", start, bool(globs.matched(start)))
    if found.members:
        found.size += len(archive.end(found.size))
    return found


class _Search:
    def __init__(self, globs: Globs, found: Collected, bytes_max: int) -> None:
        self._globs = globs
        self._found = found
        self._bytes_max = bytes_max
        self._names = _Names()
        self._looked = self._compared = 0
        self._parents: list[str] = []

    def walk(self, directory: Beneath, prefix: str, state: State, whole: bool) -> None:
        """One directory: `whole` where all of it is wanted, else what `state` leads to."""
        for entry in sorted(directory.names(), key=lambda item: os.fsencode(item.name)):
            self._looked += 1
            if self._looked > limits.OUTPUTS_LOOKED_THROUGH_MAX:
                raise OverLimit(f"the outputs lie among more than {limits.OUTPUTS_LOOKED_THROUGH_MAX} files")
            self._compared += len(state)
            if self._compared > limits.OUTPUTS_COMPARED_MAX:
                raise OverLimit("the output patterns are too many for so many files")
            after = self._globs.step(state, entry.name)
            matched = self._globs.matched(after)
            wanted = self._globs.inside(entry.name) if whole else bool(matched)
            if not wanted and (whole or not after):
                continue
            info = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(info.st_mode):
                self._enter(directory, entry.name, prefix, after, wanted)
            elif wanted:
                self._take(directory, prefix, entry.name, info)

    def _enter(self, directory: Beneath, name: str, prefix: str, state: State, wanted: bool) -> None:
        relative = prefix + name
        why = trouble(relative)
        if why:
            self._found.leave(relative, why)
            return
        if wanted and not self._add(Member(relative, "dir")):
            return
        if not wanted:
            self._parents.append(relative)
        try:
            inner = directory.child(name)
        except PermissionError:
            self._found.leave(relative, "cannot be read")
            return
        try:
            self.walk(inner, relative + "/", state, wanted)
        finally:
            inner.close()
            if self._parents and self._parents[-1] == relative:
                self._parents.pop()

    def _take(self, directory: Beneath, prefix: str, name: str, info: os.stat_result) -> None:
        relative = prefix + name
        why = trouble(relative)
        if not why and stat.S_ISLNK(info.st_mode):
            target = directory.target(name)
            if stays_inside(relative, target) and storable(target):
                self._add(Member(relative, "link", target=target))
                return
            why = "is a link that leads out of the working directory"
        elif not why and not _ours(info, self._found._owner):
            why = "is no file of the task's own" if stat.S_ISREG(info.st_mode) else "is no file"
        if why:
            self._found.leave(relative, why)
            return
        self._add(Member(relative, "file", info.st_size, bool(info.st_mode & 0o111)))

    def _add(self, member: Member) -> bool:
        """Takes it, with the directories on the way to it that are not taken themselves."""
        for parent in self._parents:
            self._put(Member(parent, "dir"))
        self._parents.clear()
        return self._put(member)

    def _put(self, member: Member) -> bool:
        found = self._found
        why = self._names.clash(member.name, member.kind)
        if why:
            found.leave(member.name, why)
            return False
        found.members.append(member)
        found.size += len(archive.header(member)) + member.size + -member.size % archive.BLOCK
        if len(found.members) > limits.TREE_FILES_MAX:
            raise OverLimit(f"the outputs are more than {limits.TREE_FILES_MAX} files")
        if found.size > self._bytes_max:
            raise OverLimit(f"the outputs are more than {self._bytes_max} bytes")
        return True


# --- the requester's side


class Listing(Struct):
    """What is in an archive of outputs: the first files as the task's JSON shows them, and how many there are.

    `missing` are the patterns that nothing in it matches.
    """

    files: list[dict[str, Any]]
    count: int
    bytes: int
    missing: list[str]


def listing(source: Source, patterns: Sequence[str], *, bytes_max: int) -> Listing:
    """Reads an archive through; raises DataError for the first thing in it that a set of outputs cannot hold."""
    globs, names = Globs(patterns), _Names()
    found, seen = Listing([], 0, 0, []), set[int]()
    tar = Reader(source, files_max=limits.TREE_FILES_MAX, bytes_max=bytes_max)
    for member in tar:
        check(member, globs, names)
        seen |= globs.seen(member.name.split("/"))
        if member.kind != "file":
            continue
        found.count += 1
        found.bytes += member.size
        if len(found.files) < limits.OUTPUTS_LISTED_MAX:
            hasher = sha256()
            for piece in tar.content():
                hasher.update(piece)
            found.files.append({"name": member.name, "bytes": member.size, "sha256": hasher.hexdigest()})
    found.missing = [pattern for number, pattern in enumerate(globs.patterns) if number not in seen]
    return found


def check(member: Member, globs: Globs, names: _Names) -> None:
    """Raises DataError for a member that no honest executor sends."""
    shown = member.name[:100]
    why = trouble(member.name)
    if not why and member.kind == "link" and not (stays_inside(member.name, member.target) and storable(member.target)):
        why = "is a link that leads out of its directory"
    parts = member.name.split("/")
    if not why and not globs.covers(parts) and not (member.kind == "dir" and globs.on_the_way(parts)):
        why = "was not asked for"
    why = why or names.clash(member.name, member.kind)
    if why:
        raise DataError(f"its output {shown!r} {why}")


def new_names() -> _Names:
    """For a second reading of an archive."""
    return _Names()
