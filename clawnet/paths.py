"""Where things lie: the home of a node, the files in it, and who may touch them."""

from __future__ import annotations

import hashlib
import os
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from clawnet.errors import ConfigError, StorageFullError

SOCKET_PATH_BYTES_MAX = 100
"""Linux allows 107 bytes in a socket's name and macOS 103; a longer one moves to a short directory."""

_PRIVATE_FILE = 0o600
_PRIVATE_DIR = 0o700


class Home:
    """The directory of one node and the names in it; nothing here touches the disk.

    Keys, lock and socket always lie in the home itself. `data_dir` (configuration key node.data_dir) moves the
    database, blobs, runs and logs elsewhere.
    """

    __slots__ = ("config_file", "data_dir", "dir")

    STDIN_PREFIX = "stdin-"

    def __init__(self, directory: Path, *, config_file: Path | None = None, data_dir: Path | None = None) -> None:
        self.dir = directory
        self.config_file = config_file or directory / "config.yaml"
        self.data_dir = data_dir or directory

    def with_data_dir(self, data_dir: Path) -> Home:
        """The same home with database, blobs, runs and logs in another directory."""
        return Home(self.dir, config_file=self.config_file, data_dir=data_dir)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Home) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        return f"Home({str(self.dir)!r})"

    def _key(self) -> tuple[Path, Path, Path]:
        return (self.dir, self.config_file, self.data_dir)

    @property
    def keys_dir(self) -> Path:
        return self.dir / "keys"

    @property
    def node_key(self) -> Path:
        return self.keys_dir / "node.key"

    @property
    def next_node_key(self) -> Path:
        """The node's next key while `identity rotate` is under way."""
        return self.keys_dir / "node.key.next"

    @property
    def owner_key(self) -> Path:
        return self.keys_dir / "owner.key"

    @property
    def mesh_key(self) -> Path:
        return self.keys_dir / "mesh.key"

    def old_mesh_key(self, epoch: int) -> Path:
        """The mesh key of an epoch before the present one."""
        return self.keys_dir / f"mesh-{epoch}.key"

    @property
    def escrow_seed(self) -> Path:
        return self.keys_dir / "escrow.seed"

    @property
    def mesh_file(self) -> Path:
        return self.dir / "mesh.json"

    @property
    def restore_draft(self) -> Path:
        """What a restore has read so far; one that was cut short is thrown away."""
        return self.dir / "restore.draft"

    @property
    def restore_ready(self) -> Path:
        """The same once it is complete: from here on the home is the restored one, whatever happens."""
        return self.dir / "restore.ready"

    @property
    def restore_placing(self) -> Path:
        """The same once what the home held before is in the archive."""
        return self.dir / "restore.placing"

    @property
    def half_restored(self) -> bool:
        """Whether a restore was cut short that the next start finishes."""
        return self.restore_ready.exists() or self.restore_placing.exists()

    @property
    def run_dir(self) -> Path:
        return self.dir / "run"

    def stdin_file(self, name: str) -> Path:
        """Where a command leaves its standard input for the daemon, when it is too long for the task itself."""
        return self.run_dir / (self.STDIN_PREFIX + name)

    def is_stdin_file(self, path: Path) -> bool:
        """Whether a path without links is such a file: the only thing in the home that may travel."""
        return path.parent == self.run_dir.resolve() and path.name.startswith(self.STDIN_PREFIX)

    @property
    def socket(self) -> Path:
        """The daemon's Unix socket; in a short directory of this user's when the home's path is too long for one."""
        usual = self.run_dir / "clawnet.sock"
        if len(os.fsencode(usual)) <= SOCKET_PATH_BYTES_MAX:
            return usual
        return _short_dir() / f"clawnet-{_user_id()}-{self.digest}" / "clawnet.sock"

    @property
    def pipe_name(self) -> str:
        """The daemon's named pipe on Windows."""
        return rf"\\.\pipe\clawnet-{self.digest}"

    @property
    def digest(self) -> str:
        """Sixteen hex digits that stand for this home where its path does not fit."""
        return hashlib.sha256(os.fsencode(self.dir)).hexdigest()[:16]

    @property
    def lock_file(self) -> Path:
        return self.run_dir / "daemon.lock"

    @property
    def autostart_lock(self) -> Path:
        return self.run_dir / "autostart.lock"

    @property
    def database(self) -> Path:
        return self.data_dir / "clawnet.db"

    @property
    def blobs_dir(self) -> Path:
        return self.data_dir / "blobs"

    @property
    def work_dir(self) -> Path:
        """Where runs have their working directories; emptied at start."""
        return self.data_dir / "work"

    @property
    def wasm_cache_dir(self) -> Path:
        """Compiled WebAssembly modules: native code, so nobody else may write there."""
        return self.data_dir / "wasm"

    @property
    def wasm_runs_dir(self) -> Path:
        """Where runs of modules leave long output; emptied at start."""
        return self.data_dir / "wasm-runs"

    @property
    def logs_dir(self) -> Path:
        return self.data_dir / "logs"

    @property
    def log_file(self) -> Path:
        return self.logs_dir / "clawnet.log"

    @property
    def security_log(self) -> Path:
        return self.logs_dir / "security.log"

    @property
    def archive_dir(self) -> Path:
        """What a join or a restore set aside: old databases, memberships and owner keys."""
        return self.data_dir / "archive"


