"""Three real daemons on loopback for a measurement: brought up, joined, given tasks, weighed, and taken down again."""

from __future__ import annotations

import asyncio
import base64
import os
import statistics
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

from clawnet import api, config, launch
from clawnet.api_async import AsyncClient
from clawnet.home import initialise
from clawnet.paths import Home

NAMES = ("requester", "worker-1", "worker-2")
READY_S = 30.0
SETTLED_S = 60.0
SETTINGS = {
    "node.listen_addrs": "/ip4/127.0.0.1/tcp/0",
    "daemon.drain_timeout": "2s",
    "market.initial_wallet_balance": "10000",
    "market.rates.task": "0.01",
    "market.rates.cpu_second": "0.001",
    "market.min_bid_increment": "0.001",
}
"""Prices are a hundredth of the defaults, so that one grant pays for hundreds of thousands of tasks."""
TICKS_PER_S = os.sysconf("SC_CLK_TCK")

Task = Callable[[], Awaitable[None]]
Load = Callable[[Task], Awaitable[list[float]]]
Summary = Callable[[list[float], float], dict[str, Any]]


def percentile(values: list[float], share: int) -> float:
    """The value below which `share` percent of the values lie."""
    return statistics.quantiles(values, n=100)[share - 1] if len(values) > 1 else values[0]


