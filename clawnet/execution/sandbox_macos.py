"""The seatbelt sandbox: what a run on macOS may do, as a profile for sandbox-exec.

Everything is refused that is not named: the system's programs may be read and run, the run's own directory and its
temporary one be written, processes of the same sandbox be signalled. There is no network, also not the loopback, and
clawnet's home is shut whatever it lies below. sandbox-exec replaces itself by the command and what it starts inherits
the sandbox for good, which is also how a run's processes are found again, wherever they hid (libproc.confined_to).

Apple calls sandbox-exec deprecated and ships it; the start-up probe decides whether it does here what it should.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

PROGRAM: Final = "/usr/bin/sandbox-exec"
PATH: Final = "/usr/bin:/bin:/usr/sbin:/sbin:/usr/local/bin:/opt/homebrew/bin"

_READABLE: Final = (
    "/bin",
    "/sbin",
    "/usr",
    "/System",
    "/opt/homebrew",
    "/Library/Developer/CommandLineTools",
    "/Library/Frameworks",
    "/Applications/Xcode.app/Contents/Developer",
    "/private/var/db/dyld",
    "/private/var/db/timezone",
    "/private/var/select",
    "/private/etc/localtime",
    "/private/etc/ssl",
)
_ANCESTORS: Final = (
    "/",
    "/private",
    "/private/var",
    "/private/etc",
    "/opt",
    "/Library",
    "/Applications",
    "/var",
    "/etc",
    "/tmp",
)
_DEVICES: Final = ("null", "zero", "random", "urandom", "dtracehelper")

# The last rule that fits decides: hence the home after what is readable, and the run's directories, which may lie below
# the home, after it.
_RULES: Final = """\
(version 1)
(deny default)
(allow process-fork)
(allow process-exec {readable} (subpath (param "WORK")) (subpath (param "TMP")))
(allow process-info* (target same-sandbox))
(allow signal (target same-sandbox))
(allow sysctl-read)
(allow file-read* file-map-executable {readable})
(allow file-read-metadata {ancestors} {parents})
(allow file-read-data (literal "/"))
(allow file-read* file-write-data file-ioctl {devices})
(deny file-read* file-write* {hidden})
(allow file-read-metadata {parents})
(allow file-read* file-write* file-map-executable (subpath (param "WORK")) (subpath (param "TMP")))
(deny file-write-setugid)
(deny file-link (require-not (require-any (subpath (param "WORK")) (subpath (param "TMP")))))
(deny network*)
(deny mach-register)
(deny system*)
"""


def quoted(path: str) -> str:
    """A path as a string of the profile's language."""
    return '"' + path.replace("\\", "\\\\").replace('"', '\\"') + '"'


class Seatbelt:
    """One machine's sandbox: a command line for each run.

    `hidden` are directories that stay shut (clawnet's home), `uid` is whom to become first (the node being root).
    """

    def __init__(self, hidden: tuple[Path, ...], *, uid: int | None, program: str = PROGRAM) -> None:
        self.uid = uid
        self._program = program
        self._hidden = hidden

    def profile(self, directory: Path) -> str:
        """The rules for a run in this directory; its paths come as parameters WORK and TMP."""
        above = [str(parent) for parent in directory.parents]
        return _RULES.format(
            readable=_each("subpath", _READABLE),
            ancestors=_each("literal", _ANCESTORS),
            parents=_each("literal", above),
            devices=_each("literal", [f"/dev/{name}" for name in _DEVICES]),
            hidden=_each("subpath", [str(path) for path in self._hidden]),
        )

    def argv(self, directory: Path, command: list[str]) -> list[str]:
        """The command inside."""
        directory = directory.resolve()  # the rules go by real paths
        where = ["-D", f"WORK={directory}", "-D", f"TMP={directory.parent / 'tmp'}"]
        return [self._program, *where, "-p", self.profile(directory), *command]

    def members(self, directory: Path) -> list[int]:
        """The processes of the run in this directory, also those that left its session and their parents."""
        if sys.platform == "darwin":
            from clawnet.execution import libproc

            return [pid for pid in libproc.confined_to(str(directory.resolve())) if pid != os.getpid()]
        return []


def environment(given: Mapping[str, str], directory: Path) -> dict[str, str]:
    """All that a sandboxed run finds in its environment."""
    base = {"PATH": PATH, "HOME": str(directory), "LANG": "C.UTF-8", "TMPDIR": str(directory.parent / "tmp")}
    return {**base, **given}


def _each(filter_: str, paths: tuple[str, ...] | list[str]) -> str:
    return " ".join(f"({filter_} {quoted(path)})" for path in paths) or '(literal "/nowhere")'
