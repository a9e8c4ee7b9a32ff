"""A restore and a backup that are killed at every step: the home is the one or the other, and nothing lies in plain."""

from __future__ import annotations

import io
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clawnet import backup
from clawnet.identity import export
from clawnet.identity.keys import KeyPair
from clawnet.identity.membership import create_home, load_escrow_seed, load_membership, load_mesh_key
from clawnet.paths import Home
from clawnet.storage import restoring
from clawnet.storage.store import Store
from clawnet.wire.events import Put

pytestmark = pytest.mark.slow

WORD = "correct horse battery"
STEPS = ("replace", "fsync", "unlink", "rmdir", "mkdir")


@pytest.fixture(autouse=True)
def quick_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Argon2id takes a second each time; this is not what is looked at here."""
    monkeypatch.setattr(export, "derive", lambda passphrase, *rest: passphrase.encode().ljust(32)[:32])


def made(directory: Path, name: str) -> Home:
    """A home with a database in which its name stands."""
    home = Home(directory)
    create_home(home, name, os.urandom, 1_800_000_000_000)
    store = Store.open(home.database)
    store.commit([Put("meta", ("spent:name", name.encode()))])
    store.close()
    return home


def told(home: Home) -> tuple[Any, ...]:
    """Who a home is, by all that must belong together."""
    store = Store.open(home.database)
    name = dict(store.load_all("meta"))["spent:name"]
    store.close()
    node = KeyPair.load(home.node_key)
    membership = load_membership(home)
    membership.verified(node.public)
    return node.peer_id, KeyPair.load(home.owner_key).seed, load_escrow_seed(home), load_mesh_key(home), name


def killed(step: int, work: Callable[[], Any]) -> bool:
    """Does `work` in a process that is killed just before its file operation number `step`; False when it had fewer."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            done = iter(range(step))

            def counted(real: Callable[..., Any]) -> Callable[..., Any]:
                def call(*args: Any, **more: Any) -> Any:
                    if next(done, None) is None:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*args, **more)

                return call

            for name in STEPS:
                setattr(os, name, counted(getattr(os, name)))
            work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.waitstatus_to_exitcode(status) == 0
    return False


def saved(home: Home) -> bytes:
    file = io.BytesIO()
    backup.back_up(home, file, WORD)
    return file.getvalue()


def leftovers(home: Home) -> list[str]:
    """Files that no home has for long."""
    return [p.name for p in home.dir.iterdir() if p.name.startswith((".backup", ".restor", "restore."))]


@pytest.mark.parametrize("occupied", [False, True], ids=["empty", "forced"])
def test_a_restore_killed_at_any_step_is_all_or_nothing(tmp_path: Path, occupied: bool) -> None:
    source = made(tmp_path / "source", "alice")
    data, wanted = saved(source), told(source)
    before = told(made(tmp_path / "model", "bob")) if occupied else None
    seen = set()
    for step in range(500):
        home = Home(tmp_path / "home")
        if occupied:
            shutil.copytree(tmp_path / "model", home.dir, copy_function=shutil.copy2)
        more = killed(step, lambda home=home: backup.restore(home, io.BytesIO(data), WORD, force=occupied))
        restoring.settle(home)
        assert leftovers(home) == [] if home.dir.exists() else True, step
        if home.mesh_file.exists():
            found = told(home)
            assert found in (wanted, before), step
            if found == wanted and occupied:
                names = {path.name for path in home.archive_dir.rglob("*")}
                assert {"node.key", "mesh.json", "escrow.seed", "mesh.key", "owner.key", "clawnet.db"} <= names
            seen.add("new" if found == wanted else "old")
        else:
            assert not occupied and not home.database.exists() and not home.node_key.exists(), step
            seen.add("old")
            backup.restore(home, io.BytesIO(data), WORD)
            assert told(home) == wanted
        if not more:
            break
        shutil.rmtree(home.dir, ignore_errors=True)
    else:
        raise AssertionError("it never came to its end")
    assert seen == {"old", "new"} and step > 10


def test_a_half_done_restore_is_finished_again_when_that_is_killed_too(tmp_path: Path) -> None:
    source = made(tmp_path / "source", "alice")
    data, wanted = saved(source), told(source)
    model = made(tmp_path / "model", "bob")
    home = Home(tmp_path / "home")

    def restore() -> None:
        backup.restore(home, io.BytesIO(data), WORD, force=True)

    for first in range(500):  # to the first step after which the restore counts
        shutil.copytree(model.dir, home.dir, copy_function=shutil.copy2)
        assert killed(first, restore), "no step leaves it half done"
        if home.half_restored:
            break
        shutil.rmtree(home.dir)
    shutil.copytree(home.dir, tmp_path / "half", copy_function=shutil.copy2)
    for step in range(500):
        more = killed(step, lambda: restoring.settle(home))
        restoring.settle(home)
        assert told(home) == wanted and leftovers(home) == []
        if not more:
            break
        shutil.rmtree(home.dir)
        shutil.copytree(tmp_path / "half", home.dir, copy_function=shutil.copy2)
    assert step > 5


def test_a_backup_that_is_killed_leaves_nothing_in_plain(tmp_path: Path) -> None:
    home = made(tmp_path / "home", "alice")
    before = {path for path in home.dir.rglob("*") if path.is_file()}
    for step in range(100):
        if not killed(step, lambda: backup.back_up(home, tmp_path / "saved", WORD)):
            break
        left = {path for path in home.dir.rglob("*") if path.is_file()} - before
        assert {path.name for path in left} <= {"clawnet.db-wal", "clawnet.db-shm"}, step
    assert step >= 2


def test_what_an_earlier_version_left_in_plain_is_swept(tmp_path: Path) -> None:
    home = made(tmp_path / "home", "alice")
    for name in (".backup.123.db", ".backup.123.db-journal", ".restore.9.db"):
        (home.data_dir / name).write_bytes(b"plain")
    restoring.settle(home)
    assert leftovers(home) == []
