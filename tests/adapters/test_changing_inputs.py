"""An input that something writes to while it is read: an error that names it, and nothing left of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from clawnet import limits
from clawnet.errors import DataError
from clawnet.execution.inputs import pack_path
from clawnet.storage import blobs as blobs_module
from clawnet.storage.blobs import BlobStore
from clawnet.wire.blobid import blob_id

SIZE = 3 * limits.MIB + 5
Change = Callable[[Path], None]


def grow(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def shrink(path: Path) -> None:
    os.truncate(path, limits.MIB)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(SIZE - 5)
        file.write(b"other")
    os.utime(path, ns=(1, 1))


def files(directory: Path) -> list[Path]:
    return [file for file in directory.rglob("*") if file.is_file()]


@pytest.mark.parametrize("change", [grow, shrink, empty, overwrite])
@pytest.mark.parametrize("kind", ["file", "tree"])
def test_a_file_that_changes_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, change: Change
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    path = root / "data"
    path.write_bytes(bytes(SIZE))
    store = BlobStore(tmp_path / "blobs")
    changed: list[Path] = []
    write = blobs_module.BlobWriter.write

    def first_then_change(self: blobs_module.BlobWriter, data: bytes) -> int:
        done = write(self, data)
        if not changed and self.size >= limits.BLOB_CHUNK_BYTES:
            changed.append(path)
            change(path)
        return done

    monkeypatch.setattr(blobs_module.BlobWriter, "write", first_then_change)
    with pytest.raises(DataError) as caught:
        pack_path("data", str(path if kind == "file" else root), store)
    assert changed == [path]
    assert caught.value.exit_code == 65
    assert "data" in caught.value.message and "while it was read" in caught.value.message
    assert files(store.directory) == []
    assert store.total_bytes == 0


def test_a_file_that_is_replaced_while_it_is_read_travels_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other = tmp_path / "data", tmp_path / "other"
    path.write_bytes(bytes(SIZE))
    other.write_bytes(b"other")
    store = BlobStore(tmp_path / "blobs")
    write = blobs_module.BlobWriter.write

    def then_replace(self: blobs_module.BlobWriter, data: bytes) -> int:
        if other.exists():
            os.replace(other, path)
        return write(self, data)

    monkeypatch.setattr(blobs_module.BlobWriter, "write", then_replace)
    assert pack_path("data", str(path), store)["blob"] == blob_id(bytes(SIZE))
