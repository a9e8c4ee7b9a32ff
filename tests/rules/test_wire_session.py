"""Two sessions and a wire between them: what is sealed here opens there, once, in order, and nothing else does."""

from __future__ import annotations

from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clawnet import limits
from clawnet.errors import LinkError, MessageTooOld, Replayed, SignatureRefused, WireError
from clawnet.identity.keys import KeyPair, public_of, verify
from clawnet.wire.batch import Batch, Frames, decode_batch, frame, verify_evidence
from clawnet.wire.codec import encode
from clawnet.wire.envelope import decode_envelope
from clawnet.wire.messages import Disconnect, Error, Hello, Message, Ping, Result
from clawnet.wire.session import HELLO_TAG, PROTOCOL_VERSION, Handshake, HelloFacts, Session, SignedHello
from tests.rules.wire_messages import CONTROL

NOW_MS = 1_800_000_000_000
ALICE, BOB, EVE = (KeyPair.from_seed(sha256(name).digest()) for name in (b"alice", b"bob", b"eve"))
FACTS = HelloFacts(bytes(32), "laptop", [b"certificate"])


def handshake(
    own: KeyPair, remote: KeyPair, now_ms: int = NOW_MS, nonce: bytes = b"", facts: HelloFacts = FACTS
) -> Handshake:
    return Handshake(
        own.peer_id,
        remote.peer_id,
        facts,
        agent="clawnet/test",
        nonce=nonce or sha256(own.public + b"nonce").digest(),
        now_ms=now_ms,
        sign=own.sign,
        verify=lambda message, signature: verify(remote.public, message, signature),
    )


def body(sealed: bytes) -> bytes:
    (one,) = Frames(limits.BATCH_BYTES_MAX).feed(sealed)
    return one


def bodies(sealed: bytes) -> list[bytes]:
    return list(Frames(limits.BATCH_BYTES_MAX).feed(sealed))


def pair() -> tuple[Session, Session]:
    here, there = handshake(ALICE, BOB), handshake(BOB, ALICE)
    there.receive(body(here.frame), NOW_MS)
    here.receive(body(there.frame), NOW_MS)
    assert here.session is not None
    assert there.session is not None
    return here.session, there.session


def signed_hello(author: KeyPair, **changes: object) -> bytes:
    fields = {
        "version": list(PROTOCOL_VERSION),
        "agent": "clawnet/test",
        "peer": BOB.peer_id,
        "remote": ALICE.peer_id,
        "mesh": bytes(32),
        "nonce": bytes(32),
        "time_ms": NOW_MS,
        "name": "vps",
        "certificates": [],
        "rotations": [],
    } | changes
    hello = encode(Hello(**fields))
    return encode(SignedHello(hello, author.sign(HELLO_TAG + hello)))


def messages(batch: Batch) -> list[Message]:
    return [decode_envelope(raw).message() for raw in batch.envelopes]


def test_both_sides_derive_one_session_and_see_the_facts() -> None:
    here, there = handshake(ALICE, BOB), handshake(BOB, ALICE)
    hello = there.receive(body(here.frame), NOW_MS)
    here.receive(body(there.frame), NOW_MS)
    assert (hello.name, hello.mesh, hello.certificates) == (FACTS.name, FACTS.mesh, FACTS.certificates)
    assert here.session is not None
    assert there.session is not None
    assert here.session.id == there.session.id
    again = handshake(BOB, ALICE, nonce=bytes(32))
    handshake(ALICE, BOB).receive(body(again.frame), NOW_MS)
    again.receive(body(here.frame), NOW_MS)
    assert again.session is not None
    assert again.session.id != here.session.id


@given(st.lists(CONTROL, min_size=1, max_size=5))
def test_what_is_sealed_opens_at_the_other_end(sent: list[Message]) -> None:
    alice, bob = pair()
    batch = bob.open(body(alice.seal([(message, None, None) for message in sent], NOW_MS)), NOW_MS)
    assert messages(batch) == sent


