"""Rules of prompts: addresses of endpoints, tokens that stay at home, what is bid and asked, whose are answered."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clawnet import config
from clawnet.config import Config
from clawnet.config_endpoint import parse_address, read_token, token_trouble
from clawnet.errors import ConfigError, DataError, UsageError
from clawnet.execution.prompt import PromptSettings
from clawnet.market.capability import capability_hash, unmet
from clawnet.market.pricing import Durations, Quote, Rates, Workload, metered, quote, rates_from
from clawnet.market.reasons import Reason
from clawnet.market.taskspec import normalise
from clawnet.paths import Home
from clawnet.wire.messages import Offer, PeerCard, Requirements

TOKEN = "sk-Rather-Secret-42"
NOW = 1_700_000_000_000
RATES = Rates()
CARD = PeerCard(
    *("worker", 1, "worker", "1", [], ["ai-inference"], [], "linux", 4, 2**33, 0, ["tiny"], 4, 0, 0, []),
    prompt_rings=["own", "member"],
)


@pytest.mark.parametrize(
    ("text", "bases"),
    [
        ("http://127.0.0.1:11434", ["http://127.0.0.1:11434/v1", "http://127.0.0.1:11434"]),
        ("http://127.0.0.1:11434/v1/", ["http://127.0.0.1:11434/v1"]),
        ("https://example.org/api", ["https://example.org/api/v1", "https://example.org/api"]),
        ("https://example.org/v1/chat/completions", ["https://example.org/v1"]),
        ("http://[::1]:8080", ["http://[::1]:8080/v1", "http://[::1]:8080"]),
    ],
)
def test_an_address_gives_where_to_ask(text: str, bases: list[str]) -> None:
    assert list(parse_address(text).bases) == bases


@pytest.mark.parametrize(
    "text",
    [
        *("", "127.0.0.1:11434", "ftp://example.org", "http://", "http:///v1", "http://a b", "http://example.org:0"),
        *("http://example.org:99999", "http://user:pw@example.org", "https://example.org/v1?key=1", "http://x\n"),
        *("http://example.org/#a", "http://exam\tple.org", "http://" + "a" * 600),
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(DataError):
        parse_address(text)


@given(st.text(max_size=80))
def test_any_text_is_an_address_or_a_clear_refusal(text: str) -> None:
    try:
        address = parse_address(text)
    except DataError:
        return
    assert text.startswith(address.origin)


@pytest.mark.parametrize(
    ("address", "token", "refused"),
    [
        ("http://127.0.0.1:1", TOKEN, False),
        ("http://localhost", TOKEN, False),
        ("http://[::1]:1", TOKEN, False),
        ("https://example.org", TOKEN, False),
        ("http://192.0.2.1:1", "", False),
        ("http://192.0.2.1:1", TOKEN, True),
        ("http://localhost.example.org", TOKEN, True),
        ("http://127.0.0.1.example.org", TOKEN, True),
    ],
)
def test_a_token_crosses_no_network_in_the_open(address: str, token: str, refused: bool) -> None:
    message, remedy = token_trouble(parse_address(address), token)
    assert bool(message) is bool(remedy) is refused
    assert TOKEN not in message + remedy


def test_where_the_token_is_read_from_and_how_it_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f" {TOKEN}\n")
    file.chmod(0o600)
    assert read_token({}, None) == ""
    assert read_token({}, file) == TOKEN
    assert read_token({"CLAWNET_OPENCLAW_TOKEN": "other"}, file) == "other"
    for mode in (0o640, 0o604, 0o622):
        file.chmod(mode)
        with pytest.raises(ConfigError) as caught:
            read_token({}, file)
        assert f"chmod 600 {file}" in caught.value.hint
        assert read_token({}, file, check_permissions=False) == TOKEN
    file.chmod(0o600)
    for content in (b"", b"\n", b"two words", b"x" * 5_000, "schlüssel".encode(), b"a\x00b"):
        file.write_bytes(content)
        with pytest.raises(ConfigError) as caught:
            read_token({}, file)
        assert "two words" not in str(caught.value.as_dict())
    with pytest.raises(ConfigError):
        read_token({}, tmp_path / "missing")


def test_the_configuration_as_a_whole_refuses_a_token_in_the_open(home: Home) -> None:
    environ = {"CLAWNET_OPENCLAW_TOKEN": TOKEN, "CLAWNET_OPENCLAW_API_ENDPOINT": "http://192.0.2.1:8080"}
    with pytest.raises(ConfigError) as caught:
        config.load(home, environ)
    assert "unencrypted" in caught.value.message and "https://" in caught.value.hint
    assert config.load(home, {**environ, "CLAWNET_OPENCLAW_ENABLED": "false"})
    settings = PromptSettings.of(
        config.load(home, {**environ, "CLAWNET_OPENCLAW_API_ENDPOINT": "https://a.org"}), environ
    )
    assert settings.token == TOKEN and TOKEN not in repr(settings)


def offer(**changes: Any) -> Offer:
    fields: dict[str, Any] = {
        "task_id": bytes(16),
        "round": 1,
        "kind": "prompt",
        "task": bytes(32),
        "payload_bytes": 3_000,
        "input_bytes": 0,
        "max_budget_ucr": 10_000_000,
        "deadline_ms": NOW + 300_000,
        "close_ms": NOW + 30_000,
        "lease_s": 30,
        "requirements": Requirements(capabilities=["ai-inference"]),
        "retries": 2,
    }
    return Offer(**{**fields, **changes})


def bid(
    rates: Rates = RATES, *, committed: int = 0, ring: str = "member", card: PeerCard = CARD, **changes: Any
) -> Any:
    workload = Workload(2, committed, queue_max=8)
    of = {"card": card, "ring": ring, "workload": workload, "durations": Durations(), "rates": rates, "now_ms": NOW}
    return quote(offer(**changes), **of)  # type: ignore[arg-type]


def test_a_prompt_is_bid_for_by_its_length_and_the_longest_answer() -> None:
    exact = msgspec.structs.replace(Rates(), step_ucr=1)
    cost = 1_000_000 + 1_000 * 100 + 4_096 * 300
    assert bid(exact).price_ucr == -(-cost * 900 // 1000)
    assert bid().price_ucr == 2_100_000  # in steps of 0.1
    assert bid(committed=2).price_ucr > bid().price_ucr
    assert bid(payload_bytes=30_000).price_ucr > bid().price_ucr
    assert bid(ring="own").price_ucr == 0
    assert bid(max_budget_ucr=2_000_000) is Reason.PRICE
    assert isinstance(bid(kind="openclaw_prompt"), Quote)


def test_the_rates_are_those_of_the_configuration() -> None:
    keys = {"market.rates.tokens_in": "0.2", "market.rates.tokens_out": "0.5", "openclaw.max_tokens": "1000"}
    rates = rates_from(Config.defaults(keys))
    assert (rates.tokens_in_ucr, rates.tokens_out_ucr, rates.answer_tokens_max) == (200_000, 500_000, 1_000)
    assert (Rates().tokens_in_ucr, Rates().tokens_out_ucr) == (100_000, 300_000)


@given(st.integers(1, 10**12), st.integers(0, 2**18), st.integers(0, 10**8), st.integers(0, 10**8))
def test_what_is_asked_is_something_and_never_more_than_the_bid(price: int, size: int, came_in: int, out: int) -> None:
    asked = metered(Rates(), price, size, came_in, out)
    assert 1 <= asked <= price
    assert metered(Rates(), price, size, came_in, out + 1) >= asked
    if out >= 4_096 and came_in * 3 >= size:
        assert asked == price


def test_who_is_served_is_seen_from_the_card() -> None:
    wanted = Requirements(capabilities=["ai-inference"])
    assert unmet("prompt", wanted, CARD, "member") is None
    mine = msgspec.structs.replace(CARD, prompt_rings=["own"])
    assert unmet("prompt", wanted, mine, "member") is Reason.POLICY
    assert unmet("prompt", wanted, mine, "own") is None
    assert capability_hash(mine) != capability_hash(CARD)
    assert unmet("prompt", Requirements(model="tiny"), CARD, "own") is None
    assert unmet("prompt", Requirements(model="huge"), CARD, "own") is Reason.NO_MODEL
    assert bid(card=mine) is Reason.POLICY


@pytest.mark.parametrize(
    ("spec", "error"),
    [
        ({"description": ""}, UsageError),
        ({"description": " \n", "stdin_b64": base64.b64encode(b" ").decode()}, UsageError),
        ({"description": "x", "inputs": [{"name": "a", "path": "/a"}]}, UsageError),
        ({"description": "x", "env": {"A": "b"}}, UsageError),
        ({"description": "x", "argv": ["ls"]}, UsageError),
        ({"description": "x", "stdin_b64": base64.b64encode(b"\xff").decode()}, DataError),
        ({"description": "x", "stdin_b64": base64.b64encode(b"a\0b").decode()}, DataError),
    ],
)
def test_what_is_no_prompt_is_refused(spec: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        normalise(spec, Config.defaults(), family="linux")


def test_a_prompt_is_the_default_and_may_be_standard_input_alone() -> None:
    normal = normalise({"stdin_b64": base64.b64encode(b"text").decode()}, Config.defaults(), family="linux")
    assert (normal["type"], normal["retries"], normal["ring"]) == ("prompt", 2, "member")
    assert normal["requirements"]["capabilities"] == ["ai-inference"] and normal["requirements"]["os"] == ""
    own = Config.defaults({"market.send_to.prompt": "own"})
    assert normalise({"description": "x"}, own, family="linux")["ring"] == "own"
