"""Large files between real nodes: a fetch goes on over SIGKILL of either side, and gigabytes pass in little memory."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from clawnet import limits
from clawnet.errors import NoBidError, TimedOutError
from tests.cli.harness import Node, Nodes, connected, join, until

pytestmark = pytest.mark.slow

ABROAD = ("--ring", "member", "--prefer", "market")
FETCHED = re.compile(r"blobs\.fetched .*bytes=(\d+) ")
CHUNK = limits.BLOB_CHUNK_BYTES
SIZE = 160 * limits.MIB + 77


def big_file(path: Path, size: int) -> str:
    """A file of so many bytes in which no piece is like another; its SHA-256."""
    block, digest = bytearray(os.urandom(limits.MIB)), hashlib.sha256()
    with path.open("wb") as file:
        for number in range(-(-size // limits.MIB)):
            block[:8] = number.to_bytes(8, "big")
            piece = bytes(block[: size - number * limits.MIB])
            digest.update(piece)
            file.write(piece)
    return digest.hexdigest()


def submit(node: Node, path: Path, deadline_s: float = 300) -> str:
    """A task for another node: the hash of the file."""
    spec = {"type": "compute", "op": "sha256", "inputs": [{"name": "big", "path": str(path)}], "ring": "member"}
    made = node.ask("task.submit", spec={**spec, "prefer": "market", "deadline_s": deadline_s, "budget": "5"})
    return str(made["task_id"])


def parts(node: Node) -> list[Path]:
    return sorted((node.home.blobs_dir / "parts").glob("*.part"))


def caught_half_way(holder: Node, asker: Node) -> None:
    """Stops the holder, and lets go of it where the asker has some of the file and not all."""
    pid = holder.pid
    (part,) = asker.until("a fetch has begun", lambda: [file for file in parts(asker) if file.stat().st_size])
    os.kill(pid, signal.SIGSTOP)
    assert part.stat().st_size < SIZE, "the file is too small for this machine"


def settled(node: Node, task: str, digest: str) -> None:
    done = node.reaches(task, "settled", "failed", "timed_out", "no_bids")
    assert done["state"] == "settled", done["error"]
    assert done["result"]["stdout"].split()[0] == digest


def test_a_fetch_goes_on_after_the_executor_was_killed(nodes: Nodes, tmp_path: Path) -> None:
    alice, bob = nodes.mesh("alice", "bob")
    digest = big_file(tmp_path / "big", SIZE)
    task = submit(alice, tmp_path / "big")
    pid = alice.pid
    caught_half_way(alice, bob)
    bob.kill()
    (part,) = parts(bob)
    kept = part.stat().st_size // CHUNK * CHUNK
    os.kill(pid, signal.SIGCONT)
    bob.start()
    settled(alice, task, digest)
    assert FETCHED.findall(bob.log) == [str(SIZE - kept)]
    bob.until("nothing is left of it", lambda: not list(bob.home.blobs_dir.rglob("*.part*")))


def test_a_fetch_goes_on_after_the_requester_was_killed(nodes: Nodes, tmp_path: Path) -> None:
    alice, bob = nodes.mesh("alice", "bob")
    digest = big_file(tmp_path / "big", SIZE)
    task = submit(alice, tmp_path / "big")
    pid = alice.pid
    caught_half_way(alice, bob)
    os.kill(pid, signal.SIGKILL)
    until("alice dies", lambda: alice.pid == 0)
    bob.until("notices it", lambda: not connected(bob))
    kept = parts(bob)[0].stat().st_size
    alice.start()
    settled(alice, task, digest)
    assert FETCHED.findall(bob.log) == [str(SIZE - kept)]


def test_what_does_not_fit_is_declined_with_the_reason(nodes: Nodes, tmp_path: Path) -> None:
    alice, bob = (
        nodes("alice", CLAWNET_MARKET_SELF="never").start(),
        nodes("bob", CLAWNET_EXECUTION_INPUT_MAX_MEMBER="1MiB").start(),
    )
    join(alice, bob)
    alice.until("sees bob", lambda: connected(alice))
    big_file(tmp_path / "big", limits.MIB + 1)
    asked = ("market", "submit", "--wait", *ABROAD, "--type", "compute", "--op", "sha256")
    alice(*asked, "--input", str(tmp_path / "big")).failed(NoBidError.exit_code, "too_large")
    assert not alice.ask("wallet.escrows")["items"]
    assert not [file for file in bob.home.blobs_dir.rglob("*") if file.is_file()]


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of 48 megabytes, of which 16 are the database's."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root on Linux")
    with tempfile.TemporaryDirectory(prefix="clawnet-", dir="/tmp") as place:
        mount = ["mount", "-t", "tmpfs", "-o", "size=48m,mode=0700", "tmpfs", place]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("mounting a small file system needs CAP_SYS_ADMIN")
        try:
            yield Path(place)
        finally:
            subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_of_the_executor_is_a_reason_to_decline(nodes: Nodes, tmp_path: Path, small_disk: Path) -> None:
    alice = nodes("alice", CLAWNET_MARKET_SELF="never").start()
    bob = nodes("bob", CLAWNET_NODE_DATA_DIR=str(small_disk)).start()
    join(alice, bob)
    big_file(tmp_path / "big", 40 * limits.MIB)
    task = submit(alice, tmp_path / "big", deadline_s=5)
    assert alice.reaches(task, "settled", "failed", "timed_out", "no_bids")["state"] == "timed_out"
    assert "storage_full" in alice("market", "why", task).out
    assert not alice.task(task)["attempts"]
    assert not [file for file in (small_disk / "blobs").rglob("*") if file.is_file()]
    digest = big_file(tmp_path / "small", limits.MIB)
    settled(alice, submit(alice, tmp_path / "small"), digest)


def test_a_full_disk_of_the_requester_leaves_nothing_of_a_result(nodes: Nodes, small_disk: Path) -> None:
    alice = nodes("alice", CLAWNET_NODE_DATA_DIR=str(small_disk)).start()
    bob = nodes("bob").start()
    join(alice, bob)
    made = "head -c 40000000 /dev/urandom"
    done = alice("run", *ABROAD, "--deadline", "8s", "--", "sh", "-c", made)
    done.failed(TimedOutError.exit_code, "could not be fetched", "is full")
    assert not [file for file in (small_disk / "blobs").rglob("*") if file.is_file()]
    assert alice("run", *ABROAD, "--", "echo", "on").out == "on\n"
    assert not [name for name in bob.log.splitlines() if "defect" in name]


class Peaks:
    """The memory of two daemons while something goes on, and whether they answer meanwhile."""

    def __init__(self, *nodes: Node) -> None:
        self.pids = [node.pid for node in nodes]
        self.idle = [self._reset(pid) for pid in self.pids]
        self.answers = 0
        self._nodes = nodes
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()

    @staticmethod
    def field(pid: int, name: str) -> int:
        text = Path(f"/proc/{pid}/status").read_text()
        return int(text.split(name + ":", 1)[1].split()[0]) * limits.KIB

    def _reset(self, pid: int) -> int:
        Path(f"/proc/{pid}/clear_refs").write_text("5")
        return self.field(pid, "VmRSS")

    def _ask(self) -> None:
        while not self._over.wait(0.2):
            for node in self._nodes:
                node.ask("wallet.balance")
                self.answers += 1

    def above_idle(self) -> list[int]:
        """Bytes, node by node."""
        self._over.set()
        self._thread.join()
        return [self.field(pid, "VmHWM") - idle for pid, idle in zip(self.pids, self.idle, strict=True)]


@pytest.mark.parametrize("size", [24_000_000, pytest.param(2_000_000_000, marks=pytest.mark.long)])
def test_a_large_file_goes_in_and_out_in_little_memory(
    nodes: Nodes, tmp_path: Path, size: int, record_property: object
) -> None:
    alice, bob = nodes.mesh("alice", "bob")
    source, out = tmp_path / "big", tmp_path / "out"
    digest = big_file(source, size)
    peaks = Peaks(alice, bob)
    try:
        done = alice(
            *("run", *ABROAD, "--input", str(source), "--output", "copy", "--output-dir", str(out)),
            *("--deadline", "20m", "--", "cp", "big", "copy"),
            timeout_s=1_200,
        )
    finally:
        above = peaks.above_idle()
    assert done.code == 0, done.err
    with (out / "copy").open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == digest
    print(f"\n{size} bytes: above idle {[round(each / 1e6, 1) for each in above]} MB, {peaks.answers} answers")
    assert max(above) < 100_000_000
    assert peaks.answers
    shutil.rmtree(out)
    left = [file for file in bob.home.blobs_dir.rglob("*") if file.is_file()]
    bob.until("nothing is left of it", lambda: not [file for file in left if file.exists()])
