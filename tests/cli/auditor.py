"""An auditor from outside: reads the databases of a mesh at rest, read-only, and holds them against the laws.

It shares the ledger's decoder and the records' with the product; sums, lines, payments and claims are the referee's own
(tests/world/referee.py), as in the simulated world.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterable
from contextlib import closing
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

from msgspec import Struct

from clawnet.identity.certificates import read_charter
from clawnet.identity.keys import KeyPair, verify
from clawnet.identity.membership import load_membership
from clawnet.ledger.audit import audit_chains
from clawnet.ledger.entries import Claim, parse
from clawnet.ledger.terms import LedgerTerms
from clawnet.market.records import FINAL_STATES, JOB_FINAL, Job, Task, decode_job, decode_task
from clawnet.paths import Home
from tests.world.clock import LawBroken
from tests.world.referee import Chain, Referee


class Disk(Struct):
    """What one node's database holds."""

    name: str
    account: bytes
    peer: str
    integrity: str
    entries: dict[bytes, list[tuple[int, bytes, bytes]]]
    tasks: dict[str, Task]
    jobs: list[Job]
    outbox: int
    proofs: int
    unsettled: int
    grants: int
    ended_ms: dict[str, int]
    """When each task got into a final state first."""

    @classmethod
    def read(cls, name: str, home: Home) -> Disk:
        """Opens the database read-only, whether or not its daemon runs."""
        key = KeyPair.load(home.node_key)
        with closing(sqlite3.connect(f"file:{home.database}?mode=ro", uri=True)) as database:
            database.execute("BEGIN")  # one moment for all tables
            entries: dict[bytes, list[tuple[int, bytes, bytes]]] = {}
            for account, seq, entry_hash, raw in database.execute("SELECT * FROM entries ORDER BY account, seq"):
                entries.setdefault(account, []).append((seq, entry_hash, raw))

            def count(table: str) -> int:
                return int(database.execute(f"SELECT count(*) FROM {table}").fetchone()[0])

            return cls(
                name,
                key.public,
                key.peer_id,
                "; ".join(row[0] for row in database.execute("PRAGMA integrity_check")),
                entries,
                {row[0].hex(): decode_task(row[1]) for row in database.execute("SELECT task_id, body FROM tasks")},
                [decode_job(row[0]) for row in database.execute("SELECT body FROM jobs")],
                count("outbox"),
                count("proofs"),
                count("unsettled"),
                count("blob_grants"),
                {
                    task_id.hex(): at_ms
                    for task_id, at_ms in database.execute(
                        "SELECT task_id, MIN(at_ms) FROM transitions"
                        f" WHERE state IN ({', '.join(map(repr, sorted(FINAL_STATES)))}) GROUP BY task_id"
                    )
                },
            )


class Accepted(Struct):
    """A task that a client was told to be taken."""

    key: str
    disk: str
    task: str
    kind: str
    retries: int
    sha256: str
    cancelled: bool


class Verdict(Struct):
    """What the laws say: nothing in `broken` when they hold."""

    broken: list[str]
    settled: int = 0
    states: dict[str, int] = {}
    lost: int = 0
    credits_off: str = "0"
    duplicates: int = 0
    entries: int = 0


def judge(disks: list[Disk], homes: list[Home], accepted: Iterable[Accepted], marks: Path) -> Verdict:
    """Every law on every disk of a mesh at rest."""
    verdict = Verdict([])
    try:
        referee = _chains(disks, verdict)
    except LawBroken as broken:
        verdict.broken.append(str(broken))
        return verdict
    there, granted = referee.conservation()
    verdict.credits_off = str(there - granted)
    if there != granted:
        verdict.broken.append(f"credits: {there} ucr are there, {granted} were granted")
    verdict.broken += referee.line_ends() + referee.unclaimed()
    verdict.broken += _audited(homes[0], referee)
    for disk in disks:
        verdict.broken += [f"{disk.name}: {text}" for text in _at_rest(disk)]
        verdict.broken += [f"{disk.name}: {text}" for text in _paid(disk, referee.chains[disk.account])]
        verdict.broken += [f"{disk.name}: {text}" for text in _worked(disk, referee)]
    _judge_tasks(disks, list(accepted), verdict)
    _judge_starts(disks, marks, verdict)
    verdict.entries = referee.entries_total
    return verdict


