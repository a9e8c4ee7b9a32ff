"""The sandbox is broken out of in every way we know: each is open without it, in the same test, and shut inside.

All of it twice: with a daemon that is root, and gives its rights up before a run, and with one that never had any.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

from tests.adapters.daemons import DAEMON, NOBODY, ROOT, as_daemon
from tests.adapters.escapes import ESCAPES
from tests.adapters.execution_bench import Bench, needs_bubblewrap
from tests.cli.netns import ip, possible

pytestmark = [needs_bubblewrap, pytest.mark.slow]

NETWORK: Final = f"10.213.{os.getpid() % 254 + 1}"
_SERVER: Final = r"""
import os, selectors, socket, sys
ready = selectors.DefaultSelector()
anywhere = socket.create_server(("", 0))
named = socket.socket(socket.AF_UNIX)
named.bind(sys.argv[1])
os.chmod(sys.argv[1], 0o777)
abstract = socket.socket(socket.AF_UNIX)
abstract.bind("\0" + sys.argv[2])
for each in (anywhere, named, abstract):
    each.listen()
    ready.register(each, selectors.EVENT_READ)
print(anywhere.getsockname()[1], flush=True)
while True:
    for key, _ in ready.select():
        with key.fileobj.accept()[0] as client:
            client.sendall(b"escaped\n")
"""


# --- the ways out, one by one


class Ground(NamedTuple):
    """What there is to be reached on this machine, as words for the scripts."""

    words: dict[str, str]


@pytest.fixture(scope="module")
def ground() -> Iterator[Ground]:
    """Files, processes and sockets of this machine that a run has no business with."""
    public = Path(tempfile.mkdtemp(prefix="clawnet-escapes-", dir="/var/tmp"))
    public.chmod(0o755)
    (public / "drop").mkdir()
    (public / "drop").chmod(0o777)
    (public / "file").write_text("escaped\n")
    (public / "secret").write_text("escaped\n")
    (public / "secret").chmod(0o600)
    words = {
        "public": str(public),
        "file": str(public / "file"),
        "secret": str(public / "secret"),
        "abstract": f"clawnet-escapes-{os.getpid()}",
        "setuid": f"/usr/local/bin/clawnet-escape-{os.getpid()}",
        "far": "127.0.0.1",
        "mark": "CLAWNET_ESCAPE_MARK",
    }
    become: Any = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if ROOT else {}
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, public)
        victim = stack.enter_context(_ended(subprocess.Popen(["sleep", "600"], **become)))
        words["victim"] = str(victim.pid)
        words["port"] = stack.enter_context(_server([], public / "socket", words["abstract"]))
        words["far_port"] = words["port"]
        if ROOT:
            shutil.copy("/usr/bin/id", words["setuid"])
            stack.callback(Path(words["setuid"]).unlink)
            Path(words["setuid"]).chmod(0o4755)
        if not possible():
            words["far"] = stack.enter_context(_network(words["abstract"]))
            prefix = ["ip", "netns", "exec", words["abstract"]]
            words["far_port"] = stack.enter_context(_server(prefix, public / "far", words["abstract"]))
        yield Ground(words)


@contextlib.contextmanager
def _ended(process: subprocess.Popen[Any]) -> Iterator[subprocess.Popen[Any]]:
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


@contextlib.contextmanager
def _server(prefix: list[str], path: Path, abstract: str) -> Iterator[str]:
    """The TCP port of a server that greets, also at a path and under an abstract name."""
    command = [*prefix, sys.executable, "-c", _SERVER, str(path), abstract]
    with _ended(subprocess.Popen(command, stdout=subprocess.PIPE)) as server:
        assert server.stdout is not None
        yield server.stdout.readline().decode().strip()


@contextlib.contextmanager
def _network(name: str) -> Iterator[str]:
    """The address of another machine, which is a network namespace with a cable to this one."""
    cable = f"cwe{os.getpid()}"[:15]
    ip("netns", "add", name)
    try:
        ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("addr", "add", f"{NETWORK}.1/30", "dev", cable)
        ip("-n", name, "addr", "add", f"{NETWORK}.2/30", "dev", "eth0")
        ip("link", "set", cable, "up")
        ip("-n", name, "link", "set", "eth0", "up")
        yield f"{NETWORK}.2"
    finally:
        ip("netns", "del", name)


@pytest.fixture(scope="module")
def tried(ground: Ground) -> Callable[[str], dict[str, tuple[bytes, bytes]]]:
    """For each daemon, once: what every way out said outside and inside."""
    known: dict[str, dict[str, tuple[bytes, bytes]]] = {}

    def of(daemon: str) -> dict[str, tuple[bytes, bytes]]:
        if daemon not in known:
            found = as_daemon(daemon, lambda bench: _try_all(bench, ground.words))
            for name, way in ESCAPES.items():
                if way.outside == "root" and ROOT:
                    found[name] = (_plain(_filled(way.script, ground.words)), found[name][1])
            known[daemon] = found
        return known[daemon]

    return of


async def _try_all(bench: Bench, words: dict[str, str]) -> dict[str, tuple[bytes, bytes]]:
    words = {**words, "home": str(bench.home.dir), "leaked": str(bench.public / "leaked")}
    (bench.home.dir / "keys").mkdir(mode=0o700)
    (bench.home.dir / "keys" / "node.key").write_text("escaped\n")
    (bench.home.dir / "keys" / "node.key").chmod(0o600)
    bench.home.run_dir.mkdir()
    keeper = subprocess.Popen(["sleep", "600"], env={"PATH": os.environ["PATH"], words["mark"]: "escaped"})
    words["keeper"] = str(keeper.pid)
    leaked = os.open(words["leaked"], os.O_RDWR | os.O_CREAT)
    os.set_inheritable(leaked, True)
    own = await asyncio.start_unix_server(_greet, bench.home.socket)
    found: dict[str, tuple[bytes, bytes]] = {}
    try:
        for name, way in ESCAPES.items():
            script = _filled(way.script, words)
            outside = b""
            if way.outside == "host":
                outside = (await bench.shell(script, "host")).stdout
            elif way.outside != "root":
                outside = await asyncio.to_thread(_plain, script, nobody=way.outside == "user" and os.getuid() == 0)
            found[name] = (outside, (await bench.shell(script)).stdout)
    finally:
        own.close()
        os.close(leaked)
        keeper.kill()
        keeper.wait()
    return found


async def _greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"escaped\n")
    writer.close()


def _filled(script: str, words: dict[str, str]) -> str:
    for word, value in words.items():
        script = script.replace("{" + word + "}", value)
    return script


def _plain(script: str, *, nobody: bool = False) -> bytes:
    """What a plain process of this user (or nobody's) says, with whatever descriptors this one lets it inherit."""
    become: Any = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if nobody else {}
    with tempfile.TemporaryDirectory() as directory:
        done = subprocess.run(
            ["sh", "-c", script], stdout=subprocess.PIPE, cwd=directory, close_fds=False, timeout=30, **become
        )
    return done.stdout


@DAEMON
@pytest.mark.parametrize("name", ESCAPES)
def test_there_is_no_way_out(daemon: str, name: str, tried: Callable[[str], Any]) -> None:
    if ESCAPES[name].outside == "root" and not ROOT:
        pytest.skip("open to root alone outside, too")
    outside, inside = tried(daemon)[name]
    assert b"escaped" in outside, "the way is open without the sandbox"
    assert b"escaped" not in inside
