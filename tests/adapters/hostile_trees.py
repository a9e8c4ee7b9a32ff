"""Archives that no honest executor writes, one for each trick; a lying executor of the tests sends them too."""

from __future__ import annotations

import io
import tarfile

from clawnet.execution import archive
from clawnet.execution.archive import Member

Part = tuple[Member, bytes]


def tree(*parts: Part | Member) -> bytes:
    """An archive as clawnet writes it, of whatever members."""
    out = io.BytesIO()
    writing = archive.Writing(out)
    for part in parts:
        member, data = (part, b"") if isinstance(part, Member) else part
        writing.add(member, io.BytesIO(data))
    writing.close()
    return out.getvalue()


def file(name: str, data: bytes = b"owned\n", *, executable: bool = False) -> Part:
    """A file."""
    return Member(name, "file", len(data), executable), data


def link(name: str, target: str) -> Member:
    """A symbolic link."""
    return Member(name, "link", target=target)


def foreign(kind: bytes, name: str = "dist/x", target: str = "") -> bytes:
    """An archive of tarfile's with a member of a kind that is none of ours."""
    out = io.BytesIO()
    with tarfile.open(mode="w", fileobj=out, format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, target
        tar.addfile(info)
    return out.getvalue()


def _twice_in_pax() -> bytes:
    """A pax header whose path says one thing and the header behind it another, and a second path after the first."""
    records = b"".join(_record(b"path", name) for name in (b"dist/good", b"../evil"))
    info = tarfile.TarInfo("PaxHeaders/x")
    info.type, info.size = tarfile.XHDTYPE, len(records)
    body = records + archive.padding(len(records))
    plain = tree(file("dist/good"))
    return info.tobuf(tarfile.USTAR_FORMAT) + body + plain


def _record(key: bytes, value: bytes) -> bytes:
    length = len(key) + len(value) + 3
    while len(str(length)) + len(key) + len(value) + 3 != length:
        length = len(str(length)) + len(key) + len(value) + 3
    return str(length).encode() + b" " + key + b"=" + value + b"\n"


def _endless_pax() -> bytes:
    """A pax header that announces a gigabyte of records."""
    info = tarfile.TarInfo("PaxHeaders/x")
    info.type, info.size = tarfile.XHDTYPE, 2**30
    return info.tobuf(tarfile.USTAR_FORMAT) + tree(file("dist/x"))


_plain = tree(file("dist/x", b"x" * 1_000))
TRICKS: dict[str, bytes] = {
    "absolute": tree(file("/tmp/clawnet-evil")),
    "dotdot": tree(file("dist/../../evil")),
    "dotdot-first": tree(file("../evil")),
    "dot": tree(file("dist/./x")),
    "empty-part": tree(file("dist//x")),
    "link-absolute": tree(link("dist/x", "/etc/passwd")),
    "link-out": tree(link("dist/x", "../../etc")),
    "link-roundabout": tree(link("dist/x", "a/../../../etc")),
    "through-a-link": tree(link("dist/x", "sub"), file("dist/x/y")),
    "link-over-file": tree(file("dist/x"), link("dist/x", "y")),
    "file-over-link": tree(link("dist/x", "y"), file("dist/x")),
    "below-a-file": tree(file("dist/x"), file("dist/x/y")),
    "twice": tree(file("dist/x"), file("dist/x", b"other\n")),
    "case": tree(file("dist/readme"), file("dist/README")),
    "case-of-a-directory": tree(link("dist/A", "sub"), file("dist/a/x")),
    "unicode-forms": tree(file("dist/caf\u00e9"), file("dist/cafe\u0301")),
    "unicode-width": tree(file("dist/x"), file("dist/\uff58")),
    "invisible": tree(file("dist/x"), file("dist/x\u200b")),
    "reserved": tree(file("dist/NUL")),
    "reserved-with-extension": tree(file("dist/com1.txt")),
    "reserved-directory": tree(file("dist/aux/x")),
    "backslash": tree(file("dist/..\\..\\evil")),
    "nul": tree(file("dist/x\0y")),
    "newline": tree(file("dist/x\ny")),
    "escape-sequence": tree(file("dist/\x1b[2Jx")),
    "long-part": tree(file("dist/" + "x" * 256)),
    "long-path": tree(file("dist/" + "/".join(["x" * 200] * 30))),
    "deep": tree(file("dist/" + "/".join(["d"] * 80))),
    "not-asked-for": tree(file("dist/x"), file("other")),
    "hidden-not-asked-for": tree(file("dist/x"), file(".bashrc")),
    "git-hook": tree(file("dist/.git/hooks/post-checkout", executable=True)),
    "git-hook-in-disguise": tree(file("dist/.GIT /hooks/post-checkout", executable=True)),
    "hard-link": foreign(tarfile.LNKTYPE, target="/etc/passwd"),
    "character-device": foreign(tarfile.CHRTYPE),
    "block-device": foreign(tarfile.BLKTYPE),
    "fifo": foreign(tarfile.FIFOTYPE),
    "contiguous": foreign(tarfile.CONTTYPE),
    "gnu-long-name": foreign(tarfile.GNUTYPE_LONGNAME),
    "sparse": foreign(tarfile.GNUTYPE_SPARSE),
    "pax-says-it-twice": _twice_in_pax(),
    "pax-without-end": _endless_pax(),
    "pax-global": foreign(tarfile.XGLTYPE),
    "cut-in-a-header": _plain[:300],
    "cut-in-a-file": _plain[:900],
    "cut-before-the-end": _plain[: 512 + 1_024],
    "something-behind": _plain + b"x" * 512,
    "wrong-checksum": _plain[:100] + b"\1" + _plain[101:],
    "garbage": b"\x7fELF" * 1_000,
    "empty": b"",
}
"""What comes in place of the files of `dist/*`, by the trick's name."""
