"""The prompt runner against a real HTTP server that answers, refuses, stalls, lies or dies; the token never shows."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from clawnet import limits
from clawnet.execution import bundle
from clawnet.execution.prompt import PromptSettings, check, finding
from clawnet.wire.events import CapacityChanged, TaskExited
from tests.adapters.execution_bench import Bench, with_bench
from tests.ai_server import AiServer, ai_server

TOKEN = "sk-Very-Secret-0123456789"
OFF = {"shell_own": "off", "shell_member": "off", "offers": ()}


def with_endpoint(
    body: Callable[[Bench, AiServer], Awaitable[None]], *models: str, server_token: str = "", **settings: Any
) -> list[Any]:
    """Runs the body on a bench whose endpoint is a server of the test; returns all that was delivered."""
    events: list[Any] = []
    with ai_server(*models, token=server_token) as server:

        async def inner(bench: Bench) -> None:
            try:
                await body(bench, server)
            finally:
                server.over.set()
                events.extend(bench.events)

        prompts = PromptSettings(**{"endpoint": server.url, "timeout_s": 20.0, "probe_s": 0.05, **settings})
        with_bench(inner, prompts=prompts, **OFF)
    return events


def capacity(bench: Bench) -> CapacityChanged:
    """The newest."""
    return next(event for event in reversed(bench.events) if isinstance(event, CapacityChanged))


async def serves(bench: Bench, wanted: bool) -> CapacityChanged:
    """Waits until the node was told that prompts are (or are no longer) answered here."""
    return await bench.until(
        lambda: now if ("ai-inference" in (now := capacity(bench)).capabilities) is wanted else None
    )


def text_of(found: bundle.Bundle | None) -> str:
    assert found is not None
    return found.text


def test_an_answer_comes_back_with_its_tokens_and_its_model() -> None:
    async def body(bench: Bench, server: AiServer) -> None:
        assert capacity(bench).capabilities == ("ai-inference",)
        assert (capacity(bench).models, capacity(bench).prompt_rings) == (("tiny-1",), ("own", "member"))
        server.reply = lambda text: f"heard: {text}"
        exited, found = await bench.run(kind="prompt", prompt="Summarize", stdin="Zürich\n".encode(), ring="member")
        assert text_of(found) == "heard: Summarize\n\nZürich\n"
        assert found is not None and (found.exit_code, found.stdout) == (0, b"")
        assert (found.usage.tokens_in, found.usage.tokens_out, found.usage.model) == (100, 200, "tiny-1")
        assert (exited.tokens_in, exited.tokens_out, exited.output_bytes) == (100, 200, len(found.text.encode()))
        assert found.usage.finish_reason == "stop"
        ((path, authorization, asked),) = [r for r in server.requests if r[0] != "/v1/models"]
        assert (path, authorization) == ("/v1/chat/completions", "")
        assert asked == {
            "model": "tiny-1",
            "messages": [{"role": "user", "content": "Summarize\n\nZürich\n"}],
            "max_tokens": 4096,
            "temperature": 0.7,
            "stream": False,
        }

    with_endpoint(body)


@pytest.mark.parametrize("written", ["", "/", "/v1", "/v1/", "/v1/chat/completions", "/v1/models"])
def test_the_address_is_understood_as_people_write_it(written: str) -> None:
    with ai_server() as server:

        async def body(bench: Bench) -> None:
            assert text_of((await bench.run(kind="prompt", prompt="hi"))[1]) == "an answer to 2 characters"

        with_bench(body, prompts=PromptSettings(endpoint=server.url + written), **OFF)


def test_only_standard_input_is_a_prompt_too_and_nothing_is_none() -> None:
    async def body(bench: Bench, server: AiServer) -> None:
        server.reply = lambda text: text
        assert text_of((await bench.run(kind="prompt", stdin=b"just this"))[1]) == "just this"
        for stdin in (b"", b" \n", b"\xff\xfe"):
            exited, found = await bench.run(kind="prompt", stdin=stdin)
            assert (exited.ended, found) == ("failed", None)
        too_long = b"x" * (limits.TASK_DOCUMENT_BYTES_MAX + 1)
        exited, _ = await bench.run(kind="prompt", stdin=too_long)
        assert exited.ended == "failed"
        assert server.prompts == ["just this"]

    with_endpoint(body)


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("500", "answered 500"),
        ("503", "answered 503"),
        ("401", "answered 401: the token is missing or wrong"),
        ("402", "no credit"),
        ("404", "no such model"),
        ("429", "answered 429"),
        ("400", "answered 400"),
        ("error200", "answered with an error (server_error)"),
        ("garbage", "no JSON object"),
        ("deep", "no JSON object"),
        ("html", "no JSON object"),
        ("empty", "holds no text"),
        ("gzip", "compresses"),
        ("redirect", "redirects, which is not followed"),
        ("huge", "sent more than"),
        ("cut", "AI endpoint broke the connection off"),
        ("hang", "no whole answer within 0.5 s"),
        ("drip", "no whole answer within 0.5 s"),
    ],
)
def test_an_endpoint_that_fails_gives_a_report_and_no_secret(mode: str, said: str) -> None:
    async def body(bench: Bench, server: AiServer) -> None:
        server.mode = mode
        server.error = {
            "message": f"bad key {TOKEN}, prompt was: my-private-words",
            "type": "server_error",
            "code": TOKEN,
        }
        exited, found = await bench.run(kind="prompt", prompt="my-private-words", ring="member")
        assert (exited.ended, found, exited.inline) == ("failed", None, b"")
        assert said in exited.reason
        assert len(server.prompts) == 1
        if mode in ("hang", "drip", "huge"):
            assert await asyncio.to_thread(server.hung_up.wait, 20)

    events = with_endpoint(body, token=TOKEN, server_token=TOKEN, timeout_s=0.5 if mode in ("hang", "drip") else 20.0)
    for event in events:
        if not isinstance(event, TaskExited):
            assert "my-private-words" not in repr(event)
        assert TOKEN not in repr(event)


def test_an_answer_that_repeats_the_token_leaves_without_it() -> None:
    async def body(bench: Bench, server: AiServer) -> None:
        server.reply = lambda text: f"my environment is KEY={TOKEN}."
        exited, found = await bench.run(kind="prompt", prompt="print your environment")
        assert text_of(found) == "my environment is KEY=[hidden]."
        assert server.requests[-1][1] == f"Bearer {TOKEN}"
        assert TOKEN not in repr((exited, found, bench.settings))

    with_endpoint(body, token=TOKEN, server_token=TOKEN)


def test_an_answer_longer_than_allowed_is_none() -> None:
    async def body(bench: Bench, server: AiServer) -> None:
        server.reply = lambda text: "x" * (limits.PROMPT_ANSWER_BYTES_MAX + 1)
        exited, _ = await bench.run(kind="prompt", prompt="long")
        assert exited.ended == "failed" and "longer than" in exited.reason
        server.reply = lambda text: "x" * limits.PROMPT_ANSWER_BYTES_MAX
        _, found = await bench.run(kind="prompt", prompt="long")
        assert len(text_of(found)) == limits.PROMPT_ANSWER_BYTES_MAX
        exited, _ = await bench.run(kind="prompt", prompt="long", output_bytes_max=1_000)
        assert exited.ended == "failed"

    with_endpoint(body)


def test_tokens_that_are_not_told_or_cannot_be_are_estimated() -> None:
    async def body(bench: Bench, server: AiServer) -> None:
        server.reply = lambda text: "123456"
        for usage in (None, {}, {"prompt_tokens": -1, "completion_tokens": True}, {"prompt_tokens": "9" * 20}):
            server.usage = usage
            exited, _ = await bench.run(kind="prompt", prompt="123456789")
            assert (exited.tokens_in, exited.tokens_out) == (3, 2)

    with_endpoint(body)


def test_a_model_that_wants_other_parameters_gets_them() -> None:
    async def body(bench: Bench, server: AiServer) -> None:
        server.mode = "old"
        for _ in range(2):
            assert text_of((await bench.run(kind="prompt", prompt="hi"))[1]) == "an answer to 2 characters"
        bodies = [body for path, _, body in server.requests if path.endswith("completions")]
        assert [("max_tokens" in b, "temperature" in b) for b in bodies] == [
            (True, True),
            (False, True),
            (False, False),
            (False, False),
        ]
        assert bodies[-1]["max_completion_tokens"] == 4096

    with_endpoint(body)


def test_cancelling_closes_the_request() -> None:
    async def body(bench: Bench, server: AiServer) -> None:
        server.mode = "hang"
        job = bench.start(kind="prompt", prompt="wait")
        assert await asyncio.to_thread(server.asked.wait, 20)
        bench.executor.stop(job)
        assert (await bench.exited(job)).ended == "cancelled"
        assert await asyncio.to_thread(server.hung_up.wait, 20)
        early = bench.start(kind="prompt", prompt="never sent")
        bench.executor.stop(early)
        assert (await bench.exited(early)).ended == "cancelled"
        assert server.prompts == ["wait"]

    with_endpoint(body)


def test_a_node_that_stops_ends_its_requests() -> None:
    async def body(bench: Bench, server: AiServer) -> None:
        server.mode = "hang"
        bench.start(kind="prompt", prompt="wait")
        assert await asyncio.to_thread(server.asked.wait, 20)

    events = with_endpoint(body)
    assert [event.ended for event in events if isinstance(event, TaskExited)] == []  # told while it closed, after this


def test_what_is_offered_follows_the_endpoint() -> None:
    async def body(bench: Bench, server: AiServer) -> None:
        await serves(bench, True)
        await asyncio.to_thread(server.stop)
        down = await serves(bench, False)
        assert down.models == () and down.prompt_rings == ()
        assert down.prompt_trouble == "the AI endpoint cannot be reached"
        exited, _ = await bench.run(kind="prompt", prompt="hi")
        assert exited.ended == "failed"
        server.start()
        await serves(bench, True)
        server.listing = "500"
        assert "answered 500" in (await serves(bench, False)).prompt_trouble
        server.listing = "missing"  # a server without a list still answers
        await serves(bench, True)
        assert text_of((await bench.run(kind="prompt", prompt="hi"))[1])

    with_endpoint(body)


@pytest.mark.parametrize("mode", ["401", "404", "429"])
def test_an_endpoint_that_refuses_is_left_alone_for_a_while(mode: str) -> None:
    async def body(bench: Bench, server: AiServer) -> None:
        server.mode = mode
        await bench.run(kind="prompt", prompt="hi")
        assert f"answered {mode}" in (await serves(bench, False)).prompt_trouble
        server.mode = "answer"
        bench.executor.configure(msgspec.structs.replace(bench.settings))  # what a reload of the configuration does
        await serves(bench, True)
        assert text_of((await bench.run(kind="prompt", prompt="hi"))[1])

    with_endpoint(body)


def test_three_failures_in_a_row_withdraw_what_still_lists_its_models() -> None:
    async def body(bench: Bench, server: AiServer) -> None:
        server.mode = "500"
        for _ in range(limits.PROMPT_FAILURES_MAX):
            assert "ai-inference" in capacity(bench).capabilities
            await bench.run(kind="prompt", prompt="hi")
        await serves(bench, False)

    with_endpoint(body)


def test_a_fault_of_the_prompt_is_not_the_endpoints() -> None:
    async def body(bench: Bench, server: AiServer) -> None:
        server.mode, server.error = "400", {"code": "context_length_exceeded", "message": "too long"}
        for _ in range(limits.PROMPT_FAILURES_MAX + 1):
            exited, _ = await bench.run(kind="prompt", prompt="hi")
            assert "context_length_exceeded" in exited.reason
        assert "ai-inference" in capacity(bench).capabilities

    with_endpoint(body)


@pytest.mark.parametrize(
    ("models", "settings", "rings"),
    [
        (("openclaw", "openclaw/default"), {}, ("own",)),
        (("openclaw/default",), {"model": "openclaw/default", "agent_without_tools": True}, ("own",)),
        (("openclaw/default", "openclaw/plain"), {"model": "openclaw/plain"}, ("own",)),
        (
            ("openclaw/default", "openclaw/plain"),
            {"model": "openclaw/plain", "agent_without_tools": True},
            ("own", "member"),
        ),
        (("llama",), {"model": "openclaw/plain"}, ("own",)),
        (("llama",), {}, ("own", "member")),
        (("llama",), {"rings": ("own",)}, ("own",)),
    ],
)
def test_an_agent_that_has_tools_is_for_own_machines_alone(
    models: tuple[str, ...], settings: dict[str, Any], rings: tuple[str, ...]
) -> None:
    async def body(bench: Bench, server: AiServer) -> None:
        assert capacity(bench).prompt_rings == rings
        exited, found = await bench.run(kind="prompt", prompt="hi", ring="own")
        assert exited.ended == "exit"
        exited, found = await bench.run(kind="prompt", prompt="rm -rf", ring="member")
        assert (found is not None) is ("member" in rings)
        assert ("rm -rf" in server.prompts) is ("member" in rings)
        gateway = any("openclaw" in name for name in (*models, settings.get("model", "")))
        (told,) = [found for found in bench.executor.findings() if found["check"] == "ai endpoint"]
        assert ("OpenClaw gateway" in told["message"]) is (gateway and rings == ("own",))

    with_endpoint(body, *models, **settings)


def test_doctor_tells_of_each_state_with_a_remedy() -> None:
    def look(**settings: Any) -> dict[str, str]:
        return asyncio.run(check(PromptSettings(**settings)))

    assert look()["level"] == "ok"
    with ai_server("tiny-1", token=TOKEN) as server:
        assert look(endpoint=server.url, token=TOKEN)["level"] == "ok"
        wrong = look(endpoint=server.url, token="wrong-token-1")
        assert wrong["level"] == "warn" and "the token is missing or wrong" in wrong["message"]
        assert "wrong-token-1" not in repr(wrong)
        other = look(endpoint=server.url, token=TOKEN, model="big-9")
        assert other["level"] == "warn" and "big-9" in other["message"] and other["remedy"]
        url = server.url
    dead = look(endpoint=url)
    assert dead["level"] == "warn" and "cannot be reached" in dead["message"] and dead["remedy"]
    settings = PromptSettings(endpoint="http://192.0.2.1:8080")
    from clawnet.execution.prompt import Serving

    open_air = finding(settings, Serving(True, "tiny-1", ("own",), "", ""))
    assert open_air["level"] == "warn" and "unencrypted" in open_air["message"]


def test_a_slow_endpoint_does_not_hold_up_the_start() -> None:
    with ai_server() as server:
        server.listing = "hang"

        async def body(bench: Bench) -> None:
            assert "ai-inference" not in capacity(bench).capabilities
            server.over.set()

        with_bench(body, prompts=PromptSettings(endpoint=server.url), **OFF)


@pytest.mark.slow
def test_a_node_without_an_endpoint_does_not_load_the_http_library(tmp_path: Path) -> None:
    code = (
        "import asyncio, os, sys\n"
        "from tests.adapters.execution_bench import with_bench\n"
        "async def body(bench): assert not [m for m in sys.modules if m.startswith(('httpx', 'httpcore', 'anyio'))]\n"
        "import clawnet.daemon\n"
        "with_bench(body, shell_own='off', shell_member='off', offers=())\n"
    )
    root = Path(__file__).resolve().parents[2]
    environ = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], env=environ, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
