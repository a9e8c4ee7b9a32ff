"""The laws that are asked of the whole mesh: at any moment, when nothing is owed any more, and of every disk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from clawnet import limits
from clawnet.identity import keys
from clawnet.ledger.audit import audit_chains
from clawnet.market.records import FINAL_STATES, Task, decode_job, decode_task, encode
from tests.node.meshruns import Entropy
from tests.world.clock import LawBroken
from tests.world.liars import PAY_THEIR_DUE

if TYPE_CHECKING:
    from tests.world.machine import Machine
    from tests.world.world import World


SOON_MS = 90_000
REPLAYED_MAX = 200
"""Of a larger mesh so many disks, drawn by lot, are read into a new node at the end."""


def now(world: World) -> None:
    """What holds at every moment."""
    there, granted = world.referee.conservation()
    if there != granted:
        raise LawBroken(f"credits: {there} ucr are there, {granted} were granted")
    for machine in world.honest:
        if machine.up:
            _bounds(machine)
            _book(machine)
            _expired(machine)
            _standing(machine)
    for machine in world.rng.sample(world.honest, min(3, len(world.honest))):
        if machine.up and machine.runtime.resting is None:
            replay(machine)


def _bounds(machine: Machine) -> None:
    rooms = machine.node.rooms
    lines = len(rooms.books.book.open_lines(machine.key.public))
    for what, count, most in (
        ("stimuli that wait", machine.runtime.backlog, limits.INBOX_MAX),
        ("open tasks", len(rooms.tasks.open), limits.OPEN_TASKS_MAX),
        ("open lines", lines, limits.OPEN_LINES_MAX),
        ("runs", len(machine.executor.runs), machine.world.slots + limits.SHORT_RUNS_MAX),
        ("rows in the outbox", len(rooms.outbox.rows), 4 * (len(rooms.tasks.open) + len(rooms.jobs.jobs)) + 512),
    ):
        if count > most:
            raise LawBroken(f"{machine.name} has {count} {what}; {most} is the limit")


def _expired(machine: Machine) -> None:
    """In peace a line ends soon after its expiry, whether its payee is there or not."""
    world = machine.world
    started_us = max(machine.since_us, world.peace_us)
    if not world.peace_us or world.clock.now_us < started_us + SOON_MS * 1000 or machine.node.rooms.members.clock_off():
        return
    for place, line in world.referee.chains[machine.key.public].lines.items():
        late_ms = machine.now_ms() - line.expiry_ms
        if line.left_ucr and late_ms > SOON_MS:
            raise LawBroken(f"{machine.name}: line {place} is still open {late_ms / 1000:.0f} s after its expiry")


def _book(machine: Machine) -> None:
    book = machine.node.rooms.books.book
    if not book.conservation().conserved:
        raise LawBroken(f"{machine.name}'s book does not add up: {book.conservation()}")


def _standing(machine: Machine) -> None:
    """Nobody's lie condemns an honest account, in no honest book."""
    book, world = machine.node.rooms.books.book, machine.world
    for account in book.condemned():
        if account not in world.referee.liars:
            raise LawBroken(f"{machine.name} holds honest {world.name_of(account)} for condemned: {book.view(account)}")


# --- the disk


_FLEETING = ("heard_ms", "pulls", "updated_ms", "card", "refusals", "backoff_ms", "stage")
"""Fields that may run ahead of their row: they only time what is repeated anyway after a start."""


def _plain(record: Any) -> dict[str, Any]:
    fields = {name: getattr(record, name) for name in record.__struct_fields__ if name not in _FLEETING}
    if isinstance(record, Task):
        fields["attempts"] = [_plain(attempt) for attempt in record.attempts]
    return fields


def _differences(kept: dict[str, Any], live: dict[str, Any]) -> str:
    odd: dict[str, Any] = {}
    for name in live:
        one, other = kept.get(name), live[name]
        if name == "attempts" and isinstance(one, list) and len(one) == len(other):
            odd[name] = [_differences(*pair) for pair in zip(one, other, strict=True)]
        elif one != other:
            odd[name] = f"{one!r:.80} / {other!r:.80}"
    return str(odd)


