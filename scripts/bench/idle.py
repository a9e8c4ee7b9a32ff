#!/usr/bin/env python3
"""Measures what idle links cost one real daemon: its memory and processor time with N connected peers that say nothing.

Usage: python scripts/bench/idle.py [--links 500] [--transport tcp|quic-v1] [--seconds 30] [--json]
The peers are certified machines of the daemon's owner, all in one other process, over loopback. Target: 150 MB at 500.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import machine

from clawnet.api_async import AsyncClient
from clawnet.identity import membership
from clawnet.identity.certificates import certify_node
from clawnet.identity.keys import KeyPair
from clawnet.net.quic import QuicTransport
from clawnet.net.settings import SwitchSettings
from clawnet.net.switch import PROTOCOLS, Switch
from clawnet.net.tcp import TcpTransport
from clawnet.paths import Home
from clawnet.wire.events import DialEnded, Stimulus
from clawnet.wire.session import HelloFacts

TRANSPORTS: dict[str, Any] = {"tcp": TcpTransport, "quic-v1": QuicTransport}
ADDRESSES = {"tcp": "/ip4/127.0.0.1/tcp/0", "quic-v1": "/ip4/127.0.0.1/udp/0/quic-v1"}
TARGET_MB = 150
DIALS_AT_ONCE = 16


class NoBlobs:
    """A peer that has nothing to give."""

    def may_fetch(self, peer: str, task_id: bytes, blob: bytes) -> bool:
        return False

    def has(self, blob: bytes) -> bool:
        return False


class Peer:
    """One quiet machine: a link, and nothing else."""

    def __init__(self, mesh: bytes, owner: KeyPair, kind: str) -> None:
        self.key = KeyPair.generate(os.urandom)
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        certificate = certify_node(
            owner, mesh, self.key.public, issued_ms=time.time_ns() // 1_000_000, inviter=self.key.peer_id
        )
        self.switch = Switch(
            self.key,
            SwitchSettings(listen_addrs=("/ip6/::1/tcp/0",) if kind != "tcp" else ("/ip6/::1/udp/0/quic-v1",)),
            clock=lambda: time.time_ns() // 1_000_000,
            entropy=os.urandom,
            transports={kind: TRANSPORTS[kind](self.key, PROTOCOLS, "idle")},
            local_hello=lambda: HelloFacts(mesh, f"idle-{self.key.peer_id[-6:]}", [certificate]),
            admit=lambda peer, hello, wanted: "",
            deliver=self._deliver,
            blobs=NoBlobs(),  # type: ignore[arg-type]
            log=lambda level, event, fields: None,
        )

    def _deliver(self, stimulus: Stimulus) -> None:
        if isinstance(stimulus, DialEnded) and not self.ended.done():
            self.ended.set_result(stimulus.reason)

    async def connect(self, peer: str, addresses: list[str]) -> None:
        await self.switch.start()
        self.switch.dial(1, peer, addresses)
        reason = await self.ended
        if reason:
            raise SystemExit(f"a peer could not connect: {reason}")


def usage(pid: int) -> tuple[float, float]:
    """Memory in MB (10^6 bytes) and processor seconds of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6, (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def measure(home: Home, options: argparse.Namespace) -> dict[str, Any]:
    local = membership.load_membership(home)
    owner = KeyPair.load(home.owner_key)
    _, mesh, _ = local.verified(KeyPair.load(home.node_key).public)
    client = AsyncClient(home)
    await client.connect()
    status = await client.call("status")
    before, _ = usage(status["pid"])
    addresses = [text for text in status["listen"] if "127.0.0.1" in text]
    gate = asyncio.Semaphore(DIALS_AT_ONCE)

    async def one() -> Peer:
        async with gate:
            peer = Peer(mesh, owner, options.transport)
            await peer.connect(status["peer_id"], addresses)
            return peer

    started = time.perf_counter()
    peers = await asyncio.gather(*(one() for _ in range(options.links)))
    took = time.perf_counter() - started
    await asyncio.sleep(5.0)
    after, cpu = usage(status["pid"])
    await asyncio.sleep(options.seconds)
    later, cpu_later = usage(status["pid"])
    linked = len([peer for peer in (await client.call("peer.list"))["items"] if peer["state"] == "connected"])
    await client.close()
    for peer in peers:
        await peer.switch.stop()
    return {
        "transport": options.transport,
        "links": linked,
        "connected_in_s": round(took, 1),
        "daemon_mb_before": round(before),
        "daemon_mb_with_links": round(max(after, later)),
        "kb_a_link": round(1000 * (max(after, later) - before) / options.links),
        "idle_cpu_percent": round(100 * (cpu_later - cpu) / options.seconds, 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--links", type=int, default=500)
    parser.add_argument("--transport", choices=TRANSPORTS, default="tcp")
    parser.add_argument("--seconds", type=float, default=30.0, help="how long the idle processor time is watched")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="clawnet-idle-") as directory:
        environ = {
            **os.environ,
            "CLAWNET_HOME": directory,
            "CLAWNET_NODE_LISTEN_ADDRS": ADDRESSES[options.transport],
            "CLAWNET_NODE_MAX_PEERS": str(options.links + 16),
            "CLAWNET_NETWORK_ENABLE_MDNS": "false",
        }
        program = [sys.executable, "-m", "clawnet.commands"]
        subprocess.run([*program, "daemon", "start", "-q"], env=environ, check=True, stdout=subprocess.DEVNULL)
        try:
            figures = asyncio.run(measure(Home(Path(directory)), options))
        finally:
            subprocess.run([*program, "daemon", "stop", "-q"], env=environ, check=False)
    if options.json:
        print(json.dumps({"machine": machine(), **figures}))
        return 0
    print(f"machine: {machine()}")
    for name, value in figures.items():
        print(f"{name:24} {value}")
    reached = figures["daemon_mb_with_links"] <= TARGET_MB
    print(f"target <= {TARGET_MB} MB with 500 links: {'reached' if reached else 'MISSED'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
