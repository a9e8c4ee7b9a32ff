"""Logs on real files: one safe line an event, rotation, the security log, a disk that refuses; and the exporter."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from clawnet.config import Config
from clawnet.observe import logs, security
from clawnet.observe.logfile import LOOK_EVERY_S, LogFile
from clawnet.observe.logs import Observer
from clawnet.paths import Home

AT = 1_700_000_000.5


class Clock:
    def __init__(self) -> None:
        self.now = AT

    def __call__(self) -> float:
        return self.now


class Lines:
    """A sink that keeps lines, or refuses them."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.lost = 0
        self.refuses = False

    def write(self, line: str) -> bool:
        if self.refuses:
            self.lost += 1
            return False
        self.lines.append(line)
        return True

    def close(self) -> None:
        self.refuses = True


def opened(home: Home, **changes: str) -> Observer:
    return Observer.open(Config.defaults({name.replace("__", "."): value for name, value in changes.items()}), home)


def test_an_event_is_one_line_of_text() -> None:
    sink = Lines()
    observer = Observer(sink, clock=Clock())
    observer.log("info", "link.closed", {"peer": "12D3KooWx", "reason": "went away", "rtt_ms": 3, "kept": None})
    assert sink.lines == [
        '2023-11-14T22:13:20.500Z info  link.closed peer=12D3KooWx reason="went away" rtt_ms=3 kept=null'
    ]


def test_an_event_is_one_object_of_json() -> None:
    sink = Lines()
    observer = Observer(sink, as_json=True, clock=Clock())
    observer.log("error", "a.b", {"event": "mine", "text": "a\nb\u2028\x1b[31mß", "big": 2**70, "nan": float("nan")})
    (line,) = sink.lines
    assert line.isascii()
    assert json.loads(line) == {
        "at": "2023-11-14T22:13:20.500Z",
        "level": "error",
        "event": "a.b",
        "event_": "mine",
        "text": "a\nb\u2028\x1b[31mß",
        "big": str(2**70),
        "nan": "nan",
    }


@pytest.mark.parametrize(
    "hostile", ["a\nfake", "a\r\nb", "\x1b[2J", "\x9b31m", "a\u2028b", "\u202eevil", "\x00", "\ud800"]
)
def test_hostile_text_stays_inside_its_line(hostile: str) -> None:
    sink = Lines()
    observer = Observer(sink)
    observer.log("warn", "x." + hostile, {"name": hostile, hostile: 1, "list": [hostile], "in": {hostile: [hostile]}})
    assert sink.lines[0].isprintable()


def test_text_that_looks_like_a_field_is_quoted() -> None:
    sink = Lines()
    Observer(sink).log("info", "x", {"a": 'b" c="d', "e": "f=g", "h": ""})
    assert sink.lines[0].endswith('a="b\\" c=\\"d" e="f=g" h=""')


def test_secrets_and_payloads_do_not_reach_a_line() -> None:
    sink = Lines()
    invite = "clawnet1" + "A" * 40
    Observer(sink).log(
        "info",
        "x",
        {
            "mesh_key": b"k" * 32,
            "escrow_seed": "sssss",
            "token": 12345,
            "deep": [{"password": "hunter2"}],
            "text": f"use {invite} soon",
            "payload": b"\x01" * 1000,
            "id": b"\x02" * 16,
            "key": "log.level",
        },
    )
    (line,) = sink.lines
    for secret in ("6b6b", "sssss", "12345", "hunter2", invite):
        assert secret not in line
    assert "payload=0101010101010101..(1000" in line.replace('"', "")
    assert f"id={'02' * 16}" in line
    assert "key=log.level" in line


def test_a_long_value_loses_its_middle() -> None:
    sink = Lines()
    Observer(sink).log("info", "x", {"text": "a" * 50_000 + "the end"})
    assert len(sink.lines[0]) < 10_000
    assert sink.lines[0].endswith('the end"') or sink.lines[0].endswith("the end")


def test_levels_filter_and_change() -> None:
    sink = Lines()
    observer = Observer(sink, level="warn")
    for level in ("debug", "info", "warn", "error"):
        observer.log(level, level, {})
    observer.set_level("debug")
    observer.log("debug", "now", {})
    assert [line.split()[2] for line in sink.lines] == ["warn", "error", "now"]
    with pytest.raises(KeyError):
        observer.set_level("loud")


