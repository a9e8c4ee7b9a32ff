"""The configuration of a node: defaults, then the file, then the environment, then flags; checked as a whole."""

from __future__ import annotations

import functools
import platform
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from clawnet import config_file, limits, paths
from clawnet.config_endpoint import TOKEN_VARIABLE, parse_address, read_token, token_trouble
from clawnet.config_file import Problem, known_key
from clawnet.config_keys import KEYS, RESTART, SECTIONS, UNBOUNDED, Key, Value, format_value, parse_value
from clawnet.errors import ConfigError, DataError, UsageError
from clawnet.paths import Home

T = TypeVar("T")

_NOT_KEYS = frozenset({"CLAWNET_HOME", "CLAWNET_CONFIG", "CLAWNET_AUTOSTART", "CLAWNET_JOIN", TOKEN_VARIABLE})


class Setting(NamedTuple):
    """A value and where it comes from: "default", "FILE:LINE", an environment variable, or "flag"."""

    value: Value
    source: str


class Config:
    """The settings of one node, all checked; read with the accessor that fits the key's type.

    Reading a key by the wrong accessor, or one that is not in the table, is a defect and raises AssertionError.
    """

    def __init__(self, settings: Mapping[str, Setting]) -> None:
        self._settings = dict(settings)
        self._derived: dict[Callable[[Config], Any], Any] = {}

    @classmethod
    def defaults(cls, changes: Mapping[str, str] | None = None) -> Config:
        """The defaults with some values changed, given as text; for whoever builds a node without a file.

        Raises ConfigError for a bad value.
        """
        settings = _defaults()
        for name, text in (changes or {}).items():
            settings[name] = _setting(known_key(name), text, "flag")
        for problem in _cross_checks(settings):
            raise ConfigError(problem.message)
        return cls(settings)

    def text(self, name: str) -> str:
        """A text, name or choice."""
        value = self._settings[name].value
        assert isinstance(value, str), name
        if name == "node.name" and not value:
            return host_name()
        return value

    def path(self, name: str) -> Path | None:
        """A directory or file, with ~ replaced; None when the key is empty."""
        text = self.text(name)
        return Path(text).expanduser() if text else None

    def flag(self, name: str) -> bool:
        """True or false."""
        value = self._settings[name].value
        assert isinstance(value, bool), name
        return value

    def integer(self, name: str) -> int:
        """A whole number; for sizes, bytes."""
        return self._whole(name, "integer", "size")

    def number(self, name: str) -> float:
        """A number."""
        value = self._settings[name].value
        assert isinstance(value, (int, float)), name
        assert KEYS[name].kind in ("number", "integer"), name
        return float(value)

    def seconds(self, name: str) -> float:
        """A duration in seconds."""
        return self._whole(name, "duration") / 1_000

    def millis(self, name: str) -> int:
        """A duration in milliseconds."""
        return self._whole(name, "duration")

    def amount_ucr(self, name: str) -> int:
        """An amount in micro-credits."""
        return self._whole(name, "amount")

    def allowance_ucr(self, name: str) -> int | None:
        """An amount in micro-credits that bounds something; None for "none"."""
        value = self._whole(name, "allowance")
        return None if value == UNBOUNDED else value

    def derived(self, make: Callable[[Config], T]) -> T:
        """What the function `make` makes of these settings alone, made anew only when they have changed."""
        try:
            found: T = self._derived[make]
        except KeyError:
            found = self._derived[make] = make(self)
        return found

    def words(self, name: str) -> tuple[str, ...]:
        """A list of words or multiaddrs."""
        value = self._settings[name].value
        assert isinstance(value, tuple), name
        return value

    def source(self, name: str) -> str:
        """Where a value comes from: "default", "FILE:LINE", an environment variable's name, or "flag"."""
        return self._settings[name].source

    def is_set(self, name: str) -> bool:
        """Whether somebody set this key, be it to its default."""
        return self._settings[name].source != "default"

    def shown(self, name: str) -> str:
        """The value as text, as `clawnet config get` prints it."""
        return format_value(KEYS[name], self._settings[name].value)

    def names(self) -> tuple[str, ...]:
        """Every key that can be set in this version."""
        return tuple(self._settings)

    def home(self, home: Home) -> Home:
        """The home with its data where node.data_dir says."""
        data_dir = self.path("node.data_dir")
        return home.with_data_dir(data_dir) if data_dir else home

    def changed(self, other: Config) -> tuple[str, ...]:
        """The keys whose value differs in another configuration."""
        return tuple(n for n, setting in self._settings.items() if setting.value != other._settings[n].value)

    def adopt(self, other: Config) -> tuple[list[str], list[str]]:
        """Takes over what may change in a running daemon; returns the keys that did, and those that need a restart."""
        changed = self.changed(other)
        waiting = restart_needed(changed)
        applied = [name for name in changed if name not in waiting]
        for name in applied:
            self._settings[name] = other._settings[name]
        self._derived.clear()
        return applied, list(waiting)

    def render(self) -> str:
        """The commented file that holds these settings."""
        return config_file.render({name: self.shown(name) for name in self._settings if self.is_set(name)})

    def _whole(self, name: str, *kinds: str) -> int:
        value = self._settings[name].value
        assert isinstance(value, int), name
        assert KEYS[name].kind in kinds, name
        return value


