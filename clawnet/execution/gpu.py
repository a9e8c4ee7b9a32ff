"""GPUs of this machine as nvidia-smi tells of them, and how a run sees those that are its own and no others."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from msgspec import Struct

from clawnet import limits

DEV: Final = Path("/dev")
DRIVER: Final = Path("/proc/driver/nvidia/gpus")
SHARED: Final = ("nvidiactl", "nvidia-uvm", "nvidia-uvm-tools")
"""Devices that any use of a GPU needs besides the GPU's own."""
_QUERY: Final = ("--query-gpu=index,uuid,pci.bus_id", "--format=csv,noheader")
_LINE: Final = re.compile(r"(\d{1,3}), (GPU-[0-9A-Fa-f-]{1,64}), ([0-9A-Fa-f]{4,8}:[0-9A-Fa-f]{2}:[0-9A-Fa-f]{2}\.\d)")
_NONE: Final = "No devices were found"
_READ_BYTES: Final = 64 * limits.KIB


class Gpu(Struct, frozen=True):
    """One GPU: its name for CUDA, and the number of its device file."""

    uuid: str
    minor: int


class Found(Struct, frozen=True):
    """All GPUs in the order of nvidia-smi; `trouble` says why there are none though nvidia-smi is installed."""

    gpus: tuple[Gpu, ...] = ()
    trouble: str = ""


async def find(environ: Mapping[str, str] | None = None) -> Found:
    """Asks the nvidia-smi on PATH, within bounds of time and size; without one there are no GPUs."""
    path = (os.environ if environ is None else environ).get("PATH", os.defpath)
    program = shutil.which("nvidia-smi", path=path)
    if program is None:
        return Found()
    try:
        async with asyncio.timeout(limits.GPU_PROBE_TIMEOUT_S):
            code, said = await _ask(program, path)
    except TimeoutError:
        return Found(trouble=f"nvidia-smi does not answer within {limits.GPU_PROBE_TIMEOUT_S:g} s")
    except OSError as error:
        return Found(trouble=f"nvidia-smi does not run: {error.strerror or error}")
    text = said.decode("utf-8", "replace").strip()
    if _NONE in text:
        return Found()
    if code != 0:
        return Found(trouble=f"nvidia-smi failed: {_shown(text) or f'exit code {code}'}")
    return read(text)


async def _ask(program: str, path: str) -> tuple[int, bytes]:
    process = await asyncio.create_subprocess_exec(
        program,
        *_QUERY,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={"PATH": path, "LANG": "C"} if sys.platform != "win32" else None,
        start_new_session=sys.platform != "win32",
    )
    assert process.stdout is not None
    said = b""
    try:
        while len(said) <= limits.GPU_LIST_BYTES_MAX and (data := await process.stdout.read(_READ_BYTES)):
            said += data
        if len(said) <= limits.GPU_LIST_BYTES_MAX:
            return await process.wait(), said
        return 0, said[: limits.GPU_LIST_BYTES_MAX]
    finally:
        if process.returncode is None:
            _kill(process)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limits.KILL_GRACE_S):
                await process.communicate()


def _kill(process: asyncio.subprocess.Process) -> None:
    """The program, if it still runs, and what it started."""
    with contextlib.suppress(ProcessLookupError):
        if sys.platform != "win32":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


def read(text: str) -> Found:
    """What nvidia-smi printed: a line a GPU. Of output that is not understood nothing is believed."""
    gpus: list[Gpu] = []
    for line in text.splitlines():
        match = _LINE.fullmatch(line.strip())
        if match is None or len(gpus) == limits.GPUS_MAX or any(one.uuid == match[2] for one in gpus):
            return Found(trouble=f"nvidia-smi says what is not understood: {_shown(line)}")
        gpus.append(Gpu(match[2], _minor(int(match[1]), match[3])))
    return Found(tuple(gpus))


def _shown(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)[:100].strip()


def _minor(index: int, bus_id: str) -> int:
    """The number of the device file: the driver tells it; where it does not, it is the index."""
    domain, _, rest = bus_id.lower().partition(":")
    try:
        text = (DRIVER / f"{domain[-4:]}:{rest}" / "information").read_text("utf-8", "replace")
    except OSError:
        return index
    match = re.search(r"^Device Minor:\s*(\d{1,3})\s*$", text, re.MULTILINE)
    return index if match is None else int(match[1])


def own(gpus: tuple[Gpu, ...], numbers: Iterable[int]) -> list[Gpu]:
    """Those of a run, by their numbers; one that this machine does not have is left out."""
    return [gpus[number] for number in numbers if 0 <= number < len(gpus)]


def variables(gpus: tuple[Gpu, ...], numbers: Iterable[int]) -> dict[str, str]:
    """What a run finds in its environment: CUDA shows it its own GPUs alone. Nothing where the machine has none."""
    if not gpus:
        return {}
    return {"CUDA_VISIBLE_DEVICES": ",".join(one.uuid for one in own(gpus, numbers))}


def bind_words(gpus: tuple[Gpu, ...], numbers: Iterable[int]) -> list[str]:
    """bubblewrap's words for the device files of a run's own GPUs; nothing for a run that has none."""
    names = [f"nvidia{one.minor}" for one in own(gpus, numbers)]
    words: list[str] = []
    for name in (*names, *SHARED) if names else ():
        words += ["--dev-bind-try", str(DEV / name), f"/dev/{name}"]
    return words


def findings(found: Found, offered_max: int) -> list[dict[str, str]]:
    """What `doctor` tells of the GPUs; nothing where there is no sign of any."""
    if found.trouble:
        return [{"check": "gpu", "level": "warn", "message": found.trouble, "remedy": "run nvidia-smi by hand"}]
    if not found.gpus:
        return []
    text = f"{min(len(found.gpus), offered_max)} of {len(found.gpus)} GPUs are offered to tasks"
    return [{"check": "gpu", "level": "ok", "message": text, "remedy": ""}]
