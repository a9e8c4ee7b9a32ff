"""The program: global options, the table of commands (each loaded when it is named), and one place where errors end."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from clawnet.errors import ClawnetError, DataError, InternalError, UsageError

from .invocation import SETTINGS, Invocation, NodeCommand, here

COMMANDS: dict[str, tuple[str, str, str]] = {
    "init": (".init", "init", "Make a home: configuration, keys, a mesh of one."),
    "run": (".run", "app", "Run a command on whichever machine takes it; its output and exit code come back."),
    "market": (".market", "app", "Submit tasks, follow them, see who bid and why."),
    "peer": (".peer", "app", "The mesh: invite, join, connect, ban, reputation."),
    "wallet": (".wallet", "app", "Balance, history, escrows, sending credits, audit."),
    "daemon": (".daemon", "app", "The node as a process: run, start, stop, status, logs."),
    "config": (".config", "app", "Show, check and change the configuration."),
    "identity": (".identity", "app", "This node's keys."),
    "doctor": (".doctor", "app", "Check everything; each finding with its remedy."),
    "demo": (".demo", "app", "A throw-away mesh on this machine, with real tasks through the whole market."),
    "completion": (".completion", "app", "Shell completion for bash, zsh, fish or PowerShell."),
    "version": (".version", "version", "Version, protocol, Python and platform."),
    "_worker": (".worker", "serve", ""),
}
HIDDEN = {"_worker"}

Click = Any
"""typer carries click inside itself from 0.28 on; its classes are reached through typer's own names."""

# BadParameter is a UsageError is a ClickException, in typer's own copy of click as in click itself.
_CLICK_USAGE: type[Exception] = typer.BadParameter.__mro__[1]
_CLICK_ERROR: type[Exception] = _CLICK_USAGE.__mro__[1]


class Root(TyperGroup):
    """The root group: knows its commands by name and line of help, and loads one when it is named."""

    def list_commands(self, ctx: Click) -> list[str]:
        return [name for name in COMMANDS if name not in HIDDEN and _exists(name)]

    def get_command(self, ctx: Click, cmd_name: str) -> Click:
        entry = COMMANDS.get(cmd_name)
        if entry is None or not _exists(cmd_name):
            return None
        module, attribute, text = entry
        found = getattr(importlib.import_module(module, __package__), attribute)
        if not isinstance(found, typer.Typer):
            single = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
            single.command(cmd_name, cls=NodeCommand, help=text, context_settings=SETTINGS)(found)
            found = single
        command = typer.main.get_command(found)
        command.name = cmd_name
        return command

    def resolve_command(self, ctx: Click, args: list[str]) -> Click:
        name = args[0]
        if self.get_command(ctx, name) is None and not name.startswith("-"):
            from difflib import get_close_matches

            near = get_close_matches(name, self.list_commands(ctx), n=1)
            hint = f"did you mean `clawnet {near[0]}`?" if near else "`clawnet --help` shows what there is"
            raise UsageError(f"there is no command {name!r}", hint=hint)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Click, formatter: Click) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][2]) for name in self.list_commands(ctx)])


def _exists(name: str) -> bool:
    """A command whose file is not part of this build is no command."""
    return importlib.util.find_spec(COMMANDS[name][0], __package__) is not None


app = typer.Typer(
    cls=Root,
    name="clawnet",
    help="clawnet joins your machines and agents, and those of people you invite, into one mesh and task market.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    invoke_without_command=True,
    context_settings=SETTINGS,
)


