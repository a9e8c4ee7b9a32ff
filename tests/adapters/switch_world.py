"""Nodes for switch tests: a real switch with real keys and signatures on a transport of choice, and all it was told."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from hashlib import sha256
from io import BytesIO
from typing import Any

from clawnet import limits
from clawnet.errors import DataError
from clawnet.identity.keys import KeyPair
from clawnet.net.fake import FakeNetwork
from clawnet.net.port import Transport
from clawnet.net.quic import QuicTransport
from clawnet.net.settings import SwitchSettings
from clawnet.net.switch import PROTOCOLS, Switch
from clawnet.net.tcp import TcpTransport
from clawnet.wire.blobid import blob_id, id_of_leaves, leaf, split_leaves
from clawnet.wire.events import DialEnded, MessageIn, PeerDown, PeerUp, Stimulus
from clawnet.wire.messages import Hello, Message
from clawnet.wire.session import HelloFacts

KEYS = sorted((KeyPair.from_seed(sha256(bytes([n])).digest()) for n in range(8)), key=lambda key: key.peer_id)
"""Key pairs, the smallest peer id first."""

SETTINGS = SwitchSettings(
    listen_addrs=("/ip4/127.0.0.1/tcp/0", "/ip4/127.0.0.1/udp/0/quic-v1"),
    agent="clawnet/test",
    connection_timeout_s=10.0,
)
MESH = bytes(32)
WAIT_S = 20.0


class MemoryBlobs:
    """A blob store in memory, as net/blobs.py asks for it."""

    def __init__(self) -> None:
        self.kept: dict[bytes, bytes] = {}
        self.granted: set[tuple[str, bytes, bytes]] = set()
        self.sources: set[tuple[bytes, str]] = set()
        self.parts: dict[tuple[bytes, str], bytes] = {}
        self.open_parts = 0

    def put(self, data: bytes) -> bytes:
        blob = blob_id(data)
        self.kept[blob] = data
        return blob

    def may_fetch(self, peer: str, task_id: bytes, blob: bytes) -> bool:
        return (peer, task_id, blob) in self.granted

    def has(self, blob: bytes) -> bool:
        return blob in self.kept

    def size(self, blob: bytes) -> int:
        return len(self.kept[blob])

    def came_from(self, blob: bytes, size: int, source: str) -> bool:
        return (
            len(self.kept.get(blob, b"")) == size
            and blob in self.kept
            and (not source or (blob, source) in self.sources)
        )

    def note_source(self, blob: bytes, source: str) -> None:
        self.sources.add((blob, source))

    def leaves(self, blob: bytes) -> list[bytes]:
        leaves = [leaf(chunk) for chunk in self.read_chunks(blob)]
        if id_of_leaves(len(self.kept[blob]), leaves) != blob:
            raise DataError("the stored blob is damaged")
        return leaves

    def read_chunks(self, blob: bytes) -> Iterator[bytes]:
        data = self.kept[blob]
        for at in range(0, len(data), limits.BLOB_CHUNK_BYTES):
            yield data[at : at + limits.BLOB_CHUNK_BYTES]

    def opened(self, blob: bytes, offset: int) -> BytesIO:
        file = BytesIO(self.kept[blob])
        file.seek(offset)
        return file

    def fetching(self, blob: bytes, size: int, source: str) -> MemoryPart:
        return MemoryPart(self, blob, size, source)


class MemoryPart:
    """See net.blobs.BlobPart."""

    def __init__(self, store: MemoryBlobs, blob: bytes, size: int, source: str) -> None:
        self.store = store
        self.name = (blob, source)
        self.size = size
        self.data = store.parts.pop(self.name, b"")
        store.open_parts += 1

    @property
    def verified(self) -> int:
        return len(self.data)

    def begin(self, leaves: bytes) -> None:
        assert id_of_leaves(self.size, split_leaves(leaves)) == self.name[0]

    def write(self, pieces: Sequence[bytes]) -> None:
        self.data += b"".join(pieces)

    def commit(self) -> None:
        assert blob_id(self.data) == self.name[0]
        self.store.kept[self.name[0]] = self.data

    def stop(self) -> None:
        self.store.open_parts -= 1
        if self.data and self.name[0] not in self.store.kept:
            self.store.parts[self.name] = self.data


class SwitchNode:
    """One switch and what it delivered; checks at every stimulus that ups and downs of a peer alternate."""

    def __init__(
        self, key: KeyPair, transports: dict[str, Transport], settings: SwitchSettings = SETTINGS, seed: int = 0
    ) -> None:
        self.key = key
        self.peer = key.peer_id
        self.told: list[Stimulus] = []
        self.up: dict[str, PeerUp] = {}
        self.log: list[tuple[str, str, dict[str, Any]]] = []
        self.refuse: dict[str, str] = {}
        self.followed: dict[str, str] = {}
        self.blobs = MemoryBlobs()
        self.clock_off_ms = 0
        self.addresses: list[str] = []
        self.known: dict[str, list[str]] = {}
        self._changed = asyncio.Event()
        chance = random.Random(f"{seed} {key.peer_id}")
        self.switch = Switch(
            key,
            settings,
            clock=lambda: time.time_ns() // 1_000_000 + self.clock_off_ms,
            entropy=chance.randbytes if seed else os.urandom,
            transports=transports,
            local_hello=lambda: HelloFacts(MESH, f"node-{key.peer_id[-4:]}", []),
            admit=self._admit,
            deliver=self._deliver,
            blobs=self.blobs,
            log=lambda level, event, fields: self.log.append((level, event, fields)),
            addresses_of=lambda peer: self.known.get(peer, []),
        )

    def _admit(self, peer: str, hello: Hello, wanted: str) -> str:
        if wanted and self.followed.get(wanted) != peer:
            return f"it is {peer} there, not {wanted}"
        return self.refuse.get(peer, "" if hello.mesh == MESH else "another mesh")

    def _deliver(self, stimulus: Stimulus) -> None:
        if isinstance(stimulus, PeerUp):
            assert stimulus.peer not in self.up, f"{stimulus.peer} came up twice"
            self.up[stimulus.peer] = stimulus
        elif isinstance(stimulus, PeerDown):
            assert self.up.pop(stimulus.peer, None) is not None, f"{stimulus.peer} went down unseen"
        self.told.append(stimulus)
        self._changed.set()

    async def until(self, holds: Callable[[], Any]) -> Any:
        """Waits until something is true, looking whenever something was delivered."""
        async with asyncio.timeout(WAIT_S):
            while not (value := holds()):
                self._changed.clear()
                await self._changed.wait()
        return value

    async def find(self, kind: type[Any], **fields: Any) -> Any:
        """The first stimulus of a kind with these fields, awaited."""
        return await self.until(lambda: next(self.all(kind, **fields), None))

    def all(self, kind: type[Any], **fields: Any) -> Iterator[Any]:
        """What was delivered of a kind."""
        for one in self.told:
            if isinstance(one, kind) and all(getattr(one, name) == value for name, value in fields.items()):
                yield one

    def messages(self, peer: str) -> list[Message]:
        """What a peer sent, in order."""
        return [one.message for one in self.all(MessageIn, peer=peer)]

    def session(self, peer: str) -> bytes | None:
        """The session of the link to a peer."""
        link = self.switch._links.get(peer)
        return link.session.id if link is not None and link.session is not None else None

    def events(self, event: str) -> list[dict[str, Any]]:
        """The log lines of one event."""
        return [fields for _, name, fields in self.log if name == event]

    async def dial(self, other: SwitchNode, call: int = 1) -> str:
        """Connects to another node; the reason why not, or ""."""
        self.switch.dial(call, other.peer, other.addresses)
        ended: DialEnded = await self.find(DialEnded, call=call)
        return ended.reason


class SwitchWorld:
    """Some nodes on one network."""

    def __init__(self, kind: str = "fake") -> None:
        self.kind = kind
        self.network = FakeNetwork()
        self.nodes: list[SwitchNode] = []
        self.transports: list[Transport] = []

    def transport(self, key: KeyPair, kind: str = "") -> Transport:
        """A transport for the holder of the key; closed with the world."""
        kind = kind or self.kind
        made: Transport
        if kind == "fake":
            made = self.network.transport(key.peer_id, PROTOCOLS, "clawnet/test")
        else:
            make = QuicTransport if kind == "quic-v1" else TcpTransport
            made = make(key, PROTOCOLS, "clawnet/test")
        self.transports.append(made)
        return made

    def carriers(self, key: KeyPair) -> dict[str, Transport]:
        """The transports of a node of this kind of network, as the switch takes them."""
        kinds = ("quic-v1", "tcp") if self.kind == "both" else (self.kind,)
        return {kind.replace("fake", "tcp"): self.transport(key, kind) for kind in kinds}

    async def node(self, index: int, settings: SwitchSettings = SETTINGS, seed: int = 0) -> SwitchNode:
        """A started node with the key KEYS[index]."""
        node = SwitchNode(KEYS[index], self.carriers(KEYS[index]), settings, seed)
        self.nodes.append(node)
        node.addresses = await node.switch.start()
        return node

    async def pair(self) -> tuple[SwitchNode, SwitchNode]:
        """Two nodes, the second dialled by the first."""
        one, other = await self.node(0), await self.node(1)
        assert await one.dial(other) == ""
        await other.find(PeerUp, peer=one.peer)
        return one, other


@asynccontextmanager
async def switch_world(kind: str = "fake") -> AsyncIterator[SwitchWorld]:
    """A network whose nodes are stopped at the end; a defect caught by any switch fails the test."""
    world = SwitchWorld(kind)
    defects: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: defects.append(context))
    try:
        yield world
    finally:
        for node in world.nodes:
            await node.switch.stop()
        for transport in world.transports:
            await transport.close()
        assert not defects, defects
        assert not [node.up for node in world.nodes if node.up]
