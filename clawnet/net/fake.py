"""The network in memory: honours the port without sockets or cryptography; a test can cut, hang and heal it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

from clawnet import limits
from clawnet.errors import LinkError
from clawnet.identity.keys import public_of
from clawnet.identity.multiaddr import Multiaddr
from clawnet.net import identify, ping
from clawnet.net.doors import Doors
from clawnet.net.port import Bytes, ConnectionHandler, StreamHandler, expected_peer
from clawnet.net.streams import BufferedStream, StreamDesk

_FIRST_FREE_PORT = 40_000


class FakeNetwork:
    """Where fake transports find each other: listeners by host and port, and the faults a test has switched on."""

    def __init__(self) -> None:
        self.listeners: dict[tuple[str, int], FakeListener] = {}
        self.connections: list[FakeConnection] = []
        self._port = _FIRST_FREE_PORT
        self._cut: set[frozenset[str]] = set()
        self._hung: set[str] = set()

    def transport(self, peer: str, protocols: Sequence[str] = (), agent: str = "clawnet") -> FakeTransport:
        """A transport for the node with this peer id (a real one: identify tells its key)."""
        return FakeTransport(self, peer, protocols, agent)

    def cut(self, one: str, other: str) -> None:
        """Breaks every connection between two peers and refuses new ones."""
        self._cut.add(frozenset((one, other)))
        for connection in list(self.connections):
            if {connection.peer, connection.own_peer} == {one, other}:
                connection.break_off("the network was cut")

    def heal(self) -> None:
        """Takes back `cut` and `hang`; connections that broke stay broken."""
        self._cut.clear()
        self._hung.clear()
        for connection in list(self.connections):
            connection.release()

    def hang(self, peer: str) -> None:
        """Dials to `peer` get no answer, and nothing sent to it on open connections arrives until `heal`."""
        self._hung.add(peer)

    def is_hung(self, peer: str) -> bool:
        """Whether `peer` is silent."""
        return peer in self._hung

    def is_cut(self, one: str, other: str) -> bool:
        """Whether two peers cannot reach each other."""
        return frozenset((one, other)) in self._cut

    def free_port(self) -> int:
        """A port nobody listens on."""
        self._port += 1
        return self._port


class FakeListener:
    """A bound fake address."""

    def __init__(self, network: FakeNetwork, owner: FakeTransport, host: str, port: int, on: ConnectionHandler) -> None:
        family = "ip6" if ":" in host else "ip4"
        self.addresses = (Multiaddr(host, port, "tcp", None, family),)
        self.owner = owner
        self.on_connection = on
        self._network = network
        self._key = (host, port)

    async def close(self) -> None:
        """See port.Listener.close."""
        self._network.listeners.pop(self._key, None)


class FakeTransport:
    """See port.Transport."""

    name = "fake"

    def __init__(self, network: FakeNetwork, peer: str, protocols: Sequence[str], agent: str) -> None:
        self.network = network
        self.doors = Doors()
        self.peer = peer
        self.protocols = tuple(protocols)
        self.identify = identify.answerer(public_of(peer), (*protocols, ping.PROTOCOL, identify.PROTOCOL), agent)

    async def dial(
        self, address: Multiaddr, peer: str | None, timeout_s: float = limits.HANDSHAKE_TIMEOUT_S
    ) -> FakeConnection:
        """See port.Transport.dial."""
        expected = expected_peer(address, peer, self.peer)
        await asyncio.sleep(0)
        network = self.network
        listener = network.listeners.get((address.host, address.port))
        if listener is None:
            raise LinkError(f"{address} refused the connection", address=str(address))
        owner = listener.owner
        if network.is_hung(owner.peer):
            await asyncio.sleep(timeout_s)
            raise LinkError(f"{address} did not answer within {timeout_s:g} s", address=str(address))
        if network.is_cut(self.peer, owner.peer):
            raise LinkError(f"{address} cannot be reached", address=str(address))
        if expected is not None and expected != owner.peer:
            raise LinkError(f"{address} is {owner.peer}, not {expected}", address=str(address), found=owner.peer)
        near = FakeConnection(self, owner.peer, str(address.with_peer(None)), inbound=False)
        far = FakeConnection(owner, self.peer, f"/ip4/127.0.0.1/tcp/{network.free_port()}", inbound=True)
        near.far, far.far = far, near
        network.connections += [near, far]
        listener.on_connection(far)
        return near

    async def listen(self, host: str, port: int, on_connection: ConnectionHandler) -> FakeListener:
        """See port.Transport.listen."""
        port = port or self.network.free_port()
        if (host, port) in self.network.listeners:
            raise LinkError(f"cannot listen on {host} port {port}: address already in use", errno=98)
        listener = FakeListener(self.network, self, host, port, on_connection)
        self.network.listeners[(host, port)] = listener
        return listener

    async def close(self) -> None:
        """See port.Transport.close."""
        for connection in list(self.network.connections):
            if connection.own_peer == self.peer:
                connection.close("the transport is closed")


class FakeConnection:
    """One end of a connection; `far` is the other."""

    transport = "fake"
    offence = ""
    far: FakeConnection

    def __init__(self, owner: FakeTransport, peer: str, address: str, *, inbound: bool) -> None:
        self.peer = peer
        self.address = address
        self.inbound = inbound
        self.own_peer = owner.peer
        self.network = owner.network
        self.closed: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.rtt_s = 0.0
        self.streams: set[FakeStream] = set()
        self.held: deque[Callable[[], object]] = deque()
        self._ping = ping.Answerer()
        self.desk = StreamDesk(owner.protocols, {ping.PROTOCOL: self._ping.serve, identify.PROTOCOL: owner.identify})

    async def open_stream(
        self, protocols: Sequence[str], timeout_s: float = limits.STREAM_NEGOTIATION_TIMEOUT_S
    ) -> FakeStream:
        """See port.Connection.open_stream."""
        await asyncio.sleep(0)
        if self.closed.done():
            raise LinkError(f"the connection is closed: {self.closed.result()}", peer=self.peer)
        if sum(not s.inbound for s in self.streams) >= limits.STREAMS_PER_CONNECTION_MAX:
            raise LinkError("too many streams on this connection", peer=self.peer)
        agreed = next((p for p in protocols if p in self.far.desk.protocols), None)
        if agreed is None:
            raise LinkError(f"the peer speaks none of {', '.join(protocols)}", peer=self.peer, refused=True)
        near, far = FakeStream(self, False), FakeStream(self.far, True)
        near.protocol = far.protocol = agreed
        near.far, far.far = far, near
        self.streams.add(near)
        self.far.streams.add(far)
        self.after(lambda: self.far.welcome(far))
        return near

    def set_stream_handler(self, handler: StreamHandler) -> None:
        """See port.Connection.set_stream_handler."""
        self.desk.set_handler(handler)

    def close(self, reason: str) -> None:
        """See port.Connection.close."""
        if not self.closed.done():
            self._lost(reason)
            self.after(lambda: self.far._lost(f"closed by the peer: {reason}"))

    def break_off(self, reason: str) -> None:
        """Both ends at once lose the connection, with what was on its way."""
        self._lost(reason)
        self.far._lost(reason)

    def after(self, deliver: Callable[[], object]) -> None:
        """Runs `deliver` at the far end in the next turn, in order; a hung peer gets it after the healing."""
        asyncio.get_running_loop().call_soon(self._deliver, deliver)

    def _deliver(self, deliver: Callable[[], object]) -> None:
        self.held.append(deliver)
        self.release()

    def release(self) -> None:
        """Delivers what is held, unless the far end is hung."""
        while self.held and not self.network.is_hung(self.peer):
            self.held.popleft()()

    def welcome(self, stream: FakeStream) -> None:
        """A stream from the far end."""
        if not stream.closed.done():
            self.desk.deliver(stream)

    def _lost(self, reason: str) -> None:
        if self.closed.done():
            return
        self.closed.set_result(reason)
        if self in self.network.connections:
            self.network.connections.remove(self)
        for stream in list(self.streams):
            stream.fail(reason, discard=False)
        self._ping.close()
        self.desk.clear()


class FakeStream(BufferedStream):
    """One end of a stream with a fixed window of limits.STREAM_WINDOW_BYTES."""

    far: FakeStream
    connection: FakeConnection

    def __init__(self, connection: FakeConnection, inbound: bool) -> None:
        super().__init__(connection, inbound)
        self._window = limits.STREAM_WINDOW_BYTES
        self._pending = bytearray()

    @property
    def buffered(self) -> int:
        """See port.Stream.buffered."""
        return len(self._pending)

    def write_nowait(self, data: Bytes) -> None:
        """See port.Stream.write_nowait."""
        self._check_writable()
        if len(self._pending) + len(data) > limits.SEND_QUEUE_BYTES_MAX:
            raise LinkError("the peer takes nothing and the send queue is full", peer=self.connection.peer)
        view = memoryview(data)
        if not self._pending:
            view = view[self._send_some(view) :]
        self._pending += view

    def close_write(self) -> None:
        """See port.Stream.close_write."""
        if self.write_ended or self.error:
            return
        self.write_ended = True
        self._flush()

    def reset(self) -> None:
        """See port.Stream.reset."""
        if not self.closed.done() and not self.error:
            self.connection.after(lambda: self.far.fail("reset by the peer", discard=True))
            self.fail("reset", discard=True)

    def _send_some(self, data: memoryview) -> int:
        n = min(len(data), self._window)
        if n:
            self._window -= n
            chunk = bytes(data[:n])
            self.connection.after(lambda: self.far.arrive(chunk))
        return n

    def arrive(self, data: bytes) -> None:
        """Bytes from the far end; a stream that failed drops them."""
        if not self.error:
            self.feed(data)

    def _consumed(self, n: int) -> None:
        self.connection.after(lambda: self.far.grant(n))

    def grant(self, n: int) -> None:
        """The far reader took `n` bytes."""
        self._window += n
        self._flush()

    def _flush(self) -> None:
        if self._pending and not self.error:
            sent = self._send_some(memoryview(bytes(self._pending)))
            del self._pending[:sent]
        if self.write_ended and not self.write_done and not self._pending:
            self.write_done = True
            self.connection.after(self.far.feed_end)
            self._settle()
        if not self._pending:
            self.writable()

    def _ended(self) -> None:
        self.connection.streams.discard(self)
