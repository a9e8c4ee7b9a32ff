"""Where the database lies, as a stamp of two words: a copy of it somewhere else has another stamp."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Final

UNKNOWN: Final = "-"
"""In place of a word that this system cannot tell; it then speaks neither for nor against a copy."""

_MACHINE_FILES: Final = ("/etc/machine-id", "/var/lib/dbus/machine-id")
_CONTAINER_MARKS: Final = ("/.dockerenv", "/run/.containerenv", "/run/systemd/container")


def stamp(database: Path) -> str:
    """ "MACHINE FILE" for a database that is there.

    FILE is its inode: a copy has another, while a rename, a moved home on one file system and a volume that is mounted
    elsewhere keep it. MACHINE is a hash of the system's own id, for disks that were cloned with everything on them. In
    a container it is left out: containers are made anew around one volume. The word is hashed because the id itself is
    nobody's business. A false alarm costs a look at what the known peers hold; a copy that is missed is caught by the
    check of the own head after every start.
    """
    return f"{machine()} {_inode(database)}"


def _inode(path: Path) -> str:
    try:
        number = path.stat().st_ino
    except OSError:
        return UNKNOWN
    return str(number) if number else UNKNOWN


def machine() -> str:
    """Sixteen hex digits that stand for this installation of an operating system."""
    identifier = _windows_id() if sys.platform == "win32" else _unix_id()
    if not identifier:
        return UNKNOWN
    return hashlib.sha256(b"clawnet/host/1" + identifier.encode()).hexdigest()[:16]


def _unix_id() -> str:
    if any(Path(mark).exists() for mark in _CONTAINER_MARKS):
        return ""
    for name in _MACHINE_FILES:
        try:
            text = Path(name).read_text("ascii", "replace").strip()
        except OSError:
            continue
        if text and text != "uninitialized":
            return text
    return ""


def _windows_id() -> str:
    if sys.platform != "win32":
        return ""
    import winreg

    try:
        with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, r"SOFTWARE\Microsoft\Cryptography") as key:
            return str(winreg.QueryValueEx(key, "MachineGuid")[0])
    except OSError:
        return ""
