"""Read-only answers: tasks, bids, peers, wallet, status as the JSON objects of answers.py."""

from __future__ import annotations

import base64
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from clawnet import PROTOCOL_ID, __version__
from clawnet.answers_market import time_text
from clawnet.errors import FundsError, exit_code_of
from clawnet.market.auction import decode_record, explain
from clawnet.market.records import FINAL_STATES, Attempt, Task
from clawnet.money import format_credits
from clawnet.node import saving
from clawnet.node.approvals import is_held
from clawnet.node.context import Context

if TYPE_CHECKING:
    from clawnet.node.kernel import Rooms

STREAMS_KEPT_MAX = 16
SMALL_STREAMS_BYTES = 16 * 1024
UNDER_WAY = ("awarded", "locked", "accepted")
APPROVE = "clawnet market approve TASK lets it go, clawnet market cancel TASK drops it"
OUTCOME_STATES = ("delivering", "released", "claimed", "done")


def _stream(data: bytes | None, name: str) -> dict[str, Any]:
    """A stream of a result: text where it is UTF-8, else base64 beside a null."""
    if data is None:
        return {name: None}
    try:
        return {name: data.decode()}
    except UnicodeDecodeError:
        return {name: None, name + "_b64": base64.b64encode(data).decode()}


def written(result: dict[str, Any]) -> int:
    """The bytes that a run brought: both streams, an answer's text, output files."""
    streams: int = result["stdout_bytes"] + result["stderr_bytes"] + len((result["text"] or "").encode())
    files: int = result.get("outputs_bytes", 0)  # a result of an older version has none
    return streams + files


def _usage(task: Task, result: dict[str, Any]) -> dict[str, Any]:
    """The cost record; tokens and model are a prompt's alone."""
    usage = dict(result["usage"])
    if task.kind != "prompt":
        for name in ("tokens_in", "tokens_out", "model", "finish_reason"):
            usage.pop(name, None)
    text = len((result["text"] or "").encode())
    streams = result["stdout_bytes"] + result["stderr_bytes"] + text
    return {**usage, "output_bytes": streams, "bytes_in": _sent(task), "bytes_out": written(result)}


def _sent(task: Task) -> int:
    """What an executor gets: the document, standard input in it, and the inputs."""
    return task.document_bytes + task.input_bytes


def _attempt_usage(task: Task, attempt: Attempt) -> dict[str, Any] | None:
    """What a try has cost, also one that failed, as its executor told it; None where nothing was told."""
    if not (attempt.duration_s or attempt.cpu_s or attempt.output_bytes):
        return None
    return {
        "duration_s": attempt.duration_s,
        "cpu_s": attempt.cpu_s,
        "memory_bytes_max": attempt.memory_bytes_max,
        "output_bytes": attempt.output_bytes,
        "bytes_in": _sent(task),
        "bytes_out": attempt.output_bytes,
    }


