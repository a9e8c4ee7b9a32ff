"""What the command line says to every command: which home, how to answer, how long to wait; the way to the node."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperCommand, TyperOption

from clawnet import units
from clawnet.api import Client
from clawnet.errors import TimedOutError
from clawnet.paths import Home, resolve_home


class Invocation:
    """One run of the program: the global options, filled in while the command line is read."""

    def __init__(self) -> None:
        self.home_flag: str | None = None
        self.config_flag: str | None = None
        self.log_level: str | None = None
        self.autostart = True
        self.json = False
        self.quiet = False
        self.verbose = False
        self.timeout_s: float | None = None
        self.leaving: Callable[[dict[str, Any]], None] = lambda value: None
        self._started = time.monotonic()

    @property
    def home(self) -> Home:
        """The home this command means."""
        return resolve_home(self.home_flag, os.environ, config=self.config_flag)

    @property
    def flags(self) -> dict[str, str]:
        """Configuration keys given as flags."""
        return {"log.level": self.log_level} if self.log_level else {}

    def client(self, *, create_home: bool = False, autostart: bool = True) -> Client:
        """A client of this home's daemon; the daemon is started at the first call if need be."""
        return Client(
            self.home,
            autostart=self.autostart and autostart,
            create_home=create_home,
            timeout_s=self.timeout_s,
            say=self.warn,
        )

    def call(self, method: str, params: dict[str, Any] | None = None, *, timeout_s: float | None = None) -> Any:
        """One call to the daemon; `--timeout` bounds it, else `timeout_s`, else the usual limit."""
        with self.client() as client:
            return client.call(method, params, timeout_s=self.timeout_s or timeout_s)

    def deadline(self) -> float | None:
        """When `--timeout` is over, in monotonic seconds."""
        return None if self.timeout_s is None else self._started + self.timeout_s

    def left_s(self, what: str) -> float | None:
        """What is left of `--timeout`; raises TimedOutError when nothing is."""
        deadline = self.deadline()
        if deadline is None:
            return None
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise TimedOutError(f"{what} was not done within {self.timeout_s:g} s")
        return left_s

    @property
    def talks(self) -> bool:
        """Whether notices are wanted: stderr is a terminal, or --verbose; cron mails nothing when all is well."""
        return not self.quiet and (self.verbose or (sys.stderr is not None and sys.stderr.isatty()))

    def say(self, text: str) -> None:
        """A notice for people, on stderr."""
        if self.talks:
            sys.stderr.write(f"clawnet: {text}\n")
            sys.stderr.flush()

    def warn(self, text: str) -> None:
        """A notice that must not be missed, terminal or not."""
        if not self.quiet and sys.stderr is not None:
            sys.stderr.write(f"clawnet: {text}\n")
            sys.stderr.flush()


def here(context: typer.Context) -> Invocation:
    """The invocation that a command belongs to."""
    found = context.find_object(Invocation)
    assert isinstance(found, Invocation)
    return found


def duration_s(text: str | None, what: str) -> float | None:
    """Seconds of an option such as 30s or 500ms; raises DataError."""
    return None if text is None else units.parse_duration_ms(text, what=what) / 1000


# --- options that every command has


def _set(name: str) -> Callable[[Any, Any, Any], Any]:
    def callback(context: Any, parameter: Any, value: Any) -> Any:
        if value and not context.resilient_parsing:
            setattr(here(context), name, duration_s(value, "--timeout") if name == "timeout_s" else value)
        return value

    return callback


def _common() -> list[Any]:
    def flag(names: list[str], name: str, text: str) -> Any:
        return TyperOption(
            param_decls=names, is_flag=True, default=False, expose_value=False, callback=_set(name), help=text
        )

    timeout = TyperOption(
        param_decls=["--timeout"],
        metavar="DURATION",
        expose_value=False,
        callback=_set("timeout_s"),
        help="Wait no longer than this (exit code 124).",
    )
    return [
        flag(["--json"], "json", "Print one JSON object."),
        flag(["--quiet", "-q"], "quiet", "No notices on stderr."),
        flag(["--verbose", "-v"], "verbose", "Notices even when stderr is no terminal."),
        timeout,
    ]


class NodeCommand(TyperCommand):
    """A command with the options that all commands share: --json, --quiet, --verbose, --timeout."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        mine = {name for parameter in self.params for name in getattr(parameter, "opts", ())}
        self.params += [option for option in _common() if not mine.intersection(option.opts)]


SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"]}


def group(text: str, **more: Any) -> typer.Typer:
    """A group of commands, set up to start fast and to leave errors to the program."""
    return typer.Typer(
        help=text,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings=SETTINGS,
        **more,
    )
