"""A restored wallet taking its place in a home: all of it or nothing, whenever the process ends.

The order is: keys, membership and database into `restore.draft` -> that is renamed to `restore.ready` -> what the home
held goes to the archive -> renamed to `restore.placing` -> the database, the keys and at last mesh.json take their
places -> the empty directory goes. Before the first rename nothing of the home has changed, and what there is of a
draft is thrown away; after it whoever next looks at the home (`settle`) goes on where this ended.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Final

from clawnet import paths
from clawnet.errors import ConfigError
from clawnet.identity import export
from clawnet.identity.export import Identity
from clawnet.paths import Home
from clawnet.storage.filelock import FileLock

_OLD_DRAFTS: Final = (".backup.*.db*", ".restore.*.db*", ".restoring.db*")


def begin(home: Home) -> Path:
    """An empty draft; returns where the database belongs while it is made, on the file system it will live on."""
    discard(home)
    paths.make_private_dir(home.restore_draft)
    return _database(home)


def finish(home: Home, identity: Identity) -> None:
    """The database is complete: keys and membership join it, and all of it takes its place."""
    draft = Home(home.restore_draft)
    paths.make_private_dir(draft.keys_dir)
    export.install(draft, identity)
    _sync(_database(home))
    paths.sync_directory(home.data_dir)
    paths.sync_directory(draft.keys_dir)
    paths.sync_directory(draft.dir)
    os.replace(home.restore_draft, home.restore_ready)
    paths.sync_directory(home.dir)
    resume(home)


def resume(home: Home) -> None:
    """Goes on with a restore that had come so far that it counts; the caller holds the home's lock."""
    if home.restore_ready.exists():
        held = (home.node_key, home.mesh_file, home.database, home.owner_key, home.escrow_seed, home.mesh_key)
        if any(path.exists() for path in held):
            paths.archive(home, time.strftime("%Y%m%d-%H%M%S", time.gmtime()), keep_owner=False, keys=True)
            paths.sync_directory(home.archive_dir)
        os.replace(home.restore_ready, home.restore_placing)
        paths.sync_directory(home.dir)
    if not home.restore_placing.exists():
        return
    draft = Home(home.restore_placing)
    if _database(home).exists():
        os.replace(_database(home), home.database)
    elif not home.database.exists():
        raise ConfigError(
            f"a restore into {home.dir} was cut short, and its database is not in {home.data_dir}",
            hint=f"set node.data_dir back to what it was, or remove {home.restore_placing} and restore again",
        )
    paths.sync_directory(home.data_dir)
    for key in sorted(draft.keys_dir.glob("*")):
        os.replace(key, home.keys_dir / key.name)
    paths.sync_directory(home.keys_dir)
    if draft.mesh_file.exists():
        os.replace(draft.mesh_file, home.mesh_file)
    paths.sync_directory(home.dir)
    shutil.rmtree(home.restore_placing)


def discard(home: Home) -> None:
    """Throws away a draft that never counted, and what a version before this one may have left in plain."""
    if home.restore_draft.exists():
        shutil.rmtree(home.restore_draft)
    if home.half_restored:
        return
    for pattern in _OLD_DRAFTS:
        for path in home.data_dir.glob(pattern):
            path.unlink(missing_ok=True)


def settle(home: Home) -> None:
    """Finishes or throws away a restore that was cut short; nothing while a daemon or a restore has the home."""
    drafts = any(True for pattern in _OLD_DRAFTS for _ in home.data_dir.glob(pattern))
    if not (home.half_restored or home.restore_draft.exists() or drafts):
        return
    try:
        lock = FileLock.take(home.lock_file, what=f"the home {home.dir}")
    except ConfigError:
        return
    try:
        resume(home)
        discard(home)
    except OSError as error:
        raise ConfigError(
            f"a restore into {home.dir} was cut short and cannot be finished: {error.strerror}",
            hint="repair that and start the node again: it goes on where this ended",
        ) from error
    finally:
        lock.release()


def _database(home: Home) -> Path:
    return home.data_dir / ".restoring.db"


def _sync(path: Path) -> None:
    with path.open("r+b") as file:
        os.fsync(file.fileno())
