"""Patterns of output files: what they match, what they never match, and that no pattern costs more than its path."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clawnet import limits
from clawnet.errors import DataError
from clawnet.wire.globs import Globs, is_git


@pytest.mark.parametrize(
    ("pattern", "path", "covered"),
    [
        ("dist/*", "dist/a.txt", True),
        ("dist/*", "dist/sub/a.txt", True),
        ("dist/*", "dist/sub/.hidden", True),
        ("dist/*", "dist/.hidden", False),
        ("dist/*", "dist", False),
        ("dist/*", "other/a.txt", False),
        ("dist", "dist/a/b/c", True),
        ("dist/", "dist/a", True),
        ("./dist//x", "dist/x", True),
        ("*.txt", "a.txt", True),
        ("*.txt", "b/a.txt", False),
        ("**/*.txt", "a.txt", True),
        ("**/*.txt", "b/c/a.txt", True),
        ("**/*.txt", ".b/a.txt", False),
        ("a/**/b", "a/b", True),
        ("a/**/b", "a/x/y/b", True),
        ("a/**/b", "x/b", False),
        ("**", "a/b", True),
        ("**", ".a", False),
        ("a/**", "a/b", True),
        ("a/**", "a", False),
        (".", ".a/b", True),
        (".*", ".env", True),
        ("a?c", "abc", True),
        ("a[bd]c", "abc", True),
        ("a[!b]c", "abc", False),
        ("[ab]*", ".a", False),
        ("gru\u0308n", "gr\u00fcn", True),
        (".", ".git/config", False),
        ("**", "sub/.git/hooks/post-checkout", False),
        ("*", ".GIT/config", False),
        (".", "git~1/config", False),
        (".", ".g\u200cit/config", False),
        (".", ".git./config", False),
        (".git", ".git/config", True),
        ("repo/.git", "repo/.git/config", True),
        ("A", "a", False),
    ],
)
def test_what_a_pattern_asks_for(pattern: str, path: str, covered: bool) -> None:
    assert Globs([pattern]).covers(path.split("/")) is covered


@pytest.mark.parametrize(
    "pattern",
    ["", "/etc/passwd", "..", "../x", "a/../b", "a\\b", "~/x", "C:x", "a\nb", "a\0b", "x" * 1_025, "a\udc80"],
)
def test_patterns_that_lead_out_are_refused(pattern: str) -> None:
    with pytest.raises(DataError):
        Globs([pattern])


def test_too_many_are_refused() -> None:
    with pytest.raises(DataError):
        Globs(["x"] * (limits.OUTPUT_GLOBS_MAX + 1))


def test_which_pattern_matched_is_known() -> None:
    globs = Globs(["a/*", "a/b", "c"])
    state = globs.step(globs.step(globs.start, "a"), "b")
    assert globs.matched(state) == {0, 1}


def test_directories_on_the_way_are_known() -> None:
    globs = Globs(["a/*/c", "x/**/y"])

    def on_the_way(path: str) -> bool:
        state = globs.start
        for name in path.split("/"):
            state = globs.step(state, name)
        return bool(state)

    assert [on_the_way(path) for path in ("a", "a/q", "b", "x/1/2/3", "a/q/d")] == [True, True, False, True, False]


def test_no_pattern_takes_longer_than_its_path_deserves() -> None:
    globs = Globs(["/".join(["**"] * 40 + ["x"]), "a*" * 300 + "b"])
    assert not globs.covers(["a" * 200] * 60)  # by trying every way through the pattern this would not end at all
    assert len(globs.step(globs.start, "a")) <= 4  # several ** are one


def test_a_pattern_deeper_than_outputs_may_lie_is_refused() -> None:
    assert Globs(["/".join(["a", "**"] * limits.OUTPUT_DEPTH_MAX)])
    with pytest.raises(DataError, match="deep"):
        Globs(["/".join(["a", "**"] * (limits.OUTPUT_DEPTH_MAX + 1))])


@given(st.lists(st.sampled_from(["a", "b", ".c", "d.txt"]), min_size=1, max_size=5))
def test_a_path_that_is_its_own_pattern_is_covered(path: list[str]) -> None:
    assert Globs(["/".join(path)]).covers(path)
    assert Globs(["/".join(path)]).covers([*path, "below"])


def test_the_names_of_a_repositorys_own_directory() -> None:
    assert all(map(is_git, (".git", ".GIT", ".git ", ".git.", "GIT~1", ".git::$INDEX_ALLOCATION")))
    assert not any(map(is_git, ("git", ".gitignore", ".github", "a.git")))
