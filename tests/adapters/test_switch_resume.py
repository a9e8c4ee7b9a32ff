"""Blob streams that are cut, stall, drip or lie on the way: what was verified stays, the rest comes later or never."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from clawnet import limits
from clawnet.errors import LinkError
from clawnet.net.blobs import BLOB_PROTOCOL, NO_OFFSET, NOT_FOUND, BlobAnswer, BlobRequest
from clawnet.net.joining import read_frame
from clawnet.wire.batch import frame
from clawnet.wire.blobid import BlobHasher
from clawnet.wire.codec import decode_struct, encode
from clawnet.wire.events import CONTENT, LINK, BlobReady
from tests.adapters.switch_world import SwitchNode, switch_world

KINDS = ("fake", "tcp", "quic-v1")
TASK = b"t" * 16
CHUNK = limits.BLOB_CHUNK_BYTES
CHUNKS = 11
DATA = b"".join(bytes([n + 1]) * CHUNK for n in range(CHUNKS)) + b"the end"
HASHER = BlobHasher()
HASHER.update(DATA)
BLOB = HASHER.digest()
LEAVES = b"".join(HASHER.leaves)
SOURCE = "somebody"

Body = Callable[[SwitchNode, SwitchNode], Awaitable[None]]


def run(kind: str, body: Body) -> None:
    async def main() -> None:
        async with switch_world(kind) as world:
            await body(*await world.pair())

    asyncio.run(main())


def offer(holder: SwitchNode, asker: SwitchNode) -> None:
    holder.blobs.granted.add((asker.peer, TASK, holder.blobs.put(DATA)))


async def fetched(asker: SwitchNode, holder: SwitchNode, size: int = len(DATA), source: str = "") -> BlobReady:
    request = b"request" + bytes([len(asker.told)])
    asker.switch.fetch(request, holder.peer, TASK, ((BLOB, size),), source=source)
    ready: BlobReady = await asker.find(BlobReady, request=request)
    assert asker.blobs.open_parts == 0
    return ready


def instead(holder: SwitchNode, serve: Callable[[Any], Awaitable[None]]) -> Callable[[], None]:
    """The holder serves so until what this returns is called."""
    desk: Any = holder.switch._blobs
    desk.serve, before = serve, desk.serve

    def again() -> None:
        desk.serve = before

    return again


def cut_after(count: int, wrong: int = -1) -> Callable[[Any], Awaitable[None]]:
    """A holder that gives the first bytes and resets the stream; with `wrong` one byte there is another."""

    async def serve(stream: Any) -> None:
        request = decode_struct(BlobRequest, await read_frame(stream, limits.KIB), limits.KIB)
        data = bytearray(DATA[request.offset : count])
        if wrong >= 0:
            data[wrong - request.offset] ^= 1
        try:
            await stream.write(frame(encode(BlobAnswer("", len(DATA), LEAVES))) + bytes(data))
            stream.close_write()
        except LinkError:
            assert wrong >= 0

    return serve


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("came", [0, 1, CHUNK - 1, CHUNK, 6 * CHUNK + 5, len(DATA) - 1])
def test_a_cut_fetch_goes_on_where_it_was(kind: str, came: int) -> None:
    async def body(asker: SwitchNode, holder: SwitchNode) -> None:
        again = instead(holder, cut_after(came))
        first = await fetched(asker, holder)
        assert (first.fault, first.received) == (LINK, came // CHUNK * CHUNK)
        again()
        offer(holder, asker)
        second = await fetched(asker, holder)
        assert (second.reason, second.received) == ("", len(DATA) - first.received)
        assert holder.switch.counters["blob_bytes_sent"] == second.received
        assert asker.switch.counters["blob_bytes_received"] == len(DATA)
        assert asker.blobs.kept[BLOB] == DATA

    run(kind, body)


@pytest.mark.parametrize("number", [0, 3, CHUNKS])
def test_a_wrong_chunk_convicts_its_sender_and_costs_nothing_that_was_good(number: int) -> None:
    async def body(asker: SwitchNode, holder: SwitchNode) -> None:
        again = instead(holder, cut_after(len(DATA), wrong=number * CHUNK))
        first = await fetched(asker, holder)
        assert (first.fault, first.received) == (CONTENT, number * CHUNK)
        assert f"chunk {number} " in first.reason
        assert [(level, event) for level, event, _ in asker.log if event == "blob.refused"] == [
            ("security", "blob.refused")
        ]
        assert BLOB not in asker.blobs.kept
        again()
        offer(holder, asker)
        assert (await fetched(asker, holder)).received == len(DATA) - number * CHUNK
        assert asker.blobs.kept[BLOB] == DATA

    run("fake", body)


@pytest.mark.parametrize("size", [len(DATA) - 1, len(DATA) + 1, 16 * limits.GIB])
def test_a_size_that_is_a_lie_convicts_before_the_first_byte(size: int) -> None:
    async def body(asker: SwitchNode, holder: SwitchNode) -> None:
        offer(holder, asker)
        ready = await fetched(asker, holder, size)
        assert (ready.fault, ready.received) == (CONTENT, 0)
        assert asker.blobs.parts == {}

    run("fake", body)


def test_one_blob_of_two_sizes_is_not_even_asked_for() -> None:
    async def body(asker: SwitchNode, holder: SwitchNode) -> None:
        offer(holder, asker)
        asker.switch.fetch(b"1", holder.peer, TASK, ((BLOB, len(DATA)), (BLOB, 5)))
        assert (await asker.find(BlobReady, request=b"1")).fault == CONTENT
        assert holder.switch.counters["blob_bytes_sent"] == 0

    run("fake", body)


@pytest.mark.parametrize("says", ["nothing", "half"])
def test_a_stalled_holder_is_given_up_while_its_connection_lives(says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BLOB_STALL_S", 0.05)

    async def body(asker: SwitchNode, holder: SwitchNode) -> None:
        async def stall(stream: Any) -> None:
            await read_frame(stream, limits.KIB)
            if says == "half":
                await stream.write(frame(encode(BlobAnswer("", len(DATA), LEAVES))) + DATA[: 2 * CHUNK + 7])
            await stream.closed

        again = instead(holder, stall)
        ready = await fetched(asker, holder)
        assert (ready.fault, ready.received) == (LINK, 2 * CHUNK if says == "half" else 0)
        again()
        offer(holder, asker)
        assert (await fetched(asker, holder)).reason == ""

    run("fake", body)


def test_a_dripping_holder_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BLOB_CHUNK_S", 0.1)

    async def body(asker: SwitchNode, holder: SwitchNode) -> None:
        async def drip(stream: Any) -> None:
            await read_frame(stream, limits.KIB)
            await stream.write(frame(encode(BlobAnswer("", len(DATA), LEAVES))))
            for byte in DATA:
                try:
                    await stream.write(bytes([byte]))
                except LinkError:
                    return
                await asyncio.sleep(0)

        instead(holder, drip)
        ready = await fetched(asker, holder)
        assert (ready.fault, ready.received) == (LINK, 0)
        assert "stalled" in ready.reason

    run("fake", body)


@pytest.mark.parametrize("kind", KINDS)
def test_an_asker_gets_the_chunks_from_its_offset_on_and_no_others(kind: str) -> None:
    async def body(asker: SwitchNode, holder: SwitchNode) -> None:
        offer(holder, asker)
        connection = asker.switch._links[holder.peer].connection
        stream = await connection.open_stream([BLOB_PROTOCOL])

        async def ask(offset: int, blob: bytes = BLOB, task: bytes = TASK) -> BlobAnswer:
            await stream.write(frame(encode(BlobRequest(task, blob, offset))))
            return decode_struct(BlobAnswer, await read_frame(stream, limits.BLOB_FRAME_BYTES_MAX))

        for offset in (len(DATA) + 1, (CHUNKS + 1) * CHUNK, 1, CHUNK + 1, 2**63 - 1):
            assert await ask(offset) == BlobAnswer(NO_OFFSET, 0, b"")
        for blob, task in ((bytes(32), TASK), (BLOB, b"u" * 16)):
            assert await ask(3 * CHUNK, blob, task) == BlobAnswer(NOT_FOUND, 0, b"")
            assert await ask(1, blob, task) == BlobAnswer(NOT_FOUND, 0, b"")
        for offset in (0, CHUNKS * CHUNK, 4 * CHUNK):
            assert await ask(offset) == BlobAnswer("", len(DATA), LEAVES)
            assert await stream.readexactly(len(DATA) - offset) == DATA[offset:]
        stream.close_write()
        await stream.closed

    run(kind, body)


def test_two_fetches_of_one_blob_share_one_transfer() -> None:
    async def body(asker: SwitchNode, holder: SwitchNode) -> None:
        offer(holder, asker)
        for request in (b"1", b"2", b"3"):
            asker.switch.fetch(request, holder.peer, TASK, ((BLOB, len(DATA)),), source=SOURCE)
        received = [(await asker.find(BlobReady, request=request)).received for request in (b"1", b"2", b"3")]
        assert received == [len(DATA), 0, 0]
        assert holder.switch.counters["blob_bytes_sent"] == len(DATA)

    run("tcp", body)


def test_of_two_fetches_that_share_a_transfer_the_second_goes_on_when_the_first_fails() -> None:
    async def body(asker: SwitchNode, holder: SwitchNode) -> None:
        offer(holder, asker)
        asked = 0
        desk: Any = holder.switch._blobs
        honest = desk.serve

        async def first_cut(stream: Any) -> None:
            nonlocal asked
            asked += 1
            await (cut_after(3 * CHUNK) if asked == 1 else honest)(stream)

        instead(holder, first_cut)
        for request in (b"1", b"2"):
            asker.switch.fetch(request, holder.peer, TASK, ((BLOB, len(DATA)),))
        one, two = [await asker.find(BlobReady, request=request) for request in (b"1", b"2")]
        assert (one.fault, two.fault) == (LINK, "")
        assert one.received + two.received == len(DATA)
        assert asker.blobs.kept[BLOB] == DATA

    run("fake", body)


def test_who_names_anothers_blob_must_show_that_it_has_it() -> None:
    async def body(asker: SwitchNode, holder: SwitchNode) -> None:
        asker.blobs.put(DATA)
        ready = await fetched(asker, holder, source=holder.peer)
        assert NOT_FOUND in ready.reason
        offer(holder, asker)
        assert (await fetched(asker, holder, source=holder.peer)).reason == ""
        sent = holder.switch.counters["blob_bytes_sent"]
        assert sent == len(DATA)
        assert (await fetched(asker, holder, source=holder.peer)).reason == ""
        assert (await fetched(asker, holder)).reason == ""
        assert holder.switch.counters["blob_bytes_sent"] == sent

    run("fake", body)
