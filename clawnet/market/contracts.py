"""Acceptance contracts: from a submission's conditions to the task document's, back, and in words. Pure.

A condition is written as text, "exit:0", "sha256:H", "test:CMD", or as an object with one of these names; schemas and
modules are objects, for a client has read or named their files: {"schema": {...}}, {"wasm": "/path/of/module"}.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import msgspec
from msgspec import Struct

from clawnet import limits
from clawnet.errors import DataError, WireError
from clawnet.wire import verdict as v
from clawnet.wire.jobspec import InputRef
from clawnet.wire.verdict import Check

WORDS: Final = {
    "exit": v.EXIT_CODE,
    "sha256": v.OUTPUT_SHA256,
    "schema": v.OUTPUT_SCHEMA,
    "test": v.VERIFIER_COMMAND,
    "wasm": v.VERIFIER_WASM,
}
HINT: Final = "exit:0, sha256:HEX, schema:FILE, test:COMMAND or wasm:MODULE"
SHELL: Final = "shell-execution"
WASM: Final = "wasm"


class Accept(Struct, frozen=True):
    """One condition of a submission: `text` for people, `value` as the task document holds it.

    `path` is the file of a verifier module, which travels as the input `value`.
    """

    kind: str
    text: str
    value: bytes
    path: str = ""


def _bad(text: str, what: str, hint: str = HINT) -> DataError:
    return DataError(f"acceptance condition {_short(text)!r}: {what}", hint=hint, field="accept")


def _short(text: str, most: int = 200) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


# --- from a submission


def read(accept: Any) -> list[Accept]:
    """The conditions of a submission; raises DataError (65) for the first that is none."""
    items = [] if accept is None else [accept] if isinstance(accept, (str, dict)) else accept
    if not isinstance(items, list) or len(items) > limits.CONTRACT_CONDITIONS_MAX:
        raise DataError(
            f"accept is not a list of at most {limits.CONTRACT_CONDITIONS_MAX} conditions", hint=HINT, field="accept"
        )
    return [_one(item, number) for number, item in enumerate(items, 1)]


def _one(item: Any, number: int) -> Accept:
    name = ""
    if isinstance(item, dict):
        name = item.get("name", "")
        rest = [(word, given) for word, given in item.items() if word != "name"]
        if len(rest) != 1 or not isinstance(name, str):
            raise _bad(str(item), "it is not one condition")
        ((word, given),) = rest
    elif isinstance(item, str):
        word, colon, given = item.partition(":")
        if not colon:
            raise _bad(item, "it has no kind")
        if word in ("schema", "wasm"):
            raise _bad(item, "the client reads this file", '{"schema": {...}} or {"wasm": "/path"} in a submission')
    else:
        raise _bad(str(item), "it is neither text nor an object")
    reader = _READERS.get(word)
    if reader is None:
        raise _bad(f"{word}:{given}", "there is no such kind of condition")
    return reader(given, name, number)


def _exit(given: Any, name: str, number: int) -> Accept:
    text = str(given) if isinstance(given, int) and not isinstance(given, bool) else given
    if not isinstance(text, str) or not text.isascii() or not text.isdigit() or len(text) > 3 or int(text) > 255:
        raise _bad(f"exit:{given}", "an exit code is a number from 0 to 255")
    return Accept(v.EXIT_CODE, f"exit:{int(text)}", str(int(text)).encode())


def _sha256(given: Any, name: str, number: int) -> Accept:
    if not isinstance(given, str) or re.fullmatch("[0-9a-fA-F]{64}", given) is None:
        raise _bad(f"sha256:{given}", "a SHA-256 is 64 hexadecimal digits", "sha256sum FILE prints one")
    return Accept(v.OUTPUT_SHA256, f"sha256:{given.lower()}", bytes.fromhex(given))


def _schema(given: Any, name: str, number: int) -> Accept:
    text = f"schema:{_short(name, 80)}" if name else "schema"
    if not isinstance(given, (dict, bool)):
        raise _bad(text, "a JSON Schema is an object, true or false")
    try:
        value = msgspec.json.encode(given)
    except (TypeError, ValueError, RecursionError) as error:
        raise _bad(text, f"it is no JSON: {error}") from error
    if len(value) > limits.CONTRACT_VALUE_BYTES_MAX:
        raise _bad(text, f"it is {len(value)} bytes, above the limit of {limits.CONTRACT_VALUE_BYTES_MAX}", "")
    return Accept(v.OUTPUT_SCHEMA, text, value)


def _test(given: Any, name: str, number: int) -> Accept:
    if not isinstance(given, str) or not given.strip() or "\0" in given:
        raise _bad(f"test:{given}", "a verifier is a shell command", "test:grep -q PASSED")
    try:
        value = msgspec.msgpack.encode({"script": given})
    except UnicodeEncodeError as error:
        raise _bad("test:…", "it is not UTF-8", "") from error
    if len(value) > limits.CONTRACT_VALUE_BYTES_MAX:
        raise _bad(f"test:{given}", f"it is longer than {limits.CONTRACT_VALUE_BYTES_MAX} bytes", "use wasm: or less")
    return Accept(v.VERIFIER_COMMAND, f"test:{_short(given)}", value)


def _wasm(given: Any, name: str, number: int) -> Accept:
    if not isinstance(given, str) or not given or "\0" in given:
        raise _bad(f"wasm:{given}", "it names no file")
    base = given.rstrip("/").rpartition("/")[2]
    return Accept(v.VERIFIER_WASM, f"wasm:{_short(base, 80)}", f"accept-{number}.wasm".encode(), given)


_READERS: Final = {"exit": _exit, "sha256": _sha256, "schema": _schema, "test": _test, "wasm": _wasm}


def modules(found: Iterable[Accept]) -> list[dict[str, str]]:
    """The verifier modules as inputs of the submission."""
    return [{"name": one.value.decode(), "path": one.path} for one in found if one.path]


def needs(found: Iterable[Accept]) -> list[str]:
    """The capabilities an executor needs to judge it."""
    kinds = {one.kind for one in found}
    wanted = {v.VERIFIER_COMMAND: SHELL, v.VERIFIER_WASM: WASM}
    return sorted(word for kind, word in wanted.items() if kind in kinds)


def schemas(spec: Mapping[str, Any]) -> tuple[tuple[str, bytes], ...]:
    """(text, schema) of the schemas of a normalised submission, which somebody with a clock looks at."""
    return tuple((one["text"], one["value"]) for one in spec["accept"] if one["kind"] == v.OUTPUT_SCHEMA)


def told(spec: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The conditions without their values, which the task document holds: what a task's own row keeps of them."""
    return [{"kind": one["kind"], "text": one["text"]} for one in spec["accept"]]


