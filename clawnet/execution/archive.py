"""The one form in which trees of files travel: a tar with nothing in it that a tree of ours does not need.

Written are ustar headers for files, directories and symbolic links, and before one whose name or target is long or not
ASCII a pax header that says it (POSIX.1-2001, pax; section "ustar Interchange Format"). Read is exactly that: sizes are
bounded before anything is held in memory, and every other kind of member is refused.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import IO, Any, Final, Protocol

from msgspec import Struct

from clawnet import limits
from clawnet.errors import DataError

BLOCK: Final = 512
_RECORD: Final = 20 * BLOCK
_PAX_BYTES_MAX: Final = 32 * limits.KIB
_PAX_WORDS: Final = frozenset(("path", "linkpath", "size"))
_KINDS: Final = {b"0": "file", b"\0": "file", b"5": "dir", b"2": "link"}
_TYPES: Final = {"file": tarfile.REGTYPE, "dir": tarfile.DIRTYPE, "link": tarfile.SYMTYPE}
_READ_BYTES: Final = 256 * limits.KIB


class Source(Protocol):
    """What is read from."""

    def read(self, size: int = -1, /) -> bytes: ...


class Member(Struct, frozen=True, gc=False):
    """One thing in a tree: `kind` is "file", "dir" or "link"; `name` has / between its parts and none at the end."""

    name: str
    kind: str
    size: int = 0
    executable: bool = False
    target: str = ""


def header(member: Member) -> bytes:
    """The blocks that stand before a member's content; the same bytes for the same member."""
    info = tarfile.TarInfo(member.name)
    info.type = _TYPES[member.kind]
    info.size, info.linkname = member.size, member.target
    info.mode = {"file": 0o755 if member.executable else 0o644, "dir": 0o755, "link": 0o777}[member.kind]
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")


def padding(size: int) -> bytes:
    """What fills a content of this size up to whole blocks."""
    return bytes(-size % BLOCK)


def end(written: int) -> bytes:
    """What closes an archive of which `written` bytes are written."""
    return bytes(2 * BLOCK + -(written + 2 * BLOCK) % _RECORD)


class Reader:
    """Members in their order; `content` gives those of the present file, what is not read of it is skipped."""

    def __init__(self, source: Source, *, files_max: int, bytes_max: int) -> None:
        """`bytes_max` bounds the contents of all files together, as declared and before they are read."""
        self._source = source
        self._files_max = files_max
        self._bytes_left = bytes_max
        self._left = 0
        self._pad = 0

    def __iter__(self) -> Iterator[Member]:
        """Raises DataError for what is no archive of this form, or beyond the bounds."""
        count = 0
        while (member := self._next()) is not None:
            count += 1
            if count > self._files_max:
                raise DataError(f"the tree holds more than {self._files_max} files")
            self._bytes_left -= member.size
            if self._bytes_left < 0:
                raise DataError("the tree is larger than it may be")
            yield member
            for _ in self.content():
                pass

    def content(self) -> Iterator[bytes]:
        """The bytes of the member at hand, in pieces."""
        while self._left:
            piece = self._source.read(min(self._left, _READ_BYTES))
            if not piece:
                raise _bad()
            self._left -= len(piece)
            yield piece
        if self._pad:
            self._exactly(self._pad)
            self._pad = 0

    def _next(self) -> Member | None:
        words: dict[str, str] = {}
        block = self._exactly(BLOCK)
        if block[156:157] == b"x":
            words = self._pax(_fields(block)[1])
            block = self._exactly(BLOCK)
        if not any(block):
            if words:
                raise _bad()
            self._end()
            return None
        name, size, mode, kind, target = _fields(block)
        name, target = words.get("path", name), words.get("linkpath", target)
        if "size" in words:
            if not words["size"].isdigit() or len(words["size"]) > 15:
                raise _bad()
            size = int(words["size"])
        if kind not in _KINDS:
            raise DataError(f"{name[:60]!r} is neither a file, a directory nor a link")
        what = _KINDS[kind]
        if what != "file" and size:
            raise _bad()
        self._left, self._pad = size, -size % BLOCK
        name = name.removesuffix("/") if what == "dir" else name
        return Member(name, what, size, bool(mode & 0o111), target if what == "link" else "")

    def _pax(self, size: int) -> dict[str, str]:
        """The records of a pax header; one key twice, or one that no tree needs, is refused."""
        if not 0 < size <= _PAX_BYTES_MAX:
            raise _bad()
        data = self._exactly(size + -size % BLOCK)[:size]
        words: dict[str, str] = {}
        while data:
            length, space, _ = data.partition(b" ")
            if not space or not length.isdigit() or len(length) > 6 or not len(length) + 3 < int(length) <= len(data):
                raise _bad()
            record, data = data[len(length) + 1 : int(length)], data[int(length) :]
            key, equals, value = record.partition(b"=")
            try:
                word, text = key.decode("ascii"), value[:-1].decode("utf-8")
            except UnicodeDecodeError as error:
                raise _bad() from error
            if not equals or value[-1:] != b"\n" or word not in _PAX_WORDS or word in words:
                raise _bad()
            words[word] = text
        return words

    def _end(self) -> None:
        """After one block of zeros nothing but zeros follows, at least one block of them."""
        data = self._exactly(BLOCK)
        while data:
            if any(data):
                raise _bad()
            data = self._source.read(_READ_BYTES)

    def _exactly(self, size: int) -> bytes:
        parts, left = [], size
        while left:
            piece = self._source.read(min(left, _READ_BYTES))
            if not piece:
                raise _bad()
            parts.append(piece)
            left -= len(piece)
        return parts[0] if len(parts) == 1 else b"".join(parts)


