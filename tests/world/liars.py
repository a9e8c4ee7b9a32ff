"""Members that lie: production nodes with one dishonest habit each, real keys, and a hand that signs anything.

`HABITS` names them. A habit is put on a node after each of its starts; what it forges is signed with the liar's own
key and told as messages that its node knows nothing of. Rows are those of LEDGER.md section 7 (docs/LEDGER.md).
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING, Any

import msgspec

from clawnet.ledger.entries import Body, Lock, LockLine, Refund, RefundItem, Release, ReleaseItem, Send, build, parse
from clawnet.wire.blobid import blob_id
from clawnet.wire.messages import (
    Accept,
    EscrowLock,
    Head,
    LedgerPull,
    LedgerPush,
    Message,
    PeerInfo,
    Progress,
    Reject,
    Settlement,
)

if TYPE_CHECKING:
    from tests.world.machine import Machine
    from tests.world.world import World

Sent = Callable[[str, list[Any]], list[Any]]
Habit = Callable[["Liar"], None]
HABITS: dict[str, Habit] = {}
CONVICTED = frozenset(("claims_falsely", "poisons", "forks", "forks_after_claim", "refunds_by_a_false_time"))
"""Habits that leave evidence: whoever lied so is condemned in somebody's book at the end."""
PAY_THEIR_DUE = frozenset(("hides_claim", "garbage", "floods", "replays", "answers_twice"))
"""Habits that leave nobody waiting for ever: a key that was paid for is shown in the end."""
FLOOD = 400
KEPT = 60


