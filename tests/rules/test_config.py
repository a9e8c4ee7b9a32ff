"""The configuration: every key is read, every mistake is named with file and line, and no comment is ever lost."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from clawnet import config, config_file
from clawnet.config import Config
from clawnet.config_keys import KEYS, RELOAD, RESTART, SECTIONS, Key, format_value, parse_value
from clawnet.errors import ConfigError, DataError, NotFoundError
from clawnet.paths import Home
from tests.test_layers import parse, python_files

SETTABLE = [key for key in KEYS.values() if not key.unbuilt]
UNBUILT = [key for key in KEYS.values() if key.unbuilt]
ACCESSORS = {
    "text": ("text", "name", "choice", "path", "url"),
    "path": ("path", "file"),
    "flag": ("flag",),
    "integer": ("integer", "size"),
    "number": ("number", "integer"),
    "seconds": ("duration",),
    "millis": ("duration",),
    "amount_ucr": ("amount",),
    "words": ("words", "addresses"),
}


def written(home: Home, text: str) -> Home:
    """A home whose configuration file holds this text."""
    home.dir.mkdir(mode=0o700, exist_ok=True)
    home.config_file.write_text(text)
    home.config_file.chmod(0o600)
    return home


def refusal(home: Home, text: str, environ: dict[str, str] | None = None) -> str:
    """Message and hint of the error that this file gets, without the home's path."""
    with pytest.raises(ConfigError) as caught:
        config.load(written(home, text), environ or {})
    assert caught.value.exit_code == 78
    return f"{caught.value.message} | {caught.value.hint}".replace(str(home.dir) + "/", "")


# --- the table


@pytest.mark.parametrize("key", SETTABLE, ids=lambda key: key.name)
def test_every_key_has_a_good_default_a_meaning_and_a_section(key: Key) -> None:
    value = parse_value(key, key.default)
    assert parse_value(key, format_value(key, value)) == value
    assert key.meaning and not key.meaning.endswith(".")
    assert key.section in SECTIONS
    assert key.apply in (RELOAD, RESTART)
    if key.low:
        parse_value(key, key.low)
    if key.high:
        parse_value(key, key.high)


@pytest.mark.parametrize("key", UNBUILT, ids=lambda key: key.name)
def test_a_key_of_a_feature_that_is_not_built_is_refused_with_the_reason(key: Key, home: Home) -> None:
    section, _, word = key.name.rpartition(".")
    message = refusal(home, f"{section}:\n  {word}: false\n")
    assert message.startswith(f"config.yaml:2: {key.name}: ")
    assert "not built yet in this version" in message


def _read_names() -> tuple[set[str], set[str]]:
    """Texts in the code that could name a key, and the fixed beginnings of those put together."""
    whole: set[str] = set()
    begun: set[str] = set()
    for path in python_files("clawnet", "commands"):
        if path.stem.startswith("config"):
            continue
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                whole.add(node.value)
            elif isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant):
                begun.add(str(node.values[0].value))
    return whole, begun


def test_some_code_reads_every_key() -> None:
    whole, begun = _read_names()
    elsewhere = {"node.data_dir"}  # Config.home reads it
    unread = [
        key.name
        for key in SETTABLE
        if key.name not in whole | elsewhere
        and not any(
            start.endswith(".") and key.name.startswith(start) for start in begun if start.rstrip(".") in SECTIONS
        )
        # a value that must be what it is needs no reader
        and not (key.choices and len(key.choices) - len(key.refused) == 1)
    ]
    assert unread == []


def test_the_code_reads_only_keys_that_exist_and_as_what_they_are() -> None:
    wrong = []
    for path in python_files("clawnet", "commands"):
        for node in ast.walk(parse(path)):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args):
                continue
            name = node.args[0].value if isinstance(node.args[0], ast.Constant) else None
            if not isinstance(name, str) or "." not in name or node.func.attr not in ACCESSORS:
                continue
            if "config" in ast.unparse(node.func.value):
                kind = KEYS[name].kind if name in KEYS else "no key"
                if kind not in ACCESSORS[node.func.attr]:
                    wrong.append(f"{path}:{node.lineno}: {node.func.attr}({name!r}), which is {kind}")
    assert wrong == []


# --- layers


def test_environment_is_over_the_file_and_flags_over_the_environment(home: Home) -> None:
    written(home, "market:\n  bid_timeout: 5s\nlog:\n  level: warn\n")
    environ = {"CLAWNET_MARKET_BID_TIMEOUT": "7s", "CLAWNET_LOG_LEVEL": "error", "CLAWNET_HOME": "x", "PATH": "y"}
    settings = config.load(home, environ, {"log.level": "debug"})
    assert settings.seconds("market.bid_timeout") == 7.0
    assert settings.source("market.bid_timeout") == "CLAWNET_MARKET_BID_TIMEOUT"
    assert settings.text("log.level") == "debug"
    assert settings.source("log.level") == "flag"
    assert config.load(home, {}).source("market.bid_timeout") == f"{home.config_file}:2"
    assert settings.source("market.soft_close") == "default"
    assert not settings.is_set("market.soft_close")


