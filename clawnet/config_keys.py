"""Every configuration key: its meaning, default, type, bounds, and whether a change needs a restart."""

from __future__ import annotations

import re
from typing import Final, Literal, NamedTuple

from clawnet import limits
from clawnet.errors import DataError
from clawnet.money import format_credits, parse_credits
from clawnet.units import format_duration, format_size, parse_duration_ms, parse_size

Kind = Literal[
    "text",
    "name",
    "path",
    "choice",
    "words",
    "addresses",
    "flag",
    "integer",
    "number",
    "duration",
    "size",
    "amount",
    "allowance",
]
Value = str | int | float | bool | tuple[str, ...]

RELOAD: Final = "reload"
RESTART: Final = "restart"

_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{limits.NAME_CHARS_MAX - 1}}}\Z")
_ADDRESS = re.compile(r"/(ip4|ip6|dns|dns4|dns6)/[^/\s]+/(tcp/\d+|udp/\d+/quic-v1)(/p2p/[A-Za-z0-9]+)?\Z")
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=-]{0,62}\Z")
UNBOUNDED: Final = -1
"""The value of an allowance that is "none"."""
_TRUE = ("true", "yes", "on", "1")
_FALSE = ("false", "no", "off", "0")
_DAY_MS = 86_400_000


class Key(NamedTuple):
    """One key. `default`, `low` and `high` are written as a user would write them.

    `refused` names values that are understood and turned down, with the reason; `unbuilt` is the reason why the whole
    key is turned down in this version.
    """

    name: str
    kind: Kind
    default: str
    meaning: str
    apply: str = RESTART
    low: str = ""
    high: str = ""
    choices: tuple[str, ...] = ()
    refused: tuple[tuple[str, str], ...] = ()
    unbuilt: str = ""
    short_variable: str = ""

    @property
    def variable(self) -> str:
        """The environment variable that overrides the file."""
        return "CLAWNET_" + self.name.upper().replace(".", "_")

    @property
    def section(self) -> str:
        """The dotted name of the section the key stands in."""
        return self.name.rpartition(".")[0]

    @property
    def allowed(self) -> str:
        """What a value may be, in words."""
        if self.choices:
            refused = {value for value, _ in self.refused}
            offered = " | ".join(choice for choice in self.choices if choice not in refused)
            return f"any of {offered}" if self.kind == "words" else offered
        words = _KIND_WORDS[self.kind]
        if self.low and self.high:
            return f"{words}, {self.low} to {self.high}"
        if self.low:
            return f"{words}, at least {self.low}"
        return words


_KIND_WORDS: Final[dict[Kind, str]] = {
    "text": "text",
    "name": f"1 to {limits.NAME_CHARS_MAX} letters, digits, dots, dashes and underscores, or empty",
    "path": "a directory, absolute or starting with ~, or empty",
    "choice": "a word",
    "words": "words of letters, digits, dots, dashes, underscores and =",
    "addresses": "multiaddrs such as /ip4/203.0.113.7/tcp/4002",
    "flag": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "duration": "a duration such as 500ms, 30s, 5m, 2h or 7d",
    "size": "a size such as 64KiB, 512MiB or 1GiB",
    "amount": "credits with up to six decimals",
    "allowance": "credits with up to six decimals, or none",
}


def parse_value(key: Key, raw: str | list[str]) -> Value:
    """The value of a key from its text, or from the texts of a list.

    Raises DataError whose message says what is wrong with the value and what is allowed.
    """
    if key.unbuilt:
        raise DataError(key.unbuilt)
    if key.kind in ("words", "addresses"):
        texts = raw if isinstance(raw, list) else [part.strip() for part in raw.split(",") if part.strip()]
        return tuple(dict.fromkeys(_checked_word(key, text) for text in texts))
    if isinstance(raw, list):
        raise DataError(f"a list is not allowed here; allowed: {key.allowed}")
    value = _parse_one(key, raw.strip())
    if key.low and value < _parse_one(key, key.low):  # type: ignore[operator]
        raise DataError(f"{raw.strip()!r} is too small; allowed: {key.allowed}")
    if key.high and value > _parse_one(key, key.high):  # type: ignore[operator]
        raise DataError(f"{raw.strip()!r} is too large; allowed: {key.allowed}")
    return value