def test_security_goes_to_both_logs_whatever_the_level() -> None:
    sink, secure = Lines(), Lines()
    observer = Observer(sink, secure, level="error", clock=Clock())
    observer.log("security", "signature.bad", {"peer": "p"})
    assert json.loads(secure.lines[0])["event"] == "signature.bad"
    assert sink.lines == []
    observer.set_level("info")
    observer.log("security", "signature.bad", {"peer": "p"})
    assert " warn  signature.bad peer=p" in sink.lines[0]
    assert observer.counters["security_events_total", "signature.bad"] == 2


def test_a_flood_of_security_events_is_summed_up() -> None:
    clock, lines = Clock(), Lines()
    observer = Observer(None, lines, clock=clock)
    for n in range(security.LINES_A_MINUTE + 50):
        observer.log("security", "signature.bad", {"peer": f"p{n}"})
    assert len(lines.lines) == security.LINES_A_MINUTE
    clock.now += 60
    observer.log("security", "replay", {})
    told, last = (json.loads(line) for line in lines.lines[-2:])
    assert (told["event"], told["lines"], last["event"]) == ("security.suppressed", 50, "replay")


def test_repeats_of_one_author_are_summed_up_and_hide_no_other() -> None:
    clock, lines = Clock(), Lines()
    observer = Observer(None, lines, clock=clock)
    most = security.LINES_OF_ONE_A_MINUTE
    for n in range(100_000):
        observer.log("security", "rate.exceeded", {"peer": "mallory", "n": n})
    observer.log("security", "rate.exceeded", {"peer": "trudy"})
    observer.log("security", "ban", {"peer": "mallory"})
    observer.log("security", "connection.refused", {"address": "192.0.2.1"})
    assert len(lines.lines) == most + 3
    clock.now += 60
    observer.log("security", "rate.exceeded", {"peer": "mallory"})
    told = json.loads(lines.lines[-2])
    assert (told["event"], told["of"], told["peer"], told["lines"]) == (
        "security.repeated",
        "rate.exceeded",
        "mallory",
        100_000 - most,
    )
    for _ in range(most):
        observer.log("security", "rate.exceeded", {"peer": "mallory"})
    observer.close()
    assert json.loads(lines.lines[-1])["lines"] == 1


def test_a_flood_of_one_warning_is_summed_up_and_hides_no_other() -> None:
    log, lines, at = Lines(), logs.LINES_OF_EVENT_A_MINUTE, [60.0]
    observer = Observer(log, clock=lambda: at[0])
    for n in range(lines + 30):
        observer.log("warn" if n % 2 else "security", "entry.rejected", {"n": n})
        observer.log("info", "task.done", {"n": n})
    observer.log("error", "disk.full", {})
    assert sum("entry.rejected" in line for line in log.lines) == lines
    assert sum("task.done" in line for line in log.lines) == lines + 30
    assert "disk.full" in log.lines[-1]
    at[0] += 60
    observer.log("warn", "other", {})
    assert "log.suppressed" in log.lines[-2] and "of=entry.rejected lines=30" in log.lines[-2]
    observer.log("warn", "entry.rejected", {})
    assert "entry.rejected" in log.lines[-1]


def test_lines_lost_are_told_when_the_disk_takes_them_again() -> None:
    sink = Lines()
    observer = Observer(sink)
    sink.refuses = True
    for _ in range(3):
        observer.log("info", "x", {})
    sink.refuses = False
    observer.log("info", "y", {})
    observer.log("info", "z", {})
    assert [line.split(" ", 1)[1] for line in sink.lines] == ["info  y", "warn  log.lost lines=3", "info  z"]


def test_files_are_private_and_the_observer_closes_them(home: Home) -> None:
    observer = opened(home, log__format="json")
    observer.log("security", "ban", {"peer": "p"})
    observer.close()
    observer.log("info", "late", {})
    for path in (home.log_file, home.security_log):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == ["ban"]
    assert observer.lines_lost == 1


