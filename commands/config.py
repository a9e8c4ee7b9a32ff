"""`clawnet config`: show, get, set, check and path."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from clawnet.errors import ClawnetError, ConfigError, UsageError

from .invocation import Invocation, NodeCommand, group, here
from .render import clean, on_terminal, pairs, show, table, write

if TYPE_CHECKING:
    from clawnet.config import Config

app = group("Show, check and change the configuration.")


@app.command("show", cls=NodeCommand)
def show_all(context: typer.Context) -> None:
    """Every key with its value and where the value comes from."""
    invocation = here(context)
    config = _load(invocation)
    items = [_item(config, name) for name in config.names()]
    columns = [
        ("key", lambda item: item["key"]),
        ("value", lambda item: config.shown(item["key"])),
        ("source", lambda item: item["source"]),
    ]
    table(invocation, {"items": items, "next": None}, columns)


@app.command("get", cls=NodeCommand)
def get(context: typer.Context, key: Annotated[str, typer.Argument(metavar="KEY")]) -> None:
    """The value of one key."""
    from clawnet.config_file import known_key

    invocation = here(context)
    known = known_key(key)
    if known.unbuilt:
        raise ConfigError(f"{key}: {known.unbuilt}", key=key)
    config = _load(invocation)
    item = _item(config, key)
    lines = [
        ("value", config.shown(key)),
        ("source", item["source"]),
        ("meaning", item["meaning"]),
        ("allowed", item["allowed"]),
        ("default", item["default"]),
        ("applies", "at once" if item["apply"] == "reload" else "after clawnet daemon restart"),
    ]
    show(invocation, item, bare=config.shown(key), lines=lines)


@app.command("set", cls=NodeCommand)
def set_(
    context: typer.Context,
    words: Annotated[list[str], typer.Argument(metavar="KEY VALUE [KEY VALUE]...")],
) -> None:
    """Change keys in the file, keeping its comments; a running daemon takes them up. All changes hold, or none."""
    from clawnet.config import restart_needed, set_in_file

    if len(words) % 2:
        raise UsageError(f"{words[-1]} has no value", hint="clawnet config set KEY VALUE [KEY VALUE]...")
    if len(set(words[::2])) != len(words) // 2:
        raise UsageError("a key is named twice")
    invocation = here(context)
    changes = dict(zip(words[::2], words[1::2], strict=True))
    home = invocation.home
    if not home.dir.is_dir():
        raise ConfigError(f"{home.dir} is no clawnet home yet", hint="clawnet init")
    keys = tuple(key.name for key in set_in_file(home.config_file, changes))
    config = _load(invocation)
    for name in keys:
        if not config.source(name).startswith(str(home.config_file)):
            invocation.warn(f"{name} is overridden by {config.source(name)}")
    reloaded = _reload(invocation)
    waiting = list(restart_needed(keys))
    if reloaded is None:
        reloaded, waiting, running = {"applied": [], "restart": []}, [], False
    else:
        running = True
    value = {
        "items": [_item(config, name) for name in keys],
        "applied": reloaded["applied"],
        "restart": sorted({*reloaded["restart"], *waiting}),
        "daemon_running": running,
    }
    if invocation.json:
        pairs(invocation, value, [])
        return
    for name in keys:
        invocation.say(f"{name} = {config.shown(name)}")
    if value["restart"]:
        invocation.warn(f"takes effect after `clawnet daemon restart`: {', '.join(value['restart'])}")


@app.command("check", cls=NodeCommand)
def check(context: typer.Context) -> int:
    """Everything that is wrong with the configuration, with file and line; exit code 78 when something is."""
    from clawnet import config

    invocation = here(context)
    home = invocation.home
    try:
        problems = [problem._asdict() for problem in config.check(home, os.environ)]
    except ClawnetError as error:
        problems = [{"line": 0, "message": error.message, "hint": error.hint}]
    if invocation.json:
        pairs(invocation, {"ok": not problems, "file": str(home.config_file), "problems": problems}, [])
    for problem in problems if not invocation.json else []:
        write(clean(problem["message"]) + (f" ({clean(problem['hint'])})" if problem["hint"] else "") + "\n")
    if not problems:
        what = f"{home.config_file} is good" if home.config_file.exists() else "there is no file; the defaults are good"
        if on_terminal() and not invocation.json:
            write(what + "\n")
    return ConfigError.exit_code if problems else 0


@app.command("path", cls=NodeCommand)
def path(context: typer.Context) -> None:
    """Where the configuration file is, or would be."""
    invocation = here(context)
    file = invocation.home.config_file
    show(invocation, {"path": str(file), "exists": file.exists()}, bare=str(file), lines=[("path", str(file))])


def _load(invocation: Invocation) -> Config:
    from clawnet import config

    return config.load(invocation.home, os.environ, invocation.flags)


def _item(config: Config, name: str) -> dict[str, Any]:
    """One key as JSON shows it."""
    from clawnet.config_keys import KEYS

    key = KEYS[name]
    value: Any
    match key.kind:
        case "duration":
            value = config.seconds(name)
        case "size" | "integer":
            value = config.integer(name)
        case "number":
            value = config.number(name)
        case "flag":
            value = config.flag(name)
        case "words" | "addresses":
            value = list(config.words(name))
        case _:
            value = config.shown(name)
    return {
        "key": name,
        "value": value,
        "source": config.source(name),
        "default": key.default,
        "allowed": key.allowed,
        "meaning": key.meaning,
        "apply": key.apply,
    }


def _reload(invocation: Invocation) -> dict[str, Any] | None:
    """Tells a running daemon; None when none runs."""
    from clawnet.errors import UnreachableError

    try:
        with invocation.client(autostart=False) as client:
            answer: dict[str, Any] = client.call("config.reload", {})
            return answer
    except UnreachableError:
        return None
