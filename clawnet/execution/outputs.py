"""The files that a task is asked to leave: found where it ran, packed, and checked by whoever asked for them.

At the executor `collect` looks for them when the command has ended, following no link; at the requester `listing` reads
what came as an archive of a possible liar. Both keep to the same names: what could lead out of a directory, or would
mean another file on another system, does not travel, and refuses the whole set where it comes all the same.
"""

from __future__ import annotations

import os
import re
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
_CONTROL: Final = re.compile("[\0-\x1f\x7f-\x9f]")
_TWICE: Final = "is there twice, or lies in what is no directory"
_NOWHERE: Final[State] = frozenset()
_EMPTY: Final[dict[str, Any]] = {}
"""What is in a file: nothing, and it stays so."""


class OverLimit(DataError):
    """The files are more, or more bytes, than may be delivered."""


def trouble(name: str, depth: int, chars: int) -> str:
    """Why a path of so many parts and characters cannot travel as an output; "" when it can. `name` is its last part.

    Of the parts before it the same was asked when they came: each is looked at once, however much lies below it.
    """
    if not storable(name) or _CONTROL.search(name):
        return "is no text, or holds a control character"
    if name in ("", ".", ".."):
        return "leads out of its directory, or has an empty part"
    if chars > limits.TREE_PATH_CHARS_MAX or len(name.encode()) > NAME_BYTES_MAX:
        return "is too long"
    if depth > limits.OUTPUT_DEPTH_MAX:
        return f"lies more than {limits.OUTPUT_DEPTH_MAX} directories deep"
    if reserved(name):
        return "is a name that Windows reserves"
    if "\\" in name or (os.name == "nt" and (set(name) & set(':*?"<>|') or name[-1] in ". ")):
        return "holds a character that is none of a name everywhere"
    return ""


def _same(name: str) -> str:
    """What two names have in common that some file system takes for one: case, Unicode's forms, invisible signs."""
    if name.isascii():
        return name.lower().rstrip(". ")
    text = "".join(c for c in unicodedata.normalize("NFKC", name) if unicodedata.category(c) != "Cf")
    return unicodedata.normalize("NFKC", text.casefold()).rstrip(". ")


class _Place:
    """A path of a set, with what lies below it. `state` and `whole` are what the patterns say of it."""

    __slots__ = ("_same", "below", "is_dir", "state", "whole")

    def __init__(self, *, is_dir: bool, state: State = _NOWHERE, whole: bool = False) -> None:
        self.is_dir = is_dir
        self.state = state
        self.whole = whole
        self.below: dict[str, _Place] = {} if is_dir else _EMPTY
        self._same: dict[str, str] = {} if is_dir else _EMPTY

    def add(self, name: str, *, is_dir: bool) -> str:
        """Takes in a name below, or says why it does not go with those that are there."""
        if not self.is_dir:
            return _TWICE
        known = self.below.get(name)
        if known is not None:
            return "" if known.is_dir and is_dir else _TWICE
        other = self._same.setdefault(_same(name), name)
        if other != name:
            return f"would be the same file as {other[:60]!r} on some systems"
        self.below[name] = _Place(is_dir=is_dir)
        return ""


class _Names:
    """Paths so far, to find two that would be one file somewhere, and a path through what is no directory."""

    def __init__(self) -> None:
        self._root = _Place(is_dir=True)

    def clash(self, name: str, kind: str) -> str:
        """Why this path does not go with those before it; "" when it does, and then it counts."""
        *above, last = name.split("/")
        place = self._root
        for part in above:
            if part not in place.below and (why := place.add(part, is_dir=True)):
                return why
            place = place.below[part]
        return place.add(last, is_dir=kind == "dir")


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
        why = trouble(name, relative.count("/") + 1, len(relative))
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
        why = trouble(name, relative.count("/") + 1, len(relative))
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
    checked, found = Checked(patterns), Listing([], 0, 0, [])
    tar = Reader(source, files_max=limits.TREE_FILES_MAX, bytes_max=bytes_max)
    for member in tar:
        checked.take(member)
        if member.kind != "file":
            continue
        found.count += 1
        found.bytes += member.size
        if len(found.files) < limits.OUTPUTS_LISTED_MAX:
            hasher = sha256()
            for piece in tar.content():
                hasher.update(piece)
            found.files.append({"name": member.name, "bytes": member.size, "sha256": hasher.hexdigest()})
    found.missing = [pattern for number, pattern in enumerate(patterns) if number not in checked.seen]
    return found


class Checked:
    """The members of one archive, held against the rules as they come. `seen` are the patterns that named any.

    What a name costs is paid once, when it is first met: a liar may put a hundred thousand files under the same sixty
    directories. Directories that are only on the way to a member count as members do, for each of them will be made.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        self._globs = Globs(patterns)
        start = self._globs.start
        self.seen = self._globs.matched(start)
        self._root = _Place(is_dir=True, state=start, whole=bool(self.seen))
        self._count = 0

    def take(self, member: Member) -> None:
        """Raises DataError for a member that no honest executor sends."""
        if why := self._wrong(member):
            raise DataError(f"its output {member.name[:100]!r} {why}")

    def _wrong(self, member: Member) -> str:
        parts = member.name.split("/")
        place, last = self._root, len(parts) - 1
        for n, part in enumerate(parts):
            if n < last and (known := place.below.get(part)) is not None:
                place = known
                continue
            is_dir = n < last or member.kind == "dir"
            if why := trouble(part, len(parts), len(member.name)) or self._met(place, part, is_dir):
                return why
            place = place.below[part]
        if not place.whole and not (member.kind == "dir" and place.state):
            return "was not asked for"
        if member.kind == "link" and not (stays_inside(member.name, member.target) and storable(member.target)):
            return "is a link that leads out of its directory"
        return ""

    def _met(self, place: _Place, part: str, is_dir: bool) -> str:
        """A name that may be new; why it cannot be there, or ""."""
        known = part in place.below
        if (why := place.add(part, is_dir=is_dir)) or known:
            return why
        self._count += 1
        if self._count > limits.TREE_FILES_MAX:
            return f"is beyond the {limits.TREE_FILES_MAX} files and directories of a set"
        new = place.below[part]
        new.state = self._globs.step(place.state, part)
        matched = self._globs.matched(new.state)
        new.whole = self._globs.inside(part) if place.whole else bool(matched)
        self.seen |= matched
        return ""