def _chains(disks: list[Disk], verdict: Verdict) -> Referee:
    """All own chains side by side, then everybody's copies of the others'."""
    referee = Referee({disk.account: disk.name for disk in disks})
    left = {disk.account: list(reversed(disk.entries.get(disk.account, []))) for disk in disks}
    moved = True
    while moved:
        moved = False
        for account, rows in left.items():
            while rows and _payments_known(referee, rows[-1][2]):
                seq, entry_hash, raw = rows.pop()
                referee.saw(account, account, seq, entry_hash, raw, True)
                moved = True
    for account, rows in left.items():
        if rows:
            raise LawBroken(f"entry {rows[-1][0]} of {referee.names[account]} claims what its payer never wrote")
    for disk in disks:
        for account, entries in disk.entries.items():
            for seq, entry_hash, raw in entries:
                referee.saw(disk.account, account, seq, entry_hash, raw, True)
    return referee


def _payments_known(referee: Referee, raw: bytes) -> bool:
    body = parse(raw).body
    if not isinstance(body, Claim):
        return True
    chains = referee.chains
    return all(item.payer in chains and item.seq < len(chains[item.payer].hashes) for item in body.items)


def _audited(home: Home, referee: Referee) -> list[str]:
    """The product's own full audit, from genesis with every signature."""
    charter, mesh = read_charter(load_membership(home).charter)
    chains = {account: chain.raws for account, chain in referee.chains.items()}
    report = audit_chains(LedgerTerms.of(charter), mesh, chains, verify)
    return [] if report.sound else [f"the audit of all chains: {report.problems[:3]}, conserved: {report.conserved}"]


def _at_rest(disk: Disk) -> Iterable[str]:
    """Nothing is owed, nothing is open, the file is whole."""
    if disk.integrity != "ok":
        yield f"integrity_check says {disk.integrity}"
    for what in ("outbox", "proofs", "unsettled"):
        if getattr(disk, what):
            yield f"{getattr(disk, what)} rows in {what}"
    for task in disk.tasks.values():
        if task.state not in FINAL_STATES or not all(attempt.closed for attempt in task.attempts):
            yield f"task {story(task)} is not over"
    for job in disk.jobs:
        if job.state not in JOB_FINAL:
            yield f"job {job.job.hex()[:8]} is still {job.state}"


def story(task: Task) -> str:
    """A task in a line."""
    attempts = [(a.n, a.peer[-6:], a.state, a.escrow, a.reason) for a in task.attempts]
    return f"{task.task_id.hex()[:8]} {task.kind} {task.state} {task.error_code} {task.error_text} {attempts}"


def _paid(disk: Disk, chain: Chain) -> Iterable[str]:
    """What was settled at a price was paid and claimed once; nothing else was."""
    claimed = {pay.line for pay in chain.payments.values() if pay.line is not None and pay.claimed}
    for task in disk.tasks.values():
        lines = [(a.lock_seq, a.line) for a in task.attempts if a.lock_seq >= 0]
        paid = [line for line in lines if line in claimed]
        claimed.difference_update(paid)
        free = any(a.lock_seq < 0 and a.state == "done" for a in task.attempts)
        if task.error_code == "verification_failed":
            yield f"the result of an honest executor does not open: {story(task)}"
        if len(paid) > 1 or (task.state == "settled" and not free and len(paid) != 1):
            yield f"{len(paid)} lines paid of {story(task)}"
        if paid and task.result is None:
            yield f"paid, and no result: {story(task)}"
        if sum(chain.lines[line].released_ucr for line in paid) > task.max_budget_ucr:
            yield f"over its budget of {task.max_budget_ucr}: {story(task)}"
    if claimed:
        yield f"lines {sorted(claimed)} were paid for no task"


