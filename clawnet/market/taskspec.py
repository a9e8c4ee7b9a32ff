"""From a submission (JSON of CLI.md) to a normalised task specification, or a clear error. Pure."""

from __future__ import annotations

import base64
from typing import Any, Final

from clawnet import limits
from clawnet.config import Config
from clawnet.errors import DataError, NotPermittedError, UsageError
from clawnet.market import contracts
from clawnet.money import parse_credits
from clawnet.wire.globs import Globs

KINDS: Final = {"shell": "shell_task", "compute": "compute", "prompt": "openclaw_prompt"}
ALIASES: Final = {"shell_task": "shell", "openclaw_prompt": "prompt", "swarm_ai": "swarm"}
LATER: Final = {"storage": "storage tasks", "swarm": "swarm tasks"}
OPERATIONS: Final = ("sha256", "sort", "wordcount", "primes")
OS_FAMILIES: Final = ("linux", "darwin", "windows", "any")
AMOUNTS: Final = {"cpu": (0, 4096), "memory_bytes": (0, 2**50), "gpu": (0, 64), "priority": (-100, 100)}
"""What a task may ask for, and its order among its requester's own; the executor reserves and sorts by them."""
RINGS: Final = ("own", "member")
MODULE: Final = "module"
"""The name of the input that is the program of a compute task without an operation."""
WASM: Final = "wasm"
"""What a node advertises that can run WebAssembly modules."""
SEND_TO: Final = ("shell", "compute", "prompt")
"""Kinds with a configuration key for the outermost ring that may see them."""

_FIELDS: Final = frozenset(
    [
        "type",
        "description",
        "argv",
        "script",
        "op",
        "op_args",
        "wasm",
        "fuel",
        "inputs",
        "stdin_b64",
        "stdin_path",
        "env",
        "budget_ucr",
        "budget",
        "deadline_s",
        "bid_timeout_s",
        "min_reputation",
        "require",
        "cpu",
        "memory_bytes",
        "gpu",
        "model",
        "labels",
        "os",
        "peer",
        "exclude",
        "ring",
        "prefer",
        "retries",
        "priority",
        "idempotency_key",
        "accept",
        "stream",
        "outputs",
        "gitignore",
        "wait",
        "cwd",
    ]
)


def _bad(field: str, value: Any, allowed: str) -> DataError:
    return DataError(f"task field {field!r} is {value!r}", hint=f"allowed: {allowed}", field=field)


def _text(spec: dict[str, Any], field: str, chars_max: int, default: str = "") -> str:
    value = spec.get(field)
    if value is None:
        return default
    if not isinstance(value, str) or len(value) > chars_max or "\0" in value:
        raise _bad(field, str(value)[:60], f"text of at most {chars_max} characters and no NUL")
    return value


def _words(spec: dict[str, Any], field: str, chars_max: int = 64) -> list[str]:
    value = spec.get(field) or []
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or len(value) > limits.LIST_ITEMS_MAX:
        raise _bad(field, value, f"a list of at most {limits.LIST_ITEMS_MAX} words")
    for word in value:
        if not isinstance(word, str) or not word or len(word) > chars_max:
            raise _bad(field, word, f"words of 1 to {chars_max} characters")
    return list(value)


def _number(spec: dict[str, Any], field: str, low: float, high: float, default: float) -> float:
    value = spec.get(field)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise _bad(field, value, f"a number from {low:g} to {high:g}")
    return float(value)


def _amount(spec: dict[str, Any], field: str) -> int:
    low, high = AMOUNTS[field]
    return int(_number(spec, field, low, high, 0))


def _argv(spec: dict[str, Any]) -> tuple[list[str] | None, str | None]:
    argv, script = spec.get("argv"), spec.get("script")
    if argv is not None:
        if not isinstance(argv, list) or not argv or not all(isinstance(a, str) and "\0" not in a for a in argv):
            raise _bad("argv", argv, "a list of at least one text")
        if sum(len(a.encode("utf-8", "surrogateescape")) + 1 for a in argv) > limits.ARGV_BYTES_MAX:
            raise _bad("argv", "…", f"at most {limits.ARGV_BYTES_MAX} bytes")
        return list(argv), None
    text = script if script is not None else spec.get("description")
    if not isinstance(text, str) or not text.strip():
        raise UsageError("a shell task needs a command", hint="clawnet run -- CMD ARG..., or --type shell 'script'")
    if len(text.encode("utf-8", "surrogateescape")) > limits.ARGV_BYTES_MAX or "\0" in text:
        raise _bad("script", "…", f"at most {limits.ARGV_BYTES_MAX} bytes and no NUL")
    return None, text


