"""The figures for Prometheus and a health check, on a loopback port that is off unless asked for."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

import clawnet
from clawnet.limits import KIB
from clawnet.observe.logs import Observer

PREFIX: Final = "clawnet_"
REQUEST_BYTES_MAX: Final = 8 * KIB
REQUEST_TIMEOUT_S: Final = 5.0
CONNECTIONS_MAX: Final = 16
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_LOCAL_NAMES: Final = frozenset({"localhost", "127.0.0.1", "[::1]"})


class Figure(NamedTuple):
    """What a figure means, and for a counter with labels the name of its label."""

    meaning: str
    label: str = ""


FIGURES: Final[dict[str, Figure]] = {
    # counters: they only grow while the daemon runs
    "chains_refused_total": Figure("Entries of a chain that broke a rule of the ledger.", "reason"),
    "commits_failed_total": Figure("Transactions that could not be committed.", "code"),
    "defects_total": Figure("Steps that ended in an internal error."),
    "dialled_on_demand_total": Figure("Members dialled for one task."),
    "forks_total": Figure("Accounts found to have signed two chains."),
    "identity_twins_total": Figure("Signs of another program with this node's identity."),
    "jobs_total": Figure("Tasks run for peers, by how they ended.", "state"),
    "joins_total": Figure("Invites redeemed or refused.", "result"),
    "log_lines_lost_total": Figure("Log lines that could not be written."),
    "memberships_ended_total": Figure("Memberships that ended: removed, left, or a lease not kept.", "cause"),
    "messages_ignored_total": Figure("Messages that nothing waited for.", "kind"),
    "messages_refused_total": Figure("Messages of peers that broke a rule.", "reason"),
    "offers_gossiped_total": Figure("Own offers sent round because too few members were known."),
    "relayed_refused_total": Figure("Relayed statements that were not taken.", "reason"),
    "relayed_repeated_total": Figure("Relayed statements that came again.", "kind"),
    "security_events_total": Figure("Events of the security log.", "event"),
    "tasks_held_total": Figure("Own tasks that waited for approval."),
    "tasks_total": Figure("Own tasks, by their final state.", "state"),
    # gauges: their value now
    "auctions_active": Figure("Auctions of own tasks that are open."),
    "info": Figure("The version that runs."),
    "memory_bytes": Figure("Resident memory of the daemon."),
    "peers_connected": Figure("Peers with an open control stream."),
    "reputation_score": Figure("Mean standing of the peers known, from 0 to 1."),
    "rtt_seconds": Figure("Mean round trip to the connected peers."),
    "runs_active": Figure("Tasks this node executes now."),
    "storage_bytes": Figure("Database and blobs on the disk."),
    "tasks_open": Figure("Own tasks that are not final."),
    "wallet_balance": Figure("Available credits of this node's account."),
}


def render(counters: Mapping[tuple[str, str], int], gauges: Mapping[str, float]) -> str:
    """All figures in Prometheus' text format 0.0.4. A gauge whose name ends in _total is told as a counter."""
    samples: dict[str, list[str]] = {}
    for (name, label), value in counters.items():
        label_name = _figure(name).label or ("kind" if label else "")
        labels = f'{{{label_name}="{_quoted(label)}"}}' if label_name else ""
        samples.setdefault(name, []).append(f"{PREFIX}{name}{labels} {value}")
    for name, number in gauges.items():
        samples.setdefault(name, []).append(f"{PREFIX}{name} {_number(number)}")
    samples["info"] = [f'{PREFIX}info{{version="{_quoted(clawnet.__version__)}"}} 1']
    lines = []
    for name in sorted(samples):
        kind = "counter" if name.endswith("_total") else "gauge"
        lines += [f"# HELP {PREFIX}{name} {_figure(name).meaning}", f"# TYPE {PREFIX}{name} {kind}"]
        lines += sorted(samples[name])
    return "\n".join(lines) + "\n"


def _figure(name: str) -> Figure:
    return FIGURES.get(name) or Figure(name.removesuffix("_total").replace("_", " ").capitalize() + ".")


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    return str(int(value)) if value == value and abs(value) < 2**53 and value == int(value) else repr(float(value))


async def serve(port: int, observer: Observer, gauges: Callable[[], dict[str, float]]) -> Exporter:
    """Answers GET /metrics and GET /healthz on 127.0.0.1; port 0 lets the system choose. Raises OSError."""
    exporter = Exporter(observer, gauges)
    await exporter.start(port)
    return exporter


class Exporter:
    """A listener that answers one request a connection; `port` is where, `close` ends it."""

    def __init__(self, observer: Observer, gauges: Callable[[], dict[str, float]]) -> None:
        self._observer = observer
        self._gauges = gauges
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self.port = 0

    async def start(self, port: int) -> None:
        """Begins to listen."""
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", port, limit=REQUEST_BYTES_MAX)
        self.port = int(self._server.sockets[0].getsockname()[1])

    def close(self) -> None:
        """Stops listening and drops the connections there are."""
        if self._server is not None:
            self._server.close()
        for writer in self._writers:
            writer.transport.abort()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._writers) >= CONNECTIONS_MAX:
            writer.transport.abort()
            return
        self._writers.add(writer)
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
                async with asyncio.timeout(REQUEST_TIMEOUT_S):
                    writer.write(self._answer(await reader.readuntil(b"\r\n\r\n")))
                    await writer.drain()
        finally:
            self._writers.discard(writer)
            writer.close()

    def _answer(self, head: bytes) -> bytes:
        lines = head.decode("latin-1").split("\r\n")
        method, _, rest = lines[0].partition(" ")
        path = rest.partition(" ")[0].partition("?")[0]
        fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        # A page in a browser can give its own name this machine's address, but not this Host.
        if _host(fields.get("host", "")) not in _LOCAL_NAMES:
            return _response("421 Misdirected Request", "ask by 127.0.0.1 or localhost\n")
        if method not in ("GET", "HEAD"):
            return _response("405 Method Not Allowed", "GET only\n", extra="Allow: GET, HEAD\r\n")
        body = method == "GET"
        if path == "/healthz":
            return _response("200 OK", "ok\n", body=body)
        if path == "/metrics":
            gauges = {
                **self._observer.gauges,
                "log_lines_lost_total": self._observer.lines_lost,
                **self._gauges(),
            }
            return _response("200 OK", render(self._observer.counters, gauges), body=body)
        return _response("404 Not Found", "here are /metrics and /healthz\n", body=body)


def _host(value: str) -> str:
    name, colon, port = value.rpartition(":")
    return (name if colon and port.isdigit() else value).lower()


def _response(status: str, text: str, *, body: bool = True, extra: str = "") -> bytes:
    data = text.encode()
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {CONTENT_TYPE}\r\nContent-Length: {len(data)}\r\n"
        f"{extra}Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + (data if body else b"")
