"""The generated parts of docs/: blocks between markers in the pages, and docs/schema/. Run through scripts/gen-docs.

A block is what stands between `<!-- generated: NAME -->` and `<!-- end of NAME -->`; everything else in a page is
written by hand. `rendered()` is the single truth, for writing and for the test that compares.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import typer
from msgspec import inspect as shapes

from clawnet import errors, limits
from clawnet.answers import ANSWERS
from clawnet.commands.app import app
from clawnet.config_keys import KEYS, SECTIONS
from clawnet.ledger import entries, statements
from clawnet.ledger.taskdoc import TaskDocument, TaskInput
from clawnet.market import states
from clawnet.market.reasons import MEANING
from clawnet.net.blobs import BlobAnswer, BlobRequest
from clawnet.observe.metrics import FIGURES, PREFIX
from clawnet.wire import batch, envelope, messages, session

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = ("CLI.md", "PROTOCOL.md", "LEDGER.md", "OPERATIONS.md")
COMMON_OPTIONS = ("--json", "-q, --quiet", "-v, --verbose", "--timeout DURATION", "--help", "-h, --help")
_BLOCK = re.compile(r"(<!-- generated: ([a-z-]+) -->\n)(.*?)(<!-- end of \2 -->)", re.DOTALL)


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; a bar inside a cell is escaped."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def told(thing: Any) -> str:
    """A docstring as one line."""
    return " ".join(inspect.cleandoc(thing.__doc__ or "").split())


# --- the command line


class Command(msgspec.Struct):
    """One command as its own help tells it."""

    path: str
    usage: str
    text: str
    arguments: list[tuple[str, str]]
    options: list[tuple[str, str]]
    is_group: bool


def commands() -> list[Command]:
    """Every command, groups before what is in them, in the order of the help."""
    root = typer.main.get_command(app)
    return list(_walk(root, root.context_class(root, info_name="clawnet")))


def _walk(command: Any, context: Any) -> Iterator[Command]:
    arguments: list[tuple[str, str]] = []
    options: list[tuple[str, str]] = []
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None:
            kind = arguments if parameter.param_type_name == "argument" else options
            kind.append((record[0], record[1]))
    children = command.list_commands(context) if hasattr(command, "list_commands") else []
    pieces = [piece for piece in command.collect_usage_pieces(context) if piece]
    text = inspect.cleandoc(command.help or "")
    usage = " ".join([context.command_path, *pieces])
    yield Command(context.command_path, usage, text, arguments, options, bool(children))
    for name in children:
        child = command.get_command(context, name)
        if child is not None and not child.hidden:
            yield from _walk(child, child.context_class(child, info_name=name, parent=context))


def command_pages() -> str:
    """Each command: usage, what it does, its arguments and options."""
    parts: list[str] = []
    for command in commands():
        parts.append(f"### `{command.path}`\n\n    {command.usage}\n\n{command.text}\n")
        rows = [[f"`{name}`", text] for name, text in command.arguments if text]
        rows += [[f"`{name}`", text] for name, text in command.options if name not in COMMON_OPTIONS]
        if rows:
            parts.append(table(["argument or option", "meaning"], rows))
        name = command.path.removeprefix("clawnet ")
        if name in ANSWERS:
            parts.append(f"With `--json`: [{schema_name(name)}](schema/{schema_name(name)}).\n")
    return "\n".join(parts)


def _error_classes() -> list[type[errors.ClawnetError]]:
    found = [
        value
        for value in vars(errors).values()
        if inspect.isclass(value) and issubclass(value, errors.ClawnetError) and value is not errors.ClawnetError
    ]
    return sorted(found, key=lambda cls: (cls.exit_code, cls.code))


def exit_codes() -> str:
    """The exit codes of the error classes, with the word that `--json` carries."""
    rows = [[str(cls.exit_code), f"`{cls.code}`", told(cls).partition(" `wire_code`")[0]] for cls in _error_classes()]
    return table(["code", "`error.code`", "meaning"], rows)


# --- the protocol


def shape(kind: shapes.Type) -> str:
    """A field's type in words."""
    match kind:
        case shapes.IntType(ge=low, le=high, gt=above, lt=below):
            if above is not None:
                low = above + 1
            if below is not None:
                high = below - 1
            return "integer" if low is None else f"integer {_bound(low)} to {_bound(high)}"
        case shapes.FloatType(ge=low, le=high):
            return f"number {low} to {high:g}" if high is not None else "number"
        case shapes.BytesType(min_length=low, max_length=high):
            return f"{low} bytes" if low == high and low is not None else f"bytes, at most {high}" if high else "bytes"
        case shapes.StrType(max_length=high):
            return f"text, at most {high} characters" if high else "text"
        case shapes.BoolType():
            return "true or false"
        case shapes.NoneType():
            return "null"
        case shapes.ListType(item_type=item, min_length=low, max_length=high):
            count = f"{low} to {high} of" if low else f"at most {high} of" if high else "list of"
            return f"{count} ({shape(item)})"
        case shapes.UnionType(types=types):
            return " or ".join(shape(one) for one in sorted(types, key=lambda one: isinstance(one, shapes.NoneType)))
        case shapes.LiteralType(values=values):
            return " or ".join(f'"{value}"' for value in values)
        case shapes.StructType(cls=cls):
            return cls.__name__
        case shapes.RawType():
            return "MessagePack"
    raise TypeError(f"no words for {kind}")


