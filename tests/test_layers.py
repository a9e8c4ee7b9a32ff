"""The floors of the house: who may import whom, how long a file may be, and what the pure floors never touch."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILE_LINES_MAX = 500

FLOORS = {
    "__init__": 0,
    "errors": 0,
    "limits": 0,
    "paths": 0,
    "money": 0,
    "units": 0,
    "modulefile": 0,
    "config": 1,
    "rpc": 1,
    "answers": 1,
    "identity": 1,
    "home": 2,
    "wire": 2,
    "market": 3,
    "ledger": 3,
    "reputation": 3,
    "memory": 3,
    "mesh": 3,
    "node": 4,
    "net": 5,
    "execution": 5,
    "storage": 5,
    "ipc": 5,
    "observe": 5,
    "ports": 5,
    "timers": 5,
    "inbox": 5,
    "undone": 5,
    "runtime": 6,
    "adoption": 5,
    "backup": 6,
    "errands": 6,
    "handover": 6,
    "daemon": 7,
}
# On the ground floor amounts, durations and paths raise the errors and keep to the limits beside them.
GROUND = {"paths", "money", "units", "modulefile"}
# The client stands beside the house: it knows the local protocol and nothing of the node.
CLIENT = {"api", "api_async", "launch"}
CLIENT_MAY_USE = {"__init__", "errors", "limits", "paths", "money", "units", "rpc", "api", "launch"}
ADAPTER_FLOOR = 5
PURE_FLOORS = range(5)
IMPURE = {
    *("asyncio", "concurrent", "multiprocessing", "threading", "selectors", "signal", "subprocess", "sched"),
    *("random", "secrets", "socket", "sqlite3", "time", "uuid", "urllib", "http", "ssl", "httpx"),
}
# Where a pure floor must touch the system: files of the home; the peer's user id on the local socket.
IMPURE_ALLOWED = {
    "clawnet/rpc.py": {"socket"},
}
SYSTEM_CALLS = {
    *("os.urandom", "os.getrandom", "datetime.now", "datetime.utcnow", "datetime.today", "date.today"),
    *("datetime.datetime.now", "datetime.datetime.utcnow", "datetime.date.today", "bindings.randombytes"),
}
OS_ALLOWED = {"clawnet/paths.py"}

# The commands that are the node, or work on a home without one: these may import node parts inside a function.
NODE_COMMANDS = {
    "app.py",
    "config.py",
    "daemon.py",
    "demo.py",
    "demo_mesh.py",
    "demo_report.py",
    "doctor.py",
    "identity.py",
    "init.py",
    "mcp.py",
    "wallet.py",
    "wallet_files.py",
    "worker.py",
}
COMMANDS_MAY_USE = {"__init__", "errors", "limits", "paths", "money", "units", "modulefile", "rpc", "api", "launch"}
COMMANDS_NEVER_AT_TOP = {"asyncio", "sqlite3", "yaml", "nacl", "cryptography", "msgspec", "rich", "platformdirs"}


def python_files(*folders: str) -> list[Path]:
    """Every Python file of these folders, in order."""
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def name_of(path: Path) -> str:
    """A file's path inside the checkout."""
    return path.relative_to(ROOT).as_posix()


def room_of(module: str) -> str:
    """The room a dotted module inside clawnet stands in; split files (config_keys) belong to their room."""
    top = module.split(".")[1] if "." in module else "__init__"
    for room in ("config", "answers"):
        if top.startswith(f"{room}_"):
            return room
    return top


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every module imported anywhere in a tree, with its line; `from clawnet import x` counts as clawnet.x."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            if node.module == "clawnet":
                for alias in node.names:
                    is_module = (ROOT / "clawnet" / f"{alias.name}.py").exists() or (
                        ROOT / "clawnet" / alias.name
                    ).is_dir()
                    yield (f"clawnet.{alias.name}" if is_module else "clawnet"), node.lineno
            else:
                yield node.module, node.lineno


