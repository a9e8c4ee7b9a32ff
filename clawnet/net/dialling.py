"""Reaching a peer: its addresses raced, failures answered or retried with growing, jittered pauses."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Protocol

from clawnet import limits
from clawnet.errors import DataError, LinkError
from clawnet.identity import multiaddr
from clawnet.identity.multiaddr import Multiaddr
from clawnet.net.control import Link
from clawnet.net.port import Connection

DUPLICATE = "there is another connection between these two already"
"""The reason a second connection is refused with; a dialler that reads it waits for the first one."""

DialOne = Callable[[Multiaddr], Awaitable[Connection]]


async def race(dial: DialOne, addresses: Sequence[Multiaddr]) -> Connection:
    """The first connection made to any of the addresses (RFC 8305, section 5).

    Hosts are tried in order and DIAL_STAGGER_S apart, the transports of one host at the same time. Raises LinkError
    with every address's reason when all fail; its detail `found` names another peer that answered there.
    """
    hosts: dict[str, list[Multiaddr]] = {}
    for address in addresses:
        hosts.setdefault(address.host, []).append(address)
    waiting = list(hosts.values())
    running: set[asyncio.Task[Connection]] = set()
    problems: list[str] = []
    found = ""
    try:
        while waiting or running:
            if waiting:
                running |= {asyncio.ensure_future(dial(address)) for address in waiting.pop(0)}
            stagger_s = limits.DIAL_STAGGER_S if waiting else None
            done, running = await asyncio.wait(running, timeout=stagger_s, return_when=asyncio.FIRST_COMPLETED)
            made = [task for task in done if task.exception() is None]
            problems += [_reason(task) for task in done if task not in made]
            found = next((who for task in done if (who := _found(task))), found)
            if made:
                running |= set(made[1:])
                return made[0].result()
    finally:
        for task in running:
            task.cancel()
            task.add_done_callback(_close_late)
    raise LinkError("; ".join(dict.fromkeys(problems)) or "no address to dial", found=found)


def _reason(task: asyncio.Task[Connection]) -> str:
    problem = task.exception()
    if isinstance(problem, LinkError):
        return problem.message
    assert problem is not None
    raise problem


def _found(task: asyncio.Task[Connection]) -> str:
    problem = task.exception()
    return str(problem.details.get("found") or "") if isinstance(problem, LinkError) else ""


def _report(task: asyncio.Task[None]) -> None:
    """A defect must not end a dialler in silence: the peer would never be dialled again."""
    if not task.cancelled() and (defect := task.exception()) is not None:
        context = {"message": "a dialler failed", "exception": defect, "task": task}
        task.get_loop().call_exception_handler(context)


def _close_late(task: asyncio.Task[Connection]) -> None:
    if not task.cancelled() and task.exception() is None:
        task.result().close("another address was faster")


def parsed(addresses: Iterable[str]) -> list[Multiaddr]:
    """The addresses that this node can dial, at most DIAL_ADDRESSES_MAX; LinkError when there is none."""
    good: list[Multiaddr] = []
    problems: list[str] = []
    for text in addresses:
        try:
            good.append(multiaddr.parse(text))
        except DataError as problem:
            problems.append(problem.message)
    if not good:
        raise LinkError("; ".join(problems) or "no address is known for this peer")
    return good[: limits.DIAL_ADDRESSES_MAX]


def peer_in(addresses: Iterable[str]) -> str:
    """The peer id that the addresses name, or ""."""
    try:
        return next((where.peer for where in parsed(addresses) if where.peer), "")
    except LinkError:
        return ""


class DialOwner(Protocol):
    """What a dialler asks of the switch."""

    async def connect(self, peer: str, addresses: Sequence[str]) -> Connection:
        """A proven connection to the peer, with no control stream yet."""

    async def open_link(self, connection: Connection, wanted: str = "") -> Link:
        """The control stream over a connection of ours, not settled yet. `wanted`: whom it must be, or follow."""

    def chance(self) -> float:
        """A random number from 0 to 1."""

    def dial_ended(self, call: int, peer: str, reason: str) -> None:
        """Answers a call; call 0: a kept peer could not be reached the first time."""

    def dialler_idle(self, dialler: Dialler) -> None:
        """The dialler has nothing more to do."""


class Dialler:
    """All that wants one peer (or whoever answers at an address) connected: calls that wait, or for ever."""

    def __init__(self, owner: DialOwner, peer: str, key: str) -> None:
        self.peer = peer
        self.key = key
        self.keep = False
        self.addresses: tuple[str, ...] = ()
        self._owner = owner
        self._calls: list[int] = []
        self._failures = 0
        self._tried = False
        self._task: asyncio.Task[None] | None = None
        self._linked = asyncio.Event()
        self._pausing = False
        self._restarted_s = -limits.DIAL_RESTART_S
        self._later: asyncio.TimerHandle | None = None

    def want(self, call: int, addresses: Sequence[str], keep: bool) -> None:
        """One more reason to connect; the newest addresses come first.

        News of addresses end a pause and begin an attempt again that may hang on the old ones, every DIAL_RESTART_S.
        """
        news = not set(addresses) <= set(self.addresses)
        self.addresses = tuple(dict.fromkeys((*addresses, *self.addresses)))[: limits.DIAL_ADDRESSES_MAX]
        self.keep = self.keep or keep
        if call:
            self._calls.append(call)
        if self._task is None or (self._pausing and call):
            self._start(0.0)
        elif news:
            self._failures = 0
            self._restart()
        elif self._pausing and not call:
            self._owner.dial_ended(0, self.peer, "it could not be reached")

    def linked(self) -> None:
        """The peer is connected, whoever dialled."""
        self._linked.set()
        self._answer("")
        self._stop()
        if not self.keep:
            self._owner.dialler_idle(self)

    def lost(self, lasted_s: float) -> None:
        """The link is gone; one that did not last counts as a failure, so that a flapping peer is dialled ever less."""
        self._linked.clear()
        self._failures = 0 if lasted_s >= limits.LINK_SETTLED_S else self._failures + 1
        if self.keep:
            self._start(self._pause_s())

    def hurry(self) -> None:
        """The own network changed: what was tried before tells nothing, and an attempt may hang on the old one."""
        self._failures = 0
        if self._task is not None:
            self._start(0.0)

    def _restart(self) -> None:
        """Begins an attempt anew, now or when the last time is long enough ago: anybody may tell of addresses."""
        loop = asyncio.get_running_loop()
        wait_s = self._restarted_s + limits.DIAL_RESTART_S - loop.time()
        if self._task is None:
            return
        if wait_s <= 0:
            self._restarted_s = loop.time()
            self._start(0.0)
        elif self._later is None:
            self._later = loop.call_later(wait_s, self._restart_later)

    def _restart_later(self) -> None:
        self._later = None
        self._restart()

    def cancel(self, reason: str) -> None:
        """Stops; calls still waiting get the reason."""
        self.keep = False
        self._stop()
        self._answer(reason)

    def _start(self, pause_s: float) -> None:
        self._halt()
        self._pausing = False
        self._task = asyncio.ensure_future(self._run(pause_s))
        self._task.add_done_callback(_report)

    def _stop(self) -> None:
        self._halt()
        if self._later is not None:
            self._later.cancel()
            self._later = None

    def _halt(self) -> None:
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
        self._task = None

    def _answer(self, reason: str) -> None:
        calls, self._calls = self._calls, []
        for call in calls:
            self._owner.dial_ended(call, self.peer, reason)

    def _pause_s(self) -> float:
        longest_s = min(limits.RECONNECT_MAX_S, limits.RECONNECT_MIN_S * 2.0 ** min(self._failures, 16))
        return longest_s * (0.5 + 0.5 * self._owner.chance())

    async def _run(self, pause_s: float) -> None:
        while True:
            if pause_s:
                self._pausing = True
                await asyncio.sleep(pause_s)
            self._pausing = False
            reason = await self._attempt()
            if self._linked.is_set():
                return
            self._answer(reason)
            if not self.keep:
                self._task = None
                self._owner.dialler_idle(self)
                return
            if not self._tried:
                self._owner.dial_ended(0, self.peer, reason)
            self._tried = True
            self._failures += 1
            pause_s = self._pause_s()

    async def _attempt(self) -> str:
        """Empty once linked, else why not. A refusal as duplicate means: the other connection is coming up, or is dead
        and will soon be found so; hence one more try after a while."""
        reason = ""
        for _ in range(2):
            try:
                link = await self._link()
                await link.settled
                self.peer = link.peer
                return ""
            except LinkError as problem:
                reason = problem.message
            if DUPLICATE not in reason:
                break
            try:
                async with asyncio.timeout(1.5 * limits.LINK_PROBE_S):
                    await self._linked.wait()
                return ""
            except TimeoutError:
                continue
        return reason or "the link could not be made"

    async def _link(self) -> Link:
        """A control stream with the peer. Where another id answers it may be the same node under its next key: then
        that one's HELLO has to prove it."""
        try:
            return await self._owner.open_link(await self._owner.connect(self.peer, self.addresses))
        except LinkError as problem:
            found = str(problem.details.get("found") or "")
            if not found or not self.peer:
                raise
            where = [str(address.with_peer(None)) for address in parsed(self.addresses)]
            try:
                return await self._owner.open_link(await self._owner.connect(found, where), self.peer)
            except LinkError as later:
                raise problem from later