class Index(Reader):
    """Where everything in an archive of this machine's lies: contents are passed over unread."""

    def __init__(self, source: IO[bytes]) -> None:
        super().__init__(source, files_max=limits.TREE_FILES_MAX, bytes_max=limits.INPUT_BYTES_MAX)
        self._file = source

    def content(self) -> Iterator[bytes]:
        self._file.seek(self._left + self._pad, 1)
        self._left = self._pad = 0
        return iter(())


def _bad() -> DataError:
    return DataError("the tree is no archive of ours")


def _number(field: bytes) -> int:
    digits = field.rstrip(b"\0 ").lstrip(b" ")
    if not digits.isdigit() or len(digits) > 12 or any(digit in b"89" for digit in digits):
        raise _bad()
    return int(digits, 8)


def _text(field: bytes) -> str:
    text, _, rest = field.partition(b"\0")
    if any(rest):
        raise _bad()
    try:
        return text.decode("ascii")
    except UnicodeDecodeError as error:
        raise _bad() from error


def _fields(block: bytes) -> tuple[str, int, int, bytes, str]:
    """(name, size, mode, type, link target) of a header block whose checksum holds."""
    summed = sum(block[:148]) + sum(block[156:]) + 8 * 32
    if block[257:265] != b"ustar\x0000" or any(block[345:500]) or _number(block[148:156]) != summed:
        raise _bad()
    return _text(block[:100]), _number(block[124:136]), _number(block[100:108]), block[156:157], _text(block[157:257])


class Writing:
    """An archive on its way into something with `write`; nothing is held in memory."""

    def __init__(self, target: Any) -> None:
        self._target = target
        self.written = 0

    def add(self, member: Member, content: Source | None = None) -> None:
        """One member; its content has exactly the size that it declares, else DataError."""
        self._write(header(member))
        left = member.size
        while left:
            piece = b"" if content is None else content.read(min(left, _READ_BYTES))
            if not piece:
                raise DataError(f"{member.name[:60]!r} became shorter while it was read", hint="try again")
            self._write(piece)
            left -= len(piece)
        if member.size % BLOCK:
            self._write(padding(member.size))

    def close(self) -> None:
        """The end of the archive."""
        self._write(end(self.written))

    def _write(self, data: bytes) -> None:
        self._target.write(data)
        self.written += len(data)
