"""Memberships that are over: removing a member, telling the mesh, and having nothing more to do with who is out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from clawnet import limits
from clawnet.errors import ClawnetError, DataError, NotPermittedError
from clawnet.identity.keys import KeyPair, peer_id_of
from clawnet.identity.revocations import KEEPS_MAX, WORDS, MeshKey, Revocation, node_in, owners_in, sign_revocation
from clawnet.mesh.ends import Ends, Learned
from clawnet.mesh.roster import PeerRecord
from clawnet.node.context import Context
from clawnet.wire.events import Hangup, MessageIn, PeerDown
from clawnet.wire.messages import Membership

if TYPE_CHECKING:
    from clawnet.node.kernel import Rooms

ANSWER_MESSAGES_MAX = 32


class Removals:
    """The statements of mesh/ends.py on the disk and on their way, and what follows from a new one."""

    def __init__(self, ctx: Context, rooms: Rooms) -> None:
        self._ctx = ctx
        self._rooms = rooms
        facts = rooms.members.facts
        self.ends = Ends(facts.charter, facts.mesh)
        self.own = ""
        """Why this node's own membership is over; "" while it is not."""
        self._gone: set[str] = set()
        self._answered_ms: dict[str, int] = {}
        self._asked_ms: dict[str, int] = {}

    # --- start-up

    def load(self, statement: bytes) -> None:
        """Takes in a stored statement."""
        try:
            self.ends.learn(statement, None)
        except ClawnetError as error:
            self._ctx.log("error", "membership.unreadable", reason=error.message)

    def start(self) -> None:
        """All is loaded: who is out already is known as such, this node included."""
        self._judge_own()
        self._gone = {record.peer for record in self._rooms.members.records.values() if record.ended}

    # --- what others ask

    def reason(self, chain: list[bytes]) -> str:
        """Why the membership that this verified chain proves is over, as a sentence; "" while it is not."""
        cause = self.ends.reason(chain)
        return WORDS[cause] if cause else ""

    def silent(self, peer: str) -> bool:
        """Whether what this peer still says is not heard: its membership is over."""
        return peer in self._gone

    def check_joiner(self, node: bytes, owner: bytes) -> None:
        """A key whose membership ended does not come back, whoever invites it. Raises NotPermittedError."""
        if self.ends.ended("node", node) or self.ends.ended("owner", owner):
            raise NotPermittedError("the membership of this key is over; join from a new --home")

    def warnings(self) -> list[str]:
        """What the owner should know: that this node is out."""
        return [f"this node is no member any longer: {WORDS[self.own]}"] if self.own else []

    # --- removing

    def remove(self, call: int, params: dict[str, Any]) -> None:
        """The founder ends a membership: of an owner with all its machines, or of one machine."""
        key = self._founder()
        rooms, ctx = self._rooms, self._ctx
        record = rooms.members.records[rooms.calls.named(params)]
        if record.ended:
            raise DataError(f"{record.shown} is no member any longer: {WORDS[record.ended]}")
        whole = record.owner != key.public and not params.get("machine")
        kept = self._invited_by(record.owner) if whole else []
        if len(kept) > KEEPS_MAX:
            raise DataError(
                f"{record.shown} has invited {len(kept)} owners that are still members; a removal can keep {KEEPS_MAX}",
                hint="remove some of those first",
            )
        revocation = Revocation(
            rooms.members.facts.mesh,
            key.public,
            "owner" if whole else "node",
            record.owner if whole else node_in(record.certificates).node,
            ctx.now,
            "removed",
            tuple(kept),
        )
        out = [one for one in rooms.members.records.values() if one.owner == record.owner] if whole else [record]
        machines = [rooms.members.party(one.peer) for one in out if not one.ended]
        party = rooms.members.party(record.peer)
        stay = [rooms.members.party(one.peer) for one in rooms.members.records.values() if one.owner in kept]
        self.publish([sign_revocation(revocation, key)])
        rooms.mesh_keys.rotate()
        ctx.reply(
            call,
            {
                "peer": party,
                "removed": "owner" if whole else "machine",
                "machines": machines,
                "kept": stay,
                "key_epoch": self.ends.epoch,
                "told": len(ctx.links),
            },
        )

    def _founder(self) -> KeyPair:
        members, owner = self._rooms.members, self._ctx.ports.owner
        founder = members.facts.charter.founder
        if owner is not None and owner.public == founder:
            return owner
        names = [one.shown for one in members.records.values() if one.owner == founder and not one.ended]
        who = " or ".join(sorted(names)[:4]) or "the machine that founded it"
        raise NotPermittedError(
            f"only the founder of this mesh may remove members; the founder's machine is {who}",
            hint="clawnet peer ban refuses a peer on this node alone",
        )

    def _invited_by(self, owner: bytes) -> list[bytes]:
        """Owners certified by this one who are members now, those known longest first."""
        found: dict[bytes, None] = {}
        for record in sorted(self._rooms.members.records.values(), key=lambda one: (one.first_ms, one.peer)):
            if len(record.certificates) < 3 or record.ended or record.owner == owner:
                continue
            if any(link.issuer == owner for link in owners_in(record.certificates)):
                found[record.owner] = None
        return list(found)

    # --- telling

    def publish(self, statements: list[bytes]) -> None:
        """Statements of this node's own making: stored, obeyed, and told to all that are connected."""
        news = [(one, self.ends.learn(one, self._ctx.now)) for one in statements]
        for statement, learned in news:
            if learned is not None:
                self._stored(statement, learned)
        for at in range(0, len(statements), limits.MEMBERSHIP_MESSAGE_STATEMENTS):
            self._pass_on(statements[at : at + limits.MEMBERSHIP_MESSAGE_STATEMENTS], "")
        for _, learned in news:
            if learned is not None:
                self._obey(learned.body)
        self._ctx.durable()

    def peer_up(self, peer: str, inbound: bool) -> None:
        """Whoever dialled sums up what it holds; the other answers with what it lacks, and asks for what it has more.

        (Who was dialled may have been told of a removal that nobody else here knows: it asks by itself in a minute.)
        """
        if not inbound:
            self._ask(peer)

    def _ask(self, peer: str) -> None:
        self._asked_ms[peer] = self._ctx.now
        self._ctx.send(peer, Membership([], self.ends.digest()))

    def peer_down(self, peer: str) -> None:
        """A new connection is answered at once."""
        self._answered_ms.pop(peer, None)
        self._asked_ms.pop(peer, None)

    def keep_up(self) -> None:
        """Every minute one random peer is asked, for what was lost on the way."""
        links = list(self._ctx.links)
        if links:
            self._ask(links[self._rooms.members.pick(len(links))])

    def told(self, event: MessageIn, message: Membership) -> None:
        """Statements from a member, or its question for those it lacks. Raises NotPermittedError for bad ones."""
        if not message.statements:
            self._answer(event.peer, message.digest)
            return
        fresh: dict[bytes, Learned] = {}
        refused: NotPermittedError | None = None
        for statement in message.statements:
            try:
                learned = self.ends.learn(statement, self._ctx.now)
            except NotPermittedError as error:
                refused = error
                continue
            if learned is not None:
                fresh[statement] = learned
                self._stored(statement, learned)
        if fresh:
            self._pass_on(list(fresh), event.peer)
            for learned in fresh.values():
                self._obey(learned.body)
            self._ctx.durable()
        if refused is not None:
            raise refused

    def _answer(self, peer: str, digest: list[int]) -> None:
        ctx = self._ctx
        if ctx.now - self._answered_ms.get(peer, -limits.MEMBERSHIP_ANSWER_MS) < limits.MEMBERSHIP_ANSWER_MS:
            return
        if self.ends.agrees(digest):
            return
        lacking = self.ends.differing(digest)
        self._answered_ms[peer] = ctx.now
        at_most = ANSWER_MESSAGES_MAX * limits.MEMBERSHIP_MESSAGE_STATEMENTS
        start = self._rooms.members.pick(len(lacking)) if len(lacking) > at_most else 0
        part = [*lacking[start:], *lacking[:start]][:at_most]
        for at in range(0, len(part), limits.MEMBERSHIP_MESSAGE_STATEMENTS):
            ctx.send(peer, Membership(part[at : at + limits.MEMBERSHIP_MESSAGE_STATEMENTS]))
        if ctx.now - self._asked_ms.get(peer, -limits.MEMBERSHIP_ANSWER_MS) >= limits.MEMBERSHIP_ANSWER_MS:
            self._ask(peer)

    def _pass_on(self, statements: list[bytes], sender: str) -> None:
        message = Membership(statements)
        for peer in self._ctx.links:
            if peer != sender:
                self._ctx.send(peer, message)

    # --- obeying

    def _stored(self, statement: bytes, learned: Learned) -> None:
        self._ctx.put("statements", learned.hash, statement)
        for name in learned.needless:
            self._ctx.delete("statements", name)

    def _obey(self, body: Revocation | MeshKey) -> None:
        if isinstance(body, MeshKey):
            self._rooms.mesh_keys.adopt()
        else:
            self._revoked(body)

    def _revoked(self, body: Revocation) -> None:
        key = peer_id_of(body.key) if body.subject == "node" else body.key.hex()[:16]
        self._ctx.log("security", "membership.revoked", subject=body.subject, key=key, cause=body.cause)
        self._ctx.count("memberships_ended_total", body.cause)
        for record in list(self._rooms.members.records.values()):
            if record.ended or not record.certificates:
                continue
            if body.subject == "node" or body.key == record.owner or len(record.certificates) > 2:
                cause = self.ends.reason(record.certificates)
                if cause:
                    self._part_with(record, cause)
        self._judge_own()

    def _judge_own(self) -> None:
        cause = self.ends.reason(self._rooms.members.facts.certificates)
        if cause and not self.own:
            self.own = cause
            self._ctx.log("security", "membership.over", cause=cause)

    def _part_with(self, record: PeerRecord, cause: str) -> None:
        """No link, no work, no card: as if the peer had gone for good. What is on the chains stays on them."""
        ctx, rooms = self._ctx, self._rooms
        peer = record.peer
        rooms.members.down(PeerDown(peer, WORDS[cause]))
        self._gone.add(peer)
        ctx.out.append(Hangup(peer, WORDS[cause]))
        rooms.members.index.remove(peer)
        rooms.jobs.stop_for(record.account, own=True)
        rooms.throwaways.ended(record.account)
        rooms.books.chains.restore.answered(peer)
        record.ended = cause
        if cause == "removed":
            rooms.invites.forget_redeemer(record.account)
            record.card = record.signature = b""
            rooms.members.save(record)
        else:
            rooms.members.forget(record)
