"""`clawnet market` on three real nodes: every command in its three forms, ids cut short, keys, and every refusal."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path

import pytest

from clawnet.answers import ANSWERS
from tests.cli.harness import Done, Node, checked, processes_with, until
from tests.cli.test_market_run import ABROAD

pytestmark = pytest.mark.slow


def submit(node: Node, *arguments: str) -> str:
    """A task's id."""
    return node("market", "submit", *arguments).line


@contextlib.contextmanager
def busy(node: Node) -> Iterator[str]:
    """A task that runs on another machine until it is cancelled."""
    task = submit(node, "--type", "shell", *ABROAD, f"echo begun; sleep 600; : {os.urandom(6).hex()}")
    try:
        node.reaches(task, "executing")
        yield task
    finally:
        node("market", "cancel", task)
        node.reaches(task, "cancelled")


# --- the way of a task


def test_a_task_from_submit_to_why(alice: Node) -> None:
    submitted = alice("market", "submit", "--type", "shell", *ABROAD, "--json", "echo out; echo err >&2; exit 3")
    task = submitted.json("market submit")["task_id"]
    assert alice("market", "wait", task).code == 3
    waited = alice("market", "wait", task, "--json")
    assert waited.json("market wait")["items"][0]["task_id"] == task
    done = alice("market", "result", task)
    assert (done.code, done.out, done.err) == (3, "out\n", "err\n")
    result = alice("market", "result", task, "--json").json("market result")["result"]
    assert (result["stdout"], result["stderr"], result["exit_code"]) == ("out\n", "err\n", 3)
    logs = alice("market", "logs", task)
    assert (logs.code, logs.out, logs.err) == (0, "out\n", "err\n")
    assert alice("market", "logs", "-f", task).out == "out\n"
    shown = alice("market", "show", task, "--json").json("market show")
    settled = alice.reaches(task, "settled")
    assert settled["escrow"]["state"] in ("released", "claimed")
    assert shown["ring"] == "member"
    assert alice("market", "status", task).line == "settled"
    assert checked(alice("market", "status", task, "--json").json("market status"))["state"] == "settled"
    bids = alice("market", "bids", task, "--json").json("market bids")["items"]
    assert len(bids) == 2 == shown["bids"]
    assert [bid["won"] for bid in sorted(bids, key=lambda bid: -bid["score"])] == [True, False]
    for bid in bids:
        assert bid["score"] == pytest.approx(sum(bid["terms"].values()))
    assert len(alice("market", "bids", task).rows()) == 2
    why = alice("market", "why", task, "--json").json("market why")
    assert [peer["answer"] for auction in why["rounds"] for peer in auction["peers"]] == ["bid", "bid"]
    assert "won" in alice("market", "why", task).line


def test_lists_hold_what_is_open_and_what_has_ended(alice: Node) -> None:
    with busy(alice) as task:
        rows = alice("market", "list").rows()
        assert [row[0] for row in rows] == [task]
        assert task in [item["task_id"] for item in alice("market", "list", "--json").json("market list")["items"]]
        assert alice("market", "status", task).line == "executing"
        counts = dict(alice("market", "status").rows())
        assert counts["executing"] == "1"
        assert alice("market", "logs", task).out == "begun\n"
        alice("market", "result", task).failed(66, "has no result yet", "executing")
    assert alice("market", "list").out == ""
    assert alice("market", "history").rows()[0][0] == task
    first = alice("market", "history", "--limit", "1", "--json").json("market history")
    assert first["items"][0]["state"] == "cancelled"
    assert len(first["items"]) == 1


def test_a_cancelled_task_is_81_for_whoever_waits(alice: Node) -> None:
    with busy(alice) as task, ThreadPoolExecutor() as pool:
        waiting = pool.submit(alice, "market", "wait", task)
        cancelled = alice("market", "cancel", task, "--reason", "no longer wanted", "--json")
        assert cancelled.json("market cancel")["task_id"] == task
        assert waiting.result().code == 81
        assert alice("market", "result", task).code == 81
        assert "no longer wanted" in json.dumps(alice.reaches(task, "cancelled"))
        marker = alice.task(task)["description"].rpartition(" ")[2]
        until("it is gone", lambda: not processes_with(marker))
    assert alice("market", "cancel", task).code in (0, 77)