def host_name() -> str:
    """This machine's host name as a node name."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", platform.node().partition(".")[0]).strip("._-")
    return name[: limits.NAME_CHARS_MAX] or "node"


def load(home: Home, environ: Mapping[str, str], flags: Mapping[str, str] | None = None) -> Config:
    """The configuration of a home, with `environ` over the file and `flags` (dotted name to text) over both.

    A missing file means the defaults, unless it was named by --config or CLAWNET_CONFIG. Raises ConfigError that names
    file, line and key; `details["problems"]` lists every problem found.
    """
    settings, problems = _collect(home, environ, flags or {})
    config = _checked(settings, problems)
    if config.flag("security.check_permissions"):
        paths.check_private(home.dir)
        paths.check_private(home.config_file)
    return config


def load_layers(environ: Mapping[str, str], flags: Mapping[str, str] | None = None) -> Config:
    """What environment and flags alone say, over the defaults; raises ConfigError as `load` does."""
    settings, problems = _collect(None, environ, flags or {})
    return _checked(settings, problems)


def _checked(settings: Mapping[str, Setting], problems: list[Problem]) -> Config:
    if problems:
        more = f" (and {len(problems) - 1} more; clawnet config check lists them)" if problems[1:] else ""
        raise ConfigError(
            problems[0].message + more,
            hint=problems[0].hint,
            problems=[problem.message for problem in problems],
        )
    return Config(settings)


def check(home: Home, environ: Mapping[str, str]) -> list[Problem]:
    """Everything that is wrong with the configuration of a home; each message names file and line."""
    settings, problems = _collect(home, environ, {})
    if not problems and settings["security.check_permissions"].value:
        for path in (home.dir, home.config_file):
            try:
                paths.check_private(path)
            except ConfigError as error:
                problems.append(Problem(0, error.message, error.hint))
    return problems


def set_in_file(path: Path, changes: Mapping[str, str]) -> list[Key]:
    """Sets keys in the file, keeping its comments; returns the keys. The file is replaced in one step, mode 0600.

    The changed file must be good as a whole, so values that depend on each other go into one call. Raises ConfigError
    for a bad value, NotFoundError for an unknown key, UsageError when nothing is to be changed.
    """
    if not changes:
        raise UsageError("nothing to set", hint="clawnet config set KEY VALUE")
    text = _read(path) if path.exists() else config_file.render({})
    keys: list[Key] = []
    for name, value in changes.items():
        key = known_key(name)
        try:
            parsed = parse_value(key, value)
        except DataError as error:
            raise ConfigError(f"{name}: {error.message}", key=name) from error
        text = _edited(path, text, name, format_value(key, parsed))
        keys.append(key)
    settings = _defaults()
    problems = _from_text(path, text, settings) or [*_cross_checks(settings), *_endpoint_checks(settings, {})]
    if problems:
        raise ConfigError(problems[0].message, hint=problems[0].hint)
    for name, value in changes.items():
        if settings[name].value != parse_value(known_key(name), value):
            raise ConfigError(f"{path}: no place was found for {name}", hint="edit the file by hand")
    paths.write_private(path, text.encode())
    return keys


def write_new(path: Path, values: Mapping[str, str]) -> None:
    """Writes the commented file of a new home. Raises ConfigError for a bad value."""
    config = Config.defaults(values)
    paths.write_private(path, config.render().encode())


def restart_needed(names: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the keys whose change only a restart takes up."""
    return tuple(name for name in names if KEYS[name].apply == RESTART)


# --- the layers


def _defaults() -> dict[str, Setting]:
    return dict(_read_defaults())


@functools.cache
def _read_defaults() -> dict[str, Setting]:
    return {key.name: _setting(key, key.default, "default") for key in KEYS.values() if not key.unbuilt}