def files(inputs: Sequence[dict[str, Any]], spec: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The inputs of a submission that are not its verifier modules."""
    names = verifier_names((one["kind"], one["value"]) for one in spec["accept"])
    return [item for item in inputs if item["name"] not in names]


# --- from a task document


def checks(conditions: Sequence[tuple[str, bytes]], inputs: Mapping[str, InputRef]) -> tuple[Check, ...]:
    """What execution judges by; raises WireError for a condition of no known kind or form (it came from a peer)."""
    return tuple(_check(kind, value, inputs) for kind, value in conditions)


def _check(kind: str, value: bytes, inputs: Mapping[str, InputRef]) -> Check:
    if kind == v.EXIT_CODE and value.isdigit() and len(value) <= 3 and int(value) <= 255:
        return Check(kind, value)
    if kind == v.OUTPUT_SHA256 and len(value) == 32:
        return Check(kind, value)
    if kind == v.OUTPUT_SCHEMA:
        return Check(kind, value)
    if kind == v.VERIFIER_COMMAND:
        return Check(kind, argv=command_of(value))
    if kind == v.VERIFIER_WASM:
        module = inputs.get(value.decode("utf-8", "replace"))
        if module is not None and module.kind == "file":
            return Check(kind, module=module)
    raise WireError(f"a condition that cannot be judged: {kind[:40]!r}")


def command_of(value: bytes) -> tuple[str, ...]:
    """The verifier command as argv; raises WireError for what is none."""
    try:
        found = msgspec.msgpack.decode(value, type=_Command)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise WireError(f"not a verifier command: {error}") from error
    argv = found.argv if found.argv is not None else ["sh", "-c", found.script or "", "sh"]
    if not argv or not argv[0] or argv[0].startswith("-") or any("\0" in word for word in argv):
        raise WireError("not a verifier command")
    return tuple(argv)


class _Command(Struct, forbid_unknown_fields=True):
    argv: list[str] | None = None
    script: str | None = None


def verifier_names(conditions: Iterable[tuple[str, bytes]]) -> frozenset[str]:
    """The inputs that are verifier modules: no files of the task."""
    return frozenset(value.decode("utf-8", "replace") for kind, value in conditions if kind == v.VERIFIER_WASM)


# --- in words


def sentence(text: str, one: v.Judged) -> str:
    """Why a result did not pass, in one line."""
    said = one.stderr.decode("utf-8", "replace").strip().rpartition("\n")[2].strip()
    return f"{_short(text, 80)}: {one.detail}" + (f'; it said: "{_short(said)}"' if said else "")
