"""The result of a run as one run of bytes, and its seal: nobody reads a result before its escrow is released.

Plain form: "CWB1", the head's length (u32 big-endian), the head (MessagePack), stdout, stderr, the output files as one
archive (execution/trees.py). Sealed form: libsodium secretstream (XChaCha20-Poly1305; LEDGER.md, "Seal"): 24 bytes of
header, then chunks of 64 KiB each longer by 17, the last one marked final, so that neither a byte nor the end can be
changed unnoticed. Both stream, for results that do not fit in memory comfortably.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import sha256
from typing import Annotated, Any, Final

import msgspec
from msgspec import Meta, Struct
from nacl import bindings, exceptions

from clawnet import limits
from clawnet.errors import DataError, VerificationError
from clawnet.execution.outputs import NAMED_MAX, Listing, listing
from clawnet.execution.spec import BlobPort

MAGIC: Final = b"CWB1"
HEAD_BYTES_MAX: Final = 1 * limits.MIB
CHUNK_BYTES: Final = 64 * limits.KIB
HEADER_BYTES: Final = bindings.crypto_secretstream_xchacha20poly1305_HEADERBYTES
TAIL_BYTES: Final = bindings.crypto_secretstream_xchacha20poly1305_ABYTES
_MESSAGE: Final = bindings.crypto_secretstream_xchacha20poly1305_TAG_MESSAGE
_FINAL: Final = bindings.crypto_secretstream_xchacha20poly1305_TAG_FINAL

_Size = Annotated[int, Meta(ge=0, le=limits.RUN_OUTPUT_BYTES_MAX)]


class Usage(Struct, frozen=True, array_like=True, gc=False):
    """What a run cost: wall-clock and processor seconds, and the most memory its processes held together.

    Of a prompt: the tokens that went in and came out, the model that answered, and why it stopped (`finish_reason` as
    the endpoint says it: "stop", or "length" for an answer that was cut).
    """

    duration_s: float = 0.0
    cpu_s: float = 0.0
    memory_bytes_max: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    model: str = ""
    finish_reason: str = ""


_Told = Annotated[list[Annotated[str, Meta(max_length=400)]], Meta(max_length=NAMED_MAX)]


class Outputs(Struct, frozen=True, array_like=True, gc=False):
    """What the executor says of the output files: the archive's length, and what it left.

    `left_out` tells the first of `left_out_count` files that cannot travel, each with the reason.
    """

    bytes: Annotated[int, Meta(ge=0, le=limits.OUTPUTS_BYTES_MAX)] = 0
    left_out: _Told = []
    left_out_count: Annotated[int, Meta(ge=0, le=2**53)] = 0


class Head(Struct, frozen=True, array_like=True, gc=False):
    """A bundle without its streams and files."""

    exit_code: int | None
    signal: int | None
    stdout_bytes: _Size
    stderr_bytes: _Size
    text: str = ""
    usage: Usage = Usage()
    outputs: Outputs = Outputs()


class Bundle(Struct, frozen=True, gc=False):
    """A result: `signal` is set, and exit_code None, when a signal ended the command; `text` is a prompt's answer.

    `files` is the archive of the output files.
    """

    exit_code: int | None
    signal: int | None
    stdout: bytes = b""
    stderr: bytes = b""
    text: str = ""
    usage: Usage = Usage()
    outputs: Outputs = Outputs()
    files: bytes = b""


class Summary(Struct, frozen=True, gc=False):
    """An opened bundle as the node keeps it.

    Streams that are together at most RESULT_JSON_BYTES_MAX are here as bytes; else `stdout` and `stderr` are None and
    the store holds them as the blobs `stdout_blob` and `stderr_blob`. `sha256` is that of the plain bundle. `outputs`
    names the first of `outputs_count` output files; all of them are in the archive `outputs_blob`, read and found good.
    """

    exit_code: int | None
    signal: int | None
    text: str
    usage: Usage
    outputs: list[Any]
    sha256: bytes
    stdout_bytes: int
    stderr_bytes: int
    stdout: bytes | None
    stderr: bytes | None
    stdout_blob: bytes = b""
    stderr_blob: bytes = b""
    outputs_blob: bytes = b""
    outputs_count: int = 0
    outputs_bytes: int = 0
    outputs_missing: list[str] = []
    outputs_left_out: list[str] = []
    outputs_left_out_count: int = 0


_heads: Final = msgspec.msgpack.Decoder(Head)
_encoder: Final = msgspec.msgpack.Encoder()


def _bad(reason: str) -> VerificationError:
    return VerificationError(f"the result does not open: {reason}", hint="the sealed bytes are kept as proof")


def encode_head(head: Head) -> bytes:
    """All that stands before the streams."""
    body = _encoder.encode(head)
    return b"".join((MAGIC, len(body).to_bytes(4, "big"), body))


def encode(bundle: Bundle) -> bytes:
    """A bundle held in memory, in its plain form."""
    head = Head(
        bundle.exit_code,
        bundle.signal,
        len(bundle.stdout),
        len(bundle.stderr),
        bundle.text,
        bundle.usage,
        msgspec.structs.replace(bundle.outputs, bytes=len(bundle.files)),
    )
    return b"".join((encode_head(head), bundle.stdout, bundle.stderr, bundle.files))


def decode(plain: bytes) -> Bundle:
    """The reverse of encode; raises VerificationError for anything else."""
    head, start = _split_head(plain)
    middle = start + head.stdout_bytes
    files = middle + head.stderr_bytes
    if len(plain) != files + head.outputs.bytes:
        raise _bad("its length is not what its head says")
    out, err = plain[start:middle], plain[middle:files]
    return Bundle(head.exit_code, head.signal, out, err, head.text, head.usage, head.outputs, plain[files:])


def _split_head(plain: bytes) -> tuple[Head, int]:
    length = _head_length(plain)
    if len(plain) < 8 + length:
        raise _bad("it is cut short")
    try:
        return _heads.decode(plain[8 : 8 + length]), 8 + length
    except (ValueError, RecursionError) as error:
        raise _bad("its head is malformed") from error


def _head_length(plain: bytes) -> int:
    if plain[:4] != MAGIC:
        raise _bad("it is no result bundle")
    length = int.from_bytes(plain[4:8], "big")
    if len(plain) < 8 or length > HEAD_BYTES_MAX:
        raise _bad("its head is malformed")
    return length


def sealed_size(plain_bytes: int) -> int:
    """How long a plain bundle of this size becomes by sealing."""
    return HEADER_BYTES + plain_bytes + TAIL_BYTES * max(1, -(-plain_bytes // CHUNK_BYTES))


def _rechunk(parts: Iterable[bytes], size: int) -> Iterator[tuple[bytes, bool]]:
    """Chunks of exactly `size` bytes, the last one shorter, each with whether it is the last; always at least one."""
    held = bytearray()
    for part in parts:
        held += part
        while len(held) > size:
            yield bytes(held[:size]), False
            del held[:size]
    yield bytes(held), True


def seal_parts(parts: Iterable[bytes], key: bytes, entropy: Callable[[int], bytes]) -> Iterator[bytes]:
    """Seals a plain bundle that comes in pieces. `key` is 32 bytes, used for this one result; the header is fresh.

    The state for writing and for reading is the same function of key and header, so that the reading side's set-up
    takes a header that comes from the node's own source of randomness.
    """
    header = entropy(HEADER_BYTES)
    state = bindings.crypto_secretstream_xchacha20poly1305_state()
    bindings.crypto_secretstream_xchacha20poly1305_init_pull(state, header, key)
    yield header
    for chunk, last in _rechunk(parts, CHUNK_BYTES):
        yield bindings.crypto_secretstream_xchacha20poly1305_push(state, chunk, None, _FINAL if last else _MESSAGE)


def open_parts(parts: Iterable[bytes], key: bytes) -> Iterator[bytes]:
    """Unseals; raises VerificationError as soon as anything was changed, and at the end if the end is missing."""
    state = bindings.crypto_secretstream_xchacha20poly1305_state()
    source = iter(parts)
    held = bytearray()
    while len(held) < HEADER_BYTES:
        part = next(source, None)
        if part is None:
            raise _bad("it is cut short")
        held += part
    bindings.crypto_secretstream_xchacha20poly1305_init_pull(state, bytes(held[:HEADER_BYTES]), key)
    del held[:HEADER_BYTES]
    for chunk, last in _rechunk(_chain(bytes(held), source), CHUNK_BYTES + TAIL_BYTES):
        try:
            plain, tag = bindings.crypto_secretstream_xchacha20poly1305_pull(state, chunk, None)
        except (exceptions.CryptoError, ValueError) as error:
            raise _bad("wrong key or changed bytes") from error
        if (tag == _FINAL) != last:
            raise _bad("it is cut short, or something follows it")
        yield plain


def _chain(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield first
    yield from rest


def seal(plain: bytes, key: bytes, entropy: Callable[[int], bytes]) -> bytes:
    """Seals a bundle held in memory."""
    return b"".join(seal_parts((plain,), key, entropy))


def unseal(sealed: bytes, key: bytes) -> bytes:
    """The plain bundle; raises VerificationError for a wrong key or changed bytes."""
    return b"".join(open_parts((sealed,), key))


class Packed(Struct, frozen=True, gc=False):
    """A bundle ready to be sent: inline, or in the store when it is longer than RESULT_INLINE_BYTES_MAX."""

    inline: bytes
    blob: bytes
    blob_bytes: int
    plain_hash: bytes


def pack(
    head: Head,
    streams: Iterable[bytes],
    key: bytes | None,
    entropy: Callable[[int], bytes],
    blobs: BlobPort,
) -> Packed:
    """Writes head and streams (stdout's bytes, stderr's, the archive's) as a bundle, sealed when there is a key."""
    first = encode_head(head)
    hasher = sha256()
    plain_bytes = len(first) + head.stdout_bytes + head.stderr_bytes + head.outputs.bytes
    size = plain_bytes if key is None else sealed_size(plain_bytes)

    def hashed() -> Iterator[bytes]:
        hasher.update(first)
        yield first
        for part in streams:
            hasher.update(part)
            yield part

    parts = hashed() if key is None else seal_parts(hashed(), key, entropy)
    if size <= limits.RESULT_INLINE_BYTES_MAX:
        inline = b"".join(parts)
        return Packed(inline, b"", size, hasher.digest())
    blob = _store(blobs, parts)
    return Packed(b"", blob, size, hasher.digest())


def _store(blobs: BlobPort, parts: Iterable[bytes]) -> bytes:
    writer = blobs.writer()
    try:
        for part in parts:
            writer.write(part)
        return writer.commit()
    finally:
        writer.abort()


def unpack(
    parts: Iterable[bytes],
    key: bytes | None,
    blobs: BlobPort,
    *,
    outputs: Sequence[str] = (),
    outputs_bytes_max: int = limits.OUTPUTS_BYTES_MAX,
) -> Summary:
    """Opens a bundle that comes in pieces; long streams and output files go to the store as blobs of their own.

    `outputs` are the patterns of the files that were asked for: what else comes, or breaks a rule of names, refuses the
    whole result. Raises VerificationError. The pieces together must not be longer than the caller allows: sizes are
    declared and checked before a blob is fetched.
    """
    hasher = sha256()
    plain = iter(parts if key is None else open_parts(parts, key))
    held = bytearray()
    while len(held) < 8 or len(held) < 8 + _head_length(bytes(held[:8])):
        part = next(plain, None)
        if part is None:
            raise _bad("it is cut short")
        hasher.update(part)
        held += part
    head, start = _split_head(bytes(held))
    if head.outputs.bytes > (outputs_bytes_max if outputs else 0):
        raise _bad(f"it holds {head.outputs.bytes} bytes of files" + (", too many" if outputs else ", and none is due"))
    rest = _Cut(_hashing(bytes(held[start:]), plain, hasher))
    out: bytes | None = None
    err: bytes | None = None
    out_blob = err_blob = files_blob = b""
    if head.stdout_bytes + head.stderr_bytes <= limits.RESULT_JSON_BYTES_MAX:
        out, err = b"".join(rest.take(head.stdout_bytes)), b"".join(rest.take(head.stderr_bytes))
    else:
        out_blob = _store(blobs, rest.take(head.stdout_bytes))
        err_blob = _store(blobs, rest.take(head.stderr_bytes))
    if head.outputs.bytes:
        files_blob = _store(blobs, rest.take(head.outputs.bytes))
    rest.end()
    found = _listed(blobs, files_blob, outputs, outputs_bytes_max)
    return Summary(
        exit_code=head.exit_code,
        signal=head.signal,
        text=head.text,
        usage=head.usage,
        outputs=found.files,
        sha256=hasher.digest(),
        stdout_bytes=head.stdout_bytes,
        stderr_bytes=head.stderr_bytes,
        stdout=out,
        stderr=err,
        stdout_blob=out_blob,
        stderr_blob=err_blob,
        outputs_blob=files_blob,
        outputs_count=found.count,
        outputs_bytes=found.bytes,
        outputs_missing=found.missing,
        outputs_left_out=head.outputs.left_out,
        outputs_left_out_count=max(head.outputs.left_out_count, len(head.outputs.left_out)),
    )


def _listed(blobs: BlobPort, blob: bytes, outputs: Sequence[str], bytes_max: int) -> Listing:
    if not blob:
        return Listing([], 0, 0, list(outputs))
    try:
        with blobs.path(blob).open("rb") as file:
            return listing(file, outputs, bytes_max=bytes_max)
    except DataError as error:
        raise _bad(error.message) from error


def _hashing(first: bytes, rest: Iterator[bytes], hasher: Any) -> Iterator[bytes]:
    yield first
    for part in rest:
        hasher.update(part)
        yield part


class _Cut:
    """Takes an exact number of bytes off a sequence of pieces."""

    def __init__(self, parts: Iterator[bytes]) -> None:
        self._parts = parts
        self._held = b""

    def take(self, size: int) -> Iterator[bytes]:
        while size:
            if not self._held:
                part = next(self._parts, None)
                if part is None:
                    raise _bad("it is cut short")
                self._held = part
            piece, self._held = self._held[:size], self._held[size:]
            size -= len(piece)
            yield piece

    def end(self) -> None:
        if self._held or any(self._parts):
            raise _bad("its length is not what its head says")
