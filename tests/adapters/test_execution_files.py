"""Output files of real runs: taken when the command has ended, from the sandbox and from the host, within bounds."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from clawnet import limits
from clawnet.execution import bundle, delivery, process
from clawnet.wire.events import Open, Opened, TaskExited
from clawnet.wire.fileevents import OutputsSaved, SaveOutputs
from tests.adapters.execution_bench import Bench, needs_bubblewrap, with_bench

PLACES = pytest.mark.parametrize("sandbox", [pytest.param("sandboxed", marks=needs_bubblewrap), "host"])
MAKES = "mkdir -p dist/sub; echo a > dist/a; printf 'x%.0s' $(seq 1000) > dist/sub/b; chmod 755 dist/a; exit 4"


async def _opened(bench: Bench, exited: TaskExited, *patterns: str, key: bytes | None = None) -> Any:
    effect = Open(b"open", key, exited.inline, exited.blob, exited.blob_bytes, (), patterns, 2**30)
    bench.executor.open_result(effect)
    opened = await bench.until(lambda: next((e for e in bench.events if isinstance(e, Opened)), None))
    assert not opened.reason
    return opened.bundle


@PLACES
def test_files_come_with_the_result_whatever_its_code(sandbox: str) -> None:
    async def body(bench: Bench) -> None:
        key = os.urandom(32)
        job = bench.start(
            kind="shell", argv=["sh", "-c", MAKES], sandbox=sandbox, outputs=["dist/*", "core"], seal_key=key
        )
        exited = await bench.exited(job)
        found = await _opened(bench, exited, "dist/*", "core", key=key)
        assert (found.exit_code, found.outputs_missing) == (4, ["core"])
        assert [(one["name"], one["bytes"]) for one in found.outputs] == [("dist/a", 2), ("dist/sub/b", 1_000)]
        assert not list(bench.public.rglob("dist")), "the working directory is gone"

    with_bench(body)


@PLACES
def test_more_than_the_smaller_of_both_bounds_is_no_result(sandbox: str) -> None:
    async def body(bench: Bench) -> None:
        for bound, settled in ((20_000, 2**40), (2**40, 30_000)):
            bench.executor.configure(
                bench.settings.__class__(worker_argv=bench.settings.worker_argv, outputs_bytes_max=settled)
            )
            exited, _ = await bench.run(
                kind="shell",
                argv=["sh", "-c", "head -c 50000 /dev/zero > x"],
                sandbox=sandbox,
                outputs=["x"],
                outputs_bytes_max=bound,
            )
            assert (exited.ended, exited.blob_bytes) == ("output_limit", 0)
            assert f"more than {min(bound, settled)} bytes" in exited.reason

    with_bench(body)


def test_patterns_of_a_liar_are_refused_before_anything_runs() -> None:
    async def body(bench: Bench) -> None:
        exited, _ = await bench.run(kind="shell", argv=["true"], outputs=["../../etc/*"])
        assert (exited.ended, "leads out" in exited.reason) == ("failed", True)
        exited, _ = await bench.run(kind="shell", argv=["true"], outputs=["x"] * (limits.OUTPUT_GLOBS_MAX + 1))
        assert exited.ended == "failed"

    with_bench(body)


def test_files_that_cannot_be_read_or_stored_end_the_run_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any, **more: Any) -> Any:
        raise OSError(5, "Input/output error")

    async def body(bench: Bench) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(delivery, "collect", broken)
            exited, _ = await bench.run(kind="shell", argv=["sh", "-c", "echo 1 > x"], outputs=["x"])
        assert exited.ended == "failed" and "Input/output error" in exited.reason
        bench.blobs.bytes_max = 1
        exited, _ = await bench.run(kind="shell", argv=["sh", "-c", "head -c 1000000 /dev/urandom > x"], outputs=["x"])
        assert exited.ended == "failed" and "do not fit" in exited.reason
        assert not list(bench.public.rglob("x"))

    with_bench(body)


def test_a_result_for_which_there_is_no_room_is_no_bad_result() -> None:
    async def body(bench: Bench) -> None:
        exited, _ = await bench.run(kind="shell", argv=["sh", "-c", "echo 1 > x"], outputs=["x"])
        bench.blobs.bytes_max = 1
        bench.executor.open_result(Open(b"o", None, exited.inline, b"", exited.blob_bytes, (), ("x",), 2**30))
        opened = await bench.until(lambda: next((e for e in bench.events if isinstance(e, Opened)), None))
        assert (opened.fault, opened.bundle) == ("storage", None)
        assert "do not fit" in opened.reason

    with_bench(body)


def test_the_hosts_own_disk_is_no_memory_of_a_run() -> None:
    # While a sandbox is being set up, its process still sees the host's directories.
    assert process.mounted_bytes(os.getpid(), ("/tmp", "/dev/shm", "/")) == 0


def test_a_run_without_patterns_sends_no_files() -> None:
    async def body(bench: Bench) -> None:
        _, found = await bench.run(kind="shell", argv=["sh", "-c", "echo 1 > x"])
        assert isinstance(found, bundle.Bundle)
        assert (found.files, found.outputs) == (b"", bundle.Outputs())

    with_bench(body)


def test_what_this_nodes_user_waits_for_holds_up_no_run_of_others() -> None:
    async def body(bench: Bench) -> None:
        slow = []
        for number in range(8):  # results on a disk that does not answer
            blob = bytes([number]) * 32
            path = bench.blobs.path(blob)
            path.parent.mkdir(exist_ok=True)
            os.mkfifo(path)
            slow.append(path)
            bench.executor.open_result(Open(bytes([number]), None, b"", blob, 100, (), (), 0))
        exited, _ = await bench.run(kind="shell", argv=["sh", "-c", MAKES], sandbox="host", outputs=["dist/*"])
        assert exited.ended == "exit"
        for path in slow:
            await asyncio.to_thread(path.write_bytes, b"")
        await bench.until(lambda: len([one for one in bench.events if isinstance(one, Opened)]) == len(slow) or None)

    with_bench(body)


class _Going(type(Path())):  # type: ignore[misc]
    """A file that is removed as soon as it has been looked at."""

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        found: os.stat_result = super().stat(follow_symlinks=follow_symlinks)
        self.unlink()
        return found


def test_files_that_go_while_they_are_asked_for_are_told_as_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(bench: Bench) -> None:
        blob = bench.blobs.put_bytes(b"files")
        monkeypatch.setattr(bench.blobs, "path", lambda blob, real=bench.blobs.path: _Going(real(blob)))
        bench.executor.save(SaveOutputs(1, blob, ("x",), str(bench.public / "to"), 0o022, told=True))
        saved = await bench.until(lambda: next((e for e in bench.events if isinstance(e, OutputsSaved)), None))
        assert (saved.files, saved.error["code"]) == (0, "not_found")

    with_bench(body)