def format_value(key: Key, value: Value) -> str:
    """The text of a value, which `parse_value` reads back; lists are joined by commas."""
    if isinstance(value, tuple):
        return ", ".join(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if key.kind == "duration":
        return format_duration(int(value))
    if key.kind == "size":
        return format_size(int(value))
    if key.kind in ("amount", "allowance"):
        return "none" if value == UNBOUNDED else format_credits(int(value))
    if key.kind == "number":
        return f"{value:.12f}".rstrip("0").rstrip(".")
    return str(value)


def _parse_one(key: Key, text: str) -> Value:
    wrong = DataError(f"{text!r} is not allowed; allowed: {key.allowed}")
    if key.kind == "choice":
        return _checked_word(key, text)
    if key.kind == "flag":
        word = text.lower()
        if word not in _TRUE + _FALSE:
            raise wrong
        return _unrefused(key, "true" if word in _TRUE else "false") == "true"
    if key.kind == "name" and text and _NAME.match(text) is None:
        raise wrong
    if key.kind == "path" and text and not text.startswith(("/", "~", "\\")) and text[1:2] != ":":
        raise wrong
    try:
        match key.kind:
            case "integer":
                return int(text) if re.fullmatch(r"-?\d{1,15}", text, re.ASCII) else _raise(wrong)
            case "number":
                return float(text) if re.fullmatch(r"-?\d{1,12}(\.\d{1,12})?", text, re.ASCII) else _raise(wrong)
            case "duration":
                return parse_duration_ms(text)
            case "size":
                return parse_size(text)
            case "amount":
                return parse_credits(text)
            case "allowance":
                return UNBOUNDED if text == "none" else parse_credits(text)
            case _:
                return text
    except DataError as error:
        raise wrong from error


def _raise(error: DataError) -> Value:
    raise error


def _checked_word(key: Key, text: str) -> str:
    if key.kind == "addresses":
        if _ADDRESS.match(text) is None:
            raise DataError(f"{text!r} is not allowed; allowed: {key.allowed}")
        return text
    if text not in key.choices if key.choices else _LABEL.match(text) is None:
        raise DataError(f"{text!r} is not allowed; allowed: {key.allowed}")
    return _unrefused(key, text)


def _unrefused(key: Key, text: str) -> str:
    for value, reason in key.refused:
        if value == text:
            raise DataError(f"{text!r} is refused: {reason}")
    return text


# --- the table, in the order of the file that `clawnet init` writes

SECTIONS: Final[dict[str, str]] = {
    "node": "This node.",
    "network": "How peers are reached.",
    "mesh": "The mesh this node founded (without effect where another founded it).",
    "market": "Buying and selling work.",
    "market.weights": "What a bid's score is made of; the four add up to 1.",
    "market.send_to": "The outermost ring that may see a task when a command names no --ring.",
    "market.rates": "What this node asks for its work.",
    "market.spend": "How much each local user may spend; none: no limit but the wallet, 0: nothing.",
    "ledger": "Credits and their books.",
    "memory": "The replicated memory.",
    "openclaw": "The AI endpoint.",
    "tui": "The live view.",
    "execution": "How tasks run on this machine.",
    "execution.shell": "For whom shell tasks run here, and how.",
    "storage": "The database and the files beside it.",
    "daemon": "The process.",
    "security": "Checks of this machine's own files.",
    "log": "Logs.",
    "metrics": "Figures for Prometheus.",
}


def _unbuilt(section: str, feature: str, names: str) -> tuple[Key, ...]:
    reason = f"{feature} not built yet in this version; remove the key"
    return tuple(Key(f"{section}.{name}", "text", "", feature, unbuilt=reason) for name in names.split())


_QUIC = "QUIC is not built yet in this version (peers are reached over TCP); remove the key"
_OWN_OR_MEMBER = ("own", "member")

_TABLE: Final[tuple[Key, ...]] = (
    Key("node.name", "name", "", "the name peers see; empty: this machine's host name"),
    Key("node.data_dir", "path", "", "where database, blobs and logs lie; empty: the home"),
    Key(
        "node.listen_addrs",
        "addresses",
        "",
        "where to listen; empty: every IPv4 and IPv6 interface at network.tcp_port",
    ),
    Key("node.bootstrap_peers", "addresses", "", "peers to connect to at start, each with its /p2p/ part"),
    Key(
        "node.capabilities",
        "words",
        "compute, shell-execution",
        "what this node offers, as far as the machine can do it",
        choices=("compute", "storage", "ai-inference", "shell-execution"),
        refused=(
            ("storage", "storage tasks are not built yet in this version"),
            ("ai-inference", "prompt tasks are not built yet in this version"),
        ),
    ),
    Key("node.labels", "words", "", "words that a task may ask for with --label", RESTART),
    Key("node.max_peers", "integer", "100", "connections at most", RELOAD, "1", "10000"),
    Key(
        "node.min_peers", "integer", "5", "below this many connections known members are dialled", RELOAD, "0", "10000"
    ),
    Key("network.enable_tcp", "flag", "true", "listen and dial over TCP"),
    Key(
        "network.tcp_port",
        "integer",
        "4002",
        "TCP port; 0: any free one",
        RESTART,
        "0",
        "65535",
        short_variable="CLAWNET_TCP_PORT",
    ),
    Key("network.connection_timeout", "duration", "30s", "how long a dial may take", RELOAD, "100ms", "10m"),
    Key("network.ping_interval", "duration", "15s", "how often a silent connection is checked", RESTART, "1s", "60s"),
    Key("network.enable_quic", "flag", "", "QUIC", unbuilt=_QUIC),
    Key("network.quic_port", "integer", "", "UDP port of QUIC", unbuilt=_QUIC, short_variable="CLAWNET_QUIC_PORT"),
    *_unbuilt("network", "discovery on the local network (mDNS) is", "enable_mdns"),
    *_unbuilt("network", "discovery through the DHT is", "enable_dht dht_mode"),
    *_unbuilt("network", "relaying is", "enable_relay"),
    *_unbuilt("network", "port mapping at the router is", "enable_nat_portmap"),
    Key(
        "mesh.mode",
        "choice",
        "private",
        "who may become a peer",
        choices=("private", "open"),
        refused=(("open", "open meshes are not built yet in this version; members join by invite"),),
    ),
    Key(
        "mesh.member_grant",
        "amount",
        "1000",
        "credits the founder's node gives with a member invite",
        RELOAD,
        "0",
        "1000000000",
    ),
    Key("mesh.members_may_invite", "flag", "false", "whether new members may invite others", RELOAD),
    Key("market.enabled", "flag", "true", "bid for others' tasks", RELOAD),
    Key(
        "market.initial_wallet_balance",
        "amount",
        "1000",
        "credits the founder's node grants itself at init; later changes only warn",
        RESTART,
        "0",
        "1000000000",
        short_variable="CLAWNET_WALLET_BALANCE",
    ),
    Key(
        "market.default_budget",
        "amount",
        "10",
        "the most a task may cost when its command names no --budget",
        RELOAD,
        "0",
        "1000000000",
    ),
    Key(
        "market.min_bid_increment",
        "amount",
        "0.1",
        "prices are rounded up to a multiple of this",
        RELOAD,
        "0.000001",
        "1000000",
    ),
    Key(
        "market.max_concurrent_auctions", "integer", "1000", "auctions of this node open at once", RELOAD, "1", "20000"
    ),
    Key("market.bid_timeout", "duration", "30s", "when an auction closes at the latest", RELOAD, "50ms", "1h"),
    Key(
        "market.soft_close",
        "duration",
        "500ms",
        "how long an auction stays open after its first acceptable bid",
        RELOAD,
        "1ms",
        "10m",
    ),
    Key("market.task_timeout", "duration", "300s", "a task's deadline when its command names none", RELOAD, "1s", "1d"),
    Key(
        "market.self",
        "choice",
        "fallback",
        "when this node takes its own tasks: after other own machines, first, or never",
        RELOAD,
        choices=("fallback", "prefer", "never"),
    ),
    Key(
        "market.preview",
        "words",
        "own, member",
        "the rings that are shown a task's output before it is paid",
        RELOAD,
        choices=_OWN_OR_MEMBER,
    ),
    Key(
        "market.energy_cost",
        "number",
        "0",
        "what a second of work costs this machine in energy, in credits; part of its price and shown in its bids",
        RELOAD,
        "0",
        "1000000",
    ),
    Key(
        "market.reputation_decay_rate",
        "number",
        "0.01",
        "the part of old evidence that fades in a day",
        RELOAD,
        "0",
        "1",
    ),
    Key(
        "market.rate_limit_bids",
        "integer",
        "100",
        "bids a peer may send for one task of ours in a minute",
        RELOAD,
        "1",
        "1000000",
    ),
    Key(
        "market.escrow_required",
        "flag",
        "true",
        "members are paid through escrow",
        choices=("true", "false"),
        refused=(("false", "work for members is always locked in escrow first"),),
    ),
    *_unbuilt("market", "swarm tasks are", "enable_swarm_mode"),
    *_unbuilt("market", "collusion and fraud signals are", "anti_collusion_checks fraud_detection"),
    *_unbuilt("market", "running a task at several peers and comparing is", "consensus_mode consensus_threshold"),
    Key("market.weights.price", "number", "0.4", "1 / price", RELOAD, "0", "1"),
    Key("market.weights.reputation", "number", "0.3", "the bidder's reputation here", RELOAD, "0", "1"),
    Key("market.weights.latency", "number", "0.1", "1 / estimated duration", RELOAD, "0", "1"),
    Key(
        "market.weights.confidence",
        "number",
        "0.2",
        "the bidder's confidence, discounted by its record",
        RELOAD,
        "0",
        "1",
    ),
    Key("market.send_to.shell", "choice", "own", "shell tasks", RELOAD, choices=_OWN_OR_MEMBER),
    Key("market.send_to.compute", "choice", "member", "compute tasks", RELOAD, choices=_OWN_OR_MEMBER),
    Key("market.rates.task", "amount", "1", "for any task", RELOAD, "0", "1000000"),
    Key("market.rates.cpu_second", "amount", "0.1", "for a second of processor time", RELOAD, "0", "1000000"),
    Key("market.spend.per_task", "allowance", "none", "for one task, over all its attempts", RELOAD),
    Key("market.spend.per_day", "allowance", "none", "in a day (UTC): locked, less refunded, and sent", RELOAD),
    Key("market.spend.open", "allowance", "none", "in open escrow at once", RELOAD),
    Key(
        "ledger.audit_entries_max",
        "integer",
        "20000",
        "entries of a chain that are audited before work",
        RELOAD,
        "100",
        "1000000",
    ),
    Key(
        "ledger.exposure_max",
        "amount",
        "1000",
        "delivered and not yet released work, for one requester",
        RELOAD,
        "0",
        "1000000000",
    ),
    *_unbuilt(
        "memory",
        "the replicated memory is",
        "enabled sync_interval max_memory_size compression_level encryption_enabled gc_interval",
    ),
    *_unbuilt(
        "openclaw",
        "prompt tasks and OpenClaw are",
        "enabled api_endpoint api_timeout max_tokens temperature model enable_streaming",
    ),
    *_unbuilt(
        "tui",
        "the live view is",
        "enabled theme refresh_rate show_peers_panel show_market_panel show_memory_panel show_log_panel",
    ),
    Key("execution.slots", "integer", "0", "tasks that run at once; 0: one for each processor", RESTART, "0", "1024"),
    Key("execution.queue_max", "integer", "256", "tasks won that may wait for a slot", RESTART, "0", "4096"),
    Key("execution.memory_max", "size", "1GiB", "memory of one run", RELOAD, "16MiB", "1TiB"),
    Key("execution.wall_max", "duration", "1h", "how long one run may take", RELOAD, "1s", "24h"),
    Key("execution.output_max", "size", "64MiB", "stdout and stderr of one run together", RELOAD, "4KiB", "64MiB"),
    Key("execution.user", "text", "nobody", "whom shell tasks run as when this node runs as root"),
    Key(
        "execution.shell.own",
        "choice",
        "auto",
        "own machines; auto: sandboxed where the sandbox works, else host",
        choices=("auto", "sandboxed", "host", "off"),
    ),
    Key("execution.shell.member", "choice", "sandboxed", "members", choices=("sandboxed", "off")),
    Key("execution.shell.stranger", "choice", "off", "strangers", choices=("off",)),
    Key(
        "storage.max_size",
        "size",
        "10GiB",
        "above this, new tasks and results are refused; obligations go on",
        RELOAD,
        "16MiB",
        "1024TiB",
    ),
    Key("daemon.drain_timeout", "duration", "30s", "how long a stop waits for what runs", RELOAD, "0s", "1d"),
    Key("security.check_permissions", "flag", "true", "refuse home, keys and config that others own or may write"),
    Key("log.level", "choice", "info", "the least that is written", RELOAD, choices=("debug", "info", "warn", "error")),
    Key("log.format", "choice", "text", "for people or for programs", RESTART, choices=("json", "text")),
    Key("log.output", "choice", "file", "where logs go", RESTART, choices=("stdout", "stderr", "file")),
    Key("log.max_size", "integer", "100", "megabytes of a log file before the next is begun", RESTART, "1", "10000"),
    Key("log.max_backups", "integer", "3", "old log files kept", RESTART, "0", "1000"),
    Key("log.max_age", "integer", "7", "days an old log file is kept", RESTART, "1", "3650"),
    Key("metrics.port", "integer", "0", "loopback port of the exporter; 0: none", RESTART, "0", "65535"),
)

KEYS: Final[dict[str, Key]] = {key.name: key for key in _TABLE}
