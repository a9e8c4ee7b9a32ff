"""Membership given and taken away, with real daemons: removal, members that invite, CI runners, CLAWNET_JOIN."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from clawnet.identity.membership import load_mesh_key
from tests.cli.harness import Node, Nodes, alive, at_fixed_ports, connected, join, until

pytestmark = pytest.mark.slow

HERE = ("--peer", "self")


def balance(node: Node) -> str:
    return str(node.ask("wallet.balance")["available"])


def events(node: Node, name: str) -> list[dict[str, object]]:
    """What a daemon's security log says of one kind of event."""
    lines = [json.loads(line) for line in node.security_log.splitlines()]
    return [line for line in lines if line["event"] == name]


# --- removing


def test_a_member_is_removed_by_the_founder_alone_and_for_good(nodes: Nodes) -> None:
    # One after the other is killed: at another port each time, they would lose sight of each other.
    alice, bob, carol = at_fixed_ports(nodes, "alice", "bob", "carol")
    for node in (alice, bob, carol):
        node.until("sees all", lambda node=node: len(connected(node)) == 2)
    old = load_mesh_key(alice.home)
    bob("peer", "remove", "carol").failed(77, "founder", "alice")
    bob_id, bob_address = bob.peer_id, bob.ask("status")["listen"][0]
    found = alice("peer", "remove", "bob", "--json").json("peer remove")
    assert (found["removed"], found["key_epoch"], found["told"]) == ("owner", 1, 1)
    alice("peer", "remove", "bob").failed(65, "no member any longer")
    for node in (alice, carol):
        node.until("lost bob", lambda node=node: connected(node) == {"alice", "carol"} - {node.name})
        assert node.ask("peer.show", peer=bob_id)["state"] == "removed"
        node.until("says so", lambda node=node: events(node, "membership.revoked"))
    bob.until("is alone", lambda: connected(bob) == set())
    assert any("removed from the mesh" in text for text in bob.ask("status")["warnings"])
    carol.until("has the new key", lambda: events(carol, "mesh_key.rotated"))
    assert load_mesh_key(carol.home) == load_mesh_key(alice.home) != old
    assert load_mesh_key(bob.home) == old
    for node in (alice, carol):
        kept = node.home.old_mesh_key(0)
        assert kept.stat().st_mode & 0o777 == node.home.mesh_key.stat().st_mode & 0o777 == 0o600
    bob("peer", "connect", alice.ask("status")["listen"][0]).failed(69)
    bob("peer", "connect", carol.ask("status")["listen"][0]).failed(69)
    alice("peer", "connect", bob_address).failed(69)
    alice("run", "--peer", bob_id, "--", "true").failed(75)
    for node in (alice, carol, bob):
        node.kill()
        node.start()
        alice.until("meets carol", lambda: connected(alice) == {"carol"})
    assert load_mesh_key(alice.home) == load_mesh_key(carol.home) != old
    bob("peer", "connect", carol.ask("status")["listen"][0]).failed(69)
    assert connected(bob) == set()


def test_who_was_off_when_it_happened_learns_it_before_it_deals_with_the_removed_one(nodes: Nodes) -> None:
    alice, _, carol = nodes.mesh("alice", "bob", "carol")
    carol.kill()
    assert alice("peer", "remove", "bob").code == 0
    carol.start()
    carol.until("knows", lambda: events(carol, "membership.revoked"))
    carol.until("is with alice alone", lambda: connected(carol) == {"alice"})
    carol.until("has the key", lambda: load_mesh_key(carol.home) == load_mesh_key(alice.home))


# --- members that invite


