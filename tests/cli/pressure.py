"""Storms on one real daemon: submissions all at once, readers that never read, a peer that floods; how it bears them.

The bench (scripts/bench/pressure.py) prints the figures, tests/cli/test_pressure.py holds the daemon to its bounds.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from time import perf_counter
from typing import Any

from msgspec import Struct, field

from clawnet import __version__, limits, rpc
from clawnet.api_async import AsyncClient
from clawnet.errors import ClawnetError, LinkError
from clawnet.wire import messages as m
from clawnet.wire.messages import Message
from tests.cli.harness import Node
from tests.cli.test_hostile_peer import Intruder, Victim, intruder

LOOK_EVERY_S = 0.05
FINAL_PATIENCE_S = 600.0


class Figures(Struct):
    """What one storm came to."""

    storm: str
    rss_before_mib: float = 0.0
    rss_peak_mib: float = 0.0
    rss_after_mib: float = 0.0
    seconds: float = 0.0
    accepted: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    ended: dict[str, int] = field(default_factory=dict)
    accepted_s: float = 0.0
    balance_ms: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Half, 99 of a hundred, and all `wallet balance` of another client were answered within this."""
    submit_ms: tuple[float, float, float] = (0.0, 0.0, 0.0)
    log_lines: int = 0
    storage_mib: float = 0.0
    sent: int = 0
    dropped: str = ""
    failures: list[str] = field(default_factory=list)


def rss_mib(pid: int, name: str = "VmRSS") -> float:
    """The resident memory of a process now, or with VmHWM its peak since `forget_peak`."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return round(int(line.split()[1]) / 1024, 1)
    return 0.0


def forget_peak(pid: int) -> None:
    """From now on VmHWM is the peak since now."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def shares(times: list[float]) -> tuple[float, float, float]:
    """Median, 99th percentile and maximum in milliseconds."""
    ranked = sorted(times) or [0.0]
    at = [ranked[len(ranked) // 2], ranked[min(len(ranked) - 1, len(ranked) * 99 // 100)], ranked[-1]]
    return round(1000 * at[0], 1), round(1000 * at[1], 1), round(1000 * at[2], 1)


def trifle(number: int) -> dict[str, Any]:
    """A task that takes no time, for this machine itself."""
    payload = base64.b64encode(b"storm %d" % number).decode()
    return {"type": "compute", "op": "sha256", "stdin_b64": payload, "ring": "own", "deadline_s": 3600}


@contextlib.asynccontextmanager
async def observed(node: Node, storm: str) -> AsyncIterator[Figures]:
    """Memory, log and database before, during and after; and another client that asks all the while."""
    found = Figures(storm)
    pid = node.pid
    forget_peak(pid)
    found.rss_before_mib = rss_mib(pid)
    lines = node.log.count("\n")
    over = asyncio.Event()
    asking = asyncio.create_task(_other_client(node, over, found))
    started = perf_counter()
    try:
        yield found
    finally:
        found.seconds = round(perf_counter() - started, 2)
        over.set()
        await asking
        found.rss_peak_mib, found.rss_after_mib = rss_mib(pid, "VmHWM"), rss_mib(pid)
        found.log_lines = node.log.count("\n") - lines
        found.storage_mib = round(node.ask("status")["storage_bytes"] / limits.MIB, 1)
        if node.pid != pid:
            found.failures.append("the daemon is another process")


async def _other_client(node: Node, over: asyncio.Event, found: Figures) -> None:
    """Asks for the balance, and now and then submits a task of its own."""
    balances: list[float] = []
    submits: list[float] = []
    async with AsyncClient(node.home) as client:
        number = 0
        while not over.is_set():
            started = perf_counter()
            await client.call("wallet.balance", timeout_s=120)
            balances.append(perf_counter() - started)
            number += 1
            if number % 10 == 0:
                started = perf_counter()
                try:
                    await client.call("task.submit", {"spec": trifle(-number)}, timeout_s=120)
                except ClawnetError as error:
                    found.failures.append(f"another client's submission: {error.code}")
                submits.append(perf_counter() - started)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), LOOK_EVERY_S)
    found.balance_ms, found.submit_ms = shares(balances), shares(submits)


# --- submissions


