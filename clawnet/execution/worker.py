"""The worker process (`clawnet _worker`): operations and modules, one after the other, over a socket on descriptor 0.

Frames are a u32 big-endian length and a MessagePack array. Request: [id, op, args, sources, time_s, answer_bytes_max],
where a source is bytes, or [name, path] of a blob; of the operation "wasm" `args` is a WasmRequest, and the answer's
data a WasmEnded (execution/wasmruns.py). Answer: [id, data, reason, cpu_s]; a reason means that it failed. Answers of
quick operations leave together. The process imports little and starts in the time of a bare Python: the engine for
WebAssembly comes in with the first module.
"""

from __future__ import annotations

import os
import signal
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from typing import Any, Final

import msgspec

from clawnet import limits
from clawnet.execution.wasmruns import ENGINE_TROUBLE, WASM, WasmRequest

_QUICK_BYTES: Final = 64 * limits.KIB
_READ_BYTES: Final = 256 * limits.KIB
_TOLD_S: Final = 0.01
"""Answers wait for one another no longer: what is silent for much longer is at one operation."""
_encode: Final = msgspec.msgpack.Encoder().encode
_decode: Final = msgspec.msgpack.Decoder().decode

Sources = list[Any]


class Refused(Exception):
    """The operation cannot be done as asked; the text is for the requester."""


class OutOfTime(Exception):
    """The time allowed for one operation ran out."""


def _pieces(source: Any) -> Iterator[bytes]:
    if isinstance(source, bytes):
        yield source
        return
    with open(source[1], "rb") as file:
        while data := file.read(_READ_BYTES):
            yield data


def _name(source: Any) -> str:
    return "" if isinstance(source, bytes) else str(source[0])


def _no_args(args: dict[str, Any], *known: str) -> None:
    for name in args:
        if name not in known:
            allowed = ", ".join(known) or "none"
            raise Refused(f"unknown argument {name[:40]!r}; known: {allowed}")


def op_sha256(args: dict[str, Any], sources: Sources) -> bytes:
    """One line for each source: the hash, and the input's name as sha256sum writes it."""
    _no_args(args)
    lines = []
    for source in sources:
        digest = sha256()
        for piece in _pieces(source):
            digest.update(piece)
        name = _name(source)
        lines.append(f"{digest.hexdigest()}  {name}\n" if name else f"{digest.hexdigest()}\n")
    return "".join(lines).encode()


def op_sort(args: dict[str, Any], sources: Sources) -> bytes:
    """All lines of all sources in byte order; `reverse` and `unique` as in sort(1)."""
    _no_args(args, "reverse", "unique")
    for name in args:
        if not isinstance(args[name], bool):
            raise Refused(f"{name} is true or false")
    text = b"".join(piece if piece.endswith(b"\n") or not piece else piece + b"\n" for piece in _whole(sources))
    lines = text.split(b"\n")
    lines.pop()
    if args.get("unique"):
        lines = list(set(lines))
    lines.sort(reverse=bool(args.get("reverse")))
    return b"".join([line + b"\n" for line in lines])


def _whole(sources: Sources) -> Iterator[bytes]:
    for source in sources:
        yield b"".join(_pieces(source))


def op_wordcount(args: dict[str, Any], sources: Sources) -> bytes:
    """Lines, words and bytes of each source, and their sum over several, as wc(1) counts them."""
    _no_args(args)
    rows: list[tuple[int, int, int, str]] = []
    for source in sources:
        lines = words = size = 0
        inside = False
        for piece in _pieces(source):
            lines += piece.count(b"\n")
            size += len(piece)
            words += len(piece.split()) - (1 if inside and piece[:1].strip() else 0)
            inside = bool(piece[-1:].strip())
        rows.append((lines, words, size, _name(source)))
    if len(rows) > 1:
        lines, words, size = (sum(column) for column in zip(*(row[:3] for row in rows), strict=True))
        rows.append((lines, words, size, "total"))
    return "".join([" ".join(map(str, row)).rstrip() + "\n" for row in rows]).encode()


