"""Prompts on this machine: whether its AI endpoint serves, for whom, and the requests under way.

The endpoint is looked at when the node starts, regularly afterwards, and at once after a request went wrong; while it
does not answer, or refuses, nothing is offered. Everything runs in the node's loop.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import Final

from msgspec import Struct

from clawnet import limits
from clawnet.config import Config
from clawnet.config_endpoint import parse_address, read_token, token_trouble
from clawnet.errors import ConfigError, DataError
from clawnet.execution.endpoint import BUSY, REFUSED, TASK, Answer, Endpoint, EndpointFailed

NOT_SET: Final = "no AI endpoint is configured"
SET_ONE: Final = "clawnet config set openclaw.api_endpoint http://127.0.0.1:11434 (any OpenAI-compatible server)"
RINGS: Final = ("own", "member")
_GATEWAY: Final = "openclaw"
_NAME_ONE: Final = "clawnet config set openclaw.model NAME"

Answered = Callable[[Answer | None, str, str, float], None]
"""Called once with the answer, or None, how it ended instead and why; and with the seconds it took."""


class PromptSettings(Struct, frozen=True):
    """Section `openclaw` of the configuration, and who may use the endpoint; no `endpoint`: there is none."""

    endpoint: str = ""
    token: str = ""
    model: str = ""
    max_tokens: int = 4_096
    temperature: float = 0.7
    timeout_s: float = 30.0
    probe_s: float = 30.0
    rings: tuple[str, ...] = RINGS
    agent_without_tools: bool = False

    def __repr__(self) -> str:
        return f"PromptSettings(endpoint={self.endpoint!r}, model={self.model!r})"

    @classmethod
    def of(cls, config: Config, environ: Mapping[str, str]) -> PromptSettings:
        """From the configuration; raises ConfigError for a token that cannot be read or must not be sent."""
        endpoint = config.text("openclaw.api_endpoint") if config.flag("openclaw.enabled") else ""
        if not endpoint or "ai-inference" not in config.words("node.capabilities"):
            return cls()
        check = config.flag("security.check_permissions")
        token = read_token(environ, config.path("openclaw.token_file"), check_permissions=check)
        message, remedy = token_trouble(parse_address(endpoint), token)
        if message:
            raise ConfigError(message, hint=remedy)
        return cls(
            endpoint=endpoint,
            token=token,
            model=config.text("openclaw.model"),
            max_tokens=config.integer("openclaw.max_tokens"),
            temperature=config.number("openclaw.temperature"),
            timeout_s=config.seconds("openclaw.api_timeout"),
            probe_s=config.seconds("openclaw.probe_interval"),
            rings=tuple(ring for ring in RINGS if config.text(f"execution.prompt.{ring}") == "on"),
            agent_without_tools=config.flag("openclaw.agent_without_tools"),
        )


class Serving(Struct, frozen=True):
    """What the last look at the endpoint says. `up`: prompts of `rings` are answered by `model`.

    `reason` says why nobody is served, or why only some are; `remedy` what the owner can do.
    """

    up: bool = False
    model: str = ""
    rings: tuple[str, ...] = ()
    reason: str = NOT_SET
    remedy: str = SET_ONE


class PromptRunner:
    """Asks the endpoint; `changed` is called whenever `serving` has become another."""

    def __init__(self, settings: PromptSettings, changed: Callable[[], None]) -> None:
        self.serving = Serving()
        self._settings = settings
        self._changed = changed
        self._endpoint: Endpoint | None = None
        self._requests: dict[bytes, asyncio.Task[None]] = {}
        self._watch: asyncio.Task[None] | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._look_now = asyncio.Event()
        self._held_until_s = 0.0
        self._hold_s = 0.0
        self._failed_in_row = 0

    # --- life

    async def start(self) -> None:
        """Looks at the endpoint once, a little while at most, and goes on doing so."""
        self._begin()
        if self._watch is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(limits.PROMPT_START_S):
                    await self._looked.wait()

    def configure(self, settings: PromptSettings) -> None:
        """Other settings from now on; requests under way end as they began."""
        if settings == self._settings and self._watch is not None:
            self._held_until_s = self._hold_s = 0.0
            self._look_now.set()  # the endpoint itself may be what was put right
            return
        self._settings = settings
        self._stop_watching()
        self._tell(Serving())
        self._begin()

    def _begin(self) -> None:
        settings = self._settings
        self._looked = asyncio.Event()
        self._held_until_s = self._hold_s = 0.0
        if settings.endpoint:
            self._endpoint = Endpoint(
                settings.endpoint, settings.token, max_tokens=settings.max_tokens, temperature=settings.temperature
            )
            self._watch = asyncio.get_running_loop().create_task(self._keep_looking(self._endpoint))
            self._watch.add_done_callback(_raise_again)

    def _stop_watching(self) -> None:
        watch, self._watch = self._watch, None
        endpoint, self._endpoint = self._endpoint, None
        if watch is not None:
            watch.cancel()
        if endpoint is not None:
            task = asyncio.get_running_loop().create_task(_close_after(endpoint, list(self._requests.values())))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Ends every request (as cancelled) and closes every connection."""
        for job in list(self._requests):
            self.cancel(job)
        self._stop_watching()
        while self._closing or self._requests:
            await asyncio.wait([*self._closing, *self._requests.values()])

    # --- whether it serves

    async def _keep_looking(self, endpoint: Endpoint) -> None:
        loop = asyncio.get_running_loop()
        pause_s = limits.PROMPT_PROBE_MIN_S
        while True:
            self._look_now.clear()
            if loop.time() >= self._held_until_s:
                found = await look(endpoint, self._settings)
                if loop.time() >= self._held_until_s:  # a request may have gone wrong meanwhile, and says more
                    self._tell(found)
            self._looked.set()
            held_s = self._held_until_s - loop.time()
            if held_s > 0:
                wait_s = held_s
            elif self.serving.up:
                wait_s, pause_s = self._settings.probe_s, limits.PROMPT_PROBE_MIN_S
            else:
                wait_s, pause_s = pause_s, min(pause_s * 2, max(self._settings.probe_s, limits.PROMPT_PROBE_MIN_S))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._look_now.wait()

    def _tell(self, serving: Serving) -> None:
        if serving != self.serving:
            self.serving = serving
            self._changed()

    def _went_wrong(self, error: EndpointFailed) -> None:
        """What a failed request says of the endpoint: look again, or leave it alone for a while."""
        if error.how == TASK:
            return
        self._failed_in_row += 1
        if error.how == REFUSED or (error.how != BUSY and self._failed_in_row >= limits.PROMPT_FAILURES_MAX):
            self._hold_s = min(max(self._hold_s * 2, limits.PROMPT_HOLD_MIN_S), limits.PROMPT_HOLD_MAX_S)
            self._hold(self._hold_s, error, "put it right, then clawnet config set openclaw.enabled true looks again")
        elif error.how == BUSY:
            pause_s = min(error.pause_s or limits.PROMPT_BUSY_S, limits.PROMPT_BUSY_MAX_S)
            self._hold(pause_s, error, "it is asked again after a pause")
        self._look_now.set()

    def _hold(self, pause_s: float, error: EndpointFailed, remedy: str) -> None:
        self._held_until_s = asyncio.get_running_loop().time() + pause_s
        self._tell(Serving(reason=error.message, remedy=error.hint or remedy))

    # --- requests

    def run(self, job: bytes, text: str, *, wall_s: float, answer_bytes_max: int, answered: Answered) -> None:
        """Asks the endpoint; `answered` follows later, once. Raises EndpointFailed when there is none to ask."""
        endpoint = self._endpoint
        if endpoint is None or not self.serving.up:
            raise EndpointFailed(self.serving.reason)
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        ask = self._ask(endpoint, text, self.serving.model, min(wall_s, self._settings.timeout_s), answer_bytes_max)
        outcome: list[Answer | EndpointFailed] = []

        async def request() -> None:
            try:
                outcome.append(await ask)
            except EndpointFailed as error:
                outcome.append(error)

        def done(task: asyncio.Task[None]) -> None:
            del self._requests[job]
            took_s = loop.time() - began_s
            got = outcome[0] if outcome else None
            if isinstance(got, Answer):
                answered(got, "", "", took_s)
            elif task.cancelled():
                ask.close()
                answered(None, "cancelled", "cancelled", took_s)
            else:
                answered(None, "failed", got.message if got is not None else "the request broke off", took_s)
                if got is None:
                    task.result()  # a defect of ours: the loop's own handler tells it

        self._requests[job] = task = loop.create_task(request())
        task.add_done_callback(done)

    async def _ask(self, endpoint: Endpoint, text: str, model: str, wall_s: float, bytes_max: int) -> Answer:
        try:
            answer = await endpoint.ask(text, model, wall_s=wall_s, answer_bytes_max=bytes_max)
        except EndpointFailed as error:
            if endpoint is self._endpoint:
                self._went_wrong(error)
            raise
        self._hold_s, self._failed_in_row = 0.0, 0
        return answer

    def cancel(self, job: bytes) -> bool:
        """Closes the request of a job; False when it has none."""
        task = self._requests.get(job)
        return task is not None and task.cancel()


