"""The files that a WebAssembly module sees: a tree in memory over the task's inputs, and nothing of the machine.

Input files are read where they lie in the blob store (a directory's files inside its tar), and only what the module
changes takes up memory. There is no path of the host in it, so no name, link or ".." can lead to one. What a module
can see of a file is the same on every machine: names in byte order, inode numbers in the order of creation, times of
the module's own clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import IO, Final

from clawnet import limits
from clawnet.errors import DataError
from clawnet.execution.archive import Index, Member
from clawnet.execution.wasiabi import Errno, WasiError

NAME_BYTES_MAX: Final = 255
LINKS_MAX: Final = 32
_COPY_BYTES: Final = 256 * limits.KIB


class Node:
    """What a name stands for. `inode` is a number of this tree's, `uses` counts its names and open descriptors."""

    __slots__ = ("inode", "modified_ns", "uses")

    def __init__(self, inode: int, modified_ns: int) -> None:
        self.inode = inode
        self.modified_ns = modified_ns
        self.uses = 1


class Dir(Node):
    """A directory: its entries by name."""

    __slots__ = ("entries", "removed")

    def __init__(self, inode: int, modified_ns: int) -> None:
        super().__init__(inode, modified_ns)
        self.entries: dict[str, Node] = {}
        self.removed = False


class Link(Node):
    """A symbolic link."""

    __slots__ = ("target",)

    def __init__(self, inode: int, modified_ns: int, target: str) -> None:
        super().__init__(inode, modified_ns)
        self.target = target


class File(Node):
    """A regular file: part of a file on disk that is only read, or, once it was written to, bytes of its own."""

    __slots__ = ("_data", "_offset", "_size", "_source", "executable")

    def __init__(self, inode: int, modified_ns: int, *, executable: bool = False) -> None:
        super().__init__(inode, modified_ns)
        self.executable = executable
        self._data: bytearray | None = bytearray()
        self._source: IO[bytes] | None = None
        self._offset = self._size = 0

    def lies_in(self, source: IO[bytes], offset: int, size: int) -> None:
        """Its content is `size` bytes of `source`, from `offset` on."""
        self._data, self._source, self._offset, self._size = None, source, offset, size

    @property
    def size(self) -> int:
        """Its length in bytes."""
        return self._size if self._data is None else len(self._data)

    @property
    def held(self) -> int:
        """Bytes of memory that its content takes."""
        return 0 if self._data is None else len(self._data)

    def read(self, at: int, size: int) -> bytes | bytearray:
        """Up to `size` bytes from `at` on."""
        if self._data is not None:
            return self._data[at : at + size]
        assert self._source is not None
        size = min(size, self._size - at)
        if size <= 0:
            return b""
        self._source.seek(self._offset + at)
        return self._source.read(size)

    def own(self) -> bytearray:
        """Its content as bytes that may be changed."""
        if self._data is None:
            self._data = bytearray(self.read(0, self._size))
            self._source = None
        return self._data

    def clear(self) -> None:
        """Its content is nothing from now on."""
        self._data, self._source = bytearray(), None

    def pieces(self) -> Iterator[bytes | bytearray]:
        """Its whole content."""
        at = 0
        while data := self.read(at, _COPY_BYTES):
            yield data
            at += len(data)


