"""A home on a real disk: made whole, made once, finished when it was cut short, refused when others may touch it."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import msgspec
import pytest

from clawnet import home as homes
from clawnet import paths
from clawnet.errors import ConfigError, DataError, NotPermittedError, StorageFullError
from clawnet.identity.export import PASSPHRASE_CHARS_MIN, export_identity, import_identity
from clawnet.identity.keys import KeyPair
from clawnet.identity.membership import (
    create_home,
    load_escrow_seed,
    load_membership,
    load_mesh_key,
    save_membership,
)
from clawnet.paths import Home, resolve_home
from tests.conftest import NOW_MS, counted_entropy

PASSPHRASE = "correct horse battery staple"


def contents(home: Home) -> dict[str, bytes]:
    """Every file of a home."""
    return {path.relative_to(home.dir).as_posix(): path.read_bytes() for path in home.dir.rglob("*") if path.is_file()}


def make(home: Home, seed: str = "x") -> homes.Initialised:
    return homes.initialise(home, {}, {}, entropy=counted_entropy(seed), now_ms=NOW_MS, name="alice")


def test_a_new_home_is_whole_and_private(home: Home) -> None:
    made = make(home)
    assert sorted(contents(home)) == [
        "config.yaml",
        "keys/escrow.seed",
        "keys/mesh.key",
        "keys/node.key",
        "keys/owner.key",
        "mesh.json",
    ]
    for path in [home.dir, *home.dir.rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    charter, _, member = made.membership.verified(made.node.public)
    assert charter.name == "alice"
    assert charter.issuers == (made.node.public,)
    assert charter.founder == member.owner == KeyPair.load(home.owner_key).public
    assert made.membership.founded
    assert len(load_mesh_key(home)) == len(load_escrow_seed(home)) == 32


def test_a_second_run_changes_nothing(home: Home) -> None:
    make(home)
    before = contents(home)
    assert make(home, "y").made == ()
    assert contents(home) == before


def test_force_writes_only_the_configuration(home: Home) -> None:
    make(home)
    before = contents(home)
    home.config_file.write_text("market:\n  bid_timout: 5s\n")
    again = homes.initialise(home, {}, {}, entropy=counted_entropy("y"), now_ms=NOW_MS, name="bob", force=True)
    assert again.made == (str(home.config_file),)
    after = contents(home)
    assert after.pop("config.yaml.old") == b"market:\n  bid_timout: 5s\n"
    assert b"name: bob" in after.pop("config.yaml")
    before.pop("config.yaml")
    assert after == before


@pytest.mark.parametrize("lost", ["mesh.json", "keys/node.key", "keys/owner.key", "keys/escrow.seed", "keys/mesh.key"])
def test_a_home_cut_short_is_finished(home: Home, lost: str) -> None:
    """mesh.json is written last: without it any of the keys may be missing."""
    make(home)
    before = contents(home)
    for word in {lost, "mesh.json"}:
        (home.dir / word).unlink()
    made = make(home, "y")
    assert {str(home.dir / word) for word in {lost, "mesh.json"}} == set(made.made)
    after = contents(home)
    assert {word for word in before if before[word] != after[word]} == {lost, "mesh.json"}
    made.membership.verified(KeyPair.load(home.node_key).public)


@pytest.mark.parametrize("lost", ["node.key", "escrow.seed", "mesh.key"])
def test_a_key_that_is_gone_is_never_made_anew(home: Home, lost: str) -> None:
    make(home)
    (home.keys_dir / lost).unlink()
    with pytest.raises(ConfigError, match="there is no key file"):
        make(home, "y")


def test_a_database_without_its_mesh_is_not_given_another(home: Home) -> None:
    make(home)
    home.mesh_file.unlink()
    home.database.write_bytes(b"")
    with pytest.raises(ConfigError, match=r"a database but no mesh\.json"):
        make(home)


def test_the_balance_of_the_environment_is_kept_and_covered_by_the_charter(home: Home) -> None:
    environ = {"CLAWNET_WALLET_BALANCE": "20000", "CLAWNET_NODE_NAME": "carol"}
    made = homes.initialise(home, environ, {}, entropy=counted_entropy("x"), now_ms=NOW_MS)
    assert made.membership.verified(made.node.public)[0].grant_max_ucr == 20_000_000_000
    later = homes.initialise(home, {}, {}, entropy=counted_entropy("x"), now_ms=NOW_MS)
    assert later.config.amount_ucr("market.initial_wallet_balance") == 20_000_000_000
    assert later.config.text("node.name") == "carol"


def test_data_may_lie_elsewhere(home: Home, tmp_path: Path) -> None:
    environ = {"CLAWNET_NODE_DATA_DIR": str(tmp_path / "data")}
    made = homes.initialise(home, environ, {}, entropy=counted_entropy("x"), now_ms=NOW_MS)
    assert made.home.logs_dir == tmp_path / "data" / "logs"
    assert made.home.logs_dir.is_dir()


@pytest.mark.parametrize(
    ("word", "mode", "remedy"),
    [
        ("keys/node.key", 0o640, "chmod 600"),
        ("keys/node.key", 0o604, "chmod 600"),
        ("keys/mesh.key", 0o660, "chmod 600"),
        ("keys", 0o770, "chmod 700"),
        ("mesh.json", 0o622, "chmod 600"),
        (".", 0o777, "chmod 700"),
        ("config.yaml", 0o666, "chmod 600"),
    ],
)
def test_what_others_may_touch_is_refused_with_the_line_that_helps(
    home: Home, word: str, mode: int, remedy: str
) -> None:
    make(home)
    path = home.dir / word
    path.chmod(mode)
    with pytest.raises(ConfigError) as caught:
        make(home)
    assert caught.value.hint == f"{remedy} {path.resolve()}"
    environ = {"CLAWNET_SECURITY_CHECK_PERMISSIONS": "false"}
    assert homes.initialise(home, environ, {}, entropy=counted_entropy("x"), now_ms=NOW_MS).made == ()


def test_a_file_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"")
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    with pytest.raises(ConfigError, match="belongs to another user") as caught:
        paths.check_private(path)
    assert caught.value.hint == f"sudo chown {me + 1} {path}"


@pytest.mark.parametrize(
    "text", ["", "hello\n", "clawnet-ed25519-1:AAAA\n", "clawnet-mesh-key-1:" + "A" * 43 + "=\n", "\xff"]
)
def test_a_file_that_is_no_key(tmp_path: Path, text: str) -> None:
    path = tmp_path / "node.key"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="no key file of this kind"):
        KeyPair.load(path)


def test_a_damaged_membership(fresh_home: Home) -> None:
    fresh_home.mesh_file.write_text("{")
    with pytest.raises(ConfigError, match="is damaged"):
        load_membership(fresh_home)
    fresh_home.mesh_file.write_text('{"charter": "", "certificates": [], "founded": true, "v": 2}')
    with pytest.raises(ConfigError, match="newer version"):
        load_membership(fresh_home)


def test_a_membership_of_another_node_is_refused(fresh_home: Home, tmp_path: Path) -> None:
    other = create_home(Home(tmp_path / "other"), "bob", counted_entropy("bob"), NOW_MS)
    save_membership(fresh_home, other.membership)
    with pytest.raises(ConfigError, match="does not belong to this node's key"):
        create_home(fresh_home, "alice", counted_entropy("x"), NOW_MS)


# --- writing


def test_a_write_that_fails_leaves_the_old_file_and_no_draft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    paths.write_private(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageFullError, match="No space left"):
        paths.write_private(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_write_into_nothing_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file or directory"):
        paths.write_private(tmp_path / "none" / "file", b"")


# --- where home is


def test_which_home_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    environ = {"HOME": str(tmp_path), "XDG_RUNTIME_DIR": "/nowhere", "TMPDIR": "/nowhere"}
    usual = resolve_home(None, environ)
    assert usual.dir.is_relative_to(tmp_path)
    (tmp_path / ".clawnet").mkdir()
    assert resolve_home(None, environ).dir == tmp_path / ".clawnet"
    assert resolve_home(None, {**environ, "CLAWNET_HOME": "~/a"}).dir == tmp_path / "a"
    flagged = resolve_home("/b/../c", {**environ, "CLAWNET_HOME": "/a", "CLAWNET_CONFIG": "/etc/clawnet.yaml"})
    assert flagged == Home(Path("/c"), config_file=Path("/etc/clawnet.yaml"))
    assert resolve_home("/c", environ, config="/d.yaml").config_file == Path("/d.yaml")


def test_a_socket_in_a_deep_home_moves_to_a_short_name_of_its_own() -> None:
    deep, deeper = Home(Path("/home") / ("d" * 120)), Home(Path("/home") / ("d" * 121))
    for home in (deep, deeper):
        assert len(os.fsencode(home.socket)) <= paths.SOCKET_PATH_BYTES_MAX
        assert str(os.geteuid()) in home.socket.parent.name
    assert deep.socket != deeper.socket
    assert Home(Path("/home/x")).socket == Path("/home/x/run/clawnet.sock")


# --- export and import


@pytest.mark.slow
def test_an_identity_moves_behind_its_passphrase(fresh_home: Home, tmp_path: Path) -> None:
    data = export_identity(fresh_home, PASSPHRASE, counted_entropy("salt"))
    for secret in (fresh_home.node_key, fresh_home.mesh_key):
        assert secret.read_bytes().split(b":")[1].strip() not in data
    there = Home(tmp_path / "there")
    with pytest.raises(DataError, match="passphrase is wrong"):
        import_identity(there, data, PASSPHRASE + "x")
    assert not there.dir.exists()
    assert import_identity(there, data, PASSPHRASE) == KeyPair.load(fresh_home.node_key).peer_id
    assert {word: text for word, text in contents(there).items() if word != "mesh.json"} == {
        word: text for word, text in contents(fresh_home).items() if word != "mesh.json"
    }
    moved = load_membership(there)
    assert moved.imported, "its chain may go on elsewhere: nothing is written before a peer has shown it"
    assert msgspec.structs.replace(moved, imported=False) == load_membership(fresh_home)
    with pytest.raises(NotPermittedError, match="already holds a node"):
        import_identity(there, data, PASSPHRASE)


def test_what_is_no_exported_identity(home: Home, fresh_home: Home) -> None:
    with pytest.raises(DataError, match=f"at least {PASSPHRASE_CHARS_MIN}"):
        export_identity(fresh_home, "short", counted_entropy("salt"))
    empty = Home(home.dir.parent / "empty")
    greedy = (
        '{"format":"clawnet-identity","v":1,"kdf":"argon2id13","ops":99,"memory_bytes":9999999999,"salt":"","box":""}'
    )
    for data in (b"", b"{}", b"x" * 100_000, greedy.encode()):
        with pytest.raises(DataError, match="no exported identity"):
            import_identity(empty, data, PASSPHRASE)


def test_a_home_whose_data_lie_on_another_file_system_is_archived_there(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(home)
    before = {path.name: path.read_bytes() for path in (home.mesh_file, home.mesh_key, home.owner_key)}
    rename = os.replace

    def across(source: Path, target: Path) -> None:
        if Path(source).suffix != ".tmp" and Path(source).parent != Path(target).parent:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        rename(source, target)

    monkeypatch.setattr(os, "replace", across)
    paths.archive(home, "stamp", keep_owner=False)
    kept = home.archive_dir / "stamp"
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in kept.iterdir())
    assert not any(path.exists() for path in (home.mesh_file, home.mesh_key, home.owner_key))