def _stdin(spec: dict[str, Any]) -> str:
    text = _text(spec, "stdin_b64", 2 * limits.PAYLOAD_INLINE_BYTES_MAX)
    try:
        base64.b64decode(text)
    except ValueError:
        raise _bad("stdin_b64", text[:60], "base64") from None
    return text


def _with_stdin(spec: dict[str, Any], kind: str, inputs: list[dict[str, str]]) -> str:
    """Adds the file that standard input is read from to the inputs, and gives the name it has there; "" for none."""
    path = _text(spec, "stdin_path", limits.TEXT_CHARS_MAX)
    if not path:
        return ""
    if kind == "prompt":
        raise DataError(
            f"the text for a prompt is longer than {limits.STDIN_BYTES_MAX // limits.KIB} KiB", field="stdin_path"
        )
    if spec.get("stdin_b64"):
        raise DataError("standard input is given twice, as stdin_b64 and as stdin_path", field="stdin_path")
    taken = {item["name"] for item in inputs}
    name = next(name for name in ("stdin", *(f"stdin-{n}" for n in range(len(taken)))) if name not in taken)
    inputs.append({"name": name, "path": path})
    if len(inputs) > limits.INPUTS_MAX:
        raise _bad("inputs", "…", f"a list of at most {limits.INPUTS_MAX - 1} inputs besides standard input")
    return name


def _check_prompt(spec: dict[str, Any]) -> None:
    """A prompt is text, and nothing but text: what would silently be left out is refused."""
    for field, option in (("inputs", "--input"), ("env", "--env"), ("argv", "a command"), ("script", "a script")):
        if spec.get(field):
            hint = "its text is the description and standard input (command < notes.txt)"
            raise UsageError(f"a prompt takes no {option.removeprefix('a ')}", hint=hint)
    data = base64.b64decode(_stdin(spec))
    if b"\0" in data:
        raise DataError("standard input is not text, and a prompt can only be text", field="stdin_b64")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise DataError("standard input is not UTF-8 text, and a prompt can only be text", field="stdin_b64") from error
    if not (_text(spec, "description", limits.PAYLOAD_INLINE_BYTES_MAX).strip() or text.strip()):
        raise UsageError("a prompt needs some text", hint='clawnet market submit "Summarize" < notes.txt')


def _environment(spec: dict[str, Any]) -> dict[str, str]:
    env = spec.get("env") or {}
    if not isinstance(env, dict) or len(env) > limits.LIST_ITEMS_MAX:
        raise _bad("env", env, "an object of texts")
    size = 0
    for name, value in env.items():
        if (
            not isinstance(name, str)
            or not name
            or "=" in name
            or "\0" in name
            or not isinstance(value, str)
            or "\0" in value
        ):
            raise _bad("env", name, "NAME=value with a name that is not empty")
        size += len(name) + len(value) + 2
    if size > limits.ENV_BYTES_MAX:
        raise _bad("env", "…", f"at most {limits.ENV_BYTES_MAX} bytes")
    return dict(env)


def _inputs(spec: dict[str, Any]) -> list[dict[str, str]]:
    inputs = spec.get("inputs") or []
    if not isinstance(inputs, list) or len(inputs) > limits.INPUTS_MAX:
        raise _bad("inputs", "…", f"a list of at most {limits.INPUTS_MAX} inputs")
    seen: set[str] = set()
    for item in inputs:
        if not isinstance(item, dict) or not isinstance(item.get("path"), str) or not isinstance(item.get("name"), str):
            raise _bad("inputs", item, "objects with name and path")
        if item["name"] in seen:
            raise _bad("inputs", item["name"], "each name once")
        seen.add(item["name"])
    return [{"name": item["name"], "path": item["path"]} for item in inputs]


def _outputs(spec: dict[str, Any], kind: str, op: str) -> list[str]:
    """The patterns of the files that come back."""
    found = spec.get("outputs") or []
    if isinstance(found, str):
        found = [found]
    if not isinstance(found, list) or not all(isinstance(pattern, str) for pattern in found):
        raise _bad("outputs", found, "a list of patterns such as 'dist/*'")
    if found and (kind == "prompt" or op):
        raise UsageError(f"a {'prompt' if kind == 'prompt' else 'built-in operation'} leaves no files for --output")
    if found:
        Globs(found)
    return list(dict.fromkeys(found))


