"""/ipfs/id/1.0.0: who is there (https://github.com/libp2p/specs/blob/master/identify/README.md).

A clawnet node in a private mesh tells its key, its agent and its protocols, and no address.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from msgspec import Struct

from clawnet import limits
from clawnet.errors import DataError, LinkError, WireError
from clawnet.identity.keys import PUBLIC_BYTES, peer_id_of
from clawnet.identity.multiaddr import Multiaddr
from clawnet.net import protobuf
from clawnet.net.port import Connection, Stream, StreamHandler

PROTOCOL = "/ipfs/id/1.0.0"
PROTOCOL_VERSION = "ipfs/0.1.0"

_PUBLIC_KEY, _ADDRESSES, _PROTOCOLS, _VERSION, _AGENT = 1, 2, 3, 5, 6
_PROTOCOLS_MAX = 256
_TEXT_CHARS_MAX = 256
_KEY_TYPE_ED25519 = 1


class Identified(Struct, frozen=True):
    """What a peer says of itself. Only `peer` is proven (by the connection); the rest is its word."""

    peer: str
    agent: str
    version: str
    protocols: tuple[str, ...]
    addresses: tuple[str, ...]


def encode_key(public: bytes) -> bytes:
    """libp2p's PublicKey message of an Ed25519 key."""
    return protobuf.encode([(1, _KEY_TYPE_ED25519), (2, public)])


def decode_key(data: bytes) -> bytes:
    """The 32 bytes of the Ed25519 key in a PublicKey message; WireError for any other."""
    fields = protobuf.decode(data)
    public = protobuf.one_bytes(fields, 2)
    if fields.get(1) != [_KEY_TYPE_ED25519] or len(public) != PUBLIC_BYTES:
        raise WireError("the peer's key is not an Ed25519 key")
    return public


def encode(public: bytes, protocols: Sequence[str], agent: str) -> bytes:
    """The Identify message of a private node."""
    fields: list[tuple[int, int | bytes]] = [
        (_PUBLIC_KEY, encode_key(public)),
        *((_PROTOCOLS, protocol.encode()) for protocol in protocols),
        (_VERSION, PROTOCOL_VERSION.encode()),
        (_AGENT, agent.encode()),
    ]
    return protobuf.encode(fields)


def decode(data: bytes, peer: str) -> Identified:
    """The message of the peer proven to be `peer`; WireError when malformed or when it shows another's key."""
    fields = protobuf.decode(data)
    key = protobuf.one_bytes(fields, _PUBLIC_KEY)
    if key and peer_id_of(decode_key(key)) != peer:
        raise WireError("identify shows another key than the connection")
    return Identified(
        peer,
        _text(protobuf.one_bytes(fields, _AGENT)),
        _text(protobuf.one_bytes(fields, _VERSION)),
        tuple(_text(raw) for raw in protobuf.all_bytes(fields, _PROTOCOLS)[:_PROTOCOLS_MAX]),
        tuple(_addresses(protobuf.all_bytes(fields, _ADDRESSES))),
    )


def answerer(public: bytes, protocols: Sequence[str], agent: str) -> StreamHandler:
    """A handler of inbound identify streams: sends the message and ends."""
    body = encode(public, protocols, agent)
    message = protobuf.varint(len(body)) + body

    def answer(stream: Stream) -> None:
        stream.write_nowait(message)
        stream.close_write()
        stream.set_data_handler(lambda data: stream.reset() if data else None)

    return answer


async def ask(connection: Connection, timeout_s: float = limits.IDENTIFY_TIMEOUT_S) -> Identified:
    """Asks the other end who it is; raises LinkError, or WireError when the answer is malformed."""
    try:
        async with asyncio.timeout(timeout_s):
            stream = await connection.open_stream([PROTOCOL])
            try:
                stream.close_write()
                raw = await _delimited(stream)
            finally:
                stream.reset()
    except TimeoutError as error:
        raise LinkError(f"no answer to identify within {timeout_s:g} s", peer=connection.peer) from error
    return decode(raw, connection.peer)


async def _delimited(stream: Stream) -> bytes:
    """One message with its varint length before it, at most limits.IDENTIFY_BYTES_MAX."""
    head = b""
    size = -1
    while size < 0:
        head += await stream.readexactly(1)
        size, _ = protobuf.read_varint(head, 0)
    if size > limits.IDENTIFY_BYTES_MAX:
        raise WireError(f"an identify message of {size} bytes is too long")
    return await stream.readexactly(size)


def _text(raw: bytes) -> str:
    return raw[:_TEXT_CHARS_MAX].decode("utf-8", "replace")


def _addresses(raws: Sequence[bytes]) -> list[str]:
    """The addresses clawnet could dial; others are of no use here."""
    found: list[str] = []
    for raw in raws[: limits.DIAL_ADDRESSES_MAX]:
        try:
            found.append(str(Multiaddr.from_bytes(raw)))
        except DataError:
            continue
    return found
