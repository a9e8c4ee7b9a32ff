"""The noise handshake proves both identities or fails, the muxer is agreed in either way, frames keep their order."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from clawnet import limits
from clawnet.errors import LinkError, WireError
from clawnet.identity.keys import KeyPair
from clawnet.net import multistream, noise, upgrade, yamux
from clawnet.net.identify import encode_key
from clawnet.net.noise import Channel, Handshake, Payload
from clawnet.net.upgrade import Upgrade

ALICE = KeyPair.from_seed(b"a" * 32)
BOB = KeyPair.from_seed(b"b" * 32)
CAROL = KeyPair.from_seed(b"c" * 32)


def shake(dialler: Handshake, acceptor: Handshake) -> None:
    assert dialler.receive(acceptor.receive(dialler.start())) is not None


def pair(expected: str | None = None, muxers: tuple[str, ...] = ("/yamux/1.0.0",)) -> tuple[Handshake, Handshake]:
    return (
        Handshake(ALICE, initiator=True, expected=expected, muxers=muxers),
        Handshake(BOB, initiator=False, expected=None, muxers=("/yamux/1.0.0",)),
    )


def channels() -> tuple[Channel, Channel]:
    dialler, acceptor = pair()
    second = acceptor.receive(dialler.start())
    acceptor.receive(dialler.receive(second))
    return dialler.channel(), acceptor.channel()


@pytest.mark.parametrize(("muxers", "agreed"), [(("/yamux/1.0.0",), "/yamux/1.0.0"), ((), ""), (("/mplex",), "")])
def test_both_sides_learn_who_is_there_and_which_muxer(muxers: tuple[str, ...], agreed: str) -> None:
    dialler, acceptor = pair(BOB.peer_id, muxers)
    second = acceptor.receive(dialler.start())
    assert acceptor.receive(dialler.receive(second)) == b""
    assert (dialler.peer, acceptor.peer) == (BOB.peer_id, ALICE.peer_id)
    assert dialler.done and acceptor.done
    assert (dialler.muxer, acceptor.muxer) == (agreed, agreed)


def test_a_wrong_peer_is_refused_before_the_dialler_shows_itself() -> None:
    dialler, acceptor = pair(CAROL.peer_id)
    second = acceptor.receive(dialler.start())
    with pytest.raises(LinkError, match=BOB.peer_id):
        dialler.receive(second)
    assert not dialler.done and not acceptor.done


def test_a_stolen_identity_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # Bob shows Carol's key; he can sign for himself only.
    forged = Payload(CAROL.public, BOB.sign(b"noise-libp2p-static-key:" + bytes(32)), ()).encode()
    dialler, acceptor = pair()
    monkeypatch.setattr(acceptor, "_payload", lambda: forged)
    second = acceptor.receive(dialler.start())
    with pytest.raises(WireError, match="not signed"):
        dialler.receive(second)


@pytest.mark.parametrize("place", [0, 31, 40, 80, 100, -1])
def test_a_changed_handshake_message_is_refused(place: int) -> None:
    dialler, acceptor = pair()
    second = bytearray(acceptor.receive(dialler.start()))
    second[place] ^= 1
    with pytest.raises(WireError):
        dialler.receive(bytes(second))


@pytest.mark.parametrize("message", [b"", bytes(31), bytes(32), b"\xff" * 32])
def test_a_first_message_that_is_no_key_is_refused_or_leads_nowhere(message: bytes) -> None:
    acceptor = Handshake(BOB, initiator=False, expected=None, muxers=())
    try:
        acceptor.receive(message)
    except WireError:
        return
    with pytest.raises(WireError):
        acceptor.receive(bytes(200))


def test_payloads_come_back_and_other_keys_are_refused() -> None:
    payload = Payload.decode(Payload(ALICE.public, b"s" * 64, ["/yamux/1.0.0", "/mplex"]).encode())
    assert (payload.public, payload.signature) == (ALICE.public, b"s" * 64)
    assert payload.muxers == ("/yamux/1.0.0", "/mplex")
    secp256k1 = b"\x0a\x25" + b"\x08\x02\x12\x21" + bytes(33)
    for raw in (b"", secp256k1, bytes(limits.NOISE_PAYLOAD_BYTES_MAX + 1), b"\x08\x01", encode_key(ALICE.public)):
        with pytest.raises(WireError):
            Payload.decode(raw)


@pytest.mark.parametrize("size", [0, 1, 65_519, 65_520, 300_000])
def test_frames_carry_any_size(size: int) -> None:
    near, far = channels()
    plain = bytes(range(256)) * (size // 256) + bytes(size % 256)
    wire = near.seal(plain)
    got = b""
    while wire:
        end = 2 + int.from_bytes(wire[:2], "big")
        got += far.open(wire[2:end])
        wire = wire[end:]
    assert got == plain
    assert far.open(near.seal(b"next")[2:]) == b"next"


def test_a_cipher_that_cannot_encrypt_into_a_buffer_sends_the_same() -> None:
    cipher = ChaCha20Poly1305(b"k" * 32)
    older = SimpleNamespace(encrypt=cipher.encrypt, decrypt=cipher.decrypt)
    now, then = Channel(cipher, cipher), Channel(older, older)  # type: ignore[arg-type]
    for plain in (b"few", os.urandom(200_000)):
        assert now.seal(plain) == then.seal(plain)


def test_frames_out_of_order_repeated_cut_or_changed_are_refused() -> None:
    near, far = channels()
    first, second = (near.seal(text)[2:] for text in (b"first", b"second"))
    for frame in (second, first[:-1], first[:10], b"", bytes([first[0] ^ 1]) + first[1:]):
        with pytest.raises(WireError):
            far.open(frame)
    assert far.open(first) == b"first"
    with pytest.raises(WireError):
        far.open(first)


def upgrades(piece: int, dialler: Upgrade, acceptor: Upgrade) -> None:
    to_acceptor, to_dialler = dialler.start(), acceptor.start()
    while to_acceptor or to_dialler:
        sent, to_acceptor = to_acceptor[:piece], to_acceptor[piece:]
        if sent:
            to_dialler += acceptor.receive(sent)
        sent, to_dialler = to_dialler[:piece], to_dialler[piece:]
        if sent:
            to_acceptor += dialler.receive(sent)


@pytest.mark.parametrize("piece", [1, 13, 10_000])
@pytest.mark.parametrize("early", [True, False])
def test_the_upgrade_works_in_any_pieces_with_and_without_early_muxers(
    piece: int, early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    dialler = Upgrade(ALICE, initiator=True, expected=BOB.peer_id)
    if not early:
        monkeypatch.setattr(upgrade, "MUXERS", ())
    acceptor = Upgrade(BOB, initiator=False, expected=None)
    upgrades(piece, dialler, acceptor)
    assert dialler.done and acceptor.done
    assert (dialler.peer, acceptor.peer) == (BOB.peer_id, ALICE.peer_id)
    assert dialler.channel is not None and acceptor.channel is not None
    sealed = dialler.channel.seal(b"hello")
    assert acceptor.channel.open(sealed[2:]) == b"hello"


def test_bytes_right_behind_the_upgrade_belong_to_the_muxer(monkeypatch: pytest.MonkeyPatch) -> None:
    dialler = Upgrade(ALICE, initiator=True, expected=None)
    acceptor = Upgrade(BOB, initiator=False, expected=None)
    last = dialler.receive(acceptor.receive(dialler.start()))
    assert dialler.done and dialler.channel is not None
    acceptor.receive(last + dialler.channel.seal(b"at once"))
    assert acceptor.done and acceptor.channel is not None
    assert acceptor.channel.open(bytes(acceptor.raw[2:])) == b"at once"

    # The same when the muxer is agreed in band: the rest is decrypted already.
    monkeypatch.setattr(upgrade, "MUXERS", ())
    acceptor = Upgrade(BOB, initiator=False, expected=None)
    dialler = Upgrade(ALICE, initiator=True, expected=None)
    acceptor.receive(dialler.receive(acceptor.receive(dialler.start()))[:-1])
    assert dialler.channel is not None and not dialler.done
    proposal = multistream.Proposer([yamux.PROTOCOL]).start()
    other = Upgrade(BOB, initiator=False, expected=None)
    fresh = Upgrade(ALICE, initiator=True, expected=None)
    third = fresh.receive(other.receive(fresh.start()))
    assert fresh.channel is not None and len(third) > len(proposal)
    other.receive(third + fresh.channel.seal(b"frames"))
    assert other.done and other.channel is not None
    assert other.channel.open(bytes(other.raw[2:])) == b"frames"


def test_a_handshake_message_as_long_as_a_frame_is_refused_by_its_length() -> None:
    acceptor = Upgrade(BOB, initiator=False, expected=None)
    hello = multistream.Proposer([noise.PROTOCOL]).start()
    with pytest.raises(WireError, match="too long"):
        acceptor.receive(hello + b"\xff\xff")
