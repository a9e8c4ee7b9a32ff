"""Neighbours heard by mDNS: what records say and may not say, how long they hold, and what a flood of them does."""

from __future__ import annotations

from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clawnet import limits
from clawnet.identity.keys import KeyPair
from clawnet.net.addresses import is_dialable, own_network
from clawnet.net.dnsaddr import Announced, read_txt, write_txt
from clawnet.net.nearby import Nearby
from clawnet.wire.events import NeighbourGone, NeighbourSeen, Stimulus

PEERS = [KeyPair.from_seed(sha256(bytes([n])).digest()).peer_id for n in range(4)]
ME, ALICE, BOB, EVE = PEERS
TAG = bytes(range(limits.MDNS_TAG_BYTES))
NOISE = bytes(limits.MDNS_TAG_BYTES)


def at(peer: str, host: str = "192.0.2.7", port: int = 4002) -> str:
    return f"/ip4/{host}/tcp/{port}/p2p/{peer}"


class Ear:
    """A table, what it told, and a clock."""

    def __init__(self) -> None:
        self.told: list[Stimulus] = []
        self.now_s = 100.0
        self.nearby = Nearby(lambda: ME, self.told.append, lambda peer, tag: tag == TAG, self.now_s)

    def hear(self, name: str, *addresses: str, tag: bytes = TAG, ttl_s: float = 120.0) -> None:
        self.nearby.heard(name, write_txt(addresses, tag), ttl_s, self.now_s)

    def look(self, after_s: float = 0.0) -> list[str]:
        self.now_s += after_s
        return self.nearby.look(self.now_s)

    def news(self) -> list[Stimulus]:
        told, self.told[:] = list(self.told), []
        return told


# --- records


def test_a_record_says_what_was_written() -> None:
    addresses = (at(ALICE), f"/ip4/192.0.2.7/udp/4001/quic-v1/p2p/{ALICE}", f"/ip6/2001:db8::7/tcp/4002/p2p/{ALICE}")
    assert read_txt(write_txt(addresses, TAG)) == Announced(ALICE, addresses, TAG)
    assert read_txt(write_txt(addresses, b"")) == Announced(ALICE, addresses, b"")


def test_a_record_is_libp2ps() -> None:
    """One length-prefixed string an address, so that any libp2p node reads it."""
    text = at(ALICE).encode()
    strings = [b"dnsaddr=" + text]
    assert write_txt([at(ALICE)], b"") == b"".join(bytes((len(one),)) + one for one in strings)


def test_loopback_is_not_announced_and_a_record_fits_a_packet() -> None:
    local = [at(ALICE, "127.0.0.1"), f"/ip6/::1/tcp/1/p2p/{ALICE}", f"/ip6/fe80::1/tcp/1/p2p/{ALICE}"]
    assert write_txt(local, b"") == b""
    many = write_txt([at(ALICE, f"192.0.2.{n}") for n in range(1, 100)], TAG)
    assert 1_000 < len(many) <= limits.MDNS_TXT_BYTES_MAX
    said = read_txt(many)
    assert said is not None and len(said.addresses) <= limits.NEIGHBOUR_ADDRESSES_MAX


def strings(*texts: bytes) -> bytes:
    return b"".join(bytes((len(text),)) + text for text in texts)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\x00",
        b"\xff",
        strings(b"dnsaddr="),
        strings(b"dnsaddr=/ip4/192.0.2.7/tcp/4002"),
        strings(b"dnsaddr=" + at(ALICE, "127.0.0.1").encode()),
        strings(b"dnsaddr=" + at(ALICE, "224.0.0.251").encode()),
        strings(b"dnsaddr=" + at(ALICE, "0.0.0.0").encode()),
        strings(b"dnsaddr=" + at(ALICE, port=0).encode()),
        strings(b"dnsaddr=/dns4/example.org/tcp/1/p2p/" + ALICE.encode()),
        strings(b"dnsaddr=/ip4/192.0.2.7/tcp/1/p2p/12D3KooWnobody"),
        strings(b"dnsaddr=" + at(ALICE).encode(), b"dnsaddr=" + at(BOB).encode()),
        strings(b"DNSADDR=" + at(ALICE).encode()),
        strings(*[b"dnsaddr=" + at(ALICE).encode()] * 20),
        strings(b"dnsaddr=" + at(ALICE).encode())[:-1],
        strings(b"dnsaddr=/ip4/\xff\xfe/tcp/1/p2p/" + ALICE.encode()),
    ],
)
def test_what_names_no_one_peer_that_could_be_dialled_is_nothing(raw: bytes) -> None:
    assert read_txt(raw) is None


@pytest.mark.parametrize("tag", [b"clawnet=", b"clawnet=zz", b"clawnet=00", b"clawnet=\xff", b"clawnet=" + b"0" * 200])
def test_a_tag_that_is_none_leaves_a_libp2p_node(tag: bytes) -> None:
    assert read_txt(strings(tag, b"dnsaddr=" + at(ALICE).encode())) == Announced(ALICE, (at(ALICE),), b"")


def test_addresses_in_forms_that_are_not_dialled_are_left_out() -> None:
    raw = strings(b"dnsaddr=/ip4/192.0.2.7/tcp/9/ws/p2p/" + ALICE.encode(), b"dnsaddr=" + at(ALICE).encode(), b"other")
    assert read_txt(raw) == Announced(ALICE, (at(ALICE),), b"")