def _bound(value: int | None) -> str:
    if value is None:
        return "2^64-1"
    power = value.bit_length()
    return f"2^{power}-1" if value > 65_535 and value == 2**power - 1 else str(value)


def struct(cls: type[Any], number: str = "") -> str:
    """One struct: its promise and its fields in order."""
    info = shapes.type_info(cls)
    assert isinstance(info, shapes.StructType)
    title = f"**{cls.__name__}**" + (f" ({number})" if number else "")
    fields = "\n".join(f"{n}. `{field.encode_name}`: {shape(field.type)}" for n, field in enumerate(info.fields))
    return f"{title}. {told(cls)}\n\n{fields or '(no fields)'}\n"


def message_table() -> str:
    """All kinds, built or reserved."""
    rows = []
    for kind in messages.Kind:
        payload = messages.PAYLOADS.get(kind)
        what = "reserved; not accepted in this version"
        if payload is not None:
            what = told(payload).split(". ")[0].rstrip(".")
        rows.append([str(kind.value), f"`{kind.name}`", payload.__name__ if payload else "-", what])
    return table(["no", "kind", "payload", "what it says"], rows)


def message_fields() -> str:
    """Payloads in the order of their kinds, then what they contain."""
    parts = [struct(payload, f"{kind.name} = {kind.value}") for kind, payload in messages.PAYLOADS.items()]
    inner = (messages.PeerCard, messages.Requirements, messages.Head)
    return "\n".join([*parts, *(struct(cls) for cls in inner)])


def framing() -> str:
    """What lies around payloads."""
    return "\n".join(struct(cls) for cls in (session.SignedHello, batch.Batch, envelope.Envelope, batch.Evidence))


def join_structs() -> str:
    """The join stream's."""
    return "\n".join(struct(cls) for cls in (messages.JoinAsk, messages.JoinAnswer, messages.JoinPeer))


def blob_structs() -> str:
    """The blob stream's."""
    return "\n".join(struct(cls) for cls in (BlobRequest, BlobAnswer))


def document_structs() -> str:
    """The task document's."""
    return "\n".join(struct(cls) for cls in (TaskDocument, TaskInput))


WIRE_ERRORS = {
    100: "invalid format",
    101: "invalid signature",
    102: "too old",
    103: "rate limit",
    200: "task not found",
    201: "insufficient funds",
    202: "bid too low",
    203: "auction closed",
    300: "escrow not found",
    301: "escrow expired",
    302: "verification failed",
}
"""The numbers that the protocol keeps; those with a class in errors.py are in use."""


def wire_errors() -> str:
    """The error numbers."""
    used: dict[int, str] = {}
    for cls in _error_classes():
        if issubclass(cls, errors.RemoteError) and cls not in (errors.RemoteError, errors.LinkError):
            used[cls.wire_code] = told(cls).removesuffix(f" (code {cls.wire_code}).") + "."
    assert set(used) <= set(WIRE_ERRORS)
    rows = [[str(number), text, used.get(number, "reserved")] for number, text in WIRE_ERRORS.items()]
    return table(["no", "name", "in this version"], rows)


def decline_reasons() -> str:
    """The words of TASK_DECLINE."""
    return table(["word", "meaning"], [[f"`{reason.value}`", text] for reason, text in MEANING.items()])


def limit_table() -> str:
    """limits.py, with its sections."""
    source = Path(limits.__file__).read_text()
    rows: list[list[str]] = []
    section = ""
    for line in source.splitlines():
        if line.startswith("# --- "):
            section = line[6:].partition(" (")[0]
        name, _, _ = line.partition(": Final")
        if name.isidentifier() and name.isupper() and name not in ("KIB", "MIB"):
            rows.append([section, f"`{name}`", _amount(name, getattr(limits, name))])
    return table(["part", "limit", "value"], rows)


def _amount(name: str, value: float) -> str:
    if "BYTES" in name and value >= limits.KIB and value % limits.KIB == 0:
        return f"{value // limits.MIB:g} MiB" if value % limits.MIB == 0 else f"{value // limits.KIB:g} KiB"
    if name.endswith("_MS") or "_MS_" in name:
        if value < 1000:
            return f"{value:g} ms"
        return f"{value / 86_400_000:g} d" if value >= 7 * 86_400_000 else f"{value / 1000:,g} s"
    if re.search(r"_S(_MAX)?$", name) and not name.endswith("PER_S"):
        return f"{value:,g} s"
    return f"{value:,}"


def diagram(machine: str) -> Callable[[], str]:
    """A state machine, with what its states mean."""

    def render() -> str:
        return f"```mermaid\n{states.mermaid(machine)}```\n"

    return render


# --- the ledger


