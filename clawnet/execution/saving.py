"""Output files into a directory of the user's: complete and verified, or not at all.

They are first written beside their places, in a directory of a name that is ours, checked against the id of their
archive, and only then moved in, what they replace being kept until all is done. What is moved never passes a symbolic
link below the directory. A note in the node's home says what is under way: after a crash a set that was not complete
is removed, and one that was being moved is moved to its end.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from msgspec import Struct

from clawnet import limits, paths
from clawnet.errors import ClawnetError, DataError, NotFoundError, NotPermittedError, StorageError, StorageFullError
from clawnet.execution.archive import Member, Reader
from clawnet.execution.beneath import Beneath, move, second_name
from clawnet.execution.outputs import Checked
from clawnet.execution.removing import remove_tree
from clawnet.paths import Home
from clawnet.wire.blobid import BlobHasher

PREFIX: Final = ".clawnet-saving-"
_NOTES: Final = "saving"
_NEW, _OLD = "new", "old"


class Saved(Struct, frozen=True):
    """What is in place."""

    files: int
    bytes: int


class Saver:
    """Saves into directories that are not this node's own. `entropy` names the staging directories."""

    def __init__(self, home: Home, entropy: Callable[[int], bytes]) -> None:
        self._home = home
        self._entropy = entropy
        self._mine = f"{PREFIX}{home.digest}-"
        self._live: set[str] = set()
        self._lock = threading.Lock()

    # --- after a crash

    def recover(self) -> None:
        """Ends what an earlier life of this node was at."""
        notes = self._home.data_dir / _NOTES
        with suppress(FileNotFoundError):
            for note in sorted(notes.iterdir()):
                with suppress(OSError, ValueError, KeyError, TypeError):
                    self._finish(json.loads(note.read_bytes()))
                note.unlink(missing_ok=True)

    def _finish(self, said: dict[str, Any]) -> None:
        """Moves on what was being moved; then nothing of it is left beside."""
        staging = Path(said["staging"])
        if not staging.name.startswith(self._mine) or not stat.S_ISDIR(staging.lstat().st_mode):
            return
        if said["moving"]:
            with suppress(ClawnetError, OSError), self._opened(staging) as merge:
                merge.place(int(said["umask"]))
        remove_tree(staging)

    def _sweep(self, target: Path) -> None:
        """Removes what an earlier life left in this directory, should its note be lost."""
        with self._lock, os.scandir(target) as entries:
            left = [e for e in entries if e.name.startswith(self._mine) and e.path not in self._live]
        for entry in left:
            if entry.is_dir(follow_symlinks=False):
                remove_tree(Path(entry.path))

    # --- saving

    def save(
        self,
        archive: Path,
        blob: bytes,
        patterns: tuple[str, ...],
        directory: str,
        umask: int,
        moved: Callable[[int], None] = lambda size: None,
    ) -> Saved:
        """Puts the files of an archive below `directory`, which is made if it is not there. `moved` hears of bytes.

        Raises NotPermittedError where this user may not write or the directory is the node's own, StorageFullError,
        NotFoundError for an archive that is no longer kept, and DataError for all else that keeps a file from its
        place. Then nothing has changed.
        """
        made: list[Path] = []
        try:
            target = self._target(directory, umask & 0o777, made)
            self._sweep(target)
            with archive.open("rb") as source, self._staged(target, umask) as staging:
                saved = _unpack(_Hashing(source, blob, moved), staging / _NEW, patterns, umask)
                with self._opened(staging) as merge:
                    merge.look()
                    self._note(staging, umask, moving=True)
                    merge.place(umask)
            made.clear()
            return saved
        except FileNotFoundError as error:
            if error.filename != str(archive):
                raise _translated(error, directory) from error
            raise NotFoundError("the output files are no longer here", hint="results are kept for 7 days") from error
        except (OSError, ValueError) as error:
            raise _translated(error, directory) from error
        finally:
            for path in reversed(made):
                with suppress(OSError):
                    path.rmdir()

    def _target(self, directory: str, umask: int, made: list[Path]) -> Path:
        """The directory as it really is, made where it was not."""
        if not os.path.isabs(directory):
            raise DataError(f"{directory[:200]!r} is no absolute path", hint="the daemon has another working directory")
        target = Path(os.path.realpath(directory))
        for secret in self._private():
            if target == secret or secret in target.parents:
                raise NotPermittedError(f"{directory} lies in clawnet's own home", hint="name another --output-dir")
        missing: list[Path] = []
        while not os.path.lexists(target if not missing else missing[-1].parent):
            missing.append(target if not missing else missing[-1].parent)
        for path in reversed(missing):
            path.mkdir(0o700)
            made.append(path)
            path.chmod(0o777 & ~umask)
        if not target.is_dir():
            raise DataError(f"{directory} is not a directory", hint="name another --output-dir")
        if not os.access(target, os.W_OK | os.X_OK):
            raise NotPermittedError(f"{directory} cannot be written to", hint="check its owner and mode")
        return target

    def _private(self) -> list[Path]:
        return [self._home.dir.resolve(), self._home.data_dir.resolve()]

    @contextmanager
    def _staged(self, target: Path, umask: int) -> Iterator[Path]:
        """A directory beside the places, on their file system; gone at the end, whatever happens."""
        tag = self._entropy(8).hex()
        staging = target / (self._mine + tag)
        note = self._home.data_dir / _NOTES / tag
        with self._lock:
            self._live.add(str(staging))
        try:
            self._note(staging, umask, moving=False)
            staging.mkdir(0o700)
            (staging / _NEW).mkdir(0o700)
            (staging / _OLD).mkdir(0o700)
            yield staging
        finally:
            try:
                remove_tree(staging)
                note.unlink(missing_ok=True)
            finally:
                with self._lock:
                    self._live.discard(str(staging))

    def _note(self, staging: Path, umask: int, *, moving: bool) -> None:
        notes = self._home.data_dir / _NOTES
        notes.mkdir(0o700, exist_ok=True)
        text = json.dumps({"staging": str(staging), "umask": umask, "moving": moving})
        with paths.whole(notes / staging.name.removeprefix(self._mine)) as file:
            file.write(text.encode())

    @contextmanager
    def _opened(self, staging: Path) -> Iterator[_Merge]:
        private = set()
        for path in self._private():
            with Beneath.opened(path) as secret:
                private.add(secret.identity())
        with (
            Beneath.opened(staging.parent) as target,
            Beneath.opened(staging / _NEW) as new,
            Beneath.opened(staging / _OLD) as old,
        ):
            yield _Merge(target, new, old, private)


