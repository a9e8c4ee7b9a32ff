"""A whole wallet as one passphrase-encrypted file, and back: keys, membership, ledger, peers, open lines.

The file is one line of JSON, which says how the key comes from the passphrase, and a libsodium secretstream of pieces,
each with its length before it: first the contents, then the reduced database. The stream's last piece is marked, so a
file that was cut short is known for one. The line is authenticated with every piece.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final, NoReturn

import msgspec
from msgspec import Struct
from nacl import bindings

from clawnet import __version__, config, limits, paths
from clawnet.errors import ConfigError, DataError, NotPermittedError, StorageFullError
from clawnet.identity import export
from clawnet.identity.export import Identity
from clawnet.identity.keys import KeyPair
from clawnet.market.records import decode_task, encode
from clawnet.mesh.roster import PeerRecord
from clawnet.paths import Home
from clawnet.storage import reduced, restoring
from clawnet.storage.filelock import FileLock

FORMAT: Final = "clawnet-wallet"
PIECE_BYTES: Final = 256 * limits.KIB
REASON: Final = "it was restored from a backup"
_HEADER_BYTES_MAX: Final = 4 * limits.KIB
_TAG_MESSAGE: Final = bindings.crypto_secretstream_xchacha20poly1305_TAG_MESSAGE
_TAG_FINAL: Final = bindings.crypto_secretstream_xchacha20poly1305_TAG_FINAL
_OVERHEAD: Final = bindings.crypto_secretstream_xchacha20poly1305_ABYTES


class _Header(Struct, frozen=True):
    format: str
    v: int
    kdf: str
    ops: export.Ops
    memory_bytes: export.MemoryBytes
    salt: bytes


class Named(Struct, frozen=True):
    """A peer that will be asked for the own chain after a restore."""

    peer: str
    name: str
    ring: str
    addresses: list[str]


class Contents(Struct, frozen=True):
    """The first piece: who this is, and what the rest holds. `seq` is the head of the own chain, -1 for none."""

    identity: Identity
    made_ms: int
    version: str
    seq: int
    entries: int
    peers: list[Named]
    name: str = ""
    """What the node was called."""


class Told(Struct, frozen=True):
    """What a backup or a restore did."""

    peer_id: str
    path: str
    made_ms: int
    seq: int
    entries: int
    peers: list[Named]
    bytes: int


# --- making one


def back_up(
    home: Home, target: Path | BinaryIO, passphrase: str, *, name: str = "", check_permissions: bool = True
) -> Told:
    """Writes the backup of `home`, whose daemon may run, to a file (whole or not at all, mode 0600) or a pipe.

    `name` is what its configuration calls the node.

    Raises DataError for a passphrase that is too short, ConfigError when the home is not initialised, NotFoundError
    when it has no database yet, BrokenPipeError when nobody reads the pipe.
    """
    export.check_passphrase(passphrase)
    identity = export.collect(home, check_permissions=check_permissions)
    node = KeyPair.from_seed(identity.node_seed)
    head = reduced.reduce(home.database, identity.membership.account(node.public), _not_again)
    peers = [_named(body) for _, body in head.peers]
    contents = Contents(identity, time.time_ns() // 1_000_000, __version__, head.seq, head.entries, peers, name)
    try:
        if isinstance(target, Path):
            with paths.whole(target) as file:
                written = _write(file, contents, head.image, passphrase)
        else:
            written = _write(target, contents, head.image, passphrase)
    except BrokenPipeError:
        raise
    except OSError as error:
        _refuse(f"cannot write the backup {'' if not isinstance(target, Path) else target}".rstrip(), error)
    path = str(target) if isinstance(target, Path) else "-"
    return Told(node.peer_id, path, contents.made_ms, head.seq, head.entries, contents.peers, written)


def _named(body: bytes) -> Named:
    record = msgspec.msgpack.decode(body, type=PeerRecord)
    return Named(record.peer, record.shown, record.ring, record.addresses)


def _not_again(body: bytes) -> tuple[str, bytes] | None:
    """A task without a line in the chain may have run by the time of the restore: it is not begun again."""
    task = decode_task(body)
    if any(attempt.lock_seq >= 0 and not attempt.closed for attempt in task.attempts):
        return None
    for attempt in task.attempts:
        attempt.closed = True
    task.state = "failed"
    task.error_code, task.error_hint = "restored", "submit it again if it must run"
    task.error_text = "the task was open when the backup was made; how it ended is not known here"
    return task.state, encode(task)


def _write(file: BinaryIO, contents: Contents, image: bytes, passphrase: str) -> int:
    salt = os.urandom(bindings.crypto_pwhash_SALTBYTES)
    header = msgspec.json.encode(_Header(FORMAT, 1, "argon2id13", export.OPS, export.MEMORY_BYTES, salt)) + b"\n"
    state = bindings.crypto_secretstream_xchacha20poly1305_state()
    key = export.derive(passphrase, salt, export.OPS, export.MEMORY_BYTES)
    stream = bindings.crypto_secretstream_xchacha20poly1305_init_push(state, key)
    written = file.write(header + stream)

    def push(piece: bytes, tag: int) -> int:
        sealed = bindings.crypto_secretstream_xchacha20poly1305_push(state, piece, header, tag)
        return file.write(len(sealed).to_bytes(4, "big") + sealed)

    plain = msgspec.msgpack.encode(contents)
    written += push(len(plain).to_bytes(8, "big"), _TAG_MESSAGE)
    for at in range(0, len(plain), PIECE_BYTES):
        written += push(plain[at : at + PIECE_BYTES], _TAG_MESSAGE)
    view = memoryview(image)
    for at in range(0, len(view), PIECE_BYTES):
        last = at + PIECE_BYTES >= len(view)
        written += push(bytes(view[at : at + PIECE_BYTES]), _TAG_FINAL if last else _TAG_MESSAGE)
    return written


# --- and back


def restore(home: Home, source: BinaryIO, passphrase: str, *, force: bool = False) -> Told:
    """Puts a backup into a home without keys or database; its chain is read-only until the known peers answered.

    The whole file is read and checked before anything in the home changes, and the change is one rename: a process that
    is killed leaves the home as it was, or one that the next start finishes (restoring.py). With `force` what the home
    held goes to its archive. Without a configuration the home gets one with the node's name. Raises NotPermittedError
    for a home that is in use otherwise, ConfigError while a daemon has it, DataError for a file or passphrase that is
    wrong.
    """
    pieces = _read(source, passphrase)
    contents = _contents(pieces)
    node = KeyPair.from_seed(contents.identity.node_seed)
    contents.identity.membership.verified(node.public)
    for directory in (home.dir, home.keys_dir, home.run_dir, home.data_dir, home.logs_dir):
        paths.make_private_dir(directory)
    lock = FileLock.take(home.lock_file, what=f"the home {home.dir}")
    try:
        restoring.resume(home)
        if not force:
            _check_empty(home)
        draft = restoring.begin(home)
        size = _write_database(draft, pieces)
        reduced.revive(draft, REASON)
        restoring.finish(home, contents.identity)
        if contents.name and not home.config_file.exists():
            paths.make_private_dir(home.config_file.parent)
            config.write_new(home.config_file, {"node.name": contents.name})
    except OSError as error:
        _refuse(f"cannot restore into {home.dir}", error)
    finally:
        restoring.discard(home)
        lock.release()
    return Told(node.peer_id, str(home.dir), contents.made_ms, contents.seq, contents.entries, contents.peers, size)


def _is_empty(home: Home) -> bool:
    return not any(path.exists() for path in (home.node_key, home.mesh_file, home.database, home.owner_key))


def _check_empty(home: Home) -> None:
    if not _is_empty(home):
        raise NotPermittedError(
            f"{home.dir} already holds a node; its keys and chain are not overwritten",
            hint="restore into an empty home (clawnet --home DIR wallet restore FILE); --force archives what is here",
        )


def _read(source: BinaryIO, passphrase: str) -> Iterator[bytes]:
    """The opened pieces, to the one that is marked as the last."""
    header = source.readline(_HEADER_BYTES_MAX)
    try:
        told = msgspec.json.decode(header, type=_Header)
    except (ValueError, RecursionError) as error:
        raise DataError("this is no backup of a wallet", hint="`clawnet wallet backup FILE` makes one") from error
    if told.format != FORMAT:
        raise DataError("this is no backup of a wallet", hint="an exported identity: clawnet identity import FILE")
    if told.v != 1 or told.kdf != "argon2id13":
        raise DataError("this backup was made by a newer version of clawnet", hint="install that version")
    if len(told.salt) != bindings.crypto_pwhash_SALTBYTES:
        raise DataError("the backup is damaged")
    stream = source.read(bindings.crypto_secretstream_xchacha20poly1305_HEADERBYTES)
    if len(stream) < bindings.crypto_secretstream_xchacha20poly1305_HEADERBYTES:
        raise DataError("the backup is cut short")
    state = bindings.crypto_secretstream_xchacha20poly1305_state()
    key = export.derive(passphrase, told.salt, told.ops, told.memory_bytes)
    bindings.crypto_secretstream_xchacha20poly1305_init_pull(state, stream, key)
    tag, first = _TAG_MESSAGE, True
    while tag != _TAG_FINAL:
        size = int.from_bytes(source.read(4), "big")
        sealed = source.read(min(size, PIECE_BYTES + _OVERHEAD))
        if size > PIECE_BYTES + _OVERHEAD or len(sealed) < max(size, _OVERHEAD):
            raise DataError("the backup is damaged or cut short")
        try:
            piece, tag = bindings.crypto_secretstream_xchacha20poly1305_pull(state, sealed, header)
        except RuntimeError as error:
            text = "the passphrase is wrong, or the backup is damaged" if first else "the backup is damaged"
            raise DataError(text) from error
        first = False
        yield piece
    if source.read(1):
        raise DataError("the backup is damaged: something follows its end")


def _contents(pieces: Iterator[bytes]) -> Contents:
    left = int.from_bytes(next(pieces, b""), "big")
    if not 0 < left <= limits.BACKUP_CONTENTS_BYTES_MAX:
        raise DataError("the backup is damaged")
    plain = b""
    while left > len(plain):
        piece = next(pieces, b"")
        if not piece:
            raise DataError("the backup is cut short")
        plain += piece
    try:
        return msgspec.msgpack.decode(plain, type=Contents)
    except (ValueError, RecursionError) as error:
        raise DataError("the backup is damaged, or was made by a newer version of clawnet") from error


def _write_database(draft: Path, pieces: Iterator[bytes]) -> int:
    draft.unlink(missing_ok=True)
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
    size = 0
    with os.fdopen(handle, "wb") as file:
        for piece in pieces:
            size += file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return size


def _refuse(what: str, error: OSError) -> NoReturn:
    import errno

    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        raise StorageFullError(f"{what}: {error.strerror}", hint="make room on the disk and try again") from error
    raise ConfigError(f"{what}: {error.strerror}") from error
