"""WASI calls by themselves: whatever a module passes, a call answers an error number or does what it says."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from clawnet import limits
from clawnet.execution.wasi import Exited, TooMuchOutput, Wasi, perform
from clawnet.execution.wasiabi import CALLS, Errno
from clawnet.modulefile import magic_trouble

MEMORY_BYTES = 65_536
ROOM = 1 * limits.MIB

_address = st.one_of(
    st.integers(0, 2_048),
    st.integers(MEMORY_BYTES - 64, MEMORY_BYTES + 8),
    st.sampled_from([2**31 - 1, 2**31, 2**32 - 8, 2**32 - 1]),
)
_narrow = st.one_of(st.integers(0, 8), _address)
_wide = st.one_of(st.integers(0, 4_096), st.sampled_from([2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1]))
_rights = st.sampled_from([0, 2, 64, 66, 2**30 - 1, 2**64 - 1])


@st.composite
def _call(draw: Any) -> tuple[str, tuple[int, ...]]:
    name = draw(st.sampled_from(sorted(CALLS)))
    wide = _rights if name == "path_open" else _wide
    return name, tuple(draw(_narrow if each == "i" else wide) for each in CALLS[name])


def wasi(path: Path | None = None, stdin: bytes = b"input") -> tuple[Wasi, dict[int, bytearray]]:
    written = {1: bytearray(), 2: bytearray()}

    def write(stream: int, data: bytes) -> None:
        if len(written[stream]) + len(data) > 4_096:
            raise TooMuchOutput
        written[stream] += data

    made = Wasi([b"module", b"x"], [b"A=B"], io.BytesIO(stdin), write, files_bytes_max=ROOM, seed=b"seed")
    if path is not None:
        path.write_bytes(b"content")
        made.files.add_file("file", str(path), 7, executable=False)
    return made, written


def held(files: Any) -> int:
    """What the tree's files take, counted again."""
    return sum(file.held for file in {id(node): node for _, node in files.all_files()}.values())


@settings(max_examples=300, deadline=None)
@given(calls=st.lists(_call(), max_size=25), content=st.binary(max_size=512))
def test_no_call_does_more_than_answer(calls: list[tuple[str, tuple[int, ...]]], content: bytes) -> None:
    made, _ = wasi()
    memory = memoryview(bytearray(content.ljust(512, b"f") * (MEMORY_BYTES // 512)))
    memory[512:1_024] = (b"a\0\0\0\1\0\0\0file/dir/../x" * 30)[:512]
    try:
        for name, args in calls:
            answer = perform(made, name, memory, args)
            assert answer in set(Errno), (name, args)
            assert 0 <= made.files.held <= ROOM
            assert made.files.held >= held(made.files)
    except (Exited, TooMuchOutput):
        pass
    finally:
        made.files.close()


def _path(memory: memoryview, text: str) -> tuple[int, int]:
    data = text.encode()
    memory[4_096 : 4_096 + len(data)] = data
    return 4_096, len(data)


def test_no_path_leads_out_of_the_tree(tmp_path: Path) -> None:
    made, _ = wasi(tmp_path / "file")
    memory = memoryview(bytearray(MEMORY_BYTES))
    for text in ("..", "../x", "a/../../x", "/etc/passwd", "./../file", "file/../../x", "x/../../../x"):
        answer = perform(made, "path_open", memory, (3, 1, *_path(memory, text), 1, 66, 0, 0, 8))
        assert answer in (Errno.PERM, Errno.NOENT, Errno.NOTDIR, Errno.ISDIR), text
    for target in ("/etc", "/"):
        memory[8_192 : 8_192 + len(target)] = target.encode()
        assert perform(made, "path_symlink", memory, (8_192, len(target), 3, *_path(memory, "l"))) == Errno.PERM
    target = "../../../.."
    memory[8_192 : 8_192 + len(target)] = target.encode()
    assert perform(made, "path_symlink", memory, (8_192, len(target), 3, *_path(memory, "out"))) == 0
    for text in ("out", "out/etc/passwd", "out/.."):
        assert perform(made, "path_open", memory, (3, 1, *_path(memory, text), 0, 2, 0, 0, 8)) == Errno.PERM
    assert (tmp_path / "file").read_bytes() == b"content"
    made.files.close()


def test_what_a_module_writes_never_reaches_the_input(tmp_path: Path) -> None:
    made, _ = wasi(tmp_path / "file")
    memory = memoryview(bytearray(MEMORY_BYTES))
    assert perform(made, "path_open", memory, (3, 0, *_path(memory, "file"), 8, 66, 0, 0, 8)) == 0
    fd = int.from_bytes(memory[8:12], "little")
    memory[16:24] = (100).to_bytes(4, "little") + (4).to_bytes(4, "little")
    memory[100:104] = b"mine"
    assert perform(made, "fd_write", memory, (fd, 16, 1, 24)) == 0
    assert [bytes(file.read(0, 99)) for _, file in made.files.all_files()] == [b"mine"]
    assert (tmp_path / "file").read_bytes() == b"content"
    made.files.close()


def test_clock_and_chance_are_the_same_for_the_same_seed() -> None:
    seen = []
    for _ in range(2):
        made, _ = wasi()
        memory = memoryview(bytearray(MEMORY_BYTES))
        for clock, at in ((0, 0), (1, 8), (0, 16), (3, 24)):
            assert perform(made, "clock_time_get", memory, (clock, 0, at)) == 0
        assert perform(made, "random_get", memory, (32, 60_000)) == 0
        seen.append(bytes(memory))
    assert seen[0] == seen[1]
    first, _, third, _ = (int.from_bytes(seen[0][at : at + 8], "little") for at in (0, 8, 16, 24))
    assert (first, third - first) == (946_684_800_001_000_000, 2_000_000)
    assert len(set(seen[0][32:60_032])) == 256


def test_a_modules_first_bytes_tell_what_is_wrong_with_it() -> None:
    good = b"\0asm\1\0\0\0"
    table = {
        (b"", 0): "is empty",
        (good, limits.WASM_MODULE_BYTES_MAX + 1): "larger than a module may be (64 MiB)",
        (b"\0asm", 4): "of a version",
        (b"PK\3\4", 4): "is no WebAssembly",
        (b"  (module)", 10): "compile it first",
        (b"\0asm\x0d\0\1\0", 8): "is a component",
        (good, 8): "",
    }
    for (first, size), words in table.items():
        told = magic_trouble(first, size)
        assert words in told
        assert bool(told) == bool(words)