@pytest.mark.parametrize(
    ("variable", "text", "name", "value"),
    [
        ("CLAWNET_NODE_NAME", "bob", "node.name", "bob"),
        ("CLAWNET_TCP_PORT", "4010", "network.tcp_port", 4010),
        ("CLAWNET_NETWORK_TCP_PORT", "4011", "network.tcp_port", 4011),
        ("CLAWNET_MARKET_ENABLED", "false", "market.enabled", False),
        ("CLAWNET_WALLET_BALANCE", "2.5", "market.initial_wallet_balance", 2_500_000),
        ("CLAWNET_EXECUTION_SHELL_OWN", "host", "execution.shell.own", "host"),
        ("CLAWNET_NODE_LISTEN_ADDRS", "/ip4/1.2.3.4/tcp/1,/dns/a.example/tcp/2", "node.listen_addrs", None),
    ],
)
def test_variables_of_the_environment(home: Home, variable: str, text: str, name: str, value: object) -> None:
    settings = config.load(home, {variable: text})
    assert settings.source(name) == variable
    got = parse_value(KEYS[name], settings.shown(name))
    assert got == (("/ip4/1.2.3.4/tcp/1", "/dns/a.example/tcp/2") if value is None else value)


def test_a_mistyped_variable_is_an_error(home: Home) -> None:
    with pytest.raises(ConfigError, match="CLAWNET_MARKET_BID_TIMOUT names no configuration key") as caught:
        config.load(home, {"CLAWNET_MARKET_BID_TIMOUT": "7s"})
    assert caught.value.hint == "did you mean market.bid_timeout?"
    with pytest.raises(ConfigError, match="CLAWNET_TUI_THEME: the live view is not built yet"):
        config.load(home, {"CLAWNET_TUI_THEME": "dark"})
    config.load(home, {"CLAWNET_SOMETHING_ELSE": "1"})


def test_without_a_file_the_defaults_hold_but_a_named_file_must_exist(home: Home, tmp_path: Path) -> None:
    assert config.load(home, {}).integer("network.tcp_port") == 4002
    with pytest.raises(ConfigError, match="there is no configuration file"):
        config.load(Home(home.dir, config_file=tmp_path / "other.yaml"), {})


# --- mistakes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "market:\n  bid_timout: 5s\n",
            "config.yaml:2: market.bid_timout is not a configuration key | did you mean market.bid_timeout?",
        ),
        ("\n\nmarkt:\n  a: 1\n", "config.yaml:3: markt is not a configuration key | did you mean market?"),
        ("market:\n  bid_timeout: 5\n", "config.yaml:2: market.bid_timeout: '5' is not allowed; allowed: a duration"),
        ("market:\n  bid_timeout: 99h\n", "config.yaml:2: market.bid_timeout: '99h' is too large; allowed: "),
        (
            "market:\n  bid_timeout: 1ms\n",
            "'1ms' is too small; allowed: a duration such as 500ms, 30s, 5m, 2h or 7d, 50ms to 1h",
        ),
        ("market:\n  bid_timeout:\n", "config.yaml:2: market.bid_timeout has no value"),
        ("market:\n  bid_timeout: [1s]\n", "config.yaml:2: market.bid_timeout: a list is not allowed here"),
        ("market:\n  bid_timeout: {a: 1}\n", "config.yaml:2: market.bid_timeout cannot be a section"),
        (
            "market:\n  default_budget: 1e3\n",
            "config.yaml:2: market.default_budget: '1e3' is not allowed; allowed: credits",
        ),
        ("market:\n  default_budget: 0.0000001\n", "'0.0000001' is not allowed"),
        (
            "market:\n  enabled: maybe\n",
            "config.yaml:2: market.enabled: 'maybe' is not allowed; allowed: true or false",
        ),
        ("market:\n  bid_timeout: 1s\n  bid_timeout: 2s\n", "config.yaml:3: market.bid_timeout is set twice"),
        ("market: 5\n", "config.yaml:1: market must be a section"),
        (
            "market:\n  weights:\n    price: 0.9\n",
            "config.yaml:3: market.weights: the four weights add up to 1.5; allowed: 1 in all",
        ),
        (
            "market:\n  escrow_required: false\n",
            "config.yaml:2: market.escrow_required: 'false' is refused: work for members",
        ),
        ("mesh:\n  mode: open\n", "config.yaml:2: mesh.mode: 'open' is refused: open meshes are not built yet"),
        (
            "node:\n  capabilities: [compute, storage]\n",
            "node.capabilities: 'storage' is refused: storage tasks are not built",
        ),
        ("node:\n  capabilities: [cpu]\n", "allowed: any of compute | ai-inference | shell-execution"),
        ("node:\n  name: a b\n", "config.yaml:2: node.name: 'a b' is not allowed"),
        ("node:\n  data_dir: here\n", "config.yaml:2: node.data_dir: 'here' is not allowed"),
        ("node:\n  listen_addrs: [1.2.3.4:5]\n", "node.listen_addrs: '1.2.3.4:5' is not allowed; allowed: multiaddrs"),
        ("network:\n  tcp_port: 65536\n", "'65536' is too large; allowed: a whole number, 0 to 65535"),
        ("- a\n", "config.yaml:1: the file must be a section"),
        ("market:\n\tenabled: true\n", "config.yaml:2: this is not YAML"),
        ("a: [\n", "this is not YAML"),
        ("a: 1\n---\nb: 2\n", "this is not YAML"),
        ("node: &a\n  name: *a\n", "config.yaml:2: node.name cannot be a section"),
        ("? [1]\n: 2\n", "config.yaml:1: a key must be a word"),
        ("x\x00: 1\n", "this is not YAML"),
    ],
)
def test_mistakes_in_the_file(home: Home, text: str, message: str) -> None:
    assert message in refusal(home, text)


