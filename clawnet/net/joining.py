"""/clawnet/join/1.0.0: redeeming an invite over a stream of its own, one question and one answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from clawnet import limits
from clawnet.errors import DataError, LinkError, WireError
from clawnet.identity import multiaddr
from clawnet.net import ratelimit
from clawnet.net.port import Connection, Stream
from clawnet.net.ratelimit import Arrivals
from clawnet.wire.batch import frame
from clawnet.wire.codec import decode_struct, encode
from clawnet.wire.events import JoinAnswered, JoinAsked, Stimulus
from clawnet.wire.messages import JoinAnswer, JoinAsk

JOIN_PROTOCOL = "/clawnet/join/1.0.0"
_ANOTHER = (
    "another key answers there than the token names: the inviter has changed its key since, so ask for a new token, or "
    "another machine has that address now"
)

Connecting = Awaitable[Connection]


class JoinDesk:
    """Answers those who redeem invites of this node, and redeems one elsewhere."""

    def __init__(self, deliver: Callable[[Stimulus], None], note: Callable[..., None]) -> None:
        self._deliver = deliver
        self._note = note
        self._arrivals = Arrivals()
        self._waiting: dict[int, asyncio.Future[JoinAnswer]] = {}
        self._calls = 0

    async def serve(self, stream: Stream) -> None:
        """Takes the question of an inbound stream to the node and its answer back."""
        connection = stream.connection
        try:
            async with asyncio.timeout(limits.JOIN_TIMEOUT_S):
                answer = await self._answer(stream)
                await stream.write(frame(encode(answer)))
                stream.close_write()
                await asyncio.wait([stream.closed])
        except (LinkError, WireError, TimeoutError) as problem:
            self._note("warn", "join.dropped", peer=connection.peer, address=connection.address, problem=str(problem))
        finally:
            stream.reset()

    def reply(self, call: int, answer: JoinAnswer) -> None:
        """The node's answer to JoinAsked; too late is no error."""
        future = self._waiting.pop(call, None)
        if future is not None and not future.done():
            future.set_result(answer)

    async def ask(self, call: int, inviter: str, connecting: Callable[[], Connecting], ask: JoinAsk) -> None:
        """Redeems an invite and delivers JoinAnswered, whatever happens."""
        answer: JoinAnswer | None = None
        error = ""
        try:
            async with asyncio.timeout(limits.JOIN_TIMEOUT_S):
                connection = await connecting()
                try:
                    answer = await _question(connection, ask)
                finally:
                    connection.close("the join stream is done")
        except TimeoutError:
            error = f"the inviter gave no answer within {limits.JOIN_TIMEOUT_S:g} s"
        except asyncio.CancelledError:
            self._deliver(JoinAnswered(call, None, "this node stops, or goes on under another key", inviter))
            raise
        except (LinkError, WireError) as problem:
            error = _ANOTHER if problem.details.get("found") else problem.message
        self._deliver(JoinAnswered(call, answer, error, inviter))

    async def _answer(self, stream: Stream) -> JoinAnswer:
        connection = stream.connection
        now_s = asyncio.get_running_loop().time()
        if not self._arrivals.take(place_of(connection.address), now_s):
            self._note("security", "join.rate_limited", peer=connection.peer, address=connection.address)
            return JoinAnswer("too many join requests from this address; try again in a minute")
        if len(self._waiting) >= limits.PENDING_JOINS_MAX:
            return JoinAnswer("too many join requests at once; try again in a minute")
        ask = decode_struct(JoinAsk, await read_frame(stream, limits.JOIN_BYTES_MAX), limits.JOIN_BYTES_MAX)
        self._calls += 1
        call = self._calls
        future: asyncio.Future[JoinAnswer] = asyncio.get_running_loop().create_future()
        self._waiting[call] = future
        try:
            self._deliver(JoinAsked(call, connection.peer, connection.address, ask))
            return await future
        finally:
            self._waiting.pop(call, None)


async def _question(connection: Connection, ask: JoinAsk) -> JoinAnswer:
    stream = await connection.open_stream([JOIN_PROTOCOL])
    await stream.write(frame(encode(ask)))
    stream.close_write()
    raw = await read_frame(stream, limits.JOIN_BYTES_MAX)
    return decode_struct(JoinAnswer, raw, limits.JOIN_BYTES_MAX)


async def read_frame(stream: Stream, bytes_max: int) -> bytes:
    """One length-prefixed frame; WireError when it declares more than is taken, LinkError when the stream ends."""
    length = int.from_bytes(await stream.readexactly(4), "big")
    if not 0 < length <= bytes_max:
        raise WireError(f"frame of {length} bytes; 1 to {bytes_max} are taken")
    return await stream.readexactly(length)


def place_of(address: str) -> str:
    """What counts as one address in a rate limit: an IPv4 address, or the /64 network of an IPv6 one."""
    try:
        return ratelimit.place_of(multiaddr.parse(address).host)
    except DataError:
        return address
