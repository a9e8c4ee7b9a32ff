#!/usr/bin/env python3
"""Measures libp2p over loopback, TCP and QUIC, between two processes: connect, ping, fresh stream, bulk both ways.

Usage: python scripts/bench/net.py [--transport tcp] [--mib 512] [--pings 500] [--dials 100] [--repeat 3] [--json]
       python -m venv build/libp2p; build/libp2p/bin/pip install libp2p; then --libp2p build/libp2p/bin/python
Figures of a shared machine vary; the line that describes it is printed first, the targets and how they fared last.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

from machine import machine

from clawnet.errors import LinkError
from clawnet.identity import multiaddr
from clawnet.identity.keys import KeyPair
from clawnet.net.ping import Pinger
from clawnet.net.port import Connection, Stream
from clawnet.net.quic import QuicTransport
from clawnet.net.tcp import TcpTransport

SINK, SOURCE = "/bench/sink/1", "/bench/source/1"
CHUNK = bytes(256 * 1024)
TRANSPORTS = {"tcp": TcpTransport, "quic-v1": QuicTransport}
QUIC_IS_SMALLER = 16
RIVAL_IS_SMALLER = 8
TARGET_RATIO = 1.3
TARGETS = (
    ("tcp", "connect_and_first_ping_p50_ms", 10),
    ("tcp", "ping_p50_us", 250),
    ("tcp", "bulk_up_mb_per_s", 250),
    ("tcp", "bulk_down_mb_per_s", 250),
    ("quic-v1", "ping_p50_us", 600),
    ("quic-v1", "bulk_up_mb_per_s", 8),
    ("quic-v1", "bulk_down_mb_per_s", 8),
)


async def serve(kind: str) -> None:
    """The other process: takes or gives as many bytes as asked; ends when its standard input does."""
    transport = TRANSPORTS[kind](KeyPair.generate(os.urandom), [SINK, SOURCE], "bench")
    jobs: set[asyncio.Task[None]] = set()

    def on_stream(stream: Stream) -> None:
        job = asyncio.ensure_future(sink(stream) if stream.protocol == SINK else source(stream))
        jobs.add(job)
        job.add_done_callback(jobs.discard)

    def on_connection(connection: Connection) -> None:
        connection.set_stream_handler(on_stream)

    listener = await transport.listen("127.0.0.1", 0, on_connection)
    print(listener.addresses[0], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await listener.close()
    await transport.close()


async def sink(stream: Stream) -> None:
    """Reads to the end, then says how much that was."""
    count = 0
    with contextlib.suppress(LinkError):
        while data := await stream.read():
            count += len(data)
        await stream.write(count.to_bytes(8, "big"))
        stream.close_write()


async def source(stream: Stream) -> None:
    """Writes as many bytes as the first eight say."""
    left = int.from_bytes(await stream.readexactly(8), "big")
    while left:
        await stream.write(CHUNK[: min(left, len(CHUNK))])
        left -= min(left, len(CHUNK))
    stream.close_write()


async def upload(connection: Connection, count: int) -> float:
    stream = await connection.open_stream([SINK])
    started = perf_counter()
    for _ in range(count // len(CHUNK)):
        await stream.write(CHUNK)
    stream.close_write()
    taken = int.from_bytes(await stream.readexactly(8), "big")
    seconds = perf_counter() - started
    assert taken == count // len(CHUNK) * len(CHUNK)
    return taken / seconds / 1e6


async def download(connection: Connection, count: int) -> float:
    stream = await connection.open_stream([SOURCE])
    started = perf_counter()
    await stream.write(count.to_bytes(8, "big"))
    got = 0
    while data := await stream.read():
        got += len(data)
    seconds = perf_counter() - started
    assert got == count
    return got / seconds / 1e6


async def measure(address: str, options: argparse.Namespace) -> dict[str, Any]:
    target = multiaddr.parse(address)
    transport = TRANSPORTS[target.transport](KeyPair.generate(os.urandom), [], "bench")
    connects: list[float] = []
    for _ in range(options.dials):
        started = perf_counter()
        connection = await transport.dial(target, None)
        await Pinger(connection).ping()
        connects.append(perf_counter() - started)
        connection.close("measured")
    connection = await transport.dial(target, None)
    pinger = Pinger(connection)
    for _ in range(50):
        await pinger.ping()
    pings = [await pinger.ping() for _ in range(options.pings)]
    pinger.close()
    opens: list[float] = []
    for _ in range(options.dials):
        started = perf_counter()
        stream = await connection.open_stream([SINK])
        opens.append(perf_counter() - started)
        stream.close_write()
        assert await stream.readexactly(8) == bytes(8)
    count = options.mib * 1024 * 1024
    cpu = process_time()
    up = [await upload(connection, count) for _ in range(options.repeat)]
    down = [await download(connection, count) for _ in range(options.repeat)]
    cpu = process_time() - cpu
    busy = asyncio.ensure_future(upload(connection, 4 * count))
    loaded: list[float] = []
    while not busy.done() and len(loaded) < options.pings:
        loaded.append(await pinger.ping())
    busy.cancel()
    await transport.close()
    return {
        "connect_and_first_ping_p50_ms": round(statistics.median(connects) * 1e3, 2),
        "ping_p50_us": round(statistics.median(pings) * 1e6),
        "ping_p95_us": round(statistics.quantiles(pings, n=20)[-1] * 1e6),
        "ping_beside_bulk_p50_us": round(statistics.median(loaded) * 1e6),
        "fresh_stream_p50_us": round(statistics.median(opens) * 1e6),
        "bulk_up_mb_per_s": round(statistics.median(up)),
        "bulk_down_mb_per_s": round(statistics.median(down)),
        "bulk_cpu_s_per_gb": round(cpu / (2 * options.repeat * count / 1e9), 2),
    }


def measured(kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of one transport, between this process and another."""
    if kind != "tcp":
        options = argparse.Namespace(**{**vars(options), "mib": max(1, options.mib // QUIC_IS_SMALLER)})
    command = [sys.executable, __file__, "--serve", kind]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdin is not None
        figures = asyncio.run(measure(other.stdout.readline().strip(), options))
        other.stdin.close()
    return figures


def rival(kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """py-libp2p's figures for the same transport, in its own Python."""
    mib = options.mib if kind == "tcp" else max(1, options.mib // QUIC_IS_SMALLER)
    numbers = [str(max(1, mib // RIVAL_IS_SMALLER)), str(options.pings), str(max(1, options.dials // RIVAL_IS_SMALLER))]
    side = str(Path(__file__).with_name("py_libp2p_side.py"))
    done = subprocess.run([options.libp2p, side, kind, *numbers], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def compared(figures: dict[str, dict[str, Any]]) -> list[str]:
    """How often our figure is as good as py-libp2p's, for each that both have; 1.3 is the target."""
    lines = []
    for kind in TRANSPORTS:
        for name, theirs in figures.get(f"py {kind}", {}).items():
            ours = figures[kind][name]
            ratio = ours / theirs if "bulk" in name else theirs / ours
            verdict = "reached" if ratio >= TARGET_RATIO else "MISSED"
            lines.append(f"target {kind} {name} >= {TARGET_RATIO} x py-libp2p: {ratio:.1f} x, {verdict}")
    return lines


def verdicts(figures: dict[str, dict[str, Any]]) -> list[str]:
    """One line for each target: reached or missed."""
    lines = []
    for kind, name, limit in TARGETS:
        if kind not in figures:
            continue
        value = figures[kind][name]
        reached = value >= limit if "bulk" in name else value <= limit
        wanted = f"{'>=' if 'bulk' in name else '<='} {limit}"
        lines.append(f"target {kind} {name} {wanted}: {value}, {'reached' if reached else 'MISSED'}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--serve", choices=TRANSPORTS, help=argparse.SUPPRESS)
    parser.add_argument("--transport", action="append", choices=TRANSPORTS, help="only this one (default: all)")
    parser.add_argument("--mib", type=int, default=512, help=f"per transfer (QUIC: 1/{QUIC_IS_SMALLER} of it)")
    parser.add_argument("--pings", type=int, default=500, help="pings measured (limits.PING_BURST bounds a burst)")
    parser.add_argument("--dials", type=int, default=100)
    parser.add_argument("--repeat", type=int, default=3, help="bulk transfers each way; the median counts")
    parser.add_argument(
        "--libp2p", default="", metavar="PYTHON", help="a Python that has py-libp2p, measured beside ours"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve(options.serve))
        return 0
    described = machine()
    figures: dict[str, dict[str, Any]] = {}
    for kind in options.transport or TRANSPORTS:
        figures[kind] = measured(kind, options)
        if options.libp2p:
            figures[f"py {kind}"] = rival(kind, options)
    if options.json:
        print(json.dumps({"machine": described, **figures}))
        return 0
    print(f"machine: {described}")
    print(f"{'':32}" + "".join(f"{kind:>12}" for kind in figures))
    for name in next(iter(figures.values())):
        print(f"{name:32}" + "".join(f"{values.get(name, '-'):>12}" for values in figures.values()))
    for line in (*verdicts(figures), *compared(figures)):
        print(line)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
