"""What a short command loads: modules that cost time must not be among them. Nothing here is measured in seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {
    *("asyncio", "sqlite3", "yaml", "nacl", "cryptography", "msgspec", "rich", "httpx", "noise", "sqlite_utils"),
    "wasmtime",
}
NODE = {
    f"clawnet.{room}"
    for room in (
        *("config", "answers", "identity", "wire", "market", "ledger", "reputation", "mesh", "node"),
        *("net", "execution", "storage", "ipc", "observe", "runtime", "daemon"),
    )
}
PROBE = """
import json, sys
sys.argv = ["clawnet", *sys.argv[1:]]
from clawnet.commands.app import main
code = 0
try:
    main()
except SystemExit as stop:
    code = stop.code
print(json.dumps([code, sorted(sys.modules)]), file=sys.stderr)
"""


def loaded(home: Path, *arguments: str) -> tuple[int, set[str]]:
    """Exit code and modules of one command in a fresh interpreter."""
    environ = {**os.environ, "CLAWNET_HOME": str(home), "CLAWNET_AUTOSTART": "0", "TERM": "dumb"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROBE, *arguments],
        env=environ,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    lines = done.stderr.splitlines()
    assert lines and lines[-1].startswith("["), done.stderr
    code, modules = json.loads(lines[-1])
    return int(code or 0), set(modules)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "exit_code"),
    [
        (("version",), 0),
        (("--help",), 0),
        (("wallet", "balance", "--help"), 0),
        (("wallet", "balance"), 69),
        (("market", "submit", "--help"), 0),
        (("run", "--", "true"), 69),
        (("peer", "list"), 69),
        (("daemon", "status"), 69),
    ],
)
def test_a_short_command_loads_nothing_heavy(tmp_path: Path, arguments: tuple[str, ...], exit_code: int) -> None:
    code, modules = loaded(tmp_path / "home", *arguments)
    assert code == exit_code
    assert modules & HEAVY == set()
    assert modules & NODE == set()


@pytest.mark.slow
def test_a_command_loads_only_its_own_group(tmp_path: Path) -> None:
    _, modules = loaded(tmp_path / "home", "wallet", "balance", "--help")
    groups = {name for name in modules if name.startswith("clawnet.commands.")}
    assert "clawnet.commands.wallet" in groups
    assert (
        groups & {f"clawnet.commands.{other}" for other in ("market", "peer", "daemon", "config", "identity", "demo")}
        == set()
    )
