"""From options, a spec file and standard input to the task that is submitted. Shared by `run` and `market submit`."""

from __future__ import annotations

import base64
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from clawnet import limits, money, units
from clawnet.api import Client
from clawnet.errors import DataError, NotFoundError, UsageError

from . import accepting, modules
from .piped import Piped, standard_input

TYPES = ("prompt", "shell", "compute")
LATER = ("storage", "swarm")
T = TypeVar("T")
R = TypeVar("R")
WIRE_NAMES = {"shell_task": "shell", "openclaw_prompt": "prompt", "swarm_ai": "swarm"}


def task_type(text: str) -> str:
    """A task type by either name; raises UsageError for one that does not exist (yet)."""
    kind = WIRE_NAMES.get(text, text)
    if kind in LATER:
        raise UsageError(f"{kind} tasks come with a later version", hint="use --type prompt, shell or compute")
    if kind not in TYPES:
        raise UsageError(f"there is no task type {text!r}", hint="use --type prompt, shell or compute")
    return kind


def environment(pairs: list[str]) -> dict[str, str]:
    """K=V options as an object."""
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise DataError(f"--env {pair!r} is not NAME=VALUE")
        found[name] = value
    return found


def inputs(texts: list[str]) -> list[dict[str, str]]:
    """[NAME=]PATH options; a path that is there goes before a NAME= reading. Raises NotFoundError, DataError."""
    found: list[dict[str, str]] = []
    for text in texts:
        name, equals, rest = text.partition("=")
        named = bool(equals) and bool(name) and "/" not in name and not os.path.lexists(text)
        path = Path(rest if named else text).expanduser().absolute()
        try:
            path = path.resolve(strict=True)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise NotFoundError(f"there is no file or directory {path}", path=str(path)) from error
        except (OSError, RuntimeError) as error:
            raise DataError(f"cannot read {path}: {error}") from error
        entry = {"name": name if named else (path.name or "root"), "path": str(path)}
        if any(other["name"] == entry["name"] for other in found):
            raise UsageError(f"two inputs are named {entry['name']!r}", hint="give one another name: --input NAME=PATH")
        found.append(entry)
    return found


def described(argument: str | None, *, no_stdin: bool) -> tuple[str, Piped | None]:
    """The description and what else stdin holds: `-` reads the description itself from there."""
    if argument == "-":
        data = standard_input()
        if data is None:
            raise UsageError("- reads the description from standard input, which is neither a file nor a pipe")
        try:
            return data.whole().decode(), None
        except UnicodeDecodeError as error:
            raise DataError("the description on standard input is not UTF-8") from error
    return argument or "", standard_input(wanted=not no_stdin)


# --- a whole task as JSON or YAML


def from_file(name: str) -> dict[str, Any]:
    """The task in a --spec file, or `-`; people's spellings (deadline: 5m, memory: 2GiB) become the protocol's."""
    text = _read(name)
    try:
        value = parse_json(text)
    except ValueError as error:
        value = _yaml(name, text, error)
    except RecursionError as error:
        raise DataError(f"{name} is nested too deeply") from error
    if not isinstance(value, dict):
        raise DataError(f"{name} does not hold one task (an object)", hint="see docs/CLI.md, --spec")
    return spelled_out(name, value)


