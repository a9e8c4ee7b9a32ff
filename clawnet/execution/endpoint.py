"""One OpenAI-compatible HTTP endpoint: what it lists, and its answer to a prompt. httpx is loaded at the first call.

Whatever the endpoint sends is bounded before it is parsed: identity encoding, so many bytes, so many seconds. What is
told to others of a failure is a sentence of ours with the status and at most a well-known error word: an endpoint's own
text may repeat the token or the prompt.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec import Struct

from clawnet import __version__, limits
from clawnet.config_endpoint import parse_address
from clawnet.errors import ClawnetError

if TYPE_CHECKING:
    import httpx

TRANSIENT: Final = "transient"
"""The endpoint may do better at the next try."""
REFUSED: Final = "refused"
"""Its owner has to put something right: the token, the model, the credit."""
BUSY: Final = "busy"
"""It asked for a pause."""
TASK: Final = "task"
"""The prompt itself cannot be answered."""

_KNOWN_WORDS: Final = frozenset(
    (
        "context_length_exceeded",
        "string_above_max_length",
        "content_filter",
        "content_policy_violation",
        "model_not_found",
        "model_not_available",
        "insufficient_quota",
        "invalid_api_key",
        "rate_limit_exceeded",
        "server_error",
        "unsupported_parameter",
        "unsupported_value",
        "overloaded_error",
        "upstream_error",
    )
)
_PROMPT_WORDS: Final = frozenset(
    ("context_length_exceeded", "string_above_max_length", "content_filter", "content_policy_violation")
)
_OWNER_WORDS: Final = frozenset(("insufficient_quota", "invalid_api_key", "model_not_found", "model_not_available"))
_MEANING: Final = {
    400: "the prompt or its settings were refused",
    401: "the token is missing or wrong",
    402: "its account has no credit left",
    403: "the token does not allow this",
    404: "there is no such model or address",
    408: "it took too long",
    413: "the prompt is too long",
    422: "the prompt or its settings were refused",
    429: "it asks for fewer requests",
}
_OWNER_STATUSES: Final = frozenset((401, 402, 403, 404, 405))
_TASK_STATUSES: Final = frozenset((400, 413, 422))
_HIDDEN: Final = "[hidden]"
_FINISH_WORD_CHARS_MAX: Final = 32
_ADAPTATIONS_MAX: Final = 2


class EndpointFailed(ClawnetError):
    """The AI endpoint gave no answer; `how` says whose fault it is, `pause_s` what pause it asked for."""

    code = "endpoint_failed"
    exit_code = 76

    def __init__(self, message: str, how: str = TRANSIENT, *, pause_s: float = 0.0, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.how = how
        self.pause_s = pause_s


class Answer(Struct, frozen=True, gc=False):
    """What a prompt was answered; tokens are the endpoint's count, else estimated from the texts' lengths."""

    text: str
    model: str
    tokens_in: int
    tokens_out: int
    finish_reason: str = ""


class Endpoint:
    """A client of one address. `base` is what answered, once a list was asked for."""

    def __init__(self, address: str, token: str, *, max_tokens: int, temperature: float) -> None:
        self._bases = parse_address(address).bases
        self.base = self._bases[0]
        self._token = token
        self._settings: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature}
        self._client: httpx.AsyncClient | None = None

    def _open(self) -> httpx.AsyncClient:
        import httpx

        if self._client is None:
            headers = {
                "Accept": "application/json",
                "Accept-Encoding": "identity",
                "User-Agent": f"clawnet/{__version__}",
            }
            if self._token:
                headers["Authorization"] = f"Bearer {self._token}"
            # No proxy, no .netrc: the token and the prompt go to the address that was configured and nowhere else.
            self._client = httpx.AsyncClient(
                headers=headers,
                verify=_authorities() if self.base.startswith("https:") else False,
                timeout=limits.PROMPT_WALL_MAX_S,  # each exchange has a deadline of its own
                follow_redirects=False,
                trust_env=False,
                limits=httpx.Limits(max_connections=64, max_keepalive_connections=2),
            )
        return self._client

    async def close(self) -> None:
        """Closes every connection."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    # --- the two questions

    async def models(self) -> list[str]:
        """Ids the endpoint lists; empty for one that answers but keeps no list. Raises EndpointFailed."""
        for base in self._bases:
            self.base = base
            status, body, _ = await self._exchange(
                "GET", "/models", None, limits.PROMPT_PROBE_TIMEOUT_S, limits.PROMPT_LIST_BYTES_MAX
            )
            if status not in (404, 405):
                break
        else:
            self.base = self._bases[0]
            return []
        if status != 200:
            raise _failure(status, body)
        listed = _object(body).get("data")
        ids = [item.get("id") for item in listed if isinstance(item, dict)] if isinstance(listed, list) else []
        return [name for name in ids if isinstance(name, str) and name][: limits.LIST_ITEMS_MAX]

    async def ask(self, text: str, model: str, *, wall_s: float, answer_bytes_max: int) -> Answer:
        """One prompt, one answer. Cancelling it closes the request. Raises EndpointFailed."""
        body: dict[str, Any] = {"messages": [{"role": "user", "content": text}], "stream": False}
        if model:
            body["model"] = model
        loop = asyncio.get_running_loop()
        until = loop.time() + wall_s
        for _ in range(_ADAPTATIONS_MAX + 1):
            status, raw, pause_s = await self._exchange(
                "POST",
                "/chat/completions",
                msgspec.json.encode({**body, **self._settings}),
                max(0.001, until - loop.time()),
                limits.PROMPT_RESPONSE_BYTES_MAX,
            )
            if status != 400 or not self._adapt(raw):
                break
        if status != 200:
            raise _failure(status, raw, pause_s)
        answer = _answer(raw, text, model)
        if self._token and self._token in answer.text:
            answer = msgspec.structs.replace(answer, text=answer.text.replace(self._token, _HIDDEN))
        if len(answer.text.encode()) > answer_bytes_max:
            raise EndpointFailed(f"the answer is longer than {answer_bytes_max} bytes", TASK)
        return answer

    def _adapt(self, raw: bytes) -> bool:
        """Newer models want max_completion_tokens, and some no temperature: they say so, and are asked again."""
        error = _error_in(_object_or_none(raw))
        named = error.get("param") if error else None
        if named == "max_tokens" and "max_tokens" in self._settings:
            self._settings["max_completion_tokens"] = self._settings.pop("max_tokens")
            return True
        return named == "temperature" and self._settings.pop("temperature", None) is not None

    # --- the exchange

    async def _exchange(
        self, method: str, path: str, body: bytes | None, wall_s: float, bytes_max: int
    ) -> tuple[int, bytes, float]:
        """Status, body and the pause asked for. Raises EndpointFailed for whatever is no whole answer in time."""
        import httpx

        client = self._open()
        headers = {"Content-Type": "application/json"} if body is not None else {}
        try:
            async with asyncio.timeout(wall_s):
                async with client.stream(method, self.base + path, content=body, headers=headers) as response:
                    if response.is_redirect:
                        raise EndpointFailed(
                            f"the AI endpoint answered {response.status_code}: it redirects, which is not followed",
                            REFUSED,
                            hint="set openclaw.api_endpoint to where it really is",
                        )
                    if response.headers.get("content-encoding", "identity") != "identity":
                        raise EndpointFailed("the AI endpoint compresses its answers although asked not to", REFUSED)
                    data = bytearray()
                    async for part in response.aiter_raw():
                        data += part
                        if len(data) > bytes_max:
                            raise EndpointFailed(f"the AI endpoint sent more than {bytes_max} bytes")
                    return response.status_code, bytes(data), _pause(response.headers.get("retry-after", ""))
        except TimeoutError as error:
            raise EndpointFailed(f"the AI endpoint gave no whole answer within {wall_s:.3g} s") from error
        except httpx.ConnectError as error:
            raise EndpointFailed(
                "the AI endpoint cannot be reached", hint="is it running, and is openclaw.api_endpoint right?"
            ) from error
        except (httpx.NetworkError, httpx.RemoteProtocolError) as error:
            raise EndpointFailed("the AI endpoint broke the connection off") from error
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
            raise EndpointFailed(f"the exchange with the AI endpoint failed: {type(error).__name__}") from error