class Views:
    """Renders what the rooms hold. `streams` keeps the output of the newest large results at hand."""

    def __init__(self, ctx: Context, rooms: Rooms, version: str) -> None:
        self._ctx = ctx
        self._rooms = rooms
        self._version = version or __version__
        self.streams: OrderedDict[bytes, tuple[bytes, bytes]] = OrderedDict()

    def time(self, at_ms: int) -> str:
        """RFC 3339 in UTC."""
        return time_text(at_ms)

    # --- tasks

    def keep_streams(self, task_id: bytes, stdout: bytes, stderr: bytes) -> None:
        """Output too large for the task's row; its own row is written in the same turn."""
        self.streams[task_id] = (stdout, stderr)
        while len(self.streams) > STREAMS_KEPT_MAX:
            self.streams.popitem(last=False)

    def needs_streams(self, task: Task) -> bool:
        """Whether the output lies in a row of its own that is not at hand."""
        return bool(task.result and task.result.get("row") is not None and task.task_id not in self.streams)

    def task(self, task: Task) -> dict[str, Any]:
        """The task object of docs/CLI.md."""
        shown = self._shown_attempt(task)
        error = None
        if task.error_code:
            error = {
                "code": task.error_code,
                "message": task.error_text,
                "hint": task.error_hint,
                "exit_code": exit_code_of(task.error_code),
            }
        return {
            "task_id": task.task_id.hex(),
            "state": task.state,
            "type": task.kind,
            "description": task.description,
            "created_at": time_text(task.created_ms),
            "deadline": time_text(task.deadline_ms),
            "max_budget": format_credits(task.max_budget_ucr),
            "price": None if shown is None else format_credits(shown.released_ucr or shown.price_ucr),
            "ring": None if shown is None else ("own" if shown.ring == "self" else shown.ring),
            "executor": None if shown is None else self._rooms.members.party(shown.peer),
            "attempts": [self._attempt(task, attempt) for attempt in task.attempts],
            "bids": task.bids,
            "escrow": self._escrow(shown),
            "result": self._result(task),
            "acceptance": self._rooms.verdicts.view(task, shown),
            "error": error,
            "idempotency_key": task.spec["idempotency_key"] or None,
            "final": task.state in FINAL_STATES,
            "ended_at": time_text(task.updated_ms) if task.state in FINAL_STATES and task.updated_ms else None,
            "held": self._rooms.approvals.view(task),
        }

    @staticmethod
    def _shown_attempt(task: Task) -> Attempt | None:
        """The attempt that stands for the task: that which delivered, else holds the slot, else the last."""
        for attempt in task.attempts:
            if attempt.state in OUTCOME_STATES:
                return attempt
        return task.paying or (task.attempts[-1] if task.attempts else None)

    @staticmethod
    def _escrow(attempt: Attempt | None) -> dict[str, Any]:
        if attempt is None or attempt.lock_seq < 0:
            return {"id": None, "state": "none", "amount": "0"}
        return {
            "id": f"{attempt.lock_hash.hex()}:{attempt.line}",
            "state": attempt.escrow,
            "amount": format_credits(attempt.released_ucr or attempt.price_ucr),
        }

    def _attempt(self, task: Task, attempt: Attempt) -> dict[str, Any]:
        lost = not attempt.paying and not attempt.closed and attempt.state in UNDER_WAY
        ended = attempt.delivered_ms or attempt.ended_ms
        return {
            "attempt": attempt.n,
            "executor": self._rooms.members.party(attempt.peer),
            "state": "lost" if lost else attempt.state,
            "price": format_credits(attempt.price_ucr),
            "started_at": time_text(attempt.awarded_ms),
            "ended_at": time_text(ended) if ended else None,
            "reason": attempt.reason,
            "escrow": self._escrow(attempt),
            "usage": _attempt_usage(task, attempt),
        }

    def _result(self, task: Task) -> dict[str, Any] | None:
        result = task.result
        if result is None:
            return None
        stdout, stderr = result.get("stdout"), result.get("stderr")
        if task.task_id in self.streams:
            stdout, stderr = self.streams[task.task_id]
        usage = result["usage"]
        return {
            "exit_code": result["exit_code"],
            "signal": result["signal"],
            **_stream(stdout, "stdout"),
            **_stream(stderr, "stderr"),
            "text": result["text"] or None,
            **saving.shown(result),
            "sha256": result["sha256"].hex(),
            "duration_s": usage["duration_s"],
            "usage": _usage(task, result),
            "stdout_bytes": result["stdout_bytes"],
            "stderr_bytes": result["stderr_bytes"],
        }

    def summary(self, task: Task) -> dict[str, Any]:
        """A task as lists show it."""
        whole = self.task(task)
        names = (
            "task_id",
            "state",
            "type",
            "description",
            "created_at",
            "ended_at",
            "max_budget",
            "price",
            "executor",
            "error",
            "held",
        )
        return {**{name: whole[name] for name in names}, "exit_code": (task.result or {}).get("exit_code")}

    # --- bids and reasons

    def bids(self, rows: tuple[Any, ...]) -> list[dict[str, Any]]:
        """All bids for a task, best score first."""
        found = [peer["bid"] for record in self._rounds(rows) for peer in record["peers"] if peer["bid"] is not None]
        return sorted(found, key=lambda bid: -bid["score"])

    def _rounds(self, rows: tuple[Any, ...]) -> list[dict[str, Any]]:
        rounds = []
        for row in rows:
            record = explain(decode_record(row[-1]))
            record["opened_at"] = time_text(record.pop("opened_ms"))
            record["closed_at"] = time_text(record.pop("closed_ms"))
            for peer in record["peers"]:
                party = self._rooms.members.party(peer["peer"])
                peer["peer"] = party
                bid = peer["bid"]
                if bid is not None:
                    bid["bidder"] = party
                    bid["at"] = time_text(bid.pop("at_ms"))
                    bid.pop("price_ucr", None)
            record["winner"] = self._rooms.members.party(record["winner"]) if record["winner"] else None
            rounds.append(record)
        return rounds

    def why(
        self, task: Task, bids: tuple[Any, ...], transitions: tuple[Any, ...], newest: tuple[Any, ...] = ()
    ) -> dict[str, Any]:
        """Who was asked, who declined and why, every bid's four terms, why the winner won."""
        rounds = self._rounds(bids)
        last = rounds[-1] if rounds else None
        if last is None:
            waits = f"waits for approval: {task.held_reason}" if is_held(task) else "nobody has been asked yet"
            summary = task.error_text or waits
        elif last["winner"] is not None:
            summary = f"{last['winner']['name']} won: {last['reason']}"
        else:
            summary = last["reason"]
        declined: dict[str, int] = {}
        for record in rounds:
            for word, count in record["declined"].items():
                declined[word] = declined.get(word, 0) + count
        if declined:
            summary += "; declined: " + ", ".join(f"{count} {word}" for word, count in declined.items())
        if rounds and task.error_code == FundsError.code:
            summary += f"; {task.error_text}"
        return {
            "task_id": task.task_id.hex(),
            "state": task.state,
            "summary": summary,
            "hint": APPROVE if is_held(task) else task.error_hint,
            "rounds": rounds,
            "attempts": [self._attempt(task, attempt) for attempt in task.attempts],
            "transitions": self.transitions(transitions, newest),
        }

    @staticmethod
    def transitions(rows: tuple[Any, ...], newest: tuple[Any, ...] = ()) -> list[dict[str, Any]]:
        """The states a task went through: those with rows, and the newest that lie with the task (perhaps both)."""
        moves = {n: (at_ms, state, reason) for n, at_ms, state, reason in (*(row[1:] for row in rows), *newest)}
        return [
            {"state": state, "at": time_text(at_ms), "reason": reason}
            for _, (at_ms, state, reason) in sorted(moves.items())
        ]

    # --- peers

    def peer(self, peer: str) -> dict[str, Any]:
        """One peer, connected or not."""
        ctx, members = self._ctx, self._rooms.members
        record = members.records[peer]
        link = ctx.links.get(peer)
        card = members.index.card(peer)
        state = "connected" if link is not None else "known"
        if members.banned(peer):
            state = "removed" if record.ended else "banned"
        rtt_ms = members.rtt_ms(peer) if link is not None else 0.0
        return {
            **members.party(peer),
            "state": state,
            "address": link.address if link is not None else None,
            "transport": link.transport if link is not None else None,
            "rtt_s": rtt_ms / 1000 if rtt_ms else None,
            "reputation": members.reputation.score(peer, ctx.now).total,
            "last_seen": time_text(ctx.now if link is not None else record.last_ms) if record.last_ms else None,
            "inbound": link.inbound if link is not None else False,
            "connected_at": time_text(link.since_ms) if link is not None else None,
            "addresses": record.addresses,
            "capabilities": list(card.capabilities) if card else [],
            "models": list(card.models) if card else [],
            "labels": list(card.labels) if card else [],
            "os": card.os if card else "",
            "cpu": card.cpu if card else 0,
            "memory_bytes": card.memory_bytes if card else 0,
            "gpu": card.gpu if card else 0,
            "load": min(1.0, card.running / card.slots) if card and card.slots else 0.0,
            "account": record.account.hex(),
            "owner": record.owner.hex(),
            "inviter": ctx.ids.outer(record.inviter),
            "version": card.version if card else "",
            "notes": members.reputation.notes(peer),
            "came_by": self._came_by(peer),
            "invited_by": members.party(record.inviter) if record.inviter else None,
            "known_since": time_text(record.first_ms),
        }

    def _came_by(self, peer: str) -> str:
        """How this link came to be; of a peer never connected, how it is known."""
        ctx, rooms = self._ctx, self._rooms
        link = ctx.links.get(peer)
        present = ctx.ids.outer(peer)
        if link is None:
            return "" if rooms.members.records[peer].last_ms else "card"
        if link.inbound:
            return "inbound"
        if any(present in text for text in ctx.config.words("node.bootstrap_peers")):
            return "bootstrap"
        neighbour = rooms.neighbours.present.get(present)
        return "mdns" if neighbour is not None and link.address in neighbour.addresses else "dialled"

    def reputation(self, peer: str) -> dict[str, Any]:
        """This node's own view of a peer as an executor."""
        members = self._rooms.members
        score = members.reputation.score(peer, self._ctx.now)
        return {
            "peer": members.party(peer),
            "score": score.total,
            "factors": {
                "completion": score.completion,
                "on_time": score.on_time,
                "accuracy": score.accuracy,
                "dispute_ratio": score.dispute_ratio,
                "swarm": score.swarm,
            },
            "evidence": score.evidence,
            "confidence_discount": score.confidence_discount,
            "notes": members.reputation.notes(peer),
        }

    # --- wallet

    def balance(self) -> dict[str, Any]:
        """What may be spent, what is bound, what is on its way."""
        ctx, books = self._ctx, self._rooms.books
        view = books.book.view(ctx.account)
        incoming = sum(payable.amount_ucr for payable in books.book.incomes(ctx.account))
        return {
            "available": format_credits(view.available_ucr),
            "locked": format_credits(view.open_ucr),
            "incoming": format_credits(incoming),
            "account": ctx.account.hex(),
            "mesh": books.mesh.hex(),
            "open_lines": view.open_lines,
            "read_only": books.purse.read_only_reason or ("being checked" if books.chains.checking else None),
            "restore": books.chains.restore.view(),
            "spend": self._rooms.spending.view(),
        }

    def escrows(self) -> list[dict[str, Any]]:
        """Open lines of ours, and to us."""
        ctx, book = self._ctx, self._rooms.books.book
        items = [self._line(line, "payer", line.payee) for line in book.open_lines(ctx.account)]
        for account in book.accounts():
            if account != ctx.account:
                lines = book.open_lines(account)
                items.extend(self._line(line, "payee", account) for line in lines if line.payee == ctx.account)
        return items

    def _line(self, line: Any, role: str, counterparty: bytes) -> dict[str, Any]:
        return {
            "id": f"{line.lock_hash.hex()}:{line.line}",
            "role": role,
            "state": "locked",
            "amount": format_credits(line.left_ucr),
            "counterparty": self.account_party(counterparty),
            "task_id": self._rooms.tasks.task_of_hash(line.task) or self._rooms.pay.task_of(line.lock_hash, line.line),
            "locked_at": time_text(line.time_ms),
            "deliver_by": time_text(line.deliver_by_ms),
            "expires_at": time_text(line.expiry_ms),
        }

    def account_party(self, account: bytes) -> dict[str, Any]:
        """The peer behind an account."""
        peer = self._rooms.members.peer_of(account)
        if peer is not None:
            return self._rooms.members.party(peer)
        return {"peer_id": account.hex(), "name": "", "ring": "member"}

    # --- the node

    def gauges(self) -> dict[str, float]:
        """The node's part of the metrics."""
        ctx, rooms = self._ctx, self._rooms
        scores = [rooms.members.reputation.score(peer, ctx.now).total for peer in ctx.links]
        return {
            "peers_connected": len(ctx.links),
            "auctions_active": len(rooms.auctions.live),
            "tasks_open": len(rooms.tasks.open),
            "runs_active": len(rooms.jobs.running),
            "wallet_balance": rooms.books.purse.available_ucr / 1_000_000,
            "reputation_score": sum(scores) / len(scores) if scores else 0.5,
        }

    def status(self) -> dict[str, Any]:
        """The node's half of `daemon status`; the daemon adds what only a process knows."""
        ctx, rooms = self._ctx, self._rooms
        tasks: dict[str, int] = {}
        for task in rooms.tasks.open.values():
            tasks[task.state] = tasks.get(task.state, 0) + 1
        return {
            "running": True,
            "version": self._version,
            "protocol": PROTOCOL_ID,
            "peer_id": ctx.wire_me,
            "name": rooms.members.name,
            "mesh": rooms.books.mesh.hex(),
            "account": ctx.account.hex(),
            "draining": ctx.draining,
            "listen": rooms.cards.addresses,
            "peers_connected": len(ctx.links),
            "peers_known": len(rooms.members.records),
            "tasks": tasks,
            "runs": len(rooms.jobs.running),
            "slots": rooms.jobs.slots,
            "capabilities": list(rooms.cards.own.capabilities),
            "shell": dict.fromkeys(rooms.cards.own.shell_rings, "yes"),
            "balance": format_credits(rooms.books.purse.available_ucr),
            "activity": {
                "tasks_open": len(rooms.tasks.open),
                "jobs_open": len(rooms.jobs.jobs),
                "obligations_open": len(rooms.outbox.rows),
            },
            "restore": rooms.books.chains.restore.view(),
            "warnings": rooms.calls.warnings(),
        }
