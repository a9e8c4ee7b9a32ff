"""Where a task runs and with how much: labels, systems, processors, memory, GPUs, priority; real daemons."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from clawnet.commands.render import seconds
from tests.cli.harness import Node, Nodes, connected, join

pytestmark = pytest.mark.slow

SMI = "#!/bin/sh\necho '0, GPU-aaaaaaaa-0000, 00000000:01:00.0'\necho '1, GPU-bbbbbbbb-0000, 00000000:02:00.0'\n"
MEMBERS = ("--ring", "member", "--prefer", "market")
FAMILY = {"Linux": "linux", "Darwin": "darwin", "Windows": "windows"}[platform.system()]


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Node]]:
    """alice, who never works herself; bob, a gpu-box with two GPUs and one slot; carol, another."""
    if FAMILY == "linux" and shutil.which("bwrap") is None:
        pytest.skip("bubblewrap not installed")
    tools = tmp_path_factory.mktemp("tools")
    (tools / "nvidia-smi").write_text(SMI)
    (tools / "nvidia-smi").chmod(0o755)
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    nodes = Nodes()
    try:
        alice = nodes("alice", CLAWNET_MARKET_SELF="never")
        bob = nodes(
            "bob",
            PATH=path,
            CLAWNET_NODE_LABELS="gpu-box,zone=a",
            CLAWNET_EXECUTION_SLOTS="1",
            CLAWNET_EXECUTION_CPUS="1",
            CLAWNET_EXECUTION_MEMORY_TOTAL="512MiB",
        )
        carol = nodes("carol", CLAWNET_NODE_LABELS="big-disk", CLAWNET_EXECUTION_MEMORY_TOTAL="1GiB")
        made = [alice, bob, carol]
        for node in made:
            node.start()
        for node in made[1:]:
            join(alice, node)
        for node in made:
            node.until("sees all", lambda node=node: len(connected(node)) == 2)
        yield made
    finally:
        nodes.close()


def ran_at(alice: Node, *options: str) -> str:
    """Who ran a task with these options."""
    done = alice("run", "--json", *MEMBERS, *options, "--", "true").json("run")
    return str(done["executor"]["name"])


def test_a_label_chooses_who_has_it(mesh: list[Node]) -> None:
    alice = mesh[0]
    assert ran_at(alice, "--label", "gpu-box") == "bob"
    assert ran_at(alice, "--label", "gpu-box", "--label", "zone=a") == "bob"
    assert ran_at(alice, "--label", "big-disk") == "carol"
    alice("run", *MEMBERS, "--label", "gpu-box", "--label", "big-disk", "--", "true").failed(75, "2 labels", "--label")
    alice("run", *MEMBERS, "--label", "quantum", "--", "true").failed(75, "--label quantum", "node.labels")


def test_an_operating_system_nobody_runs_is_named(mesh: list[Node]) -> None:
    alice, other = mesh[0], "windows" if FAMILY != "windows" else "linux"
    alice("run", *MEMBERS, "--os", other, "--", "true").failed(75, "2 os", f"--os {other}", "--os any")
    assert ran_at(alice, "--os", FAMILY) in ("bob", "carol")
    assert ran_at(alice, "--os", "any", "--label", "big-disk") == "carol"


def test_amounts_nobody_has_are_named(mesh: list[Node]) -> None:
    alice = mesh[0]
    alice("run", *MEMBERS, "--gpu", "3", "--", "true").failed(75, "no_gpu", "--gpu 3")
    alice("run", *MEMBERS, "--cpu", "999", "--", "true").failed(75, "2 cpu", "--cpu 999")
    alice("run", *MEMBERS, "--memory", "2GiB", "--", "true").failed(75, "2 memory", "--memory")
    for option, bad in (("--cpu", "-1"), ("--gpu", "many"), ("--memory", "much"), ("--priority", "101")):
        done = alice("run", *MEMBERS, option, bad, "--", "true")
        assert done.code in (64, 65) and "Traceback" not in done.err, done


def test_memory_asked_for_is_memory_given_and_no_more(mesh: list[Node]) -> None:
    alice = mesh[0]
    assert ran_at(alice, "--memory", "800MiB") == "carol"
    hungry = "x=$(head -c 100000000 /dev/zero | tr '\\0' x); echo ${#x}"
    on_bob = (*MEMBERS, "--peer", "bob")
    kept = alice("run", *on_bob, "--memory", "64MiB", "--", "sh", "-c", hungry)
    assert kept.code != 0 and kept.out.strip() != "100000000"
    assert alice("run", *on_bob, "--memory", "500MiB", "--", "sh", "-c", hungry).out.strip() == "100000000"


def test_a_gpu_is_shown_to_the_task_that_asks_for_it(mesh: list[Node]) -> None:
    alice = mesh[0]
    said = ("--", "sh", "-c", "echo $CUDA_VISIBLE_DEVICES")
    assert alice("run", *MEMBERS, "--gpu", "1", *said).out == "GPU-aaaaaaaa-0000\n"
    assert alice("run", *MEMBERS, "--gpu", "2", *said).out == "GPU-aaaaaaaa-0000,GPU-bbbbbbbb-0000\n"
    assert alice("run", *MEMBERS, "--label", "gpu-box", *said).out == "\n"
    checks = {one["check"]: one for one in mesh[1]("doctor", "--json").json("doctor")["findings"]}
    assert checks["gpu"]["level"] == "ok" and "2 of 2" in checks["gpu"]["message"]


def test_what_waits_goes_by_priority_and_its_wait_is_told(mesh: list[Node], tmp_path: Path) -> None:
    alice, bob, _ = mesh
    on_bob = (*MEMBERS, "--type", "shell", "--peer", "bob", "--json")
    # One that runs until it is cancelled, then three that wait for the only slot.
    first = alice("market", "submit", *on_bob, "sleep 60").json()["task_id"]
    alice.until("it runs", lambda: bob.ask("status")["runs"] == 1)
    waiting = {}
    for priority in ("0", "-7", "50"):
        submitted = alice("market", "submit", *on_bob, "--priority", priority, f"echo {priority}").json()
        waiting[priority] = submitted["task_id"]
        alice.reaches(submitted["task_id"], "executing")
    (bid,) = alice("market", "bids", waiting["50"], "--json").json("market bids")["items"]
    assert bid["queue_wait_s"] > 0 and bid["load"] == 1
    (row,) = alice("market", "bids", waiting["50"]).rows()
    assert seconds(bid["queue_wait_s"] + bid["own_ahead_s"]) in row
    alice("market", "cancel", first)
    ended = {}
    for priority, task in waiting.items():
        found = alice.reaches(task, "settled")
        ended[priority] = json.dumps(found["attempts"][-1])
        waiting[priority] = found["attempts"][-1]["ended_at"]
    assert waiting["50"] <= waiting["0"] <= waiting["-7"], ended
