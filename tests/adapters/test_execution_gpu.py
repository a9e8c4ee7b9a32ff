"""GPUs are found by running whatever nvidia-smi is on PATH, and a run sees its own and no others."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from clawnet import limits
from clawnet.execution import gpu
from clawnet.execution.gpu import Found, Gpu
from tests.adapters.execution_bench import Bench, needs_bubblewrap, running, with_bench

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="shell scripts are POSIX")

FIRST, SECOND = "GPU-11111111-aaaa-bbbb-cccc-000000000001", "GPU-22222222-aaaa-bbbb-cccc-000000000002"
TWO = f"0, {FIRST}, 00000000:01:00.0\n1, {SECOND}, 00000000:0A:00.0"
Install = Callable[[str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts an executable nvidia-smi with this script on PATH."""

    def put(script: str) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return put


def found() -> Found:
    return asyncio.run(gpu.find())


def test_without_nvidia_smi_there_are_none() -> None:
    assert asyncio.run(gpu.find({"PATH": "/nonexistent"})) == Found()


def test_each_line_is_a_gpu(install: Install) -> None:
    install(f"case \"$*\" in *index,uuid,pci.bus_id*csv,noheader*) printf '%s\\n' '{TWO}' ;; *) exit 2 ;; esac")
    assert found() == Found((Gpu(FIRST, 0), Gpu(SECOND, 1)))


def test_the_driver_tells_the_number_of_the_device_file(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "DRIVER", tmp_path)
    (tmp_path / "0000:0a:00.0").mkdir()
    (tmp_path / "0000:0a:00.0" / "information").write_text("Model: \t X\nDevice Minor: \t 7\n")
    install(f"echo '{TWO}'")
    assert [one.minor for one in found().gpus] == [0, 7]


@pytest.mark.parametrize(
    ("script", "trouble"),
    [
        ("echo 'NVIDIA-SMI has failed: no driver'; exit 9", "failed: NVIDIA-SMI has failed"),
        ("exit 3", "exit code 3"),
        (f"printf '%s\\n' '0, {FIRST}, 00000000:01:00.0' 'ERROR'", "not understood: ERROR"),
        (f"echo '0, {FIRST}; rm -rf /, 00000000:01:00.0'", "not understood"),
        (f"printf '%s\\n' '0, {FIRST}, 00000000:01:00.0' '1, {FIRST}, 00000000:02:00.0'", "not understood"),
        ("printf 'a\\033[2Jb'", "not understood: a [2Jb"),
        ('i=0; while [ $i -lt 80 ]; do echo "$i, GPU-$i, 00000000:01:00.0"; i=$((i+1)); done', "not understood"),
        ("yes", "not understood: y"),
    ],
)
def test_bad_output_is_no_gpu_and_says_why(install: Install, script: str, trouble: str) -> None:
    install(script)
    said = found()
    assert said.gpus == () and trouble in said.trouble, said
    assert gpu.findings(said, 64)[0]["level"] == "warn"


@pytest.mark.parametrize("script", ["echo 'No devices were found'; exit 6", "echo 'No devices were found'", ":"])
def test_none_is_no_trouble(install: Install, script: str) -> None:
    install(script)
    assert found() == Found()


def test_one_that_hangs_is_killed_with_all_it_started(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "GPU_PROBE_TIMEOUT_S", 0.2)
    install("sleep 600.125 & sleep 600.125")
    assert "does not answer" in found().trouble
    assert not running("600.125")


def test_one_that_cannot_be_executed(install: Install, tmp_path: Path) -> None:
    install("")
    (tmp_path / "nvidia-smi").write_text("#!/nonexistent/interpreter\n")
    assert "does not run" in found().trouble


def test_a_machine_without_gpus_touches_no_variable() -> None:
    assert gpu.variables((), ()) == {} and gpu.bind_words((), ()) == []


@needs_bubblewrap
def test_a_sandboxed_run_has_its_own_gpus_and_no_others(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(f"echo '{TWO}'")
    script = 'ls /dev | grep nvidia; echo "[$CUDA_VISIBLE_DEVICES]"'

    async def body(bench: Bench) -> None:
        devices = bench.public / "dev"
        devices.mkdir()
        for name in ("nvidia0", "nvidia1", "nvidiactl"):
            (devices / name).touch()
        monkeypatch.setattr(gpu, "DEV", devices)
        assert bench.executor.capacity().gpu == 2
        env = {"CUDA_VISIBLE_DEVICES": "0,1"}
        none = await bench.shell(script, env=env)
        assert none.stdout == b"[]\n"
        one = await bench.shell(script, env=env, gpus=(1,))
        assert one.stdout.decode() == f"nvidia1\nnvidiactl\n[{SECOND}]\n"
        both = await bench.shell(script, gpus=(0, 1))
        assert both.stdout.decode() == f"nvidia0\nnvidia1\nnvidiactl\n[{FIRST},{SECOND}]\n"

    with_bench(body)


@needs_bubblewrap
def test_a_run_with_a_gpu_may_reserve_addresses_but_not_use_more_memory(install: Install) -> None:
    install(f"echo '{TWO}'")

    async def body(bench: Bench) -> None:
        bounded = await bench.shell("ulimit -v", memory_bytes_max=64 * limits.MIB)
        assert int(bounded.stdout) == 4 * 64 * limits.KIB
        wide = await bench.shell("ulimit -v", memory_bytes_max=64 * limits.MIB, gpus=(0,))
        assert wide.stdout == b"unlimited\n" or int(wide.stdout) >= 2**36
        hold = "x=$(head -c 200000000 /dev/zero | tr '\\0' x); echo ${#x}"
        exited, _ = await bench.run(kind="shell", script=hold, memory_bytes_max=64 * limits.MIB, gpus=(0,), wall_s=60)
        assert exited.ended == "memory_limit", exited

    with_bench(body)


def test_a_run_on_the_host_is_shown_its_own_gpus(install: Install) -> None:
    install(f"echo '{TWO}'")

    async def body(bench: Bench) -> None:
        said = 'echo "[$CUDA_VISIBLE_DEVICES]"'
        assert (await bench.shell(said, "host")).stdout == b"[]\n"
        assert (await bench.shell(said, "host", gpus=(0,))).stdout.decode() == f"[{FIRST}]\n"

    with_bench(body, shell_own="host")


def test_the_policy_may_offer_fewer(install: Install) -> None:
    install(f"echo '{TWO}'")

    async def body(bench: Bench) -> None:
        capacity = bench.executor.capacity()
        assert (capacity.gpu, capacity.cpu, capacity.memory_bytes) == (1, 1, 64 * limits.MIB)
        (finding,) = [one for one in bench.executor.findings() if one["check"] == "gpu"]
        assert finding["level"] == "ok" and "1 of 2" in finding["message"]

    with_bench(body, gpus=1, cpus=1, memory_bytes_total=64 * limits.MIB)
