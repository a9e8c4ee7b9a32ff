"""Contracts judged by a real executor: sandbox, schemas, modules; and verifiers that crash, hang or are cancelled."""

from __future__ import annotations

import asyncio
import hashlib
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
import wasmtime

from clawnet import limits
from clawnet.execution import bundle
from clawnet.execution.spec import InputRef
from clawnet.wire import verdict as v
from clawnet.wire.events import InputsReady, Open, Opened, TaskExited
from clawnet.wire.verdict import Check
from tests.adapters.execution_bench import Bench, needs_bubblewrap, running, with_bench

BOTH = pytest.mark.parametrize("sandbox", [pytest.param("sandboxed", marks=needs_bubblewrap), "host"])
EXIT_0 = Check(v.EXIT_CODE, b"0")
READER = """(module
 (import "wasi_snapshot_preview1" "fd_read" (func $read (param i32 i32 i32 i32) (result i32)))
 (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
 (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
 (memory (export "memory") 1)
 (data (i32.const 100) "no good\\n")
 (func (export "_start")
  (i32.store (i32.const 0) (i32.const 200)) (i32.store (i32.const 4) (i32.const 1))
  (drop (call $read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 8)))
  (if (i32.eq (i32.load8_u (i32.const 200)) (i32.const 121)) (then (call $exit (i32.const 0))))
  (if (i32.eq (i32.load8_u (i32.const 200)) (i32.const 116)) (then (unreachable)))
  (if (i32.eq (i32.load8_u (i32.const 200)) (i32.const 108)) (then (loop $l (br $l))))
  (i32.store (i32.const 0) (i32.const 100)) (i32.store (i32.const 4) (i32.const 8))
  (drop (call $write (i32.const 2) (i32.const 0) (i32.const 1) (i32.const 8)))
  (call $exit (i32.const 1))))"""
"""Accepts what begins with y; traps on t, never ends on l, and says "no good" of all else."""


def command(script: str) -> Check:
    return Check(v.VERIFIER_COMMAND, argv=("sh", "-c", script, "sh"))


def sha256(data: bytes) -> Check:
    return Check(v.OUTPUT_SHA256, hashlib.sha256(data).digest())


def schema(text: str) -> Check:
    return Check(v.OUTPUT_SCHEMA, text.encode())


def module(bench: Bench) -> Check:
    data = bytes(wasmtime.wat2wasm(READER))
    return Check(v.VERIFIER_WASM, module=InputRef("accept-1.wasm", "file", bench.blobs.put_bytes(data), len(data)))


async def judge(bench: Bench, script: str, *checks: Check, sandbox: str = "sandboxed", **fields: Any) -> v.Verdict:
    """Runs a script under a contract; how its conditions came out, nothing when it was delivered."""
    spec = {"kind": "shell", "argv": ["sh", "-c", script], "sandbox": sandbox, "acceptance": checks, **fields}
    exited, found = await bench.run(**spec)
    assert (exited.ended, bool(exited.report)) == (("exit", False) if found is not None else ("contract", True)), exited
    return () if found is not None else v.decode_report(exited.report, len(checks))


async def failed(bench: Bench, script: str, *checks: Check, **fields: Any) -> tuple[str, str]:
    """The outcome and the sentence of the condition that failed, which is the last one judged."""
    verdict = await judge(bench, script, *checks, **fields)
    assert verdict and all(one.outcome == "passed" for one in verdict[:-1])
    return verdict[-1].outcome, verdict[-1].detail


def here(policy: str) -> dict[str, str]:
    return {"shell_own": policy}


# --- each kind


@BOTH
def test_exit_code_and_hash(sandbox: str) -> None:
    async def body(bench: Bench) -> None:
        assert await judge(bench, "echo hi", EXIT_0, sha256(b"hi\n"), sandbox=sandbox) == ()
        assert await failed(bench, "exit 3", EXIT_0, sandbox=sandbox) == ("failed", "exit code 3; 0 is wanted")
        assert await judge(bench, "exit 3", Check(v.EXIT_CODE, b"3"), sandbox=sandbox) == ()
        outcome, why = await failed(bench, "kill -KILL $$", EXIT_0, sandbox=sandbox)
        assert (outcome, why) == ("failed", "ended by signal 9; 0 is wanted")
        outcome, why = await failed(bench, "echo ho", EXIT_0, sha256(b"hi\n"), sandbox=sandbox)
        assert outcome == "failed" and hashlib.sha256(b"ho\n").hexdigest() in why

    with_bench(body, **here(sandbox))