def replay(machine: Machine) -> None:
    """A node made from this disk knows what the running one knows, wherever a turn has just ended."""
    node, disk = machine.node, machine.disk
    rooms = node.rooms
    for row in disk.query("tasks_open"):
        if row[0] not in rooms.tasks.open:
            raise LawBroken(f"{machine.name}: open task {row[0].hex()[:8]} is on the disk, not in memory")
    for task_id, task in rooms.tasks.open.items():
        held = disk.tables["tasks"].get((task_id,))
        if held is None or _plain(decode_task(held[-1])) != _plain(decode_task(encode(task))):
            odd = _differences(_plain(decode_task(held[-1])) if held is not None else {}, _plain(task))
            raise LawBroken(f"{machine.name}: task {task_id.hex()[:8]} on the disk and in memory: {odd}")
    on_disk = {row[0]: decode_job(row[-1]) for row in disk.query("jobs_open")}
    if on_disk.keys() != rooms.jobs.jobs.keys():
        apart = {job.hex()[:8] for job in on_disk.keys() ^ rooms.jobs.jobs.keys()}
        raise LawBroken(f"{machine.name}: jobs {apart} are either on the disk or in memory")
    for job, kept in on_disk.items():
        if _plain(kept) != _plain(rooms.jobs.jobs[job]):
            odd = _differences(_plain(kept), _plain(rooms.jobs.jobs[job]))
            raise LawBroken(f"{machine.name}: job {job.hex()[:8]} on the disk and in memory: {odd}")
    if {key[0] for key in disk.tables["outbox"]} != set(rooms.outbox.rows):
        raise LawBroken(f"{machine.name}: the outbox on the disk is not the one in memory")
    _replay_book(machine)


def _replay_book(machine: Machine) -> None:
    again, _ = machine.make_node(machine.disk.twin(), Entropy("replay"))
    book, other = machine.node.rooms.books.book, again.rooms.books.book
    accounts = set(book.accounts()) | set(other.accounts())
    for account in sorted(accounts):
        mine, theirs = book.view(account), other.view(account)
        if account == machine.key.public and theirs.seq > mine.seq:
            continue  # the new node has at once written what the old one still gathers
        if mine != theirs or book.state_bytes(account) != other.state_bytes(account):
            raise LawBroken(f"{machine.name}: account {account.hex()[:8]} replays to {theirs}; memory has {mine}")


# --- the end


def quiet(world: World) -> bool:
    """Nothing is owed anywhere."""
    for machine in world.honest:
        if not machine.up or machine.executor.runs or any(_owed(machine)):
            return False
        if machine.node.rooms.books.purse.read_only_reason:
            return False
    return not world.referee.line_ends()


def end(world: World) -> None:
    """Once the faults have ended and time has passed."""
    now(world)
    if not world.liars:
        _audit(world)
    for machine in world.honest:
        _nothing_owed(machine)
        _tasks(world, machine)
    for machine in world.rng.sample(world.honest, min(REPLAYED_MAX, len(world.honest))):
        replay(machine)
    for what in (world.referee.line_ends(), world.referee.unclaimed()):
        if what:
            raise LawBroken("; ".join(what[:5]))


def _owed(machine: Machine) -> Iterator[str]:
    """What this machine still owes, or is owed, by members that keep their word in the end."""
    rooms, world = machine.node.rooms, machine.world
    faithless = {peer for peer, liar in world.liars.items() if liar.name not in PAY_THEIR_DUE}
    for task in rooms.tasks.open.values():
        held = {attempt.peer for attempt in task.attempts if not attempt.closed}
        if task.state not in FINAL_STATES or not held or held - faithless:
            states = [(a.n, a.state, a.escrow, a.closed, a.reason) for a in task.attempts]
            yield f"task {task.task_id.hex()[:8]} is still {task.state}: {states}"
    for job in rooms.jobs.jobs.values():
        if job.peer not in world.liars:
            yield f"job {job.job.hex()[:8]} is still {job.state}"
    for row in rooms.outbox.rows.values():
        if row.peer not in world.liars:
            to = world.names.get(row.peer)
            yield f"the outbox still holds {row.kind.name} for {to} about {row.about.hex()}"