class Files:
    """The tree. `bytes_max` bounds what the module writes, `now_ns` is the module's clock."""

    def __init__(self, now_ns: Callable[[], int], bytes_max: int) -> None:
        self._now_ns = now_ns
        self._bytes_max = bytes_max
        self._numbers = self._nodes = 0
        self._sources: list[IO[bytes]] = []
        self.held = 0
        self.root = Dir(self._inode(), now_ns())

    def close(self) -> None:
        """Closes the files that inputs are read from."""
        for source in self._sources:
            source.close()

    # --- inputs

    def add_file(self, name: str, path: str, size: int, *, executable: bool) -> None:
        """An input file under its name; raises DataError for a name that is there, OSError."""
        self._new(self.root, name)
        file = self._file(executable=executable)
        file.lies_in(self._open(path), 0, size)
        self.root.entries[name] = file

    def add_tree(self, name: str, path: str) -> None:
        """An input directory (execution/archive.py), below its name or, without one, at the root.

        Raises DataError for an archive that breaks the rules, OSError.
        """
        top = self.root
        if name:
            self._new(self.root, name)
            top = Dir(self._inode(), self._now_ns())
            self.root.entries[name] = top
        source = self._open(path)
        for member in Index(source):
            self._add(top, member, source)

    def _add(self, top: Dir, member: Member, source: IO[bytes]) -> None:
        *above, name = member.name.split("/")
        directory = top
        for part in above:
            below = directory.entries.get(part)
            if not isinstance(below, Dir):
                raise DataError("the tree names a file without its directory")
            directory = below
        self._new(directory, name)
        if member.kind == "dir":
            directory.entries[name] = Dir(self._inode(), self._now_ns())
        elif member.kind == "link":
            directory.entries[name] = Link(self._inode(), self._now_ns(), member.target)
        else:
            file = self._file(executable=member.executable)
            file.lies_in(source, source.tell(), member.size)
            directory.entries[name] = file

    def _open(self, path: str) -> IO[bytes]:
        source = open(path, "rb")  # noqa: SIM115 - closed with the tree
        self._sources.append(source)
        return source

    @staticmethod
    def _new(directory: Dir, name: str) -> None:
        if name in ("", ".", "..") or "\0" in name or "/" in name or len(name.encode()) > NAME_BYTES_MAX:
            raise DataError(f"no file can be called {name[:60]!r}")
        if name in directory.entries:
            raise DataError(f"two inputs are named {name[:60]!r}")

    # --- what the module does

    def _inode(self) -> int:
        if self._nodes >= limits.TREE_FILES_MAX:
            raise WasiError(Errno.NOSPC)
        self._nodes += 1
        self._numbers += 1
        return self._numbers

    def drop(self, node: Node) -> None:
        """One name or descriptor of a node less; without any its memory is free again."""
        node.uses -= 1
        if not node.uses:
            self._nodes -= 1
            if isinstance(node, File):
                self.held -= node.held

    def _file(self, *, executable: bool = False) -> File:
        return File(self._inode(), self._now_ns(), executable=executable)

    def find(self, start: Dir, path: str, *, follow: bool) -> Node:
        """What a path below `start` leads to; raises WasiError."""
        directory, name = self.split(start, path, follow=follow)
        if not name:
            return directory
        node = directory.entries.get(name)
        if node is None:
            raise WasiError(Errno.NOENT)
        if path.endswith("/") and not isinstance(node, Dir):
            raise WasiError(Errno.NOTDIR)
        return node

    def split(self, start: Dir, path: str, *, follow: bool) -> tuple[Dir, str]:
        """The directory that a path ends in, and the last name, which may not exist; "" where it ends in a directory.

        A link at the end is gone through with `follow`. Nothing above `start` can be reached; raises WasiError.
        """
        if path.startswith("/"):
            raise WasiError(Errno.PERM)
        above: list[Dir] = [start]
        parts = [part for part in reversed(path.split("/")) if part not in ("", ".")]
        if not parts and not path:
            raise WasiError(Errno.NOENT)
        links = 0
        while parts:
            part = parts.pop()
            if part == "..":
                above.pop()
                if not above:
                    raise WasiError(Errno.PERM)
                continue
            if len(part.encode()) > NAME_BYTES_MAX:
                raise WasiError(Errno.NAMETOOLONG)
            node = above[-1].entries.get(part)
            if isinstance(node, Link) and (parts or follow):
                links += 1
                if links > LINKS_MAX:
                    raise WasiError(Errno.LOOP)
                if node.target.startswith("/"):
                    raise WasiError(Errno.PERM)
                parts.extend(each for each in reversed(node.target.split("/")) if each not in ("", "."))
            elif not parts:
                return above[-1], part
            elif isinstance(node, Dir):
                above.append(node)
            else:
                raise WasiError(Errno.NOENT if node is None else Errno.NOTDIR)
        return above[-1], ""

    def create(self, directory: Dir, name: str) -> File:
        """A new empty file."""
        self._writable(directory)
        file = self._file()
        directory.entries[name] = file
        directory.modified_ns = file.modified_ns
        return file

    def make_dir(self, start: Dir, path: str) -> None:
        """mkdir."""
        directory, name = self._vacant(start, path)
        directory.entries[name] = Dir(self._inode(), self._now_ns())

    def make_link(self, start: Dir, path: str, target: str) -> None:
        """A symbolic link; one that begins at a root is refused."""
        if not target or target.startswith("/"):
            raise WasiError(Errno.PERM if target else Errno.INVAL)
        directory, name = self._vacant(start, path)
        self.grow(len(target.encode()))
        directory.entries[name] = Link(self._inode(), self._now_ns(), target)

    def link(self, node: Node, start: Dir, path: str) -> None:
        """One more name for a file."""
        if isinstance(node, Dir):
            raise WasiError(Errno.PERM)
        directory, name = self._vacant(start, path)
        directory.entries[name] = node
        node.uses += 1

    def _vacant(self, start: Dir, path: str) -> tuple[Dir, str]:
        directory, name = self.split(start, path, follow=False)
        if not name or name in directory.entries:
            raise WasiError(Errno.EXIST)
        self._writable(directory)
        directory.modified_ns = self._now_ns()
        return directory, name

    @staticmethod
    def _writable(directory: Dir) -> None:
        if directory.removed:
            raise WasiError(Errno.NOENT)

    def remove_dir(self, start: Dir, path: str) -> None:
        """rmdir."""
        directory, name = self.split(start, path, follow=False)
        node = directory.entries.get(name) if name else None
        if not isinstance(node, Dir):
            raise WasiError(Errno.INVAL if not name else Errno.NOENT if node is None else Errno.NOTDIR)
        if node.entries:
            raise WasiError(Errno.NOTEMPTY)
        node.removed = True
        del directory.entries[name]
        self.drop(node)

    def unlink(self, start: Dir, path: str) -> None:
        """Removes a file's or a link's name; what is open stays readable."""
        directory, name = self.split(start, path, follow=False)
        node = directory.entries.get(name) if name else directory
        if node is None:
            raise WasiError(Errno.NOENT)
        if isinstance(node, Dir):
            raise WasiError(Errno.ISDIR)
        if path.endswith("/"):
            raise WasiError(Errno.NOTDIR)
        del directory.entries[name]
        self.drop(node)

    def rename(self, start: Dir, path: str, other: Dir, to: str) -> None:
        """Moves a name; an existing file or empty directory of the same sort gives way."""
        directory, name = self.split(start, path, follow=False)
        target_dir, target = self.split(other, to, follow=False)
        node = directory.entries.get(name) if name else None
        if node is None or not target:
            raise WasiError(Errno.INVAL if not (name and target) else Errno.NOENT)
        known = target_dir.entries.get(target)
        if known is node:
            return
        if isinstance(node, Dir):
            if self._inside(node, target_dir):
                raise WasiError(Errno.INVAL)
            if known is not None and not isinstance(known, Dir):
                raise WasiError(Errno.NOTDIR)
            if isinstance(known, Dir) and known.entries:
                raise WasiError(Errno.NOTEMPTY)
        elif isinstance(known, Dir):
            raise WasiError(Errno.ISDIR)
        self._writable(target_dir)
        del directory.entries[name]
        if known is not None:
            if isinstance(known, Dir):
                known.removed = True
            self.drop(known)
        target_dir.entries[target] = node
        directory.modified_ns = target_dir.modified_ns = self._now_ns()

    def _inside(self, directory: Dir, other: Dir) -> bool:
        waiting: list[Dir] = [directory]
        while waiting:
            each = waiting.pop()
            if each is other:
                return True
            waiting.extend(node for node in each.entries.values() if isinstance(node, Dir))
        return False

    def write(self, file: File, at: int, data: bytes | memoryview) -> None:
        """Writes into a file; what lies between its end and `at` becomes zeros."""
        self.resize(file, max(file.size, at + len(data)))
        file.own()[at : at + len(data)] = data
        file.modified_ns = self._now_ns()

    def resize(self, file: File, size: int) -> None:
        """Makes a file this long; raises WasiError when there is no room."""
        if not size:
            self.held -= file.held
            file.clear()
            file.modified_ns = self._now_ns()
            return
        self.grow(max(size, file.size) - file.held)
        content = file.own()
        if size > len(content):
            content.extend(bytes(size - len(content)))
        elif size < len(content):
            self.held -= len(content) - size
            del content[size:]
        file.modified_ns = self._now_ns()

    def grow(self, by: int) -> None:
        """Takes up so many more bytes; raises WasiError beyond the bound."""
        if self.held + by > self._bytes_max:
            raise WasiError(Errno.NOSPC)
        self.held += by

    def all_files(self) -> Iterator[tuple[str, File]]:
        """Every regular file with its path, in byte order."""
        waiting: list[tuple[str, Node]] = [("", self.root)]
        while waiting:
            path, node = waiting.pop()
            if isinstance(node, File):
                yield path, node
            elif isinstance(node, Dir):
                prefix = path + "/" if path else ""
                waiting.extend((prefix + name, node.entries[name]) for name in sorted(node.entries, reverse=True))