def _setting(key: Key, raw: str | list[str], source: str) -> Setting:
    try:
        return Setting(parse_value(key, raw), source)
    except DataError as error:
        raise ConfigError(f"{key.name}: {error.message}", key=key.name) from error


def _collect(
    home: Home | None, environ: Mapping[str, str], flags: Mapping[str, str]
) -> tuple[dict[str, Setting], list[Problem]]:
    settings = _defaults()
    problems: list[Problem] = []
    path = home.config_file if home else None
    if path is not None and path.exists():
        problems += _from_text(path, _read(path), settings)
    elif home is not None and path != home.dir / "config.yaml":
        problems.append(Problem(0, f"there is no configuration file {path}", "clawnet init writes one"))
    problems += _from_environment(environ, settings)
    for name, text in flags.items():
        _layer(known_key(name), text, "flag", f"--{name.rpartition('.')[2].replace('_', '-')}", settings, problems)
    return settings, problems or [*_cross_checks(settings), *_endpoint_checks(settings, environ)]


def _endpoint_checks(settings: Mapping[str, Setting], environ: Mapping[str, str]) -> list[Problem]:
    """A token that cannot be read, or that would cross the network for everybody to read."""
    config = Config(settings)
    endpoint = config.text("openclaw.api_endpoint")
    if not endpoint or not config.flag("openclaw.enabled"):
        return []
    check_permissions = config.flag("security.check_permissions")
    try:
        token = read_token(environ, config.path("openclaw.token_file"), check_permissions=check_permissions)
    except ConfigError as error:
        return [Problem(0, error.message, error.hint)]
    message, remedy = token_trouble(parse_address(endpoint), token)
    return [Problem(0, message, remedy)] if message else []


def _read(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    if len(data) > config_file.FILE_BYTES_MAX:
        raise ConfigError(f"{path} has {len(data)} bytes; the limit is {config_file.FILE_BYTES_MAX}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{line}: this is not UTF-8 text") from error


def _from_text(path: Path, text: str, settings: dict[str, Setting]) -> list[Problem]:
    entries, problems = config_file.read_entries(text)
    problems = [problem._replace(message=f"{path}:{problem.line}: {problem.message}") for problem in problems]
    for entry in entries:
        source = f"{path}:{entry.line}"
        _layer(KEYS[entry.name], entry.raw, source, f"{source}: {entry.name}", settings, problems)
    return sorted(problems, key=lambda problem: problem.line)


def _from_environment(environ: Mapping[str, str], settings: dict[str, Setting]) -> list[Problem]:
    problems: list[Problem] = []
    by_variable = {key.variable: key for key in KEYS.values()}
    for key in KEYS.values():
        for variable in (key.short_variable, key.variable):
            if variable and variable in environ:
                _layer(key, environ[variable], variable, variable, settings, problems)
    short = {key.short_variable for key in KEYS.values()}
    prefixes = tuple(f"CLAWNET_{section.upper()}_" for section in SECTIONS if "." not in section)
    for variable in sorted(environ):
        if not variable.startswith(prefixes) or variable in by_variable or variable in short | _NOT_KEYS:
            continue
        name = variable.removeprefix("CLAWNET_").lower().replace("_", ".", 1)
        hint = config_file.nearest(name) or "clawnet config show lists every key"
        problems.append(Problem(0, f"{variable} names no configuration key", hint))
    return problems


def _layer(
    key: Key, raw: str | list[str], source: str, shown: str, settings: dict[str, Setting], problems: list[Problem]
) -> None:
    """Puts one value over the lower layers, or says what is wrong with it."""
    try:
        settings[key.name] = Setting(parse_value(key, raw), source)
    except DataError as error:
        tail = source.rpartition(":")[2]
        problems.append(Problem(int(tail) if tail.isdigit() else 0, f"{shown}: {error.message}"))


def _cross_checks(settings: Mapping[str, Setting]) -> list[Problem]:
    """What several keys together must keep to."""
    problems: list[Problem] = []
    names = [key.name for key in KEYS.values() if key.section == "market.weights"]
    total = sum(value for name in names if isinstance(value := settings[name].value, float))
    if abs(total - 1) > 1e-6:
        where = next((f"{settings[name].source}: " for name in names if settings[name].source != "default"), "")
        problems.append(Problem(0, f"{where}market.weights: the four weights add up to {total:g}; allowed: 1 in all"))
    return problems


def _edited(path: Path, text: str, name: str, value: str) -> str:
    try:
        return config_file.edit(text, name, value)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.message}", hint=error.hint) from error