async def submit_all(node: Node, total: int, clients: int, found: Figures) -> list[str]:
    """`total` submissions written without waiting for an answer, by so many clients; the ids of those accepted."""
    started = perf_counter()

    async def one(first: int, count: int) -> list[str]:
        async with AsyncClient(node.home) as client:
            calls = [client.start("task.submit", {"spec": trifle(first + n)}) for n in range(count)]
            answers = await asyncio.gather(*calls, return_exceptions=True)
        ids = []
        for answer in answers:
            if isinstance(answer, ClawnetError):
                found.refused[answer.code] = found.refused.get(answer.code, 0) + 1
            elif isinstance(answer, BaseException):
                raise answer
            else:
                ids.append(answer["task_id"])
        return ids

    share = total // clients
    parts = await asyncio.gather(*(one(n * share, share) for n in range(clients)))
    found.accepted_s = round(perf_counter() - started, 2)
    ids = [identifier for part in parts for identifier in part]
    found.accepted = len(ids)
    return ids


async def all_final(node: Node, ids: list[str], found: Figures) -> None:
    """Waits until nothing is open, and counts how the accepted tasks ended."""
    async with AsyncClient(node.home) as client:
        deadline = perf_counter() + FINAL_PATIENCE_S
        while (status := await client.call("node.status"))["activity"]["tasks_open"]:
            if perf_counter() > deadline:
                found.failures.append(f"{status['activity']['tasks_open']} tasks have not ended")
                break
            await asyncio.sleep(LOOK_EVERY_S)
        ended: Counter[str] = Counter()
        wanted, after = set(ids), None
        while wanted:
            page = await client.call("task.list", {"limit": 500, "after": after})
            for item in page["items"]:
                if item["task_id"] in wanted:
                    wanted.discard(item["task_id"])
                    ended[item["state"]] += 1
            after = page["next"]
            if after is None:
                break
        found.ended = dict(ended)
        if wanted:
            found.failures.append(f"{len(wanted)} accepted tasks are not listed")


async def storm_of_submissions(node: Node, total: int, clients: int) -> Figures:
    """All at once, until all that was accepted is final."""
    async with observed(node, f"{total} submissions by {clients} clients") as found:
        ids = await submit_all(node, total, clients, found)
        await all_final(node, ids, found)
    return found


# --- clients that do not read


class Silent:
    """A client that says hello, asks, and never reads again."""

    def __init__(self, node: Node) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(node.home.socket))
        self._socket.sendall(rpc.hello_line(__version__))
        self._socket.recv(65536)

    def ask(self, call: int, method: str, params: dict[str, Any]) -> None:
        """One call, unread."""
        self._socket.sendall(rpc.request_line(call, method, params))

    @property
    def dropped(self) -> bool:
        """Whether the daemon has hung up."""
        self._socket.setblocking(False)
        try:
            self._socket.send(b"\n")
        except BlockingIOError:
            return False
        except OSError:
            return True
        return False

    def close(self) -> None:
        """Leaves."""
        self._socket.close()


async def silent_followers(node: Node, followers: int, megabytes: int) -> Figures:
    """A task that prints much, followed by clients that never read."""
    async with observed(node, f"{followers} followers that never read, {megabytes} MB of output") as found:
        line = f"head -c {megabytes}000000 /dev/zero | tr '\\0' x"
        spec = {"type": "shell", "script": line, "ring": "own", "deadline_s": 600}
        async with AsyncClient(node.home) as client:
            made = await client.call("task.submit", {"spec": spec})
            silent = [Silent(node) for _ in range(followers)]
            for one in silent:
                one.ask(1, "task.follow", {"task": made["task_id"], "output": True, "from": "start"})
            done = await client.call("task.follow", {"task": made["task_id"], "output": False}, timeout_s=300)
            found.ended = {done["state"]: 1}
            await client.call("wallet.balance")
        found.dropped = f"{sum(one.dropped for one in silent)} of {followers}"
        for one in silent:
            one.close()
    return found


