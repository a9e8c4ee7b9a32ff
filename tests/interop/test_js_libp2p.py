"""js-libp2p and clawnet over TCP and QUIC: each dials, identifies and pings the other, and refuses a wrong peer id.

npm installs js-libp2p, in the exact versions of js/package.json, into CLAWNET_INTEROP_DIR (default build/interop).
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from clawnet.errors import LinkError
from clawnet.identity import multiaddr
from clawnet.identity.keys import KeyPair
from clawnet.net import identify
from clawnet.net.ping import Pinger
from clawnet.net.port import Connection, Stream, Transport
from clawnet.net.quic import QuicTransport
from clawnet.net.tcp import TcpTransport

HERE = Path(__file__).parent
CHECKOUT = HERE.parent.parent
OURS = KeyPair.from_seed(b"o" * 32)
OTHER = KeyPair.from_seed(b"x" * 32)
ECHO = "/test/echo/1"
PINGS = 200

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(shutil.which("npm") is None, reason="interop: npm is not installed"),
]


@pytest.fixture(scope="session")
def js() -> Path:
    """The directory with js-libp2p and node 22 in it; installed once, with no lock file."""
    place = Path(os.environ.get("CLAWNET_INTEROP_DIR") or CHECKOUT / "build" / "interop")
    place.mkdir(parents=True, exist_ok=True)
    wanted = (HERE / "js" / "package.json").read_bytes()
    stamp = place / "installed.json"
    if not stamp.exists() or stamp.read_bytes() != wanted:
        (place / "package.json").write_bytes(wanted)
        npm = ["npm", "install", "--no-package-lock", "--no-audit", "--no-fund", "--loglevel=error"]
        subprocess.run(npm, cwd=place, check=True, timeout=280)
        stamp.write_bytes(wanted)
    shutil.copy(HERE / "js" / "node.mjs", place / "node.mjs")
    return place


class JsNode:
    """The other side, spoken to by one JSON line each way."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None and process.stdout is not None
        self.process, self.stdin, self.stdout = process, process.stdin, process.stdout

    async def line(self) -> dict[str, Any]:
        raw = await self.stdout.readline()
        assert raw, "the js node ended"
        answer: dict[str, Any] = json.loads(raw)
        return answer

    async def do(self, what: str, **fields: object) -> dict[str, Any]:
        self.stdin.write(json.dumps({"do": what, **fields}).encode() + b"\n")
        return await self.line()


class Stage:
    """A clawnet node that listens, a js node, and the connections that came in."""

    def __init__(self, ours: Transport, address: str, node: JsNode, peer: str, address_js: str) -> None:
        self.ours, self.address, self.node, self.peer, self.address_js = ours, address, node, peer, address_js
        self.arrived: asyncio.Queue[Connection] = asyncio.Queue()


async def echo(stream: Stream) -> None:
    while data := await stream.read():
        await stream.write(data)
    stream.close_write()