def _primes_below(limit: int) -> list[int]:
    sieve = bytearray(b"\1") * max(limit + 1, 2)
    sieve[0:2] = b"\0\0"
    for number in range(2, int(limit**0.5) + 1):
        if sieve[number]:
            sieve[number * number :: number] = bytes(len(range(number * number, limit + 1, number)))
    return [number for number in range(limit + 1) if sieve[number]]


def op_primes(args: dict[str, Any], sources: Sources) -> bytes:
    """The first `count` primes, or those up to `limit` (also a bare number as the payload), one a line."""
    _no_args(args, "count", "limit")
    if not args:
        text = b"".join(_whole(sources))[:64].strip()
        if not text.isdigit():
            raise Refused("primes needs count or limit, or a number as its payload")
        args = {"limit": int(text)}
    if len(args) != 1:
        raise Refused("primes takes count or limit, not both")
    ((name, value),) = args.items()
    most = limits.PRIMES_LIMIT_MAX if name == "limit" else limits.PRIMES_LIMIT_MAX // 20
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise Refused(f"{name} is a whole number from 0 to {most}")
    if name == "limit":
        found = _primes_below(value)
    else:
        # The n-th prime is below n (ln n + ln ln n) for n >= 6; the bit length bounds the logarithms from above.
        found = _primes_below(max(15, value * (value.bit_length() + 1)))[:value]
    return "".join([f"{number}\n" for number in found]).encode()


OPERATIONS: Final[dict[str, Callable[[dict[str, Any], Sources], bytes]]] = {
    "sha256": op_sha256,
    "sort": op_sort,
    "wordcount": op_wordcount,
    "primes": op_primes,
}


def _judge_schema(args: dict[str, Any], sources: Sources) -> bytes:
    """Why an answer (the second source) does not pass a schema (the first), or why the schema alone is none."""
    from clawnet.execution import schema

    if len(sources) == 1:
        return schema.check(sources[0]).encode()
    try:
        return schema.judge(*sources).encode()
    except schema.Unusable as error:
        raise Refused(str(error)) from None


JUDGES: Final[dict[str, Callable[[dict[str, Any], Sources], bytes]]] = {"schema": _judge_schema}
"""What acceptance contracts ask for, and no task may."""


def _on_alarm(*_: object) -> None:
    raise OutOfTime


def perform(op: str, args: Any, sources: Sources, time_s: float, answer_bytes_max: int) -> tuple[bytes, str]:
    """(result, "") or (b"", why not)."""
    operation = OPERATIONS.get(op) or JUDGES.get(op)
    if operation is None or not isinstance(args, dict):
        return b"", f"there is no operation {op[:40]!r}" if operation is None else "the arguments are no object"
    timed = hasattr(signal, "setitimer")
    try:
        if timed:
            signal.setitimer(signal.ITIMER_REAL, max(time_s, 0.001))
        try:
            data = operation(args, sources)
        finally:
            if timed:
                signal.setitimer(signal.ITIMER_REAL, 0)
    except Refused as error:
        return b"", str(error)
    except OutOfTime:
        return b"", "wall_limit"
    except MemoryError:
        return b"", "memory_limit"
    except OSError as error:
        return b"", f"an input cannot be read: {error.strerror or error}"
    if len(data) > answer_bytes_max:
        return b"", "output_limit"
    return data, ""


def _perform_wasm(args: Any, time_s: float) -> tuple[bytes, str]:
    """(a WasmEnded, "") or (b"", why not)."""
    try:
        from clawnet.execution import wasm
    except (ImportError, OSError, RuntimeError) as error:
        return b"", f"{ENGINE_TROUBLE}{error}"[:500]
    request = msgspec.convert(args, WasmRequest)
    _allow_memory(request.memory_bytes_max)
    try:
        walled = _walled(request)
        ended = wasm.runner().run(request, time_s)
        return _encode(msgspec.structs.replace(ended, walled=walled)), ""
    except wasm.Failed as error:
        return b"", str(error)
    except MemoryError:
        return b"", "memory_limit"
    except OSError as error:
        return b"", f"the module or an input cannot be read: {error.strerror or error}"


