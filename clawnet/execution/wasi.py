"""WASI preview 1 as clawnet gives it to a module: the whole of it in terms of what the task holds, nothing else.

The same module with the same input ends with the same output on every machine, so nothing here comes from the machine:
files are a tree of their own (execution/wasifiles.py); the clock begins at CLOCK_START_S and moves on by CLOCK_STEP_NS
with every look at it, and by the whole time of every sleep, which takes no time; random bytes are drawn from `seed`.
There are no sockets. Every address and length comes from the module and is checked against its memory.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from hashlib import shake_256
from typing import IO, Any, Final

from clawnet import limits
from clawnet.execution.wasiabi import Errno, WasiError
from clawnet.execution.wasifiles import Dir, File, Files, Link, Node
from clawnet.execution.wasimemory import path_of, piece, put, put_list, sizes, vectors_of

CLOCK_START_S: Final = 946_684_800
"""The first of January 2000, UTC."""
CLOCK_STEP_NS: Final = 1_000_000
_RANDOM_PIECE: Final = 64 * limits.KIB
_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")
_UNKNOWN, _DIRECTORY, _REGULAR, _LINK = 0, 3, 4, 7
_APPEND: Final = 1
_CREAT, _WANT_DIR, _EXCL, _TRUNC = 1, 2, 4, 8
_FD_READ, _FD_WRITE = 1 << 1, 1 << 6
_ALL_RIGHTS: Final = (1 << 30) - 1
_SOCKET_RIGHTS: Final = 3 << 28
_FILE_RIGHTS: Final = sum(1 << bit for bit in (0, 1, 2, 3, 4, 5, 6, 7, 8, 21, 22, 23, 27))
_DIR_RIGHTS: Final = _ALL_RIGHTS & ~_SOCKET_RIGHTS & ~sum(1 << bit for bit in (1, 2, 5, 6, 7, 8, 22, 27))
_STREAM_RIGHTS: Final = sum(1 << bit for bit in (0, 3, 4, 21, 27))

Memory = Callable[[], memoryview]
"""The module's memory as it is now; raises WasiError when it has none."""


