"""Passphrases: the first line of a private file, or what is typed at a terminal, unseen; never an argument."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, BinaryIO

import typer

from clawnet import paths
from clawnet.errors import DataError, NotFoundError, UsageError

BYTES_MAX = 4_096

PassphraseFile = Annotated[
    str, typer.Option("--passphrase-file", metavar="FILE", help="A private file whose first line is the passphrase.")
]


def passphrase(file: str, *, confirm: bool) -> str:
    """The passphrase of this command; with `confirm` it is typed twice."""
    if file:
        path = Path(file)
        paths.check_private(path, secret=True)
        line = read(path, BYTES_MAX).split(b"\n", 1)[0].rstrip(b"\r")
        try:
            return line.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"the first line of {path} is not UTF-8 text") from error
    if sys.stdin is None or not sys.stdin.isatty():
        raise UsageError("no passphrase", hint="name a private file that holds it: --passphrase-file FILE")
    import getpass

    typed = getpass.getpass("Passphrase: ")
    if confirm and getpass.getpass("Again: ") != typed:
        raise DataError("the two passphrases differ")
    return typed


def standard_input() -> BinaryIO:
    """What - stands for, where a file is wanted."""
    if sys.stdin is None:
        raise UsageError("- reads standard input, which is closed", hint="name a file")
    return sys.stdin.buffer


def read(path: Path, bytes_max: int) -> bytes:
    """The beginning of a file that the user named."""
    try:
        with path.open("rb") as file:
            return file.read(bytes_max)
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no file {path}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