_walls: list[bool] = []


def _walled(request: WasmRequest) -> bool:
    """Gives up, with the first module, what no module's process needs; whether that could be done here."""
    if not _walls:
        from clawnet.execution.landlock import confine

        program = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        runs = os.path.dirname(request.directory)
        _walls.append(confine([*filter(None, sys.path), program, request.blobs], [request.cache, runs]))
    return _walls[0]


def _may_take_long(request: list[Any]) -> bool:
    _, op, args, sources, *_ = request
    if op == WASM:
        loaded = sys.modules.get("clawnet.execution.wasm")
        return loaded is None or not loaded.runner().is_quick(args[1])
    return op in ("primes", *JUDGES) or any(not isinstance(each, bytes) or len(each) > _QUICK_BYTES for each in sources)


class Channel:
    """Frames in and out, blocking; a socket, or two pipes where a socket cannot be handed over."""

    def __init__(self, descriptor: int) -> None:
        self._held = bytearray()
        if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            connection = socket.socket(fileno=os.dup(descriptor))
            self._receive: Callable[[], bytes] = lambda: connection.recv(_READ_BYTES)
            self._send: Callable[[bytes], object] = connection.sendall
        else:
            self._receive = lambda: os.read(descriptor, _READ_BYTES)
            self._send = self._write_stdout

    @staticmethod
    def _write_stdout(data: bytes) -> None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()

    def requests(self) -> list[list[Any]] | None:
        """All whole requests that are there, at least one; None at the end."""
        found: list[list[Any]] = []
        while not found:
            data = self._receive()
            if not data:
                return None
            self._held += data
            while len(self._held) >= 4 and len(self._held) >= 4 + (size := int.from_bytes(self._held[:4], "big")):
                found.append(_decode(bytes(self._held[4 : 4 + size])))
                del self._held[: 4 + size]
        return found

    def answer(self, answers: list[list[Any]]) -> None:
        """Sends these and forgets them."""
        if answers:
            frames = [_encode(each) for each in answers]
            self._send(b"".join([part for frame in frames for part in (len(frame).to_bytes(4, "big"), frame)]))
            answers.clear()


def _confine() -> None:
    """Limits of the worker's own, and its death with the daemon's, where the system knows such things."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGALRM"):
        signal.signal(signal.SIGALRM, _on_alarm)
    try:
        import resource
    except ImportError:
        return  # Windows: the node's own limits on sizes and times are what there is
    for name, value in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, limits.WORKER_FILE_BYTES_MAX)):
        hard = resource.getrlimit(name)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (value, value))
    _allow_memory(0)
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG


def _allow_memory(module_bytes: int) -> None:
    """What this process may hold: its own bound, and beside it what a module may have and its files may take.

    It is memory that is really written to that counts (RLIMIT_DATA): the engine reserves far more addresses than a
    module uses. Where only the address space can be bounded (macOS cannot do even that), what the node checks is left.
    """
    if sys.platform != "linux":
        return
    import resource

    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    value = limits.WORKER_MEMORY_BYTES_MAX + 2 * module_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def main(descriptor: int = 0) -> None:
    """Serves requests until the other side closes."""
    _confine()
    channel = Channel(descriptor)
    answers: list[list[Any]] = [[0]]  # number 0: ready
    channel.answer(answers)
    while (requests := channel.requests()) is not None:
        told_s = time.monotonic()
        for request in requests:
            if _may_take_long(request) or time.monotonic() - told_s > _TOLD_S:
                channel.answer(answers)
                told_s = time.monotonic()
            number, op, args, sources, time_s, answer_bytes_max = request
            began = time.process_time()
            if op == WASM:
                data, reason = _perform_wasm(args, time_s)
            else:
                data, reason = perform(op, args, sources, time_s, answer_bytes_max)
            answers.append([number, data, reason, time.process_time() - began])
        channel.answer(answers)
