"""Local calls: what each method of the local socket does, and the errors it answers with."""

from __future__ import annotations

import base64
from collections.abc import Callable
from heapq import nlargest
from typing import TYPE_CHECKING, Any

from clawnet import limits
from clawnet.errors import ClawnetError, DataError, NotFoundError, UnreachableError
from clawnet.identity import multiaddr
from clawnet.market.records import FINAL_STATES, Task, decode_task
from clawnet.money import format_credits, parse_credits
from clawnet.node.audit import Audit
from clawnet.node.context import Context
from clawnet.node.exporting import Export
from clawnet.node.output import Start
from clawnet.node.params import ID_DIGITS, Params, integer, task_digits, words
from clawnet.node.retained import forgotten, unknown
from clawnet.wire.events import CallGone, Dial, DialEnded, Hangup, ReadBlob, RpcCall

if TYPE_CHECKING:
    from clawnet.node.kernel import Rooms

PAGE_MAX = 500


class Calls:
    """One method a name; every failure is answered as a ClawnetError."""

    def __init__(self, ctx: Context, rooms: Rooms) -> None:
        self._ctx = ctx
        self._rooms = rooms
        self._methods: dict[str, Callable[[int, Params], None]] = {
            "node.status": self._status,
            "task.submit": self._task_submit,
            "task.check": self._task_check,
            "task.get": self._with_task(self._task_get),
            "task.bids": self._with_task(self._task_bids),
            "task.why": self._with_task(self._task_why),
            "task.follow": self._with_task(self._task_follow),
            "task.read": self._with_task(self._task_read),
            "task.cancel": self._with_task(self._task_cancel),
            "task.save": self._with_task(rooms.saving.save),
            "task.approve": self._with_task(rooms.approvals.approve),
            "task.list": self._task_list,
            "job.list": rooms.worked.page,
            "peer.list": self._peer_list,
            "peer.nearby": lambda call, params: ctx.reply(call, {"items": rooms.neighbours.items(), "next": None}),
            "peer.show": self._peer_show,
            "peer.connect": self._peer_connect,
            "peer.disconnect": self._peer_disconnect,
            "peer.invite": rooms.invites.invite,
            "peer.join": rooms.invites.join,
            "peer.remove": rooms.removals.remove,
            "node.leave": rooms.throwaways.leave,
            "peer.ban": lambda call, params: self._ban(call, params, True),
            "peer.unban": lambda call, params: self._ban(call, params, False),
            "peer.reputation": self._reputation,
            "wallet.balance": lambda call, params: ctx.reply(call, rooms.views.balance()),
            "wallet.escrows": lambda call, params: ctx.reply(call, {"items": rooms.views.escrows(), "next": None}),
            "wallet.history": rooms.history.page,
            "wallet.send": self._send,
            "wallet.resume": self._resume,
            "identity.rotate": rooms.successions.rotate,
            "wallet.export": lambda call, params: Export(ctx, rooms, call, params).start(),
            "wallet.audit": lambda call, params: Audit(ctx, rooms, call, params).start(),
        }

    def call(self, event: RpcCall) -> None:
        """Runs a method; what goes wrong is the answer."""
        method = self._methods.get(event.method)
        self._ctx.credential = event.credential
        try:
            if method is None:
                raise NotFoundError(f"there is no method {event.method!r}", hint="command and daemon differ in version")
            method(event.call, event.params)
        except ClawnetError as error:
            if error.exit_code == 70 and error.code == "internal":
                raise
            self._ctx.fail(event.call, error)

    def gone(self, event: CallGone) -> None:
        """A client left; its tasks go on, and what it wanted written and is not written yet is dropped."""
        self._rooms.writes.drop(("call", event.call))
        self._rooms.tasks.followers.gone(event.call)

    # --- tasks

    def _with_task(self, then: Callable[[int, Params, Task], None]) -> Callable[[int, Params], None]:
        """Finds the task named by id or prefix, in memory or in the database."""

        def run(call: int, params: Params) -> None:
            text = task_digits(params)
            if len(text) == ID_DIGITS:
                task = self._rooms.tasks.get(bytes.fromhex(text))
                if task is not None:
                    then(call, params, task)
                    return
            self._rooms.loads.ask("task_by_prefix", (text, 9), lambda rows: found(call, params, text, rows), call=call)

        def found(call: int, params: Params, text: str, rows: tuple[Any, ...]) -> None:
            if not rows:
                raise unknown(text)
            if len(rows) > 1:
                names = ", ".join(row[0].hex()[:12] for row in rows[:8])
                raise NotFoundError(f"{text!r} begins several task ids: {names}", hint="give more of the id")
            task = self._rooms.tasks.get(rows[0][0]) or decode_task(rows[0][-1])
            then(call, params, task)

        return run

    def _task_submit(self, call: int, params: Params) -> None:
        before_ms = integer(params, "retry_failed_before_ms", 0)
        awaited, told = params.get("awaited") is True, params.get("progress") is True
        self._rooms.tasks.submit(call, params.get("spec") or {}, before_ms, awaited=awaited, told=told)

    def _task_check(self, call: int, params: Params) -> None:
        """What is wrong with each of these submissions (null: nothing), by the rules that accept them."""
        specs = params.get("specs")
        if not isinstance(specs, list) or len(specs) > limits.LIST_ITEMS_MAX:
            raise DataError(f"specs is no list of at most {limits.LIST_ITEMS_MAX} tasks")
        items: list[dict[str, Any] | None] = []
        for spec in specs:
            try:
                self._rooms.tasks.normal(spec)
                items.append(None)
            except ClawnetError as error:
                items.append(error.as_dict())
        self._ctx.reply(call, {"items": items, "next": None})

    def _task_get(self, call: int, params: Params, task: Task) -> None:
        self._with_streams(task, call, lambda: self._task_reply(call, task))

    def _task_reply(self, call: int, task: Task) -> None:
        view, newest = self._rooms.views.task(task), tuple(task.moves)

        def done(rows: tuple[Any, ...]) -> None:
            self._ctx.reply(call, {**view, "transitions": self._rooms.views.transitions(rows, newest)})

        self._rooms.loads.ask("transitions", (task.task_id,), done, call=call)

    def _with_streams(self, task: Task, call: int, then: Callable[[], None]) -> None:
        """Large output lies in a row of its own; it is read before the task is shown."""
        if not self._rooms.views.needs_streams(task):
            then()
            return
        assert task.result is not None

        def done(rows: tuple[Any, ...]) -> None:
            if rows:
                size = int.from_bytes(rows[0][-1][:4], "big")
                body = rows[0][-1][4:]
                self._rooms.views.keep_streams(task.task_id, body[:size], body[size:])
            then()

        self._rooms.loads.ask("result", (task.task_id, task.result["row"]), done, call=call)

    def _task_bids(self, call: int, params: Params, task: Task) -> None:
        self._rooms.loads.ask(
            "bids",
            (task.task_id,),
            lambda rows: self._ctx.reply(call, {"items": self._rooms.views.bids(rows), "next": None}),
            call=call,
        )

    def _task_why(self, call: int, params: Params, task: Task) -> None:
        loads, views, newest = self._rooms.loads, self._rooms.views, tuple(task.moves)

        def bids(rows: tuple[Any, ...]) -> None:
            loads.ask(
                "transitions",
                (task.task_id,),
                lambda moves: self._ctx.reply(call, views.why(task, rows, moves, newest)),
                call=call,
            )

        loads.ask("bids", (task.task_id,), bids, call=call)

    def _task_follow(self, call: int, params: Params, task: Task) -> None:
        output = bool(params.get("output", True))
        start = Start(
            from_end=params.get("from") == "end",
            offsets=(integer(params, "stdout", 0), integer(params, "stderr", 0)),
            attempt=integer(params, "attempt", -1),
            so_far=bool(params.get("so_far")),
            progress=params.get("progress") is True,
        )
        self._with_streams(task, call, lambda: self._rooms.tasks.follow(call, task, output=output, start=start))

    def _task_read(self, call: int, params: Params, task: Task) -> None:
        """A piece of a stored stream: of a result over 1 MiB from its blob, else from the row."""
        stream = str(params.get("stream") or "stdout")
        if stream not in ("stdout", "stderr") or task.result is None:
            raise NotFoundError(f"the task has no {stream} to read", hint="it has no result yet")
        offset = integer(params, "offset", 0)
        length = max(1, min(integer(params, "length", limits.MIB), limits.MIB))
        blob = task.result.get(stream + "_blob") or b""
        size = task.result[stream + "_bytes"]
        gone = forgotten(task.task_id, stream)
        if blob:
            self._ctx.out.append(ReadBlob(call, blob, offset, length, gone.as_dict()))
            return

        def small() -> None:
            assert task.result is not None
            streams = self._rooms.views.streams.get(task.task_id)
            data = task.result.get(stream) if streams is None else streams[stream == "stderr"]
            if data is None:
                raise gone
            part = data[offset : offset + length]
            body = {"data_b64": base64.b64encode(part).decode(), "size": size, "eof": offset + len(part) >= size}
            self._ctx.reply(call, body)

        self._with_streams(task, call, small)

    def _task_cancel(self, call: int, params: Params, task: Task) -> None:
        reason = str(params.get("reason") or "cancelled by the requester")[:200]
        self._rooms.tasks.cancel(task, reason)
        self._ctx.reply(call, {"task_id": task.task_id.hex(), "state": task.state})

    def _task_list(self, call: int, params: Params) -> None:
        limit = max(1, min(integer(params, "limit", 20), PAGE_MAX))
        states = words(params, "states")
        after_ms, after_id = None, None
        if params.get("after"):
            try:
                stamp, _, identifier = str(params["after"]).partition("-")
                after_ms, after_id = min(int(stamp), 2**62), bytes.fromhex(identifier)
            except ValueError:
                raise DataError(f"{params['after']!r} is no continuation of a list") from None
        if states and not FINAL_STATES & set(states):
            tasks = [task for task in self._rooms.tasks.open.values() if task.state not in FINAL_STATES]
            if states != ["open"]:
                tasks = [task for task in tasks if task.state in states]
            if after_ms is not None and after_id is not None:
                tasks = [task for task in tasks if (task.created_ms, task.task_id) < (after_ms, after_id)]
            newest = nlargest(limit, tasks, key=lambda task: (task.created_ms, task.task_id))
            more = f"{newest[-1].created_ms}-{newest[-1].task_id.hex()}" if len(tasks) > limit else None
            self._ctx.reply(call, {"items": [self._rooms.views.summary(task) for task in newest], "next": more})
            return

        def done(rows: tuple[Any, ...]) -> None:
            found = [self._rooms.tasks.get(row[0]) or decode_task(row[-1]) for row in rows]
            items = [self._rooms.views.summary(task) for task in found if not states or task.state in states]
            following = f"{rows[-1][2]}-{rows[-1][0].hex()}" if len(rows) == limit else None
            self._ctx.reply(call, {"items": items, "next": following})

        state = states[0] if len(states) == 1 else ""
        self._rooms.loads.ask("tasks_page", (state, after_ms, after_id, limit), done, call=call)

    # --- peers

    def named(self, params: Params) -> str:
        """The peer that a call is about; raises NotFoundError, or DataError for this node itself."""
        peer = self._rooms.members.resolve(str(params.get("peer") or ""))
        if peer not in self._rooms.members.records:
            raise DataError("that is this node itself", hint="name another peer")
        return peer

    def _peer_list(self, call: int, params: Params) -> None:
        views, members = self._rooms.views, self._rooms.members
        order = sorted(
            (r for r in members.records.values() if not r.ended),
            key=lambda r: (r.ring != "own", r.peer not in self._ctx.links, r.shown),
        )
        self._ctx.reply(call, {"items": [views.peer(record.peer) for record in order], "next": None})

    def _peer_show(self, call: int, params: Params) -> None:
        self._ctx.reply(call, self._rooms.views.peer(self.named(params)))

    def _peer_connect(self, call: int, params: Params) -> None:
        text = str(params.get("address") or "")
        address = multiaddr.parse(text)
        if address.peer is None:
            raise DataError(
                f"{text} does not name a peer", hint="add its /p2p/12D3KooW... part, as peer show prints it"
            )
        if self._rooms.members.is_me(address.peer):
            raise DataError("that is this node's own address")
        peer = self._ctx.ids.inner(address.peer)
        record = self._rooms.members.records.get(peer)
        if record is not None:
            record.muted = False
        self._ctx.out.append(Dial(call, peer, (text,)))

    def dial_ended(self, event: DialEnded) -> None:
        """A dial for a command ended; keepers that cannot be reached are not waited for."""
        if event.call <= 0:
            if event.reason:
                self._rooms.reaching.dial_ended(event.peer, event.reason)
            if event.reason and event.call == 0:
                self._rooms.books.chains.checked(event.peer)
                self._rooms.auctions.met(event.peer, connected=False)
            return
        if event.reason:
            error = UnreachableError(
                f"cannot connect to {event.peer[-8:]}: {event.reason}", hint="is its daemon running?"
            )
            self._ctx.fail(event.call, error)
            return
        party = self._rooms.members.party(event.peer)
        self._ctx.reply(event.call, {"peer": party, "state": "connected", "changed": True})

    def _peer_disconnect(self, call: int, params: Params) -> None:
        peer = self.named(params)
        connected = peer in self._ctx.links
        record = self._rooms.members.records[peer]
        record.muted = True
        self._rooms.members.save(record)
        self._ctx.out.append(Hangup(peer, "disconnected by the user"))
        self._ctx.reply(call, {"peer": self._rooms.members.party(peer), "state": "known", "changed": connected})

    def _ban(self, call: int, params: Params, on: bool) -> None:
        peer = self.named(params)
        changed = self._rooms.members.ban(peer, on)
        state = "banned" if on else ("connected" if peer in self._ctx.links else "known")
        self._ctx.reply(call, {"peer": self._rooms.members.party(peer), "state": state, "changed": changed})

    def _reputation(self, call: int, params: Params) -> None:
        members, views = self._rooms.members, self._rooms.views
        peers = [self.named(params)] if params.get("peer") else [r.peer for r in members.records.values()]
        items = sorted((views.reputation(peer) for peer in peers), key=lambda item: -item["score"])
        self._ctx.reply(call, {"items": items, "next": None})

    # --- wallet

    def _send(self, call: int, params: Params) -> None:
        peer = self.named(params)
        if params.get("amount_ucr") is not None:
            amount_ucr = integer(params, "amount_ucr", 0)
        else:
            amount_ucr = parse_credits(str(params.get("amount") or ""))
        if amount_ucr <= 0:
            raise DataError("an amount to send is more than 0")
        memo = str(params.get("memo") or "")
        credential = self._ctx.credential
        self._rooms.writes.once_checked(
            ("call", call), lambda: self._try(call, lambda: self._pay(call, credential, peer, amount_ucr, memo))
        )

    def _try(self, call: int, then: Callable[[], None]) -> None:
        """Does what had to wait; what goes wrong is the answer."""
        try:
            then()
        except ClawnetError as error:
            self._ctx.fail(call, error)

    def _pay(self, call: int, credential: str, peer: str, amount_ucr: int, memo: str) -> None:
        self._rooms.spending.check_payment(credential, amount_ucr)
        entry = self._rooms.books.send(
            self._rooms.members.account_of(peer), amount_ucr, self._rooms.books.memo_hash(memo)
        )
        self._rooms.spending.payment(credential, amount_ucr)
        self._ctx.reply(
            call,
            {
                "to": self._rooms.members.party(peer),
                "amount": format_credits(amount_ucr),
                "seq": entry.seq,
                "hash": entry.hash.hex(),
            },
        )

    def _resume(self, call: int, params: Params) -> None:
        """The owner's override of the restore rule."""
        self._rooms.books.chains.restore.accept_risk()
        self._ctx.reply(call, self._rooms.views.balance())

    # --- the node

    def _status(self, call: int, params: Params) -> None:
        self._ctx.reply(call, self._rooms.views.status())

    def warnings(self) -> list[str]:
        """What the owner should know, in sentences."""
        found = []
        books = self._rooms.books
        if self._rooms.twins.reason():
            found.append(self._rooms.twins.reason())
        if books.purse.read_only_reason:
            why = books.chains.restore.sentence() or books.purse.read_only_reason
            found.append(f"the wallet is read-only: {why}")
        found.extend(self._rooms.members.warnings())
        found.extend(self._rooms.removals.warnings())
        return found

    def findings(self) -> list[dict[str, str]]:
        """What the node itself finds for `doctor`: wallet, clock, peers."""
        remedy = self._rooms.books.chains.restore.remedy()
        findings = [
            {"check": "node", "level": "warn", "message": text, "remedy": remedy or "clawnet daemon logs tells more"}
            for text in self.warnings()
        ]
        findings += self._rooms.approvals.findings()
        skew_ms = self._rooms.members.skew_ms()
        if skew_ms is not None:
            level = "ok" if abs(skew_ms) <= limits.CLOCK_STOP_MS else "error"
            remedy = "" if level == "ok" else "set this machine's clock (an NTP service keeps it right)"
            text = f"this machine's clock differs from its peers' by {abs(skew_ms) / 1000:.1f} s"
            findings.append({"check": "clock", "level": level, "message": text, "remedy": remedy})
        return findings
