"""What all tests share: homes to work in, --long and --alone, and that every skip is listed with its reason."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from clawnet.identity.membership import create_home
from clawnet.paths import Home

ALLOWED_SKIPS = Path(__file__).with_name("allowed_skips")
NOW_MS = 1_700_000_000_000

_skipped: dict[str, str] = {}

# A shell's background job ignores Ctrl-C, and one under nohup a closed terminal: so would every program tested.
for _name, _usual in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL), ("SIGTERM", signal.SIG_DFL)):
    if hasattr(signal, _name) and signal.getsignal(getattr(signal, _name)) is signal.SIG_IGN:
        signal.signal(getattr(signal, _name), _usual)


def allowed_skips() -> dict[str, str]:
    """The patterns of test ids that may skip, each with its reason, from tests/allowed_skips.

    A reason that begins with "not in CI" holds on a developer's machine only.
    """
    allowed: dict[str, str] = {}
    for line in ALLOWED_SKIPS.read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            pattern, colon, reason = line.partition(": ")
            assert colon and reason.strip(), f"tests/allowed_skips: {line!r} gives no reason"
            if not (os.environ.get("CI") and reason.strip().startswith("not in CI")):
                allowed[pattern.strip()] = reason.strip()
    return allowed


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also run the long form of the tests that have one")
    parser.addoption("--alone", action="store_true", help="only the tests that several processes leave out")


_LONGEST = ("test_world", "test_roaming", "test_wallet_files", "test_hostile_transport", "test_membership", "test_lan")
_FIRST = {"cli": 1, "interop": 2, "world": 3}


def _order(item: pytest.Item) -> int:
    return 0 if item.path.stem in _LONGEST else _FIRST.get(item.path.parent.name, 4)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The files that take longest come first, so that no process is left alone with one at the end.

    Long tests are left out, not skipped, unless they are asked for; those that fill the machine, where others run.
    """
    items.sort(key=_order)

    def wanted(item: pytest.Item) -> bool:
        alone = item.get_closest_marker("alone") is not None
        if (alone and hasattr(config, "workerinput")) or (not alone and config.getoption("--alone")):
            return False
        return bool(config.getoption("--long")) or item.get_closest_marker("long") is None

    left_out = [item for item in items if not wanted(item)]
    if left_out:
        items[:] = [item for item in items if wanted(item)]
        config.hook.pytest_deselected(items=left_out)


def _note_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        _skipped[report.nodeid] = reason


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _note_skip(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    _note_skip(report)


def unlisted_skips() -> dict[str, str]:
    """The tests that were skipped in this run and are not in tests/allowed_skips."""
    patterns = allowed_skips()
    return {
        nodeid: reason
        for nodeid, reason in _skipped.items()
        if not any(fnmatch.fnmatchcase(nodeid, pattern) for pattern in patterns)
    }


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus == pytest.ExitCode.OK and unlisted_skips():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    unlisted = unlisted_skips()
    if unlisted:
        terminalreporter.section("skipped, but not listed in tests/allowed_skips", red=True)
        for nodeid, reason in unlisted.items():
            terminalreporter.line(f"{nodeid}: {reason}")


def counted_entropy(seed: str) -> Callable[[int], bytes]:
    """Bytes that look random and are the same in every run with this seed."""
    count = 0

    def entropy(length: int) -> bytes:
        nonlocal count
        count += 1
        return hashlib.shake_256(f"{seed}/{count}".encode()).digest(length)

    return entropy


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """A home that does not exist yet."""
    return Home(tmp_path / "home")


@pytest.fixture
def fresh_home(home: Home) -> Home:
    """A home with keys and a mesh of one; the same keys in every run."""
    create_home(home, "alice", counted_entropy("alice"), NOW_MS)
    return home
