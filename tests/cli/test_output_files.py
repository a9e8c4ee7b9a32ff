"""Files in and out between two machines: what goes along, what comes back, and what is never written."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from .harness import Node, Nodes

BUILD = r"""
set -e
test "$1" = dist
mkdir -p dist/many dist/empty
i=0; while [ $i -lt 1000 ]; do echo "file $i" > dist/many/$i.txt; i=$((i+1)); done
head -c 20000000 /dev/zero | tr '\0' 'x' > dist/big
printf '#!/bin/sh\necho hello\n' > dist/tool
chmod 755 dist/tool
ln -s tool dist/current
cp "$(printf 'gr\303\274\303\237e.txt')" dist/
cp src/main.c dist/main.c
echo other > other
echo "built" >&2
"""


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Node, Node]]:
    """Alice submits; Bob, a member of her mesh, has the only machine that may take it."""
    nodes = Nodes()
    try:
        alice, bob = nodes.mesh("alice", "bob")
        yield alice, bob
    finally:
        nodes.close()


def _project(root: Path) -> Path:
    (root / "src").mkdir(parents=True)
    (root / "make.sh").write_text(BUILD)
    (root / "src" / "main.c").write_text("int main(void) { return 0; }\n")
    (root / "grüße.txt").write_text("hallo\n")
    return root


def test_a_build_on_another_machine_brings_its_files_back(pair: tuple[Node, Node], tmp_path: Path) -> None:
    alice, bob = pair
    root = _project(tmp_path / "project")
    (root / "dist").mkdir()
    (root / "dist" / "tool").write_text("old")
    status = tmp_path / "status.json"
    done = alice(
        *("run", "--peer", bob.peer_id, "--ring", "member", "--input", ".", "--output", "dist/*", "--output-dir", "."),
        *("--status-file", str(status), "--", "sh", "make.sh", "dist"),
        cwd=root,
    )
    assert (done.code, done.out, done.err) == (0, "", "built\n")
    dist = root / "dist"
    assert len(list((dist / "many").iterdir())) == 1000
    assert (dist / "many" / "999.txt").read_text() == "file 999\n"
    assert (dist / "big").read_bytes() == b"x" * 20_000_000
    assert (dist / "tool").read_text().startswith("#!") and os.access(dist / "tool", os.X_OK)
    assert (dist / "current").is_symlink() and os.readlink(dist / "current") == "tool"
    assert (dist / "grüße.txt").read_text() == "hallo\n"
    assert (dist / "empty").is_dir()
    assert not os.access(dist / "main.c", os.X_OK)
    assert not (root / "other").exists(), "only what was asked for comes"
    assert not list(root.rglob(".clawnet*"))
