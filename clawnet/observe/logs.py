"""What the daemon tells of itself: event names with fields, one line each; the security log; counters and gauges."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final, Protocol

from clawnet.config import Config
from clawnet.limits import KIB, MIB
from clawnet.observe.logfile import LogFile, LogStream
from clawnet.observe.security import SecurityLog
from clawnet.paths import Home

LEVELS: Final = {"debug": 10, "info": 20, "warn": 30, "error": 40, "security": 30}

FIELD_CHARS_MAX: Final = 8 * KIB
FIELD_ITEMS_MAX: Final = 64
FIELD_DEPTH_MAX: Final = 4
# The same warning again and again may not drive everything else out of the log.
LINES_OF_EVENT_A_MINUTE: Final = 120
LABELS_MAX: Final = 4096

_HIDDEN: Final = "[hidden]"
_SECRET_NAME: Final = re.compile(
    r"(^|_)(secret|password|passphrase|token|seed|private|credential|api_?key|mesh_?key)s?$"
)
_INVITE: Final = re.compile(r"clawnet1[A-Za-z0-9_-]{12,}")
_BARE: Final = re.compile(r"[!#-<>-\[\]-~][!#-<>-~]*\Z")
_RESERVED: Final = ("at", "level", "event")


class Sink(Protocol):
    """Where lines go; writing never raises."""

    lost: int

    def write(self, line: str) -> bool: ...
    def close(self) -> None: ...


class Observer:
    """Logs, counters and gauges of one daemon. Nothing here raises because a disk is full or a pipe is closed.

    `counters` maps (name, label) to a count, `gauges` a name to its value; both may be read at any time.
    """

    def __init__(
        self,
        sink: Sink | None = None,
        security: Sink | None = None,
        *,
        level: str = "info",
        as_json: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.counters: dict[tuple[str, str], int] = {}
        self.gauges: dict[str, float] = {}
        self.level = level
        self._least = LEVELS[level]
        self._sink = sink
        self._security = security
        self._render = json_line if as_json else text_line
        self._clock = clock
        self._lost_told = 0
        self._security_log = SecurityLog(security, _security_line) if security is not None else None
        self._log_minute = 0
        self._warned: dict[str, int] = {}

    @classmethod
    def open(cls, config: Config, home: Home) -> Observer:
        """The observer the configuration asks for (keys log.*); a log that cannot be opened costs its lines alone."""
        bytes_max = config.integer("log.max_size") * MIB
        backups = config.integer("log.max_backups")
        age_s = config.integer("log.max_age") * 86_400
        output = config.text("log.output")
        sink: Sink
        if output == "file":
            sink = LogFile(home.log_file, bytes_max, backups, age_s)
        else:
            sink = LogStream(1 if output == "stdout" else 2)
        # Of the security log nothing is forgotten for its age.
        security = LogFile(home.security_log, bytes_max, max(backups, 1), 0)
        return cls(sink, security, level=config.text("log.level"), as_json=config.text("log.format") == "json")

    # --- logs

    def log(self, level: str, event: str, fields: dict[str, Any]) -> None:
        """One line, if `level` is debug, info, warn or error and at least the level set.

        "security" goes to the security log as JSON and, as a warning, into the log.
        """
        if LEVELS.get(level, 40) < self._least and level != "security":
            return
        at = self._clock()
        plain = {name: _plain(name, value, 0) for name, value in fields.items()}
        if level == "security":
            self._secure(at, event, plain)
            level = "warn"
            if LEVELS[level] < self._least:
                return
        sink = self._sink
        if sink is None or (LEVELS[level] >= LEVELS["warn"] and not self._may_warn(sink, at, event)):
            return
        if sink.write(self._render(at, level, event, plain)) and sink.lost > self._lost_told:
            lost = sink.lost
            if sink.write(self._render(at, "warn", "log.lost", {"lines": lost - self._lost_told})):
                self._lost_told = lost

    def _may_warn(self, sink: Sink, at: float, event: str) -> bool:
        """Whether one more line of this event is written in this minute; what was not is told in the next."""
        minute = int(at) // 60
        if minute != self._log_minute:
            self._log_minute = minute
            warned, self._warned = self._warned, {}
            for name, count in warned.items():
                if count > LINES_OF_EVENT_A_MINUTE:
                    more = {"of": name, "lines": count - LINES_OF_EVENT_A_MINUTE}
                    sink.write(self._render(at, "warn", "log.suppressed", more))
        count = self._warned[event] = self._warned.get(event, 0) + 1
        return count <= LINES_OF_EVENT_A_MINUTE

    def _secure(self, at: float, event: str, plain: dict[str, Any]) -> None:
        self.count("security_events_total", event)
        if self._security_log is not None:
            self._security_log.write(at, event, plain)

    def set_level(self, level: str) -> None:
        """From now on the least that is written; KeyError for a word that is no level."""
        self._least = LEVELS[level]
        self.level = level

    @property
    def lines_lost(self) -> int:
        """Lines that could not be written."""
        return (self._sink.lost if self._sink else 0) + (self._security.lost if self._security else 0)

    def close(self) -> None:
        """Lets the files go; what the security log left out is told before."""
        if self._security_log is not None:
            self._security_log.sum_up(self._clock())
        for sink in (self._sink, self._security):
            if sink is not None:
                sink.close()

    # --- figures

    def count(self, name: str, label: str = "", by: int = 1) -> None:
        """A counter goes up. Labels beyond LABELS_MAX are counted together under "other"."""
        key = (name, label)
        counters = self.counters
        if key not in counters and len(counters) >= LABELS_MAX:
            key = (name, "other")
        counters[key] = counters.get(key, 0) + by

    def set_gauge(self, name: str, value: float) -> None:
        """A gauge has this value now."""
        self.gauges[name] = value


def text_line(at: float, level: str, event: str, fields: dict[str, Any]) -> str:
    """A line for people: time, level, event, then name=value."""
    parts = [_stamp(at), f"{level:<5}", _escaped(event)]
    parts += [f"{_escaped(name)}={_word(value)}" for name, value in fields.items()]
    return " ".join(parts)


def _security_line(at: float, event: str, fields: dict[str, Any]) -> str:
    return json_line(at, "security", event, fields)


def json_line(at: float, level: str, event: str, fields: dict[str, Any]) -> str:
    """A line for programs: one JSON object with at, level, event and the fields, in ASCII."""
    record: dict[str, Any] = {"at": _stamp(at), "level": level, "event": event}
    for name, value in fields.items():
        record[f"{name}_" if name in _RESERVED else name] = value
    return json.dumps(record, separators=(",", ":"), allow_nan=False)


def _stamp(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _plain(name: str, value: Any, depth: int) -> Any:
    """A value fit for a line: JSON-able, bounded, without secrets; bytes show their beginning and their length."""
    if value is None or isinstance(value, bool):
        return value
    if _SECRET_NAME.search(name) and value != "":
        return _HIDDEN
    if isinstance(value, int):
        return value if abs(value) < 2**63 else str(value)[:64]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, bytes | bytearray | memoryview):
        data = bytes(value)
        return data.hex() if len(data) <= 16 else f"{data[:8].hex()}..({len(data)} bytes)"
    if depth < FIELD_DEPTH_MAX:
        if isinstance(value, dict):
            items = list(value.items())[:FIELD_ITEMS_MAX]
            return {str(key): _plain(str(key), one, depth + 1) for key, one in items}
        if isinstance(value, list | tuple | set | frozenset):
            return [_plain("", one, depth + 1) for one in list(value)[:FIELD_ITEMS_MAX]]
    text = _INVITE.sub(f"clawnet1{_HIDDEN}", str(value))
    if len(text) > FIELD_CHARS_MAX:
        half = FIELD_CHARS_MAX // 2
        text = f"{text[:half]}..({len(text)} characters)..{text[-half:]}"
    return text


def _word(value: Any) -> str:
    if isinstance(value, str):
        return value if _BARE.match(value) else '"' + _escaped(value).replace('"', '\\"') + '"'
    if isinstance(value, list) and all(isinstance(one, str | int) for one in value):
        return _word(",".join(str(one) for one in value))
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _escaped(text: str) -> str:
    """No character that ends a line, moves a cursor or turns the writing direction survives as itself."""
    if text.isprintable() and "\\" not in text:
        return text
    return "".join(_escape(char) for char in text)


_SHORT: Final = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\\": "\\\\"}


def _escape(char: str) -> str:
    if char in _SHORT:
        return _SHORT[char]
    if char.isprintable():
        return char
    code = ord(char)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
