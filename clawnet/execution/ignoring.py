"""What a Git repository ignores: .gitignore files at every level, negations, .git/info/exclude, .git itself.

The rules are git's (gitignore(5)): of the files from the repository's top to a path the innermost that says something
counts, and in it the last line; what lies in an ignored directory is ignored. A repository within is a repository of
its own. Neither the user's own core.excludesFile nor what is tracked in spite of a rule is looked at.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathspec import GitIgnoreSpec

Rules = list[tuple[Path, "GitIgnoreSpec"]]


class GitIgnore:
    """The rules for one tree, asked while it is walked from its root down."""

    def __init__(self, root: Path) -> None:
        self._rules: dict[Path, Rules] = {}
        above = _above(root)
        # A directory that is named for itself is wanted, whatever the repository around it says of it.
        if any(self._ignored(above, path, True) for path in [root, *root.parents]):
            above = []
        self._rules[root] = self._at(root, above)

    def enter(self, directory: Path) -> None:
        """Reads what is said in this directory, whose parent was entered before."""
        self._rules[directory] = self._at(directory, self._rules[directory.parent])

    def left(self, directory: Path, name: str, *, is_dir: bool) -> bool:
        """Whether this entry of an entered directory stays behind."""
        return name == ".git" or self._ignored(self._rules[directory], directory / name, is_dir)

    @staticmethod
    def _at(directory: Path, outer: Rules) -> Rules:
        rules = outer
        if os.path.lexists(directory / ".git"):
            rules = _of(directory, _exclude_file(directory))
        own = _of(directory, directory / ".gitignore")
        return rules + own

    @staticmethod
    def _ignored(rules: Rules, path: Path, is_dir: bool) -> bool:
        for base, spec in reversed(rules):
            if base not in path.parents:
                continue
            found = spec.check_file(path.relative_to(base).as_posix() + ("/" if is_dir else "")).include
            if found is not None:
                return found
        return False


def _above(root: Path) -> Rules:
    """What the directories around the root say, from the top of its repository down; nothing outside of one."""
    chain: list[Path] = []
    if os.path.lexists(root / ".git"):
        return []
    for directory in root.parents:
        chain.append(directory)
        if os.path.lexists(directory / ".git"):
            rules = _of(directory, _exclude_file(directory))
            for each in reversed(chain):
                rules = rules + _of(each, each / ".gitignore")
            return rules
    return []


def _exclude_file(top: Path) -> Path:
    """info/exclude of the repository: of a linked work tree, or of a submodule, it lies elsewhere."""
    git = top / ".git"
    try:
        if git.is_file():
            named = git.read_text("utf-8", "surrogateescape").removeprefix("gitdir:").strip()
            git = top / named
            common = git / "commondir"
            if common.is_file():
                git = git / common.read_text("utf-8", "surrogateescape").strip()
    except (OSError, ValueError):
        return top / ".git" / "info" / "exclude"
    return git / "info" / "exclude"


def _of(base: Path, file: Path) -> Rules:
    """The rules in one file, for what lies below `base`; none where it is no file, as git has it also for a link."""
    from pathspec import GitIgnoreSpec

    try:
        if file.is_symlink() or not file.is_file():
            return []
        lines = file.read_text("utf-8-sig", "surrogateescape").splitlines()
    except (OSError, ValueError):
        return []
    good = []
    for line in lines:
        try:
            GitIgnoreSpec.from_lines([line])
        except ValueError:
            continue  # no pattern; git takes no notice of it either
        good.append(line)
    return [(base, GitIgnoreSpec.from_lines(good))]