def _authorities() -> Any:
    """Whose certificates are believed: httpx's list and this system's own."""
    import httpx

    context = httpx.create_ssl_context(trust_env=False)
    context.load_default_certs()
    return context


def _pause(text: str) -> float:
    return float(text) if text.isascii() and text.isdigit() and len(text) < 6 else 0.0


# --- reading


def _object_or_none(raw: bytes) -> dict[str, Any] | None:
    try:
        value = msgspec.json.decode(raw)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return None
    return value if isinstance(value, dict) else None


def _object(raw: bytes) -> dict[str, Any]:
    value = _object_or_none(raw)
    if value is None:
        raise EndpointFailed("the AI endpoint's answer is no JSON object")
    return value


def _error_in(value: dict[str, Any] | None) -> dict[str, Any] | None:
    """The error that a body carries, be it beside the status 200; servers write it as an object or as a text."""
    if value is None:
        return None
    error = value.get("error")
    if error is None or error is False:
        return None
    return error if isinstance(error, dict) else {"message": str(error)}


def _word(error: dict[str, Any] | None) -> str:
    for name in ("code", "type"):
        word = (error or {}).get(name)
        if isinstance(word, str) and word in _KNOWN_WORDS:
            return word
    return ""


def _failure(status: int, raw: bytes, pause_s: float = 0.0) -> EndpointFailed:
    """A status other than 200 as a failure, by whose fault it is."""
    word = _word(_error_in(_object_or_none(raw)))
    meaning = _MEANING.get(status) or ("it has a fault of its own" if status >= 500 else "that is no answer")
    message = f"the AI endpoint answered {status}: {meaning}{f' ({word})' if word else ''}"
    if word in _OWNER_WORDS or status in _OWNER_STATUSES or (300 <= status < 400):
        return EndpointFailed(message, REFUSED)
    if word in _PROMPT_WORDS or status in _TASK_STATUSES:
        return EndpointFailed(message, TASK)
    if status in (429, 503) and (pause_s or status == 429):
        return EndpointFailed(message, BUSY, pause_s=pause_s)
    return EndpointFailed(message)


