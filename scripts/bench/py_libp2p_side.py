"""py-libp2p over loopback, measured as net.py measures clawnet: connect, ping, bulk both ways, between two processes.

Run by net.py in an environment that has py-libp2p: python py_libp2p_side.py KIND MIB PINGS DIALS; one JSON object.
"""

from __future__ import annotations

import json
import logging
import secrets
import statistics
import subprocess
import sys
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import multiaddr
import trio
from libp2p import new_host
from libp2p.host.ping import handle_ping
from libp2p.io.utils import read_exactly
from libp2p.peer.peerinfo import info_from_p2p_addr

PING, SINK, SOURCE = "/ipfs/ping/1.0.0", "/bench/sink/1", "/bench/source/1"
CHUNK = bytes(256 * 1024)
LISTEN = {"tcp": "/ip4/127.0.0.1/tcp/0", "quic-v1": "/ip4/127.0.0.1/udp/0/quic-v1"}


async def sink(stream: Any) -> None:
    left = int.from_bytes(await read_exactly(stream, 8), "big")
    while left:
        left -= len(await stream.read(min(left, len(CHUNK))))
    await stream.write(b"done")


async def source(stream: Any) -> None:
    left = int.from_bytes(await read_exactly(stream, 8), "big")
    while left:
        size = min(left, len(CHUNK))
        await stream.write(CHUNK[:size])
        left -= size


async def serve(kind: str) -> None:
    host = new_host(enable_quic=kind != "tcp")
    async with host.run(listen_addrs=[multiaddr.Multiaddr(LISTEN[kind])]):
        host.set_stream_handler(PING, handle_ping)
        host.set_stream_handler(SINK, sink)
        host.set_stream_handler(SOURCE, source)
        print(host.get_addrs()[0], flush=True)
        await trio.to_thread.run_sync(sys.stdin.read)


async def ping_once(stream: Any) -> float:
    payload = secrets.token_bytes(32)
    started = perf_counter()
    await stream.write(payload)
    assert await read_exactly(stream, 32) == payload
    return perf_counter() - started


async def measure(kind: str, address: str, mib: int, pings: int, dials: int) -> dict[str, Any]:
    peer = info_from_p2p_addr(multiaddr.Multiaddr(address))
    count = mib * 1024 * 1024
    connects = []
    host = new_host(enable_quic=kind != "tcp")
    async with host.run(listen_addrs=[]):
        for _ in range(dials):
            started = perf_counter()
            await host.connect(peer)
            await ping_once(await host.new_stream(peer.peer_id, [PING]))
            connects.append(perf_counter() - started)
            await host.disconnect(peer.peer_id)
        await host.connect(peer)
        stream = await host.new_stream(peer.peer_id, [PING])
        for _ in range(50):
            await ping_once(stream)
        times = [await ping_once(stream) for _ in range(pings)]
        up = await host.new_stream(peer.peer_id, [SINK])
        started = perf_counter()
        await up.write(count.to_bytes(8, "big"))
        for _ in range(count // len(CHUNK)):
            await up.write(CHUNK)
        await read_exactly(up, 4)
        up_s = perf_counter() - started
        down = await host.new_stream(peer.peer_id, [SOURCE])
        started = perf_counter()
        await down.write(count.to_bytes(8, "big"))
        left = count
        while left:
            left -= len(await down.read(min(left, len(CHUNK))))
        down_s = perf_counter() - started
    return {
        "connect_and_first_ping_p50_ms": round(statistics.median(connects) * 1e3, 2),
        "ping_p50_us": round(statistics.median(times) * 1e6),
        "bulk_up_mb_per_s": round(count / up_s / 1e6, 1),
        "bulk_down_mb_per_s": round(count / down_s / 1e6, 1),
    }


def main(arguments: Sequence[str]) -> None:
    logging.disable(logging.CRITICAL)
    if arguments[0] == "--serve":
        trio.run(serve, arguments[1])
        return
    kind, *numbers = arguments
    command = [sys.executable, __file__, "--serve", kind]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdin is not None
        figures = trio.run(measure, kind, other.stdout.readline().strip(), *map(int, numbers))
        other.stdin.close()
    print(json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1:])