def resolve_home(flag: str | None, environ: Mapping[str, str], *, config: str | None = None) -> Home:
    """The home a command means: `--home`, CLAWNET_HOME, ~/.clawnet if it exists, else the user's data directory.

    `config` is `--config`; without it CLAWNET_CONFIG, else config.yaml in the home. Neither XDG_RUNTIME_DIR nor TMPDIR
    matters, so that cron finds the daemon of the terminal.
    """
    config_text = config or environ.get("CLAWNET_CONFIG")
    config_file = _absolute(config_text, environ) if config_text else None
    text = flag or environ.get("CLAWNET_HOME")
    if text:
        return Home(_absolute(text, environ), config_file=config_file)
    dotted = _user_home(environ) / ".clawnet"
    if dotted.is_dir():
        return Home(dotted, config_file=config_file)
    import platformdirs

    return Home(Path(platformdirs.user_data_dir("clawnet", appauthor=False)), config_file=config_file)


def check_private(path: Path, *, secret: bool = False) -> None:
    """Refuses a file or directory that belongs to another user or that others may write; a secret, also read.

    Raises ConfigError with the line that puts it right. A path that does not exist passes; Windows keeps its files by
    access lists, which the user's profile directory sets, so nothing is checked there.
    """
    if sys.platform == "win32":
        return
    try:
        status = path.stat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"cannot look at {path}: {error.strerror}") from error
    if status.st_uid != os.geteuid():
        raise ConfigError(
            f"{path} belongs to another user (uid {status.st_uid})",
            hint=f"sudo chown {os.geteuid()} {path}",
            path=str(path),
        )
    mode = stat.S_IMODE(status.st_mode)
    if mode & (0o077 if secret else 0o022):
        wanted = _PRIVATE_DIR if stat.S_ISDIR(status.st_mode) else _PRIVATE_FILE
        raise ConfigError(
            f"{path} can be {'read or ' if secret else ''}written by other users (mode {mode:04o})",
            hint=f"chmod {wanted:o} {path}",
            path=str(path),
        )


def make_private_dir(path: Path) -> None:
    """Makes a directory 0700, with its parents; one that is there already stays as it is.

    Raises ConfigError when it cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=_PRIVATE_DIR, exist_ok=True)
    except OSError as error:
        raise _refused(f"cannot make the directory {path}", error) from error


def write_private(path: Path, data: bytes) -> None:
    """Writes a file 0600 so that after a crash it holds either all of the old content or all of the new.

    Raises StorageFullError when the disk is full, ConfigError for everything else that stands in the way.
    """
    try:
        with whole(path) as file:
            file.write(data)
    except OSError as error:
        raise _refused(f"cannot write {path}", error) from error


@contextmanager
def whole(path: Path, mode: int = _PRIVATE_FILE) -> Iterator[BinaryIO]:
    """A file that appears under its name, or where a link of that name leads, only when it is complete and synced.

    What is no file (a device, a pipe) is written as it is: it must not be replaced by one. Raises OSError.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        with path.open("wb") as device:
            yield device
        return
    draft = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        draft.unlink(missing_ok=True)
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode)
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
        sync_directory(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def archive(home: Home, stamp: str, *, keep_owner: bool, keys: bool = False) -> None:
    """Moves database and membership of the mesh left behind into archive/STAMP; the owner key too unless kept.

    `keys`: the node's own keys as well, when another node is to live here.
    """
    make_private_dir(home.archive_dir)
    target = home.archive_dir / stamp
    number = 0
    while target.exists():
        number += 1
        target = target.with_name(f"{stamp}.{number}")
    make_private_dir(target)
    names = [home.mesh_file, home.mesh_key, *sorted(home.keys_dir.glob("mesh-*.key"))]
    names += [home.database.with_name(home.database.name + suffix) for suffix in ("", "-wal", "-shm")]
    if not keep_owner:
        names.append(home.owner_key)
    if keys:
        names += [home.node_key, home.escrow_seed]
    for path in names:
        if path.exists():
            _move(path, target / path.name)


def _move(path: Path, target: Path) -> None:
    """Renames a file; a key or membership of a home whose data lie on another file system is copied first."""
    import errno

    try:
        os.replace(path, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        write_private(target, path.read_bytes())
        path.unlink()


def sync_directory(path: Path) -> None:
    """Makes a rename in this directory outlast a power cut; Windows has no such call."""
    if sys.platform == "win32":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _refused(what: str, error: OSError) -> ConfigError | StorageFullError:
    import errno

    if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
        return StorageFullError(f"{what}: {error.strerror}", hint="make room on the disk and try again")
    return ConfigError(f"{what}: {error.strerror}")


def _user_home(environ: Mapping[str, str]) -> Path:
    name = "USERPROFILE" if sys.platform == "win32" else "HOME"
    return Path(environ.get(name) or Path.home())


def _absolute(text: str, environ: Mapping[str, str]) -> Path:
    if text == "~" or text.startswith(("~/", "~\\")):
        text = str(_user_home(environ)) + text[1:]
    return Path(os.path.abspath(text))  # noqa: PTH100 - links stay as they were named


def _user_id() -> int:
    return 0 if sys.platform == "win32" else os.geteuid()


def _short_dir() -> Path:
    """A directory whose name is short and the same for every process of this machine."""
    usual = Path("/tmp")  # noqa: S108 - only a directory of this user's, checked, is used in it
    return usual if usual.is_dir() else Path(os.environ.get("PREFIX", "/")) / "tmp"