def parse_json(text: str | bytes) -> Any:
    """JSON; raises ValueError also for what its readers disagree on: a name given twice, half of a surrogate pair."""
    value = json.loads(text, object_pairs_hook=_each_once)
    if (b"\\u" if isinstance(text, bytes) else "\\u") in text:  # type: ignore[operator]
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start : error.start + 1].encode("ascii", "backslashreplace").decode()
            raise ValueError(f"{half} is half of a character") from error
    return value


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (again, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{again!r} is given twice")
    return found


def _read(name: str) -> str:
    try:
        if name == "-":
            data = sys.stdin.buffer.read(limits.TASK_DOCUMENT_BYTES_MAX + 1) if sys.stdin is not None else b""
        else:
            with Path(name).open("rb") as file:
                data = file.read(limits.TASK_DOCUMENT_BYTES_MAX + 1)
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no file {name}") from error
    except OSError as error:
        raise DataError(f"cannot read {name}: {error.strerror}") from error
    if len(data) > limits.TASK_DOCUMENT_BYTES_MAX:
        raise DataError(f"{name} is longer than {units.format_size(limits.TASK_DOCUMENT_BYTES_MAX)}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8") from error


def _yaml(name: str, text: str, first: ValueError) -> Any:
    if text.lstrip().startswith("{"):
        raise DataError(f"{name} is not valid JSON: {first}") from first
    import yaml

    class Loader(yaml.SafeLoader):
        """Refuses a name that is given twice, of which YAML's readers take now the first, now the last."""

        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                    raise yaml.MarkedYAMLError(problem=f"{key.value!r} is given twice", problem_mark=key.start_mark)
                seen.add((key.tag, key.value) if isinstance(key, yaml.ScalarNode) else key)
            return node

    try:
        return yaml.load(text, Loader)  # noqa: S506 - a SafeLoader that refuses more
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "it cannot be read"
        raise DataError(f"{name}{where}: not valid YAML or JSON: {problem}") from error
    except RecursionError as error:
        raise DataError(f"{name} is nested too deeply") from error


def spelled_out(name: str, value: dict[str, Any]) -> dict[str, Any]:
    """People's spellings of a task's fields as the protocol's; `name` is where they stand, for the errors.

    A duration that is a number is in seconds, a size in bytes, as in all JSON of this program.
    """
    spec = {field: item for field, item in value.items() if item is not None}
    for field, target in (("deadline", "deadline_s"), ("bid_timeout", "bid_timeout_s")):
        if field in spec:
            given = spec.pop(field)
            text = isinstance(given, str)
            spec[target] = units.parse_duration_ms(given, what=f"{name}: {field}") / 1000 if text else given
    if "memory" in spec:
        given = spec.pop("memory")
        spec["memory_bytes"] = units.parse_size(given, what=f"{name}: memory") if isinstance(given, str) else given
    if "budget" in spec:
        spec["budget_ucr"] = money.parse_credits(str(spec.pop("budget")), what=f"{name}: budget")
    if isinstance(spec.get("stdin"), str):
        spec["stdin_b64"] = base64.b64encode(spec.pop("stdin").encode()).decode()
    if isinstance(spec.get("stdin_path"), str):
        spec["stdin_path"] = str(Path(spec["stdin_path"]).expanduser().absolute())
    if isinstance(spec.get("env"), dict):
        spec["env"] = {
            str(key): item if isinstance(item, str) else json.dumps(item) for key, item in spec["env"].items()
        }
    given = spec.get("inputs")
    if isinstance(given, list):
        texts = [item for item in given if isinstance(item, str)]
        objects = [item for item in given if isinstance(item, dict)]
        named = [
            f"{item['name']}={item.get('path')}" if item.get("name") else str(item.get("path")) for item in objects
        ]
        spec["inputs"] = _data(name, inputs, texts + named)
    if "accept" in spec:
        spec["accept"] = accepting.conditions(spec["accept"], f"{name}: accept")
    if isinstance(spec.get("type"), str):
        spec["type"] = _data(name, task_type, spec["type"])
    return spec


def _data(name: str, read: Callable[[T], R], given: T) -> R:
    """What stands in a file is data: where an option's value would be wrong usage, this is a DataError."""
    try:
        return read(given)
    except UsageError as error:
        hint = "" if error.hint.startswith("use --") else error.hint
        raise DataError(f"{name}: {error.message}", hint=hint or f"type is {' or '.join(TYPES)}") from error


CHOICES = {"ring": ("own", "member"), "prefer": ("market",), "os": ("linux", "darwin", "windows", "any")}


def build(base: dict[str, Any], **options: Any) -> dict[str, Any]:
    """The spec file's task with the options given on the command line over it; empty options change nothing."""
    spec = dict(base)
    texts: dict[str, Callable[[str], float]] = {
        "budget_ucr": lambda text: money.parse_credits(text, what="--budget"),
        "deadline_s": lambda text: units.parse_duration_ms(text, what="--deadline") / 1000,
        "bid_timeout_s": lambda text: units.parse_duration_ms(text, what="--bid-timeout") / 1000,
        "memory_bytes": lambda text: units.parse_size(text, what="--memory"),
    }
    for name, value in options.items():
        if value is None or value == [] or value == {} or value == "":
            continue
        if name in CHOICES and value not in CHOICES[name]:
            raise UsageError(f"--{name} cannot be {value!r}", hint=f"it is {' or '.join(CHOICES[name])}")
        spec[name] = texts[name](value) if name in texts else value
    return spec


def attach_stdin(spec: dict[str, Any], data: Piped | None) -> None:
    """Standard input becomes the task's, unless the spec has its own; a long one follows later (piped.handed_over)."""
    if data is None or not data.head or spec.get("stdin_b64") or spec.get("stdin_path"):
        return
    if not data.longer or spec.get("type") == "prompt":
        spec["stdin_b64"] = base64.b64encode(data.whole()).decode()


def complete(spec: dict[str, Any], data: Piped | None) -> None:
    """The type's own needs: something to do; a compute task without files works on its description."""
    module = modules.look(spec)
    kind = spec.setdefault("type", "prompt")
    given = data is not None and bool(data.head)
    if not (
        given
        or module
        or any(spec.get(name) for name in ("description", "argv", "script", "op", "stdin_b64", "stdin_path"))
    ):
        raise UsageError("nothing to do: give a description", hint="clawnet market submit DESCRIPTION, or - for stdin")
    if kind == "compute" and not module and not given and not spec.get("inputs") and spec.get("description"):
        data = Piped(spec["description"].encode(), longer=False)
    attach_stdin(spec, data)


def resolve_peers(client: Client, spec: dict[str, Any], say: Callable[[str], None]) -> None:
    """Names and short ids in --peer and --exclude become whole ids, which are told to the person."""
    for field in ("peer", "exclude"):
        for place, name in enumerate(spec.get(field) or []):
            try:
                found = client.call("peer.show", {"peer": name})["peer_id"]
            except DataError:
                # This node itself, which is no peer of its own and yet may be chosen or left out.
                continue
            if found != name:
                say(f"--{field} {name} is {found}")
            spec[field][place] = found
