"""The join stream: one question, one answer, from people who are no members yet."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from clawnet import limits
from clawnet.errors import LinkError
from clawnet.identity.multiaddr import parse
from clawnet.net.joining import JOIN_PROTOCOL, place_of, read_frame
from clawnet.wire.batch import frame
from clawnet.wire.codec import decode_struct, encode
from clawnet.wire.events import JoinAnswered, JoinAsked, PeerUp
from clawnet.wire.messages import JoinAnswer, JoinAsk
from tests.adapters.switch_world import KEYS, SwitchWorld, switch_world

ASK = JoinAsk(bytes(32), b"s" * 16, bytes(32), bytes(32), "laptop", 1, bytes(64), bytes(64))
ANSWER = JoinAnswer("", "member", b"charter", [b"certificate"], bytes(32), "inviter")


def run(body: Callable[[SwitchWorld], Awaitable[None]], kind: str = "fake") -> None:
    async def main() -> None:
        async with switch_world(kind) as world:
            await body(world)

    asyncio.run(main())


@pytest.mark.parametrize("kind", ["fake", "tcp"])
@pytest.mark.parametrize("answer", [ANSWER, JoinAnswer("this invite was used already")])
def test_question_and_answer(kind: str, answer: JoinAnswer) -> None:
    async def body(world: SwitchWorld) -> None:
        joiner, inviter = await world.node(0), await world.node(1)
        inviter.refuse[joiner.peer] = "no member"
        joiner.switch.join(5, inviter.peer, inviter.addresses, ASK)
        asked = await inviter.find(JoinAsked)
        assert (asked.peer, asked.ask) == (joiner.peer, ASK)
        inviter.switch.join_reply(asked.call, answer)
        answered = await joiner.find(JoinAnswered)
        assert (answered.call, answered.answer, answered.error, answered.inviter) == (5, answer, "", inviter.peer)
        inviter.switch.join_reply(asked.call, answer)
        assert not list(inviter.all(PeerUp))

    run(body, kind)


def test_an_inviter_that_cannot_be_reached_is_an_error() -> None:
    async def body(world: SwitchWorld) -> None:
        joiner, inviter = await world.node(0), await world.node(1)
        joiner.switch.join(1, inviter.peer, ["/ip4/127.0.0.1/tcp/9"], ASK)
        assert "/tcp/9" in (await joiner.find(JoinAnswered, call=1)).error
        world.network.cut(joiner.peer, inviter.peer)
        joiner.switch.join(2, inviter.peer, inviter.addresses, ASK)
        assert (await joiner.find(JoinAnswered, call=2)).answer is None

    run(body)


def test_an_inviter_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "JOIN_TIMEOUT_S", 1.0)

    async def body(world: SwitchWorld) -> None:
        joiner, inviter = await world.node(0), await world.node(1)
        joiner.switch.join(1, inviter.peer, inviter.addresses, ASK)
        await inviter.find(JoinAsked)
        assert (await joiner.find(JoinAnswered)).error
        # Each side has a clock of its own.
        while inviter.switch._joins._waiting:
            await asyncio.sleep(0)

    run(body)


def test_one_address_asks_ten_times_a_minute() -> None:
    async def body(world: SwitchWorld) -> None:
        joiner, inviter = await world.node(0), await world.node(1)
        for call in range(1, 14):
            joiner.switch.join(call, inviter.peer, inviter.addresses, ASK)
        await inviter.until(lambda: len(list(inviter.all(JoinAsked))) == 10)
        for asked in list(inviter.all(JoinAsked)):
            inviter.switch.join_reply(asked.call, ANSWER)
        await joiner.until(lambda: len(list(joiner.all(JoinAnswered))) == 13)
        refused = [one for one in joiner.all(JoinAnswered) if one.answer.refusal]
        assert len(refused) == 3
        assert "too many join requests" in refused[0].answer.refusal
        assert len(inviter.events("join.rate_limited")) == 3

    run(body)


@pytest.mark.parametrize(
    "sent",
    [b"", b"\x00\x00\x00\x00", b"\xff\xff\xff\xff", frame(b"\xc1"), frame(encode(ASK) + b"x"), frame(encode(ASK))[:-1]],
    ids=["nothing", "empty", "oversized", "no msgpack", "trailing", "cut short"],
)
def test_a_malformed_question_reaches_nobody(sent: bytes) -> None:
    async def body(world: SwitchWorld) -> None:
        inviter = await world.node(1)
        stranger = world.transport(KEYS[7])
        connection = await stranger.dial(parse(inviter.addresses[0]), inviter.peer)
        stream = await connection.open_stream([JOIN_PROTOCOL])
        await stream.write(sent)
        stream.close_write()
        with pytest.raises(LinkError):
            await read_frame(stream, limits.JOIN_BYTES_MAX)
        await stream.closed
        assert len(inviter.events("join.dropped")) == 1
        assert not list(inviter.all(JoinAsked))
        connection.close("the test is over")

    run(body)


def test_a_second_question_on_one_stream_is_not_read() -> None:
    async def body(world: SwitchWorld) -> None:
        inviter = await world.node(1)
        connection = await world.transport(KEYS[7]).dial(parse(inviter.addresses[0]), inviter.peer)
        stream = await connection.open_stream([JOIN_PROTOCOL])
        await stream.write(frame(encode(ASK)) * 2)
        asked = await inviter.find(JoinAsked)
        inviter.switch.join_reply(asked.call, ANSWER)
        assert decode_struct(JoinAnswer, await read_frame(stream, limits.JOIN_BYTES_MAX)) == ANSWER
        stream.close_write()
        await stream.closed
        assert len(list(inviter.all(JoinAsked))) == 1
        connection.close("the test is over")

    run(body)


def test_addresses_count_as_one_by_host_and_by_ipv6_network() -> None:
    assert place_of("/ip4/192.0.2.1/tcp/1") == place_of("/ip4/192.0.2.1/tcp/2") != place_of("/ip4/192.0.2.2/tcp/1")
    assert place_of("/ip6/2001:db8::1/tcp/1") == place_of("/ip6/2001:db8::ffff/tcp/1")
    assert place_of("/ip6/2001:db8:0:1::1/tcp/1") != place_of("/ip6/2001:db8:0:2::1/tcp/1")
    assert place_of("odd") == "odd"
