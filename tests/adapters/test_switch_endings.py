"""What ends while something is under way: no link, stream, connection or question outlives its end."""

from __future__ import annotations

import asyncio
import os
from types import SimpleNamespace
from typing import Any

import pytest

from clawnet import limits
from clawnet.identity.multiaddr import Multiaddr
from clawnet.net import multistream, ping
from clawnet.net.bulk import BulkRoutes
from clawnet.net.joining import JOIN_PROTOCOL
from clawnet.net.link import Link as TcpLink
from clawnet.net.quic_link import QuicLink
from clawnet.wire.batch import frame
from clawnet.wire.codec import encode
from clawnet.wire.events import DialEnded, JoinAnswered, JoinAsked, PeerDown, PeerUp
from clawnet.wire.messages import JoinAnswer
from tests.adapters.switch_world import KEYS, switch_world
from tests.adapters.test_switch_join import ASK


def streams_of(connection: Any) -> list[Any]:
    """The streams that a connection holds."""
    held = connection._streams if isinstance(connection, QuicLink) else connection._session.streams
    return list(held.values())


@pytest.mark.parametrize("kind", ["tcp", "quic-v1"])
def test_a_link_whose_peer_waits_for_pings_ends_all_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PING_BURST", 1)
    monkeypatch.setattr(limits, "PING_PER_S", 0.001)

    async def main() -> None:
        async with switch_world(kind) as world:
            one, other = await world.pair()
            near = one.switch.connection(other.peer)
            asking = await other.switch.connection(one.peer).open_stream([ping.PROTOCOL])
            asking.write_nowait(os.urandom(2 * ping.PAYLOAD_BYTES))
            while not any(stream.protocol == ping.PROTOCOL and stream._paused for stream in streams_of(near)):
                await asyncio.sleep(0)
            asking.write_nowait(os.urandom(ping.PAYLOAD_BYTES))
            while not any(stream.protocol == ping.PROTOCOL and stream.unread for stream in streams_of(near)):
                await asyncio.sleep(0)
            one.switch.hangup(other.peer, "you may go")
            assert (await one.find(PeerDown)).reason == "you may go"
            assert "you may go" in (await other.find(PeerDown)).reason
            await one.until(lambda: one.switch.gauges()["connections"] == 0)
            assert await one.dial(other, 2) == ""

    asyncio.run(main())


def test_a_quic_stream_that_takes_no_answer_to_its_proposal_is_reset() -> None:
    """Half a proposal, STOP_SENDING, the other half: the answer has nowhere to go, and that is all."""

    async def main() -> None:
        async with switch_world("quic-v1") as world:
            one, other = await world.pair()
            near, far = one.switch.connection(other.peer), other.switch.connection(one.peer)
            assert isinstance(near, QuicLink) and isinstance(far, QuicLink)
            core: Any = far._core
            number = core.get_next_available_stream_id()
            whole = multistream._HEADER_LINE + multistream.line(ping.PROTOCOL)
            core.send_stream_data(number, whole[:5])
            far._flush()
            while number not in near._streams:
                await asyncio.sleep(0)
            core.stop_stream(number, 0)
            far._flush()
            while not near._streams[number].write_ended:
                await asyncio.sleep(0)
            core.send_stream_data(number, whole[5:])
            far._flush()
            while number in near._streams:
                await asyncio.sleep(0)
            assert not near.closed.done()

    asyncio.run(asyncio.wait_for(main(), 30))


def test_a_node_under_a_new_key_is_found_where_its_address_names_the_old_one() -> None:
    async def main() -> None:
        async with switch_world("tcp") as world:
            one, new = await world.node(0), await world.node(2)
            old = KEYS[1].peer_id
            at_old = [address.replace(new.peer, old) for address in new.addresses]
            one.switch.dial(1, old, at_old)
            assert new.peer in (await one.find(DialEnded, call=1)).reason, "it does not follow that one"
            one.followed[old] = new.peer
            one.switch.dial(2, old, at_old)
            assert (await one.find(DialEnded, call=2)).reason == ""
            await one.find(PeerUp, peer=new.peer)

    asyncio.run(main())


def test_an_answered_join_stream_that_its_asker_keeps_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "JOIN_TIMEOUT_S", 0.1)

    async def main() -> None:
        async with switch_world("tcp") as world:
            asker, inviter = await world.pair()
            far = inviter.switch.connection(asker.peer)
            assert isinstance(far, TcpLink)
            stream = await asker.switch.connection(inviter.peer).open_stream([JOIN_PROTOCOL])
            stream.write_nowait(frame(encode(ASK)))
            inviter.switch.join_reply((await inviter.find(JoinAsked)).call, JoinAnswer("no"))
            assert await stream.closed, "it is reset"
            assert [one.protocol for one in streams_of(far) if one.protocol == JOIN_PROTOCOL] == []

    asyncio.run(asyncio.wait_for(main(), 30))


def test_a_join_under_way_is_answered_when_the_node_stops() -> None:
    async def main() -> None:
        async with switch_world("tcp") as world:
            joiner, inviter = await world.node(0), await world.node(1)
            joiner.switch.join(5, inviter.peer, inviter.addresses, ASK)
            await inviter.find(JoinAsked)
            await joiner.switch.stop()
            assert "this node stops" in (await joiner.find(JoinAnswered, call=5)).error

    asyncio.run(main())


def test_a_connection_for_bulk_data_whose_link_is_gone_when_it_is_made_is_closed() -> None:
    def connection(transport: str) -> Any:
        closed = asyncio.get_running_loop().create_future()
        return SimpleNamespace(peer="p", transport=transport, closed=closed, close=closed.set_result)

    async def main() -> None:
        link, made = connection("quic-v1"), connection("tcp")

        async def dial(peer: str, addresses: Any) -> Any:
            link.close("gone")
            routes.link_down(peer)
            return made

        routes = BulkRoutes(dial, lambda _: [str(Multiaddr("127.0.0.1", 1))])
        async with routes.route(link, limits.BULK_BYTES_MIN) as taken:
            assert taken is link
        assert made.closed.result() == "its link is gone" and not routes._open

    asyncio.run(main())
