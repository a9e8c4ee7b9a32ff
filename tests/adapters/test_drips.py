"""Batches that come in piece by piece on a link that is up: late ones end it, slow ones do not."""

from __future__ import annotations

import contextlib

import pytest

from clawnet import limits
from clawnet.errors import LinkError
from clawnet.wire.events import MessageIn, PeerDown
from clawnet.wire.messages import Ack
from tests.adapters.switch_world import SwitchNode
from tests.adapters.test_switch import KINDS, Rogue, with_rogue


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_that_drips_in_for_ever_ends_its_link(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a frame on a link that is up, and a byte whenever the other side gives a sign of life."""
    monkeypatch.setattr(limits, "FRAME_TIMEOUT_S", 0.05)

    async def body(rogue: Rogue, victim: SwitchNode) -> None:
        await rogue.welcome()
        link = victim.switch._links[rogue.key.peer_id]
        victim.switch.ping_interval_s = 1.0
        link._timer.cancel()
        link._tick()
        with contextlib.suppress(LinkError):
            await rogue.stream.write((1_000).to_bytes(4, "big"))
            while await rogue.stream.read(4096):
                await rogue.stream.write(b"\x95")
        down = await victim.find(PeerDown, peer=rogue.key.peer_id)
        assert "not whole" in down.reason
        assert victim.switch.counters["links_dripping"] == 1
        assert victim.events("link.dripping")[0]["peer"] == rogue.key.peer_id

    with_rogue(body, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_what_arrives_late_for_a_busy_peer_is_no_drip(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole batches in pieces, one after the other, are never late, however long all of them take."""
    monkeypatch.setattr(limits, "FRAME_TIMEOUT_S", 0.5)

    async def body(rogue: Rogue, victim: SwitchNode) -> None:
        await rogue.welcome()
        assert rogue.session is not None
        link = victim.switch._links[rogue.key.peer_id]
        for number in range(5):
            sealed = rogue.session.seal([(Ack(bytes([number] * 16)), None, None)], victim.switch.clock())
            await rogue.stream.write(sealed[:40])
            await rogue.stream.write(sealed[40:])
            await victim.find(MessageIn, message=Ack(bytes([number] * 16)))
            link._tick()
            link._timer.cancel()
        assert victim.switch.counters["links_dripping"] == 0

    with_rogue(body, kind)
