"""Every message survives the wire; bytes of any kind raise the wire's own error only, and allocate within bounds."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clawnet import limits
from clawnet.errors import InternalError, WireError
from clawnet.wire.batch import decode_batch
from clawnet.wire.codec import decode_payload, decode_struct, encode, encode_payload
from clawnet.wire.envelope import Envelope, decode_envelope, encode_envelope
from clawnet.wire.messages import KIND_OF, PAYLOADS, Bid, JoinAsk, Kind, Message, Ping, Words
from tests.rules.wire_messages import CONTROL, MESSAGES, STRUCTS

BOMBS = {
    "nothing": b"",
    "never-used byte": b"\xc1",
    "array of 4 billion": b"\xdd\xff\xff\xff\xff",
    "map of 4 billion": b"\xdf\xff\xff\xff\xff",
    "4 billion bytes": b"\xc6\xff\xff\xff\xff",
    "string of 4 billion": b"\xdb\xff\xff\xff\xff",
    "extension of 4 billion": b"\xc9\xff\xff\xff\xff\x01",
    "arrays nested 100,000 deep": b"\x91" * 100_000 + b"\x00",
    "maps nested 100,000 deep": b"\x81\x00" * 100_000 + b"\x00",
    "broken UTF-8": b"\x91\xa2\xff\xfe",
    "bad timestamp": b"\x91\xc7\x09\xff" + b"\xff" * 9,
    "huge list inside": b"\x9c" + b"\xdd\xff\xff\xff\xff" * 12,
}


@pytest.mark.parametrize("cls", STRUCTS, ids=lambda cls: cls.__name__)
def test_every_message_survives_the_wire(cls: type[Message]) -> None:
    @given(MESSAGES[cls])
    def round_trip(message: Message) -> None:
        if cls in KIND_OF:
            kind, raw = encode_payload(message)
            assert kind is KIND_OF[cls]
            assert decode_payload(kind, raw) == message
        else:
            assert decode_struct(cls, encode(message)) == message

    round_trip()


@given(CONTROL, st.binary(min_size=16, max_size=16), st.none() | st.binary(min_size=16, max_size=16))
def test_an_envelope_keeps_all_it_was_given(message: Message, name: bytes, other: bytes | None) -> None:
    kind, payload = encode_payload(message)
    envelope = decode_envelope(encode_envelope(kind, name, other, None, payload))
    assert (envelope.kind, envelope.id, envelope.reply_to, envelope.obligation) == (kind, name, other, None)
    assert envelope.message() == message


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("cls", STRUCTS, ids=lambda cls: cls.__name__)
def test_bombs_are_wire_errors(cls: type[Message], name: str) -> None:
    with pytest.raises(WireError):
        decode_struct(cls, BOMBS[name])


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_cost_no_memory_worth_naming(name: str) -> None:
    wrapped = b"\x96\x01\x00\xc4\x10" + bytes(16) + b"\xc0\xc0" + BOMBS[name]
    readers: list[Callable[[bytes], object]] = [
        _whole_envelope,
        decode_batch,
        *(lambda raw, kind=kind: decode_payload(kind, raw) for kind in PAYLOADS),
    ]
    tracemalloc.start()
    try:
        for raw in (BOMBS[name], wrapped):
            for read in readers:
                with pytest.raises(WireError):
                    read(raw)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * limits.MIB + 8 * len(wrapped)


def _whole_envelope(raw: bytes) -> Message:
    return decode_envelope(raw).message()


@given(st.integers(0, 70_000), st.binary(max_size=300))
def test_any_bytes_as_a_payload_are_a_message_or_a_wire_error(kind: int, raw: bytes) -> None:
    _message_or_wire_error(kind, raw)


@given(CONTROL, st.data())
def test_a_damaged_message_is_another_message_or_a_wire_error(message: Message, data: st.DataObject) -> None:
    kind, raw = encode_payload(message)
    at = data.draw(st.integers(0, len(raw) - 1))
    _message_or_wire_error(kind, raw[:at] + data.draw(st.binary(max_size=6)) + raw[at + data.draw(st.integers(0, 6)) :])


def _message_or_wire_error(kind: int, raw: bytes) -> None:
    try:
        message = decode_payload(kind, raw)
    except WireError:
        return
    assert decode_payload(kind, encode(message)) == message


def test_types_are_strict() -> None:
    fields: list[Any] = [1, 2]
    assert decode_payload(Kind.PING, msgspec.msgpack.encode(fields)) == Ping(1, 2)
    for wrong in (["1", 2], [1.0, 2], [True, 2], [None, 2], [-1, 2], [2**63, 2], [1], [1, 2, 3], {"nonce": 1}):
        with pytest.raises(WireError):
            decode_payload(Kind.PING, msgspec.msgpack.encode(wrong))
    with pytest.raises(WireError):
        decode_payload(Kind.PING, msgspec.msgpack.encode(fields) + b"\x00")


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -0.1, 1.1])
def test_numbers_that_are_none_are_refused(number: float) -> None:
    bid = Bid(bytes(16), 0, 1, 1.0, 1.0, number, bytes(32), 0.5, 1.0, bytes(16), -1, bytes(32))
    with pytest.raises(WireError):
        decode_payload(Kind.MARKET_BID, encode(bid))


def test_an_unknown_kind_is_named() -> None:
    with pytest.raises(WireError, match="kind 10 "):
        decode_payload(10, b"\x90")


def test_a_struct_that_is_no_control_message_is_our_own_mistake() -> None:
    ask = JoinAsk(bytes(32), bytes(16), bytes(32), bytes(32), "n", 0, bytes(64), bytes(64))
    with pytest.raises(InternalError):
        encode_payload(ask)


def test_size_is_checked_before_parsing() -> None:
    with pytest.raises(WireError, match="at most 10"):
        decode_struct(JoinAsk, bytes(11), 10)
    with pytest.raises(WireError, match="at most"):
        decode_envelope(bytes(limits.ENVELOPE_BYTES_MAX + 1))
    with pytest.raises(WireError, match="at most"):
        decode_batch(bytes(limits.BATCH_BYTES_MAX + 1))


def test_a_message_over_the_limit_is_refused_before_it_leaves() -> None:
    with pytest.raises(InternalError):
        encode_envelope(Kind.LEDGER_PUSH, bytes(16), None, None, encode(bytes(limits.ENVELOPE_BYTES_MAX)))


def test_another_envelope_version_is_refused() -> None:
    raw = encode(Envelope(9, 0, bytes(16), None, None, msgspec.Raw(encode(Ping(1, 2)))))
    with pytest.raises(WireError, match="version 9"):
        decode_envelope(raw)


def test_lists_are_bounded_before_they_are_built() -> None:
    decoder = msgspec.msgpack.Decoder(Words)
    with pytest.raises(msgspec.ValidationError):
        decoder.decode(msgspec.msgpack.encode(["w"] * (limits.LIST_ITEMS_MAX + 1)))
