"""Becoming a member of another mesh, on the disk: what an inviter's answer makes of a home, all of it or nothing.

The order is: key and membership of the new mesh into `join.draft` -> that is renamed to `join.ready` -> what belongs to
the mesh that is left goes to the archive -> the mesh key and at last mesh.json take their places -> the empty directory
goes. Before the rename nothing of the home has changed. After it a failure takes everything back; a process that ends
there leaves a home that `resume` finishes.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from pathlib import Path

from clawnet import paths
from clawnet.errors import ClawnetError, ConfigError, DataError, StorageFullError
from clawnet.home import JOIN_READY
from clawnet.identity import membership
from clawnet.identity.certificates import certify_node, read_charter
from clawnet.identity.keybox import MESH_KEY_BYTES
from clawnet.identity.keys import KeyPair
from clawnet.identity.membership import LocalMembership
from clawnet.paths import Home
from clawnet.wire.messages import JoinAnswer


def adopted(home: Home, node: bytes, answer: JoinAnswer, now_ms: int) -> LocalMembership:
    """The membership that an answer gives this node; nothing is written.

    Raises NotPermittedError, ConfigError or DataError when the answer does not make it a member.
    """
    _, mesh = read_charter(answer.charter)
    chain = list(answer.certificates)
    if answer.ring == "member":
        owner = KeyPair.load(home.owner_key)
        chain.append(certify_node(owner, mesh, node, issued_ms=now_ms, inviter=answer.inviter))
    if len(answer.mesh_key) != (0 if answer.lease_s else MESH_KEY_BYTES):
        raise DataError("the inviter's answer has no mesh key as it should be", hint="ask for a new token")
    local = LocalMembership(
        charter=answer.charter,
        certificates=tuple(chain),
        founded=False,
        inviter=answer.inviter,
        ring=answer.ring,
        lease_s=answer.lease_s,
    )
    local.verified(node)
    return local


def write_aside(home: Home, local: LocalMembership, mesh_key: bytes) -> None:
    """The draft of the new membership; what cannot be written is found here, where nothing has changed.

    Raises StorageFullError or ConfigError.
    """
    draft = Home(_draft(home))
    try:
        discard(home)
        paths.make_private_dir(draft.dir)
        paths.make_private_dir(draft.keys_dir)
        membership.save_mesh_key(draft, mesh_key or bytes(MESH_KEY_BYTES))
        membership.save_membership(draft, local)
        paths.sync_directory(draft.dir)
    except (OSError, ClawnetError) as error:
        shutil.rmtree(draft.dir, ignore_errors=True)
        raise _refused(home, error, "the node stays in its mesh; put that right and join again") from error


def settle_in(home: Home) -> None:
    """Archives what belongs to the mesh that is left, and the draft takes its place. The database must be closed.

    Raises StorageFullError or ConfigError, with everything back where it was.
    """
    archives = _archives(home)
    try:
        os.replace(_draft(home), _ready(home))
        paths.sync_directory(home.dir)
        resume(home)
    except (OSError, ClawnetError) as error:
        try:
            _take_back(home, _archives(home) - archives)
        except (OSError, ClawnetError):
            hint = f"put that right and start the node again: it goes on with {_ready(home)}"
        else:
            hint = "the node stays in its mesh; put that right, start it again, and join again"
        raise _refused(home, error, hint) from error


def half_done(home: Home) -> bool:
    """Whether a join was cut short that the next start finishes, or a draft of one is left."""
    return _ready(home).exists() or _draft(home).exists()


def resume(home: Home) -> None:
    """Goes on with a join that had come so far that it counts; the caller has the home to itself. May raise OSError."""
    ready = Home(_ready(home))
    if not ready.dir.exists():
        return
    if ready.mesh_key.exists():
        # While the new key is here, whatever lies in the home's own places is of the mesh that is left.
        stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        paths.archive(home, stamp, keep_owner=membership.load_membership(ready).ring == "member")
        paths.sync_directory(home.archive_dir)
        os.replace(ready.mesh_key, home.mesh_key)
        paths.sync_directory(home.keys_dir)
    if ready.mesh_file.exists():
        os.replace(ready.mesh_file, home.mesh_file)
        paths.sync_directory(home.dir)
    shutil.rmtree(ready.dir)


def discard(home: Home) -> None:
    """Throws away a draft that never counted."""
    if _draft(home).exists():
        shutil.rmtree(_draft(home))


def _take_back(home: Home, archived: set[Path]) -> None:
    """What was archived returns to its place, and the draft counts no longer; cut short, it is a join to go on with."""
    ready = Home(_ready(home))
    if ready.dir.exists() and not ready.mesh_file.exists():
        os.replace(home.mesh_file, ready.mesh_file)
    if ready.dir.exists() and not ready.mesh_key.exists():
        os.replace(home.mesh_key, ready.mesh_key)
    for directory in archived:
        for path in sorted(directory.iterdir()):
            _put_back(path, _place(home, path.name))
        directory.rmdir()
    for place in (home.dir, home.keys_dir, home.data_dir):
        paths.sync_directory(place)
    if ready.dir.exists():
        os.replace(ready.dir, _draft(home))
    discard(home)


def _place(home: Home, name: str) -> Path:
    if name.startswith(home.database.name):
        return home.data_dir / name
    return home.mesh_file if name == home.mesh_file.name else home.keys_dir / name


def _put_back(path: Path, place: Path) -> None:
    try:
        os.replace(path, place)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        paths.write_private(place, path.read_bytes())
        path.unlink()


def _archives(home: Home) -> set[Path]:
    return set(home.archive_dir.iterdir()) if home.archive_dir.exists() else set()


def _draft(home: Home) -> Path:
    return home.dir / "join.draft"


def _ready(home: Home) -> Path:
    return home.dir / JOIN_READY


def _refused(home: Home, error: OSError | ClawnetError, hint: str) -> ClawnetError:
    full = isinstance(error, StorageFullError) or getattr(error, "errno", 0) == errno.ENOSPC
    why = error.message if isinstance(error, ClawnetError) else str(error)
    return (StorageFullError if full else ConfigError)(f"{home.dir} cannot join another mesh: {why}", hint=hint)
