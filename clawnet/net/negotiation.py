"""Agreeing on a new stream's protocol by multistream-select, the same way over every muxer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

from clawnet import limits
from clawnet.errors import LinkError, WireError
from clawnet.net import multistream
from clawnet.net.streams import BufferedStream, StreamDesk

S = TypeVar("S", bound=BufferedStream)


async def propose(stream: S, protocols: Sequence[str], timeout_s: float) -> S:
    """Agrees on a protocol for an outbound stream and puts it into `stream.protocol`; see Connection.open_stream.

    A stream without an agreement is reset before this raises.
    """
    peer = stream.connection.peer
    try:
        async with asyncio.timeout(timeout_s):
            await _propose(stream, protocols)
    except TimeoutError as error:
        raise LinkError(f"no answer to a new stream within {timeout_s:g} s", peer=peer) from error
    except WireError as error:
        raise LinkError(error.message, peer=peer) from error
    finally:
        if not stream.protocol:
            stream.reset()
    return stream


async def _propose(stream: BufferedStream, protocols: Sequence[str]) -> None:
    proposer = multistream.Proposer(protocols)
    stream.write_nowait(proposer.start())
    while not proposer.agreed:
        data = await stream.read()
        if not data:
            raise LinkError("the peer ended a new stream without an answer", peer=stream.connection.peer)
        answer = proposer.receive(data)
        if answer:
            stream.write_nowait(answer)
    stream.unshift(proposer.rest)
    stream.protocol = proposer.agreed


def accept(stream: S, desk: StreamDesk, on_agreed: Callable[[S], None]) -> None:
    """A new inbound stream: agrees on its protocol without a task, tells `on_agreed`, and hands it to the desk."""
    responder = multistream.Responder(desk.protocols)
    timer = asyncio.get_running_loop().call_later(limits.STREAM_NEGOTIATION_TIMEOUT_S, stream.reset)

    def negotiate(data: bytes) -> None:
        try:
            answer = responder.receive(data)
        except WireError:
            data = b""
        if not data:
            timer.cancel()
            stream.reset()
            return
        if answer:
            stream.write_nowait(answer)
        if responder.agreed:
            timer.cancel()
            stream.set_data_handler(None)
            stream.unshift(responder.rest)
            stream.protocol = responder.agreed
            on_agreed(stream)
            desk.deliver(stream)

    stream.set_data_handler(negotiate)
