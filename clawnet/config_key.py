"""What a configuration key is: its kind, what it may hold, and its value from a text and back."""

from __future__ import annotations

import re
from typing import Final, Literal, NamedTuple

from clawnet import limits
from clawnet.config_endpoint import parse_address
from clawnet.errors import DataError
from clawnet.money import format_credits, parse_credits
from clawnet.units import format_duration, format_size, parse_duration_ms, parse_size

Kind = Literal[
    "text",
    "name",
    "path",
    "file",
    "url",
    "choice",
    "words",
    "addresses",
    "flag",
    "integer",
    "number",
    "duration",
    "size",
    "amount",
    "allowance",
]
Value = str | int | float | bool | tuple[str, ...]

RELOAD: Final = "reload"
RESTART: Final = "restart"

_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{limits.NAME_CHARS_MAX - 1}}}\Z")
_ADDRESS = re.compile(r"/(ip4|ip6|dns|dns4|dns6)/[^/\s]+/(tcp/\d+|udp/\d+/quic-v1)(/p2p/[A-Za-z0-9]+)?\Z")
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=-]{0,62}\Z")
UNBOUNDED: Final = -1
"""The value of an allowance that is "none"."""
_TRUE = ("true", "yes", "on", "1")
_FALSE = ("false", "no", "off", "0")
_DAY_MS = 86_400_000


class Key(NamedTuple):
    """One key. `default`, `low` and `high` are written as a user would write them.

    `refused` names values that are understood and turned down, with the reason; `unbuilt` is the reason why the whole
    key is turned down in this version.
    """

    name: str
    kind: Kind
    default: str
    meaning: str
    apply: str = RESTART
    low: str = ""
    high: str = ""
    choices: tuple[str, ...] = ()
    refused: tuple[tuple[str, str], ...] = ()
    unbuilt: str = ""
    short_variable: str = ""

    @property
    def variable(self) -> str:
        """The environment variable that overrides the file."""
        return "CLAWNET_" + self.name.upper().replace(".", "_")

    @property
    def section(self) -> str:
        """The dotted name of the section the key stands in."""
        return self.name.rpartition(".")[0]

    @property
    def allowed(self) -> str:
        """What a value may be, in words."""
        if self.choices:
            refused = {value for value, _ in self.refused}
            offered = " | ".join(choice for choice in self.choices if choice not in refused)
            return f"any of {offered}" if self.kind == "words" else offered
        words = _KIND_WORDS[self.kind]
        if self.low and self.high:
            return f"{words}, {self.low} to {self.high}"
        if self.low:
            return f"{words}, at least {self.low}"
        return words


_KIND_WORDS: Final[dict[Kind, str]] = {
    "text": "text",
    "name": f"1 to {limits.NAME_CHARS_MAX} letters, digits, dots, dashes and underscores, or empty",
    "path": "a directory, absolute or starting with ~, or empty",
    "file": "a file, absolute or starting with ~, or empty",
    "url": "an address such as http://127.0.0.1:11434 or https://example.org/v1, without user name or query, or empty",
    "choice": "a word",
    "words": "words of letters, digits, dots, dashes, underscores and =",
    "addresses": "multiaddrs such as /ip4/203.0.113.7/tcp/4002",
    "flag": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "duration": "a duration such as 500ms, 30s, 5m, 2h or 7d",
    "size": "a size such as 64KiB, 512MiB or 1GiB",
    "amount": "credits with up to six decimals",
    "allowance": "credits with up to six decimals, or none",
}


def parse_value(key: Key, raw: str | list[str]) -> Value:
    """The value of a key from its text, or from the texts of a list.

    Raises DataError whose message says what is wrong with the value and what is allowed.
    """
    if key.unbuilt:
        raise DataError(key.unbuilt)
    if key.kind in ("words", "addresses"):
        texts = raw if isinstance(raw, list) else [part.strip() for part in raw.split(",") if part.strip()]
        return tuple(dict.fromkeys(_checked_word(key, text) for text in texts))
    if isinstance(raw, list):
        raise DataError(f"a list is not allowed here; allowed: {key.allowed}")
    value = _parse_one(key, raw.strip())
    if key.low and value < _parse_one(key, key.low):  # type: ignore[operator]
        raise DataError(f"{raw.strip()!r} is too small; allowed: {key.allowed}")
    if key.high and value > _parse_one(key, key.high):  # type: ignore[operator]
        raise DataError(f"{raw.strip()!r} is too large; allowed: {key.allowed}")
    return value


def format_value(key: Key, value: Value) -> str:
    """The text of a value, which `parse_value` reads back; lists are joined by commas."""
    if isinstance(value, tuple):
        return ", ".join(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if key.kind == "duration":
        return format_duration(int(value))
    if key.kind == "size":
        return format_size(int(value))
    if key.kind in ("amount", "allowance"):
        return "none" if value == UNBOUNDED else format_credits(int(value))
    if key.kind == "number":
        return f"{value:.12f}".rstrip("0").rstrip(".")
    return str(value)


def _parse_one(key: Key, text: str) -> Value:
    wrong = DataError(f"{text!r} is not allowed; allowed: {key.allowed}")
    if key.kind == "choice":
        return _checked_word(key, text)
    if key.kind == "flag":
        word = text.lower()
        if word not in _TRUE + _FALSE:
            raise wrong
        return _unrefused(key, "true" if word in _TRUE else "false") == "true"
    if key.kind == "name" and text and _NAME.match(text) is None:
        raise wrong
    if key.kind in ("path", "file") and text and not text.startswith(("/", "~", "\\")) and text[1:2] != ":":
        raise wrong
    try:
        match key.kind:
            case "url":
                if text:
                    parse_address(text)
                return text
            case "integer":
                return int(text) if re.fullmatch(r"-?\d{1,15}", text, re.ASCII) else _raise(wrong)
            case "number":
                return float(text) if re.fullmatch(r"-?\d{1,12}(\.\d{1,12})?", text, re.ASCII) else _raise(wrong)
            case "duration":
                return parse_duration_ms(text)
            case "size":
                return parse_size(text)
            case "amount":
                return parse_credits(text)
            case "allowance":
                return UNBOUNDED if text == "none" else parse_credits(text)
            case _:
                return text
    except DataError as error:
        raise wrong from error


def _raise(error: DataError) -> Value:
    raise error


def _checked_word(key: Key, text: str) -> str:
    if key.kind == "addresses":
        if _ADDRESS.match(text) is None:
            raise DataError(f"{text!r} is not allowed; allowed: {key.allowed}")
        return text
    if text not in key.choices if key.choices else _LABEL.match(text) is None:
        raise DataError(f"{text!r} is not allowed; allowed: {key.allowed}")
    return _unrefused(key, text)


def _unrefused(key: Key, text: str) -> str:
    for value, reason in key.refused:
        if value == text:
            raise DataError(f"{text!r} is refused: {reason}")
    return text