@pytest.mark.slow
def test_a_long_answer_is_judged_whole() -> None:
    async def body(bench: Bench) -> None:
        count = limits.RUN_INLINE_WORK_BYTES_MAX * 8
        whole = b"a" * count
        assert await judge(bench, f"head -c {count} /dev/zero | tr '\\0' a", sha256(whole), sandbox="host") == ()
        text = f"head -c {count} /dev/zero | tr '\\0' a; echo >&2 oh"
        assert (
            await judge(bench, text, command(f"test $(wc -c) = {count} && grep oh $CLAWNET_STDERR"), sandbox="") == ()
        )
        big = limits.CONTRACT_JSON_BYTES_MAX + 1
        outcome, why = await failed(bench, f"head -c {big} /dev/zero", schema("true"), sandbox="host")
        assert outcome == "failed" and "a schema judges at most" in why

    with_bench(body, shell_own="host")


def test_schemas_judge_what_was_printed() -> None:
    async def body(bench: Bench) -> None:
        wanted = schema('{"type": "object", "required": ["a"]}')
        assert await judge(bench, """echo '{"a": 1}'""", wanted, sandbox="host") == ()
        assert (await failed(bench, """echo '{"b": 1}'""", wanted, sandbox="host"))[0] == "failed"
        outcome, why = await failed(bench, "echo nothing", wanted, sandbox="host")
        assert outcome == "failed" and why.startswith("it is no JSON")
        outcome, why = await failed(bench, "echo 1", schema('{"type": "objct"}'), sandbox="host")
        assert outcome == "broken" and "$.type" in why

    with_bench(body, shell_own="host")


@pytest.mark.slow
def test_a_schema_that_takes_for_ever_is_given_up_and_hurts_nobody() -> None:
    async def body(bench: Bench) -> None:
        bomb = schema('{"pattern": "^(a+)+$"}')
        outcome, why = await failed(bench, f"echo '\"{'a' * 60}!\"'", bomb, sandbox="host")
        assert outcome == "broken" and "took longer than" in why
        assert await judge(bench, "echo 1", schema("true"), sandbox="host") == ()
        deep = schema(
            '{"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"}'
        )
        assert (await failed(bench, "echo 1", deep, sandbox="host"))[0] in ("failed", "broken")
        assert await judge(bench, "echo 1", schema("true"), sandbox="host") == ()

    with_bench(body, shell_own="host", verifier_s_max=0.5)


def test_schemas_are_looked_at_also_where_no_compute_task_runs() -> None:
    async def body(bench: Bench) -> None:
        assert bench.executor.worker_pids == []
        bench.executor.pack(b"r", (), (("schema:a.json", b"true"), ("schema:b.json", b'{"type": "objct"}')))
        ready = await bench.until(lambda: next((e for e in bench.events if isinstance(e, InputsReady)), None))
        assert ready.error is not None and ready.error["exit_code"] == 65
        assert "schema:b.json" in ready.error["message"] and "$.type" in ready.error["message"]
        bench.events.clear()
        bench.executor.pack(b"r", (), (("schema:a.json", b"true"),))
        ready = await bench.until(lambda: next((e for e in bench.events if isinstance(e, InputsReady)), None))
        assert ready.error is None and ready.inputs == ()

    with_bench(body, offers=("shell-execution",))


@BOTH
def test_a_command_finds_the_result(sandbox: str) -> None:
    async def body(bench: Bench) -> None:
        script = "echo out; echo err >&2; mkdir dist; echo data > dist/file; echo other > other"
        looks = command(
            'test "$(cat)" = out && test "$(cat "$CLAWNET_STDOUT")" = out && test "$(cat "$CLAWNET_STDERR")" = err && '
            'test "$1" = 0 && test "$CLAWNET_EXIT_CODE" = 0 && test -z "$CLAWNET_SIGNAL" && test -z "$SECRET" && '
            'test "$(cat dist/file)" = data && test ! -e other && echo more > dist/new'
        )
        fields = {"sandbox": sandbox, "env": {"SECRET": "x"}}
        assert await judge(bench, script, looks, outputs=["dist/*"], **fields) == ()
        (exited,) = [event for event in bench.events if isinstance(event, TaskExited)]
        found = bundle.decode(exited.inline or bench.blobs.path(exited.blob).read_bytes())
        assert b"new" not in found.files, "what a verifier writes is no part of the result"
        assert (await failed(bench, script + "; echo bad > dist/file", looks, outputs=["dist/*"], **fields))[
            0
        ] == "failed"
        crash = command('test "$1" = "" && test "$CLAWNET_SIGNAL" = 9')
        assert await judge(bench, "kill -KILL $$", crash, sandbox=sandbox) == ()

    with_bench(body, **here(sandbox))


