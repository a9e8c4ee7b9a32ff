"""Every kind of message, sound and without end, over TCP and QUIC: its author is told, held back and banned."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import find

from clawnet import limits
from clawnet.errors import LinkError
from clawnet.net.rates import CLASS_OF
from clawnet.wire.events import MessageIn, PeerDown
from clawnet.wire.messages import PAYLOADS, Kind
from tests.adapters.switch_world import SwitchNode
from tests.adapters.test_switch import Rogue, with_rogue
from tests.rules.wire_messages import MESSAGES

RATE = 5
CLASSES = ("SESSION", "ANSWERS", "MARKET", "LEDGER", "RELAY", "OUTPUT")


@pytest.fixture(autouse=True)
def small_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CLASSES:
        monkeypatch.setattr(limits, f"RATE_{name}_PER_S", RATE)
    monkeypatch.setattr(limits, "RATE_SPELL_S", 0.3)
    monkeypatch.setattr(limits, "RATE_DROP_S", 0.01)
    monkeypatch.setattr(limits, "RATE_PAUSE_MIN_S", 0.01)
    monkeypatch.setattr(limits, "RATE_PAUSE_MAX_S", 0.02)


@pytest.mark.parametrize("transport", ["tcp", "quic-v1"])
@pytest.mark.parametrize("kind", [kind for kind in PAYLOADS if kind != Kind.DISCONNECT], ids=lambda kind: kind.name)
def test_a_flood_of_any_kind_ends_in_a_ban_and_harms_nobody_else(transport: str, kind: Kind) -> None:
    message = find(MESSAGES[PAYLOADS[kind]], lambda _: True)

    async def body(rogue: Rogue, victim: SwitchNode) -> None:
        await rogue.welcome()
        peer = rogue.key.peer_id
        with pytest.raises(LinkError):
            while True:
                await rogue.say(*[message] * 20)
                await asyncio.sleep(0)
        name = CLASS_OF[kind]
        assert f"rate limit of {name} messages" in (await victim.find(PeerDown, peer=peer)).reason
        counters = victim.switch.counters
        assert counters["messages_over_rate"] == counters[f"messages_over_rate_{name}"] > 0
        assert counters["links_held_back"] > 0
        assert sum(1 for _ in victim.all(MessageIn, peer=peer)) <= 20 * RATE * limits.RATE_BURST_S
        told, *_ = victim.events("rate.exceeded")
        assert (told["peer"], told["of"], told["kind"]) == (peer, name, kind)
        (banned,) = victim.events("peer.banned")
        assert (banned["peer"], banned["seconds"]) == (peer, limits.BAN_MIN_S)

    with_rogue(body, transport)