class _Hashing:
    """A file whose bytes must be the blob of this id once they are all read."""

    def __init__(self, source: Any, blob: bytes, moved: Callable[[int], None]) -> None:
        self._source = source
        self._blob = blob
        self._moved = moved
        self._hasher = BlobHasher()

    def read(self, size: int = -1, /) -> bytes:
        data: bytes = self._source.read(size)
        self._hasher.update(data)
        self._moved(len(data))
        return data

    def check(self) -> None:
        """Raises StorageError when the disk did not keep what was stored."""
        if self._hasher.digest() != self._blob:
            raise StorageError("the stored output files are damaged", hint="run the task again, and check the disk")


def _unpack(source: _Hashing, directory: Path, patterns: tuple[str, ...], umask: int) -> Saved:
    """All of an archive into a fresh directory that only this process can enter."""
    checked, links = Checked(patterns), list[tuple[Path, str]]()
    files = size = 0
    tar = Reader(source, files_max=limits.TREE_FILES_MAX, bytes_max=limits.OUTPUTS_BYTES_MAX)
    for member in tar:
        checked.take(member)
        path = directory / member.name
        if member.kind == "dir":
            path.mkdir(0o700, parents=True, exist_ok=True)
            continue
        path.parent.mkdir(0o700, parents=True, exist_ok=True)
        if member.kind == "link":
            links.append((path, member.target))
            continue
        _write(path, member, tar.content(), umask)
        files, size = files + 1, size + member.size
    for path, target in links:
        os.symlink(target, path)
    source.check()
    return Saved(files, size)


def _write(path: Path, member: Member, content: Iterator[bytes], umask: int) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    with os.fdopen(os.open(path, flags, 0o600), "wb") as file:
        for piece in content:
            file.write(piece)
        if os.name != "nt":
            os.fchmod(file.fileno(), (0o777 if member.executable else 0o666) & ~umask)