@BOTH
@pytest.mark.parametrize("leave", ["mkdir -p NAME; echo mine > NAME/f", "echo mine > NAME", "ln -s f NAME"])
def test_output_files_of_any_name_stay_apart_from_what_was_written(sandbox: str, leave: str) -> None:
    async def body(bench: Bench) -> None:
        names = (".clawnet-stdout", ".clawnet-stdout-2", ".clawnet-stderr")
        script = "; ".join(["echo yes; echo err >&2; echo mine > f", *(leave.replace("NAME", name) for name in names)])
        looks = command(
            'test "$(cat "$CLAWNET_STDOUT")" = yes && test "$(cat "$CLAWNET_STDERR")" = err && test "$(cat)" = yes && '
            "for n in .clawnet-stdout .clawnet-stdout-2 .clawnet-stderr; do test -d $n && n=$n/f; "
            'test "$(cat $n)" = mine || exit 1; done'
        )
        assert await judge(bench, script, looks, module(bench), sandbox=sandbox, outputs=["."]) == ()

    with_bench(body, **here(sandbox))


@BOTH
def test_how_commands_judge(sandbox: str) -> None:
    async def body(bench: Bench) -> None:
        for script, outcome, word in (
            ("exit 1", "failed", "exit code 1"),
            ("nosuchcommand", "failed", "exit code 127"),
            ("kill -SEGV $$", "broken", "crashed (signal 11)"),
            ("head -c 2000000 /dev/zero", "broken", "wrote more than"),
        ):
            verdict = await judge(bench, "true", command(f"echo told >&2; {script}"), sandbox=sandbox)
            assert (verdict[0].outcome, word in verdict[0].detail) == (outcome, True), verdict
            assert verdict[0].stderr.startswith(b"told\n")
        verdict = await judge(bench, "true", command("seq 1 5000 >&2; exit 1"), sandbox=sandbox)
        assert len(verdict[0].stderr) == limits.VERIFIER_STDERR_BYTES_MAX and verdict[0].stderr.endswith(b"5000\n")

    with_bench(body, **here(sandbox))


@needs_bubblewrap
def test_a_verifier_is_in_the_sandbox() -> None:
    async def body(bench: Bench) -> None:
        (bench.public / "secret").write_text("x")
        (bench.public / "secret").chmod(0o644)
        assert await judge(bench, "true", command(f"test ! -e {bench.public}/secret && test $(id -u) != 0")) == ()
        assert (await failed(bench, "true", command(f"echo x > {bench.public}/new")))[0] == "failed"
        assert not (bench.public / "new").exists()

    with_bench(body)


def test_a_module_judges() -> None:
    async def body(bench: Bench) -> None:
        check = module(bench)
        assert await judge(bench, "echo yes", check, sandbox="host") == ()
        verdict = await judge(bench, "echo no", check, sandbox="host")
        assert (verdict[0].outcome, verdict[0].stderr) == ("failed", b"no good\n")
        outcome, why = await failed(bench, "echo trap", check, sandbox="host")
        assert (outcome, why) == ("failed", "its verifier trapped")
        outcome, why = await failed(bench, "echo loop", check, sandbox="host")
        assert outcome == "broken" and "longer than 0.5 s" in why
        data = b"\0asm\1\0\0\0junk"
        junk = Check(v.VERIFIER_WASM, module=InputRef("m", "file", bench.blobs.put_bytes(data), len(data)))
        assert (await failed(bench, "echo yes", junk, sandbox="host"))[0] == "broken"
        assert await judge(bench, "mkdir d; echo x > d/f; echo yes", check, sandbox="host", outputs=["d/*"]) == ()
        assert list(bench.home.wasm_runs_dir.iterdir()) == []

    with_bench(body, shell_own="host", verifier_s_max=0.5)