@given(st.binary(max_size=400) | st.lists(st.binary(max_size=60).map(lambda one: b"dnsaddr=" + one)).map(b"".join))
def test_garbage_is_harmless(raw: bytes) -> None:
    said = read_txt(raw)
    assert said is None or (said.addresses and all(text.endswith(said.peer) for text in said.addresses))


def test_the_own_network_names_no_loopback() -> None:
    network = own_network()
    assert all(is_dialable(host) for host in network.hosts)
    assert network.mark == own_network().mark


# --- the table


def test_a_neighbour_comes_moves_and_goes() -> None:
    ear = Ear()
    ear.hear("a", at(ALICE))
    assert ear.news() == [NeighbourSeen(ALICE, (at(ALICE),), TAG)]
    ear.hear("a", at(ALICE))
    assert ear.news() == [], "said again"
    ear.hear("a", at(ALICE, port=5000))
    assert ear.news() == [NeighbourSeen(ALICE, (at(ALICE, port=5000),), TAG)]
    ear.nearby.gone("a", write_txt([at(ALICE)], TAG), ear.now_s)
    assert ear.news() == [], "the record it replaced ran out"
    ear.nearby.gone("a", write_txt([at(ALICE, port=5000)], TAG), ear.now_s)
    assert ear.news() == [NeighbourGone(ALICE)] and len(ear.nearby) == 0


def test_a_record_is_asked_for_before_it_runs_out() -> None:
    ear = Ear()
    ear.hear("a", at(ALICE))
    assert ear.look(90) == []
    assert ear.look(7) == ["a"]
    ear.hear("a", at(ALICE))
    assert ear.look(90) == [] and ear.look(7) == ["a"], "an answer is a new lease"
    assert ear.look(22) == ["a"] and ear.news()[1:] == []
    assert ear.look(2) == [] and ear.news() == [NeighbourGone(ALICE)]


def test_one_in_doubt_answers_soon_or_is_gone() -> None:
    ear = Ear()
    ear.hear("a", at(ALICE))
    ear.hear("b", at(BOB))
    ear.news()
    assert ear.nearby.doubt(ALICE, ear.now_s) == ["a"]
    assert ear.look(limits.NEIGHBOUR_ASK_S) == ["a"]
    assert ear.look(limits.NEIGHBOUR_DOUBT_S) == [] and ear.news() == [NeighbourGone(ALICE)]
    assert ear.nearby.doubt(None, ear.now_s) == ["b"]
    ear.hear("b", at(BOB))
    assert ear.look(limits.NEIGHBOUR_DOUBT_S) == [] and ear.news() == []


def test_a_restart_adds_its_addresses_until_the_old_ones_run_out() -> None:
    ear = Ear()
    ear.hear("before", at(ALICE))
    ear.hear("after", at(ALICE, port=5000))
    assert ear.news()[-1] == NeighbourSeen(ALICE, (at(ALICE, port=5000), at(ALICE)), TAG)
    ear.nearby.gone("before", None, ear.now_s)
    assert ear.news() == [NeighbourSeen(ALICE, (at(ALICE, port=5000),), TAG)]


def test_who_has_no_tag_cannot_speak_for_who_has() -> None:
    ear = Ear()
    ear.hear("e", at(ALICE, "192.0.2.66"), tag=NOISE)
    ear.hear("a", at(ALICE))
    ear.hear("f", at(ALICE, "192.0.2.67"), tag=NOISE)
    assert ear.news()[-1] == NeighbourSeen(ALICE, (at(ALICE),), TAG)
    ear.nearby.gone("a", None, ear.now_s)
    assert ear.news()[-1].tag == NOISE  # type: ignore[attr-defined]


def test_oneself_is_no_neighbour() -> None:
    ear = Ear()
    ear.hear("me", at(ME))
    assert ear.news() == []


def stranger(number: int) -> str:
    return KeyPair.from_seed(sha256(b"stranger %d" % number).digest()).peer_id


def test_a_flood_of_strangers_is_bounded_and_makes_room_for_members() -> None:
    ear = Ear()
    for number in range(2 * limits.NEIGHBOURS_MAX):
        ear.hear(f"s{number}", at(stranger(number)), tag=NOISE)
    assert len(ear.news()) == 8 * limits.NEIGHBOUR_NEWS_PER_S, "the rest waits for the next look"
    ear.hear("a", at(ALICE))
    for _ in range(100):
        ear.look(limits.NETWORK_WATCH_S)
        ear.hear("a", at(ALICE))
    told = ear.news()
    assert NeighbourSeen(ALICE, (at(ALICE),), TAG) in told
    seen = {one.peer for one in told if isinstance(one, NeighbourSeen)}
    assert len(seen) <= limits.NEIGHBOURS_MAX
    assert len(told) <= 100 * limits.NETWORK_WATCH_S * limits.NEIGHBOUR_NEWS_PER_S


def test_one_peer_holds_few_places() -> None:
    ear = Ear()
    for number in range(100):
        ear.hear(f"n{number}", at(ALICE, port=1000 + number))
        ear.look(1)
    addresses = ear.news()[-1].addresses  # type: ignore[attr-defined]
    assert len(addresses) == limits.NEIGHBOUR_INSTANCES_MAX and addresses[0] == at(ALICE, port=1099)


def test_a_new_node_is_told_all_again() -> None:
    ear = Ear()
    ear.hear("a", at(ALICE))
    ear.hear("e", at(EVE), tag=NOISE)
    before = ear.news()
    ear.nearby.tell_again()
    assert sorted(ear.news(), key=str) == sorted(before, key=str)