def test_ids_are_unique_over_both_directions_and_answers_are_kept() -> None:
    alice, bob = pair()
    first = bob.open(body(alice.seal([(Ping(1, 1), None, b"o" * 16)] * 40, NOW_MS)), NOW_MS)
    second = alice.open(body(bob.seal([(Ping(1, 1), b"r" * 16, None)] * 40, NOW_MS)), NOW_MS)
    there = [decode_envelope(raw) for raw in first.envelopes]
    here = [decode_envelope(raw) for raw in second.envelopes]
    assert len({envelope.id for envelope in (*there, *here)}) == 80
    assert {envelope.obligation for envelope in there} == {b"o" * 16}
    assert {envelope.reply_to for envelope in here} == {b"r" * 16}


def test_what_does_not_fit_goes_in_the_next_batch() -> None:
    alice, bob = pair()
    many = [Ping(n, 0) for n in range(limits.BATCH_ENVELOPES_MAX * 2 + 3)]
    batches = [bob.open(raw, NOW_MS) for raw in bodies(alice.seal([(one, None, None) for one in many], NOW_MS))]
    assert [len(batch.envelopes) for batch in batches] == [64, 64, 3]
    assert [message for batch in batches for message in messages(batch)] == many
    big = [Error(100, "x" * 4_000, bytes(32))] * limits.BATCH_ENVELOPES_MAX
    big_result = Result(bytes(16), 0, b"", b"", bytes(500_000), bytes(32), 0, 0, 0.0, 0.0, 0)
    items = [(message, None, None) for message in (big_result, big_result, *big, big_result)]
    sealed = bodies(alice.seal(items, NOW_MS))
    assert all(len(raw) <= limits.BATCH_BYTES_MAX for raw in sealed)
    assert len(sealed) >= 2
    got = [message for raw in sealed for message in messages(bob.open(raw, NOW_MS))]
    assert got == [big_result, big_result, *big, big_result]


def test_nothing_to_say_is_no_frame() -> None:
    alice, _ = pair()
    assert alice.seal([], NOW_MS) == b""


def test_a_batch_is_valid_once_and_in_order() -> None:
    alice, bob = pair()
    first, second = (body(alice.seal([(Ping(n, 0), None, None)], NOW_MS)) for n in range(2))
    bob.open(second, NOW_MS)
    for replayed in (second, first):
        with pytest.raises(Replayed, match="out of sequence"):
            bob.open(replayed, NOW_MS)
    assert bob.refused.sequence == 2


def test_a_batch_of_another_session_or_sent_back_to_its_author_is_refused() -> None:
    alice, bob = pair()
    sealed = body(alice.seal([(Ping(1, 0), None, None)], NOW_MS))
    later = handshake(BOB, ALICE, nonce=bytes(32))
    later.receive(body(handshake(ALICE, BOB).frame), NOW_MS)
    assert later.session is not None
    with pytest.raises(Replayed):
        later.session.open(sealed, NOW_MS)
    with pytest.raises(SignatureRefused):
        alice.open(sealed, NOW_MS)
    assert bob.open(sealed, NOW_MS).seq == 1