def test_a_member_invites_another_and_pays_its_first_credits(nodes: Nodes) -> None:
    alice = nodes("alice", CLAWNET_MESH_MEMBERS_MAY_INVITE="true").start()
    bob, carol, dave = nodes("bob").start(), nodes("carol").start(), nodes("dave").start()
    join(alice, bob)
    bob.until("has its grant", lambda: balance(bob) == "1000")
    token = bob("peer", "invite", "--credits", "30").line
    assert carol("peer", "join", "-", stdin=token.encode()).code == 0
    carol.until("is paid", lambda: balance(carol) == "30")
    assert balance(bob) == "970"
    carol.until("meets both", lambda: connected(carol) == {"alice", "bob"})
    alice.until("meets it too", lambda: connected(alice) == {"bob", "carol"})
    assert alice.ask("peer.show", peer="carol")["inviter"] == bob.peer_id
    carol("peer", "invite").failed(77, "founder")
    bob("peer", "invite", "--credits", "971").failed(79, "970")
    assert dave("peer", "join", token).code == 77, "a token is used once"
    found = alice("peer", "remove", "bob", "--json").json("peer remove")
    assert [one["name"] for one in found["kept"]] == ["carol"]
    alice.until("bob is out", lambda: connected(alice) == {"carol"})
    again = bob("peer", "invite")
    refused = dave("peer", "join", "-", stdin=again.out.encode())
    assert refused.code != 0


def test_without_the_founders_leave_no_member_invites(nodes: Nodes) -> None:
    _, bob = nodes.mesh("alice", "bob")
    bob("peer", "invite").failed(77, "members_may_invite")


# --- tokens that are none


def test_tokens_that_are_malformed_foreign_or_spent_are_told_apart(nodes: Nodes) -> None:
    alice, bob = nodes("alice").start(), nodes("bob").start()
    token = alice("peer", "invite").line
    bob("peer", "join", "hello").failed(65, "clawnet1")
    bob("peer", "join", token[:-9]).failed(65, "checksum")
    bob("peer", "join", token[:40] + ("A" if token[40] != "A" else "B") + token[41:]).failed(65, "checksum")
    bob("peer", "join", "clawnet2" + token[8:]).failed(65)
    own = bob("peer", "invite").line
    bob("peer", "join", own).failed(77, "member of that mesh already")
    assert bob("peer", "join", token).code == 77, "it has given an invite: that is a history"
    carol = nodes("carol").start()
    brief = alice("peer", "invite", "--expires", "1s").line
    over_s = time.time() + 1.1
    until("it has expired", lambda: time.time() > over_s)
    carol("peer", "join", brief).failed(77, "expired")
    assert carol("peer", "join", token).code == 0
    dave = nodes("dave").start()
    dave("peer", "join", token).failed(77, "has been used")
    until("it is on record", lambda: events(alice, "join.refused"))


# --- throw-away members


def runner_of(nodes: Nodes, name: str, token: str) -> Node:
    return nodes(name, CLAWNET_JOIN=token)


def test_a_runner_joins_by_itself_works_pays_and_leaves(nodes: Nodes) -> None:
    alice, bob = nodes.mesh("alice", "bob")
    before = float(balance(alice))
    made = alice("peer", "invite", "--ephemeral", "--uses", "2", "--credits", "20", "--expires", "7d", "--json").json(
        "peer invite"
    )
    assert (made["ephemeral"], made["uses"], made["credits"]) == (True, 2, "20")
    runner = runner_of(nodes, "runner", made["token"])
    runner.start()
    runner.until("has its credits", lambda: balance(runner) == "20")
    assert float(balance(alice)) == before - 20
    assert set(load_mesh_key(runner.home)) == {0}, "the mesh's key is not for it"
    secret = made["token"]
    for place in (runner.home.log_file, runner.home.dir / "run" / "daemon.out"):
        assert secret not in place.read_text()
    assert secret.encode() not in Path(f"/proc/{runner.pid}/environ").read_bytes()
    assert secret.encode() not in Path(f"/proc/{runner.pid}/cmdline").read_bytes()
    runner.until("meets bob", lambda: "bob" in connected(runner))
    pid = runner.pid
    left = runner("daemon", "stop", "--leave", "--json").json("daemon stop")["left"]
    assert (left["returned"], left["accepted"], left["kept"], left["bound"]) == ("20", True, "0", "0")
    assert not alive(pid)
    alice.until("has it back", lambda: float(balance(alice)) == before)
    for node in (alice, bob):
        node.until("it is out", lambda node=node: "runner" not in connected(node))
        assert "runner" not in {peer["name"] for peer in node.ask("peer.list")["items"]}
    runner.environ.pop("CLAWNET_JOIN")
    runner.start()
    assert any("it left the mesh" in text for text in runner.ask("status")["warnings"])
    runner("peer", "connect", alice.ask("status")["listen"][0]).failed(69)
    second = runner_of(nodes, "runner2", made["token"])
    assert second("run", *HERE, "--", "sh", "-c", "env; true").code == 0
    assert secret not in second("run", *HERE, "--", "env").out
    assert second.ask("status")["mesh"] == alice.ask("status")["mesh"]


