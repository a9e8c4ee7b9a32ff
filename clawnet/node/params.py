"""Parameters of local calls: a value of the wrong kind is the caller's mistake, and is told as one."""

from __future__ import annotations

import math
from typing import Any

from clawnet.errors import DataError

Params = dict[str, Any]
HEX_DIGITS = frozenset("0123456789abcdef")
ID_DIGITS = 32


def integer(params: Params, name: str, default: int, low: int = 0, high: int = 2**62) -> int:
    """A whole number between `low` and `high`; `default` when it is not given. Raises DataError."""
    return int(number(params, name, default, low, high))


def number(params: Params, name: str, default: float, low: float, high: float) -> float:
    """A number between `low` and `high`; `default` when it is not given. Raises DataError."""
    value = params.get(name)
    if value is None or value == "":
        return default
    if isinstance(value, str):
        try:
            value = int(value)
        except ValueError:
            raise _bad(name, value, low, high) from None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _bad(name, value, low, high)
    if not low <= value <= high:
        raise _bad(name, value, low, high)
    return value


def _bad(name: str, value: object, low: float, high: float) -> DataError:
    return DataError(f"{name} is {str(value)[:40]!r}", hint=f"allowed: a number from {low:g} to {high:g}", field=name)


def words(params: Params, name: str) -> list[str]:
    """A list of words, empty when it is not given. Raises DataError."""
    value = params.get(name) or []
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise DataError(f"{name} is {str(value)[:40]!r}", hint="allowed: a list of words", field=name)
    return value


def task_digits(params: Params) -> str:
    """The hexadecimal id of a task, or its beginning. Raises DataError."""
    text = str(params.get("task") or "").strip().lower()
    if not 1 <= len(text) <= ID_DIGITS or not HEX_DIGITS.issuperset(text):
        raise DataError(f"{text[:64]!r} is no task id", hint="give the hexadecimal id of a task or the beginning of it")
    return text