def _flag(spec: dict[str, Any], field: str) -> bool:
    value = spec.get(field)
    if value is not None and not isinstance(value, bool):
        raise _bad(field, value, "true or false")
    return bool(value)


def kind_of(spec: dict[str, Any]) -> str:
    """The canonical kind of a submission; raises UsageError for one that does not exist (yet)."""
    kind = spec.get("type") or "prompt"
    kind = ALIASES.get(kind, kind) if isinstance(kind, str) else kind
    if kind in LATER:
        raise UsageError(f"{LATER[kind]} come with a later version", hint="use --type shell, compute or prompt")
    if kind not in KINDS:
        raise _bad("type", kind, "prompt, shell, compute")
    return str(kind)


def _module(spec: dict[str, Any], kind: str, inputs: list[dict[str, str]]) -> str:
    """The input that is a WebAssembly program: the file in `wasm`, which joins them, or the one called MODULE."""
    path = _text(spec, "wasm", limits.TEXT_CHARS_MAX)
    taken = {item["name"] for item in inputs}
    if kind != "compute":
        if path:
            raise UsageError(
                "a WebAssembly module goes with --type compute", hint="clawnet run --wasm MODULE -- ARG..."
            )
        return ""
    if not path:
        return MODULE if MODULE in taken and not spec.get("op") else ""
    name = next(name for name in (MODULE, *(f"{MODULE}-{n}" for n in range(len(taken)))) if name not in taken)
    inputs.append({"name": name, "path": path})
    if len(inputs) > limits.INPUTS_MAX:
        raise _bad("inputs", "…", f"a list of at most {limits.INPUTS_MAX - 1} inputs besides the module")
    return name


def _fuel(spec: dict[str, Any], module: str) -> int:
    fuel = int(_number(spec, "fuel", 0, limits.WASM_FUEL_MAX, 0))
    if fuel and not module:
        raise UsageError("fuel is a WebAssembly module's", hint="clawnet run --wasm MODULE --fuel N -- ARG...")
    return fuel


def _operation(spec: dict[str, Any], kind: str, module: str) -> tuple[str, dict[str, Any]]:
    op, args = spec.get("op"), spec.get("op_args") or {}
    if kind != "compute":
        if op:
            raise UsageError("--op goes with --type compute")
        return "", {}
    if module:
        if op or args:
            raise UsageError("a compute task is an operation or a module, not both", hint="leave --op out")
        return "", {}
    if not op:
        hint = "--op " + "|".join(OPERATIONS) + ", or a WebAssembly program: --input module=FILE.wasm"
        raise UsageError("a compute task needs an operation or a module", hint=hint)
    if op not in OPERATIONS:
        raise _bad("op", op, ", ".join(OPERATIONS))
    if not isinstance(args, dict) or len(args) > 16:
        raise _bad("op_args", args, "an object")
    if op == "primes" and not any((args, *map(spec.get, ("stdin_b64", "stdin_path", "inputs", "description")))):
        raise UsageError("primes needs to know how far", hint="primes of up to 1000: a number as the task's payload")
    return str(op), dict(args)


def _accept(spec: dict[str, Any], inputs: list[dict[str, str]]) -> list[contracts.Accept]:
    """The acceptance contract; its verifier modules are inputs of the task document, though no files of the task."""
    if spec.get("accept") is None:
        return []
    found = contracts.read(spec["accept"])
    taken = {item["name"] for item in inputs}
    for module in contracts.modules(found):
        if module["name"] in taken:
            raise _bad("inputs", module["name"], "other names than those of verifier modules (accept-N.wasm)")
        inputs.append(module)
    if len(inputs) > limits.INPUTS_MAX:
        raise _bad("inputs", "…", f"at most {limits.INPUTS_MAX} inputs, verifier modules among them")
    return found


def _requirements(
    spec: dict[str, Any], kind: str, work: str, family: str, accept: list[contracts.Accept]
) -> dict[str, Any]:
    capability = {"shell": "shell-execution", "compute": "compute", "prompt": "ai-inference"}[kind]
    judged = contracts.needs(accept) if accept else []
    wanted = [capability, *([work] if work else []), *_words(spec, "require"), *judged]
    commands = kind == "shell" or contracts.SHELL in judged
    system = _text(spec, "os", 16)
    if system and system not in OS_FAMILIES:
        raise _bad("os", system, ", ".join(OS_FAMILIES))
    return {
        "capabilities": sorted(set(wanted)),
        "min_reputation": _number(spec, "min_reputation", 0, 1, 0.0),
        "cpu": _amount(spec, "cpu"),
        "memory_bytes": _amount(spec, "memory_bytes"),
        "gpu": _amount(spec, "gpu"),
        "model": _text(spec, "model", 64),
        "labels": _words(spec, "labels"),
        "os": ("" if system == "any" else system or (family if commands else "")),
    }