def test_prompts_and_operations_are_judged_by_their_answer() -> None:
    async def body(bench: Bench) -> None:
        fields: dict[str, Any] = {"kind": "compute", "op": "sort", "stdin": b"b\na\n"}
        _, found = await bench.run(acceptance=(sha256(b"a\nb\n"), EXIT_0), **fields)
        assert found is not None and found.stdout == b"a\nb\n"
        exited, found = await bench.run(acceptance=(sha256(b"a\n"),), **fields)
        assert found is None and exited.ended == "contract"

    with_bench(body)


def test_a_condition_of_a_later_kind_is_none_that_holds() -> None:
    async def body(bench: Bench) -> None:
        outcome, why = await failed(bench, "true", EXIT_0, Check("colour", b"red"), sandbox="host")
        assert outcome == "broken" and "'colour'" in why

    with_bench(body, shell_own="host")


# --- what hangs, and what is cancelled


@BOTH
def test_a_verifier_that_hangs_is_ended_and_leaves_nothing(sandbox: str) -> None:
    async def body(bench: Bench) -> None:
        mark = f"3{os.getpid()}"
        outcome, why = await failed(bench, "true", command(f"sleep {mark} & sleep {mark}"), sandbox=sandbox)
        assert outcome == "broken" and "did not end" in why
        assert running(mark) == []
        await _cleared(bench)

    with_bench(body, verifier_s_max=0.5, **here(sandbox))


@BOTH
def test_no_verifier_outlives_a_cancel(sandbox: str) -> None:
    async def body(bench: Bench) -> None:
        mark = f"4{os.getpid()}"
        spec = {"kind": "shell", "argv": ["true"], "sandbox": sandbox, "acceptance": (command(f"sleep {mark}; true"),)}
        job = bench.start(**spec)
        await _runs(mark)
        bench.executor.stop(job)
        exited = await bench.exited(job)
        assert (exited.ended, exited.report) == ("cancelled", b"")
        assert running(mark) == []
        await _cleared(bench)

    with_bench(body, verifier_s_max=3_600.0, **here(sandbox))


def test_no_module_outlives_a_cancel() -> None:
    async def body(bench: Bench) -> None:
        job = bench.start(kind="shell", argv=["echo", "loop"], sandbox="host", acceptance=(module(bench),))
        async with asyncio.timeout(60):
            while not any(worker.unanswered for worker in bench.executor._pool._workers):
                await asyncio.sleep(0)  # until the loop has heard of the run's end
        bench.executor.stop(job)
        assert (await bench.exited(job)).ended == "cancelled"
        assert await judge(bench, "echo yes", module(bench), sandbox="host") == ()

    with_bench(body, shell_own="host", verifier_s_max=3_600.0)


def test_nothing_is_judged_when_no_time_is_left() -> None:
    async def body(bench: Bench) -> None:
        outcome, why = await failed(bench, "sleep 0.2", command("true"), sandbox="host", until_s=0.1)
        assert (outcome, why) == ("broken", "no time is left to judge it")

    with_bench(body, shell_own="host")


@BOTH
def test_the_end_of_the_node_ends_its_verifiers(sandbox: str) -> None:
    mark = f"5{os.getpid()}"

    async def body(bench: Bench) -> None:
        bench.start(kind="shell", argv=["true"], sandbox=sandbox, acceptance=(command(f"sleep {mark}; true"),))
        await _runs(mark)

    with_bench(body, verifier_s_max=3_600.0, **here(sandbox))
    assert running(mark) == []


async def _runs(mark: str) -> None:
    async with asyncio.timeout(60):
        while not running(mark):
            await asyncio.sleep(0.01)  # it is another process: nobody tells when it has begun


async def _cleared(bench: Bench) -> None:
    """A run's own directory is removed in a thread while its end is told."""
    async with asyncio.timeout(60):
        while _left(bench):
            await asyncio.sleep(0.01)  # nobody tells when it is gone


def _left(bench: Bench) -> list[str]:
    """Directories of jobs that are still there."""
    base: Path = bench.executor._dirs.base
    return [path.name for path in base.iterdir() if len(path.name) == 32]


# --- judged again by who asked


async def opened(bench: Bench, name: bytes, found: bundle.Bundle, *checks: Check, **words: Any) -> Opened:
    plain = bundle.encode(found)
    bench.executor.open_result(Open(name, None, plain, b"", len(plain), checks, **words))
    return await bench.until(
        lambda: next((e for e in bench.events if isinstance(e, Opened) and e.request == name), None)
    )


