"""The little of protocol buffers that libp2p's handshakes need: varints, and flat messages of numbers and bytes."""

from __future__ import annotations

from collections.abc import Iterable

from clawnet.errors import WireError

FIELDS_MAX = 1_024
_VARINT_BYTES_MAX = 9
_WIDTHS = {1: 8, 5: 4}


def varint(value: int) -> bytes:
    """The unsigned LEB128 form of a number, as protobuf and multistream write it."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def read_varint(data: bytes | bytearray, at: int) -> tuple[int, int]:
    """The number at `at` and the place after it; (-1, at) when `data` ends inside it.

    Raises WireError for more than nine bytes (the unsigned-varint specification's bound).
    """
    value = 0
    for i in range(_VARINT_BYTES_MAX):
        if at + i >= len(data):
            return -1, at
        byte = data[at + i]
        value |= (byte & 0x7F) << (7 * i)
        if not byte & 0x80:
            return value, at + i + 1
    raise WireError("a varint is longer than nine bytes")


def encode(fields: Iterable[tuple[int, int | bytes]]) -> bytes:
    """A message of (field number, value) in the order given: int as varint, bytes as length-delimited."""
    out = bytearray()
    for number, value in fields:
        if isinstance(value, int):
            out += varint(number << 3) + varint(value)
        else:
            out += varint(number << 3 | 2) + varint(len(value)) + value
    return bytes(out)


def decode(data: bytes) -> dict[int, list[int | bytes]]:
    """Every value by field number, in order; fixed-width values come as bytes.

    Raises WireError when the bytes are no protobuf message or hold more than FIELDS_MAX values.
    """
    found: dict[int, list[int | bytes]] = {}
    at = count = 0
    while at < len(data):
        count += 1
        if count > FIELDS_MAX:
            raise WireError(f"a protobuf message holds more than {FIELDS_MAX} values")
        key, at = _whole_varint(data, at)
        number, kind = key >> 3, key & 7
        if number == 0:
            raise WireError("a protobuf field has the number 0")
        value: int | bytes
        if kind == 0:
            value, at = _whole_varint(data, at)
        else:
            if kind == 2:
                size, at = _whole_varint(data, at)
            elif kind in _WIDTHS:
                size = _WIDTHS[kind]
            else:
                raise WireError(f"a protobuf field has the unknown wire type {kind}")
            value = data[at : at + size]
            if len(value) != size:
                raise WireError("a protobuf message ends inside a field")
            at += size
        found.setdefault(number, []).append(value)
    return found


def one_bytes(fields: dict[int, list[int | bytes]], number: int) -> bytes:
    """The last value of a bytes field, b"" when absent; WireError when it is a number."""
    values = fields.get(number)
    if not values:
        return b""
    if not isinstance(values[-1], bytes):
        raise WireError(f"protobuf field {number} should be bytes")
    return values[-1]


def all_bytes(fields: dict[int, list[int | bytes]], number: int) -> list[bytes]:
    """All values of a repeated bytes field; WireError when one is a number."""
    values = fields.get(number, [])
    found = [value for value in values if isinstance(value, bytes)]
    if len(found) != len(values):
        raise WireError(f"protobuf field {number} should be bytes")
    return found


def _whole_varint(data: bytes, at: int) -> tuple[int, int]:
    value, after = read_varint(data, at)
    if value < 0:
        raise WireError("a protobuf message ends inside a number")
    return value, after
