"""The demo's tasks: what each asks for, and whether what came back is what this process works out by itself."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from clawnet import limits, units
from clawnet.errors import DataError, NotFoundError, VerificationError

from .demo_mesh import Mesh
from .following import follow
from .waiting import READ_BYTES, STREAMS, data_of, task_error

PRIMES_BELOW = 20_000
DEADLINE_S = 120.0
LACKING = "time-travel"
"""A capability that no machine has."""
SOURCES = ("clawnet", "commands", "tests", "scripts", "packaging", "docs", "examples", "termux")
NOT_SOURCES = ("__pycache__", "*.pyc", "*.egg-info", "node_modules", ".*")

HASH_EVERY_FILE = """\
if command -v sha256sum >/dev/null 2>&1; then hash=sha256sum; else hash="shasum -a 256"; fi
list=$(find . -type f -exec $hash {} + | LC_ALL=C sort -k 2) || exit 1
printf '%s\\n' "$list"
printf '%s files\\n' "$(printf '%s\\n' "$list" | grep -c .)"
"""

Hashes = dict[bytes, str]


class Files(NamedTuple):
    """The directory that travels, where it came from, and the sha256 of every regular file in it as hashed here."""

    path: Path
    shown: Path
    hashes: Hashes
    size: int


class Outcome(NamedTuple):
    """A task as it ended and how the market came to it; `problem` is empty when it showed what it was to show."""

    name: str
    title: str
    finding: str
    problem: str
    task: dict[str, Any]
    why: dict[str, Any]


# --- the files


def files_of(text: str | None, place: Path) -> Files:
    """The directory named, or clawnet's own sources, copied into `place`.

    Raises NotFoundError or DataError for what is no directory that can travel.
    """
    if text is None:
        path, shown = own_sources(place)
    else:
        path = shown = Path(text).expanduser().absolute()
        if not path.exists():
            raise NotFoundError(f"there is no directory {path}", path=str(path))
        if not path.is_dir():
            raise DataError(f"{path} is no directory", hint="--input-dir names one")
        path = path.resolve()
        if path in place.resolve().parents:
            raise DataError(f"{path} contains the demo's own files", hint="choose a directory inside it")
    return Files(path, shown, *hash_files(path))


def own_sources(place: Path) -> tuple[Path, Path]:
    """A copy of the checkout's sources (where there is none, of the package's own files), and where they came from."""
    import clawnet

    package, commands = Path(clawnet.__file__).parent, Path(__file__).parent
    target = place / "sources"
    target.mkdir()
    ignore = shutil.ignore_patterns(*NOT_SOURCES)
    root = package.parent
    if (root / "pyproject.toml").is_file() and commands == root / "commands":
        for name in SOURCES:
            if (root / name).is_dir():
                shutil.copytree(root / name, target / name, ignore=ignore, symlinks=True)
        for file in root.iterdir():
            if file.is_file() and not file.name.startswith("."):
                shutil.copy(file, target)
        return target, root
    shutil.copytree(package, target / "clawnet", ignore=ignore, symlinks=True)
    return target, package


def hash_files(root: Path) -> tuple[Hashes, int]:
    """The sha256 of every regular file below `root`, and their bytes in all.

    Raises DataError for one that cannot be read, and when they are more than can travel.
    """
    hashes: Hashes = {}
    size = 0
    for path in _regular_files(root):
        try:
            if size + path.stat().st_size > limits.DEMO_BYTES_MAX or len(hashes) >= limits.TREE_FILES_MAX:
                most = f"{units.format_size(limits.DEMO_BYTES_MAX)} in {limits.TREE_FILES_MAX} files"
                raise DataError(f"{root} holds more than can travel with a task ({most})", hint="name a smaller one")
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256")
                size += file.tell()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        hashes[b"./" + os.fsencode(path.relative_to(root))] = digest.hexdigest()
    return hashes, size


def _regular_files(root: Path) -> Iterator[Path]:
    """As they travel: links, sockets and names that are no UTF-8 stay behind."""

    def refused(error: OSError) -> None:
        raise DataError(f"cannot read {error.filename}: {error.strerror}") from error

    for directory, names, files in os.walk(root, onerror=refused):
        names[:] = [name for name in names if _travels(name)]
        for name in files:
            path = Path(directory, name)
            if _travels(name) and path.is_file() and not path.is_symlink():
                yield path


def _travels(name: str) -> bool:
    return not any(0xD800 <= ord(letter) <= 0xDFFF for letter in name)


def read_listing(output: bytes) -> tuple[Hashes, int]:
    """What the task printed: a sha256 and a name a line, escaped as by sha256sum, and the count. Raises ValueError."""
    *lines, last = output.rstrip(b"\n").split(b"\n")
    count, word, *_ = last.split()
    if word != b"files":
        raise ValueError("the last line does not count the files")
    hashes: Hashes = {}
    for line in filter(None, lines):
        escaped = line.startswith(b"\\")
        digest, _, name = line[escaped:].partition(b" ")
        name = name[1:]
        if escaped:
            name = name.replace(b"\\\\", b"\0").replace(b"\\n", b"\n").replace(b"\\r", b"\r").replace(b"\0", b"\\")
        hashes[name] = digest.decode("ascii", "replace")
    return hashes, int(count)


# --- the tasks


class Asked(NamedTuple):
    """A task to submit; `judge` takes how it ended and returns what was found, or raises VerificationError."""

    name: str
    title: str
    spec: dict[str, Any]
    judge: Callable[[dict[str, Any], dict[str, bytes]], str]


def tasks(files: Files) -> list[Asked]:
    """The four tasks, in order."""
    common = {"ring": "member", "prefer": "market", "deadline_s": DEADLINE_S}
    shell = {**common, "type": "shell"}
    return [
        Asked(
            "files",
            "counts and hashes every file of a directory that travels with it",
            {
                **shell,
                "description": "count and hash every file",
                "script": HASH_EVERY_FILE,
                "inputs": [{"name": "files", "path": str(files.path)}],
                "cwd": "files",
            },
            lambda task, output: _judge_files(files, output["stdout"]),
        ),
        Asked(
            "primes",
            f"a built-in computation of the primes up to {PRIMES_BELOW}",
            {
                **common,
                "type": "compute",
                "op": "primes",
                "description": f"primes up to {PRIMES_BELOW}",
                "stdin_b64": base64.b64encode(str(PRIMES_BELOW).encode()).decode(),
            },
            lambda task, output: _judge_primes(output["stdout"]),
        ),
        Asked(
            "exit-3",
            "writes to both streams and exits 3: delivered and paid, with its exit code",
            {**shell, "argv": ["sh", "-c", "echo this is stdout; echo this is stderr >&2; exit 3"]},
            _judge_exit,
        ),
        Asked(
            "nobody",
            f"needs {LACKING}: nobody can take it, and nothing is paid",
            {**shell, "argv": ["true"], "require": [LACKING]},
            _judge_nobody,
        ),
    ]


def perform(mesh: Mesh, asked: Asked, deadline: float | None) -> Outcome:
    """Submits a task at the founder, waits for its end, asks why, and judges the result."""
    client = mesh.founder.client
    task_id = client.call("task.submit", {"spec": asked.spec})["task_id"]
    task = follow(client, task_id, deadline=deadline)
    why = client.call("task.why", {"task": task_id})
    output = {name: _whole(mesh, task, name) for name in STREAMS} if task["result"] else {}
    try:
        if asked.name != "nobody" and task["state"] != "settled":
            error = task_error(task)
            raise VerificationError(error.message if error else f"it ended {task['state']}")
        return Outcome(asked.name, asked.title, asked.judge(task, output), "", task, why)
    except VerificationError as error:
        return Outcome(asked.name, asked.title, error.message, error.message, task, why)


def _whole(mesh: Mesh, task: dict[str, Any], stream: str) -> bytes:
    """A stream of the result, read piece by piece where it is too large to be inline."""
    inline = data_of(task["result"], stream)
    if inline is not None:
        return inline
    data = b""
    while True:
        params = {"task": task["task_id"], "stream": stream, "offset": len(data), "length": READ_BYTES}
        piece = mesh.founder.client.call("task.read", params)
        part = base64.b64decode(piece["data_b64"])
        data += part
        if piece["eof"] or not part:
            return data


def _judge_files(files: Files, stdout: bytes) -> str:
    try:
        found, count = read_listing(stdout)
    except ValueError as error:
        raise VerificationError(f"the listing cannot be read: {error}") from error
    if found != files.hashes or count != len(files.hashes):
        if hash_files(files.path)[0] != files.hashes:
            raise DataError(f"{files.path} changed while the demo ran", hint="run it again, or with a quiet directory")
        wrong = [name for name in files.hashes if found.get(name) != files.hashes[name]]
        wrong += [name for name in found if name not in files.hashes]
        example = f", such as {os.fsdecode(wrong[0])}" if wrong else ""
        raise VerificationError(
            f"the result is wrong: {count} files listed, {len(files.hashes)} sent, {len(wrong)} differ{example}"
        )
    return f"{count} files, {files.size} bytes: every hash equals the one worked out here"


def _judge_primes(stdout: bytes) -> str:
    composite = bytearray(PRIMES_BELOW + 1)
    expected = []
    for number in range(2, PRIMES_BELOW + 1):
        if not composite[number]:
            expected.append(number)
            composite[number * number :: number] = b"\1" * len(composite[number * number :: number])
    if [int(word) for word in stdout.split() if word.isdigit()] != expected:
        raise VerificationError("the result is wrong: these are not the primes")
    return f"{len(expected)} primes, the last {expected[-1]}, as worked out here"


def _judge_exit(task: dict[str, Any], output: dict[str, bytes]) -> str:
    code = task["result"]["exit_code"]
    if (code, output["stdout"], output["stderr"]) != (3, b"this is stdout\n", b"this is stderr\n"):
        raise VerificationError(f"the result is wrong: exit code {code}, {output}")
    return "exit code 3, stdout and stderr apart"


def _judge_nobody(task: dict[str, Any], output: dict[str, bytes]) -> str:
    error = task["error"] or {}
    if (task["state"], error.get("code")) != ("no_bids", "no_bids"):
        raise VerificationError(f"a task that nobody can do ended {task['state']}")
    return str(error["message"])