def entry_kinds() -> str:
    """The kinds of entries."""
    rows = []
    for kind in entries.EntryKind:
        body = entries.BODIES.get(kind)
        what = told(body) if body else "a later increment: recognised, never judged (the audit stops before it)"
        rows.append([str(kind.value), kind.name.lower(), what])
    return table(["no", "kind", "what it says"], rows)


def entry_structs() -> str:
    """Header, bodies, items."""
    inner = (entries.LockLine, entries.ReleaseItem, entries.RefundItem, entries.ClaimItem, entries.Proof)
    return "\n".join(struct(cls) for cls in (entries.Entry, *entries.BODIES.values(), *inner))


def statement_structs() -> str:
    """Signed statements, with the tag that their signature covers."""
    kinds = (statements.Note, statements.Waiver, statements.Countersign)
    return "\n".join(struct(cls, f"tag `{cls.TAG.decode()}`") for cls in kinds)


# --- operations


def config_keys() -> str:
    """Every key, section by section."""
    parts: list[str] = []
    for section, meaning in SECTIONS.items():
        keys = [key for key in KEYS.values() if key.section == section]
        rows = []
        for key in keys:
            if key.unbuilt:
                rows.append([f"`{key.name}`", "-", f"refused: {key.unbuilt}", "-", "-"])
                continue
            refused = "".join(f" ({value}: {reason})" for value, reason in key.refused)
            default = f"`{key.default}`" if key.default else "(empty)"
            rows.append([f"`{key.name}`", default, key.meaning, key.allowed + refused, key.apply])
        if rows:
            head = ["key", "default", "meaning", "allowed", "takes effect"]
            parts.append(f"**{section}**: {meaning}\n\n" + table(head, rows))
    return "\n".join(parts)


def metrics() -> str:
    """The names of the exporter."""
    rows = []
    for name, figure in FIGURES.items():
        label = f"{{{figure.label}}}" if figure.label else ""
        rows.append([f"`{PREFIX}{name}{label}`", "counter" if name.endswith("_total") else "gauge", figure.meaning])
    return table(["name", "type", "meaning"], rows)


BLOCKS: dict[str, Callable[[], str]] = {
    "commands": command_pages,
    "exit-codes": exit_codes,
    "message-table": message_table,
    "message-fields": message_fields,
    "framing": framing,
    "join": join_structs,
    "blob": blob_structs,
    "task-document": document_structs,
    "wire-errors": wire_errors,
    "decline-reasons": decline_reasons,
    "limits": limit_table,
    "states-task": diagram("task"),
    "states-attempt": diagram("attempt"),
    "states-job": diagram("job"),
    "entry-kinds": entry_kinds,
    "entry-structs": entry_structs,
    "statements": statement_structs,
    "config-keys": config_keys,
    "metrics": metrics,
}


def schema_name(command: str) -> str:
    """The file of a command's schema."""
    return command.replace(" ", "-") + ".json"


def schema(command: str) -> str:
    """The JSON Schema of what a command prints with --json (draft 2020-12)."""
    found = msgspec.json.schema(ANSWERS[command])
    title = command if command in ("error", "stream") else f"clawnet {command} --json"
    whole = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": title, **_one_line(found)}
    return json.dumps(whole, indent=2, ensure_ascii=False) + "\n"


def _one_line(node: Any) -> Any:
    """The same schema with descriptions on one line: how docstrings are indented depends on Python's version."""
    if isinstance(node, dict):
        flat = {name: _one_line(value) for name, value in node.items()}
        if isinstance(node.get("description"), str):
            flat["description"] = " ".join(node["description"].split())
        return flat
    return [_one_line(item) for item in node] if isinstance(node, list) else node


def rendered() -> dict[Path, str]:
    """Every generated file and every page with generated blocks, as it should be now."""
    found = {DOCS / "schema" / schema_name(command): schema(command) for command in ANSWERS}
    for name in PAGES:
        page = (DOCS / name).read_text()
        found[DOCS / name] = _BLOCK.sub(_fill, page)
    return found


def _fill(match: re.Match[str]) -> str:
    return f"{match[1]}\n{BLOCKS[match[2]]().rstrip()}\n\n{match[4]}"


def stale() -> list[str]:
    """The files that are not what the code says, and schemas of commands that are no more."""
    wanted = rendered()
    wrong = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    wrong += [path for path in (DOCS / "schema").glob("*.json") if path not in wanted]
    return sorted(path.relative_to(DOCS.parent).as_posix() for path in wrong)


def main(arguments: list[str]) -> int:
    """Writes, or with --check tells what is stale."""
    if arguments not in ([], ["--check"]):
        print("gen-docs [--check]", file=sys.stderr)
        return 64
    found = stale()
    if arguments:
        for name in found:
            print(f"stale: {name} (scripts/gen-docs writes it)", file=sys.stderr)
        return int(bool(found))
    wanted = rendered()
    (DOCS / "schema").mkdir(exist_ok=True)
    for name in found:
        path = DOCS.parent / name
        if path in wanted:
            path.write_text(wanted[path])
        else:
            path.unlink()
        print(name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
