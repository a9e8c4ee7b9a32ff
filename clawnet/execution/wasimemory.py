"""A module's memory as a call finds it: every address and length comes from the module, and is checked here."""

from __future__ import annotations

import struct
from typing import Final

from clawnet import limits
from clawnet.execution.wasiabi import Errno, WasiError

_VECTORS_MAX: Final = 1_024


def piece(memory: memoryview, at: int, size: int) -> memoryview:
    """Part of the memory; raises WasiError for what does not lie in it."""
    if at + size > len(memory):
        raise WasiError(Errno.FAULT)
    return memory[at : at + size]


def put(memory: memoryview, at: int, data: bytes | bytearray) -> None:
    """Writes there."""
    piece(memory, at, len(data))[:] = data


def vectors_of(memory: memoryview, at: int, count: int) -> list[memoryview]:
    """The pieces of a read or write, together at most WASM_TRANSFER_BYTES_MAX: more is left for the next call."""
    if count > _VECTORS_MAX:
        raise WasiError(Errno.INVAL)
    found, left = [], limits.WASM_TRANSFER_BYTES_MAX
    for address, size in struct.iter_unpack("<II", piece(memory, at, 8 * count)):
        found.append(piece(memory, address, size)[:left])
        left -= min(size, left)
    return found


def path_of(memory: memoryview, at: int, size: int) -> str:
    """A path."""
    if size > limits.WASM_PATH_BYTES_MAX:
        raise WasiError(Errno.NAMETOOLONG)
    try:
        path = str(piece(memory, at, size), "utf-8")
    except UnicodeDecodeError:
        raise WasiError(Errno.ILSEQ) from None
    if "\0" in path:
        raise WasiError(Errno.INVAL)
    return path


def put_list(memory: memoryview, items: list[bytes], table: int, buffer: int) -> None:
    """Arguments or environment: the texts one after the other, and the table of where each begins."""
    put(memory, buffer, b"".join([item + b"\0" for item in items]))
    for item in items:
        put(memory, table, buffer.to_bytes(4, "little"))
        table += 4
        buffer += len(item) + 1


def sizes(items: list[bytes]) -> bytes:
    """How many texts, and how many bytes with their ends."""
    return struct.pack("<II", len(items), sum(len(item) + 1 for item in items))
