"""The jobs of examples/ci, step by step as a CI server runs them, on a fresh machine against a mesh of real daemons.

What cannot be had here is the package index: `pip install clawnet` is answered by a script that puts the program under
test on the PATH, as pip would.
"""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from clawnet import api
from clawnet.paths import Home
from tests.cli.harness import PROGRAM, Node, Nodes, alive, connected, join

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "ci"


class Job:
    """Shell steps in the order of the job, and those that run whatever became of the others."""

    def __init__(self, steps: list[str], always: list[str], shell: tuple[str, ...]) -> None:
        self.steps, self.always, self.shell = steps, always, shell


def github() -> Job:
    text = yaml.safe_load((EXAMPLES / "github-actions.yml").read_text())
    (job,) = text["jobs"].values()
    assert job["env"] == {"CLAWNET_JOIN": "${{ secrets.CLAWNET_JOIN }}"}, "the token comes as a secret, and only there"
    runs = [step for step in job["steps"] if "run" in step]
    steps = [step["run"] for step in runs if "if" not in step]
    always = [step["run"] for step in runs if step.get("if") == "always()"]
    assert len(steps) + len(always) == len(runs)
    return Job(steps, always, ("bash", "--noprofile", "--norc", "-eo", "pipefail", "-c"))


def gitlab() -> Job:
    text = yaml.safe_load((EXAMPLES / "gitlab-ci.yml").read_text())
    job = text["tests"]
    return Job(["\n".join(job["script"])], job["after_script"], ("bash", "-eo", "pipefail", "-c"))


class Machine:
    """A CI machine: nothing but a home, a checkout, and an installer."""

    def __init__(self, directory: Path, token: str) -> None:
        self.directory = directory
        self.home, self.checkout, self.tools = (directory / name for name in ("home", "checkout", "bin"))
        for place in (self.home, self.checkout, self.tools):
            place.mkdir(parents=True)
        (self.checkout / "Makefile").write_text("test:\n\t@echo all is well with $$(cat product)\n")
        (self.checkout / "product").write_text("the product\n")
        program = shlex.join(PROGRAM)
        installer = self.tools / "pip"
        installer.write_text(
            "#!/bin/sh\n"
            '[ "$*" = "install clawnet" ] || exit 9\n'
            f"printf '#!/bin/sh\\nexec {program} \"$@\"\\n' > {self.tools}/clawnet && chmod +x {self.tools}/clawnet\n"
        )
        installer.chmod(0o755)
        self.environ = {
            "HOME": str(self.home),
            "PATH": f"{self.tools}:{os.environ['PATH']}",
            "CI": "true",
            "CLAWNET_JOIN": token,
            "CLAWNET_NODE_NAME": "runner",
            "CLAWNET_NODE_LISTEN_ADDRS": "/ip4/127.0.0.1/tcp/0",
            "CLAWNET_QUIC_PORT": "0",
            "CLAWNET_NETWORK_ENABLE_MDNS": "false",
            "CLAWNET_HOME": str(self.home / ".clawnet"),
            "LC_ALL": "C.UTF-8",
        }

    def step(self, job: Job, script: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*job.shell, script],
            env=self.environ,
            cwd=self.checkout,
            capture_output=True,
            text=True,
            timeout=120,
            stdin=subprocess.DEVNULL,
        )

    @property
    def pid(self) -> int:
        channel = api.open_channel(Home(self.home / ".clawnet"))
        pid = channel.pid if channel is not None else 0
        if channel is not None:
            channel.close()
        return pid or 0


@pytest.fixture
def mesh(nodes: Nodes) -> Iterator[tuple[Node, Node]]:
    alice = nodes("alice").start()
    if alice.ask("status")["shell"]["member"] != "sandboxed":
        pytest.skip("bubblewrap not installed")
    bob = nodes("bob").start()
    join(alice, bob)
    yield alice, bob


def balance(node: Node) -> float:
    return float(node.ask("wallet.balance")["available"])


@pytest.mark.parametrize("example", [github, gitlab])
@pytest.mark.parametrize("outcome", ["passes", "fails"])
def test_a_job_runs_on_the_mesh_and_leaves_it_as_it_was(
    nodes: Nodes, mesh: tuple[Node, Node], example: Any, outcome: str
) -> None:
    alice, bob = mesh
    before = balance(alice) + balance(bob)
    token = alice("peer", "invite", "--ephemeral", "--uses", "2", "--credits", "20", "--expires", "7d").line
    job, machine = example(), Machine(nodes.directory / "ci", token)
    if outcome == "fails":
        (machine.checkout / "Makefile").write_text("test:\n\t@echo broken; exit 3\n")
    said, code = "", 0
    for script in job.steps:
        done = machine.step(job, script)
        said, code = said + done.stdout, done.returncode
        assert token not in done.stdout + done.stderr
        if code:
            break
    try:
        if outcome == "passes":
            assert code == 0, done.stderr
            assert "all is well with the product" in said
        else:
            assert code == 2, f"make's own code, not {code}: {done.stderr}"
            assert "broken" in said
        assert "\n20" in "\n" + said, "its credits had come when the job began"
        assert machine.pid
    finally:
        pid = machine.pid
        for script in job.always:
            left = machine.step(job, script)
            assert left.returncode == 0, left.stderr
    assert not alive(pid)
    alice.until("has what was left", lambda: balance(alice) + balance(bob) == before)
    for node in (alice, bob):
        node.until("the runner is out", lambda node=node: "runner" not in connected(node))
