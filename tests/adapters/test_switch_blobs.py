"""Blob streams: what a task's party gets whole, what nobody else gets, and what a lying holder gets told."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from clawnet import limits
from clawnet.errors import LinkError
from clawnet.net.blobs import BLOB_PROTOCOL, BlobAnswer, BlobRequest
from clawnet.net.fake import FakeNetwork
from clawnet.net.joining import read_frame
from clawnet.net.ratelimit import Arrivals
from clawnet.net.switch import PROTOCOLS
from clawnet.storage.blobs import BlobStore
from clawnet.wire.batch import frame
from clawnet.wire.blobid import BlobHasher, blob_id
from clawnet.wire.codec import decode_struct, encode
from clawnet.wire.events import BlobReady, PeerDown, PeerUp
from tests.adapters.switch_world import KEYS, SwitchNode, switch_world

KINDS = ("fake", "tcp", "quic-v1")
TASK = b"t" * 16
CHUNK = limits.BLOB_CHUNK_BYTES
REQUEST = b"request"


def run(kind: str, body: Callable[[SwitchNode, SwitchNode], Awaitable[None]]) -> None:
    async def main() -> None:
        async with switch_world(kind) as world:
            await body(*await world.pair())

    asyncio.run(main())


def grant(holder: SwitchNode, asker: SwitchNode, *contents: bytes) -> tuple[tuple[bytes, int], ...]:
    found = []
    for data in contents:
        blob = holder.blobs.put(data)
        holder.blobs.granted.add((asker.peer, TASK, blob))
        found.append((blob, len(data)))
    return tuple(found)


async def fetched(
    asker: SwitchNode, holder: SwitchNode, blobs: tuple[tuple[bytes, int], ...], inline_max: int = 0, task: bytes = TASK
) -> BlobReady:
    request = REQUEST + bytes([len(asker.told)])
    asker.switch.fetch(request, holder.peer, task, blobs, inline_max)
    ready: BlobReady = await asker.find(BlobReady, request=request)
    assert asker.blobs.open_parts == 0
    return ready


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [0, 1, CHUNK, 3 * CHUNK + 17])
def test_a_blob_arrives_whole(kind: str, size: int) -> None:
    async def body(asker: SwitchNode, holder: SwitchNode) -> None:
        data = (b"0123456789abcdef" * (size // 16 + 1))[:size]
        blobs = grant(holder, asker, data)
        assert (await fetched(asker, holder, blobs)).reason == ""
        assert asker.blobs.kept[blobs[0][0]] == data

    run(kind, body)


@pytest.mark.parametrize("kind", KINDS)
def test_many_blobs_travel_over_one_stream_and_known_ones_not_at_all(kind: str) -> None:
    async def body(asker: SwitchNode, holder: SwitchNode) -> None:
        blobs = grant(holder, asker, *(bytes([n]) * (n * 5_000) for n in range(limits.INPUTS_MAX)))
        asker.blobs.put(bytes([9]) * 45_000)
        opened = []
        connection = asker.switch._links[holder.peer].connection
        open_stream = connection.open_stream

        async def counting(protocols: list[str]) -> object:
            opened.append(protocols)
            return await open_stream(protocols)

        connection.open_stream = counting  # type: ignore[method-assign,assignment]
        assert (await fetched(asker, holder, (*blobs, blobs[3]))).reason == ""
        assert all(blob in asker.blobs.kept for blob, _ in blobs)
        sent = holder.switch.counters["blob_bytes_sent"]
        assert sent == sum(size for _, size in blobs) - 45_000
        assert (await fetched(asker, holder, blobs)).reason == ""
        assert holder.switch.counters["blob_bytes_sent"] == sent
        (one_more,) = grant(holder, asker, b"one more")
        assert (await fetched(asker, holder, (one_more,))).reason == ""
        assert opened == [[BLOB_PROTOCOL]]

    run(kind, body)


def test_a_small_one_comes_inline_and_is_not_stored() -> None:
    async def body(asker: SwitchNode, holder: SwitchNode) -> None:
        blobs = grant(holder, asker, b"small")
        ready = await fetched(asker, holder, blobs, inline_max=5)
        assert (ready.reason, ready.inline, asker.blobs.kept) == ("", b"small", {})
        assert (await fetched(asker, holder, blobs, inline_max=4)).inline == b""
        assert (await fetched(asker, holder, blobs, inline_max=5)).inline == b"small"

    run("fake", body)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_tasks_party_gets_it_and_nobody_learns_that_it_is_there(kind: str) -> None:
    async def body(asker: SwitchNode, holder: SwitchNode) -> None:
        blobs = grant(holder, asker, b"x" * 1_000)
        secret = holder.blobs.put(b"secret")
        wrong_task = await fetched(asker, holder, blobs, task=b"u" * 16)
        not_granted = await fetched(asker, holder, ((secret, 6),))
        not_there = await fetched(asker, holder, ((b"\x00" * 32, 6),))
        endings = {ready.reason.rpartition(": ")[2] for ready in (wrong_task, not_granted, not_there)}
        assert endings == {"not found"}
        assert asker.blobs.kept == {}
        assert (await fetched(asker, holder, blobs)).reason == ""

    run(kind, body)


def test_a_size_that_was_not_promised_is_refused_before_the_first_byte() -> None:
    async def body(asker: SwitchNode, holder: SwitchNode) -> None:
        ((blob, size),) = grant(holder, asker, b"x" * 100_000)
        assert "promised with 99999" in (await fetched(asker, holder, ((blob, size - 1),))).reason
        assert asker.switch.counters["blob_bytes_received"] == 0

    run("fake", body)


def test_nobody_to_ask_is_a_reason_and_own_blobs_need_nobody() -> None:
    async def body(asker: SwitchNode, holder: SwitchNode) -> None:
        asker.switch.fetch(b"1", "nobody", TASK, ((bytes(32), 5),))
        assert "not connected" in (await asker.find(BlobReady, request=b"1")).reason
        blob = asker.blobs.put(b"mine")
        asker.switch.fetch(b"2", asker.peer, TASK, ((blob, 4),))
        assert (await asker.find(BlobReady, request=b"2")).reason == ""

    run("fake", body)


def test_a_fetch_before_the_start_is_answered_too() -> None:
    async def main() -> None:
        node = SwitchNode(KEYS[0], {"tcp": FakeNetwork().transport(KEYS[0].peer_id, PROTOCOLS, "clawnet/test")})
        node.switch.fetch(b"1", KEYS[1].peer_id, TASK, ((bytes(32), 5),))
        assert "not connected" in (await node.find(BlobReady, request=b"1")).reason

    asyncio.run(main())


@pytest.mark.parametrize("lie", ["leaves", "chunk", "short", "leaf count", "garbage"])
def test_a_lying_holder_is_found_out(lie: str) -> None:
    data = b"a" * CHUNK + b"b" * 100
    hasher = BlobHasher()
    hasher.update(data)
    blob = hasher.digest()
    leaves = b"".join(hasher.leaves)

    async def body(asker: SwitchNode, holder: SwitchNode) -> None:
        async def liar(stream: object) -> None:
            await read_frame(stream, limits.KIB)  # type: ignore[arg-type]
            told = {"leaves": bytes(64), "leaf count": leaves[:32]}.get(lie, leaves)
            sent = {"chunk": data[:-1] + b"c", "short": data[:-1]}.get(lie, data)
            answer = b"\xff" * 100 if lie == "garbage" else frame(encode(BlobAnswer("", len(data), told)))
            try:
                await stream.write(answer + sent)  # type: ignore[attr-defined]
            except LinkError:
                assert lie in ("leaves", "leaf count", "garbage")
            stream.close_write()  # type: ignore[attr-defined]

        holder.switch._blobs.serve = liar  # type: ignore[method-assign,assignment]
        ready = await fetched(asker, holder, ((blob, len(data)),))
        assert ready.reason
        assert asker.blobs.kept == {}

    run("fake", body)


def test_a_lost_connection_ends_the_fetch_with_a_reason() -> None:
    async def main() -> None:
        async with switch_world() as world:
            asker, holder = await world.pair()
            blobs = grant(holder, asker, bytes(8 * CHUNK))
            world.network.hang(holder.peer)
            asker.switch.fetch(b"1", holder.peer, TASK, blobs)
            for _ in range(10):
                await asyncio.sleep(0)
            world.network.cut(asker.peer, holder.peer)
            assert (await asker.find(BlobReady, request=b"1")).reason
            assert asker.blobs.open_parts == 0

    asyncio.run(main())


@pytest.mark.parametrize("kind", KINDS)
def test_an_asker_that_does_not_read_holds_the_sender_back(kind: str) -> None:
    async def body(asker: SwitchNode, holder: SwitchNode) -> None:
        size = 24 * limits.MIB
        ((blob, _),) = grant(holder, asker, bytes(size))
        connection = asker.switch._links[holder.peer].connection
        stream = await connection.open_stream([BLOB_PROTOCOL])
        await stream.write(frame(encode(BlobRequest(TASK, blob, 0))))
        answer = decode_struct(BlobAnswer, await read_frame(stream, limits.BLOB_FRAME_BYTES_MAX))
        assert answer.size == size
        before = -1
        while before != (before := holder.switch.counters["blob_bytes_sent"]):
            for _ in range(500):
                await asyncio.sleep(0)
        assert before < size
        read = 0
        while read < size:
            read += len(await stream.readexactly(min(CHUNK, size - read)))
        stream.close_write()
        await stream.closed

    run(kind, body)


def test_a_stalled_asker_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BLOB_STALL_S", 0.05)

    async def body(asker: SwitchNode, holder: SwitchNode) -> None:
        ((blob, _),) = grant(holder, asker, bytes(8 * CHUNK))
        connection = asker.switch._links[holder.peer].connection
        stream = await connection.open_stream([BLOB_PROTOCOL])
        await stream.write(frame(encode(BlobRequest(TASK, blob, 0))))
        await stream.closed
        assert holder.switch._blobs._serving == {}

    run("fake", body)


def test_more_streams_than_allowed_are_reset_and_own_fetches_wait_their_turn() -> None:
    async def body(asker: SwitchNode, holder: SwitchNode) -> None:
        connection = asker.switch._links[holder.peer].connection
        held = [await connection.open_stream([BLOB_PROTOCOL]) for _ in range(limits.BLOB_STREAMS_PER_PEER_MAX)]
        extra = await connection.open_stream([BLOB_PROTOCOL])
        await extra.closed
        for stream in held:
            stream.close_write()
            await stream.closed
        many = [grant(holder, asker, bytes([n]) * 300_000) for n in range(3 * limits.BLOB_STREAMS_PER_PEER_MAX)]
        for n, blobs in enumerate(many):
            asker.switch.fetch(bytes([n]), holder.peer, TASK, blobs)
        for n in range(len(many)):
            assert (await asker.find(BlobReady, request=bytes([n]))).reason == ""
        assert holder.switch.counters["blob_streams_refused"] == 1

    run("fake", body)


@pytest.mark.parametrize(
    "garbage", [b"\x00\x00\x00\x00", b"\xff\xff\xff\xff", frame(b"\xc1" * 50), frame(bytes(2_000))]
)
def test_a_malformed_request_ends_the_stream_alone(garbage: bytes) -> None:
    async def body(asker: SwitchNode, holder: SwitchNode) -> None:
        connection = asker.switch._links[holder.peer].connection
        stream = await connection.open_stream([BLOB_PROTOCOL])
        await stream.write(garbage)
        await stream.closed
        blobs = grant(holder, asker, b"still served")
        assert (await fetched(asker, holder, blobs)).reason == ""

    run("fake", body)


def test_a_damaged_blob_is_not_passed_on() -> None:
    async def body(asker: SwitchNode, holder: SwitchNode) -> None:
        blobs = grant(holder, asker, b"healthy")
        holder.blobs.kept[blobs[0][0]] = b"damaged"
        assert (await fetched(asker, holder, blobs)).reason
        assert blob_id(b"damaged") not in asker.blobs.kept

    run("fake", body)


def test_the_real_store_serves_and_takes(tmp_path: Path) -> None:
    async def body(asker: SwitchNode, holder: SwitchNode) -> None:
        here, there = BlobStore(tmp_path / "here"), BlobStore(tmp_path / "there")
        asker.switch._fetcher._store, holder.switch._blobs._store = here, there
        data = bytes(range(256)) * 3_000
        blob = there.put_bytes(data)
        there.grant(TASK, asker.peer, blob)
        assert (await fetched(asker, holder, ((blob, len(data)),))).reason == ""
        assert here.path(blob).read_bytes() == data
        full = BlobStore(tmp_path / "full", bytes_max=1_000)
        asker.switch._fetcher._store = full
        assert "768000" in (await fetched(asker, holder, ((blob, len(data)),))).reason
        assert not [path for path in (tmp_path / "full").rglob("*") if path.is_file()]

    run("tcp", body)


def test_bulk_data_takes_tcp_beside_a_quic_link() -> None:
    async def body(asker: SwitchNode, holder: SwitchNode) -> None:
        quic = [address for address in holder.addresses if "quic-v1" in address]
        asker.switch.dial(1, holder.peer, quic)
        await asker.find(PeerUp, peer=holder.peer)
        await holder.find(PeerUp, peer=asker.peer)
        link = asker.switch.connection(holder.peer)
        assert link.transport == "quic-v1"
        small, big, bigger = b"s" * 100, b"b" * limits.BULK_BYTES_MIN, b"c" * limits.BULK_BYTES_MIN
        blobs = grant(holder, asker, small, big, bigger)
        asker.known[holder.peer] = holder.addresses

        def transports() -> list[str]:
            return sorted(visit.connection.transport for visit in holder.switch._visits)

        assert (await fetched(asker, holder, blobs[:1])).reason == ""
        assert transports() == ["quic-v1"]
        assert (await fetched(asker, holder, blobs[1:2])).reason == ""
        assert transports() == ["quic-v1", "tcp"]
        assert (await fetched(asker, holder, blobs[2:])).reason == ""
        assert transports() == ["quic-v1", "tcp"], "the second goes where the first went"
        asker.switch.hangup(holder.peer, "enough")
        await holder.find(PeerDown, peer=asker.peer)
        await holder.until(lambda: not transports())

    async def main() -> None:
        async with switch_world("both") as world:
            await body(await world.node(0), await world.node(1))

    asyncio.run(main())


def test_where_tcp_is_closed_bulk_data_takes_the_quic_link() -> None:
    async def body(asker: SwitchNode, holder: SwitchNode) -> None:
        asker.known[holder.peer] = ["/ip4/127.0.0.1/tcp/9"]
        blobs = grant(holder, asker, b"b" * limits.BULK_BYTES_MIN)
        assert (await fetched(asker, holder, blobs)).reason == ""

    run("quic-v1", body)


def test_bulk_data_dials_no_address_more_often_than_anybody_else() -> None:
    async def main() -> None:
        async with switch_world("both") as world:
            asker, holder = await world.node(0), await world.node(1)
            asker.switch.dial(1, holder.peer, [address for address in holder.addresses if "quic-v1" in address])
            await asker.find(PeerUp, peer=holder.peer)
            await holder.find(PeerUp, peer=asker.peer)
            asker.known[holder.peer] = ["/ip4/127.0.0.1/tcp/9"]
            visits = asker.switch._visits
            visits._dials = Arrivals(1)
            visits.may_dial("127.0.0.1", asyncio.get_running_loop().time())
            blobs = grant(holder, asker, b"b" * limits.BULK_BYTES_MIN)
            assert (await fetched(asker, holder, blobs)).reason == ""
            assert asker.switch.counters["dials_refused"] == 1

    asyncio.run(main())