class _Merge:
    """Moves a staged tree into a directory that may hold some of it already."""

    def __init__(self, target: Beneath, new: Beneath, old: Beneath, private: set[tuple[int, int]]) -> None:
        self._target = target
        self._new = new
        self._old = old
        self._private = private
        self._device = target.identity()[0]
        self._made: list[tuple[str, ...]] = []
        self._moved: list[tuple[tuple[str, ...], str]] = []

    def look(self) -> None:
        """Raises NotPermittedError or DataError for what cannot be moved to its place, before anything is."""
        self._look(self._new, self._target, "")

    def _look(self, new: Beneath, target: Beneath, prefix: str) -> None:
        device, inode = target.identity()
        if (device, inode) in self._private:
            raise NotPermittedError("clawnet's own home is no place for output files", hint="name another --output-dir")
        if device != self._device:
            raise DataError(
                f"{prefix} is another file system than the directory around it", hint="name it as --output-dir itself"
            )
        for entry in new.names():
            shown, there = prefix + entry.name, target.look(entry.name)
            if there is None:
                if not target.writable():
                    raise NotPermittedError(f"{target.path} cannot be written to", hint="check its owner and mode")
                continue
            if not entry.is_dir(follow_symlinks=False):
                if stat.S_ISDIR(there.st_mode):
                    raise DataError(f"the output {shown[:100]!r} is a directory there", hint="move it away")
                if not target.writable():
                    raise NotPermittedError(f"{target.path} cannot be written to", hint="check its owner and mode")
                continue
            if not stat.S_ISDIR(there.st_mode):
                what = "a symbolic link" if stat.S_ISLNK(there.st_mode) else "a file"
                raise DataError(
                    f"the directory {shown[:100]!r} of the output is {what} there",
                    hint="move it away; what a link leads to can be the --output-dir itself",
                )
            with _both(new, target, entry.name) as (inner, place):
                self._look(inner, place, shown + "/")

    def place(self, umask: int) -> None:
        """Moves everything; what goes wrong half-way is undone."""
        try:
            self._place(self._new, self._target, (), umask)
        except OSError:
            self._undo()
            raise

    def _place(self, new: Beneath, target: Beneath, above: tuple[str, ...], umask: int) -> None:
        for entry in sorted(new.names(), key=lambda item: item.name):
            name = entry.name
            if not entry.is_dir(follow_symlinks=False):
                self._move(new, target, (*above, name))
                continue
            if target.look(name) is None:
                target.make(name)
                self._made.append((*above, name))
                target.mode(name, 0o777 & ~umask)
            with _both(new, target, name) as (inner, place):
                self._place(inner, place, (*above, name), umask)

    def _move(self, new: Beneath, target: Beneath, path: tuple[str, ...]) -> None:
        name, kept = path[-1], ""
        if target.look(name) is not None:
            kept = str(len(self._moved))
            if not second_name(target, name, self._old, kept):
                move(target, name, self._old, kept)
                self._moved.append((path, kept))
                move(new, name, target, name)
                return
        move(new, name, target, name)
        self._moved.append((path, kept))

    def _undo(self) -> None:
        """Puts back what was there, newest first; what cannot be put back stays as it is."""
        for path, kept in reversed(self._moved):
            with suppress(OSError), self._at(path[:-1]) as directory:
                if kept:
                    move(self._old, kept, directory, path[-1])
                else:
                    directory.drop(path[-1])
        for path in reversed(self._made):
            with suppress(OSError), self._at(path[:-1]) as directory:
                directory.drop_directory(path[-1])

    @contextmanager
    def _at(self, path: tuple[str, ...]) -> Iterator[Beneath]:
        chain = [self._target]
        try:
            for name in path:
                chain.append(chain[-1].child(name))
            yield chain[-1]
        finally:
            for each in chain[1:]:
                each.close()


@contextmanager
def _both(new: Beneath, target: Beneath, name: str) -> Iterator[tuple[Beneath, Beneath]]:
    inner = new.child(name)
    try:
        place = target.child(name)
        try:
            yield inner, place
        finally:
            place.close()
    finally:
        inner.close()


def _translated(error: Exception, directory: str) -> ClawnetError:
    number = error.errno if isinstance(error, OSError) else None
    where = getattr(error, "filename", None)
    about = where if isinstance(where, str) and PREFIX not in where else directory
    said = getattr(error, "strerror", None) or error
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return StorageFullError(f"the output files do not fit in {directory}: {said}", hint="make room on the disk")
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return NotPermittedError(f"{about} cannot be written to: {said}", hint="check its owner and mode")
    return DataError(f"the output files cannot be put in {directory}: {said}", hint="name another --output-dir")
