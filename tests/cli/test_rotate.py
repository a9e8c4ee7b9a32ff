"""`clawnet identity rotate` on real nodes: tasks go on, peers follow, files hold the new key, a crash leaves one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from clawnet.handover import begin
from clawnet.identity.keys import KeyPair
from tests.cli.harness import Gate, Node, Nodes, connected, until
from tests.cli.test_market_run import ABROAD

pytestmark = pytest.mark.slow


def rotate(node: Node) -> dict[str, object]:
    """The answer of the command, as programs read it."""
    done: dict[str, object] = node("identity", "rotate", "--json").json("identity rotate")
    return done


def seen(node: Node, name: str) -> dict[str, object]:
    found: dict[str, object] = node.ask("peer.show", peer=name)
    return found


def test_a_key_changes_while_tasks_run() -> None:
    nodes = Nodes()
    try:
        alice, bob, carol = nodes.mesh("alice", "bob", "carol")
        assert alice("run", "--peer", "bob", *ABROAD, "--", "true").code == 0
        before = seen(alice, "bob")
        held = bob("wallet", "balance").line
        gate = Gate()
        waits = ["sh", "-c", gate.script + "echo done"]
        # One of bob's own tasks runs at carol, one of alice's at bob, while bob changes his key.
        with (
            alice.popen("run", "--peer", "bob", *ABROAD, "--", *waits) as to_bob,
            bob.popen("run", "--peer", "carol", *ABROAD, "--", *waits) as to_carol,
        ):
            until("both run", lambda: bob.ask("status")["runs"] == 1 and carol.ask("status")["runs"] == 1)
            answer = rotate(bob)
            assert answer["previous"] == before["peer_id"] and answer["told"] == 2
            assert bob.peer_id == answer["peer_id"] != before["peer_id"]
            for node in (alice, carol):
                node.until("bob is followed", lambda node=node: "bob" in connected(node))
                assert seen(node, "bob")["peer_id"] == bob.peer_id
            gate.open(2)
            for process in (to_bob, to_carol):
                out, err = process.communicate(timeout=60)
                assert (process.returncode, out) == (0, b"done\n"), err
        after = seen(alice, "bob")
        for name in ("name", "ring", "account", "owner", "inviter"):
            assert after[name] == before[name], name
        assert (before["notes"], after["notes"]) == (["1 settled"], ["2 settled"]), "its record goes on"
        assert float(bob("wallet", "balance").line) != float(held), "it earned and it spent, on one account"
        assert bob("identity", "show", "--json").json("identity show")["account"] == before["account"]
        assert alice("wallet", "audit", "bob").code == 0
        assert alice("run", "--peer", str(before["peer_id"]), *ABROAD, "--", "echo", "hi").line == "hi"
        assert bob("daemon", "restart").code == 0
        bob.until("sees all", lambda: connected(bob) == {"alice", "carol"})
        assert bob.peer_id == answer["peer_id"]
    finally:
        nodes.close()


def test_the_old_home_is_refused_and_its_owner_keeps_the_chain() -> None:
    nodes = Nodes()
    try:
        alice, bob = nodes.mesh("alice", "bob")
        assert bob("daemon", "stop").code == 0
        stolen = nodes("stolen")
        shutil.copytree(bob.dir, stolen.dir)
        # Without a daemon the command starts one; alice hears of it by the HELLO alone.
        answer = rotate(bob)
        alice.until("bob is followed", lambda: "bob" in connected(alice))
        assert seen(alice, "bob")["peer_id"] == answer["peer_id"]
        stolen.start()
        alice.until("the old key was refused", lambda: "that key was given up" in alice.log)
        assert not connected(stolen)
        assert seen(alice, "bob")["peer_id"] == answer["peer_id"]
        assert alice("wallet", "audit").code == 0, "nobody is convicted"
        assert "bob" in connected(alice)
        assert bob("wallet", "send", "alice", "1").code == 0
    finally:
        nodes.close()


def test_backups_exports_and_invites_after_it(tmp_path: Path) -> None:
    nodes = Nodes()
    try:
        alice, bob = nodes.mesh("alice", "bob")
        token = alice("peer", "invite").line
        words = tmp_path / "words"
        words.write_text("a long enough passphrase\n")
        words.chmod(0o600)
        assert rotate(alice)["invites_void"] == 1
        assert rotate(bob)["rotations"] == 1
        bob.until("alice is followed", lambda: "alice" in connected(bob))
        for command, file in ((("wallet", "backup"), "wallet"), (("identity", "export"), "identity")):
            assert bob(*command, str(tmp_path / file), "--passphrase-file", str(words)).code == 0
        dave = nodes("dave").start()
        dave("peer", "join", "-", stdin=token.encode()).failed(69, "has changed its key", "ask for a new token")
        fresh = alice("peer", "invite").line
        assert dave("peer", "join", "-", stdin=fresh.encode()).code == 0
        identity = bob.peer_id
        assert bob("daemon", "stop").code == 0
        restored, imported = nodes("restored"), nodes("imported")
        assert restored("wallet", "restore", str(tmp_path / "wallet"), "--passphrase-file", str(words)).code == 0
        assert imported("identity", "import", str(tmp_path / "identity"), "--passphrase-file", str(words)).code == 0
        for node in (restored, imported):
            node.start()
            assert node.peer_id == identity
            if node is imported:  # of whom it knew nothing came with the keys
                assert node("peer", "connect", alice.ask("status")["listen"][0]).code == 0
            node.until("alice knows it", lambda node=node: "alice" in connected(node))
            node.until("its chain is whole", lambda node=node: node.ask("wallet.balance")["read_only"] is None)
            assert node("wallet", "send", "alice", "1").code == 0
            assert node("daemon", "stop").code == 0
    finally:
        nodes.close()


@pytest.mark.parametrize("torn", [False, True])
def test_a_home_between_two_keys_is_settled_at_the_next_start(torn: bool) -> None:
    nodes = Nodes()
    try:
        _, bob = nodes.mesh("alice", "bob")
        if torn:
            # The chain went over, the key file did not: as a crash between the two leaves it.
            key = KeyPair.load(bob.home.node_key)
            local = bob.home.mesh_file.read_bytes()
            answer = rotate(bob)
            new = KeyPair.load(bob.home.node_key)
            assert answer["peer_id"] == new.peer_id
            assert not bob.home.next_node_key.exists()
            bob.kill()
            new.save(bob.home.next_node_key)
            key.save(bob.home.node_key)
            bob.home.mesh_file.write_bytes(local)
            expected = new.peer_id
        else:
            expected = bob.peer_id
            bob.kill()
            begin(bob.home, lambda count: bytes([7]) * count)
        assert bob("identity", "show", "--json").json("identity show")["peer_id"] == expected
        bob.start()
        assert bob.peer_id == expected
        assert not bob.home.next_node_key.exists()
        bob.until("alice admits it", lambda: "alice" in connected(bob))
    finally:
        nodes.close()
