"""The people of the mesh: they submit, cancel, pay, ask again, and remember what they were told."""

from __future__ import annotations

import math
from random import Random
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from clawnet.wire.events import RpcCall

if TYPE_CHECKING:
    from tests.world.machine import Machine
    from tests.world.world import World


SPARE = 0.05
"""So many people more ask for a task more: some calls come to nothing."""
CONTRACTS = 0.2
"""The part of the tasks whose results must pass a contract; a tenth of the runs end with another exit code."""
LAST_CALL_US = 3_000_000


class Wish(Struct):
    """One task that somebody wants done."""

    mark: str
    machine: Machine
    spec: dict[str, Any]
    cancel_after_us: int
    task_id: str = ""
    accepted_us: int = 0
    asked: bool = False
    refused: str = ""

    @property
    def once(self) -> bool:
        """True for a task that must never start twice."""
        return self.spec["type"] == "shell" and not self.spec.get("retries")


class Client:
    """All wishes by mark, and the calls that wait for an answer."""

    def __init__(self, world: World, rng: Random) -> None:
        self.world = world
        self.rng = rng
        self.wishes: dict[str, Wish] = {}
        self.accepted: dict[tuple[str, str], Wish] = {}
        self._calls: dict[int, Wish] = {}
        self._of: dict[str, set[int]] = {}
        self._next = 0
        self._until_us = 0
        self.again = True

    def plan(self, machines: list[Machine], seconds: float, each: int, rest_s: float = 0.0) -> None:
        """`each` tasks a machine and simulated minute, at least one, and a few more, at seeded times after the rest."""
        self._until_us = self.world.clock.now_us + round((rest_s + seconds) * 1e6)
        for machine in machines:
            for _ in range(max(1, math.ceil(each * seconds / 60)) + (self.rng.random() < SPARE)):
                at_s = rest_s + self.rng.uniform(2.0, max(3.0, seconds - 1))
                self._plan(self._wish(machine), round(at_s * 1e6))
            if self.world.sends and self.rng.random() < 0.3:
                other = self.rng.choice(machines)
                at_us = round((rest_s + self.rng.uniform(3.0, max(4.0, seconds - 1))) * 1e6)
                self.world.clock.after(at_us, self._pay, machine, other, self.rng.randrange(1, 2_000_000))

    def _plan(self, wish: Wish, after_us: int) -> None:
        self.wishes[wish.mark] = wish
        self.world.clock.after(after_us, self._submit, wish)

    def _wish(self, machine: Machine) -> Wish:
        rng = self.rng
        mark = f"{len(self.wishes)}"
        spec: dict[str, Any] = {"ring": "member", "deadline_s": rng.choice((15, 40, 90, 200)), "env": {"MARK": mark}}
        if rng.random() < 0.5:
            spec |= {"type": "shell", "argv": ["work", mark], "os": "linux"}
        else:
            op = rng.choice(("sha256", "primes", "sort"))
            spec |= {"type": "compute", "op": op, "op_args": {"limit": 10}, "description": f"{mark} x"}
        if rng.random() < 0.2:
            spec["retries"] = rng.choice((0, 1, 3))
        if rng.random() < 0.15:
            spec["inputs"] = [{"name": "in", "path": f"/file/{mark}"}]
        if rng.random() < 0.4:
            spec["idempotency_key"] = f"key {mark}"
        if rng.random() < 0.3:
            spec["budget_ucr"] = rng.randrange(500_000, 5_000_000)
        if Random(f"{self.world.seed} contract {mark}").random() < CONTRACTS:
            spec["accept"] = ["exit:0"]
        cancel_us = round(rng.expovariate(1 / 3.0) * 1e6) if rng.random() < 0.1 else 0
        return Wish(mark, machine, spec, cancel_us)

    def _call(self, machine: Machine, method: str, params: dict[str, Any], wish: Wish | None) -> None:
        self._next += 1
        if wish is not None:
            self._calls[self._next] = wish
            self._of.setdefault(machine.peer, set()).add(self._next)
        machine.guard(machine.runtime.feed, (RpcCall(self._next, method, params),))

    def _submit(self, wish: Wish) -> None:
        if wish.task_id or wish.refused:
            return
        if wish.machine.up and not wish.machine.draining:
            wish.asked = True
            self._call(wish.machine, "task.submit", {"spec": wish.spec}, wish)
        elif self.again and self.world.clock.now_us < self._until_us - LAST_CALL_US:
            self.world.clock.after(1_000_000, self._submit, wish)
        elif self.again and not wish.asked:
            self._elsewhere(wish)

    def _elsewhere(self, wish: Wish) -> None:
        """Its daemon has been away all the while, and never heard of it: it is asked of another."""
        others = [machine for machine in self.world.machines if machine.up and not machine.draining]
        if others:
            wish.machine = self.rng.choice(others)
            self._submit(wish)

    def _pay(self, machine: Machine, other: Machine, amount_ucr: int) -> None:
        if machine.up and other is not machine:
            self._call(machine, "wallet.send", {"peer": other.peer, "amount_ucr": amount_ucr}, None)

    def replied(self, machine: Machine, call: int, value: Any, error: dict[str, Any] | None) -> None:
        """An answer came."""
        wish = self._calls.pop(call, None)
        if wish is None:
            return
        self._of[machine.peer].discard(call)
        if error is not None:
            self.world.clock.tell(machine.name, f"refuses task {wish.mark}: {error.get('message', error)}")
            if self.again:
                wish.asked = False
                self.world.clock.after(1_000_000, self._submit, wish)
            else:
                wish.refused = str(error.get("message", error))
            return
        wish.task_id = value["task_id"]
        wish.accepted_us = self.world.clock.now_us
        self.accepted[machine.peer, wish.task_id] = wish
        self.world.clock.tell(machine.name, f"accepts task {wish.mark} as {wish.task_id[:8]}")
        if wish.cancel_after_us:
            self.world.clock.after(wish.cancel_after_us, self._cancel, wish)

    def _cancel(self, wish: Wish) -> None:
        if wish.machine.up:
            self._call(wish.machine, "task.cancel", {"task": wish.task_id}, None)

    def machine_down(self, machine: Machine) -> None:
        """Who waited for an answer of it asks again, where no idempotency key makes that safe for another task."""
        for call in sorted(self._of.pop(machine.peer, ())):
            wish = self._calls.pop(call)
            if wish.spec.get("idempotency_key") and self.again:
                self.world.clock.after(2_000_000, self._submit, wish)
            else:
                wish.refused = "the daemon went away"
                if self.again:
                    self._plan(self._wish(machine), 1_000_000)
