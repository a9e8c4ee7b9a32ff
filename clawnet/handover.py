"""A node's change of key on the disk: the next key written aside, and the old one destroyed once the chain has it.

The order is: the next key aside -> rotate entry and the row `handover`, in one transaction (node/succession.py) ->
mesh.json -> the key file. A process that ends anywhere in between leaves a home that `settle` finishes, or takes back
where the entry was never written.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import msgspec

from clawnet import adoption, paths
from clawnet.errors import ClawnetError, ConfigError
from clawnet.identity.keys import KeyPair
from clawnet.identity.membership import Handover, load_membership, save_membership
from clawnet.mesh.ids import HANDOVER_ROW, HandoverRow
from clawnet.paths import Home
from clawnet.storage import restoring
from clawnet.storage.filelock import FileLock
from clawnet.storage.store import Store


def begin(home: Home, entropy: Callable[[int], bytes]) -> KeyPair:
    """A new key, written aside before anybody hears of it."""
    key = KeyPair.generate(entropy)
    key.save(home.next_node_key)
    return key


def finish(home: Home, written: HandoverRow, *, check_permissions: bool = True) -> None:
    """The entry is durable: mesh.json tells of it, the next key takes the old one's place, and that is overwritten."""
    if KeyPair.load(home.next_node_key, check_permissions=check_permissions).public != written.new_key:
        raise ConfigError(
            f"{home.next_node_key} is not the key that the chain went over to", hint="put that back there"
        )
    local = load_membership(home, check_permissions=check_permissions)
    if all(handover.entry != written.entry for handover in local.handovers):
        handovers = (*local.handovers, Handover(written.key, written.entry))
        local = msgspec.structs.replace(local, handovers=handovers, certificates=written.certificates)
        save_membership(home, local)
    try:
        with home.node_key.open("r+b") as old:
            old.write(bytes(os.fstat(old.fileno()).st_size))
            old.flush()
            os.fsync(old.fileno())
        home.next_node_key.replace(home.node_key)
        paths.sync_directory(home.keys_dir)
    except OSError as error:
        raise ConfigError(
            f"the new key cannot take its place at {home.node_key}: {error.strerror}",
            hint="repair that, then start the node again: it goes on where this ended",
        ) from error


def settle(home: Home, *, check_permissions: bool = True) -> bool:
    """Finishes a change of key that a crash cut short, or takes it back; False when there is none or a daemon runs.

    Whoever is about to read the node's key calls this first. A restore or a join that was cut short is finished before
    that.
    """
    restoring.settle(home)
    if not home.next_node_key.exists() and not adoption.half_done(home):
        return False
    try:
        lock = FileLock.take(home.lock_file, what=f"the home {home.dir}")
    except ConfigError:
        return False
    try:
        _finish_join(home)
        if not home.next_node_key.exists():
            return False
        key = KeyPair.load(home.next_node_key, check_permissions=check_permissions)
        written = _written(home)
        if written is not None and written.new_key == key.public:
            finish(home, written, check_permissions=check_permissions)
        else:
            home.next_node_key.unlink(missing_ok=True)
            paths.sync_directory(home.keys_dir)
    finally:
        lock.release()
    return True


def _finish_join(home: Home) -> None:
    try:
        adoption.resume(home)
        adoption.discard(home)
    except OSError as error:
        raise ConfigError(
            f"the join into another mesh was cut short and cannot be finished: {error}",
            hint="repair that and start the node again: it goes on where this ended",
        ) from error


def _written(home: Home) -> HandoverRow | None:
    if not home.database.exists():
        return None
    store = Store.open(home.database)
    try:
        row = next((body for key, body in store.load_all("meta") if key == HANDOVER_ROW), None)
        return None if row is None else msgspec.msgpack.decode(row, type=HandoverRow)
    except (msgspec.MsgspecError, ClawnetError) as error:
        raise ConfigError(
            f"whether the change of key was finished cannot be read from {home.database}: {error}",
            hint="restore the home from a backup",
        ) from error
    finally:
        store.close()