def test_only_a_throw_away_member_can_leave(nodes: Nodes) -> None:
    alice, bob = nodes.mesh("alice", "bob")
    for node in (alice, bob):
        node("daemon", "stop", "--leave").failed(77, "throw-away")
        assert node.pid


def test_a_join_that_fails_leaves_no_node_in_a_mesh_of_its_own(nodes: Nodes) -> None:
    alice = nodes("alice").start()
    token = alice("peer", "invite", "--ephemeral").line
    first = runner_of(nodes, "first", token).start()
    second = runner_of(nodes, "second", token)
    second("daemon", "start").failed(77, "CLAWNET_JOIN", "has been used")
    assert not second.pid
    second("run", "--", "true").failed(77, "has been used")
    assert not second.pid
    fresh = alice("peer", "invite", "--ephemeral").line
    assert second("run", *HERE, "--", "true", CLAWNET_JOIN=fresh).code == 0
    second.until("is a member", lambda: "alice" in connected(second))
    second("daemon", "start", CLAWNET_JOIN="not a token")
    assert first.pid and second.pid


def test_a_daemon_in_the_foreground_joins_too(nodes: Nodes) -> None:
    alice = nodes("alice").start()
    token = alice("peer", "invite", "--ephemeral").line
    runner = runner_of(nodes, "runner", token)
    with runner.popen("daemon", "run") as process:
        until("it joins", lambda: runner.pid and "alice" in connected(runner))
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(30) == 0
    other = runner_of(nodes, "other", token)
    with other.popen("daemon", "run") as process:
        assert process.wait(60) == 77
        assert b"has been used" in process.stderr.read()


# --- bans and names


def test_a_ban_lasts_over_restarts_until_it_is_lifted(nodes: Nodes) -> None:
    alice, bob = nodes.mesh("alice", "bob")
    assert alice("peer", "ban", "bob").code == 0
    alice.until("bob is gone", lambda: connected(alice) == set())
    alice.kill()
    alice.start()
    assert alice.ask("peer.show", peer="bob")["state"] == "banned"
    bob("peer", "connect", alice.ask("status")["listen"][0]).failed(69)
    assert events(alice, "peer.banned")
    assert alice("peer", "unban", "bob").code == 0
    alice.kill()
    alice.start()
    assert bob("peer", "connect", alice.ask("status")["listen"][0]).code == 0


def test_a_second_alice_is_shown_as_such_for_ever(nodes: Nodes) -> None:
    alice, first = nodes.mesh("alice", "bob")
    second = nodes("bob2", CLAWNET_NODE_NAME="bob").start()
    join(alice, second)
    alice.until("sees both", lambda: connected(alice) == {"bob", "bob~2"})
    first.kill()
    alice.kill()
    alice.start()
    alice.until("sees the second", lambda: connected(alice) == {"bob~2"})
    first.start()
    assert first("peer", "connect", alice.ask("status")["listen"][0]).code == 0
    alice.until("sees both again", lambda: connected(alice) == {"bob", "bob~2"})
    assert alice.ask("peer.show", peer="bob")["peer_id"] == first.peer_id
