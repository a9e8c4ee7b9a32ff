"""Prompts between real daemons: one has an AI endpoint, another asks; what it costs, who sees what, what goes wrong."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest

from clawnet.execution import process
from tests.ai_server import AiServer, ai_server
from tests.cli.harness import Node, Nodes, connected, join
from tests.cli.test_market_secrecy import files_of, traces

pytestmark = pytest.mark.slow

TOKEN = "sk-Never-To-Be-Seen-0123456789"
PROMPT = "Summarize-prompt-marker-5417"
NOTES = "notes-marker-9923: the meeting is on Tuesday.\n"


@pytest.fixture
def server() -> Iterator[AiServer]:
    with ai_server("tiny-1", token=TOKEN) as running:
        yield running


def endpoint(server: AiServer, **more: str) -> dict[str, str]:
    """The environment of a node that serves prompts."""
    return {
        "CLAWNET_OPENCLAW_API_ENDPOINT": server.url,
        "CLAWNET_OPENCLAW_TOKEN": TOKEN,
        "CLAWNET_OPENCLAW_PROBE_INTERVAL": "200ms",
        **more,
    }


def serving(node: Node, *names: str) -> None:
    """Waits until a node sees that exactly these others answer prompts."""

    def look() -> bool:
        shown = [node.ask("peer.show", peer=peer["peer_id"]) for peer in node.ask("peer.list")["items"]]
        return {peer["name"] for peer in shown if "ai-inference" in peer["capabilities"]} == set(names)

    node.until(f"sees that {names} answer prompts", look)


def pair(nodes: Nodes, server: AiServer, **more: str) -> tuple[Node, Node]:
    """Alice, and Bob, a member with an endpoint."""
    alice, bob = nodes("alice").start(), nodes("bob", **endpoint(server, **more)).start()
    join(alice, bob)
    serving(alice, "bob")
    return alice, bob


def funds(node: Node) -> Decimal:
    return Decimal(node.ask("wallet.balance")["available"])


def test_the_first_command_on_a_fresh_home_says_what_to_do(nodes: Nodes) -> None:
    alice = nodes("alice")
    done = alice("market", "submit", "hello")
    assert len(done.out.strip()) == 32
    done.failed(75, "no acceptable bid", "--type shell", "clawnet config set openclaw.api_endpoint")
    alice("market", "submit", "hello", "--wait").failed(75, "--type shell", "clawnet config set openclaw.api_endpoint")
    with ai_server() as server:
        said = alice("config", "set", "openclaw.api_endpoint", server.url, "--json").json()
        assert (said["applied"], said["restart"]) == (["openclaw.api_endpoint"], [])
        alice.until("serves itself", lambda: "ai-inference" in alice.ask("status")["capabilities"])
        assert alice("market", "submit", "hello", "--wait").line == "an answer to 5 characters"
        assert alice("config", "set", "openclaw.enabled", "false").code == 0
        alice("market", "submit", "hello", "--wait").failed(75, "openclaw.api_endpoint")
        assert server.prompts == ["hello"]


def test_a_member_answers_is_paid_for_its_tokens_and_nobody_else_sees_a_word(nodes: Nodes, tmp_path: Path) -> None:
    with ai_server("tiny-1", token=TOKEN) as server, ai_server("tiny-1", token=TOKEN) as dearer:
        server.reply = lambda text: f"You asked: {text}"
        alice, bob = pair(nodes, server)
        carol = nodes("carol", **endpoint(dearer, CLAWNET_MARKET_RATES_TASK="5")).start()
        join(alice, carol)
        serving(alice, "bob", "carol")
        had = {node.name: funds(node) for node in (alice, bob, carol)}
        notes = NOTES.encode()
        done = alice("market", "submit", PROMPT, "--wait", "--verbose", stdin=notes)
        assert (done.code, done.out) == (0, f"You asked: {PROMPT}\n\n{NOTES}")
        assert "100 tokens in and 200 out, tiny-1" in done.err
        (task_id,) = (row[0] for row in alice("market", "history").rows())
        task = alice.task(task_id)
        assert (task["executor"]["name"], task["bids"], task["state"]) == ("bob", 2, "settled")
        usage = task["result"]["usage"]
        assert (usage["tokens_in"], usage["tokens_out"], usage["model"]) == (100, 200, "tiny-1")
        # The bid was a cap; what its tokens come to is paid, to the micro-credit, and the rest is free again.
        (opened,) = alice.ask("task.why", task=task_id)["rounds"]
        (bid,) = (peer["bid"] for peer in opened["peers"] if peer["peer"]["name"] == "bob")
        cap, paid = Decimal(bid["price"]), Decimal(task["price"])
        assert 2 < cap < Decimal("2.3")
        used = (1 + 0.1 * 0.1 + 0.3 * 0.2) / (1 + 0.3 * 4.096)
        assert float(paid / cap) == pytest.approx(used, rel=0.03)
        bob.until("is paid", lambda: funds(bob) == had["bob"] + paid)
        alice.until("has the rest back", lambda: funds(alice) == had["alice"] - paid)
        assert funds(carol) == had["carol"]
        assert alice.ask("wallet.escrows")["items"] == []
        # The loser's endpoint was never asked and its disk holds no word of it; the token is on nobody's.
        assert dearer.prompts == []
        for marker in (PROMPT, NOTES.strip()):
            assert traces(files_of(alice.dir), marker)
            assert not traces(files_of(carol.dir), marker)
        for node in (alice, bob, carol):
            assert not traces(files_of(node.dir), TOKEN)
            logs = files_of(node.home.logs_dir)
            assert not [m for m in (TOKEN, PROMPT, NOTES.strip()) if traces(logs, m)]
        told = bob("doctor", "--json").out + bob("config", "show").out + bob("daemon", "status", "--json").out
        assert TOKEN not in told + done.out + done.err


def test_what_is_offered_to_members_follows_the_endpoint_and_the_policy(nodes: Nodes, server: AiServer) -> None:
    alice, bob = pair(nodes, server)
    server.stop()
    serving(alice)
    alice("market", "submit", "hello", "--wait").failed(75, "no connected node serves prompts")
    at_home = ("market", "submit", "hello", "--wait", "--ring", "own")
    bob(*at_home).failed(75, "does not serve")
    # What it was asked just when it stopped ended in another way.
    bob.until("has asked it again", lambda: "cannot be reached" in bob(*at_home).err)
    (found,) = (f for f in bob("doctor", "--json").json()["findings"] if f["check"] == "ai endpoint")
    assert found["level"] == "warn" and found["remedy"]
    server.start()
    serving(alice, "bob")
    assert alice("market", "submit", "hello", "--wait", "--model", "tiny-1").code == 0
    alice("market", "submit", "hello", "--wait", "--model", "big-9").failed(75, "--model")
    assert bob("config", "set", "execution.prompt.member", "off").code == 0
    alice.until("is refused", lambda: alice("market", "submit", "hello", "--wait").code == 75)
    assert bob("market", "submit", "hello", "--wait").line == "an answer to 5 characters"


def test_a_failure_moves_the_prompt_to_another_and_costs_nothing(nodes: Nodes, server: AiServer) -> None:
    alice, bob = pair(nodes, server, CLAWNET_MARKET_RATES_TASK="0.1")
    with ai_server("tiny-1", token=TOKEN) as other:
        carol = nodes("carol", **endpoint(other)).start()
        join(alice, carol)
        serving(alice, "bob", "carol")
        had = {node.name: funds(node) for node in (alice, bob, carol)}
        server.mode = "500"
        server.error = {"message": f"bad token {TOKEN}"}
        done = alice("market", "submit", "hello", "--wait", "--json")
        task = done.json("market show")
        assert (done.code, task["executor"]["name"]) == (0, "carol")
        assert [(a["executor"]["name"], a["state"]) for a in task["attempts"]] == [("bob", "waived"), ("carol", "done")]
        alice.until("paid once", lambda: funds(alice) == had["alice"] - Decimal(task["price"]))
        assert funds(bob) == had["bob"]
        assert not traces(files_of(alice.dir), TOKEN)
        failing = alice("market", "submit", "hello", "--wait", "--peer", "bob", "--retries", "0")
        failing.failed(76, "the AI endpoint answered 500")
        assert TOKEN not in failing.err


def test_cancelling_a_prompt_closes_its_request_and_frees_the_money(nodes: Nodes, server: AiServer) -> None:
    alice, _ = pair(nodes, server)
    had = funds(alice)
    server.mode = "hang"
    task = alice("market", "submit", "hello").line
    assert server.asked.wait(40)
    assert funds(alice) < had
    assert alice("market", "cancel", task).code == 0
    assert server.hung_up.wait(40)
    alice.until("has it all back", lambda: funds(alice) == had)
    server.mode = "answer"
    assert alice("market", "submit", "hello", "--wait").code == 0


def test_a_worker_that_dies_while_it_asks_asks_once_more_and_is_paid_once(nodes: Nodes, server: AiServer) -> None:
    alice, bob = pair(nodes, server)
    had = {node.name: funds(node) for node in (alice, bob)}
    server.mode = "hang"
    task = alice("market", "submit", "hello").line
    assert server.asked.wait(40)
    bob.kill()
    server.mode = "answer"
    bob.start()
    done = alice.reaches(task, "settled")
    assert done["result"]["text"] == "an answer to 5 characters"
    bob.until("is paid", lambda: funds(bob) == had["bob"] + Decimal(done["price"]))
    alice.until("paid once", lambda: funds(alice) == had["alice"] - Decimal(done["price"]))


def test_prompts_wait_for_a_slot_of_their_own_and_hold_up_nothing_else(nodes: Nodes, server: AiServer) -> None:
    alice, _ = pair(nodes, server, CLAWNET_EXECUTION_PROMPT_SLOTS="1", CLAWNET_EXECUTION_SLOTS="1")
    server.mode = "hang"
    first = alice("market", "submit", "first").line
    assert server.asked.wait(40)
    second = alice("market", "submit", "second").line
    alice.reaches(second, "awarded", "executing")
    abroad = ("--ring", "member", "--prefer", "market", "--wait")
    assert alice("market", "submit", "--type", "compute", "--op", "sha256", "x", *abroad).code == 0
    assert server.prompts == ["first"]
    server.mode = "answer"
    assert alice("market", "cancel", first).code == 0
    assert alice("market", "wait", second).code == 0
    assert server.prompts == ["first", "second"]


def test_what_is_no_prompt_is_refused_before_anything_is_sent(nodes: Nodes, tmp_path: Path) -> None:
    alice = nodes("alice").start()
    alice("market", "submit", "what is this", stdin=b"\xff\xfe\x00").failed(65, "not")
    alice("market", "submit", "what is this", stdin=b"zero\0byte").failed(65, "not text")
    (tmp_path / "notes").write_text("x")
    alice("market", "submit", "read", "--input", str(tmp_path / "notes")).failed(64, "--input", "standard input")
    alice("market", "submit", "read", "--env", "A=b").failed(64, "--env")
    alice("market", "submit", "  ").failed(64)
    assert alice.ask("task.list", states=[], limit=10)["items"] == []


def test_a_token_that_cannot_be_kept_is_refused_with_the_remedy(nodes: Nodes, tmp_path: Path) -> None:
    alice = nodes("alice")
    assert alice("init").code == 0
    token = tmp_path / "token"
    token.write_text(TOKEN + "\n")
    token.chmod(0o644)
    settings = ("openclaw.api_endpoint", "https://example.org/v1", "openclaw.token_file", str(token))
    alice("config", "set", *settings).failed(78, f"chmod 600 {token}")
    token.chmod(0o600)
    assert alice("config", "set", *settings).code == 0
    token.chmod(0o644)
    checked = alice("config", "check")
    assert checked.code == 78 and f"chmod 600 {token}" in checked.out and TOKEN not in checked.out
    alice("daemon", "start").failed(78, "chmod 600")
    token.chmod(0o600)
    assert alice("config", "check").code == 0
    alice("config", "set", "openclaw.api_endpoint", "http://192.0.2.7:8080").failed(78, "unencrypted", "https://")
    assert alice("config", "get", "openclaw.api_endpoint").line == "https://example.org/v1"
    open_air = alice("config", "check", CLAWNET_OPENCLAW_API_ENDPOINT="http://192.0.2.7:8080")
    assert open_air.code == 78 and "unencrypted" in open_air.out
    alice("config", "set", "openclaw.api_endpoint", "http://user:pw@example.org").failed(78, "openclaw.api_endpoint")
    alice("config", "set", "openclaw.enable_streaming", "true").failed(78, "come whole")
    refused = alice("config", "check", CLAWNET_OPENCLAW_TOKEN="two words")
    assert refused.code == 78 and "two words" not in refused.out


def test_the_token_of_a_file_is_taken_up_by_a_reload(nodes: Nodes, server: AiServer, tmp_path: Path) -> None:
    alice = nodes("alice").start()
    token = tmp_path / "token"
    token.write_text(TOKEN + "\n")
    token.chmod(0o600)
    assert alice("config", "set", "openclaw.api_endpoint", server.url).code == 0
    alice.until("is refused", lambda: "401" in alice("doctor").out)
    assert alice("config", "set", "openclaw.token_file", str(token)).code == 0
    alice.until("serves", lambda: "ai-inference" in alice.ask("status")["capabilities"])
    assert alice("market", "submit", "hello", "--wait").code == 0
    assert connected(alice) == set()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux")
def test_no_child_of_the_daemon_is_given_the_token_and_a_reload_keeps_it(nodes: Nodes, server: AiServer) -> None:
    alice = nodes("alice", **endpoint(server)).start()
    alice.until("serves itself", lambda: "ai-inference" in alice.ask("status")["capabilities"])
    children = process.tree(alice.pid, 50)[1:]
    assert children, "the worker is a child"
    for pid in children:
        assert TOKEN.encode() not in Path(f"/proc/{pid}/environ").read_bytes()
    assert alice("config", "set", "openclaw.max_tokens", "77", "--json").json()["restart"] == []
    assert alice("market", "submit", "hello", "--wait").code == 0
