"""Standard output closed or full, standard input closed, files that are none: a code and a sentence, no defect."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.cli.harness import PROGRAM, Node, Nodes

pytestmark = pytest.mark.slow


@pytest.fixture
def node(nodes: Nodes) -> Node:
    return nodes("alice").start()


def redirected(node: Node, how: str) -> Node:
    """The same node, its commands redirected by a shell."""
    node.program = ("sh", "-c", f'exec "$@" {how}', "sh", *PROGRAM)
    return node


def wrote_out(node: Node, directory: Path) -> list[tuple[str, ...]]:
    """Commands that print something, by each of the ways in which they do."""
    secret = directory / "passphrase"
    secret.write_text("correct horse battery\n")
    secret.chmod(0o600)
    lines = directory / "lines"
    lines.write_text('{"type": "compute", "op": "sha256", "description": "x"}\n')
    return [
        ("--version",),
        ("wallet", "history"),
        ("wallet", "history", "--json"),
        ("wallet", "export"),
        ("wallet", "backup", "-", "--passphrase-file", str(secret)),
        ("identity", "export", "--passphrase-file", str(secret)),
        ("run", "--", "echo", "hi"),
        ("run", "--json", "--", "echo", "hi"),
        ("market", "batch", str(lines)),
    ]


def test_a_closed_stdout_is_141(node: Node, tmp_path: Path) -> None:
    for words in wrote_out(redirected(node, ">&-"), tmp_path):
        code, _, err = node.raw(*words)
        assert (code, err) == (141, b""), words
    # What prints nothing needs none.
    assert node("run", "--", "true").code == 0


def test_a_reader_that_left_is_141(node: Node, tmp_path: Path) -> None:
    for words in wrote_out(node, tmp_path):
        with node.popen(*words) as process:
            assert process.stdout is not None
            process.stdout.close()
            assert process.wait(60) == 141, words
            assert process.stderr is not None
            assert process.stderr.read() == b"", words


def test_a_stdout_on_a_full_disk_is_told(node: Node, tmp_path: Path) -> None:
    if not Path("/dev/full").is_char_device():
        pytest.skip("no /dev/full here")
    for words in wrote_out(redirected(node, ">/dev/full"), tmp_path):
        node(*words).failed(70, "No space left")
    assert "internal error" not in node.log


def test_a_wallet_goes_to_a_file_though_stdout_is_closed(node: Node, tmp_path: Path) -> None:
    wrote_out(node, tmp_path)
    secret = str(tmp_path / "passphrase")
    redirected(node, ">&-")
    node("wallet", "backup", str(tmp_path / "wallet"), "--passphrase-file", secret)
    node("identity", "export", str(tmp_path / "identity"), "--passphrase-file", secret)
    assert (tmp_path / "wallet").stat().st_size > 0
    assert (tmp_path / "identity").stat().st_size > 0


@pytest.mark.parametrize(
    "words", [("wallet", "backup", "FILE"), ("wallet", "restore", "-"), ("identity", "import", "-")], ids=str
)
def test_a_closed_stdin_is_said(nodes: Nodes, tmp_path: Path, words: tuple[str, ...]) -> None:
    node = redirected(nodes("alice"), "<&-")
    node(*words).failed(64)


def test_a_pipe_that_is_named_is_written_and_stays_one(node: Node, tmp_path: Path) -> None:
    pipe, link, file = tmp_path / "pipe", tmp_path / "link", tmp_path / "file"
    os.mkfifo(pipe)
    for words, begins in (
        (("run", "--status-file", str(pipe), "--", "true"), b"{"),
        (("wallet", "export", "--output", str(pipe)), b'{"'),
    ):
        with node.popen(*words) as process:
            assert pipe.read_bytes().startswith(begins)
            assert process.wait(60) == 0
        assert pipe.is_fifo()
    link.symlink_to(file)
    assert node("wallet", "export", "--output", str(link)).code == 0
    assert link.is_symlink() and file.stat().st_mode & 0o777 == 0o600
