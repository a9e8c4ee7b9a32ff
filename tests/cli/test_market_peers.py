"""`clawnet peer` and `clawnet wallet` on real nodes: invites and their ends, rings, bans, payments and audits."""

from __future__ import annotations

import base64
import json
import os
from datetime import UTC, datetime
from decimal import Decimal

import pytest

from clawnet.identity.keys import KeyPair
from tests.cli.harness import Node, Nodes, answers, connected, free_port, join, until
from tests.cli.test_market_run import ABROAD

pytestmark = pytest.mark.slow


# --- looking


def test_peers_are_listed_shown_and_pinged(mesh: list[Node], alice: Node) -> None:
    listed = alice("peer", "list", "--json").json("peer list")["items"]
    assert {(peer["name"], peer["ring"], peer["state"]) for peer in listed} == {
        ("bob", "member", "connected"),
        ("carol", "member", "connected"),
    }
    assert {row[1] for row in alice("peer", "list").rows()} == {"bob", "carol"}
    bob = mesh[1].peer_id
    for name in ("bob", bob, bob[:20], bob[-8:]):
        assert alice("peer", "show", name, "--json").json("peer show")["peer_id"] == bob, name
    ping = alice("peer", "ping", "bob", "-c", "3", "--json").json("peer ping")
    assert (ping["sent"], ping["received"], len(ping["rtts_s"])) == (3, 3, 3)
    assert len(alice("peer", "ping", "bob", "-c", "2").line.split("\t")) == 2
    alice("peer", "show", "12D3KooW").failed(66, "bob", "carol")
    reputation = alice("peer", "reputation", "--json").json("peer reputation")["items"]
    assert {one["peer"]["name"] for one in reputation} == {"bob", "carol"}
    assert len(alice("peer", "reputation", "bob").rows()) == 1


def test_disconnect_connect_ban_and_unban(mesh: list[Node], alice: Node) -> None:
    bob = mesh[1]
    address = bob.ask("status")["listen"][0]
    closed = alice.log.count("disconnected by the user")
    assert alice("peer", "disconnect", "bob", "--json").json("peer disconnect")["changed"]
    alice.until("the link was closed", lambda: alice.log.count("disconnected by the user") > closed)
    assert alice("peer", "connect", address, "--json").json("peer connect")["state"] == "connected"
    alice.until("bob is back", lambda: "bob" in connected(alice))
    try:
        assert alice("peer", "ban", "bob", "--json").json("peer ban")["changed"]
        assert alice("peer", "ban", "bob", "--json").json("peer ban")["changed"] is False
        alice.until("bob is gone", lambda: "bob" not in connected(alice))
        assert [peer["state"] for peer in alice.ask("peer.list")["items"] if peer["name"] == "bob"] == ["banned"]
        alice("peer", "ping", "bob").failed(69, "not connected")
        bob("peer", "connect", alice.ask("status")["listen"][0]).failed(69)
        task = alice("run", "--json", *ABROAD, "--", "true").json("run")
        assert task["executor"]["name"] == "carol"
        alice("run", *ABROAD, "--peer", "bob", "--", "true").failed(75, "banned")
        assert "bob" not in connected(alice)
    finally:
        assert alice("peer", "unban", "bob", "--json").json("peer unban")["changed"]
    assert alice("peer", "connect", address).code == 0
    bob.until("alice is back", lambda: "alice" in connected(bob))
    alice("run", "--peer", "bob", "--", "true").failed(75, "bob is a member, and --ring own")
    task = alice("run", "--json", *ABROAD, "--peer", "bob", "--", "true").json("run")
    assert task["executor"]["name"] == "bob", "whoever is allowed back is offered work again"


def test_what_cannot_be_reached_is_69(mesh: list[Node], alice: Node) -> None:
    nobody = KeyPair.generate(os.urandom).peer_id
    alice("peer", "connect", f"/ip4/127.0.0.1/tcp/{free_port()}/p2p/{nobody}").failed(69, "cannot connect")
    # Somebody else than the one named answers there.
    carol = mesh[2].ask("status")["listen"][0].rpartition("/")[0]
    alice("peer", "connect", f"{carol}/{nobody}").failed(69, "cannot connect")


# --- invites


@pytest.fixture
def dora(nodes: Nodes) -> Node:
    """A started node of a mesh of its own."""
    return nodes("dora").start()