def test_waiting_ends_with_its_timeout_and_the_task_goes_on(alice: Node) -> None:
    with busy(alice) as task:
        alice("market", "wait", task, "--timeout", "2s").failed(124, "not done in time")
        alice("market", "logs", "-f", task, "--timeout", "2s").failed(124, "goes on")
        assert alice("market", "status", task).line == "executing"


def test_submit_that_waits(alice: Node) -> None:
    done = alice("market", "submit", "--type", "shell", "--wait", "--stream", *ABROAD, "echo out; echo err >&2; exit 5")
    assert (done.code, done.out, done.err) == (5, "out\n", "err\n")
    done = alice("market", "submit", "--type", "compute", "--op", "wordcount", "--wait", *ABROAD, "one two two")
    assert done.code == 0
    assert done.out.split() == ["0", "3", "11"]
    late = alice("market", "submit", "--type", "shell", "--wait", "--timeout", "2s", *ABROAD, "sleep 600")
    late.failed(124, "goes on")
    task = alice("market", "list").rows()[0][0]
    assert alice("market", "cancel", task).code == 0
    alice.reaches(task, "cancelled")


def test_several_waited_for_at_once(alice: Node) -> None:
    good = [submit(alice, "--type", "shell", "exit 0"), submit(alice, "--type", "shell", "true")]
    bad = submit(alice, "--type", "shell", "exit 9")
    assert alice("market", "wait", *good).code == 0
    assert alice("market", "wait", *good, bad).code == 1
    assert [row[2] for row in alice("market", "wait", bad, *good).rows(1)] == ["9", "0", "0"]