def _answer(raw: bytes, prompt: str, model: str) -> Answer:
    value = _object(raw)
    choices = value.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    error = _error_in(value) or _error_in(choice)
    if error is not None:
        word = _word(error)
        how = REFUSED if word in _OWNER_WORDS else TASK if word in _PROMPT_WORDS else TRANSIENT
        raise EndpointFailed(f"the AI endpoint answered with an error{f' ({word})' if word else ''}", how)
    message = choice.get("message")
    text = _text_of(message.get("content")) if isinstance(message, dict) else None
    if text is None:
        raise EndpointFailed("the AI endpoint's answer holds no text")
    usage = value.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    finish, named = choice.get("finish_reason"), value.get("model")
    return Answer(
        text=text,
        model=(named if isinstance(named, str) and named else model)[: limits.MODEL_CHARS_MAX],
        tokens_in=_count(usage.get("prompt_tokens"), prompt),
        tokens_out=_count(usage.get("completion_tokens"), text),
        finish_reason=finish[:_FINISH_WORD_CHARS_MAX] if isinstance(finish, str) else "",
    )


def _text_of(content: Any) -> str | None:
    """The text of a message: a string, or the text parts of a list."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return None
    parts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
    return "".join(part for part in parts if isinstance(part, str))


def _count(told: Any, text: str) -> int:
    if isinstance(told, int) and not isinstance(told, bool) and 0 <= told <= limits.PROMPT_TOKENS_MAX:
        return told
    return -(-len(text.encode()) // limits.PROMPT_BYTES_PER_TOKEN)