def test_tokens_that_are_not_accepted(mesh: list[Node], alice: Node, dora: Node, nodes: Nodes) -> None:
    expiring = alice("peer", "invite", "--expires", "1s", "--json").json("peer invite")
    token = alice("peer", "invite", "--json").json("peer invite")["token"]
    middle = len(token) // 2
    other = "A" if token[middle] != "A" else "B"
    for wrong in (token[:middle] + other + token[middle + 1 :], token[:-3], token[: len(token) // 3], token + "AA"):
        dora("peer", "join", wrong).failed(65)
    until("it has expired", lambda: datetime.now(UTC) > datetime.fromisoformat(expiring["expires_at"]))
    dora("peer", "join", expiring["token"]).failed(77, "expired")
    alice("peer", "join", token).failed(77, "member of that mesh already")
    mesh[1]("peer", "join", "-", stdin=token.encode()).failed(77)
    used = alice("peer", "invite").line
    erin = nodes("erin").start()
    assert erin("peer", "join", "-", stdin=used.encode()).code == 0
    dora("peer", "join", used).failed(77, "has been used")
    # A founder who does not answer: nobody else can redeem the token.
    gone = nodes("gone").start()
    lost = gone("peer", "invite").line
    assert gone("daemon", "stop").code == 0
    dora("peer", "join", lost, "--timeout", "20s").failed(69, "must run")
    assert dora("wallet", "balance").line == "1000"
    assert connected(dora) == set()
    assert token not in dora.log + alice.log + dora.security_log + alice.security_log
    assert "join.refused" in alice.security_log
    erin("peer", "disconnect", "alice")
    assert answers([alice, dora, erin])


def test_an_invite_with_credits_and_several_uses(nodes: Nodes) -> None:
    founder = nodes("founder").start()
    token = founder("peer", "invite", "--uses", "2", "--credits", "12.5", "--json").json("peer invite")
    assert (token["uses"], token["credits"]) == (2, "12.5")
    for name in ("one", "two"):
        newcomer = nodes(name).start()
        assert newcomer("peer", "join", "-", "--json", stdin=token["token"].encode()).json("peer join")["peers"] >= 1
        newcomer.until("has its credits", lambda newcomer=newcomer: newcomer("wallet", "balance").line == "12.5")
    third = nodes("third").start()
    third("peer", "join", token["token"]).failed(77, "has been used")
    audit = founder.until("the books are complete", lambda: _audit(founder))
    assert len(audit["accounts"]) == 3


def _audit(node: Node) -> dict[str, object] | None:
    found: dict[str, object] = node("wallet", "audit", "--json").json("wallet audit")
    return found if found["complete"] else None


def test_a_home_with_a_history_leaves_only_on_purpose(mesh: list[Node], alice: Node, nodes: Nodes) -> None:
    founder, member = nodes.mesh("founder", "member")
    token = alice("peer", "invite", "--uses", "2").line
    founder("peer", "join", token).failed(77, "has a history", "--leave")
    member("peer", "join", token).failed(77, "has a history", "--leave")
    assert connected(member) == {"founder"}
    joined = member("peer", "join", token, "--leave", "--json").json("peer join")
    assert joined["mesh"] == alice.ask("status")["mesh"]
    member.until("meets the mesh", lambda: {"alice"} <= connected(member))
    # The mesh of one that every home begins with, and the one just left.
    kept = sorted(member.home.archive_dir.iterdir())
    assert len(kept) == 2
    assert {"clawnet.db", "mesh.json", "mesh.key"} <= {file.name for file in kept[1].iterdir()}
    assert member.home.owner_key.exists()
    assert member("run", *ABROAD, "--", "echo", "works").out == "works\n"
    pid = member.pid
    assert member("daemon", "restart").code == 0
    assert member.pid != pid
    member.until("meets the mesh", lambda: {"alice"} <= connected(member))


# --- a machine of one's own


def test_machines_of_one_owner_work_for_each_other_at_no_price(nodes: Nodes) -> None:
    first, second = nodes.mesh("first", "second", ring="own")
    for here, there in ((first, "second"), (second, "first")):
        assert [(peer["name"], peer["ring"]) for peer in here.ask("peer.list")["items"]] == [(there, "own")]
        task = here("run", "--json", "--peer", there, "--", "echo", "mine").json("run")
        assert (task["executor"]["name"], task["executor"]["ring"]) == (there, "own")
        assert (task["price"], task["escrow"]["state"]) == ("0", "none")
        assert task["result"]["stdout"] == "mine\n"
    assert first("wallet", "balance").line == "1000"
    assert Decimal(second("wallet", "balance").line) == 0
    assert not second.home.owner_key.exists()
    assert list(second.home.archive_dir.glob("*/owner.key"))
    second("peer", "invite").failed(77, "first")
    second("peer", "invite", "--ring", "own").failed(77, "first")
    third = nodes("third").start()
    join(first, third, ring="own")
    second.until("meets the third", lambda: "third" in connected(second))
    assert {peer["ring"] for peer in third.ask("peer.list")["items"]} == {"own"}


# --- the wallet


def test_credits_are_sent_and_told(mesh: list[Node], alice: Node) -> None:
    carol = mesh[2]
    before = Decimal(alice("wallet", "balance").line), Decimal(carol("wallet", "balance").line)
    sent = alice("wallet", "send", "carol", "2.25", "--memo", "for the coffee", "--json").json("wallet send")
    assert (sent["to"]["name"], sent["amount"]) == ("carol", "2.25")
    carol.until("is paid", lambda: Decimal(carol("wallet", "balance").line) == before[1] + Decimal("2.25"))
    assert alice("wallet", "send", "carol", "0.75").rows()[0][:2] == [carol.peer_id, "0.75"]
    carol.until("is paid", lambda: Decimal(carol("wallet", "balance").line) == before[1] + 3)
    balance = alice("wallet", "balance", "--json").json("wallet balance")
    assert Decimal(balance["available"]) == before[0] - 3
    history = alice("wallet", "history", "--limit", "2", "--json").json("wallet history")["items"]
    assert [(entry["amount"], entry["counterparty"]["name"]) for entry in history] == [
        ("-0.75", "carol"),
        ("-2.25", "carol"),
    ]
    assert len(alice("wallet", "history", "--limit", "2").rows()) == 2


def test_what_is_locked_is_shown_and_comes_back(mesh: list[Node], alice: Node) -> None:
    before = Decimal(alice("wallet", "balance").line)
    task = alice("market", "submit", "--type", "shell", "--budget", "5", *ABROAD, "sleep 600").line
    alice.reaches(task, "executing")
    lines = alice("wallet", "escrows", "--json").json("wallet escrows")["items"]
    mine = [line for line in lines if line["task_id"] == task]
    assert [(line["role"], line["state"]) for line in mine] == [("payer", "locked")]
    balance = alice("wallet", "balance", "--json").json("wallet balance")
    assert Decimal(balance["available"]) < before
    assert Decimal(balance["locked"]) > 0
    executor = next(node for node in mesh if node.name == alice.task(task)["executor"]["name"])
    theirs = executor("wallet", "escrows", "--json").json("wallet escrows")["items"]
    assert "payee" in {line["role"] for line in theirs}
    assert alice("market", "cancel", task).code == 0
    alice.reaches(task, "cancelled")
    alice.until("nothing is locked", lambda: alice("wallet", "escrows").out == "")
    spent = before - Decimal(alice("wallet", "balance").line)
    assert 0 <= spent <= 5


def test_everybody_finds_the_same_books(mesh: list[Node], alice: Node) -> None:
    assert alice("run", *ABROAD, "--", "true").code == 0
    totals = set()
    for node in mesh:
        audit = node.until("has every chain", lambda node=node: _audit(node))
        assert audit["ok"], audit
        totals.add(audit["granted"])
        assert all(one["ok"] for one in audit["accounts"])
    assert len(totals) == 1
    one = alice("wallet", "audit", "bob", "--json").json("wallet audit")
    assert [account["peer"]["name"] for account in one["accounts"]] == ["bob"]
    assert alice("wallet", "audit").code == 0


def test_a_token_tells_its_secret_to_nobody_but_its_reader(alice: Node) -> None:
    done = alice("peer", "invite", "-v")
    token = done.out.strip()
    assert token.startswith("clawnet1")
    assert "must be online" in done.err
    assert token not in done.err
    padded = token.removeprefix("clawnet1") + "=" * (-len(token.removeprefix("clawnet1")) % 4)
    assert b"alice" not in base64.urlsafe_b64decode(padded)
    assert json.loads(alice("peer", "invite", "--ring", "own", "--json").out)["ring"] == "own"