def lies_of(seed: int, word: str) -> tuple[str, ...]:
    """The habits of a seed's liars: those named ("forks+garbage"), or with "all" two that change with the seed."""
    if word != "all":
        return tuple(name for name in word.split("+") if name)
    names = list(HABITS)
    first = seed % len(names)
    return (names[first], names[(first + 1 + seed // len(names) % (len(names) - 1)) % len(names)])


def habit(work: Habit) -> Habit:
    """Registers a habit under its name."""
    HABITS[work.__name__] = work
    return work


class Liar:
    """One machine with one habit. `sent` changes what leaves it; `heard` sees what comes to it."""

    def __init__(self, world: World, machine: Machine, name: str) -> None:
        self.world = world
        self.machine = machine
        self.name = name
        self.rng = Random(f"{world.seed} {machine.name} {name}")
        self.sent: Sent = lambda peer, items: items
        self.memory: list[Message] = []
        self.lies = 0
        send, build_node = machine.send, machine._build

        def send_too(peer: str, items: list[Any]) -> bool:
            left = self.sent(peer, items)
            return send(peer, left) if left else True

        def build_too() -> Any:
            made = build_node()
            HABITS[name](self)
            return made

        machine.send = send_too  # type: ignore[method-assign]
        machine._build = build_too  # type: ignore[method-assign]

    @property
    def rooms(self) -> Any:
        """Of the node that runs now."""
        return self.machine.node.rooms

    def lie(self) -> None:
        """One more lie was told."""
        self.lies += 1
        self.world.clock.tell(self.machine.name, f"lies: {self.name}")

    def tell(self, peer: str, *messages: Message) -> None:
        """Messages that the liar's own node knows nothing of."""
        if self.machine.up:
            self.world.network.send(self.machine, peer, [(message, None, None) for message in messages])

    def others(self) -> list[str]:
        """Whom it is connected to."""
        return list(self.machine.node.ctx.links)

    def forge(self, seq: int, prev: bytes, body: Body, ahead_ms: int = 0) -> Any:
        """An entry that no rule was asked about."""
        machine, mesh = self.machine, self.rooms.books.mesh
        return build(mesh, machine.key.public, seq, prev, machine.now_ms() + ahead_ms, body, machine.key.sign)

    def head(self) -> tuple[int, bytes]:
        """Where its own chain ends, as its node believes."""
        found: tuple[int, bytes] = self.rooms.books.book.head(self.machine.key.public)
        return found

    def every(self, seconds: float, work: Callable[[], None]) -> None:
        """Again and again until the faults end."""
        starts = self.machine.starts

        def again() -> None:
            if self.machine.up and self.machine.starts == starts and not self.world.peace_us:
                work()
                self.every(seconds, work)

        self.world.clock.after(round(seconds * self.rng.uniform(0.5, 1.5) * 1e6), again)

    def before_release(self, change: Callable[[Any], Any]) -> None:
        """Every receipt goes through `change`: None keeps it back."""
        books = self.rooms.books
        release = books.release

        def releasing(task: Any, attempt: Any, item: ReleaseItem) -> None:
            changed = change((task, attempt, item))
            self.lie()
            if changed is not None:
                release(task, attempt, changed)

        books.release = releasing


# --- executors


@habit
def withholds_key(liar: Liar) -> None:
    """Row "6, E never shows the key": it is paid and claims nothing."""
    books = liar.rooms.books
    claimable = books._claimable

    def never(payable: Any) -> Any:
        item, job = claimable(payable)
        if job is None:
            return item, job
        liar.lie()
        return None, None

    books._claimable = never


@habit
def garbage(liar: Liar) -> None:
    """Row "6, sealed bytes are garbage": note and blob are right, what they seal is noise."""
    pay = liar.rooms.pay
    deliver = pay.deliver

    def noise(job: Any, event: Any, amount_ucr: int) -> None:
        junk = liar.rng.randbytes(64)
        liar.lie()
        deliver(job, msgspec.structs.replace(event, inline=junk, blob=blob_id(junk), blob_bytes=len(junk)), amount_ucr)

    pay.deliver = noise


@habit
def hides_claim(liar: Liar) -> None:
    """Row "6, E claims but hides it from R": one payer never hears of its chain from itself."""
    victim: list[bytes] = []

    def sent(peer: str, items: list[Any]) -> list[Any]:
        account = liar.rooms.members.account_of(peer)
        victim.extend(line[0] for line in liar.world.deliveries_of(liar.machine)[:1] if not victim)
        left = [item for item in items if account not in victim or not isinstance(item[0], Settlement | LedgerPush)]
        if len(left) < len(items):
            liar.lie()
        return left

    liar.sent = sent


@habit
def claims_falsely(liar: Liar) -> None:
    """Row "E claims twice, with a wrong key, or another's line": one of its claims is forged, and told to all."""
    books = liar.rooms.books
    claim = books.purse.claim

    def claiming(items: Any, now_ms: int) -> Any:
        true = claim(items, now_ms)
        how = liar.rng.randrange(3)
        first = items[0]
        if how == 0:
            wrong = [*items, *items]
        elif how == 1:
            wrong = [msgspec.structs.replace(first, key=bytes(32))]
        else:
            wrong = [msgspec.structs.replace(first, payer=liar.machine.key.public, amount_ucr=first.amount_ucr + 1)]
        false = liar.forge(true.seq + 1, true.hash, type(true.body)(wrong))
        if first.key is not None:
            liar.lie()
            for peer in liar.others():
                liar.tell(peer, LedgerPush(liar.machine.key.public, [true.raw, false.raw]))
        return true

    books.purse.claim = claiming


@habit
def answers_twice(liar: Liar) -> None:
    """Double acceptance: ACCEPT and REJECT for one award, again and again, and PROGRESS of what it never took."""

    def sent(peer: str, items: list[Any]) -> list[Any]:
        more = []
        for message, _, _ in items:
            if isinstance(message, Accept):
                liar.lie()
                reject = Reject(message.task_id, message.attempt, "busy", "", b"")
                more += [(reject, None, bytes(16)), (message, None, liar.rng.randbytes(16)), (reject, None, None)]
                more.append((Progress(message.task_id, message.attempt + 1, "running", 1.0), None, None))
                more.append((Accept(message.task_id, message.attempt + 1), None, liar.rng.randbytes(16)))
        return items + more

    liar.sent = sent


# --- requesters


@habit
def refuses_receipt(liar: Liar) -> None:
    """Row "5, R refuses the receipt": it has the sealed result and writes no release."""
    liar.before_release(lambda told: None)


@habit
def underpays(liar: Liar) -> None:
    """Row "5, R releases too little or for another key"."""

    def less(told: Any) -> Any:
        item = told[2]
        if liar.rng.random() < 0.5:
            return msgspec.structs.replace(item, key_hash=liar.rng.randbytes(32))
        return msgspec.structs.replace(item, amount_ucr=max(1, item.amount_ucr // 2))

    liar.before_release(less)


@habit
def poisons(liar: Liar) -> None:
    """Row "5, R writes an invalid entry before the release": an overdraft stands between lock and release."""

    def poison(told: Any) -> Any:
        _, attempt, item = told
        seq, prev = liar.head()
        now = liar.machine.now_ms()
        greedy = Lock(now + 60_000, now + 400_000, None, [LockLine(bytes(32), attempt.account, 10**14, 1)])
        first = liar.forge(seq + 1, prev, greedy)
        second = liar.forge(seq + 2, first.hash, Release([item]))
        liar.tell(attempt.peer, Settlement(liar.machine.key.public, [first.raw, second.raw], []))

    liar.before_release(poison)


@habit
def forks(liar: Liar) -> None:
    """Rows "5, R forks" and "R shows n payees n branches": every lock has a sibling that others are shown."""
    purse = liar.rooms.books.purse
    lock = purse.lock

    def locking(lines: Any, deliver_by_ms: int, expiry_ms: int, now_ms: int) -> Any:
        seq, prev = liar.head()
        true = lock(lines, deliver_by_ms, expiry_ms, now_ms)
        payees = {line.payee for line in lines}
        for peer in liar.others():
            account = liar.rooms.members.account_of(peer)
            if account not in payees:
                liar.lie()
                body = Send(account, 1_000_000, bytes(32))
                liar.tell(peer, LedgerPush(liar.machine.key.public, [liar.forge(seq + 1, prev, body).raw]))
        return true

    purse.lock = locking


@habit
def forks_after_claim(liar: Liar) -> None:
    """Row "7, R forks after the claim": once the key is known, others are shown a chain without the release."""
    awards = liar.rooms.awards
    key_shown = awards.key_shown

    def shown(lock_seq: int, line: int, key: bytes) -> None:
        key_shown(lock_seq, line, key)
        raws = dict(liar.rooms.books.shipping.recent)
        previous = raws.get(lock_seq)
        if previous is None or not liar.others():
            return
        liar.lie()
        last = parse(previous)
        for peer in liar.others():
            body = Send(liar.rooms.members.account_of(peer), 500_000, bytes(32))
            liar.tell(peer, LedgerPush(liar.machine.key.public, [liar.forge(last.seq + 1, last.hash, body).raw]))

    awards.key_shown = shown


@habit
def hides_entries(liar: Liar) -> None:
    """Row "2, R's chain bad or hidden": awards come without the entries before the lock, and pulls go unanswered."""

    def sent(peer: str, items: list[Any]) -> list[Any]:
        left = []
        for message, reply_to, obligation in items:
            if isinstance(message, LedgerPush) and message.account == liar.machine.key.public and message.entries:
                continue
            told = message
            if isinstance(message, EscrowLock):
                liar.lie()
                told = msgspec.structs.replace(message, entries=message.entries[1:])
            left.append((told, reply_to, obligation))
        return left

    liar.sent = sent


@habit
def refunds_by_a_false_time(liar: Liar) -> None:
    """Row "R refunds early by a false time": the line is taken back by an entry stamped at its expiry."""

    def early(told: Any) -> Any:
        _, attempt, _ = told
        seq, prev = liar.head()
        ahead_ms = max(0, attempt.expiry_ms - liar.machine.now_ms())
        body = Refund([RefundItem(attempt.lock_seq, attempt.line, None)])
        entry = liar.forge(seq + 1, prev, body, ahead_ms)
        liar.tell(attempt.peer, Settlement(liar.machine.key.public, [entry.raw], []))

    liar.before_release(early)


# --- anybody


@habit
def replays(liar: Liar) -> None:
    """What it heard or said is said again, later, to anybody; relayed statements with their hops set back."""

    def sent(peer: str, items: list[Any]) -> list[Any]:
        liar.memory += [message for message, _, _ in items]
        del liar.memory[:-KEPT]
        return items

    liar.sent = sent
    step = liar.machine.node.step

    def heard(now_ms: int, stimulus: Any) -> Any:
        message = getattr(stimulus, "message", None)
        if message is not None:
            liar.memory.append(message)
        return step(now_ms, stimulus)

    liar.machine.node.step = heard  # type: ignore[method-assign]

    def again() -> None:
        others = liar.others()
        if others and liar.memory:
            liar.lie()
            told = [again_from_start(message) for message in liar.rng.sample(liar.memory, min(20, len(liar.memory)))]
            liar.tell(liar.rng.choice(others), *told)

    liar.every(0.7, again)


def again_from_start(message: Message) -> Message:
    """As its author said it first, as far as nobody signed that."""
    return msgspec.structs.replace(message, hops=0) if isinstance(message, PeerInfo) else message


@habit
def floods(liar: Liar) -> None:
    """Hundreds of messages that ask for work, claim heads, and say nothing."""

    def flood() -> None:
        for peer in liar.others():
            liar.lie()
            account = liar.rooms.members.account_of(peer)
            pulls = [LedgerPull(account, liar.rng.randrange(50), 2**62) for _ in range(FLOOD // 4)]
            heads = [
                LedgerPush(account, [], [Head(liar.rng.randbytes(32), 9, liar.rng.randbytes(32))])
                for _ in range(FLOOD // 4)
            ]
            ahead = [LedgerPush(account, [], [Head(account, 10**6, bytes(32))])]
            junk = [LedgerPush(account, [liar.rng.randbytes(200)]) for _ in range(FLOOD // 4)]
            told = [Accept(liar.rng.randbytes(16), 1) for _ in range(FLOOD // 4)]
            liar.tell(peer, *pulls, *heads, *ahead, *junk, *told)

    liar.every(3.0, flood)