def test_the_security_log_is_appended_to(home: Home) -> None:
    for n in range(2):
        observer = opened(home, log__output="stderr")
        observer.log("security", f"ban{n}", {})
        observer.close()
    assert [json.loads(line)["event"] for line in home.security_log.read_text().splitlines()] == ["ban0", "ban1"]
    assert not home.log_file.exists()


@pytest.mark.parametrize(("output", "place"), [("stdout", 0), ("stderr", 1)])
def test_output_to_a_stream(home: Home, capfd: pytest.CaptureFixture[str], output: str, place: int) -> None:
    observer = opened(home, log__output=output)
    observer.log("info", "started", {})
    observer.close()
    assert " info  started" in capfd.readouterr()[place]


def test_a_home_that_takes_no_logs_costs_only_the_lines(home: Home) -> None:
    home.dir.mkdir(parents=True)
    home.logs_dir.write_text("a file where the directory should be")
    observer = opened(home)
    observer.log("security", "ban", {})
    assert observer.lines_lost == 2
    observer.close()


def numbered(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.parent.iterdir())


def test_rotation_keeps_whole_lines_and_so_many_files(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "a.log"
    file = LogFile(path, 100, 2, 0)
    for n in range(30):
        assert file.write(f"line {n:02} " + "x" * 20)
    file.close()
    assert numbered(path) == ["a.log", "a.log.1", "a.log.2"]
    kept = [line for name in ("a.log.2", "a.log.1", "a.log") for line in (path.with_name(name)).read_text().split("\n")]
    numbers = [int(line.split()[1]) for line in kept if line]
    assert numbers == list(range(numbers[0], 30))
    assert all(path.with_name(name).stat().st_size <= 100 for name in numbered(path))


def test_no_backups_means_one_file(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    file = LogFile(path, 50, 0, 0)
    for _ in range(9):
        file.write("x" * 30)
    file.close()
    assert numbered(path) == ["a.log"]
    assert path.stat().st_size == 31


def test_old_backups_are_forgotten_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    for name in ("a.log.1", "a.log.2", "a.log.txt", "b.log.1"):
        (tmp_path / name).write_text("old")
        os.utime(tmp_path / name, (AT - 1_000, AT - 1_000))
    os.utime(tmp_path / "a.log.1", (AT - 10, AT - 10))
    LogFile(path, 100, 3, 500, clock=Clock()).close()
    assert numbered(path) == ["a.log", "a.log.1", "a.log.txt", "b.log.1"]


def test_a_file_moved_away_is_begun_anew(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "a.log"
    file = LogFile(path, 1_000, 1, 0, clock=clock)
    file.write("one")
    path.rename(tmp_path / "taken")
    clock.now += LOOK_EVERY_S
    file.write("two")
    file.close()
    assert path.read_text() == "two\n"
    assert (tmp_path / "taken").read_text() == "one\n"


def test_a_file_becomes_writable_again(tmp_path: Path) -> None:
    clock, folder = Clock(), tmp_path / "logs"
    folder.write_text("in the way")
    file = LogFile(folder / "a.log", 1_000, 1, 0, clock=clock)
    assert not file.write("lost")
    folder.unlink()
    assert not file.write("lost too: it is not looked at for every line")
    clock.now += LOOK_EVERY_S
    assert file.write("kept")
    file.close()
    assert (file.lost, (folder / "a.log").read_text()) == (2, "kept\n")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the machine has no /dev/full")
def test_a_full_disk_costs_the_lines(tmp_path: Path) -> None:
    file = LogFile(tmp_path / "a.log", 1_000, 1, 0)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, file._fd)
    os.close(full)
    assert not file.write("x")
    assert file.lost == 1
    file.close()


def test_counters_and_their_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    observer = Observer()
    observer.count("a")
    observer.count("a", "x", 3)
    observer.count("a", by=2)
    observer.set_gauge("g", 1.5)
    assert observer.counters == {("a", ""): 3, ("a", "x"): 3}
    assert observer.gauges == {"g": 1.5}
    monkeypatch.setattr(logs, "LABELS_MAX", 2)
    observer.count("a", "from a peer")
    observer.count("a", "x")
    assert observer.counters == {("a", ""): 3, ("a", "x"): 4, ("a", "other"): 1}