def test_every_mistake_is_listed_by_check(home: Home) -> None:
    written(home, "market:\n  enabled: maybe\n  bid_timout: 1s\nnode:\n  max_peers: many\n")
    lines = [problem.line for problem in config.check(home, {})]
    assert lines == [2, 3, 5]
    assert "(and 2 more; clawnet config check lists them)" in refusal(home, home.config_file.read_text())


def test_a_file_that_is_no_text_or_too_large(home: Home) -> None:
    written(home, "")
    home.config_file.write_bytes(b"node:\n  name: \xff\n")
    with pytest.raises(ConfigError, match=r"config.yaml:2: this is not UTF-8"):
        config.load(home, {})
    home.config_file.write_bytes(b"#" * (config_file.FILE_BYTES_MAX + 1))
    with pytest.raises(ConfigError, match="the limit is"):
        config.load(home, {})


@pytest.mark.parametrize(("mode", "line"), [(0o622, "chmod 600"), (0o660, "chmod 600")])
def test_a_file_that_others_may_write_is_refused_with_the_line_that_helps(home: Home, mode: int, line: str) -> None:
    written(home, "")
    home.config_file.chmod(mode)
    with pytest.raises(ConfigError, match="written by other users") as caught:
        config.load(home, {})
    assert caught.value.hint == f"{line} {home.config_file}"
    config.load(home, {"CLAWNET_SECURITY_CHECK_PERMISSIONS": "false"})
    home.config_file.chmod(0o644)
    config.load(home, {})


@given(st.text(max_size=200))
def test_no_text_makes_the_reader_fail_in_another_way(text: str) -> None:
    entries, problems = config_file.read_entries(text)
    assert all(entry.name in KEYS for entry in entries)
    assert all(problem.line >= 1 and problem.message for problem in problems)


@given(st.sampled_from(SETTABLE), st.text(max_size=40))
def test_no_value_makes_the_parser_fail_in_another_way(key: Key, text: str) -> None:
    try:
        value = parse_value(key, text)
    except DataError:
        return
    assert parse_value(key, format_value(key, value)) == value


# --- writing


def test_the_file_that_init_writes_shows_every_key_and_sets_only_what_was_asked(home: Home) -> None:
    home.dir.mkdir(mode=0o700)
    config.write_new(home.config_file, {"node.name": "alice"})
    text = home.config_file.read_text()
    assert home.config_file.stat().st_mode & 0o777 == 0o600
    settings = config.load(home, {})
    assert [name for name in settings.names() if settings.is_set(name)] == ["node.name"]
    uncommented = "\n".join(
        line.replace("# ", "", 1)
        if line.strip().startswith("# ") and (line.rstrip().endswith(":") or _is_value(line))
        else line
        for line in text.splitlines()
    )
    everything = yaml.safe_load(uncommented)
    for key in SETTABLE:
        place = everything
        for word in key.name.split("."):
            place = place[word]
        assert key.meaning in text
    assert max(len(line) for line in text.splitlines()) < 200


def _is_value(line: str) -> bool:
    words = {key.name.rpartition(".")[2] for key in SETTABLE}
    return line.strip().removeprefix("# ").split(":")[0] in words and ";" not in line