@asynccontextmanager
async def stage(js: Path, kind: str) -> AsyncIterator[Stage]:
    process = await asyncio.create_subprocess_exec(
        str(js / "node_modules" / ".bin" / "node"),
        "node.mjs",
        kind,
        cwd=js,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    ours = {"tcp": TcpTransport, "quic-v1": QuicTransport}[kind](OURS, [ECHO], "clawnet/interop")
    try:
        node = JsNode(process)
        info = await node.line()
        echoes: set[asyncio.Task[None]] = set()
        arrived: asyncio.Queue[Connection] = asyncio.Queue()

        def on_connection(connection: Connection) -> None:
            connection.set_stream_handler(lambda stream: echoes.add(asyncio.ensure_future(echo(stream))))
            arrived.put_nowait(connection)

        listener = await ours.listen("127.0.0.1", 0, on_connection)
        address = str(listener.addresses[0])
        there = Stage(ours, address, node, info["peer"], info["addresses"][0])
        there.arrived = arrived
        yield there
        await listener.close()
        for task in echoes:
            assert task.done() and task.exception() is None
    finally:
        await ours.close()
        assert process.stdin is not None
        process.stdin.close()
        await asyncio.wait_for(process.wait(), 20)


@pytest.fixture(params=["tcp", "quic-v1"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def run(js: Path, kind: str, body: Callable[[Stage], Awaitable[None]]) -> None:
    async def all_of_it() -> None:
        async with stage(js, kind) as there:
            await body(there)

    asyncio.run(asyncio.wait_for(all_of_it(), 60))


def test_js_dials_identifies_and_pings_clawnet(js: Path, kind: str) -> None:
    async def body(there: Stage) -> None:
        up = await there.node.do("dial", address=f"{there.address}/p2p/{OURS.peer_id}")
        secured, muxed = {"tcp": ("/noise", "/yamux/1.0.0"), "quic-v1": ("native", "quic")}[kind]
        assert up == {"peer": OURS.peer_id, "encryption": secured, "multiplexer": muxed}
        assert (await there.arrived.get()).peer == there.peer
        said = await there.node.do("identify", peer=OURS.peer_id)
        assert "error" not in said, said
        assert (said["peer"], said["agent"], said["addresses"]) == (OURS.peer_id, "clawnet/interop", [])
        assert {ECHO, "/ipfs/id/1.0.0", "/ipfs/ping/1.0.0"} == set(said["protocols"])
        assert await there.node.do("ping", peer=OURS.peer_id, count=PINGS) == {"done": PINGS}

    run(js, kind, body)


def test_clawnet_dials_identifies_and_pings_js(js: Path, kind: str) -> None:
    async def body(there: Stage) -> None:
        link = await there.ours.dial(multiaddr.parse(there.address_js), there.peer)
        said = await identify.ask(link)
        assert (said.peer, said.agent) == (there.peer, "js-interop/1")
        assert "/ipfs/ping/1.0.0" in said.protocols
        pinger = Pinger(link)
        for _ in range(PINGS):
            assert await pinger.ping() > 0
        pinger.close()
        with pytest.raises(LinkError) as caught:
            await link.open_stream(["/test/unknown/1"])
        assert caught.value.details["refused"] is True
        link.close("done")

    run(js, kind, body)


@pytest.mark.slow
def test_bulk_data_passes_both_ways(js: Path, kind: str) -> None:
    async def body(there: Stage) -> None:
        link = await there.ours.dial(multiaddr.parse(there.address_js), there.peer)
        stream = await link.open_stream([ECHO])
        data = os.urandom(3_000_000)
        writing = asyncio.ensure_future(stream.write(data))
        assert await stream.readexactly(len(data)) == data
        await writing
        stream.close_write()
        assert await stream.read() == b""
        link.close("now the other way")
        await there.node.do("hangup", peer=OURS.peer_id)
        await there.node.do("dial", address=f"{there.address}/p2p/{OURS.peer_id}")
        assert await there.node.do("echo", peer=OURS.peer_id, bytes=3_000_000) == {"received": 3_000_000, "same": True}

    run(js, kind, body)


def test_a_wrong_peer_id_is_refused_both_ways(js: Path, kind: str) -> None:
    async def body(there: Stage) -> None:
        refused = await there.node.do("dial", address=f"{there.address}/p2p/{OTHER.peer_id}")
        assert "error" in refused
        with pytest.raises(LinkError, match=there.peer):
            await there.ours.dial(multiaddr.parse(there.address_js), OTHER.peer_id)
        # Both still take the right one.
        link = await there.ours.dial(multiaddr.parse(there.address_js), there.peer)
        assert await Pinger(link).ping() > 0
        link.close("done")

    run(js, kind, body)


def test_garbage_harms_nobody_who_comes_after(js: Path, kind: str) -> None:
    async def body(there: Stage) -> None:
        port = multiaddr.parse(there.address).port
        for first_flight in (
            b"GET / HTTP/1.1\r\n\r\n",
            b"\xff" * 300,
            b"\x13/multistream/1.0.0\n\x03ls\n" * 40,
            os.urandom(4096),
        ):
            if kind == "quic-v1":
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as raw:
                    for first_byte in (b"", b"\xc0", b"\x40"):
                        raw.sendto((first_byte + first_flight)[:1_400].ljust(1_200, b"x"), ("127.0.0.1", port))
                continue
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(first_flight)
            try:
                answer = await reader.read()
            except ConnectionResetError:
                answer = b""
            assert len(answer) < 2_000
            writer.close()
        up = await there.node.do("dial", address=f"{there.address}/p2p/{OURS.peer_id}")
        assert up["peer"] == OURS.peer_id
        assert await there.node.do("ping", peer=OURS.peer_id, count=1) == {"done": 1}

    run(js, kind, body)
