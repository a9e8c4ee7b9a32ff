"""The load of the crash soak as a process of its own, so that it can be killed like any client: tasks of every sort.

    python -m tests.cli.soak_load PLAN.json SEED

What it wants is in its journal before it asks, what a node took is there as soon as it knows; both survive its SIGKILL.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from clawnet.api import Client
from clawnet.errors import ClawnetError, TimedOutError, UnreachableError
from clawnet.paths import Home

PROGRAM = (sys.executable, "-P", "-m", "clawnet.commands")
AGAIN_S = 20.0
"""So long a submission is repeated, under the same key, while its node does not answer."""
PAUSE_S = 0.02
FOLLOWED_MAX = 64
SORTS = {"marked": 3, "shell": 2, "hash": 4, "primes": 4, "input": 2, "large": 2, "blob": 1, "endless": 0.6}
"""What is asked for, and how often; "endless" is never done by its deadline."""


class Journal:
    """JSON lines, each written at once: what is in it outlives the process."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab", buffering=0)
        self._lock = threading.Lock()

    def note(self, **fields: Any) -> None:
        """Appends one line."""
        with self._lock:
            self._file.write(json.dumps(fields).encode() + b"\n")


class Load:
    """Submits until it is told to stop; a second thread follows tasks, a third runs real commands."""

    def __init__(self, plan: dict[str, Any], seed: int) -> None:
        self.plan = plan
        self.name = f"{seed}"
        self.rng = random.Random(seed)
        self.journal = Journal(Path(plan["journals"]) / f"{seed}.jsonl")
        self.stopped = threading.Event()
        self._followed: list[tuple[int, str]] = []
        self._count = 0

    def run(self) -> None:
        """Until SIGTERM."""
        signal.signal(signal.SIGTERM, lambda *_: self.stopped.set())
        threads = [threading.Thread(target=work) for work in (self._follow, self._commands)]
        for thread in threads:
            thread.start()
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(self._client(node)) for node in range(len(self.plan["homes"]))]
            while not self.stopped.wait(self.rng.expovariate(self.plan["rate"])):
                self._one(clients)
        for thread in threads:
            thread.join()

    def _client(self, node: int) -> Client:
        return Client(Home(Path(self.plan["homes"][node])), autostart=False, timeout_s=AGAIN_S)

    # --- submissions

    def _key(self) -> str:
        self._count += 1
        return f"{self.name}-{self._count}"

    def _wish(self, node: int, key: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """A task, and what must come of it: its output, and how often it may begin."""
        rng = self.rng
        kind = rng.choices(tuple(SORTS), tuple(SORTS.values()))[0]
        retries = rng.choice((0, 0, 2))
        market = rng.random() < 0.7
        spec: dict[str, Any] = {"ring": "member", "retries": retries, "idempotency_key": key, "deadline_s": 120.0}
        if market:
            spec["prefer"] = "market"
        rest = f"sleep {rng.choice((0, 0.05, 0.3, 1.0))}"
        if kind == "marked":
            spec |= {
                "type": "shell",
                "ring": "own",
                "script": f"echo run >>{self.plan['marks']}/{key}; {rest}; echo {key}",
            }
            spec.pop("prefer", None)
            told = f"{key}\n".encode()
        elif kind == "shell":
            spec |= {"type": "shell", "script": f"echo {key}; {rest}"}
            told = f"{key}\n".encode()
        elif kind == "endless":
            ring = rng.choice(("own", "member"))
            spec |= {"type": "shell", "argv": ["sleep", self.plan["nap"]], "ring": ring, "deadline_s": 3.0}
            if ring == "own":
                spec.pop("prefer", None)
            told = b""
        elif kind == "hash":
            data = f"{key} ".encode() * rng.randrange(1, 200)
            spec |= {"type": "compute", "op": "sha256", "stdin_b64": base64.b64encode(data).decode()}
            told = hashlib.sha256(data).hexdigest().encode() + b"\n"
        elif kind == "primes":
            spec |= {"type": "compute", "op": "primes", "op_args": {"limit": 10}}
            told = b"2\n3\n5\n7\n"
        elif kind == "input":
            lines = sorted(f"{rng.random()}" for _ in range(rng.choice((3, 2000))))
            path = Path(self.plan["inputs"]) / key
            path.write_text("".join(f"{line}\n" for line in rng.sample(lines, len(lines))))
            spec |= {"type": "compute", "op": "sort", "inputs": [{"name": "lines", "path": str(path)}]}
            told = "".join(f"{line}\n" for line in lines).encode()
        else:
            last = 8_000 if kind == "large" else 120_000
            spec |= {"type": "shell", "argv": ["seq", "1", str(last)], "stream": rng.random() < 0.5}
            told = "".join(f"{number}\n" for number in range(1, last + 1)).encode()
        fields = {"kind": kind, "retries": retries, "sha256": hashlib.sha256(told).hexdigest()}
        return spec, fields

    def _one(self, clients: list[Client]) -> None:
        rng = self.rng
        node, key = rng.randrange(len(clients)), self._key()
        spec, fields = self._wish(node, key)
        cancelled = rng.random() < 0.1
        self.journal.note(key=key, node=node, cancelled=cancelled, **fields)
        task = self._submit(clients[node], node, key, spec)
        if task and rng.random() < 0.3:
            again = self._submit(clients[node], node, key, spec)
            if again and again != task:
                self.journal.note(key=key, node=node, twice=again)
        if task and cancelled:
            self.stopped.wait(rng.choice((0, 0.05, 0.3)))
            with contextlib.suppress(UnreachableError, TimedOutError):
                clients[node].call("task.cancel", {"task": task, "reason": "soak"})
        elif task and len(self._followed) < FOLLOWED_MAX:
            self._followed.append((node, task))

    def _submit(self, client: Client, node: int, key: str, spec: dict[str, Any]) -> str:
        """The task's id; "" when its node did not come back in time or refused."""
        deadline = time.monotonic() + AGAIN_S
        while time.monotonic() < deadline and not self.stopped.is_set():
            try:
                made = client.call("task.submit", {"spec": spec})
            except UnreachableError:
                self.stopped.wait(PAUSE_S)
                continue
            except ClawnetError as error:
                self.journal.note(key=key, node=node, refused=error.code, text=error.message)
                return ""
            self.journal.note(key=key, node=node, task=made["task_id"], created=made["created"])
            return str(made["task_id"])
        return ""

    # --- who waits

    def _follow(self) -> None:
        """Follows tasks to their end, attached again whenever the daemon went away."""
        while not self.stopped.wait(PAUSE_S):
            if not self._followed:
                continue
            node, task = self._followed.pop(0)
            with self._client(node) as client:
                while not self.stopped.is_set():
                    try:
                        self._followed_once(client, task)
                        break
                    except (UnreachableError, TimedOutError):
                        self.stopped.wait(PAUSE_S)

    def _followed_once(self, client: Client, task: str) -> None:
        stream = client.stream("task.follow", {"task": task, "output": True, "from": "start"}, timeout_s=5.0)
        for _ in stream:
            continue
        if not stream.result["final"] and stream.result["error"] is None:
            self.journal.note(task=task, follow=stream.result["state"])

    def _commands(self) -> None:
        """The real command with autostart, now and then killed before it ends."""
        rng = random.Random(self.rng.random())
        while not self.stopped.wait(rng.expovariate(self.plan["commands"])):
            node, key = rng.randrange(len(self.plan["homes"])), self._key() + "c"
            script = f"echo run >>{self.plan['marks']}/{key}; sleep 0.2; echo {key}"
            told = hashlib.sha256(f"{key}\n".encode()).hexdigest()
            self.journal.note(key=key, node=node, cancelled=True, kind="marked", retries=0, sha256=told)
            words = ("run", "--ring", "own", "--deadline", "60s", "--idempotency-key", key, "--", "sh", "-c", script)
            command = subprocess.Popen(
                [*PROGRAM, *words],
                env=self.plan["environs"][node],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            out, err, patience_s = b"", b"", rng.choice((0.3, 1.0, AGAIN_S))
            try:
                out, err = command.communicate(timeout=patience_s)
            except subprocess.TimeoutExpired:
                command.kill()
                out, err = command.communicate()  # it may have ended by itself meanwhile
            if command.returncode == 0 and out != f"{key}\n".encode():
                self.journal.note(key=key, node=node, command=[out.decode(), err.decode()])
            elif b"Traceback" in err:
                self.journal.note(key=key, node=node, command=[command.returncode, err.decode()])
            elif command.returncode > 0:
                self.journal.note(key=key, node=node, exit=command.returncode, text=err.decode()[-300:])


def main() -> None:
    """Reads the plan and goes to work."""
    Load(json.loads(Path(sys.argv[1]).read_text()), int(sys.argv[2])).run()


if __name__ == "__main__":
    main()