@given(st.data())
def test_a_batch_with_any_byte_changed_is_refused_and_leaves_no_trace(data: st.DataObject) -> None:
    alice, bob = pair()
    sealed = bytearray(body(alice.seal([(Disconnect("bye"), None, None), (Ping(1, 2), None, None)], NOW_MS)))
    at = data.draw(st.integers(0, len(sealed) - 1))
    sealed[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises((SignatureRefused, Replayed, WireError)):
        bob.open(bytes(sealed), NOW_MS)
    refused = bob.refused
    assert refused.format + refused.signature + refused.sequence == 1
    assert messages(bob.open(body(alice.seal([(Ping(3, 4), None, None)], NOW_MS)), NOW_MS)) == [Ping(3, 4)]


@pytest.mark.parametrize("off_ms", [-limits.MESSAGE_AGE_MS - 1, limits.MESSAGE_AGE_MS + 1])
def test_batches_and_hellos_far_off_the_clock_are_refused(off_ms: int) -> None:
    alice, bob = pair()
    with pytest.raises(MessageTooOld):
        bob.open(body(alice.seal([(Ping(1, 0), None, None)], NOW_MS + off_ms)), NOW_MS)
    assert bob.refused.age == 1
    with pytest.raises(MessageTooOld, match=r"300 s (ahead|behind)"):
        handshake(BOB, ALICE).receive(body(handshake(ALICE, BOB, NOW_MS + off_ms).frame), NOW_MS)


def test_a_hello_by_somebody_else_or_for_somebody_else_is_refused() -> None:
    for frame_body in (
        signed_hello(EVE),
        signed_hello(BOB, peer=EVE.peer_id),
        signed_hello(BOB, remote=EVE.peer_id),
    ):
        mine = handshake(ALICE, BOB)
        with pytest.raises(SignatureRefused):
            mine.receive(frame_body, NOW_MS)
        assert mine.session is None


@pytest.mark.parametrize(("version", "hint"), [([2, 0], "this node"), ([1, 7], "this node"), ([0, 9], "the other")])
def test_another_version_is_refused_with_a_reason_that_can_be_told(version: list[int], hint: str) -> None:
    mine = handshake(ALICE, BOB)
    with pytest.raises(LinkError, match=f"update {hint}"):
        mine.receive(signed_hello(BOB, version=version), NOW_MS)
    assert mine.session is not None
    assert mine.session.seal([(Disconnect("version"), None, None)], NOW_MS)


def test_the_next_minor_version_is_served_by_the_newer_side() -> None:
    mine = handshake(ALICE, BOB)
    assert mine.receive(signed_hello(BOB, version=[PROTOCOL_VERSION[0], PROTOCOL_VERSION[1] + 1]), NOW_MS).name == "vps"


@given(st.binary(max_size=200))
def test_any_bytes_as_a_hello_are_refused(raw: bytes) -> None:
    with pytest.raises((WireError, SignatureRefused)):
        handshake(ALICE, BOB).receive(raw, NOW_MS)


@given(st.binary(max_size=200))
def test_any_signed_bytes_as_a_hello_are_refused(raw: bytes) -> None:
    with pytest.raises(WireError):
        handshake(ALICE, BOB).receive(encode(SignedHello(raw, BOB.sign(HELLO_TAG + raw))), NOW_MS)


def test_evidence_shows_one_envelope_and_convinces_a_third_party() -> None:
    alice, bob = pair()
    said = [Disconnect("secret one"), Ping(7, 8), Disconnect("secret two")]
    batch = bob.open(body(alice.seal([(message, None, None) for message in said], NOW_MS)), NOW_MS)
    shown = bob.evidence(batch, 1)
    assert b"secret" not in shown
    proof, envelope = verify_evidence(shown, _verify_by_name)
    assert (proof.author, proof.time_ms, envelope.message()) == (ALICE.peer_id, NOW_MS, Ping(7, 8))


@given(st.data())
def test_evidence_with_any_byte_changed_proves_nothing(data: st.DataObject) -> None:
    alice, bob = pair()
    batch = bob.open(body(alice.seal([(Ping(1, 2), None, None), (Ping(3, 4), None, None)], NOW_MS)), NOW_MS)
    shown = bytearray(bob.evidence(batch, 0))
    at = data.draw(st.integers(0, len(shown) - 1))
    shown[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises((SignatureRefused, WireError)):
        verify_evidence(bytes(shown), _verify_by_name)


def _verify_by_name(peer: str, message: bytes, signature: bytes) -> bool:
    return peer in {key.peer_id for key in (ALICE, BOB, EVE)} and verify(public_of(peer), message, signature)


@given(st.lists(st.binary(min_size=1, max_size=60), max_size=12), st.lists(st.integers(1, 40)))
def test_frames_come_out_whole_however_the_stream_is_cut(sent: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(frame(one) for one in sent)
    frames, got = Frames(60), []
    for cut in (*cuts, len(stream)):
        got += frames.feed(stream[:cut])
        stream = stream[cut:]
    assert got == sent


@pytest.mark.parametrize("declared", [0, 61, 2**32 - 1])
def test_a_frame_length_over_the_limit_is_refused_before_its_bytes_come(declared: int) -> None:
    frames = Frames(60)
    head = declared.to_bytes(4, "big")
    assert list(frames.feed(head[:3])) == []
    with pytest.raises(WireError):
        list(frames.feed(head[3:]))
    with pytest.raises(WireError):
        list(Frames(60).feed(frame(b"good") + head + b"rest"))


def test_a_batch_of_nothing_or_of_too_much_is_malformed() -> None:
    for envelopes in ([], [b"x"] * (limits.BATCH_ENVELOPES_MAX + 1)):
        with pytest.raises(WireError):
            decode_batch(encode(Batch(bytes(32), 1, NOW_MS, envelopes, bytes(64))))