def test_a_spec_file_runs_as_it_says(alice: Node, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("payload")
    spec = tmp_path / "task.yaml"
    spec.write_text(
        f"type: shell\nscript: cat data; echo $WORD; cat\nring: member\nprefer: market\nbudget: 2.5\ndeadline: 1m\n"
        f"env: {{WORD: xyzzy}}\nstdin: from stdin\ninputs: [{tmp_path / 'data'}]\n"
    )
    task = alice("market", "submit", "--wait", "--spec", str(spec), "--json").json("market result")
    assert task["result"]["stdout"] == "payloadxyzzy\nfrom stdin"
    assert task["max_budget"] == "2.5"
    piped = alice("run", "--spec", "-", stdin=b'{"argv": ["echo", "argv"], "ring": "own"}')
    assert piped.out == "argv\n"


# --- keys and prefixes


def test_one_key_is_one_task_whatever_process_asks(alice: Node) -> None:
    key = os.urandom(6).hex()
    arguments = ("market", "submit", "--json", "--type", "shell", "--idempotency-key", key)
    with ThreadPoolExecutor() as pool:
        answers = [done.json("market submit") for done in pool.map(lambda _: alice(*arguments, "echo one"), range(4))]
    assert len({answer["task_id"] for answer in answers}) == 1
    assert [answer["created"] for answer in answers].count(True) == 1
    alice.reaches(answers[0]["task_id"], "settled")
    again = alice("run", "--idempotency-key", key, "-n", "--", "echo", "other")
    again.failed(65, key)
    same = alice("market", "submit", "--wait", "--type", "shell", "--idempotency-key", key, "echo one")
    assert same.out == "one\n"
    shown = alice("market", "show", answers[0]["task_id"], "--json").json("market show")
    assert shown["idempotency_key"] == key


def test_ids_may_be_cut_short_where_that_is_clear(alice: Node) -> None:
    spec = {"type": "compute", "op": "sha256", "description": "x"}
    tasks = {alice.ask("task.submit", spec=spec)["task_id"] for _ in range(17)}
    for task in tasks:
        alice.reaches(task, "settled")
    firsts = [task[0] for task in tasks]
    shared = next(first for first in firsts if firsts.count(first) > 1)
    some = [task for task in tasks if task.startswith(shared)]
    alice("market", "show", shared).failed(66, *(task[:12] for task in some[:2]))
    assert alice("market", "status", some[0][:12]).line == "settled"
    assert alice("market", "status", some[0].upper()[:12]).line == "settled"
    for command in ("show", "status", "why", "bids", "result", "logs", "wait", "cancel"):
        alice("market", command, "f" * 32).failed(66, "no task")
        alice("market", command, "not-hex!").failed(65, "no task id")


# --- what is refused


def test_nobody_who_can_is_75_and_says_what_would_help(alice: Node) -> None:
    done = alice("run", "--json", "--require", "gpu:h100", *ABROAD, "--", "true")
    task = done.json("run")
    assert (done.code, task["state"], task["error"]["code"]) == (75, "no_bids", "no_bids")
    assert json.loads(done.err)["error"]["exit_code"] == 75
    why = alice("market", "why", task["task_id"])
    assert why.code == 0 and "no_capability" in why.out and "--require" in why.out
    alice("run", "--min-reputation", "0.99", "--exclude", "alice", *ABROAD, "--", "true").failed(75)
    alice("run", "--os", "windows", *ABROAD, "--", "true").failed(75)
    alice("run", "--budget", "0.000001", "--exclude", "alice", *ABROAD, "--", "true").failed(75)


def test_a_budget_above_the_balance_is_79(alice: Node) -> None:
    before = alice("wallet", "balance").line
    alice("run", "--budget", "1000000", *ABROAD, "--", "true").failed(79, "1000000")
    alice("market", "submit", "--type", "shell", "--budget", "1000000", *ABROAD, "true").failed(79)
    assert alice("wallet", "balance").line == before
    assert alice("run", "--budget", "1000000", "--ring", "own", "--", "true").code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["run", "--budget", "ten", "--", "true"], 65, "--budget"),
        (["run", "--budget", "-1", "--", "true"], 65, "--budget"),
        (["run", "--budget", "1.2345678", "--", "true"], 65, "--budget"),
        (["run", "--budget", "1e99", "--", "true"], 65, "--budget"),
        (["run", "--deadline", "soon", "--", "true"], 65, "--deadline"),
        (["run", "--deadline", "0s", "--", "true"], 65, "deadline"),
        (["run", "--deadline", "99999d", "--", "true"], 65, "deadline"),
        (["run", "--timeout", "-5s", "--", "true"], 65, "--timeout"),
        (["run", "--bid-timeout", "1", "--", "true"], 65, "--bid-timeout"),
        (["run", "--memory", "lots", "--", "true"], 65, "--memory"),
        (["run", "--env", "NOVALUE", "--", "true"], 65, "--env"),
        (["run", "--input", "/no/such/file", "--", "true"], 66, "/no/such/file"),
        (["run", "--ring", "stranger", "--", "true"], 64, "ring"),
        (["run", "--ring", "everyone", "--", "true"], 64, "everyone"),
        (["run", "--prefer", "home", "--", "true"], 64, "prefer"),
        (["run", "--min-reputation", "2", "--", "true"], 65, "reputation"),
        (["run", "--min-reputation", "much", "--", "true"], 64, "--min-reputation"),
        (["run", "--retries", "-1", "--", "true"], 65, "retries"),
        (["run", "--peer", "nobody-of-this-name", "--", "true"], 66, "nobody-of-this-name"),
        (["run", "--exclude", "nobody-of-this-name", "--", "true"], 66, "nobody-of-this-name"),
        (["run", "--os", "beos", "--", "true"], 64, "beos"),
        (["run", "--spec", "/no/such/file"], 66, "/no/such/file"),
        (["run", "--status-file", "/no/such/dir/x", "--", "true"], 65, "/no/such/dir/x"),
        (["run"], 64, "no command"),
        (["run", "--frobnicate", "--", "true"], 64, "--frobnicate"),
        (["run", "--attach", "00", "--", "true"], 64, "--attach"),
        (["market", "submit", "--type", "shell"], 64, "nothing to do"),
        (["market", "submit", "--type", "magic", "x"], 64, "magic"),
        (["market", "submit", "--type", "swarm", "x"], 64, "later version"),
        (["market", "submit", "--type", "compute", "--op", "launder", "x"], 65, "launder"),
        (["market", "submit", "--type", "compute", "x"], 64, "op"),
        (["market", "submit", "--stream", "x"], 64, "--wait"),
        (["market", "frobnicate"], 64, "frobnicate"),
        (["market", "list", "--limit", "0"], 64, "--limit"),
        (["market", "wait"], 64, "TASK"),
        (["wallet", "send", "bob", "1,5"], 65, "1,5"),
        (["wallet", "send", "bob", "0"], 65, "0"),
        (["wallet", "send", "bob", "-3"], 64, "-3"),
        (["wallet", "send", "nobody", "1"], 66, "nobody"),
        (["wallet", "send", "alice", "1"], 65, "this node itself"),
        (["wallet", "send", "bob", "999999"], 79, "999999"),
        (["peer", "show", "nobody"], 66, "nobody"),
        (["peer", "connect", "nonsense"], 65, "multiaddr"),
        (["peer", "connect", "/ip4/1.2.3.4"], 65, "/ip4/1.2.3.4"),
        (["peer", "connect", "/ip4/1.2.3.400/tcp/1"], 65, "1.2.3.400"),
        (["peer", "connect", "/ip4/127.0.0.1/tcp/4002"], 65, "p2p"),
        (["peer", "connect", "/ip4/127.0.0.1/tcp/99999/p2p/x"], 65, "99999"),
        (["peer", "connect", "/ip4/127.0.0.1/tcp/1/p2p/12D3KooW"], 65, "12D3KooW"),
        (["peer", "invite", "--ring", "everyone"], 64, "everyone"),
        (["peer", "invite", "--expires", "tomorrow"], 65, "--expires"),
        (["peer", "invite", "--uses", "0"], 64, "--uses"),
        (["peer", "invite", "--ring", "own", "--uses", "2"], 64, "once"),
        (["peer", "invite", "--credits", "100000000"], 65, "--credits"),
        (["peer", "invite", "--credits", "much"], 65, "--credits"),
        (["peer", "join", "nonsense"], 65, "clawnet1"),
        (["peer", "join", "clawnet1nonsense"], 65, ""),
        (["peer", "join"], 64, "no token"),
        (["peer", "ping", "bob", "--count", "0"], 64, "--count"),
        (["config", "set", "market.bid_timeuot", "3s"], 66, "market.bid_timeout"),
        (["frobnicate"], 64, "frobnicate"),
        (["--no-such-flag"], 64, "--no-such-flag"),
        (["--no-autostart", "--home", "/tmp/clawnet-there-is-none", "wallet", "balance"], 69, "no daemon"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_be_is_said_with_its_code(alice: Node, arguments: list[str], code: int, said: str) -> None:
    alice(*arguments).failed(code, said)


def test_a_refusal_as_json_is_an_object_with_its_code(alice: Node) -> None:
    for code, arguments in ((79, ["wallet", "send", "bob", "999999"]), (66, ["market", "show", "f" * 32])):
        said = json.loads(alice(*arguments, "--json").failed(code).err)
        assert checked(said, ANSWERS["error"])["error"]["exit_code"] == code


def test_a_task_nobody_is_allowed_to_take(alice: Node) -> None:
    bob = alice.ask("peer.show", peer="bob")["peer_id"]
    task = alice("run", "--json", "--peer", "bob", *ABROAD, "--", "true").json("run")
    assert task["executor"]["peer_id"] == bob
    task = alice("run", "--json", "--exclude", bob[:16], *ABROAD, "--", "true").json("run")
    assert task["executor"]["name"] == "carol"
    done: Done = alice("run", "--exclude", "bob", "--exclude", "carol", "--exclude", "alice", *ABROAD, "--", "true")
    done.failed(75)


def test_prices_are_paid_and_the_sums_stay(mesh: list[Node], alice: Node) -> None:
    before = [Decimal(node("wallet", "balance").line) for node in mesh]
    task = alice("run", "--json", *ABROAD, "--", "true").json("run")
    price = Decimal(task["price"])
    executor = next(node for node in mesh if node.name == task["executor"]["name"])
    assert price > 0
    executor.until(
        "is paid", lambda: Decimal(executor("wallet", "balance").line) == before[mesh.index(executor)] + price
    )
    assert Decimal(alice("wallet", "balance").line) == before[0] - price
