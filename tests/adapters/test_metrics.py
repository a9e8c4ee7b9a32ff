"""The exporter over a real loopback socket, asked with the standard library's HTTP client."""

from __future__ import annotations

import asyncio
import http.client
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clawnet.observe import metrics
from clawnet.observe.logs import Observer
from clawnet.observe.metrics import FIGURES, Exporter, render, serve

ROOT = Path(__file__).resolve().parents[2]


def ask(observer: Observer, work: Callable[[int], Any], gauges: dict[str, float] | None = None) -> Any:
    """Runs `work(port)` in a thread while an exporter listens."""

    async def go() -> Any:
        exporter = await serve(0, observer, lambda: gauges or {})
        try:
            return await asyncio.to_thread(work, exporter.port)
        finally:
            exporter.close()

    return asyncio.run(go())


def request(port: int, path: str, method: str = "GET", host: str = "") -> tuple[int, str, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, headers={"Host": host} if host else {})
        response = connection.getresponse()
        return response.status, response.read().decode(), {k.lower(): v for k, v in response.getheaders()}
    finally:
        connection.close()


def test_figures_are_told_in_the_text_format() -> None:
    observer = Observer()
    observer.count("tasks_total", "settled", 2)
    observer.count("tasks_total", 'o"d\\d\n')
    observer.count("forks_total")
    text = render(observer.counters, {"wallet_balance": 1.5, "peers_connected": 3, "odd": float("inf")})
    lines = text.splitlines()
    at = lines.index("# TYPE clawnet_tasks_total counter")
    assert lines[at + 1 : at + 3] == [
        'clawnet_tasks_total{state="o\\"d\\\\d\\n"} 1',
        'clawnet_tasks_total{state="settled"} 2',
    ]
    assert {"clawnet_forks_total 1", "clawnet_wallet_balance 1.5", "clawnet_peers_connected 3"} <= set(lines)
    assert "clawnet_odd inf" in lines
    assert text.endswith("\n")
    sample = re.compile(r'[a-z_]+(\{[a-z]+="(?:[^"\\\n]|\\.)*"\})? \S+')
    assert all(line.startswith("# ") or sample.fullmatch(line) for line in lines)


def test_metrics_and_health_are_answered() -> None:
    observer = Observer()
    observer.count("joins_total", "admitted")
    observer.set_gauge("reputation_score", 0.5)

    def work(port: int) -> None:
        status, text, headers = request(port, "/metrics?x=1")
        assert (status, headers["content-type"]) == (200, metrics.CONTENT_TYPE)
        for line in (
            'clawnet_joins_total{result="admitted"} 1',
            "clawnet_reputation_score 0.5",
            "clawnet_memory_bytes 7",
            "clawnet_log_lines_lost_total 0",
        ):
            assert line in text.splitlines()
        assert request(port, "/healthz", host="localhost:9464")[:2] == (200, "ok\n")
        status, text, headers = request(port, "/metrics", "HEAD")
        assert (status, text) == (200, "")
        assert int(headers["content-length"]) > 100

    ask(observer, work, {"memory_bytes": 7})


@pytest.mark.parametrize(
    ("method", "path", "host", "status"),
    [
        ("GET", "/", "", 404),
        ("POST", "/metrics", "", 405),
        ("GET", "/metrics", "evil.example", 421),
        ("GET", "/metrics", "evil.example:80", 421),
    ],
)
def test_other_requests_are_refused(method: str, path: str, host: str, status: int) -> None:
    assert ask(Observer(), lambda port: request(port, path, method, host))[0] == status


def test_an_endless_request_and_a_flood_of_connections_are_cut_off() -> None:
    async def go() -> None:
        exporter = await serve(0, Observer(), dict)
        reader, writer = await asyncio.open_connection("127.0.0.1", exporter.port)
        writer.write(b"GET /metrics HTTP/1.1\r\nX: " + b"a" * (2 * metrics.REQUEST_BYTES_MAX))
        assert await read_all(reader) == b""
        writer.close()
        open_ones = [await asyncio.open_connection("127.0.0.1", exporter.port) for _ in range(20)]
        assert await read_all(open_ones[-1][0]) == b""
        exporter.close()
        for other, its_writer in open_ones:
            assert await read_all(other) == b""
            its_writer.close()

    asyncio.run(go())


async def read_all(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read()
    except ConnectionResetError:
        return b""


def test_a_port_in_use_is_an_error_of_the_system() -> None:
    async def go() -> None:
        first = await serve(0, Observer(), dict)
        with pytest.raises(OSError):
            await Exporter(Observer(), dict).start(first.port)
        first.close()

    asyncio.run(go())


def test_every_counter_of_the_node_has_its_meaning() -> None:
    counted = re.compile(r'\.count\(\s*"([a-z_]+_total)"(, "[a-z]|, [a-z])?')
    found = [match for path in (ROOT / "clawnet").rglob("*.py") for match in counted.findall(path.read_text())]
    assert found
    assert {name for name, _ in found} <= set(FIGURES)
    assert all(FIGURES[name].label for name, label in found if label)