def top_level(tree: ast.Module) -> ast.Module:
    """A module without the bodies of its functions and without what only a type checker sees."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
            return None

        def visit_If(self, node: ast.If) -> ast.AST | None:
            typing_only = isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
            return None if typing_only else self.generic_visit(node)

    stripped = Strip().visit(tree)
    assert isinstance(stripped, ast.Module)
    return stripped


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def may_import(room: str, other: str) -> bool:
    """The law of the floors."""
    if room == other or (room in GROUND and other in ("__init__", "errors", "limits")):
        return True
    if room in CLIENT:
        return other in CLIENT_MAY_USE
    if other in CLIENT:
        return FLOORS[room] > ADAPTER_FLOOR
    if FLOORS[room] == ADAPTER_FLOOR:
        return FLOORS[other] <= 2
    return FLOORS[other] < FLOORS[room]


def test_every_room_stands_on_a_floor() -> None:
    rooms = {room_of(f"clawnet.{path.stem}") for path in (ROOT / "clawnet").glob("*.py")}
    rooms |= {path.name for path in (ROOT / "clawnet").iterdir() if (path / "__init__.py").exists()}
    assert rooms - set(FLOORS) - CLIENT == set()


def test_rooms_import_only_from_floors_below() -> None:
    wrong = []
    for path in python_files("clawnet"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        room = room_of(".".join(parts))
        for module, line in imports(parse(path)):
            if module == "clawnet" or module.startswith("clawnet."):
                other = room_of(module)
                if other not in FLOORS and other not in CLIENT:
                    wrong.append(f"{name_of(path)}:{line}: {module} is no room")
                elif not may_import(room, other):
                    wrong.append(f"{name_of(path)}:{line}: {room} must not import {module}")
    assert not wrong, "\n".join(wrong)


def test_pure_floors_touch_no_clock_no_chance_and_no_system() -> None:
    wrong = []
    for path in python_files("clawnet"):
        room = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        if FLOORS.get(room) not in PURE_FLOORS:
            continue
        tree = parse(path)
        allowed = IMPURE_ALLOWED.get(name_of(path), set())
        for module, line in imports(tree):
            top = module.split(".")[0]
            if (top in IMPURE and top not in allowed) or (top == "os" and name_of(path) not in OS_ALLOWED):
                wrong.append(f"{name_of(path)}:{line}: imports {module}")
        wrong += [
            f"{name_of(path)}:{node.lineno}: asks the system for {ast.unparse(node)}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and ast.unparse(node) in SYSTEM_CALLS
        ]
    assert not wrong, "\n".join(wrong)


def test_clawnet_never_imports_its_commands() -> None:
    wrong = [
        f"{name_of(path)}:{line}"
        for path in python_files("clawnet")
        for module, line in imports(parse(path))
        if module.split(".")[0] == "commands" or module.startswith("clawnet.commands")
    ]
    assert not wrong, wrong


def test_commands_start_light() -> None:
    wrong = []
    for path in python_files("commands"):
        for module, line in imports(top_level(parse(path))):
            top = module.split(".")[0]
            if top in COMMANDS_NEVER_AT_TOP:
                wrong.append(f"{name_of(path)}:{line}: imports {module} at its top level")
            if top == "clawnet" and room_of(module) not in COMMANDS_MAY_USE:
                wrong.append(f"{name_of(path)}:{line}: imports {module} at its top level")
    assert not wrong, "\n".join(wrong)


def test_only_the_commands_that_are_the_node_import_the_node() -> None:
    wrong = []
    for path in python_files("commands"):
        is_node = path.relative_to(ROOT / "commands").parts[0] in NODE_COMMANDS
        for module, line in imports(parse(path)):
            if module.startswith("clawnet.commands") or module.split(".")[0] == "commands":
                wrong.append(f"{name_of(path)}:{line}: inside commands/ imports are relative")
            elif module.split(".")[0] == "clawnet" and room_of(module) not in COMMANDS_MAY_USE and not is_node:
                wrong.append(f"{name_of(path)}:{line}: imports {module}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("folder", ["clawnet", "commands", "tests", "scripts", "packaging", "examples"])
def test_files_are_short_and_say_what_they_are(folder: str) -> None:
    wrong = []
    for path in python_files(folder):
        text = path.read_text(encoding="utf-8")
        lines = text.splitlines()
        if len(lines) > FILE_LINES_MAX:
            wrong.append(f"{name_of(path)} has {len(lines)} lines; the limit is {FILE_LINES_MAX}")
        first = lines[1:2] if lines[:1] and lines[0].startswith("#!") else lines[:1]
        if not first or not first[0].startswith('"""') or len(first[0]) < 10:
            wrong.append(f"{name_of(path)} does not begin with a line that says what is inside")
    assert not wrong, "\n".join(wrong)


def test_the_law_itself_refuses_what_it_must() -> None:
    assert not may_import("ledger", "storage")
    assert not may_import("errors", "paths")
    assert not may_import("storage", "ledger")
    assert not may_import("net", "storage")
    assert not may_import("wire", "node")
    assert not may_import("market", "ledger")
    assert not may_import("api", "node")
    assert may_import("node", "market")
    assert may_import("storage", "wire")
    assert may_import("daemon", "runtime")
    tree = ast.parse("def f():\n    import asyncio\nimport json\nif TYPE_CHECKING:\n    import yaml\n")
    assert [name for name, _ in imports(top_level(tree))] == ["json"]