def cpu_s(pid: int) -> float:
    """Processor seconds of a process so far, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def children(pid: int) -> list[int]:
    """The processes that this one has started."""
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


class Node:
    """One daemon, its process and a connection to it."""

    def __init__(self, name: str, home: Home, process: subprocess.Popen[bytes]) -> None:
        self.name = name
        self.home = home
        self.process = process
        self.client = AsyncClient(home)

    async def figures(self) -> dict[str, float]:
        """Processor time and counters so far, for differences."""
        status = await self.client.call("status")
        own, workers = cpu_s(self.process.pid), sum(cpu_s(pid) for pid in children(self.process.pid))
        return {**status["activity"], "cpu_s": own, "worker_cpu_s": workers, "rss": status["memory_rss_bytes"]}


class Mesh:
    """The nodes; the first founded the mesh and submits, the others work."""

    def __init__(self, nodes: list[Node]) -> None:
        self.nodes = nodes
        self._count = 0

    @classmethod
    @asynccontextmanager
    async def running(cls, directory: Path, slots: int) -> AsyncIterator[Mesh]:
        """Three daemons, joined, until the block is left."""
        mesh = cls([])
        try:
            for name in NAMES:
                home = Home(directory / name)
                initialise(home, {}, {}, entropy=os.urandom, now_ms=time.time_ns() // 1_000_000, name=name)
                config.set_in_file(home.config_file, {**SETTINGS, "execution.slots": str(slots)})
                home.run_dir.mkdir(mode=0o700, exist_ok=True)
                environ = {name: value for name, value in os.environ.items() if not name.startswith("CLAWNET_")}
                mesh.nodes.append(Node(name, home, launch.spawn(home, environ, launch.program())))
            await mesh._join()
            yield mesh
        finally:
            await mesh._stop()

    async def _join(self) -> None:
        for node in self.nodes:
            await self._until(lambda node=node: self._answers(node), f"{node.name} did not start")
            await node.client.connect()
        first = self.nodes[0].client
        for node in self.nodes[1:]:
            invite = await first.call("peer.invite", {"ring": "member"})
            await node.client.call("peer.join", {"token": invite["token"], "leave": False})
        await self._until(self._ready, "the nodes did not find each other")

    @staticmethod
    async def _answers(node: Node) -> bool:
        channel = api.open_channel(node.home)
        if channel is not None:
            channel.close()
            return True
        code = node.process.poll()
        if code is not None:
            raise launch.failure(node.home, code)
        return False

    async def _ready(self) -> bool:
        peers = (await self.nodes[0].client.call("peer.list"))["items"]
        able = [peer for peer in peers if peer["state"] == "connected" and peer["capabilities"]]
        wallets = [await node.client.call("wallet.balance") for node in self.nodes]
        return len(able) == len(self.nodes) - 1 and all(not wallet["read_only"] for wallet in wallets)

    @staticmethod
    async def _until(met: Callable[[], Awaitable[bool]], otherwise: str, limit_s: float = READY_S) -> None:
        deadline = perf_counter() + limit_s
        while not await met():
            if perf_counter() > deadline:
                raise SystemExit(f"{otherwise} within {limit_s:g} s")
            await asyncio.sleep(0.01)

    async def _stop(self) -> None:
        for node in self.nodes:
            await node.client.close()
            node.process.terminate()
        for node in self.nodes:
            try:
                await asyncio.to_thread(node.process.wait, 10)
            except subprocess.TimeoutExpired:
                node.process.kill()
                node.process.wait()

    # --- work

    async def task(self) -> None:
        """One hash of a few bytes through the market, until its requester has the result."""
        self._count += 1
        spec = {
            "type": "compute",
            "op": "sha256",
            "stdin_b64": base64.b64encode(b"payload %d" % self._count).decode(),
            "ring": "member",
            "prefer": "market",
            "budget": "5",
        }
        client = self.nodes[0].client
        made = await client.call("task.submit", {"spec": spec, "awaited": True})
        done = await client.call("task.follow", {"task": made["task_id"], "output": False, "from": "start"})
        if done["state"] != "settled" or done["error"] or done["result"]["exit_code"] != 0:
            raise SystemExit(f"a task ended as {done['state']}: {done['error']}")

    async def task_on_both_sides(self) -> None:
        """The same until nothing is open on any side: the executor knows that its claim has arrived."""
        await self.task()
        while await self.open():
            pass

    async def open(self) -> int:
        """Tasks, jobs and obligations that have not ended, on all nodes."""
        found = await asyncio.gather(*(node.client.call("node.status") for node in self.nodes))
        return sum(status["activity"][f"{what}_open"] for status in found for what in ("tasks", "jobs", "obligations"))

    async def measured(self, load: Load, summary: Summary, *, both: bool) -> dict[str, Any]:
        """Runs a load to its end on both sides; with `both`, each task counts only then."""

        async def settled() -> bool:
            return await self.open() == 0

        before = [await node.figures() for node in self.nodes]
        client_s, started = time.process_time(), perf_counter()
        times = await load(self.task_on_both_sides if both else self.task)
        await self._until(settled, "the last tasks did not settle on both sides", SETTLED_S)
        wall_s, client_s = perf_counter() - started, time.process_time() - client_s
        after = [await node.figures() for node in self.nodes]
        result = summary(times, wall_s)
        costs = zip(self.nodes, before, after, strict=True)
        result["per_task"] = {node.name: _costs(old, new, len(times)) for node, old, new in costs}
        result["per_task"]["client"] = {"cpu_us": round(1e6 * client_s / len(times))}
        return result

    async def books(self) -> dict[str, Any]:
        """What every node's own audit says, and whether anything went wrong underneath."""
        reports = []
        for node in self.nodes:
            audit = await node.client.call("wallet.audit")
            log = node.home.log_file.read_text(errors="replace") if node.home.log_file.exists() else ""
            reports.append(
                {
                    "node": node.name,
                    "ok": audit["ok"],
                    "granted": audit["granted"],
                    "held": [audit["available"], audit["locked"], audit["unclaimed"]],
                    "defects": log.count("node.defect") + log.count("node.turn_repeated"),
                    "rss_mib": round((await node.figures())["rss"] / 2**20, 1),
                }
            )
        return {"nodes": reports, "open": await self.open()}


def _costs(old: dict[str, float], new: dict[str, float], tasks: int) -> dict[str, float]:
    """Differences of counters, a task each."""
    gone = {name: new[name] - old[name] for name in new}
    turns = max(1.0, gone["turns"])
    return {
        "cpu_us": round(1e6 * gone["cpu_s"] / tasks),
        "worker_cpu_us": round(1e6 * gone["worker_cpu_s"] / tasks),
        "turns": round(gone["turns"] / tasks, 2),
        "items_per_turn": round(gone["stimuli"] / turns, 2),
        "commits": round(gone["commits"] / tasks, 2),
        "fsyncs": round(gone["synced_commits"] / tasks, 2),
        "signatures": round(gone["signatures"] / tasks, 2),
    }
