"""What leaves a machine: a relay between two daemons records ciphertext only, and the loser's files know nothing."""

from __future__ import annotations

import base64
import contextlib
import os
import secrets
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from clawnet.identity import invite
from tests.cli.harness import PATIENCE_S, Node, Nodes, connected, join

pytestmark = pytest.mark.slow


class Relay:
    """Forwards connections to a port and keeps every byte of both directions."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._server = socket.create_server(("127.0.0.1", 0))
        self._server.settimeout(0.1)
        self.port: int = self._server.getsockname()[1]
        self.seen: list[bytearray] = []
        self._open: list[socket.socket] = []
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while not self._over.is_set():
            try:
                near, _ = self._server.accept()
            except TimeoutError:
                continue
            far = socket.create_connection(("127.0.0.1", self._to))
            self._open += [near, far]
            for source, target in ((near, far), (far, near)):
                record = bytearray()
                self.seen.append(record)
                thread = threading.Thread(target=self._pump, args=(source, target, record))
                self._threads.append(thread)
                thread.start()

    @staticmethod
    def _pump(source: socket.socket, target: socket.socket, record: bytearray) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                record += data
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    @property
    def recorded(self) -> bytes:
        """All that went through so far."""
        return b"\n".join(bytes(record) for record in self.seen)

    def close(self) -> None:
        """Ends every connection and waits for the threads."""
        self._over.set()
        for connection in self._open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()
        for connection in (self._server, *self._open):
            connection.close()


@pytest.fixture
def relays() -> Iterator[list[Relay]]:
    """Relays that a test opens; they are closed after it."""
    opened: list[Relay] = []
    yield opened
    for relay in opened:
        relay.close()


def port_of(node: Node) -> int:
    """The port a node listens at on the loopback."""
    (address,) = {text for text in node.ask("status")["listen"] if "/ip4/127.0.0.1/" in text}
    return int(address.split("/")[4])


def join_through(relay: Relay, founder: Node, newcomer: Node) -> None:
    """An invite whose addresses are the relay's, redeemed; the connection that stays goes through the relay too."""
    token = invite.decode(founder("peer", "invite").line)
    there = f"/ip4/127.0.0.1/tcp/{relay.port}"
    bent = msgspec.structs.replace(token, addresses=(there,))
    joined = newcomer("peer", "join", "-", stdin=bent.encode().encode())
    assert joined.code == 0, joined.err
    newcomer.until("knows the founder", lambda: connected(newcomer))
    (peer,) = newcomer.ask("peer.list")["items"]
    if f"/tcp/{relay.port}" not in peer["address"]:
        newcomer.ask("peer.disconnect", peer=peer["peer_id"])
        founder.until("is alone", lambda: newcomer.name not in connected(founder))
        newcomer.ask("peer.connect", address=f"{there}/p2p/{founder.peer_id}")
    (peer,) = newcomer.ask("peer.list")["items"]
    assert f"/tcp/{relay.port}" in peer["address"]


def traces(data: bytes, marker: str) -> list[str]:
    """In which spellings a marker occurs in data."""
    plain = marker.encode()
    spellings = {"plain": plain, "utf-16": marker.encode("utf-16-le"), "hex": plain.hex().encode()}
    for shift in range(3):
        # The middle of the base64 text is the same whatever stands around it, for each of three alignments.
        spellings[f"base64+{shift}"] = base64.b64encode(bytes(shift) + plain)[4:-4]
    return [name for name, spelling in spellings.items() if spelling in data]


def files_of(directory: Path) -> bytes:
    """Every byte in every file below a directory: database, its log, blobs, logs."""
    return b"\n".join(path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file())


def test_a_relay_and_the_loser_see_no_word_of_a_task(nodes: Nodes, relays: list[Relay], tmp_path: Path) -> None:
    alice, bob = nodes("alice").start(), nodes("bob").start()
    carol = nodes("carol", CLAWNET_MARKET_RATES_TASK="5").start()
    if bob.ask("status")["shell"]["member"] != "sandboxed":
        pytest.skip("bubblewrap not installed")
    relays.append(Relay(port_of(alice)))
    join_through(relays[0], alice, bob)
    join(alice, carol)
    alice.until("sees both", lambda: connected(alice) == {"bob", "carol"})
    markers = {name: f"{name}-{secrets.token_hex(16)}" for name in ("prompt", "argv", "env", "file", "stdin", "name")}
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / markers["name"]).write_text(markers["file"] * 3 + "\n")
    (tree / "bulk").write_bytes(os.urandom(300_000))
    script = 'echo "$1 $SECRET"; cat; cat tree/*-*; ls tree'
    abroad = ("--ring", "member", "--prefer", "market")
    spec = {
        "type": "shell",
        "description": markers["prompt"],
        "argv": ["sh", "-c", script, "sh", markers["argv"]],
        "env": {"SECRET": markers["env"]},
        "stdin_b64": base64.b64encode(markers["stdin"].encode()).decode(),
        "inputs": [{"name": "tree", "path": str(tree)}],
        "ring": "member",
        "prefer": "market",
    }
    task = alice.reaches(alice.ask("task.submit", spec=spec)["task_id"], "settled")
    assert (task["executor"]["name"], task["bids"], task["result"]["exit_code"]) == ("bob", 2, 0)
    for name in ("argv", "env", "stdin", "file", "name"):
        assert markers[name] in task["result"]["stdout"]
    asked = alice("market", "submit", "--type", "prompt", markers["prompt"], *abroad, "--wait")
    assert asked.code == 75
    # The relay was on the way: its record begins as libp2p connections do, and holds at least the incompressible bulk.
    recorded = relays[0].recorded
    assert b"/multistream/1.0.0" in recorded and b"/noise" in recorded
    assert len(recorded) > 300_000
    assert {name: found for name, marker in markers.items() if (found := traces(recorded, marker))} == {}
    # The loser has nothing on disk; that the search would find it is seen at the requester.
    assert "plain" in traces(files_of(alice.dir), markers["argv"])
    assert {name: found for name, marker in markers.items() if (found := traces(files_of(carol.dir), marker))} == {}
    # Nobody's logs tell, not even the winner's.
    logs = b"".join(files_of(node.home.logs_dir) for node in (alice, bob, carol))
    assert {name: found for name, marker in markers.items() if (found := traces(logs, marker))} == {}
