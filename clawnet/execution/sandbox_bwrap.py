"""The bubblewrap sandbox: what a run on Linux sees of this machine, as a command line.

Own namespaces for all that Linux has, no network, no capabilities, no nested user namespaces, a system call filter.
Of the file system only /usr and what belongs to it, read-only, an /etc made up here, a bounded /tmp and the run's own
directory. `/` itself is never bound, and no uid of the run is root towards host files.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from clawnet import limits

JOB_DIR: Final = "/job"
PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
IN_MEMORY: Final = ("/tmp", "/dev/shm")
ENVIRONMENT: Final = {"PATH": PATH, "HOME": JOB_DIR, "LANG": "C.UTF-8", "TMPDIR": "/tmp"}
OUTSIDE: Final = {"PATH": PATH}
"""The environment of the programs around a run, which read locales for nothing where it names one."""
STATUS_FD, SECCOMP_FD, OPTIONS_FD, STDIN_FD = 3, 4, 5, 6
_TOP: Final = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")

# Inside, as process 1: the limits, a mark that the set-up is done, then the command in a process of its own. The
# shell's stderr is the status pipe: it reports a fatal signal there ("Killed"), which tells 128+N from an exit code.
# Should this machine's memory run out, the kernel takes a run before anything else.
SCRIPT: Final = (
    "echo 1000 2>/dev/null >/proc/self/oom_score_adj; "
    "ulimit -c 0 && ulimit -t {cpu_s} && ulimit -f {file_blocks} && ulimit -v {address_kib} && ulimit -n {files} && "
    "{{ ulimit -p {processes} 2>/dev/null || ulimit -u {processes}; }} && printf r >&3 || exit 125; "
    'exec 4>&2 2>&3; (exec "$@" {stdin}2>&4 3>&- 4>&-); echo "$?" >&3'
)


def limit_words(*, wall_s: float, memory_bytes_max: int, processes: int, gpu: bool = False) -> dict[str, int]:
    """The rlimits of a run, in the units of `ulimit`, never above what this process may set.

    Address space is bounded at four times the memory: it is reserved far more than used; the watchdog counts what is
    used. CUDA reserves as much as there is, so a run with a GPU has the watchdog alone. Processor time is what all
    processors could give in the time allowed.
    """
    import resource

    def cut(name: int, value: int) -> int:
        hard = resource.getrlimit(name)[1]
        return value if hard == resource.RLIM_INFINITY else min(value, hard)

    cpu_s = int(wall_s * (os.cpu_count() or 1)) + 2
    return {
        "cpu_s": cut(resource.RLIMIT_CPU, cpu_s),
        "file_blocks": cut(resource.RLIMIT_FSIZE, limits.RUN_FILE_BYTES_MAX) // 512,
        "address_kib": cut(resource.RLIMIT_AS, limits.GPU_ADDRESS_BYTES_MAX if gpu else 4 * memory_bytes_max) // 1024,
        "files": cut(resource.RLIMIT_NOFILE, limits.RUN_FILES_OPEN_MAX),
        "processes": cut(resource.RLIMIT_NPROC, processes),
    }


def drop_words(uid: int | None) -> list[str]:
    """The command in front that gives up root for `uid` (None: nothing to give up)."""
    if uid is None:
        return []
    if sys.platform == "darwin":
        return [sys.executable, "-I", "-S", "-c", _DROP, str(uid)]
    setpriv = shutil.which("setpriv", path=PATH) or "/usr/bin/setpriv"
    return [setpriv, f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--inh-caps=-all", "--no-new-privs"]


# macOS has no setpriv.
_DROP: Final = (
    "import os, sys; uid = int(sys.argv[1]); os.setgroups([]); os.setgid(uid); os.setuid(uid); "
    "os.execv(sys.argv[2], sys.argv[2:])"
)


class Bubblewrap:
    """One machine's sandbox: found once, then a command line for each run."""

    def __init__(self, program: str, base: Path, *, uid: int | None, hidden: tuple[Path, ...]) -> None:
        """`base` holds the made-up /etc, `uid` is whom to become first (the node being root), `hidden` are directories
        (clawnet's home) that are covered should they lie below a directory that is bound."""
        self.program = program
        self.uid = uid
        self._etc = base / "etc"
        self._hidden = hidden
        self._fixed: list[str] = []
        self._sizes = False

    @property
    def in_memory(self) -> bool:
        """Whether /tmp and /dev/shm are the run's own, in memory and bounded."""
        return self._sizes

    def prepare(self, help_text: str) -> None:
        """Writes the made-up /etc and settles what all runs share. `help_text` is what the program says it can do:
        `--size` came with 0.7 and `--disable-userns` with 0.8; without them a directory on disk stands for the bounded
        /tmp, and the system call filter alone refuses nested user namespaces."""
        self._sizes = "--size" in help_text
        uid = self.uid if self.uid is not None else os.getuid()
        gid = self.uid if self.uid is not None else os.getgid()
        self._etc.mkdir(mode=0o755, exist_ok=True)
        (self._etc / "alternatives").mkdir(mode=0o755, exist_ok=True)
        for name, text in (
            ("passwd", f"root:x:0:0:root:/:/bin/sh\njob:x:{uid}:{gid}:job:{JOB_DIR}:/bin/sh\n"),
            ("group", f"root:x:0:\njob:x:{gid}:\n"),
            ("hosts", "127.0.0.1 localhost\n::1 localhost\n"),
            ("nsswitch.conf", "passwd: files\ngroup: files\nhosts: files\n"),
            ("ld.so.cache", ""),
        ):
            path = self._etc / name
            path.write_text(text)
            path.chmod(0o644)
        self._etc.chmod(0o755)
        self._fixed = self._shared_words("--disable-userns" in help_text)

    def _shared_words(self, no_nesting: bool) -> list[str]:
        words = ["--unshare-all", "--unshare-user", "--die-with-parent", "--new-session", "--as-pid-1"]
        words += ["--disable-userns"] if no_nesting else []
        words += ["--cap-drop", "ALL", "--hostname", "job"]
        bound = [Path("/usr")]
        words += ["--ro-bind", "/usr", "/usr"]
        for name in _TOP:
            path = Path("/", name)
            if path.is_symlink():
                words += ["--symlink", os.readlink(path), str(path)]
            elif path.is_dir():
                words += ["--ro-bind", str(path), str(path)]
                bound.append(path)
        words += ["--ro-bind", str(self._etc), "/etc"]
        for name in ("/etc/alternatives", "/etc/ld.so.cache"):
            words += ["--ro-bind-try", name, name]
        for path in self._hidden:
            if any(parent == path or parent in path.parents for parent in bound):
                words += ["--tmpfs", str(path), "--remount-ro", str(path)]
        return [*words, "--proc", "/proc", "--dev", "/dev"]

    def argv(
        self,
        directory: Path,
        command: list[str],
        *,
        limit: Mapping[str, int],
        tmp_bytes: int,
        seccomp: bool,
        devices: Sequence[str] = (),
    ) -> list[str]:
        """The whole command line of a run; environment variables come through OPTIONS_FD, where nobody reads them.

        `devices` are words that bind the device files of GPUs that are this run's own (execution/gpu.py).
        """
        around = self._around(directory, tmp_bytes, seccomp, devices)
        return [*around, "/bin/sh", "-c", SCRIPT.format(stdin="", **limit), "sh", *command]

    def waiting_argv(self, directory: Path, *, tmp_bytes: int, seccomp: bool) -> list[str]:
        """The command line of a sandbox that reads the script of its one run from its standard input."""
        return [*self._around(directory, tmp_bytes, seccomp, ()), "/bin/sh", "-s"]

    def _around(self, directory: Path, tmp_bytes: int, seccomp: bool, devices: Sequence[str]) -> list[str]:
        words = [*drop_words(self.uid), self.program, *self._fixed, *devices]
        if self._sizes:
            words += ["--size", str(tmp_bytes), "--tmpfs", "/dev/shm", "--remount-ro", "/dev"]
            words += ["--size", str(tmp_bytes), "--tmpfs", "/tmp"]
        else:
            words += ["--remount-ro", "/dev", "--bind", str(directory.parent / "tmp"), "/tmp"]
        words += ["--bind", str(directory), JOB_DIR, "--chdir", JOB_DIR, "--remount-ro", "/"]
        words += ["--args", str(OPTIONS_FD)]
        if seccomp:
            words += ["--seccomp", str(SECCOMP_FD)]
        return [*words, "--"]


def waiting_script(command: Sequence[str], limit: Mapping[str, int], stdin: bool) -> bytes:
    """What a sandbox that waits is told; `stdin` is whether the command reads STDIN_FD.

    All of it is read before any of it runs: the shell's own standard input is at its end then.
    """
    source = f"<&{STDIN_FD} {STDIN_FD}<&- " if stdin else f"</dev/null {STDIN_FD}<&- "
    text = f"{{ set -- {shlex.join(command)}; {SCRIPT.format(stdin=source, **limit)}; exit; }}\n"
    return os.fsencode(text)


def options(environment: Mapping[str, str]) -> bytes:
    """What goes through OPTIONS_FD: the run's environment and nothing else."""
    words: list[str] = ["--clearenv"]
    for name, value in environment.items():
        words += ["--setenv", name, value]
    return b"".join(word.encode("utf-8", "surrogateescape") + b"\0" for word in words)
