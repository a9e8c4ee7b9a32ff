"""The mesh's keys on the disk: the newest, those before it, and both out of the way when another mesh is joined."""

from __future__ import annotations

from clawnet import paths
from clawnet.identity import membership
from clawnet.paths import Home


def test_a_new_key_leaves_the_older_ones_readable_and_private(fresh_home: Home) -> None:
    home = fresh_home
    first = membership.load_mesh_key(home)
    membership.keep_mesh_key(home, 1, b"1" * 32, {0: first})
    membership.keep_mesh_key(home, 2, b"2" * 32, {1: b"1" * 32, 0: first})
    assert membership.load_mesh_key(home) == b"2" * 32
    for epoch, key in ((0, first), (1, b"1" * 32)):
        path = home.old_mesh_key(epoch)
        assert membership.read_secret(path, membership.MESH_KEY_PREFIX) == key
        assert path.stat().st_mode & 0o777 == 0o600
    membership.keep_mesh_key(home, 2, b"2" * 32, {1: b"other".ljust(32), -3: first, 7: first})
    assert membership.read_secret(home.old_mesh_key(1), membership.MESH_KEY_PREFIX) == b"1" * 32
    assert sorted(path.name for path in home.keys_dir.glob("mesh-*")) == ["mesh-0.key", "mesh-1.key"]


def test_who_joins_another_mesh_begins_with_its_key_alone(fresh_home: Home) -> None:
    home = fresh_home
    membership.keep_mesh_key(home, 1, b"1" * 32, {0: membership.load_mesh_key(home)})
    paths.archive(home, "then", keep_owner=True)
    assert not list(home.keys_dir.glob("mesh*"))
    archived = {path.name for path in (home.archive_dir / "then").iterdir()}
    assert {"mesh.json", "mesh.key", "mesh-0.key"} <= archived
