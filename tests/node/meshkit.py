"""A small mesh in one process: production nodes on memory stores, messages as encoded bytes, a clock that a test moves.

Deterministic: entropy comes from a seed, links are FIFO, nothing sleeps. The executor runs a job at once and answers
with a real bundle (sealed where the job says so), so that keys and notes are the real ones.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import deque
from collections.abc import Callable
from typing import Any

from clawnet.config import Config
from clawnet.execution import bundle
from clawnet.identity.certificates import certify_node, certify_owner, read_charter
from clawnet.identity.keys import KeyPair, peer_id_of, verify
from clawnet.identity.membership import LocalMembership, found_mesh
from clawnet.ledger.book import FOREVER_MS, Book
from clawnet.ledger.terms import LedgerTerms
from clawnet.node.context import Ports
from clawnet.node.kernel import Node
from clawnet.node.members import MeshFacts
from clawnet.storage.memory import MemoryStore
from clawnet.wire import events as e
from clawnet.wire.blobid import blob_id
from clawnet.wire.codec import decode_payload, encode_payload
from clawnet.wire.messages import Hello, Message
from clawnet.wire.verdict import Check, Verdict
from tests.node.meshruns import Entropy, Runner, go_over, settle_key
from tests.node.outcomes import echo, judge, stopped, summary_of, unreachable

START_MS = 1_800_000_000_000


class Member:
    """One node with its disk, its inbox and its timers."""

    def __init__(
        self, mesh: Mesh, name: str, key: KeyPair, owner: KeyPair, local: LocalMembership, **keys: str
    ) -> None:
        self.mesh = mesh
        self.name = name
        self.key = key
        self.owner = owner
        self.local = local
        self.entropy = Entropy(mesh.seed + name)
        self.store = MemoryStore()
        self.config = Config.defaults({"node.name": name, **keys})
        self.inbox: deque[e.Stimulus] = deque()
        self.timers: list[tuple[int, int, tuple[Any, ...]]] = []
        self.due: dict[tuple[Any, ...], tuple[int, int]] = {}
        self.replies: dict[int, Any] = {}
        self.notes: dict[int, list[tuple[str, Any]]] = {}
        self.logs: list[e.Log] = []
        self.mesh_keys: list[e.KeepMeshKey] = []
        self.drained = 0
        self.runner: Runner = echo
        self.judge: Callable[[tuple[Check, ...], int | None, bytes], Verdict | None] = judge
        """How an opened result is judged; None: that takes long."""
        self.judging: dict[bytes, bundle.Summary] = {}
        self.stopper: Callable[[Member, bytes], e.TaskExited | None] = lambda member, job: stopped(job)
        self.runs: list[e.Run] = []
        self.stops: list[bytes] = []
        self.sent: list[tuple[str, str]] = []
        self.blobs: dict[bytes, bytes] = {}
        self.grants: dict[bytes, set[tuple[str, bytes]]] = {}
        self.packed: dict[str, bytes] = {}
        self.fetch_fails: Callable[[e.Fetch], e.BlobReady | None] = lambda effect: None
        self.inline_max = 2**19
        self.skew_ms = 0
        self.turns = 0
        self.next_key: KeyPair | None = None
        self.crash_at = 0
        self.crash_after_commit = False
        self.power_cut = False
        self._timer = 0
        self.boot()

    def keep(self, sealed: bytes) -> bytes:
        """A result too large to go inline becomes a blob."""
        self.blobs[blob_id(sealed)] = sealed
        return b""

    @property
    def now_ms(self) -> int:
        """The time by this member's own clock."""
        return self.mesh.now_ms + self.skew_ms

    @property
    def peer(self) -> str:
        return self.key.peer_id

    @property
    def account(self) -> bytes:
        """The first key, which every change of key leaves as it is."""
        return self.local.account(self.key.public)

    def rotate(self) -> int:
        """`identity rotate`, as the daemon does it: the next key first, then the node's entry."""
        self.next_key = KeyPair.generate(self.entropy)
        return self.call("identity.rotate", key=self.next_key)

    def _do_rotated(self, effect: e.Rotated) -> None:
        others = self.mesh.linked(self)
        for other in others:
            self.mesh.cut(self, other)
        go_over(self, effect.row)
        self.feed(e.Listening((f"/ip4/127.0.0.1/tcp/{4000 + len(self.mesh.members)}",)))
        self.mesh.relink += [(self, other) for other in others]
        self._do_reply(e.Reply(effect.call, effect.value))

    def _do_succeeded(self, effect: e.Succeeded) -> None:
        for granted in self.grants.values():
            granted |= {(effect.new, blob) for peer, blob in granted if peer == effect.old}

    def boot(self) -> None:
        """A start: a new node from what the disk holds; a change of key cut short is finished or taken back."""
        settle_key(self)
        facts = MeshFacts.of(self.local, self.key.public, bytes(32))
        terms = LedgerTerms(issuers=frozenset(facts.charter.issuers), grant_max_ucr=facts.charter.grant_max_ucr)
        self.node = Node(
            self.config,
            Ports(self.entropy, self.key.sign, lambda peer: 1.0, self.owner, unseal=self.key.unseal),
            me=peer_id_of(self.account),
            account=self.account,
            facts=facts,
            terms=terms,
            escrow_seed=hashlib.sha256(self.name.encode()).digest(),
            os_family="linux",
            version="test",
        )
        self.written: dict[bytes, tuple[bytearray, bytearray]] = {}
        self.inbox.clear()
        self.timers.clear()
        self.due.clear()
        self.grants.clear()
        self.perform(self.node.load(self.now_ms, self._read))
        self.feed(
            e.CapacityChanged(
                ("compute", "op:primes", "op:sha256", "op:sort", "op:wordcount", "shell-execution"),
                ("own", "member"),
                4,
                2**32,
                0,
            )
        )
        self.feed(e.Listening((f"/ip4/127.0.0.1/tcp/{4000 + len(self.mesh.members)}",)))

    def _read(self, name: str, args: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        if name.startswith("table:"):
            return list(self.store.load_all(name.removeprefix("table:")))
        return self.store.query(name, args)

    def feed(self, stimulus: e.Stimulus) -> None:
        self.inbox.append(stimulus)

    def call(self, method: str, **params: Any) -> int:
        number = self.mesh.next_call()
        self.feed(e.RpcCall(number, method, params))
        return number

    def turn(self) -> bool:
        """One turn: everything in the inbox, then the effects."""
        fired = self._fire()
        if not self.inbox and not fired:
            return False
        out: list[e.Effect] = []
        for _ in range(len(self.inbox)):
            out += self.node.step(self.now_ms, self.inbox.popleft())
        out += self.node.end_turn(self.now_ms)
        self.turns += 1
        crash = self.turns == self.crash_at
        self.perform(out, silent=crash and self.crash_after_commit)
        if crash:
            self.restart()
        return True

    def restart(self) -> None:
        """The process is killed and starts again: jobs, links and unsent messages are gone, the disk stays."""
        if self.power_cut:
            self.store.cut_power()
        for other in self.mesh.linked(self):
            self.mesh.cut(self, other)
            self.mesh.relink.append((self, other))
        self.boot()

    def perform(self, out: list[e.Effect], *, silent: bool = False) -> None:
        rows = [x for x in out if isinstance(x, (e.Put, e.Delete))]
        self.store.commit(rows, any(isinstance(x, e.Durable) for x in out))
        if silent:
            return
        for effect in out:
            handler = getattr(self, "_do_" + type(effect).__name__.lower(), None)
            if handler is not None:
                handler(effect)

    def _do_send(self, effect: e.Send) -> None:
        self.sent.append((effect.peer, type(effect.message).__name__))
        self.mesh.carry(self, effect)

    def _do_reply(self, effect: e.Reply) -> None:
        assert effect.call not in self.replies, "a call is answered once"
        self.replies[effect.call] = effect.error if effect.error is not None else effect.value

    def _do_notify(self, effect: e.Notify) -> None:
        self.notes.setdefault(effect.call, []).append((effect.method, effect.value))

    def _do_wake(self, effect: e.Wake) -> None:
        if effect.at_ms == e.NEVER:
            self.due.pop(effect.key, None)
            return
        self._timer += 1
        self.due[effect.key] = (effect.at_ms, self._timer)
        heapq.heappush(self.timers, (effect.at_ms, self._timer, effect.key))

    def _fire(self) -> bool:
        fired = False
        while self.timers and self.timers[0][0] <= self.now_ms:
            _, number, key = heapq.heappop(self.timers)
            if self.due.get(key, (0, 0))[1] == number:
                del self.due[key]
                self.inbox.append(e.TimerFired(key))
                fired = True
        return fired

    def next_timer_ms(self) -> int | None:
        while self.timers and self.due.get(self.timers[0][2], (0, 0))[1] != self.timers[0][1]:
            heapq.heappop(self.timers)
        return self.timers[0][0] - self.skew_ms if self.timers else None

    def _do_run(self, effect: e.Run) -> None:
        self.runs.append(effect)
        ended = self.runner(self, effect)
        if ended is not None:
            self.feed(ended)

    def write(self, run: e.Run, data: bytes, stream: int = 1) -> None:
        kept = self.written.setdefault(run.job, (bytearray(), bytearray()))[stream - 1]
        self.feed(e.TaskOutput(run.job, stream, len(kept), data))
        kept += data

    def _do_readoutput(self, effect: e.ReadOutput) -> None:
        kept = self.written[effect.job][effect.stream - 1]
        piece = bytes(kept[effect.offset :][: effect.length])
        self.feed(e.OutputKept(effect.job, effect.stream, effect.offset, piece))

    def _do_stoprun(self, effect: e.StopRun) -> None:
        self.stops.append(effect.job)
        ended = self.stopper(self, effect.job)
        if ended is not None:
            self.feed(ended)

    def _do_grantblob(self, effect: e.GrantBlob) -> None:
        self.grants.setdefault(effect.task_id, set()).add((effect.peer, effect.blob))

    def _do_revokeblobs(self, effect: e.RevokeBlobs) -> None:
        gone = {blob for _, blob in self.grants.pop(effect.task_id, ())}
        used = {blob for granted in self.grants.values() for _, blob in granted}
        for blob in gone - used:
            self.blobs.pop(blob, None)

    def _do_packinputs(self, effect: e.PackInputs) -> None:
        found = []
        for name, path in effect.paths:
            data = self.packed[path]
            self.blobs[blob_id(data)] = data
            found.append({"name": name, "kind": "file", "blob": blob_id(data), "bytes": len(data), "mode": 0o644})
        self.feed(e.InputsReady(effect.request, tuple(found)))

    def _do_fetch(self, effect: e.Fetch) -> None:
        if not self.mesh.fetching:
            return
        failed = self.fetch_fails(effect)
        if failed is not None:
            self.feed(failed)
            return
        source = self.mesh.members[effect.peer]
        if source is not self and frozenset((self.peer, source.peer)) not in self.mesh.links:
            self.feed(e.BlobReady(effect.request, "not connected"))
            return
        for blob, _ in effect.blobs:
            if blob in self.blobs:
                continue
            if (self.peer, blob) not in source.grants.get(effect.task_id, ()) or blob not in source.blobs:
                self.feed(e.BlobReady(effect.request, "not found"))
                return
            self.blobs[blob] = source.blobs[blob]
        self.feed(e.BlobReady(effect.request))

    def _do_dial(self, effect: e.Dial) -> None:
        if effect.call:
            self.mesh.dialled(self, effect)

    def _do_hangup(self, effect: e.Hangup) -> None:
        other = self.mesh.members.get(effect.peer)
        if other is not None and frozenset((self.peer, other.peer)) in self.mesh.links:
            self.mesh.cut(self, other, effect.reason)

    def _do_load(self, effect: e.Load) -> None:
        self.feed(e.Loaded(effect.request, tuple(self.store.query(effect.query, effect.args))))

    def _do_open(self, effect: e.Open) -> None:
        try:
            sealed = effect.inline or self.blobs[effect.blob]
            plain = sealed if effect.key is None else bundle.unseal(sealed, effect.key)
            opened = bundle.decode(plain)
        except Exception as error:  # noqa: BLE001 - what the real adapter turns into a reason
            self.feed(e.Opened(effect.request, str(error)))
            return
        summary = summary_of(opened, plain)
        verdict = self.judge(effect.acceptance, opened.exit_code, opened.stdout)
        if verdict is None:
            self.judging[effect.request] = summary
        else:
            self.feed(e.Opened(effect.request, "", summary, verdict))

    def _do_stopjudging(self, effect: e.StopJudging) -> None:
        if (summary := self.judging.pop(effect.request, None)) is not None:
            self.feed(e.Opened(effect.request, "", summary))

    def _do_log(self, effect: e.Log) -> None:
        self.logs.append(effect)

    def _do_drained(self, effect: e.Drained) -> None:
        self.drained += 1

    def _do_keepmeshkey(self, effect: e.KeepMeshKey) -> None:
        self.mesh_keys.append(effect)

    # --- what tests ask

    def task(self, call: int) -> dict[str, Any]:
        """The task object behind a submission's answer."""
        answer = self.replies[call]
        number = self.call("task.get", task=answer["task_id"])
        self.mesh.settle()
        view: dict[str, Any] = self.replies[number]
        return view


class Mesh:
    """Members and the links between them."""

    def __init__(self, seed: str = "seed") -> None:
        self.seed = seed
        self.now_ms = START_MS
        self.members: dict[str, Member] = {}
        self.links: set[frozenset[str]] = set()
        self.relink: list[tuple[Member, Member]] = []
        self.fetching = True
        self.dialled: Callable[[Member, e.Dial], None] = lambda member, dial: member.feed(unreachable(dial))
        """What becomes of a dial for a task; links that are kept are the test's."""
        self.fate: Callable[[Member, Member, Message], int] = lambda sender, receiver, message: 1
        """How often a message arrives: 0 drops it, 2 repeats it."""
        self.late: list[tuple[Member, e.MessageIn]] = []
        self.reorder: Callable[[Member, Member, Message], bool] = lambda sender, receiver, message: False
        """True: the message comes after everything else of this turn."""
        self._calls = 0
        self._ids = 0

    def next_call(self) -> int:
        self._calls += 1
        return self._calls

    def found(self, name: str, **keys: str) -> Member:
        """The founder, whose own account issues credits."""
        key, owner = self._key(name), self._key(name + " owner")
        local = found_mesh(owner, key.public, name, Entropy(self.seed + "charter"), self.now_ms)
        return self._add(Member(self, name, key, owner, local, **keys))

    def join(self, founder: Member, name: str, *, ring: str = "member", credits_ucr: int = 0, **keys: str) -> Member:
        """A member (or another machine of the founder's), certified as an invite would, with credits if asked."""
        _, mesh = read_charter(founder.local.charter)
        key = self._key(name)
        owner = founder.owner if ring == "own" else self._key(name + " owner")
        chain = list(founder.local.certificates[:-1])
        if ring == "member":
            chain.append(
                certify_owner(
                    founder.owner, mesh, owner.public, may_invite=False, issued_ms=self.now_ms, inviter=founder.peer
                )
            )
        chain.append(certify_node(owner, mesh, key.public, issued_ms=self.now_ms, inviter=founder.peer))
        local = LocalMembership(founder.local.charter, tuple(chain), False, founder.peer, ring)
        member = self._add(Member(self, name, key, owner, local, **keys))
        if credits_ucr:
            founder.node.rooms.books.grant(key.public, credits_ucr, bytes(16))
            founder.perform(founder.node.end_turn(self.now_ms))
        return member

    def _key(self, name: str) -> KeyPair:
        return KeyPair.from_seed(hashlib.sha256((self.seed + name).encode()).digest())

    def _add(self, member: Member) -> Member:
        self.members[member.peer] = member
        return member

    def link(self, a: Member, b: Member) -> None:
        """Connects two members; both hear of it."""
        self.links.add(frozenset((a.peer, b.peer)))
        for one, other in ((a, b), (b, a)):
            mesh, name, certificates, rotations = other.node.hello_facts()
            hello = Hello(
                [1, 0], "test", other.peer, one.peer, mesh, bytes(32), other.now_ms, name, certificates, rotations
            )
            refusal = one.node.admit(other.peer, hello)
            assert not refusal, refusal
            one.feed(e.PeerUp(other.peer, hello, "", "fake", one is b))

    def cut(self, a: Member, b: Member, reason: str = "cut") -> None:
        """The link is gone."""
        self.links.discard(frozenset((a.peer, b.peer)))
        a.feed(e.PeerDown(b.peer, reason))
        b.feed(e.PeerDown(a.peer, reason))

    def linked(self, member: Member) -> list[Member]:
        """Whom a member is connected to."""
        return [other for other in self.members.values() if frozenset((member.peer, other.peer)) in self.links]

    def link_all(self) -> None:
        members = list(self.members.values())
        for at, one in enumerate(members):
            for other in members[at + 1 :]:
                self.link(one, other)

    def carry(self, sender: Member, effect: e.Send) -> None:
        """A message goes to its receiver's inbox as its bytes, if they are linked."""
        if effect.peer == sender.peer:
            sender.feed(e.MessageIn(sender.peer, b"", effect.message, effect.reply_to, effect.obligation))
            return
        if frozenset((sender.peer, effect.peer)) not in self.links:
            return
        receiver = self.members[effect.peer]
        kind, payload = encode_payload(effect.message)
        message = decode_payload(int(kind), payload)
        for _ in range(self.fate(sender, receiver, message)):
            self._ids += 1
            event = e.MessageIn(sender.peer, self._ids.to_bytes(16, "big"), message, effect.reply_to, effect.obligation)
            if self.reorder(sender, receiver, message):
                self.late.append((receiver, event))
            else:
                receiver.feed(event)

    def settle(self, turns_max: int = 10_000) -> None:
        """Runs turns until nobody has anything to do at this moment."""
        for _ in range(turns_max):
            moved = sum(member.turn() for member in self.members.values()) > 0  # all of them, not the first
            if not moved and self.relink:
                pairs, self.relink = self.relink, []
                for one, other in pairs:
                    if other not in self.linked(one):
                        self.link(one, other)
                moved = True
            if not moved and self.late:
                late, self.late = self.late, []
                for receiver, event in reversed(late):
                    receiver.feed(event)
                moved = True
            if not moved:
                return
        raise AssertionError("the mesh does not come to rest")

    def run(self, seconds: float) -> None:
        """Lets time pass, stopping at every timer."""
        end_ms = self.now_ms + round(seconds * 1000)
        self.settle()
        while True:
            upcoming = [at for m in self.members.values() if (at := m.next_timer_ms()) is not None and at <= end_ms]
            if not upcoming:
                break
            self.now_ms = max(self.now_ms, min(upcoming))
            self.settle()
        self.now_ms = end_ms

    def check(self) -> None:
        """The laws that every fixture ends with: credits conserved in every book that knows all, disk equals memory."""
        for member in self.members.values():
            totals = member.node.rooms.books.book.conservation()
            assert totals.conserved, (member.name, totals)
            self._check_disk(member)

    def _check_disk(self, member: Member) -> None:
        """The chains on the disk, judged anew from their first entries, give the heads and balances in memory."""
        live = member.node.rooms.books.book
        read = Book(live.terms, live.mesh, verify)
        for row in member.store.load_all("entries"):
            read.apply(row[-1], FOREVER_MS - 10**6)
        read.drain(FOREVER_MS - 10**6)
        for account in live.accounts():
            assert read.head(account) == live.head(account), (member.name, account.hex())
            assert read.view(account).available_ucr == live.view(account).available_ucr or live.proof(account)
