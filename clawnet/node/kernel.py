"""Node: routes every stimulus to its room and gathers a turn's effects. Pure: no I/O, no clock, no entropy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from clawnet import limits
from clawnet.config import Config
from clawnet.errors import ClawnetError
from clawnet.ledger.terms import LedgerTerms
from clawnet.market.records import Job, decode_job
from clawnet.node.approvals import Approvals
from clawnet.node.auctions import Auctions
from clawnet.node.awards import Awards
from clawnet.node.bidding import Bidding
from clawnet.node.books import Books
from clawnet.node.calls import Calls
from clawnet.node.cards import Cards
from clawnet.node.context import Context, Outbox, Ports
from clawnet.node.draining import Draining
from clawnet.node.fetches import Fetches
from clawnet.node.gossiping import Gossiping
from clawnet.node.history import History
from clawnet.node.invites import Invites
from clawnet.node.jobs import INPUTS, Jobs
from clawnet.node.leases import Leases
from clawnet.node.loads import Loads
from clawnet.node.members import Members, MeshFacts
from clawnet.node.mesh_keys import MeshKeys
from clawnet.node.neighbours import Neighbours
from clawnet.node.offers import Offers
from clawnet.node.pay import Pay
from clawnet.node.placing import Placing
from clawnet.node.quotas import Quotas
from clawnet.node.reaching import Reaching
from clawnet.node.relay import FLOOR_KEY, Relay
from clawnet.node.removals import Removals
from clawnet.node.results import Results
from clawnet.node.saving import Saving
from clawnet.node.spending import KIND_ROW, ROW, Spending
from clawnet.node.streaming import Streaming
from clawnet.node.succession import Successions
from clawnet.node.taking import Taking
from clawnet.node.tasks import Tasks
from clawnet.node.throwaways import Throwaways
from clawnet.node.twins import STATED_KEY, Twins
from clawnet.node.verdicts import Verdicts
from clawnet.node.views import Views
from clawnet.node.worked import Worked
from clawnet.node.writes import Writes
from clawnet.wire import events as e
from clawnet.wire import messages as m
from clawnet.wire.fileevents import Moved, OutputsSaved
from clawnet.wire.messages import Kind

Read = Callable[[str, tuple[Any, ...]], Iterable[tuple[Any, ...]]]
"""A named read of storage/queries.py, or "table:NAME" for all rows of a table; used at start-up only."""


class Rooms:
    """The rooms of one node, each knowing the others through this object."""

    outbox: Outbox
    loads: Loads
    relay: Relay
    twins: Twins
    successions: Successions
    members: Members
    neighbours: Neighbours
    removals: Removals
    mesh_keys: MeshKeys
    throwaways: Throwaways
    cards: Cards
    reaching: Reaching
    offers: Offers
    gossiping: Gossiping
    books: Books
    spending: Spending
    approvals: Approvals
    tasks: Tasks
    auctions: Auctions
    awards: Awards
    leases: Leases
    results: Results
    verdicts: Verdicts
    bidding: Bidding
    taking: Taking
    placing: Placing
    fetches: Fetches
    quotas: Quotas
    jobs: Jobs
    streaming: Streaming
    pay: Pay
    invites: Invites
    writes: Writes
    views: Views
    saving: Saving
    history: History
    worked: Worked
    calls: Calls
    draining: Draining


class Node:
    """One member of one mesh. `step` takes what happened; `end_turn` closes a turn and returns the last effects."""

    def __init__(
        self,
        config: Config,
        ports: Ports,
        *,
        me: str,
        account: bytes,
        facts: MeshFacts,
        terms: LedgerTerms,
        escrow_seed: bytes,
        os_family: str,
        version: str,
    ) -> None:
        self.ctx = Context(me, account, config, ports)
        rooms = self.rooms = Rooms()
        rooms.outbox = Outbox(self.ctx)
        rooms.loads = Loads(self.ctx)
        rooms.bidding = Bidding(self.ctx, rooms)
        rooms.placing = Placing(self.ctx, rooms)
        rooms.fetches = Fetches(self.ctx, rooms)
        rooms.quotas = Quotas(self.ctx, rooms)
        rooms.jobs = Jobs(self.ctx, rooms, os_family)
        rooms.streaming = Streaming(self.ctx, rooms)
        rooms.pay = Pay(self.ctx, rooms, escrow_seed)
        rooms.taking = Taking(self.ctx, rooms)
        rooms.twins = Twins(self.ctx, rooms)
        rooms.relay = Relay(self.ctx, rooms)
        rooms.successions = Successions(self.ctx, rooms)
        rooms.members = Members(self.ctx, rooms, facts, config.text("node.name"))
        self.ctx.wire_me = rooms.successions.present()
        rooms.neighbours = Neighbours(self.ctx, rooms)
        rooms.removals = Removals(self.ctx, rooms)
        rooms.mesh_keys = MeshKeys(self.ctx, rooms)
        rooms.throwaways = Throwaways(self.ctx, rooms)
        rooms.cards = Cards(self.ctx, rooms)
        rooms.reaching = Reaching(self.ctx, rooms)
        rooms.offers = Offers(self.ctx, rooms)
        rooms.gossiping = Gossiping(self.ctx, rooms)
        rooms.books = Books(self.ctx, rooms, terms, facts.mesh)
        rooms.spending = Spending(self.ctx, rooms)
        rooms.approvals = Approvals(self.ctx, rooms)
        rooms.views = Views(self.ctx, rooms, version)
        rooms.saving = Saving(self.ctx, rooms)
        rooms.tasks = Tasks(self.ctx, rooms)
        rooms.auctions = Auctions(self.ctx, rooms)
        rooms.awards = Awards(self.ctx, rooms)
        rooms.leases = Leases(self.ctx, rooms)
        rooms.results = Results(self.ctx, rooms)
        rooms.verdicts = Verdicts(self.ctx, rooms)
        rooms.invites = Invites(self.ctx, rooms)
        rooms.writes = Writes(self.ctx, rooms)
        rooms.history = History(self.ctx, rooms)
        rooms.worked = Worked(self.ctx, rooms)
        rooms.calls = Calls(self.ctx, rooms)
        rooms.draining = Draining(self.ctx, rooms)
        self._messages = self._message_table()
        self._stimuli = self._stimulus_table()

    # --- start-up

    def load(self, now_ms: int, read: Read) -> list[e.Effect]:
        """Takes in what the database holds and goes on where it stopped; the effects are performed as a turn's."""
        ctx, rooms = self.ctx, self.rooms
        ctx.now = now_ms
        fresh = self._load_ledger(read)
        for row in read("table:peers", ()):
            rooms.members.load(row[-1])
        for row in read("table:statements", ()):
            rooms.removals.load(row[-1])
        for row in read("table:leases", ()):
            rooms.throwaways.load(row[-1])
        rooms.removals.start()
        rooms.mesh_keys.adopt()
        stored_host = ""
        for peer, since_ms in read("table:awaited", ()):
            rooms.books.chains.restore.load_awaited(peer, since_ms)
        floor_ms = 0
        for key, body in read("table:meta", ()):
            if key == "checkpoint":
                rooms.books.countersigns.load(body)
            elif key == "restore":
                rooms.books.chains.restore.load_reason(body.decode())
            elif key.startswith((ROW, KIND_ROW)):
                rooms.spending.load(key, body)
            elif key == "host":
                stored_host = body.decode()
            elif key == FLOOR_KEY:
                floor_ms = int(body)
            elif key == STATED_KEY:
                rooms.twins.load(body)
        rooms.relay.load([(time_ms, author, name) for author, name, time_ms in read("table:relayed", ())], floor_ms)
        for peer, body in read("table:reputation", ()):
            rooms.members.reputation.from_bytes(peer, body)
        for key, body in read("table:durations", ()):
            rooms.bidding.durations.load(key, body)
        for row in read("table:invites", ()):
            rooms.invites.load(row[-1])
        for row in read("table:outbox", ()):
            rooms.outbox.load(row)
            if row[4] in (Kind.TASK_REJECT, Kind.TASK_WAIVER):
                rooms.taking.over(row[3])
        for row in read("jobs_open", ()):
            self._load_job(decode_job(row[-1]), read)
        for task_id, peer, blob in read("table:blob_grants", ()):
            ctx.out.append(e.GrantBlob(task_id, peer, blob))
        self._load_tasks(read)
        rooms.books.start()
        rooms.books.chains.restore.start(ctx.ports.host, stored_host)
        rooms.books.chains.reconsider()
        if not fresh:
            rooms.books.chains.start_check(rooms.books.chains.keepers())
        rooms.twins.start()
        rooms.jobs.resume()
        rooms.members.start()
        rooms.auctions.expect([effect.peer for effect in ctx.out if isinstance(effect, e.Dial)])
        rooms.outbox.peer_up(ctx.me)
        ctx.wake(("heads",), now_ms + limits.HEADS_EVERY_MS)
        return self._close_turn()

    def _load_ledger(self, read: Read) -> bool:
        """Snapshots, then the entries after them; True when there was no chain of our own."""
        book, account = self.rooms.books.book, self.ctx.account
        known: dict[bytes, int] = {}
        for owner, snapshot in read("table:accounts", ()):
            known[owner] = book.restore(snapshot)
        for _, proof in read("table:proofs", ()):
            book.learn_proof(proof, trusted=True)
        heads = {owner: int(last) for owner, last in read("entry_heads", ())}
        for owner, last in heads.items():
            first = known.get(owner, -1) + 1
            while first <= last:
                rows = list(read("entries_range", (owner, first, last, 4 * limits.MIB)))
                if not rows:
                    break
                for row in rows:
                    book.apply(row[-1], self.ctx.now, trusted=True)
                first = rows[-1][1] + 1
        if account in heads:
            first = max(0, heads[account] - limits.OPEN_LINES_MAX)
            while first <= heads[account]:
                rows = list(read("entries_range", (account, first, heads[account], 4 * limits.MIB)))
                if not rows:
                    break
                self.rooms.books.shipping.recent.extend((row[1], row[-1]) for row in rows)
                first = rows[-1][1] + 1
        return account not in heads

    def _load_job(self, job: Job, read: Read) -> None:
        rows = list(read("document", (job.job,)))
        self.rooms.jobs.load(job, rows[0][-1] if rows else None)
        if job.state == "claimed":
            self.rooms.books.shipping.load_claimed(job)

    def _load_tasks(self, read: Read) -> None:
        rooms = self.rooms
        rows = {row[0]: row for row in read("tasks_open", ())}
        for (task_id,) in read("table:unsettled", ()):
            for row in read("task", (task_id,)):
                rows[task_id] = row
        loaded = [rooms.tasks.load(row[-1]) for row in rows.values()]
        for task in loaded:
            documents = list(read("document", (task.task_id,)))
            if documents:
                rooms.awards.documents[task.task_id] = documents[0][-1]
            rooms.tasks.resume(task)

    # --- steps

    def step(self, now_ms: int, stimulus: e.Stimulus) -> list[e.Effect]:
        """What follows from one stimulus. Effects come from end_turn, except that callers may ask for them at once."""
        self.ctx.now = now_ms
        told = self.rooms.successions.inward(stimulus)
        if told is not None:
            self._stimuli[type(told)](told)
        return self._effects()

    def _effects(self) -> list[e.Effect]:
        out, self.ctx.out = self.ctx.out, []
        return self.rooms.successions.outward(out) if self.ctx.ids else out

    def end_turn(self, now_ms: int) -> list[e.Effect]:
        """Opens waiting auctions, starts queued jobs, writes the ledger entries and rows that the turn owes."""
        self.ctx.now = now_ms
        return self._close_turn()

    def _close_turn(self) -> list[e.Effect]:
        rooms = self.rooms
        rooms.throwaways.pump()
        rooms.auctions.pump()
        rooms.jobs.pump()
        rooms.writes.flush()
        rooms.books.flush()
        rooms.tasks.flush()
        rooms.jobs.flush()
        rooms.books.snapshot()
        if rooms.draining.ended():
            rooms.books.snapshot(force=True)
            self.ctx.out.append(e.Drained())
        return self._effects()

    def _stimulus_table(self) -> dict[type[e.Stimulus], Callable[[Any], None]]:
        rooms = self.rooms
        return {
            e.MessageIn: self._message,
            e.TimerFired: self._timer,
            e.RpcCall: rooms.calls.call,
            e.CallGone: rooms.calls.gone,
            e.PeerUp: rooms.members.up,
            e.PeerDown: rooms.members.down,
            e.TaskOutput: rooms.streaming.output,
            e.OutputKept: rooms.streaming.kept,
            e.TaskExited: rooms.jobs.exited,
            e.InputsReady: self._inputs_ready,
            e.BlobReady: self._blob_ready,
            e.Opened: rooms.results.opened,
            OutputsSaved: rooms.saving.saved,
            Moved: rooms.saving.moved,
            e.Loaded: rooms.loads.loaded,
            e.JoinAsked: rooms.invites.asked,
            e.JoinAnswered: rooms.invites.answered,
            e.DialEnded: rooms.calls.dial_ended,
            e.CapacityChanged: rooms.cards.capacity_changed,
            e.Listening: rooms.cards.listening,
            e.MeetPeers: rooms.members.meet,
            e.Rekeyed: lambda event: rooms.members.start(),
            e.NeighbourSeen: rooms.neighbours.seen,
            e.NeighbourGone: rooms.neighbours.gone,
            e.Reloaded: rooms.members.reloaded,
            e.Drain: lambda event: rooms.draining.begin(),
        }

    def _message_table(self) -> dict[type[m.Message], Callable[[e.MessageIn], None]]:
        r = self.rooms
        return {
            m.Offer: lambda event: r.bidding.offer(event, event.message),  # type: ignore[arg-type]
            m.Bid: lambda event: r.auctions.bid(event.peer, event.message),  # type: ignore[arg-type]
            m.Decline: lambda event: r.auctions.decline(event.peer, event.message),  # type: ignore[arg-type]
            m.Winner: lambda event: r.taking.winner(event, event.message),  # type: ignore[arg-type]
            m.EscrowLock: lambda event: r.taking.lock(event, event.message),  # type: ignore[arg-type]
            m.Accept: lambda event: r.awards.accept(event, event.message),  # type: ignore[arg-type]
            m.Reject: lambda event: r.awards.reject(event, event.message),  # type: ignore[arg-type]
            m.Cancel: lambda event: r.jobs.cancel(event, event.message),  # type: ignore[arg-type]
            m.Result: lambda event: r.results.result(event, event.message),  # type: ignore[arg-type]
            m.Progress: lambda event: r.awards.progress(event, event.message),  # type: ignore[arg-type]
            m.Output: self._output,
            m.Waiver: lambda event: r.awards.waiver(event, event.message),  # type: ignore[arg-type]
            m.Settlement: self._settlement,
            m.LedgerPull: lambda event: r.books.chains.pulled(event.peer, event.message),  # type: ignore[arg-type]
            m.LedgerPush: lambda event: r.books.chains.pushed(event.peer, event.message),  # type: ignore[arg-type]
            m.Countersign: lambda event: r.books.countersigns.message(event.peer, event.message),  # type: ignore[arg-type]
            m.Gossip: lambda event: r.gossiping.heard(event, event.message),  # type: ignore[arg-type]
            m.PeerInfo: lambda event: r.cards.heard(event, event.message),  # type: ignore[arg-type]
            m.Membership: self._membership,
            m.Ack: self._ack,
        }

    def _message(self, event: e.MessageIn) -> None:
        handler = self._messages.get(type(event.message))
        if self.rooms.removals.silent(event.peer):
            self.ctx.count("messages_refused_total", "membership_over")
            return
        if handler is None:
            self.ctx.count("messages_ignored_total", type(event.message).__name__)
            return
        try:
            handler(event)
        except ClawnetError as error:
            if error.exit_code == 70:
                raise
            self.ctx.log(
                "security", "message.refused", peer=event.peer, kind=type(event.message).__name__, reason=error.message
            )
            self.ctx.count("messages_refused_total", error.code)

    def _membership(self, event: e.MessageIn) -> None:
        """Ends of memberships and mesh keys, or nodes that go on under another key."""
        message = event.message
        assert isinstance(message, m.Membership)
        (self.rooms.successions if message.successions else self.rooms.removals).told(event, message)

    def _output(self, event: e.MessageIn) -> None:
        """A preview for the requester; without data, its question for what it lacks."""
        message = event.message
        assert isinstance(message, m.Output)
        (self.rooms.awards.output if message.data else self.rooms.streaming.asked)(event, message)

    def _settlement(self, event: e.MessageIn) -> None:
        """Entries with an obligation: acknowledged once nothing that they need is missing."""
        message = event.message
        assert isinstance(message, m.Settlement)
        complete = self.rooms.books.take(event.peer, message.entries)
        if complete and event.obligation is not None:
            self.ctx.send(event.peer, m.Ack(event.obligation), event.id)

    def _ack(self, event: e.MessageIn) -> None:
        message = event.message
        assert isinstance(message, m.Ack)
        row = self.rooms.outbox.rows.get(message.obligation)
        if row is None or not self.rooms.outbox.acknowledged(message.obligation, event.peer):
            return
        if row.kind is Kind.MARKET_SETTLEMENT:
            self.rooms.books.shipping.acknowledged(event.peer, row.about)
        elif row.kind is Kind.TASK_RESULT:
            self.rooms.pay.result_acknowledged(row.about)

    def _timer(self, event: e.TimerFired) -> None:
        rooms, key = self.rooms, event.key
        what = key[0]
        if what == "task":
            task = rooms.tasks.open.get(key[1])
            if task is not None:
                rooms.leases.timer(task)
        elif what == "auction":
            rooms.auctions.timer(key[1])
        elif what == "job":
            rooms.jobs.timer(key[1])
        elif what == "fetch":
            rooms.fetches.timer(key[1])
        elif what == "open":
            rooms.results.timer(key[1])
        elif what == "outbox":
            rooms.outbox.timer()
        elif what == "output":
            rooms.streaming.timer(key[1])
        elif what == "progress":
            rooms.jobs.progress()
        elif what == "reach":
            rooms.reaching.timer(key[1])
        elif what == "twin":
            rooms.twins.timer()
        elif what == "heads":
            rooms.books.chains.gossip_heads()
            rooms.books.refund_orphans()
            rooms.members.keep_up()
            rooms.removals.keep_up()
            rooms.mesh_keys.keep_up()
            rooms.throwaways.keep_up()
        elif what == "keepers":
            rooms.books.push_keepers()
        elif what == "start_check":
            rooms.books.chains.check_ends()
        elif what == "drain":
            rooms.books.drain("")
        elif what == "drain_timeout":
            rooms.draining.timed_out()
        elif what == "drain_settle":
            rooms.draining.settled()

    def _inputs_ready(self, event: e.InputsReady) -> None:
        calls = self.rooms.tasks.draft_calls(event.request)
        try:
            self.rooms.tasks.inputs_ready(event)
        except ClawnetError as error:
            for call in calls:
                self.ctx.fail(call, error)

    def _blob_ready(self, event: e.BlobReady) -> None:
        if not self.rooms.fetches.over(event):
            return
        if event.request.startswith(INPUTS):
            self.rooms.jobs.inputs_fetched(event)
        else:
            self.rooms.results.blob_ready(event)

    # --- what the adapters read between steps

    def hello_facts(self) -> tuple[bytes, str, list[bytes], list[bytes]]:
        """(mesh id, name, certificates, rotate entries) for the HELLO of a new control stream."""
        facts = self.rooms.members.facts
        return facts.mesh, self.rooms.members.name, facts.certificates, facts.rotations

    def admit(self, peer: str, hello: m.Hello, wanted: str = "") -> str:
        """ "" when the peer may speak on the control stream, else the refusal. `wanted`: see Members.admit."""
        return self.rooms.members.admit(peer, hello, wanted)

    def addresses(self, peer: str) -> list[str]:
        """Where a peer says that it listens, whichever of its ids is named."""
        return self.rooms.members.addresses(self.ctx.ids.inner(peer))

    def kept_ids(self) -> frozenset[bytes]:
        """Ids of tasks and jobs that an open line, an unclaimed release or the outbox still needs."""
        rooms = self.rooms
        owed = {row.about[:16] for row in rooms.outbox.rows.values()}
        return frozenset((*rooms.tasks.open, *rooms.jobs.jobs, *owed))
