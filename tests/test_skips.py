"""The rule of the skips, tried on a test run of its own: a skip that is not listed with its reason fails the run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


@pytest.mark.slow
@pytest.mark.parametrize(
    ("listed", "ci", "exit_code", "workers"),
    [
        ("", "", 1, 0),
        ("test_other.py::*: not needed here\n", "", 1, 1),
        ("test_it.py::test_*: not in CI, where it runs\n", "", 0, 0),
        ("test_it.py::test_*: not in CI, where it runs\n", "true", 1, 0),
    ],
)
def test_only_listed_skips_pass(tmp_path: Path, listed: str, ci: str, exit_code: int, workers: int) -> None:
    shutil.copy(HERE / "conftest.py", tmp_path)
    (tmp_path / "allowed_skips").write_text(listed)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    (tmp_path / "test_it.py").write_text(
        "import pytest\ndef test_good(): pass\n@pytest.mark.skip(reason='why')\ndef test_left_out(): pass\n"
    )
    environ = {**os.environ, "CI": ci, "PYTEST_ADDOPTS": ""}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", str(workers)],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
    )
    assert done.returncode == exit_code, done.stdout
    assert "1 passed, 1 skipped" in done.stdout
    assert ("test_it.py::test_left_out: " in done.stdout) == bool(exit_code)
