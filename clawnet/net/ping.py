"""/ipfs/ping/1.0.0: 32 random bytes come back (https://github.com/libp2p/specs/blob/master/ping/ping.md)."""

from __future__ import annotations

import asyncio
import os

from clawnet import limits
from clawnet.errors import LinkError
from clawnet.net.port import Connection, Stream

PROTOCOL = "/ipfs/ping/1.0.0"
PAYLOAD_BYTES = 32


class Pinger:
    """Pings one connection, over one stream that is kept for the next time."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._stream: Stream | None = None
        self._turn = asyncio.Lock()

    async def ping(self, timeout_s: float = limits.PING_TIMEOUT_S) -> float:
        """One round trip in seconds; LinkError when the answer is wrong, late, or the connection ends.

        The first ping of a connection also opens the stream; that is not counted.
        """
        async with self._turn:
            try:
                async with asyncio.timeout(timeout_s):
                    return await self._round_trip()
            except TimeoutError as error:
                self.close()
                raise LinkError(f"no answer to a ping within {timeout_s:g} s", peer=self._connection.peer) from error
            except (LinkError, asyncio.CancelledError):
                self.close()
                raise

    def close(self) -> None:
        """Gives the stream back; the next ping opens another."""
        if self._stream is not None:
            self._stream.reset()
            self._stream = None

    async def _round_trip(self) -> float:
        if self._stream is not None:
            try:
                return await self._exchange(self._stream)
            except LinkError:
                # The peer gives ping streams up after a while (js-libp2p after ten seconds): one fresh try.
                self.close()
        self._stream = await self._connection.open_stream([PROTOCOL])
        return await self._exchange(self._stream)

    async def _exchange(self, stream: Stream) -> float:
        loop = asyncio.get_running_loop()
        payload = os.urandom(PAYLOAD_BYTES)
        sent_at = loop.time()
        stream.write_nowait(payload)
        if await stream.readexactly(PAYLOAD_BYTES) != payload:
            raise LinkError("a ping came back changed", peer=self._connection.peer)
        return loop.time() - sent_at


async def measure(connection: Connection, count: int) -> tuple[int, list[float]]:
    """How many pings went out, and the seconds of each that came back; the first without an answer is the last.

    Raises LinkError when none was answered.
    """
    pinger = Pinger(connection)
    seconds: list[float] = []
    try:
        while len(seconds) < count:
            seconds.append(await pinger.ping())
    except LinkError:
        if not seconds:
            raise
        return len(seconds) + 1, seconds
    finally:
        pinger.close()
    return count, seconds


class Answerer:
    """Answers one peer's pings on at most two streams; beyond limits.PING_PER_S it answers later, never more."""

    def __init__(self) -> None:
        self._streams: dict[Stream, asyncio.TimerHandle | None] = {}
        self._tokens = float(limits.PING_BURST)
        self._counted_at = 0.0

    def serve(self, stream: Stream) -> None:
        """Takes an inbound ping stream."""
        if len(self._streams) >= limits.PING_STREAMS_PER_CONNECTION_MAX:
            stream.reset()
            return
        self._streams[stream] = None
        stream.set_data_handler(lambda data: self._on_data(stream, data))

    def close(self) -> None:
        """Stops all timers; the streams end with their connection."""
        for timer in self._streams.values():
            if timer is not None:
                timer.cancel()
        self._streams.clear()

    def _on_data(self, stream: Stream, data: bytes) -> None:
        if not data:
            self._forget(stream)
            stream.close_write()
            return
        if stream.buffered > limits.STREAM_CHUNK_BYTES:
            self._forget(stream)
            stream.reset()
            return
        stream.write_nowait(data)
        wait_s = self._spend(len(data) / PAYLOAD_BYTES)
        if wait_s > 0:
            stream.pause_reading()
            loop = asyncio.get_running_loop()
            self._streams[stream] = loop.call_later(wait_s, stream.resume_reading)

    def _spend(self, pings: float) -> float:
        """Takes from the bucket and says how long to wait until it is no longer empty."""
        now_s = asyncio.get_running_loop().time()
        gained = (now_s - self._counted_at) * limits.PING_PER_S
        self._tokens = min(float(limits.PING_BURST), self._tokens + gained) - pings
        self._counted_at = now_s
        return max(0.0, -self._tokens / limits.PING_PER_S)

    def _forget(self, stream: Stream) -> None:
        timer = self._streams.pop(stream, None)
        if timer is not None:
            timer.cancel()