def _worked(disk: Disk, referee: Referee) -> Iterable[str]:
    """An executor is paid exactly for what it delivered and the requester took."""
    for job in disk.jobs:
        if job.lock_seq < 0 or job.state not in JOB_FINAL:
            continue
        pays = [pay for pay in referee.chains[job.account].payments.values() if pay.line == (job.lock_seq, job.line)]
        claimed = [pay for pay in pays if pay.claimed and pay.payee == disk.account]
        if len(claimed) != (job.state == "done"):
            yield f"job {job.job.hex()[:8]} is {job.state} ({job.reason}) and was paid {len(claimed)} times"


def _judge_tasks(disks: list[Disk], accepted: list[Accepted], verdict: Verdict) -> None:
    by_name = {disk.name: disk for disk in disks}
    states: Counter[str] = Counter()
    for wish in accepted:
        task = by_name[wish.disk].tasks.get(wish.task)
        if task is None or task.state not in FINAL_STATES:
            verdict.lost += 1
            verdict.broken.append(f"{wish.disk}: accepted task {wish.task[:8]} is {task and task.state}")
            continue
        states[task.state] += 1
        if task.state == "cancelled" and not wish.cancelled:
            verdict.broken.append(f"{wish.disk}: nobody cancelled {story(task)}")
        if task.state == "settled":
            verdict.settled += 1
            wrong = _wrong_result(task, wish)
            if wrong:
                verdict.broken.append(f"{wish.disk}: {wrong}: {story(task)}")
    verdict.states = dict(states)
    for disk in disks:
        verdict.broken += _one_key_twice(disk, accepted)


def _one_key_twice(disk: Disk, accepted: Iterable[Accepted]) -> list[str]:
    """Tasks of one key that were open together, or the later of two of which the first has a result."""
    of_key: dict[str, list[Task]] = {}
    for wish in accepted:
        if wish.disk == disk.name and wish.task in disk.tasks:
            of_key.setdefault(wish.key, []).append(disk.tasks[wish.task])
    return [
        f"{disk.name}: {key} stands for {before.task_id.hex()[:8]} ({before.state}) and {after.task_id.hex()[:8]}"
        for key, tasks in of_key.items()
        for before, after in pairwise(sorted(tasks, key=lambda task: task.created_ms))
        if (before.state == "settled" and before.result is not None)
        or disk.ended_ms.get(before.task_id.hex(), after.created_ms + 1) > after.created_ms
    ]


def _wrong_result(task: Task, wish: Accepted) -> str:
    result: dict[str, Any] = task.result or {}
    if result.get("exit_code") != 0:
        return f"exit code {result.get('exit_code')}, signal {result.get('signal')}"
    told = result.get("stdout")
    if isinstance(told, bytes) and sha256(told).hexdigest() != wish.sha256:
        return f"its output is {told[:60]!r}"
    return ""


def _judge_starts(disks: list[Disk], marks: Path, verdict: Verdict) -> None:
    """A shell task with retries 0 began at most once: by the marks that runs left, and by the executors' own rows."""
    tasks: dict[str, list[Task]] = {}
    for disk in disks:
        for task in disk.tasks.values():
            tasks.setdefault(task.spec["idempotency_key"], []).append(task)
    for mark in marks.iterdir():
        of_key = tasks.get(mark.name, [])
        begun = mark.read_bytes().count(b"\n")
        allowed = sum(1 + task.spec["retries"] for task in of_key)
        if begun > allowed:
            verdict.duplicates += begun - allowed
            verdict.broken.append(f"{mark.name} began {begun} times: {[story(task) for task in of_key]}")
    for key, of_key in tasks.items():
        for task in of_key:
            marked = task.kind == "shell" and "echo run >>" in str(task.spec["script"] or task.spec["argv"])
            if task.state == "settled" and marked and not (marks / key).exists():
                verdict.broken.append(f"settled, and it never ran: {story(task)}")
    starts: Counter[bytes] = Counter()
    for disk in disks:
        for job in disk.jobs:
            starts[job.task_id] += job.starts
    for of_key in tasks.values():
        for task in of_key:
            if task.kind == "shell" and starts[task.task_id] > 1 + task.spec["retries"]:
                verdict.duplicates += 1
                verdict.broken.append(f"began {starts[task.task_id]} times by its executors' rows: {story(task)}")
