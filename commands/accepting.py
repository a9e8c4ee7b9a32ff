"""Acceptance contracts on the command line: the files that --accept names are read here, and the outcome is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from clawnet import limits, units
from clawnet.errors import DataError, NotFoundError

from . import modules
from .render import clean

KINDS = ("exit", "sha256", "schema", "test", "wasm")
HINT = "exit:0, sha256:HEX, schema:FILE, test:COMMAND or wasm:MODULE"


def conditions(items: Any, where: str = "--accept") -> Any:
    """The conditions as the node takes them: schemas read, modules by their whole paths. Raises NotFoundError (66) or
    DataError (65). What is no text, as a spec file may have it, is for the node to judge."""
    if isinstance(items, (str, dict)):
        items = [items]
    return [_condition(item, where) for item in items] if isinstance(items, (list, tuple)) else items


def _condition(item: Any, where: str) -> Any:
    if isinstance(item, dict):
        if isinstance(item.get("wasm"), str):
            return {**item, "wasm": modules.checked(item["wasm"])}
        return item
    if not isinstance(item, str):
        return item
    kind, colon, rest = item.partition(":")
    if not colon or kind not in KINDS or not rest:
        raise DataError(f"{where} {item!r} is no condition", hint=HINT)
    if kind == "schema":
        return {"schema": _schema(rest), "name": rest}
    return {"wasm": modules.checked(rest)} if kind == "wasm" else item


def _schema(name: str) -> Any:
    from .submission import parse_json

    try:
        with Path(name).expanduser().open("rb") as file:
            data = file.read(limits.CONTRACT_VALUE_BYTES_MAX + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError(f"there is no file {name}", path=name) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"cannot read the schema {name}: {getattr(error, 'strerror', None) or error}") from error
    if len(data) > limits.CONTRACT_VALUE_BYTES_MAX:
        raise DataError(f"the schema {name} is longer than {units.format_size(limits.CONTRACT_VALUE_BYTES_MAX)}")
    try:
        found = parse_json(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"the schema {name} is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{name}, line {error.lineno}, column {error.colno}: not valid JSON: {error.msg}") from error
    except ValueError as error:
        raise DataError(f"{name}: not valid JSON: {error}") from error
    except RecursionError as error:
        raise DataError(f"the schema {name} is nested too deeply") from error
    if not isinstance(found, (dict, bool)):
        raise DataError(f"{name} holds no JSON Schema", hint="a schema is an object, true or false")
    return found


def lines(task: dict[str, Any]) -> list[tuple[str, str]]:
    """The contract as `market show` tells it: each condition, how it came out, by whose word, and why."""
    rows: list[tuple[str, str]] = []
    for one in task.get("acceptance") or []:
        by = f" by the {one['judged_by']}'s word" if one["judged_by"] == "executor" else ""
        told = f"{one['value']}  {one['outcome'].replace('_', ' ')}{by}"
        rows.append(("accept", told + (f": {one['detail']}" if one["detail"] else "")))
        rows += [("verifier", clean(line)) for line in one["stderr"].splitlines()[-_SHOWN_LINES:]]
    return rows


_SHOWN_LINES = 20
