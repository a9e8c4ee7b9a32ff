"""Which files of a task's working directory are its outputs: patterns as a shell has them, matched name by name.

Both sides ask the same rules: the executor when it looks for the files, the requester when it checks that what came is
what it asked for. The cost follows the length of a path, whatever the pattern.
"""

from __future__ import annotations

import fnmatch
import re
import unicodedata
from collections.abc import Sequence
from typing import Final

from clawnet import limits
from clawnet.errors import DataError

ANY_DEPTH: Final = "**"
_GIT: Final = (".git", "git~1")
State = frozenset[tuple[int, int]]
"""Places in the patterns: (which one, how many of its parts are behind)."""


def split(pattern: str) -> list[str]:
    """A pattern's parts; raises DataError for one that could name something outside the directory."""
    hint = "patterns are relative to the task's working directory, such as 'dist/*' or 'reports/**/*.xml'"
    if not pattern or len(pattern) > limits.OUTPUT_GLOB_CHARS_MAX:
        raise DataError(
            f"an output pattern has 1 to {limits.OUTPUT_GLOB_CHARS_MAX} characters: {pattern[:60]!r}", hint=hint
        )
    if any(ord(c) < 32 or ord(c) == 127 or 0xD800 <= ord(c) <= 0xDFFF for c in pattern):
        raise DataError(f"the output pattern {pattern[:60]!r} holds a control character", hint=hint)
    if "\\" in pattern:
        raise DataError(f"the output pattern {pattern[:60]!r} holds a backslash", hint="write / between directories")
    parts = [part for part in pattern.split("/") if part not in ("", ".")]
    if pattern.startswith(("/", "~")) or ".." in parts or re.match(r"[A-Za-z]:", pattern):
        raise DataError(f"the output pattern {pattern[:60]!r} leads out of the working directory", hint=hint)
    if sum(part != ANY_DEPTH for part in parts) > limits.OUTPUT_DEPTH_MAX:
        raise DataError(
            f"the output pattern {pattern[:60]!r} names what lies more than {limits.OUTPUT_DEPTH_MAX} directories deep",
            hint=hint,
        )
    # Several ** in a row say no more than one.
    once = [part for n, part in enumerate(parts) if part != ANY_DEPTH or n == 0 or parts[n - 1] != ANY_DEPTH]
    return [unicodedata.normalize("NFC", part) for part in once]


def is_git(name: str) -> bool:
    """Whether a name is that of a repository's own directory, on any file system."""
    bare = "".join(c for c in unicodedata.normalize("NFC", name) if unicodedata.category(c) != "Cf")
    return bare.casefold().rstrip(" .").split(":")[0] in _GIT


class Globs:
    """Patterns of `*`, `?`, `[...]` within a name, and `**` for any number of directories.

    As in a shell no wildcard matches a leading dot. A directory that matches is taken whole, with the names in it that
    begin with a dot; `.` is the whole working directory. What is in a repository's `.git` is taken only where a
    pattern names that directory.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        """Raises DataError for a pattern that is none, and for too many."""
        if len(patterns) > limits.OUTPUT_GLOBS_MAX:
            raise DataError(f"{len(patterns)} output patterns; at most {limits.OUTPUT_GLOBS_MAX} are allowed")
        self.patterns = tuple(patterns)
        parts = [split(pattern) for pattern in patterns]
        self._parts = [[None if part == ANY_DEPTH else _Part(part) for part in each] for each in parts]
        self._plain = [[part.startswith(".") for part in each] for each in parts]
        self._git = any(is_git(part) for each in parts for part in each)

    @property
    def start(self) -> State:
        """Where every match begins: at the working directory itself."""
        return self._closed((number, 0) for number in range(len(self._parts)))

    def _closed(self, places: object) -> State:
        """With what `**` allows to skip; a last `**` stands for at least one name."""
        found: set[tuple[int, int]] = set()
        for number, at in places:  # type: ignore[attr-defined]
            parts = self._parts[number]
            found.add((number, at))
            while at < len(parts) - 1 and parts[at] is None:
                at += 1
                found.add((number, at))
        return frozenset(found)

    def step(self, state: State, name: str) -> State:
        """The places after one more name below."""
        name = unicodedata.normalize("NFC", name)
        if is_git(name) and not self._git:
            return frozenset()
        after: set[tuple[int, int]] = set()
        for number, at in state:
            parts = self._parts[number]
            if at == len(parts):
                continue
            part = parts[at]
            if part is None:
                if not name.startswith("."):
                    after.add((number, at))
                    if at == len(parts) - 1:
                        after.add((number, at + 1))
            elif (not name.startswith(".") or self._plain[number][at]) and part.match(name):
                after.add((number, at + 1))
        return self._closed(after)

    def matched(self, state: State) -> set[int]:
        """The patterns (by number) that end here."""
        return {number for number, at in state if at == len(self._parts[number])}

    def inside(self, name: str) -> bool:
        """Whether this name may be taken below a directory that is taken whole."""
        return self._git or not is_git(name)

    def covers(self, path: Sequence[str]) -> bool:
        """Whether a pattern asks for this path, or for a directory around it."""
        state = self.start
        whole = bool(self.matched(state))
        for name in path:
            if whole:
                if not self.inside(name):
                    return False
                continue
            state = self.step(state, name)
            whole = bool(self.matched(state))
        return whole


class _Part:
    """One part of a pattern, made ready when a name is first held against it: most of a bad pattern's never are."""

    __slots__ = ("_regex", "_text")

    def __init__(self, text: str) -> None:
        self._text = text
        self._regex: re.Pattern[str] | None = None

    def match(self, name: str) -> bool:
        """Whether it means this name."""
        if self._regex is None:
            self._regex = re.compile(fnmatch.translate(self._text), re.DOTALL)
        return self._regex.match(name) is not None
