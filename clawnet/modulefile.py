"""What a WebAssembly module looks like from outside: told by its first bytes, before anything is sent or compiled."""

from __future__ import annotations

from clawnet import limits

LOOK_BYTES = 16
"""So many of the first bytes tell."""


def magic_trouble(first: bytes, size: int) -> str:
    """What is wrong with a module by its first bytes and its length, as the end of a sentence; "" for nothing."""
    if size > limits.WASM_MODULE_BYTES_MAX:
        return f"is larger than a module may be ({limits.WASM_MODULE_BYTES_MAX // limits.MIB} MiB)"
    if not size:
        return "is empty"
    if first[:4] != b"\0asm":
        if first.lstrip()[:7] == b"(module":
            return "is WebAssembly text: compile it first (wat2wasm)"
        return "is no WebAssembly: it does not begin with the bytes of one"
    if first[4:8] == b"\1\0\0\0":
        return ""
    if first[6:8] == b"\1\0":
        return "is a component, which is not supported: build a WASI preview 1 command (a core module)"
    return "is WebAssembly of a version that is not supported"
