"""The network port: authenticated connections, their streams, and the transports that make them.

The switch knows these four protocols only. `fake.py` honours them in memory, `tcp.py` by libp2p over TCP; one contract
suite (tests/adapters/test_transport_contract.py) holds both to the sentences below.

Everything here belongs to one event loop and is called from it alone. Callbacks must not raise and must not wait.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from clawnet import limits
from clawnet.errors import LinkError

if TYPE_CHECKING:
    from clawnet.identity.multiaddr import Multiaddr
from clawnet.net.doors import Doors

Bytes = bytes | bytearray | memoryview
DataHandler = Callable[[bytes], None]
StreamHandler = Callable[["Stream"], None]
ConnectionHandler = Callable[["Connection"], None]


class Stream(Protocol):
    """One ordered, reliable, flow-controlled byte stream; both directions end on their own.

    At most one window of unread bytes is ever held for a stream: the peer may not send more, and a peer that does so
    loses its connection.
    """

    @property
    def protocol(self) -> str:
        """The protocol both sides agreed on, such as "/clawnet/1.0.0"."""

    @property
    def connection(self) -> Connection:
        """The connection that carries it; its `peer` is proven."""

    @property
    def inbound(self) -> bool:
        """True when the peer opened it."""

    @property
    def closed(self) -> asyncio.Future[str]:
        """Resolves, never fails, once both directions have ended: "" after an orderly end, else the reason."""

    @property
    def buffered(self) -> int:
        """Bytes accepted by `write_nowait` that the peer's window or the socket has not taken yet."""

    @property
    def unread(self) -> int:
        """Bytes that arrived and were not read."""

    async def read(self, n_max: int = limits.STREAM_CHUNK_BYTES) -> bytes:
        """What is there, at least one byte and at most `n_max`; b"" once the peer has ended its direction.

        Raises LinkError when the stream was reset or the connection lost. One reader at a time.
        """

    async def readexactly(self, n: int) -> bytes:
        """Exactly `n` bytes; LinkError when the stream ends before. `n` above the window is fine."""

    async def read_into(self, buffer: memoryview, stall_s: float) -> int:
        """Fills `buffer` and returns its length, or fewer when the peer ended its direction before.

        The reader is woken once, however many pieces the bytes come in, and the peer's window opens as they come.
        Raises TimeoutError when none came for `stall_s`, and LinkError as `read` does; what came is lost then.
        """

    async def write(self, data: Bytes) -> None:
        """Returns when all of `data` is on its way; waits while the peer's window or the connection is full.

        The memory of `data` may be used again once this has returned or was cancelled, and after `write_nowait`.
        Raises LinkError when the stream is reset, its direction was closed, or the connection is lost. One writer at
        a time.
        """

    def write_nowait(self, data: Bytes) -> None:
        """Sends now what may be sent and keeps the rest, in order. No task, no future.

        Raises LinkError, taking nothing, when `buffered` would pass limits.SEND_QUEUE_BYTES_MAX or the stream is
        closed for writing.
        """

    def set_data_handler(self, on_data: DataHandler | None) -> None:
        """Hands every arriving chunk to `on_data` instead of `read`, what is already here at once.

        `on_data(b"")` comes exactly once, when nothing more will come: the peer's end, a reset, or a lost connection
        (`closed` tells which). Bytes given to the handler count as consumed and open the peer's window again. A
        LinkError out of it resets the stream. None gives the stream back to `read`.
        """

    def pause_reading(self) -> None:
        """Holds the data handler's bytes back; the peer's window then runs full."""

    def resume_reading(self) -> None:
        """Takes `pause_reading` back and hands over what waits."""

    def close_write(self) -> None:
        """Ends this direction after what was written; the other direction stays open. Twice is once."""

    def reset(self) -> None:
        """Drops the stream in both directions at once; unsent and unread bytes are lost. Twice is once."""


class Connection(Protocol):
    """An encrypted connection to a peer that has proven its key."""

    @property
    def peer(self) -> str:
        """The proven peer id."""

    @property
    def address(self) -> str:
        """The other end as a multiaddr without peer id, such as "/ip4/192.0.2.1/tcp/4002"."""

    @property
    def transport(self) -> str:
        """ "tcp", "quic-v1" or "fake"."""

    @property
    def inbound(self) -> bool:
        """True when the peer dialled."""

    @property
    def closed(self) -> asyncio.Future[str]:
        """Resolves, never fails, with the reason once nothing more can be sent or received."""

    @property
    def offence(self) -> str:
        """What the peer did against the protocol, for which this side ended the connection, or the handshake."""

    @property
    def rtt_s(self) -> float:
        """The transport's own smoothed round trip; 0.0 while unknown."""

    async def open_stream(
        self, protocols: Sequence[str], timeout_s: float = limits.STREAM_NEGOTIATION_TIMEOUT_S
    ) -> Stream:
        """A new stream speaking the first of `protocols` that the peer supports.

        Raises LinkError: none supported (`details["refused"]` is True), time-out, stream limit, closed.
        """

    def set_stream_handler(self, handler: StreamHandler) -> None:
        """Calls `handler` for every inbound stream of the transport's `protocols`, once its protocol is agreed.

        Streams that came earlier are handed over now. Ping and identify are answered below and never seen here.
        """

    def close(self, reason: str) -> None:
        """Ends the connection in good order: what the windows let out still arrives. Twice is once."""


class Listener(Protocol):
    """A bound address that accepts connections."""

    @property
    def addresses(self) -> tuple[Multiaddr, ...]:
        """Where it is bound, with the real port; an unspecified host (0.0.0.0, ::) stays so."""

    async def close(self) -> None:
        """Stops accepting; connections already made stay."""


class Transport(Protocol):
    """Makes connections for one identity. `protocols` are what inbound streams may speak besides ping and identify."""

    doors: Doors

    @property
    def name(self) -> str:
        """The multiaddr's word for it: "tcp", "quic-v1" or "fake"."""

    async def dial(
        self, address: Multiaddr, peer: str | None, timeout_s: float = limits.HANDSHAKE_TIMEOUT_S
    ) -> Connection:
        """Connects to an IP address, encrypts, and proves the peer.

        `peer` (or the address's own /p2p/ part) is whom it must be. Raises LinkError: refused, timed out, wrong peer,
        not libp2p. The far side may still refuse after this returns: then `closed` resolves.
        """

    async def listen(self, host: str, port: int, on_connection: ConnectionHandler) -> Listener:
        """Accepts on host and port (0: any free one); `on_connection` gets each connection that is fully set up.

        A stream handler set inside `on_connection` misses nothing. Raises LinkError (`details["errno"]`) when the
        address cannot be bound.
        """

    async def close(self) -> None:
        """Ends every connection and handshake that is left and returns when their sockets are gone."""


def expected_peer(address: Multiaddr, peer: str | None, own_peer: str) -> str | None:
    """Whom a dial must find: `peer`, or the peer id in the address; None takes anybody.

    Raises LinkError when the two differ or name this very node.
    """
    if peer is not None and address.peer is not None and peer != address.peer:
        raise LinkError(f"{address} is not an address of {peer}", address=str(address))
    expected = peer or address.peer
    if expected == own_peer:
        raise LinkError(f"{address} is this node itself", address=str(address))
    return expected
