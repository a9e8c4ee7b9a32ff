"""Durations and sizes as people write them: 500ms, 30s, 7d; 64KiB, 1GiB, 100MB."""

from __future__ import annotations

import re

from clawnet.errors import DataError

DURATION_MS_MAX = 366 * 86_400_000
SIZE_BYTES_MAX = 2**60

_DURATION = re.compile(r"(\d{1,11})(?:\.(\d{1,3}))?(ms|s|m|h|d)\Z", re.ASCII)
_SIZE = re.compile(r"(\d{1,18})(?:\.(\d{1,3}))?\s?(B|[KMGT]i?B)?\Z", re.ASCII)
_UNIT_MS = {"ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_UNIT_BYTES = {
    "B": 1,
    "KB": 1_000,
    "MB": 1_000**2,
    "GB": 1_000**3,
    "TB": 1_000**4,
    "KiB": 1_024,
    "MiB": 1_024**2,
    "GiB": 1_024**3,
    "TiB": 1_024**4,
}


def parse_duration_ms(text: str, *, what: str = "duration") -> int:
    """Whole milliseconds of a duration such as 500ms, 30s, 5m, 2h, 7d or 1.5h; a bare 0 needs no unit.

    Raises DataError for anything else and for more than a year.
    """
    text = text.strip()
    if text == "0":
        return 0
    match = _DURATION.match(text)
    if match is None:
        raise DataError(
            f"{what} {text!r} is not a duration", hint="write a number and a unit: 500ms, 30s, 5m, 2h or 7d"
        )
    thousandths = int(match[1]) * 1_000 + int((match[2] or "").ljust(3, "0"))
    duration_ms = -(-thousandths * _UNIT_MS[match[3]] // 1_000)
    if duration_ms > DURATION_MS_MAX:
        raise DataError(f"{what} {text!r} is longer than a year")
    return duration_ms


def format_duration(duration_ms: int) -> str:
    """The shortest duration with one unit and no fraction; `parse_duration_ms` reads it back."""
    if duration_ms == 0:
        return "0s"
    unit = next(unit for unit in ("d", "h", "m", "s", "ms") if duration_ms % _UNIT_MS[unit] == 0)
    return f"{duration_ms // _UNIT_MS[unit]}{unit}"


def parse_size(text: str, *, what: str = "size") -> int:
    """Bytes of a size such as 65536, 64KiB, 1.5GiB or 100MB.

    Raises DataError for anything else.
    """
    text = text.strip()
    match = _SIZE.match(text)
    if match is None:
        raise DataError(
            f"{what} {text!r} is not a size", hint="write bytes, or a number and a unit: 64KiB, 512MiB, 1GiB"
        )
    thousandths = int(match[1]) * 1_000 + int((match[2] or "").ljust(3, "0"))
    size_bytes = thousandths * _UNIT_BYTES[match[3] or "B"] // 1_000
    if size_bytes > SIZE_BYTES_MAX:
        raise DataError(f"{what} {text!r} is above the limit of {format_size(SIZE_BYTES_MAX)}")
    return size_bytes


def format_size(size_bytes: int) -> str:
    """The shortest size with one unit and no fraction; `parse_size` reads it back."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if size_bytes and size_bytes % _UNIT_BYTES[unit] == 0:
            return f"{size_bytes // _UNIT_BYTES[unit]}{unit}"
    return f"{size_bytes}B"