@app.callback()
def root(
    context: typer.Context,
    home: Annotated[str, typer.Option("--home", metavar="DIR", help="The node's home (CLAWNET_HOME).")] = "",
    config: Annotated[str, typer.Option("--config", metavar="FILE", help="Its configuration (CLAWNET_CONFIG).")] = "",
    log_level: Annotated[
        str, typer.Option("--log-level", metavar="LEVEL", help="debug, info, warn or error, for a daemon run here.")
    ] = "",
    no_autostart: Annotated[
        bool, typer.Option("--no-autostart", help="Never start the daemon (CLAWNET_AUTOSTART=0).")
    ] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Global options, and the program without a command."""
    invocation = here(context)
    invocation.home_flag = home or None
    invocation.config_flag = config or None
    invocation.log_level = log_level or None
    invocation.autostart = not no_autostart
    if version:
        from clawnet import __version__

        from .render import write

        write(f"clawnet {__version__}\n")
        raise typer.Exit
    if context.invoked_subcommand is None:
        from .daemon import bare

        raise typer.Exit(bare(invocation))


def main(arguments: list[str] | None = None) -> NoReturn:
    """The entry point of the program; ends the process with the exit codes of docs/CLI.md."""
    words = sys.argv[1:] if arguments is None else arguments
    if "_CLAWNET_COMPLETE" in os.environ:
        from .completion import answer

        answer(typer.main.get_command(app))
    invocation = Invocation()
    code = 70
    try:
        code = _run(words, invocation)
    except ClawnetError as error:
        code = report(error, as_json=_wants_json(words, invocation))
    except (KeyboardInterrupt, typer.Abort) as error:
        code = 128 + getattr(error, "number", 2)  # waiting.Interrupted tells which signal it was
    except BrokenPipeError:
        code = 141
    except RecursionError as error:
        code = report(DataError(f"too deeply nested: {error}"), as_json=_wants_json(words, invocation))
    except Exception as error:  # noqa: BLE001 - the last line of defence: no traceback reaches a user
        code = report(unexpected(error, invocation), as_json=_wants_json(words, invocation))
    leave(code)


def _run(words: list[str], invocation: Invocation) -> int:
    """Reads the command line and does what it says. Errors of the command line become UsageError."""
    command = typer.main.get_command(app)
    try:
        with command.make_context("clawnet", list(words), obj=invocation) as context:
            result = command.invoke(context)
            return result if isinstance(result, int) else 0
    except typer.Exit as done:
        return done.exit_code
    except _CLICK_ERROR as error:
        named = getattr(error, "ctx", None)
        path = named.command_path if named is not None else "clawnet"
        message = error.format_message()  # type: ignore[attr-defined]
        raise UsageError(message.strip().rstrip("."), hint=f"`{path} --help` shows what there is") from error


def _wants_json(words: list[str], invocation: Invocation) -> bool:
    """Also true when the command line could not be read as far as --json."""
    before = words[: words.index("--")] if "--" in words else words
    return invocation.json or "--json" in before


def report(error: ClawnetError, *, as_json: bool = False) -> int:
    """Says on stderr what happened and what to do next, in one or two lines; returns the exit code."""
    from .render import clean, json_line

    if sys.stderr is None:
        return error.exit_code
    if as_json:
        text = json_line({"error": error.as_dict()})
    else:
        message = " ".join(clean(line) for line in error.message.splitlines())
        text = f"clawnet: {message}\n" + (f"  {clean(error.hint)}\n" if error.hint else "")
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except (OSError, UnicodeError):
        return error.exit_code
    return error.exit_code


def unexpected(error: Exception, invocation: Invocation) -> InternalError:
    """A defect: its traceback goes to the log under an id, which is what the user is told."""
    import secrets
    import time
    import traceback

    number = secrets.token_hex(4)
    log = invocation.home.log_file
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    text = "".join(traceback.format_exception(error))
    try:
        log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with os.fdopen(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "a", encoding="utf-8") as file:
            file.write(f"{stamp} error command.failed id={number} argv0={sys.argv[0]!r}\n{text}")
        hint = f"look up {number} in {log}"
    except OSError as unwritable:
        hint = f"the traceback could not be written to {log} ({unwritable.strerror})"
    return InternalError(f"internal error {number}: {type(error).__name__}: {error}", hint=hint, id=number)


def leave(code: int) -> NoReturn:
    """Ends the process; a stdout that nobody reads any longer must not raise once more while Python shuts down."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            code = code or 141
    sys.exit(code)
