"""JSON Schema, as acceptance contracts use it. Runs in the worker process, where its time and memory are bounded.

No schema makes this fetch anything: a `$ref` leads into the schema itself or to a published dialect, or nowhere. What
`format` says is not judged. Of a dialect unknown here (`$schema`) nothing is assumed.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, Final

_SHOWN_CHARS: Final = 300
_DIGITS_MAX: Final = 400


class Unusable(Exception):
    """Nobody can judge by this schema; the text says why."""


class _NoJson(Exception):
    """The text says why it is none."""


def check(schema: bytes) -> str:
    """Why this is no JSON Schema that can be judged by; "" when it is one."""
    try:
        _validator(schema)
    except Unusable as error:
        return str(error)
    return ""


def judge(schema: bytes, answer: bytes) -> str:
    """Why this answer does not pass; "" when it does. Raises Unusable for a schema that nobody can judge by."""
    from referencing.exceptions import Unresolvable

    validator = _validator(schema)
    try:
        error = next(validator.iter_errors(_json(answer)), None)
    except _NoJson as failure:
        return f"it is no JSON: {failure}"
    except RecursionError:
        return "it is nested too deeply, or the schema refers to itself without end"
    except ArithmeticError:
        return "it holds a number that the schema's arithmetic does not reach"
    except Unresolvable:
        raise Unusable("the schema refers to what is not in it") from None
    if error is None:
        return ""
    return f"at {_shown(error.json_path, 100)}: {_shown(error.message)}"


def _shown(text: Any, most: int = _SHOWN_CHARS) -> str:
    told = str(text).encode("utf-8", "backslashreplace").decode()
    return told if len(told) <= most else told[: most - 1] + "…"


def _json(data: bytes) -> Any:
    """JSON alone: no NaN, no infinity, no number without end, no name given twice."""

    def constant(name: str) -> Any:
        raise _NoJson(f"{name} is no number of it")

    def whole(digits: str) -> int:
        if len(digits) > _DIGITS_MAX:
            raise _NoJson(f"a number has {len(digits)} digits")
        return int(digits)

    def real(digits: str) -> float:
        if not math.isfinite(value := float(digits)):
            raise _NoJson(f"the number {_shown(digits, 40)} is too large")
        return value

    def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise _NoJson("a name is given twice in one object")
        return found

    try:
        return json.loads(
            data.decode(), parse_constant=constant, parse_int=whole, parse_float=real, object_pairs_hook=each_once
        )
    except UnicodeDecodeError:
        raise _NoJson("it is not UTF-8") from None
    except ValueError as error:
        raise _NoJson(str(error)) from None


def _validator(schema: bytes) -> Any:
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import validator_for
    from jsonschema_specifications import REGISTRY
    from referencing import Resource
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012

    try:
        value = _json(schema)
    except (_NoJson, RecursionError) as error:
        raise Unusable(f"the schema is no JSON: {error}") from None
    if not isinstance(value, (dict, bool)):
        raise Unusable("the schema is not an object, true or false")
    dialect = value.get("$schema") if isinstance(value, dict) else None
    cls: Any = Draft202012Validator
    if dialect is not None:
        cls = validator_for(value, default=None) if isinstance(dialect, str) else None
        if cls is None:
            raise Unusable(f"the schema is of a dialect unknown here: {_shown(dialect, 100)}")
    try:
        cls.check_schema(value)
    except SchemaError as error:
        raise Unusable(f"the schema is none: at {_shown(error.json_path, 100)}: {_shown(error.message)}") from None
    except (RecursionError, re.error) as error:
        raise Unusable(f"the schema is none: {error}") from None
    resource = Resource.from_contents(value, default_specification=DRAFT202012)
    registry = REGISTRY.with_resource(resource.id() or "", resource)
    todo = [(registry.resolver_with_root(resource), resource)]
    while todo:
        resolver, part = todo.pop()
        if isinstance(part.contents, dict):
            for word in ("$ref", "$dynamicRef"):
                ref = part.contents.get(word)
                if isinstance(ref, str):
                    try:
                        resolver.lookup(ref)
                    except Unresolvable:
                        raise Unusable(f"the schema refers to {_shown(ref, 100)}, which is not in it") from None
        todo += [(resolver.in_subresource(inner), inner) for inner in part.subresources()]
    return cls(value, registry=registry)