def prompt_text(prompt: str, stdin: bytes | None) -> str:
    """What is asked: the description first, then the text of standard input. Raises DataError for what is no text."""
    try:
        text = (stdin or b"").decode()
    except UnicodeDecodeError as error:
        raise DataError("a prompt's standard input is not UTF-8") from error
    whole = "\n\n".join(part for part in (prompt, text) if part.strip())
    if not whole:
        raise DataError("a prompt without text")
    return whole


async def look(endpoint: Endpoint, settings: PromptSettings) -> Serving:
    """One look at an endpoint: does it answer, with which model, and for whom."""
    try:
        listed = await endpoint.models()
    except EndpointFailed as error:
        return Serving(reason=error.message, remedy=error.hint or "clawnet config get openclaw.api_endpoint")
    model = settings.model or (listed[0] if listed else "")
    if len(model) > limits.MODEL_CHARS_MAX:
        reason = f"the model's name is longer than {limits.MODEL_CHARS_MAX} characters"
        return Serving(reason=reason, remedy=_NAME_ONE)
    gateway = any(name.partition("/")[0] == _GATEWAY for name in (*listed, model))
    if gateway and not _without_tools(model, settings):
        return Serving(
            up="own" in settings.rings,
            model=model,
            rings=tuple(ring for ring in settings.rings if ring == "own"),
            reason="it is an OpenClaw gateway, whose agents have tools, so only own machines are served",
            remedy="make an agent without tools, then clawnet config set openclaw.model openclaw/NAME "
            "openclaw.agent_without_tools true",
        )
    if listed and model not in listed and not any(name.partition(":")[0] == model for name in listed):
        return Serving(True, model, settings.rings, f"it does not list the model {model!r}", _NAME_ONE)
    return Serving(True, model, settings.rings, "", "")