async def silent_askers(node: Node, clients: int, calls: int) -> Figures:
    """Clients that ask for long lists and never read the answers."""
    async with observed(node, f"{clients} clients ask {calls} lists each and never read") as found:
        silent = [Silent(node) for _ in range(clients)]

        def ask_all() -> None:
            for one in silent:
                with contextlib.suppress(OSError):
                    one._socket.settimeout(2.0)
                    for number in range(1, calls + 1):
                        one.ask(number, "task.list", {"limit": 500})

        await asyncio.to_thread(ask_all)
        async with AsyncClient(node.home) as client:
            await client.call("node.status", timeout_s=120)
        found.dropped = f"{sum(one.dropped for one in silent)} of {clients}"
        for one in silent:
            one.close()
    return found


# --- a peer that floods

ID16, ID32 = bytes(16), bytes(32)


def flood_messages(account: bytes) -> dict[str, Callable[[int], Message]]:
    """By name, what a member may say of each kind that costs something; the number makes every one another."""

    def id16(n: int) -> bytes:
        return n.to_bytes(16, "big")

    needs = m.Requirements(capabilities=["compute"])
    late = 2**42
    return {
        "ping": lambda n: m.Ping(n, 0),
        "offer": lambda n: m.Offer(id16(n), 1, "compute", ID32, 10, 0, 10**7, late, late, 30, needs),
        "bid": lambda n: m.Bid(id16(n), 1, 1, 1.0, 0.0, 1.0, ID32, 0.0, 0.0, ID16, -1, ID32),
        "decline": lambda n: m.Decline(id16(n), 1, "full"),
        "winner": lambda n: m.Winner(id16(n), 0, b"x" * 200, 10, late, late, True, True),
        "lock": lambda n: m.EscrowLock(id16(n), 0, n, ID32, 0, [b"x" * 300]),
        "output": lambda n: m.Output(id16(n), 0, 1, 0, b"x" * 4096),
        "pull": lambda n: m.LedgerPull(account, 0, 2**62),
        "push": lambda n: m.LedgerPush(n.to_bytes(32, "big"), [n.to_bytes(300, "big")]),
        "ack": lambda n: m.Ack(id16(n)),
        "reject": lambda n: m.Reject(id16(n), 0, "full", "", b""),
    }


async def flood(victim: Victim, name: str, make: Callable[[int], Message], seconds: float) -> Figures:
    """A member that says one thing as fast as the wire takes it, until it is dropped or the time is over."""
    async with observed(victim.node, f"a peer floods {name}") as found, intruder(victim) as them:
        await them.greet()
        reading = asyncio.create_task(_read_all(them))
        until_s, number = perf_counter() + seconds, 1
        with contextlib.suppress(LinkError):
            while perf_counter() < until_s and not them.connection.closed.done():
                items = [(make(number + n), None, None) for n in range(limits.BATCH_ENVELOPES_MAX)]
                number += len(items)
                await them.stream.write(them.session.seal(items, perf_counter_ms()))
                found.sent = number
        found.dropped = them.connection.closed.result() if them.connection.closed.done() else "no"
        reading.cancel()
        with contextlib.suppress(asyncio.CancelledError, LinkError):
            await reading
    return found


async def _read_all(them: Intruder) -> None:
    while await them.stream.read(65536):
        pass


def perf_counter_ms() -> int:
    """Unix milliseconds for a batch."""
    import time

    return time.time_ns() // 1_000_000


# --- a restart with much open


async def restart_with_open_tasks(node: Node, total: int) -> Figures:
    """Submits, kills the daemon as soon as all are accepted, starts it, and waits until all are final."""
    found = Figures(f"restart with {total} tasks open")
    ids = await submit_all(node, total, 10, found)
    open_then = node.ask("node.status")["activity"]["tasks_open"]
    node.kill()
    started = perf_counter()
    node.start()
    ready_s = perf_counter() - started
    found.rss_before_mib = rss_mib(node.pid)
    found.dropped = f"{open_then} open at the kill, answers after {ready_s:.1f} s"
    forget_peak(node.pid)
    await all_final(node, ids, found)
    found.seconds = round(perf_counter() - started, 2)
    found.rss_peak_mib = rss_mib(node.pid, "VmHWM")
    found.rss_after_mib = rss_mib(node.pid)
    found.storage_mib = round(node.ask("status")["storage_bytes"] / limits.MIB, 1)
    return found


Storm = Callable[[], Awaitable[Figures]]