@needs_bubblewrap
def test_who_asked_judges_again() -> None:
    async def body(bench: Bench) -> None:
        checks = (EXIT_0, sha256(b"yes\n"), schema('{"const": 1}'), command("grep yes"), module(bench))
        event = await opened(bench, b"a", bundle.Bundle(0, None, b"yes\n"), *checks[:2], *checks[3:])
        assert [one.outcome for one in event.verdict] == ["passed"] * 4 and event.bundle.stdout == b"yes\n"
        event = await opened(bench, b"b", bundle.Bundle(0, None, b"yes\n"), *checks)
        assert [one.outcome for one in event.verdict] == ["passed", "passed", "failed"]
        event = await opened(bench, b"c", bundle.Bundle(0, None, b"no\n"), command("grep yes"))
        assert [(one.n, one.outcome) for one in event.verdict] == [(0, "failed")]
        event = await opened(bench, b"d", bundle.Bundle(0, None, b"no\n"), command("nosuchcommand"), EXIT_0)
        assert [one.outcome for one in event.verdict] == ["skipped", "passed"]
        event = await opened(bench, b"e", bundle.Bundle(0, None, text="an answer"), sha256(b"an answer"), EXIT_0)
        assert [one.outcome for one in event.verdict] == ["passed", "passed"]
        event = await opened(bench, b"f", bundle.Bundle(0, None, b"no\n"), command("sleep 60"))
        assert [one.outcome for one in event.verdict] == ["broken"]
        assert _left(bench) == [] and list(bench.home.wasm_runs_dir.iterdir()) == []

    with_bench(body, verifier_s_max=1.0)


def test_who_asked_judges_nothing_of_others_outside_a_sandbox() -> None:
    async def body(bench: Bench) -> None:
        event = await opened(bench, b"a", bundle.Bundle(0, None, b"no\n"), command("touch /tmp/never"), EXIT_0)
        assert [one.outcome for one in event.verdict] == ["skipped", "passed"]
        assert "sandbox" in event.verdict[0].detail

    with_bench(body, shell_own="host")


@needs_bubblewrap
def test_who_asked_stops_judging() -> None:
    async def body(bench: Bench) -> None:
        mark = f"6{os.getpid()}"
        plain = bundle.encode(bundle.Bundle(0, None, b"x"))
        for n in range(limits.VERIFIERS_AT_ONCE_MAX + 2):
            name = b"name%d" % n
            bench.executor.open_result(Open(name, None, plain, b"", len(plain), (command(f"sleep {mark}; true"),)))
        await _runs(mark)
        for n in range(limits.VERIFIERS_AT_ONCE_MAX + 2):
            bench.executor.stop_judging(b"name%d" % n)
        everybody = limits.VERIFIERS_AT_ONCE_MAX + 2
        ends = await bench.until(
            lambda: (
                found
                if len(found := [each for each in bench.events if isinstance(each, Opened)]) == everybody
                else None
            )
        )
        assert {each.verdict for each in ends} == {()} and running(mark) == [] and _left(bench) == []

    with_bench(body, verifier_s_max=3_600.0)


@needs_bubblewrap
def test_more_results_than_are_judged_at_once_are_all_judged() -> None:
    async def body(bench: Bench) -> None:
        plain = bundle.encode(bundle.Bundle(0, None, b"x"))
        count = 3 * limits.VERIFIERS_AT_ONCE_MAX
        for n in range(count):
            bench.executor.open_result(Open(b"name%d" % n, None, plain, b"", len(plain), (command("true"), EXIT_0)))
        ends = await bench.until(
            lambda: found if len(found := [e for e in bench.events if isinstance(e, Opened)]) == count else None
        )
        assert all([one.outcome for one in each.verdict] == ["passed", "passed"] for each in ends)

    with_bench(body)


def test_the_report_fits_its_message() -> None:
    from clawnet.wire.messages import Waiver

    verdict = tuple(v.judged(n, "passed") for n in range(limits.CONTRACT_CONDITIONS_MAX - 1))
    last = v.judged(limits.CONTRACT_CONDITIONS_MAX - 1, "failed", "€" * 1_000, b"\xff" * 10_000)
    report = v.encode_report((*verdict, last))
    message = Waiver(bytes(16), 0, b"", v.CONTRACT, report)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=Waiver) == message