def _without_tools(model: str, settings: PromptSettings) -> bool:
    """Whether the owner has named an agent of its own and said that it has no tools; the default agent may change."""
    agent = model.partition("/")[2]
    return settings.agent_without_tools and agent not in ("", "default")


def finding(settings: PromptSettings, serving: Serving) -> dict[str, str]:
    """What `doctor` tells of the endpoint."""
    if not settings.endpoint:
        return {"check": "ai endpoint", "level": "ok", "message": NOT_SET, "remedy": SET_ONE}
    where = parse_address(settings.endpoint)
    text = f"{where.origin} serves {serving.model or 'its model'} to {' and '.join(serving.rings) or 'nobody'}"
    if not serving.up:
        text = f"{where.origin} does not serve: {serving.reason}"
    elif serving.reason:
        text += f"; {serving.reason}"
    elif where.scheme == "http" and not where.loopback:
        message = f"{text}; prompts and answers cross the network unencrypted"
        return {"check": "ai endpoint", "level": "warn", "message": message, "remedy": "an https:// address, or ssh -L"}
    level = "ok" if serving.up and not serving.reason else "warn"
    return {"check": "ai endpoint", "level": level, "message": text, "remedy": serving.remedy}


async def check(settings: PromptSettings) -> dict[str, str]:
    """One look from outside a daemon, for `doctor`."""
    if not settings.endpoint:
        return finding(settings, Serving())
    endpoint = Endpoint(settings.endpoint, settings.token, max_tokens=1, temperature=0.0)
    try:
        return finding(settings, await look(endpoint, settings))
    finally:
        await endpoint.close()


async def _close_after(endpoint: Endpoint, requests: list[asyncio.Task[None]]) -> None:
    """The requests of an endpoint that is left end first, then its connections."""
    if requests:
        await asyncio.wait(requests)
    await endpoint.close()


def _raise_again(task: asyncio.Task[None]) -> None:
    if not task.cancelled():
        task.result()