def _nothing_owed(machine: Machine) -> None:
    rooms = machine.node.rooms
    for what in _owed(machine):
        raise LawBroken(f"{machine.name}: {what}")
    view = rooms.books.book.view(machine.key.public)
    chain = machine.world.referee.chains[machine.key.public]
    own = (view.seq + 1, view.available_ucr + view.void_ucr)
    if own != (len(chain.hashes), chain.available_ucr) or (view.refuse and not view.void_ucr):
        raise LawBroken(f"{machine.name}: its own chain is {view}; the referee has {chain.available_ucr}")
    if rooms.books.purse.read_only_reason or rooms.books.chains.checking:
        raise LawBroken(f"{machine.name} may not write its chain: {rooms.books.purse.read_only_reason}")


def _tasks(world: World, machine: Machine) -> None:
    """Every accepted task is final; what was settled at a price was paid and claimed once, and nothing else was."""
    tasks = {row[0].hex(): decode_task(row[-1]) for row in machine.disk.load_all("tasks")}
    for (peer, task_id), wish in world.client.accepted.items():
        if peer == machine.peer:
            task = tasks.get(task_id)
            if task is None and machine.may_have_lost(wish.accepted_us):
                continue
            if task is None or task.state not in FINAL_STATES:
                raise LawBroken(f"{machine.name}: accepted task {wish.mark} is {task and task.state}")
    chain = world.referee.chains[machine.key.public]
    claimed = {pay.line for pay in chain.payments.values() if pay.line is not None and pay.claimed}
    for task in tasks.values():
        lines = [(a.lock_seq, a.line) for a in task.attempts if a.lock_seq >= 0]
        paid = [line for line in lines if line in claimed]
        if any(attempt.peer in world.liars for attempt in task.attempts):
            _beside_a_liar(machine, task, [line for line in lines if chain.lines[line].released_ucr])
            continue
        free = any(a.lock_seq < 0 and a.state == "done" for a in task.attempts)
        name = f"{machine.name}: task {task.task_id.hex()[:8]} ({task.state})"
        if task.error_code == "verification_failed":
            _unaccepted(name, task, paid)
            continue
        if task.state == "settled" and not free and len(paid) != 1:
            raise LawBroken(f"{name} was settled, and {len(paid)} of its lines were paid")
        if len(paid) > 1 or (paid and task.result is None):
            raise LawBroken(f"{name} paid {len(paid)} lines and has {'a' if task.result else 'no'} result")
        if task.spec["accept"] and task.result is not None and task.result["exit_code"]:
            raise LawBroken(f"{name} was accepted with exit code {task.result['exit_code']}")
        spent = sum(chain.lines[line].released_ucr for line in paid)
        if spent > task.max_budget_ucr:
            raise LawBroken(f"{name} cost {spent}, its budget is {task.max_budget_ucr}")


def _unaccepted(name: str, task: Task, paid: list[tuple[int, int]]) -> None:
    """What honest executors found not to pass the contract was not delivered, and not paid."""
    if task.state != "failed" or not task.spec["accept"] or not task.attempts[-1].report:
        raise LawBroken(f"{name}: the result of an honest executor is refused: {task.error_text}")
    if paid or task.result is not None:
        raise LawBroken(f"{name} failed its contract, paid {len(paid)} lines and has {task.result and 'a'} result")


def _beside_a_liar(machine: Machine, task: Task, released: list[tuple[int, int]]) -> None:
    """A liar costs its requester one line at most, and none that it delivered nothing for."""
    name = f"{machine.name}: task {task.task_id.hex()[:8]} ({task.state}), which a liar had"
    if len(released) > 1:
        raise LawBroken(f"{name}, paid {len(released)} lines")
    spent = sum(machine.world.referee.chains[machine.key.public].lines[line].released_ucr for line in released)
    if spent > task.max_budget_ucr:
        raise LawBroken(f"{name}, cost {spent}; its budget is {task.max_budget_ucr}")
    if (
        task.result is not None
        and task.state == "settled"
        and not released
        and all(a.lock_seq >= 0 for a in task.attempts)
    ):
        raise LawBroken(f"{name}, was settled and paid nobody")


def _audit(world: World) -> None:
    """The product's own full audit, from genesis with every signature, over what all authors have written."""
    node = world.machines[0].node
    chains = {account: chain.raws for account, chain in world.referee.chains.items()}
    report = audit_chains(node.rooms.books.terms, node.rooms.books.mesh, chains, keys.verify)
    if not report.sound:
        raise LawBroken(f"the audit of all chains: {report.problems[:3]}, conserved: {report.conserved}")
