"""The blob section of exec.py: a large input from one daemon to another, timed where it is fetched."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from time import perf_counter
from typing import Any

from mesh import Mesh, Node, cpu_s

from clawnet import limits

TARGETS = (("mb_per_s", ">=", 150), ("requester_mb_above_idle", "<=", 100), ("worker_mb_above_idle", "<=", 100))
_FETCHED = re.compile(r"blobs\.fetched .*bytes=(\d+) seconds=([\d.]+)")
MB = 1_000_000


def memory_bytes(pid: int, field: str) -> int:
    """A line of /proc/PID/status: VmRSS is what a process holds now, VmHWM the most since it was reset."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.split(field + ":", 1)[1].split()[0]) * limits.KIB


def reset_peak(pid: int) -> int:
    """The most is counted from now on; what the process holds now."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")
    return memory_bytes(pid, "VmRSS")


def write_random(path: Path, mib: int) -> None:
    """A file of so many MiB that nothing could shorten."""
    with path.open("wb") as file:
        for _ in range(mib):
            file.write(os.urandom(limits.MIB))


def fetched(node: Node) -> tuple[int, float]:
    """Bytes and seconds of the last large fetch that the node's log tells of; zeros before the first."""
    log = node.home.log_file.read_text(errors="replace") if node.home.log_file.exists() else ""
    found = _FETCHED.findall(log)
    return (int(found[-1][0]), float(found[-1][1])) if found else (0, 0.0)


async def measured(directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One task with one large file, from `task.submit` to its result."""
    source = directory / "input"
    write_random(source, options.mib)
    async with Mesh.running(directory, slots=1) as mesh:
        idle = {node: reset_peak(node.process.pid) for node in mesh.nodes}
        client = mesh.nodes[0].client
        spec = {
            "type": "compute",
            "op": "sha256",
            "inputs": [{"name": "input", "path": str(source)}],
            "ring": "member",
            "prefer": "market",
            "budget": "5",
            "deadline_s": 600,
        }
        began = perf_counter()
        made = await client.call("task.submit", {"spec": spec, "awaited": True})
        packed = perf_counter()
        used_s = {node: cpu_s(node.process.pid) for node in mesh.nodes}
        done = await client.call("task.follow", {"task": made["task_id"], "output": False, "from": "start"})
        over = perf_counter()
        used_s = {node: cpu_s(node.process.pid) - used_s[node] for node in mesh.nodes}
        if done["state"] != "settled" or done["error"] or done["result"]["exit_code"] != 0:
            raise SystemExit(f"the task ended as {done['state']}: {done['error']}")
        worker, (size, took_s) = max(((node, fetched(node)) for node in mesh.nodes), key=lambda item: item[1])
        above = {
            name: round((memory_bytes(node.process.pid, "VmHWM") - idle[node]) / MB, 1)
            for name, node in (("requester", mesh.nodes[0]), ("worker", worker))
        }
        return {
            "mib": options.mib,
            "mb_per_s": round(size / MB / took_s, 1),
            "fetch_s": took_s,
            "pack_s": round(packed - began, 3),
            "task_s": round(over - began, 3),
            "requester_mb_idle": round(idle[mesh.nodes[0]] / MB, 1),
            "worker_mb_idle": round(idle[worker] / MB, 1),
            "requester_cpu_s_per_gb": round(used_s[mesh.nodes[0]] / size * 1e9, 2),
            "worker_cpu_s_per_gb": round(used_s[worker] / size * 1e9, 2),
            **{f"{name}_mb_above_idle": value for name, value in above.items()},
        }