def test_set_keeps_comments_order_and_everything_else(home: Home) -> None:
    text = "# mine\nmarket:   # why\n  bid_timeout: 5s   # short\n\n  # about self\n  self: never\nnode:\n  name: 'x'\n"
    written(home, text)
    config.set_in_file(home.config_file, {"market.bid_timeout": "7s"})
    assert home.config_file.read_text() == text.replace("5s", "7s")
    config.set_in_file(home.config_file, {"node.name": "bob", "market.self": "prefer"})
    changed = text.replace("5s", "7s").replace("'x'", "bob").replace("never", "prefer")
    assert home.config_file.read_text() == changed
    config.set_in_file(home.config_file, {"log.level": "debug"})
    assert home.config_file.read_text() == changed + "log:\n  level: debug\n"


@pytest.mark.parametrize("key", [key for key in SETTABLE if key.section != "market.weights"], ids=lambda key: key.name)
def test_every_key_can_be_set_in_a_fresh_file_and_in_an_empty_one(home: Home, key: Key) -> None:
    value = _another_value(key)
    home.dir.mkdir(mode=0o700)
    for start in (config_file.render({}), "", "# only a comment"):
        home.config_file.write_text(start)
        config.set_in_file(home.config_file, {key.name: value})
        home.config_file.chmod(0o600)
        settings = config.load(home, {})
        assert settings.shown(key.name) == format_value(key, parse_value(key, value))
        assert [name for name in settings.names() if settings.is_set(name)] == [key.name]
        kept = [line for line in start.splitlines() if line.startswith("# ")]
        assert [line for line in home.config_file.read_text().splitlines() if line.startswith("# ")][
            : len(kept)
        ] == kept


def _another_value(key: Key) -> str:
    match key.kind:
        case "choice" | "words" if key.choices:
            refused = {value for value, _ in key.refused}
            return [choice for choice in key.choices if choice not in refused][-1]
        case "flag":
            return key.default
        case "path":
            return "/var/lib/clawnet data"
        case "addresses":
            return "/ip4/1.2.3.4/tcp/1, /ip6/::1/tcp/2"
        case "words":
            return "gpu, zone=eu"
        case "text" | "name":
            return "true"
        case _:
            return key.high or key.default


def test_weights_are_changed_together(home: Home) -> None:
    written(home, "market:\n  weights:\n    price: 0.4\n")
    with pytest.raises(ConfigError, match=r"add up to 1\.1"):
        config.set_in_file(home.config_file, {"market.weights.price": "0.5"})
    assert home.config_file.read_text() == "market:\n  weights:\n    price: 0.4\n"
    config.set_in_file(home.config_file, {"market.weights.price": "0.5", "market.weights.reputation": "0.2"})
    assert config.load(home, {}).number("market.weights.reputation") == 0.2


def test_what_set_refuses_leaves_the_file_alone(home: Home) -> None:
    text = "market: {bid_timeout: 5s}\n"
    written(home, text)
    with pytest.raises(ConfigError, match="is not written as lines of KEY: VALUE"):
        config.set_in_file(home.config_file, {"market.self": "never"})
    with pytest.raises(NotFoundError):
        config.set_in_file(home.config_file, {"market.bid": "1s"})
    with pytest.raises(ConfigError, match="not built yet"):
        config.set_in_file(home.config_file, {"tui.enabled": "true"})
    with pytest.raises(ConfigError, match="is not allowed"):
        config.set_in_file(home.config_file, {"market.bid_timeout": "soon"})
    assert home.config_file.read_text() == text
    config.set_in_file(home.config_file, {"market.bid_timeout": "6s"})
    assert home.config_file.read_text() == "market: {bid_timeout: 6s}\n"


# --- reading


def test_reading_by_the_wrong_accessor_is_a_defect() -> None:
    settings = Config.defaults({"market.bid_timeout": "1500ms"})
    assert settings.millis("market.bid_timeout") == 1_500
    assert settings.seconds("market.bid_timeout") == 1.5
    assert settings.integer("execution.memory_max") == 2**30
    assert settings.text("node.name")
    for read in (settings.text, settings.flag, settings.amount_ucr, settings.integer, settings.words):
        with pytest.raises(AssertionError):
            read("market.bid_timeout")


def test_changes_between_two_configurations() -> None:
    before, after = Config.defaults(), Config.defaults({"log.level": "debug", "network.tcp_port": "1"})
    assert before.changed(after) == ("network.tcp_port", "log.level")
    assert config.restart_needed(before.changed(after)) == ("network.tcp_port",)
    with pytest.raises(ConfigError, match="weights"):
        Config.defaults({"market.weights.price": "1"})


def test_data_moves_with_its_key_but_keys_and_socket_stay(home: Home) -> None:
    moved = Config.defaults({"node.data_dir": "/srv/clawnet"}).home(home)
    assert moved.database == Path("/srv/clawnet/clawnet.db")
    assert moved.node_key == home.node_key
    assert moved.socket == home.socket
    assert Config.defaults().home(home) == home
