"""Durations and sizes: what people write is read exactly, and nothing else is read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clawnet import units
from clawnet.errors import DataError


@pytest.mark.parametrize(
    ("text", "duration_ms"),
    [
        ("500ms", 500),
        ("30s", 30_000),
        ("5m", 300_000),
        ("2h", 7_200_000),
        ("7d", 604_800_000),
        ("1.5s", 1_500),
        ("0", 0),
    ],
)
def test_durations(text: str, duration_ms: int) -> None:
    assert units.parse_duration_ms(text) == duration_ms


@pytest.mark.parametrize(
    "text", ["", "5", "s", "-1s", "1e3s", "5 m", "1h30m", "\u0665s", "400d", "5S", "1.2345s", "inf"]
)
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(DataError):
        units.parse_duration_ms(text)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("0", 0), ("65536", 65_536), ("64KiB", 65_536), ("1.5GiB", 1_610_612_736), ("100MB", 10**8)],
)
def test_sizes(text: str, size_bytes: int) -> None:
    assert units.parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "-1", "1kib", "1 GB GB", "1e9", "2000000TiB", "GiB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(DataError):
        units.parse_size(text)


@given(st.integers(0, units.DURATION_MS_MAX))
def test_durations_round_trip(duration_ms: int) -> None:
    assert units.parse_duration_ms(units.format_duration(duration_ms)) == duration_ms


@given(st.integers(0, 2**59))
def test_sizes_round_trip(size_bytes: int) -> None:
    assert units.parse_size(units.format_size(size_bytes)) == size_bytes
