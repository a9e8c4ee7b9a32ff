"""The WebAssembly module of a task, looked at before it is sent: most of what is wrong with one is seen at once."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

from clawnet.errors import DataError, NotFoundError
from clawnet.modulefile import LOOK_BYTES, magic_trouble

INPUT = "module"
"""The input that is the program of a compute task without an operation."""


def look(spec: dict[str, Any]) -> bool:
    """Whether the task is a module's; its path in `wasm` becomes absolute. Raises NotFoundError or DataError."""
    if spec.get("wasm"):
        spec.setdefault("type", "compute")
        spec["wasm"] = checked(str(spec["wasm"]))
        return True
    if spec.get("type") != "compute" or spec.get("op"):
        return False
    for item in spec.get("inputs") or []:
        if item["name"] == INPUT:
            checked(item["path"])
            return True
    return False


def checked(name: str) -> str:
    """The whole path of a module file that may be one. Raises NotFoundError or DataError."""
    try:
        path = Path(name).expanduser().resolve(strict=True)
        info = path.stat()
        if not stat.S_ISREG(info.st_mode):
            raise DataError(f"the module {name} is no file")
        with path.open("rb") as file:
            first = file.read(LOOK_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFoundError(f"there is no file {name}", path=name) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"cannot read the module {name}: {error}") from error
    trouble = magic_trouble(first, info.st_size)
    if trouble:
        raise DataError(f"the module {name} {trouble}")
    return str(path)