class Exited(Exception):
    """The module called proc_exit."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class TooMuchOutput(Exception):
    """The module wrote more than its task allows."""


class Open:
    """An open descriptor: a file or directory of the tree, or one of the three streams."""

    __slots__ = ("append", "at", "inheriting", "listing", "node", "preopen", "rights", "stream")

    def __init__(self, node: Node | None, rights: int, inheriting: int = 0, *, stream: int = -1) -> None:
        self.node = node
        self.rights = rights
        self.inheriting = inheriting
        self.stream = stream
        self.at = 0
        self.append = False
        self.preopen = b""
        self.listing: list[str] = []


class Wasi:
    """The calls of one run. `stdin` is read from, `write(stream, data)` takes what is written to 1 and 2."""

    def __init__(
        self,
        argv: list[bytes],
        env: list[bytes],
        stdin: IO[bytes],
        write: Callable[[int, bytes], None],
        *,
        files_bytes_max: int,
        seed: bytes,
    ) -> None:
        self._argv = argv
        self._env = env
        self._stdin = stdin
        self._write = write
        self._elapsed_ns = 0
        self._random = self._stream_of(seed)
        self._random_left = b""
        self.files = Files(self._now_ns, files_bytes_max)
        root = Open(self.files.root, _DIR_RIGHTS, _DIR_RIGHTS | _FILE_RIGHTS)
        root.preopen = b"/"
        self._open: dict[int, Open] = {
            0: Open(None, _STREAM_RIGHTS | _FD_READ, stream=0),
            1: Open(None, _STREAM_RIGHTS | _FD_WRITE, stream=1),
            2: Open(None, _STREAM_RIGHTS | _FD_WRITE, stream=2),
            3: root,
        }

    def _now_ns(self) -> int:
        return CLOCK_START_S * 1_000_000_000 + self._elapsed_ns

    @staticmethod
    def _stream_of(seed: bytes) -> Iterator[bytes]:
        number = 0
        while True:
            yield shake_256(seed + number.to_bytes(8, "big")).digest(_RANDOM_PIECE)
            number += 1

    # --- descriptors

    def _get(self, fd: int) -> Open:
        found = self._open.get(fd)
        if found is None:
            raise WasiError(Errno.BADF)
        return found

    def _dir(self, fd: int) -> Dir:
        node = self._get(fd).node
        if not isinstance(node, Dir):
            raise WasiError(Errno.NOTDIR)
        return node

    def _file(self, fd: int, right: int) -> tuple[Open, File]:
        found = self._get(fd)
        if not isinstance(found.node, File):
            raise WasiError(Errno.BADF if found.node is not None else Errno.SPIPE)
        if right and not found.rights & right:
            raise WasiError(Errno.BADF)
        return found, found.node

    # --- arguments and environment

    def args_get(self, memory: memoryview, table: int, buffer: int) -> None:
        put_list(memory, self._argv, table, buffer)

    def args_sizes_get(self, memory: memoryview, count: int, size: int) -> None:
        both = sizes(self._argv)
        put(memory, count, both[:4])
        put(memory, size, both[4:])

    def environ_get(self, memory: memoryview, table: int, buffer: int) -> None:
        put_list(memory, self._env, table, buffer)

    def environ_sizes_get(self, memory: memoryview, count: int, size: int) -> None:
        both = sizes(self._env)
        put(memory, count, both[:4])
        put(memory, size, both[4:])

    # --- clock, chance, end

    def clock_res_get(self, memory: memoryview, clock: int, result: int) -> None:
        if clock > 3:
            raise WasiError(Errno.INVAL)
        put(memory, result, _U64.pack(CLOCK_STEP_NS))

    def clock_time_get(self, memory: memoryview, clock: int, precision: int, result: int) -> None:
        if clock > 3:
            raise WasiError(Errno.INVAL)
        self._elapsed_ns += CLOCK_STEP_NS
        put(memory, result, _U64.pack(self._now_ns() if clock == 0 else self._elapsed_ns))

    def random_get(self, memory: memoryview, at: int, size: int) -> None:
        target = piece(memory, at, size)
        done = 0
        while done < size:
            if not self._random_left:
                self._random_left = next(self._random)
            part = self._random_left[: size - done]
            target[done : done + len(part)] = part
            self._random_left = self._random_left[len(part) :]
            done += len(part)

    def proc_exit(self, memory: memoryview, code: int) -> None:
        raise Exited(code)

    def proc_raise(self, memory: memoryview, signal: int) -> None:
        raise WasiError(Errno.NOSYS)

    def sched_yield(self, memory: memoryview) -> None:
        pass

    def poll_oneoff(self, memory: memoryview, subscriptions: int, events: int, count: int, result: int) -> None:
        """Streams and files are always ready; with clocks alone the earliest one is reached at once."""
        if not count or count > limits.RUN_FILES_OPEN_MAX:
            raise WasiError(Errno.INVAL)
        table = piece(memory, subscriptions, 48 * count)
        ready: list[bytes] = []
        clocks: list[tuple[int, bytes]] = []
        for place in range(0, 48 * count, 48):
            userdata, tag = struct.unpack_from("<QB", table, place)
            if tag == 0:
                clock, timeout, _, flags = struct.unpack_from("<I4xQQH", table, place + 16)
                if clock > 1:
                    ready.append(struct.pack("<QHB5xQH6x", userdata, Errno.INVAL, tag, 0, 0))
                    continue
                now = self._now_ns() if clock == 0 else self._elapsed_ns
                wait = max(0, timeout - now) if flags & 1 else timeout
                clocks.append((wait, struct.pack("<QHB5xQH6x", userdata, 0, tag, 0, 0)))
                continue
            (fd,) = _U32.unpack_from(table, place + 16)
            error = 0 if fd in self._open and tag in (1, 2) else Errno.BADF
            ready.append(struct.pack("<QHB5xQH6x", userdata, error, tag, 0 if error else 1, 0))
        if not ready:
            wait = min(wait for wait, _ in clocks)
            # Not beyond what 64 bits of nanoseconds hold, whatever sum of sleeps a module asks for.
            self._elapsed_ns = min(self._elapsed_ns + wait, 2**62)
            ready = [event for due, event in clocks if due <= wait]
        put(memory, events, b"".join(ready))
        put(memory, result, _U32.pack(len(ready)))

    # --- what is open

    def fd_advise(self, memory: memoryview, fd: int, offset: int, size: int, advice: int) -> None:
        self._file(fd, 0)

    def fd_allocate(self, memory: memoryview, fd: int, offset: int, size: int) -> None:
        _, file = self._file(fd, _FD_WRITE)
        if offset + size > file.size:
            self.files.resize(file, offset + size)

    def fd_close(self, memory: memoryview, fd: int) -> None:
        found = self._get(fd)
        del self._open[fd]
        if found.node is not None and not found.preopen:
            self.files.drop(found.node)

    def fd_datasync(self, memory: memoryview, fd: int) -> None:
        self._get(fd)

    fd_sync = fd_datasync

    def fd_fdstat_get(self, memory: memoryview, fd: int, result: int) -> None:
        found = self._get(fd)
        flags = _APPEND if found.append else 0
        put(memory, result, struct.pack("<BxH4xQQ", self._type(found.node), flags, found.rights, found.inheriting))

    @staticmethod
    def _type(node: Node | None) -> int:
        if isinstance(node, Dir):
            return _DIRECTORY
        if isinstance(node, File):
            return _REGULAR
        return _LINK if isinstance(node, Link) else _UNKNOWN

    def fd_fdstat_set_flags(self, memory: memoryview, fd: int, flags: int) -> None:
        self._get(fd).append = bool(flags & _APPEND)

    def fd_fdstat_set_rights(self, memory: memoryview, fd: int, rights: int, inheriting: int) -> None:
        found = self._get(fd)
        if rights & ~found.rights or inheriting & ~found.inheriting:
            raise WasiError(Errno.NOTCAPABLE)
        found.rights, found.inheriting = rights, inheriting

    def fd_filestat_get(self, memory: memoryview, fd: int, result: int) -> None:
        put(memory, result, self._stat(self._get(fd).node))

    def _stat(self, node: Node | None) -> bytes:
        if node is None:
            return struct.pack("<QQB7xQQQQQ", 0, 0, _UNKNOWN, 1, 0, 0, 0, 0)
        size = node.size if isinstance(node, File) else len(node.target.encode()) if isinstance(node, Link) else 0
        at = node.modified_ns
        return struct.pack("<QQB7xQQQQQ", 1, node.inode, self._type(node), 1, size, at, at, at)

    def fd_filestat_set_size(self, memory: memoryview, fd: int, size: int) -> None:
        self.files.resize(self._file(fd, _FD_WRITE)[1], size)

    def fd_filestat_set_times(self, memory: memoryview, fd: int, accessed: int, modified: int, flags: int) -> None:
        node = self._get(fd).node
        if node is None:
            raise WasiError(Errno.INVAL)
        self._set_time(node, modified, flags)

    def _set_time(self, node: Node, modified: int, flags: int) -> None:
        if flags & 8:
            node.modified_ns = self._now_ns()
        elif flags & 4:
            node.modified_ns = modified

    def fd_prestat_get(self, memory: memoryview, fd: int, result: int) -> None:
        found = self._get(fd)
        if not found.preopen:
            raise WasiError(Errno.BADF)
        put(memory, result, struct.pack("<II", 0, len(found.preopen)))

    def fd_prestat_dir_name(self, memory: memoryview, fd: int, at: int, size: int) -> None:
        found = self._get(fd)
        if not found.preopen:
            raise WasiError(Errno.BADF)
        if size < len(found.preopen):
            raise WasiError(Errno.NAMETOOLONG)
        put(memory, at, found.preopen)

    def fd_renumber(self, memory: memoryview, fd: int, to: int) -> None:
        found = self._get(fd)
        self._get(to)
        if fd != to:
            self.fd_close(memory, to)
            del self._open[fd]
            self._open[to] = found

    # --- reading and writing

    def fd_read(self, memory: memoryview, fd: int, vectors: int, count: int, result: int) -> None:
        found = self._get(fd)
        targets = vectors_of(memory, vectors, count)
        if found.stream == 0:
            total = self._fill(targets, lambda size, _: self._stdin.read(size))
        else:
            found, file = self._file(fd, _FD_READ)
            total = self._fill(targets, lambda size, done: file.read(found.at + done, size))
            found.at += total
        put(memory, result, _U32.pack(total))

    @staticmethod
    def _fill(targets: list[memoryview], read: Callable[[int, int], bytes | bytearray]) -> int:
        done = 0
        for target in targets:
            data = read(len(target), done)
            target[: len(data)] = data
            done += len(data)
            if len(data) < len(target):
                break
        return done

    def fd_pread(self, memory: memoryview, fd: int, vectors: int, count: int, offset: int, result: int) -> None:
        _, file = self._file(fd, _FD_READ)
        targets = vectors_of(memory, vectors, count)
        put(memory, result, _U32.pack(self._fill(targets, lambda size, done: file.read(offset + done, size))))

    def fd_write(self, memory: memoryview, fd: int, vectors: int, count: int, result: int) -> None:
        found = self._get(fd)
        data = b"".join(vectors_of(memory, vectors, count))
        if found.stream in (1, 2):
            self._write(found.stream, data)
        else:
            if found.stream == 0:
                raise WasiError(Errno.BADF)
            found, file = self._file(fd, _FD_WRITE)
            if found.append:
                found.at = file.size
            if data:
                self.files.write(file, found.at, data)
            found.at += len(data)
        put(memory, result, _U32.pack(len(data)))

    def fd_pwrite(self, memory: memoryview, fd: int, vectors: int, count: int, offset: int, result: int) -> None:
        _, file = self._file(fd, _FD_WRITE)
        data = b"".join(vectors_of(memory, vectors, count))
        if data:
            self.files.write(file, offset, data)
        put(memory, result, _U32.pack(len(data)))

    def fd_seek(self, memory: memoryview, fd: int, offset: int, whence: int, result: int) -> None:
        found, file = self._file(fd, 0)
        offset = offset - 2**64 if offset >= 2**63 else offset
        if whence > 2:
            raise WasiError(Errno.INVAL)
        at = offset + (0, found.at, file.size)[whence]
        if not 0 <= at < 2**63:
            raise WasiError(Errno.INVAL)
        found.at = at
        put(memory, result, _U64.pack(at))

    def fd_tell(self, memory: memoryview, fd: int, result: int) -> None:
        put(memory, result, _U64.pack(self._file(fd, 0)[0].at))

    def fd_readdir(self, memory: memoryview, fd: int, at: int, size: int, cookie: int, result: int) -> None:
        """The entries as they are when the first one is read, in byte order; what does not fit is cut short."""
        directory, found = self._dir(fd), self._get(fd)
        target = piece(memory, at, size)
        if not cookie:
            found.listing = sorted(directory.entries)
        done = 0
        for number in range(cookie, len(found.listing) + 2):
            if done >= size:
                break
            name = (".", "..")[number] if number < 2 else found.listing[number - 2]
            node = directory if number < 2 else directory.entries.get(name)
            if node is None:
                continue  # removed since
            encoded = name.encode()
            entry = struct.pack("<QQIB3x", number + 1, node.inode, len(encoded), self._type(node)) + encoded
            entry = entry[: size - done]
            target[done : done + len(entry)] = entry
            done += len(entry)
        put(memory, result, _U32.pack(done))

    # --- paths

    def path_create_directory(self, memory: memoryview, fd: int, at: int, size: int) -> None:
        self.files.make_dir(self._dir(fd), path_of(memory, at, size))

    def path_filestat_get(self, memory: memoryview, fd: int, flags: int, at: int, size: int, result: int) -> None:
        node = self.files.find(self._dir(fd), path_of(memory, at, size), follow=bool(flags & 1))
        put(memory, result, self._stat(node))

    def path_filestat_set_times(
        self, memory: memoryview, fd: int, flags: int, at: int, size: int, accessed: int, modified: int, which: int
    ) -> None:
        node = self.files.find(self._dir(fd), path_of(memory, at, size), follow=bool(flags & 1))
        self._set_time(node, modified, which)

    def path_link(
        self, memory: memoryview, fd: int, flags: int, at: int, size: int, to_fd: int, to: int, to_size: int
    ) -> None:
        node = self.files.find(self._dir(fd), path_of(memory, at, size), follow=bool(flags & 1))
        self.files.link(node, self._dir(to_fd), path_of(memory, to, to_size))

    def path_open(
        self,
        memory: memoryview,
        fd: int,
        lookup: int,
        at: int,
        size: int,
        oflags: int,
        rights: int,
        inheriting: int,
        fdflags: int,
        result: int,
    ) -> None:
        files, start, path = self.files, self._dir(fd), path_of(memory, at, size)
        piece(memory, result, 4)
        if len(self._open) >= limits.RUN_FILES_OPEN_MAX:
            raise WasiError(Errno.MFILE)
        directory, name = files.split(start, path, follow=bool(lookup & 1))
        node: Node | None = directory.entries.get(name) if name else directory
        made = False
        if node is None:
            if path.endswith("/") or not oflags & _CREAT or oflags & _WANT_DIR:
                raise WasiError(Errno.NOENT)
            node, made = files.create(directory, name), True
        elif oflags & _CREAT and oflags & _EXCL:
            raise WasiError(Errno.EXIST)
        if isinstance(node, Link):
            raise WasiError(Errno.LOOP)
        if isinstance(node, Dir):
            if rights & _FD_WRITE or oflags & (_TRUNC | _CREAT):
                raise WasiError(Errno.ISDIR)
            found = Open(node, rights & _DIR_RIGHTS, inheriting & (_DIR_RIGHTS | _FILE_RIGHTS))
        else:
            assert isinstance(node, File)
            if oflags & _WANT_DIR or path.endswith("/"):
                raise WasiError(Errno.NOTDIR)
            if oflags & _TRUNC and not made:
                files.resize(node, 0)
            found = Open(node, rights & _FILE_RIGHTS, inheriting & _FILE_RIGHTS)
            found.append = bool(fdflags & _APPEND)
        node.uses += 1
        number = next(number for number in range(len(self._open) + 1) if number not in self._open)
        self._open[number] = found
        put(memory, result, _U32.pack(number))

    def path_readlink(
        self, memory: memoryview, fd: int, at: int, size: int, to: int, to_size: int, result: int
    ) -> None:
        node = self.files.find(self._dir(fd), path_of(memory, at, size), follow=False)
        if not isinstance(node, Link):
            raise WasiError(Errno.INVAL)
        text = node.target.encode()[:to_size]
        put(memory, to, text)
        put(memory, result, _U32.pack(len(text)))

    def path_remove_directory(self, memory: memoryview, fd: int, at: int, size: int) -> None:
        self.files.remove_dir(self._dir(fd), path_of(memory, at, size))

    def path_rename(self, memory: memoryview, fd: int, at: int, size: int, to_fd: int, to: int, to_size: int) -> None:
        path, target = path_of(memory, at, size), path_of(memory, to, to_size)
        self.files.rename(self._dir(fd), path, self._dir(to_fd), target)

    def path_symlink(self, memory: memoryview, at: int, size: int, fd: int, to: int, to_size: int) -> None:
        target, path = path_of(memory, at, size), path_of(memory, to, to_size)
        self.files.make_link(self._dir(fd), path, target)

    def path_unlink_file(self, memory: memoryview, fd: int, at: int, size: int) -> None:
        self.files.unlink(self._dir(fd), path_of(memory, at, size))

    # --- sockets: there are none

    def sock_accept(self, memory: memoryview, *args: int) -> None:
        self._no_socket(args[0])

    sock_recv = sock_send = sock_shutdown = sock_accept

    def _no_socket(self, fd: int) -> None:
        self._get(fd)
        raise WasiError(Errno.NOTSOCK)


def perform(wasi: Wasi, name: str, memory: memoryview, args: tuple[Any, ...]) -> int:
    """One call with unsigned arguments: the number that the module gets."""
    try:
        getattr(wasi, name)(memory, *args)
    except WasiError as error:
        return int(error.errno)
    return 0