def normalise(spec: dict[str, Any], config: Config, *, family: str) -> dict[str, Any]:
    """Checks a submission and fills in the defaults of the configuration.

    `family` is this machine's OS family (shell tasks require the requester's own unless `os` says otherwise).
    Raises UsageError (64), DataError (65) or NotPermittedError (77).
    """
    if not isinstance(spec, dict):
        raise DataError("a task must be a JSON object", hint="see docs/CLI.md, 'A task as JSON'")
    if not spec.keys() <= _FIELDS:
        name = next(name for name in spec if name not in _FIELDS)
        raise DataError(f"unknown task field {name!r}", hint="known: " + ", ".join(sorted(_FIELDS)))
    kind = kind_of(spec)
    inputs = _inputs(spec)
    module = _module(spec, kind, inputs)
    op, op_args = _operation(spec, kind, module)
    argv, script = _argv(spec) if kind == "shell" or (module and spec.get("argv")) else (None, None)
    if kind == "prompt":
        _check_prompt(spec)
    ring = spec.get("ring") or (config.text(f"market.send_to.{kind}") if kind in SEND_TO else "member")
    if ring not in RINGS:
        raise _bad("ring", ring, "own, member")
    prefer = spec.get("prefer") or ""
    if prefer not in ("", "market"):
        raise _bad("prefer", prefer, "market")
    if prefer == "market" and ring == "own":
        raise NotPermittedError(
            "--prefer market asks members, but this task may be seen by own machines only",
            hint="add --ring member, or set market.send_to for this kind of task",
        )
    budget = spec.get("budget_ucr")
    if budget is None and spec.get("budget") is not None:
        budget = parse_credits(str(spec["budget"]), what="budget")
    if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int) or not 0 <= budget <= 10**15):
        raise _bad("budget_ucr", budget, "micro-credits from 0 to 10^15")
    retries = spec.get("retries")
    stdin_input = _with_stdin(spec, kind, inputs)
    accept = _accept(spec, inputs)
    default_deadline_s = config.seconds("market.task_timeout")
    return {
        "type": kind,
        "description": _text(spec, "description", limits.PAYLOAD_INLINE_BYTES_MAX),
        "argv": argv,
        "script": script,
        "op": op,
        "op_args": op_args,
        "module": module,
        "fuel": _fuel(spec, module),
        "inputs": inputs,
        "stdin_b64": _stdin(spec),
        "stdin_input": stdin_input,
        "env": _environment(spec),
        "cwd": _text(spec, "cwd", 255),
        "budget_ucr": budget if budget is not None else config.amount_ucr("market.default_budget"),
        "budget_given": budget is not None,
        "deadline_s": _number(spec, "deadline_s", 0.1, 30 * 86_400, default_deadline_s),
        "bid_timeout_s": _number(spec, "bid_timeout_s", 0.05, 3_600, config.seconds("market.bid_timeout")),
        "requirements": _requirements(spec, kind, WASM if module else f"op:{op}" if op else "", family, accept),
        "peer": _words(spec, "peer", 128),
        "exclude": _words(spec, "exclude", 128),
        "ring": ring,
        "prefer": prefer,
        "retries": int(_number(spec, "retries", 0, limits.ATTEMPTS_MAX, 0 if kind == "shell" else 2))
        if retries is not None
        else (0 if kind == "shell" else 2),
        "priority": _amount(spec, "priority"),
        "idempotency_key": _text(spec, "idempotency_key", 256),
        "accept": [{"kind": one.kind, "text": one.text, "value": one.value} for one in accept],
        "stream": bool(spec.get("stream", True)),
        "outputs": _outputs(spec, kind, op),
        "gitignore": _flag(spec, "gitignore"),
    }


def stages(spec: dict[str, Any], config: Config) -> list[str]:
    """In which order the rings are asked: own machines, this node ("self"), members (DESIGN, section 5)."""
    own_self = config.text("market.self")
    inner = {"fallback": ["own", "self"], "prefer": ["self", "own"], "never": ["own"]}[own_self]
    if spec["ring"] == "own":
        return inner
    return ["member", *inner] if spec["prefer"] == "market" else [*inner, "member"]


def seconds_to_ms(value_s: float) -> int:
    """Whole milliseconds of a duration, at least 1."""
    return max(1, round(value_s * 1000))
